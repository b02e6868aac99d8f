"""Every family through every stage: each learns something on tiny models, and the policy it leaves is a folder of its family."""
import pytest
import torch
from test_every_family import NAMES, family_paths  # noqa: F401  a fixture

import rlhfkit as rk
from rlhfkit.samples.couplets import held_out

CHARACTERS = "春风秋月明山水云"


def first_character(prompts, answers):
    """A reward that even a tiny model finds: answers that begin with a character of a short list."""
    return [10.0 * bool(answer and answer[0] in CHARACTERS) for answer in answers]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    lines = held_out(88)
    records = [rk.Record(f"上联：{a}", (rk.Answer(b, 1), rk.Answer(lines[i - 1][1] + "山", 0)), "下联：") for i, (a, b) in enumerate(lines)]
    rk.write_records(records[:80], folder / "train.jsonl")
    rk.write_records(records[80:], folder / "dev.jsonl")
    return folder


@pytest.mark.slow
@pytest.mark.supports("pretrain", "SFT", "reward", "DPO", "PPO", "evaluate")
@pytest.mark.parametrize("name", NAMES)
def test_a_family_passes_through_all_stages_and_learns(name, family_paths, data, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.syspath_prepend(str(__file__).rsplit("/", 1)[0])
    common = dict(max_length=96, logging_steps=5, report_to="none", batch_size=8, seed=1)
    sampled = dict(max_new_tokens=8, samples=4)
    runs = [rk.Pretrain(family_paths(name), data, tmp_path / "pretrain", learning_rate=4e-3, max_steps=20, **common)]
    runs += [rk.SFT(runs[0].output_dir, data, tmp_path / "sft", learning_rate=4e-3, max_steps=30, packing=True, **common, **sampled)]
    runs += [rk.Reward(runs[1].output_dir, data, tmp_path / "reward", learning_rate=2e-3, max_steps=20, **common)]
    runs += [rk.DPO(runs[1].output_dir, data, tmp_path / "dpo", learning_rate=5e-4, max_steps=10, **common, **sampled)]
    results = {run.stage: rk.launch(run) for run in runs}
    for stage, result in results.items():
        losses = [row["loss"] for row in result.history if "loss" in row]
        assert losses[-1] < losses[0], (stage, losses)
    ppo = rk.launch(rk.PPO(runs[1].output_dir, data, tmp_path / "ppo", learning_rate=1e-3, max_steps=15, reward_path=runs[2].output_dir,
                           reward_function="test_family_stages:first_character", score_clip=20.0, kl_coefficient=0.0,
                           unfinished_score=0.0, mini_batch_size=32, critic="actor", **common | {"batch_size": 64, "logging_steps": 1}, **sampled))
    steps = [row for row in ppo.history if "score" in row]
    scores = [row["score"] for row in steps]
    assert max(row["first_ratio"] for row in steps) < 1e-4 and sum(scores[-3:]) > sum(scores[:3]), scores
    table = rk.evaluate(tmp_path / "ppo", ["couplets", "ocnli", "ceval"], limit=4)
    assert set(table.task) >= {"couplets", "ocnli", "ceval"} and table.score.between(0, 1).all()
    assert rk.family_of(tmp_path / "ppo").name == rk.family_of(family_paths(name)).name
    assert rk.load_model(tmp_path / "dpo").config.eos_token_id == rk.load_model(family_paths(name)).config.eos_token_id


@pytest.mark.slow
@pytest.mark.supports("ZeRO-3")
@pytest.mark.skipif(torch.cuda.device_count() == 1, reason="one GPU: two workers need two, or none")
@pytest.mark.parametrize("name", NAMES)
def test_weights_shared_out_over_two_processes_learn_what_one_does(name, family_paths, data, tmp_path):  # noqa: F811
    common = dict(max_length=96, learning_rate=1e-3, max_steps=2, logging_steps=1, report_to="none", samples=0)
    one = rk.launch(rk.SFT(family_paths(name), data, tmp_path / "one", batch_size=8, **common))
    two = rk.launch(rk.SFT(family_paths(name), data, tmp_path / "two", batch_size=4, zero_stage=3, **common), num_processes=2)
    assert two.metrics["eval_loss"] == pytest.approx(one.metrics["eval_loss"], abs=1e-4)
    before, after = (dict(rk.load_model(tmp_path / run).named_parameters()) for run in ("one", "two"))
    assert before.keys() == after.keys()
    for key, weight in before.items():
        torch.testing.assert_close(after[key], weight, atol=1e-4, rtol=0, msg=key)
