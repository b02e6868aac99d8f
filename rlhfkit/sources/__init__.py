"""Raw corpora → Records. A corpus is one small file here, one line in SOURCES, and a card in data_cards/.

Each source has a random stream of its own, made from the seed and its name, so that its records do not change with the
other sources, the process or the hash seed. Which layouts are understood stands in each file as LAYOUT.
"""
import difflib
import logging
import random
import sys
from collections import Counter
from pathlib import Path

from rlhfkit.samples import RAW
from rlhfkit.sources import baike, classical, couplets, poetry, weibo, zhidao

# name -> read(folder: Path, rng: random.Random, rejected: list) -> iterator of Records; FileNotFoundError when absent
SOURCES = {"weibo": weibo.read, "couplets": couplets.read, "zhidao": zhidao.read, "classical": classical.read,
           "poetry": poetry.read, "baike": baike.read}
log = logging.getLogger("rlhfkit")


def build(sources=None, raw_dir=None, seed=0, rejected=None):
    """Records of the named sources under `raw_dir` (None: the shipped samples), shuffled by `seed`.

    sources None: every source; those that are absent are named in the log and left out. Rows that cannot be used are
    appended to `rejected` as {"file", "line", "reason", "text"}, and counted in the log, as are files nobody reads.
    Raises FileNotFoundError when the folder, a source asked for by name, or every source is absent; ValueError for an
    unknown name and when a source holds no usable row.
    """
    folder = Path(RAW if raw_dir is None else raw_dir)
    names = _names(sources)
    if not folder.is_dir():
        raise FileNotFoundError(f"raw_dir is {folder}; it must be a folder of raw corpora; None takes the samples")
    rejected = [] if rejected is None else rejected
    records, absent, start = [], [], len(rejected)
    for name in names:
        before = len(rejected)
        try:
            found = list(SOURCES[name](folder, random.Random(f"{seed}-{name}"), rejected))
        except FileNotFoundError:
            if sources is not None:
                raise
            absent.append(name)
            continue
        if not found:
            first = f"; the first: {rejected[before]['reason']}" if rejected[before:] else ""
            raise ValueError(f"{name} in {folder} has no usable row, {len(rejected) - before} set aside{first}; "
                             "repair it, or name the other sources")
        records += found
    if not records:
        layouts = ", ".join(pattern for read in SOURCES.values() for pattern in _layout(read))
        raise FileNotFoundError(f"{folder} holds no corpus; it must have one of these layouts: {layouts}")
    _report(folder, records, absent, rejected[start:])
    random.Random(f"{seed}-order").shuffle(records)
    return records


def _names(sources):
    if isinstance(sources, str):
        sources = [sources]
    names = list(SOURCES) if sources is None else list(dict.fromkeys(sources))
    for name in names:
        if name not in SOURCES:
            near = difflib.get_close_matches(str(name), SOURCES, n=1, cutoff=0)[0]
            raise ValueError(f"source is {name!r}; it must be one of {', '.join(SOURCES)}; did you mean {near!r}?")
    if not names:
        raise ValueError("sources is empty; it must name a source; None takes all of them")
    return names


def _layout(read):
    return getattr(sys.modules[read.__module__], "LAYOUT", ())


def _report(folder, records, absent, bad):
    for name in absent:
        log.warning("no %s in %s, left out; it would be %s", name, folder, " or ".join(_layout(SOURCES[name])))
    known = {path for read in SOURCES.values() for pattern in _layout(read) for path in folder.glob(pattern)}
    present = {path for pattern in ("*", "*/*", "*/*/*") for path in folder.glob(pattern) if path.is_file()}
    unknown = [str(path.relative_to(folder)) for path in sorted(present - known)]
    if unknown:
        more = f" and {len(unknown) - 10} more" if len(unknown) > 10 else ""
        log.warning("not understood by any source, left out: %s%s", ", ".join(unknown[:10]), more)
    counts = ", ".join(f"{name} {count}" for name, count in Counter(record.source for record in records).items())
    if bad:
        log.warning("records: %s; rows set aside: %d, the first %s line %s: %s", counts, len(bad),
                    *(bad[0][key] for key in ("file", "line", "reason")))
    else:
        log.info("records: %s; rows set aside: 0", counts)
