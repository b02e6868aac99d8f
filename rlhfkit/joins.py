"""The loops of duplicates.py: texts as sets of bigrams, and near pairs of sets. No torch.

Loops are numba's, one thread; without numba they run as plain Python, a hundred times slower.
"""
import re
import unicodedata
from array import array
from itertools import islice

import numpy as np

try:
    import numba
except ImportError:
    numba = None

LIMIT = 128             # bigrams that stand for a longer text: those with the lowest hash (bottom-k sketch, Broder 1997)
BASE = -7046029254386353131                                     # of the hashes, modulo 2^64; odd
_AT_ONCE = 4096         # texts
_BITS, _KEY = 42, (1 << 42) - 1                                 # of a bigram: a code point has 21
_BUCKET = (1 << 22) - 1                                         # of a bigram: where it is counted and looked up
_SIGNS = re.compile(r"[\W_]+")                                  # all that is not alnum


def compiled(function):
    """numba.njit; machine code is kept on disk where a folder can be written, else made anew in each process."""
    try:
        return numba.njit(function, cache=True) if numba else function
    except RuntimeError:                                        # numba found no such folder
        return numba.njit(function)


def letters(text):
    """The letters and digits of a text after NFKC (full-width forms become plain), in lower case."""
    text = text.replace("，", " ")                               # no letter, and without it most texts are NFKC: twice as fast
    return _SIGNS.sub("", unicodedata.normalize("NFKC", text).lower())


def sets_of(texts):
    """Iterable of str -> tokens (T,) int64, each text's set of bigrams, rarest first; where each set starts (N + 1,).

    A token is how often its bucket of bigrams occurs in all texts, and below that the bigram, hashed one to one.
    """
    texts, tokens, sizes, counts = iter(texts), array("q"), [np.zeros(1, np.int64)], np.zeros(_BUCKET + 1, np.int64)
    while chunk := list(islice(texts, _AT_ONCE)):
        chunk = [text.ljust(2, "\0") for text in chunk]
        codes = np.frombuffer("".join(chunk).encode("utf-32-le", "surrogatepass"), np.int32).astype(np.int64)
        ends = np.cumsum(list(map(len, chunk)))
        pairs = np.delete(codes[:-1] << 21 | codes[1:], ends[:-1] - 1) * BASE & _KEY
        pairs = (pairs ^ pairs >> 21) * BASE & _KEY
        found = np.sort(np.arange(len(chunk)).repeat(np.diff(ends, prepend=0) - 1) << _BITS | pairs)
        found = found[np.append(True, found[1:] != found[:-1])]
        size = np.bincount(found >> _BITS)
        found = found[np.arange(len(found)) - (np.cumsum(size) - size).repeat(size) < LIMIT] & _KEY
        counts += np.bincount(found & _BUCKET, minlength=len(counts))
        tokens.frombytes(found.tobytes())
        sizes.append(np.minimum(size, LIMIT))
    tokens, starts = np.frombuffer(tokens, np.int64), np.cumsum(np.concatenate(sizes))
    _rarest_first(tokens, starts, np.minimum(counts, (1 << 63 - _BITS) - 1) << _BITS)
    return tokens, starts


@compiled
def _rarest_first(tokens, starts, counts):
    for text in range(len(starts) - 1):
        part = tokens[starts[text]:starts[text + 1]]
        for i in range(len(part)):
            part[i] |= counts[part[i] & _BUCKET]
        part.sort()


@compiled
def _root(roots, x):
    while roots[x] != x:
        roots[x] = roots[roots[x]]
        x = roots[x]
    return x


@compiled
def join(tokens, starts, order, need, least):
    """tokens, starts: `sets_of`; order (N,): sets by size -> (N,) the smallest index among those that near pairs connect.

    Sets of a and b tokens are near when they share need[a + b]; least[a]: the fewest tokens of a set near one of a. A set is
    looked up by its rarest tokens among smaller ones, which stand in a posting for each of their rarest. Members of its own
    component are jumped over: a posting remembers runs of them (ahead), so that a component of a million is cheap.
    """
    sizes, heads, roots = np.diff(starts), np.zeros(_BUCKET + 2, np.int64), np.arange(len(order))
    for x in order:
        for token in tokens[starts[x]:starts[x + 1] - need[2 * sizes[x]] + 1]:
            heads[(token & _BUCKET) + 1] += 1
    heads = np.cumsum(heads)
    tails, sets, ahead = heads[:-1].copy(), np.empty(heads[-1], np.int32), np.empty(heads[-1], np.int32)
    for x in order:
        size, mine = sizes[x], x
        for token in tokens[starts[x]:starts[x + 1] - need[size + least[size]] + 1]:
            bucket = token & _BUCKET
            while heads[bucket] < tails[bucket] and sizes[sets[heads[bucket]]] < least[size]:
                heads[bucket] += 1                              # too small for all that follow, too
            at = heads[bucket]
            while at < tails[bucket]:
                here, y = at, sets[at]
                at, root = at + 1, _root(roots, y)
                if root == mine:
                    at = ahead[here]
                    while at < tails[bucket] and _root(roots, sets[at]) == mine:
                        at = ahead[at]
                    ahead[here] = at
                    continue
                wanted, i, j = need[size + sizes[y]], starts[x], starts[y]
                while wanted > 0 and min(starts[x + 1] - i, starts[y + 1] - j) >= wanted:
                    a, b = tokens[i], tokens[j]
                    wanted -= a == b
                    i += a <= b
                    j += b <= a
                if wanted <= 0:
                    roots[max(mine, root)] = mine = min(mine, root)
        for token in tokens[starts[x]:starts[x + 1] - need[2 * size] + 1]:
            sets[tails[token & _BUCKET]], ahead[tails[token & _BUCKET]] = x, tails[token & _BUCKET] + 1
            tails[token & _BUCKET] += 1
    for x in range(len(roots)):
        roots[x] = _root(roots, x)
    return roots
