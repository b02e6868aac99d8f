"""plots.py and plots_rl.py draw to a file without a missing glyph, and say what they drew."""
import random
import sys
import warnings
from types import SimpleNamespace

import matplotlib.pyplot as plt
import pandas
import pytest

from rlhfkit import plots, plots_rl
from rlhfkit.memory import Estimate
from rlhfkit.records import Answer, Record


@pytest.fixture
def drawn(tmp_path):
    """Saves the open figure, every warning an error (a missing glyph is one), and gives it back."""
    def save():
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            plt.gcf().savefig(tmp_path / "figure.png")
        assert (tmp_path / "figure.png").stat().st_size > 5000
        return plt.gcf()
    yield save
    plt.close("all")


def result(stage="ppo", steps=40):
    history = []
    for step in range(1, steps + 1):
        history.append(dict(step=step, loss=2 - step / 40, score=step / 40, kl=step / 10, length=20, accuracy=0.7))
        if step % 10 == 0:
            history.append(dict(step=step, eval_score=step / 50, eval_gold=0.3 + step / 100, eval_loss=1.9))
    return SimpleNamespace(stage=stage, history=history, metrics={})


def table(shift=0.0):
    rows = [("ocnli", "accuracy", 0.36, 1 / 3), ("tnews 新闻", "accuracy", 0.2, 1 / 15), ("cmrc2018", "em", 0.1, 0.0),
            ("cmrc2018", "f1", 0.3, 0.0), ("ceval", "accuracy", 0.31, 0.25), ("ceval/STEM", "accuracy", 0.28, 0.25)]
    return pandas.DataFrame([dict(task=task, metric=metric, score=score + shift, low=score + shift - 0.06,
                                  high=score + shift + 0.06, examples=100, chance=chance, seconds=1.0)
                             for task, metric, score, chance in rows])


def estimate(room=80.0):
    parts = {"weights": 14.7, "gradients": 9.8, "optimizer": 19.6, "activations": 30.1, "fragmentation": 4.0}
    return Estimate(sum(parts.values()) < room, parts, sum(parts.values()), 12.8, room, None, "")


def test_ppo_shows_score_gold_kl_and_length_with_chinese_labels(drawn):
    assert plots.plot_history(result(), title="对联：得分从 0.40 升到 0.70，“奖励”也升；−1") is None
    figure = drawn()
    labels = [ax.get_ylabel() for ax in figure.axes]
    assert labels == ["reward score", "gold score", "KL (nats an answer)", "length (tokens)"]
    assert {ax.get_xlabel() for ax in figure.axes} == {"step"}
    assert tuple(figure.get_size_inches()) == (6.4, 3.0) and figure.dpi == 100


def test_training_is_a_line_and_its_held_out_twin_are_dots_at_their_own_steps(drawn):
    plots.plot_history(result("sft"), "loss")
    line, dots = drawn().axes[0].lines
    assert len(line.get_xdata()) == 40 and line.get_marker() == "None"
    assert list(dots.get_xdata()) == [10, 20, 30, 40] and dots.get_marker() == "o"


def test_a_figure_that_only_the_held_out_rows_have_is_drawn_by_either_name(drawn):
    plots.plot_history(result(), "gold", "eval_gold")
    assert [len(ax.lines) for ax in drawn().axes] == [1, 1]


def test_a_name_that_the_history_lacks_is_an_error_that_lists_those_it_has():
    with pytest.raises(ValueError, match="no entropie; it has: accuracy, gold, kl"):
        plots.plot_history(result(), "score", "entropie")


def test_margins_state_the_share_above_zero_and_no_bar_holds_both_sides(drawn):
    generator = random.Random(0)
    plots.plot_margins([1.0, 2.0, -0.5, 0.25] + [abs(generator.gauss(0, 1)) for _ in range(96)], title="奖励模型")
    figure = drawn()
    assert "奖励模型 (99% of 100 pairs above 0)" == figure.get_suptitle()
    edges = [bar.get_x() for bar in figure.axes[0].patches]
    assert min(abs(edge) for edge in edges) < 1e-9
    assert sum(bar.get_height() for bar in figure.axes[0].patches) == 100


def test_margins_come_from_a_result_too_and_none_is_an_error(drawn):
    plots.plot_margins(SimpleNamespace(metrics={"margins": [0.5, -0.5]}))
    assert drawn().get_suptitle() == "50% of 2 pairs above 0"
    with pytest.raises(ValueError, match="no margins"):
        plots.plot_margins(result("reward"))


def test_scores_of_several_models_stand_side_by_side_with_interval_and_chance(drawn):
    plots.plot_scores(table(), table(0.1), labels=["微调之前", "微调之后"], title="两个模型")
    figure = drawn()
    ax = figure.axes[0]
    rows = [label.get_text() for label in ax.get_yticklabels()]
    assert rows == ["ocnli", "tnews 新闻", "cmrc2018 em", "cmrc2018 f1", "ceval"]
    assert len(ax.patches) == 10
    assert {text.get_text() for text in figure.legends[0].get_texts()} == {"微调之前", "微调之后", "chance"}


def test_a_table_of_subjects_alone_is_drawn(drawn):
    plots.plot_scores(table().tail(1))
    assert [label.get_text() for label in drawn().axes[0].get_yticklabels()] == ["ceval/STEM"]


def test_memory_stacks_the_parts_to_the_sum_beside_the_gpu(drawn):
    plots.plot_memory(estimate(), estimate(), labels=["原设置", "检查点"], title="放得下")
    ax = drawn().axes[0]
    assert max(bar.get_x() + bar.get_width() for bar in ax.patches) == pytest.approx(estimate().gpu_gib)
    assert ax.lines[0].get_xdata()[0] == 80


def test_a_sweep_shows_memory_and_speed_and_says_which_row_failed(drawn):
    sweep = pandas.DataFrame(dict(batch_size=[1, 2, 4], zero_stage=[2, 2, 2], tokens_per_second=[100.0, 190.0, None],
                                  memory_gib=[1.0, 1.4, None]))
    plots.plot_memory(sweep, title="批量")
    left, right = drawn().axes
    assert left.get_ylabel() == "batch_size" and [t.get_text() for t in left.get_yticklabels()] == ["1", "2", "4"]
    assert [ax.texts[0].get_text().strip() for ax in (left, right)] == ["failed", "failed"]


def test_without_the_font_package_a_figure_is_drawn_and_one_warning_names_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "paperang_p2_fonts_cjk", None)
    plots._chinese_font.cache_clear()
    with pytest.warns(UserWarning, match="pip install paperang-p2-fonts-cjk") as caught:
        plots.plot_history(result("sft"))
        plots.plot_history(result("sft"))
    assert len(caught) == 1
    plots._chinese_font.cache_clear()
    plt.close("all")


def test_the_share_of_rows_that_each_length_cuts_stands_beside_its_line(drawn):
    plots.plot_lengths({"对联": [10, 20, 600], "诗": [3000]})
    axis = drawn().axes[0]
    assert [text.get_text().strip() for text in axis.texts] == ["512: 50.0% cut", "1024: 25.0% cut", "2048: 25.0% cut"]
    with pytest.raises(ValueError, match="there are no lengths"):
        plots.plot_lengths({"对联": []})


def test_only_what_carries_a_loss_is_coloured_in_a_row(drawn):
    words = {1: "问", 2: "题", 3: "答", 4: "x"}
    tokenizer = SimpleNamespace(decode=lambda ids: "".join(words[i] for i in ids))
    plots.plot_rows([dict(input_ids=[1, 2, 3, 4], labels=[-100, -100, 3, 4])] * 20, tokenizer, "行")
    texts = drawn().axes[0].texts[:4]
    assert [(text.get_text(), text.get_color() == plots.COLOURS[1]) for text in texts] == [
        ("问", False), ("题", False), ("答", True), ("x", True)]
    assert [text.get_position()[0] for text in texts] == [0, 2, 4, 6]           # a Chinese character is as wide as two others


def test_shares_of_answers_and_scores_sum_to_one_for_each_source(drawn):
    records = [Record("问", tuple(Answer(f"答{i}", score) for i, score in enumerate(scores)), source=source)
               for source, scores in (("a", (1, 0)), ("a", (1,)), ("微博", (1200, 30, 2, -1)), ("c", ()))]
    plots.plot_answers(records)
    left, right = drawn().axes
    assert sum(bar.get_height() for bars in left.containers for bar in bars) == pytest.approx(3)
    assert len(right.patches) == 3


def rolled(tokens=3, **changes):
    values = dict(ids=list(range(1, tokens + 1)), values=[1.0, 2.0, 3.0], kl=[0.5, -0.25, 0.0], advantages=[-1.0, 0.001, -0.001])
    return dict(step=7, prompt="问", score=-1.5, finished=1.0) | {
        name: (value * tokens)[:tokens] for name, value in values.items()} | changes


def words(special=""):
    names = {1: "朝霞", 2: "\n", 3: special}
    return SimpleNamespace(decode=lambda ids: names.get(ids[0], "字"), convert_ids_to_tokens=lambda token: f"<{token}>")


def hue(box):
    red, _, blue, _ = box.get_facecolor()
    return "white" if abs(red - blue) < 0.01 else "blue" if blue > red else "orange"


def test_a_rollout_shows_each_token_with_its_value_kl_and_advantage_as_number_and_colour(drawn):
    plots_rl.plot_rollout(rolled(), words())
    figure = drawn()
    ax = figure.axes[0]
    assert figure.get_suptitle() == "step 7: score -1.50, ended by itself"
    assert [t.get_text() for t in ax.texts] == ["朝霞", "⏎", "<3>", "1.00", "2.00", "3.00", "0.50", "−0.25", "0.00", "−1.00", "0.00", "0.00"]
    assert [hue(box) for box in ax.patches][:7] == ["orange", "white", "blue", "blue", "orange", "white", "orange"]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["value (score)", "KL (nats)", "advantage"]


def test_a_long_rollout_without_a_critic_goes_on_in_the_next_line_without_values(drawn):
    plots_rl.plot_rollout(rolled(14, values=None, finished=0.0), words(), width=6)
    ax = drawn().axes[0]
    assert drawn().get_suptitle().endswith("cut by length")
    assert [label.get_text() for label in ax.get_yticklabels()] == ["KL (nats)", "advantage"] * 3
    assert len(ax.patches) == 28 and max(box.get_x() for box in ax.patches) < 6
    with pytest.raises(ValueError, match="'问' has no tokens"):
        plots_rl.plot_rollout(rolled(0), words())


def test_phases_are_stacked_to_the_seconds_of_a_step_with_their_shares_as_title(drawn):
    rows = [dict(step=step, seconds_rollout=2.0, seconds_scoring=1.0, seconds_update=1.0) for step in (2, 4)]
    plots_rl.plot_phases(SimpleNamespace(history=[dict(step=0, eval_score=1.0), *rows]))
    figure = drawn()
    assert figure.get_suptitle() == "4 s a step: sampling 50%, scoring 25%, update 25%"
    assert [max(area.get_paths()[0].vertices[:, 1]) for area in figure.axes[0].collections] == [2.0, 3.0, 4.0]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["update", "scoring", "sampling"]     # as they are stacked
    with pytest.raises(ValueError, match="no seconds_rollout"):
        plots_rl.plot_phases(result("sft"))


def test_an_ablation_fills_only_the_points_whose_interval_leaves_zero_out(drawn):
    rows = [("full", [0.0, 0.0, 0.0], 1.0), ("no KL", [-0.05, -0.08, -0.02], 9.0), ("RLOO", [0.01, -0.02, 0.04], 0.7)]
    plots_rl.plot_ablation(dict(seeds=[0, 1, 2], rows=[dict(variant=name, difference=difference, kl=kl) for name, difference, kl in rows]))
    figure = drawn()
    left, right = figure.axes
    assert figure.get_suptitle() == "1 of 2 differ from the full recipe by more than chance, 3 seeds"
    assert [label.get_text() for label in left.get_yticklabels()] == ["full", "no KL", "RLOO"]
    assert [line.get_markerfacecolor() != "white" for line in left.lines[1:6:2]] == [False, True, False]
    assert list(left.lines[2].get_xdata()) == [-0.08, -0.02]
    assert [line.get_xdata()[0] for line in right.lines[1::2]] == [1.0, 9.0, 0.7]
