"""Record: one prompt with its answers, best first; written, split and paired. No torch. (formats.py reads them.)

On disk: JSON lines with the keys of the corpus published in 2023; a row that is no Record is set aside with file and
line. Unlike the 2023 kit: no dev prompt, nor a near duplicate of one, is in train (its dev was the first 10,000 rows of
train), and pairs are all strictly ordered ones (it took neighbours only, and from unsorted rows the worse as chosen).
"""
import codecs
import gzip
import json
import lzma
import os
import random
import re
import zlib
from collections import Counter
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import orjson
from xxhash import xxh3_64_intdigest

MOST = 1 << 63                      # of a score
LONGEST_LINE = 1 << 22              # bytes: a longer line is no row, but a file without line ends
BROKEN_ARCHIVE = (EOFError, lzma.LZMAError, zlib.error, gzip.BadGzipFile)
_BAD = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")     # all but tab and line ends


@dataclass(frozen=True, slots=True)
class Answer:
    text: str
    score: float

    def __post_init__(self):
        check_text("answer", self.text)
        if not isinstance(self.score, (int, float)) or isinstance(self.score, bool) or not -MOST < self.score < MOST:
            raise ValueError(f"score is {self.score!r:.80}; it must be a finite number; write 1 or 0.5, without quotes")


@dataclass(frozen=True, slots=True)
class Record:
    """`answers` come best first (equal scores keep their order); `history` holds earlier (user, assistant) turns."""
    prompt: str
    answers: tuple = ()
    prefix: str = ""
    system: str = ""
    history: tuple = ()
    source: str = ""

    def __post_init__(self):
        check_text("prompt", self.prompt)
        for name in ("prefix", "system", "source"):
            check_text(name, getattr(self, name), empty=True)
        for name in ("answers", "history"):
            if not isinstance(getattr(self, name), (list, tuple)):
                raise ValueError(f"{name} is {getattr(self, name)!r:.80}; it must be a list")
        for answer in self.answers:
            if not isinstance(answer, Answer):
                raise ValueError(f"an answer is {answer!r:.80}; it must be an Answer(text, score)")
        for turn in self.history:
            if not isinstance(turn, (list, tuple)) or len(turn) != 2:
                raise ValueError(f"a turn of history is {turn!r:.80}; it must be the two texts (user, assistant)")
            for text in turn:
                check_text("history", text, empty=True)
        object.__setattr__(self, "answers", tuple(sorted(self.answers, key=lambda answer: -answer.score)))
        object.__setattr__(self, "history", tuple(map(tuple, self.history)))


def write_records(records, path):
    """One JSON line a record, written beside `path` and renamed: a full disk or a kill leaves the old file as is."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(beside, "wb") as file:
            for record in records:
                file.write(to_line(record))
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def to_line(record):
    """The record as one line of the file, bytes with the line end."""
    row = {"prompt": record.prompt, "answers": [{"answer": a.text, "score": a.score} for a in record.answers]}
    row |= {key: getattr(record, key) for key in OPTIONAL if key == "prefix" or getattr(record, key)}
    return orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE | orjson.OPT_SERIALIZE_NUMPY)


def split(records, dev_fraction, seed):
    """(train, dev) by prompt: all records of a prompt and of its near duplicates (duplicates.prompt_groups) are on one side,
    `dev_fraction` of the distinct prompts in dev, or a little less where a group does not fit.

    Which ones depends on seed and texts alone, not on the order of the records. From two groups on no side is empty.
    """
    from rlhfkit.duplicates import prompt_groups        # numba: half a second, which not everybody needs
    prompts = list(dict.fromkeys(record.prompt for record in records))
    flags = dev_flags([prompt_key(prompt, seed) for prompt in prompts], prompt_groups(prompts), dev_fraction)
    dev = {prompt for prompt, held_out in zip(prompts, flags) if held_out}
    return [r for r in records if r.prompt not in dev], [r for r in records if r.prompt in dev]


def prompt_key(prompt, seed):
    """A number of 64 bits, by which prompts are ordered for the split."""
    return xxh3_64_intdigest(prompt.encode(), seed & (1 << 64) - 1)


def dev_flags(keys, groups, dev_fraction):
    """keys, groups (N,) of distinct prompts -> (N,) bool, True for those that are held out: whole groups, by the smallest of
    their keys, as long as they fit into `dev_fraction` of N, which is rounded, and one at the least."""
    import numpy as np
    if not isinstance(dev_fraction, (int, float)) or not 0 < dev_fraction < 1:
        raise ValueError(f"dev_fraction is {dev_fraction!r}; it must be between 0 and 1, both excluded; try 0.05")
    _, groups, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    first = np.full(len(sizes), np.iinfo(np.uint64).max)
    np.minimum.at(first, groups, np.asarray(keys, np.uint64))
    room, chosen = max(1, round(dev_fraction * len(groups))), []
    for group in first.argsort()[:-1]:                  # the last one stays: train must not be empty
        if sizes[group] <= room:                        # a group too large for dev is trained on
            chosen.append(group)
            room -= sizes[group]
            if not room:
                break
    if not chosen and len(sizes) > 1:
        chosen = np.lexsort((first, sizes))[:1]
    return np.isin(groups, chosen)


def pairs(record, rule="all", limit=0):
    """(chosen Answer, rejected Answer) where chosen has strictly the higher score and another text.

    rule "all": every such pair; "neighbours": the 2023 kit's, each answer with the last one that was better than its
    neighbour, n - 1 at the most. limit: at most so many, drawn without bias and the same for the same record; 0: all.
    """
    if rule not in ("all", "neighbours"):
        raise ValueError(f"rule is {rule!r}; it must be 'all' or 'neighbours'")
    if rule == "all":
        found = [(a, b) for a, b in combinations(record.answers, 2) if a.score > b.score and a.text != b.text]
    else:
        found, chosen = [], None
        for a, b in zip(record.answers, record.answers[1:]):
            chosen = a if a.score > b.score else chosen
            if chosen and chosen.text != b.text:
                found.append((chosen, b))
    if limit and len(found) > limit:
        found = [found[i] for i in sorted(random.Random(record.prompt).sample(range(len(found)), limit))]
    return found


def json_lines(path, rejected, part=(0, 1)):
    """(line number from 1, dict) of each JSON object in the file; all other lines but blank ones go to `rejected`.
    part (i, n): only every n-th line, from the i-th on, for n processes that share a file."""
    for line, text in text_lines(path, rejected, part):
        if not text or text.isspace():
            continue
        try:
            row = orjson.loads(text)
        except ValueError:
            try:
                row = json.loads(text)                  # it takes NaN and says better what is wrong
            except (ValueError, RecursionError) as error:
                set_aside(rejected, path, line, f"not JSON: {error}", text)
                continue
        if isinstance(row, dict):
            yield line, row
        else:
            set_aside(rejected, path, line, f"JSON, but a {type(row).__name__}; it must be an object with fields", text.strip())


def text_lines(path, rejected, part=(0, 1)):
    """(line number from 1, text without line end) of each UTF-8 line, blank ones too; the others go to `rejected`."""
    for line, raw in raw_lines(path, rejected, part):
        try:
            text = raw.decode().rstrip("\r\n")
        except UnicodeDecodeError as error:
            set_aside(rejected, path, line, f"not UTF-8 at byte {error.start + 1}", raw.decode("utf-8", "backslashreplace"))
        else:
            yield line, text


def raw_lines(path, rejected, part=(0, 1)):
    """(line number from 1, bytes) of this part's lines, also of a .gz or .xz. The lines before the break of a half-downloaded
    archive are kept, and the break is set aside, as are lines that are too long to be a row."""
    line = 0
    with open_bytes(path) as file:
        try:
            for line, raw in enumerate(iter(lambda: file.readline(LONGEST_LINE), b""), 1):
                size, last = len(raw), raw
                while len(last) == LONGEST_LINE and last[-1:] != b"\n":
                    last = file.readline(LONGEST_LINE)
                    size += len(last)
                if (line - 1) % part[1] != part[0]:
                    continue
                if size > len(raw):
                    set_aside(rejected, path, line, f"{size} bytes in one line; a row has at most {LONGEST_LINE}",
                              raw[:1000].decode("utf-8", "backslashreplace"))
                else:
                    yield line, raw.removeprefix(codecs.BOM_UTF8) if line == 1 else raw
        except BROKEN_ARCHIVE as error:
            if part[0] == 0:
                set_aside(rejected, path, line + 1, f"the archive ends early or is damaged ({error}): fetch it again", "")


def open_bytes(path):
    """The file, or what is in it when its name ends with .gz or .xz, to read bytes from."""
    opener = {".gz": gzip.open, ".xz": lzma.open}.get(Path(path).suffix, open)
    try:
        return opener(path, "rb")
    except PermissionError as error:
        raise PermissionError(f"{path} may not be read; it must be readable by you: chmod u+r, or ask its owner") from error


def set_aside(rejected, path, line, reason, row):
    """Keeps a bad row: all its text (half characters escaped, so that it can be printed), where it stood, and why."""
    text = row if isinstance(row, str) else json.dumps(row, ensure_ascii=False)
    text = text.encode("utf-8", "backslashreplace").decode()
    rejected.append({"file": str(path), "line": line, "reason": str(reason), "text": text})


class Aside:
    """A list that rows are set aside to, in a file: counts by kind of reason, and the first row, stay in memory."""

    def __init__(self, path):
        self.file, self.reasons, self.first = open(path, "wb"), Counter(), None

    def __len__(self):
        return sum(self.reasons.values())

    def append(self, row):
        self.file.write(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE))
        # what differs from row to row, texts in quotes and numbers, is left out of the kind
        self.reasons[re.sub(r"\d+", "n", re.sub(r"(['\"]).*?\1", "…", row["reason"]))[:120]] += 1
        self.first = self.first or row

    def extend(self, rows):
        for row in rows:
            self.append(row)


def check_text(name, text, empty=False):
    """Raise ValueError where `text` is no text, holds what no text should, or is empty and must not be."""
    if not isinstance(text, str):
        raise ValueError(f"{name} is {text!r:.80}; it must be a text")
    if not empty and (not text or text.isspace()):
        raise ValueError(f"{name} is {text!r:.80}; it must not be empty")
    if not text.isprintable() and (bad := _BAD.search(text)):
        what = "half a character" if "\ud800" <= bad[0] <= "\udfff" else "a control character"
        raise ValueError(f"{name} holds {bad[0]!r}, {what}; it must be valid UTF-8 without control characters")


OPTIONAL = ("prefix", "system", "history", "source")
