"""Our figures in the form of the 2023 kit's published tables, beside them; samples of stages side by side; one HTML page.

tables/: the published cells as printed, and notes.csv, which of them are noise and why (its scorer applied softmax twice
to unshifted tokens and drew shots from the scored file). C-Eval's averages are means of subjects, MMLU's are over items.
"""
from html import escape
from os import fspath
from pathlib import Path

import numpy as np
import pandas as pd

from rlhfkit.configs import Result
from rlhfkit.evaluation.log import read_items, write_whole
from rlhfkit.evaluation.report import tabulate

TABLES = Path(__file__).parent / "tables"
SHOTS = {0: "zero", 1: "one"}
STYLE = ("body{font-family:sans-serif;margin:2em}table{border-collapse:collapse}td,th{border:1px solid #bbb;padding:.2em .6em;"
         "text-align:left;vertical-align:top;white-space:pre-wrap}")


def leaderboard(*output_dirs, name="clue"):
    """The published table `clue`, `ceval` or `mmlu` with rows for our evaluations in the same form -> DataFrame.

    output_dirs: of `rk.evaluate`; a folder's name is the model's. The columns of the published table (`ceval`, `mmlu`: per
    cent, best first; `clue`: shares), then source (published 2023 or this kit) and note: what is known against a
    published figure; split, items, interval and verdict of ours. ValueError where a folder has no score of that table.
    """
    if name not in ("clue", "ceval", "mmlu"):
        raise ValueError(f"name is {name!r}; the published tables are clue, ceval and mmlu")
    published = pd.read_csv(TABLES / f"{name}.csv").assign(source="published 2023")
    notes = pd.read_csv(TABLES / "notes.csv", keep_default_na=False)
    notes = {row.row: row.note for row in notes[notes.table == name].itertuples()}
    published["note"] = [notes.get(row, notes.get("", "")) for row in published["task" if name == "clue" else "model"]]
    rows = []
    for folder in output_dirs:
        items = [i for i in read_items(folder) if not (i["gold"] is None or "split" not in i)]
        made = _clue(items, published) if name == "clue" else _exam(items, name, published.columns)
        if not made:
            raise ValueError(f"{folder} has no scored items of {name}; evaluate its tasks there, on a split with labels")
        rows += [{"model": Path(folder).resolve().name, "source": "this kit"} | row for row in made]
    table = pd.concat([published, pd.DataFrame(rows, columns=published.columns)]) if rows else published
    order = dict(by="task", key=lambda c: c.map(list(dict.fromkeys(published.task)).index)) if name == "clue" else dict(
        by="average", ascending=False)
    return table.sort_values(**order, kind="stable", ignore_index=True)


def samples_table(*results, n=10):
    """What stages answer to the same prompts -> DataFrame: prompt, then a column for each Result (or its folder), named as
    the folder; the first answer of the last step to each of the first n prompts, empty where a stage was not asked it."""
    results = [r if hasattr(r, "samples") else Result.load(r) for r in results]
    names = [Path(r.output_dir).name for r in results]
    names = names if len(set(names)) == len(names) else [r.output_dir for r in results]
    columns = {}
    for name, result in zip(names, results):
        last, columns[name] = max((s["step"] for s in result.samples), default=0), {}
        for s in result.samples:
            if s["step"] == last:
                columns[name].setdefault(s["prompt"], s["answer"])
    prompts = list(dict.fromkeys(prompt for answers in columns.values() for prompt in answers))[:n]
    if not prompts:
        raise ValueError(f"{', '.join(names) or 'no result'} holds no samples; give Results of stages that sample")
    return pd.DataFrame([{"prompt": p} | {name: answers.get(p, "") for name, answers in columns.items()} for p in prompts])


def write_page(path, tables, title="rlhfkit"):
    """{heading: DataFrame} -> one HTML file without scripts, all text escaped; written beside and renamed. Returns path."""
    parts = [f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>{escape(title)}</title><style>{STYLE}</style>',
             f"<h1>{escape(title)}</h1>"]
    with pd.option_context("display.max_colwidth", None):       # else pandas cuts texts at 50 characters
        parts += [f"<h2>{escape(heading)}</h2>\n" + table.to_html(index=False, na_rep="", border=0, float_format="{:.4g}".format)
                  for heading, table in tables.items()]
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, "\n".join(parts) + "\n</html>\n")
    return fspath(path)


def _clue(items, published):
    """A row for each published task that has items, with the one metric that was published."""
    metrics, rows = dict(zip(published.task, published.metric)), []
    for task in [t for t in dict.fromkeys(item["task"] for item in items) if t.upper() in metrics]:
        part, metric = [item for item in items if item["task"] == task], metrics[task.upper()]
        table = tabulate(part)
        [total] = table[(table.task == task) & (table.metric == {"acc": "accuracy"}.get(metric, metric))].itertuples()
        rows.append({"task": task.upper(), "method": "generation" if part[0]["scoring"] == "generation" else "log-likelihood",
                     "metric": metric, "shots": SHOTS.get(part[0]["shots"], "few"), "score": total.score,
                     "note": _note(part, total, 1)})
    return rows


def _exam(items, task, columns):
    """One row: averages in per cent, of C-Eval over subjects, of MMLU over items; empty for a category without items."""
    items = [item for item in items if item["task"] == task]
    if not items:
        return []
    subjects = len({item["subject"] for item in items})
    parts = {"average": items, "average_hard": [item for item in items if "hard" in item["groups"]]}
    for item in items:
        key = item["category"].lower().replace(" ", "_")        # MMLU says Social Sciences, the column social_science
        parts.setdefault(next((c for c in columns if key.startswith(c)), key), []).append(item)
    row = {name: _average(part, task == "ceval") for name, part in parts.items() if name in columns}
    table = tabulate(items)
    [total] = table[table.task == (f"{task}/macro" if task == "ceval" and subjects > 1 else task)].itertuples()
    return [row | {"note": f"{subjects} subjects, {items[0]['shots']}-shot, {_note(items, total, 100)}"}]


def _average(items, of_subjects):
    if not items:
        return np.nan
    frame = pd.DataFrame({"subject": [i["subject"] for i in items], "share": [i["credit"]["accuracy"] for i in items]})
    return 100 * float(frame.groupby("subject").share.mean().mean() if of_subjects else frame.share.mean())


def _note(items, total, scale):
    verdict = "; inside chance" if total.verdict else ""
    interval = f"95 % interval {scale * total.low:.3g} to {scale * total.high:.3g}"
    return f"{items[0]['split']}, {len(items):,} items, {interval}{verdict}"
