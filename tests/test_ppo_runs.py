"""Whole PPO runs: they go on where a kill left them, depend on the seed alone, solve a task of a known optimum, and are one on two processes."""
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from test_ppo_proofs import family, ppo, short_couplets, taught, trainer_of, weights  # noqa: F401  a fixture

import rlhfkit as rk
from rlhfkit.rollout import rollouts
from rlhfkit.stages.ppo import PPOTrainer


def test_the_adaptive_coefficient_follows_its_closed_form_through_a_kill(family, tmp_path, monkeypatch):  # noqa: F811
    """I17, P21: killed in the fourth step and gone on with from the checkpoint of the second; scores' moments and average come back too."""
    config = ppo(family("pangu"), tmp_path / "run", max_steps=6, save_steps=2, kl_target=0.3, kl_horizon=30, normalize_scores="running",
                 ema_decay=0.9)
    step, calls = PPOTrainer.step, []

    def dying(trainer, number):
        calls.append(number)
        if calls == [0, 1, 2, 3]:
            raise KeyboardInterrupt
        return step(trainer, number)
    monkeypatch.setattr(PPOTrainer, "step", dying)
    with pytest.raises(KeyboardInterrupt):
        rk.launch(config)
    rows = [row for row in rk.launch(config).history if "score" in row]
    assert calls == [0, 1, 2, 3, 2, 3, 4, 5] and [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    coefficient = config.kl_coefficient
    for row in rows:
        assert row["kl_coefficient"] == pytest.approx(coefficient, rel=1e-12)
        coefficient *= 1 + max(-0.2, min(0.2, row["kl"] / 0.3 - 1)) * 6 / 30
    straight = rk.launch(replace(config, output_dir=str(tmp_path / "straight")))
    for folder in ("", "ema"):
        ours, theirs = (weights(rk.load_model(tmp_path / name / folder)) for name in ("run", "straight"))
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert straight.history[-1]["kl_coefficient"] == rows[-1]["kl_coefficient"]


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(family, tmp_path):  # noqa: F811
    """I18."""
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        trainer_of(ppo(family("pangu"), tmp_path / name, seed=seed, keep_rollouts=True)).train()
    (a, b, c), (x, y, z) = [weights(rk.load_model(tmp_path / name)) for name in "abc"], [list(rollouts(tmp_path / name)) for name in "abc"]
    assert x == y and all(torch.equal(a[key], b[key]) for key in a)
    assert [row["ids"] for row in x] != [row["ids"] for row in z] and any(not torch.equal(a[key], c[key]) for key in a)


def right(prompts, answers):
    """A reward with a known optimum."""
    return [float(answer == "月") for answer in answers]


@pytest.fixture(scope="module")
def divided(family, tmp_path_factory):  # noqa: F811
    """A policy that begins its answers with one of eight characters, the right one of them."""
    found = SimpleNamespace(**vars(family("pangu")) | {"policy": str(tmp_path_factory.mktemp("divided") / "policy")})
    shutil.copytree(family("pangu").policy, found.policy)
    taught(found.policy, [replace(r, answers=(rk.Answer("花鸟春秋山水云月"[i % 8], 1),)) for i, r in enumerate(short_couplets(64))], steps=24)
    return found


@pytest.mark.parametrize("advantage", ["gae", "rloo", "grpo", "dr_grpo"])
@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 10))])
def test_a_task_with_one_right_token_is_solved(advantage, seed, divided, tmp_path):
    """I19: 20 steps of 32 answers, all cut by length; ten seeds of each where slow tests run. With a value behind the cut, 4 of 10 failed."""
    group = dict(critic="actor", batch_size=32) if advantage == "gae" else dict(critic="none", batch_size=8, answers_per_prompt=4)
    config = ppo(divided, tmp_path / "run", reward_path="", reward_function=f"{__name__}:right", advantage=advantage, seed=seed, max_steps=20,
                 max_new_tokens=1, learning_rate=2e-3, lr_scheduler_type="constant", ppo_epochs=2, kl_coefficient=0.02, unfinished_score=0.0,
                 temperature=1.0, **group)
    scores = [row["score"] for row in trainer_of(config).train().history if "score" in row]
    assert scores[0] < 0.4 and sum(scores[-3:]) / 3 > 0.95


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.device_count() == 1, reason="one GPU: two workers need two, or none")
@pytest.mark.parametrize("stage, more", [
    (0, {}), (1, {}), (2, {}), (3, {}), (2, dict(lora_rank=4)), (3, dict(gradient_checkpointing=True, gradient_accumulation_steps=2))], ids=str)
def test_two_processes_are_one_over_twenty_steps(stage, more, family, tmp_path):  # noqa: F811
    """I6 in float32: the same answers; figures apart by the rounding of sums taken in another order (losses 1e-6, KL 3e-6, weights 7e-9 in
    the mean; single biases of keys, which have no gradient, 6e-5)."""
    found = family("pangu")
    shutil.copytree(found.data, tmp_path / "data")
    rk.write_records(short_couplets(4), tmp_path / "data/dev.jsonl")
    common = dict(max_steps=20, learning_rate=1e-4, keep_rollouts=True, ppo_epochs=2, samples=2, ema_decay=0.9) | more
    one, two = (replace(ppo(found, tmp_path / name, **common | dict(batch_size=size, mini_batch_size=size // 2, zero_stage=at)),
                        data_path=str(tmp_path / "data")) for name, size, at in (("one", 8, 0), ("two", 4, stage)))
    one, two = rk.launch(one), rk.launch(two, num_processes=2)
    assert [row["ids"] for row in rollouts(tmp_path / "one")] == [row["ids"] for row in rollouts(tmp_path / "two")] and one.samples == two.samples
    apart = {name: max(abs(a[name] - b[name]) for a, b in zip(one.history, two.history, strict=True) if name in a)
             for name in ("score", "kl", "policy_loss", "value_loss", "entropy", "eval_score", "eval_kl", "grad_norm", "critic_grad_norm")}
    for folder in ("", "ema"):
        ours, theirs = (weights(rk.load_model(tmp_path / name / folder)) for name in ("one", "two"))
        residual = torch.cat([(ours[key] - theirs[key]).flatten() for key in ours])
        assert abs(float(residual.mean())) < 1e-8 and float(residual.abs().mean()) < 1e-7, folder
    print(stage, more, {name: f"{value:.0e}" for name, value in apart.items()}, f"{residual.abs().mean():.0e} {residual.abs().max():.0e}")
    assert max(value for name, value in apart.items() if not name.endswith("norm")) < 1e-5 and max(apart.values()) < 1e-3
