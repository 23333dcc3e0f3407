"""The MicroNet score: storage and arithmetic of one image, counted layer by layer (specification §9).

    score = params / 36.5e6 + FLOPs / 10.49e9          FLOPs = multiplications + additions

A parameter is 32 bits of storage and a multiplication is one of FP32 operands: a k-bit value
counts k/32 of either. Additions inside convolutions and linear layers stay FP32.

Where this first-party rule and the challenge's official counter are known to differ, it is kept:
the bias of a linear layer is not counted (neither as storage nor as additions), and a linear layer
is always counted dense, however many zeros it has.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pandas as pd
import torch
from torch import Tensor, nn

from ..errors import StudyError, reason
from ..model.network import SqueezeExcite
from ..model.precision import apply_opt_level
from ..model.ternary import GivenTernaryConv2d, TernaryConv2d
from .packed_format import SPARSE_FROM

# WideResNet-28-10 on CIFAR-100, the challenge's unit (MicroNet Challenge, scoring page).
REFERENCE_PARAMS = 36.5e6
REFERENCE_FLOPS = 10.49e9
# The challenge ranked entries from this top-1 on, in percent and not rounded (specification §1).
RANKED_FROM = 80.0
# A value of k bits counts k / 32 (the same page).
FULL_BITS = 32

# Operations for each input element: (multiplications, additions).
ACTIVATIONS: dict[type[nn.Module], tuple[int, int]] = {nn.ReLU: (1, 0), nn.Sigmoid: (2, 1), nn.SiLU: (3, 1)}
ACTIVATION_NAMES = {nn.ReLU: "ReLU", nn.Sigmoid: "sigmoid", nn.SiLU: "Swish"}
# Modules that compute nothing at inference.
FREE = (nn.Identity, nn.Flatten, nn.Dropout, nn.Sequential, nn.ModuleList, nn.ModuleDict)

MEASURES = ["params", "mults", "adds", "flops"]


def score_of(params, flops):
    """params / 36.5e6 + FLOPs / 10.49e9, of numbers or of columns."""
    return params / REFERENCE_PARAMS + flops / REFERENCE_FLOPS


@dataclass(frozen=True)
class Score:
    """What one image costs, as returned by :func:`score`.

    Attributes
    ----------
    params : float, stored values of 32 bits
    mults, adds : float, multiplications and additions (a half-precision multiplication is 1/2)
    flops : float, ``mults + adds``
    value : float, the score (lower is better; 2 for WideResNet-28-10 itself)
    opt_level : "O0" .. "O3"
    layers : DataFrame, a row for each counted module, in the order of computing:
        ``name``, ``kind``, ``shape`` (of the weight, else of the output without the batch),
        ``fan_in`` (K, terms of a sum for one output element; 0 where there is none),
        ``outputs`` (elements), ``sparsity`` (as counted), ``bits`` (of a stored or computed value),
        ``d``, ``bias`` (how many biases are counted), ``params``, ``mults``, ``adds``, ``flops``
    """

    params: float
    mults: float
    adds: float
    opt_level: str
    layers: pd.DataFrame = field(repr=False, compare=False)

    @property
    def flops(self) -> float:
        """Multiplications and additions together."""
        return self.mults + self.adds

    @property
    def value(self) -> float:
        """The score: params / 36.5e6 + FLOPs / 10.49e9."""
        return score_of(self.params, self.flops)

    def by_kind(self) -> pd.DataFrame:
        """Counts summed over each kind of layer, and its part of the score; most expensive first."""
        table = self.layers.groupby("kind")[MEASURES].sum()
        table["score"] = score_of(table["params"], table["flops"])
        return table.sort_values("score", ascending=False)

    def __str__(self) -> str:
        lines = [
            ("#params", f"{self.params / 1e6:.5f} M"),
            ("#mults", f"{self.mults / 1e6:.3f} M"),
            ("#adds", f"{self.adds / 1e6:.3f} M"),
            ("#FLOPs", f"{self.flops / 1e6:.3f} M"),
            (
                "score",
                f"{self.value:.5f} = {score_of(self.params, 0.0):.5f} (params) "
                f"+ {score_of(0.0, self.flops):.5f} (FLOPs)   at {self.opt_level}",
            ),
        ]
        return "\n".join(f"{label:<8} {text}" for label, text in lines)


@dataclass(frozen=True)
class _Count:
    """What one call of a layer costs."""

    kind: str
    params: float = 0.0
    mults: float = 0.0
    adds: float = 0.0
    fan_in: int = 0
    sparsity: float = 0.0
    bits: int | None = None  # None: 32 / d
    bias: int = 0


@dataclass(frozen=True)
class _Call:
    """One call of a layer: element counts, spatial size of the input, and the divisor d."""

    inputs: int
    outputs: int
    pixels: int
    d: int
    convs_are_half: bool


def _sum_adds(fan_in: float, outputs: int) -> float:
    """Additions of ``outputs`` sums of ``fan_in`` terms; a sum of less than one term needs none."""
    return max(fan_in - 1.0, 0.0) * outputs


def _conv(conv: nn.Conv2d, call: _Call) -> _Count:
    size, fan_in, out, d = conv.weight.numel(), math.prod(conv.weight.shape[1:]), call.outputs, call.d
    zeros = 1.0 - conv.weight.count_nonzero().item() / size
    if zeros >= SPARSE_FROM:
        kind, params = "sparse conv", size / FULL_BITS + size * (1 - zeros) / d  # a bitmask and the non-zeros
    else:
        kind, params, zeros = "dense conv", size / d, 0.0
    terms = fan_in * (1 - zeros)
    adds = _sum_adds(terms, out)
    bias = 0 if conv.bias is None else conv.bias.numel()
    if bias:
        params += bias / d
        adds += out
    return _Count(kind, params, terms * out / d, adds, fan_in, zeros, bias=bias)


def _ternary_conv(conv: TernaryConv2d, call: _Call) -> _Count:
    size, fan_in, out, d = conv.weight.numel(), math.prod(conv.weight.shape[1:]), call.outputs, call.d
    zeros = 1.0 - conv.signs().count_nonzero().item() / size
    terms = fan_in * (1 - zeros)
    if conv.weights == "binary":
        kind, sign_bits = "binary conv", size
    else:
        kind, sign_bits = "ternary conv", size + size * (1 - zeros)  # a bitmask, and a sign for each non-zero
    params = sign_bits / FULL_BITS + 1 / d  # with the scale, which multiplies the output
    mults = terms * out / FULL_BITS + out / d
    return _Count(kind, params, mults, _sum_adds(terms, out), fan_in, zeros, bits=1)


def _linear(linear: nn.Linear, call: _Call) -> _Count:
    fan_in, out, d = linear.in_features, call.outputs, call.d
    return _Count("linear", linear.weight.numel() / d, fan_in * out / d, _sum_adds(fan_in, out), fan_in)


def _batch_norm(norm: nn.BatchNorm2d, call: _Call) -> _Count:
    half = norm.running_var.dtype == torch.float16
    if half == call.convs_are_half:
        # The scale merges into the convolution, the shift stays.
        return _Count("batch norm, merged", norm.num_features / call.d, 0.0, call.inputs / call.d)
    each = call.inputs / call.d
    return _Count("batch norm, apart", 2 * norm.num_features / call.d, each, each)


def _activation(act: nn.Module, call: _Call) -> _Count:
    mults, adds = ACTIVATIONS[type(act)]
    each = call.inputs / call.d
    return _Count(ACTIVATION_NAMES[type(act)], 0.0, mults * each, adds * each)


def _squeeze_excite(se: SqueezeExcite, call: _Call) -> _Count:
    channels = call.inputs // call.pixels
    return _Count("SE pool and gate", 0.0, 2 * call.outputs / call.d, (call.pixels - 1) * channels / call.d)


def _average_pool(pool: nn.AdaptiveAvgPool2d, call: _Call) -> _Count:
    stencil = call.inputs // call.outputs  # elements under one output element
    return _Count("average pool", 0.0, call.outputs / call.d, (stencil - 1) * call.outputs / call.d)


# Exact types: a subclass may compute something else, so it is refused until it has its own rule.
RULES: dict[type[nn.Module], Callable[[nn.Module, _Call], _Count]] = {
    nn.Conv2d: _conv,
    TernaryConv2d: _ternary_conv,
    GivenTernaryConv2d: _ternary_conv,
    nn.Linear: _linear,
    nn.BatchNorm2d: _batch_norm,
    **dict.fromkeys(ACTIVATIONS, _activation),
    SqueezeExcite: _squeeze_excite,
    nn.AdaptiveAvgPool2d: _average_pool,
}


class _Counter:
    """Forward hooks on every module of a model, and the rows they write."""

    def __init__(self, model: nn.Module):
        self.rows: dict[str, dict] = {}
        convs = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
        # As stored: at O1 their weights are FP32, so a scale merges into them before they are cast.
        self.convs_are_half = any(conv.weight.dtype == torch.float16 for conv in convs)
        self.expected = []
        for name, module in model.named_modules():
            self._refuse_unknown(name, module)
            if next(module.parameters(recurse=False), None) is not None:
                self.expected.append(name)
            # Before the model's own hook, which casts the output back to FP32.
            module.register_forward_hook(self._hook(name), prepend=True)

    @staticmethod
    def _refuse_unknown(name: str, module: nn.Module) -> None:
        exact = type(module) in RULES
        is_variant = not exact and isinstance(module, tuple(RULES))
        unknown = [*module.parameters(recurse=False)] or not [*module.children()]
        if is_variant or (not exact and not isinstance(module, FREE) and unknown):
            raise StudyError(
                f"the score has no rule for {type(module).__name__} ({name or 'the model itself'}); "
                "add one to RULES in scoring.py, or to FREE if it computes nothing"
            )

    def _hook(self, name: str) -> Callable:
        def hook(module: nn.Module, args: tuple, output: Tensor) -> None:
            if type(module) in RULES:
                self._count(name, module, args[0], output)
            if getattr(module, "has_skip", False):
                d, outputs = _divisor(args[0], output), output.numel()
                self._add(f"{name} + skip", _Count("skip addition", adds=outputs / d), output[0], outputs, d)

        return hook

    def _count(self, name: str, module: nn.Module, x: Tensor, output: Tensor) -> None:
        d, outputs = _divisor(*module.parameters(recurse=False), x, output), output.numel()
        call = _Call(x.numel(), outputs, math.prod(x.shape[2:]), d, self.convs_are_half)
        shaped = module.weight if isinstance(module, nn.Conv2d | nn.Linear) else output[0]
        self._add(name, RULES[type(module)](module, call), shaped, outputs, d)

    def _add(self, name: str, count: _Count, shaped: Tensor, outputs: int, d: int) -> None:
        if name in self.rows:  # run again: the same parameters, more operations
            row = self.rows[name]
            row["mults"] += count.mults
            row["adds"] += count.adds
            row["flops"] += count.mults + count.adds
            row["outputs"] += outputs
            return
        self.rows[name] = {
            "name": name,
            "kind": count.kind,
            "shape": tuple(shaped.shape),
            "fan_in": count.fan_in,
            "outputs": outputs,
            "sparsity": count.sparsity,
            "bits": count.bits or FULL_BITS // d,
            "d": d,
            "bias": count.bias,
            "params": count.params,
            "mults": count.mults,
            "adds": count.adds,
            "flops": count.mults + count.adds,
        }

    def table(self) -> pd.DataFrame:
        missed = [name for name in self.expected if name not in self.rows]
        if missed:
            raise StudyError(
                f"{missed[0] or 'the model itself'} has parameters but was never called ({len(missed)} such "
                "modules); the score would miss them: remove them or call them as modules"
            )
        return pd.DataFrame(list(self.rows.values()), columns=_COLUMNS)


_COLUMNS = ["name", "kind", "shape", "fan_in", "outputs", "sparsity", "bits", "d", "bias", *MEASURES]


def _divisor(*tensors: Tensor) -> int:
    """Divisor d: 2 where weights, input and output are all FP16, else 1."""
    return 2 if all(tensor.dtype == torch.float16 for tensor in tensors) else 1


@torch.no_grad()
def score(model: nn.Module, opt_level: str = "O0", input_size: tuple[int, int, int] = (3, 32, 32)) -> Score:
    """Count what storing ``model`` and running one image through it costs (specification §9).

    The counting runs on a deep copy in eval mode: the model, its mode and its hooks stay as they are. Counted
    is what modules compute; arithmetic in the forward of a module that holds others is not seen, but for the
    addition of one with ``has_skip``.

    Parameters
    ----------
    model : nn.Module whose forward takes one FP32 tensor (B, C, H, W); at O0, or at ``opt_level`` already
    opt_level : "O0" .. "O3", the precision that the copy is brought to
    input_size : (C, H, W) of the image

    Returns
    -------
    Score

    Raises
    ------
    StudyError : unknown opt level, a model at another opt level, an image that does not fit the model,
        a value beyond FP16, a kind of module without a rule, or a module with parameters that is never called
    """
    if (
        not isinstance(input_size, Sequence)
        or len(input_size) != 3
        or not all(isinstance(n, int) and n >= 1 for n in input_size)
    ):
        raise StudyError(f"input_size {input_size!r} is not three whole numbers (channels, height, width)")
    subject = apply_opt_level(copy.deepcopy(model), opt_level).eval()
    counter = _Counter(subject)
    device = next((parameter.device for parameter in subject.parameters()), None)
    image = torch.zeros(1, *input_size, device=device)
    try:
        subject(image)
    except RuntimeError as error:
        raise StudyError(
            f"an image of input_size {input_size!r} does not fit the model: {reason(error)}"
        ) from error
    layers = counter.table()
    return Score(*(float(layers[m].sum()) for m in ("params", "mults", "adds")), opt_level, layers)


def ternary_sparsity_at(result: Score, flops: float) -> float:
    """The share of zeros in ternary layers at which ``result``'s network would cost ``flops``.

    The operations of a ternary layer are linear in its share of zeros, so this is an average over
    all ternary layers weighted by their multiplications (fan_in * outputs), everything else as it is.
    It may lie outside [0, 1] where no share of zeros gives that count.

    Raises
    ------
    StudyError : a network without ternary layers
    """
    ternary = result.layers[result.layers["kind"] == "ternary conv"]
    if ternary.empty:
        raise StudyError("the scored network has no ternary layers; score one built with weights='ternary'")
    dense = ternary["fan_in"] * ternary["outputs"]
    zeros = (dense * ternary["sparsity"]).sum() / dense.sum()
    # One more zero saves an addition and a multiplication by a sign of one bit.
    return float(zeros + (result.flops - flops) / (dense.sum() * (1 + 1 / FULL_BITS)))


def published_table() -> pd.DataFrame:
    """The published results (the project's description; specification §1), indexed by model.

    Columns: ``variant``, ``top1`` (percent of the CIFAR-100 test images), ``flops``, ``params``
    (counts), ``score``, ``weights``, ``sparse``, ``opt_level`` (at test).
    """
    columns = ["model", "variant", "top1", "flops", "params", "score", "weights", "sparse", "opt_level"]
    rows = [
        ("MSUNet-v1", "v1", 80.47, 118.6e6, 0.2119e6, 0.01711, "ternary 1x1", "SE 0.9", "O0"),
        ("MSUNet-v2", "v2", 80.30, 97.01e6, 0.1204e6, 0.01255, "ternary 1x1", "SE 0.9, dw 0.5", "O3"),
        ("MSUNet-v3", "v3", 80.13, 85.27e6, 0.09853e6, 0.01083, "ternary 1x1", "SE 0.9, dw 0.5", "O3"),
    ]
    return pd.DataFrame(rows, columns=columns).set_index("model")
