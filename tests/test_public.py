"""What others build on: public names and signatures, a light import, and the habits that keep the library readable."""
import ast
import inspect
import re
import subprocess
import sys

import pytest
from conftest import PROJECT

import rlhfkit as rk

FILES = sorted((PROJECT / "rlhfkit").rglob("*.py"))
# The arguments that callers may count on, in order; a function may have more, with defaults.
SIGNATURES = """
build(sources=None, raw_dir=None, seed=0)
read_records(path)
write_records(records, path)
pairs(record)
split(records, dev_fraction, seed)
load_tokenizer(path, family=None)
load_model(path, family=None, dtype=None)
family_of(path)
tiny(output_dir, family="pangu", seed=0)
show(row, tokenizer)
launch(config, num_processes=0, hostfile=None, detach=False)
generate(model_path, prompts, max_new_tokens=64, temperature=0.0, top_k=0, top_p=1.0, seed=0)
score(reward_path, records)
gold(prompt, answer)
evaluate(model, tasks, data_dir=None, shots=0, limit=None, split=None, output_dir=None)
perplexity(model, records)
compare(result_a, result_b)
report_card(reward_path, records)
doctor(result)
attach(output_dir)
stop(output_dir)
versions()
patch_jieba()
unpatch_jieba()
sweep(config, num_processes=0, **lists)
will_it_fit(config, gpu_gib, num_gpus, host_gib=None)
""".split("\n")[1:-1]
CLASSES = ["Record", "Answer", "Family", "Task", "Result", "Pretrain", "SFT", "Reward", "PPO", "DPO"]
PLOTS = ["plot_history", "plot_margins", "plot_scores", "plot_memory"]
FAMILY_NAME = re.compile(r"""(==|\bin|startswith\()\s*[\["'(]+(pangu|glm|chatglm[23]?|baichuan|qwen|llama)["']""")


def test_importing_the_kit_imports_no_torch():
    code = "import sys, rlhfkit; print(sorted({'torch', 'transformers', 'pandas', 'numpy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PROJECT)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name", sorted({*rk.__all__, *CLASSES, *PLOTS}))
def test_every_public_name_is_there_and_explains_itself(name):
    found = getattr(rk, name)
    assert name in dir(rk)
    assert not callable(found) or found.__doc__, f"rk.{name} has no docstring"


def test_an_unknown_name_is_an_error_that_lists_the_public_ones():
    with pytest.raises(AttributeError, match="no attribute 'lunch'; public names: .*launch"):
        rk.lunch


@pytest.mark.parametrize("line", SIGNATURES, ids=lambda line: line.partition("(")[0])
def test_public_functions_take_the_arguments_that_are_promised(line):
    scope = {}
    exec(f"def {line}: pass", scope)
    name = line.partition("(")[0]
    promised = list(inspect.signature(scope[name]).parameters.values())
    actual = list(inspect.signature(getattr(rk, name)).parameters.values())
    assert list(map(str, actual[:len(promised)])) == list(map(str, promised))
    assert all(p.default is not p.empty for p in actual[len(promised):])


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PROJECT).as_posix())
def test_a_file_stays_under_300_lines_and_a_function_under_50(path):
    source = path.read_text(encoding="utf-8")
    assert len(source.splitlines()) < 300
    assert max((len(line) for line in source.splitlines()), default=0) <= 150
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno - node.lineno + 1 < 50, f"{node.name} is too long"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PROJECT).as_posix())
def test_nothing_outside_families_models_and_tokenizers_asks_for_a_familys_name(path):
    if path.name != "families.py" and path.parent.name not in ("models", "tokenizers"):
        assert not FAMILY_NAME.search(path.read_text(encoding="utf-8"))


def test_the_library_stays_within_its_lines():
    assert sum(len(path.read_text(encoding="utf-8").splitlines()) for path in FILES) <= 11400
