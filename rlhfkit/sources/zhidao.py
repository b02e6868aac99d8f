"""Zhidao: question → the replies, 1 when marked best, 0 otherwise; rows of one title in one file are one Record.

A title may have several best replies or none. The 2023 kit wrote the prefix for the last title of a file only.
"""
import csv

from rlhfkit.records import Answer, Record, set_aside
from rlhfkit.sources.raw import files

LAYOUT = ("zhidao/*.csv",)
COLUMNS = ("title", "question", "reply", "is_best")


def read(folder, rng, rejected):
    """CSV with the columns title, question, reply, is_best → Records, in the order of the titles' first rows."""
    for path in files(folder, LAYOUT):
        groups = {}                                    # title -> (questions, answers)
        for title, question, answer in _rows(path, rejected):
            questions, answers = groups.setdefault(title, ([], []))
            answers.append(answer)
            if question.strip() and question != title:
                questions.append(question)
        for title, (questions, answers) in groups.items():
            prompt = f"问题：{title} 内容：{questions[0]}" if questions else f"问题：{title}"
            yield Record(prompt, answers, "答：", source="zhidao")


def _rows(path, rejected):
    # surrogateescape: a broken byte costs its row, not the file
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.reader(file)
        header = next(reader, [])
        if not set(COLUMNS) <= set(header):
            set_aside(rejected, path, 1, f"the columns must include {', '.join(COLUMNS)}; file left out", header)
            return
        while True:
            cells = []
            try:
                cells = next(reader)
                if cells:
                    yield _row(header, cells)
            except StopIteration:
                return
            except (ValueError, csv.Error) as error:
                set_aside(rejected, path, reader.line_num, error, cells)


def _row(header, cells):
    if len(cells) != len(header):
        raise ValueError(f"{len(cells)} cells; the header has {len(header)}; a quote may be missing")
    title, question, reply, is_best = (cells[header.index(name)] for name in COLUMNS)
    if not title.strip():
        raise ValueError(f"title is {title!r}; it must not be empty")
    if is_best not in ("0", "1"):
        raise ValueError(f"is_best is {is_best!r}; it must be 0 or 1")
    (title + question).encode()                        # UnicodeEncodeError is a ValueError; Answer checks the reply
    return title, question, Answer(reply, int(is_best))
