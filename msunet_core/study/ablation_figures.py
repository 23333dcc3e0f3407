"""Pictures of ablations: what each choice does, what it costs, how it trains.

Drawn 6.4 inches wide with text of 9 points, so that they can be read on a phone and in print; what matters is
told by shape as well as by colour.
"""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd
from matplotlib.ticker import LogLocator, NullFormatter

from ..measure.scoring import RANKED_FROM, published_table
from .figures import plt  # with the study's style of axes
from .grid import BASELINE

WIDTH = 6.4
MARKERS = "osD^vP*Xhp<>"
# The winner of the challenge's CIFAR-100 track and the second (proceedings.mlr.press/v123/kim20a.html),
# both at 80 % top-1 or a little more, the least that was ranked.
CHALLENGE_BEST = {"winner": 0.004169, "second": 0.0054}


def plot_effects(table: pd.DataFrame) -> plt.Figure:
    """Differences in top-1 to the first level of each factor, with their intervals, one line a row.

    Filled: resolved. Hollow: the interval holds 0, so the row may as well be no better and no worse.
    """
    lines = []  # (text, row or None), from the top
    for choice, rows in table[table["choice"] != BASELINE].groupby("choice", sort=False):
        first = rows.iloc[0]
        lines.append((f"{choice} (against {first['value']})", None))
        lines += [(row["value"], row) for _, row in rows.iloc[1:].iterrows()]
    figure, ax = plt.subplots(figsize=(WIDTH, 0.27 * len(lines) + 1.2), layout="constrained")
    ax.axvline(0, color="black", linewidth=1)
    for place, (_, row) in enumerate(lines):
        if row is None:
            continue
        if pd.isna(row["difference"]):
            ax.text(
                0, place, " failed" if row["n"] == 0 else " no seed in common", va="center", style="italic"
            )
            continue
        colour = "tab:blue" if row["resolved"] else "0.45"
        face = colour if row["resolved"] else "white"
        ax.plot([row["low"], row["high"]], [place, place], color=colour, linewidth=2, solid_capstyle="butt")
        ax.plot(row["difference"], place, "o", color=colour, markerfacecolor=face, markersize=6)
    ax.set_yticks(range(len(lines)), [text for text, _ in lines])
    for label, (_, row) in zip(ax.get_yticklabels(), lines, strict=True):
        label.set_weight("bold" if row is None else "normal")
    ax.set(ylim=(len(lines) - 0.4, -0.6), xlabel="difference in top-1 (points), mean and 95 % interval")
    ax.set_title("Filled: resolved. Hollow: not resolved.", fontsize=10, loc="left")
    ax.grid(axis="y", visible=False)
    ax.spines["left"].set_visible(False)
    ax.tick_params(axis="y", length=0)
    return figure


def plot_front(table: pd.DataFrame) -> plt.Figure:
    """Top-1 against score: the rows with their Pareto front, and below, how far the published ones are."""
    figure, (near, far) = plt.subplots(2, 1, figsize=(WIDTH, 7.4), height_ratios=(3, 2), layout="constrained")
    rows = table.dropna(subset=["mean", "score"])
    factors = rows.groupby("choice", sort=False)
    for marker, (choice, of) in zip(itertools.cycle(MARKERS), factors, strict=False):
        near.plot(of["score"], of["mean"], marker, markersize=7, alpha=0.8, label=choice)
    front = pareto(rows)
    near.plot(front["score"], front["mean"], color="black", linewidth=1, label="Pareto front", zorder=1)
    for _, row in front.iterrows():
        _label(near, f"{row['choice']}: {row['value']}", row["score"], row["mean"], (6, 4), "left")
    far.plot(rows["score"], rows["mean"], "o", color="tab:blue", markersize=4, label="these rows")
    known = published_table()
    far.plot(known["score"], known["top1"], "k*", markersize=10, label="published, full training")
    for (_, row), above in zip(known.iterrows(), (6, -14, 6), strict=True):
        _label(far, row["variant"], row["score"], row["top1"], (0, above), "center")
    best = list(CHALLENGE_BEST.values())
    far.plot(
        best, [RANKED_FROM] * len(best), "k|", markersize=14, markeredgewidth=2, label="challenge's best"
    )
    for score, side in zip(best, ("right", "left"), strict=True):
        _label(far, f"{score:g}", score, RANKED_FROM, (0, -18), side)
    far.axhline(RANKED_FROM, color="0.6", linewidth=0.8, linestyle=":")
    for ax in (near, far):
        ax.set_xscale("log")
        ax.xaxis.set_major_formatter("{x:g}")
        ax.xaxis.set_minor_formatter(NullFormatter())
        ax.margins(x=0.15, y=0.12)
        ax.set(xlabel="score (log scale, lower is better)", ylabel="top-1 (%), mean over seeds")
    near.xaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5)))  # rows lie within one power of ten
    near.set_title("Upper left is better: accuracy against score", fontsize=10, loc="left")
    far.set_title("The same rows beside full training of wide networks", fontsize=10, loc="left")
    near.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8, frameon=False)
    far.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8, frameon=False)
    return figure


def _label(ax, text: str, x: float, y: float, offset: tuple[int, int], side: str) -> None:
    ax.annotate(text, (x, y), xytext=offset, textcoords="offset points", ha=side, fontsize=8)


def pareto(table: pd.DataFrame) -> pd.DataFrame:
    """The rows that no other row beats in both, by ascending ``score``; ``mean`` climbs along them."""
    rows = table.sort_values(["score", "mean"], ascending=[True, False])
    best_before = rows["mean"].astype(float).cummax().shift(fill_value=-np.inf)
    return rows[rows["mean"] > best_before]


def plot_factor_curves(curves: pd.DataFrame) -> plt.Figure:
    """Training loss and test accuracy by epoch, means over seeds: a line of two panels for each factor."""
    factors = [
        (choice, rows) for choice, rows in curves.groupby("choice", sort=False) if rows["value"].nunique() > 1
    ]
    figure, axes = plt.subplots(
        max(1, len(factors)),
        2,
        figsize=(WIDTH, 2.0 * max(1, len(factors)) + 0.4),
        layout="constrained",
        squeeze=False,
    )
    for (left, right), (choice, rows) in zip(axes, factors, strict=False):
        levels = rows.groupby("value", sort=False)
        for style, (value, level) in zip(itertools.cycle(("-", "--", "-.", ":")), levels, strict=False):
            left.plot(level["epoch"] + 1, level["train_loss"], style, label=value)
            tested = level.dropna(subset="top1")
            right.plot(tested["epoch"] + 1, tested["top1"], style, marker="o", markersize=4, label=value)
        right.sharex(left)
        left.set_title(choice, fontsize=10, loc="left", weight="bold")
        left.legend(fontsize=8)
        left.set_ylabel("training loss")
        right.set_ylabel("test top-1 (%)")
    for ax in axes[-1]:
        ax.set_xlabel("epochs of training")
    return figure
