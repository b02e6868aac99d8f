"""The statistics of an evaluation: credit for ranked choices, 95 % intervals, the paired comparison of two models.

Lists in, numbers out. The 2023 kit printed bare accuracies, gave ties to the right answer, and compared by looking.
"""
import math

import numpy as np

Z = 1.959963984540054           # 97.5 % point of the normal distribution
Z_POWER = 0.8416212335729143    # 80 % point


def credit(scores, gold):
    """1 if the choice at index `gold` has the best score, 1/k if it is among k tied best, else 0."""
    if any(math.isnan(s) for s in scores):
        raise ValueError(f"the log-likelihoods of the choices are {scores}; they must be numbers; look at the model's "
                         "weights, or take float32")
    best = max(scores)
    return float(scores[gold] == best) / sum(s == best for s in scores)


def wilson(successes, n):
    """95 % Wilson score interval (low, high) of a rate (Wilson 1927); `successes` may be a sum of shares."""
    if n < 1:
        raise ValueError(f"n is {n}; it must be > 0; there is nothing to take an interval of")
    p, spread = successes / n, 1 + Z * Z / n
    centre = (p + Z * Z / (2 * n)) / spread
    half = Z * math.sqrt(max(0.0, p * (1 - p)) / n + Z * Z / (4 * n * n)) / spread
    return max(0.0, min(p, centre - half)), min(1.0, max(p, centre + half))         # rounding: 0 of n has low 0


def mean_interval(values):
    """95 % normal interval (low, high) of the mean of scores in [0, 1], cut to [0, 1].

    Scores that are all the same get Wilson's interval: their own spread of 0 would claim certainty.
    """
    mean, n = float(np.mean(values)), len(values)
    if n < 2 or np.ptp(values) == 0:
        return wilson(mean * n, n)
    half = Z * float(np.std(values, ddof=1)) / math.sqrt(n)
    return max(0.0, mean - half), min(1.0, mean + half)


def macro_interval(groups):
    """95 % normal interval (low, high) of the mean of the groups' means, cut to [0, 1]; groups: lists of scores in [0, 1].

    One variance within groups for all, so that a group of one item counts too; where it is 0, the means are the items.
    """
    means, n = [float(np.mean(group)) for group in groups], sum(map(len, groups))
    within = sum(float(np.var(group)) * len(group) for group in groups) / max(1, n - len(groups))
    if within == 0:
        return mean_interval(means)
    half = Z * math.sqrt(within * sum(1 / len(group) for group in groups)) / len(groups)
    return max(0.0, float(np.mean(means)) - half), min(1.0, float(np.mean(means)) + half)


def paired_interval(differences, resamples=2000, seed=0):
    """95 % interval (low, high) of the mean difference over paired items: percentiles of a bootstrap (Efron 1979)."""
    differences, rng = np.asarray(differences, dtype=np.float64), np.random.default_rng(seed)
    n = len(differences)
    means = [differences[rng.integers(n, size=n)].mean() for _ in range(resamples)]
    return tuple(float(x) for x in np.percentile(means, [2.5, 97.5]))


def mcnemar(differences):
    """Two-sided p of the exact McNemar test (sign test over items on which the two differ); 1.0 where they never do."""
    up, down = sum(bool(d > 0) for d in differences), sum(bool(d < 0) for d in differences)     # Python ints: 2 ** 188
    tail = sum(math.comb(up + down, k) for k in range(min(up, down) + 1))
    return min(1.0, 2 * tail / 2 ** (up + down))


def detectable(differences):
    """The smallest true mean difference that a two-sided 5 % test over as many paired items finds in 80 % of cases, from
    their own variance (normal approximation); NaN where the differences do not vary, which says nothing of others."""
    spread = float(np.std(differences, ddof=1)) if len(differences) > 1 else 0.0
    return (Z + Z_POWER) * spread / math.sqrt(len(differences)) if spread else math.nan
