"""PPO written plainly from the papers, an answer at a time, unpadded, in float64: what tests/test_ppo_proofs.py holds the loop to.

Schulman et al. 2016 (eq. 16) and 2017 (eq. 7), InstructGPT (eq. 2), Ziegler et al. 2019 with the details that Huang et al. 2023 dug out of its
code, Ahmadian et al. 2024 (RLOO), DeepSeekMath (GRPO), Liu et al. 2025 (Dr. GRPO). Of the library only the loaders are used, no arithmetic.
"""
import math

import torch

import rlhfkit as rk
from rlhfkit.models.value import load_reward_model


class Reference:
    """The four models of a run and its steps. A row is a dict with prompt_ids, ids and finished, as a run with keep_rollouts stores it."""

    def __init__(self, config):
        self.config, self.coefficient, self.steps, self.seen, self.offsets = config, config.kl_coefficient, 0, [], []
        self.actor, self.old = (rk.load_model(config.model_path).double() for _ in range(2))
        self.rewards = [load_reward_model(path).double() for path in config.reward_path.split(",")]
        self.critic = load_reward_model(config.reward_path.split(",")[0]).double() if config.critic == "reward" else None
        self.adams = [Adam(model) for model in (self.actor, self.critic) if model]

    def step(self, rows, mixed=()):
        """rows: the step's answers; mixed: for each update its rows of input_ids and labels -> figures as the run's history has them."""
        config, rows = self.config, [self.looked_at(row) for row in rows]
        self.shape(rows)
        figures = self.seen_in(rows)
        rate = (config.max_steps - self.steps) / config.max_steps               # linear, without warm-up: the whole rate at first, never 0
        updates = []
        for _ in range(config.ppo_epochs):
            for start in range(0, len(rows), config.mini_batch_size):
                updates.append(self.update(rows[start:start + config.mini_batch_size], mixed[len(updates)] if mixed else (), rate))
        if config.kl_target:                                                    # Ziegler et al. 2019, section 2.2
            error = max(-0.2, min(0.2, figures["kl"] / config.kl_target - 1))
            self.coefficient *= 1 + error * len(rows) / config.kl_horizon
        self.steps += 1
        return figures | {name: mean([u[name] for u in updates]) for name in updates[0]} | {"updates": len(updates)}

    @torch.no_grad()
    def looked_at(self, row):
        """A row with the log-probs, values and score of the models as they are now."""
        row = dict(row, old=self.logps(self.actor, row)[0], ref=self.logps(self.old, row)[0])
        row["scores"] = [float(self.values(model, row)[-1]) for model in self.rewards]
        if self.config.critic != "none":
            row["values"] = [float(v) for v in self.values(self.critic or self.rewards[0], row)]
        return row

    def logps(self, model, row):
        """Log-prob of each answer token under the tempered softmax, and the entropy where it was drawn: two lists of scalars."""
        logits = model(input_ids=torch.tensor([row["prompt_ids"] + row["ids"]]), use_cache=False).logits[0]
        first, found, entropies = len(row["prompt_ids"]), [], []
        for t, token in enumerate(row["ids"]):
            logps = torch.log_softmax(logits[first + t - 1] / self.config.temperature, 0)
            found.append(logps[token])
            entropies.append(-(logps.exp() * logps).sum())
        return found, entropies

    def values(self, model, row):
        """Values of the state before each answer token, and of the one after the last."""
        hidden = model.transformer(input_ids=torch.tensor([row["prompt_ids"] + row["ids"]]), use_cache=False).last_hidden_state[0]
        return list(hidden[len(row["prompt_ids"]) - 1:] @ model.v_head.weight[0])

    def shape(self, rows):
        """Rewards and advantages into the rows."""
        config = self.config
        if len(self.rewards) > 1:                                               # each model centred on its mean over the first answers
            self.offsets = self.offsets or [mean(scores) for scores in zip(*(row["scores"] for row in rows))]
            for row in rows:
                row["scores"] = [score - offset for score, offset in zip(row["scores"], self.offsets)]
        for row in rows:
            spread = math.sqrt(variance(row["scores"]))
            row["score"] = {"mean": mean(row["scores"]), "min": min(row["scores"]), "spread": mean(row["scores"]) - spread}[config.ensemble]
        if config.normalize_scores == "running" or not self.seen:
            self.seen += [row["score"] for row in rows]
        for row in rows:
            row["values"] = [self.scaled(value) for value in row.get("values") or ()]
            score = max(-config.score_clip, min(config.score_clip, self.scaled(row["score"])))
            score += 0 if row["finished"] else config.unfinished_score
            paid = self.coefficient if config.kl_in == "reward" else 0.0
            row["kl"] = [float(a - b) for a, b in zip(row["old"], row["ref"])]
            row["rewards"] = [-paid * k for k in row["kl"]]
            row["rewards"][-1] += score
        self.generalised(rows) if config.advantage == "gae" else self.grouped(rows)

    def scaled(self, score):
        """A score, or the critic's forecast of one, in standard deviations from the mean of those seen."""
        if self.config.normalize_scores == "none":
            return score
        return (score - mean(self.seen)) / (math.sqrt(variance(self.seen)) + 1e-8)

    def generalised(self, rows):
        """Each advantage as the sum over the errors to come that the paper writes, not as a recursion."""
        config = self.config
        for row in rows:
            values, rewards = list(row["values"]), row["rewards"]
            values[-1] = 0.0                                                    # nothing comes after the end, nor after a cut
            errors = [rewards[t] + config.gamma * values[t + 1] - values[t] for t in range(len(rewards))]
            row["advantages"] = [sum((config.gamma * config.lam) ** (s - t) * errors[s] for s in range(t, len(errors)))
                                 for t in range(len(errors))]
            row["returns"] = [a + v for a, v in zip(row["advantages"], values)]
        everything = [a for row in rows for a in row["advantages"]]
        if config.whiten_advantages:
            for row in rows:
                row["advantages"] = [(a - mean(everything)) / math.sqrt(variance(everything) + 1e-8) for a in row["advantages"]]

    def grouped(self, rows):
        size = self.config.answers_per_prompt
        for start in range(0, len(rows), size):
            sums = [sum(row["rewards"]) for row in rows[start:start + size]]
            for i, row in enumerate(rows[start:start + size]):
                others = sums[:i] + sums[i + 1:]
                deviation = math.sqrt(sum((s - mean(sums)) ** 2 for s in sums) / (size - 1))
                one = {"rloo": sums[i] - mean(others), "dr_grpo": sums[i] - mean(sums), "grpo": (sums[i] - mean(sums)) / (deviation + 1e-4)}
                row["advantages"] = [one[self.config.advantage]] * len(row["ids"])

    def update(self, rows, mixed, rate):
        """One step of both optimisers on a mini-batch."""
        config, tokens = self.config, sum(len(row["ids"]) for row in rows)
        found = dict.fromkeys(("policy_loss", "entropy", "clip_fraction", "approx_kl", *(("value_loss",) if self.critic else ())), 0.0)
        if mixed:
            found["ptx_loss"] = self.mix(mixed)
        for row in rows:
            weight = {"tokens": 1 / tokens, "answers": 1 / len(row["ids"]) / len(rows), "constant": 1 / config.max_new_tokens / len(rows)}
            policy, bonus, loss, critic = 0.0, 0.0, 0.0, 0.0
            for t, (new, entropy) in enumerate(zip(*self.logps(self.actor, row))):
                ratio, advantage = (new - row["old"][t]).exp(), row["advantages"][t]
                policy -= weight[config.loss_mean] * min(ratio * advantage, max(1 - config.clip, min(1 + config.clip, ratio)) * advantage)
                if config.kl_in == "loss":
                    loss += weight[config.loss_mean] * self.coefficient * (new - row["ref"][t]) ** 2 / 2
                bonus += entropy / tokens
                found["clip_fraction"] += float(abs(ratio - 1) > config.clip) / tokens
                found["approx_kl"] += float((ratio - 1 - ratio.log()).detach()) / tokens
            (policy + loss - config.entropy_coefficient * bonus).backward()
            if self.critic:
                values = [self.scaled(value) for value in self.values(self.critic, row)]
                critic = 0.0 * sum(values)                                      # a tensor also where every token is clipped
                for value, old, wanted in zip(values, row["values"], row["returns"]):
                    held = max(old - config.value_clip, min(old + config.value_clip, value)) if config.value_clip else value
                    critic += max((value - wanted) ** 2, (held - wanted) ** 2) / 2 / tokens
                critic.backward()
            for name, value in (("policy_loss", policy + loss), ("entropy", bonus), ("value_loss", critic)):
                if name in found:
                    found[name] += float(torch.as_tensor(value).detach())
        names, rates = ("grad_norm", "critic_grad_norm"), (config.learning_rate, config.critic_learning_rate or config.learning_rate)
        return found | {name: adam.step(one * rate, config) for name, adam, one in zip(names, self.adams, rates)}

    def mix(self, rows):
        """Add the gradient of the mean loss over all tokens of the rows mixed in (InstructGPT's third term) -> that loss."""
        count, total = sum(label != -100 for row in rows for label in row["labels"][1:]), 0.0
        for row in rows:
            logps = self.actor(input_ids=torch.tensor([row["input_ids"]]), use_cache=False).logits[0].log_softmax(-1)
            total -= sum(logps[t, label] for t, label in enumerate(row["labels"][1:]) if label != -100)
        (self.config.ptx_coefficient * total / count).backward()
        return float(total.detach()) / count

    def seen_in(self, rows):
        """Figures of a rollout; a critic's only where there is one."""
        scores, kls, sums = [row["score"] for row in rows], [k for row in rows for k in row["kl"]], len(rows)
        pairs = [list(zip(row["ids"], row["ids"][1:])) for row in rows]
        figures = dict(
            score=mean(scores), score_std=math.sqrt(variance(scores)), score_spread=mean([math.sqrt(variance(row["scores"])) for row in rows]),
            reward=sum(sum(row["rewards"]) for row in rows) / sums, kl=sum(kls) / sums, kl_k2=sum(k * k / 2 for k in kls) / sums,
            kl_k3=sum(math.exp(-k) - 1 + k for k in kls) / sums, length=mean([len(row["ids"]) for row in rows]),
            finished=mean([row["finished"] for row in rows]), kl_coefficient=self.coefficient,
            repetition=mean([(len(p) - len(set(p))) / len(p) if p else 0.0 for p in pairs]))
        if self.config.advantage == "gae":
            values, returns = ([x for row in rows for x in row[name][:len(row["ids"])]] for name in ("values", "returns"))
            left = variance([r - v for r, v in zip(returns, values)])
            figures |= {"value_std": math.sqrt(variance(values)), "explained_variance": 1 - left / variance(returns)}
        return figures


class Adam:
    """AdamW (Loshchilov and Hutter 2019, algorithm 2) with moments of .9 and .95 after clipping by the norm of all gradients."""

    def __init__(self, model):
        self.moments = [(p, torch.zeros_like(p), torch.zeros_like(p)) for p in model.parameters()]
        self.count, self.largest = 0, [torch.zeros_like(p) for p in model.parameters()]      # |gradient| so far

    @torch.no_grad()
    def step(self, rate, config):
        self.count += 1
        norm = math.sqrt(sum(float((p.grad ** 2).sum()) for p, _, _ in self.moments if p.grad is not None))
        for (p, first, second), largest in zip(self.moments, self.largest):
            if p.grad is None:
                continue
            gradient = p.grad * min(1.0, config.max_grad_norm / (norm + 1e-6))
            largest.copy_(torch.maximum(largest, gradient.abs()))
            first.copy_(0.9 * first + 0.1 * gradient)
            second.copy_(0.95 * second + 0.05 * gradient ** 2)
            p *= 1 - rate * config.weight_decay
            p -= rate * first / (1 - 0.9 ** self.count) / ((second / (1 - 0.95 ** self.count)).sqrt() + 1e-8)
            p.grad = None
        return norm


def mean(numbers):
    return sum(numbers) / len(numbers)


def variance(numbers):
    return sum((x - mean(numbers)) ** 2 for x in numbers) / len(numbers)
