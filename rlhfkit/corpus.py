"""A corpus of any size, on disk: built by several processes, shuffled, split without leaks, counted.

Records go into buckets by a hash of seed and content and each bucket is sorted by it, so that the files are the same
whatever the order of files and rows and the number of processes, and memory holds a bucket, not the corpus. Besides: the
prompts' bigrams while near duplicates are looked for, and the sources' own indexes (sources/).
"""
import json
import os
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
from rlhfkit.forms import to_record
from rlhfkit.records import Aside, dev_flags, prompt_key, to_line

LEAST = 0.2                         # share of a benchmark item's grams that a record holds when it is left out
BUCKET = 1 << 25                    # bytes of records that are sorted at a time


def build_corpus(output_dir, sources=None, raw_dir=None, seed=0, dev_fraction=0.002, template="HEAD", num_proc=1, eval_dir=None):
    """train.jsonl, dev.jsonl, rejected.jsonl and summary.json in `output_dir` -> the summary, a dict of counts.

    sources, raw_dir, seed, template: as in rk.build. dev_fraction: share of the distinct prompts that is held out, with
    their near duplicates. num_proc: processes that build. eval_dir: benchmark files; records that hold more than a fifth of
    the 13-grams of one of their items go to contaminated.jsonl instead, and the items found are named in contamination.jsonl.
    Files are written beside and renamed; memory does not grow with the corpus but for what the module's docstring names.
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
        places = {work / f"{number}-{i}": (name, (i, num_proc)) for number, name in enumerate(names) for i in range(num_proc)}
        found = Parallel(num_proc)(delayed(_build_part)(name, folder, seed, chosen, part, place, buckets)
                                   for place, (name, part) in places.items())
        counts = _merged(names, folder, found, named=sources is not None)
        with open(work / "rejected.jsonl", "wb") as out:
            out.writelines(_lines(place / "rejected.jsonl" for place in places))
        lines = [sorted(work.glob(f"*/{bucket}.jsonl")) for bucket in range(buckets)]
        counts |= _write_sides(work, lines, seed, dev_fraction, eval_dir)
        counts |= {"seed": seed, "template": template, "seconds": round(time.perf_counter() - start, 1)}
        (work / "summary.json").write_text(json.dumps(counts, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        for path in sorted(work.glob("*.json*")):
            os.replace(path, output / path.name)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return counts


def _build_part(name, folder, seed, template, part, place, buckets):
    """One process's share of a source, into the buckets below `place` -> (name, counts, rows set aside by reason, the first of
    them, "" or that the source is absent)."""
    place.mkdir()
    counts, absent = {}, ""
    with ExitStack() as stack:
        outs = [stack.enter_context(open(place / f"{bucket}.jsonl", "wb")) for bucket in range(buckets)]
        aside = Aside(place / "rejected.jsonl")
        stack.enter_context(aside.file)
        try:
            for record in raw.records_of(name, folder, aside, seed, template, part):
                line = to_line(record)
                outs[raw.order(seed, line)[0] * buckets >> 64].write(line)
                count = counts.setdefault(record.source or name, Counter())
                count.update(records=1, answers=len(record.answers), **_pairs(record))
        except FileNotFoundError as error:
            absent = str(error)
    return name, counts, aside.reasons, aside.first, absent


def _pairs(record):
    """Strictly ordered pairs and those of the neighbour rule, by scores alone."""
    scores = [answer.score for answer in record.answers]
    ties = Counter(scores)
    return {"pairs": (len(scores) ** 2 - sum(n * n for n in ties.values())) // 2,
            "neighbour_pairs": len(scores) - ties[scores[0]] if scores else 0}


def _merged(names, folder, found, named):
    """Counts of all parts; the errors of rk.build when a source that was named is absent or nothing is there."""
    errors = {name: error for name, *_, error in found if error}
    absent = [name for name in names if name in errors]
    if absent and (named or len(absent) == len(names)):
        raise FileNotFoundError(errors[absent[0]] if named else raw.nothing_in(folder))
    by_source, reasons, firsts = {}, Counter(), [first for *_, first, _ in found if first]
    for _, counts, aside, *_ in found:
        reasons.update(aside)
        for source, count in counts.items():
            by_source.setdefault(source, Counter()).update(count)
    bad = sum(reasons.values())
    for name in names:
        if name not in errors and not any(counts for of, counts, *_ in found if of == name):
            raise ValueError(raw.no_row(name, folder, bad, firsts[0]["reason"] if firsts else ""))
    raw.report(folder, {source: count["records"] for source, count in by_source.items()}, absent, bad, firsts[:1])
    return {"sources": {source: dict(count) for source, count in by_source.items()}, "absent": absent,
            "set_aside": dict(reasons.most_common())}


def _write_sides(work, buckets, seed, dev_fraction, eval_dir):
    """Buckets -> train.jsonl and dev.jsonl, and with eval_dir what is left out -> counts."""
    from rlhfkit.duplicates import EvalGrams, prompt_groups         # numba, which the processes that build can do without
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
                rows = list(map(orjson.loads, part))
                hits = grams.look(list(map(to_record, rows))) if grams else [False] * len(part)
                for line, row, hit in zip(part, rows, hits):
                    name = "contaminated" if hit else "dev" if prompt_key(row["prompt"], seed) in dev else "train"
                    outs[name].write(line)
                    clean[name] += 1
    sizes = np.unique(group[first], return_counts=True)[1]
    counts = {name: clean[name] for name in names}
    counts |= {"prompts": len(keys), "groups": len(sizes), "largest_group": int(sizes.max())}
    if grams:
        found = grams.report()
        (work / "contamination.jsonl").write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in found))
        counts["contaminated_items"] = len(found)
    return counts


def _lines(paths):
    for path in paths:
        with open(path, "rb") as file:
            yield from file
