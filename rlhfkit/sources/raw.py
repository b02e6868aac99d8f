"""What the sources share: raw files in a fixed order, templates of the three generations, and negatives drawn at a fixed cost.

Negatives are drawn by index from distinct texts laid out by hash, group after group: they depend on the seed and the row
alone, not on the order of files or rows. The 2023 kit scanned the list for every row, and could draw the gold answer.
"""
import unicodedata
from array import array
from collections import deque
from dataclasses import dataclass, replace

from xxhash import xxh3_64_intdigest

from rlhfkit.records import Answer


@dataclass(frozen=True)
class Template:
    """How a generation of the 2023 kit wrote prompts: what parts their pieces, how an answer begins, and half-width signs."""
    between: str
    reply: str
    half_width: bool = False


# v0 trained the published weights; published is the 5 GB file; HEAD the last commit
TEMPLATES = {"HEAD": Template(" ", "答："), "published": Template(" ", "回答：", True), "v0": Template("<sep>", "回答：")}

NOWHERE = deque(maxlen=0)           # takes what is set aside by a second reading of the same file


def files(folder, patterns):
    """The files that match, packed (.gz, .xz) or not, sorted, whatever order the system lists them in.

    FileNotFoundError when there are none."""
    found = {path for pattern in patterns for end in ("", ".gz", ".xz") for path in folder.glob(pattern + end) if path.is_file()}
    found = [path for path in sorted(found) if not path.name.startswith(".")]
    if not found:
        raise FileNotFoundError(f"{folder} has no {' and no '.join(patterns)}; give the folder with it as raw_dir")
    return found


def share(items, part):
    """Every n-th of the items from the i-th on, for part (i, n)."""
    return (item for number, item in enumerate(items) if number % part[1] == part[0])


def first_share(rejected, part):
    """`rejected` for the first of the processes that each read a whole file, for the others a list that keeps nothing."""
    return rejected if part[0] == 0 else NOWHERE


def half_width(record):
    """The record as the published file has it: compatibility forms as sentencepiece's normaliser makes them (NFKC)."""
    def plain(text):
        return " ".join(unicodedata.normalize("NFKC", text).split())
    answers = [Answer(plain(answer.text), answer.score) for answer in record.answers]
    return replace(record, prompt=plain(record.prompt), prefix=plain(record.prefix), answers=answers)


class Pool:
    """Distinct texts in groups within groups (length; book; genre, author, title), to draw others of the same or another group.

    Memory: the UTF-8 bytes of the texts, and 24 bytes each and 8 more a level (twice that while it is made)."""

    def __init__(self, items):
        """items: (path, text) in any order; a path is a tuple of groups, the outermost first; a text counts once in its group."""
        import numpy as np
        blob, starts, columns = bytearray(), array("Q", [0]), []
        for path, text in items:
            raw = text.encode()
            blob += raw
            starts.append(len(blob))
            columns = columns or [array("Q") for _ in range(len(path) + 1)]
            for level in range(len(path)):
                columns[level].append(_key(path[:level + 1]))
            columns[-1].append(xxh3_64_intdigest(raw))
        starts, *columns = (np.frombuffer(column, np.uint64) for column in (starts, *columns))
        order = np.lexsort(columns[::-1]) if columns else np.arange(0)
        new = np.ones(len(order), bool)
        if len(order):
            new[1:] = np.any([column[order][1:] != column[order][:-1] for column in columns], axis=0)
        order = order[new]
        self._blob, self._starts, self._ends = blob, starts[order], starts[order + 1]
        self._levels, self._spans = [column[order] for column in columns[:-1]], {}
        for keys in self._levels:
            bounds = [0, *(np.flatnonzero(keys[1:] != keys[:-1]) + 1).tolist(), len(keys)]
            self._spans |= {int(keys[a]): (a, b) for a, b in zip(bounds, bounds[1:])}

    def draw(self, draws, path, level, taken, count):
        """Up to `count` texts that share the path's first `level` groups with it and not the next, all different, none in `taken`, each of
        another such group if it can be. level len(path): of the same group."""
        start, stop = self._spans[_key(path[:level])] if level else (0, len(self._starts))
        own, own_end = self._spans[_key(path[:level + 1])] if level < len(path) else (stop, stop)
        tries = 8 * count if level < len(path) else count + len(taken)
        fresh, rest, groups, texts = [], [], set(), set(taken)
        for index in _some(draws, stop - start - (own_end - own), tries):
            index += start
            index += own_end - own if index >= own else 0
            text = self._blob[self._starts[index]:self._ends[index]].decode()
            group = self._levels[level][index] if level < len(path) else index
            if text not in texts:
                (rest if group in groups else fresh).append(text)
                groups.add(group)
                texts.add(text)
                if len(fresh) == count:
                    break
        return (fresh + rest)[:count]


class Draws:
    """Numbers drawn for one row, from a hash of the seed and the row: the same whatever stands before it, and in every process."""

    def __init__(self, seed, *row):
        self._key, self._count = "\0".join(map(str, (seed, *row))).encode(), 0

    def below(self, size):
        """A number from 0 to below `size`, all equally likely (to 1 in 2^64 / size)."""
        self._count += 1
        return xxh3_64_intdigest(self._key, self._count) * size >> 64


def _some(draws, size, count):
    """Different numbers below `size`, `count` of them or all, one by one."""
    if size <= 4 * count:
        numbers = list(range(size))
        for i in range(min(size, count)):
            j = i + draws.below(size - i)
            numbers[i], numbers[j] = numbers[j], numbers[i]
            yield numbers[i]
        return
    seen = set()
    while len(seen) < count:
        number = draws.below(size)
        if number not in seen:
            seen.add(number)
            yield number


def _key(path):
    return xxh3_64_intdigest("\0".join(map(str, path)).encode())
