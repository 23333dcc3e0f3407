"""Pictures that more than one notebook draws."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from torch import Tensor

from ..data.images import MEAN, STD

plt.rcParams.update(
    {
        "figure.dpi": 100,
        # Class names are names: one may hold a dollar sign. Logarithmic axes get plain formatters for it.
        "text.parse_math": False,
        "axes.grid": True,
        "grid.alpha": 0.3,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
)


def show_images(images, titles: Sequence[str] = (), columns: int = 10, title: str = "") -> plt.Figure:
    """A sheet of pictures with a title above each.

    images : uint8 (N, 32, 32, 3), or normalised float (N, 3, 32, 32)
    """
    pictures = [as_picture(image) for image in images]
    rows = -(-len(pictures) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(1.25 * columns, 1.6 * rows + 0.3), squeeze=False)
    for ax in axes.flat:
        ax.axis("off")
    for i, (ax, picture) in enumerate(zip(axes.flat, pictures, strict=False)):
        ax.imshow(picture, interpolation="nearest")
        lines = titles[i].splitlines() if i < len(titles) else []
        ax.set_title("\n".join(textwrap.fill(line, 16) for line in lines), fontsize=8)
    figure.suptitle(title)
    figure.tight_layout()
    return figure


def as_picture(image: Tensor) -> np.ndarray:
    """One image as (32, 32, 3) in 0 .. 1, whether uint8 or normalised."""
    if image.shape[-1] == 3:
        return np.asarray(image) / 255.0
    picture = image.permute(1, 2, 0).cpu().numpy() * np.array(STD) + np.array(MEAN)
    return picture.clip(0.0, 1.0)


def plot_curves(history: pd.DataFrame, marks: dict[str, int] | None = None) -> plt.Figure:
    """Loss and test accuracy per epoch, side by side; ``marks`` names epochs to point at."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.6))
    tested = history[history["test_top1"].notna()]
    left.plot(history["epoch"], history["train_loss"], label="training (augmented images)")
    left.plot(tested["epoch"], tested["test_loss"], marker=".", label="test")
    left.set(xlabel="epoch", ylabel="loss", title="Does the loss fall?")
    right.plot(tested["epoch"], tested["test_top1"], marker=".", label="top-1")
    right.plot(tested["epoch"], tested["test_top5"], marker=".", label="top-5")
    right.set(xlabel="epoch", ylabel="test accuracy (%)", title="Does test accuracy rise?", ylim=(0, None))
    for ax in (left, right):
        for label, epoch in (marks or {}).items():
            ax.axvline(epoch, color="tab:red", linestyle="--", label=label)
        ax.legend(fontsize=8)
    figure.tight_layout()
    return figure


def plot_by_layer(shares: dict[str, float], title: str, colours: Sequence[str] = ("tab:blue",)) -> plt.Figure:
    """A bar for each layer: shares of zeros (0 to 1) by name."""
    figure, ax = plt.subplots(figsize=(11, 3.2))
    ax.bar(range(len(shares)), list(shares.values()), color=colours)
    ax.set_xticks(range(len(shares)), list(shares), rotation=65, ha="right", fontsize=7)
    ax.set(xlabel="layer", ylabel="share of zeros", ylim=(0, 1), title=title)
    return figure


def hatch_bars(ax: plt.Axes, hatches: Sequence[str]) -> None:
    """A pattern for each series of a bar chart beside its colour, for whoever does not see colours."""
    for bars, hatch in zip(ax.containers, hatches, strict=True):
        for bar in bars:
            bar.set_hatch(hatch)
