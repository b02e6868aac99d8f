"""Named checks over a run's history: a verdict, the evidence, the likely cause, the parameter to change.

A check is a pure function of (history, config) and one entry in CHECKS; stages ask live what `doctor` asks afterwards.
A healthy run must stay quiet, so means of three logged steps are judged, and a single step only where it is proof
(a NaN, a first-step ratio that is not 1). Live, the first and the newest rows and the held-out ones are looked at, so
that a long run does not pay for its length.
"""
import math
from dataclasses import dataclass
from statistics import fmean, median
from typing import Callable

NOTHING = (None, "")        # the history does not say
FIRST, NEWEST = 10, 100     # rows that are looked at live


@dataclass(frozen=True)
class Check:
    """judge(history, config dict) -> ("ok", "warn", "fail" or None, evidence)."""

    name: str
    stages: tuple
    judge: Callable
    cause: str
    change: str


def doctor(result):
    """A Result -> DataFrame (check, verdict, evidence, cause, change), worst first; checks without data are absent."""
    import pandas
    rows = [dict(check=check.name, verdict=verdict, evidence=evidence,
                 cause="" if verdict == "ok" else check.cause, change="" if verdict == "ok" else check.change)
            for check, verdict, evidence in _findings(result.history, {**result.config, "stage": result.stage})]
    rows.sort(key=lambda row: ("fail", "warn", "ok").index(row["verdict"]))
    return pandas.DataFrame(rows, columns=["check", "verdict", "evidence", "cause", "change"])


def warnings_at(history, config):
    """History so far, config as a dict -> a line for each verdict that the newest row brought, so each is said once."""
    def bad(rows):
        between = [row for row in rows[FIRST:-NEWEST] if "eval_score" in row]
        return {(check.name, verdict): f"{verdict}: {check.name}: {evidence}; {check.cause}; try: {check.change}"
                for check, verdict, evidence in _findings(rows[:FIRST] + between + rows[max(FIRST, len(rows) - NEWEST):], config)
                if verdict != "ok"}
    now = bad(history)
    before = bad(history[:-1]) if now else ()
    return [line for key, line in now.items() if key not in before]


def _findings(history, config):
    for check in CHECKS:
        if config["stage"] in check.stages:
            verdict, evidence = check.judge(history, config)
            if verdict:
                yield check, verdict, evidence


def _series(history, name):
    """The finite values of a figure; what is not finite is the first check's."""
    return [value for row in history if (value := row.get(name)) is not None and value - value == 0]


def _from_start_to_now(name, rows):
    """A check from judge(start, now, config), means of a figure's first and last three values, once it has `rows`."""
    def decorate(judge):
        def check(history, config):
            values = _series(history, name)
            return judge(fmean(values[:3]), fmean(values[-3:]), config) if len(values) >= rows else NOTHING
        return check
    return decorate


def _grade(value, warn, fail):
    return "fail" if value > fail else "warn" if value > warn else "ok"


# ---- all stages

def _finite(history, config):
    names = ("loss", "policy_loss", "value_loss", "ptx_loss", "eval_loss", "score", "kl", "entropy")
    for row in history:
        for name in names:
            if not math.isfinite(row.get(name) or 0):
                return "fail", f"{name} is {row[name]} at step {row.get('step')}"
    return ("ok", "all figures are finite") if any(_series(history, name) for name in names) else NOTHING


def _gradient_norm(history, config):
    found = [NOTHING]
    for name in ("grad_norm", "critic_grad_norm"):
        for row in history:
            if not math.isfinite(row.get(name) or 0) and config.get("dtype") != "float16":   # it overflows while it seeks
                return "fail", f"{name} is {row[name]} at step {row.get('step')}"
        norms = _series(history, name)
        if len(norms) >= 6:
            usual, now = median(norms[:-3]), median(norms[-3:])
            found.append((_grade(now, 10 * usual, 100 * usual), f"{name} {now:.3g}, usually {usual:.3g}"))
    return max(found, key=lambda finding: (None, "ok", "warn", "fail").index(finding[0]))


@_from_start_to_now("loss", 6)
def _loss_falls(start, now, config):
    return _grade(now, start, 1.1 * start), f"loss {start:.3f} at the start, {now:.3f} now"


# ---- reward and DPO

def _held_out(history, name):
    """The newest held-out value of a figure after five logged steps, the mean of its last three after ten, or None."""
    values, held_out = _series(history, name), _series([row for row in history if row["step"]], "eval_" + name)  # not the start
    if held_out and len(values) >= 5:
        return held_out[-1]
    return fmean(values[-3:]) if len(values) >= 10 else None


def _better_than_chance(name, sign, warn, fail, chance):
    def check(history, config):
        value = _held_out(history, name)
        return NOTHING if value is None else (_grade(sign * value, warn, fail), f"{name} {value:.3f}; guessing gives {chance}")
    return check


@_from_start_to_now("logps/chosen", 6)
def _chosen_falls(start, now, config):
    fall = (start - now) / max(abs(start), 1.0)
    return _grade(fall, 0.1, 0.5), f"log-prob of the chosen answers {start:.1f} at the start, {now:.1f} now"


# ---- PPO

def _worst(name, what, float32, half):
    """A check of the largest value that any step has, against (warn, fail) for the run's precision."""
    def check(history, config):
        warn, fail = float32 if config.get("dtype", "float32") == "float32" else half
        value, step = max(((row[name], row.get("step")) for row in history if row.get(name) is not None), default=(None, 0))
        return NOTHING if value is None else (_grade(value, warn, fail), f"{what} {value:.2g} at step {step}; allowed {warn:g}")
    return check


def _kl_negative(history, config):
    kls = _series(history, "kl")
    longest = run = 0
    for kl in kls:
        run = run + 1 if kl < -0.05 else 0
        longest = max(longest, run)
    verdict = None if len(kls) < 5 else "fail" if longest >= 5 else "ok"
    return verdict, f"KL below 0 for {longest} steps in a row, lowest {min(kls, default=0):.3g} nats an answer"


def _kl_explodes(history, config):
    kls, lengths = (_series(history, name)[-3:] for name in ("kl", "length"))
    if len(kls) < 3:
        return NOTHING
    now, limit = fmean(kls), fmean(lengths or [50.0])                       # a nat a token
    if config.get("kl_coefficient", 1):
        limit = 3 * config["kl_target"] if config.get("kl_target") else min(limit, 50)
    return _grade(now, limit, 2 * limit), f"KL {now:.3g} nats an answer; expected below {limit:.3g}"


@_from_start_to_now("entropy", 6)
def _entropy_collapses(start, now, config):
    return _grade(-now, -0.1 * start, -0.02 * start), f"entropy {start:.3g} nats a token at the start, {now:.3g} now"


@_from_start_to_now("finished", 3)
def _end_token(start, now, config):
    return _grade(-now, -0.1, -0.005), f"{now:.0%} of the answers end by themselves"


@_from_start_to_now("length", 6)
def _length_grows(start, now, config):
    full = now >= 0.95 * config.get("max_new_tokens", math.inf)
    verdict = "ok" if now < 1.5 * start else "fail" if full else "warn"
    return verdict, f"answers of {start:.1f} tokens at the start, {now:.1f} now" + ", the most allowed" * full


@_from_start_to_now("repetition", 6)
def _repetition(start, now, config):
    return _grade(max(now - start, now - 0.4), 0.15, 0.4), f"{start:.0%} of the token pairs repeat at the start, {now:.0%} now"


def _critic(history, config):
    values = _series(history, "explained_variance")[-20:]
    spread, scores = min(_series(history, "value_std")[-3:], default=0), max(_series(history, "score_std"), default=0)
    apart = 0 < 20 * scores < spread or median(values[-10:] or [0]) < -1
    verdict = None if len(values) < 20 else "fail" if apart else "ok" if max(values) > 0 else "warn"
    return verdict, f"explained variance at best {max(values, default=0):.2f} in {len(values)} steps, values {spread:.2g} apart"


def _dead_critic(history, config):
    values, norms, scores = (_series(history, name)[-3:] for name in ("value_std", "critic_grad_norm", "score_std"))
    if len(values) < 3:
        return NOTHING
    dead = max(values) < 1e-3 * max(scores, default=0) or (norms and max(norms) < 1e-7)
    norm = f"; gradient norm {max(norms):.2g}" if norms else ""
    return "fail" if dead else "ok", f"values {max(values):.2g} apart, scores {max(scores, default=0):.2g}{norm}"


@_from_start_to_now("clip_fraction", 3)
def _clip_fraction(start, now, config):
    return _grade(now, 0.3, 0.6), f"{now:.0%} of the tokens are clipped"


def _over_optimised(history, config):
    rows = [row for row in history if row.get("eval_score") is not None and row.get("eval_gold") is not None]
    if len(rows) < 3:
        return NOTHING
    best, now = max(rows, key=lambda row: row["eval_gold"]), rows[-1]
    fall = best["eval_gold"] - now["eval_gold"] if now["eval_score"] > best["eval_score"] else 0.0
    return _grade(fall, 0.1, 0.25), (
        f"gold {best['eval_gold']:.2f} at step {best.get('step')}, {now['eval_gold']:.2f} now; "
        f"score {best['eval_score']:.2f} then, {now['eval_score']:.2f} now")


def _held_out_falls(history, config):
    """Training scores around the best held-out one and now; the fall is in standard deviations of the answers' scores."""
    rows = [(i, row["eval_score"]) for i, row in enumerate(history) if row.get("eval_score") is not None]
    spread = _series(history, "score_std")[:3]
    if len(rows) < 3 or not spread:
        return NOTHING
    at, best = max(rows, key=lambda row: row[1])
    then, now = (fmean(_series(part, "score")[-3:] or [0.0]) for part in (history[:at + 4], history))
    fall = (best - rows[-1][1]) / max(fmean(spread), 1e-6) if now > then else 0.0
    return _grade(fall, 0.5, 1.0), (f"held-out score {best:.2f} at step {history[at].get('step')}, {rows[-1][1]:.2f} now; "
                                    f"training score {then:.2f} then, {now:.2f} now")


def _reward_model(history, config):
    values = [value for value in _series(history, "eval_score_gold") if value][:3]       # 0: one of the two is constant
    return (_grade(-fmean(values), -0.1, 0.1), f"score and gold correlate by {fmean(values):.2f}") if values else NOTHING


def _scores_differ(history, config):
    spreads, size = _series(history, "score_std"), max(map(abs, _series(history, "score")[:3]), default=0.0)
    verdict = None if len(spreads) < 3 else "ok" if max(spreads) > 1e-5 * (1 + size) else "fail"
    return verdict, f"standard deviation of the scores at most {max(spreads, default=0):.3g}"


def _ensemble(history, config):
    """The disagreement must grow, and its share in what tells answers apart: scores that come together are no fault."""
    rows = [(s, s / max(row["score_std"], 1e-6)) for row in history if (s := row.get("score_spread"))]
    if len(rows) < 6:
        return NOTHING
    (start, share), (now, share_now) = ([fmean(x) for x in zip(*part)] for part in (rows[:3], rows[-3:]))
    grown = min(share_now / share, (now / start) ** 2)
    return _grade(grown, 1.5, 3), f"the reward models are {start:.3g} apart at the start, {now:.3g} now"


def _loss_scale(history, config):
    scales = _series(history, "loss_scale")
    verdict = _grade(-scales[-1], -32, -1.5) if len(scales) >= 3 else None
    return verdict, f"loss scale {scales[:1]} at the start, {scales[-1:]} now"


ALL, PPO = ("pretrain", "sft", "reward", "dpo", "ppo"), ("ppo",)
CHECKS = [Check(*entry) for entry in (
    ("finite loss", ALL, _finite,
     "steps are too large, or half precision overflows", "lower learning_rate, dtype='mixed'"),
    ("gradient norm", ALL, _gradient_norm,
     "the run diverges", "lower learning_rate or max_grad_norm, raise warmup_ratio"),
    ("loss falls", ("pretrain", "sft"), _loss_falls,
     "nothing is trained on, or steps have the wrong size", "rk.show(row); raise learning_rate, or lower it"),
    ("loss below chance", ("reward",), _better_than_chance("loss", 1, 0.66, 0.69, "ln 2 = 0.693"),
     "pairs cannot be told apart, or steps are too small", "rk.pairs(record); raise learning_rate or num_epochs"),
    ("accuracy above chance", ("reward",), _better_than_chance("accuracy", -1, -0.55, -0.45, "0.5"),
     "too little training, or, well below 0.5, swapped scores", "rk.pairs(record); raise learning_rate or num_epochs"),
    ("chosen log-prob", ("dpo",), _chosen_falls,
     "the margin grows by making both answers unlikely", "lower learning_rate, raise beta"),
    ("first-step ratio", PPO, _worst("first_ratio", "|ratio - 1| before any update", (1e-3, 0.1), (0.2, 1.0)),
     "old log-probs come from other weights, another temperature or mask, or with dropout", "dropout=0.0, rescore=True"),
    ("sampled against scored", PPO, _worst("sampler_gap", "nats a token between sampler and scoring", (1e-3, 0.03), (0.05, 0.3)),
     "sampling and scoring differ in temperature, mask, dropout or weights", "rescore=True, top_k=0, top_p=1.0; report it"),
    ("KL not negative", PPO, _kl_negative,
     "the sampler is not the policy: filters, temperature, dropout", "top_k=0, top_p=1.0, dropout=0.0"),
    ("KL bounded", PPO, _kl_explodes,
     "the penalty is too weak for the steps", "raise kl_coefficient, set kl_target, lower learning_rate"),
    ("entropy", PPO, _entropy_collapses, "the policy repeats one answer", "raise kl_coefficient, lower learning_rate"),
    ("end token", PPO, _end_token,
     "it was never trained, or answers are cut too early", "unfinished_score below 0, more max_new_tokens"),
    ("length", PPO, _length_grows,
     "the reward model likes long answers", "unfinished_score below 0, raise kl_coefficient"),
    ("repetition", PPO, _repetition, "the reward model likes loops", "raise kl_coefficient, stop earlier, other reward model"),
    ("critic", PPO, _critic, "the critic learns nothing, or diverges", "other critic_learning_rate, critic='reward', value_clip"),
    ("dead critic", PPO, _dead_critic,
     "its head is zero, frozen or without gradient", "raise critic_learning_rate, critic='reward', advantage='rloo'"),
    ("clip fraction", PPO, _clip_fraction,
     "each rollout moves the policy too far", "lower learning_rate or ppo_epochs"),
    ("score against gold", PPO, _over_optimised,
     "the policy exploits the reward model", "stop earlier, raise kl_coefficient"),
    ("score against held-out", PPO, _held_out_falls,
     "the policy learns the training prompts by heart", "stop earlier, more prompts, fewer ppo_epochs"),
    ("reward model", PPO, _reward_model,
     "it guesses, or, well below 0, its scores are swapped", "rk.report_card(reward_path, records); train it again"),
    ("scores differ", PPO, _scores_differ,
     "the reward says the same of every answer", "look at the reward_function or reward_path, raise score_clip"),
    ("ensemble", PPO, _ensemble,
     "answers have left what the reward models know", "ensemble='min' or 'spread', raise kl_coefficient, stop earlier"),
    ("loss scale", PPO, _loss_scale, "gradients overflow in float16", "dtype='mixed' or 'bfloat16', lower learning_rate"),
)]
