"""ChID (CLUE): which idiom was taken out of a passage? PanGu-α's template: the passage with a candidate in the blank.

Every blank is an item. The candidate *and the text behind it* are scored, given the text before it. Other blanks of the passage
are shown as ____: their idioms would give candidates away, and the 2023 kit left the marks #idiom000123# in.
"""
import json
import re

from rlhfkit.tasks.task import Task, find_files, read_json_lines, read_text, template, texts_of

BLANK = re.compile(r"#idiom\d+#")
LAYOUT = ('chid/{train,dev}.json, JSON lines with "content" (a list of passages) and "candidates", and beside it '
          '{train,dev}_answer.json, {"#idiom000000#": place of the right candidate from 0}')


def load(folder, split):
    [file] = find_files(folder, [f"{split}.json"], LAYOUT)
    answers, examples = _answers(file.with_name(f"{split}_answer.json")), {}
    for number, row in enumerate(read_json_lines(file, ("content", "candidates")), 1):
        where = f"{file}, row {number}"
        candidates = texts_of(row, "candidates", where)
        for passage in texts_of(row, "content", where):
            for blank in BLANK.finditer(passage):
                if blank[0] in examples:
                    raise ValueError(f"{where}: the blank {blank[0]} stands there twice; blanks must be unique")
                examples[blank[0]] = {
                    "id": blank[0].strip("#"), "before": BLANK.sub("____", passage[:blank.start()]),
                    "behind": BLANK.sub("____", passage[blank.end():]), **_choices(candidates, answers.get(blank[0]), where)}
    return list(examples.values())


def ask(example):
    before = example["before"] if example["before"].strip() else "短文："       # a model needs something to go on from
    return before, "", tuple(idiom + example["behind"] for idiom in example["choices"])


def _choices(candidates, answer, where):
    if answer is not None and (type(answer) is not int or not 0 <= answer < len(candidates)):
        raise ValueError(f"{where}: the answer is {answer!r}; it must be a place among {len(candidates)} candidates, from 0")
    choices = tuple(dict.fromkeys(candidates))
    return {"choices": choices, "gold": None if answer is None else choices.index(candidates[answer])}


def _answers(file):
    """{blank: place}; empty where there is no file, as for test."""
    try:
        answers = json.loads(read_text(file)) if file.is_file() else {}
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} cannot be read ({error}); expected {LAYOUT}") from error
    if not isinstance(answers, dict):
        raise ValueError(f"{file} holds no object; expected {LAYOUT}")
    return answers


TASK = Task("chid", load, template(ask))
