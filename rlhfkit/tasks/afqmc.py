"""AFQMC (CLUE): do two customers' questions mean the same? PanGu-α's template, `下面两个句子语义{不同|相同}:{sentence1}。{sentence2}`.

The word *and the text behind it* are scored: how well the second question goes on from the first, said to be alike or not.
"""
from rlhfkit.tasks.task import Task, index_of, lines_loader, template

LABELS = {"0": "不同", "1": "相同"}
LAYOUT = 'afqmc/{train,dev}.json, JSON lines with "sentence1", "sentence2" and "label", 0 or 1'
load = lines_loader(LAYOUT, ("sentence1", "sentence2"), lambda row, where: {
    "first": row["sentence1"], "second": row["sentence2"], "gold": index_of(row.get("label"), LABELS, where)})


def ask(example):
    return "下面两个句子语义", "", tuple(f"{word}:{example['first']}。{example['second']}" for word in LABELS.values())


TASK = Task("afqmc", load, template(ask))
