"""Files that people bring: each form of a row in each kind of file, damaged files, real rows, and memory."""
import csv
import gzip
import io
import json
import lzma
import os
import random
import shutil
import tempfile
import tracemalloc
from collections import Counter
from pathlib import Path

import pytest
from test_forms import FORMS

from rlhfkit.formats import read_records, stream_records
from rlhfkit.records import Answer, Record


def lines(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def table(rows, delimiter=","):
    """CSV, with lists and dicts as JSON in their cells."""
    file = io.StringIO()
    writer = csv.writer(file, delimiter=delimiter)
    writer.writerow(rows[0])
    for row in rows:
        writer.writerow([json.dumps(v, ensure_ascii=False) if isinstance(v, (list, dict)) else v for v in row.values()])
    return file.getvalue().encode()


def parquet(rows):
    from pyarrow import BufferOutputStream, Table
    from pyarrow import parquet as pq
    file = BufferOutputStream()
    pq.write_table(Table.from_pylist(rows), file)
    return file.getvalue().to_pybytes()


def listed(rows, **how):
    return json.dumps(rows, ensure_ascii=False, **how).encode()


BOM = b"\xef\xbb\xbf"
FILES = {
    "rows.jsonl": lines, "rows.jsonl.gz": lambda rows: gzip.compress(lines(rows)), "rows": lines,
    "rows.json": lambda rows: listed(rows, indent=2), "rows.json.xz": lambda rows: lzma.compress(listed(rows)),
    "compact.json": listed, "lines.json": lines, "one.json": lambda rows: listed(rows[0], indent=1),
    "windows.json": lambda rows: BOM + listed(rows, indent=2).replace(b"\n", b"\r\n"),
    "rows.csv": table, "rows.csv.gz": lambda rows: gzip.compress(table(rows)), "bom.csv": lambda rows: BOM + table(rows),
    "rows.tsv": lambda rows: table(rows, "\t"),
    "rows.parquet": parquet, "rows.parquet.xz": lambda rows: lzma.compress(parquet(rows)),
}


def written(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("form", FORMS)
def test_each_form_is_read_from_each_kind_of_file(tmp_path, form, name):
    row, record = FORMS[form]
    path = written(tmp_path, name, FILES[name]([row, row]))
    rejected = []
    assert read_records(path, rejected) == [record] * (1 if name == "one.json" else 2) and not rejected


def test_a_folder_that_datasets_saved_is_read(tmp_path):
    datasets = pytest.importorskip("datasets")
    row, record = FORMS["preference after a conversation"]
    saved = datasets.Dataset.from_list([row, row])
    saved.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(test=saved).save_to_disk(tmp_path / "splits")
    assert read_records(tmp_path / "one") == [record] * 2 == read_records(f"{tmp_path}/splits:test")
    with pytest.raises(ValueError, match="split is 'train'; it must be one of test"):
        read_records(tmp_path / "splits")


def test_forms_may_be_mixed_in_a_file_and_absent_cells_are_no_values(tmp_path):
    nan = float("nan")
    rows = [{"prompt": "问", "answer": "答", "size": None, "text": None},
            {"prompt": None, "answer": None, "size": nan, "text": "文"}]
    for name in "rows.jsonl", "rows.json", "rows.parquet":
        records = read_records(written(tmp_path, name, FILES[name](rows)))
        assert records == [Record("问", (Answer("答", 1),)), Record("文")]


def test_lines_of_plain_text_are_prompts_and_blank_ones_nothing(tmp_path):
    text = "\ufeff第一行\r\n\r\n  第二行 \n".encode()
    for name, content in ("a.txt", text), ("a.txt.xz", lzma.compress(text)), ("a.txt.gz", gzip.compress(text)):
        assert read_records(written(tmp_path, name, content)) == [Record("第一行"), Record("  第二行 ")]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.parquet"])
def test_a_row_that_is_no_record_is_set_aside_whole_with_its_place(tmp_path, name):
    rows, rejected = [{"text": "文", "size": 1}, {"text": " ", "size": 2}, {"text": "字", "size": 3}], []
    path = written(tmp_path, name, FILES[name](rows))
    assert read_records(path, rejected) == [Record("文"), Record("字")]
    (bad,) = rejected
    assert bad["file"] == str(path) and json.loads(bad["text"]) == rows[1]
    assert bad["reason"] == "prompt is ' '; it must not be empty" and bad["line"] == (6 if name == "rows.json" else 2)


def test_bad_rows_are_a_warning_and_a_file_without_rows_is_an_error(tmp_path):
    with pytest.warns(UserWarning, match=r"1 of 2 rows set aside; the first, line 3: answer is ''"):
        read_records(written(tmp_path, "rows.csv", "question,answer\n问,答\n问,\n"))
    with pytest.raises(ValueError, match="is empty"):
        read_records(written(tmp_path, "rows.json", "[]"))


# --- damaged files ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["rows.jsonl.gz", "rows.jsonl.xz", "rows.json.gz", "rows.json.xz", "rows.csv.gz", "rows.txt.xz"])
@pytest.mark.parametrize("harm", ["cut", "foreign"])
def test_a_half_downloaded_archive_gives_the_rows_before_the_break(tmp_path, name, harm):
    texts = [f"{i} {random.Random(i).randbytes(40).hex()}" for i in range(3000)]
    rows = [{"text": text} for text in texts]
    plain = {"jsonl": lines(rows), "json": listed(rows, indent=0), "csv": table(rows), "txt": "\n".join(texts).encode()}
    content = {"gz": gzip, "xz": lzma}[name[-2:]].compress(plain[name.split(".")[1]])
    content = content[:len(content) // 2] if harm == "cut" else b"<html>not found</html>" * 9
    rejected = []
    records = read_records(written(tmp_path, name, content), rejected)
    assert records == list(map(Record, texts[:len(records)]))
    assert 1000 < len(records) < 1600 if harm == "cut" else not records
    assert len(rejected) == 1 and "the archive ends early or is damaged" in rejected[0]["reason"]
    step = 3 if ".json." in name else 1                 # lines a row
    assert step * len(records) <= rejected[0]["line"] <= step * len(records) + 2


def test_a_cut_parquet_file_is_named(tmp_path):
    with pytest.raises(ValueError, match="not a whole Parquet file .*: fetch it again"):
        read_records(written(tmp_path, "rows.parquet", parquet([{"text": "文"}])[:-9]))


@pytest.mark.parametrize("content, count, place", [
    ('{"text": "甲"}\n{"text": "乙"}\n{"text": "丙', 2, 3), ('[{"text": "甲"},\n {"text": "乙"},\n {"text": "丙', 2, 3),
    ('[{"text": "甲"},\n\n{"text": "乙"},\n{"tex', 2, 4), ('[{"text": "甲"}, {"text": "乙"}', 2, 1), ('[{"text": "甲"},', 1, 1)])
def test_half_a_row_at_the_end_is_set_aside_with_its_place(tmp_path, content, count, place):
    rejected = []
    assert len(read_records(written(tmp_path, "rows.json", content), rejected)) == count
    assert [row["line"] for row in rejected] == [place]


@pytest.mark.parametrize("how", [dict(indent=2), dict(), dict(indent=None, separators=(",", ":")), "lines"])
@pytest.mark.parametrize("harm", ['乙"', '"乙', '"乙\n"', '"\\x"', '[{"a": 1}, {"b": 2]'])
def test_a_broken_object_costs_only_itself(tmp_path, how, harm):
    rows = [{"text": text} for text in "甲乙丙丁"]
    content = (lines(rows) if how == "lines" else listed(rows, **how)).decode().replace('"乙"', harm)
    rejected = []
    assert [r.prompt for r in read_records(written(tmp_path, "rows.json", content), rejected)] == ["甲", "丙", "丁"]
    (bad,) = rejected
    assert "not JSON" in bad["reason"] and bad["line"] == content[:content.index(bad["text"])].count("\n") + 1
    assert bad["text"].startswith("{") and bad["text"].count("text") == 1


def test_what_is_no_object_in_a_list_is_set_aside(tmp_path):
    rejected = []
    content = '[1, "二", [{"text": "里"}], null,\n{"text": "文"}]'
    assert read_records(written(tmp_path, "rows.json", content), rejected) == [Record("文")]
    reasons = [f"JSON, but a {kind}; it must be an object with fields" for kind in ("int", "str", "list", "NoneType")]
    assert [row["reason"] for row in rejected] == reasons


def test_a_row_far_longer_than_a_block_is_read_and_one_over_the_limit_is_set_aside(tmp_path):
    long, too_long = {"text": "长" * 1_000_000}, {"text": "a" * 5_000_000}
    rows = [{"text": "甲"}, long, too_long, {"text": "乙"}]
    for name in "rows.json", "compact.json", "rows.csv", "rows.jsonl":
        rejected = []
        got = read_records(written(tmp_path, name, FILES[name](rows)), rejected)
        assert [len(r.prompt) for r in got] == [1, 1_000_000, 1] and len(rejected) == 1, name


@pytest.mark.parametrize("line", ['"问,答', '问,"答', '问,"答"了', '问,答,多', '问', '"问,答\n"问,答', '问,"答""'])
def test_an_unbalanced_quote_in_csv_costs_only_its_lines(tmp_path, line):
    rejected = []
    content = f'question,answer\n一,"1\n1"\n{line}\n二,2\n"三","3"\n四,4\n'
    got = read_records(written(tmp_path, "rows.csv", content), rejected)
    assert [(r.prompt, r.answers[0].text) for r in got] == [("一", "1\n1"), ("二", "2"), ("三", "3"), ("四", "4")]
    assert [(row["line"], row["text"]) for row in rejected] == list(enumerate(line.split("\n"), 4))


def test_an_unbalanced_quote_at_the_end_and_bytes_that_are_no_utf_8_cost_only_their_rows(tmp_path):
    rejected = []
    content = "question,answer\n一,1\n".encode() + "错,了\n".encode("gbk") + "二,2\n三,\"3\n四,4\n".encode()
    assert [r.prompt for r in read_records(written(tmp_path, "rows.csv", content), rejected)] == ["一", "二", "四"]
    assert [row["line"] for row in rejected] == [3, 5]
    json.dumps(rejected, ensure_ascii=False).encode()


# --- what is not there -----------------------------------------------------------------------------------------------------

def test_what_is_no_file_is_an_error_with_the_way_out(tmp_path):
    (tmp_path / "raw").mkdir()
    with pytest.raises(FileNotFoundError, match="no data set was saved to.*rk.build.*rk.read_data"):
        read_records(tmp_path / "raw")
    with pytest.raises(FileNotFoundError, match=r"is no file; it must be one of .jsonl, .json, .csv"):
        next(stream_records("nobody/rows.jsonl", []))


def test_a_name_of_the_hub_that_cannot_be_had_is_an_error_with_the_way_out():
    pytest.importorskip("datasets")
    with pytest.raises(FileNotFoundError, match=r"nobody/nothing:test is no file here, and the hub gave .*save_to_disk"):
        read_records("nobody/nothing:test")


def test_a_file_that_may_not_be_read_is_an_error_with_the_way_out():
    folder = Path(tempfile.mkdtemp())                   # not tmp_path: others may not enter that at all
    try:
        folder.chmod(0o755)
        path = written(folder, "rows.csv", "text\n文\n")
        path.chmod(0)
        if os.geteuid() == 0:
            os.seteuid(65534)
        with pytest.raises(PermissionError, match="chmod"):
            read_records(path)
    finally:
        os.seteuid(os.getuid())
        shutil.rmtree(folder)


# --- memory, and real rows -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["rows.json", "broken.json", "rows.csv", "rows.jsonl"])
def test_memory_does_not_grow_with_the_file(tmp_path, name):
    row, count = json.dumps({"text": "文" * 3000}, ensure_ascii=False), 5600
    if name.endswith("csv"):
        parts = "text\n", '"' + "文" * 3000 + '"', "\n", "\n"
    else:
        parts = ("", row, "\n", "") if name.endswith("jsonl") else ("[", row, ", ", "]")
    first, row, between, last = (part.encode() for part in parts)
    path = tmp_path / name
    with open(path, "wb") as file:
        file.write(first + (b'{"other": "' if name == "broken.json" else b""))
        for i in range(count):
            file.write((between if i else b"") + row)
        file.write(last)
    assert path.stat().st_size > 50_000_000
    tracemalloc.start()
    rejected = []
    read = sum(1 for _ in stream_records(path, rejected))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (read, len(rejected)) == ((count, 0) if name != "broken.json" else (0, 1)) and peak < 5_000_000, (read, peak)


def test_the_real_instruction_rows_are_read(shared):
    records = read_records(shared / "data/sft/alpaca_zh_demo/alpaca_zh_demo.json")
    assert len(records) == 1000 and all(len(r.answers) == 1 and not r.history for r in records)


def test_the_real_chinese_preference_rows_are_read(shared):
    records = read_records(shared / "data/pref/dpo_zh_demo/dpo_zh_demo.json")
    assert len(records) == 300 and sum(bool(r.system) for r in records) == 64
    assert all([a.score for a in r.answers] == [1, 0] for r in records)


def test_the_real_transcripts_are_read_and_those_out_of_turn_set_aside(shared):
    rejected = []
    records = read_records(shared / "data/pref/hh-rlhf/harmless-base/test.jsonl.gz", rejected)
    assert (len(records), len(rejected)) == (2299, 13) and sum(bool(r.history) for r in records) > 1000
    reasons = Counter(row["reason"].partition(";")[0].lstrip("turn 0123456789") for row in rejected)
    assert reasons == {"chosen and rejected part before their last turn": 5, "answer is ''": 4, "is the assistant's": 4}


def test_real_benchmark_lists_and_raw_corpora_are_not_taken_for_rows(shared):
    for name in "eval/c3/dev.json", "raw/zhidao/nonghangzhidao_filter.csv", "raw/baike_qa2019/baike_qa_readme_example.json":
        with pytest.raises(ValueError, match="rows set aside"):
            read_records(shared / "data" / name)
