"""Zhidao: question → the replies, 1 when marked best, 0 otherwise; rows of one title in one file are one Record.

A title may have several best replies or none. The 2023 kit wrote the prefix for the last title of a file only. Rows are
brought together through files on disk, a part of the titles at a time, so that memory does not grow with the file.
"""
import tempfile
from contextlib import ExitStack
from pathlib import Path

import orjson
from xxhash import xxh3_64_intdigest

from rlhfkit.formats import csv_rows
from rlhfkit.records import Answer, Record, set_aside
from rlhfkit.sources.raw import TEMPLATES, files, first_share

LAYOUT = ("zhidao/*.csv",)
COLUMNS = ("title", "question", "reply", "is_best")
AT_ONCE = 1 << 24                   # bytes of a file whose titles are held at a time


def read(folder, rejected, seed=0, template=TEMPLATES["HEAD"], part=(0, 1)):
    """CSV with the columns title, question, reply, is_best → Records."""
    for path in files(folder, LAYOUT):
        aside = first_share(rejected, part)
        for group in _parts(_rows(path, aside, part), 1 + path.stat().st_size // (AT_ONCE * part[1])):
            titles = {}                                # title -> (line, questions, answers)
            for line, title, question, reply, best in group:
                _, questions, answers = titles.setdefault(title, (line, [], []))
                answers.append(Answer(reply, best))
                if question.strip() and question != title:
                    questions.append(question)
            for title, (line, questions, answers) in titles.items():
                prompt = f"问题：{title}{template.between}内容：{questions[0]}" if questions else f"问题：{title}"
                try:
                    yield Record(prompt, answers, template.reply, source="zhidao")
                except ValueError as error:            # control characters
                    set_aside(rejected, path, line, error, prompt)


def _rows(path, rejected, part):
    """(line, title, question, reply, 0 or 1) of the good rows whose title is this part's."""
    for line, row in csv_rows(path, rejected):
        if not set(COLUMNS) <= row.keys():
            set_aside(rejected, path, 1, f"the columns must include {', '.join(COLUMNS)}; file left out", ",".join(row))
            return
        try:
            title, question, reply, best = (row[name] for name in COLUMNS)
            if not title.strip():
                raise ValueError(f"title is {title!r}; it must not be empty")
            if best not in ("0", "1"):
                raise ValueError(f"is_best is {best!r}; it must be 0 or 1")
            Answer(reply, 0)
            mine = part[1] == 1 or xxh3_64_intdigest(title.encode()) % part[1] == part[0]
            question.encode()                          # half a character of a file that is not UTF-8
        except ValueError as error:
            set_aside(rejected, path, line, error, row)
            continue
        if mine:
            yield line, title, question, reply, int(best)


def _parts(rows, count):
    """The rows in `count` groups by title, one group in memory at a time."""
    if count == 1:
        yield rows
        return
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        outs = [stack.enter_context(open(Path(folder) / str(i), "w+b")) for i in range(count)]
        for row in rows:
            outs[xxh3_64_intdigest(row[1].encode(), 1) % count].write(orjson.dumps(row) + b"\n")
        for out in outs:
            out.seek(0)
            yield map(orjson.loads, out)
