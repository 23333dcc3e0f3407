"""WideResNet-28-10, the network whose own counts are the unit of the score (arXiv:1605.07146).

It is here to be counted, not trained: that one counter gives the published denominators for it
(36.5 M parameters, 10.49 G operations) is the check that the score is read as it was meant.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..errors import StudyError

STEM_CHANNELS = 16
GROUP_CHANNELS = (16, 32, 64)  # before widening


class PreActivationBlock(nn.Module):
    """Batch norm and ReLU before each 3x3 convolution, then the sum with the shortcut.

    Where the channels change the shortcut is a 1x1 convolution of the activated input.
    """

    has_skip = True  # the sum is there behind every block, with or without the 1x1 convolution

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.act1 = nn.ReLU()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.act2 = nn.ReLU()
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        if in_channels != out_channels:
            self.shortcut = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.act1(self.bn1(x))
        skip = self.shortcut(y) if hasattr(self, "shortcut") else x
        return skip + self.conv2(self.act2(self.bn2(self.conv1(y))))


class WideResNet(nn.Module):
    """Images (B, 3, 32, 32) to class scores (B, num_classes). Build it with :func:`wide_resnet`."""

    def __init__(self, blocks_per_group: int, width: int, num_classes: int):
        super().__init__()
        channels = STEM_CHANNELS
        self.conv_stem = nn.Conv2d(3, channels, 3, padding=1, bias=False)
        groups = []
        for index, base in enumerate(GROUP_CHANNELS):
            blocks = []
            for position in range(blocks_per_group):
                stride = 2 if index > 0 and position == 0 else 1
                blocks.append(PreActivationBlock(channels, base * width, stride))
                channels = base * width
            groups.append(nn.Sequential(*blocks))
        self.groups = nn.Sequential(*groups)
        self.bn = nn.BatchNorm2d(channels)
        self.act = nn.ReLU()
        self.global_pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.bn(self.groups(self.conv_stem(x))))
        return self.classifier(torch.flatten(self.global_pool(x), 1))


def wide_resnet(depth: int = 28, width: int = 10, num_classes: int = 100) -> nn.Module:
    """Build a pre-activation WideResNet with PyTorch's default initial weights.

    Parameters
    ----------
    depth : 6n + 4 (three groups of n blocks of two convolutions)
    width : int >= 1, multiplies the 16, 32, 64 channels of the groups
    num_classes : int >= 1

    Raises
    ------
    StudyError : a depth that no whole number of blocks gives, a width or class count below 1
    """
    if depth < 10 or (depth - 4) % 6:
        raise StudyError(f"depth {depth!r} is not 6n + 4 with n >= 1; WideResNet-28-10 has 28")
    if width < 1 or num_classes < 1:
        raise StudyError(f"width {width!r} and num_classes {num_classes!r} must be at least 1")
    return WideResNet((depth - 4) // 6, width, num_classes)
