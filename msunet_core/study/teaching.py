"""The small experiments that the notebooks show beside a formula."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable, Sequence

import matplotlib.pyplot as plt
import pandas as pd
import torch
from torch import Tensor, nn

from ..data.images import IMAGE_SIZE, ImageData
from ..errors import StudyError
from ..measure.evaluation import evaluate
from ..model.pruning import GROUPS, Pruner, smallest_mask
from ..model.ternary import ternarize, ternary_scale
from ..training.learner import Learner
from ..training.masters import MasterWeights
from ..training.recipe import StageConfig
from ..training.records import ran_away
from ..training.schedules import learning_rate

# -- notebook 01: data and CutMix --------------------------------------------------------------


def one_of_each(labels: Tensor, at_most: int) -> Tensor:
    """The first image of each class, int64 (n,); of ``at_most`` evenly spread classes where there are more.

    labels : int64 (N,); a class without an image is left out, so any number of classes will do.
    """
    classes = labels.unique()
    classes = classes[torch.linspace(0, len(classes) - 1, min(at_most, len(classes))).round().long()]
    return torch.stack([(labels == label).nonzero()[0, 0] for label in classes])


def mean_lambda(size: int = IMAGE_SIZE) -> float:
    """The mean of CutMix's lambda after clipping, exactly, for images of ``size`` pixels (specification §5).

    A sum over the halves h of a side: h = int(size * s) // 2 for a side s with s^2 uniform, of the squared
    mean length that is left of 2h pixels about a uniform centre.
    """
    pasted = 0.0
    for half in range((size + 1) // 2):
        low, high = 2 * half / size, min(1.0, 2 * (half + 1) / size)  # the s that give this half
        lengths = [min(centre + half, size) - max(centre - half, 0) for centre in range(size)]
        pasted += (high**2 - low**2) * (sum(lengths) / size**2) ** 2
    return 1 - pasted


@torch.no_grad()
def statistics_apart(model: nn.Module, first: Tensor, second: Tensor) -> dict[str, float]:
    """How far apart batch norm's statistics of two batches are, by layer.

    Parameters
    ----------
    model : in eval mode, so that the statistics are looked at and not used
    first, second : normalised images (B, 3, 32, 32)

    Returns
    -------
    By name of each batch norm: the difference of a channel's means over the two batches, in standard
    deviations of the second, absolute, its mean over channels. Channels that do not vary are left out.
    """
    norms = {name: m for name, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}
    seen: dict[str, list] = {name: [] for name in norms}

    def watch(name: str):
        return lambda _, inputs: seen[name].append(torch.var_mean(inputs[0].float(), (0, 2, 3)))

    hooks = [norm.register_forward_pre_hook(watch(name)) for name, norm in norms.items()]
    try:
        for batch in (first, second):
            model(batch)
    finally:
        for hook in hooks:
            hook.remove()
    apart = {}
    for name, ((_, mean), (variance, other)) in seen.items():
        varies = variance > 1e-12
        apart[name] = ((mean - other)[varies].abs() / variance[varies].sqrt()).mean().item()
    return apart


# -- notebook 02: ternary training -------------------------------------------------------------


@torch.no_grad()
def output_variances(alphas: Iterable[float], fan_in: int = 128, images: int = 20_000) -> pd.DataFrame:
    """What the scale keeps: the variance of a ternary sum, for inputs of mean square 1, by threshold.

    Columns ``alpha``, ``zeros`` (share), ``with the scale``, ``without`` (variance of the output). The kernel
    is (64, fan_in) of normal weights, the inputs are independent and normal.
    """
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(64, fan_in, 1, 1, generator=draw)
    inputs = torch.randn(images, fan_in, generator=draw)
    rows = []
    for alpha in alphas:
        signs = ternarize(weight, float(alpha))
        plain = (inputs @ signs.flatten(1).T).var().item()
        scaled = plain * ternary_scale(signs).item() ** 2
        zeros = (signs == 0).double().mean().item()
        rows.append({"alpha": float(alpha), "zeros": zeros, "with the scale": scaled, "without": plain})
    return pd.DataFrame(rows)


def first_epochs(config: StageConfig, count: int) -> StageConfig:
    """The same recipe for its first epochs only, at the rates it has there; itself if it has no more."""
    if config.epochs <= count:
        return config
    changes: dict = {"epochs": count}
    if config.schedule == "one-cycle":  # a straight line down, so its start ends where the whole passes
        changes["final_lr"] = learning_rate(config, count)
    if config.schedule == "cosine":
        changes["cycle_epochs"] = config.cycle_epochs or max(1, config.epochs - config.warmup_epochs)
    return dataclasses.replace(config, **changes)


def stability(layers: pd.DataFrame) -> pd.DataFrame:
    """Whether ternary layers are sane, a row a layer, from what a stage writes as ``layers.csv``.

    Returns
    -------
    Index ``layer``; ``spread of W`` after the last epoch and ``furthest`` (the factor furthest from 1 that it
    ever had), both relative to before training; ``zeros`` and ``empty channels`` at the end, as shares; the
    epochs after which it ``ran away`` (:func:`msunet_core.training.records.ran_away`), NaN if it never did.
    """
    spread = layers.pivot(index="epochs", columns="layer", values="spread")
    relative = spread / spread.iloc[0]
    last = layers[layers["epochs"] == layers["epochs"].max()].set_index("layer")
    furthest = {name: max(of, key=lambda factor: max(factor, 1 / factor)) for name, of in relative.items()}
    table = pd.DataFrame(
        {
            "spread of W": relative.iloc[-1],
            "furthest": pd.Series(furthest),
            "zeros": last["zeros"],
            "empty channels": last["empty_channels"],
            "ran away": pd.Series(ran_away(layers.to_dict("records")), dtype=float),
        }
    )
    return table.loc[last.index]


def told_stability(table: pd.DataFrame) -> str:
    """One sentence about a table of :func:`stability`."""
    factor = table["furthest"]
    ran = table.dropna(subset="ran away")
    if ran.empty:
        return (
            f"No layer ran away: relative to before training the spread of W stayed within "
            f"{factor.min():.2f} .. {factor.max():.2f}, and at most {table['empty channels'].max():.0%} of a "
            "layer's output channels are all zero."
        )
    names = "; ".join(
        f"{name} (× {row['furthest']:,.{0 if row['furthest'] >= 10 else 2}f}, at the end "
        f"{row['zeros']:.0%} zeros and {row['empty channels']:.0%} of its output channels all zero)"
        for name, row in ran.iterrows()
    )
    rest = factor.drop(ran.index)
    others = f" The others stayed within {rest.min():.2f} .. {rest.max():.2f}." if len(rest) else ""
    return f"{len(ran)} of {len(table)} layers ran away (× their first spread of W): {names}.{others}"


def plot_stability(layers: pd.DataFrame) -> plt.Figure:
    """Spread of W, zeros and empty channels of each ternary layer over epochs; who ran away has a name."""
    named = set(stability(layers)["ran away"].dropna().index)
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.4))
    for name, rows in layers.groupby("layer", sort=False):
        first = rows["spread"].iloc[0]
        style = {"marker": ".", "label": name} if name in named else {"color": "0.6", "linewidth": 1}
        for ax, values in zip(
            axes, (rows["spread"] / first, rows["zeros"], rows["empty_channels"]), strict=True
        ):
            ax.plot(rows["epochs"], values, **style)
    axes[0].set(yscale="log", ylabel="spread of W (1 = before training)", title="Does W keep its size?")
    axes[0].yaxis.set_major_formatter("{x:g}")
    axes[1].set(ylabel="share of zeros in T", ylim=(-0.02, 1), title="Zeros of each layer")
    axes[2].set(ylabel="share of output channels", ylim=(-0.02, 1), title="Output channels that are all zero")
    for ax in axes:
        ax.set_xlabel("epochs trained")
    if named:
        axes[0].legend(fontsize=7)
    figure.tight_layout()
    return figure


# -- notebook 03: pruning in half precision ----------------------------------------------------


def accuracy_when_pruned(
    model: nn.Module, images: Tensor, labels: Tensor, shares: Sequence[float], groups: Sequence[str]
) -> pd.DataFrame:
    """Top-1 of a network pruned at once, without any training after it.

    Parameters
    ----------
    model : FP32 network, left as it is
    images, labels : uint8 (N, 32, 32, 3), int64 (N,)
    shares : of each group's weights that become 0, the smallest magnitudes of each tensor
    groups : "se", "dw", "classifier"

    Returns
    -------
    Columns ``group``, ``zeros`` (the share), ``top1`` (percent); one group pruned at a time.
    """
    rows = []
    for group in groups:
        for share in shares:
            pruned = copy.deepcopy(model)
            _prune_group(pruned, group, share)
            top1 = evaluate(pruned, images, labels)["top1"]
            rows.append({"group": group, "zeros": share, "top1": top1})
    return pd.DataFrame(rows)


@torch.no_grad()
def _prune_group(model: nn.Module, group: str, share: float) -> None:
    if group not in GROUPS:
        raise StudyError(f"group {group!r} is unknown; choose from {', '.join(GROUPS)}")
    pruner = Pruner(dict(model.named_parameters()), "V3")
    for name, weight in pruner.weights.items():
        if pruner.group[name] == group:
            weight.mul_(smallest_mask(weight, share))


def epoch_of_targets(history: pd.DataFrame, targets: dict[str, float]) -> int | None:
    """The first epoch of a pruning's history with every group at its target; None where it ended before."""
    there = [history[f"target_{group}"] >= target for group, target in targets.items()]
    epochs = history["epoch"][pd.concat(there, axis=1).all(axis=1)]
    return None if epochs.empty else int(epochs.iloc[0])


def power_ramp(epoch: int, target: float, ramp_epochs: int, power: int) -> float:
    """Sparsity s - s (1 - e/r)^power of an epoch: 3 is the published ramp, 1 a straight line."""
    return target - target * max(0.0, 1 - epoch / ramp_epochs) ** power


@torch.no_grad()
def small_steps(weight: float, step: float, count: int) -> pd.DataFrame:
    """A weight that takes many small steps, in FP16 alone and by an FP32 master (specification §8).

    Columns ``steps``, ``FP16 alone``, ``FP32 master``, ``FP16 copy of it``: the weight after so many steps.
    """
    layer = nn.Conv2d(1, 1, 1, bias=False)
    layer.weight.fill_(weight)
    masters = MasterWeights(layer, "O2")
    (master,) = masters.parameters.values()
    alone = layer.weight.detach().clone()
    rows = []
    for done in range(count + 1):
        values = (alone, master, layer.weight)
        rows.append([done, *(value.item() for value in values)])
        alone += step
        master += step
        masters.publish()
    return pd.DataFrame(rows, columns=["steps", "FP16 alone", "FP32 master", "FP16 copy of it"])


def loss_scale_steps(learner: Learner, data: ImageData, plan, scale: float, count: int) -> pd.DataFrame:
    """Steps of a learner at O1 or O2 from a planted loss scale, which overflow until it has fallen enough.

    Parameters
    ----------
    learner : trained by it
    data, plan : images and an epoch's choices for at least ``count`` steps
    scale : the planted one

    Returns
    -------
    Columns ``step``, ``loss scale``, ``overflow`` (whether the scale was cut, and so the step skipped),
    ``largest change of a weight``.
    """
    if not learner.scaler.is_enabled():
        raise StudyError(f"opt level {learner.config.opt_level} has no loss scale; train at O1 or O2")
    learner.begin_epoch(0)
    learner.scaler.scale(torch.zeros((), device=data.train_images.device))  # it is made at its first use
    learner.scaler.update(scale)
    rows = []
    for index in range(count):
        before = {name: w.detach().clone() for name, w in learner.masters.parameters.items()}
        used = learner.loss_scale()
        learner.step(data.train_images, data.train_labels, plan.step(index))
        change = max((w - before[n]).abs().max().item() for n, w in learner.masters.parameters.items())
        rows.append([index, used, learner.loss_scale() < used, change])
    return pd.DataFrame(rows, columns=["step", "loss scale", "overflow", "largest change of a weight"])
