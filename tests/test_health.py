"""health.py: a healthy run is quiet, each planted fault is found, and only that one."""
import math
import random
from types import SimpleNamespace

import pytest

from rlhfkit import health

CONFIGS = {
    "pretrain": dict(dtype="float32"), "sft": dict(dtype="float32"), "reward": dict(dtype="float32"),
    "dpo": dict(dtype="float32", beta=0.1),
    "ppo": dict(dtype="float32", max_new_tokens=64, kl_target=0.0, temperature=1.0),
}


def healthy(stage, seed=0, steps=30):
    """What a good run of a stage logs, with noise: everything moves the right way from start (x = 0) to end (x = 1)."""
    rng, history = random.Random(seed), []
    for step in range(1, steps + 1):
        x, noise = (step - 1) / (steps - 1), rng.gauss(0, 1)
        row = dict(step=step, learning_rate=1e-5, grad_norm=1.5 * math.exp(0.3 * noise), seconds=1.0)
        if stage in ("pretrain", "sft"):
            row.update(loss=3 - x + 0.05 * noise)
        if stage == "reward":
            row.update(loss=0.69 - 0.4 * x + 0.02 * noise, accuracy=min(1, 0.5 + 0.4 * x + 0.04 * noise), margin=x)
        if stage == "dpo":
            row.update({"loss": 0.69 - 0.3 * x, "logps/chosen": -40 - x + noise, "rewards/margins": x})
        if stage == "ppo":
            row.update(score=x + 0.1 * noise, kl=0.1 * abs(noise) * (1 - x) + 6 * x - 0.03,
                       entropy=2 - x + 0.05 * noise, length=20 + 4 * x + noise, finished=0.95,
                       first_ratio=2e-6, sampler_gap=1e-6, clip_fraction=0.1 + 0.02 * noise, explained_variance=-0.5 + x,
                       policy_loss=-0.01 * noise, value_loss=0.3 - 0.2 * x, score_std=1.5 - 0.5 * x,
                       score_spread=0.4 + 0.05 * noise,
                       repetition=0.05 + 0.02 * x, value_std=0.8, critic_grad_norm=2 * math.exp(0.3 * noise), loss_scale=65536.0)
        history.append(row)
        if step % 10 == 0:
            history.append(dict(step=step, eval_loss=0.5, eval_accuracy=0.8, eval_score=x, eval_gold=0.3 + 0.4 * x,
                                eval_score_gold=0.5 - 0.2 * x))
    return history


def planted(stage, **faults):
    """A healthy history in which each named figure is what its function makes of (step, value)."""
    history = healthy(stage)
    for row in history:
        for name, fault in faults.items():
            if name in row:
                row[name] = fault(row["step"], row[name])
    return history


def verdicts(stage, history, **config):
    table = health.doctor(SimpleNamespace(stage=stage, config={**CONFIGS[stage], **config}, history=history))
    return dict(zip(table["check"], table["verdict"]))


@pytest.mark.parametrize("stage", CONFIGS)
def test_healthy_runs_of_ten_seeds_stay_quiet_live_and_afterwards(stage):
    for seed in range(10):
        history = healthy(stage, seed)
        found = verdicts(stage, history)
        assert found and set(found.values()) == {"ok"}, (seed, found)
        for rows in range(1, len(history) + 1):
            assert health.warnings_at(history[:rows], {"stage": stage, **CONFIGS[stage]}) == [], (seed, rows)


FAULTS = [
    # check, stage, verdict, what is planted
    ("finite loss", "sft", "fail", dict(loss=lambda step, v: math.nan if step == 7 else v)),
    ("finite loss", "ppo", "fail", dict(value_loss=lambda step, v: math.inf if step == 7 else v)),
    ("gradient norm", "sft", "fail", dict(grad_norm=lambda step, v: math.nan if step == 7 else v)),
    ("gradient norm", "dpo", "warn", dict(grad_norm=lambda step, v: 30 * v if step > 25 else v)),
    ("gradient norm", "ppo", "fail", dict(grad_norm=lambda step, v: 1e4 * v if step > 25 else v)),
    ("loss falls", "sft", "warn", dict(loss=lambda step, v: 3.0 + 0.001 * step)),
    ("loss falls", "pretrain", "fail", dict(loss=lambda step, v: 3.0 + 0.1 * step)),
    ("loss below chance", "reward", "fail", dict(eval_loss=lambda step, v: 0.693)),
    ("accuracy above chance", "reward", "warn", dict(eval_accuracy=lambda step, v: 0.5)),
    ("accuracy above chance", "reward", "fail", dict(eval_accuracy=lambda step, v: 0.2)),
    ("chosen log-prob", "dpo", "warn", {"logps/chosen": lambda step, v: -40 - 0.4 * step}),
    ("chosen log-prob", "dpo", "fail", {"logps/chosen": lambda step, v: -40 - 4.0 * step}),
    ("first-step ratio", "ppo", "warn", dict(first_ratio=lambda step, v: 0.02 if step == 12 else v)),
    ("first-step ratio", "ppo", "fail", dict(first_ratio=lambda step, v: 0.5)),
    ("sampled against scored", "ppo", "warn", dict(sampler_gap=lambda step, v: 0.01 if step == 12 else v)),
    ("sampled against scored", "ppo", "fail", dict(sampler_gap=lambda step, v: 0.4)),
    ("KL not negative", "ppo", "fail", dict(kl=lambda step, v: -0.8)),
    ("KL bounded", "ppo", "warn", dict(kl=lambda step, v: 1.1 * step)),
    ("KL bounded", "ppo", "fail", dict(kl=lambda step, v: 2.3 * step)),
    ("entropy", "ppo", "warn", dict(entropy=lambda step, v: 2.0 * 0.9 ** step)),
    ("entropy", "ppo", "fail", dict(entropy=lambda step, v: 2.0 * 0.8 ** step)),
    ("end token", "ppo", "fail", dict(finished=lambda step, v: 0.0)),
    ("length", "ppo", "warn", dict(length=lambda step, v: 20.0 + step)),
    ("length", "ppo", "fail", dict(length=lambda step, v: min(20.0 + 3 * step, 64.0))),
    ("critic", "ppo", "warn", dict(explained_variance=lambda step, v: -0.2)),
    ("critic", "ppo", "fail", dict(explained_variance=lambda step, v: -1.5 * step)),
    ("critic", "ppo", "fail", dict(value_std=lambda step, v: 3.0 * step)),
    ("dead critic", "ppo", "fail", dict(value_std=lambda step, v: 0.0)),
    ("dead critic", "ppo", "fail", dict(critic_grad_norm=lambda step, v: 0.0)),
    ("repetition", "ppo", "warn", dict(repetition=lambda step, v: 0.01 * step)),
    ("repetition", "ppo", "fail", dict(repetition=lambda step, v: 0.02 * step)),
    ("scores differ", "ppo", "fail", dict(score_std=lambda step, v: 0.0)),
    ("reward model", "ppo", "warn", dict(eval_score_gold=lambda step, v: 0.02)),
    ("reward model", "ppo", "fail", dict(eval_score_gold=lambda step, v: -0.5)),
    ("ensemble", "ppo", "warn", dict(score_spread=lambda step, v: 0.4 + 0.005 * step)),
    ("ensemble", "ppo", "fail", dict(score_spread=lambda step, v: 0.1 * step)),
    ("loss scale", "ppo", "warn", dict(loss_scale=lambda step, v: 2.0 ** max(16 - step, 2))),
    ("loss scale", "ppo", "fail", dict(loss_scale=lambda step, v: 2.0 ** max(16 - step, 0))),
    ("gradient norm", "ppo", "fail", dict(critic_grad_norm=lambda step, v: math.inf if step == 12 else v)),
    ("clip fraction", "ppo", "warn", dict(clip_fraction=lambda step, v: 0.45)),
    ("clip fraction", "ppo", "fail", dict(clip_fraction=lambda step, v: 0.8)),
    ("score against gold", "ppo", "fail", dict(eval_gold=lambda step, v: {10: 0.7, 20: 0.5, 30: 0.2}[step])),
    ("score against held-out", "ppo", "warn", dict(eval_score=lambda step, v: {10: 2.0, 20: 1.8, 30: 1.1}[step])),
    ("score against held-out", "ppo", "fail", dict(eval_score=lambda step, v: {10: 2.0, 20: 1.0, 30: 0.1}[step])),
]


@pytest.mark.parametrize("check, stage, verdict, faults", FAULTS, ids=[f"{f[0]} {f[2]} {f[1]}" for f in FAULTS])
def test_a_planted_fault_is_found_and_nothing_else(check, stage, verdict, faults):
    found = verdicts(stage, planted(stage, **faults))
    assert {name: v for name, v in found.items() if v != "ok"} == {check: verdict}


@pytest.mark.parametrize("check, stage, verdict, faults", FAULTS, ids=[f"{f[0]} {f[2]} {f[1]}" for f in FAULTS])
def test_a_planted_fault_is_said_while_the_run_goes_on_and_not_at_every_step(check, stage, verdict, faults):
    history, config = planted(stage, **faults), {"stage": stage, **CONFIGS[stage]}
    lines = [line for rows in range(1, len(history) + 1) for line in health.warnings_at(history[:rows], config)]
    mine = [line for line in lines if line.startswith(f"{verdict}: {check}: ")]
    assert 1 <= len(mine) <= 3


def test_every_check_has_a_planted_fault():
    assert {check.name for check in health.CHECKS} == {fault[0] for fault in FAULTS}


def test_the_doctor_gives_evidence_cause_and_change_worst_first():
    history = planted("ppo", first_ratio=lambda step, v: 0.5 if step == 12 else v, clip_fraction=lambda step, v: 0.45)
    table = health.doctor(SimpleNamespace(stage="ppo", config=CONFIGS["ppo"], history=history))
    assert list(table.columns) == ["check", "verdict", "evidence", "cause", "change"]
    assert list(table["verdict"][:3]) == ["fail", "warn", "ok"]
    worst = table.iloc[0]
    assert "0.5 at step 12" in worst["evidence"] and "temperature" in worst["cause"] and "dropout=0.0" in worst["change"]
    assert not table[table["verdict"] == "ok"][["cause", "change"]].to_numpy().any()


def test_rounding_of_half_precision_is_not_a_fault():
    history = planted("ppo", first_ratio=lambda step, v: 0.05)
    assert verdicts("ppo", history, dtype="mixed")["first-step ratio"] == "ok"
    assert verdicts("ppo", history, dtype="float32")["first-step ratio"] == "warn"


def test_the_kl_of_a_short_answer_may_be_a_nat_a_token_and_of_a_long_one_fifty_unless_no_penalty_was_asked_for():
    long = dict(length=lambda step, v: 300.0, kl=lambda step, v: 60.0)
    assert verdicts("ppo", planted("ppo", **long))["KL bounded"] == "warn"
    assert verdicts("ppo", planted("ppo", **long), kl_coefficient=0.0)["KL bounded"] == "ok"
    assert verdicts("ppo", planted("ppo", kl=lambda step, v: 13.0), kl_target=4.0)["KL bounded"] == "warn"


def test_an_overflow_while_float16_seeks_its_loss_scale_is_no_divergence():
    history = planted("ppo", grad_norm=lambda step, v: math.inf if step in (1, 2) else v)
    assert verdicts("ppo", history, dtype="float16")["gradient norm"] == "ok"
    assert verdicts("ppo", history, dtype="float32")["gradient norm"] == "fail"


def test_scores_that_come_together_are_no_disagreement_of_the_reward_models():
    solved = planted("ppo", score_std=lambda step, v: 0.5 ** step, score_spread=lambda step, v: 0.4)
    assert verdicts("ppo", solved)["ensemble"] == "ok"
    assert "ensemble" not in verdicts("ppo", planted("ppo", score_spread=lambda step, v: 0.0))         # one reward model


def test_a_nan_is_said_by_one_check_and_not_by_all():
    history = healthy("ppo")
    for row in history[25:]:
        row.update({name: math.nan for name in row if name not in ("step", "grad_norm", "critic_grad_norm")})
    assert [name for name, verdict in verdicts("ppo", history).items() if verdict != "ok"] == ["finite loss"]


def test_live_warnings_look_at_a_few_rows_of_a_long_run_and_at_all_held_out_ones(monkeypatch):
    seen = []
    monkeypatch.setattr(health, "CHECKS", [health.Check("rows", ("ppo",), lambda rows, config: (
        seen.append([row["step"] for row in rows]), ("warn", ""))[1], "", "")])
    history = [dict(step=step, **({"eval_score": 0.0} if step % 1000 == 0 else {"score": 0.0})) for step in range(10_000)]
    assert len(health.warnings_at(history, {"stage": "ppo"})) == 0                  # it was said a row earlier
    assert seen[0] == [*range(10), *range(1000, 9001, 1000), *range(9900, 10_000)] and len(seen[1]) == 119


def test_a_score_that_rises_with_gold_or_falls_with_it_is_not_over_optimisation():
    both_fall = planted("ppo", eval_gold=lambda step, v: 1 - step / 40, eval_score=lambda step, v: -step)
    assert verdicts("ppo", both_fall)["score against gold"] == "ok"


def test_a_history_without_the_figures_gives_no_verdict():
    assert verdicts("ppo", []) == {}
    assert verdicts("ppo", [dict(step=1, seconds=2.0), dict(step=2, eval_score=0.1)]) == {}
    assert health.warnings_at([], {"stage": "sft"}) == []
