"""Over-optimisation (Gao et al. 2023): gold against the reward score along the distance, and a rule that stops without gold.

The distance is the root of the KL from the start, along which Gao et al. find gold = d (alpha - beta log d) for RL. The rule asks
what a run without a judge has: the held-out score, what it gains a unit of distance, the disagreement of the reward models.
"""
import math

LEAST_GAIN = 0.1            # of the score's gain a unit of distance so far: below it, more distance buys nothing
LARGEST_FALL = 0.1          # of the score's gain so far, lost again
LARGEST_SPREAD = 1.25       # times the disagreement of the reward models at the start
LARGEST_KL = 1.0            # nats a token: further away, an answer is not that model's any more


def frontier(history):
    """History -> dicts of its held-out rows: step, distance (root of nats an answer), score, gold, spread, length (or None)."""
    points, kl, spread = [], 0.0, None
    for row in history:
        kl, spread = row.get("kl", kl), row.get("score_spread", spread)
        if row.get("eval_score") is not None:
            distance = math.sqrt(max(row.get("eval_kl", kl if row["step"] else 0.0), 0.0))
            points.append(dict(step=row["step"], distance=distance, score=row["eval_score"], gold=row.get("eval_gold"),
                               spread=spread, length=row.get("eval_length")))
    return points


def stop_point(history):
    """The held-out step whose policy is to be kept, or None as long as nothing speaks against going on; gold is not looked at.

    It is the last step before the first sign: the held-out score falls, it gains too little for the distance, the reward models
    disagree a quarter more than at first, or an answer's tokens are a nat away each. Rows after the sign change nothing,
    so it can be asked while a run goes on.
    """
    points = frontier(history)
    first = next((p["spread"] for p in points if p["spread"] is not None), None)
    for number in range(1, len(points)):
        start, last, here = points[0], points[number - 1], points[number]
        gain, way = last["score"] - start["score"], last["distance"] - start["distance"]
        more, further = here["score"] - last["score"], here["distance"] - last["distance"]
        falls = gain > 0 and more < -LARGEST_FALL * gain
        flat = further > 0 and way > 0 and more / further < LEAST_GAIN * gain / way and further > 0.05 * way
        apart = first is not None and here["spread"] > LARGEST_SPREAD * first
        far = here["length"] is not None and here["distance"] ** 2 > LARGEST_KL * here["length"]
        if falls or flat or apart or far:
            return last["step"]
    return None


def hindsight(history):
    """What stopping where gold was best would have given, and what the rule gave -> dict(best_step, best_gold, stopped_step,
    stopped_gold, share), share: of the gain in gold over the start, 1 when there was none to be had.

    Without a sign the rule goes to the last held-out row. Raises ValueError when fewer than two held-out rows have gold.
    """
    points = [p for p in frontier(history) if p["gold"] is not None]
    if len(points) < 2:
        raise ValueError(f"{len(points)} held-out rows have a gold score; it takes two: set eval_steps; the judge knows couplets")
    best, step = max(points, key=lambda p: p["gold"]), stop_point(history)
    stopped = next((p for p in points if p["step"] == step), points[-1])
    gain = best["gold"] - points[0]["gold"]
    return dict(best_step=best["step"], best_gold=best["gold"], stopped_step=stopped["step"], stopped_gold=stopped["gold"],
                share=(stopped["gold"] - points[0]["gold"]) / gain if gain > 0 else float(stopped["gold"] == best["gold"]))


def fit_gold(points):
    """Points of `frontier` with gold -> (alpha, beta, best distance), fitted to gold - first gold = d (alpha - beta log d).

    The best distance is exp(alpha / beta - 1), inf where gold only rises (beta <= 0). Raises ValueError for fewer than two
    distances above 0.
    """
    known = [(p["distance"], p["gold"] - points[0]["gold"]) for p in points if p["gold"] is not None and p["distance"] > 0]
    if len({d for d, _ in known}) < 2:
        raise ValueError(f"{len(known)} held-out rows lie away from the start; a curve of two numbers needs two distances")
    rows = [(d, -d * math.log(d), gain) for d, gain in known]                   # gain = alpha * a + beta * b
    aa, ab, bb, ag, bg = (sum(row[i] * row[j] for row in rows) for i, j in ((0, 0), (0, 1), (1, 1), (0, 2), (1, 2)))
    determinant = aa * bb - ab * ab
    alpha, beta = (ag * bb - bg * ab) / determinant, (bg * aa - ag * ab) / determinant
    return alpha, beta, math.exp(alpha / beta - 1) if beta > 0 else math.inf
