"""Near duplicates among texts, and benchmark items whose text stands in training records. No torch.

Both searches are complete: near pairs come from a prefix-filtered join over character bigrams, benchmark text from
58-bit hashes of all runs of 13 characters (Brown 2020, appendix C, has 13 words), which lie by chance once in some 10^10
characters. The 2023 kit looked for neither, and its dev rows were train rows.
"""
import csv
import json
import re
from itertools import islice
from pathlib import Path

import numpy as np

from rlhfkit.joins import BASE, LENGTH_BITS, LIMIT, codes_of, join, letters, mixed, repeats_in, sets_of, windows
from rlhfkit.records import text_lines

SHORTEST = 8            # characters of a benchmark's string worth a search
BOILERPLATE = 10        # a gram of more items of one file is an instruction or a label
_AT_ONCE = 4096         # records
_POEM = re.compile("^以(.{1,30})的风格[，,]写一[首篇].{1,6}[，,]题为")


def normal(text):
    """Letters and digits only, lower case, NFKC (full-width forms become plain). What has none of them stays as it is."""
    return letters(text) or text


def groups(texts, threshold=0.8):
    """texts: any iterable of str -> (N,) int64: near duplicates bear the same number, the smallest index among them.

    Near: equal after `normal`, or sets of character bigrams with a Jaccard similarity of at least `threshold`; and near of
    near, so that prompts of one template which differ by a character or two are one chain. No pair is missed (AllPairs,
    Bayardo 2007; PPJoin, Xiao 2008: sets alike share one of their rarest bigrams). Texts with more than LIMIT bigrams are
    compared by sketches: there a pair close to the threshold may go either way, an equal one never.
    """
    if isinstance(texts, str) or not 0 < threshold <= 1:
        raise ValueError(f"texts is a {type(texts).__name__}, threshold {threshold!r}; they must be a list of texts and a number "
                         "above 0 and at most 1; try groups([prompt, …], 0.8)")
    need = [1] + [min(o for o in range(1, s + 1) if o == s or o / (s - o) >= threshold) for s in range(1, 2 * LIMIT + 1)]
    least = [0] + [min(b for b in range(1, a + 1) if need[a + b] <= b) for a in range(1, LIMIT + 1)]
    tokens, starts, sums, known = sets_of(texts)
    order = np.lexsort((sums, np.diff(starts)))                 # by size, equal sets side by side
    repeats = repeats_in(tokens, starts, sums, order)
    labels = join(tokens, starts, order[~repeats], np.array(need), np.array(least), known)
    label = np.empty(len(order), np.int64)
    label[order] = labels[np.cumsum(~repeats) - 1]
    smallest = np.full(len(labels), len(order))
    np.minimum.at(smallest, label, np.arange(len(order)))
    return smallest[label]


def prompt_groups(prompts):
    """`groups` of an iterable of prompts. Of a poem's prompt only author and title count: its template is so long that all poems of an
    author would be one group."""
    return groups(_POEM.sub(r"\1 ", prompt) for prompt in prompts)


def contamination(records, eval_dir, n=13, least=0.0):
    """One pass over any iterable of Records -> `EvalGrams.report()`."""
    grams, records = EvalGrams(eval_dir, n, least), iter(records)
    while chunk := list(islice(records, _AT_ONCE)):
        grams.look(chunk)
    return grams.report()


class EvalGrams:
    """What the benchmark files below `eval_dir` (or one file) say, to be looked for in training records, a chunk at a time.

    An item is a row of a .json, .jsonl, .csv, .tsv or .txt file, of CMRC a paragraph with its questions. Its grams are the n
    letters from each place of each of its strings on (see `normal`); a string of SHORTEST to n - 1 is one gram, shorter ones
    none. A gram of more than BOILERPLATE items of a file counts nowhere. An item is found when more than the share `least`
    of its grams is: 13 letters are two or three words of English, which stand in many texts; 0.2 keeps to whole sentences.
    Fields: items [(file, number in it from 1, first 60 characters)], too_short: how many of them have no gram to look for.
    Raises FileNotFoundError without such a file, ValueError for one that cannot be read.
    """

    def __init__(self, eval_dir, n=13, least=0.0):
        if not isinstance(n, int) or not SHORTEST <= n <= LENGTH_BITS or not 0 <= least < 1:
            raise ValueError(f"n is {n!r}, least {least!r}; n must be a whole number from {SHORTEST} to {LENGTH_BITS}, least a "
                             "share from 0 to below 1; try 13 and 0.2")
        self.least, self.items, self._seen, self._prompts = least, [], 0, {}
        self._lengths = np.arange(SHORTEST, n + 1)
        self._filter = np.zeros((2, len(self._lengths)), np.int64), np.full(1, 255, np.uint8)     # lets everything pass
        owners, grams, dull = [], [], []
        for file, path in _files(eval_dir):
            rows = _rows(path)
            text, gram, sizes = self._scan([string for row in rows for string in row])
            whole = gram & LENGTH_BITS == np.minimum(n, sizes[text])
            owner = np.array([i for i, row in enumerate(rows) for _ in row], np.int64)
            owner, gram = _distinct(owner[text[whole]], gram[whole])
            values, counts = np.unique(gram, return_counts=True)
            owners, grams, dull = owners + [owner + len(self.items)], grams + [gram], dull + [values[counts > BOILERPLATE]]
            self.items += [(file, i, " ".join(s for s in row if len(s) >= SHORTEST)[:60]) for i, row in enumerate(rows, 1)]
        owner, gram = np.concatenate(owners), np.concatenate(grams)
        kept = np.flatnonzero(~np.isin(gram, np.concatenate(dull)))
        kept = kept[np.argsort(gram[kept], kind="stable")]
        self._owner = owner[kept]
        self._grams, starts = np.unique(gram[kept], return_index=True)
        self._starts = np.append(starts, len(kept))             # the items of gram i are _owner[_starts[i]:_starts[i + 1]]
        self._first = np.full(len(self._grams), -1)             # the record that held it first
        self._totals = np.bincount(self._owner, minlength=len(self.items))
        self.too_short = int((self._totals == 0).sum())
        if not len(kept):
            raise ValueError(f"{eval_dir}: none of {len(self.items)} items has {SHORTEST} letters to look for; name a "
                             "benchmark's folder or file")
        self._filter = self._sieve()

    def look(self, records):
        """A list of Records -> (len,) bool: which of them hold, each by itself, more than `least` of some item's grams."""
        texts = [(i, text) for i, record in enumerate(records) for text in _texts(record)]
        hit = np.zeros(len(records), bool)
        if texts:
            text, found, _ = self._scan([text for _, text in texts])
            gram = np.minimum(np.searchsorted(self._grams, found), len(self._grams) - 1)
            there = self._grams[gram] == found
            holder, gram = _distinct(np.array([i for i, _ in texts])[text[there]], gram[there])
            fresh = self._first[gram] < 0
            new, at = np.unique(gram[fresh], return_index=True)             # holders ascend: the first index is the first record
            self._first[new] = self._seen + holder[fresh][at]
            self._prompts.update((self._seen + i, records[i].prompt[:60]) for i in set(holder[fresh][at].tolist()))
            counts = self._starts[gram + 1] - self._starts[gram]
            items = self._owner[np.arange(counts.sum()) + np.repeat(self._starts[gram] + counts - np.cumsum(counts), counts)]
            both, counts = np.unique(holder.repeat(counts) * len(self.items) + items, return_counts=True)
            holder, item = np.divmod(both, len(self.items))
            hit[holder[counts > self.least * self._totals[item]]] = True
        self._seen += len(records)
        return hit

    def report(self):
        """The items found so far -> list of {file, item, text, share, record, prompt}, most first.

        item: number in the file from 1; share: of its grams, in whichever records; record: index of the first one that holds
        any of them; text, prompt: the first 60 characters.
        """
        first = np.repeat(self._first, np.diff(self._starts))
        owner, first = self._owner[first >= 0], first[first >= 0]
        counts, earliest = np.bincount(owner, minlength=len(self.items)), np.full(len(self.items), self._seen)
        np.minimum.at(earliest, owner, first)
        named = np.flatnonzero(counts > self.least * self._totals).tolist()
        rows = [dict(zip(("file", "item", "text"), self.items[i]), share=float(counts[i] / self._totals[i]),
                     record=int(earliest[i]), prompt=self._prompts[int(earliest[i])]) for i in named]
        return sorted(rows, key=lambda row: (-row["share"], row["file"], row["item"]))

    def _scan(self, strings):
        """-> string's index (W,) and gram (W,) of each window that the filter lets pass; how many letters each string has."""
        codes, starts = codes_of(strings)
        powers = np.array([pow(BASE, int(length), 1 << 64) for length in self._lengths], np.uint64).view(np.int64)
        text, gram = windows(mixed(codes).view(np.int64), starts, self._lengths, powers, *self._filter)
        return text, gram, np.diff(starts)

    def _sieve(self):
        """A Bloom filter for each length: [first bit, mask of a bit's number] (2, lengths), and the bits, two set for a gram."""
        length = (self._grams & LENGTH_BITS) - SHORTEST
        sizes = 1 << np.ceil(np.log2(16 * np.bincount(length, minlength=len(self._lengths)) + 64)).astype(np.int64)
        places = np.stack([np.cumsum(sizes) - sizes, sizes - 1])
        bits = np.zeros(sizes.sum() // 8, np.uint8)
        for shift in (6, 34):
            bit = places[0, length] + (self._grams >> shift & places[1, length])
            np.bitwise_or.at(bits, bit >> 3, (1 << (bit & 7)).astype(np.uint8))
        return places, bits


def _files(eval_dir):
    """(name, path) of each file that may hold a benchmark, in the order of their names."""
    folder = Path(eval_dir)
    paths = [folder] if folder.is_file() else sorted(path for path in folder.rglob("*") if path.is_file())
    paths = [path for path in paths if path.suffix.lower() in (".json", ".jsonl", ".csv", ".tsv", ".txt")]
    if not paths:
        raise FileNotFoundError(f"{folder} is or holds no .json, .jsonl, .csv, .tsv or .txt file; name a benchmark's folder")
    return [(path.name if path == folder else path.relative_to(folder).as_posix(), path) for path in paths]


def _rows(path):
    """Each item of a benchmark file as the list of its strings."""
    bad, suffix = [], path.suffix.lower()
    lines = [text for _, text in text_lines(path, bad)]
    if bad:
        raise ValueError(f"{path}, line {bad[0]['line']}: {bad[0]['reason']}; save it as UTF-8, or take it out of the folder")
    if suffix in (".csv", ".tsv"):
        style = dict(delimiter="\t", quoting=csv.QUOTE_NONE) if suffix == ".tsv" else dict(strict=True)
        reader = csv.reader((line + "\n" for line in lines), **style)
        try:
            rows = [row for row in reader if row]
        except csv.Error as error:
            raise ValueError(f"{path}, line {reader.line_num}: {error}; mend the row, or take it out of the folder") from None
        names = [cell for cell in rows[0] if cell] if rows else []
        header = len(set(names)) == len(names) and all(name.isascii() and name.isidentifier() for name in names)
        return rows[1:] if header else rows                     # MMLU has none
    try:
        return [list(_strings(row)) for row in _json_rows(path, lines)]
    except ValueError:
        if suffix == ".txt":
            return [[line] for line in lines if line.strip()]
        raise


def _json_rows(path, lines):
    """A list's elements, paragraphs below "data" (CMRC, SQuAD), or one value a line."""
    try:
        whole = json.loads("\n".join(lines))
    except (ValueError, RecursionError) as error:
        rows, first = [], getattr(error, "lineno", 1)
        for number, line in enumerate(lines, 1):
            try:
                rows += [json.loads(line)] if line.strip() else []
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}, line {number if rows else first}: not JSON, as one value or a value a line: {error}; "
                                 "repair it, or take it out of the folder") from None
        return rows
    if isinstance(whole, dict) and isinstance(whole.get("data"), list):
        return [row for part in whole["data"] for row in (part.get("paragraphs", [part]) if isinstance(part, dict) else [part])]
    return whole if isinstance(whole, list) else [whole]


def _strings(value):
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, dict)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _strings(part)


def _texts(record):
    return [record.prompt, record.prefix, record.system, *(text for turn in record.history for text in turn),
            *(answer.text for answer in record.answers)]


def _distinct(first, second):
    """Two arrays (P,) -> the same pairs without repeats, sorted."""
    order = np.lexsort((second, first))
    first, second = first[order], second[order]
    new = np.ones(len(first), bool)
    new[1:] = (first[1:] != first[:-1]) | (second[1:] != second[:-1])
    return first[new], second[new]
