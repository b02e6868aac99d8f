"""CMRC 2018 (CLUE): read a passage, answer by a span of it; F1 and exact match by the official script's rules.

Lower case, 32 marks dropped, a Chinese character or a word between such is a unit, F1 over the longest common *run* of
units, the best reference counts. The script takes NLTK's words; our one pattern agrees on 99.8 % of the references.
The 2023 kit compared bags of model tokens."""
import json
import re
from difflib import SequenceMatcher

from rlhfkit.tasks.task import Task, check_fields, find_files, read_text, template

LAYOUT = ('cmrc2018/{train,dev,trial}.json, {"data": [{"paragraphs": [{"context", '
          '"qas": [{"question", "id", "answers": [{"text"}]}]}]}]}')
DROPPED = set("-:_*^/\\~`+=，。：？！“”；’《》·、「」（）－～『』")
UNITS = re.compile(r"""[\u4e00-\u9fa5]|(?:[^\s\u4e00-\u9fa5,;!?#$%&@|"()\[\]{}<>]|,(?=\d))+|\S""")


def load(folder, split):
    [file] = find_files(folder, [f"{split}.json"], LAYOUT)
    examples = {}
    for article in _articles(file):
        for paragraph in article["paragraphs"]:
            check_fields(paragraph, ("context", "qas"), str(file))
            for question in paragraph["qas"]:
                check_fields(question, ("question", "id"), str(file))
                if question["id"] in examples:
                    raise ValueError(f"{file}: two questions have the id {question['id']}; ids must be unique")
                references = tuple(dict.fromkeys(a["text"] for a in question.get("answers") or ()))
                examples[question["id"]] = {"id": question["id"], "context": paragraph["context"],
                                            "question": question["question"], "gold": references or None}
    return list(examples.values())


def ask(example):
    return f"阅读文章：{example['context']}\n问：{example['question']}\n", "答：", ()


def score(answer, references):
    """{"f1", "em"} of the answer's first line, the best over the references."""
    line = (answer.strip().splitlines() or [""])[0]
    return {"f1": max(_f1(line, reference) for reference in references),
            "em": float(any(_bare(line) == _bare(reference) for reference in references))}


def _f1(answer, reference):
    found, wanted = units(answer), units(reference)
    run = SequenceMatcher(None, found, wanted, autojunk=False).find_longest_match().size
    return 2 * run / (len(found) + len(wanted)) if run else 0.0


def units(text):
    """The script's units of a text: Chinese characters and, between them, words."""
    return UNITS.findall(_bare(text))


def _bare(text):
    return "".join(c for c in text.lower().strip() if c not in DROPPED)


def _articles(file):
    try:
        data = json.loads(read_text(file))
        return [{"paragraphs": article["paragraphs"]} for article in data["data"]]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{file} cannot be read ({error!r}); expected {LAYOUT}") from error


TASK = Task("cmrc2018", load, template(ask, "\n\n"), "generation", shot_splits=("train", "trial", "dev"), metric=score,
            max_new_tokens=50)
