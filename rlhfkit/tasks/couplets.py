"""Couplets of the samples: write the second line to a held-out first line, scored by the samples' gold judge.

Ours, in no published kit: the one benchmark here whose truth is a rule, so that what RLHF changed can be told from what
a reward model believes.
"""
from rlhfkit.samples import couplets
from rlhfkit.tasks.task import Task, template

HELD_OUT = 200


def load(folder, split):
    """Needs no file, so the folder means nothing; `train` are lines of raw/couplets.txt, any other split are not."""
    lines = couplets.make(HELD_OUT) if split == "train" else couplets.held_out(HELD_OUT)
    return [{"id": f"{i}", "prompt": f"上联：{first}", "gold": (second,)} for i, (first, second) in enumerate(lines)]


def render(example, shots=()):
    record, _, _ = template(lambda e: (e["prompt"], "下联：", ()))(example, shots)
    return record, (), example["prompt"]


def score(answer, prompt):
    return {"gold": couplets.gold(prompt, (answer.strip().splitlines() or [""])[0])}


TASK = Task("couplets", load, render, scoring="generation", metric=score, max_new_tokens=24, temperature=1.0)
