"""PPO from a reward model or a function (Ouyang et al. 2022; Schulman et al. 2017); without a critic the same loop is RLOO or GRPO.

One step: sample answers, score them, shape rewards, estimate advantages, update actor and critic. The ids trained on are the ids sampled:
the 2023 kit decoded and encoded again, let GAE run over padding, swapped its two losses and never left its loop.
"""
import copy
import json
import math
import statistics
import time
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist

from rlhfkit import health, rl
from rlhfkit.configs import Result
from rlhfkit.engine import Engine, all_sum, device, gather_list, log_line, rank, say, set_dropout, world_size
from rlhfkit.families import load_model
from rlhfkit.models.value import RewardModel
from rlhfkit.rollout import Rewards, answer_samples, rollout, sample_metrics
from rlhfkit.rows import pad, prompt_rows
from rlhfkit.samples.couplets import applies, gold
from rlhfkit.saving import load_checkpoint, save_checkpoint, save_folder
from rlhfkit.trainer import merged, peak_memory, prepare, rows_for


@dataclass
class Rollout:
    """B sampled answers: what the update needs of them, on this process."""

    ids: torch.Tensor               # (B, T) prompt and answer, padded right
    mask: torch.Tensor              # (B, T)
    answer: torch.Tensor            # (B, T-1) 1 where ids[:, 1:] is an answer's token
    logps: torch.Tensor             # (B, T-1) of the actor that sampled
    ref_logps: torch.Tensor         # (B, T-1)
    entropy: torch.Tensor           # (B, T-1)
    values: torch.Tensor | None     # (B, T) or None without a critic
    score: torch.Tensor             # (B,)
    finished: torch.Tensor          # (B,) 1 where the end token was sampled
    texts: list                     # (prompt, answer) strings


def run(config):
    trainer = PPOTrainer(config)
    start, first = time.perf_counter(), trainer.resume()
    if first == 0:
        trainer.judge(0)
    for step in range(first, trainer.total_steps):
        row = trainer.step(step)
        if (step + 1) % config.logging_steps == 0 or step + 1 == trainer.total_steps:
            trainer.add(row)
        if config.eval_steps and (step + 1) % config.eval_steps == 0 and step + 1 < trainer.total_steps:
            trainer.judge(step + 1)
        if config.save_steps and (step + 1) % config.save_steps == 0:
            trainer.checkpoint(step + 1)
    trainer.judge(trainer.total_steps)
    return trainer.finish(time.perf_counter() - start)


class PPOTrainer:
    """The models of a run and the steps on them."""

    def __init__(self, config):
        self.config = config
        model, self.tokenizer, self.family = prepare(config)
        self.end_ids = self.family.end_ids(self.tokenizer)
        self.rows, self.dev, _ = rows_for(config, partial(
            prompt_rows, family=self.family, tokenizer=self.tokenizer, max_length=config.max_length - config.max_new_tokens))
        self.per_step = config.batch_size * world_size()
        self.total_steps = config.max_steps or config.num_epochs * math.ceil(len(self.rows) / self.per_step)
        inner = config.ppo_epochs * math.ceil(config.batch_size * config.answers_per_prompt / self.mini)
        if config.gradient_checkpointing:
            model.gradient_checkpointing_enable()
        self.reference = None if config.lora_rank else load_model(config.model_path, dtype=config.dtype, device=device())
        self.rewards = Rewards(config, self.tokenizer)
        critic = self._critic()
        self.actor = Engine(model, config, config.learning_rate, self.total_steps * inner)
        self.critic = Engine(critic, config, config.critic_learning_rate or config.learning_rate, self.total_steps * inner) if critic else None
        self.engines = {"actor": self.actor} | ({"critic": self.critic} if self.critic else {})
        self.kl = rl.AdaptiveKL(config.kl_coefficient, config.kl_target, config.kl_horizon) if config.kl_target \
            else rl.FixedKL(config.kl_coefficient)
        self.history, self.samples = [], self._samples(0)
        self.autocast = partial(torch.autocast, device().type, torch.bfloat16, enabled=config.dtype == "mixed")

    @property
    def mini(self):
        return self.config.mini_batch_size or self.config.batch_size * self.config.answers_per_prompt

    def step(self, step):
        """One rollout and its updates -> the row for the history."""
        config, start = self.config, time.perf_counter()
        prompts, numbers = self._prompts(step)
        answers = self._sample(prompts, [hash((config.seed, step, n)) for n in numbers])
        sampled = time.perf_counter()
        with torch.no_grad(), self.autocast():
            batch = self._score(prompts, answers)
            advantages, returns, rewards = self._advantages(batch)
        scored = time.perf_counter()
        stats = self._update(batch, advantages, returns)
        kl, row = self._figures(batch, rewards, returns)
        self.kl.update(kl, int(all_sum([len(answers)])))
        end = time.perf_counter()
        return {"step": step + 1, **row, **stats, "learning_rate": self.actor.learning_rate, "seconds": end - start,
                "seconds_rollout": sampled - start, "seconds_scoring": scored - sampled, "seconds_update": end - scored}

    def _prompts(self, step):
        """This process's share of the step's prompts, strided so that step s sees the same prompts for any number of processes."""
        config, chosen = self.config, []
        while len(chosen) < self.per_step:
            epoch, at = divmod(step * self.per_step + len(chosen), len(self.rows))
            order = torch.randperm(len(self.rows), generator=torch.Generator().manual_seed(config.seed + epoch)).tolist()
            chosen += order[at:at + self.per_step - len(chosen)]
        numbers = [n for i in range(rank(), self.per_step, world_size())
                   for n in range(i * config.answers_per_prompt, (i + 1) * config.answers_per_prompt)]
        return [self.rows[chosen[n // config.answers_per_prompt]] for n in numbers], numbers

    def _sample(self, prompts, seeds):
        config = self.config
        return rollout(self.actor.model, [row["prompt_ids"] for row in prompts], config.max_new_tokens, self.end_ids,
                       self.tokenizer.pad_token_id, seeds, config.temperature, config.top_k, config.top_p, synced=config.zero_stage == 3)

    def _score(self, prompts, answers):
        """Log-probs, values and scores of the sampled ids, by the modules that train."""
        (end, *_), config = self.end_ids, self.config
        rows = [row["prompt_ids"] + answer for row, answer in zip(prompts, answers)]
        ids, mask = pad(rows, self.tokenizer.pad_token_id).to(device()), pad([[1] * len(r) for r in rows], 0).to(device())
        answer = pad([[0] * (len(p["prompt_ids"]) - 1) + [1] * len(a) for p, a in zip(prompts, answers)], 0, ids.shape[1] - 1).to(device())
        texts = [(row["record"].prompt, self.tokenizer.decode([t for t in a if t != end])) for row, a in zip(prompts, answers)]
        parts = [self._logps(ids[i:i + self.mini], mask[i:i + self.mini]) for i in range(0, len(ids), self.mini)]
        logps, ref_logps, entropy = (torch.cat(p) for p in zip(*parts))
        values = None
        if config.critic != "none":
            value_of = self.critic or self.rewards.models[0]
            values = torch.cat([value_of(ids[i:i + self.mini], attention_mask=mask[i:i + self.mini]) for i in range(0, len(ids), self.mini)])
        return Rollout(ids, mask, answer.float(), logps, ref_logps, entropy, values, self.rewards(ids, mask, texts),
                       torch.tensor([float(a[-1] == end) for a in answers], device=device()), texts)

    def _logps(self, ids, mask):
        """(log-probs of the actor, of the reference, entropy of the actor), each (B, T-1), of the temperature-scaled distribution."""
        t = self.config.temperature
        logits = self.actor(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
        if self.reference is not None:
            ref_logits = self.reference(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
        else:
            with self.actor.model.disable_adapter():
                ref_logits = self.actor(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
        return rl.token_logps(logits, ids[:, 1:], t), rl.token_logps(ref_logits, ids[:, 1:], t), rl.entropy(logits, t)

    def _advantages(self, batch):
        """-> advantages (B, T-1), returns (B, T-1) or None, rewards (B, T-1)."""
        config = self.config
        coefficient = self.kl.value if config.kl_in == "reward" else 0.0
        clipped = batch.score.clamp(-config.score_clip, config.score_clip)
        rewards = rl.shaped_rewards(clipped, batch.logps, batch.ref_logps, batch.answer, coefficient, batch.finished, config.unfinished_score)
        if config.advantage == "gae":
            last = (batch.mask.sum(1, keepdim=True) - 1)
            advantages, returns = rl.gae(rewards, batch.values[:, :-1], batch.answer, batch.finished, config.gamma, config.lam,
                                         bootstrap=batch.values.gather(1, last)[:, 0])
        else:
            one_each = getattr(rl, config.advantage)(rewards.sum(1), config.answers_per_prompt)
            advantages, returns = one_each[:, None] * batch.answer, None
        return (rl.whiten(advantages, batch.answer) if config.whiten_advantages and returns is not None else advantages), returns, rewards

    def _update(self, batch, advantages, returns):
        """ppo_epochs passes over the rollout in mini-batches, each an update of actor and critic -> figures, averaged over the updates."""
        config, figures, norms = self.config, [], []
        for _ in range(config.ppo_epochs):
            for start in range(0, len(batch.ids), self.mini):
                rows = torch.arange(start, min(start + self.mini, len(batch.ids)), device=device())
                tokens, sums = float(all_sum([batch.answer[rows].sum()])), {}
                micros = rows.chunk(config.gradient_accumulation_steps)
                for micro in micros:
                    for name, value in self._losses(batch, advantages, returns, micro, tokens, last=micro is micros[-1]).items():
                        sums[name] = max(sums.get(name, 0.0), value) if name == "ratio_deviation" else sums.get(name, 0.0) + value
                norms.append(self.actor.step())
                if self.critic:
                    self.critic.step()
                figures.append(sums)
        first = max(gather_list([figures[0]["ratio_deviation"]]))
        names = [name for name in figures[0] if name != "ratio_deviation"]
        means = all_sum([sum(f[name] for f in figures) / len(figures) for name in names]).tolist()
        return {"first_ratio": first, **dict(zip(names, means)), "grad_norm": sum(norms) / len(norms)}

    def _losses(self, batch, advantages, returns, rows, tokens, last):
        """Backward passes of one micro-batch -> its share of the figures."""
        config, ids, mask, answer = self.config, batch.ids[rows], batch.mask[rows], batch.answer[rows]
        with self.autocast():
            logits = self.actor(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
        logps = rl.token_logps(logits, ids[:, 1:], config.temperature)
        loss, stats = rl.policy_loss(logps, batch.logps[rows], advantages[rows], answer, config.clip, tokens)
        if config.kl_in == "loss":              # k2, whose gradient is that of the KL
            loss = loss + self.kl.value * rl.kl_estimates(logps, batch.ref_logps[rows], answer)[1].sum() / tokens
        self.actor.backward(loss, last)
        figures = {"policy_loss": loss.item(), **{name: stats[name].item() for name in ("clip_fraction", "ratio_deviation")}}
        if self.critic:
            with self.autocast():
                values = self.critic(ids, attention_mask=mask)[:, :-1]
            value_loss = rl.value_loss(values, batch.values[rows, :-1], returns[rows], answer, config.value_clip, tokens)
            self.critic.backward(value_loss, last)
            figures["value_loss"] = value_loss.item()
        return figures

    def _figures(self, batch, rewards, returns):
        """(KL in nats an answer, figures of the rollout over all processes)."""
        k1, _, k3 = rl.kl_estimates(batch.logps, batch.ref_logps, batch.answer)
        sums = all_sum([len(batch.ids), batch.score.sum(), rewards.sum(), k1.sum(), k3.sum(), (batch.entropy * batch.answer).sum(),
                        batch.answer.sum(), batch.finished.sum()]).tolist()
        answers, total, reward, kl, kl3, entropy, tokens, finished = sums
        row = dict(score=total / answers, reward=reward / answers, kl=kl / answers, kl_k3=kl3 / answers, kl_coefficient=self.kl.value,
                   entropy=entropy / tokens, length=tokens / answers, finished=finished / answers)
        if returns is not None:
            row["explained_variance"] = float(rl.explained_variance(batch.values[:, :-1], returns, batch.answer))
        return row["kl"], row

    def judge(self, step):
        """Answers to the held-out prompts, with the same noise each time: mean score, gold score where the judge's rules apply, length."""
        (end, *_), pad_id, totals = self.end_ids, self.tokenizer.pad_token_id, torch.zeros(5)
        for start in range(0, len(self.dev), 64 * world_size()):
            mine = range(start + rank(), min(start + 64 * world_size(), len(self.dev)), world_size())
            part = [self.dev[i] for i in mine or [0]]                   # sharded weights: all processes take part
            sampled = self._sample(part, [hash((self.config.seed, -1, i)) for i in mine or [0]])
            answers = [[t for t in a if t != end] for a in sampled]
            ids = [row["prompt_ids"] + a + [end] for row, a in zip(part, answers)]
            texts = [(row["record"].prompt, self.tokenizer.decode(a)) for row, a in zip(part, answers)]
            scores = self.rewards(pad(ids, pad_id).to(device()), pad([[1] * len(i) for i in ids], 0).to(device()), texts)
            golds = [gold(*t) for t in texts if applies(t[0])]
            totals += bool(mine) * torch.tensor([len(part), float(scores.sum()), sum(map(len, sampled)), len(golds), sum(golds)])
        count, total, length, judged, golds = all_sum(totals).tolist()
        if count:
            row = {"step": step, "eval_score": total / count, "eval_length": length / count}
            self.add(row | ({"eval_gold": golds / judged} if judged else {}))

    def add(self, row):
        self.history.append(row)
        say(self.config.output_dir, log_line(row))
        for line in health.warnings_at(self.history, self.config.to_dict()):
            say(self.config.output_dir, line)

    def resume(self):
        """Step to go on from: 0, or that of the newest whole checkpoint, whose state is loaded."""
        state = load_checkpoint(self.config.output_dir, self.engines, rank()) if self.config.resume else None
        if state is None:
            return 0
        self.history, self.samples, self.kl.value = json.loads(state["history"]), json.loads(state["samples"]), state["kl"]
        return state["step"]

    def checkpoint(self, step):
        state = {"kl": self.kl.value, "history": json.dumps(self.history), "samples": json.dumps(self.samples)}
        save_checkpoint(self.config.output_dir, step, state, self.engines, self.config.save_total_limit, rank(),
                        dist.barrier if dist.is_initialized() else lambda: None)

    def finish(self, seconds):
        """Save actor (adapters merged) and tokenizer into the run folder -> Result."""
        self.samples += self._samples(self.total_steps)
        weights = self.actor.weights() if self.config.zero_stage == 3 else None
        if rank() == 0:
            model = merged(self.actor.model, torch.arange(8, 24, device=device())[None])
            save_folder(self.config.output_dir, lambda folder: (
                model.save_pretrained(folder, **({"state_dict": weights} if weights else {})), self.tokenizer.save_pretrained(folder)))
        trained = [row for row in self.history if "score" in row]
        held_out = [row for row in self.history if "eval_score" in row]
        metrics = {k: v for k, v in trained[-1].items() if k in ("score", "kl", "length", "finished", "entropy")}
        for row, suffix in ((held_out[0], "_before"), (held_out[-1], "")) if held_out else ():
            metrics |= {f"{k}{suffix}": v for k, v in row.items() if k.startswith("eval_")}
        spans, answers = [row["seconds"] for row in trained], self.per_step * self.config.answers_per_prompt
        metrics |= {"seconds_per_step": statistics.median(spans), "memory_gib": peak_memory(), "steps": self.total_steps, "seconds": seconds,
                    "tokens_per_second": statistics.median(row["length"] * answers / row["seconds"] for row in trained)}
        return Result(self.config.stage, self.config.to_dict(), metrics | sample_metrics(self.samples), self.config.output_dir,
                      self.history, self.samples)

    def _samples(self, step):
        return answer_samples(self.actor.model, self.tokenizer, self.family,
                              (row["record"] for row in self.dev), self.config, step)

    def _critic(self):
        """The critic that is trained along, started from the reward model or from the actor, or None."""
        if self.config.critic not in ("reward", "actor"):
            return None
        model = copy.deepcopy(self.rewards.models[0]) if self.config.critic == "reward" else \
            RewardModel.from_causal(load_model(self.config.model_path, dtype=self.config.dtype), seed=self.config.seed)
        if self.config.gradient_checkpointing:
            model.gradient_checkpointing_enable()
        return set_dropout(model, self.config.dropout).requires_grad_(True).train()
