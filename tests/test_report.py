"""Intervals, tests and comparisons by published or hand-worked numbers."""
import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from rlhfkit import evaluation
from rlhfkit.configs import Result
from rlhfkit.evaluation.metrics import detectable, macro_interval, mcnemar, mean_interval, paired_interval, wilson
from rlhfkit.families import load_model, load_tokenizer
from rlhfkit.models.value import RewardModel
from rlhfkit.records import Answer, Record
from rlhfkit.samples.couplets import gold


@pytest.mark.parametrize("successes, n, low, high", [
    (0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (5, 10, 0.2366, 0.7634), (81, 263, 0.2553, 0.3662)])  # Newcombe 1998
def test_wilson_intervals_are_the_published_ones(successes, n, low, high):
    assert wilson(successes, n) == pytest.approx((low, high), abs=5e-5)


def test_the_interval_of_a_mean_has_its_standard_error():
    assert mean_interval([0.0, 1.0] * 50) == pytest.approx((0.5 - 1.96 * 0.0502519, 0.5 + 1.96 * 0.0502519), abs=1e-5)
    assert mean_interval([0.0] * 10) == pytest.approx((0.0, 0.2775), abs=1e-4)       # all alike is no certainty


def test_mcnemar_is_the_exact_sign_test():
    assert mcnemar([1] * 8 + [-1] * 2 + [0] * 50) == pytest.approx(2 * (1 + 10 + 45) / 1024)
    assert mcnemar([0, 0]) == 1.0


def test_paired_intervals_are_seeded_and_cover_at_their_level():
    rng = np.random.default_rng(3)
    draws = [paired_interval(rng.normal(0.2, 1.0, 60), resamples=200) for _ in range(200)]
    assert 180 <= sum(low <= 0.2 <= high for low, high in draws) <= 199
    assert paired_interval([1, 2, 3, 9]) == paired_interval([1, 2, 3, 9])


def test_compare_takes_numbers_over_the_same_items():
    row = evaluation.compare([0.0, 0.5, 0.25, 0.0], [1.0, 0.5, 0.75, 0.5]).iloc[0]
    assert (row.a, row.b, row.difference, row.examples) == (0.1875, 0.6875, 0.5, 4)
    assert 0 < row.low < 0.5 < row.high <= 1 and row.p == pytest.approx(0.25)
    with pytest.raises(ValueError, match="2 and 3 numbers"):
        evaluation.compare([1, 2], [1, 2, 3])


def test_compare_takes_the_last_samples_and_the_figures_of_results(tmp_path):
    def result(name, golds, loss):
        rows = [dict(step=step, prompt=prompt, answer="x", gold=gold * step / 20)
                for step in (10, 20) for prompt, gold in zip("aabc", golds)]
        folder = tmp_path / name
        folder.mkdir()
        return Result("sft", {}, {"eval_loss": loss}, str(folder), [], rows).save()
    before, after = result("before", [0.2, 0.4, 0.0, 0.0], 2.0), result("after", [0.4, 0.6, 0.2, 0.2], 1.5)
    for table in (evaluation.compare(before, after), evaluation.compare(before.output_dir, after.output_dir)):
        rows = {r.metric: r for r in table.itertuples()}
        assert rows["gold"].difference == pytest.approx(0.2) and rows["gold"].examples == 4
        assert rows["gold"].low == pytest.approx(0.2) and rows["eval_loss"].difference == -0.5
        assert math.isnan(rows["eval_loss"].low)


def item(number, task="t", right=True, choices=("ab", "cd"), scoring="choices", gold=0, **more):
    scores = [-1.0 if (i == gold) == right else -2.0 for i in range(len(choices))]
    return {"task": task, "id": str(number), "choices": choices, "scores": scores, "scoring": scoring, "gold": gold,
            "seconds": 0.5, "chance": 1 / len(choices), "credit": {"accuracy": float(right)}, **more}


def test_the_interval_of_a_macro_average_weighs_subjects_alike():
    groups = [[0.0, 1.0] * 8, [1.0, 0.0] * 32]                      # variance 1/4 within, 78 degrees of freedom of 80
    half = 1.96 * math.sqrt(0.25 * 80 / 78 * (1 / 16 + 1 / 64)) / 2
    assert macro_interval(groups) == pytest.approx((0.5 - half, 0.5 + half), abs=1e-4)
    assert macro_interval([[1.0], [0.0]]) == mean_interval([1.0, 0.0])
    low, high = macro_interval([[1.0] * 5, [1.0] * 9])
    assert low < 0.5 and high == 1


def test_groups_macro_and_micro():
    items = [item(i, right=i == 0, subject="a" if i < 4 else "b", category="c", groups=("hard",) if i < 4 else ())
             for i in range(5)]
    table = evaluation.tabulate(items)
    assert table.task.tolist() == ["t", "t/macro", "t/c", "t/hard", "t/a", "t/b"]
    assert table.score.tolist() == [0.2, 0.125, 0.2, 0.25, 0.25, 0.0] and table.examples.tolist() == [5, 5, 5, 4, 4, 1]
    assert table.seconds.tolist()[:1] + table.seconds.tolist()[2:] == [2.5, 2.5, 2.0, 2.0, 0.5]


def test_a_score_inside_chance_is_marked():
    rows = {n: evaluation.tabulate([item(i, right=i % 10 < 7) for i in range(n)]).iloc[0] for n in (10, 200)}
    assert rows[10].verdict == "chance" and rows[10].low < 0.5 < rows[10].high
    assert rows[200].verdict == "" and rows[200].low > 0.5


def test_the_majority_class_is_shown_where_labels_are_the_same_for_all_items():
    labels = [(f"{i}：Yes，句{i}", f"{i}：No，句{i}") for i in range(4)]       # what all choices of an item share is no label
    table = evaluation.tabulate([item(i, choices=labels[i], gold=int(i == 3)) for i in range(4)])
    assert table.majority.tolist() == [0.75]
    own = evaluation.tabulate([item(i, choices=(f"甲{i}", f"乙{i}x")) for i in range(4)])
    assert own.majority.isna().all()
    letters = evaluation.tabulate([item(i, choices="ABCD", scoring="letters", gold=i % 2) for i in range(4)])
    assert letters.majority.tolist() == [0.5]
    generated = {"task": "g", "id": "0", "gold": ["x"], "answer": "x", "chance": 0.0, "credit": {"f1": 1.0, "em": 1.0}}
    assert evaluation.tabulate([generated]).majority.isna().all()


def test_length_normalisation_is_a_second_metric_by_name():
    """-6 for two characters is worse than -8 for four; a sum says the opposite. Letters are never normalised."""
    long = item(0, choices=("对的", "对不对吗")) | {"scores": [-6.0, -8.0], "gold": 1, "credit": {"accuracy": 0.0}}
    table = evaluation.tabulate([long, item(1, "s", scoring="letters", choices=("A", "BB")), item(2, "e")], normalised=True)
    assert table[["task", "metric", "score"]].values.tolist() == [
        ["t", "accuracy", 0], ["t", "accuracy_norm", 1], ["s", "accuracy", 1], ["e", "accuracy", 1]]
    assert table.attrs["credits"]["t"] == {"accuracy": {"0": 0.0}, "accuracy_norm": {"0": 1.0}}
    assert evaluation.tabulate([long]).metric.tolist() == ["accuracy"]


def test_the_smallest_detectable_difference_is_found_in_four_of_five_draws():
    rng = np.random.default_rng(0)
    assert detectable([1.0, -1.0] * 50) == pytest.approx(2.8016 * math.sqrt(100 / 99) / 10, rel=1e-4)
    smallest = detectable(rng.normal(0, 1, 400))
    draws = rng.normal(smallest, 1, (2000, 400))
    found = np.abs(draws.mean(1)) / (draws.std(1, ddof=1) / 20) > 1.96
    assert 0.76 < found.mean() < 0.84
    assert math.isnan(detectable([0.0] * 9)) and math.isnan(detectable([0.3]))
    assert evaluation.compare([0.0, 1.0, 0.0], [1.0, 1.0, 1.0]).detectable.item() == detectable([1.0, 0.0, 1.0])


def test_a_win_rate_counts_ties_half_and_an_empty_answer_as_lost():
    records = [Record(p, prefix="下联：") for p in ("上联：晚风", "上联：秋月", "上联：晚风", "上联：秋月")]
    row = evaluation.win_rate(records, ["", "春风", " ", ""], ["细雨", "", "", "春风"], gold).iloc[0]
    assert (row.wins, row.ties, row.losses, row.examples) == (2, 1, 1, 4) and row.win_rate == 0.625
    assert (row.low, row.high) == wilson(2.5, 4) and row.p == 1.0
    with pytest.raises(ValueError, match="2 records, 1 and 2 answers; give one answer"):
        evaluation.win_rate(records[:2], ["a"], ["a", "b"], gold)


def test_a_reward_model_can_be_the_judge(tmp_path, tiny_path):
    RewardModel.from_causal(load_model(tiny_path)).save_pretrained(tmp_path)
    load_tokenizer(tiny_path).save_pretrained(tmp_path)
    records, a, b = [Record("上联：晚风"), Record("上联：秋月")], ["细雨", "春风"], ["晨露润花", ""]
    [[x, y]] = evaluation.score(tmp_path, [replace(records[0], answers=(Answer("细雨", 0), Answer("晨露润花", 0)))])
    row = evaluation.win_rate(records, a, b, str(tmp_path)).iloc[0]
    assert row.losses == 1 + (y < x) and row.wins == (y > x)
