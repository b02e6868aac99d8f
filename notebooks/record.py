"""Evaluates a model folder on every task and writes records/evaluation-<folder>.csv, under the command and the versions that made it.

    python notebooks/record.py <folder of a model> <folder with a folder a task> [--limit 100] [--shots 5]

Exams get the shots, the other tasks none (not all of them have a split to take shots from). What was scored before is taken over from
runs/evaluation, so that a stopped run goes on.
"""
import argparse
from pathlib import Path

import pandas

import rlhfkit as rk

HERE = Path(__file__).resolve().parent
EXAMS = ("ceval", "cmmlu", "mmlu")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("data_dir")
    parser.add_argument("--limit", type=int, default=0, help="items a task, spread evenly over its file; 0 for all")
    parser.add_argument("--shots", type=int, default=5, help="of the exams")
    parser.add_argument("--leave-out", nargs="*", default=[], help="tasks; IFLYTEK asks 119 choices an item")
    given = parser.parse_args()
    name, tables = Path(given.model).resolve().name, []
    for tasks, shots in (EXAMS, given.shots), ([task for task in rk.TASKS if not task.startswith((*EXAMS, "couplets"))], 0):
        asked = [task for task in tasks if task not in given.leave_out]
        table = rk.evaluate(given.model, asked, given.data_dir, shots=shots, limit=given.limit or None, normalised=True,
                            output_dir=HERE.parent / f"runs/evaluation/{name}-{shots}-shot")
        tables.append(table.assign(shots=shots, cut=table["task"].map(table.attrs["cut"])))
    rows = pandas.concat(tables).round(4).to_csv(index=False)
    command = f"python notebooks/record.py <{name}> <tasks> --limit {given.limit} --shots {given.shots}"
    command += f" --leave-out {' '.join(given.leave_out)}" * bool(given.leave_out)
    path = HERE / f"records/evaluation-{name}.csv"
    path.write_text(f"# {command}\n# {rk.versions()}\n{rows}", encoding="utf-8")
    print(f"{path.relative_to(HERE.parent)}: {len(tables[0]) + len(tables[1])} rows")


if __name__ == "__main__":
    main()
