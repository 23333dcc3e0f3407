"""Pictures of ablations: what each choice does, what it costs, how it trains.

Drawn 6.4 inches wide with text of 9 points, so that they can be read on a phone and in print; what matters is
told by shape as well as by colour.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.ticker import NullFormatter

from ..measure.scoring import published_table
from .figures import plt  # with the study's style of axes
from .grid import BASELINE

WIDTH = 6.4
MARKERS = "osD^vP*Xhp"
# The winner of the challenge's CIFAR-100 track and the second (proceedings.mlr.press/v123/kim20a.html),
# both at 80 % top-1 or a little more, the least that was ranked.
CHALLENGE_BEST = {"winner": 0.004169, "second": 0.0054}
RANKED_TOP1 = 80.0


def plot_effects(table: pd.DataFrame) -> plt.Figure:
    """Differences in top-1 to the first level of each factor, with their intervals, one line a row.

    Filled: resolved. Hollow: the interval holds 0, so the row may as well be no better and no worse.
    """
    lines = []  # (text, row or None), from the top
    for choice, rows in table[table["choice"] != BASELINE].groupby("choice", sort=False):
        first = rows.iloc[0]
        lines.append((f"{choice}, against {first['value']} ({first['mean']:.1f} %)", None))
        lines += [(row["value"], row) for _, row in rows.iloc[1:].iterrows()]
    figure, ax = plt.subplots(figsize=(WIDTH, 0.27 * len(lines) + 1.2), layout="constrained")
    ax.axvline(0, color="black", linewidth=1)
    for place, (text, row) in enumerate(lines):
        if row is None:
            ax.text(-0.42, place, text, transform=ax.get_yaxis_transform(), va="center", weight="bold")
            continue
        ax.text(-0.02, place, text, transform=ax.get_yaxis_transform(), va="center", ha="right")
        if pd.isna(row["difference"]):
            ax.text(
                0,
                place,
                " failed" if row["n"] == 0 else " no difference measured",
                va="center",
                style="italic",
            )
            continue
        colour = "tab:blue" if row["resolved"] else "0.45"
        face = colour if row["resolved"] else "white"
        ax.plot([row["low"], row["high"]], [place, place], color=colour, linewidth=2, solid_capstyle="butt")
        ax.plot(row["difference"], place, "o", color=colour, markerfacecolor=face, markersize=6)
    ax.set(
        yticks=[],
        ylim=(len(lines) - 0.4, -0.6),
        xlabel="difference in top-1 (points), mean and 95 % interval",
    )
    ax.set_title("Filled: resolved. Hollow: not resolved.", fontsize=10, loc="left")
    ax.grid(axis="y", visible=False)
    ax.spines["left"].set_visible(False)
    return figure


def plot_front(table: pd.DataFrame, published: bool = True) -> plt.Figure:
    """Top-1 against score: a marker a factor, a line along the rows that no other beats in both."""
    figure, ax = plt.subplots(figsize=(WIDTH, 5.2), layout="constrained")
    rows = table.dropna(subset=["mean", "score"])
    for marker, (choice, of) in zip(
        np.resize(list(MARKERS), len(rows)), rows.groupby("choice", sort=False), strict=False
    ):
        ax.plot(of["score"], of["mean"], marker, markersize=7, alpha=0.8, label=choice)
    front = pareto(rows)
    ax.plot(front["score"], front["mean"], color="black", linewidth=1, label="Pareto front", zorder=1)
    for _, row in front.iterrows():
        ax.annotate(
            f"{row['choice']}: {row['value']}", (row["score"], row["mean"]), xytext=(4, -11),
            textcoords="offset points", fontsize=8,
        )  # fmt: skip
    if published:
        known = published_table()
        ax.plot(known["score"], known["top1"], "k*", markersize=10, label="published, full training")
        for _, row in known.iterrows():
            ax.annotate(
                row["variant"],
                (row["score"], row["top1"]),
                xytext=(5, 4),
                textcoords="offset points",
                fontsize=9,
            )
        best = list(CHALLENGE_BEST.values())
        ax.plot(
            best,
            [RANKED_TOP1] * len(best),
            "k|",
            markersize=14,
            markeredgewidth=2,
            label="challenge's best two",
        )
        for score in best:
            ax.annotate(
                f"{score:g}",
                (score, RANKED_TOP1),
                xytext=(0, -18),
                textcoords="offset points",
                ha="right",
                fontsize=8,
            )
        ax.axhline(RANKED_TOP1, color="0.6", linewidth=0.8, linestyle=":")
    ax.set_xscale("log")
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.set(xlabel="score (log scale, lower is better)", ylabel="top-1 (% of test images), mean over seeds")
    ax.set_title("Upper left is better: accuracy against score", fontsize=10, loc="left")
    figure.legend(loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    return figure


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
        for style, (value, level) in zip(
            np.resize(["-", "--", "-.", ":"], 9), rows.groupby("value", sort=False), strict=False
        ):
            left.plot(level["epoch"] + 1, level["train_loss"], style, label=value)
            tested = level.dropna(subset="top1")
            right.plot(tested["epoch"] + 1, tested["top1"], style, marker="o", markersize=4, label=value)
        left.set_title(choice, fontsize=10, loc="left", weight="bold")
        left.legend(fontsize=8)
        left.set_ylabel("training loss")
        right.set_ylabel("test top-1 (%)")
    for ax in axes[-1]:
        ax.set_xlabel("epochs of training")
    return figure
