"""Runs the notebooks from a shell.

`refresh` executes all of them and stores their outputs in place; `demo` executes 01 to 08 as batch runs with papermill
into runs/demo, or with --data and --vocab into runs/demo-data, and closes with a table; `seeds` repeats 01 to 06.
Nothing is decided here but where outputs go and, for --data, how long each stage trains.
"""
import argparse
import ast
import csv
import hashlib
import json
import logging
import os
import re
import shutil
import sys
import time
from pathlib import Path

import nbformat
import papermill
from nbclient import NotebookClient
from nbclient.exceptions import DeadKernelError
from papermill.exceptions import PapermillExecutionError

import rlhfkit as rk

HERE = Path(__file__).resolve().parent
RUNS = HERE.parent / "runs"
DEFAULT = "../runs/tiny"                    # where the notebooks write when nobody says otherwise
KERNELSPEC = {"name": "python3", "display_name": "Python 3", "language": "python"}
QUIET = ["--IPKernelApp.log_level=50"]      # no note on each kernel's start and end
PROGRESS = re.compile(r"\r|\d+%\|.*\|")    # a line that a progress bar wrote

# Other parameters with --data: some 20,000 real records and a vocabulary of 40,000 pieces in 20 minutes on two cores.
DATA = {
    "01_data": dict(pair_sources=""),
    "02_pretrain": dict(batch_size=4, max_steps=250, eval_steps=0),
    "03_sft": dict(batch_size=4, max_steps=250, eval_steps=0),
    "04_reward": dict(batch_size=8, max_steps=150, eval_steps=0),
    "05_ppo": dict(batch_size=32, mini_batch_size=16, max_steps=15, eval_steps=0),
    "06_dpo": dict(batch_size=8, max_steps=50, eval_steps=0, data_path="../runs/demo-data/data/pairs"),
}

# What a stage is judged by: the figure, and its names in the metrics of a result before and after.
JUDGED = {
    "pretrain": ("held-out loss", "eval_loss_before", "eval_loss"),
    "sft": ("held-out loss", "eval_loss_before", "eval_loss"),
    "reward": ("pairs ranked right", "eval_accuracy_before", "eval_accuracy"),
    "ppo": ("reward score", "eval_score_before", "eval_score"),
    "dpo": ("held-out loss", "eval_loss_before", "eval_loss"),
}


def refresh():
    """Execute all notebooks in order, from an empty runs/tiny, and store the outputs; one that fails stays as it was."""
    shutil.rmtree(RUNS / "tiny", ignore_errors=True)
    for path in sorted(HERE.glob("[0-9]*.ipynb")):
        start, notebook = time.perf_counter(), nbformat.read(path, as_version=4)
        NotebookClient(notebook, timeout=None, kernel_name="python3", resources={"metadata": {"path": str(HERE)}},
                       extra_arguments=QUIET).execute()
        beside = path.with_suffix(".partial")
        nbformat.write(cleaned(notebook), beside)
        os.replace(beside, path)
        print(f"{path.stem:<14}{time.perf_counter() - start:6.0f} s  {path.stat().st_size / 1024:.0f} KiB", flush=True)


def cleaned(notebook):
    """The notebook with its outputs and counts, but nothing that changes with the run or the machine: times, widgets,
    progress bars, absolute paths."""
    notebook.metadata = {"kernelspec": KERNELSPEC}
    for cell in notebook.cells:
        cell.metadata = {"tags": cell.metadata["tags"]} if cell.metadata.get("tags") else {}
        if cell.cell_type == "code":
            cell.outputs = _joined(cell.outputs)
            for output in cell.outputs:
                if "metadata" in output:
                    output.metadata = {}
                for part in (output, output.get("data", {})):
                    part.update({key: _relative(text) for key, text in part.items() if key.startswith("text")})
    return notebook


def demo(data="", vocab=""):
    """Run notebooks 01 to 08 into runs/demo (runs/demo-data with data or vocab) -> True when all went through.
    What is finished there with the same parameters is read, not trained again; with others the folder is made anew."""
    folder = RUNS / ("demo-data" if data or vocab else "demo")
    plan = planned(folder.name, data, vocab)
    _claim(folder, {"parameters": plan, "data": _fingerprint(HERE.parent / "rlhfkit", data, vocab)})
    rows = []
    for name, parameters in plan.items():
        print(f"{name:<14}", end="", flush=True)
        start, executed = time.perf_counter(), folder / f"{name}.ipynb"
        try:
            papermill.execute_notebook(HERE / f"{name}.ipynb", executed, parameters, cwd=HERE, progress_bar=False,
                                       extra_arguments=QUIET)
        except (PapermillExecutionError, DeadKernelError) as error:
            print(f"failed {_where(error)}\nthe executed notebook: {_shown(executed)}", flush=True)
            return False
        seconds = time.perf_counter() - start
        rows.append(summary(name, parameters, seconds) | {"look at": _shown(executed)})
        print(f"{seconds:6.0f} s  {rows[-1]['line']}", flush=True)
    print("\n" + table(rows))
    return True


def seeds(numbers):
    """Run notebooks 01 to 06 once a seed into runs/seeds/<seed> (a finished stage is read) and write the gold scores, with the gains over
    SFT and the lower ends of their 95 % intervals (paired over the prompts), to records/seeds.json."""
    rows = []
    for seed in numbers:
        folder, results = RUNS / "seeds" / str(seed), {}
        folder.mkdir(parents=True, exist_ok=True)
        for name, parameters in list(planned(f"seeds/{seed}").items())[:6]:
            output_dir = HERE / parameters["output_dir"]
            if not (output_dir / "result.json").is_file() and not (output_dir / "sft/train.jsonl").is_file():
                papermill.execute_notebook(HERE / f"{name}.ipynb", folder / f"{name}.ipynb", parameters | {"seed": seed}, cwd=HERE,
                                           progress_bar=False, extra_arguments=QUIET)
            results[output_dir.name] = output_dir
        rows.append({"seed": seed} | gains(results))
        print(rows[-1], flush=True)
    command = f"python notebooks/run.py seeds {' '.join(map(str, numbers))}"
    (HERE / "records/seeds.json").write_text(json.dumps({"command": command, "rows": rows}, indent=1) + "\n", encoding="utf-8")


def gains(results):
    """The figures of one seed from the run folders of its stages."""
    row = {}
    for stage in ("sft", "reward", "ppo", "dpo"):
        result = rk.Result.load(results[stage])
        if stage == "reward":
            row["reward accuracy"] = round(result.metrics["eval_accuracy"], 3)
            continue
        row[f"{stage} gold"] = round(result.metrics["gold"], 3)
        if stage != "sft":
            first, last = ([s["gold"] for s in result.samples if (s["step"] == 0) == before and "gold" in s] for before in (True, False))
            difference = rk.compare(first, last).iloc[0]
            row |= {f"{stage} gain": round(float(difference.difference), 3), f"{stage} low": round(float(difference.low), 3)}
        if stage == "ppo":
            row["ppo kl"] = round(result.metrics["kl"], 2)
    return row


def planned(target, data="", vocab=""):
    """The parameters of each notebook, {name: {parameter: value}}: its defaults, with DEFAULT replaced by
    ../runs/<target>, and what data and vocab ask for. Raises ValueError for a parameter that the notebook lacks."""
    plan = {}
    for path in sorted(HERE.glob("0[1-9]*.ipynb")):
        known = papermill.inspect_notebook(str(path))
        defaults = {name: ast.literal_eval(parameter["default"]) for name, parameter in known.items()}
        given = dict(DATA.get(path.stem, {})) if data or vocab else {}
        if path.stem == "01_data" and data:
            given["sources" if Path(data).is_file() else "raw_dir"] = str(Path(data).resolve())
        if vocab and ("vocab_path" in known or path.stem == "01_data"):
            given["vocab_path"] = str(Path(vocab).resolve())
        wrong = sorted(set(given) - set(known))
        if wrong:
            raise ValueError(f"{path.name} has no parameter {', '.join(wrong)}; it has: {', '.join(known)}")
        plan[path.stem] = _moved(defaults, f"../runs/{target}") | given
    if not plan:
        raise ValueError(f"{HERE} holds no notebook 01 to 09")
    return plan


def summary(name, parameters, seconds):
    """A row of the closing table, and `line`, the figure that matters, from what a notebook left in its output_dir."""
    folder = HERE / parameters["output_dir"]
    row = dict(stage=name, figure="", before=None, after=None, gold_before=None, gold=None, seconds=seconds)
    if (folder / "result.json").is_file():
        result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        metrics, (figure, before, after) = result["metrics"], JUDGED[result["stage"]]
        row |= dict(figure=figure, before=metrics.get(before), after=metrics.get(after), gold=metrics.get("gold"),
                    gold_before=metrics.get("gold_before"), seconds=metrics.get("seconds", seconds))
    elif (folder / "table.csv").is_file():
        with open(folder / "table.csv", encoding="utf-8", newline="") as f:
            row |= _of_table(list(csv.DictReader(f)), parameters)
    elif (folder / "sft/train.jsonl").is_file():
        with open(folder / "sft/train.jsonl", "rb") as f:
            row |= dict(figure="records to train on", after=sum(1 for _ in f))
    parts = [("gold score", row["gold_before"], row["gold"]), (row["figure"], row["before"], row["after"])]
    row["line"] = ", ".join(f"{what} " + " → ".join(_number(x) for x in (before, after) if x is not None)
                            for what, before, after in parts if after is not None)
    return row


def table(rows):
    """The rows of `summary` as aligned text."""
    cells = [("stage", "figure", "before", "after", "gold before", "gold after", "seconds", "look at")]
    for row in rows:
        numbers = [_number(row[key]) for key in ("before", "after", "gold_before", "gold")]
        cells.append((row["stage"], row["figure"], *numbers, f"{row['seconds']:.0f}", row["look at"]))
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    sides = [str.ljust] * 2 + [str.rjust] * 5 + [str.ljust]
    lines = ["  ".join(side(text, width) for side, text, width in zip(sides, line, widths)) for line in cells]
    return "\n".join(line.rstrip() for line in lines)


def _of_table(rows, parameters):
    """Of a table.csv: the best speed of a sweep; or of an evaluation the couplets, before and after RLHF."""
    speeds = [float(row["tokens_per_second"]) for row in rows if row.get("tokens_per_second")]
    if "tokens_per_second" in rows[0]:
        return dict(figure="tokens a second, best run", after=max(speeds, default=None))
    models = [parameters.get("baseline"), parameters.get("candidate")]
    golds = [float(row[model]) for row in rows if row["task"] == "couplets" for model in models if row.get(model)]
    return dict(figure=f"task couplets, {' and '.join(models)}") | dict(zip(("gold_before", "gold"), golds))


def _moved(value, target):
    """The value with DEFAULT replaced by `target` in every text that starts with it."""
    if isinstance(value, dict):
        return {key: _moved(item, target) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_moved(item, target) for item in value]
    return value.replace(DEFAULT, target) if isinstance(value, str) and value.startswith(DEFAULT) else value


def _claim(folder, made_from):
    """Make the demo's folder, anew when it was made from other parameters or data; ValueError for one no demo made."""
    file = folder / "demo.json"
    if file.is_file() and json.loads(file.read_text(encoding="utf-8")) != made_from:
        print(f"{_shown(folder)} was made with other parameters or data: it is made anew")
        shutil.rmtree(folder)
    elif folder.exists() and not file.is_file() and any(folder.iterdir()):
        raise ValueError(f"{folder} holds files that no demo made; move them or delete them")
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(made_from, ensure_ascii=False, indent=1), encoding="utf-8")


def _fingerprint(*paths):
    """A hash of names, sizes and times of all files below the paths."""
    digest = hashlib.sha256()
    for path in (Path(p) for p in paths if p):
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_file() and "__pycache__" not in file.parts:
                digest.update(f"{file} {file.stat().st_size} {file.stat().st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]


def _joined(outputs):
    """Stream outputs of one name in one piece, however they came, without the lines of progress bars."""
    joined = []
    for output in outputs:
        if output.output_type == "stream" and joined and joined[-1].get("name") == output.name:
            joined[-1].text += output.text
        else:
            joined.append(output)
    for output in joined:
        if output.output_type == "stream":
            output.text = "".join(line for line in output.text.splitlines(keepends=True) if not PROGRESS.search(line))
    return [output for output in joined if output.output_type != "stream" or output.text.strip()]


def _relative(text):
    text = re.sub(r"\S*/ipykernel_\d+/\d+\.py", "<cell>", text)
    return text.replace(str(HERE) + "/", "").replace(str(HERE.parent), "..")


def _where(error):
    if isinstance(error, PapermillExecutionError):
        first_line = error.source.strip().splitlines()[0]
        return f"in cell In [{error.exec_count}], `{first_line}`: {error.ename}: {error.evalue}"
    return f"with its kernel: {error}"


def _number(value):
    return "–" if value is None else f"{value:,.0f}" if isinstance(value, int) or abs(value) >= 100 else f"{value:.3f}"


def _shown(path):
    return str(path.relative_to(HERE.parent))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("refresh", help="execute all notebooks and store their outputs")
    own = commands.add_parser("demo", help="notebooks 01 to 08 as batch runs")
    own.add_argument("--data", default="", help="a folder of raw corpora, or a file of your own")
    own.add_argument("--vocab", default="", help="a sentencepiece model")
    repeat = commands.add_parser("seeds", help="01 to 06 once a seed, gold scores into records/seeds.json")
    repeat.add_argument("numbers", type=int, nargs="+", help="the seeds")
    given = parser.parse_args()
    logging.getLogger("papermill").setLevel(logging.ERROR)
    if given.command == "refresh":
        return refresh()
    if given.command == "seeds":
        return seeds(given.numbers)
    if given.data and not Path(given.data).exists():
        parser.error(f"--data {given.data} is not there; give the folder of the raw corpora, or a file that rk.read_records reads")
    if given.vocab and not Path(given.vocab).is_file():
        parser.error(f"--vocab {given.vocab} is no file; give a sentencepiece model such as vocab.model")
    try:
        sys.exit(0 if demo(given.data, given.vocab) else 1)
    except ValueError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
