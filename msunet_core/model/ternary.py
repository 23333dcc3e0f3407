"""Ternary 1x1 convolutions (after arXiv:1802.08530; specification §3).

A weight tensor W is replaced by K = sqrt(M) * T with T in {-1, 0, +1}. The float W is kept and
trained: it gets the gradient of K unchanged, straight through.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import StudyError, closest
from .architecture import WEIGHTS, check_alpha

# The published threshold in standard deviations. Phi^-1(0.75) = 0.67449 would make half of a
# normal tensor zero; the schedule climbs to that, the constant afterwards is the published 0.67749.
ALPHA = 0.67749

# Of which tensor the float weight gets the gradient: K as published, or T, so sqrt(M) times that.
GRADIENTS = ("kernel", "signs")


def ternarize(weight: Tensor, alpha: float = ALPHA) -> Tensor:
    """T = sign(Z) where |Z| > alpha else 0, with Z = (W - mean W) / std W (unbiased).

    Parameters
    ----------
    weight : Tensor, any shape, floating point
    alpha : float >= 0, in standard deviations of ``weight``

    Returns
    -------
    Tensor of the same shape in {-1, 0, +1}, float32 (float64 for a float64 weight).
    A constant tensor has no spread to threshold, so all of it becomes 0.
    """
    deviation, std, spread = _deviation(weight)
    return (deviation.sign() * (deviation.abs() > alpha * std)).mul_(spread)


def binarize(weight: Tensor) -> Tensor:
    """T = +1 where W >= mean W, else -1: ternary with alpha = 0 and no zero left.

    weight : floating point, any shape; returns float32 of the same shape (float64 for a float64 weight)
    """
    deviation, _, _ = _deviation(weight)
    return torch.where(deviation >= 0, 1.0, -1.0).to(deviation.dtype)


def _deviation(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    weight = weight.detach()
    weight = weight if weight.dtype == torch.float64 else weight.float()
    std = weight.std() if weight.numel() > 1 else weight.new_zeros(())
    # Below this the "spread" of a constant tensor is only the rounding of its mean.
    spread = std > 4 * torch.finfo(weight.dtype).eps * weight.abs().amax()
    return weight - weight.mean(), std, spread


def ternary_scale(signs: Tensor) -> Tensor:
    """sqrt(M) = sqrt(2 / (in_ch*k*k) * numel / nonzeros) of a kernel (out, in, k, k) of signs.

    With no non-zero weight the scale is that of one: the layer's output is 0 all the same.
    """
    fan_in = math.prod(signs.shape[1:])
    # A sum of ones, in double where 2^24 of them would not do; an FP64 scale for FP64 signs, else FP32.
    nonzeros = signs.abs().sum(dtype=torch.float64).clamp(min=1)
    nonzeros = nonzeros.to(torch.promote_types(signs.dtype, torch.float32))
    return (2.0 / fan_in * signs.numel() / nonzeros).sqrt().to(signs.dtype)


class TernaryConv2d(nn.Conv2d):
    """A bias-free 1x1 convolution that computes sqrt(M) * conv(x, T).

    In training the scale is folded into the kernel (one pass over the small tensor); in eval
    mode it multiplies the output, as the score counts it.

    Attributes: ``alpha`` (float), ``weights`` ("ternary" or "binary"), ``gradient`` (one of GRADIENTS).
    """

    gradient = "kernel"

    def __init__(self, in_channels: int, out_channels: int, *, weights: str, alpha: float):
        super().__init__(in_channels, out_channels, 1, bias=False)
        if weights not in WEIGHTS[:2]:
            raise StudyError(f"weights {weights!r} is not one of {', '.join(WEIGHTS[:2])}")
        self.weights = weights
        self.alpha = alpha

    def signs(self) -> Tensor:
        """T, of the kernel's shape, without gradient."""
        return binarize(self.weight) if self.weights == "binary" else ternarize(self.weight, self.alpha)

    def kernel(self) -> Tensor:
        """K = sqrt(M) * T, of the kernel's shape, in the weight's dtype.

        W gets dL/dK unchanged; where ``gradient`` is "signs", dL/dT = sqrt(M) * dL/dK.
        """
        signs = self.signs()
        scale = ternary_scale(signs)
        kernel = (signs * scale).to(self.weight.dtype)
        zero = self.weight - self.weight.detach()  # which has the gradient
        return kernel + (zero * scale.to(zero.dtype) if self.gradient == "signs" else zero)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return F.conv2d(x, self.kernel())
        signs = self.signs()
        return F.conv2d(x, signs.to(x.dtype)).mul_(ternary_scale(signs).to(x.dtype))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, weights={self.weights}, alpha={self.alpha}"


class GivenTernaryConv2d(TernaryConv2d):
    """A ternary convolution that was given its T: ``weight`` holds T itself and no threshold is asked."""

    def __init__(self, layer: TernaryConv2d, signs: Tensor):
        super().__init__(layer.in_channels, layer.out_channels, weights=layer.weights, alpha=layer.alpha)
        self.weight = nn.Parameter(signs, requires_grad=False)

    def signs(self) -> Tensor:
        """T, as it was given; float32."""
        return self.weight.detach().float()


def ternary_layers(model: nn.Module) -> dict[str, TernaryConv2d]:
    """All ternary (or binary) convolutions of a model by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, TernaryConv2d)}


def layer_statistics(model: nn.Module, masters: Mapping[str, Tensor] | None = None) -> list[dict]:
    """What tells whether ternary weights are still learning, one row per layer.

    masters : the FP32 W by parameter name, where those of the model are halves, whose size may be another

    Returns
    -------
    dicts of ``layer`` (its name), ``spread`` (standard deviation of W), ``zeros`` (share of T that is 0) and
    ``empty_channels`` (share of output channels of which all of T is 0). W has no clipping and T does not
    depend on its size: a spread that runs away freezes T.
    """
    rows = []
    for name, layer in ternary_layers(model).items():
        signs = layer.signs()
        rows.append(
            {
                "layer": name,
                "spread": (masters or {}).get(f"{name}.weight", layer.weight).detach().float().std().item(),
                "zeros": (signs == 0).double().mean().item(),
                "empty_channels": (signs == 0).flatten(1).all(1).double().mean().item(),
            }
        )
    return rows


def set_alpha(model: nn.Module, alpha: float) -> None:
    """Set the threshold of every ternary layer (binary ones ignore it); StudyError: it is no number >= 0."""
    check_alpha(alpha)
    for layer in ternary_layers(model).values():
        layer.alpha = alpha


def set_gradient(model: nn.Module, gradient: str) -> None:
    """Choose which gradient the float weights of all ternary layers get; StudyError: none of GRADIENTS."""
    if gradient not in GRADIENTS:
        raise StudyError(f"gradient {gradient!r} is unknown; {closest(gradient, GRADIENTS)}")
    for layer in ternary_layers(model).values():
        layer.gradient = gradient


def freeze_ternary(model: nn.Module) -> None:
    """Stop the gradients of all ternary weights (pruning stage, specification §6)."""
    for layer in ternary_layers(model).values():
        layer.weight.requires_grad_(False)
