"""Figures, all of one size and palette; the title is the finding, and the caller knows it.

Chinese text is drawn, not boxes, on machines without Chinese fonts: what matplotlib's own font lacks comes from that in
the package paperang-p2-fonts-cjk. Nothing is returned: a notebook shows the figure, a script saves `plt.gcf()`.
"""
import math
import warnings
from functools import cache
from importlib import resources
from unicodedata import east_asian_width

import matplotlib.pyplot as plt
from matplotlib import font_manager
from matplotlib.ticker import ScalarFormatter

SIZE, DPI = (6.4, 3.0), 100
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442", "#999999", "#444444", "#661100",
           "#BBBBBB"]                                   # Okabe and Ito's, then greys and a brown
PANELS = {"pretrain": ["loss"], "sft": ["loss"], "reward": ["loss", "accuracy", "margin"],
          "dpo": ["loss", "rewards/accuracies", "rewards/margins"], "ppo": ["score", "gold", "kl", "length"]}
AXES = {"kl": "KL (nats an answer)", "entropy": "entropy (nats a token)", "length": "length (tokens)",
        "gold": "gold score", "score": "reward score", "grad_norm": "gradient norm", "seconds": "seconds a step",
        "explained_variance": "explained variance (share)", "clip_fraction": "clipped (share of tokens)"}


def plot_history(result, *names, title=""):
    """A panel for each named figure of a run over its steps; without names, those that its stage is judged by.

    Training is a line, the held-out twin (`eval_` and the name) dots. Raises ValueError for a name the history lacks.
    """
    known = {key.removeprefix("eval_") for row in result.history for key in row}
    wanted = [name.removeprefix("eval_") for name in names] or [n for n in PANELS[result.stage] if n in known]
    missing = [name for name in wanted if name not in known]
    if missing or not wanted:
        raise ValueError(f"the history has no {', '.join(missing) or 'figures'}; it has: {', '.join(sorted(known))}")
    figure, axes = canvas(len(wanted), title)
    for ax, name in zip(axes, wanted):
        for key, style, colour, label in ((name, "-", COLOURS[0], "training"),
                                          ("eval_" + name, "o:", COLOURS[1], "held out")):
            points = [(row["step"], row[key]) for row in result.history if row.get(key) is not None]
            if points:
                ax.plot(*zip(*points), style, color=colour, markersize=4, linewidth=1.2, label=label)
        ax.set(xlabel="step", ylabel=AXES.get(name, name))
        ax.locator_params(nbins=4)
    most = max(axes, key=lambda ax: len(ax.lines))
    if len(most.lines) > 1:
        figure.legend(handles=most.lines, loc="outside lower center", ncols=2, fontsize="small", frameon=False)


def plot_margins(margins, title=""):
    """Histogram of margins (score of the better answer less that of the other), their share above 0 in the title.

    margins: numbers, or a reward Result that holds those of its held-out pairs as metrics["margins"].
    """
    values = list(margins.metrics.get("margins", ()) if hasattr(margins, "metrics") else margins)
    if not values:
        raise ValueError("there are no margins; give a list of numbers, or a reward Result with metrics['margins']")
    share = f"{sum(v > 0 for v in values) / len(values):.0%} of {len(values)} pairs above 0"
    _, (ax,) = canvas(1, f"{title} ({share})" if title else share)
    _, edges, bars = ax.hist(values, bins=_bins(values), edgecolor="white", linewidth=0.5)
    for left, bar in zip(edges, bars):
        bar.set_facecolor(COLOURS[0] if left >= 0 else COLOURS[1])
    ax.axvline(0, color="black", linewidth=1)
    ax.set(xlabel="margin", ylabel="pairs")


def plot_scores(*tables, labels=(), title=""):
    """Tables of `rk.evaluate`, each with its label -> a bar for each task's total, 95 % interval, a mark at chance."""
    figure, (ax,) = canvas(1, title)
    totals = [_totals(table) for table in tables]
    keys = [list(zip(table["task"], table["metric"])) for table in totals]
    rows = list(dict.fromkeys(key for table in keys for key in table))
    width = 0.8 / len(tables)
    for number, table in enumerate(totals):
        shift = (number - (len(tables) - 1) / 2) * width
        places = [rows.index(key) + shift for key in keys[number]]
        spread = [(table["score"] - table["low"]).clip(lower=0), (table["high"] - table["score"]).clip(lower=0)]
        ax.barh(places, table["score"], width, xerr=spread, label=labels[number] if labels else None,
                error_kw=dict(linewidth=1, capsize=2))
        ends = [[place + side * width / 2 for place in places] for side in (-1, 1)]
        ax.vlines(table["chance"], *ends, color="black", linestyle=":", label="" if number else "chance")
    tasks = [task for task, _ in rows]
    figure.set_size_inches(SIZE[0], max(SIZE[1], 0.24 * len(rows) + 0.8))
    ax.set_yticks(range(len(rows)), [f"{task} {metric}" if tasks.count(task) > 1 else task for task, metric in rows])
    ax.set(xlabel="score, 95 % interval", xlim=(0, 1))
    ax.invert_yaxis()
    figure.legend(loc="outside lower center", ncols=1 + len(tables), fontsize="small", frameon=False)


def plot_memory(*estimates, labels=(), title=""):
    """Estimates of `rk.will_it_fit`, each with its label -> parts stacked against the GPU's size; or one table of
    `rk.sweep` (swept fields, then `tokens_per_second` and `memory_gib`) -> bars of peak memory and of speed."""
    if hasattr(estimates[0], "columns"):
        return _plot_sweep(estimates[0], title)
    figure, (ax,) = canvas(1, title)
    left, parts = [0.0] * len(estimates), list(dict.fromkeys(name for e in estimates for name in e.parts))
    for name, colour in zip(parts, COLOURS * 2):
        sizes = [e.parts.get(name, 0.0) for e in estimates]
        ax.barh(range(len(estimates)), sizes, 0.6, left, label=name, color=colour)
        left = [a + b for a, b in zip(left, sizes)]
    ax.axvline(estimates[0].gpu_room, color="black", linestyle="--", linewidth=1, label="GPU")
    ax.set_yticks(range(len(estimates)), labels or [""] * len(estimates))
    ax.tick_params(axis="y", length=0)
    ax.set(xlabel="GiB a GPU", ylim=(len(estimates) - 0.4, -0.6))
    figure.legend(loc="outside right upper", fontsize="small", frameon=False)


def plot_rows(rows, tokenizer, title="", width=100):
    """Rows as text, a colour for what carries a loss (bold) and one for what is read only; `width`: Latin characters a line."""
    lines = []                                          # of (place, text, trained)
    for row in rows:
        ids, labels = row["input_ids"], row["labels"]
        starts = [i for i in range(len(ids)) if i == 0 or (labels[i] >= 0) != (labels[i - 1] >= 0)] + [len(ids)]
        line, place = [], 0
        for start, stop in zip(starts, starts[1:]):
            for character in tokenizer.decode(ids[start:stop]).replace("\n", "⏎"):
                size = 2 if east_asian_width(character) in "WFA" else 1
                if place + size > width:
                    lines.append(line)
                    line, place = [], 0
                line.append((place, character, labels[start] >= 0))
                place += size
        lines += [line, []]
    figure, (ax,) = canvas(1, title)
    figure.set_size_inches(SIZE[0], max(1.0, 0.2 * len(lines) + 0.4))
    for number, line in enumerate(lines):
        for place, character, trained in line:
            ax.text(place, -number, character, color=COLOURS[1] if trained else COLOURS[8], fontsize=8, va="center")
            if trained:
                ax.axhspan(-number - 0.45, -number - 0.38, place / width, (place + 2) / width, color=COLOURS[1])
    ax.set(xlim=(0, width), ylim=(-len(lines) + 1.2, 0.8))
    ax.axis("off")


def plot_lengths(lengths, cuts=(512, 1024, 2048), title=""):
    """{source: tokens a row} -> histogram on a logarithmic axis, with the share of all rows that each length cuts."""
    everything = sorted(length for some in lengths.values() for length in some)
    if not everything:
        raise ValueError("there are no lengths; give {source: [tokens of each row, …]} with a row at the least")
    figure, (ax,) = canvas(1, title)
    low, high = math.log2(max(1, everything[0])), math.log2(max(everything[-1], *cuts) + 1)
    edges = [2 ** (low + (high - low) * i / 40) for i in range(41)]
    ax.hist(list(lengths.values()), bins=edges, histtype="step", label=list(lengths), color=_colours(lengths))
    for cut in cuts:
        ax.axvline(cut, color="black", linewidth=0.8, linestyle="--")
        share = sum(length > cut for length in everything) / len(everything)
        ax.text(cut, 1, f"{cut}: {share:.1%} cut ", ha="right", va="top", rotation=90, fontsize="small", transform=ax.get_xaxis_transform())
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_formatter(ScalarFormatter())
    ax.set(xlabel="tokens a row", ylabel="rows", yscale="log")
    figure.legend(loc="outside right upper", fontsize="small", frameon=False)


def plot_answers(records, title=""):
    """How many answers a prompt has and how scores are spread: shares of each source by itself."""
    sources = sorted({record.source for record in records})
    figure, (left, right) = canvas(2, title)
    counts = [[len(record.answers) for record in records if record.source == source] for source in sources]
    scores = [[answer.score for record in records if record.source == source for answer in record.answers] for source in sources]
    most = max(map(max, counts))
    left.hist(counts, bins=[i - 0.5 for i in range(most + 2)] if most < 20 else 20, weights=_shares(counts), label=sources, color=_colours(sources))
    left.set(xlabel="answers a prompt", ylabel="share of the prompts")
    low, high = (math.asinh(f(f(some or [0]) for some in scores)) for f in (min, max))
    edges = [math.sinh(low - 0.2 + (high - low + 0.4) * i / 30) for i in range(31)]      # likes go into the thousands
    right.hist(scores, bins=edges, weights=_shares(scores), histtype="step", color=_colours(sources))
    right.set_xscale("symlog", linthresh=10)
    right.xaxis.set_major_formatter(ScalarFormatter())
    right.set(xlabel="score of an answer", ylabel="share of the answers")
    figure.legend(*left.get_legend_handles_labels(), loc="outside right upper", fontsize="small", frameon=False)


def _shares(lists):
    return [[1 / len(some) for _ in some] for some in lists]


def _colours(names):
    return [COLOURS[i % len(COLOURS)] for i in range(len(names))]


def _totals(table):
    """The rows of whole tasks, `ceval` but not `ceval/STEM`; a table of subjects alone stays as it is."""
    part = table["task"].str.contains("/")
    return table if part.all() else table[~part]


def _plot_sweep(table, title):
    figures = [("memory_gib", "peak memory (GiB)"), ("tokens_per_second", "tokens a second")]
    fields = list(table.columns)[:min(list(table.columns).index(name) for name, _ in figures)]
    varied = [name for name in fields if table[name].nunique() > 1] or fields[:1]
    _, axes = canvas(2, title)
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


def canvas(panels, title):
    """A figure with a row of empty panels -> (figure, axes): the size, the palette and the fonts of all."""
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
