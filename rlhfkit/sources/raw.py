"""What the sources share: finding raw files in a fixed order, and drawing negatives.

Negatives are drawn by index from distinct texts laid out group by group, so a row costs the same in 3,000 rows as in
700,000. The 2023 kit scanned the list for every row, and its negatives could be the gold answer itself.
"""


def files(folder, patterns):
    """The files that match, sorted, whatever order the system lists them in; FileNotFoundError when there are none."""
    found = sorted({path for pattern in patterns for path in folder.glob(pattern) if path.is_file()})
    found = [path for path in found if not path.name.startswith(".")]
    if not found:
        raise FileNotFoundError(f"{folder} has no {' and no '.join(patterns)}; give the folder with it as raw_dir")
    return found


class Pool:
    """Texts in groups (length, book, author, …), to draw other texts of the same or of another group."""

    def __init__(self, items):
        """items: (group, text) pairs in a fixed order; a text counts once in a group."""
        groups = {}
        for group, text in items:
            groups.setdefault(group, {})[text] = None
        self._items = [(group, text) for group, texts in groups.items() for text in texts]
        self._spans, start = {}, 0
        for group, texts in groups.items():
            self._spans[group] = start, start + len(texts)
            start += len(texts)

    def inside(self, rng, group, taken, count):
        """Up to `count` texts of `group`, none in `taken` (texts, no duplicates)."""
        start, stop = self._spans[group]
        drawn = rng.sample(range(start, stop), min(count + len(taken), stop - start))
        return [text for _, text in map(self._items.__getitem__, drawn) if text not in taken][:count]

    def outside(self, rng, group, taken, count):
        """Up to `count` texts of other groups, all different, none in `taken`, each of its own group if it can be."""
        start, stop = self._spans[group]
        size = len(self._items) - (stop - start)
        fresh, rest, groups, texts = [], [], set(), set(taken)
        for index in rng.sample(range(size), min(8 * count, size)):
            other, text = self._items[index if index < start else index + stop - start]
            if text not in texts:
                (rest if other in groups else fresh).append(text)
                groups.add(other)
                texts.add(text)
        return (fresh + rest)[:count]
