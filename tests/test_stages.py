"""Each stage on a tiny model: what it trains on, that it learns, and that it goes on where a kill left it."""
import math

import pytest
import torch

import rlhfkit as rk
from rlhfkit.configs import config_from
from rlhfkit.records import Answer, Record
from rlhfkit.samples.couplets import TONE, held_out
from rlhfkit.saving import newest_checkpoint
from rlhfkit.stages.reward import pair_margins, pair_weights

PAIRS = held_out(48)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    records = [Record(prompt=f"上联：{a}", prefix="下联：", answers=(Answer(b, 1), Answer(PAIRS[i - 1][1], 0), Answer("，", -1)), source="couplets")
               for i, (a, b) in enumerate(PAIRS)]
    rk.write_records(records[:40], folder / "train.jsonl")
    rk.write_records(records[40:], folder / "dev.jsonl")
    return str(folder)


def common(**more):
    return {**dict(max_length=48, batch_size=8, learning_rate=2e-3, logging_steps=1, report_to="none"), **more}


@pytest.fixture(scope="module")
def sft(tiny_path, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sft") / "run"
    return rk.launch(rk.SFT(tiny_path, data, folder, **common(max_steps=30, max_new_tokens=8)))


@pytest.fixture(scope="module")
def reward(sft, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("reward") / "run"
    return rk.launch(rk.Reward(sft.output_dir, data, folder, **common(max_steps=20)))


def ppo(sft, data, output_dir, **more):
    return rk.PPO(sft.output_dir, data, output_dir, **common(**{**dict(max_steps=3, max_new_tokens=6), **more}))


def test_pretraining_lowers_the_held_out_loss_and_saves_a_model_that_loads(tiny_path, data, tmp_path):
    result = rk.launch(rk.Pretrain(tiny_path, data, tmp_path / "run", **common(max_steps=20)))
    assert result.metrics["eval_loss"] < result.metrics["eval_loss_before"] - 0.5
    assert rk.family_of(result.output_dir).name == "pangu" and rk.load_model(result.output_dir) is not None


def test_sft_lowers_the_held_out_loss_and_judges_its_samples(sft):
    assert sft.metrics["eval_loss"] < sft.metrics["eval_loss_before"] - 0.5
    assert [s["step"] for s in sft.samples] == [0] * 4 + [30] * 4
    assert all(0 <= s["gold"] <= 1 for s in sft.samples)


def test_the_first_sft_loss_is_that_of_the_answer_tokens_alone(tiny_path, data, tmp_path):
    """The 2023 kit trained on the prompt too."""
    result = rk.launch(rk.SFT(tiny_path, data, tmp_path / "run", **common(max_steps=1, batch_size=40, samples=0)))
    model, tokenizer = rk.load_model(tiny_path), rk.load_tokenizer(tiny_path)
    total, count = 0.0, 0
    for record in rk.read_records(f"{data}/train.jsonl"):
        prompt, answer = rk.FAMILIES["pangu"].encode(tokenizer, record, record.answers[0].text)
        logps = model(input_ids=torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
        total -= sum(logps[len(prompt) - 1 + i, token].item() for i, token in enumerate(answer))
        count += len(answer)
    assert result.history[1]["loss"] == pytest.approx(total / count, abs=1e-4)


def test_the_reward_model_learns_the_order_of_held_out_answers(reward):
    assert reward.metrics["eval_loss"] < math.log(2) and reward.metrics["eval_accuracy"] > 0.6
    assert len(reward.metrics["margins"]) == 8 * 3


def test_pairs_of_a_prompt_weigh_as_one_whatever_their_number():
    values, scores = torch.tensor([3.0, 1.0, 0.0, 5.0, 4.0]), torch.tensor([2.0, 1.0, 0.0, 1.0, 0.0])
    margins, prompts = pair_margins(values, scores, torch.tensor([0, 0, 0, 1, 1]))
    assert margins.tolist() == [2.0, 3.0, 1.0, 1.0] and prompts.tolist() == [0, 0, 0, 1]
    assert pair_weights(prompts).tolist() == pytest.approx([1 / 3, 1 / 3, 1 / 3, 1])


def test_dpo_starts_at_ln_2_and_tells_held_out_pairs_apart(sft, data, tmp_path):
    result = rk.launch(rk.DPO(sft.output_dir, data, tmp_path / "run", **common(max_steps=10, samples=0, learning_rate=5e-4)))
    assert result.metrics["eval_loss_before"] == pytest.approx(math.log(2), abs=1e-6)
    assert result.metrics["eval_loss"] < math.log(2) and result.metrics["eval_accuracy"] > 0.6
    assert result.history[1]["loss"] == pytest.approx(math.log(2), abs=1e-5)        # the reference is the policy at step 1


@pytest.mark.parametrize("more", [
    dict(critic="reward"), dict(critic="actor"), dict(critic="frozen"), dict(critic="none", advantage="rloo", answers_per_prompt=2),
    dict(critic="none", advantage="grpo", answers_per_prompt=2, kl_in="loss"), dict(critic="reward", lora_rank=4, kl_target=1.0),
    dict(critic="reward", gradient_accumulation_steps=2, mini_batch_size=4, ppo_epochs=2)], ids=str)
def test_ppo_runs_to_its_end_with_a_first_ratio_of_one(more, sft, reward, data, tmp_path):
    """The 2023 loop never ended, and its policy-only mode added a float to None."""
    result = rk.launch(ppo(sft, data, tmp_path / "run", reward_path=reward.output_dir, **more))
    rows = [row for row in result.history if "score" in row]
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert all(row["first_ratio"] <= 1e-5 for row in rows)
    assert rows[0]["kl"] == pytest.approx(0, abs=1e-4)                  # the policy is the reference before the first update
    assert {"eval_score", "eval_gold"} <= set(result.history[0]) and rk.load_model(tmp_path / "run") is not None


def share_of_lexicon(prompts, answers):
    return [sum(c in TONE for c in answer) / max(len(answer), 1) for answer in answers]


def test_ppo_solves_a_task_with_a_known_optimum(tiny_path, data, tmp_path):
    """The reward is the share of characters that can end a couplet's word; it must rise far above what an untrained policy gets."""
    result = rk.launch(rk.PPO(tiny_path, data, tmp_path / "run", **common(
        batch_size=32, max_steps=30, max_new_tokens=4, critic="actor", learning_rate=3e-3, kl_coefficient=0.0, ppo_epochs=2, samples=0,
        unfinished_score=0.0, reward_function=f"{__name__}:share_of_lexicon")))
    scores = [row["score"] for row in result.history if "score" in row]
    assert scores[0] < 0.3 and sum(scores[-3:]) / 3 > 0.7


def test_a_reward_function_that_gives_too_few_scores_or_nan_is_named(sft, data, tmp_path, monkeypatch):
    import sys
    monkeypatch.setattr(sys.modules[__name__], "share_of_lexicon", lambda prompts, answers: [1.0])
    with pytest.raises(ValueError, match="gave 1 scores for 8 answers"):
        rk.launch(ppo(sft, data, tmp_path / "a", critic="actor", reward_function=f"{__name__}:share_of_lexicon"))
    monkeypatch.setattr(sys.modules[__name__], "share_of_lexicon", lambda prompts, answers: [math.nan] * len(answers))
    with pytest.raises(ValueError, match="scores must be finite"):
        rk.launch(ppo(sft, data, tmp_path / "b", critic="actor", reward_function=f"{__name__}:share_of_lexicon"))


def weights(path):
    return {k: v for k, v in rk.load_model(path).state_dict().items()}


def numbers(result):
    return [{k: v for k, v in row.items() if not k.startswith("seconds")} for row in result.history]


@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_a_run_that_goes_on_from_its_checkpoint_equals_one_that_was_never_stopped(stage, sft, reward, data, tmp_path, monkeypatch):
    def config(name):
        if stage == "ppo":
            return ppo(sft, data, tmp_path / name, reward_path=reward.output_dir, max_steps=4, save_steps=2, kl_target=1.0)
        return rk.SFT(sft.output_dir, data, tmp_path / name, **common(max_steps=4, save_steps=2, max_new_tokens=6))
    whole = rk.launch(config("whole"))
    with monkeypatch.context() as patch:                # killed in the third step: what is on disk is all that is left
        target = "rlhfkit.stages.ppo.PPOTrainer.step" if stage == "ppo" else "transformers.Trainer.training_step"
        module, _, name = target.rpartition(".")
        owner = pytest.importorskip(module.rpartition(".")[0])
        owner = getattr(owner, module.rpartition(".")[2])
        real, calls = getattr(owner, name), []

        def dying(*args, **kwargs):
            calls.append(1)
            if len(calls) == 3:
                raise KeyboardInterrupt
            return real(*args, **kwargs)
        patch.setattr(owner, name, dying)
        with pytest.raises(KeyboardInterrupt):
            rk.launch(config("stopped"))
    assert newest_checkpoint(tmp_path / "stopped", "state.pt" if stage == "ppo" else "trainer_state.json").name == "checkpoint-2"
    again = rk.launch(config("stopped"))
    assert numbers(again)[-3:] == numbers(whole)[-3:]
    ours, theirs = weights(tmp_path / "stopped"), weights(tmp_path / "whole")
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs)


def test_ppo_refuses_dropout_which_would_move_the_ratio(sft, data, tmp_path):
    with pytest.raises(ValueError, match="dropout is 0.1; PPO compares log-probs"):
        ppo(sft, data, tmp_path, critic="actor", reward_function="a:b", dropout=0.1)


def test_a_config_survives_the_way_to_the_workers(sft, data, tmp_path):
    config = ppo(sft, data, tmp_path, reward_function="package.module:score", critic="actor")
    assert config_from(config.to_dict()) == config
