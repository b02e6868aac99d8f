"""Fills the part of each card between the marks `counts` and `/counts`: sizes of the shipped sample and of rows given.

    python data_cards/counts.py [--raw FOLDER] [--eval FOLDER] [--rows FOLDER]

A set that ships no sample is counted on the three rows that its card shows. Lines on rows of a folder that is not given
stay as they are. Folders are never named in a card, nor is anything quoted from their rows. Nothing else is written.
"""
import argparse
import csv
import json
import logging
import math
import re
import tempfile
from collections import Counter
from pathlib import Path

import rlhfkit as rk
from rlhfkit.samples import EVAL, RAW

CARDS = Path(__file__).parent
RECORDS = ("what", "files", "records", "answers", "pairs", "prompt, characters: median / 95th percentile",
           "best answer, likewise", "set aside")
EXAMPLES = ("what", "split", "rows", "labels", "characters shown of a row: mean")
ABOVE, SAMPLE, GIVEN = "the rows above", "shipped sample", "rows given to the script"
# corpus -> its files under the raw folder; the first pattern that finds any is the one read
RAW_FILES = {"weibo": ("weibo_summary*",), "couplets": ("couplets.txt*", "couplets/**/*.txt*"), "zhidao": ("zhidao/*.csv*",),
             "classical": ("Classical-Modern/bitext/*",), "poetry": ("chinese-poetry/**/*.json*",),
             "baike": ("baike_qa2019/*.json*",), "published": ("train_data_external_v1*", "dev_data_external_v1*")}
# benchmark of JSON lines -> the fields that the model is shown
SHOWN = {"ocnli": ("sentence1", "sentence2"), "cmnli": ("sentence1", "sentence2"), "afqmc": ("sentence1", "sentence2"),
         "csl": ("abst", "keyword"), "iflytek": ("sentence",), "tnews": ("sentence",), "cluewsc2020": ("text",)}
# exam -> its columns, where the files do not name them
EXAMS = {"ceval": None, "cmmlu": None, "mmlu": ("question", "A", "B", "C", "D", "answer")}
BENCHMARKS = (*SHOWN, "chid", "c3", "cmrc2018", *EXAMS)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--raw", type=Path, help="folder of raw corpora, as for rlhfkit.build")
    parser.add_argument("--eval", type=Path, dest="benchmarks", help="folder of benchmark files, as for rlhfkit.evaluate")
    parser.add_argument("--rows", type=Path, help="folder of rows in any form that rlhfkit.read_records takes")
    given = vars(parser.parse_args())
    for name, folder in given.items():
        if folder and not folder.is_dir():
            parser.error(f"{name} is {folder}; it must be a folder")
    logging.getLogger("rlhfkit").setLevel(logging.ERROR)
    for path in sorted(CARDS.glob("*.md")):
        old = path.read_text("utf-8")
        new = filled(path.stem, old, **given)
        if new != old:
            path.write_text(new, encoding="utf-8", newline="\n")
            print(f"{path.name}: counts changed")


def filled(name, text, raw=None, benchmarks=None, rows=None, samples=(RAW, EVAL)):
    """The card's text with its counts made anew; samples: the folders of raw corpora and of benchmarks that ship."""
    match = re.search(r"(?<=<!-- counts -->\n).*?(?=<!-- /counts -->)", text, re.S)
    if not match:
        raise ValueError(f"card {name} has no marks <!-- counts --> and <!-- /counts -->; add them, each on its own line")
    columns = EXAMPLES if name in BENCHMARKS else RECORDS
    folder = benchmarks if name in BENCHMARKS else raw if name in RAW_FILES else rows
    lines = [_line(columns), _line(["---"] * len(columns))]
    lines += [_line(cells) for cells in _own_rows(name, text, samples)]
    if folder:
        lines += [_line(cells) for cells in _count(name, folder, GIVEN)]
    else:
        lines += [line for line in match[0].splitlines() if line.startswith(f"| {GIVEN} |")]
    return text[:match.start()] + "".join(f"{line}\n" for line in lines) + text[match.end():]


def examples(text):
    """{path under the folder of raw corpora, of benchmarks or of rows: content} of the raw rows that a card shows."""
    return dict(re.findall(r"^```\w+ (\S+)\n(.*?)^```$", text, re.S | re.M))


def write_examples(text, folder):
    for path, content in examples(text).items():
        file = Path(folder) / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content, encoding="utf-8", newline="\n")


def _own_rows(name, text, samples):
    """Cells on the sample that ships, or else on the rows in the card."""
    found = _count(name, samples[name in BENCHMARKS], SAMPLE) if name in BENCHMARKS or name in RAW_FILES else []
    if found:
        return found
    with tempfile.TemporaryDirectory() as folder:
        write_examples(text, folder)
        return _count(name, Path(folder), ABOVE)


def _count(name, folder, what):
    """Lists of cells, a row of the table each; none when the folder does not hold the set."""
    if name in BENCHMARKS:
        return [[what, split, _number(len(rows)), _labels(Counter(label for label, _ in rows)),
                 _number(round(sum(length for _, length in rows) / len(rows)))]
                for split, rows in _splits(name, folder / name) if rows]
    rejected = []
    if name in RAW_FILES:
        files = next((found for pattern in RAW_FILES[name] if (found := _files(folder, pattern))), [])
        records = rk.build(sources=[name], raw_dir=folder, seed=0, rejected=rejected) if files else []
    else:
        files = _files(folder, "**/*")
        records = [record for file in files for record in rk.read_records(file, rejected)]
    return [[what, _number(len(files)), *_sizes(records), _reasons(rejected)]] if files else []


def _files(folder, pattern):
    return sorted(path for path in folder.glob(pattern) if path.is_file() and not path.name.startswith("."))


def _sizes(records):
    prompts = [len(record.prompt) for record in records]
    best = [len(record.answers[0].text) for record in records if record.answers]
    counts = (len(records), sum(len(record.answers) for record in records), sum(len(rk.pairs(record)) for record in records))
    return [*map(_number, counts), *(" / ".join(_number(_rank(sizes, q)) for q in (0.5, 0.95)) for sizes in (prompts, best))]


def _rank(sizes, share):
    """Nearest rank: the smallest size that at least this share of the sizes does not exceed."""
    return sorted(sizes)[math.ceil(share * len(sizes)) - 1] if sizes else 0


def _reasons(rejected):
    """How many rows were set aside, and the three commonest reasons with all that came from a row taken out."""
    reasons = Counter()
    for row in rejected:
        # up to the last ";", for one may be in the value
        reason = re.sub(r"\b(is|are) .*(?=; )", "…", row["reason"], flags=re.S)
        reason = re.sub(r"(?<![-\w])\d+", "n", re.sub(r"holds .{1,12}?, ", "holds …, ", reason).split(": ")[0])
        reasons[reason.replace("\n", " ").replace("|", "/")] += 1
    top = sorted(reasons.items(), key=lambda item: (-item[1], item[0]))[:3]
    return _number(len(rejected)) + (": " + "; ".join(f"{count} × {reason}" for reason, count in top) if top else "")


def _labels(counts):
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    if len(ordered) <= 6:
        return ", ".join(f"{label}: {_number(count)}" for label, count in ordered)
    most, least = (f"{label} ({_number(count)})" for label, count in (ordered[0], ordered[-1]))
    return f"{len(ordered)} labels, most {most}, least {least}"


def _splits(name, folder):
    """(split, [(label, characters)]) of each file of a benchmark, or of each folder of an exam."""
    if name in EXAMS:
        for split in sorted({path.parent.name for path in folder.glob("*/*.csv")}):
            yield split, [row for path in sorted(folder.glob(f"{split}/*.csv")) for row in _exam(path, EXAMS[name])]
        return
    for path in sorted(folder.glob("*.json")):
        if not path.stem.endswith("_answer"):
            text = path.read_text("utf-8-sig")
            if name in SHOWN or name == "chid":
                data = [json.loads(line) for line in text.split("\n") if line.strip()]
            else:
                data = json.loads(text)
            yield path.stem, list({"chid": _chid, "c3": _c3, "cmrc2018": _cmrc}.get(name, _plain)(data, path))


def _exam(path, columns):
    with open(path, encoding="utf-8-sig", newline="") as file:
        for row in csv.DictReader(file, columns):
            row = {(key or "").lower(): value or "" for key, value in row.items()}
            yield row.get("answer", "").strip() or "none", sum(len(row[key]) for key in ("question", "a", "b", "c", "d"))


def _plain(rows, path):
    for row in rows:
        yield str(row.get("label", "none")), sum(len(_text(row[key])) for key in SHOWN[path.parent.name])


def _chid(rows, path):
    """A row a blank: its label is the place of the right idiom among the candidates, from 1."""
    answers = json.loads(path.with_name(f"{path.stem}_answer.json").read_text("utf-8-sig"))
    for row in rows:
        for passage in row["content"]:
            for tag in re.findall(r"#idiom\d+#", passage):
                yield f"place {answers[tag] + 1}", len(passage)


def _c3(documents, path):
    """Label: the place of the answer among the choices."""
    for sentences, questions, *_ in documents:
        for question in questions:
            answer, choices = question.get("answer"), question["choice"]
            place = f"place {choices.index(answer) + 1}" if answer in choices else "none"
            yield place, len("".join(sentences) + question["question"] + "".join(choices))


def _cmrc(data, path):
    for article in data["data"]:
        for paragraph in article["paragraphs"]:
            for question in paragraph["qas"]:
                count = len({answer["text"] for answer in question.get("answers") or ()})
                yield f"{count} reference" + "s" * (count != 1), len(paragraph["context"] + question["question"])


def _text(value):
    return value if isinstance(value, str) else "".join(map(_text, value))


def _number(count):
    return f"{count:,}"


def _line(cells):
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
