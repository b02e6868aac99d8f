"""Benchmarks: examples to prompts, prompts to scores, scores to a table with chance and a 95 % interval beside each.

Unlike the 2023 kit: shots never come from the scored file and are the same for every candidate, ties share the credit,
all labels are ranked, and rows without a label are left out and counted.
"""
import random
import time
from itertools import islice
from pathlib import Path

from rlhfkit import samples
from rlhfkit.evaluation.metrics import credit
from rlhfkit.evaluation.report import compare, report_card, save, tabulate
from rlhfkit.evaluation.scorers import open_model, perplexity, score
from rlhfkit.tasks import find_tasks

__all__ = ["evaluate", "perplexity", "score", "compare", "report_card"]


def evaluate(model, tasks, data_dir=None, shots=0, limit=None, split=None, output_dir=None):
    """Table with the columns task, metric, score, low, high, examples, chance, seconds.

    A task's first row is its total, over items; categories and subjects (`ceval/STEM`, `ceval/logic`) follow.
    model: a path, a (model, tokenizer) pair, or an object with loglikelihoods(list of (context, continuation)) -> list
    of float and generate(list of prompts, max_new_tokens) -> list of str. tasks: names or Tasks, or one of them.
    data_dir: holds one folder a task; None: the samples. limit: items a task, spread evenly over its file. split: None
    is the task's own (dev for CLUE, val for C-Eval, test for MMLU). output_dir gets table.csv and items.jsonl.
    `table.attrs`, by task: `left_out`, rows without a label; `cut`, items longer than the model's positions; `credits`,
    which `rk.compare` pairs. ValueError for an unknown task, FileNotFoundError states the layout that was expected.
    """
    tasks, folder = find_tasks(tasks), Path(samples.EVAL if data_dir is None else data_dir)
    for name, number, least in (("shots", shots, 0), ("limit", limit, 1)):
        if number is not None and (type(number) is not int or number < least):
            raise ValueError(f"{name} is {number!r}; it must be a whole number >= {least}")
    loaded = [_load(task, folder / task.name, split or task.split, shots or 0, limit) for task in tasks]
    reader = open_model(model)                      # after the files, which are quicker to be found wrong
    items, attrs, seconds = [], {"left_out": {}, "cut": {}}, {}
    for task, (examples, shown, left_out) in zip(tasks, loaded):
        start, cut = time.perf_counter(), reader.cut
        items += _items(task, examples, shown, reader)
        seconds[task.name] = time.perf_counter() - start
        attrs["left_out"][task.name], attrs["cut"][task.name] = left_out, reader.cut - cut
    table = tabulate(items, seconds)
    table.attrs.update(attrs)
    if output_dir is not None:
        save(table, items, output_dir)
    return table


def _load(task, folder, split, shots, limit):
    """The labelled examples to score, the shots of each, and the count of rows without a label."""
    examples = task.load(folder, split)
    labelled = [e for e in examples if e["gold"] is not None]
    if not labelled:
        raise ValueError(f"split {split} of {task.name} in {folder} has {len(examples)} rows, none with a label: "
                         f"there is nothing to score; take split {task.split}")
    count = min(limit or len(labelled), len(labelled))
    chosen = [labelled[i * len(labelled) // count] for i in range(count)]
    pool = _pool(task, folder, split, shots) if shots else []
    return chosen, [_shots(task, example, pool, shots) for example in chosen], len(examples) - len(labelled)


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


def _items(task, examples, shown, reader):
    """One dict an example: what was asked, what the model made of it, and its credit by metric."""
    records, choices, golds = zip(*(task.render(example, shots) for example, shots in zip(examples, shown)))
    if task.scoring == "generation":
        answers, prompts = reader.answer(records, task.max_new_tokens, task.temperature)
        results = [{"answer": a, "credit": task.metric(a, gold), "chance": 0.0} for a, gold in zip(answers, golds)]
    else:
        for example, texts in zip(examples, choices):
            if not texts or not all(text.strip() for text in texts):
                raise ValueError(f"item {example['id']} of {task.name} has the choices {texts}; "
                                 "there must be some, and none may be empty")
        scores, prompts = reader.rank(records, choices)
        results = [{"choices": texts, "scores": s, "credit": {"accuracy": credit(s, gold)}, "chance": 1 / len(texts)}
                   for texts, s, gold in zip(choices, scores, golds)]
    return [{"task": task.name, "id": e["id"], "subject": e.get("subject", ""), "category": e.get("category", ""),
             "prompt": prompt, "gold": gold, **result}
            for e, prompt, gold, result in zip(examples, prompts, golds, results)]
