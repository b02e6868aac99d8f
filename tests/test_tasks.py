"""The benchmarks' files, prompts and scoring rules: on our own rows, and on real rows where they are at hand."""
import json
import subprocess
import sys
from collections import Counter

import pytest

from rlhfkit import samples
from rlhfkit.tasks import TASKS, ceval, cmmlu, find_tasks, mmlu
from rlhfkit.tasks.cmrc2018 import score, units
from rlhfkit.tasks.task import Task

ROWS = {"ocnli": (13, 2096), "cmnli": (10, 4302), "chid": (12, 1179), "cmrc2018": (8, 2270), "cluewsc2020": (9, 210),
        "c3": (8, 2653), "afqmc": (8, 3022), "csl": (8, 2094), "iflytek": (10, 1820), "tnews": (15, 7000),
        "ceval": (12, 971), "cmmlu": (12, 938), "mmlu": (12, 1597)}         # ours, real


def examples(name, root=samples.EVAL, split=None):
    return TASKS[name].load(root / name, split or TASKS[name].split)


@pytest.mark.parametrize("name", TASKS)
def test_every_sample_item_has_a_prompt_and_its_gold_is_among_the_choices(name):
    for example in examples(name):
        record, choices, gold = TASKS[name].render(example, ())
        assert record.prompt + record.prefix and example["id"]
        assert gold is None or TASKS[name].scoring == "generation" or 0 <= gold < len(choices)


@pytest.mark.parametrize("name", ROWS)
def test_real_files_load_whole(name, shared):
    rows = examples(name, shared / "data/eval")
    assert len(rows) == ROWS[name][1] and len({r["id"] for r in rows}) == len(rows)
    assert len(examples(name)) == ROWS[name][0]
    unlabelled = [r for r in rows if r["gold"] is None]
    assert len(unlabelled) == (31 if name == "ocnli" else 0)        # real OCNLI dev has 31 rows labelled -
    for example in rows[::50]:
        record, choices, _ = TASKS[name].render(example, ())
        assert all(choices) and len(set(choices)) == len(choices)


def test_prompts_are_the_templates_of_the_pangu_paper():
    def text(name, number, choice):
        record, choices, gold = TASKS[name].render(examples(name)[number], ())
        return record.prompt + record.prefix + "|" + choices[choice]
    assert text("ocnli", 2, 2) == "小李一早就去车站接他的姐姐了?|No，小李整个上午没有出门"
    assert text("tnews", 3, 3) == "这是关于|体育的文章:主队下半场连进三球，锁定联赛第二名"
    assert text("c3", 0, 0) == "男：图书馆几点关门？\n女：平时九点，今天是周末，六点就关了。\n问：今天图书馆几点关门？\n答：|六点"
    assert text("ceval", 0, 1) == ("以下是中国关于初中物理考试的单项选择题，请选出其中的正确答案。\n\n"
                                   "一杯水倒掉一半，剩下的水的密度____\nA. 变为一半\nB. 不变\nC. 变为两倍\nD. 无法判断\n答案：|B")
    assert text("mmlu", -1, 0).startswith("The following are multiple choice questions (with answers) about Elementary "
                                          "Mathematics.\n\nWhat is the remainder of 29 divided by 6?\nA. 4\n")


def test_a_shot_stands_before_the_question_with_its_right_answer():
    rows = examples("ocnli", split="train")
    record, _, _ = TASKS["ocnli"].render(examples("ocnli")[0], tuple(rows[:2]))
    assert record.prompt == ("奶奶每天傍晚都到河边散步?Yes，奶奶每天都出门\n奶奶每天傍晚都到河边散步?Maybe，奶奶养了一只狗\n"
                             "小李一早就去车站接他的姐姐了?")
    record, _, _ = TASKS["mmlu"].render(examples("mmlu")[0], tuple(examples("mmlu", split="dev")[:1]))
    intro, shot, question = record.prompt.split("\n\n")
    assert intro.endswith("about World Religions.") and shot.endswith("Answer：B")
    assert question.startswith("The Dao De Jing")
    record, _, _ = TASKS["cmrc2018"].render(examples("cmrc2018")[0], tuple(examples("cmrc2018", split="train")[:1]))
    assert "问：书店二楼是什么？\n答：免费的阅览室\n\n阅读文章：" in record.prompt


def test_c3_questions_keep_their_own_number_of_choices(shared):
    """The 2023 kit grouped rows in fours, so that one question with two choices shifted all groups after it."""
    counts = [len(TASKS["c3"].render(e, ())[1]) for e in examples("c3", shared / "data/eval")]
    assert {n: counts.count(n) for n in set(counts)} == {2: 127, 3: 311, 4: 2215}   # one of 4 names a choice twice
    assert [len(e["choices"]) for e in examples("c3")] == [4, 3, 4, 2, 4, 4, 4, 3]


@pytest.mark.parametrize("answer, references, f1, em", [
    ("北京市", ("北京市",), 1.0, 1.0),
    ("北京市", ("北京",), 0.8, 0.0),                  # run of 2; precision 2/3, recall 1
    ("北，京。", ("北京",), 1.0, 1.0),                # marks do not count
    ("京北", ("北京",), 0.5, 0.0),                    # a run, not a bag of characters
    ("上海", ("北京", "上海市"), 0.8, 0.0),           # the best reference
    ("", ("北京",), 0.0, 0.0),
    ("GPT-4 模型", ("gpt4",), 0.5, 0.0),              # units gpt4, 模, 型 against gpt4
    ("北京\n问：然后呢？", ("北京",), 1.0, 1.0),       # only the first line is the answer
])
def test_cmrc_scores_by_the_official_rules(answer, references, f1, em):
    assert score(answer, references) == {"f1": pytest.approx(f1), "em": em}


def test_cmrc_units_are_chinese_characters_and_words():
    assert units("在 New York，1,000 人(约3.5%)") == ["在", "new", "york1,000", "人", "(", "约", "3.5", "%", ")"]


def test_exam_items_carry_subject_category_and_the_groups_that_cut_across():
    first = examples("ceval")[0]
    subject = "middle_school_physics"
    assert (first["id"], first["subject"], first["category"], first["groups"]) == (f"{subject}/0", subject, "STEM", ())
    groups = {e["subject"]: e["groups"] for e in examples("cmmlu")}
    assert groups == {"high_school_mathematics": (), "world_history": (), "chinese_food_culture": ("China specific",)}


def test_the_subjects_of_the_exams_are_those_of_their_authors(shared):
    counts = [Counter(exam.SUBJECTS.values()) for exam in (ceval, cmmlu, mmlu)]
    assert counts == [{"STEM": 20, "Social Science": 10, "Humanities": 11, "Other": 11},
                      {"STEM": 17, "Social Science": 22, "Humanities": 13, "Other": 15},
                      {"STEM": 19, "Social Sciences": 12, "Humanities": 13, "Other": 13}]
    for exam in (ceval, cmmlu, mmlu):
        assert {e["subject"] for e in examples(exam.TASK.name, shared / "data/eval")} == set(exam.SUBJECTS)
    hard = Counter(e["subject"] for e in examples("ceval", shared / "data/eval") if e["groups"] == ("hard",))
    assert set(hard) == set(ceval.HARD) and len(hard) == 8
    assert len(cmmlu.CHINA) == 15 and set(cmmlu.CHINA) < set(cmmlu.SUBJECTS)


def test_missing_files_say_which_layout_was_expected(tmp_path):
    for name in ROWS:
        with pytest.raises(FileNotFoundError, match=f"expected {name}/"):
            TASKS[name].load(tmp_path / name, TASKS[name].split)


@pytest.mark.parametrize("name, text, message", [
    ("ocnli", '{"sentence1": "a"', "line 1 is not JSON"),
    ("ocnli", '{"sentence1": "a"}', "lacks sentence2"),
    ("ocnli", '["a"]', "lacks sentence1, sentence2"),
    ("ocnli", '{"sentence1": "a", "sentence2": "b", "label": "yes"}', "label 'yes'; it must be one of entailment"),
    ("tnews", '{"label": "105", "sentence": "a"}', "label '105'"),
    ("c3", '{"a": 1}', "cannot be read"),
    ("c3", '[[["a"], [{"question": "q", "choice": ["x", "y"], "answer": "z"}], "1"]]', "none of the choices"),
    ("afqmc", '{"sentence1": "a", "sentence2": null}', "sentence2 is None; it must be a text"),
    ("iflytek", '{"label": 119, "sentence": "a"}', "label 119; it must be one of 0, 1,"),
    ("csl", '{"abst": "a", "keyword": "b", "label": "1"}', "keyword is 'b'; it must be a list of texts"),
    ("cluewsc2020", '{"text": "他来了"}', "target lacks span1_text"),
    ("cluewsc2020", '{"text": "她来了", "target": {"span1_text": "a", "span2_text": "她", "span2_index": 1}}', "not stand there"),
    ("chid", '{"content": "#idiom000001#", "candidates": ["a"]}', "content is .*; it must be a list of texts"),
    ("chid", '{"content": ["#idiom000001#", "#idiom000001#"], "candidates": ["a", "b"]}', "#idiom000001# stands there twice"),
    ("cmrc2018", '{"data": [{}]}', "expected cmrc2018/"),
    ("cmrc2018", '{"data": [{"paragraphs": [{"context": "a"}]}]}', "lacks qas"),
])
def test_bad_rows_are_named(tmp_path, name, text, message):
    (tmp_path / "dev.json").write_text(text + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        TASKS[name].load(tmp_path, "dev")


def test_bad_csv_files_are_named(tmp_path):
    def load(name, subject, text):
        folder = tmp_path / name / "dev"
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.iterdir():
            old.unlink()
        (folder / f"{subject}_dev.csv").write_bytes(text)
        return TASKS[name].load(tmp_path / name, "dev")
    for name, subject, text, message in [
            ("mmlu", "alchemy", b"q,1,2,3,4,A\n", "unknown subject 'alchemy'"),
            ("mmlu", "anatomy", b"q,1,2,3,A\n", "5 columns"),
            ("mmlu", "anatomy", b"q,1,2,3,4,E\n", "label 'E'"),
            ("mmlu", "anatomy", b"\xff\xfe,1,2,3,4,A\n", "not UTF-8"),
            ("ceval", "logic", b"id,question,A,B,C\n0,q,1,2,3\n", "lacks D")]:
        with pytest.raises(ValueError, match=message):
            load(name, subject, text)
    [example] = load("mmlu", "anatomy", 'q "x",1,"2\u2028\n2",3,4,A\n'.encode())
    assert example["options"] == ("1", "2\u2028\n2", "3", "4")


def test_rows_without_a_label_have_no_gold():
    assert [e["gold"] for e in examples("ceval", split="test")] == [None, None]
    assert examples("ocnli")[-1]["gold"] is None


@pytest.mark.parametrize("name, row", [
    ("ocnli", {"sentence1": "a", "sentence2": "b"}), ("cmnli", {"sentence1": "a", "sentence2": "b"}),
    ("afqmc", {"sentence1": "a", "sentence2": "b"}), ("csl", {"abst": "a", "keyword": ["b"]}), ("iflytek", {"sentence": "a"}),
    ("tnews", {"sentence": "a"}),
    ("cluewsc2020", {"text": "他来了", "target": {"span1_text": "a", "span2_text": "他", "span2_index": 0}})])
def test_a_label_that_is_missing_empty_or_a_dash_is_no_gold(tmp_path, name, row):
    rows = [row, row | {"label": None}, row | {"label": ""}, row | {"label": "-"}]
    (tmp_path / "test.json").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    assert [e["gold"] for e in TASKS[name].load(tmp_path, "test")] == [None] * 4


def test_an_unknown_task_offers_the_nearest_names():
    with pytest.raises(ValueError, match="'oncli' is unknown; did you mean ocnli"):
        find_tasks(["oncli"])
    with pytest.raises(ValueError, match="tasks is empty"):
        find_tasks([])


def test_a_task_checks_how_it_is_scored():
    with pytest.raises(ValueError, match="must be choices, letters or generation"):
        Task("mine", None, None, "ppl")
    with pytest.raises(ValueError, match="metric and max_new_tokens"):
        Task("mine", None, None, "generation")


def test_tasks_need_no_torch():
    code = "import sys, rlhfkit.tasks; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_samples_are_json_lines_of_the_published_keys():
    row = json.loads((samples.EVAL / "tnews/dev.json").read_text(encoding="utf-8").splitlines()[0])
    assert list(row) == ["label", "label_desc", "sentence", "keywords"]
