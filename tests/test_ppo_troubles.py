"""Bad input and bad luck in a PPO run (I22): what is said, that no weight has changed and the checkpoint stands, and that the run goes on."""
import math
import os
import resource
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_ppo_features import pangu, ran  # noqa: F401  a fixture
from test_ppo_proofs import family, moved, ppo, short_couplets, trainer_of, weights  # noqa: F401  a fixture

import rlhfkit as rk
from rlhfkit import rl
from rlhfkit.rollout import rollouts
from rlhfkit.saving import newest_checkpoint
from rlhfkit.stages.ppo import PPOTrainer


def answer(prompts, answers):
    return answer.given(answers)


BAD = [(lambda answers: 1 / 0, RuntimeError, r"reward function failed on 6 answers, the first of them \('上联.*ZeroDivisionError.*is called with"),
       (lambda answers: [0.0] * 5, ValueError, "gave 5 scores for 6 answers; it must give one for each"),
       (lambda answers: (0.0 for _ in answers), ValueError, "gave a generator, not a list of scores for 6 answers"),
       (lambda answers: None, ValueError, "gave a NoneType, not a list of scores for 6 answers"),
       (lambda answers: [0.0] * 5 + [math.nan], ValueError, r"the score of \('上联.* is nan; scores must be finite numbers: look at"),
       (lambda answers: [math.inf] + [0.0] * 5, ValueError, "is inf; scores must be finite"),
       (lambda answers: ["good"] * 6, ValueError, "scores that are no numbers")]


@pytest.mark.parametrize("given, error, message", BAD, ids=["raises", "too few", "generator", "None", "NaN", "inf", "texts"])
def test_a_reward_function_that_gives_no_scores_is_named_and_the_checkpoint_stands(given, error, message, pangu, tmp_path):  # noqa: F811
    calls = []
    answer.given = lambda answers: calls.append(1) or (given(answers) if len(calls) == 2 else [0.5] * len(answers))
    config = ppo(pangu, tmp_path / "run", reward_path="", critic="actor", reward_function=f"{__name__}:answer", save_steps=1)
    with pytest.raises(error, match=message):
        rk.launch(config)
    assert newest_checkpoint(tmp_path / "run", "state.pt").name == "checkpoint-1"
    assert [row["step"] for row in rk.launch(config).history] == [1, 2]                   # mended, the same run goes on


def test_a_reward_model_of_another_vocabulary_is_refused(pangu, family, tmp_path):  # noqa: F811
    other = family("glm").reward
    with pytest.raises(ValueError, match=f"model in {other} has another vocabulary than the actor in {pangu.policy}; train .* reward_function"):
        rk.launch(ppo(pangu, tmp_path / "run", reward_path=other))


def test_where_memory_runs_out_the_phase_the_estimate_and_what_to_lower_are_said(pangu, tmp_path, monkeypatch):  # noqa: F811
    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    config = ppo(pangu, tmp_path / "run", save_steps=1)
    with monkeypatch.context() as patch:
        step = PPOTrainer.step
        patch.setattr(PPOTrainer, "step", lambda trainer, at: (patch.setattr(rl, "policy_loss", full) if at else None, step(trainer, at))[1])
        with pytest.raises(MemoryError, match="too little in the update.*Tried to allocate.*estimated need.*change .*the same call goes on"):
            rk.launch(config)
    assert newest_checkpoint(tmp_path / "run", "state.pt").name == "checkpoint-1" and len(rk.launch(config).history) == 2


def dying(prompts, answers):
    """A reward function in which the second process dies once, in its third rollout."""
    dying.calls += 1
    if dying.calls == 3 and torch.distributed.is_initialized() and torch.distributed.get_rank() == 1 and not Path(os.environ["DIED"]).exists():
        Path(os.environ["DIED"]).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return [float(len(text)) for text in answers]


dying.calls = 0
several = pytest.mark.skipif(torch.cuda.device_count() == 1, reason="one GPU: two workers need two, or none")


@several
@pytest.mark.slow
def test_a_process_that_dies_ends_the_run_with_an_error_and_the_same_call_goes_on(pangu, tmp_path, monkeypatch):  # noqa: F811
    """I22: within a minute."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    monkeypatch.setenv("DIED", str(tmp_path / "died"))
    config = ppo(pangu, tmp_path / "run", batch_size=3, max_steps=4, save_steps=1, reward_path="", critic="actor",
                 reward_function="test_ppo_troubles:dying")
    start = time.perf_counter()
    with pytest.raises(rk.WorkerError):
        rk.launch(config, num_processes=2)
    assert (tmp_path / "died").exists() and newest_checkpoint(tmp_path / "run", "state.pt").name == "checkpoint-2"
    assert time.perf_counter() - start < 60 + 30                                            # half a minute is the start of two workers
    assert [row["step"] for row in rk.launch(config, num_processes=2).history] == [1, 2, 3, 4]


@several
@pytest.mark.slow
def test_zero_3_without_samples_runs(pangu, tmp_path):  # noqa: F811
    assert len(rk.launch(ppo(pangu, tmp_path / "run", batch_size=3, zero_stage=3), num_processes=2).history) == 2


def test_every_process_makes_as_many_passes_over_the_held_out_rows(pangu, tmp_path, monkeypatch):  # noqa: F811
    """Three rows for two processes: under ZeRO-3 each pass of one is a gather of all; seen here one process at a time."""
    found, passes = with_records(tmp_path / "data", short_couplets(8)), []
    rk.write_records(short_couplets(3), tmp_path / "data/dev.jsonl")
    trainer = trainer_of(replace(ppo(pangu, tmp_path / "run", gradient_accumulation_steps=6), **found))
    trainer.actor.model.register_forward_pre_hook(lambda *_: passes.append(1))
    monkeypatch.setattr("rlhfkit.experience.rollout", lambda _, prompts, *args, **more: ([[40]] * len(prompts), [[-1.0]] * len(prompts)))
    counts = []
    for rank in (0, 1):
        monkeypatch.setattr("rlhfkit.experience.rank", lambda: rank)
        monkeypatch.setattr("rlhfkit.experience.world_size", lambda: 2)
        passes.clear(), trainer.judge(0)
        counts.append(len(passes))
    assert counts[0] == counts[1] > 0


def with_records(folder, records):
    folder.mkdir()
    rk.write_records(records, folder / "train.jsonl")
    return dict(data_path=str(folder))


def test_a_prompt_longer_than_the_room_is_shortened_or_set_aside_and_counted(pangu, tmp_path, capsys):  # noqa: F811
    """The user's text is shortened; a prefix that leaves no room is not."""
    records = short_couplets(8) + [rk.Record("上联：" + "春风" * 100, prefix="下联："), rk.Record("长", prefix="下联：" * 60)]
    config = replace(ppo(pangu, tmp_path / "run", keep_rollouts=True), **with_records(tmp_path / "data", records))
    assert [row["updates"] for row in rk.launch(config).history] == [1, 1]
    assert "1 of 10 rows set aside (rejected.jsonl)" in capsys.readouterr().out
    assert len((tmp_path / "run/rejected.jsonl").read_text(encoding="utf-8").splitlines()) == 1
    kept = list(rollouts(tmp_path / "run"))
    assert max(len(row["prompt_ids"]) for row in kept) == 60 and not [row for row in kept if row["id"] == 9]
    with pytest.raises(ValueError, match="none of 1 records can be used"):
        rk.launch(replace(ppo(pangu, tmp_path / "none"), **with_records(tmp_path / "long", records[-1:])))


def test_an_empty_answer_is_scored_and_trained_on(pangu, tmp_path, monkeypatch):  # noqa: F811
    """P7: the end token at once; the 2023 kit crashed."""
    trainer = trainer_of(ppo(pangu, tmp_path / "run", max_steps=1, keep_rollouts=True))
    end = trainer.experience.end_ids
    monkeypatch.setattr(trainer.experience, "sample", lambda rows, seeds: ([end] * 5 + [[40, 41, 42, 43]], [[-1.0]] * 5 + [[-1.0] * 4]))
    row = trainer.step(0)
    kept = list(rollouts(tmp_path / "run"))
    assert [x["answer"] for x in kept[:5]] == [""] * 5 and [x["finished"] for x in kept] == [1.0] * 5 + [0.0]
    assert all(math.isfinite(value) for value in row.values()) and row["length"] == pytest.approx(9 / 6) and row["first_ratio"] <= 1e-6


def test_prompts_that_are_all_the_same_are_said_and_answered_each_with_its_own_noise(pangu, tmp_path, capsys):  # noqa: F811
    found = with_records(tmp_path / "data", short_couplets(1) * 8)
    rk.launch(replace(ppo(pangu, tmp_path / "run", keep_rollouts=True, temperature=1.5), **found))
    assert "the first 8 prompts are all the same: this trains one answer, not a policy" in capsys.readouterr().out
    assert len({tuple(row["ids"]) for row in rollouts(tmp_path / "run")}) > 1


@pytest.mark.parametrize("loss", ["policy_loss", "value_loss"])
def test_a_gradient_that_is_nan_stops_the_run_before_any_weight_changes(loss, pangu, tmp_path, monkeypatch):  # noqa: F811
    trainer = trainer_of(ppo(pangu, tmp_path / "run"))
    trainer.step(0)
    actor, critic = weights(trainer.actor.model), weights(trainer.critic.model)
    real = getattr(rl, loss)
    monkeypatch.setattr(rl, loss, lambda *args: real(*args) * math.nan)
    with pytest.raises(FloatingPointError, match="they must be finite: lower learning_rate; no weight has changed"):
        trainer.step(1)
    assert moved(actor, trainer.actor.model) == moved(critic, trainer.critic.model) == 0


def test_a_disk_that_fills_while_a_checkpoint_is_written_leaves_the_one_before(pangu, tmp_path, monkeypatch):  # noqa: F811
    """Files may not grow beyond 100 kB while the second is written: what the kernel then says is what a full disk says."""
    config, hard = ppo(pangu, tmp_path / "run", max_steps=3, save_steps=1), resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    real = PPOTrainer.checkpoint

    def full(trainer, step):
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000 if step == 2 else hard, hard))
        real(trainer, step)
    with monkeypatch.context() as patch:
        patch.setattr(PPOTrainer, "checkpoint", full)
        try:
            with pytest.raises(Exception, match="(?i)file too large|too large"):
                rk.launch(config)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert newest_checkpoint(tmp_path / "run", "state.pt").name == "checkpoint-1"
    again, straight = rk.launch(config), rk.launch(replace(config, output_dir=str(tmp_path / "straight")))
    ours, theirs = (weights(rk.load_model(tmp_path / name)) for name in ("run", "straight"))
    assert [row["step"] for row in again.history] == [1, 2, 3] and all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert not list(Path(tmp_path / "run").glob(".checkpoint*")) and again.history[-1]["score"] == straight.history[-1]["score"]


def test_a_best_by_without_held_out_rows_is_said(pangu, tmp_path):  # noqa: F811
    with pytest.raises(ValueError, match="best_by"):
        rk.launch(ppo(pangu, tmp_path / "run", best_by="eval_score"))


def test_one_answer_a_step_normalises_without_exploding(pangu, tmp_path):  # noqa: F811
    _, steps = ran(ppo(pangu, tmp_path / "run", batch_size=1, normalize_scores="running"))
    assert max(row["value_loss"] for row in steps) < 1e4
