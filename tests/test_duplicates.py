"""Near duplicates against all pairs one by one; benchmark items in training records; no real row is copied here."""
import json
import os
import random
import subprocess
import sys
import unicodedata
from collections import Counter

import pytest

from rlhfkit.duplicates import EvalGrams, contamination, groups, normal, prompt_groups
from rlhfkit.joins import letters
from rlhfkit.records import Answer, Record

POEM = "以李白的风格，写一首五言诗，题为{}"
PASSAGE = "秋日的下午，管理员把图书馆里所有的旧地图搬到院子里晾晒，孩子们围着看了很久。"


def plainly(texts, threshold):
    """What `groups` says, by looking at every pair."""
    plain, near = [normal(text) for text in texts], list(range(len(texts)))
    sets = [{a + b for a, b in zip(text, text[1:])} for text in plain]
    for i in range(len(texts)):
        for j in range(i):
            either = len(sets[i] | sets[j])
            if plain[i] == plain[j] or either and len(sets[i] & sets[j]) / either >= threshold:
                old, new = max(near[i], near[j]), min(near[i], near[j])
                near = [new if number == old else number for number in near]
    return near


def drawn(rng, count, alphabet="天地玄黄宇宙，！aＡ1", lengths=(0, 1, 2, 6, 20, 100)):
    """Random texts; every other one is an earlier one with some characters changed or put in."""
    texts = []
    for _ in range(count):
        text = [rng.choice(alphabet) for _ in range(rng.choice(lengths))]
        if texts and rng.random() < 0.5:
            text = list(rng.choice(texts))
            for _ in range(rng.randint(1, 4)):
                place = rng.randint(0, len(text))
                text[place:place + rng.randint(0, 1)] = rng.choice(alphabet)
        texts.append("".join(text))
    return texts


@pytest.mark.parametrize("text, plain", [
    ("你好，世界！", "你好世界"), ("ＡＢｃ １２３", "abc123"), ("Ⅳ①㎏", "iv1kg"), ("ｶﾞ", "ガ"), ("？？", "？？"), ("", ""),
    ("ΑΣ Σ", "αςσ"), ("e\u0301", "é")])
def test_the_normal_text_has_letters_and_digits_only_unless_there_are_none(text, plain):
    assert normal(text) == plain


def test_letters_are_what_unicodedata_says_of_every_character_and_its_neighbours():
    rng = random.Random(0)
    joining = [chr(i) for first, last in ((0x300, 0x370), (0x900, 0xE00), (0x1100, 0x1200), (0x3040, 0x30A0), (0xFF00, 0xFFE0))
               for i in range(first, last)] + [*"ΣaA，_\n½", "\u2028", "\U0001D6BA", "\ud800"]
    for text in [chr(i) for i in range(0x30000)] + ["".join(rng.choices(joining, k=rng.randint(0, 6))) for _ in range(20_000)]:
        assert letters(text) == "".join(c for c in unicodedata.normalize("NFKC", text).lower() if c.isalnum())


@pytest.mark.parametrize("text, near", [
    ("请问今天下午三点开会还来得及吗我现在出门", "请问今天下午三点开会还来得及吗我现在出发"), ("你好世界", "你好，世界！"), ("价格是１２３元", "价格是123元"),
    ("请用一句话介绍一下北京的春天", "请用一句话介绍一下北京的春天吧"), ("What is AI", "what is ai?"), ("哈", "哈！"), ("", "")])
def test_near_prompts_bear_the_smallest_index_among_them(text, near):
    assert groups(["别的问题在这里", text, "又一个不同的问题", near]).tolist() == [0, 1, 2, 1]


@pytest.mark.parametrize("text, other", [
    ("今天天气怎么样", "明天天气怎么样"), ("哈", "呵"), ("？？", "！！"), (POEM.format("静夜思"), POEM.format("将进酒")),
    (POEM.format("行路难"), POEM.format("行路难").replace("李白", "杜甫"))])
def test_prompts_that_are_not_near_stay_apart(text, other):
    assert groups([text, other]).tolist() == [0, 1]


def test_one_character_of_twenty_may_change_and_two_apart_may_not():
    """19 bigrams: one change in the middle leaves 17 of 21, a share of 0.81; two changes leave 15 of 23, 0.65."""
    text = "".join(chr(0x4E00 + 7 * i) for i in range(20))
    once = text[:5] + "壹" + text[6:]
    assert groups([text, once]).tolist() == [0, 0]
    assert groups([text, once[:12] + "贰" + once[13:]]).tolist() == [0, 1]
    assert groups([text, once], 0.81).tolist() == [0, 1] and 17 / 21 < 0.81


def test_near_of_near_is_near():
    """abcdefgh: of seven bigrams six are left without the last letter, 6/7; five without the last two, 5/7 < 0.8, but 5/6."""
    assert groups(["abcdefgh", "abcdef"]).tolist() == [0, 1]
    assert groups(["abcdefgh", "abcdef", "abcdefg"]).tolist() == [0, 0, 0]


@pytest.mark.parametrize("seed", range(6))
def test_groups_are_those_of_a_look_at_every_pair(seed):
    rng = random.Random(seed)
    texts = drawn(rng, 150)
    for threshold in (0.8, 0.5, 2 / 3, 0.9, 1):
        assert groups(texts, threshold).tolist() == plainly(texts, threshold)
    texts = drawn(rng, 60, alphabet=[chr(0x4E00 + i) for i in range(40)], lengths=(90, 110, 125))
    assert groups(iter(texts)).tolist() == plainly(texts, 0.8)


def test_the_groups_do_not_depend_on_the_order_of_the_texts():
    texts = drawn(random.Random(1), 3000, alphabet="天地玄黄宇宙洪荒日月盈昃辰宿列张，。")
    order = random.Random(2).sample(range(len(texts)), len(texts))
    there, back = groups(texts), groups([texts[i] for i in order])
    assert len({*zip(there[order].tolist(), back.tolist())}) == len(set(there.tolist())) == len(set(back.tolist())) > 100


def test_a_text_of_more_than_128_bigrams_is_near_to_itself_with_a_few_changes_and_to_no_other():
    rng = random.Random(0)
    text, other = ("".join(chr(rng.randint(0x4E00, 0x9000)) for _ in range(1000)) for _ in range(2))
    changed = text[:300] + "改" + text[301:700] + "动" + text[701:]
    assert groups([text, other, changed, text[:500] + other[:500], "，".join(text)]).tolist() == [0, 1, 0, 3, 0]


def test_many_prompts_of_one_template_are_told_apart_by_their_titles():
    rng = random.Random(0)
    titles = ["".join(chr(rng.randint(0x4E00, 0x9000)) for _ in range(6)) for _ in range(20_000)]
    found = groups([POEM.format(title) for title in titles] + [POEM.format(titles[7]) + "。"])
    assert found.tolist() == [*range(20_000), 7]


def test_a_hundred_thousand_prompts_with_titles_of_two_characters_fall_together_by_the_first_of_them():
    """Of 16 bigrams 15 are shared, 15/17, or 14 when only the second character of the title is the same, 14/18 < 0.8."""
    prompts = [f"以陈与义的风格，写一首五言诗，题为{chr(0x4E00 + i % 317)}{chr(0x5E00 + i // 317)}" for i in range(100_000)]
    assert groups(prompts).tolist() == [i % 317 for i in range(100_000)]
    assert not groups([*prompts, "以陈与义的风格，写一首五言诗，题为雨"]).any()        # 14/17 with each: one chain


def test_without_numba_the_groups_and_the_items_found_are_the_same(tmp_path):
    (tmp_path / "eval.txt").write_text(PASSAGE, encoding="utf-8")
    code = ("import sys\nif sys.argv[2] == 'plain': sys.modules['numba'] = None\n"
            "from rlhfkit.duplicates import contamination, groups\nfrom rlhfkit.records import Record\n"
            f"print(groups([f'第{{i * 7919 % 5003}}个问题，请回答' for i in range(800)]).tolist())\n"
            f"print(contamination([Record('别的'), Record({PASSAGE[:30]!r})], sys.argv[1]))")
    runs = [subprocess.run([sys.executable, "-c", code, str(tmp_path), way], env=os.environ | {"PYTHONHASHSEED": seed},
                           check=True, capture_output=True, text=True).stdout for way, seed in (("plain", "1"), ("numba", "2"))]
    assert runs[0] == runs[1] and "'record': 1" in runs[0]


@pytest.mark.parametrize("texts, threshold", [("一个文本", 0.8), (["文本"], 0), (["文本"], 1.1), (["文本"], float("nan"))])
def test_wrong_arguments_of_groups_are_named(texts, threshold):
    with pytest.raises(ValueError, match="list of texts and a number above 0"):
        groups(texts, threshold)


def test_no_texts_have_no_groups():
    assert groups([]).tolist() == []


FORMS = {       # file -> (its text with the passage in an item, number of that item)
    "clue.json": ('{"sentence1": "短句", "label": "0"}\n\n{"sentence1": "%s", "sentence2": "短", "label": "1"}\n', 2),
    "lines.jsonl": ('\ufeff{"a": {"b": ["%s"]}}\n', 1),
    "c3.json": ('[\n[["男：你好。"], [{"question": "谁？", "choice": ["甲"]}], "1-2"],\n[["女：是。", "%s"], [], "1-3"]]', 2),
    "cmrc.json": ('{"version": "v1", "data": [{"paragraphs": [{"context": "短", "qas": []}, {"context": "长", "qas": '
                  '[{"question": "%s"}]}]}]}', 2),
    "exam.csv": ('id,question,A,B,answer,explanation\n0,短,甲,乙,A,\n1,"多行\n题目","%s",乙,A,\n', 2),
    "none.csv": ("%s,one,two,three,four,A\n", 1), "cmmlu.csv": (",Question,A,B,C,D,Answer\n0,%s,甲,乙,丙,丁,A\n", 1),
    "table.tsv": ('label\tsentence\n0\t%s"\n', 1), "plain.txt": ("短\n\n%s\n", 2), "chid.txt": ('{"content": "%s"}\n', 1)}


@pytest.mark.parametrize("name", FORMS)
def test_an_item_of_each_form_is_found_inside_a_longer_answer(tmp_path, name):
    text, number = FORMS[name]
    (tmp_path / "task").mkdir()
    (tmp_path / "task" / name).write_text(text % PASSAGE, encoding="utf-8")
    records = [Record("无关的问题"), Record("讲个故事，要长一点", (Answer("从前有一天，" + PASSAGE + "后来下雨了。", 1), Answer("不会", 0))), Record(PASSAGE)]
    (found,) = contamination(iter(records), tmp_path)
    assert found.pop("text").startswith(PASSAGE[:20])
    assert found == {"file": f"task/{name}", "item": number, "share": 1.0, "record": 1, "prompt": "讲个故事，要长一点"}
    assert contamination(records, tmp_path / "task" / name)[0]["file"] == name
    assert contamination(records[:1], tmp_path) == []


@pytest.mark.parametrize("record", [
    Record(PASSAGE), Record("问", prefix=PASSAGE), Record("问", system=PASSAGE), Record("问", history=[("早", "好"), ("早", PASSAGE)]),
    Record("问", (Answer("好", 2), Answer(PASSAGE, 1))), Record(" ".join(PASSAGE.replace("，", "！")))])
def test_every_text_of_a_record_is_looked_at(tmp_path, record):
    (tmp_path / "a.txt").write_text(PASSAGE, encoding="utf-8")
    assert EvalGrams(tmp_path).look([Record("别"), record, Record(PASSAGE[:12])]).tolist() == [False, True, False]


def test_the_share_counts_runs_of_thirteen_letters_over_all_records_and_a_record_counts_by_itself(tmp_path):
    """The passage has 35 letters, so 23 runs; its first 20 letters hold 8 of them and its last 18 letters 6."""
    plain = normal(PASSAGE)
    assert len(plain) == 35
    (tmp_path / "a.txt").write_text(PASSAGE, encoding="utf-8")
    records = [Record("无"), Record(plain[:20]), Record(plain[:20]), Record(plain[-18:]), Record(plain[:20] + "，" + plain[-18:])]
    grams = EvalGrams(tmp_path, least=0.3)
    assert grams.look(records[:3]).tolist() == [False, True, True] and grams.report()[0]["share"] == 8 / 23
    assert grams.look(records[3:]).tolist() == [False, True]
    (row,) = grams.report()
    assert (row["share"], row["record"], row["prompt"]) == (14 / 23, 1, plain[:20])
    assert contamination(records[3:4], tmp_path, least=0.3) == [] and contamination(records[3:4], tmp_path)[0]["share"] == 6 / 23


def test_a_short_string_is_one_gram_and_what_is_shorter_still_is_none(tmp_path):
    rows = '{"a": "八个字的短题目呀", "label": "entail", "id": 12345678}\n{"a": "七个字的题目吧"}\n{}\n'
    (tmp_path / "a.jsonl").write_text(rows, encoding="utf-8")
    grams = EvalGrams(tmp_path)
    assert grams.too_short == 2 and [item[1] for item in grams.items] == [1, 2, 3]
    assert grams.look([Record("七个字的题目吧"), Record("这是八个字的，短题目呀对"), Record("八个字的短题目啊")]).tolist() == [False, True, False]


def test_what_more_than_ten_items_of_a_file_say_is_boilerplate(tmp_path):
    order = "阅读下面的短文然后回答后面的问题："
    own = ["".join(chr(0x4E00 + 40 * i + k) for k in range(20)) for i in range(11)]
    (tmp_path / "a.txt").write_text("".join(f"{order}{text}\n" for text in own[:10]), encoding="utf-8")
    assert EvalGrams(tmp_path).look([Record(order)]).tolist() == [True]
    (tmp_path / "a.txt").write_text("".join(f"{order}{text}\n" for text in own), encoding="utf-8")
    grams = EvalGrams(tmp_path)
    assert grams.look([Record(order), Record(order + own[3])]).tolist() == [False, True]
    assert [(row["item"], row["share"], row["record"]) for row in grams.report()] == [(4, 1.0, 1)]


@pytest.mark.parametrize("name, content, message", [
    ("a.json", b'[\n{"a": 1},\n{"b"}]', "a.json, line 3: not JSON"),
    ("a.jsonl", b'{"a": 1}\n{"b"\n', "a.jsonl, line 2: not JSON"),
    ("a.csv", b'question,A\n"x,1\n', "a.csv, line 2: unexpected end"), ("a.txt", "题目".encode("gbk"), "a.txt, line 1: not UTF-8"),
    ("a.txt", b"short\n", "none of 1 items has 8 letters"), ("a.json", b"", "none of 0 items")])
def test_a_file_that_cannot_be_read_is_an_error_with_file_and_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        EvalGrams(tmp_path)


def test_a_folder_without_benchmarks_and_wrong_numbers_are_errors(tmp_path):
    (tmp_path / "README.md").write_text(PASSAGE, encoding="utf-8")
    for folder in (tmp_path, tmp_path / "none", tmp_path / "README.md"):
        with pytest.raises(FileNotFoundError, match="holds no .json"):
            contamination([], folder)
    for n, least in ((7, 0), (64, 0), (13.0, 0), (13, 1), (13, -0.1)):
        with pytest.raises(ValueError, match="whole number from 8 to 63"):
            EvalGrams(tmp_path, n, least)


def test_every_real_benchmark_file_is_read_and_its_items_are_found_in_a_record_made_of_them(shared):
    grams = EvalGrams(shared / "data/eval")
    counts = Counter(file.split("/")[0] for file, _, _ in grams.items)
    assert {name: counts[name] for name in ("ceval", "mmlu", "cmmlu", "cmrc2018", "chid")} == {
        "ceval": 1491, "mmlu": 2776, "cmmlu": 1273, "cmrc2018": 850, "chid": 1181}
    assert counts["afqmc"] == len((shared / "data/eval/afqmc/dev.json").read_text("utf-8").splitlines())
    assert counts["c3"] == sum(len(json.loads(path.read_text("utf-8"))) for path in (shared / "data/eval/c3").glob("*.json"))
    assert len(grams.items) == 43_128 and grams.too_short < 0.02 * len(grams.items)
    assert not grams.look([Record("春风送暖柳丝长，燕子归来绕画梁。"), Record("上联：细雨洗青山")]).any() and not grams.report()
    planted = [item for item in grams.items[::97] if len(normal(item[2])) > 40]
    assert grams.look([Record("书。", (Answer("前文" + item[2] + "后文", 1),)) for item in planted]).mean() > 0.99
    assert {item[:2] for item in planted} - {(row["file"], row["item"]) for row in grams.report()} == set()


def test_poems_of_one_author_are_not_duplicates_for_the_words_of_the_template_but_a_title_written_twice_is():
    prompts = [f"以陈与义的风格，写一首五言诗，题为{title}" for title in ("雨", "月", "早起", "早行", "月夜")]
    assert len(set(groups(prompts))) < 5 == len(set(prompt_groups(prompts)))
    assert prompt_groups([prompts[0], prompts[0].replace("，", ",") + "。", "以苏轼的风格，写一首词，题为雨"]).tolist() == [0, 0, 2]
