"""The MSUNet family in one file, top to bottom as specification §2 tells it.

Parameter and buffer names are those of the published checkpoints: they are a promise.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..errors import StudyError
from .architecture import HEAD_CHANNELS, STEM_CHANNELS, VARIANTS, Block, check, scaled, split_channels
from .ternary import ALPHA, TernaryConv2d, ternary_layers


class MixedConv2d(nn.ModuleDict):
    """Consecutive channel groups, one convolution each, outputs concatenated. Children: 0, 1, 2."""

    def __init__(self, convs: list[nn.Conv2d]):
        super().__init__({str(i): conv for i, conv in enumerate(convs)})
        self.in_parts = [conv.in_channels for conv in convs]

    def forward(self, x: Tensor) -> Tensor:
        parts = x.split(self.in_parts, dim=1)
        return torch.cat([conv(part) for conv, part in zip(self.values(), parts, strict=True)], dim=1)


class SqueezeExcite(nn.Module):
    """x * sigmoid(expand(swish(reduce(mean over H, W of x)))) (arXiv:1709.01507)."""

    def __init__(self, channels: int, reduced: int):
        super().__init__()
        self.conv_reduce = nn.Conv2d(channels, reduced, 1)
        self.act = nn.SiLU()
        self.conv_expand = nn.Conv2d(reduced, channels, 1)
        self.gate = nn.Sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        pooled = x.mean((2, 3), keepdim=True)
        return x * self.gate(self.conv_expand(self.act(self.conv_reduce(pooled))))


class DepthwiseSeparable(nn.Module):
    """``blocks.0.0``: depthwise 3x3, then 1x1 with no activation after it."""

    def __init__(self, in_channels: int, out_channels: int, conv1x1):
        super().__init__()
        self.has_skip = in_channels == out_channels
        self.conv_dw = depthwise(in_channels, (3,), stride=1)
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.act = nn.ReLU()
        self.conv_pw = conv1x1(in_channels, out_channels)
        self.bn2 = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.bn1(self.conv_dw(x)))
        y = self.bn2(self.conv_pw(y))
        return x + y if self.has_skip else y


class InvertedResidual(nn.Module):
    """Expand 1x1, mixed depthwise, squeeze-excite, project 1x1 (arXiv:1801.04381, 1907.09595)."""

    def __init__(self, in_channels: int, out_channels: int, block: Block, conv1x1):
        super().__init__()
        self.has_skip = block.has_skip(in_channels, out_channels)
        wide, reduced = block.wide(in_channels), block.reduced(in_channels)
        self.conv_pw = conv1x1(in_channels, wide, block.expand_groups)
        self.bn1 = nn.BatchNorm2d(wide)
        self.act1 = getattr(nn, block.act)()
        self.conv_dw = depthwise(wide, block.kernels, block.stride)
        self.bn2 = nn.BatchNorm2d(wide)
        self.act2 = getattr(nn, block.act)()
        self.se = SqueezeExcite(wide, reduced) if reduced else nn.Identity()
        self.conv_pwl = conv1x1(wide, out_channels, block.project_groups)
        self.bn3 = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        y = self.act1(self.bn1(self.conv_pw(x)))
        y = self.act2(self.bn2(self.conv_dw(y)))
        y = self.bn3(self.conv_pwl(self.se(y)))
        return x + y if self.has_skip else y


def depthwise(channels: int, kernels: tuple[int, ...], stride: int) -> nn.Module:
    """A depthwise convolution, mixed over its channels where several kernel sizes are given."""
    convs = [
        nn.Conv2d(part, part, k, stride, padding=(k - 1) // 2, groups=part, bias=False)
        for part, k in zip(split_channels(channels, len(kernels)), kernels, strict=True)
    ]
    return convs[0] if len(convs) == 1 else MixedConv2d(convs)


class MSUNet(nn.Module):
    """Images (B, 3, 32, 32) to class scores (B, num_classes). Build it with :func:`build_msunet`."""

    def __init__(self, stages: tuple[tuple[Block, ...], ...], width: float, conv1x1, num_classes: int):
        super().__init__()
        self.built_with: dict = {}
        channels = scaled(STEM_CHANNELS, width)
        self.conv_stem = nn.Conv2d(3, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.act1 = nn.ReLU()
        blocks = [nn.Sequential(DepthwiseSeparable(channels, channels, conv1x1))]
        for stage in stages:
            layers = []
            for block in stage:
                out_channels = scaled(block.out_channels, width)
                layers.append(InvertedResidual(channels, out_channels, block, conv1x1))
                channels = out_channels
            blocks.append(nn.Sequential(*layers))
        self.blocks = nn.Sequential(*blocks)
        head = scaled(HEAD_CHANNELS, width)
        self.conv_head = conv1x1(channels, head)
        self.bn2 = nn.BatchNorm2d(head)
        self.act2 = nn.ReLU()
        self.global_pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(head, num_classes)

    @property
    def config(self) -> dict:
        """Arguments of :func:`build_msunet` that make this network, with the alpha its layers have now.

        StudyError where their alphas differ: there is one in a checkpoint.
        """
        alphas = {layer.alpha for layer in ternary_layers(self).values()}
        if len(alphas) > 1:
            raise StudyError(
                f"the ternary layers have {len(alphas)} thresholds, from {min(alphas):g} to {max(alphas):g}, "
                "and a checkpoint holds one; set_alpha gives all of them the same"
            )
        return {**self.built_with, **({"alpha": alphas.pop()} if alphas else {})}

    def forward(self, x: Tensor) -> Tensor:
        x = self.act1(self.bn1(self.conv_stem(x)))
        x = self.blocks(x)
        x = self.act2(self.bn2(self.conv_head(x)))
        return self.classifier(self.global_pool(x).flatten(1))


def build_msunet(
    variant: str = "v3",
    *,
    weights: str = "ternary",
    alpha: float = ALPHA,
    num_classes: int = 100,
    width: float = 1.0,
) -> MSUNet:
    """Build an MSUNet with fresh weights from torch's global random state (specification §2).

    Parameters
    ----------
    variant : "v1", "v2" (the same network) or "v3"
    weights : "ternary", "binary" or "float", of all 1x1 convolutions but the squeeze-excitation ones
    alpha : ternary threshold in standard deviations of each weight tensor
    num_classes : int >= 1
    width : multiplies every channel count, rounded to multiples of 4 (at least 4); 1.0 is the published one

    Returns
    -------
    MSUNet in channels_last memory; its ``config`` attribute holds these arguments, so that a
    checkpoint can name the network it belongs to.

    Raises
    ------
    StudyError : an argument outside the above
    """
    check(variant, weights, alpha, num_classes, width)

    def conv1x1(in_channels: int, out_channels: int, groups: int = 1) -> nn.Module:
        convs = [
            nn.Conv2d(i, o, 1, bias=False)
            if weights == "float"
            else TernaryConv2d(i, o, weights=weights, alpha=alpha)
            for i, o in zip(
                split_channels(in_channels, groups), split_channels(out_channels, groups), strict=True
            )
        ]
        return convs[0] if groups == 1 else MixedConv2d(convs)

    model = MSUNet(VARIANTS[variant], width, conv1x1, num_classes)
    init_weights(model)
    model.built_with = dict(
        variant=variant, weights=weights, alpha=alpha, num_classes=num_classes, width=width
    )
    return model.to(memory_format=torch.channels_last)


@torch.no_grad()
def init_weights(model: nn.Module) -> None:
    """Normal convolutions of std sqrt(2 / (k*k*out_channels)), zero biases, uniform classifier."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            fan_out = math.prod(module.kernel_size) * module.out_channels
            module.weight.normal_(0.0, math.sqrt(2.0 / fan_out))
            if module.bias is not None:
                module.bias.zero_()
        elif isinstance(module, nn.Linear):
            bound = 1.0 / math.sqrt(module.out_features)
            module.weight.uniform_(-bound, bound)
            module.bias.zero_()
