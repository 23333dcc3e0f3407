"""The MSUNet family as numbers (specification §2): what its networks consist of, without a tensor.

:mod:`msunet_core.model.network` builds them from this in PyTorch; who only reads a file needs no PyTorch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from ..errors import StudyError, closest

STEM_CHANNELS = 64
HEAD_CHANNELS = 256
WEIGHTS = ("ternary", "binary", "float")
# No checkpoint with optimizer state of a network up to that width is larger; one that is, is an attack or an
# accident.
MAX_WIDTH = 4
MAX_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Block:
    """One inverted residual. ``expand_groups``/``project_groups`` split a 1x1 convolution."""

    out_channels: int
    expand: int
    kernels: tuple[int, ...]
    se_ratio: float = 0.0  # reduced channels over the block's *input* channels; 0: no SE
    stride: int = 1
    expand_groups: int = 1
    project_groups: int = 1
    act: str = "SiLU"  # of torch.nn

    def wide(self, channels: int) -> int:
        """Channels inside of it, of so many that come in."""
        return channels * self.expand

    def reduced(self, channels: int) -> int:
        """Channels that squeeze-excitation squeezes to; 0: it has none."""
        return int(channels * self.se_ratio)

    def has_skip(self, channels: int, outputs: int) -> bool:
        """Whether what comes in is added to what goes out."""
        return self.stride == 1 and channels == outputs


# blocks.1.0, 2.0, 2.1, 3.0, 3.1 of v3; blocks.0.0 is the depthwise-separable one.
V3_BLOCKS: tuple[tuple[Block, ...], ...] = (
    (Block(64, 6, (3,), expand_groups=2, project_groups=2, act="ReLU"),),
    (
        Block(128, 5, (3, 5, 7), se_ratio=0.5, stride=2),
        Block(128, 6, (3, 5), se_ratio=0.5, expand_groups=2, project_groups=2),
    ),
    (
        Block(256, 5, (3, 5, 7), se_ratio=0.25, stride=2, project_groups=2),
        Block(256, 4, (3, 5), se_ratio=0.25, project_groups=2),
    ),
)
# v1 and v2 are one network, expanded by 6 everywhere.
V1_BLOCKS = tuple(tuple(replace(block, expand=6) for block in stage) for stage in V3_BLOCKS)
VARIANTS = {"v1": V1_BLOCKS, "v2": V1_BLOCKS, "v3": V3_BLOCKS}


def split_channels(channels: int, groups: int) -> list[int]:
    """Near-equal consecutive parts, the first taking the remainder: 320, 3 -> [108, 106, 106]."""
    part = channels // groups
    return [channels - part * (groups - 1)] + [part] * (groups - 1)


def scaled(channels: int, width: float) -> int:
    """Channels of a network of that width: a multiple of 4, at least 4."""
    return max(4, 4 * round(channels * width / 4))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and abs(value) < math.inf


def check_alpha(alpha: float) -> None:
    """Refuse what is no threshold in standard deviations."""
    if not (_is_number(alpha) and alpha >= 0):
        raise StudyError(f"alpha {alpha!r} is not a number >= 0; give the published 0.67749")


def check(variant: str, weights: str, alpha: float, num_classes: int, width: float) -> None:
    """Refuse what is no network, as :func:`~msunet_core.model.network.build_msunet` tells of it."""
    if not isinstance(variant, str) or variant not in VARIANTS:
        raise StudyError(f"variant {variant!r} is unknown; {closest(variant, VARIANTS)}")
    if weights not in WEIGHTS:
        raise StudyError(f"weights {weights!r} is unknown; {closest(weights, WEIGHTS)}")
    if not (_is_number(width) and 0 < width <= MAX_WIDTH):
        raise StudyError(f"width {width!r} is outside (0, {MAX_WIDTH}]; 1.0 is the published network")
    check_alpha(alpha)
    if not (isinstance(num_classes, int) and num_classes >= 1):
        raise StudyError(f"num_classes {num_classes!r} is not a whole number >= 1; CIFAR-100 has 100")


@dataclass(frozen=True)
class Layer:
    """A layer that stores something: a convolution, the classifier, or a batch norm of shape[0] channels."""

    name: str
    shape: tuple[int, ...]  # of the weight: (out, in / groups, row, column), (out, in) or (channels,)
    is_norm: bool = False
    is_ternary: bool = False  # or binary
    has_bias: bool = False

    @property
    def is_linear(self) -> bool:
        return len(self.shape) == 2


def stored_layers(
    variant: str, *, weights: str, alpha: float, num_classes: int, width: float
) -> Iterator[Layer]:
    """The layers of a network of build_msunet that store something, in the order of its modules."""
    check(variant, weights, alpha, num_classes, width)

    def conv1x1(name: str, inputs: int, outputs: int, groups: int = 1) -> Iterator[Layer]:
        parts = zip(split_channels(inputs, groups), split_channels(outputs, groups), strict=True)
        for i, (part_in, part_out) in enumerate(parts):
            full = name if groups == 1 else f"{name}.{i}"
            yield Layer(full, (part_out, part_in, 1, 1), is_ternary=weights != "float")

    def depthwise(name: str, channels: int, kernels: tuple[int, ...]) -> Iterator[Layer]:
        for i, (part, k) in enumerate(zip(split_channels(channels, len(kernels)), kernels, strict=True)):
            yield Layer(name if len(kernels) == 1 else f"{name}.{i}", (part, 1, k, k))

    def norm(name: str, channels: int) -> Layer:
        return Layer(name, (channels,), is_norm=True)

    channels = scaled(STEM_CHANNELS, width)
    yield Layer("conv_stem", (channels, 3, 3, 3))
    yield norm("bn1", channels)
    yield from depthwise("blocks.0.0.conv_dw", channels, (3,))
    yield norm("blocks.0.0.bn1", channels)
    yield from conv1x1("blocks.0.0.conv_pw", channels, channels)
    yield norm("blocks.0.0.bn2", channels)
    for i, stage in enumerate(VARIANTS[variant], 1):
        for j, block in enumerate(stage):
            name, wide = f"blocks.{i}.{j}", block.wide(channels)
            yield from conv1x1(f"{name}.conv_pw", channels, wide, block.expand_groups)
            yield norm(f"{name}.bn1", wide)
            yield from depthwise(f"{name}.conv_dw", wide, block.kernels)
            yield norm(f"{name}.bn2", wide)
            if reduced := block.reduced(channels):
                yield Layer(f"{name}.se.conv_reduce", (reduced, wide, 1, 1), has_bias=True)
                yield Layer(f"{name}.se.conv_expand", (wide, reduced, 1, 1), has_bias=True)
            channels = scaled(block.out_channels, width)
            yield from conv1x1(f"{name}.conv_pwl", wide, channels, block.project_groups)
            yield norm(f"{name}.bn3", channels)
    head = scaled(HEAD_CHANNELS, width)
    yield from conv1x1("conv_head", channels, head)
    yield norm("bn2", head)
    yield Layer("classifier", (num_classes, head), has_bias=True)
