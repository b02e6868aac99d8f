"""Baike: the longer of title and description → the answer, score 1. No second answer, so no reward pairs."""
from rlhfkit.records import Answer, Record, json_lines, set_aside
from rlhfkit.sources.raw import TEMPLATES, files

LAYOUT = ("baike_qa2019/*.json",)


def read(folder, rejected, seed=0, template=TEMPLATES["HEAD"], part=(0, 1)):
    """JSON lines with title, desc, answer → Records; line breaks are removed."""
    for path in files(folder, LAYOUT):
        for line, row in json_lines(path, rejected, part):
            try:
                title, desc, answer = (_field(row, name) for name in ("title", "desc", "answer"))
                question = title if len(title) > len(desc) else desc
                yield Record(_one_line(question), (Answer(_one_line(answer), 1),), template.reply, source="baike")
            except ValueError as error:
                set_aside(rejected, path, line, error, row)


def _field(row, name):
    if not isinstance(row.get(name), str):
        raise ValueError(f"{name} is {row.get(name)!r:.80}; it must be a text")
    return row[name]


def _one_line(text):
    return text.replace("\r", "").replace("\n", "")
