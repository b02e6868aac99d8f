"""The sources, one by one, on small files written here."""
import gzip
import json
import lzma

import pytest

from rlhfkit.records import Answer, Record
from rlhfkit.samples import RAW
from rlhfkit.sources import SOURCES, build


def put(folder, path, content):
    file = folder / path
    file.parent.mkdir(parents=True, exist_ok=True)
    if not isinstance(content, (str, bytes)):
        content = json.dumps(content, ensure_ascii=False)
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return file


def read(name, folder, seed=0):
    rejected = []
    return list(SOURCES[name](folder, rejected, seed)), rejected


def poem(title, *lines, **fields):
    return {"title": title, "paragraphs": list(lines), **fields}


# weibo

def test_weibo_removes_spaces_and_ranks_by_likes_then_length(tmp_path):
    comments = [["好 啊", "2"], ["真 不错 啊", 2], ["一般", 10]]
    put(tmp_path, "weibo_summary_comments_json.json",
        json.dumps({"article": "今天 下雨", "abstract": "下 雨", "comments": comments}))
    (record,), rejected = read("weibo", tmp_path)
    assert record == Record("新闻内容：今天下雨 摘要：下雨", (Answer("一般", 10), Answer("真不错啊", 2), Answer("好啊", 2)),
                            "评论：", source="weibo") and not rejected
    assert [answer.text for answer in record.answers] == ["一般", "真不错啊", "好啊"]


def test_weibo_sets_a_bad_comment_aside_and_keeps_the_row(tmp_path):
    bad = [["", 1], ["多", "1.5"], ["多", True], ["多"], "多", [7, 1]]
    row = {"article": "甲", "abstract": "乙", "comments": [["好", 1], *bad]}
    empty = {"article": "甲", "abstract": "乙", "comments": [["", 1]]}
    lines = [row, empty, {"article": "甲", "comments": []}, {"article": "甲", "abstract": "乙", "comments": {}}]
    put(tmp_path, "weibo_summary_comments_json.jsonl", "\n".join(map(json.dumps, lines)))
    (record,), rejected = read("weibo", tmp_path)
    assert record.answers == (Answer("好", 1),)
    assert [row["line"] for row in rejected] == [1] * 6 + [2, 2, 3, 4]


# couplets

TEN = [(chr(0x4E00 + i) * n, chr(0x5E00 + i) * n) for n in (3, 5, 7) for i in range(10 * n, 10 * n + 4)]


def test_couplets_have_two_of_the_same_length_and_two_of_other_lengths(tmp_path):
    put(tmp_path, "couplets.txt", "".join(f"{a}\t{b}\n" for a, b in TEN))
    records, rejected = read("couplets", tmp_path)
    assert [r.prompt for r in records] == [f"上联：{a}" for a, _ in TEN] and not rejected
    for record, (_, gold) in zip(records, TEN):
        texts = [answer.text for answer in record.answers]
        assert texts[0] == gold and len(set(texts)) == 5 and record.prefix == "下联："
        assert [answer.score for answer in record.answers] == [1, 0, 0, -1, -1]
        assert [len(text) == len(gold) for text in texts] == [True] * 3 + [False] * 2
        assert len(texts[3]) != len(texts[4])                       # of two other lengths


def test_couplet_answers_do_not_pile_up_on_a_row_left_over_from_another_loop(tmp_path):
    """2023: the negatives extended the variable `answers` of the reading loop, so every row held the last couplet."""
    put(tmp_path, "couplets.txt", "".join(f"{a}\t{b}\n" for a, b in TEN))
    records, _ = read("couplets", tmp_path)
    assert [r.answers[0].text for r in records] == [b for _, b in TEN] and {len(r.answers) for r in records} == {5}


def test_couplets_take_fewer_negatives_when_there_are_no_more(tmp_path):
    put(tmp_path, "couplets.txt", "春风\t秋雨\n夏日\t秋雨\n晴天\t月夜\n")
    records, _ = read("couplets", tmp_path)
    assert [[answer.text for answer in r.answers] for r in records] == [["秋雨", "月夜"]] * 2 + [["月夜", "秋雨"]]


def test_repeated_couplets_stay(tmp_path):
    put(tmp_path, "couplets.txt", "春风\t秋雨\n" * 3)
    assert len(read("couplets", tmp_path)[0]) == 3


@pytest.mark.parametrize("line", ["春风\t秋雨", "春风 秋雨", "春风；秋雨", "春 风\t秋 雨", "\ufeff春风\t秋雨\r"])
def test_couplets_take_any_one_separator(tmp_path, line):
    put(tmp_path, "couplets.txt", line + "\n")
    assert read("couplets", tmp_path) == ([Record("上联：春风", (Answer("秋雨", 1),), "下联：", source="couplets")], [])


def test_couplets_of_unequal_sides_and_broken_bytes_are_set_aside(tmp_path):
    lines = ["春风\t秋雨".encode(), "春风\t秋".encode(), b"", "春风秋雨雪".encode(), b"\xff\t\xff", "春风\t".encode()]
    put(tmp_path, "couplets.txt", b"\n".join(lines))
    records, rejected = read("couplets", tmp_path)
    assert len(records) == 1 and sorted(row["line"] for row in rejected) == [2, 4, 5, 6]
    assert "the sides have 2 and 1 characters" in rejected[0]["reason"]


def test_couplets_read_in_and_out_files_in_any_folder_but_never_both_copies(tmp_path):
    put(tmp_path, "couplets/b/in.txt", "春 风\n夏 日\n"), put(tmp_path, "couplets/b/out.txt", "秋 雨\n冬 夜\n\n")
    put(tmp_path, "couplets/a/x/in.txt", "山 高\n"), put(tmp_path, "couplets/a/x/out.txt", "水 远")
    prompts = [r.prompt for r in read("couplets", tmp_path)[0]]
    assert prompts == ["上联：山高", "上联：春风", "上联：夏日"]      # in the order of the paths
    put(tmp_path, "couplets.txt", "花红\t柳绿\n")
    assert [r.prompt for r in read("couplets", tmp_path)[0]] == ["上联：花红"]


def test_couplet_files_that_do_not_match_are_set_aside_whole(tmp_path):
    put(tmp_path, "couplets/a/in.txt", "春 风\n夏 日\n"), put(tmp_path, "couplets/a/out.txt", "秋 雨\n")
    put(tmp_path, "couplets/b/in.txt", "春 风\n"), put(tmp_path, "couplets/c/in.txt", b"\xff\n\xe5\xb1\xb1\n")
    put(tmp_path, "couplets/c/out.txt", "石\n水\n")
    records, rejected = read("couplets", tmp_path)
    assert [r.prompt for r in records] == ["上联：山"] and [row["line"] for row in rejected] == [1, 1, 1]
    assert "2 lines, and 1 in out.txt" in rejected[0]["reason"] and "and 0 in out.txt" in rejected[1]["reason"]


# zhidao

def test_zhidao_groups_by_title_and_puts_the_best_first(tmp_path):
    rows = ["title,question,reply,is_best", "甲,,一,0", "甲,细说,二,1", "乙,乙,三,0", "甲,别的,四,1", '乙,,"五\n，六",0']
    put(tmp_path, "zhidao/a.csv", "\n".join(rows))
    records, rejected = read("zhidao", tmp_path)
    assert records == [
        Record("问题：甲 内容：细说", (Answer("二", 1), Answer("四", 1), Answer("一", 0)), "答：", source="zhidao"),
        Record("问题：乙", (Answer("三", 0), Answer("五\n，六", 0)), "答：", source="zhidao")] and not rejected


def test_every_zhidao_record_has_the_prefix(tmp_path):
    """2023: only the last title of a file got one."""
    put(tmp_path, "zhidao/a.csv", "title,question,reply,is_best\n甲,,一,0\n乙,,二,0\n丙,,三,0\n")
    assert {r.prefix for r in read("zhidao", tmp_path)[0]} == {"答："}


def test_the_same_title_in_two_zhidao_files_is_two_records(tmp_path):
    for name in ("b", "a"):
        put(tmp_path, f"zhidao/{name}.csv", f"title,question,reply,is_best\n甲,,{name},0\n")
    assert [r.answers[0].text for r in read("zhidao", tmp_path)[0]] == ["a", "b"]


def test_bad_zhidao_rows_are_set_aside_one_by_one(tmp_path):
    rows = ["甲,,一,1", "甲,, ,0", "甲,,二,yes", ",,三,0", "甲,四", "甲,,五,0"]
    content = "\n".join(["\ufefftitle,question,reply,is_best", *rows]).encode() + b"\n\xd6\xd0,,x,0\n"
    put(tmp_path, "zhidao/a.csv", content)
    put(tmp_path, "zhidao/b.csv", "q,a\n1,2\n"), put(tmp_path, "zhidao/c.csv", "")      # an empty file holds no bad row
    (record,), rejected = read("zhidao", tmp_path)
    assert [answer.text for answer in record.answers] == ["一", "五"]
    assert [row["line"] for row in rejected] == [3, 4, 5, 6, 8, 1]
    assert "2 cells; the header has 4" in rejected[3]["reason"] and "must include title" in rejected[5]["reason"]


# classical

def classical(folder, **books):
    for book, pairs in books.items():
        put(folder, f"Classical-Modern/bitext/{book}", "".join(f"古文：{a}\n现代文：{b}\n\n" for a, b in pairs))


def test_classical_goes_both_ways_and_keeps_the_text_to_translate(tmp_path):
    """2023: the prefix was written as the prompt, the source text was gone."""
    books = {book: [(f"{book}古{i}", f"{book}今{i}") for i in range(8)] for book in ("甲", "乙", "丙")}
    classical(tmp_path, **books)
    records, rejected = read("classical", tmp_path)
    other = {a: b for pairs in books.values() for a, b in (*pairs, *(pair[::-1] for pair in pairs))}
    assert len(records) == 24 and not rejected and {r.prefix for r in records} == {"古文：", "现代文："}
    for record in records:
        label, text = record.prompt.split("：")
        gold, *negatives = [answer.text for answer in record.answers]
        assert gold == other[text] and label + "：" != record.prefix and len({gold, *negatives}) == 5
        style = "今" if record.prefix == "现代文：" else "古"
        assert all(style in text for text in negatives)
        assert [text[0] == gold[0] for text in negatives] == [True, True, False, False]
        assert negatives[2][0] != negatives[3][0]                   # of two other books
        assert [answer.score for answer in record.answers] == [1, 0, 0, -1, -1]


def test_classical_takes_a_blank_first_line_and_a_pair_at_the_end_without_one(tmp_path):
    """2023: the first was a NameError, the second lost the pair."""
    put(tmp_path, "Classical-Modern/bitext/甲", "\n\n古文：一\n现代文：1\n\n古文：二\n现代文：2")
    records, rejected = read("classical", tmp_path)
    assert [{r.prompt.split("：")[1], r.answers[0].text} for r in records] == [{"一", "1"}, {"二", "2"}] and not rejected


def test_half_pairs_and_foreign_lines_of_a_book_are_set_aside(tmp_path):
    lines = ["古文：一", "", "现代文：2", "古文：三", "古文：四", "现代文：4", "注：五", "古文：", "现代文：6", "古文：七"]
    put(tmp_path, "Classical-Modern/bitext/甲", "\n".join(lines).encode() + b"\n\xe7")
    records, rejected = read("classical", tmp_path)
    assert len(records) == 1 and records[0].answers == (Answer("4" if "四" in records[0].prompt else "四", 1),)
    assert sorted(row["line"] for row in rejected) == [1, 3, 4, 7, 8, 9, 10, 11]


def test_a_negative_is_never_the_gold_answer_nor_drawn_twice(tmp_path):
    """2023: gold was among the candidates. Here one modern line stands in every book, many times."""
    classical(tmp_path, **{book: [("古", "同"), (f"古{book}", "同"), ("古", f"今{book}")] * 4 for book in "甲乙丙"})
    for seed in range(20):
        for record in read("classical", tmp_path, seed)[0]:
            texts = [answer.text for answer in record.answers]
            assert len(set(texts)) == len(texts)


# poetry

def test_poetry_negatives_are_same_author_other_author_other_genre(tmp_path):
    put(tmp_path, "chinese-poetry/ci/ci.song.0.json", [
        {"author": author, "rhythmic": f"{author}{i}", "paragraphs": [f"{author}词", f"{i}。"]}
        for author in ("甲", "乙") for i in range(3)])
    put(tmp_path, "chinese-poetry/yuanqu/yuanqu.json", [poem(f"曲{i}", f"丙曲{i}", author="丙") for i in range(2)])
    records, rejected = read("poetry", tmp_path)
    assert len(records) == 8 and not rejected
    record = next(r for r in records if r.prompt == "以甲的风格，写一首词，题为甲1")
    gold, same, other, genre = record.answers
    assert gold == Answer("甲词1。", 1) and (same.score, other.score, genre.score) == (0, -1, -2)
    assert same.text in ("甲词0。", "甲词2。") and other.text.startswith("乙词") and genre.text.startswith("丙曲")


def test_a_genre_of_one_author_and_an_author_of_one_poem_do_not_stop(tmp_path):
    """2023: random.choice([])."""
    put(tmp_path, "chinese-poetry/ci/ci.song.0.json", [{"author": "甲", "rhythmic": "一", "paragraphs": ["文。"]}])
    assert [r.answers for r in read("poetry", tmp_path)[0]] == [(Answer("文。", 1),)]


def test_an_author_s_poem_of_the_same_title_is_no_negative(tmp_path):
    rows = [{"author": "甲", "rhythmic": "浣溪沙", "paragraphs": [text]} for text in ("一。", "二。", "三。")]
    put(tmp_path, "chinese-poetry/ci/ci.song.0.json", rows)
    records, _ = read("poetry", tmp_path)
    assert [r.answers for r in records] == [(Answer("一。", 1),), (Answer("二。", 1),), (Answer("三。", 1),)]


def test_folders_of_the_user_that_contain_shi_and_ci_change_nothing(tmp_path):
    """2023: "shi" in the whole path, so a home of that name made every file a shi file."""
    folder = tmp_path / "shi" / "ci" / "lunyu"
    put(folder, "chinese-poetry/yuanqu/yuanqu.json", [poem("题", "曲。", author="甲")])
    assert read("poetry", folder)[0][0].prompt == "以甲的风格，写一首曲，题为题"


def test_huajianji_poems_are_read(tmp_path):
    """2023: looked for the folder `huajianci`, and so repeated the poem before, once for each row."""
    put(tmp_path, "chinese-poetry/wudai/huajianji/huajianji-1-juan.json",
        [poem("菩萨蛮·一", "文一。", author="甲", rhythmic="菩萨蛮"), poem("菩萨蛮·二", "文二。", author="甲")])
    put(tmp_path, "chinese-poetry/wudai/huajianji/huajianji-0-preface.json", {"title": "序", "abstract": "没有诗"})
    assert [(r.prompt, r.answers[0].text) for r in read("poetry", tmp_path)[0]] == [
        ("以甲的风格，写一首词，题为菩萨蛮·一", "文一。"), ("以甲的风格，写一首词，题为菩萨蛮·二", "文二。")]


@pytest.mark.parametrize("path, content, prompt, text", [
    ("lunyu/lunyu.json", [{"chapter": "甲篇", "paragraphs": ["子曰", "善"]}], "以孔子的风格，写一篇经书，题为甲篇", "子曰善"),
    ("sishuwujing/daxue.json", {"chapter": "大學", "paragraphs": ["「學」"]}, "以曾子的风格，写一篇经书，题为大学", "“学”"),
    ("sishuwujing/zhongyong.json", {"chapter": "中庸", "paragraphs": ["謂"]}, "以孔伋的风格，写一篇经书，题为中庸", "谓"),
    ("sishuwujing/mengzi.json", [{"chapter": "上", "paragraphs": ["王曰"]}], "以孟子的风格，写一篇经书，题为上", "王曰"),
    ("caocaoshiji/caocao.json", [poem("行", "一。", "二。")], "以曹操的风格，写一首古体诗，题为行", "一。二。"),
    ("shijing/shijing.json", [{"title": "题", "chapter": "章", "section": "节", "content": ["一。"]}],
     "以诗经的风格，写一首古体诗，题为章-节-题", "一。"),
    ("chuci/chuci.json", [{"title": "题", "section": "节", "author": "甲", "content": ["兮。"]}],
     "以甲的风格，写一篇楚辞，题为节-题", "兮。"),
    ("shi/poet.tang.0.json", [poem("題", "一二三四五，六七八九十。", author="張")], "以张的风格，写一首五言诗，题为题",
     "一二三四五，六七八九十。"),
    ("shi/poet.song.0.json", [poem("題", "一二三四五六七，八九十一二三四。", author="張")], "以张的风格，写一首七言诗，题为题",
     "一二三四五六七，八九十一二三四。"),
    ("nalanxingde/甲.json", [{"title": "题", "para": ["一", "二"], "author": "甲"}], "以甲的风格，写一首词，题为题", "一二"),
    ("wudai/nantang/poetrys.json", [poem("题", "一。", author="甲")], "以甲的风格，写一首词，题为题", "一。")])
def test_each_poetry_folder_has_its_author_genre_and_title(tmp_path, path, content, prompt, text):
    put(tmp_path, f"chinese-poetry/{path}", content)
    assert read("poetry", tmp_path) == ([Record(prompt, (Answer(text, 1),), source="poetry")], [])


def test_bad_poems_and_files_are_set_aside(tmp_path):
    rows = [poem("题", author="甲"), poem("", "一。", author="甲"), poem("题", "一。"), poem("题", 5, author="甲"), "诗",
            poem("题", "一。", author="甲")]
    put(tmp_path, "chinese-poetry/yuanqu/yuanqu.json", "[" + ",\n".join(map(json.dumps, rows)) + "]")
    put(tmp_path, "chinese-poetry/ci/ci.song.0.json", "{")
    broken = json.dumps([poem("题", "二。", author="乙"), poem("X", "三。", author="丙")], ensure_ascii=False).encode()
    put(tmp_path, "chinese-poetry/wudai/nantang/poetrys.json", broken.replace(b"X", b"\xff"))
    records, rejected = read("poetry", tmp_path)
    assert sorted(r.answers[0].text for r in records) == ["一。", "二。"]
    assert sorted(row["line"] for row in rejected) == [1, 1, 1, 2, 3, 4, 5]


# baike

def test_baike_asks_the_longer_of_title_and_description_in_one_line(tmp_path):
    lines = [{"title": "长的\r\n题目", "desc": "短", "answer": "答\n一"}, {"title": "题", "desc": "长的说明", "answer": "答"},
             {"title": "同长", "desc": "说明", "answer": "答"}, {"title": "题", "answer": "答"},
             {"title": "", "desc": "\n", "answer": "答"}, {"title": "题", "desc": "", "answer": ""}]
    put(tmp_path, "baike_qa2019/baike_qa_train.json", "\n".join(map(json.dumps, lines)))
    records, rejected = read("baike", tmp_path)
    assert [(r.prompt, r.answers, r.prefix) for r in records] == [
        (prompt, (Answer(answer, 1),), "答：") for prompt, answer in (("长的题目", "答一"), ("长的说明", "答"), ("说明", "答"))]
    assert [row["line"] for row in rejected] == [4, 5, 6]


# clue, the published corpus, templates

def test_clue_reads_the_train_files_of_the_tasks_and_never_dev(tmp_path):
    rows = [{"sentence1": "天在下雨", "sentence2": "地湿了", "label": "entailment"}, {"sentence1": "一", "sentence2": "二", "label": "-"}]
    put(tmp_path, "clue/ocnli/train.json", "\n".join(map(json.dumps, rows)))
    put(tmp_path, "clue/ocnli/dev.json", json.dumps(rows[0] | {"sentence2": "留出"}))
    put(tmp_path, "clue/tnews/train.json", "{")
    (record,), rejected = read("clue", tmp_path)
    assert record.answers[0] == Answer("Yes，地湿了", 1) and [a.score for a in record.answers] == [1, 0, 0]
    assert (record.prompt, record.source) == ("天在下雨?", "clue")
    assert ["no label" in row["reason"] or "folder left out" in row["reason"] for row in rejected] == [True, True]


def test_the_published_corpus_is_read_once_though_its_dev_file_is_a_part_of_it(tmp_path):
    rows = [{"prompt": f"问题:{i}", "answers": [{"answer": "甲", "score": 1}, {"answer": "乙", "score": 0}], "prefix": "回答:"} for i in range(5)]
    put(tmp_path, "train_data_external_v1.jsonl", "\n".join(map(json.dumps, rows)))
    put(tmp_path, "dev_data_external_v1.jsonl", "\n".join(map(json.dumps, rows[:2])))
    records, _ = read("published", tmp_path)
    assert [r.prompt for r in records] == [f"问题:{i}" for i in range(5)] and {r.source for r in records} == {"published"}


@pytest.mark.parametrize("template, weibo, zhidao, prefix, answer", [
    ("HEAD", "新闻内容：今天，雨 摘要：雨", "问题：甲？ 内容：乙", "答：", "（丙），Ａ"),
    ("published", "新闻内容:今天,雨 摘要:雨", "问题:甲? 内容:乙", "回答:", "(丙),A"),
    ("v0", "新闻内容：今天，雨<sep>摘要：雨", "问题：甲？<sep>内容：乙", "回答：", "（丙），Ａ")])
def test_the_three_generations_of_templates(tmp_path, template, weibo, zhidao, prefix, answer):
    put(tmp_path, "weibo_summary_comments_json.json", json.dumps({"article": "今天，雨", "abstract": "雨", "comments": [["好", 1]]}))
    put(tmp_path, "zhidao/a.csv", "title,question,reply,is_best\n甲？,乙,（丙），Ａ,1\n")
    records = {r.source: r for r in build(["weibo", "zhidao"], tmp_path, template=template)}
    assert records["weibo"].prompt == weibo and records["zhidao"].prompt == zhidao
    assert records["zhidao"].prefix == prefix and records["zhidao"].answers == (Answer(answer, 1),)
    with pytest.raises(ValueError, match="template is 'head'; it must be one of HEAD, published, v0"):
        build(["weibo"], tmp_path, template="head")


@pytest.mark.parametrize("end, opener", [(".gz", gzip.open), (".xz", lzma.open)])
def test_packed_files_are_read_and_one_that_breaks_off_keeps_what_came_before(tmp_path, end, opener):
    rows = "".join(json.dumps({"title": f"第{i}个问题", "desc": "", "answer": f"第{i}个回答" * 20}) + "\n" for i in range(2000))
    path = tmp_path / f"baike_qa2019/baike.json{end}"
    path.parent.mkdir()
    with opener(path, "wt", encoding="utf-8") as file:
        file.write(rows)
    assert len(read("baike", tmp_path)[0]) == 2000
    path.write_bytes(path.read_bytes()[:-200])
    records, rejected = read("baike", tmp_path)
    assert 0 < len(records) <= 2000 and "archive ends early" in rejected[-1]["reason"] and "fetch it again" in rejected[-1]["reason"]


def test_every_share_of_a_source_together_is_the_whole(tmp_path):
    for name in ("weibo", "couplets", "zhidao", "classical", "poetry", "baike"):
        whole = list(SOURCES[name](RAW, []))
        parts = [list(SOURCES[name](RAW, [], part=(i, 3))) for i in range(3)]
        assert all(parts) and sorted(map(repr, whole)) == sorted(repr(r) for part in parts for r in part)
