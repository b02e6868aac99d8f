"""OCNLI (CLUE): does sentence 2 follow from 1? PanGu-α's template, `{sentence1}?{Yes|Maybe|No}，{sentence2}`.

The label stands in the middle, so the label *and the text behind it* are scored, given what all candidates share at the
left, the first sentence. The 2023 kit scored the whole text, unshifted.
"""
from rlhfkit.tasks.task import Task, index_of, lines_loader, template

LABELS = {"entailment": "Yes", "neutral": "Maybe", "contradiction": "No"}
LAYOUT = ('{}/{{train,dev}}.json, JSON lines with "sentence1", "sentence2" and "label": '
          'entailment, neutral, contradiction, or - for none')


def loader(name):
    return lines_loader(LAYOUT.format(name), ("sentence1", "sentence2"), lambda row, where: {
        "first": row["sentence1"], "second": row["sentence2"], "gold": index_of(row.get("label"), LABELS, where)})


def ask(example):
    return f"{example['first']}?", "", tuple(f"{word}，{example['second']}" for word in LABELS.values())


TASK = Task("ocnli", loader("ocnli"), template(ask))
