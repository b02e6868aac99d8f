"""Benchmarks: examples to prompts, prompts to scores, scores to a table with chance and a 95 % interval beside each.

Unlike the 2023 kit: shots never come from the scored file and are the same for every candidate, ties share the credit,
all labels are ranked, rows without a label are left out and counted, and an evaluation that was killed goes on.
"""
import random
import time
from collections import Counter
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import islice
from pathlib import Path

from rlhfkit import samples
from rlhfkit.evaluation import log
from rlhfkit.evaluation.leaderboard import leaderboard, samples_table, write_page
from rlhfkit.evaluation.metrics import credit
from rlhfkit.evaluation.report import compare, report_card, tabulate, win_rate
from rlhfkit.evaluation.scorers import open_model, perplexity, score
from rlhfkit.records import Record
from rlhfkit.tasks import find_tasks

__all__ = ["evaluate", "tabulate", "perplexity", "score", "compare", "win_rate", "report_card", "leaderboard",
           "samples_table", "write_page"]


def evaluate(model, tasks, data_dir=None, shots=0, limit=None, split=None, output_dir=None, subjects=None,
             normalised=False):
    """Table with the columns task, metric, score, low, high, examples, chance, seconds, majority, verdict: see `tabulate`.

    model: a path, a (model, tokenizer) pair, or an object with loglikelihoods(list of (context, continuation)) -> list
    of float and generate(list of prompts, max_new_tokens) -> list of str. tasks: names or Tasks, or one of them.
    data_dir: holds one folder a task; None: the samples. limit: items a task, spread evenly over its file. split: None
    is the task's own (dev for CLUE, val for C-Eval, test for MMLU and CMMLU). subjects: names, all of them if None.
    output_dir gets table.csv and items.jsonl, and holds one evaluation: called again, it takes over the items that still
    fit (model, row, prompt and scoring, by hash), and where all do, the model is not opened. A split without any label is
    answered, with NaN for scores and, for letters, submission.json as C-Eval's site takes it.
    `table.attrs`, by task: `left_out`, rows without a label; `cut`, items longer than the model's positions, which lost
    shots or the beginning; `credits`, which `rk.compare` pairs. ValueError for an unknown task or subject and for
    duplicate ids, FileNotFoundError states the layout that was expected.
    """
    tasks, folder = find_tasks(tasks), Path(samples.EVAL if data_dir is None else data_dir)
    _check(model, tasks, shots, limit)
    loaded = [_load(task, folder / task.name, split or task.split, shots or 0, limit, subjects) for task in tasks]
    who = "" if output_dir is None else log.identity(model)     # after the files, which are quicker to be found wrong
    asked = [_questions(task, split or task.split, examples, shown, who)
             for task, (examples, shown, _) in zip(tasks, loaded)]
    known = {} if output_dir is None else log.take_over(output_dir, {q.item["key"] for part in asked for q in part})
    reader, items = None, []
    for task, questions in zip(tasks, asked):
        pending = [q for q in questions if q.item["key"] not in known]
        for chunk in [pending] if task.temperature and pending else log.chunks(pending, lambda q: q.item["subject"]):
            if reader is None:
                reader = open_model(model)                      # raises before anything is written or lost
                if output_dir is not None:
                    log.begin(output_dir, known)
            lines = _answered(task, chunk, reader)
            if output_dir is not None:
                log.append(output_dir, lines)
            known |= {line["key"]: line for line in lines}
        lines = [known[q.item["key"]] | q.item for q in questions]
        items += [line | {"credit": _credit(task, line)} for line in lines]
    table = tabulate(items, normalised)
    table.attrs["left_out"] = {task.name: left_out for task, (_, _, left_out) in zip(tasks, loaded)}
    if output_dir is not None:
        log.save(output_dir, items, table)
    return table


@dataclass
class _Question:
    """`item`: what is known before the model is asked, the beginning of a line of the log."""

    item: dict
    record: Record
    choices: tuple
    example: dict
    shots: tuple


def _check(model, tasks, shots, limit):
    for name, number, least in (("shots", shots, 0), ("limit", limit, 1)):
        if number is not None and (type(number) is not int or number < least):
            raise ValueError(f"{name} is {number!r}; it must be a whole number >= {least}")
    if isinstance(model, (tuple, list)) and any(part is None for part in model):
        raise TypeError("the model or its tokenizer is None; give (model, tokenizer), or a folder that holds both")
    if twice := [name for name, count in Counter(task.name for task in tasks).items() if count > 1]:
        raise ValueError(f"{twice[0]} is named twice in tasks; name it once, or give a task of your own a name of its own")


def _load(task, folder, split, shots, limit, subjects):
    """The examples to score, the shots of each, the count of rows without a label; these are scored if there are no others."""
    examples = task.load(folder, split)
    if subjects is not None:
        examples = _of_subjects(task, examples, [subjects] if isinstance(subjects, str) else list(subjects))
    if not examples:
        raise ValueError(f"split {split} of {task.name} in {folder} has no rows; fetch it again, or take split {task.split}")
    for i, count in Counter(e["id"] for e in examples).items():
        if count > 1:
            raise ValueError(f"split {split} of {task.name} in {folder} has {count} rows with the id {i}; ids must be unique")
    labelled = [e for e in examples if e["gold"] is not None] or examples
    count = min(limit or len(labelled), len(labelled))
    chosen = [labelled[i * len(labelled) // count] for i in range(count)]
    pool = _pool(task, folder, split, shots) if shots else []
    return chosen, [_shots(task, example, pool, shots) for example in chosen], len(examples) - len(labelled)


def _of_subjects(task, examples, subjects):
    known = dict.fromkeys(e["subject"] for e in examples if e.get("subject"))
    for name in subjects:
        if name not in known:
            near = get_close_matches(str(name), known, n=3, cutoff=0.4) or list(known)[:3]
            raise ValueError(f"subject {name!r} is none of the {len(known)} that {task.name} has rows of"
                             + (f"; did you mean {' or '.join(near)}?" if near else "; leave subjects out"))
    return [e for e in examples if e.get("subject") in subjects]


def _pool(task, folder, split, shots):
    """The labelled rows that shots come from: in file order where there are subjects, else shuffled by a fixed seed."""
    missing = f"split {split} is the one that is scored"
    for name in (s for s in task.shot_splits if s != split):
        try:
            pool = [e for e in task.load(folder, name) if e["gold"] is not None]
        except FileNotFoundError as error:
            missing = error
            continue
        if not any("subject" in e for e in pool):
            random.Random(0).shuffle(pool)
        return pool
    raise FileNotFoundError(f"shots is {shots}; they come from split {' or '.join(task.shot_splits)} of {task.name}, "
                            f"but {missing}; put that file there, or set shots to 0")


def _shots(task, example, pool, shots):
    """The first rows of the pool that have the example's subject and are not the example itself in another file."""
    own, subject = _bare(example), example.get("subject")
    found = tuple(islice((s for s in pool if s.get("subject") == subject and _bare(s) != own), shots))
    if len(found) < shots:
        raise ValueError(f"shots is {shots}; {task.name} has {len(found)} rows for them"
                         f"{f' in {subject}' if subject else ''}; ask for fewer")
    return found


def _bare(example):
    return {key: value for key, value in example.items() if key != "id"}


def _questions(task, split, examples, shown, who):
    questions, others = [], [e["id"] for e in examples] if task.temperature else ()
    for example, shots in zip(examples, shown):
        record, choices, gold = task.render(example, shots)
        if task.scoring != "generation" and not (choices and all(text.strip() for text in choices)):
            raise ValueError(f"item {example['id']} of {task.name} has the choices {choices}; "
                             "there must be some, and none may be empty")
        item = {"key": log.key_of(who, task, example, record, choices, others), "task": task.name, "id": example["id"],
                "subject": example.get("subject", ""), "category": example.get("category", ""),
                "groups": example.get("groups", ()), "split": split, "shots": len(shots), "scoring": task.scoring, "gold": gold}
        questions.append(_Question(item, record, choices, example, shots))
    return questions


def _answered(task, chunk, reader):
    """A line of the log for each question: what was asked, what the model made of it, its credit by metric, and its shares of
    the seconds and of the cut items of the chunk."""
    start, cut, generated = time.perf_counter(), reader.cut, task.scoring == "generation"
    records, choices = [q.record for q in chunk], [q.choices for q in chunk]
    shorter = [[task.render(q.example, q.shots[:k])[0] for k in reversed(range(len(q.shots)))] for q in chunk]
    if generated:
        answers, prompts = reader.answer(records, task.max_new_tokens, task.temperature, shorter=shorter)
        results = [{"answer": answer, "chance": 0.0} for answer in answers]
    else:
        scores, prompts = reader.rank(records, choices, shorter=shorter)
        results = [{"choices": c, "scores": s, "chance": 1 / len(c)} for c, s in zip(choices, scores)]
    shares = {"seconds": (time.perf_counter() - start) / len(chunk), "cut": (reader.cut - cut) / len(chunk)}
    lines = [q.item | {"prompt": prompt} | result | shares for q, prompt, result in zip(chunk, prompts, results)]
    return [line | {"credit": _credit(task, line)} for line in lines]


def _credit(task, line):
    """{metric: credit of an item}, None without a label; of items that were taken over too, as a metric may have changed."""
    gold = line["gold"]
    if task.scoring == "generation":
        return {"unlabelled": None} if gold is None else task.metric(line["answer"], gold)
    share = credit(line["scores"], gold or 0)                   # raises for scores that are no numbers
    return {"accuracy": None if gold is None else share}
