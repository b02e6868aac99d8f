"""The item log of an evaluation: items.jsonl, a line an item, appended while items are scored, in chunks.

A line counts as long as its key fits, a hash of model, data row, rendered prompt, choices and scoring: so an evaluation
that was killed goes on, and what changed is scored again. The 2023 kit kept nothing until the end.
"""
import hashlib
import inspect
import json
import os
from dataclasses import astuple
from itertools import groupby
from pathlib import Path

import torch

FORM = 1                        # of keys and lines; raise it when the scorers make something else of the same item
LEAST, MOST = 64, 256           # items a chunk
HEAD = 1 << 20                  # bytes of each file of a model that are read for its identity
FILES = ("*.safetensors", "*.bin", "*config*.json", "*index.json", "*token*", "*vocab*", "*.model", "*.tiktoken", "merges.txt")
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def identity(model):
    """Hash of what a model is: 16 hexadecimal digits.

    A folder: names, sizes, times and heads of its weights, configs and vocabularies. A (model, tokenizer) pair: classes,
    config, a checksum of the parameters, the vocabulary. Any other object: its class with the source of its two methods,
    its attributes that are texts, the parameters of modules that it holds.
    """
    if isinstance(model, (str, os.PathLike)):
        files = sorted({file for pattern in FILES for file in Path(model).glob(pattern) if file.is_file()})
        return _hash([(f.name, f.stat().st_size, f.stat().st_mtime_ns, _head(f)) for f in files])
    return _hash([_facts(part) for part in (model if isinstance(model, (tuple, list)) else [model])])


def key_of(model, task, example, record, choices, others=()):
    """The key of an item. model: its identity; others: ids of the items that its noise depends on, for sampled answers."""
    return _hash([FORM, model, task.name, task.scoring, task.max_new_tokens, task.temperature, example, astuple(record),
                  choices, others])


def chunks(questions, subject_of):
    """Lists of some 64 to 256 questions, in order; those of a subject together, as the scorer computes their shots once."""
    chunk = []
    for _, group in groupby(questions, subject_of):
        group = list(group)
        if chunk and len(chunk) + len(group) > MOST:
            yield chunk
            chunk = []
        chunk += group
        while len(chunk) > MOST:
            yield chunk[:MOST]
            chunk = chunk[MOST:]
        if len(chunk) >= LEAST:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def take_over(folder, keys):
    """{key: line} of an earlier evaluation in this folder, as far as its lines still fit."""
    lines = read_items(folder) if (Path(folder) / "items.jsonl").is_file() else []
    return {line["key"]: line for line in lines if line.get("key") in keys}


def begin(folder, known):
    """Cuts the file down to the known lines; the table goes until it is whole again."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    write_whole(Path(folder) / "items.jsonl", _text(known.values()))
    for name in ("table.csv", "submission.json"):
        (Path(folder) / name).unlink(missing_ok=True)


def append(folder, lines):
    with open(Path(folder) / "items.jsonl", "a", encoding="utf-8") as file:
        file.write(_text(lines))


def read_items(folder):
    """The lines of a folder's items.jsonl, without a last one that is half written. FileNotFoundError where there is none."""
    file = Path(folder) / "items.jsonl"
    if not file.is_file():
        raise FileNotFoundError(f"{folder} holds no evaluation (no items.jsonl); give the output_dir of rk.evaluate")
    lines, items = file.read_bytes().split(b"\n"), []
    for number, line in enumerate(lines, 1):
        try:
            items += [json.loads(line)] if line else []
        except ValueError as error:                             # UnicodeDecodeError is one
            if number < len(lines):
                raise ValueError(f"{file}, line {number} is damaged ({error}); delete the line, and evaluate again") from error
    return items


def save(folder, items, table):
    """items.jsonl and table.csv; submission.json of items without labels whose choices are letters, as C-Eval's site takes it:
    {subject: {number: letter}}."""
    texts = {"items.jsonl": _text(items), "table.csv": table.to_csv(index=False)}
    submission = {}
    for item in items:
        if item["scoring"] == "letters" and item["gold"] is None:
            letter = item["choices"][item["scores"].index(max(item["scores"]))]
            submission.setdefault(item["subject"], {})[item["id"].removeprefix(f"{item['subject']}/")] = letter
    if submission:
        texts["submission.json"] = json.dumps(submission, indent=1)
    for name, text in texts.items():
        write_whole(Path(folder) / name, text)


def write_whole(path, text):
    """A file is there as a whole or not at all: written beside and renamed."""
    beside = Path(f"{path}.partial")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)


def _facts(part):
    name = type(part).__qualname__
    if hasattr(part, "named_parameters"):
        return [name, str(getattr(part, "config", "")), _checksum(part)]
    if hasattr(part, "get_vocab"):
        return [name, sorted(part.get_vocab().items())]
    methods = [getattr(type(part), method) for method in ("loglikelihoods", "generate") if hasattr(type(part), method)]
    own = getattr(part, "__dict__", {})
    held = [_checksum(value) for value in own.values() if isinstance(value, torch.nn.Module)]
    texts = sorted((k, v) for k, v in own.items() if isinstance(v, str))
    return [name, list(map(_source, methods)), texts, held]


def _checksum(model):
    """Shape and sum of the bits of each tensor, in whole numbers: exact for any device, number of threads and order."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return [(name, str(t.dtype), list(t.shape), int(t.detach().view(BITS[t.element_size()]).sum(dtype=torch.int64)))
            for name, t in tensors.items()]


def _source(method):
    try:
        return inspect.getsource(method)
    except (OSError, TypeError):                                # typed into an interpreter
        return ""


def _head(file):
    with open(file, "rb") as f:
        return hashlib.sha256(f.read(HEAD)).hexdigest()


def _hash(value):
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=repr).encode()).hexdigest()[:16]


def _text(lines):
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
