"""Rows on disk: those that would be made anew, made once, whole or not at all, and anew when anything they depend on changes."""
import json
import os
import pickle
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import PROJECT

import rlhfkit as rk
from rlhfkit import cache
from rlhfkit.cache import prepared
from rlhfkit.packing import Packed

ANSWERS = tuple(rk.Answer(text, -i / 2) for i, text in enumerate(("明月照寺", "明月", "月")))
RECORDS = [rk.Record(f"上联：晚风吹桥{'吹' * (i % 7)}", ANSWERS, prefix="下联：", system="作对" * (i % 2), history=(("问", "答"),) * (i % 3),
                     source="couplets") for i in range(30)]
BUILDERS = [(rk.text_rows, {}), (rk.sft_rows, {}), (rk.sft_rows, {"packing": True}), (rk.reward_rows, {}),
            (rk.pair_rows, {"pairs_per_prompt": 2, "seed": 3}), (rk.prompt_rows, {})]


@pytest.fixture
def config(tmp_path):
    """A run on thirty good records, a line that is none and a record whose answer is too long; three are held out."""
    long = rk.Record("上联：晚风吹桥", (rk.Answer("明月照寺" * 30, 1), rk.Answer("月", 0)))
    rk.write_records([*RECORDS[:20], long, *RECORDS[20:]], tmp_path / "data" / "train.jsonl")
    rk.write_records(RECORDS[:3], tmp_path / "data" / "dev.jsonl")
    with open(tmp_path / "data" / "train.jsonl", "ab") as file:
        file.write(b"not json\n")
    (tmp_path / "out").mkdir()
    return SimpleNamespace(data_path=str(tmp_path / "data"), output_dir=str(tmp_path / "out"))


@pytest.fixture
def make(tiny_path):
    return lambda build=rk.sft_rows, **keywords: partial(build, **{
        "family": rk.family_of(tiny_path), "tokenizer": rk.load_tokenizer(tiny_path), "max_length": 64} | keywords)


def caches(config):
    return [p for p in (Path(config.data_path) / ".rows").iterdir() if p.is_dir()]


def lines(found):
    return [json.loads(line) for line in (found.folder / "aside.jsonl").read_text("utf-8").splitlines()]


@pytest.mark.parametrize("build, keywords", BUILDERS, ids=lambda value: getattr(value, "__name__", ""))
def test_rows_of_the_cache_are_those_of_the_builder(config, make, build, keywords):
    build = make(build, **keywords)
    records, dev_records, bad = rk.read_data(config.data_path)
    made, again = prepared(config, build), prepared(config, build)
    assert made.seconds > 0 == again.seconds
    for found in (made, again):
        for ours, theirs in ((found.train, records), (found.dev, dev_records)):
            expected, aside = build(theirs)
            packed = Packed(ours, 64) if isinstance(expected, Packed) else ours
            assert list(packed) == list(expected)
            assert type(ours[0]["id"]) is int and ours[-1] == ours[len(ours) - 1] and ours[1:3] == [ours[1], ours[2]]
        assert list(found.dev_records) == dev_records and len(found.dev_records) == 3
        kept = lines(found)
        assert kept[0]["reason"] == bad[0]["reason"] and kept[0]["line"] == 32
        assert kept[1:] == [row | {"split": "train"} for row in build(records)[1]]


def test_lengths_are_the_tokens_of_each_row(config, make):
    for build in (rk.sft_rows, rk.reward_rows, rk.pair_rows):
        train = prepared(config, make(build)).train
        counted = [sum(len(ids) for ids in r.get("answers") or [r[k] for k in r if k.endswith("_ids")]) for r in train]
        assert train.lengths.tolist() == counted and train.lengths.dtype == np.int64


def test_rows_can_be_sent_to_a_process_and_know_their_end(config, make):
    train = prepared(config, make()).train
    assert pickle.loads(pickle.dumps(train))[:] == train[:]
    with pytest.raises(IndexError):
        train[len(train)]


@pytest.mark.parametrize("num_proc", [1, 2])
def test_chunks_and_processes_change_nothing(config, make, monkeypatch, num_proc):
    whole = [prepared(config, make(build), 1) for build in (rk.pair_rows, rk.text_rows)]
    expected = [(found.train[:], found.dev[:], sorted(map(str, lines(found)))) for found in whole]
    for folder in caches(config):
        folder.rename(folder.with_name(f"whole-{folder.name}"))
    monkeypatch.setattr(cache, "AT_ONCE", 4)                # 8 chunks, the one with the long record among them
    monkeypatch.setattr(cache, "HERE", 1)
    for build, values in zip((rk.pair_rows, rk.text_rows), expected):
        found = prepared(config, make(build), num_proc)
        assert (found.train[:], found.dev[:], sorted(map(str, lines(found)))) == values and found.train.columns["id"].num_chunks == 8
    monkeypatch.setattr(cache, "CHARACTERS", 1)
    assert prepared(config, make(max_length=63), num_proc).train.columns["id"].num_chunks == 30


def test_a_chunk_without_a_usable_record_is_no_error_but_data_without_one_is(config, make, monkeypatch):
    monkeypatch.setattr(cache, "AT_ONCE", 1)
    assert len(prepared(config, make()).train) == 30
    with pytest.raises(ValueError, match="none of 31 records can be used; the first: .* do not fit into max_length 7"):
        prepared(config, make(max_length=7))
    (Path(config.data_path) / "train.jsonl").write_text("not json\n" * 2)
    with pytest.raises(ValueError, match="data_path .* holds no usable record; 2 rows were set aside"):
        prepared(config, make())
    assert len(caches(config)) == 1


def other_text(tokenizer, text):
    return [], tokenizer.encode_texts([text + text])[0]


def test_a_change_of_anything_that_rows_depend_on_is_seen(config, make, tiny_path, tmp_path):
    build = make()
    prepared(config, build)
    assert prepared(config, make(packing=True)).seconds == 0                    # is done on the rows
    family, tokenizer = rk.family_of(tiny_path), rk.load_tokenizer(tiny_path)
    tokenizer.save_pretrained(tmp_path / "same")
    assert prepared(config, make(tokenizer=rk.load_tokenizer(tmp_path / "same", family))).seconds == 0      # wherever it is from
    file = tmp_path / "same" / "tokenizer_config.json"
    file.write_text(file.read_text().replace('"<sep>"', '"<pad>"'))
    others = [make(max_length=63), make(tokenizer=rk.load_tokenizer(tmp_path / "same", family)), make(rk.prompt_rows),
              make(rk.pair_rows, seed=1), make(family=replace(family, name="mine")),
              make(family=replace(family, encode_text=other_text))]
    exec("def mine(tokenizer, text):\n    return [], [9]", notebook := {"__name__": "__main__"})
    exec("def mine(tokenizer, text):\n    return [], [8]", edited := {"__name__": "__main__"})
    others += [make(family=replace(family, blank=scope["mine"])) for scope in (notebook, edited)]
    for other in others:
        assert prepared(config, other).seconds > 0 == prepared(config, other).seconds
    assert len(caches(config)) == 1 + len(others)
    assert prepared(config, build).seconds == 0


def test_a_byte_of_the_data_and_a_row_moved_between_its_files_are_seen(config, make):
    train, dev = (Path(config.data_path) / f"{name}.jsonl" for name in ("train", "dev"))
    prepared(config, make())
    train.write_bytes(train.read_bytes().replace("晚风".encode(), "春风".encode(), 1))
    found = prepared(config, make())
    assert found.seconds > 0 and "春风" in rk.show(found.train[0], make().keywords["tokenizer"])
    first, rest = dev.read_bytes().split(b"\n", 1)
    train.write_bytes(train.read_bytes() + first + b"\n")       # the bytes of the two, one behind the other, are the same
    dev.write_bytes(rest)
    found = prepared(config, make())
    assert found.seconds > 0 and (len(found.train), len(found.dev)) == (31, 2)


def test_a_source_file_of_the_library_is_part_of_the_key(config, make, monkeypatch):
    prepared(config, make())
    monkeypatch.setattr(cache, "SOURCES", (*cache.SOURCES, "plots.py"))
    assert prepared(config, make()).seconds > 0


@pytest.mark.parametrize("name, damage", [("train.arrow", 0.5), ("train.arrow", 0.99), ("dev.arrow", 0), ("facts.json", 0.5)])
def test_damaged_rows_are_made_anew(config, make, name, damage):
    found = prepared(config, make())
    expected, file = found.train[:], found.folder / name
    os.truncate(file, int(damage * file.stat().st_size))
    again = prepared(config, make())
    assert again.seconds > 0 and again.train[:] == expected and prepared(config, make()).seconds == 0


def test_rows_are_kept_in_the_run_s_folder_where_the_data_s_cannot_be_written(config, make):
    """A file stands where the folder would: that holds for root too, whom no permission stops."""
    (Path(config.data_path) / ".rows").write_text("")
    found = prepared(config, make())
    assert found.folder.parent == Path(config.output_dir) / ".rows" and prepared(config, make()).seconds == 0


def test_processes_at_once_make_the_rows_once_and_share_them(config, make, monkeypatch):
    calls, real = [], cache._make
    monkeypatch.setattr(cache, "_make", lambda *args: (calls.append(1), time.sleep(0.5), real(*args)))
    builds = [make() for _ in range(3)]
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda build: prepared(config, build), builds))
    assert len(calls) == 1 and found[0].train[:] == found[1].train[:] == found[2].train[:]
    assert len(caches(config)) == 1


SLOWLY = """
import os, sys, time
from functools import partial
from pathlib import Path
import rlhfkit as rk
from rlhfkit import cache
data_path, model_path, told, seconds = sys.argv[1:]
real, cache.AT_ONCE = cache._tokenised, 4
def tokenised(*arguments):                                                      # says which process tokenises which chunk
    Path(told, f"{time.time_ns()}-{os.getpid()}").touch()
    time.sleep(float(seconds))
    return real(*arguments)
cache._tokenised = tokenised
family, tokenizer = rk.family_of(model_path), rk.load_tokenizer(model_path)
cache.prepared(rk.SFT(model_path=model_path, data_path=data_path, output_dir=told),
               partial(rk.sft_rows, family=family, tokenizer=tokenizer, max_length=64), 1)
"""


def test_two_processes_leave_one_whole_cache_and_a_killed_one_leaves_none(config, make, tiny_path, tmp_path):
    """Rows in chunks of four records, in processes of their own that tell of each chunk by a file."""
    told = tmp_path / "told"
    told.mkdir()
    killed, *others = [[sys.executable, "-c", SLOWLY, config.data_path, tiny_path, told, seconds] for seconds in ("60", "0.02", "0.02")]
    killed = subprocess.Popen(killed, cwd=PROJECT)
    while not list(told.iterdir()):
        assert killed.poll() is None
        time.sleep(0.05)
    killed.kill()
    killed.wait()
    [left] = caches(config)
    assert left.name.startswith(".")                                            # never taken for a cache
    for file in told.iterdir():
        file.unlink()
    others = [subprocess.Popen(command, cwd=PROJECT) for command in others]
    assert [process.wait() for process in others] == [0, 0]
    chunks = [file.name.rpartition("-")[2] for file in told.iterdir() if not file.is_dir()]
    assert len(chunks) == 9 and len(set(chunks)) == 1                           # 8 of train, one held out; the other one waited
    [folder] = caches(config)
    assert not folder.name.startswith(".")


def test_an_error_leaves_nothing_behind(config, make, monkeypatch):
    monkeypatch.setattr(cache, "_tokenised", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        prepared(config, make())
    assert not caches(config)
