"""CLUE's tasks and the chain of thought: what stands in each prompt, what is odd about each file, what a letter is taken from."""
import json

import pytest

from rlhfkit import samples
from rlhfkit.sources import build
from rlhfkit.tasks import TASKS, ceval_cot, iflytek

CLUE = ("ocnli", "cmnli", "chid", "cmrc2018", "cluewsc2020", "c3", "afqmc", "csl", "iflytek", "tnews")


def example(name, number=0, split=None, root=samples.EVAL):
    return TASKS[name].load(root / name, split or TASKS[name].split)[number]


def text(name, number=0, choice=None):
    """Prompt and candidate, the bar between them; the right candidate by itself."""
    record, choices, gold = TASKS[name].render(example(name, number), ())
    return record.prompt + record.prefix + "|" + choices[gold if choice is None else choice]


def test_prompts_are_the_2023_kit_s_with_the_bar_where_the_candidates_part():
    assert text("cmnli") == "嗯，那家店我去过两回，东西不贵，就是排队太久?|Yes，那家店需要排队"
    assert text("afqmc", 1) == "下面两个句子语义|不同:还款日可以改到月底吗。还款后多久恢复额度"
    assert text("csl").endswith("几乎没有变化。，关键词:湿地+越冬水鸟+水位|是真实关键词") and text("csl").startswith("摘要:本文调查了")
    assert text("csl", choice=0).endswith("水位|不是真实关键词")
    assert text("iflytek", 8).startswith("这是关于|记账的应用程序:每一笔收支只要点两下")
    assert text("cluewsc2020", 6) == "兄弟俩等邮差等了一上午，他们饿了，【他】却还没有来。\n问：【他】指的是“邮差”吗？\n答：|是"
    assert text("chid", 9) == "大火烧了半条街，几桶水真是____，眼看邻居家也要着火，|千钧一发之际消防车赶到了。"
    record, _, _ = TASKS["cmmlu"].render(example("cmmlu"), ())
    assert record.prompt == ("以下是关于高中数学的单项选择题，请直接给出正确答案的选项。\n\n"
                             "等比数列2，6，18，…的公比是\nA. 2\nB. 4\nC. 3\nD. 6\n") and record.prefix == "答案："


def test_all_labels_are_ranked_and_named_as_in_the_files(shared):
    """The 2023 kit ranked the right label against three drawn at random, which is another and easier task."""
    assert [len(TASKS[name].render(example(name), ())[1]) for name in ("tnews", "iflytek")] == [15, 119]
    root = shared / "data/eval/iflytek"
    for file in ("dev.json", "fewclue_train_0.json"):               # labels are texts in CLUE's files and numbers in FewCLUE's
        rows = [json.loads(line) for line in (root / file).read_text("utf-8").split("\n") if line]     # U+2028 is no line end
        golds = [e["gold"] for e in TASKS["iflytek"].load(root, file[:-5])]
        assert all(iflytek.KINDS[gold] == row["label_des"] for gold, row in zip(golds, rows))


def test_every_blank_is_an_item_and_shows_nothing_of_the_others():
    """The 2023 kit left #idiom000123# in; with the right idioms there, what is left of the candidates would tell the answer."""
    items = TASKS["chid"].load(samples.EVAL / "chid", "dev")
    assert [e["id"] for e in items[:2]] == ["idiom000000", "idiom000001"] and {len(e["choices"]) for e in items} == {10}
    for item in items:
        record, choices, gold = TASKS["chid"].render(item, ())
        assert "#" not in record.prompt + choices[gold]
        assert sum(idiom in record.prompt + choices[gold] for idiom in item["choices"]) == 1


def test_a_passage_that_begins_with_its_blank_has_something_before_it(shared):
    assert text("chid", 4) == "短文：|鸦雀无声的考场里，只听得见笔尖划过纸面的声音。"
    rows = TASKS["chid"].load(shared / "data/eval/chid", "dev")
    assert sum(not e["before"] for e in rows) == 21


def test_blanks_without_an_answer_have_no_gold_and_wrong_answers_are_named(tmp_path):
    row = {"content": ["他#idiom000007#，我#idiom000008#。"], "candidates": ["甲", "乙", "乙"]}
    (tmp_path / "test.json").write_text(json.dumps(row), encoding="utf-8")
    assert [e["gold"] for e in TASKS["chid"].load(tmp_path, "test")] == [None, None]
    answers = tmp_path / "test_answer.json"
    answers.write_text('{"#idiom000008#": 2}', encoding="utf-8")
    assert [(e["gold"], e["choices"]) for e in TASKS["chid"].load(tmp_path, "test")] == [(None, ("甲", "乙")), (1, ("甲", "乙"))]
    for bad, message in (('{"#idiom000008#": 3}', "the answer is 3; it must be a place among 3"), ("[1]", "holds no object"),
                         ("{", "cannot be read")):
        answers.write_text(bad, encoding="utf-8")
        with pytest.raises(ValueError, match=message):
            TASKS["chid"].load(tmp_path, "test")


def test_the_marked_pronoun_is_the_one_that_is_meant(shared):
    """49 of 210 real texts have the pronoun more than once."""
    rows = TASKS["cluewsc2020"].load(shared / "data/eval/cluewsc2020", "dev")
    assert all(e["marked"].count("【") == 1 for e in rows)
    assert sum(e["marked"].count(e["pronoun"]) > 1 for e in rows) == 49


@pytest.mark.parametrize("name", CLUE)
def test_train_files_of_all_ten_give_shots_and_records(name):
    task = TASKS[name]
    rows = task.load(samples.EVAL / name, "train")
    assert task.shot_splits[0] == "train" and task.shot_splits[-1] == "dev" and task.split == "dev"
    assert sum(row["gold"] is not None for row in rows) >= 2


def test_the_clue_source_makes_records_of_all_ten():
    rejected = []
    records = list(build(["clue"], samples.EVAL, rejected=rejected))
    rows = sum(len(TASKS[name].load(samples.EVAL / name, "train")) for name in CLUE)
    assert [row["reason"] for row in rejected] == ["no label"] and len(records) == rows - 1
    wide = [record for record in records if len(record.answers) == 119]
    assert len(wide) == 8 and all(sum(answer.score for answer in record.answers) == 1 for record in wide)


@pytest.mark.parametrize("answer, letter", [
    ("1. 密度是物质的特性。\n2. 倒掉一半不变。\n所以答案是B。", "B"),
    ("所以答案是C。\n\n下一题\nA. 甲\n答案：让我们一步一步思考，\n所以答案是D。", "C"),     # goes on with a question of its own
    ("如果答案是A，就会矛盾。因此正确答案是 C。", "C"),                                  # the last, where the asked form is missing
    ("答案为**D**", "D"), ("答案：（A）", "A"), ("正确答案是选项B，因为光速最快", "B"), ("答案是$\\boxed{C}$", "C"), ("答案：Ｂ", "B"),
    ("A选项错误，B选项错误，D选项符合题意，故选D。", "D"), ("不选A，应选择C", "C"),
    ("B", "B"), ("B. 不变", "B"), ("(C)", "C"), ("The answer is B.", "B"),
    ("A few reasons lead here.", None),                                                   # fault E8: A is no letter here
    ("A 和 B 都对", None), ("B，但D也对", None),
    ("A. 变为一半：错误。\nB. 不变：正确。", None),                 # goes through the choices, settles on none
    ("答案是A或B。", None), ("答案是AC", None), ("答案不是A。", None), ("答案是Apple", None), ("我不知道。", None), ("", None)])
def test_the_letter_of_a_chain_of_thought_is_taken_by_stated_rules(answer, letter):
    assert ceval_cot.find_letter(answer) == letter
    assert ceval_cot.score(answer, ("B",)) == {"accuracy": float(letter == "B"), "answered": float(letter is not None)}


def test_chain_of_thought_shots_show_the_explanation_and_then_the_letter():
    shots = TASKS["ceval_cot"].load(samples.EVAL / "ceval_cot", "dev")[:1]
    record, choices, gold = TASKS["ceval_cot"].render(example("ceval_cot"), shots)
    intro, shot, question = record.prompt.split("\n\n")
    assert intro == "以下是中国关于初中物理考试的单项选择题，请先一步一步推理，最后写出“所以答案是”和选项的字母。"
    assert shot.endswith("\nD. 真空\n答案：让我们一步一步思考，\n声音在固体中传得最快，在真空中不能传播。\n所以答案是C。")
    assert question.endswith("\nD. 无法判断\n") and record.prefix == "答案：让我们一步一步思考，\n"
    assert choices == () and gold == ("B",)
    record, _, _ = TASKS["ceval_cot"].render(example("ceval_cot"), [{**shots[0], "explanation": ""}])
    assert "思考，\n所以答案是C。\n\n" in record.prompt
    assert ceval_cot.find_letter(shot.split("思考，")[1]) == "C"
