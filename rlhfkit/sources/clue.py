"""CLUE's train files as records: the right choice or answer scores 1, the other choices 0, in the prompt that evaluation uses.

Only `train` is read: what is scored must not be trained on (the 2023 kit drew its shots from the scored file).
"""
from rlhfkit.records import Answer, Record, set_aside
from rlhfkit.sources.raw import TEMPLATES, files, first_share, share
from rlhfkit.tasks import TASKS

NAMES = tuple(name for name in TASKS if not name.startswith(("ceval", "mmlu", "cmmlu", "couplets")))
LAYOUT = tuple(f"{place}{name}/*train*.json" for place in ("clue/", "") for name in NAMES)


def read(folder, rejected, seed=0, template=TEMPLATES["HEAD"], part=(0, 1)):
    """Folders `clue/<task>` or `<task>` with a train file in CLUE's own format → Records. A file is read whole."""
    rejected = first_share(rejected, part)
    for home in dict.fromkeys(path.parent for path in files(folder, LAYOUT)):
        task = TASKS[home.name]
        try:
            examples = task.load(home, "train")
        except (ValueError, FileNotFoundError) as error:
            set_aside(rejected, home, 0, f"{error}; folder left out", "")
            continue
        for example in share(examples, part):
            try:
                yield _record(task, example)
            except ValueError as error:
                set_aside(rejected, home, example["id"], error, str(example))


def _record(task, example):
    asked, choices, gold = task.render(example, ())
    if gold is None:
        raise ValueError("no label")
    answers = [Answer(choice, int(i == gold)) for i, choice in enumerate(choices)] if choices else [Answer(gold[0], 1)]
    return Record(asked.prompt, answers, asked.prefix, source="clue")
