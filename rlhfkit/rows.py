"""Records become rows of ids, one function a stage, and rows become batches; `show` makes the loss mask visible.

Only answers carry a loss; the 2023 kit trained on prompts and padding too. A record that cannot be used is set aside with a
reason; packed rows keep documents apart by positions that restart at 0 and carry no attention mask.
"""
import hashlib
import os
import random
import time
from itertools import groupby
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
        raise FileNotFoundError(f"data_path {path} has no training rows; expected a JSON-lines file, or a folder with "
                                "train.jsonl")
    return [train, dev] if dev != train and dev.is_file() else [train]


def data_hash(path):
    """Hash of the bytes of the data, 16 digits; noted beside them: files of the same size and time are not read again."""
    files = data_files(path)
    stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    note = beside(path) / f"{hashlib.sha256(repr(stats).encode()).hexdigest()[:16]}.data"
    if note.is_file():
        return note.read_text()
    digest = hashlib.sha256()
    for file in files:
        with open(file, "rb") as f:
            hashlib.file_digest(f, lambda: digest)              # goes on with the same one
    found = digest.hexdigest()[:16]
    if time.time_ns() - max(modified for *_, modified in stats) > 2e9 and writable(note.parent):    # newer ones may change unseen
        part = note.with_suffix(f".{os.getpid()}")
        part.write_text(found)
        os.replace(part, note)
    return found


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
    """Pre-training: each record's text as one document, packed -> (rows, set aside). Longer documents are cut into pieces, no
    token lost. Families that read both ways (GLM) fill blanks: a piece's beginning is read, its end or a span of it written."""
    def pieces(record):
        read, ids = family.encode_text(tokenizer, text_of(record))
        template = len(read) + (2 if family.blank else 0)
        room, made = max_length - template, []
        if room < 1:
            raise ValueError(f"max_length is {max_length}; a document takes {template} tokens beside its text: "
                             f"set it to {template + 1} or more")
        for start in range(0, len(ids), room):
            part = ids[start:start + room]
            head, part = family.blank(tokenizer, part) if family.blank else (read, part)
            made.append(dict(input_ids=head + part, labels=[IGNORE] * len(head) + part))
        return made
    return _rows(records, pieces, tokenizer, lambda record: [text_of(record)], max_length if packing else 0)


def text_of(record):
    """Prompt, prefix and best answer as one text."""
    return record.prompt + record.prefix + (record.answers[0].text if record.answers else "")


def documents(records):
    """Records for pre-training, one by one: each prompt and each best answer as a text of its own: the task stays unseen."""
    return (Record(text, source=r.source) for r in records for text in (r.prompt, *(a.text for a in r.answers[:1])))


def pack(rows, max_length):
    """Rows laid into as few rows of at most max_length as best fit finds (packing.py), in no way across documents."""
    return Packed(rows, max_length)


def sft_rows(records, family, tokenizer, max_length, packing=False):
    """The best answer of each record, loss on the answer and its end token -> (rows, set aside)."""
    def row(record):
        if not record.answers:
            raise ValueError("no answer")
        prompt, answer = family.encode(tokenizer, record, record.answers[0].text, max_length)
        return [dict(input_ids=prompt + answer, labels=[IGNORE] * len(prompt) + answer)]
    return _rows(records, row, tokenizer, lambda record: _asked(record)[:4], max_length if packing else 0)


def reward_rows(records, family, tokenizer, max_length, max_answers=0):
    """The scored answers of a prompt together: `answers` (prompt and answer ids) and `scores` -> (rows, set aside). Of more than
    max_answers (0: no limit) the best, the worst and some evenly between."""
    def row(record):
        some, last = record.answers, len(record.answers) - 1
        if 0 < max_answers <= last:
            some = [some[round(i * last / max(1, max_answers - 1))] for i in range(max_answers)]
        if not some or some[0].score == some[-1].score:
            raise ValueError("no answer is better than another")
        prompt, answers = _sides(record, some, family, tokenizer, max_length)
        return [dict(answers=[prompt + ids for ids in answers], scores=[a.score for a in some])]
    return _rows(records, row, tokenizer, _asked)


def pair_rows(records, family, tokenizer, max_length, pairs_per_prompt=1, seed=0, pair_rule="all"):
    """DPO: `prompt_ids, chosen_ids, rejected_ids`, up to pairs_per_prompt drawn by seed and prompt, whatever the records before;
    one prompt encoding serves both sides. pair_rule: as in `pairs`."""
    def row(record):
        found, rng = pairs(record, pair_rule), random.Random(f"{seed}\n{record.prompt}")
        if not found:
            raise ValueError("no answer is better than another")
        drawn = rng.sample(found, min(pairs_per_prompt, len(found)))
        made = [_sides(record, pair, family, tokenizer, max_length) for pair in drawn]
        return [dict(prompt_ids=prompt, chosen_ids=chosen, rejected_ids=rejected) for prompt, (chosen, rejected) in made]
    return _rows(records, row, tokenizer, _asked)


def prompt_rows(records, family, tokenizer, max_length):
    """Prompts for generation: `prompt_ids`, at most max_length of them -> (rows, set aside); the record rides along."""
    return _rows(records, lambda r: [dict(prompt_ids=family.encode(tokenizer, r, None, max_length)[0], record=r)], tokenizer,
                 lambda record: _asked(record)[:3])


def collate(rows, pad_id):
    """Rows -> input_ids, labels, attention_mask (B, T); packed rows get position_ids, padding being a document more."""
    ids, labels = ([row[name] for row in rows] for name in ("input_ids", "labels"))
    batch = dict(input_ids=pad(ids, pad_id), labels=pad(labels, IGNORE))
    if "position_ids" in rows[0]:
        length = batch["labels"].shape[1]
        batch["position_ids"] = torch.tensor([[*row["position_ids"], *range(length - len(row["labels"]))] for row in rows])
    else:
        batch["attention_mask"] = pad([[1] * len(row) for row in ids], 0)
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
    gaps = [[value] * (length - len(x)) for x in lists]
    return torch.tensor([x + gap if side == "right" else gap + x for x, gap in zip(lists, gaps)])


def show(row, tokenizer):
    """A row as text with what is trained on between ⟦ and ⟧; rows without labels (prompts, answers) as plain text."""
    if "labels" not in row:
        sides = [row["prompt_ids"] + row[side] for side in ("chosen_ids", "rejected_ids") if side in row]
        return "\n".join(tokenizer.decode(ids) for ids in row.get("answers") or sides or [row["prompt_ids"]])
    parts = []
    for trained, pairs_of in groupby(zip(row["input_ids"], row["labels"]), key=lambda pair: pair[1] != IGNORE):
        text = tokenizer.decode([token for token, _ in pairs_of])
        parts.append(f"⟦{text}⟧" if trained else text)
    return "".join(parts)


def _sides(record, answers, family, tokenizer, max_length):
    """-> ids of the prompt, as short as the longest of the answers needs it, and of each answer."""
    ids = [family.encode(tokenizer, record, answer.text)[1] for answer in answers]
    longest = max(range(len(ids)), key=lambda i: len(ids[i]))
    return family.encode(tokenizer, record, answers[longest].text, max_length)[0], ids


def _rows(records, build, tokenizer, texts, packed=0):
    """`build(record)`, a list of rows, for each -> (rows, set aside); packed: into rows of that length. texts: record -> the
    texts that it will ask `tokenizer` for, tokenised many at a time where the tokenizer can (Pangu's is ten times as fast)."""
    rows, rejected = [], []
    for start in range(0, len(records), AT_ONCE):
        part = records[start:start + AT_ONCE]
        if hasattr(tokenizer, "remember"):
            tokenizer.remember(text for record in part for text in texts(record))
        for i, record in enumerate(part, start):
            try:
                rows += [dict(id=i, source=record.source, **row) for row in build(record)]
            except ValueError as error:
                rejected.append(dict(id=i, source=record.source, reason=str(error), text=record.prompt[:80]))
    if hasattr(tokenizer, "remember"):
        tokenizer.remember([])
    if records and not rows:
        raise NoRow(len(records), rejected)
    return (pack(rows, packed) if packed else rows), rejected


def _asked(record):
    """What an `encode` asks of a record without earlier turns."""
    return ["", record.prompt, record.prefix, *(answer.text for answer in record.answers)]
