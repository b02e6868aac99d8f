"""Rows laid into rows of max_length by best fit: none is cut, no token is lost; lengths alone decide which goes where.

Each row goes where it leaves the least room (Johnson 1974; for language models Ding et al. 2024): first those longer than
half, the longest first, then the others as they come. All of them by length would put rows of one length together, and the
tiny couplet model then learnt markedly less. The 2023 kit cut what did not fit and lost the rest of it.
"""
from collections.abc import Sequence

import numpy as np

from rlhfkit.joins import compiled

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
    bin_of = _best_fit(lengths, np.append(longest, np.flatnonzero(~long)), max_length)
    _, first = np.unique(bin_of, return_index=True)
    number = np.argsort(np.argsort(first))[bin_of]
    return np.argsort(number, kind="stable"), np.append(0, np.cumsum(np.bincount(number)))


@compiled
def _best_fit(lengths, first, max_length):
    """first (N,): the rows in the order in which they are laid down -> each row's bin (N,)."""
    bin_of, bins = np.empty(len(lengths), np.int64), 0
    top, below = np.full(max_length + 1, -1), np.empty(len(lengths), np.int64)      # a stack of bins for each room left
    counts = np.zeros(max_length // 64 + 1, np.int64)                               # of bins, for 64 rooms at a time
    for i in first:
        room = lengths[i]
        while room <= max_length and top[room] < 0:
            room += 1 if counts[room >> 6] else 64 - (room & 63)
        if room <= max_length:
            bin_of[i], top[room] = top[room], below[top[room]]
            counts[room >> 6] -= 1
        else:
            bin_of[i], room, bins = bins, max_length, bins + 1
        left = room - lengths[i]
        below[bin_of[i]], top[left] = top[left], bin_of[i]
        counts[left >> 6] += 1
    return bin_of
