"""Intervals, tests and comparisons by published or hand-worked numbers."""
import math

import numpy as np
import pandas as pd
import pytest

from rlhfkit import evaluation, samples
from rlhfkit.configs import Result
from rlhfkit.evaluation.metrics import mcnemar, mean_interval, paired_interval, wilson


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


def test_the_published_tables_are_kept_as_data():
    folder = samples.EVAL.parents[1] / "evaluation/tables"
    ceval, clue = pd.read_csv(folder / "ceval.csv"), pd.read_csv(folder / "clue.csv")
    assert len(ceval) == len(pd.read_csv(folder / "mmlu.csv")) == 18 and ceval.average.between(20, 100).all()
    assert len(clue) == 80 and clue.score.between(0, 1).all()
