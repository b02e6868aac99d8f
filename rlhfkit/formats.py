"""Rows in the forms and files that people bring → Records, one at a time. No torch.

The suffix tells the kind of file, its fields the form of a row. What cannot be used is set aside with its place, never
mended silently; memory does not grow with the file. The 2023 kit read JSON lines of its own form only, all at once.
"""
import codecs
import csv
import json
import re
import shutil
import tempfile
import warnings
from collections import deque
from itertools import chain
from pathlib import Path

from rlhfkit.forms import to_record
from rlhfkit.records import BROKEN_ARCHIVE, LONGEST_LINE, json_lines, open_bytes, raw_lines, set_aside, text_lines

BLOCK = 1 << 16         # bytes read at once


def read_records(path, rejected=None):
    """All Records of `stream_records` in a list.

    Rows that are no Record are appended to `rejected` as {"file", "line", "reason", "text"}; without a list one warning
    counts them. Raises FileNotFoundError when there is no such file, ValueError when it holds no row, or no good row
    and nobody asked for the bad ones.
    """
    bad = []
    records = list(stream_records(path, bad))
    if not records and not bad:
        raise ValueError(f"{path} is empty; it must hold rows, for example JSON lines; make it with write_records(build(), path)")
    if rejected is not None:
        rejected.extend(bad)
    elif bad:
        report = (f"{path}: {len(bad)} of {len(records) + len(bad)} rows set aside; the first, line {bad[0]['line']}: "
                  f"{bad[0]['reason']}; pass rejected=[] to see them")
        if not records:
            raise ValueError(report)
        warnings.warn(report, stacklevel=2)
    return records


def stream_records(path, rejected):
    """Yields the Records of a .jsonl, .json, .csv, .tsv, .parquet or .txt file, also .gz or .xz (any other is read as JSON
    lines); of a folder written by datasets' save_to_disk; or of a data set on the hub, "owner/name" or "owner/name:split".

    Appends to `rejected` as `set_aside` does, `line` being the number of the row where a file has no lines. Raises
    FileNotFoundError when there is nothing to read, PermissionError when it may not be read.
    """
    line = 0
    try:
        for line, row in _reader(path)(path, rejected):
            try:
                record = to_record(row)
            except ValueError as error:
                set_aside(rejected, path, line, error, json.dumps(row, ensure_ascii=False, default=str))
                continue
            yield record
    except BROKEN_ARCHIVE as error:
        set_aside(rejected, path, line + 1, f"the archive ends early or is damaged ({error}): fetch it again", "")


# --- files: functions (path, rejected) -> (line, dict) of each row -------------------------------------------------------

def _reader(path):
    suffix = _suffix(path)
    if Path(path).exists() and not Path(path).is_dir():
        return _READERS.get(suffix, json_lines)
    if Path(path).is_dir() or Path(_name_and_split(path)[0]).is_dir():
        return _folder
    if _HUB.fullmatch(str(path)) and suffix not in _READERS:
        return _hub
    raise FileNotFoundError(
        f"{path} is no file; it must be one of {', '.join(_READERS)} (or such a .gz or .xz), a folder that a data set was saved "
        "to, or owner/name on the hub; make JSON lines with write_records(build(), path)")


def _text(path, rejected):
    return ((line, {"text": text}) for line, text in text_lines(path, rejected) if text.strip())


def json_rows(path, rejected):
    """The objects of a list, of JSON lines, or a single one; after a broken one goes on where the next seems to begin."""
    with open_bytes(path) as file:
        window, mark, cut = _Window(file), "", False
        between = "\n" + window.past(_BEGINNING)
        is_list = "[" in between
        while window.at < len(window.text):
            line, (row, stop, reason) = window.line, _object(window)
            if not reason:
                yield line, row
                mark = _mark(window, between)
                window.take(stop)
            else:
                text = window.take(stop) if stop else window.skip(mark or _mark(window, between))
                set_aside(rejected, path, line, reason, text if len(text) <= LONGEST_LINE else text[:1000])
            cut = reason and window.at == len(window.text)      # its reason names the end, too
            between = window.past(_BETWEEN)
        if is_list and not cut and "]" not in between:
            set_aside(rejected, path, window.line, "the list has no end; rows may be missing: fetch the file again", "")


def _object(window):
    """The object that begins at `window.at` → (it, where it ends, ""); of what is none: (it, where it ends or 0, why)."""
    while True:
        try:
            row, stop = _DECODER.raw_decode(window.text, window.at)
            wrong = "" if isinstance(row, dict) else f"JSON, but a {type(row).__name__}; it must be an object with fields"
            return row, stop, _TOO_LONG if stop - window.at > LONGEST_LINE else wrong
        except (ValueError, RecursionError) as error:
            place, reason = getattr(error, "pos", 0), f"not JSON: {getattr(error, 'msg', error)}"
        if "Unterminated" not in reason and place <= len(window.text) - 16:
            return None, 0, reason
        if len(window.text) - window.at > LONGEST_LINE:
            return None, 0, _TOO_LONG
        if not window.more():                           # an error at the end of what is held may be none
            return None, 0, reason


def _mark(window, between):
    """What rows like this one begin with: where it begins a line, a line as far in; elsewhere its first field."""
    _, line_end, indent = between.rpartition("\n")
    if line_end and not indent.strip() and window.text[window.at] == "{":
        return f"\n{indent}{{"
    return _OPENING.match(window.text, window.at).group() or "{"


class _Window:
    """The characters of a file that are held; those before `at` are done with, `line` is the number of the line there."""

    def __init__(self, file):
        self.text, self.at, self.line, self._read = "", 0, 1, file.read1
        self._decode = codecs.getincrementaldecoder("utf-8-sig")("surrogateescape").decode

    def more(self):
        """Reads more than is held, so that a long row is tried a few times only → whether there was anything."""
        held, new = len(self.text) - self.at, ""
        try:
            while len(new) <= held and (raw := self._read(BLOCK)):
                new += self._decode(raw)
        except BROKEN_ARCHIVE:                          # first what comes before the break; the next call meets it again
            if not new:
                raise
        if new:
            self.text, self.at = self.text[self.at:] + new, 0
        return bool(new)

    def take(self, to):
        taken, self.at = self.text[self.at:to], to
        self.line += taken.count("\n")
        return taken

    def past(self, pattern):
        while (end := pattern.match(self.text, self.at).end()) == len(self.text) and self.more():
            pass
        return self.take(end)

    def skip(self, mark):
        """Goes to the brace of the next mark, or to the end → the characters skipped, about a block of them at the most."""
        skipped = self.take(self.at + 1)
        while (found := self.text.find(mark, self.at)) < 0:
            skipped += self.take(max(self.at, len(self.text) - len(mark)))[:max(0, BLOCK - len(skipped))]
            if not self.more():
                return skipped + self.take(len(self.text))
        return (skipped + self.take(found + mark.index("{"))).rstrip(", \t\r\n")


def csv_rows(path, rejected):
    """The first row names the fields. A row with a lost quote costs its first line only: reading goes on from its second."""
    csv.field_size_limit(LONGEST_LINE)                  # where a lost quote ends at the latest
    fresh, again, taken, reader, header = raw_lines(path, rejected), deque(), [], None, None

    def lines():
        while line := again.popleft() if again else next(fresh, None):
            taken.append(line)
            yield line[1].decode("utf-8", "surrogateescape")

    while True:
        reader = reader or csv.reader(lines(), delimiter="\t" if _suffix(path) == ".tsv" else ",", strict=True)
        taken.clear()
        try:
            cells = next(reader)
            if header and cells and len(cells) != len(header):
                raise ValueError(f"{len(cells)} cells; the header has {len(header)}; a quote or a separator may be missing")
        except StopIteration:
            return
        except (csv.Error, ValueError) as error:
            line, raw = taken[0]
            set_aside(rejected, path, line, error, raw.decode("utf-8", "surrogateescape").rstrip("\r\n"))
            again.extendleft(reversed(taken[1:]))
            reader = None                               # that one is done where the file is
            continue
        if header and cells:
            yield taken[0][0], dict(zip(header, cells))
        header = header or [name.strip() for name in cells]


def _parquet(path, rejected):
    from pyarrow import ArrowException, parquet         # a third of a second, which few need
    number = 0
    with open_bytes(path) as file, tempfile.TemporaryFile() as whole:
        if Path(path).suffix in (".gz", ".xz"):         # Parquet is read from its end
            shutil.copyfileobj(file, whole)
            file = whole
        try:
            batches = parquet.ParquetFile(file, buffer_size=BLOCK).iter_batches(1000)
            for number, row in enumerate(chain.from_iterable(batch.to_pylist() for batch in batches), 1):
                yield number, row
        except (ArrowException, OSError) as error:
            set_aside(rejected, path, number + 1, f"not a whole Parquet file ({error}): fetch it again", "")


def _folder(path, rejected):
    folder, split = (path, "") if Path(path).is_dir() else _name_and_split(path)
    if not any((Path(folder) / name).is_file() for name in ("state.json", "dataset_dict.json")):
        raise FileNotFoundError(
            f"{folder} is a folder that no data set was saved to; give one of its files, or read raw corpora with "
            f"rk.build({str(folder)!r}), and train.jsonl and dev.jsonl with rk.read_data({str(folder)!r})")
    from datasets import load_from_disk                 # a second, which few need
    found, split = load_from_disk(str(folder)), split or "train"
    if isinstance(found, dict) and split not in found:
        raise ValueError(f"split is {split!r}; it must be one of {', '.join(found)}; write {folder}:{next(iter(found))}")
    return enumerate(found[split] if isinstance(found, dict) else found, 1)


def _hub(path, rejected):
    from datasets import load_dataset
    name, split = _name_and_split(path)
    try:
        return enumerate(load_dataset(name, split=split or "train", streaming=True), 1)
    except Exception as error:                          # whatever the hub's client raises
        raise FileNotFoundError(
            f"{path} is no file here, and the hub gave no such data set ({type(error).__name__}: {error!s:.200}); it must be a "
            f"path or owner/name[:split]; where there is a network, load_dataset({name!r}).save_to_disk(folder), and give that"
        ) from error


def _suffix(path):
    """'.csv' of rows.csv.gz."""
    path = Path(path)
    return Path(path.stem if path.suffix in (".gz", ".xz") else path.name).suffix.lower()


def _name_and_split(path):
    """('folder', 'test') of folder:test, ('folder', '') of folder."""
    name, colon, split = str(path).rpartition(":")
    return (name, split) if colon else (split, "")


_READERS = {".jsonl": json_lines, ".json": json_rows, ".csv": csv_rows, ".tsv": csv_rows, ".parquet": _parquet, ".txt": _text}
_DECODER = json.JSONDecoder()
_TOO_LONG = f"over {LONGEST_LINE} characters in one row; it has at most that many"
_HUB = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")
_BEGINNING = re.compile(r"\s*(\[\s*\]?)?\s*")
_BETWEEN = re.compile(r"[\s,]*\]?\s*")
_OPENING = re.compile(r'(\{\s*"[^"]*")?')
