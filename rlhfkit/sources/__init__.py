"""Raw corpora → Records. A corpus is one small file here, one line in SOURCES, and a card in data_cards/.

What is drawn for a row depends on the seed and the row alone, and records are ordered by a hash of seed and content: the
same whatever the order of files and rows, the number of processes, the other sources and the hash seed. Which layouts are
understood stands in each file as LAYOUT.
"""
import difflib
import inspect
import logging
import sys
from collections import Counter
from pathlib import Path

from xxhash import xxh3_64_intdigest

from rlhfkit.formats import stream_records
from rlhfkit.records import set_aside, to_line
from rlhfkit.samples import RAW
from rlhfkit.sources import baike, classical, clue, couplets, poetry, published, weibo, zhidao
from rlhfkit.sources.raw import TEMPLATES, half_width, share

# name -> read(folder, rejected, seed, template, part) -> iterator of Records; FileNotFoundError when absent.
# One of your own may leave out the last three by **_, and is then read by one process.
SOURCES = {"weibo": weibo.read, "couplets": couplets.read, "zhidao": zhidao.read, "classical": classical.read,
           "poetry": poetry.read, "baike": baike.read, "clue": clue.read, "published": published.read}
log = logging.getLogger("rlhfkit")


def build(sources=None, raw_dir=None, seed=0, rejected=None, template="HEAD"):
    """Records of the named sources under `raw_dir` (None: the shipped samples), in an order made from `seed`, in memory;
    rk.build_corpus does it on disk for corpora of any size.

    sources: names, or paths of files that rk.read_records reads; None: every source, those that are absent are named in
    the log and left out. template: HEAD, published or v0, the three generations of the 2023 kit. Rows that cannot be used
    are appended to `rejected` as {"file", "line", "reason", "text"}, and counted in the log, as are files nobody reads.
    Raises FileNotFoundError when the folder, a source asked for by name, or every source is absent; ValueError for an
    unknown name and when a source holds no usable row.
    """
    folder, names, template = checked(sources, raw_dir, template)
    rejected = [] if rejected is None else rejected
    records, absent, start = [], [], len(rejected)
    for name in names:
        before = len(rejected)
        try:
            found = list(records_of(name, folder, rejected, seed, template))
        except FileNotFoundError:
            if sources is not None:
                raise
            absent.append(name)
            continue
        if not found:
            raise ValueError(no_row(name, folder, len(rejected) - before, rejected[before]["reason"] if rejected[before:] else ""))
        records += found
    if not records:
        raise FileNotFoundError(nothing_in(folder))
    report(folder, Counter(record.source for record in records), absent, len(rejected) - start, rejected[start:start + 1])
    return sorted(records, key=lambda record: order(seed, to_line(record)))


def records_of(name, folder, rejected, seed, template, part=(0, 1)):
    """The Records of one source or file, of which part (i, n) takes a share."""
    if name not in SOURCES:
        found = share(stream_records(name, rejected if part[0] == 0 else []), part)
    elif part[0] and "part" not in inspect.signature(SOURCES[name]).parameters:
        return
    else:
        try:
            found = SOURCES[name](folder, rejected, seed=seed, template=template, part=part)
            first = next(found, None)                   # a generator looks for its files when it is asked for a record
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{error}{_looks_like(folder, name)}") from None
        found = _after(first, found)
    for record in found:
        try:
            yield half_width(record) if template.half_width else record
        except ValueError as error:                     # nothing is left of a text
            set_aside(rejected, name, 0, error, record.prompt)


def checked(sources, raw_dir, template):
    """(folder, names, Template), or the error that says what is wrong with them."""
    folder = Path(RAW if raw_dir is None else raw_dir)
    sources = [sources] if isinstance(sources, (str, Path)) else sources
    names = list(SOURCES) if sources is None else list(dict.fromkeys(map(str, sources)))
    if sources is None and raw_dir is None:             # the samples are not expected to have all
        names = [name for name in names if any(path for pattern in _layout(SOURCES[name]) for path in folder.glob(pattern))]
    for name in names:
        if name not in SOURCES and not Path(name).exists():
            near = difflib.get_close_matches(name, SOURCES, n=1, cutoff=0)[0]
            raise ValueError(f"source is {name!r}; it must be one of {', '.join(SOURCES)}, or a file; did you mean {near!r}?")
    if not names:
        raise ValueError("sources is empty; it must name a source; None takes all of them")
    if template not in TEMPLATES:
        raise ValueError(f"template is {template!r}; it must be one of {', '.join(TEMPLATES)}")
    if not folder.is_dir():
        raise FileNotFoundError(f"raw_dir is {folder}; it must be a folder of raw corpora; None takes the samples")
    return folder, names, TEMPLATES[template]


def order(seed, line):
    """Where a record stands among the others: a hash of the seed and its line."""
    return xxh3_64_intdigest(line, seed), line


def no_row(name, folder, count, reason):
    first = f"; the first: {reason}" if reason else ""
    return f"{name} in {folder} has no usable row, {count} set aside{first}; repair it, or name the other sources"


def nothing_in(folder):
    layouts = ", ".join(pattern for read in SOURCES.values() for pattern in _layout(read))
    return f"{folder} holds no corpus; it must have one of these layouts: {layouts}{_looks_like(folder)}"


def report(folder, counts, absent, bad, first):
    """Log what was read, what was not there, which files nobody reads, and how many rows were set aside."""
    for name in absent:
        log.warning("no %s in %s, left out; it would be %s", name, folder, " or ".join(_layout(SOURCES[name])[:3]))
    known = {path for read in SOURCES.values() for pattern in _layout(read) for end in ("", ".gz", ".xz")
             for path in folder.glob(pattern + end)}
    present = {path for pattern in ("*", "*/*", "*/*/*") for path in folder.glob(pattern) if path.is_file()}
    unknown = [str(path.relative_to(folder)) for path in sorted(present - known)]
    if unknown:
        more = f" and {len(unknown) - 10} more" if len(unknown) > 10 else ""
        log.warning("not understood by any source, left out: %s%s", ", ".join(unknown[:10]), more)
    counts = ", ".join(f"{name} {count}" for name, count in counts.items())
    if bad:
        log.warning("records: %s; rows set aside: %d, the first %s line %s: %s", counts, bad,
                    *(first[0][key] for key in ("file", "line", "reason")))
    else:
        log.info("records: %s; rows set aside: 0", counts)


def _after(first, rest):
    if first is not None:
        yield first
        yield from rest


def _layout(read):
    return getattr(sys.modules[read.__module__], "LAYOUT", ())


def _looks_like(folder, wanted=""):
    """What a folder without the wanted corpus has instead, so that the right one can be named."""
    for place, what in ((folder, ""), (folder.parent, "; give the folder above it")):
        for name, read in SOURCES.items():
            found = next((path for pattern in _layout(read) for path in place.glob(pattern)
                          if path.is_file() and (place == folder or folder in path.parents)), None)
            if found and name != wanted:
                return f"; {folder} looks like {name} ({found.relative_to(place)}){what}"
            if found and place != folder:
                return f"; {folder} looks like a part of {name}{what}"
    return ""
