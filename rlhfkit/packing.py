"""Rows laid into rows of max_length by best fit: none is cut, no token is lost; lengths alone decide which goes where.

Each row goes where it leaves the least room (Johnson 1974; for language models Ding et al. 2024): first those longer than
half, the longest first, then the others as they come. All of them by length would put rows of one length together, and the
tiny couplet model then learnt markedly less. The 2023 kit cut what did not fit and lost the rest of it.
"""
from collections.abc import Sequence

import numpy as np

from rlhfkit.tokenizers.segmenter import compiled

IGNORE = -100           # the label that torch's cross-entropy leaves out


class Packed(Sequence):
    """Rows joined into rows of at most max_length tokens, each built when it is asked for; slices are lists.

    Positions restart with each document and nothing predicts a document's first token. `lengths`: tokens a row, numpy.
    """

    def __init__(self, rows, max_length):
        self.rows, self.max_length = rows, max_length
        lengths = rows.lengths if hasattr(rows, "lengths") else np.array([len(row["input_ids"]) for row in rows], np.int64)
        self.order, self.starts = best_fit(lengths, max_length)
        self.lengths = np.diff(np.append(0, np.cumsum(lengths[self.order]))[self.starts])

    @property
    def fill_rate(self):
        """The share of len × max_length that is tokens."""
        return float(self.lengths.sum() / (max(len(self), 1) * self.max_length))

    def __len__(self):
        return len(self.starts) - 1

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        index = range(len(self))[index]
        packed = dict(id=index, source="", input_ids=[], labels=[], position_ids=[])
        for i in self.order[self.starts[index]:self.starts[index + 1]].tolist():
            row = self.rows[i]
            packed["input_ids"] += row["input_ids"]
            packed["labels"] += [IGNORE, *row["labels"][1:]]
            packed["position_ids"] += range(len(row["input_ids"]))
        return packed


def best_fit(lengths, max_length):
    """lengths: N of 1 to max_length -> order (N,), starts (bins + 1,): bin j holds the rows order[starts[j]:starts[j + 1]].

    Rows stay in their order within a bin, bins in that of their first rows. Raises ValueError for a length that is out of range.
    """
    lengths = np.asarray(lengths, np.int64)
    wrong = np.flatnonzero((lengths < 1) | (lengths > max_length))
    if len(wrong):
        raise ValueError(f"row {wrong[0]} has {lengths[wrong[0]]} tokens; a packed row takes rows of 1 to {max_length}: "
                         f"set max_length to {max(1, lengths.max())} or more, or leave such rows out")
    long = 2 * lengths > max_length
    longest = np.flatnonzero(long)[np.argsort(-lengths[long], kind="stable")]
    return _listed(*_best_fit(lengths, np.append(longest, np.flatnonzero(~long)), max_length))


@compiled
def _best_fit(lengths, first, max_length):
    """first (N,): the rows in the order in which they are laid down."""
    bin_of, bins = np.empty(len(lengths), np.int64), 0
    top, below = np.full(max_length + 1, -1), np.empty(len(lengths), np.int64)      # a stack of bins for each room left
    there = np.zeros(max_length // 64 + 2, np.uint64)                               # a bit for each room: whether it has a bin
    for i in first:
        length = lengths[i]
        word, bits = length >> 6, there[length >> 6] >> np.uint64(length & 63)
        room = length
        while not bits and word + 1 < len(there):
            word += 1
            bits, room = there[word], word << 6
        if bits:
            while not bits & np.uint64(1):
                bits, room = bits >> np.uint64(1), room + 1
            chosen, top[room] = top[room], below[top[room]]
            if top[room] < 0:
                there[room >> 6] &= ~(np.uint64(1) << np.uint64(room & 63))
        else:
            chosen, room, bins = bins, max_length, bins + 1
        bin_of[i], left = chosen, room - length
        below[chosen], top[left] = top[left], chosen
        if left:
            there[left >> 6] |= np.uint64(1) << np.uint64(left & 63)
    return bin_of, bins


@compiled
def _listed(bin_of, bins):
    """Bins in the order of their first rows -> order, starts of `best_fit`."""
    number, seen, starts = np.full(bins, -1), 0, np.zeros(bins + 1, np.int64)
    for i in range(len(bin_of)):                               # bins are numbered by their first rows
        if number[bin_of[i]] < 0:
            number[bin_of[i]] = seen
            seen += 1
        bin_of[i] = number[bin_of[i]]
        starts[bin_of[i] + 1] += 1
    starts = np.cumsum(starts)
    order, filled = np.empty(len(bin_of), np.int64), starts.copy()
    for i in range(len(bin_of)):
        order[filled[bin_of[i]]] = i
        filled[bin_of[i]] += 1
    return order, starts
