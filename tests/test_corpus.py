"""build_corpus(): the same files whatever the way, no leak, nothing lost, bounded memory; and one row of each kind of mess."""
import json
import os
import random
import shutil
import subprocess
import sys
from collections import Counter

import pytest
import synthetic
from conftest import PROJECT

import rlhfkit as rk
from rlhfkit.duplicates import prompt_groups

KINDS = list(synthetic.FILES)


def lines(path):
    return path.read_text("utf-8").splitlines()


def put(folder, path, content):
    file = folder / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return file


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The shipped samples on disk, by one process."""
    folder = tmp_path_factory.mktemp("built")
    return folder, rk.build_corpus(folder, dev_fraction=0.05)


def test_every_record_of_build_is_in_train_or_dev_and_the_counts_are_true(built):
    folder, counts = built
    train, dev, bad = rk.read_data(folder)
    records = rk.build()
    assert Counter(train + dev) == Counter(records) and not bad
    assert (counts["train"], counts["dev"]) == (len(train), len(dev))
    of = {source: [r for r in records if r.source == source] for source in counts["sources"]}
    assert counts["sources"] == {source: {
        "records": len(some), "answers": sum(len(r.answers) for r in some), "pairs": sum(len(rk.pairs(r)) for r in some),
        "neighbour_pairs": sum(len(rk.pairs(r, "neighbours")) for r in some)} for source, some in of.items()}
    assert json.loads((folder / "summary.json").read_text("utf-8")) == counts
    assert sorted(path.name for path in folder.iterdir()) == ["dev.jsonl", "rejected.jsonl", "summary.json", "train.jsonl"]


def test_the_order_is_that_of_build_and_the_split_that_of_split(built):
    train, dev, _ = rk.read_data(built[0])
    assert (train, dev) == rk.split(rk.build(), 0.05, 0)


def test_near_duplicates_of_a_prompt_are_on_one_side(built):
    train, dev, _ = rk.read_data(built[0])
    prompts = sorted({r.prompt for r in train}) + sorted({r.prompt for r in dev})
    border = len({r.prompt for r in train})
    group = prompt_groups(prompts)
    assert built[1]["groups"] < built[1]["prompts"] == len(prompts)                     # there are some
    assert not set(group[:border]) & set(group[border:])


@pytest.fixture(scope="module")
def messy(tmp_path_factory):
    """One raw folder of all kinds, and the same one with other file names and the rows in another order."""
    first, second = tmp_path_factory.mktemp("raw"), tmp_path_factory.mktemp("again")
    shutil.copytree(PROJECT / "rlhfkit/samples/raw", first, dirs_exist_ok=True)
    rng = random.Random(0)
    for path in sorted(first.rglob("*")):
        if path.is_file() and (path.suffix in (".txt", ".csv") or path.parent.name in ("raw", "baike_qa2019") or path.parent == first):
            head, *rest = lines(path)
            rest = [head, *rest] if path.suffix != ".csv" else rest
            rng.shuffle(rest)
            name = path.relative_to(first)
            put(second, name if path.suffix != ".csv" else f"zhidao/{rng.random()}.csv", "\n".join([head] * (path.suffix == ".csv") + rest))
    return first, second


def test_files_are_the_same_for_any_number_of_processes_order_of_files_and_of_rows_and_hash_seed(messy, tmp_path):
    first, second = messy
    names = ["weibo", "couplets", "zhidao", "baike"]
    rk.build_corpus(tmp_path / "one", names, first, seed=7)
    rk.build_corpus(tmp_path / "three", names, first, seed=7, num_proc=3)
    code = f"import rlhfkit as rk; rk.build_corpus({str(tmp_path / 'other')!r}, {names!r}, {str(second)!r}, seed=7, num_proc=2)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=PROJECT, env=os.environ | {"PYTHONHASHSEED": "5"})
    for name in ("train.jsonl", "dev.jsonl"):
        want = (tmp_path / "one" / name).read_bytes()
        assert want and want == (tmp_path / "three" / name).read_bytes()
        # replies of equal score keep the order of the file, and nothing else does
        other = [json.loads(line) for line in lines(tmp_path / "other" / name)]
        assert sorted(_unordered(row) for row in other) == sorted(_unordered(json.loads(line)) for line in lines(tmp_path / "one" / name))


def _unordered(row):
    return json.dumps(row | {"answers": sorted(map(str, row["answers"]))}, ensure_ascii=False)


def test_what_people_bring_stands_beside_the_sources(tmp_path):
    own = put(tmp_path, "alpaca.json", json.dumps([{"instruction": f"第{i}题：一加{i}", "input": "", "output": str(i)} for i in range(40)]))
    counts = rk.build_corpus(tmp_path / "out", ["zhidao", own], dev_fraction=0.1)
    assert {name: count["records"] for name, count in counts["sources"].items()} == {"zhidao": 80, str(own): 40}
    assert counts["train"] + counts["dev"] == 120


def test_rows_that_hold_benchmark_items_are_left_out_and_named(tmp_path):
    item = "下列关于大气层的说法中，哪一项是正确的？"
    put(tmp_path, "eval/ceval/val/x_val.csv", f"id,question,A,B,C,D,answer\n0,{item},甲,乙,丙,丁,A\n1,这是另一道没有出现在训练集里的题目,甲,乙,丙,丁,B\n")
    rows = [{"prompt": f"问题：{i}", "answers": [{"answer": "好" * (i + 1), "score": 1}]} for i in range(20)]
    rows.append({"prompt": "请讲课", "answers": [{"answer": f"今天的考题：{item}大家想一想。", "score": 1}]})
    own = put(tmp_path, "own.jsonl", "\n".join(map(json.dumps, rows)))
    counts = rk.build_corpus(tmp_path / "out", [own], dev_fraction=0.2, eval_dir=tmp_path / "eval")
    assert (counts["train"], counts["dev"], counts["contaminated"], counts["contaminated_items"]) == (16, 4, 1, 1)
    (found,) = [json.loads(line) for line in lines(tmp_path / "out/contamination.jsonl")]
    assert (found["item"], found["prompt"]) == (1, "请讲课") and found["file"].endswith("x_val.csv")
    assert "考题" in (tmp_path / "out/contaminated.jsonl").read_text("utf-8")


MESS = {
    "weibo_summary_comments_json.json": [
        '{"article": "今 天", "abstract": "晴", "comments": [["好", 3], ["坏", "12"]]}',                  # likes as digits: usable
        '{"article": "今 天", "abstract": "雨", "comments": [["好", NaN], ["行", 1]]}',
        '{"article": "甲\\u0000乙", "abstract": "雨", "comments": [["好", 1]]}',
        '{"article": "甲", "abstract": "雨", "comments": [["好", 1]]}\x07'.encode(),
        '{"article": "甲", "abstract": "雨", "comm'],
    "couplets.txt": [
        b"\xef\xbb\xbf" + "春风\t秋雨".encode(), "夏\t日\t冬\t夜", "花红\t柳绿".encode("gbk"), "山\x01高\t水\x01远", "x" * 10_000_000],
    "zhidao/a.csv": [
        "title,question,reply,is_best", "甲,,一,1", "甲,,二,1", "乙,,三,0", "乙,,,0", '丙,"没有关上,四,1', "丁,,五,1", "戊,,六,2"],
    "Classical-Modern/bitext/书": ["", "古文：一", "现代文：1", "", "古文：二", "现代文：2"],
    "chinese-poetry/sishuwujing/daxue.json": ['{"chapter": "大學", "paragraphs": ["大學之道"]}'],
    "baike_qa2019/a.json": ['{"title": "问题一", "desc": "", "answer": "答"}', '{"title": "问题二", "desc": "", "answer": ""}', '{"title": "半'],
}


def test_a_file_of_each_kind_of_mess_loses_nothing(tmp_path):
    for name, rows in MESS.items():
        put(tmp_path, f"raw/{name}", b"\n".join(row if isinstance(row, bytes) else row.encode() for row in rows))
    counts = rk.build_corpus(tmp_path / "out", raw_dir=tmp_path / "raw", dev_fraction=0.2)
    bad = [json.loads(line) for line in lines(tmp_path / "out/rejected.jsonl")]
    found = {(row["file"].split("raw/")[1], row["line"]): row["reason"] for row in bad}
    expected = {
        ("weibo_summary_comments_json.json", 2): "score is nan", ("weibo_summary_comments_json.json", 3): "a control character",
        ("weibo_summary_comments_json.json", 4): "not JSON", ("weibo_summary_comments_json.json", 5): "not JSON",
        ("couplets.txt", 2): "must have the same number", ("couplets.txt", 3): "not UTF-8", ("couplets.txt", 4): "a control character",
        ("couplets.txt", 5): "10000000 bytes in one line", ("zhidao/a.csv", 5): "answer is ''", ("zhidao/a.csv", 6): "",
        ("zhidao/a.csv", 8): "is_best is '2'", ("baike_qa2019/a.json", 2): "answer is ''", ("baike_qa2019/a.json", 3): "not JSON"}
    assert {key: expected[key] in reason for key, reason in found.items()} == dict.fromkeys(expected, True)
    assert sum(counts["set_aside"].values()) == len(bad) and all(row["text"] for row in bad)
    records = {r.prompt: r for r in rk.read_data(tmp_path / "out")[0] + rk.read_data(tmp_path / "out")[1]}
    assert [a.score for a in records["新闻内容：今天 摘要：晴"].answers] == [12, 3]
    assert "上联：春风" in records and [a.score for a in records["问题：甲"].answers] == [1, 1]
    assert {"问题：乙", "问题：丁", "问题一", "以曾子的风格，写一篇经书，题为大学"} <= records.keys()
    assert sum(r.source == "classical" for r in records.values()) == 2


def test_a_failing_build_leaves_the_files_that_were_there(built, tmp_path):
    put(tmp_path, "train.jsonl", "old")
    with pytest.raises(ValueError, match="did you mean 'couplets'"):
        rk.build_corpus(tmp_path, ["couplet"])
    with pytest.raises(FileNotFoundError, match="looks like couplets"):
        put(tmp_path, "raw/couplets.txt", "春风\t秋雨\n")
        rk.build_corpus(tmp_path, ["zhidao"], tmp_path / "raw")
    with pytest.raises(ValueError, match="dev_fraction is 1"):
        rk.build_corpus(tmp_path, ["zhidao"], dev_fraction=1)
    assert (tmp_path / "train.jsonl").read_text() == "old" and sorted(p.name for p in tmp_path.iterdir()) == ["raw", "train.jsonl"]


LIMITED = """
import resource, sys
from pathlib import Path
import rlhfkit as rk
import rlhfkit.corpus
from rlhfkit.duplicates import groups
from rlhfkit.sources import TEMPLATES, records_of
kind, limit, folder = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
groups(["甲乙", "丙丁"])
used = int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmData"))) << 10
resource.setrlimit(resource.RLIMIT_DATA, (used + (limit << 20),) * 2)
"""
BUILD = LIMITED + """
counts = rk.build_corpus(folder / "out", [kind], folder / "raw", dev_fraction=0.001)
print(counts["train"] + counts["dev"])
"""
READ = LIMITED + """
print(sum(1 for record in records_of(kind, folder / "raw", [], 0, TEMPLATES["HEAD"])))
"""


def limited(code, kind, size, limit, folder):
    """Run `code` on `size` MiB of a kind with at most `limit` MiB of memory more than an idle process has -> records, rows."""
    rows = synthetic.write(folder / "raw", kind, size << 20)
    done = subprocess.run([sys.executable, "-c", code, kind, str(limit), str(folder)], cwd=PROJECT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    shutil.rmtree(folder)
    return int(done.stdout), rows


linux = pytest.mark.skipif(sys.platform != "linux", reason="the limit on memory is Linux's")


@linux
@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_gigabyte_of_each_raw_format_is_built_in_a_fixed_memory(kind, tmp_path):
    """What grows: for couplets, classical and poetry the index of their texts (sources/raw.Pool); for all, some 200 bytes a prompt while
    near duplicates are looked for (the made-up rows have more bigrams than Chinese has)."""
    records, rows = limited(BUILD, kind, 1024, 6144 if kind == "couplets" else 2560, tmp_path)
    assert records == rows or kind == "zhidao" and rows / 3 < records < rows


@linux
@pytest.mark.parametrize("kind", ["weibo", "zhidao", "baike", "published"])
def test_a_source_without_an_index_is_read_in_less_memory_than_its_file_has(kind, tmp_path):
    records, rows = limited(READ, kind, 80, 60 if kind == "zhidao" else 20, tmp_path)
    assert records == rows or kind == "zhidao" and rows / 3 < records < rows
