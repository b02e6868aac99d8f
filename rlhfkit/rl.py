"""The arithmetic of PPO, RLOO and GRPO: what a token is rewarded with, what its advantage is, what the losses are.

A loss is a sum over answer tokens with weights that the caller counts over the whole batch, so any split gives
one gradient. The 2023 kit ran GAE and the KL over padding and never whitened. Everywhere (B, T): position t holds the
log-prob of token t and the value of the state before it, and `answer` is 1 where the token is an answer's.
"""
import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F


def token_logps(logits, ids, temperature=1.0):
    """logits (B, T, V) that predict ids (B, T) -> (B, T) log-probs in nats under softmax(logits / temperature)."""
    logits = _scaled(logits, temperature)
    return logits.gather(-1, ids[..., None])[..., 0] - logits.logsumexp(-1)


def entropy(logits, temperature=1.0):
    """logits (B, T, V) -> (B, T) entropy in nats of softmax(logits / temperature)."""
    logps = F.log_softmax(_scaled(logits, temperature), -1)
    return -(logps.exp() * logps).sum(-1)


def kl_estimates(logps, ref_logps, answer):
    """logps, ref_logps, answer (B, T) -> (k1, k2, k3), each (B, T): KL(policy || reference) in nats, from its samples.

    k1 is unbiased and may be negative, k2 is biased but has the right gradient as a loss, k3 is unbiased and never
    negative (Schulman, "Approximating KL Divergence", 2020).
    """
    k1 = (logps - ref_logps) * answer                               # masked before exp: a pad may hold anything
    return k1, k1.square() / 2, torch.expm1(-k1) + k1


def ensemble(scores, rule):
    """scores (M, B) of M reward models -> (B,): their `mean`, `min`, or `spread`: mean less population standard deviation, so that answers
    the models do not agree on gain little (Coste et al. 2024, section 3)."""
    if rule == "min":
        return scores.amin(0)
    return scores.mean(0) - (scores.std(0, unbiased=False) if rule == "spread" else 0.0)


def shaped_rewards(score, logps, ref_logps, answer, kl_coefficient, finished, unfinished_score=0.0):
    """score, finished (B,); logps, ref_logps, answer (B, T) -> rewards (B, T) (InstructGPT, eq. 2).

    Each answer token pays kl_coefficient * k1; the last one also gets the score, plus unfinished_score when the answer
    was cut before its end token. A row without answer tokens gets nothing.
    """
    k1, _, _ = kl_estimates(logps, ref_logps, answer)
    to_the_end = answer.flip(1).cumsum(1).flip(1)                   # (B, T) answer tokens from here on
    last = answer * (to_the_end == 1)
    score = score + unfinished_score * (1 - finished.to(score.dtype))
    return score[:, None] * last - kl_coefficient * k1


def gae(rewards, values, answer, finished, gamma=1.0, lam=0.95, bootstrap=None):
    """rewards, values, answer (B, T); finished, bootstrap (B,) -> (advantages, returns) (B, T), 0 off the answer.

    The state after the end token is worth 0; after an answer cut by length it is worth `bootstrap` (0 if None).
    Positions off the answer are stepped over, so padding changes nothing (Schulman et al. 2016, eq. 16).
    """
    answer = answer.to(values.dtype)
    next_value = torch.zeros_like(values[:, 0]) if bootstrap is None else bootstrap * (1 - finished.to(values.dtype))
    advantage, columns = torch.zeros_like(next_value), []
    for t in reversed(range(values.shape[1])):
        here = answer[:, t]
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = here * (delta + gamma * lam * advantage) + (1 - here) * advantage
        next_value = here * values[:, t] + (1 - here) * next_value
        columns.append(advantage)
    advantages = torch.stack(columns[::-1], 1) * answer             # (B, T)
    return advantages, advantages + values * answer


def rloo(scores, group):
    """scores (B,), `group` consecutive rows a prompt -> advantages (B,): score less the mean of the other answers.

    Ahmadian et al. 2024. Raises ValueError when there are no other answers.
    """
    scores = _grouped(scores, group)
    return ((scores - scores.mean(1, keepdim=True)) * group / (group - 1)).flatten()


def grpo(scores, group):
    """scores (B,), `group` consecutive rows a prompt -> advantages (B,): score standardised within its prompt.

    DeepSeekMath, section 4.1; standard deviation over group - 1, plus 1e-4, as in TRL. Raises ValueError for group 1.
    """
    scores = _grouped(scores, group)
    return ((scores - scores.mean(1, keepdim=True)) / (scores.std(1, keepdim=True) + 1e-4)).flatten()


def dr_grpo(scores, group):
    """scores (B,), `group` consecutive rows a prompt -> advantages (B,): score less the mean of its prompt, not divided by the spread, which
    favours questions that are all but always, or never, answered (Liu et al. 2025, section 3.1). Raises ValueError for group 1."""
    scores = _grouped(scores, group)
    return (scores - scores.mean(1, keepdim=True)).flatten()


def whiten(x, mask, shift_mean=True):
    """x, mask (B, T) -> (B, T), 0 off the mask; on it variance 1 and, unless shift_mean is False, mean 0.

    Population statistics of the batch of all processes, not of a row; a constant x becomes 0 (shift_mean False: stays).
    """
    mean, variance = (m.to(x.dtype) for m in moments(x, mask))
    whitened = (x - mean) * (variance + 1e-8).rsqrt()
    return (whitened if shift_mean else whitened + mean) * mask


def token_weights(answer, loss_mean, tokens, answers, max_new_tokens):
    """answer (B, T); tokens, answers: of the whole batch -> (B, T), what each answer token weighs in the policy's loss.

    `tokens`: every token the same (DAPO); `answers`: every answer the same (DeepSeekMath, eq. 3), which makes a token of a long wrong
    answer cheap; `constant`: 1 / (answers * max_new_tokens), free of both biases (Dr. GRPO, Liu et al. 2025, section 3.2).
    """
    if loss_mean == "answers":
        return answer / answer.sum(1, keepdim=True).clamp(min=1) / answers
    return answer / (tokens if loss_mean == "tokens" else answers * max_new_tokens)


def policy_loss(logps, old_logps, advantages, weight, clip):
    """logps, old_logps, advantages, weight (B, T), weight 0 off the answer -> scalar.

    -sum of weight * min(ratio * A, clamp(ratio, 1 - clip, 1 + clip) * A) (PPO, eq. 7).
    """
    ratio = ((logps - old_logps) * (weight > 0)).exp()              # masked before exp: inf * 0 at a pad would be NaN
    gain = torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)
    return -(gain * weight).sum()


def ratio_stats(logps, old_logps, answer, clip, tokens):
    """logps, old_logps, answer (B, T); tokens: answer tokens of the whole batch -> dict of numbers without gradient.

    `clip_fraction` and `approx_kl` (k3 of old against new, nats a token) add up over splits as the loss does; `ratio_deviation` is the
    largest |ratio - 1| here.
    """
    log_ratio = (logps.detach() - old_logps) * answer
    deviation = torch.expm1(log_ratio).abs()
    return {"clip_fraction": float(((deviation > clip) * answer).sum() / tokens),
            "approx_kl": float((torch.expm1(log_ratio) - log_ratio).sum() / tokens), "ratio_deviation": float(deviation.max())}


def value_loss(values, old_values, returns, weight, clip):
    """values, old_values, returns, weight (B, T), weight 0 off the answer -> scalar.

    Half the larger of the squared errors of the value and of the value held within `clip` of the old one; clip 0: of the value alone.
    """
    error = (values - returns).square()
    if clip:
        error = torch.maximum(error, (old_values + (values - old_values).clamp(-clip, clip) - returns).square())
    return 0.5 * (error * weight).sum()


def explained_variance(values, returns, mask):
    """values, returns, mask (B, T) -> scalar: 1 - Var(returns - values) / Var(returns) over the mask of all processes.

    1 is a perfect critic, 0 one that knows nothing, below 0 one that misleads. Constant returns cannot be explained: 0.
    """
    _, left = moments(returns - values, mask)
    _, total = moments(returns, mask)
    return torch.where(total > 1e-12, 1 - left / total, torch.zeros_like(total))


def moments(x, mask):
    """x, mask (B, T) -> mean and population variance of x over the mask, in float64, summed over all processes when there are several."""
    x, mask = x.detach().double(), mask.double()
    sums = _summed(torch.stack([(x * mask).sum(), (x.square() * mask).sum(), mask.sum()]))
    total, squares, count = sums
    mean = total / count.clamp(min=1)
    return mean, (squares / count.clamp(min=1) - mean.square()).clamp(min=0)


@dataclass
class FixedKL:
    """The KL coefficient that stays where it is."""
    value: float

    def update(self, kl, n):
        """kl: nats an answer; n: answers seen since the last update."""


@dataclass
class AdaptiveKL:
    """Moves the coefficient so that the KL of an answer approaches `target` nats (Ziegler et al. 2019, section 2.2)."""
    value: float
    target: float
    horizon: int                              # answers after which an error of 20 % or more has moved the value by 20 %

    def update(self, kl, n):
        """kl: mean nats an answer; n: answers seen since the last update."""
        error = min(max(kl / self.target - 1, -0.2), 0.2)
        self.value *= 1 + error * n / self.horizon


@dataclass
class Moments:
    """Mean and standard deviation of the scores seen so far, over all processes: of the first rollout, whose answers are the starting
    model's (`running` False; Ziegler et al. 2019, section 2.1), or of all rollouts."""
    running: bool = True
    count: float = 0.0
    mean: float = 0.0
    squares: float = 0.0                      # sum of squared distances from the mean

    def update(self, scores):
        """scores (B,) of this process."""
        if self.count and not self.running:
            return
        ones = torch.ones_like(scores)
        mean, variance = (float(m) for m in moments(scores, ones))
        count = float(_summed(ones.sum().double()))
        apart, total = mean - self.mean, self.count + count
        self.squares += variance * count + apart * apart * self.count * count / total       # Chan et al. 1979
        self.mean += apart * count / total
        self.count = total

    def normalize(self, scores):
        """scores (any shape) -> in standard deviations from the mean; where all were the same, the distance from it."""
        deviation = math.sqrt(self.squares / max(self.count, 1.0))
        return (scores - self.mean) / (deviation if deviation > 1e-6 else 1.0)


def _scaled(logits, temperature):
    """Half precision is too coarse for logsumexp: float32, or float64 where the model runs in it."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature


def _grouped(scores, group):
    if group < 2 or len(scores) % group:
        raise ValueError(f"answers_per_prompt is {group} for {len(scores)} scores; rloo and grpo compare answers of "
                         "one prompt, so it must be >= 2 and divide the number of scores; try 4, or advantage='gae'")
    return scores.view(-1, group)


def _summed(x):
    if dist.is_initialized():
        dist.all_reduce(x)
    return x
