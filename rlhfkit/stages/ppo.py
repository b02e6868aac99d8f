"""PPO from a reward model or a function (Ouyang et al. 2022; Schulman et al. 2017); without a critic the same loop is RLOO or GRPO.

One step: sample answers, score them, shape rewards, estimate advantages, update actor and critic. The ids trained on are the ids sampled:
the 2023 kit decoded and encoded again, let GAE run over padding, swapped its two losses and never left its loop.
"""
import json
import math
import statistics
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F

from rlhfkit import health, memory, rl
from rlhfkit.configs import Result
from rlhfkit.engine import Engine, all_sum, device, gather_list, log_line, rank, say, world_size
from rlhfkit.experience import Experience, as_rows, critic_for, figures
from rlhfkit.packing import IGNORE
from rlhfkit.rewards import Rewards
from rlhfkit.rollout import answer_samples, keep, sample_metrics
from rlhfkit.rows import collate, prompt_rows, sft_rows, text_rows
from rlhfkit.saving import load_checkpoint, save_checkpoint
from rlhfkit.states import Average
from rlhfkit.trainer import peak_memory, prepare, rows_for, save_engine


def run(config):
    trainer = PPOTrainer(config)
    try:
        return trainer.train()
    except torch.OutOfMemoryError as error:
        raise memory.too_little(config, trainer.phase, world_size(), error) from error


class PPOTrainer:
    """The models of a run and the steps on them."""

    def __init__(self, config):
        self.config, self.phase = config, "loading"
        model, self.tokenizer, self.family = prepare(config)
        self.pad_id = self.tokenizer.pad_token_id
        self.rows, self.dev, _ = rows_for(config, partial(
            prompt_rows, family=self.family, tokenizer=self.tokenizer, max_length=config.max_length - config.max_new_tokens))
        self.ptx = rows_for(replace(config, data_path=config.ptx_path), partial(
            {"sft": sft_rows, "pretrain": text_rows}[config.ptx_rows], family=self.family, tokenizer=self.tokenizer,
            max_length=config.max_length))[0] if config.ptx_coefficient else None
        self.size = config.batch_size * config.answers_per_prompt               # answers a process and rollout
        self.mini = min(config.mini_batch_size or self.size, self.size)
        self.micro = math.ceil(self.mini / config.gradient_accumulation_steps)
        self.per_step = config.batch_size * world_size()
        self.total_steps = config.max_steps or config.num_epochs * math.ceil(len(self.rows) / self.per_step)
        if config.gradient_checkpointing:
            model.gradient_checkpointing_enable()
        critic = critic_for(config, self.family, rewards := Rewards(config, self.tokenizer))
        self.actor = Engine(model, config, config.learning_rate, max(1, self.total_steps - config.critic_warmup_steps))
        self.critic = Engine(critic, config, config.critic_learning_rate or config.learning_rate, self.total_steps) if critic else None
        self.experience = Experience(config, self.tokenizer, self.family, self.actor, self.critic, rewards, self.micro)
        self.actor.average = Average(self.actor, config.ema_decay) if config.ema_decay else None
        self.engines = {"actor": self.actor} | ({"critic": self.critic} if self.critic else {})
        kl = config.kl_coefficient
        self.kl = rl.AdaptiveKL(kl, config.kl_target, config.kl_horizon) if config.kl_target else rl.FixedKL(kl)
        self.moments = None if config.normalize_scores == "none" else rl.Moments(config.normalize_scores == "running")
        self.history, self.samples, self.best = [], [], -math.inf
        self._remark()

    def train(self):
        config, start, first = self.config, time.perf_counter(), self.resume()
        if first == 0:
            self.samples = self._samples(0)
            self.judge(0)
        for step in range(first, self.total_steps):
            row = self.step(step)
            if (step + 1) % config.logging_steps == 0 or step + 1 == self.total_steps:
                self.add(row)
            if config.eval_steps and (step + 1) % config.eval_steps == 0 and step + 1 < self.total_steps:
                self.judge(step + 1)
            if config.save_steps and (step + 1) % config.save_steps == 0:
                self.checkpoint(step + 1)
        self.judge(self.total_steps)
        return self.finish(time.perf_counter() - start)

    def step(self, step):
        """One rollout and its updates -> the row for the history."""
        config, times = self.config, [self._now("sampling")]
        rows, numbers = self._prompts(step)
        answers = self.experience.sample(rows, [hash((config.seed, step, n)) for n in numbers])
        times.append(self._now("scoring"))
        batch = self.experience.score(rows, *answers)
        advantages, returns, rewards = self._advantages(batch)
        times.append(self._now("the update"))
        stats = self._update(step, batch, advantages, returns)
        row, count = figures(batch, rewards, returns)
        row |= {"kl_coefficient": self.kl.value} | ({"loss_scale": self.actor.loss_scale} if self.actor.loss_scale else {})
        self.kl.update(row["kl"], count if step >= config.critic_warmup_steps else 0)        # until then there is no distance to steer by
        if config.keep_rollouts:
            self._keep(step + 1, numbers, batch, advantages)
        times.append(self._now("sampling"))
        spans = [end - begin for begin, end in zip(times, times[1:])]
        return {"step": step + 1, **row, **stats, "seconds": sum(spans),
                **dict(zip(("seconds_rollout", "seconds_scoring", "seconds_update"), spans))}

    def _prompts(self, step):
        """This process's prompts of the step, one for each answer, and the answers' numbers, which are the same for any number of processes."""
        times = self.config.answers_per_prompt
        at = range(rank(), self.per_step, world_size())
        return [row for row in self._strided(self.rows, step, self.per_step) for _ in range(times)], \
            [n for i in at for n in range(i * times, (i + 1) * times)]

    def _strided(self, rows, number, together):
        """This process's share of the number-th `together` rows, epoch by epoch in an order of its own."""
        chosen = []
        while len(chosen) < together:
            epoch, at = divmod(number * together + len(chosen), len(rows))
            order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(self.config.seed + epoch)).tolist()
            chosen += order[at:at + together - len(chosen)]
        return [rows[i] for i in chosen[rank()::world_size()]]

    def _advantages(self, batch):
        """-> advantages (B, A), returns (B, A) or None, rewards (B, A)."""
        config, score = self.config, batch.score
        if self.moments:
            self.moments.update(score)
            score = self.moments.normalize(score)
            batch.values = self._scaled(batch.values)
        rewards = rl.shaped_rewards(score.clamp(-config.score_clip, config.score_clip), batch.logps, batch.ref_logps, batch.answer,
                                    self.kl.value if config.kl_in == "reward" else 0.0, batch.finished, config.unfinished_score)
        if config.advantage == "gae":
            # An answer cut by length ends there: it got its score, and no return ever trains a value behind it. With that value as bootstrap
            # PPO missed a known optimum on 4 of 10 seeds.
            advantages, returns = rl.gae(rewards, batch.values, batch.answer, batch.finished, config.gamma, config.lam)
            return rl.whiten(advantages, batch.answer) if config.whiten_advantages else advantages, returns, rewards
        each = getattr(rl, config.advantage)(rewards.sum(1), config.answers_per_prompt)
        return each[:, None] * batch.answer, None, rewards

    def _update(self, step, batch, advantages, returns):
        """ppo_epochs passes over the rollout in mini-batches, each an update of actor and critic -> figures, means over the updates."""
        config, figures, learns = self.config, [], step >= self.config.critic_warmup_steps
        minis = torch.arange(len(batch.ids), device=device()).split(self.mini)
        for n, rows in enumerate(minis * config.ppo_epochs):
            tokens, answers = (float(x) for x in all_sum([batch.answer[rows].sum(), len(rows)]))
            micros, sums = rows.split(self.micro), {}
            if learns and self.ptx:
                loss = self._ptx_loss(step * len(minis) * config.ppo_epochs + n)
                self.actor.backward(config.ptx_coefficient * loss, last=False)
                sums["ptx_loss"] = loss.item()
            for micro in micros:
                last = micro is micros[-1]
                found = self._policy(batch, advantages, micro, tokens, answers, last) if learns else {}
                found |= self._value(batch, returns, micro, tokens, last) if self.critic else {}
                for name, value in found.items():
                    sums[name] = max(sums.get(name, 0.0), value) if name == "ratio_deviation" else sums.get(name, 0.0) + value
            if not all(map(math.isfinite, sums.values())) and config.dtype != "float16":
                raise FloatingPointError(f"the losses of step {step + 1} are {sums}; they must be finite: lower learning_rate; no weight has changed "
                                         "in this update, and the same run goes on from its last checkpoint")
            norms = ({"grad_norm": self.actor.step()} if learns else {}) | ({"critic_grad_norm": self.critic.step()} if self.critic else {})
            summed = dict(zip(sums, all_sum(list(sums.values())).tolist()))
            figures.append(summed | norms | ({"first_ratio": max(gather_list([sums["ratio_deviation"]]))} if learns and n == 0 else {}))
            if config.max_update_kl and summed.get("approx_kl", 0.0) > config.max_update_kl:
                break
        rate = self.actor.learning_rate
        for engine in (self.actor, self.critic)[not learns:]:
            engine and engine.advance()
        first = {name: figures[0].pop(name) for name in ("first_ratio", "sampler_gap") if name in figures[0]}
        means = {name: sum(f[name] for f in figures) / len(figures) for name in figures[0] if name != "ratio_deviation"}
        return first | means | {"updates": len(figures), "learning_rate": rate}

    def _policy(self, batch, advantages, rows, tokens, answers, last):
        """The actor's backward pass on a micro-batch -> its share of the figures."""
        config, answer = self.config, batch.answer[rows]
        with self.experience.autocast():
            logps, logits = self.experience.logps(self.actor, batch.ids[rows], batch.mask[rows], answer.shape[1])
        with torch.set_grad_enabled(config.entropy_coefficient > 0):
            entropy = (rl.entropy(logits, config.temperature) * answer).sum() / tokens
        once = self.mini == len(batch.ids) and config.ppo_epochs == 1 and not config.rescore      # then these are the old ones
        old, weight = logps.detach() if once else batch.logps[rows], rl.token_weights(
            answer, config.loss_mean, tokens, answers, config.max_new_tokens)
        loss = rl.policy_loss(logps, old, advantages[rows], weight, config.clip)
        if config.kl_in == "loss":              # k2, whose gradient is that of the KL
            loss = loss + self.kl.value * (rl.kl_estimates(logps, batch.ref_logps[rows], answer)[1] * weight).sum()
        self.actor.backward(loss - config.entropy_coefficient * entropy, last)
        gap = {} if config.rescore else {"sampler_gap": ((logps.detach() - batch.sampled[rows]) * answer).abs().sum().item() / tokens}
        return {"policy_loss": loss.item(), "entropy": entropy.item(), **gap, **rl.ratio_stats(logps, old, answer, config.clip, tokens)}

    def _value(self, batch, returns, rows, tokens, last):
        """The critic's backward pass on a micro-batch -> its share of the figures."""
        answer = batch.answer[rows]
        with self.experience.autocast():
            values = self._scaled(self.critic(batch.ids[rows], attention_mask=batch.mask[rows])[:, -answer.shape[1] - 1:-1])
        loss = rl.value_loss(values, batch.values[rows], returns[rows], answer / tokens, self.config.value_clip)
        self.critic.backward(loss, last)
        return {"value_loss": loss.item()}

    def _scaled(self, values):
        """Values of a model that was trained to give scores, normalised as the scores are, or the critic would start far off."""
        return self.moments.normalize(values) if self.moments and values is not None and self.config.critic in ("reward", "frozen") else values

    def _ptx_loss(self, number):
        """This process's part of the loss on the rows mixed in, a mean over all their tokens."""
        rows = self._strided(self.ptx, number, self.config.ptx_batch_size * world_size())
        batch = {k: v.to(device()) for k, v in collate(rows, self.pad_id).items()}
        labels = batch.pop("labels")[:, 1:]
        with self.experience.autocast():
            logits = self.actor(**batch, use_cache=False).logits[:, :-1]
        total = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORE, reduction="sum")
        return total / float(all_sum([(labels != IGNORE).sum()]))

    def judge(self, step):
        """Held-out figures, with the same noise each time."""
        row = self.experience.judged(self.dev)
        if row:
            self.add({"step": step, **row})
            self._keep_best()

    def add(self, row):
        self.history.append(row)
        say(self.config.output_dir, log_line(row))
        for line in health.warnings_at(self.history, self.config.to_dict()):
            say(self.config.output_dir, line)

    def resume(self):
        """Step to go on from: 0, or that of the newest whole checkpoint, whose state is loaded."""
        state = self.config.resume and load_checkpoint(self.config.output_dir, self.engines, rank())
        if not state:
            return 0
        self.history, self.samples, self.best = json.loads(state["history"]), json.loads(state["samples"]), state["best"]
        self.kl.value, self.experience.rewards.offsets = state["kl"], state["offsets"]
        if self.moments:
            self.moments = rl.Moments(*state["moments"])
        say(self.config.output_dir, f"going on from step {state['step']}")
        return state["step"]

    def checkpoint(self, step):
        state = {"kl": self.kl.value, "offsets": self.experience.rewards.offsets, "best": self.best, "history": json.dumps(self.history),
                 "samples": json.dumps(self.samples), "moments": list(vars(self.moments).values()) if self.moments else []}
        save_checkpoint(self.config.output_dir, step, state, self.engines, self.config.save_total_limit, rank(),
                        dist.barrier if dist.is_initialized() else lambda: None)

    def finish(self, seconds):
        """Save the actor (adapters merged), its average and the tokenizer into the run folder -> Result."""
        self.samples += self._samples(self.total_steps)
        if self.actor.average:
            with self.actor.average.in_place():
                save_engine(self.actor, self.tokenizer, Path(self.config.output_dir, "ema"), last=False)
        save_engine(self.actor, self.tokenizer, self.config.output_dir)
        trained, held_out = ([row for row in self.history if name in row] for name in ("score", "eval_score"))
        metrics = {k: v for k, v in trained[-1].items() if k in ("score", "kl", "length", "finished", "entropy")}
        for row, suffix in ((held_out[0], "_before"), (held_out[-1], "")) if held_out else ():
            metrics |= {f"{k}{suffix}": v for k, v in row.items() if k.startswith("eval_")}
        spans, answers = [row["seconds"] for row in trained], self.size * world_size()
        metrics |= {"seconds_per_step": statistics.median(spans), "memory_gib": peak_memory(), "steps": self.total_steps, "seconds": seconds,
                    "tokens_per_second": statistics.median(row["length"] * answers / row["seconds"] for row in trained)}
        return Result(self.config.stage, self.config.to_dict(), metrics | sample_metrics(self.samples), self.config.output_dir,
                      self.history, self.samples)

    def _keep_best(self):
        """The actor into best/ where the newest held-out figure that `best_by` names is the largest so far."""
        name, row = self.config.best_by, self.history[-1]
        if name and name not in row:
            raise ValueError(f"best_by is {name!r}; this run has: {', '.join(k for k in row if k.startswith('eval_'))}")
        if name and row[name] > self.best:
            self.best = row[name]
            save_engine(self.actor, self.tokenizer, Path(self.config.output_dir, "best"), last=False)

    def _keep(self, step, numbers, batch, advantages):
        found = gather_list(as_rows(step, numbers, batch, advantages))
        if rank() == 0:
            keep(self.config.output_dir, step, [answer for _, answer in sorted(found, key=lambda pair: pair[0])])

    def _samples(self, step):
        with self.actor.whole() as model:
            return answer_samples(model, self.tokenizer, self.family, (row["record"] for row in self.dev), self.config, step)

    def _remark(self):
        config, prompts = self.config, [row["prompt_ids"] for row in self.rows[:1000]]
        if config.top_k or config.top_p < 1:
            say(config.output_dir, "top_k or top_p is set: answers are not samples of the distribution that is trained (log-probs are of the "
                "whole one); leave them at 0 and 1.0 unless you mean it")
        if config.best_by and not self.dev:
            raise ValueError(f"best_by is {config.best_by!r} and no row is held out; give a data_path with a dev.jsonl, or leave best_by empty")
        if len(prompts) > 1 and all(prompt == prompts[0] for prompt in prompts):
            say(config.output_dir, f"the first {len(prompts)} prompts are all the same: this trains one answer, not a policy")

    def _now(self, phase):
        """The clock, when the device has done what it was asked for; the phase that begins is named where memory runs out."""
        self.phase = phase
        torch.cuda.synchronize() if device().type == "cuda" else None
        return time.perf_counter()
