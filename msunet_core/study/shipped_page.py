"""The page about the shipped network: curves, zeros, score and bytes, drawn from committed files alone."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
from torch import nn

from ..files import atomic_path
from ..measure.account import account
from ..measure.pack import letter_of
from ..measure.packed_format import KINDS, PARTS
from ..measure.scoring import RANKED_FROM
from ..model.ternary import TernaryConv2d
from .claims import Shipped, load_shipped, published_epochs, shipped_beside
from .pages import figure, kinds_table, provenance_table, table
from .published import PUBLISHED_V3, published_record

# Drawn for a column of a phone: 5.2 inches are 500 CSS pixels, shrunk by no more than a third there.
WIDTH = 5.2
COLOURS = {"train": "tab:blue", "prune": "tab:orange"}
COURSES = ("tab:blue", "tab:orange", "tab:green", "tab:red")  # of networks of several budgets
HATCHES = ("", "///", "...", "xxx", "\\\\\\", "+++", "ooo")
ABSENT = "No network is shipped: `make pretrained` puts one there.\n"
PARTS_OF_THE_PAGE = ("headline", "budget", "curves", "zeros", "score", "bytes", "provenance")


def shipped_parts(shipped: Shipped | None, beside: list[Shipped], folder: Path) -> dict[str, str]:
    """Markdown for the places of ``docs/shipped.md``; pictures go to ``folder`` as SVG.

    beside : networks of smaller budgets, to compare with
    """
    if shipped is None:
        return {**{f"shipped_{part}": ABSENT for part in PARTS_OF_THE_PAGE}, "headline": ABSENT}
    return {
        "headline": _headline(shipped, beside)
        + "\nMore, with its curves, zeros and bytes: [the shipped network](shipped.md).\n",
        "shipped_headline": _headline(shipped, beside),
        "shipped_budget": _budget([shipped, *beside], folder),
        "shipped_curves": _curves(shipped, folder),
        "shipped_zeros": _zeros(shipped.model, folder),
        "shipped_score": _score(shipped),
        "shipped_bytes": _bytes(shipped.path, folder),
        "shipped_provenance": provenance_table(
            shipped.provenance, {"data": {"source": "CIFAR-100", **(shipped.info.get("accuracy") or {})}}
        ),
    }


def _headline(shipped: Shipped, beside: list[Shipped]) -> str:
    published = PUBLISHED_V3
    accuracy = shipped.info.get("accuracy") or {}
    columns = [
        (
            "published",
            *(f"{published['top1']:.2f} %", ""),
            *(f"{published['params'] / 1e6:.5f} M", f"{published['flops'] / 1e6:.2f} M"),
            *(f"{published['score']:.5f}", "", f"{published_epochs():,}"),
        )
    ]
    for one in (shipped, *beside):
        measured, counted = one.info.get("accuracy") or {}, one.score
        columns.append(
            (
                "shipped here" if one is shipped else f"beside it: {one.provenance.get('profile', '?')}",
                *(f"{measured[top]:.2f} %" if measured else "?" for top in ("top1", "top5")),
                *(f"{counted.params / 1e6:.5f} M", f"{counted.flops / 1e6:.2f} M"),
                *(f"{counted.value:.5f}", f"{one.path.stat().st_size:,}", f"{one.epochs:,}"),
            )
        )
    names = ("MSUNet-v3", "top-1 at O3", "top-5 at O3", "parameters", "operations", "score")
    head, *rows = zip((*names, "bytes on the disk", "epochs"), *columns, strict=True)
    words = table(head, rows, numbers=len(columns))
    if accuracy and accuracy["top1"] < RANKED_FROM:
        words += (
            f"\nA network below {RANKED_FROM:g} % had no rank in the challenge, whatever its "
            "score: the one shipped here would have had none.\n"
        )
    return words


def _save(drawn: plt.Figure, folder: Path, name: str) -> str:
    with plt.rc_context({"svg.hashsalt": name}):  # the same picture gives the same bytes
        drawn.savefig(folder / f"{name}.svg", bbox_inches="tight", metadata={"Date": None})
    plt.close(drawn)
    return f"figures/{name}.svg"


def draw_budget(every: list[Shipped], across: bool = False) -> tuple[plt.Figure, str]:
    """Accuracy of each network over its stages, by epochs beside the published record, and by hours.

    every : networks with histories
    across : the two pictures beside each other, for a wide page

    Returns the figure and what it tells of each network, in words.
    """
    courses, record = [(one, one.course()) for one in every], published_record()
    shape = dict(ncols=2, figsize=(2 * WIDTH, 3)) if across else dict(nrows=2, figsize=(WIDTH, 5.6))
    drawn, axes = plt.subplots(**shape, layout="constrained")
    axes[0].plot(record["epoch"] + 1, record["top1"], "o-", ms=3, color="0.5", label="published")
    told = []
    for (one, course), colour in zip(courses, itertools.cycle(COURSES), strict=False):
        profile, last = one.provenance.get("profile", "?"), course.iloc[-1]
        for stage, marker in (("train", "s"), ("prune", "^")):
            part = course[course["stage"] == stage]
            look = dict(marker=marker, ms=3, color=colour, label=f"{profile}: {stage}")
            axes[0].plot(part["epochs"], part["top1"], **look)
            axes[1].plot(part["hours"], part["top1"], **look)
        words = f"{profile} reaches {last['top1']:.1f} % in {one.epochs} epochs"
        on = f" hours on {one.provenance.get('hardware', {}).get('cores', '?')} cores"
        told.append(words + ("" if math.isnan(last["hours"]) else f" and {last['hours']:.1f}{on}"))
    axes[0].set(xlabel="epochs", xscale="log", title="Accuracy by epochs")
    axes[1].set(xlabel="hours of training", xlim=(0, None), title="Accuracy by time")
    for ax in axes:
        ax.set(ylabel="top-1 (%)", ylim=(0, 85))
        ax.grid(alpha=0.3)
        ax.legend(fontsize=8)
    return drawn, "; ".join(told)


def save_budget(path: Path) -> None:
    """Draw that picture of all shipped networks as a PNG, for README."""
    every = [one for one in (load_shipped(), *shipped_beside()) if one and one.histories]
    with plt.rc_context({"backend": "Agg"}), atomic_path(path) as partial:
        drawn, _ = draw_budget(every, across=True)
        drawn.savefig(partial, dpi=110, format="png")
    plt.close(drawn)


def _budget(every: list[Shipped], folder: Path) -> str:
    every = [one for one in every if one.histories]
    if not every:
        return ABSENT
    drawn, words = draw_budget(every)
    return figure(
        _save(drawn, folder, "shipped-budget"),
        f"Top-1 over epochs on a logarithmic axis, the published record too, and over hours. {words}.",
        f"What a small budget buys: {words}; before its pruning, the published network took "
        f"{published_record()['epoch'].max() + 1:,} epochs.",
        "fig-shipped-budget",
    )


def _curves(shipped: Shipped, folder: Path) -> str:
    if not shipped.histories:
        return "Its histories are not there.\n"
    loss, left = plt.subplots(figsize=(WIDTH, 2.8), layout="constrained")
    accuracy, right = plt.subplots(figsize=(WIDTH, 2.8), layout="constrained")
    begin, told = 0, []
    for stage, history in shipped.histories.items():
        epochs = history["epoch"] + begin
        tested = history["test_top1"].notna()
        left.plot(epochs, history["train_loss"], color=COLOURS[stage], label=f"{stage}: training loss")
        for ax, column, style, what in (
            (left, "test_loss", "o--", "test loss"),
            (right, "test_top1", "o-", "top-1"),
            (right, "test_top5", "s--", "top-5"),
        ):
            values = history[column][tested]
            ax.plot(epochs[tested], values, style, ms=3, color=COLOURS[stage], label=f"{stage}: {what}")
        last = history[tested].iloc[-1]
        told.append(
            f"{stage} ends after {len(history)} epochs at {last['test_top1']:.1f} % top-1 "
            f"and a test loss of {last['test_loss']:.2f}"
        )
        begin += len(history)
    left.set(xlabel="epoch", ylabel="loss", title="Loss, training then pruning")
    right.set(
        xlabel="epoch", ylabel="test accuracy (%)", title="Accuracy on the 10,000 test images", ylim=(0, 100)
    )
    right.axhline(PUBLISHED_V3["top1"], color="grey", ls=":", label="published top-1")
    for ax, free, columns in ((left, "upper right", 1), (right, "lower right", 2)):
        ax.grid(alpha=0.3)
        ax.legend(fontsize=8, loc=free, ncols=columns)
    words = "; ".join(told)
    return figure(
        _save(loss, folder, "shipped-loss"),
        f"Two lines for each stage, training and test loss over epochs: {words}.",
        "Loss of the shipped network. Early epochs see shrunk images where the profile says so.",
        "fig-shipped-loss",
    ) + figure(
        _save(accuracy, folder, "shipped-accuracy"),
        f"Top-1 and top-5 on test images over epochs, the published top-1 as a dotted line: {words}.",
        "Test accuracy over epochs. Test images chose nothing: the last epoch is the one that is shipped.",
        "fig-shipped-accuracy",
    )


def _zeros(model: nn.Module, folder: Path) -> str:
    rows = []
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            weight = layer.signs() if isinstance(layer, TernaryConv2d) else layer.weight
            zeros = 1 - weight.count_nonzero().item() / weight.numel()
            dead = int((weight.flatten(1).count_nonzero(1) == 0).sum())
            rows.append((name, KINDS[letter_of(layer)], weight.numel(), zeros, dead))
    layers = pd.DataFrame(rows, columns=["name", "kind", "weights", "zeros", "dead"])
    drawn, ax = plt.subplots(figsize=(WIDTH, 0.19 * len(layers) + 0.8), layout="constrained")
    for (kind, some), colour, hatch in zip(
        layers.groupby("kind", sort=False), ("silver", "tab:blue", "tab:orange"), HATCHES, strict=False
    ):
        ax.barh(some.index, some["zeros"], color=colour, hatch=hatch, edgecolor="white", label=kind)
    ax.set_yticks(layers.index, layers["name"], fontsize=8)
    ax.invert_yaxis()
    ax.set(xlabel="share of weights that are 0", title="Zeros in each layer, first layer on top", xlim=(0, 1))
    ax.margins(y=0.01)
    ax.legend(fontsize=8, loc="lower right")
    ternary = layers[layers["kind"] == "ternary"]
    most, least = ternary.loc[ternary["zeros"].idxmax()], ternary.loc[ternary["zeros"].idxmin()]
    ends = " to ".join(f"{row['zeros']:.2f} ({row['name']})" for row in (least, most))
    said = f"Zeros among ternary weights range from {ends}"
    return figure(
        _save(drawn, folder, "shipped-zeros"),
        f"Bars of the share of zeros for {len(layers)} layers, by kind. {said}.",
        f"Share of zeros, counted in the shipped file. {text_of_dead(ternary)}",
        "fig-shipped-zeros",
    )


def text_of_dead(ternary: pd.DataFrame) -> str:
    """A sentence on output channels all of whose weights are zero: they say the same for every image."""
    dead = ternary[ternary["dead"] > 0]
    if dead.empty:
        return "No output channel of a ternary layer is all zeros."
    return (
        f"{dead['dead'].sum():,} output channels in {len(dead)} ternary layers are all zeros, most of them "
        f"({dead['dead'].max():,}) in `{dead.loc[dead['dead'].idxmax(), 'name']}`."
    )


def _score(shipped: Shipped) -> str:
    kinds = shipped.score.by_kind()
    total = shipped.score
    return (
        f"Counted at O3 while this page was built: {total.params / 1e6:.5f} M parameters of 32 bits, "
        f"{total.mults / 1e6:.2f} M multiplications and {total.adds / 1e6:.2f} M additions, "
        f"so a score of {total.value:.5f}. "
        f"Additions are {100 * total.adds / total.flops:.0f} % of the operations.\n\n{kinds_table(kinds)}"
    )


def _bytes(path: Path, folder: Path) -> str:
    accounted = account(path)
    kinds = accounted.groupby("kind")[[*PARTS, "bytes"]].sum().sort_values("bytes", ascending=False) / 1000
    drawn, ax = plt.subplots(figsize=(WIDTH, 0.35 * len(kinds) + 1.4), layout="constrained")
    left = pd.Series(0.0, index=kinds.index)
    for part, hatch in zip(PARTS, HATCHES, strict=True):
        if kinds[part].sum() > 0:
            ax.barh(kinds.index, kinds[part], left=left, hatch=hatch, edgecolor="white", label=part)
            left += kinds[part]
    ax.invert_yaxis()
    ax.set(xlabel="kB on the disk", title="What the file is made of")
    ax.legend(fontsize=8)
    counted = accounted["scored"].sum() / 8
    said = ", ".join(
        f"{kind} {row.bytes:.1f} kB" for kind, row in zip(kinds.index, kinds.itertuples(), strict=True)
    )
    return (
        f"{path.stat().st_size:,} bytes, where the score counts {counted:,.0f}: "
        f"{path.stat().st_size / counted:.3f} times as many. Every byte is accounted for.\n\n"
        + figure(
            _save(drawn, folder, "shipped-bytes"),
            f"Stacked bars of kilobytes by kind of layer: {said}.",
            "Bytes of the shipped file by kind of layer and by what they hold.",
            "fig-shipped-bytes",
        )
    )
