"""A rollout: answers sampled from the actor and everything that the update must know of them, by the modules that train.

The ids trained on are the ids sampled; the 2023 kit decoded them and encoded again. Log-probs are those of the temperature-scaled
distribution without top-k and top-p, for actor, reference and sampler alike, so a filter shows as a bias and not as a wrong ratio.
"""
import copy
import statistics
from dataclasses import dataclass, replace
from functools import partial

import torch

from rlhfkit import rl
from rlhfkit.engine import all_sum, device, gather_list, rank, set_dropout, world_size
from rlhfkit.families import load_model
from rlhfkit.models.value import RewardModel
from rlhfkit.rewards import AdapterOff, placed
from rlhfkit.rollout import fast, repetition, rollout
from rlhfkit.rows import pad
from rlhfkit.samples.couplets import applies, gold
from rlhfkit.trainer import adapt


JUDGED = 64                 # held-out prompts that a process answers at once
CORRELATED = 30             # held-out answers from which on a correlation is more than noise


@dataclass
class Rollout:
    """B sampled answers of this process, of A tokens at most, and what the update needs of them."""

    rows: list                      # B prompt rows
    texts: list                     # (prompt, answer) strings
    ids: torch.Tensor               # (B, P + A) prompts padded left, answers padded right
    mask: torch.Tensor              # (B, P + A)
    answer: torch.Tensor            # (B, A) 1 where a token is the answer's
    sampled: torch.Tensor           # (B, A) the sampler's log-probs
    logps: torch.Tensor             # (B, A) of the actor that sampled, by the module that trains; or the sampler's
    ref_logps: torch.Tensor         # (B, A)
    values: torch.Tensor | None     # (B, A) of the state before each token; None without a critic
    score: torch.Tensor             # (B,)
    spread: torch.Tensor            # (B,) between the reward models
    finished: torch.Tensor          # (B,) 1 where the end token was sampled


class Experience:
    """The models that make rollouts: actor and critic, which are trained, the reference, and the rewards, which are not."""

    def __init__(self, config, tokenizer, family, actor, critic, rewards, micro):
        """actor, critic: Engines, critic None where none is trained; rewards: Rewards; micro: rows of a forward pass, those of the update's
        passes, or ratios would be off by rounding."""
        self.config, self.tokenizer, self.actor, self.critic, self.rewards, self.micro = config, tokenizer, actor, critic, rewards, micro
        self.end_ids, self.pad_id = family.end_ids(tokenizer), tokenizer.pad_token_id
        if critic and config.lora_rank and config.critic == "reward":
            rewards.models[0] = AdapterOff(critic, critic.model)
        self.reference = AdapterOff(actor, actor.model) if config.lora_rank else load_model(
            config.model_path, dtype=config.dtype, device="cpu" if config.frozen_on == "host" else device()).requires_grad_(False)
        self.decoder = fast(actor.model, compiled=True, length=config.max_length) if config.zero_stage < 3 else None
        self.autocast = partial(torch.autocast, device().type, torch.bfloat16, enabled=config.dtype == "mixed")

    def sample(self, rows, seeds):
        """-> (answers, log-probs): lists of lists."""
        config = self.config
        with self.actor.whole() as model, self.autocast():
            return rollout(model, [row["prompt_ids"] for row in rows], config.max_new_tokens, self.end_ids, self.pad_id, seeds,
                           config.temperature, config.top_k, config.top_p, synced=config.zero_stage == 3, decoder=self.decoder)

    @torch.no_grad()
    def score(self, rows, answers, sampled, valued=True):
        """Log-probs, values and scores of the sampled ids, by the modules that train."""
        (end, *_), config, prompts = self.end_ids, self.config, [row["prompt_ids"] for row in rows]
        size = max(map(len, answers))
        ids = torch.cat([pad(prompts, self.pad_id, side="left"), pad(answers, self.pad_id)], 1).to(device())
        answer = pad([[1] * len(a) for a in answers], 0, size).to(device())
        mask = torch.cat([pad([[1] * len(p) for p in prompts], 0, side="left").to(device()), answer], 1)
        sampled = torch.tensor([row + [0.0] * (size - len(row)) for row in sampled], device=device())
        parts = list(zip(ids.split(self.micro), mask.split(self.micro)))
        with self.autocast():
            with placed([self.reference], config.frozen_on == "host"):
                ref_logps = torch.cat([self.logps(self.reference, *part, size)[0] for part in parts])
            logps = torch.cat([self.logps(self.actor, *part, size)[0] for part in parts]) if config.rescore else sampled
            values = None
            if valued and config.critic != "none":
                with placed(self.rewards.models[:1], config.frozen_on == "host" and not self.critic):
                    value_of = self.critic or self.rewards.models[0]
                    values = torch.cat([value_of(i, attention_mask=m)[:, -size - 1:-1] for i, m in parts])
            texts = [(row["record"].prompt, self.tokenizer.decode([t for t in a if t != end])) for row, a in zip(rows, answers)]
            score, spread = self.rewards(ids, mask, texts)
        finished = torch.tensor([float(a[-1] == end) for a in answers], device=device())
        return Rollout(rows, texts, ids, mask, answer.to(logps.dtype), sampled, logps, ref_logps, values, score, spread, finished)

    def logps(self, model, ids, mask, size):
        """(log-probs (B, size) of the last `size` ids, logits that predict them) under the temperature-scaled distribution."""
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=size + 1).logits[:, -size - 1:-1]
        return rl.token_logps(logits, ids[:, -size:], self.config.temperature), logits

    @torch.no_grad()
    def judged(self, rows):
        """Answers to held-out prompt rows, with the same noise each time -> eval_score, eval_length, eval_finished, eval_kl over all processes,
        and eval_gold where the judge's rules apply; {} without rows."""
        found, golds, world, seed = [], [], world_size(), self.config.seed
        for start in range(0, len(rows), JUDGED * world):
            there = range(start, min(start + JUDGED * world, len(rows)))
            mine, each = there[rank()::world], -(-len(there) // world)
            at = [*mine, *[0] * (each - len(mine))]                     # sharded weights: all processes make as many passes
            batch = self.score([rows[i] for i in at], *self.sample([rows[i] for i in at], [hash((seed, -1, i)) for i in at]), valued=False)
            found.append(figures(batch, counted=len(mine)))
            golds += [(gold(*text), score) for text, score in zip(batch.texts[:len(mine)], batch.score.tolist()) if applies(text[0])]
        total = sum(count for _, count in found)
        means = {f"eval_{name}": sum(row[name] * count for row, count in found) / total
                 for name in ("score", "length", "finished", "kl") if found}
        return means | gold_figures(gather_list(golds))


def critic_for(config, family, rewards):
    """The critic that is trained along, started from the reward model or from the actor, or None."""
    if config.critic not in ("reward", "actor"):
        return None
    if config.critic == "actor":
        model = RewardModel.from_causal(load_model(config.model_path, dtype=config.dtype), seed=config.seed)
    else:               # with LoRA the reward model is the critic without its adapters
        model = rewards.models[0] if config.lora_rank else copy.deepcopy(rewards.models[0])
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    return adapt(set_dropout(model, config.dropout).requires_grad_(True), config, family).train()


def figures(batch, rewards=None, returns=None, counted=None):
    """A Rollout, rewards (B, A), returns (B, A) -> (figures over all processes, `kl` in nats an answer (k1) among them; answers).
    counted: rows of this process that are no stand-ins, the first ones; None: all."""
    batch = replace(batch, **{name: value[:counted] for name, value in vars(batch).items() if value is not None})
    k1, k2, k3 = rl.kl_estimates(batch.logps, batch.ref_logps, batch.answer)
    tokens = batch.answer.sum()
    sums = dict(score=batch.score.sum(), kl=k1.sum(), kl_k2=k2.sum(), kl_k3=k3.sum(), length=tokens, finished=batch.finished.sum(),
                repetition=sum(repetition(ids) for ids in answer_ids(batch)), score_spread=batch.spread.sum(),
                reward=0.0 if rewards is None else rewards.sum())
    gap = ((batch.sampled - batch.logps) * batch.answer).abs().sum()
    mine = [batch.score.double().square().sum(), gap, *sums.values(), len(batch.ids)]
    square, gap, *totals, answers = all_sum([float(x) for x in mine]).tolist()
    row = {name: total / answers for name, total in zip(sums, totals)}
    row |= {"score_std": max(square / answers - row["score"] ** 2, 0.0) ** 0.5}
    row |= {} if torch.equal(batch.logps, batch.sampled) else {"sampler_gap": gap / (row["length"] * answers)}      # else the update pass tells
    if returns is not None:
        _, variance = rl.moments(batch.values, batch.answer)
        row |= {"explained_variance": float(rl.explained_variance(batch.values, returns, batch.answer)), "value_std": float(variance.sqrt())}
    return row, int(answers)


def gold_figures(pairs):
    """(gold, score) of held-out answers -> eval_gold and, of CORRELATED or more, eval_score_gold: their correlation, 0 where one is constant."""
    if not pairs:
        return {}
    golds, scores = zip(*pairs)
    varied = len(set(golds)) > 1 and len(set(scores)) > 1
    correlation = {"eval_score_gold": statistics.correlation(golds, scores) if varied else 0.0} if len(pairs) >= CORRELATED else {}
    return {"eval_gold": statistics.fmean(golds)} | correlation


def answer_ids(batch):
    """The answers of a Rollout as lists of ids."""
    return [ids[:int(n)] for ids, n in zip(batch.ids[:, -batch.answer.shape[1]:].tolist(), batch.answer.sum(1))]


def as_rows(step, numbers, batch, advantages):
    """A Rollout with its answers' numbers -> (number, dict to keep) for each answer."""
    k1, _, _ = rl.kl_estimates(batch.logps, batch.ref_logps, batch.answer)
    arrays = dict(logps=batch.logps, ref_logps=batch.ref_logps, kl=k1, advantages=advantages)
    arrays |= {} if batch.values is None else {"values": batch.values}
    lists = {name: array.tolist() for name, array in arrays.items()}
    return [(number, dict(step=step, id=row["id"], prompt=prompt, answer=answer, score=score, finished=finished, prompt_ids=row["prompt_ids"],
                          ids=ids, values=None) | {name: array[i][:len(ids)] for name, array in lists.items()})
            for i, (number, row, (prompt, answer), ids, score, finished) in enumerate(zip(
                numbers, batch.rows, batch.texts, answer_ids(batch), batch.score.tolist(), batch.finished.tolist()))]
