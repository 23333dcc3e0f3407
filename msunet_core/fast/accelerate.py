"""The one door to speed: a network whose blocks run on the CPU's kernels where these apply.

What is swapped is only how a block's ``forward`` computes. Parameters, names, state and results up to
rounding stay, so nobody but who trains or evaluates needs to know.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn

from ..model.network import DepthwiseSeparable, InvertedResidual, MixedConv2d, MSUNet
from .blocks import FastDepthwiseSeparable, FastInvertedResidual, FastMSUNet
from .layers import FastMixedConv2d

FAST: dict[type[nn.Module], type[nn.Module]] = {
    DepthwiseSeparable: FastDepthwiseSeparable,
    InvertedResidual: FastInvertedResidual,
    MixedConv2d: FastMixedConv2d,
    MSUNet: FastMSUNet,
}


def accelerate(model: nn.Module) -> nn.Module:
    """Let the blocks of a network run on the kernels, in place; returns ``model``.

    Where the kernels do not apply (no compiler, a GPU, a dtype they do not know, a hook that wants to see a
    module called, ``MSUNET_FAST=0``) a block computes what it computed before. Exact types are swapped:
    whoever derives from a block keeps what was derived.
    """
    for module in model.modules():
        module.__class__ = FAST.get(type(module), type(module))  # the same state, so nothing is lost
    return model


@contextlib.contextmanager
def accelerated(model: nn.Module) -> Iterator[nn.Module]:
    """Inside this context ``model`` is accelerated; afterwards it is what it was."""
    before = [(module, type(module)) for module in model.modules()]
    try:
        yield accelerate(model)
    finally:
        for module, kind in before:
            module.__class__ = kind
