"""The README's table of families, from what the tests ran.

    pytest tests/test_originals.py tests/test_every_family.py && pytest -m slow tests/test_family_stages.py
    python tests/benchmarks/support.py [--write]

Tests marked `supports` leave what passed in runs/support.json; a cell is empty where nothing ran and "no" where a test failed.
"""
import json
import re
import sys
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]
COLUMNS = ("load", "tokenizer", "pretrain", "SFT", "reward", "DPO", "PPO", "evaluate", "packing", "static cache", "LoRA", "ZeRO-3")


def main():
    found = json.loads((PROJECT / "runs/support.json").read_text(encoding="utf-8"))
    found["baichuan"] = found.get("baichuan", {}) | found.pop("baichuan_7b", {})            # the fixture is of the 7B
    order = [name for name in ("pangu", "glm", "chatglm", "chatglm2", "chatglm3", "baichuan", "baichuan_13b", "qwen", "internlm", "llama")
             if name in found]
    lines = [f"| family | {' | '.join(COLUMNS)} | parity |", "|---" * (len(COLUMNS) + 2) + "|"]
    for name in order:
        cells = [{True: "✓", False: "no", None: ""}[found[name].get(column)] for column in COLUMNS]
        parity = found[name].get("parity")
        lines.append(f"| {name} | {' | '.join(cells)} | {'–' if parity is None else f'{parity:.1e}'} |")
    table = "\n".join(lines)
    print(table)
    if "--write" in sys.argv:
        for file in (PROJECT / "README.md", PROJECT / "README.zh.md"):
            text = file.read_text(encoding="utf-8")
            file.write_text(re.sub(r"(<!-- families -->\n).*?(<!-- /families -->)", lambda m: f"{m[1]}{table}\n{m[2]}", text, flags=re.DOTALL),
                            encoding="utf-8")


if __name__ == "__main__":
    main()
