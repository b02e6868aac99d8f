"""Fault injection: PPO on couplets with one planted cause for each check of health.py, and healthy runs that must stay quiet.

    python tests/benchmarks/faults.py [--seeds 10] [--steps 24] [--only NAME …] [--folder runs/faults]

Every run goes through the real loop; faults are planted from outside, on the trainer or by the config. What is printed was said
while the run went on: for each fault the checks that must find it, at which step they did, and what else was said; the
false alarms of healthy runs (seeds of one config, and other configs); both rates with Wilson's 95 % intervals.
"""
import argparse
import contextlib
import io
import re
import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch

import rlhfkit as rk
from rlhfkit import rl
from rlhfkit.engine import set_dropout
from rlhfkit.evaluation.metrics import wilson
from rlhfkit.rollout import rollout
from rlhfkit.samples.couplets import applies, gold
from rlhfkit.stages.ppo import PPOTrainer

PROJECT = Path(__file__).resolve().parents[2]
SEEN = set()                        # the training prompts, for the reward that knows them by heart


# ---- reward functions that invite what they are named after

def longer(prompts, answers):
    return [float(len(answer)) for answer in answers]


def loops(prompts, answers):
    return [float(len(answer) - len(set(answer))) for answer in answers]


def one_word(prompts, answers):
    return [float(min(answer.count("清"), 3)) for answer in answers]


def same(prompts, answers):
    return [1.0] * len(answers)


def by_heart(prompts, answers):
    return [score if prompt in SEEN else -score for prompt, score in zip(prompts, one_word(prompts, answers))]


# ---- plants: what is done to a trainer before its first step

def dropout(trainer):
    set_dropout(trainer.actor.model, 0.1)


def hot_sampler(trainer):
    experience, sample = trainer.experience, trainer.experience.sample

    def hot(rows, seeds):
        experience.config = replace(trainer.config, temperature=1.5)
        try:
            return sample(rows, seeds)
        finally:
            experience.config = trainer.config
    experience.sample = hot


def shifted(trainer):
    def logps(model, ids, mask, size):
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, -size - 2:-2]
        return rl.token_logps(logits, ids[:, -size:], trainer.config.temperature), logits
    trainer.experience.logps = logps


def scored(change):
    """A plant that changes each Rollout that was scored."""
    def plant(trainer):
        score = trainer.experience.score
        trainer.experience.score = lambda *args, **kwargs: change(score(*args, **kwargs))
    return plant


def stale_sampler(trainer):
    """The sampler keeps the weights it was started with, as a server whose weights are never sent."""
    config, at = trainer.config, trainer.experience
    at.sample = lambda rows, seeds: rollout(at.reference, [row["prompt_ids"] for row in rows], config.max_new_tokens, at.end_ids,
                                            at.pad_id, seeds, config.temperature)


@torch.no_grad()
def never_ends(trainer):
    """What SFT leaves that takes the end token for padding: its weights are those of no token."""
    for model in (trainer.actor.model, trainer.experience.reference):
        weight = model.get_output_embeddings().weight
        weight[list(trainer.experience.end_ids)] = weight.mean(0)


def pad_is_end(trainer):
    trainer.pad_id = trainer.experience.pad_id = trainer.experience.end_ids[0]


@torch.no_grad()
def dead_critic(trainer):
    trainer.critic.model.v_head.weight.zero_().requires_grad_(False)


def from_step(first, change):
    """A plant that calls change(trainer) before a step."""
    def plant(trainer):
        step = trainer.step

        def later(number):
            if number + 1 == first:
                change(trainer)
            return step(number)
        trainer.step = later
    return plant


def not_a_number(trainer):
    logps = trainer.experience.logps
    trainer.experience.logps = lambda *args: tuple(x * float("nan") for x in logps(*args))


def steep(trainer):
    backward = trainer.actor.backward
    trainer.actor.backward = lambda loss, last: backward(1000 * loss, last)


@torch.no_grad()
def exchanged(trainer):
    """One of several reward models is another one from here on, as after a restart with a wrong folder."""
    trainer.experience.rewards.models[-1].v_head.weight.mul_(-4)


def overflows(trainer):
    """The CPU does not train in float16: the loss scale that it would log is put into the row."""
    step = trainer.step
    trainer.step = lambda number: step(number) | {"loss_scale": 2.0 ** max(15 - number, 0)}


@dataclass(frozen=True)
class Fault:
    """checks: names of health.CHECKS that must find it; config: fields that differ; plant: what is done to the trainer."""

    name: str
    checks: tuple
    config: dict
    plant: object = None


FREE = dict(kl_coefficient=0.0, unfinished_score=0.0, critic="actor", reward_path="")
FAULTS = [Fault(*fault) for fault in (
    ("dropout switched on after the checks", ("first-step ratio",), {}, dropout),
    ("old log-probs of the starting model", ("first-step ratio",), {},
     scored(lambda batch: replace(batch, logps=batch.ref_logps))),
    ("sampler at temperature 1.5", ("sampled against scored",), {}, hot_sampler),
    ("scoring shifted by a token", ("sampled against scored",), {}, shifted),
    ("sampler with the starting weights", ("KL not negative", "sampled against scored"), dict(kl_coefficient=0.0), stale_sampler),
    ("no penalty, steps too large", ("KL bounded",), dict(kl_coefficient=0.0, learning_rate=1e-2)),
    ("every rollout used too long", ("clip fraction",), dict(learning_rate=1e-2, ppo_epochs=6)),
    ("reward for one word", ("entropy", "score against gold"),
     FREE | dict(reward_function="one_word", learning_rate=1e-2)),
    ("reward known by heart", ("score against held-out",), FREE | dict(reward_function="by_heart", learning_rate=3e-3)),
    ("reward for length", ("length",), FREE | dict(reward_function="longer", learning_rate=3e-3)),
    ("reward for loops", ("repetition",), FREE | dict(reward_function="loops", learning_rate=3e-3)),
    ("the same reward for all", ("scores differ",), FREE | dict(reward_function="same")),
    ("end token taken for padding in SFT", ("end token",), {}, never_ends),
    ("swapped scores", ("reward model",), {}, scored(lambda batch: replace(batch, score=-batch.score))),
    ("critic with a dead head", ("dead critic",), dict(critic="actor"), dead_critic),
    ("critic with huge steps", ("critic",), dict(critic_learning_rate=3.0)),
    ("weak reward models, no penalty", ("score against gold",), FREE | dict(learning_rate=3e-3, reward_path="weak")),
    ("another reward model from step 10 on", ("ensemble",), dict(reward_path="three"), from_step(10, exchanged)),
    ("NaN at step 10", ("finite loss",), {}, from_step(10, not_a_number)),
    ("gradient a thousand times too large", ("gradient norm",), {}, from_step(12, steep)),
    ("overflows in float16", ("loss scale",), {}, overflows),
)]
GROUP = dict(critic="none", batch_size=32, answers_per_prompt=2)
HEALTHY = [Fault(name, (), config, plant) for name, config, plant in (
    ("critic from the actor", dict(critic="actor"), None), ("frozen critic", dict(critic="frozen"), None),
    ("RLOO", GROUP | dict(advantage="rloo"), None),
    ("GRPO", GROUP | dict(advantage="grpo", kl_in="loss", loss_mean="answers"), None),
    ("Dr. GRPO", GROUP | dict(advantage="dr_grpo", loss_mean="constant"), None),
    ("three reward models", dict(reward_path="three", ensemble="spread"), None),
    ("normalised scores, adaptive KL", dict(normalize_scores="running", kl_target=1.0, kl_horizon=2000), None),
    ("log-probs of the sampler", dict(rescore=False), None), ("critic first", dict(critic_warmup_steps=5, value_clip=0.0), None),
    ("LoRA", dict(lora_rank=8, learning_rate=2e-3), None), ("pad is end", {}, pad_is_end))]


def run(fault, models, output_dir, seed=0, steps=24, **more):
    """Train with a fault -> dict(said: {(check, verdict): first step}, error, seconds, history)."""
    fields = dict(max_length=64, batch_size=64, learning_rate=4e-4, critic_learning_rate=1e-3, ppo_epochs=2, kl_coefficient=0.2,
                  max_new_tokens=14, unfinished_score=-5.0, logging_steps=1, eval_steps=max(1, steps // 4), samples=0,
                  report_to="none", reward_path="good", max_steps=steps) | more | fault.config
    fields["reward_path"] = models.reward.get(fields["reward_path"], "")
    if "reward_function" in fields:
        fields["reward_function"] = f"{__name__}:{fields['reward_function']}"
    SEEN.clear()
    SEEN.update(record.prompt for record in rk.read_records(f"{models.data}/train.jsonl"))
    shutil.rmtree(output_dir, ignore_errors=True)
    real, start, kept = PPOTrainer.__init__, time.perf_counter(), {}

    def planted(self, config):
        real(self, config)
        kept["trainer"] = self
        if fault.plant:
            fault.plant(self)
    error, found = "", {}
    with mock.patch.object(PPOTrainer, "__init__", planted), contextlib.redirect_stdout(io.StringIO()):
        try:
            rk.launch(rk.PPO(models.policy, models.data, output_dir, seed=seed, **fields))
        except (ValueError, RuntimeError, FloatingPointError) as raised:
            error = f"{type(raised).__name__}: {raised}"
            if isinstance(raised, FloatingPointError):              # said by the engine, before the row is there to be judged
                found[("finite loss", "fail")] = kept["trainer"].history[-1]["step"] + 1
    found |= said(Path(output_dir, "log.txt").read_text(encoding="utf-8"))
    return dict(said=found, error=error, seconds=time.perf_counter() - start, history=kept["trainer"].history)


def said(log):
    """The text of a run's log -> {(check, verdict): the step at which it was said first}."""
    found, step = {}, 0
    for line in log.splitlines():
        if number := re.match(r"step (\d+) ", line):
            step = int(number[1])
        if warning := re.match(r"(warn|fail): ([^:]+): ", line):
            found.setdefault((warning[2], warning[1]), step)
    return found


def made(folder):
    """The models, made where they are not there -> policy and data (folders), reward: {name: folder, or several}."""
    train, dev = (list(part) for part in rk.split(rk.build(["couplets"]), 0.05, 0))
    train, dev = train[:4000], [record for record in dev if applies(record.prompt)][:128]
    if not (folder / "data/dev.jsonl").is_file():
        rk.write_records(train, folder / "data/train.jsonl")
        rk.write_records(dev, folder / "data/dev.jsonl")
    common = dict(max_length=64, batch_size=16, logging_steps=20, report_to="none")

    def stage(cls, start, name, data="data", **more):
        if not (folder / name / "result.json").is_file():
            begin = time.perf_counter()
            with contextlib.redirect_stdout(io.StringIO()):
                rk.launch(cls(start, str(folder / data), str(folder / name), **common | more)).save()
            print(f"{name:<40}{time.perf_counter() - begin:6.0f} s", flush=True)
        return str(folder / name)
    policy = str(PROJECT / "runs/tiny/sft")
    if not Path(policy, "result.json").is_file():
        policy = stage(rk.SFT, rk.tiny(folder / "init"), "sft", learning_rate=4e-3, max_steps=600, samples=0)
    if not (folder / "judged/dev.jsonl").is_file():
        rk.write_records(rk.judged_records(policy, train[:2000], gold, 2, 14, 1.2), folder / "judged/train.jsonl")
        rk.write_records(dev, folder / "judged/dev.jsonl")
    good = [stage(rk.Reward, policy, f"good-{n}", "judged", seed=n, learning_rate=2e-3, max_steps=250) for n in range(3)]
    weak = [stage(rk.Reward, policy, f"weak-{n}", seed=n, learning_rate=2e-3, max_steps=30) for n in range(3)]
    rewards = {"good": good[0], "three": ",".join(good), "weak": ",".join(weak)}
    return SimpleNamespace(policy=policy, data=str(folder / "data"), reward=rewards)


def line(name, result, wanted=()):
    found = {check: step for (check, _), step in sorted(result["said"].items(), key=lambda item: -item[1])}
    parts = [f"{check}: " + (f"step {found[check]}" if check in found else "NOT FOUND") for check in wanted]
    also = ", ".join(sorted(set(found) - set(wanted)))
    return (f"{name:<40}{result['seconds']:5.0f} s  {', '.join(parts) or 'quiet' * (not also)}" + f"  (also: {also})" * bool(also)
            + f"  ended by {result['error']:.80}" * bool(result["error"]))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=10, help="healthy runs of one config")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--only", nargs="*", default=[], help="runs whose name holds one of these")
    parser.add_argument("--folder", type=Path, default=PROJECT / "runs/faults")
    given = parser.parse_args()
    folder = given.folder.resolve()
    models = made(folder)
    plain = [(Fault(f"healthy, seed {seed}", (), {}), seed) for seed in range(given.seeds)]
    hits, quiet = [], []
    for fault, seed in plain + [(fault, 0) for fault in HEALTHY + FAULTS]:
        if given.only and not any(part in fault.name for part in given.only):
            continue
        result = run(fault, models, str(folder / "run"), seed, given.steps)
        print(line(fault.name, result, fault.checks), flush=True)
        hits += [check in {name for name, _ in result["said"]} for check in fault.checks]
        quiet += [not result["said"]] if not fault.checks else []
    for name, values in (("checks that found their fault", hits), ("healthy runs that were quiet", quiet)):
        if values:
            low, high = wilson(sum(values), len(values))
            print(f"{name}: {sum(values)} of {len(values)}, 95 % interval {low:.0%} to {high:.0%}")
    raise SystemExit(0 if all(hits + quiet) else 1)


if __name__ == "__main__":
    main()
