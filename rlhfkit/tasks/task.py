"""What a benchmark is: where its rows are, how a row becomes a prompt, and how the model's answer is scored.

Examples are plain dicts with `id` (unique in its split), `gold` (None: no label; such rows are left out and counted)
and, where the benchmark has them, `subject`, `category` and `groups`, further groups that cut across the categories. The
2023 kit had a class of 88 lines for each benchmark.
"""
import csv
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

from rlhfkit.records import Record


@dataclass(frozen=True)
class Task:
    """`load(folder, split) -> [example]`: folder is `<data_dir>/<name>`; FileNotFoundError states the layout expected.

    `render(example, shots) -> (Record, choices, gold)`: shots are examples shown with answers before the question;
    gold is the index of the right choice, or for generation what `metric(answer, gold) -> {name: score in [0, 1]}`
    takes. `scoring`: `choices`, log-likelihood of each choice behind prompt + prefix, summed over its own tokens;
    `letters`, the same for single letters, the next-letter logits; `generation`, the answer goes to `metric`.
    """

    name: str
    load: Callable
    render: Callable
    scoring: str = "choices"
    split: str = "dev"                  # scored when none is asked for
    shot_splits: tuple = ("train", "fewclue_train_0", "dev")     # the first that exists and is not scored gives the shots
    metric: Callable | None = None
    max_new_tokens: int = 0
    temperature: float = 0.0            # 0 takes the likeliest token; above, what a policy does, drawn with fixed seeds

    def __post_init__(self):
        if self.scoring not in ("choices", "letters", "generation"):
            raise ValueError(f"scoring of {self.name} is {self.scoring!r}; it must be choices, letters or generation")
        if self.scoring == "generation" and (self.metric is None or self.max_new_tokens < 1):
            raise ValueError(f"task {self.name} is scored by generation; give it a metric and max_new_tokens > 0")


def template(ask, separator="\n", intro=lambda example: ""):
    """A render function from `ask(example) -> (prompt, prefix, choices)`: intro, shots and question, with separators.

    A shot is answered with its right choice, or where there are no choices with the first of its golden answers.
    """
    def render(example, shots=()):
        parts = [intro(example)] if intro(example) else []
        for shot in shots:
            prompt, prefix, choices = ask(shot)
            parts.append(prompt + prefix + (choices[shot["gold"]] if choices else shot["gold"][0]))
        prompt, prefix, choices = ask(example)
        return Record(prompt=separator.join([*parts, prompt]), prefix=prefix), choices, example["gold"]
    return render


def lines_loader(layout, texts, make):
    """A load function for `<split>.json` of JSON lines; texts: fields that must be one; `make(row, where)` gives the example."""
    def load(folder, split):
        [file] = find_files(folder, [f"{split}.json"], layout)
        examples = []
        for i, row in enumerate(read_json_lines(file, texts)):
            where = f"{file}, row {i + 1}"
            if bad := [f"{name} is {row[name]!r:.80}" for name in texts if not isinstance(row[name], str)]:
                raise ValueError(f"{where}: {', '.join(bad)}; it must be a text")
            examples.append({"id": f"{i}", **make(row, where)})
        return examples
    return load


def find_files(folder, patterns, layout):
    """The files under folder for the first pattern that any file matches, sorted; the error states the layout."""
    for pattern in patterns:
        if files := sorted(Path(folder).glob(pattern)):
            return files
    raise FileNotFoundError(f"no {' or '.join(patterns)} in {folder}; expected {layout}")


def read_json_lines(file, fields):
    """One dict a line. ValueError with file and line for a bad row: a benchmark must be whole."""
    rows = []
    for number, line in enumerate(read_text(file).split("\n"), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{file}, line {number} is not JSON ({error}); fetch the file again") from error
            check_fields(row, fields, f"{file}, line {number}")
            rows.append(row)
    return rows


def read_csv(file, fields, header):
    """One dict a row. With `header` the first row names the columns, which must have all fields; else the fields do."""
    rows = [row for row in csv.reader(io.StringIO(read_text(file), newline="")) if row]
    names = rows.pop(0) if header and rows else list(fields)
    check_fields(dict.fromkeys(names), fields, f"{file}, line 1")
    for number, row in enumerate(rows, 1 + bool(header)):
        if len(row) != len(names):
            raise ValueError(f"{file}, row {number} has {len(row)} columns; expected {len(names)}: {', '.join(names)}")
    return [dict(zip(names, row)) for row in rows]


def read_text(file):
    try:
        return Path(file).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 ({error}); fetch the file again, or convert it") from error


def check_fields(row, fields, where):
    missing = [f for f in fields if f not in row] if isinstance(row, dict) else list(fields)
    if missing:
        raise ValueError(f"{where} lacks {', '.join(missing)}; expected the fields {', '.join(fields)}")


def index_of(value, values, where):
    """The place of a label, a text or a number, among the known texts; None for a missing label and for `-`, where annotators
    disagreed."""
    if value in (None, "", "-"):
        return None
    if str(value) not in values:
        raise ValueError(f"{where}: label {value!r}; it must be one of {', '.join(values)}, or - for none")
    return list(values).index(str(value))


def texts_of(row, name, where):
    """The list of texts under a name, as a tuple: a bare text there would be taken apart into characters."""
    value = row.get(name)
    if not isinstance(value, list) or not value or not all(isinstance(text, str) and text.strip() for text in value):
        raise ValueError(f"{where}: {name} is {value!r:.80}; it must be a list of texts")
    return tuple(value)
