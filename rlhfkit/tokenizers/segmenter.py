"""jieba's words for many texts at once: its dictionary, best route and hidden Markov model as numba loops over characters.

Word for word those of jieba 0.42.1: the same doubles are added in the same order and ties go the same way. The dictionary is
jieba's default one, read anew: user words and patches in jieba's shared state change nothing. Without numba, jieba itself cuts.
"""
import functools
import logging
import math
from collections import namedtuple

import jieba
import numpy as np
from jieba import finalseg

try:
    import numba
except ImportError:
    numba = None

BLOCK, _SPACE = jieba.re_han_default, jieba.re_skip_default     # held here: patch_jieba() replaces jieba's own
_HAN_FIRST, _HAN_LAST = 0x4E00, 0x9FD5
_OTHER, _SIGN, _ALNUM, _HAN = range(4)                          # kinds of characters; all but _OTHER form jieba's blocks
_KINDS = np.zeros(1 << 16, np.uint8)                            # of each character; all beyond are _OTHER, as the last is
_KINDS[_HAN_FIRST:_HAN_LAST + 1] = _HAN
_KINDS[:128] = [_ALNUM if chr(i).isalnum() else _SIGN if chr(i) in "+#&._%-" else _OTHER for i in range(128)]
_POINT, _PERCENT, _ZERO, _NINE, _SPACE_CODE, _NEWLINE = map(ord, ".%09 \n")
_B, _E, _M, _S = range(4)     # begin, end, middle of a word and single; jieba breaks ties to the later letter, here number
_NO_WORD, _FREE, _SHIFT = -math.inf, -1, 21                     # a character has 21 bits
_Tables = namedtuple("_Tables", "keys weights unseen emit start move")


def join_words(texts):
    """texts: list of str -> list of str: each text's words parted by single spaces, its spaces now `▂`, its newlines `▃`."""
    texts = [text.replace(" ", "▂").replace("\n", "▃") for text in texts]
    if numba is None or not texts:
        return [" ".join(_cut(text)) for text in texts]
    codes = np.frombuffer("\n".join(texts).encode("utf-32-le", "surrogatepass"), np.int32)   # no text holds a newline now
    spaced = np.full((len(codes), 2), _SPACE_CODE, np.int32)    # each character and the space that may follow it
    spaced[:, 0] = codes
    kept = np.ones((len(codes), 2), np.bool_)
    kept[:, 1] = _word_ends(codes, _KINDS.take(codes, mode="clip"), tables())
    return [line[:-1] for line in str(spaced[kept].data, "utf-32-le", "surrogatepass").split("\n")]


def loaded(dictionary):
    """dictionary: a jieba.Tokenizer -> itself, loaded without the three lines that jieba writes to stderr."""
    jieba.setLogLevel(logging.ERROR)
    dictionary.check_initialized()
    return dictionary


def _cut(text):
    """jieba.Tokenizer.cut with the classes of characters held here: jieba's are module variables, open to patches."""
    for block in BLOCK.split(text):
        if BLOCK.match(block):
            yield from _dictionary()._Tokenizer__cut_DAG(block)
        else:
            for part in _SPACE.split(block):
                yield from [part] if _SPACE.match(part) else part


@functools.cache
def _dictionary():
    """jieba's, for jieba's own code: it holds what the fallback needs."""
    return loaded(jieba.Tokenizer())


@functools.cache
def tables():
    """jieba's dictionary as a hashed trie, and its model; made at the first text (1 s), for this process.

    A node of the trie is a slot: keys (slots,) int64 hold `parent's slot << 21 | character`, weights (slots,) float64 the
    log probability of the word that ends there, or _NO_WORD. unseen is the weight of a character that is no word.
    emit (han, 4), start (4,) and move (4 from, 4 to) float64 are the log probabilities of the model's states.
    """
    dictionary = loaded(jieba.Tokenizer())
    words, log_total = list(dictionary.FREQ), math.log(dictionary.total)
    codes = np.frombuffer("".join(words).encode("utf-32-le"), np.int32)
    slots = 1 << (2 * len(words)).bit_length()
    keys, weights = np.full(slots, _FREE, np.int64), np.full(slots, _NO_WORD)
    _plant(codes, np.array([len(word) for word in words]),
           np.array([math.log(n) - log_total if n else _NO_WORD for n in dictionary.FREQ.values()]), keys, weights)
    rare = finalseg.MIN_FLOAT
    emit = np.array([[finalseg.emit_P[state].get(chr(i), rare) for state in "BEMS"] for i in range(_HAN_FIRST, _HAN_LAST + 1)])
    start = np.array([finalseg.start_P[state] for state in "BEMS"])
    move = np.array([[finalseg.trans_P[state].get(to, rare) for to in "BEMS"] for state in "BEMS"])
    return _Tables(keys, weights, math.log(1) - log_total, emit, start, move)


def compiled(function):
    """numba.njit; machine code is kept on disk where a folder can be written, else made anew in each process (2 s)."""
    try:
        return numba.njit(function, cache=True) if numba else function
    except RuntimeError:                                        # numba found no such folder
        return numba.njit(function)


@compiled
def _slot(keys, parent, code):
    """The slot of a node's child, or the free one where it would go. The root's slot is len(keys)."""
    key = np.int64(parent) << _SHIFT | np.int64(code)
    slot = (key * -7046029254386353131 >> 32) & (len(keys) - 1)     # Fibonacci hashing
    while keys[slot] != key and keys[slot] != _FREE:
        slot = (slot + 1) & (len(keys) - 1)
    return slot


@compiled
def _plant(codes, lengths, word_weights, keys, weights):
    """Put words into the trie; codes are their characters, one word after the other."""
    at = 0
    for length, weight in zip(lengths, word_weights):
        node = len(keys)
        for code in codes[at:at + length]:
            slot = _slot(keys, node, code)
            keys[slot] = np.int64(node) << _SHIFT | np.int64(code)
            node = slot
        weights[node] = weight
        at += length


@compiled
def _word_ends(codes, kinds, tables):
    """codes, kinds (n,) -> (n,) bool, true at each word's last character; newlines part texts and belong to no word."""
    ends = np.zeros(len(codes), np.bool_)
    route, last = np.empty(len(codes) + 1), np.empty(len(codes), np.int64)
    scores, before = np.empty((len(codes), 4)), np.empty((len(codes), 4), np.int8)      # room for _viterbi
    at = 0
    while at < len(codes):
        stop = at
        while stop < len(codes) and kinds[stop] != _OTHER:
            stop += 1
        _best_route(codes, at, stop, tables, route, last)
        single = at                                             # where the run of one-character words begins
        while at < stop:
            if last[at] > at:
                _cut_run(codes, kinds, single, at, tables, scores, before, ends)
                ends[last[at]] = True
                single = last[at] + 1
            at = last[at] + 1
        _cut_run(codes, kinds, single, stop, tables, scores, before, ends)
        if stop < len(codes):
            ends[stop] = codes[stop] != _NEWLINE                # any other character is a word
        at = stop + 1
    return ends


@compiled
def _best_route(codes, first, stop, tables, route, last):
    """Fill for each character of a block route, the best sum of weights from it on, and last, the last of its word."""
    route[stop] = 0.0
    for i in range(stop - 1, first - 1, -1):
        route[i], node = _NO_WORD, len(tables.keys)
        for j in range(i, stop):
            node = _slot(tables.keys, node, codes[j])
            if tables.keys[node] == _FREE:
                break
            if tables.weights[node] != _NO_WORD and tables.weights[node] + route[j + 1] >= route[i]:    # ties: the longer
                route[i], last[i] = tables.weights[node] + route[j + 1], j
        if route[i] == _NO_WORD:
            route[i], last[i] = tables.unseen + route[i + 1], i


@compiled
def _cut_run(codes, kinds, first, stop, tables, scores, before, ends):
    """Cut a run of one-character words anew: han by the model; letters and digits, with `.5` and `%`; other signs."""
    node = len(tables.keys)
    for i in range(first, stop):
        node = _slot(tables.keys, node, codes[i])
        if tables.keys[node] == _FREE:
            break
    else:
        if stop - first < 2 or tables.weights[node] != _NO_WORD:    # a word that the route did not take stays in pieces
            ends[first:stop] = True
            return
    while first < stop:
        kind, i = kinds[first], first + 1
        while i < stop and kinds[i] == kind:
            i += 1
        if kind == _HAN:
            _viterbi(codes, first, i, tables, scores, before, ends)
        elif kind == _ALNUM:
            if i + 1 < stop and codes[i] == _POINT and _ZERO <= codes[i + 1] <= _NINE:
                i += 2
                while i < stop and _ZERO <= codes[i] <= _NINE:
                    i += 1
            if i < stop and codes[i] == _PERCENT:
                i += 1
        ends[i - 1] = True
        first = i


@compiled
def _viterbi(codes, first, stop, tables, scores, before, ends):
    """Mark the word ends of a run of han by its likeliest states; scores and before (n, 4) are overwritten."""
    for state in range(4):
        scores[0, state] = tables.start[state] + tables.emit[codes[first] - _HAN_FIRST, state]
    for i in range(1, stop - first):
        emit = tables.emit[codes[first + i] - _HAN_FIRST]
        for state in range(4):
            low = _E if state == _B or state == _S else _B      # _B and _S follow _E or _S; _E and _M follow _B or _M
            high = low + 2
            from_low = scores[i - 1, low] + tables.move[low, state] + emit[state]
            from_high = scores[i - 1, high] + tables.move[high, state] + emit[state]
            scores[i, state], before[i, state] = (from_high, high) if from_high >= from_low else (from_low, low)
    state = _S if scores[stop - first - 1, _S] >= scores[stop - first - 1, _E] else _E
    for i in range(stop - first - 1, -1, -1):
        ends[first + i] = state == _E or state == _S
        state = before[i, state]
