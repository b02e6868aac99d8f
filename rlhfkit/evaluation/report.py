"""What an evaluation says: the table, its files, the paired comparison of two models, a reward model's report card.

Two models are compared item by item: an unpaired comparison over the same items overstates the variance.
"""
import json
import os
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd

from rlhfkit.configs import Result
from rlhfkit.evaluation.metrics import mcnemar, mean_interval, paired_interval, wilson
from rlhfkit.evaluation.scorers import score

COLUMNS = ["task", "metric", "score", "low", "high", "examples", "chance", "seconds"]


def tabulate(items, seconds):
    """Items as in items.jsonl, seconds {task: s} -> the table of `evaluate`, with the items' credits in its attrs."""
    rows, credits = [], {}
    for task, whole in pd.DataFrame(items).groupby("task", sort=False):
        groups = [(task, whole)] + [(f"{task}/{name}", part) for column in ("category", "subject")
                                    for name, part in whole.groupby(column, sort=False) if name]
        metrics = list(whole["credit"].iloc[0])
        rows += [_row(name, metric, part, seconds.get(name, np.nan)) for metric in metrics for name, part in groups]
        credits[task] = {m: {i: c[m] for i, c in zip(whole["id"], whole["credit"])} for m in metrics}
    table = pd.DataFrame(rows, columns=COLUMNS)
    table.attrs["credits"] = credits
    return table


def save(table, items, output_dir):
    """table.csv and items.jsonl, written beside and renamed."""
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items)
    for name, text in (("items.jsonl", lines), ("table.csv", table.to_csv(index=False))):
        beside = folder / f"{name}.partial"
        beside.write_text(text, encoding="utf-8")
        os.replace(beside, folder / name)


def compare(result_a, result_b):
    """How much better b is than a over the items that both have -> table:
    task, metric, a, b, difference (b - a), low, high, p, examples.

    Either side: a table of `rk.evaluate`, its output_dir, a Result or its folder (samples of the last step, and its
    figures), or numbers, one an item. low, high: 95 % paired bootstrap, empty for single figures; p: exact McNemar
    (sign) test. ValueError where nothing is shared.
    """
    a, b, rows = _values(result_a), _values(result_b), []
    for key in (k for k in a if k in b):
        ids = [i for i in a[key] if i in b[key]]
        if key == ("", "mean") and not len(ids) == len(a[key]) == len(b[key]):
            raise ValueError(f"the lists have {len(a[key])} and {len(b[key])} numbers; they must be of the same items")
        if ids:
            x, y = (np.array([values[key][i] for i in ids], dtype=np.float64) for values in (a, b))
            tested = (*paired_interval(y - x), mcnemar(y - x)) if len(ids) > 1 else (np.nan,) * 3
            rows.append([*key, x.mean(), y.mean(), (y - x).mean(), *tested, len(ids)])
    if not rows:
        raise ValueError(f"the results share no item: {sorted(a)} and {sorted(b)}; compare the same tasks and rows")
    return pd.DataFrame(rows, columns=["task", "metric", "a", "b", "difference", "low", "high", "p", "examples"])


def report_card(reward_path, records):
    """A reward model on held-out records -> table: by (total, source, margin), group, accuracy, low, high, pairs,
    mean_margin, length_correlation.

    accuracy: share of strictly ordered pairs that it ranks right (ties 1/2), with Wilson's interval, which takes the
    pairs of one prompt as independent; mean_margin: mean difference of its scores; a group of `margin` is a difference
    of the true scores; length_correlation: its scores with the answers' characters. ValueError where there is no pair.
    """
    rows = []
    for record, scores in zip(records, score(reward_path, records)):
        for (better, high), (worse, low) in combinations(zip(record.answers, scores), 2):
            if better.score > worse.score:
                lengths = len(better.text), len(worse.text)
                rows.append((record.source, better.score - worse.score, high, low, *lengths))
    if not rows:
        raise ValueError(f"none of the {len(records)} records has two answers of different score; no pair to rank")
    columns = ["source", "margin", "chosen", "rejected", "chosen_length", "rejected_length"]
    frame = pd.DataFrame(rows, columns=columns)
    if frame.margin.nunique() > 8:
        frame["margin"] = pd.qcut(frame.margin, 4, duplicates="drop").astype(str)
    groups = [(by, name, part) for by in ("source", "margin") for name, part in frame.groupby(by)]
    return pd.DataFrame([_card(*group) for group in [("total", "", frame), *groups]])


def _row(name, metric, part, seconds):
    """One line of the table. Chance: guessing among the choices; 0, what an empty answer scores, for generation."""
    values = [credits[metric] for credits in part["credit"]]
    counted = metric == "accuracy" or set(values) <= {0, 1}
    low, high = wilson(sum(values), len(values)) if counted else mean_interval(values)
    return [name, metric, float(np.mean(values)), low, high, len(values), float(part["chance"].mean()), seconds]


def _card(by, name, part):
    margins = part.chosen - part.rejected
    correct = float((margins > 0).sum() + (margins == 0).sum() / 2)
    low, high = wilson(correct, len(part))
    scores, lengths = [*part.chosen, *part.rejected], [*part.chosen_length, *part.rejected_length]
    varied = len(set(scores)) > 1 and len(set(lengths)) > 1
    return {"by": by, "group": name, "accuracy": correct / len(part), "low": low, "high": high, "pairs": len(part),
            "mean_margin": margins.mean(),
            "length_correlation": float(np.corrcoef(scores, lengths)[0, 1]) if varied else np.nan}


def _values(result):
    """Anything `compare` takes -> {(task, metric): {item: value}}."""
    if isinstance(result, (str, os.PathLike)):
        file = Path(result) / "items.jsonl"
        if not file.is_file():
            return _values(Result.load(result))
        lines = file.read_text(encoding="utf-8").split("\n")
        return _values(tabulate([json.loads(line) for line in lines if line], {}))
    if isinstance(result, pd.DataFrame):
        if "credits" not in result.attrs:
            raise ValueError("the table has no item credits; give it as rk.evaluate returned it, or its output_dir")
        credits = result.attrs["credits"]
        return {(task, metric): credits[task][metric] for task in credits for metric in credits[task]}
    if hasattr(result, "samples"):
        return _sample_values(result)
    return {("", "mean"): dict(enumerate(map(float, result)))}


def _sample_values(result):
    """The figures of a Result and its last step's samples; the k-th answer to a prompt is paired with the k-th."""
    values = {("figures", name): {"": v} for name, v in result.metrics.items() if isinstance(v, (int, float))}
    last, seen = max((s["step"] for s in result.samples), default=0), {}
    for s in (s for s in result.samples if s["step"] == last):
        k = seen[s["prompt"]] = seen.get(s["prompt"], 0) + 1
        for metric in (m for m in ("score", "gold") if s.get(m) is not None):
            values.setdefault(("samples", metric), {})[s["prompt"], k] = s[metric]
    return values
