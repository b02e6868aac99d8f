"""What an evaluation says: the table, the paired comparison of two models, their answers before a judge, a reward model's
report card.

Two models are compared item by item: an unpaired comparison over the same items overstates the variance.
"""
import math
import os
from collections import Counter
from dataclasses import replace
from itertools import combinations
from os.path import commonprefix
from pathlib import Path

import numpy as np
import pandas as pd

from rlhfkit.configs import Result
from rlhfkit.evaluation.log import read_items
from rlhfkit.evaluation.metrics import credit, detectable, macro_interval, mcnemar, mean_interval, paired_interval, wilson
from rlhfkit.evaluation.scorers import score
from rlhfkit.records import Answer

COLUMNS = ["task", "metric", "score", "low", "high", "examples", "chance", "seconds", "majority", "verdict"]


def tabulate(result, normalised=False):
    """An output_dir of `rk.evaluate`, or its items -> the table, without the model; attrs: `credits`, `cut`, by task.

    A task's first row is its total, over items; then, where there are subjects, `ceval/macro`, the mean of the subjects'
    scores, categories (`ceval/STEM`), further groups (`ceval/hard`) and subjects (`ceval/logic`), over items again. The
    tables of C-Eval and CMMLU are means of subjects, for each category too; MMLU's are over items.
    majority: the share of the commonest label, NaN where each item has choices of its own. verdict: `chance` where the
    interval holds chance, `no labels` where the score is NaN for that reason.
    normalised: adds the metric `accuracy_norm` to tasks whose choices differ in length: the log-likelihood a character
    decides. It matters where the choices are free texts (C3): a sum favours the shortest.
    """
    items = read_items(result) if isinstance(result, (str, os.PathLike)) else list(result)
    if not items:
        raise ValueError(f"{result} holds no items; evaluate again")
    rows, credits, cut = [], {}, {}
    for task in dict.fromkeys(item["task"] for item in items):
        whole = [item for item in items if item["task"] == task]
        if normalised and any(item["scoring"] == "choices" and len(set(map(len, item["choices"]))) > 1 for item in whole):
            whole = [item | {"credit": item["credit"] | {"accuracy_norm": _normalised(item)}} for item in whole]
        labels = {_labels(item) for item in whole} if all("choices" in item for item in whole) else ()
        groups = {task: whole} | _groups(whole, task)
        metrics = list(dict.fromkeys(metric for item in whole for metric in item["credit"]))
        for metric in metrics:
            part = [_row(name, metric, group, len(labels) == 1) for name, group in groups.items()]
            subjects = list(_by(whole, lambda item: [item.get("subject")]).values())
            rows += part[:1] + ([_macro(task, metric, subjects)] if len(subjects) > 1 else []) + part[1:]
        credits[task] = {m: {i["id"]: i["credit"][m] for i in whole if i["credit"][m] is not None} for m in metrics}
        cut[task] = round(sum(item.get("cut", 0) for item in whole))
    table = pd.DataFrame(rows, columns=COLUMNS)
    table.attrs.update(credits=credits, cut=cut)
    return table


def compare(result_a, result_b):
    """How much better b is than a over the items that both have -> table:
    task, metric, a, b, difference (b - a), low, high, p, examples, detectable.

    Either side: a table of `rk.evaluate`, its output_dir, a Result or its folder (samples of the last step, and its
    figures), or numbers, one an item. low, high: 95 % paired bootstrap, empty for single figures; p: exact McNemar
    (sign) test; detectable: the smallest difference that so many items would show in 4 of 5 cases (5 % level, paired).
    ValueError where nothing is shared.
    """
    a, b, rows = _values(result_a), _values(result_b), []
    for key in (k for k in a if k in b):
        ids = [i for i in a[key] if i in b[key]]
        if key == ("", "mean") and not len(ids) == len(a[key]) == len(b[key]):
            raise ValueError(f"the lists have {len(a[key])} and {len(b[key])} numbers; they must be of the same items")
        if ids:
            x, y = (np.array([values[key][i] for i in ids], dtype=np.float64) for values in (a, b))
            tested = (*paired_interval(y - x), mcnemar(y - x)) if len(ids) > 1 else (np.nan,) * 3
            rows.append([*key, x.mean(), y.mean(), (y - x).mean(), *tested, len(ids), detectable(y - x)])
    if not rows:
        raise ValueError(f"the results share no item: {sorted(a)} and {sorted(b)}; compare the same tasks and rows")
    return pd.DataFrame(rows, columns=["task", "metric", "a", "b", "difference", "low", "high", "p", "examples", "detectable"])


def win_rate(records, answers_a, answers_b, judge):
    """How often b's answer to a record is judged better than a's -> table of one row: win_rate, low, high, p, wins, ties,
    losses, examples.

    judge: the folder of a reward model, or judge(prompt, answer) -> float such as `rk.gold`. Ties count half; an empty
    answer loses against any other. low, high: Wilson's 95 % interval; p: sign test. ValueError for lists of unequal length.
    """
    records, pairs = list(records), list(zip(answers_a, answers_b))
    if not len(records) == len(answers_a) == len(answers_b) or not records:
        raise ValueError(f"there are {len(records)} records, {len(answers_a)} and {len(answers_b)} answers; give one answer of "
                         "each model to each record, and one record at least")
    asked = [replace(r, answers=tuple(Answer(text, 0) for text in pair if text.strip())) for r, pair in zip(records, pairs)]
    judged = ([[judge(r.prompt, answer.text) for answer in r.answers] for r in asked] if callable(judge)
              else score(judge, asked))
    signs = []
    for pair, scores in zip(pairs, map(iter, judged)):
        a, b = (next(scores) if text.strip() else -math.inf for text in pair)
        signs.append(int(b > a) - int(b < a))
    wins, ties, n = signs.count(1), signs.count(0), len(signs)
    row = [(wins + ties / 2) / n, *wilson(wins + ties / 2, n), mcnemar(signs), wins, ties, signs.count(-1), n]
    return pd.DataFrame([row], columns=["win_rate", "low", "high", "p", "wins", "ties", "losses", "examples"])


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


def _row(name, metric, part, common):
    """One line of the table. Chance: guessing among the choices; 0, what an empty answer scores, for generation."""
    values = [item["credit"][metric] for item in part]
    if None in values:
        values, low, high = [math.nan], math.nan, math.nan
    elif metric.startswith("accuracy") or set(values) <= {0, 1}:
        low, high = wilson(sum(values), len(values))
    else:
        low, high = mean_interval(values)
    golds = Counter(item["gold"] for item in part) if common else {None: 0}
    majority = math.nan if None in golds else max(golds.values()) / len(part)
    seconds = sum(item.get("seconds", math.nan) for item in part)
    return _line(name, metric, values, low, high, len(part), [item["chance"] for item in part], seconds, majority)


def _macro(task, metric, subjects):
    groups = [[item["credit"][metric] for item in part] for part in subjects]
    known = not any(None in group for group in groups)
    low, high = macro_interval(groups) if known else (math.nan, math.nan)
    means = [np.mean(group) if known else math.nan for group in groups]
    chances = [np.mean([item["chance"] for item in part]) for part in subjects]
    return _line(f"{task}/macro", metric, means, low, high, sum(map(len, subjects)), chances, math.nan, math.nan)


def _line(name, metric, values, low, high, examples, chances, seconds, majority):
    value, chance = float(np.mean(values)), float(np.mean(chances))
    verdict = "no labels" if math.isnan(value) else "chance" if low <= chance <= high else ""
    return [name, metric, value, low, high, examples, chance, seconds, majority, verdict]


def _by(items, names_of):
    """{name: its items}, in the order of first appearance, for names that are not empty."""
    groups = {}
    for item in items:
        for name in filter(None, names_of(item)):
            groups.setdefault(name, []).append(item)
    return groups


def _groups(items, task):
    named = (lambda item: [item.get("category")], lambda item: item.get("groups") or (),
             lambda item: [item.get("subject")])
    return {f"{task}/{name}": part for names_of in named for name, part in _by(items, names_of).items()}


def _labels(item):
    """The choices without what all of them begin or end with, so that `Yes，…` and `No，…` are the same labels for any sentence."""
    ends = commonprefix([text[::-1] for text in item["choices"]])
    texts = [text[:len(text) - len(ends)] for text in item["choices"]]
    start = len(commonprefix(texts))
    return tuple(text[start:] for text in texts)


def _normalised(item):
    scores = [score / len(text) for score, text in zip(item["scores"], item["choices"])]
    return None if item["gold"] is None else credit(scores, item["gold"])


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
        whole = (Path(result) / "items.jsonl").is_file()
        return _values(tabulate(result) if whole else Result.load(result))
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
