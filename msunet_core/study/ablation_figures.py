"""Pictures of ablations: what each choice does, what it costs, how it trains.

Drawn 4.5 inches wide with text of 8 points or more, which is as large on a phone and in one column of print;
what matters is told by shape as well as by colour.
"""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd
from matplotlib.ticker import LogLocator, NullFormatter, NullLocator

from ..measure.scoring import RANKED_FROM, published_table
from .figures import plt  # with the study's style of axes
from .findings import LITTLE
from .grid import BASELINE

WIDTH = 4.5
MARKERS = "osD^vP*Xhp<>"
# The CIFAR-100 track of the challenge (proceedings.mlr.press/v123/kim20a.html): scores at 80 % top-1 or more,
# the least that was ranked; by how much is not told.
CHALLENGE_BEST = {"winner": 0.004169, "second": 0.0054}


def plot_effects(table: pd.DataFrame) -> plt.Figure:
    """Differences in top-1 to the first level of each factor, with their intervals, one line a row.

    Filled: resolved. Hollow: not, so the row may be better or worse by as much as its interval says. A cross:
    too few seeds for an interval. The axis is linear up to 1 point and logarithmic beyond, since rows differ
    by hundredths and by ten.
    """
    lines = []  # (text, row or None), from the top
    for choice, rows in table[table["choice"] != BASELINE].groupby("choice", sort=False):
        lines.append((f"{choice}, against {rows['value'].iloc[0]}", None))
        lines += [(row["value"], row) for _, row in rows.iloc[1:].iterrows()]
    figure, ax = plt.subplots(figsize=(WIDTH, 0.26 * len(lines) + 1.5), layout="constrained")
    ax.axvspan(-LITTLE, LITTLE, color="0.93", zorder=0)
    ax.axvline(0, color="black", linewidth=1)
    style = {"transform": ax.get_yaxis_transform(), "va": "center"}  # across the axes, and at a line
    for place, (text, row) in enumerate(lines):
        if row is None:
            ax.text(0, place, text, **style, fontsize=9, weight="bold")
        elif pd.isna(row["difference"]):
            why = "failed" if row["n"] == 0 else "no seed in common"
            ax.text(0.5, place, why, **style, ha="center", fontsize=8, style="italic")
        else:
            _draw_effect(ax, place, row)
            ax.text(1.02, place, f"{row['difference']:+.2f}", **style, fontsize=8)
    ax.set_xscale("symlog", linthresh=1)
    farthest = table[["low", "high", "difference"]].abs().max().max()
    reach = max(1.5, 1.15 * (farthest if farthest == farthest else 0))
    ticks = [tick for tick in (0.5, 1, 3, 10, 30) if tick <= reach]
    ax.set_xticks([*(-tick for tick in reversed(ticks)), 0, *ticks])
    ax.xaxis.set_major_formatter("{x:g}")
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_yticks(range(len(lines)), ["" if row is None else text for text, row in lines])
    ax.set(xlim=(-reach, reach), ylim=(len(lines) - 0.4, -0.6))
    ax.set_xlabel(
        f"difference in top-1 (points; grey: within {LITTLE:g})\nmean and 95 % interval of each row alone"
    )
    ax.set_title("Filled: resolved. Hollow: not resolved.", fontsize=10, loc="left")
    ax.grid(axis="y", visible=False)
    ax.spines["left"].set_visible(False)
    ax.tick_params(axis="y", length=0)
    return figure


def _draw_effect(ax, place: int, row: pd.Series) -> None:
    if pd.isna(row["low"]):
        ax.plot(row["difference"], place, "x", color="0.45", markersize=6)
        return
    colour = "tab:blue" if row["resolved"] else "0.45"
    face = colour if row["resolved"] else "white"
    ax.plot([row["low"], row["high"]], [place, place], color=colour, linewidth=2, solid_capstyle="butt")
    ax.plot(row["difference"], place, "o", color=colour, markerfacecolor=face, markersize=4.5)


def plot_front(table: pd.DataFrame) -> plt.Figure:
    """Top-1 against score: the rows with the Pareto front of their means, and how far the published ones are.

    Rows that are one and the same network are one point, named after the first of them.
    """
    figure, (near, far) = plt.subplots(2, 1, figsize=(WIDTH, 8.4), height_ratios=(3, 2), layout="constrained")
    rows = table.dropna(subset=["mean", "score"]).drop_duplicates(["mean", "sd", "score"])
    factors = rows.groupby("choice", sort=False)
    for marker, (choice, of) in zip(itertools.cycle(MARKERS), factors, strict=False):
        style = dict(fmt=marker, markersize=6, alpha=0.8, elinewidth=1)
        near.errorbar(of["score"], of["mean"], of["sd"], **style, label=choice)
    front = pareto(rows)
    style = dict(color="black", linewidth=1, drawstyle="steps-post", zorder=1)
    if len(front) > 1:
        near.plot(front["score"], front["mean"], **style, label="Pareto front of the means")
    named = []  # in the corner above the front, where nothing lies
    for number, (_, row) in enumerate(front.iterrows(), 1):
        _label(near, str(number), row["score"], row["mean"], (-4, 4), "right")
        named.append(f"{number}  {row['choice']}: {row['value']}")
    near.text(0.02, 0.98, "\n".join(named), transform=near.transAxes, va="top", fontsize=8)
    far.plot(rows["score"], rows["mean"], "o", color="tab:blue", markersize=4, label="these rows")
    known = published_table()
    far.plot(known["score"], known["top1"], "k*", markersize=9, label="published, one run each")
    for (_, row), above in zip(known.iterrows(), (6, -14, 6), strict=True):
        _label(far, row["variant"], row["score"], row["top1"], (0, above), "center")
    best = list(CHALLENGE_BEST.values())
    far.plot(best, [RANKED_FROM] * len(best), "k^", markersize=7, label="challenge's best, 80 % or more")
    for (name, score), below in zip(CHALLENGE_BEST.items(), (-14, -26), strict=True):
        _label(far, f"{name}, {score:g}", score, RANKED_FROM, (4, below), "right")
    far.axhline(RANKED_FROM, color="0.6", linewidth=0.8, linestyle=":")
    for ax in (near, far):
        ax.set_xscale("log")
        ax.xaxis.set_major_formatter("{x:g}")
        ax.xaxis.set_minor_formatter(NullFormatter())
        ax.margins(x=0.15, y=0.15)
        ax.set(xlabel="score (log scale, lower is better)", ylabel="top-1 (%)")
    near.xaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5)))  # rows lie within one power of ten
    near.set_title("Upper left is better. Bars: sd over seeds", fontsize=10, loc="left")
    if len(rows):
        near.legend(loc="upper center", bbox_to_anchor=(0.45, -0.16), ncols=2, fontsize=8, frameon=False)
    far.legend(loc="upper center", bbox_to_anchor=(0.45, -0.24), ncols=2, fontsize=8, frameon=False)
    far.set_title("For orientation: wide networks, trained in full", fontsize=10, loc="left")
    return figure


def _label(ax, text: str, x: float, y: float, offset: tuple[int, int], side: str) -> None:
    ax.annotate(text, (x, y), xytext=offset, textcoords="offset points", ha=side, fontsize=8)


def pareto(table: pd.DataFrame) -> pd.DataFrame:
    """The rows that no other row beats in both, by ascending ``score``; ``mean`` climbs along them."""
    rows = table.sort_values(["score", "mean"], ascending=[True, False])
    best_before = rows["mean"].astype(float).cummax().shift(fill_value=-np.inf)
    return rows[rows["mean"] > best_before]


def plot_factor_curves(curves: pd.DataFrame) -> plt.Figure:
    """How each factor's levels train: a panel a factor, a thin line a seed, their mean thick.

    Test accuracy where it was measured in more than one epoch, else training loss. A loss is of each row's
    own task: with its augmentation, its CutMix and its consistency term.
    """
    factors = [
        (choice, rows) for choice, rows in curves.groupby("choice", sort=False) if rows["value"].nunique() > 1
    ]
    count = max(1, len(factors))
    figure, axes = plt.subplots(
        count, 1, figsize=(WIDTH, 2.1 * count + 0.3), layout="constrained", squeeze=False
    )
    for ax, (choice, rows) in zip(axes.flat, factors, strict=False):
        often = rows.dropna(subset="top1").groupby("value")["epoch"].nunique().min() > 1
        column, label = ("top1", "test top-1 (%)") if often else ("train_loss", "own training loss")
        for place, (value, level) in enumerate(rows.groupby("value", sort=False)):
            style = {"color": f"C{place}", "linestyle": ("-", "--", "-.", ":")[place % 4]}
            by_seed = level.pivot(index="epoch", columns="seed", values=column).dropna(how="all")
            ax.plot(by_seed.index + 1, by_seed, **style, linewidth=0.5, alpha=0.5)
            ax.plot(by_seed.index + 1, by_seed.mean(axis=1), **style, label=value)
        ax.set_title(choice, fontsize=10, loc="left", weight="bold")
        ax.legend(fontsize=8)
        ax.set_ylabel(label)
        ax.xaxis.get_major_locator().set_params(integer=True)
    axes[-1, 0].set_xlabel("epochs of training")
    return figure
