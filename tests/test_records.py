"""Record: validation, the file format, bad rows, the split by prompt, pairs."""
import json
import os
import random
import subprocess
import sys

import pytest

from rlhfkit.formats import read_records
from rlhfkit.records import Answer, Record, pairs, split, write_records

FULL = Record("你好", (Answer("好", 1), Answer("坏", -0.5)), prefix="答：", system="你是助手",
              history=(("早", "早上好"),), source="zhidao")
GOOD = '{"prompt": "问", "answers": [{"answer": "答", "score": 1}], "prefix": ""}'


def rows_of(tmp_path, *lines):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"".join((line if isinstance(line, bytes) else line.encode()) + b"\n" for line in lines))
    return path


def test_answers_come_best_first_and_equal_scores_keep_their_order():
    record = Record("问", [Answer("丙", 0), Answer("甲", 2), Answer("丁", 0), Answer("乙", 1)])
    assert [answer.text for answer in record.answers] == ["甲", "乙", "丙", "丁"]


def test_records_are_hashable_and_lists_become_tuples():
    record = Record("问", [Answer("答", 1)], history=[["早", "好"]])
    assert record == Record("问", (Answer("答", 1),), history=(("早", "好"),))
    assert len({record, record}) == 1


@pytest.mark.parametrize("make, message", [
    (lambda: Record(""), "prompt is ''"), (lambda: Record(" \n"), "must not be empty"),
    (lambda: Record(7), "prompt is 7; it must be a text"), (lambda: Record("问", "答"), "answers is '答'"),
    (lambda: Record("问", ["答"]), "must be an Answer"), (lambda: Record("问", prefix=None), "prefix is None"),
    (lambda: Record("问", history=[("早",)]), r"\(user, assistant\)"), (lambda: Record("问\ud800"), "half a character"),
    (lambda: Answer("", 1), "answer is ''"), (lambda: Answer("答", True), "score is True"),
    (lambda: Answer("答", "1"), "score is '1'; it must be a finite number"),
    (lambda: Answer("答", float("nan")), "score is nan"), (lambda: Answer("答", 10 ** 400), "finite")])
def test_a_wrong_value_is_named_with_its_rule(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_what_is_written_is_read_back(tmp_path):
    records = [FULL, Record("只有问题"), Record("\u2028换行\n与\t制表", (Answer("“引号”\\", 3),))]
    write_records(records, tmp_path / "new" / "rows.jsonl")
    assert read_records(tmp_path / "new" / "rows.jsonl") == records


def test_the_file_has_the_published_keys_and_leaves_out_what_is_not_set(tmp_path):
    write_records([FULL, Record("问", (Answer("答", 1),))], tmp_path / "rows.jsonl")
    first, second = (json.loads(line) for line in (tmp_path / "rows.jsonl").read_text("utf-8").splitlines())
    assert first == {"prompt": "你好", "answers": [{"answer": "好", "score": 1}, {"answer": "坏", "score": -0.5}],
                     "prefix": "答：", "system": "你是助手", "history": [["早", "早上好"]], "source": "zhidao"}
    assert second == {"prompt": "问", "answers": [{"answer": "答", "score": 1}], "prefix": ""}


def test_a_row_of_the_corpus_published_in_2023_is_read(tmp_path):
    row = '{"prompt": "问题:几点了", "answers": [{"answer": "三点", "score": 1}], "prefix": "回答:", "data_type": "human"}'
    assert read_records(rows_of(tmp_path, row)) == [Record("问题:几点了", (Answer("三点", 1),), "回答:")]


@pytest.mark.parametrize("bad, reason", [
    (b'{"prompt": "\xff"}', "not UTF-8 at byte 13"), ('{"prompt": ', "not JSON"), ("[1]", "a list"),
    ("null", "NoneType"),
    ('{"answers": []}', "no field 'prompt'"), ('{"prompt": "问"}', "no field 'answers'"),
    ('{"prompt": ["问"], "answers": []}', "prompt is"), ('{"prompt": "", "answers": []}', "must not be empty"),
    ('{"prompt": "问", "answers": "答"}', "answers is '答'"), ('{"prompt": "问", "answers": ["答"]}', "fields 'answer'"),
    ('{"prompt": "问", "answers": [{"answer": "答"}]}', "'score'"),
    ('{"prompt": "问", "answers": [{"answer": "答", "score": true}]}', "score is True"),
    ('{"prompt": "问", "answers": [{"answer": "答", "score": "1"}]}', "score is '1'"),
    ('{"prompt": "问", "answers": [{"answer": "答", "score": NaN}]}', "score is nan"),
    ('{"prompt": "问", "answers": [{"answer": 5, "score": 1}]}', "answer is 5"),
    ('{"prompt": "\\ud800", "answers": []}', "half a character"), ("[" * 100_000, "not JSON")])
def test_a_bad_row_is_set_aside_with_file_line_and_reason_and_the_others_are_read(tmp_path, bad, reason):
    rejected = []
    path = rows_of(tmp_path, GOOD, "", bad, GOOD)
    assert len(read_records(path, rejected)) == 2
    (row,) = rejected
    assert (row["file"], row["line"]) == (str(path), 3) and reason in row["reason"] and row["text"]
    row["text"].encode()


def test_without_a_list_bad_rows_are_one_warning_with_count_and_first_reason(tmp_path):
    with pytest.warns(UserWarning, match=r"2 of 3 rows set aside; the first, line 1: not JSON") as warned:
        read_records(rows_of(tmp_path, "{", GOOD, "[]"))
    assert len(warned) == 1


def test_missing_empty_and_wholly_bad_files_are_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match="write_records"):
        read_records(tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match="is empty"):
        read_records(rows_of(tmp_path, "", ""))
    with pytest.raises(ValueError, match="1 of 1 rows set aside"):
        read_records(rows_of(tmp_path, "{"))


def test_a_byte_order_mark_and_windows_line_ends_are_no_fault(tmp_path):
    assert read_records(rows_of(tmp_path, b"\xef\xbb\xbf" + GOOD.encode() + b"\r", GOOD)) == read_records(
        rows_of(tmp_path, GOOD, GOOD))


@pytest.mark.parametrize("failing", ["records", "disk"])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, failing):
    path = tmp_path / "rows.jsonl"
    write_records([FULL], path)
    if failing == "disk":
        def full_disk(number):
            raise OSError(28, "No space left on device")
        monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises((OSError, AttributeError)):
        write_records([Record("新"), "no record"] if failing == "records" else [Record("新")], path)
    assert read_records(path) == [FULL] and os.listdir(tmp_path) == ["rows.jsonl"]


def test_split_takes_the_exact_share_of_distinct_prompts_whatever_the_order():
    records = [Record(f"问{i % 40}", source=str(i)) for i in range(100)]
    train, dev = split(records, 0.1, seed=3)
    assert len({r.prompt for r in dev}) == 4 and not {r.prompt for r in dev} & {r.prompt for r in train}
    assert sorted(r.source for r in train + dev) == sorted(r.source for r in records)
    shuffled = random.Random(1).sample(records, len(records))
    assert {r.prompt for r in split(shuffled, 0.1, seed=3)[1]} == {r.prompt for r in dev}
    assert {r.prompt for r in split(records, 0.1, seed=4)[1]} != {r.prompt for r in dev}


def test_split_leaves_no_side_empty_from_two_prompts_on():
    two = [Record("甲"), Record("乙")]
    assert [len(side) for side in split(two, 0.001, 0)] == [1, 1] == [len(side) for side in split(two, 0.999, 0)]
    assert split(two[:1], 0.5, 0) == (two[:1], []) and split([], 0.5, 0) == ([], [])


@pytest.mark.parametrize("share", [0, 1, -0.1, 2, float("nan"), "0.1", True])
def test_split_refuses_a_share_outside_of_zero_and_one(share):
    with pytest.raises(ValueError, match="dev_fraction is .* between 0 and 1"):
        split([FULL], share, 0)


def test_dev_rows_of_2023_were_the_first_rows_of_train_and_ours_never_are():
    records = [Record(f"问{i}") for i in range(50)]
    train, dev = split(records, 0.2, 0)
    assert len(dev) == 10 and not set(dev) & set(train) and dev != records[:10]


def test_split_is_the_same_in_a_process_with_another_hash_seed():
    code = ("from rlhfkit.records import Record, split\n"
            "print([r.prompt for r in split([Record(f'问{i}') for i in range(30)], 0.2, 5)[1]])")
    runs = [subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONHASHSEED": seed}, check=True,
                           capture_output=True, text=True).stdout for seed in ("1", "2")]
    assert runs[0] == runs[1] and runs[0].count("问") == 6


def test_pairs_of_scores_3_2_2_1_are_the_five_strictly_ordered_ones():
    """The 2023 kit took neighbours only: it had (a, d) and (b, d) never, and from unsorted rows the worse as chosen."""
    record = Record("问", [Answer("d", 1), Answer("b", 2), Answer("c", 2), Answer("a", 3)])
    assert ["".join(answer.text for answer in pair) for pair in pairs(record)] == ["ab", "ac", "ad", "bd", "cd"]


def test_pairs_leave_out_ties_and_equal_texts():
    assert pairs(Record("问", [Answer("甲", 1), Answer("甲", 0)])) == []
    assert pairs(Record("问", [Answer("甲", 1), Answer("乙", 1)])) == pairs(Record("问")) == []


def test_the_rule_of_neighbours_is_that_of_the_2023_kit_on_sorted_answers():
    def found(*scores, **options):
        answers = [Answer(text, score) for text, score in zip("abcd", scores)]
        return ["".join(answer.text for answer in pair) for pair in pairs(Record("问", answers), "neighbours", **options)]
    assert found(3, 2, 2, 1) == ["ab", "ac", "cd"] and found(2, 2, 1) == ["bc"] and found(1, 1) == found(1) == []


def test_a_limit_draws_pairs_without_bias_and_the_same_for_the_same_record():
    counts = dict.fromkeys(["ab", "ac", "bc"], 0)
    for i in range(600):
        record = Record(f"问{i}", [Answer(text, score) for text, score in zip("abc", (3, 2, 1))])
        assert pairs(record, limit=1) == pairs(record, limit=1) and len(pairs(record, limit=5)) == 3
        counts["".join(answer.text for answer in pairs(record, limit=1)[0])] += 1
    assert all(150 < count < 250 for count in counts.values())              # 200 expected, 11.5 the standard deviation
    with pytest.raises(ValueError, match="rule is 'best'; it must be 'all' or 'neighbours'"):
        pairs(record, "best")
