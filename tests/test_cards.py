"""Data cards: a card for each set, a head that the hub's tools read, raw rows that really build, counts that are up to date."""
import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import DatasetCard

import rlhfkit as rk
from rlhfkit.records import to_line
from rlhfkit.samples import EVAL, RAW
from rlhfkit.sources import SOURCES
from rlhfkit.tasks import TASKS

FOLDER = Path(__file__).resolve().parents[1] / "data_cards"
TEXTS = {path.stem: path.read_text("utf-8") for path in sorted(FOLDER.glob("*.md"))}
HEADINGS = ["Summary", "Origin", "Licence and its limits", "How to get it", "Raw format", "Fields", "Template", "Counts",
            "Known faults", "Not to be used for"]
SIZES = ["n<1K", "1K<n<10K", "10K<n<100K", "100K<n<1M", "1M<n<10M"]
LICENSES = {"mit", "agpl-3.0", "cc-by-nc-2.0", "cc-by-sa-4.0", "cc-by-nc-sa-4.0", "unknown", "other"}
KINDS = {"text-generation", "summarization", "question-answering", "translation", "text-classification", "multiple-choice"}
CLUE = {"ocnli", "cmnli", "chid", "cmrc2018", "cluewsc2020", "c3", "afqmc", "csl", "iflytek", "tnews"}
CORPORA = sorted(set(SOURCES) - {"clue"})              # clue reads train files of benchmarks, which have their own cards
READ = sorted(set(TASKS) & set(TEXTS) - {"couplets"})

spec = importlib.util.spec_from_file_location("counts", FOLDER / "counts.py")
counts = importlib.util.module_from_spec(spec)
spec.loader.exec_module(counts)


def rows_of(name, folder):
    counts.write_examples(TEXTS[name], folder)
    return folder


def section(name, heading):
    return TEXTS[name].split(f"\n## {heading}\n", 1)[1].split("\n## ", 1)[0]


def canonical(row):
    """Answers of the same score are drawn in any order."""
    return row | {"answers": sorted(row["answers"], key=lambda answer: (-answer["score"], answer["answer"]))}


def test_every_source_and_every_task_has_a_card():
    assert set(CORPORA) | {name.removesuffix("_cot") for name in TASKS} | CLUE | {"ceval", "mmlu", "cmmlu", "own_data"} <= set(TEXTS)


@pytest.mark.parametrize("name", TEXTS)
def test_a_card_has_a_head_the_ten_headings_and_forty_to_ninety_lines(name):
    head = DatasetCard(TEXTS[name]).data.to_dict()
    assert head["pretty_name"] and head["license"] in LICENSES and (head["license"] != "other" or head["license_name"])
    assert set(head["language"]) <= {"zh", "en"} and set(head["size_categories"]) <= set(SIZES)
    assert set(head["task_categories"]) <= KINDS
    assert all(re.fullmatch(r"original|extended\|[\w-]+", source) for source in head["source_datasets"])
    assert re.findall(r"^## (.*)$", TEXTS[name], re.M) == HEADINGS
    assert all(section(name, heading).strip() for heading in HEADINGS)
    assert 40 <= len(TEXTS[name].splitlines()) <= 90


@pytest.mark.parametrize("name", CORPORA)
def test_the_raw_rows_of_a_corpus_card_build_its_record_in_every_generation_of_its_template(name, tmp_path):
    folder, rejected = rows_of(name, tmp_path), []
    built = {generation: [record for seed in range(8) for record in rk.build([name], folder, seed, rejected, template=generation)]
             for generation in ("HEAD", "published", "v0")}
    assert not rejected
    for line in re.findall(r"^```json\n(.*?)```$", section(name, "Template"), re.S | re.M):
        assert canonical(json.loads(line)) in [canonical(json.loads(to_line(record))) for record in built["HEAD"]]
    if name == "published":
        return                                          # its rows come as they are
    for generation, records in built.items():
        prompts, prefixes = re.search(rf"^\| {generation} \| (.*) \| (.*) \|$", section(name, "Template"), re.M).groups()
        patterns = [re.sub(r"\\\{.*?\\\}", ".+", re.escape(text)) for text in re.findall("`(.+?)`", prompts)]
        assert all(any(re.fullmatch(pattern, record.prompt) for pattern in patterns) for record in records)
        assert {record.prefix for record in records} <= set(re.findall("`(.+?)`", prefixes) or [""])


@pytest.mark.parametrize("name", READ)
def test_the_raw_rows_of_a_benchmark_card_are_rows_of_its_task_and_render_as_the_card_says(name, tmp_path):
    folder = rows_of(name, tmp_path) / name
    examples = TASKS[name].load(folder, TASKS[name].split)
    assert len(examples) >= 3 and all(example["gold"] is not None for example in examples)
    shown = []
    for example in examples:
        record, choices, gold = TASKS[name].render(example, ())
        shown.append(record.prompt + record.prefix + (choices[gold] if choices else gold[0]))
    assert any(f"```text\n{text}\n```" in section(name, "Template") for text in shown)


def test_only_cards_of_benchmarks_without_a_task_say_that_there_is_none():
    without = {name for name, text in TEXTS.items() if "No task of this kit reads it yet" in text}
    assert without == set(counts.BENCHMARKS) - set(TASKS)


def test_people_s_own_rows_are_read_in_every_form_that_the_card_shows(tmp_path):
    for path in (rows_of("own_data", tmp_path) / "own").iterdir():
        rejected = []
        assert len(rk.read_records(path, rejected)) == 3 and not rejected


@pytest.mark.parametrize("name", TEXTS)
def test_the_counts_of_a_card_are_up_to_date_and_hold_no_path(name):
    assert counts.filled(name, TEXTS[name]) == TEXTS[name], "run python data_cards/counts.py"
    assert not re.search(r"/\w+/|[A-Z]:\\", section(name, "Counts"))


@pytest.mark.parametrize("name, file", [("baike", "baike_qa2019/baike_qa_sample.json"), ("ocnli", "ocnli/dev.json"),
                                        ("ceval", "ceval/val/logic_val.csv")])
def test_a_sample_that_loses_a_row_shows_in_the_counts(name, file, tmp_path):
    samples = RAW, EVAL
    home = samples[name in counts.BENCHMARKS]
    shutil.copytree(home / Path(file).parts[0], tmp_path / Path(file).parts[0])
    assert counts.filled(name, TEXTS[name], samples=(tmp_path, tmp_path)) == TEXTS[name]
    lines = (tmp_path / file).read_text("utf-8").splitlines(keepends=True)
    (tmp_path / file).write_text("".join(lines[:-1]), encoding="utf-8")
    assert counts.filled(name, TEXTS[name], samples=(tmp_path, tmp_path)) != TEXTS[name]


def test_counts_of_a_small_set_by_hand(tmp_path):
    rows = [{"title": "问" * n, "desc": "", "answer": "答" * 10 * n} for n in (1, 2, 3)]
    rows += [{"title": "问", "desc": "", "answer": "  "}] * 2
    (tmp_path / "baike_qa2019").mkdir()
    (tmp_path / "baike_qa2019/a.json").write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    text = counts.filled("baike", TEXTS["baike"], raw=tmp_path)
    line = next(line for line in text.splitlines() if line.startswith("| rows given"))
    assert line == "| rows given to the script | 1 | 3 | 3 | 0 | 2 / 3 | 20 / 30 | 2: 2 × answer …; it must not be empty |"


def test_the_script_writes_the_counts_alone_and_the_same_ones_again(tmp_path):
    cards, given = tmp_path / "cards", rows_of("weibo", tmp_path / "given")
    cards.mkdir()
    for name in ("counts.py", "weibo.md", "zhidao.md"):
        shutil.copy(FOLDER / name, cards)
    before = (cards / "weibo.md").read_text("utf-8")
    run = [sys.executable, "-B", "counts.py", "--raw", str(given)]
    assert "weibo.md" in subprocess.run(run, cwd=cards, capture_output=True, text=True, check=True).stdout
    after = (cards / "weibo.md").read_text("utf-8")
    assert "| rows given to the script | 1 | 3 | 6 | 3 |" in after and str(tmp_path) not in after
    assert after.split("<!-- counts -->")[0] == before.split("<!-- counts -->")[0]
    assert "rows given" not in (cards / "zhidao.md").read_text("utf-8")    # the folder given has none
    assert subprocess.run(run, cwd=cards, capture_output=True, text=True, check=True).stdout == ""
    assert {path.name for path in tmp_path.rglob("*") if path.is_file()} == {
        "counts.py", "weibo.md", "zhidao.md", "weibo_summary_comments_json.json"}
