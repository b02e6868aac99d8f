"""What PPO has beside its loop, each by what it changes and by what it must not change."""
import shutil
from dataclasses import replace

import pytest
import torch
from test_ppo_proofs import family, moved, ppo, short_couplets, trainer_of, weights  # noqa: F401  a fixture

import rlhfkit as rk
from rlhfkit.models.value import load_reward_model
from rlhfkit.rollout import rollouts


@pytest.fixture
def pangu(family):  # noqa: F811
    return family("pangu")


def ran(config):
    """(trainer after its run, the rows of its steps)."""
    trainer = trainer_of(config)
    return trainer, [row for row in trainer.train().history if "score" in row]


def scores_of(path, row):
    """The score of a kept answer by the reward model of a folder alone."""
    with torch.no_grad():
        return float(load_reward_model(path)(torch.tensor([row["prompt_ids"] + row["ids"]]))[0, -1])


def test_kept_answers_have_all_their_figures(pangu, tmp_path):
    _, steps = ran(ppo(pangu, tmp_path / "run", keep_rollouts=True))
    kept = list(rollouts(tmp_path / "run"))
    for row in kept:
        assert set(row) == {"step", "id", "prompt", "answer", "prompt_ids", "ids", "logps", "ref_logps", "score", "finished", "kl", "values",
                            "advantages"}
        assert {len(row[name]) for name in ("logps", "ref_logps", "kl", "values", "advantages")} == {len(row["ids"])}
        assert row["kl"] == pytest.approx([a - b for a, b in zip(row["logps"], row["ref_logps"])], abs=1e-6)
    for step in steps:
        mine = [row for row in kept if row["step"] == step["step"]]
        assert len(mine) == 6 and sum(sum(row["kl"]) for row in mine) / 6 == pytest.approx(step["kl"], abs=1e-6)
        assert sum(row["score"] for row in mine) / 6 == pytest.approx(step["score"], abs=1e-6)
    assert any(step["kl"] for step in steps)


def test_rows_mixed_in_change_the_actor_by_a_mean_over_their_tokens_in_the_same_step(pangu, tmp_path):
    """P17: InstructGPT's third term; the optimiser steps once an update, not twice."""
    mixed = dict(ptx_path=pangu.data, ptx_coefficient=0.5, ptx_batch_size=16)               # all 16 rows at once
    plain, _ = ran(ppo(pangu, tmp_path / "plain", max_steps=1, mini_batch_size=3))
    ours, (row,) = ran(ppo(pangu, tmp_path / "mixed", max_steps=1, mini_batch_size=3, **mixed))
    assert moved(weights(plain.actor.model), ours.actor.model) > 1e-4
    assert {int(state["step"]) for state in ours.actor.optimizer.state.values()} == {2} and row["updates"] == 2
    one, (first,) = ran(ppo(pangu, tmp_path / "first", max_steps=1, **mixed))
    model, total, count = rk.load_model(pangu.policy), 0.0, 0
    for each in one.ptx:
        logps = model(input_ids=torch.tensor([each["input_ids"]])).logits[0].log_softmax(-1)
        for t, label in enumerate(each["labels"][1:]):
            total, count = (total - float(logps[t, label].detach()), count + 1) if label != -100 else (total, count)
    assert first["ptx_loss"] == pytest.approx(total / count, abs=1e-5)
    _, (text,) = ran(ppo(pangu, tmp_path / "text", max_steps=1, ptx_rows="pretrain", **mixed))
    assert text["ptx_loss"] > 0 and text["ptx_loss"] != first["ptx_loss"]


@pytest.mark.parametrize("more", [{}, dict(lora_rank=4)], ids=["all weights", "LoRA"])
def test_the_average_of_the_actor_is_a_folder_of_its_own(more, pangu, tmp_path):
    """P18: of one update it is a tenth of the way; under LoRA adapters are averaged, then merged."""
    start = weights(rk.load_model(pangu.policy))
    trainer, _ = ran(ppo(pangu, tmp_path / "run", max_steps=1, ema_decay=0.9, **more))
    last, average = (weights(rk.load_model(tmp_path / "run" / name)) for name in ("", "ema"))
    assert any(not torch.equal(last[key], average[key]) for key in last) and any(not torch.equal(start[key], last[key]) for key in last)
    if not more:
        for key in last:
            torch.testing.assert_close(average[key], 0.9 * start[key] + 0.1 * last[key], atol=1e-7, rtol=0)


def test_under_lora_reference_and_reward_model_are_actor_and_critic_without_their_adapters(pangu, tmp_path):
    trainer, steps = ran(ppo(pangu, tmp_path / "run", max_steps=3, lora_rank=4, learning_rate=5e-3, keep_rollouts=True))
    reference, late = rk.load_model(pangu.policy), [row for row in rollouts(tmp_path / "run") if row["step"] == 3]
    for row in late:
        assert row["score"] == pytest.approx(scores_of(pangu.reward, row), abs=1e-5)
        logits = reference(input_ids=torch.tensor([row["prompt_ids"] + row["ids"]])).logits[0] / 0.7
        wanted = [float(logits[len(row["prompt_ids"]) + t - 1].log_softmax(0)[token].detach()) for t, token in enumerate(row["ids"])]
        assert row["ref_logps"] == pytest.approx(wanted, abs=1e-5)
    before = load_reward_model(pangu.reward)
    with torch.no_grad():
        values = [before(torch.tensor([row["prompt_ids"] + row["ids"]]))[0, len(row["prompt_ids"]) - 1:-1].tolist() for row in late]
    assert max(abs(a - b) for row, each in zip(late, values) for a, b in zip(row["values"], each)) > 1e-3        # the critic learns
    assert steps[-1]["kl_k3"] > 1e-3 and trainer.experience.reference.model is trainer.actor                     # and the actor


def test_models_that_wait_on_the_host_change_nothing(pangu, tmp_path):
    for critic in ("reward", "frozen"):
        device, host = (ran(ppo(pangu, tmp_path / f"{critic}-{place}", critic=critic, frozen_on=place))[0] for place in ("device", "host"))
        assert moved(weights(device.actor.model), host.actor.model) == 0


@pytest.mark.parametrize("rule", ["mean", "min", "spread"])
def test_several_reward_models_are_centred_and_combined_by_rule(rule, pangu, tmp_path):
    """On their means over the first answers; the population deviation of two is half of what they are apart."""
    _, steps = ran(ppo(pangu, tmp_path / "run", reward_path=pangu.rewards, ensemble=rule, keep_rollouts=True))
    kept = list(rollouts(tmp_path / "run"))
    pairs = [[scores_of(path, row) for path in pangu.rewards.split(",")] for row in kept]
    offsets = [sum(pair[i] for pair in pairs[:6]) / 6 for i in (0, 1)]
    for row, (one, two) in zip(kept, pairs):
        one, two = one - offsets[0], two - offsets[1]
        wanted = {"mean": (one + two) / 2, "min": min(one, two), "spread": (one + two) / 2 - abs(one - two) / 2}[rule]
        assert row["score"] == pytest.approx(wanted, abs=1e-5)
    for step, some in zip(steps, (pairs[:6], pairs[6:])):
        assert step["score_spread"] == pytest.approx(sum(abs(a - offsets[0] - b + offsets[1]) / 2 for a, b in some) / 6, abs=1e-5) != 0


def test_at_the_start_the_critic_alone_learns(pangu, tmp_path):
    """P19."""
    start = weights(rk.load_model(pangu.policy)), weights(load_reward_model(pangu.reward))
    trainer = trainer_of(ppo(pangu, tmp_path / "run", max_steps=3, critic_warmup_steps=2))
    for step in range(3):
        row = trainer.step(step)
        assert ("policy_loss" in row, moved(start[0], trainer.actor.model) > 0) == (step == 2, step == 2)
        assert moved(start[1], trainer.critic.model) > 1e-4 * (step + 1) and (step == 2 or row["kl"] == 0)
    assert row["first_ratio"] <= 1e-6


def test_updates_stop_where_the_policy_has_moved_far_enough(pangu, tmp_path):
    more = dict(max_steps=1, ppo_epochs=8, learning_rate=4e-4)
    (_, (free,)), (_, (held,)) = (ran(ppo(pangu, tmp_path / str(limit), max_update_kl=limit, **more)) for limit in (0.0, 5e-3))
    assert free["updates"] == 8 and 1 < held["updates"] < 8 and held["approx_kl"] < free["approx_kl"]


@pytest.mark.parametrize("more", [{}, dict(mini_batch_size=3, ppo_epochs=2)], ids=str)
def test_log_probs_of_the_sampler_serve_as_well_as_scored_ones(more, pangu, tmp_path):
    """P11: I2's tolerance; where there is one update they are not looked at but the ratio is 1 by itself."""
    (one, rows), (two, others) = (ran(ppo(pangu, tmp_path / str(rescore), rescore=rescore, **more)) for rescore in (True, False))
    for ours, theirs in zip(rows, others):
        for name in ("score", "kl", "policy_loss", "value_loss", "entropy", "first_ratio", "approx_kl"):
            assert ours[name] == pytest.approx(theirs[name], abs=1e-5), name
    apart = torch.cat([(p - q).flatten() for p, q in zip(weights(one.actor.model).values(), weights(two.actor.model).values())])
    assert float(apart.abs().mean()) < 1e-7 and float((apart.abs() > 1e-5).double().mean()) < 1e-4


@pytest.mark.parametrize("more", [{}, dict(lora_rank=4)], ids=["all weights", "LoRA"])
def test_gradient_checkpointing_changes_no_weight(more, pangu, tmp_path):
    plain, saving = (ran(ppo(pangu, tmp_path / str(on), gradient_checkpointing=on, keep_rollouts=True, **more))[0] for on in (False, True))
    start = weights(rk.load_model(pangu.policy))
    for ours, theirs in ((plain.actor, saving.actor), (plain.critic, saving.critic)):
        assert moved(weights(ours.model), theirs.model) < 1e-5
    assert list(rollouts(tmp_path / "False")) == list(rollouts(tmp_path / "True"))
    assert moved(start, rk.load_model(tmp_path / "True")) > 1e-4


def test_the_best_actor_by_a_named_figure_is_kept(pangu, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(pangu.data, data)
    rk.write_records(short_couplets(4), data / "dev.jsonl")
    result = rk.launch(replace(ppo(pangu, tmp_path / "run", max_steps=4, eval_steps=1, best_by="eval_score"), data_path=str(data)))
    held_out = [row["eval_score"] for row in result.history if "eval_score" in row]
    best = max(range(5), key=held_out.__getitem__)
    last, kept = (weights(rk.load_model(tmp_path / "run" / name)) for name in ("", "best"))
    assert len(held_out) == 5 and all(torch.equal(last[key], kept[key]) for key in last) is (best == 4)
    with pytest.raises(ValueError, match="best_by is 'eval_beauty'; this run has: eval_score, eval_length"):
        rk.launch(replace(ppo(pangu, tmp_path / "other", best_by="eval_beauty"), data_path=str(data)))
