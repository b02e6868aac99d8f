"""A corpus of any size, on disk: built by several processes, shuffled, split without leaks, counted.

Records go into buckets by a hash of seed and content and each bucket is sorted by it, so that the files are the same
whatever the order of files and rows and the number of processes, and memory holds a bucket, not the corpus. Besides: the
prompts' bigrams while near duplicates are looked for, and the sources' own indexes (sources/).
"""
import json
import os
import re
import shutil
import time
from array import array
from collections import Counter
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import numpy as np
import orjson
from joblib import Parallel, delayed

from rlhfkit import sources as raw
from rlhfkit.duplicates import EvalGrams, prompt_groups
from rlhfkit.forms import to_record
from rlhfkit.records import dev_flags, prompt_key, to_line

LEAST = 0.2                         # share of a benchmark item's grams that a record holds when it is left out
BUCKET = 1 << 25                    # bytes of records that are sorted at a time


def build_corpus(output_dir, sources=None, raw_dir=None, seed=0, dev_fraction=0.002, template="HEAD", num_proc=1, eval_dir=None):
    """train.jsonl, dev.jsonl, rejected.jsonl and summary.json in `output_dir` -> the summary, a dict of counts.

    sources, raw_dir, seed, template: as in rk.build. dev_fraction: share of the distinct prompts that is held out, with
    their near duplicates. num_proc: processes that build. eval_dir: benchmark files; records that hold more than a fifth of
    the 13-grams of one of their items go to contaminated.jsonl instead, and the items found are named in contamination.jsonl. Files are written
    beside and renamed; memory does not grow with the corpus but for what the module's docstring names.
    """
    folder, names, chosen = raw.checked(sources, raw_dir, template)
    if num_proc < 1:
        raise ValueError(f"num_proc is {num_proc}; it is the number of processes that build: give 1 or more")
    output, start = Path(output_dir), time.perf_counter()
    work = output / f".{os.getpid()}.tmp"
    work.mkdir(parents=True)
    try:
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        buckets = max(1, min(256, 4 * size // BUCKET))
        jobs = [(name, work / f"{number}-{i}", (i, num_proc)) for number, name in enumerate(names) for i in range(num_proc)]
        found = Parallel(num_proc)(delayed(_build_part)(name, folder, seed, chosen, part, place, buckets) for name, place, part in jobs)
        counts = _merged(names, folder, [job[0] for job in jobs], found, named=sources is not None)
        with open(work / "rejected.jsonl", "wb") as out:
            for _, place, _ in jobs:
                shutil.copyfileobj(open(place / "rejected.jsonl", "rb"), out)
        lines = [sorted(work.glob(f"*/{bucket}.jsonl")) for bucket in range(buckets)]
        counts |= _write_sides(work, lines, seed, dev_fraction, eval_dir)
        counts |= {"seed": seed, "template": template, "seconds": round(time.perf_counter() - start, 1)}
        (work / "summary.json").write_text(json.dumps(counts, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        for path in sorted(work.glob("*.json*")):
            os.replace(path, output / path.name)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return counts


class Aside:
    """Takes what is set aside, to a file: counts by reason, and the first row, stay in memory."""

    def __init__(self, path):
        self.file, self.reasons, self.first = open(path, "wb"), Counter(), None

    def append(self, row):
        self.file.write(orjson.dumps(row) + b"\n")
        self.reasons[kind_of(row["reason"])] += 1
        self.first = self.first or row

    def extend(self, rows):
        for row in rows:
            self.append(row)

    def __len__(self):
        return sum(self.reasons.values())


def kind_of(reason):
    """The reason without what differs from row to row: texts in quotes and numbers."""
    return re.sub(r"\d+", "n", re.sub(r"(['\"]).*?\1", "…", reason))[:120]


def _build_part(name, folder, seed, template, part, place, buckets):
    """One process's share of a source, into the buckets below `place` -> (counts, rows set aside by reason, the first); counts None: absent."""
    place.mkdir()
    outs, counts, aside = [open(place / f"{bucket}.jsonl", "wb") for bucket in range(buckets)], {}, Aside(place / "rejected.jsonl")
    try:
        for record in raw.records_of(name, folder, aside, seed, template, part):
            line = to_line(record)
            outs[raw.order(seed, line)[0] * buckets >> 64].write(line)
            count = counts.setdefault(record.source or name, Counter())
            count.update(records=1, answers=len(record.answers), **_pairs(record))
    except FileNotFoundError as error:
        return str(error), {}, None
    finally:
        for file in (*outs, aside.file):
            file.close()
    return counts, aside.reasons, aside.first


def _pairs(record):
    """Strictly ordered pairs and those of the neighbour rule, by scores alone."""
    scores = [answer.score for answer in record.answers]
    ties = Counter(scores)
    count = len(scores)
    return {"pairs": count * (count - 1) // 2 - sum(n * (n - 1) // 2 for n in ties.values()),
            "neighbour_pairs": count - ties[scores[0]] if scores else 0}


def _merged(names, folder, of, found, named):
    """Counts of all parts; the errors of rk.build when a source that was named is absent or nothing is there."""
    absent = [name for name in names if all(isinstance(counts, str) for job, (counts, *_) in zip(of, found) if job == name)]
    if absent and (named or len(absent) == len(names)):
        raise FileNotFoundError(next(counts for job, (counts, *_) in zip(of, found) if job == absent[0]) if named else raw.nothing_in(folder))
    by_source, reasons, firsts = {}, Counter(), []
    for counts, aside, first in found:
        for source, count in ({} if isinstance(counts, str) else counts).items():
            by_source.setdefault(source, Counter()).update(count)
        reasons.update(aside)
        firsts += [first] if first else []
    for name in set(names) - set(absent):
        if not any(counts for job, (counts, *_) in zip(of, found) if job == name and not isinstance(counts, str)):
            raise ValueError(raw.no_row(name, folder, sum(reasons.values()), firsts[0]["reason"] if firsts else ""))
    raw.report(folder, {source: count["records"] for source, count in by_source.items()}, absent, sum(reasons.values()), firsts[:1])
    return {"sources": {source: dict(count) for source, count in by_source.items()}, "absent": absent, "set_aside": dict(reasons.most_common())}


def _write_sides(work, buckets, seed, dev_fraction, eval_dir):
    """Buckets -> train.jsonl and dev.jsonl, and with eval_dir what is left out -> counts."""
    keys = array("Q")

    def prompts():
        for paths in buckets:
            for line in _lines(paths):
                prompt = orjson.loads(line)["prompt"]
                keys.append(prompt_key(prompt, seed))
                yield prompt
    group = prompt_groups(prompts())
    keys, first = np.unique(np.frombuffer(keys, np.uint64), return_index=True)
    held_out = dev_flags(keys, group[first], dev_fraction)
    dev, grams, clean = set(keys[held_out].tolist()), EvalGrams(eval_dir, least=LEAST) if eval_dir else None, Counter()
    names = ["train", "dev"] + ["contaminated"] * bool(eval_dir)
    with ExitStack() as stack:
        outs = {name: stack.enter_context(open(work / f"{name}.jsonl", "wb")) for name in names}
        for paths in buckets:
            lines = sorted(_lines(paths), key=partial(raw.order, seed))
            for start in range(0, len(lines), 10_000):
                part = lines[start:start + 10_000]
                rows = [orjson.loads(line) for line in part]
                hits = grams.look([to_record(row) for row in rows]) if grams else [False] * len(part)
                for line, row, hit in zip(part, rows, hits):
                    name = "contaminated" if hit else "dev" if prompt_key(row["prompt"], seed) in dev else "train"
                    outs[name].write(line)
                    clean[name] += 1
    sizes = np.unique(group[first], return_counts=True)[1]
    counts = {name: clean[name] for name in names} | {"prompts": len(keys), "groups": len(sizes), "largest_group": int(sizes.max())}
    if grams:
        found = grams.report()
        (work / "contamination.jsonl").write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in found))
        counts["contaminated_items"] = len(found)
    return counts


def _lines(paths):
    for path in paths:
        with open(path, "rb") as file:
            yield from file
