"""Rows are tokenised once: `.rows/<key>/` beside the data holds them as Arrow, memory-mapped; it may be deleted at any time.

The key is a hash of all that rows depend on: data, tokenizer, family, builder with its arguments, our code. Made by one
process of a machine at a time, beside and then renamed; rows of other keys stay. The 2023 kit read and tokenised the whole
file in each process at each start.
"""
import fcntl
import hashlib
import inspect
import itertools
import json
import os
import shutil
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path

import joblib
import pyarrow as pa

from rlhfkit.formats import stream_records
from rlhfkit.forms import to_record
from rlhfkit.records import Aside, to_line
from rlhfkit.rows import AT_ONCE, FOLDER, NoRow, beside, data_files, data_hash, writable
from rlhfkit.tokenizers.spread import no_collection

CHARACTERS = 1 << 22    # a chunk of records ends here, or at AT_ONCE of them: 200 MB of memory at the most
HERE = 8                # so many chunks are tokenised in this process, a second each: others take 5 s to start
LIBRARIES = ("transformers", "tokenizers", "sentencepiece", "jieba")
SOURCES = ("cache.py", "rows.py", "formats.py", "forms.py", "records.py", "encodings.py", "tokenizers/*.py")
IDS = pa.large_list(pa.int32())
TYPES = {"id": pa.int64(), "source": pa.string(), "record": pa.string(), "scores": pa.large_list(pa.float64()),
         "answers": pa.large_list(IDS), "length": pa.int64()}


@dataclass
class Prepared:
    """What `prepared` found or made: rows, the held-out records, and `facts` (counts and reasons of what `aside.jsonl` lists)."""

    folder: Path
    train: Sequence
    dev: Sequence
    facts: dict
    dev_records: Sequence = ()
    seconds: float = 0.0    # that it took to make them, 0 from the cache


def prepared(config, build, num_proc=0):
    """The rows of the run's data -> Prepared, beside the data or, where that cannot be written, in output_dir.

    build: a functools.partial of a function of rows.py over family, tokenizer and other keywords; its `packing` is left to
    the caller, so that the rows serve both ways. num_proc: processes, 0 for a core each, 16 at the most.
    Raises ValueError when no record can be used.
    """
    start, files, key = time.perf_counter(), data_files(config.data_path), _key(config.data_path, build)
    homes = beside(config.data_path), Path(config.output_dir) / FOLDER
    found = next(filter(None, (_opened(home / key) for home in homes)), None)
    if not found:
        folder = homes[not writable(homes[0])] / key
        folder.parent.mkdir(exist_ok=True)
        with open(Path(tempfile.gettempdir()) / f"rlhfkit-{os.getuid()}-{key}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)            # one process of a user on a machine; one that is killed lets go
            if not _opened(folder):                     # another may have made it meanwhile
                _make(folder, files, build, num_proc or min(16, joblib.cpu_count()))
            Path(lock.name).unlink(missing_ok=True)     # whoever comes now finds what was made
        found = _opened(folder)
        found.seconds = time.perf_counter() - start
    found.dev_records = [record for file in files[1:] for record in stream_records(file, [])]
    return found


def arguments_of(build):
    """The keywords of a partial, those that its function has by default too."""
    return {name: p.default for name, p in inspect.signature(build).parameters.items() if p.default is not p.empty}


class Rows(Sequence):
    """Rows of a file: rows[i] is a dict of plain Python, a slice a list of them; no other row is read. `lengths`: tokens a row,
    numpy (N,)."""

    def __init__(self, path):
        self.path = str(path)
        table = pa.ipc.open_file(pa.memory_map(self.path)).read_all()
        self.columns = dict(zip(table.column_names, table.columns))
        self.lengths = self.columns.pop("length").to_numpy()

    def __reduce__(self):
        return Rows, (self.path,)

    def __len__(self):
        return len(self.lengths)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        index = range(len(self))[index]
        row = {name: _plain(column[index]) for name, column in self.columns.items()}
        return row | {"record": to_record(json.loads(row["record"]))} if "record" in row else row


def _key(path, build):
    """16 hexadecimal digits of all that the rows depend on. A tokenizer is what it writes of itself, wherever it is from."""
    from datasets.fingerprint import Hasher             # a second that the processes which tokenise can do without
    arguments = arguments_of(build)
    family, tokenizer = arguments.pop("family"), arguments.pop("tokenizer")
    arguments.pop("packing", None)
    functions = [build.func, family.encode, family.encode_text, family.blank]
    modules = [sys.modules.get(getattr(function, "__module__", None)) for function in functions]
    code = {file for pattern in SOURCES for file in Path(__file__).parent.glob(pattern)}
    code |= {Path(module.__file__) for module in modules if getattr(module, "__file__", None)}
    values = [data_hash(path), [(file.name, file.stat().st_size) for file in data_files(path)], build.func.__name__, family.name,
              sorted(arguments.items()), [version(name) for name in LIBRARIES], Hasher.hash(functions)]     # of a notebook too
    digest = hashlib.sha256(repr(values).encode())
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        for file in sorted(code) + sorted(p for p in Path(folder).rglob("*") if p.is_file()):
            digest.update(f"{file.name} {file.stat().st_size} ".encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def _opened(folder):
    """What a whole folder holds, or None where there is none or it is damaged."""
    try:
        facts = json.loads((folder / "facts.json").read_text(encoding="utf-8"))
        (folder / "aside.jsonl").stat()
        train, dev = Rows(folder / "train.arrow"), Rows(folder / "dev.arrow") if facts["dev"] else []
        return Prepared(folder, train, dev, facts) if (len(train), len(dev)) == (facts["train"], facts["dev"]) else None
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException):
        return None


def _make(folder, files, build, num_proc):
    part = folder.with_name(f".{folder.name}.{socket.gethostname()}")
    shutil.rmtree(part, ignore_errors=True)                     # of a process that was killed
    part.mkdir()
    try:
        aside, counts = Aside(part / "aside.jsonl"), {}
        with aside.file:
            for split, file in zip(("train", "dev"), files):
                counts[split] = _make_split(part, split, file, build, num_proc, aside)
        facts = {split: counts.get(split, Counter())["rows"] for split in ("train", "dev")}
        facts |= {"reasons": aside.reasons.most_common(3), "aside": len(aside),
                  "total": sum(count["records"] + count["unread"] for count in counts.values())}
        (part / "facts.json").write_text(json.dumps(facts, ensure_ascii=False), encoding="utf-8")
        if not _opened(folder):                                 # another machine may have been quicker
            shutil.rmtree(folder, ignore_errors=True)           # damaged
            os.replace(part, folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _make_split(part, split, file, build, num_proc, aside):
    """Rows into <split>.arrow, what is set aside to `aside` -> Counter of rows, records, unread."""
    counts, first, writer, parts = Counter(), [], None, _parts(file)
    some = list(itertools.islice(parts, HERE + 1))
    build = partial(build, packing=False) if "packing" in arguments_of(build) else build
    work = (joblib.delayed(_tokenised)(build, *part) for part in itertools.chain(some, parts))
    # two chunks a process wait at the most, so that memory is bounded
    done = joblib.Parallel(num_proc if len(some) > HERE else 1, return_as="generator")(work)
    for records, unread, batch, unusable in done:
        first = first or unusable[:1]
        aside.extend([*unread, *(row | {"split": split} for row in unusable)])
        counts.update(records=records, unread=len(unread), rows=batch.num_rows if batch else 0)
        if batch:
            writer = writer or pa.ipc.new_file(part / f"{split}.arrow", batch.schema)
            writer.write_batch(batch)
    if split == "train" and not counts["records"]:
        raise ValueError(f"data_path {file} holds no usable record; {counts['unread']} rows were set aside")
    if counts["records"] and not counts["rows"]:
        raise NoRow(counts["records"], first)
    if writer:
        writer.close()
    return counts


def _parts(file):
    """(records before it, its records, rows between them that are none) of each chunk."""
    start, records, unread, size = 0, [], [], 0
    for record in stream_records(file, unread):
        records.append(record)
        size += sum(map(len, (record.prompt, *(answer.text for answer in record.answers))))
        if len(records) == AT_ONCE or size >= CHARACTERS:
            yield start, records, unread.copy()
            start, records, size = start + len(records), [], 0
            unread.clear()
    if records or unread:
        yield start, records, unread


def _tokenised(build, start, records, unread):
    """A chunk -> (number of records, unread, RecordBatch or None, records that cannot be used); ids go on from `start`."""
    with no_collection():
        try:
            rows, unusable = build(records)
        except NoRow as error:
            rows, unusable = [], error.rejected
        for row in itertools.chain(rows, unusable):
            row["id"] += start
        if not rows:
            return len(records), unread, None, unusable
        columns = {name: [row[name] for row in rows] for name in rows[0]}
        if "record" in columns:
            columns["record"] = [to_line(record).decode() for record in columns["record"]]
        columns["length"] = [sum(map(len, row.get("answers") or [row[name] for name in row if name.endswith("_ids")]))
                             for row in rows]
        arrays = [pa.array(values, TYPES.get(name, IDS)) for name, values in columns.items()]
        return len(records), unread, pa.record_batch(arrays, list(columns)), unusable


def _plain(value):
    """An Arrow scalar as Python; lists of numbers by way of numpy, five times as fast as Arrow's own."""
    if not isinstance(value, pa.ListScalar):
        return value.as_py()
    if isinstance(value.values, pa.LargeListArray):
        return [part.values.to_numpy().tolist() for part in value.values]
    return value.values.to_numpy().tolist()
