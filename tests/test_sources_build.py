"""build(): what it names, refuses and repeats; and the sources on the real corpora where they are."""
import logging
import os
import subprocess
import sys
from collections import Counter

import pytest

from rlhfkit.records import Record, split
from rlhfkit.sources import SOURCES, build


def put(folder, path, content):
    file = folder / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content if isinstance(content, bytes) else content.encode())


def test_build_names_what_is_absent_and_what_nobody_understands(tmp_path, caplog):
    put(tmp_path, "couplets.txt", "春风\t秋雨\n春\t秋雨\n")
    put(tmp_path, "odd.parquet", ""), put(tmp_path, "zhidao/a.xls", "")
    rejected = []
    with caplog.at_level(logging.INFO, "rlhfkit"):
        assert [r.source for r in build(raw_dir=tmp_path, rejected=rejected)] == ["couplets"]
    assert len(rejected) == 1 and "no poetry in" in caplog.text and "no zhidao in" in caplog.text
    assert "odd.parquet, zhidao/a.xls" in caplog.text
    assert "couplets 1; rows set aside: 1, the first" in caplog.messages[-1]


def test_build_errors_name_value_rule_and_way_out(tmp_path):
    with pytest.raises(FileNotFoundError, match="it must be a folder"):
        build(raw_dir=tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="holds no corpus.*weibo_summary.*couplets.txt.*zhidao.*baike_qa2019"):
        build(raw_dir=tmp_path)
    with pytest.raises(ValueError, match="'copulets'.*did you mean 'couplets'"):
        build(["copulets"])
    with pytest.raises(ValueError, match="sources is empty"):
        build([])
    put(tmp_path, "couplets.txt", "春风\t秋\n")
    with pytest.raises(FileNotFoundError, match="zhidao/.*looks like couplets \\(couplets.txt\\)"):
        build(["zhidao"], tmp_path)
    put(tmp_path, "zhidao/a.csv", "title,question,reply,is_best\n甲,,乙,1\n")
    with pytest.raises(FileNotFoundError, match="looks like a part of zhidao; give the folder above it"):
        build(["zhidao"], tmp_path / "zhidao")
    rejected = [{"reason": "of an earlier call"}]
    with pytest.raises(ValueError, match="no usable row, 1 set aside; the first: the sides have 2 and 1"):
        build("couplets", tmp_path, rejected=rejected)
    assert len(rejected) == 2                                       # what was set aside is not lost with the error


def test_a_source_does_not_change_with_its_company_and_the_seed_changes_it():
    def key(records, source):
        return sorted(map(repr, (r for r in records if r.source == source)))
    both = build(["zhidao", "classical"])
    alone = key(build("classical"), "classical")
    assert key(both, "classical") == alone != key(build("classical", seed=1), "classical")
    assert both == build(["zhidao", "classical"])
    assert {r.source for r in both[:50]} == {"zhidao", "classical"}             # shuffled together


def test_records_are_the_same_in_a_process_with_another_hash_seed():
    code = ("import hashlib; from rlhfkit.sources import build\n"
            "records = build(['weibo', 'zhidao', 'classical', 'poetry', 'baike'])\n"
            "print(hashlib.sha256(repr(records).encode()).hexdigest())")
    runs = {subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONHASHSEED": seed}, check=True,
                           capture_output=True, text=True).stdout for seed in ("1", "2")}
    assert len(runs) == 1


def test_a_corpus_of_one_s_own_is_one_entry_in_sources(tmp_path, monkeypatch):
    monkeypatch.setitem(SOURCES, "mine", lambda folder, rejected, **_: iter([Record("我的问题", source="mine")]))
    assert build("mine", tmp_path) == [Record("我的问题", source="mine")]


# the real corpora

@pytest.fixture(scope="module")
def real(shared):
    rejected = []
    names = ["couplets", "zhidao", "classical", "poetry", "baike"]
    return build(names, shared / "data/raw", rejected=rejected), rejected


def test_the_real_corpora_give_as_many_records_as_they_hold(real):
    records, rejected = real
    assert Counter(r.source for r in records) == {"couplets": 2682, "zhidao": 2208, "classical": 7000, "poetry": 8246,
                                                  "baike": 1}
    assert Counter(os.path.basename(row["file"]) for row in rejected) == {
        "yuanqu.json": 21, "nonghangzhidao_filter.csv": 8, "纳兰性德诗集.json": 1}


def test_no_answer_of_a_real_record_is_there_twice(real):
    for record in real[0]:
        if record.source in ("couplets", "classical", "poetry"):
            texts = [answer.text for answer in record.answers]
            assert len(set(texts)) == len(texts) and texts[0] and record.answers[0].score == 1 > record.answers[1].score


def test_real_couplets_and_classical_rows_have_all_their_negatives(real):
    assert {len(r.answers) for r in real[0] if r.source == "classical"} == {5}
    couplets = Counter(len(r.answers) for r in real[0] if r.source == "couplets")
    assert couplets[5] > 0.98 * couplets.total()


def test_real_train_and_dev_share_no_prompt(real):
    train, dev = split(real[0], 0.05, 0)
    assert dev and not {r.prompt for r in train} & {r.prompt for r in dev} and len(train) + len(dev) == len(real[0])


def test_real_oddities(real):
    by_source = {name: [r for r in real[0] if r.source == name] for name in SOURCES}
    best = Counter(sum(answer.score for answer in r.answers) for r in by_source["zhidao"])
    assert best[0] > 400 and best[2] == 14                          # titles without a best reply, titles with two
    prompts = {r.prompt for r in by_source["poetry"]}
    assert {"以曾子的风格，写一篇经书，题为大学", "以孔伋的风格，写一篇经书，题为中庸"} <= prompts      # objects, not lists
    assert "以太宗皇帝的风格，写一首五言诗，题为帝京篇十首 一" in prompts                 # was traditional
    assert any("温庭筠" in prompt for prompt in prompts)                                  # huajianji
    assert sum("写一首曲" in r.prompt for r in by_source["poetry"]) == 1379               # one list, a line each
    assert len({r.prompt for r in by_source["couplets"]}) == 2667                       # of 2682: repeats stay


def test_both_copies_of_the_real_couplets_are_the_same(shared, tmp_path):
    in_and_out = tmp_path / "copy" / "couplets"
    for name in ("in.txt", "out.txt"):
        put(in_and_out, name, (shared / "data/raw/couplets/test" / name).read_bytes())
    folders = tmp_path / "copy", shared / "data/raw"
    copies = [list(SOURCES["couplets"](folder, [])) for folder in folders]
    assert copies[0] == copies[1]
