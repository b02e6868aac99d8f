"""Named checks over a run's history: a verdict, the evidence, the likely cause, the parameter to change.

A check is a pure function of (history, config) and one entry in CHECKS; stages ask live what `doctor` asks afterwards.
A healthy run must stay quiet, so means of three logged steps are judged, and a single step only where it is proof
(a NaN, a first-step ratio that is not 1).
"""
import math
from dataclasses import dataclass
from statistics import fmean, median
from typing import Callable

NOTHING = (None, "")        # the history does not say


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
        return {(check.name, verdict): f"{verdict}: {check.name}: {evidence}; {check.cause}; try: {check.change}"
                for check, verdict, evidence in _findings(rows, config) if verdict != "ok"}
    before = bad(history[:-1])
    return [line for key, line in bad(history).items() if key not in before]


def _findings(history, config):
    for check in CHECKS:
        if config["stage"] in check.stages:
            verdict, evidence = check.judge(history, config)
            if verdict:
                yield check, verdict, evidence


def _series(history, name):
    return [row[name] for row in history if row.get(name) is not None]


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

def _finite_loss(history, config):
    names = ("loss", "policy_loss", "value_loss", "eval_loss")
    for row in history:
        for name in names:
            if row.get(name) is not None and not math.isfinite(row[name]):
                return "fail", f"{name} is {row[name]} at step {row.get('step')}"
    return ("ok", "all losses are finite") if any(_series(history, name) for name in names) else NOTHING


def _gradient_norm(history, config):
    norms = _series(history, "grad_norm")
    for row in history:
        if row.get("grad_norm") is not None and not math.isfinite(row["grad_norm"]):
            return "fail", f"gradient norm is {row['grad_norm']} at step {row.get('step')}"
    if len(norms) < 6:
        return NOTHING
    usual, now = median(norms[:-3]), median(norms[-3:])
    return _grade(now, 10 * usual, 100 * usual), f"gradient norm {now:.3g}, usually {usual:.3g}"


@_from_start_to_now("loss", 6)
def _loss_falls(start, now, config):
    return _grade(now, start, 1.1 * start), f"loss {start:.3f} at the start, {now:.3f} now"


# ---- reward and DPO

def _held_out(history, name):
    """The newest held-out value of a figure after five logged steps, the mean of its last three after ten, or None."""
    values, held_out = _series(history, name), _series([row for row in history if row["step"]], "eval_" + name)      # not the start
    if held_out and len(values) >= 5:
        return held_out[-1]
    return fmean(values[-3:]) if len(values) >= 10 else None


def _reward_loss(history, config):
    loss = _held_out(history, "loss")
    if loss is None:
        return NOTHING
    return _grade(loss, 0.66, 0.69), f"loss {loss:.3f}; guessing gives ln 2 = 0.693"


def _reward_accuracy(history, config):
    accuracy = _held_out(history, "accuracy")
    if accuracy is None:
        return NOTHING
    return _grade(-accuracy, -0.55, -0.45), f"accuracy {accuracy:.2f}; guessing gives 0.50"


@_from_start_to_now("logps/chosen", 6)
def _chosen_falls(start, now, config):
    fall = (start - now) / max(abs(start), 1.0)
    return _grade(fall, 0.1, 0.5), f"log-prob of the chosen answers {start:.1f} at the start, {now:.1f} now"


# ---- PPO

def _first_ratio(history, config):
    rows = [row for row in history if row.get("first_ratio") is not None]
    if not rows:
        return NOTHING
    worst = max(rows, key=lambda row: row["first_ratio"])
    warn, fail = (1e-3, 1e-1) if config.get("dtype", "float32") == "float32" else (0.2, 1.0)
    return _grade(worst["first_ratio"], warn, fail), (
        f"|ratio - 1| before any update {worst['first_ratio']:.2g} at step {worst.get('step')}; rounding: {warn:g}")


def _kl_negative(history, config):
    kls = _series(history, "kl")
    longest = run = 0
    for kl in kls:
        run = run + 1 if kl < -0.05 else 0
        longest = max(longest, run)
    verdict = None if len(kls) < 5 else "fail" if longest >= 5 else "ok"
    return verdict, f"KL below 0 for {longest} steps in a row, lowest {min(kls, default=0):.3g} nats an answer"


@_from_start_to_now("kl", 3)
def _kl_explodes(start, now, config):
    limit = 3 * config["kl_target"] if config.get("kl_target") else 50
    return _grade(now, limit, 2 * limit), f"KL {now:.3g} nats an answer; expected below {limit:g}"


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


def _critic(history, config):
    values = _series(history, "explained_variance")
    verdict = None if len(values) < 20 else "ok" if max(values) > 0 else "warn"
    return verdict, f"explained variance at best {max(values, default=0):.2f} in {len(values)} steps"


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


ALL, PPO = ("pretrain", "sft", "reward", "dpo", "ppo"), ("ppo",)
CHECKS = [Check(*entry) for entry in (
    ("finite loss", ALL, _finite_loss,
     "steps are too large, or half precision overflows", "lower learning_rate, dtype='mixed'"),
    ("gradient norm", ALL, _gradient_norm,
     "the run diverges", "lower learning_rate or max_grad_norm, raise warmup_ratio"),
    ("loss falls", ("pretrain", "sft"), _loss_falls,
     "nothing is trained on, or steps have the wrong size", "rk.show(row); raise learning_rate, or lower it"),
    ("loss below chance", ("reward",), _reward_loss,
     "pairs cannot be told apart, or steps are too small", "rk.pairs(record); raise learning_rate or num_epochs"),
    ("accuracy above chance", ("reward",), _reward_accuracy,
     "too little training, or, well below 0.5, swapped scores", "rk.pairs(record); raise learning_rate or num_epochs"),
    ("chosen log-prob", ("dpo",), _chosen_falls,
     "the margin grows by making both answers unlikely", "lower learning_rate, raise beta"),
    ("first-step ratio", PPO, _first_ratio,
     "sampling and scoring differ in temperature, mask, dropout or weights", "dropout=0.0, top_k=0, top_p=1.0"),
    ("KL not negative", PPO, _kl_negative,
     "the sampler is not the policy: filters, temperature, dropout", "top_k=0, top_p=1.0, dropout=0.0"),
    ("KL bounded", PPO, _kl_explodes,
     "the penalty is too weak for the steps", "raise kl_coefficient, set kl_target, lower learning_rate"),
    ("entropy", PPO, _entropy_collapses, "the policy repeats one answer", "raise kl_coefficient, lower learning_rate"),
    ("end token", PPO, _end_token,
     "it was never trained, or answers are cut too early", "unfinished_score below 0, more max_new_tokens"),
    ("length", PPO, _length_grows,
     "the reward model likes long answers", "unfinished_score below 0, raise kl_coefficient"),
    ("critic", PPO, _critic, "the critic learns nothing", "raise critic_learning_rate, critic='reward'"),
    ("clip fraction", PPO, _clip_fraction,
     "each rollout moves the policy too far", "lower learning_rate or ppo_epochs"),
    ("score against gold", PPO, _over_optimised,
     "the policy exploits the reward model", "stop earlier, raise kl_coefficient"),
)]
