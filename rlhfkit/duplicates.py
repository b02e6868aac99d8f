"""Near duplicates among texts, and benchmark items whose text stands in training records. No torch.

Both searches are complete: near pairs come from a prefix-filtered join over character bigrams, benchmark text from
64-bit hashes of all runs of 13 characters (Brown 2020, appendix C, has 13 words). The 2023 kit looked for neither, and its
dev rows were train rows.
"""
import csv
import json
import re
from collections import Counter
from itertools import chain, islice
from pathlib import Path

import numpy as np

from rlhfkit.joins import LIMIT, join, letters, sets_of
from rlhfkit.records import text_lines

SHORTEST = 8            # characters of a benchmark's string worth a search
BOILERPLATE = 10        # a gram of more items of one file is an instruction or a label
_AT_ONCE = 4096         # records
_SPACE = re.compile(r"\s*")
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
    tokens, starts = sets_of(map(normal, texts))
    return join(tokens, starts, np.argsort(np.diff(starts), kind="stable"), np.array(need), np.array(least))


def prompt_groups(prompts):
    """`groups` of an iterable of prompts. Of a poem's prompt only author and title count: its template is so long that all
    poems of an author would be one group."""
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
        if not isinstance(n, int) or not SHORTEST <= n <= 63 or not 0 <= least < 1:
            raise ValueError(f"n is {n!r}, least {least!r}; n must be a whole number from {SHORTEST} to 63, least a share from 0 "
                             "to below 1; try 13 and 0.2")
        self.n, self.least, self.items, self._seen = n, least, [], 0
        self._first, self._owners, self._starts = {}, {}, set()     # of grams: record that held it first, items, first letters
        dull = set()
        for file, path in _files(eval_dir):
            rows = _rows(path)
            found = [{gram for text in map(letters, row) for gram in self._grams(text)} for row in rows]
            dull.update(gram for gram, count in Counter(chain.from_iterable(found)).items() if count > BOILERPLATE)
            for number, (row, grams) in enumerate(zip(rows, found), 1):
                owner = (len(self.items),)
                for gram in grams:
                    self._owners[gram] = self._owners.get(gram, ()) + owner
                self.items.append((file, number, " ".join(s for s in row if len(s) >= SHORTEST)[:60]))
        for gram in dull:
            del self._owners[gram]
        self._totals = Counter(chain.from_iterable(self._owners.values()))
        self.too_short = len(self.items) - len(self._totals)
        if not self._owners:
            raise ValueError(f"{eval_dir}: none of {len(self.items)} items has {SHORTEST} letters to look for; name a "
                             "benchmark's folder or file")

    def look(self, records):
        """A list of Records -> (len,) bool: which of them hold, each by itself, more than `least` of some item's grams."""
        hits = np.zeros(len(records), bool)
        for i, record in enumerate(records):
            if held := set().union(*(self._held(letters(text)) for text in _texts(record) if text)):
                this, counts = (self._seen + i, record.prompt[:60]), Counter()
                for gram in held:
                    self._first.setdefault(gram, this)
                    counts.update(self._owners[gram])
                hits[i] = any(count > self.least * self._totals[item] for item, count in counts.items())
        self._seen += len(records)
        return hits

    def report(self):
        """The items found so far -> list of {file, item, text, share, record, prompt}, most first.

        item: number in the file from 1; share: of its grams, in whichever records; record: index of the first one that holds
        any of them; text, prompt: the first 60 characters.
        """
        counts, first = Counter(), {}
        for gram, this in self._first.items():
            counts.update(self._owners[gram])
            first |= {item: min(this, first.get(item, this)) for item in self._owners[gram]}
        rows = [dict(zip(("file", "item", "text"), self.items[item]), share=count / self._totals[item], record=first[item][0],
                     prompt=first[item][1]) for item, count in counts.items() if count > self.least * self._totals[item]]
        return sorted(rows, key=lambda row: (-row["share"], row["file"], row["item"]))

    def _grams(self, text):
        """Hashes of the grams of an item's letters."""
        length = min(self.n, len(text))
        places = range(len(text) - length + 1) if length >= SHORTEST else ()
        self._starts.update(hash(text[at:at + SHORTEST]) for at in places)
        return {hash(text[at:at + length]) for at in places}

    def _held(self, text):
        """Hashes of the items' grams, of any length, among a record's letters."""
        places = [at for at in range(len(text) - SHORTEST + 1) if hash(text[at:at + SHORTEST]) in self._starts]
        return {hash(text[at:at + length]) for at in places for length in range(SHORTEST, self.n + 1)} & self._owners.keys()


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
        return [list(_strings(row)) for row in _json_rows(path, "\n".join(lines))]
    except ValueError:
        if suffix == ".txt":
            return [[line] for line in lines if line.strip()]
        raise


def _json_rows(path, text):
    """A list's elements, paragraphs below "data" (CMRC, SQuAD), or values one after the other."""
    values, at, text, decoder = [], 0, text.rstrip(), json.JSONDecoder()
    try:
        while at < len(text):
            value, at = decoder.raw_decode(text, _SPACE.match(text, at).end())
            values.append(value)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}, line {getattr(error, 'lineno', 1)}: not JSON, as one value or a value a line: {error}; "
                         "repair it, or take it out of the folder") from None
    if len(values) != 1:
        return values
    [whole] = values
    if isinstance(whole, dict) and isinstance(whole.get("data"), list):
        return [row for part in whole["data"] for row in (part.get("paragraphs", [part]) if isinstance(part, dict) else [part])]
    return whole if isinstance(whole, list) else values


def _strings(value):
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, dict)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _strings(part)


def _texts(record):
    return [record.prompt, record.prefix, record.system, *(text for turn in record.history for text in turn),
            *(answer.text for answer in record.answers)]
