"""overoptimisation.py: the frontier, the rule that stops without gold, and what it is worth afterwards, on worked numbers."""
import math
from types import SimpleNamespace

import matplotlib.pyplot as plt
import pytest

from rlhfkit import plots_rl
from rlhfkit.overoptimisation import fit_gold, frontier, hindsight, stop_point


def run(scores, golds=None, kls=None, spreads=None):
    """A history with a held-out row every 10 steps; KL grows by a nat each time, unless given."""
    history, kls = [], kls or range(len(scores))
    for number, (score, kl) in enumerate(zip(scores, kls)):
        if number:
            history.append(dict(step=10 * number, score=score, kl=kl, **({"score_spread": spreads[number]} if spreads else {})))
        gold = {"eval_gold": golds[number]} if golds else {}
        history.append(dict(step=10 * number, eval_score=score, eval_kl=float(kl)) | gold)
    return history


def test_the_frontier_has_a_point_for_each_held_out_row_with_the_root_of_its_kl():
    points = frontier(run([1.0, 2.0, 3.0], golds=[0.5, 0.6, 0.4], kls=[0, 4, 9], spreads=[0, 0.3, 0.5]))
    assert [(p["step"], p["distance"], p["score"], p["gold"], p["spread"]) for p in points] == [
        (0, 0.0, 1.0, 0.5, None), (10, 2.0, 2.0, 0.6, 0.3), (20, 3.0, 3.0, 0.4, 0.5)]


def test_without_a_held_out_kl_that_of_the_newest_rollout_is_taken_and_a_negative_one_is_no_distance():
    history = [dict(step=0, eval_score=1.0), dict(step=1, kl=-0.01), dict(step=1, eval_score=1.1), dict(step=2, kl=4.0),
               dict(step=2, eval_score=1.2)]
    assert [p["distance"] for p in frontier(history)] == [0.0, 0.0, 2.0]


def test_a_run_that_gains_at_every_distance_is_not_stopped():
    assert stop_point(run([0, 1, 1.4, 1.7, 2.0, 2.2])) is None
    assert stop_point([]) is None and stop_point(run([0, 1])) is None


def test_it_is_stopped_before_the_held_out_score_falls():
    assert stop_point(run([0, 1, 1.5, 1.2, 2.0])) == 20


def test_it_is_stopped_when_distance_buys_nothing_but_not_when_it_stands_still():
    assert stop_point(run([0, 1, 2, 2.01, 2.02], kls=[0, 1, 4, 9, 16])) == 20       # a unit of distance gave 1 each, then 0.01
    assert stop_point(run([0, 1, 2, 2.01, 2.02], kls=[0, 1, 4, 4, 4])) is None


def test_it_is_stopped_before_the_reward_models_are_a_quarter_further_apart():
    assert stop_point(run([0, 1, 1.5, 1.9, 2.2], spreads=[None, 0.5, 0.6, 0.62, 0.63])) == 30


def test_gold_does_not_move_the_stop_and_rows_after_it_neither():
    scores = [0, 1, 1.5, 1.2, 2.0]
    for golds in ([0.1] * 5, [0.9, 0.1, 0.5, 0.7, 0.0]):
        assert [stop_point(run(scores[:n], golds=golds[:n])) for n in (4, 5)] == [20, 20]


def test_hindsight_says_what_share_of_the_gain_the_rule_kept():
    found = hindsight(run([0, 1, 1.5, 1.2, 2.0], golds=[0.5, 0.7, 0.66, 0.6, 0.3]))
    assert found == dict(best_step=10, best_gold=0.7, stopped_step=20, stopped_gold=0.66, share=pytest.approx(0.8))


def test_a_run_without_a_stop_is_judged_at_its_end_and_one_without_a_gain_by_whether_it_lost():
    assert hindsight(run([0, 1, 1.4], golds=[0.5, 0.7, 0.6])) == dict(
        best_step=10, best_gold=0.7, stopped_step=20, stopped_gold=0.6, share=pytest.approx(0.5))
    assert hindsight(run([0, 1, 1.4], golds=[0.5, 0.4, 0.3]))["share"] == 0.0
    assert hindsight(run([0, 1, 1.4], golds=[0.5, 0.5, 0.5]))["share"] == 1.0
    with pytest.raises(ValueError, match="1 held-out rows have a gold score; it takes two"):
        hindsight(run([0], golds=[0.5]))


def test_the_curve_of_gao_et_al_is_found_again_with_its_best_distance():
    alpha, beta = 0.6, 0.3                                  # best at exp(0.6 / 0.3 - 1) = e
    golds = [0.2] + [0.2 + d * (alpha - beta * math.log(d)) for d in (1, 2, 3, 4)]
    found = fit_gold(frontier(run([0] * 5, golds=golds, kls=[0, 1, 4, 9, 16])))
    assert found == pytest.approx((alpha, beta, math.e))
    assert fit_gold(frontier(run([0] * 3, golds=[0.0, 1.0, 3.0], kls=[0, 1, 4])))[2] == math.inf
    with pytest.raises(ValueError, match="a curve of two numbers needs two distances"):
        fit_gold(frontier(run([0] * 2, golds=[0.0, 1.0])))


@pytest.mark.parametrize("golds", [[0.7, 0.8, 0.78, 0.6, 0.4], None], ids=["with gold", "without"])
def test_the_frontier_is_drawn_with_the_best_gold_and_the_stop(golds, tmp_path):
    plots_rl.plot_frontier(SimpleNamespace(history=run([0, 1, 1.6, 1.5, 2.0], golds=golds, kls=[0, 1, 4, 9, 12])))
    figure = plt.gcf()
    figure.savefig(tmp_path / "figure.png")
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert "held-out score" in labels and "the rule stops" in labels and ("best gold" in labels) == bool(golds)
    assert not golds or figure.get_suptitle() == "stopped at step 20: gold 0.78, at best 0.80 at step 10"
    plt.close("all")


def test_a_run_without_held_out_rows_has_no_frontier():
    with pytest.raises(ValueError, match="the history has 0 held-out rows with eval_score; a line needs two"):
        plots_rl.plot_frontier(SimpleNamespace(history=[dict(step=1, score=0.5)]))
