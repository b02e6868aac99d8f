"""Records become rows of ids, one function a stage, and rows become batches; `show` makes the loss mask visible.

Only answers carry a loss; the 2023 kit trained on prompts and padding too. A record that cannot be used is set aside with a reason, never
dropped silently; packed rows keep documents apart by positions that restart at 0 and carry no attention mask.
"""
import hashlib
import random
from pathlib import Path

import torch

from rlhfkit.records import Record, pairs, read_records

AT_ONCE = 10_000        # records whose texts are tokenised together
IGNORE = -100           # the label that torch's cross-entropy leaves out


def read_data(path):
    """A JSON-lines file, or a folder with train.jsonl and perhaps dev.jsonl -> (train records, dev records, rows set aside)."""
    rejected, (train, *dev) = [], _files(path)
    records = read_records(train, rejected)
    return records, read_records(dev[0], rejected) if dev else [], rejected


def data_hash(path):
    """Hash of the bytes that `read_data` reads, 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for file in _files(path):
        with open(file, "rb") as f:
            for block in iter(lambda: f.read(1 << 20), b""):
                digest.update(block)
    return digest.hexdigest()[:16]


def text_rows(records, family, tokenizer, max_length):
    """Pre-training: each record's text as one document, packed -> (rows, set aside). Longer documents are cut into pieces, no token lost.
    Families that read both ways (GLM) learn to fill blanks: a piece's beginning is read, its end or a span of it written."""
    def pieces(record):
        read, ids = family.encode_text(tokenizer, text_of(record))
        room, made = max_length - len(read) - (2 if family.blank else 0), []
        for start in range(0, len(ids), room):
            head, part = family.blank(tokenizer, ids[start:start + room]) if family.blank else (read, ids[start:start + room])
            made.append(dict(input_ids=head + part, labels=[IGNORE] * len(head) + part))
        return made
    rows, rejected = _rows(records, pieces, tokenizer, lambda record: [text_of(record)])
    return pack(rows, max_length), rejected


def text_of(record):
    """Prompt, prefix and best answer as one text."""
    return record.prompt + record.prefix + (record.answers[0].text if record.answers else "")


def documents(records):
    """Records for pre-training: each prompt and each best answer as a text of its own, so that the task itself stays unseen."""
    return [Record(prompt=text, source=r.source) for r in records for text in (r.prompt, *(a.text for a in r.answers[:1])) if text]


def pack(rows, max_length):
    """Rows laid end to end, in order, into rows of at most max_length; positions restart, and nothing predicts a document's first token."""
    packed, used = [], max_length
    for row in rows:
        ids, labels = row["input_ids"], [IGNORE] + row["labels"][1:]
        if used + len(ids) > max_length:
            packed.append(dict(id=len(packed), source="", input_ids=[], labels=[], position_ids=[]))
            used = 0
        used += len(ids)
        packed[-1]["input_ids"] += ids
        packed[-1]["labels"] += labels
        packed[-1]["position_ids"] += range(len(ids))
    return packed


def sft_rows(records, family, tokenizer, max_length, packing=False):
    """The best answer of each record, loss on the answer and its end token -> (rows, set aside)."""
    def row(record):
        if not record.answers or not record.answers[0].text:
            raise ValueError("no answer")
        prompt, answer = family.encode(tokenizer, record, record.answers[0].text, max_length)
        return dict(input_ids=prompt + answer, labels=[IGNORE] * len(prompt) + answer)
    rows, rejected = _rows(records, row, tokenizer, lambda record: _asked(record)[:4])
    return (pack(rows, max_length) if packing else rows), rejected


def reward_rows(records, family, tokenizer, max_length):
    """All scored answers of a prompt together: `answers` (prompt and answer ids) and `scores` -> (rows, set aside)."""
    def row(record):
        if not pairs(record):
            raise ValueError("no answer is better than another")
        answers = [family.encode(tokenizer, record, a.text)[1] for a in record.answers]
        prompt, _ = family.encode(tokenizer, record, record.answers[_longest(answers)].text, max_length)
        return dict(answers=[prompt + ids for ids in answers],
                    scores=[a.score for a in record.answers])
    return _rows(records, row, tokenizer, _asked)


def pair_rows(records, family, tokenizer, max_length, pairs_per_prompt=1, seed=0):
    """DPO: `prompt_ids, chosen_ids, rejected_ids`, up to pairs_per_prompt drawn by seed; one prompt encoding serves both sides."""
    rng = random.Random(seed)

    def row(record):
        found = pairs(record)
        if not found:
            raise ValueError("no answer is better than another")
        made = []
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


def _files(path):
    """The files of a data_path that there are, training rows first."""
    path = Path(path)
    train, dev = (path / "train.jsonl", path / "dev.jsonl") if path.is_dir() else (path, path)
    if not train.is_file():
        raise FileNotFoundError(f"data_path {path} has no training rows; expected a JSON-lines file, or a folder with train.jsonl")
    return [train, dev] if dev != train and dev.is_file() else [train]


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
        raise ValueError(f"none of {len(records)} records can be used; the first: {rejected[0]['reason']}")
    return rows, rejected


def _asked(record):
    """What an `encode` asks of a record without earlier turns."""
    return ["", record.prompt, record.prefix, *(answer.text for answer in record.answers)]
