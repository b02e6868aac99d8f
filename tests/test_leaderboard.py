"""The published tables with ours beside them, samples side by side, and the page."""
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest

from rlhfkit import evaluation
from rlhfkit.configs import Result
from rlhfkit.evaluation.leaderboard import TABLES


class Letters:
    """Answers A or its own label; the right one for 3 of 4 rows at most."""

    def loglikelihoods(self, requests):
        return [-1.0 if text.startswith(("A", "Maybe", "故事")) else -2.0 for _, text in requests]

    def generate(self, prompts, max_new_tokens):
        return ["四年"] * len(prompts)


@pytest.fixture
def ours(tmp_path):
    folder = tmp_path / "my-model"
    tasks = ["ceval", "mmlu", "ocnli", "cmrc2018", "couplets"]
    return folder, evaluation.evaluate(Letters(), tasks, limit=20, shots=1, output_dir=folder)


def test_the_published_tables_are_as_printed_and_say_what_is_noise():
    clue = evaluation.leaderboard(name="clue")
    assert len(clue) == 80 and set(clue.source) == {"published 2023"} and clue.note.str.len().min() > 20
    noise = clue[clue.note.str.startswith("noise: ")]
    assert set(clue.task) - set(noise.task) == {"CMRC2018"} and noise.note.str.contains("softmax twice").all()
    ceval, mmlu = evaluation.leaderboard(name="ceval"), evaluation.leaderboard(name="mmlu")
    assert len(ceval) == len(mmlu) == 18 and ceval.average.is_monotonic_decreasing
    assert mmlu.set_index("model").note["LLaMA-7B"] != mmlu.note[0]
    published = pd.read_csv(TABLES / "ceval.csv")
    pd.testing.assert_frame_equal(ceval[published.columns], published)


def test_our_rows_have_the_published_form(ours):
    folder, table = ours
    clue = evaluation.leaderboard(folder, name="clue")
    mine = clue[clue.source == "this kit"].set_index("task")
    assert list(clue.columns) == ["task", "method", "metric", "shots", "model", "score", "source", "note"]
    assert mine.index.tolist() == ["OCNLI", "CMRC2018"] and set(mine.model) == {"my-model"} and set(mine.shots) == {"one"}
    assert mine.metric.tolist() == ["acc", "f1"] and mine.method.tolist() == ["log-likelihood", "generation"]
    total = table[(table.task == "ocnli") & (table.metric == "accuracy")].iloc[0]
    assert mine.score["OCNLI"] == total.score and mine.note["OCNLI"].startswith(f"dev, {total.examples} items, 95 % interval 0.")
    assert clue.task.tolist() == sorted(clue.task, key=list(dict.fromkeys(clue.task)).index)        # ours stand with theirs
    for name in ("ceval", "mmlu"):
        board = evaluation.leaderboard(folder, name=name)
        [row] = board[board.source == "this kit"].itertuples()
        rows = table.set_index("task").score
        assert row.average == pytest.approx(100 * rows[f"{name}/macro" if name == "ceval" else name])
        assert row.stem == pytest.approx(100 * rows[f"{name}/STEM"]) and "1-shot" in row.note and "subjects" in row.note
        assert board.average.is_monotonic_decreasing and len(board) == 19


def test_c_evals_averages_are_of_subjects_and_mmlus_of_items(tmp_path):
    def item(task, subject, right, groups=()):
        return {"task": task, "id": subject, "subject": subject, "category": "STEM", "groups": groups, "split": "val", "shots": 5,
                "scoring": "letters", "gold": 0, "choices": "AB", "scores": [right, 0.5], "chance": 0.5,
                "credit": {"accuracy": right}}
    for task in ("ceval", "mmlu"):
        rows = [item(task, "physics", right, ["hard"]) for right in (0.0, 0.0, 0.0, 1.0)] + [item(task, "biology", 1.0)]
        evaluation.log.save(tmp_path, rows, pd.DataFrame())
        [row] = evaluation.leaderboard(tmp_path, name=task).query("source == 'this kit'").itertuples()
        expected = 62.5 if task == "ceval" else 40.0
        assert row.average == row.stem == expected and np.isnan(row.humanities)
        assert task == "mmlu" or row.average_hard == 25.0


def test_a_folder_without_such_scores_and_an_unknown_table_are_refused(tmp_path):
    evaluation.evaluate(Letters(), "ceval", split="test", output_dir=tmp_path)
    with pytest.raises(ValueError, match="has no scored items of ceval"):
        evaluation.leaderboard(tmp_path, name="ceval")
    with pytest.raises(ValueError, match="name is 'cmmlu'; the published tables are"):
        evaluation.leaderboard(name="cmmlu")


def results(tmp_path):
    def result(name, answers):
        folder = tmp_path / name
        folder.mkdir()
        rows = [dict(step=step, prompt=p, answer=f"{a}{step}") for step in (0, 9) for p, a in answers]
        return Result("sft", {}, {}, str(folder), [], rows).save()
    return result("sft", [("p1", "<b>"), ("p1", "again"), ("p2", "b")]), result("ppo", [("p2", "c"), ("p3", "d")])


def test_samples_of_stages_stand_side_by_side(tmp_path):
    sft, ppo = results(tmp_path)
    table = evaluation.samples_table(sft, ppo.output_dir)
    assert table.values.tolist() == [["p1", "<b>9", ""], ["p2", "b9", "c9"], ["p3", "", "d9"]]
    assert table.columns.tolist() == ["prompt", "sft", "ppo"] and len(evaluation.samples_table(sft, ppo, n=2)) == 2
    with pytest.raises(ValueError, match="no samples"):
        evaluation.samples_table(Result("sft", {}, {}, "out"))


def test_the_page_is_one_escaped_file_without_scripts(tmp_path):
    long = "春" * 200
    samples = evaluation.samples_table(*results(tmp_path)).assign(more=f"<script>alert(1)</script>{long}")
    tables = {"CLUE & <others>": evaluation.leaderboard(), "samples": samples}
    path = evaluation.write_page(tmp_path / "new/board.html", tables, "a<b")
    text = (tmp_path / "new/board.html").read_text(encoding="utf-8")
    seen = []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attributes: seen.append(tag)
    parser.feed(text)
    assert {"table", "th", "td", "h2"} <= set(seen) and not {"script", "link", "img", "b"} & set(seen)
    assert seen.count("tr") == 81 + 4 and "CLUE &amp; &lt;others&gt;" in text and "&lt;script&gt;" in text and long in text
    assert path == str(tmp_path / "new/board.html") and [f.name for f in (tmp_path / "new").iterdir()] == ["board.html"]
