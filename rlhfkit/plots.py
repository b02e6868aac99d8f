"""Figures, all of one size and palette; the title is the finding, and the caller knows it.

Chinese text is drawn, not boxes, on machines without Chinese fonts: glyphs that matplotlib's own font lacks come from the
font in the package paperang-p2-fonts-cjk. Nothing is returned or shown: a notebook draws the open figure after its cell,
a script saves `plt.gcf()`.
"""
import warnings
from functools import cache
from importlib import resources

import matplotlib.pyplot as plt
from matplotlib import font_manager

SIZE, DPI = (6.4, 3.0), 100
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442", "#999999"]   # Okabe and Ito
PANELS = {"pretrain": ["loss"], "sft": ["loss"], "reward": ["loss", "accuracy", "margin"],
          "dpo": ["loss", "rewards/accuracies", "rewards/margins"], "ppo": ["score", "gold", "kl", "length"]}
AXES = {"kl": "KL (nats an answer)", "entropy": "entropy (nats a token)", "length": "length (tokens)",
        "gold": "gold score", "score": "reward score", "grad_norm": "gradient norm", "seconds": "seconds a step"}


def plot_history(result, *names, title=""):
    """A panel for each named figure of a run over its steps; without names, those that its stage is judged by.

    Training is a line, the held-out twin (`eval_` and the name) dots. Raises ValueError for a name the history lacks.
    """
    known = {key.removeprefix("eval_") for row in result.history for key in row}
    wanted = [name.removeprefix("eval_") for name in names] or [n for n in PANELS[result.stage] if n in known]
    missing = [name for name in wanted if name not in known]
    if missing or not wanted:
        raise ValueError(f"the history has no {', '.join(missing) or 'figures'}; it has: {', '.join(sorted(known)) or 'no rows'}")
    figure, axes = _figure(len(wanted), title)
    for ax, name in zip(axes, wanted):
        for key, style, label in ((name, "-", "training"), ("eval_" + name, "o:", "held out")):
            points = [(row["step"], row[key]) for row in result.history if row.get(key) is not None]
            if points:
                ax.plot(*zip(*points), style, markersize=4, linewidth=1.2, label=label)
        ax.set(xlabel="step", ylabel=AXES.get(name, name))
        ax.locator_params(nbins=4)
    most = max(axes, key=lambda ax: len(ax.lines))
    if len(most.lines) > 1:
        figure.legend(handles=most.lines, loc="outside lower center", ncols=2, fontsize="small", frameon=False)


def plot_margins(margins, title=""):
    """Histogram of held-out margins (score of the better answer less that of the other): numbers, or a reward Result that
    holds them as metrics["margins"]. The share above 0 stands in the title."""
    values = list(margins.metrics.get("margins", ()) if hasattr(margins, "metrics") else margins)
    if not values:
        raise ValueError("there are no margins; give a list of numbers, or a reward Result with metrics['margins']")
    share = f"{sum(v > 0 for v in values) / len(values):.0%} of {len(values)} pairs above 0"
    _, (ax,) = _figure(1, f"{title} ({share})" if title else share)
    _, edges, bars = ax.hist(values, bins=_bins(values), edgecolor="white", linewidth=0.5)
    for left, bar in zip(edges, bars):
        bar.set_facecolor(COLOURS[0] if left >= 0 else COLOURS[1])
    ax.axvline(0, color="black", linewidth=1)
    ax.set(xlabel="margin", ylabel="pairs")


def plot_scores(*tables, labels=(), title=""):
    """Tables of `rk.evaluate`, each with its label -> a bar for each task's total, with its 95 % interval and a mark at chance."""
    _, (ax,) = _figure(1, title)
    totals = [table[~table["task"].str.contains("/")] if not table["task"].str.contains("/").all() else table for table in tables]
    rows = list(dict.fromkeys((task, metric) for table in totals for task, metric in zip(table["task"], table["metric"])))
    several = {task for task, _ in rows if sum(task == other for other, _ in rows) > 1}
    width = 0.8 / len(tables)
    for number, table in enumerate(totals):
        places = [rows.index(key) + (number - (len(tables) - 1) / 2) * width for key in zip(table["task"], table["metric"])]
        spread = [(table["score"] - table["low"]).clip(lower=0), (table["high"] - table["score"]).clip(lower=0)]
        ax.barh(places, table["score"], width, xerr=spread, label=labels[number] if labels else None,
                error_kw=dict(linewidth=1, capsize=2))
        chance = ax.vlines(table["chance"], [p - width / 2 for p in places], [p + width / 2 for p in places],
                           color="black", linewidth=1.5, linestyles=(0, (1, 1)), label="chance" if number == len(tables) - 1 else None)
    ax.set_yticks(range(len(rows)), [f"{task} {metric}" if task in several else task for task, metric in rows])
    ax.set(xlabel="score, 95 % interval", xlim=(0, 1))
    ax.invert_yaxis()
    ax.figure.legend(loc="outside right upper", fontsize="small", frameon=False)


def plot_memory(*estimates, labels=(), title=""):
    """Estimates of `rk.will_it_fit`, each with its label -> stacked parts beside the GPU's size; or one table of `rk.sweep`
    (swept fields first, then `tokens_per_second`, `memory_gib`) -> bars of peak memory and of speed."""
    if hasattr(estimates[0], "columns"):
        return _plot_sweep(estimates[0], title)
    figure, (ax,) = _figure(1, title)
    left, parts = [0.0] * len(estimates), list(dict.fromkeys(name for e in estimates for name in e.parts))
    colours = COLOURS + ["#444444", "#BBBBBB"]
    for name, colour in zip(parts, colours * 2):
        sizes = [e.parts.get(name, 0.0) for e in estimates]
        ax.barh(range(len(estimates)), sizes, 0.6, left, label=name, color=colour)
        left = [a + b for a, b in zip(left, sizes)]
    ax.axvline(estimates[0].gpu_room, color="black", linestyle="--", linewidth=1, label="GPU")
    ax.set_yticks(range(len(estimates)), labels or [""] * len(estimates))
    ax.set(xlabel="GiB a GPU")
    ax.invert_yaxis()
    figure.legend(loc="outside right upper", fontsize="small", frameon=False)


def _plot_sweep(table, title):
    figures = [("memory_gib", "peak memory (GiB)"), ("tokens_per_second", "tokens a second")]
    fields = list(table.columns)[:min(list(table.columns).index(name) for name, _ in figures)]
    varied = [name for name in fields if table[name].nunique() > 1] or fields[:1]
    _, axes = _figure(2, title)
    for ax, (name, label), colour in zip(axes, figures, COLOURS):
        ax.barh(range(len(table)), table[name].fillna(0), 0.7, color=colour)
        ax.set(xlabel=label)
        ax.locator_params(axis="x", nbins=4)
        ax.set_yticks(range(len(table)), [])
        ax.invert_yaxis()
        for place in (i for i, missing in enumerate(table[name].isna()) if missing):
            ax.text(0, place, " failed", va="center", fontsize="small")
    axes[0].set_yticks(range(len(table)), [", ".join(map(str, row)) for row in table[varied].to_numpy()])
    axes[0].set(ylabel=", ".join(varied))


def _figure(panels, title):
    family = _chinese_font()
    plt.rcParams["font.family"] = ["DejaVu Sans", family] if family else ["DejaVu Sans"]
    figure, axes = plt.subplots(1, panels, figsize=SIZE, dpi=DPI, layout="constrained", squeeze=False)
    for ax in axes[0]:
        ax.set_prop_cycle(color=COLOURS)
        ax.spines[["top", "right"]].set_visible(False)
    if title:
        figure.suptitle(title, fontsize="medium")
    return figure, axes[0]


@cache
def _chinese_font():
    """The name of the packaged font, made known to matplotlib, or None with one warning."""
    try:
        path = str(resources.files("paperang_p2_fonts_cjk") / "fonts/wqy-microhei.ttc")
    except ModuleNotFoundError:
        warnings.warn("Chinese labels may show as boxes: pip install paperang-p2-fonts-cjk", stacklevel=4)
        return None
    font_manager.fontManager.addfont(path)
    return font_manager.FontProperties(fname=path).get_name()


def _bins(values, count=30):
    """Edges of about `count` bins, one of them at 0, so that no bar mixes right and wrong pairs."""
    low, high = min(*values, 0.0), max(*values, 0.0)
    width = (high - low) / count or 1.0
    return [width * i for i in range(int(low // width), int(-(-high // width)) + 1)]
