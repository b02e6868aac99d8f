"""Records become rows of ids, one function a stage, and rows become batches; `show` makes the loss mask visible.

Only answers carry a loss; the 2023 kit trained on prompts and padding too. A record that cannot be used is set aside with a reason, never
dropped silently; packed rows keep documents apart by positions that restart at 0 and carry no attention mask.
"""
import hashlib
import os
import random
import time
from pathlib import Path

import torch

from rlhfkit.formats import read_records
from rlhfkit.packing import IGNORE, Packed
from rlhfkit.records import Record, pairs

AT_ONCE = 10_000        # records whose texts are tokenised together
FOLDER = ".rows"        # beside the data: what is remembered of them (cache.py)


class NoRow(ValueError):
    """Not one of so many records can be used; `rejected` says why."""

    def __init__(self, count, rejected):
        super().__init__(f"none of {count} records can be used; the first: {rejected[0]['reason']}")
        self.rejected = rejected


def read_data(path):
    """A file of rows, or a folder with train.jsonl and perhaps dev.jsonl -> (train records, dev records, rows set aside)."""
    rejected, (train, *dev) = [], data_files(path)
    records = read_records(train, rejected)
    return records, read_records(dev[0], rejected) if dev else [], rejected


def data_files(path):
    """The files of a data_path that there are, training rows first."""
    path = Path(path)
    train, dev = (path / "train.jsonl", path / "dev.jsonl") if path.is_dir() else (path, path)
    if not train.is_file():
        raise FileNotFoundError(f"data_path {path} has no training rows; expected a JSON-lines file, or a folder with train.jsonl")
    return [train, dev] if dev != train and dev.is_file() else [train]


def data_hash(path):
    """Hash of the bytes of the data, 16 hexadecimal digits; noted beside them: files of the same size and time are not read again."""
    files, digest = data_files(path), hashlib.sha256()
    stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    note = beside(path) / f"{hashlib.sha256(repr(stats).encode()).hexdigest()[:16]}.data"
    if note.is_file():
        return note.read_text()
    for file in files:
        with open(file, "rb") as f:
            for block in iter(lambda: f.read(1 << 20), b""):
                digest.update(block)
    written = max(modified for _, _, modified in stats)
    if time.time_ns() - written > 2e9 and writable(note.parent):    # a file just written may change again unseen by its clock
        part = note.with_suffix(f".{os.getpid()}")
        part.write_text(digest.hexdigest()[:16])
        os.replace(part, note)
    return digest.hexdigest()[:16]


def beside(path):
    """The folder for what is remembered of a data_path."""
    return (Path(path) if Path(path).is_dir() else Path(path).parent) / FOLDER


def writable(folder):
    """Whether the folder, made where it is not there, can be written into."""
    try:
        folder.mkdir(exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK)


def text_rows(records, family, tokenizer, max_length, packing=True):
    """Pre-training: each record's text as one document, packed -> (rows, set aside). Longer documents are cut into pieces, no token lost.
    Families that read both ways (GLM) learn to fill blanks: a piece's beginning is read, its end or a span of it written."""
    def pieces(record):
        read, ids = family.encode_text(tokenizer, text_of(record))
        template = len(read) + (2 if family.blank else 0)
        room, made = max_length - template, []
        if room < 1:
            raise ValueError(f"max_length is {max_length}; a document takes {template} tokens beside its text: "
                             f"set it to {template + 1} or more")
        for start in range(0, len(ids), room):
            head, part = family.blank(tokenizer, ids[start:start + room]) if family.blank else (read, ids[start:start + room])
            made.append(dict(input_ids=head + part, labels=[IGNORE] * len(head) + part))
        return made
    rows, rejected = _rows(records, pieces, tokenizer, lambda record: [text_of(record)])
    return (pack(rows, max_length) if packing else rows), rejected


def text_of(record):
    """Prompt, prefix and best answer as one text."""
    return record.prompt + record.prefix + (record.answers[0].text if record.answers else "")


def documents(records):
    """Records for pre-training, one by one: each prompt and each best answer as a text of its own, so that the task itself stays unseen."""
    return (Record(prompt=text, source=r.source) for r in records for text in (r.prompt, *(a.text for a in r.answers[:1])) if text)


def pack(rows, max_length):
    """Rows laid into as few rows of at most max_length as best fit finds (packing.py), in no way across documents."""
    return Packed(rows, max_length)


def sft_rows(records, family, tokenizer, max_length, packing=False):
    """The best answer of each record, loss on the answer and its end token -> (rows, set aside)."""
    def row(record):
        if not record.answers or not record.answers[0].text:
            raise ValueError("no answer")
        prompt, answer = family.encode(tokenizer, record, record.answers[0].text, max_length)
        return dict(input_ids=prompt + answer, labels=[IGNORE] * len(prompt) + answer)
    rows, rejected = _rows(records, row, tokenizer, lambda record: _asked(record)[:4])
    return (pack(rows, max_length) if packing else rows), rejected


def reward_rows(records, family, tokenizer, max_length, max_answers=0):
    """The scored answers of a prompt together: `answers` (prompt and answer ids) and `scores` -> (rows, set aside). Of more than max_answers
    (0: no limit) the best, the worst and some evenly between."""
    def row(record):
        some = _spread(record.answers, max_answers)
        if not some or some[0].score == some[-1].score:
            raise ValueError("no answer is better than another")
        answers = [family.encode(tokenizer, record, a.text)[1] for a in some]
        prompt, _ = family.encode(tokenizer, record, some[_longest(answers)].text, max_length)
        return dict(answers=[prompt + ids for ids in answers], scores=[a.score for a in some])
    return _rows(records, row, tokenizer, _asked)


def pair_rows(records, family, tokenizer, max_length, pairs_per_prompt=1, seed=0, pair_rule="all"):
    """DPO: `prompt_ids, chosen_ids, rejected_ids`, up to pairs_per_prompt drawn by seed and prompt, whatever the records before;
    one prompt encoding serves both sides. pair_rule: as in `pairs`."""
    def row(record):
        found = pairs(record, pair_rule)
        if not found:
            raise ValueError("no answer is better than another")
        made, rng = [], random.Random(f"{seed}\n{record.prompt}")
        for chosen, rejected in rng.sample(found, min(pairs_per_prompt, len(found))):
            sides = [family.encode(tokenizer, record, a.text)[1] for a in (chosen, rejected)]
            prompt, _ = family.encode(tokenizer, record, (chosen, rejected)[_longest(sides)].text, max_length)
            made.append(dict(prompt_ids=prompt, chosen_ids=sides[0], rejected_ids=sides[1]))
        return made
    return _rows(records, row, tokenizer, _asked)


def prompt_rows(records, family, tokenizer, max_length):
    """Prompts for generation: `prompt_ids`, at most max_length of them -> (rows, set aside); the record rides along."""
    return _rows(records, lambda r: dict(prompt_ids=family.encode(tokenizer, r, None, max_length)[0], record=r), tokenizer,
                 lambda record: _asked(record)[:3])


def collate(rows, pad_id, side="right"):
    """Rows -> input_ids, labels, attention_mask (B, T); packed rows get position_ids instead of a mask, padding being a document more."""
    length = max(len(row["input_ids"]) for row in rows)
    batch = dict(input_ids=pad([row["input_ids"] for row in rows], pad_id, length, side),
                 labels=pad([row["labels"] for row in rows], IGNORE, length, side))
    if "position_ids" in rows[0]:
        batch["position_ids"] = torch.tensor([row["position_ids"] + list(range(length - len(row["position_ids"]))) for row in rows])
    else:
        batch["attention_mask"] = pad([[1] * len(row["input_ids"]) for row in rows], 0, length, side)
    return batch


def collate_answers(rows, pad_id):
    """Reward rows -> input_ids, attention_mask (N, T) of all their answers, scores (N,), prompt (N,) the row each belongs to."""
    answers = [ids for row in rows for ids in row["answers"]]
    return dict(input_ids=pad(answers, pad_id), attention_mask=pad([[1] * len(ids) for ids in answers], 0),
                scores=torch.tensor([float(s) for row in rows for s in row["scores"]]),
                prompt=torch.tensor([i for i, row in enumerate(rows) for _ in row["answers"]]))


def pad(lists, value, length=None, side="right"):
    """Lists of ints -> (B, T) int64, filled with `value` on `side`."""
    length = length or max(map(len, lists))
    return torch.tensor([x + [value] * (length - len(x)) if side == "right" else [value] * (length - len(x)) + x for x in lists])


def show(row, tokenizer):
    """A row as text with what is trained on between ⟦ and ⟧; rows without labels (prompts, answers) as plain text."""
    if "labels" not in row:
        sides = [row["prompt_ids"] + row[side] for side in ("chosen_ids", "rejected_ids") if side in row]
        return "\n".join(tokenizer.decode(ids) for ids in row.get("answers") or sides or [row["prompt_ids"]])
    parts, start = [], 0
    ids, trained = row["input_ids"], [label != IGNORE for label in row["labels"]]
    for i in range(1, len(ids) + 1):
        if i == len(ids) or trained[i] != trained[start]:
            text = tokenizer.decode(ids[start:i])
            parts.append(f"⟦{text}⟧" if trained[start] else text)
            start = i
    return "".join(parts)


def _spread(items, most):
    """`items`, or `most` of them from the first to the last."""
    if not most or len(items) <= most:
        return items
    return [items[round(i * (len(items) - 1) / max(1, most - 1))] for i in range(most)]


def _longest(lists):
    return max(range(len(lists)), key=lambda i: len(lists[i]))


def _rows(records, build, tokenizer, texts):
    """`build(record)` for each -> (rows, set aside). texts: record -> the texts that it will ask `tokenizer` for, which are then tokenised
    many at a time where the tokenizer can (Pangu's is ten times as fast so)."""
    rows, rejected = [], []
    for start in range(0, len(records), AT_ONCE):
        part = records[start:start + AT_ONCE]
        if hasattr(tokenizer, "remember"):
            tokenizer.remember(text for record in part for text in texts(record))
        for i, record in enumerate(part, start):
            try:
                made = build(record)
            except ValueError as error:
                rejected.append(dict(id=i, source=record.source, reason=str(error), text=record.prompt[:80]))
                continue
            rows += [dict(id=i, source=record.source, **r) for r in (made if isinstance(made, list) else [made])]
    if hasattr(tokenizer, "remember"):
        tokenizer.remember([])
    if records and not rows:
        raise NoRow(len(records), rejected)
    return rows, rejected


def _asked(record):
    """What an `encode` asks of a record without earlier turns."""
    return ["", record.prompt, record.prefix, *(answer.text for answer in record.answers)]
