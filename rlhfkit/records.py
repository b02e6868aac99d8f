"""Record: one prompt with its answers, best first; read, written, split and paired. No torch.

On disk: JSON lines with the keys of the corpus published in 2023; a row that is no Record is set aside with file and
line. Unlike the 2023 kit: dev prompts are never in train (its dev was the first 10,000 rows of train), and pairs are
all strictly ordered ones (it took neighbours only, and could pair ties, or the worse answer as chosen).
"""
import hashlib
import json
import math
import os
import warnings
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path


@dataclass(frozen=True)
class Answer:
    text: str
    score: float

    def __post_init__(self):
        _check_text("answer", self.text)
        try:
            number = isinstance(self.score, (int, float)) and math.isfinite(self.score)
        except OverflowError:                                   # an int too long for a float
            number = False
        if not number or isinstance(self.score, bool):
            raise ValueError(f"score is {self.score!r:.80}; it must be a finite number; write 1 or 0.5, without quotes")


@dataclass(frozen=True)
class Record:
    """`answers` come best first (equal scores keep their order); `history` holds earlier (user, assistant) turns."""
    prompt: str
    answers: tuple = ()
    prefix: str = ""
    system: str = ""
    history: tuple = ()
    source: str = ""

    def __post_init__(self):
        _check_text("prompt", self.prompt)
        for name in ("prefix", "system", "source"):
            _check_text(name, getattr(self, name), empty=True)
        for name in ("answers", "history"):
            if not isinstance(getattr(self, name), (list, tuple)):
                raise ValueError(f"{name} is {getattr(self, name)!r:.80}; it must be a list")
        for answer in self.answers:
            if not isinstance(answer, Answer):
                raise ValueError(f"an answer is {answer!r:.80}; it must be an Answer(text, score)")
        for turn in self.history:
            if not isinstance(turn, (list, tuple)) or len(turn) != 2:
                raise ValueError(f"a turn of history is {turn!r:.80}; it must be the two texts (user, assistant)")
            for text in turn:
                _check_text("history", text, empty=True)
        object.__setattr__(self, "answers", tuple(sorted(self.answers, key=lambda answer: -answer.score)))
        object.__setattr__(self, "history", tuple(map(tuple, self.history)))


def read_records(path, rejected=None):
    """JSON lines with `prompt`, `answers: [{"answer", "score"}]` and if set `prefix system history source` -> Records.

    Rows that are no Record are appended to `rejected` as {"file", "line", "reason", "text"}; without a list one warning
    counts them. Raises FileNotFoundError when there is no such file, ValueError when it holds no row, or no good row
    and nobody asked for the bad ones.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is no file; it must be JSON lines; make it with write_records(build(), path)")
    bad, records = [], []
    for line, row in json_lines(path, bad):
        try:
            records.append(_from_row(row))
        except ValueError as error:
            set_aside(bad, path, line, error, row)
    if not records and not bad:
        raise ValueError(f"{path} is empty; it must hold JSON lines; make it with write_records(build(), path)")
    if rejected is not None:
        rejected.extend(bad)
    elif bad:
        first = f"the first, line {bad[0]['line']}: {bad[0]['reason']}"
        count = f"{len(bad)} of {len(records) + len(bad)} rows set aside"
        report = f"{path}: {count}; {first}; pass rejected=[] to see them"
        if not records:
            raise ValueError(report)
        warnings.warn(report, stacklevel=2)
    return records


def write_records(records, path):
    """One JSON line a record, written beside `path` and renamed: a full disk or a kill leaves the old file as is."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(beside, "w", encoding="utf-8", newline="\n") as file:
            for record in records:
                file.write(json.dumps(_to_row(record), ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def split(records, dev_fraction, seed):
    """(train, dev) by prompt: all records of one prompt are on one side, `dev_fraction` of the distinct prompts in dev.

    Which prompts depends on seed and text alone, not on the order of the records. From two prompts on no side is empty.
    """
    if not isinstance(dev_fraction, (int, float)) or not 0 < dev_fraction < 1:
        raise ValueError(f"dev_fraction is {dev_fraction!r}; it must be between 0 and 1, both excluded; try 0.05")
    prompts = {record.prompt for record in records}
    count = min(max(1, round(dev_fraction * len(prompts))), max(0, len(prompts) - 1))
    ordered = sorted(prompts, key=lambda prompt: hashlib.sha256(f"{seed}\n{prompt}".encode()).digest())
    chosen = set(ordered[:count])
    return [r for r in records if r.prompt not in chosen], [r for r in records if r.prompt in chosen]


def pairs(record):
    """Every (chosen Answer, rejected Answer) where chosen has strictly the higher score and another text."""
    return [(a, b) for a, b in combinations(record.answers, 2) if a.score > b.score and a.text != b.text]


def json_lines(path, rejected):
    """(line number from 1, dict) of each JSON object in the file; all other lines but blank ones go to `rejected`."""
    for line, text in text_lines(path, rejected):
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except (ValueError, RecursionError) as error:
            set_aside(rejected, path, line, f"not JSON: {error}", text)
            continue
        if isinstance(row, dict):
            yield line, row
        else:
            set_aside(rejected, path, line, f"JSON, but a {type(row).__name__}; it must be an object with fields", text)


def text_lines(path, rejected):
    """(line number from 1, text without line end) of each UTF-8 line, blank ones too; the others go to `rejected`."""
    with open(path, "rb") as file:
        for line, raw in enumerate(file, 1):
            try:
                yield line, raw.decode("utf-8-sig" if line == 1 else "utf-8").rstrip("\r\n")
            except UnicodeDecodeError as error:
                text = raw.decode("utf-8", "backslashreplace")
                set_aside(rejected, path, line, f"not UTF-8 at byte {error.start + 1}", text)


def set_aside(rejected, path, line, reason, row):
    """Keeps a bad row: all its text (half characters escaped, so that it can be printed), where it stood, and why."""
    text = row if isinstance(row, str) else json.dumps(row, ensure_ascii=False)
    text = text.encode("utf-8", "backslashreplace").decode()
    rejected.append({"file": str(path), "line": line, "reason": str(reason), "text": text})


def _check_text(name, text, empty=False):
    if not isinstance(text, str):
        raise ValueError(f"{name} is {text!r:.80}; it must be a text")
    if not empty and not text.strip():
        raise ValueError(f"{name} is {text!r:.80}; it must not be empty")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} holds {text[error.start]!r}, half a character; it must be valid UTF-8") from None


def _from_row(row):
    for field in ("prompt", "answers"):
        if field not in row:
            raise ValueError(f"no field {field!r}; a row must have 'prompt' and 'answers'")
    if not isinstance(row["answers"], list):
        raise ValueError(f"answers is {row['answers']!r:.80}; it must be a list")
    answers = []
    for answer in row["answers"]:
        if not isinstance(answer, dict) or not {"answer", "score"} <= answer.keys():
            raise ValueError(f"an answer is {answer!r:.80}; it must have the fields 'answer' and 'score'")
        answers.append(Answer(answer["answer"], answer["score"]))
    return Record(row["prompt"], answers, **{key: row[key] for key in _OPTIONAL if key in row})


def _to_row(record):
    row = {"prompt": record.prompt, "answers": [{"answer": a.text, "score": a.score} for a in record.answers]}
    return row | {key: getattr(record, key) for key in _OPTIONAL if key == "prefix" or getattr(record, key)}


_OPTIONAL = ("prefix", "system", "history", "source")
