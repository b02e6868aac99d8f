"""Figures of reinforcement learning alone, in the manner of plots.py: an answer's tokens, a step's seconds, gold along the
distance, variants of the recipe. Numbers, hatches and marks say what colours say: they can be read printed in grey.
"""
import math
from unicodedata import east_asian_width

import matplotlib.pyplot as plt
from matplotlib.colors import LinearSegmentedColormap

from rlhfkit.overoptimisation import fit_gold, frontier, hindsight, stop_point
from rlhfkit.plots import AXES, COLOURS, SIZE, canvas

DIVERGING = LinearSegmentedColormap.from_list("orange, white, blue", [COLOURS[1], "white", COLOURS[0]])
ROWS = {"values": "value (score)", "kl": "KL (nats)", "advantages": "advantage"}
PHASES = {"rollout": "sampling", "scoring": "scoring", "update": "update"}


def plot_rollout(answer, tokenizer, title="", width=12):
    """An answer of `rk.rollouts` token by token: the critic's value before the token (what it expects of the score), the
    token's KL to the reference (k1, nats; the answer's is their sum), its advantage (as trained on: whitened, deviations).

    Blue is above 0 (values: above their mean), orange below, the darker the further; `width`: tokens a line. Without a
    critic there are no values. Raises ValueError for an answer without tokens.
    """
    rows, ids = [name for name in ROWS if answer[name]], answer["ids"]
    if not ids:
        raise ValueError(f"the answer to {answer['prompt']!r:.60} has no tokens; take one that has")
    width, high = min(width, max(len(ids), 6)), len(rows) + 1
    ended = "ended by itself" if answer["finished"] else "cut by length"
    figure, (ax,) = canvas(1, title or f"step {answer['step']}: score {answer['score']:.2f}, {ended}")
    lines = math.ceil(len(ids) / width)
    figure.set_size_inches(SIZE[0], 0.32 * high * lines + 0.8)
    for line in range(lines):
        for i in range(line * width, min((line + 1) * width, len(ids))):
            token = _token(tokenizer, ids[i])
            ax.text(i % width + 0.5, line * high + 0.6, token, ha="center", va="center", fontsize=min(9, 60 / _cells(token)))
    for place, name in enumerate(rows, 1):
        numbers = answer[name]
        middle = sum(numbers) / len(numbers) if name == "values" else 0.0
        most = max(abs(number - middle) for number in numbers) or 1.0
        for i, number in enumerate(numbers):
            x, y = i % width, i // width * high + place
            shade = DIVERGING(0.5 + 0.35 * (number - middle) / most)            # a black number stays legible on the darkest
            ax.add_patch(plt.Rectangle((x + 0.03, y + 0.03), 0.94, 0.94, facecolor=shade, edgecolor=COLOURS[7], linewidth=0.5))
            ax.text(x + 0.5, y + 0.5, f"{round(number, 2) + 0.0:.2f}".replace("-", "−"), ha="center", va="center", fontsize=8)
    ax.set(xlim=(0, width), ylim=(lines * high, 0), xticks=[])
    ax.set_xlabel("the answer's tokens; blue: above 0 (values: above their mean), orange: below", fontsize="small")
    places = [line * high + place + 0.5 for line in range(lines) for place in range(1, high)]
    ax.set_yticks(places, [ROWS[name] for name in rows] * lines)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)


def plot_phases(result, title=""):
    """Seconds of a PPO step, stacked: sampling the answers, scoring them, updating actor and critic; shares in the title."""
    rows = [row for row in result.history if "seconds_rollout" in row]
    if not rows:
        raise ValueError("the history has no seconds_rollout; phases are those of a PPO run")
    spans = [[row[f"seconds_{name}"] for row in rows] for name in PHASES]
    total = sum(map(sum, spans)) or 1.0
    shares = ", ".join(f"{label} {sum(span) / total:.0%}" for label, span in zip(PHASES.values(), spans))
    figure, (ax,) = canvas(1, title or f"{total / len(rows):.2g} s a step: {shares}")
    steps = [row["step"] for row in rows]
    ax.stackplot([steps[0] - 1, *steps], [[span[0], *span] for span in spans], step="pre", labels=PHASES.values(),
                 colors=(COLOURS[0], COLOURS[4], COLOURS[5]), hatch=("", "///", "..."), edgecolor="white", linewidth=0.5)
    ax.set(xlabel="step", ylabel=AXES["seconds"], xlim=(steps[0] - 1, steps[-1]))
    handles, labels = ax.get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside right upper", fontsize="small", frameon=False)


def plot_frontier(result, title=""):
    """Held-out score and gold along the distance from the start (root of the KL): the best gold, where `stop_point` stops, and
    the curve of Gao et al. through gold where it has a top. Anything with a history will do, so also a run that goes on.
    Raises ValueError for fewer than two held-out rows."""
    points, stop = frontier(result.history), stop_point(result.history)
    known = [p for p in points if p["gold"] is not None]
    if len(points) < 2:
        raise ValueError(f"the history has {len(points)} held-out rows with eval_score; a line needs two: set eval_steps")
    if len(known) > 1 and not title:
        found = hindsight(result.history)
        title = (f"{'no stop until' if stop is None else 'stopped at'} step {found['stopped_step']}: "
                 f"gold {found['stopped_gold']:.2f}, "
                 f"at best {found['best_gold']:.2f} at step {found['best_step']}")
    figure, (ax,) = canvas(1, title)
    lines = _along(ax, points, "score", "o-", COLOURS[0], "held-out score")
    ax.set(xlabel="distance from the start: root of the KL (nats an answer)", ylabel="reward score")
    if known:
        right = ax.twinx()
        right.spines["top"].set_visible(False)
        right.set(ylabel="gold score")
        lines += _along(right, known, "gold", "s-", COLOURS[1], "gold")
        best = max(known, key=lambda p: p["gold"])["distance"]
        lines.append(right.axvline(best, color=COLOURS[1], linestyle="--", linewidth=1, label="best gold"))
        alpha, beta, _ = fit_gold(known) if len({p["distance"] for p in known}) > 3 else (0, 0, 0)
        if beta > 0:
            curve = [dict(distance=d, gold=known[0]["gold"] + d * (alpha - beta * math.log(d)))
                     for d in (max(p["distance"] for p in known) * i / 50 for i in range(1, 51))]
            lines += _along(right, curve, "gold", ":", COLOURS[1], "d (α − β log d)")
    if stop is not None:
        where = next(p["distance"] for p in points if p["step"] == stop)
        lines.append(ax.axvline(where, color=COLOURS[8], linestyle="-.", linewidth=1, label="the rule stops"))
    figure.legend(handles=lines, loc="outside lower center", ncols=len(lines), fontsize="small", frameon=False)


def plot_ablation(record, title=""):
    """A record of tests/benchmarks/ablation.py -> for each variant its gold score less the full recipe's, with the 95 %
    interval over the seeds (filled where 0 is outside), and beside it the KL to SFT."""
    rows = record["rows"]
    clear = [row["difference"][1] > 0 or row["difference"][2] < 0 for row in rows]
    found = f"{sum(clear)} of {len(rows) - 1} differ from the full recipe by more than chance, {len(record['seeds'])} seeds"
    figure, (left, right) = canvas(2, title or found)
    figure.set_size_inches(SIZE[0], max(SIZE[1], 0.26 * len(rows) + 0.8))
    for place, (row, sure) in enumerate(zip(rows, clear)):
        mean, low, high = row["difference"]
        left.plot((low, high), (place, place), color=COLOURS[0], linewidth=1.5)
        left.plot(mean, place, "o", color=COLOURS[0], markerfacecolor=COLOURS[0] if sure else "white", markersize=5)
        right.plot((0, row["kl"]), (place, place), color=COLOURS[1], linewidth=0.8)
        right.plot(row["kl"], place, "s", color=COLOURS[1], markersize=5)
    left.axvline(0, color="black", linewidth=0.8, linestyle="--", zorder=0)
    left.set_yticks(range(len(rows)), [row["variant"] for row in rows])
    right.set_yticks(range(len(rows)), [""] * len(rows))
    left.set(xlabel="gold score less full's, 95 % interval", ylim=(len(rows) - 0.5, -0.5))
    right.set(xlabel=AXES["kl"], ylim=left.get_ylim(), xmargin=0.04)


def _along(ax, points, name, style, colour, label):
    x, y = zip(*((p["distance"], p[name]) for p in points))
    return ax.plot(x, y, style, color=colour, markersize=4, linewidth=1.2, label=label)


def _token(tokenizer, token):
    """A token's text; where it has none of its own (spaces, a special token that is left out), its name in the vocabulary."""
    text = tokenizer.decode([token]).replace("\n", "⏎")
    return text if text.strip() else str(tokenizer.convert_ids_to_tokens(token))


def _cells(text):
    return sum(2 if east_asian_width(character) in "WFA" else 1 for character in text)
