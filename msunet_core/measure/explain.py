"""The score in numbers: rules with a layer's numbers put in, savings by order, the official counter."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Sequence
from itertools import permutations

import pandas as pd
from torch import nn

from ..errors import StudyError
from ..model.precision import apply_opt_level
from .scoring import FULL_BITS, Score, score, score_of

# Specification §9 in terms of whole numbers: N weights, n of them not 0, P positions of an output
# channel, out = channels * P outputs. Each of the n is used once a position, so K(1 - s) * out is n * P.
RULES = {
    "ternary conv": ("N / 32 + n / 32 + 1 / d", "n × P / 32 + out / d", "n × P − out"),
    "binary conv": ("N / 32 + 1 / d", "N × P / 32 + out / d", "N × P − out"),
    "sparse conv": ("N / 32 + n / d", "n × P / d", "n × P − out"),
    "dense conv": ("N / d", "N × P / d", "N × P − out"),
    "linear": ("N / d", "N × P / d", "N × P − out"),
}
COUNTS = ("params", "mults", "adds")


def worked(row: pd.Series) -> pd.DataFrame:
    """The rules of one layer, the same with its numbers, and what they come to.

    Parameters
    ----------
    row : of ``Score.layers``, a convolution or linear layer

    Returns
    -------
    DataFrame indexed by ``params``, ``mults`` and ``adds``: ``rule``, ``numbers``, ``count``

    Raises
    ------
    StudyError : another kind of layer, or one with less than one term a sum, whose additions are 0
    """
    if row["kind"] not in RULES:
        raise StudyError(f"{row['kind']!r} has no weights; give a row of {', '.join(RULES)}")
    size = row["fan_in"] * row["shape"][0]
    nonzeros = round(size * (1 - row["sparsity"]))
    values = {"N": size, "n": nonzeros, "out": row["outputs"], "d": row["d"], "c": row["shape"][0]}
    values["P"] = row["outputs"] // row["shape"][0]
    params, mults, adds = RULES[row["kind"]]
    if nonzeros < row["shape"][0]:
        raise StudyError(
            f"this {row['kind']} has {nonzeros} weights that are not 0 for {row['shape'][0]} output "
            "channels, less than one term a sum; give a layer with more"
        )
    if row["bias"]:
        params, adds = f"{params} + c / d", f"{adds} + out"
    rules = dict(zip(COUNTS, (params, mults, adds), strict=True))

    def with_numbers(rule: str) -> str:
        return re.sub(r"\b(N|n|P|out|d|c)\b", lambda name: f"{values[name[0]]:,}", rule)

    rows = {name: (rule, with_numbers(rule), row[name]) for name, rule in rules.items()}
    return pd.DataFrame.from_dict(rows, orient="index", columns=["rule", "numbers", "count"])


def savings_by_order(cost: Callable[[frozenset[str]], float], techniques: Sequence[str]) -> pd.DataFrame:
    """What each technique saves in each order in which they can be taken, and on average over the orders.

    Parameters
    ----------
    cost : the cost with just these techniques; called once for each subset
    techniques : names

    Returns
    -------
    DataFrame, a row an order ("a, b, c") and a last one "mean", a column a technique. Every row sums to the
    cost of none less the cost of all.
    """
    costs: dict[frozenset[str], float] = {}
    rows = {}
    for order in permutations(techniques):
        for place in range(len(order) + 1):
            taken = frozenset(order[:place])
            if taken not in costs:
                costs[taken] = cost(taken)
        rows[", ".join(order)] = {
            name: costs[frozenset(order[:place])] - costs[frozenset(order[: place + 1])]
            for place, name in enumerate(order)
        }
    table = pd.DataFrame(rows).T[list(techniques)]
    table.loc["mean"] = table.mean()
    return table


def official_differences(model: nn.Module, opt_level: str = "O3") -> pd.DataFrame:
    """What the challenge's official counter adds to the score of this network (specification §9).

    Parameters
    ----------
    model : as of score; left as it is

    Returns
    -------
    DataFrame indexed by the difference: ``params``, ``flops``, ``score`` on top (negative: what it takes off)
    """
    subject = apply_opt_level(copy.deepcopy(model), opt_level)
    layers = score(subject, opt_level).layers.set_index("name")
    modules = dict(subject.named_modules())
    rows = {
        "the bias of the linear layer": [],
        "the zeros of the linear layer": [],
        "bitmasks below 40 % zeros, where they pay": [],
        "sums of SE and of the pool in 32 bits": [],
    }
    bias, linear, dense, sums = rows.values()
    for name, row in layers.iterrows():
        if row["kind"] in ("linear", "dense conv"):
            change = _as_sparse(modules[name], row)
            if score_of(*change) < 0:
                (linear if row["kind"] == "linear" else dense).append(change)
        if row["kind"] == "linear" and modules[name].bias is not None:
            bias.append((row["shape"][0] / row["d"], row["outputs"]))
        elif row["kind"] in ("SE pool and gate", "average pool"):
            sums.append((0.0, row["adds"] * (row["d"] - 1)))
    table = pd.DataFrame(
        {name: [sum(part) for part in zip((0.0, 0.0), *found, strict=True)] for name, found in rows.items()},
        index=["params", "flops"],
    ).T
    table["score"] = score_of(table["params"], table["flops"])
    return table


def scales_left_out(result: Score) -> float:
    """Parameters that neither counter has: the scales of merged batch norms behind ternary layers.

    A scale merges into the weights of a convolution, but not into T: one for each channel has to take the
    place of the one of the layer. Multiplications stay as many: that one multiplies each output already.
    """
    layers = result.layers
    if not (layers["kind"] == "batch norm, merged").any():
        return 0.0
    ternary = layers[layers["kind"].isin(("ternary conv", "binary conv"))]
    return float(sum((shape[0] - 1) / d for shape, d in zip(ternary["shape"], ternary["d"], strict=True)))


def _as_sparse(layer: nn.Module, row: pd.Series) -> tuple[float, float]:
    """Change of params and FLOPs where a layer that was counted dense is stored as bitmask and non-zeros."""
    size = layer.weight.numel()
    zeros = size - int(layer.weight.count_nonzero())
    if not zeros:
        return 0.0, 0.0
    gone = zeros * row["outputs"] / row["shape"][0]  # products, and as many additions
    return size / FULL_BITS - zeros / row["d"], -gone / row["d"] - min(gone, row["adds"])


def ternary_zeros_by_block(result: Score) -> pd.DataFrame:
    """Products and zeros of the ternary layers of each block and of the head.

    Returns
    -------
    DataFrame by block: ``products`` (fan_in * outputs, as if nothing were 0) and ``zeros``, the share of
    them that fall away
    """
    table = result.layers[result.layers["kind"] == "ternary conv"]
    block = table["name"].str.extract(r"^(blocks\.\d+\.\d+|[^.]+)")[0].rename("block")
    products = table["fan_in"] * table["outputs"]
    sums = pd.DataFrame({"products": products, "zeros": products * table["sparsity"]})
    sums = sums.groupby(block, sort=False).sum()
    return sums.assign(zeros=sums["zeros"] / sums["products"])
