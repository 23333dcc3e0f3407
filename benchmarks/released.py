"""How the published code trained, reconstructed from the specification as the baseline of ``bench.py``.

NCHW memory, Swish as ``x * sigmoid(x)``, one convolution for each group of a mixed convolution, images
transformed one by one in worker processes, three CutMix passes with Python between, weights ternarized layer
by layer, and SGD without fused kernels. The mathematics is the study's (specification §2 to §6).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision import transforms
from torchvision.transforms.functional import to_pil_image

from msunet_core.data.images import MEAN, STD
from msunet_core.model.architecture import V3_BLOCKS, split_channels
from msunet_core.model.ternary import ALPHA


class Swish(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(x)


class Ternary1x1(nn.Conv2d):
    def __init__(self, in_channels: int, out_channels: int):
        super().__init__(in_channels, out_channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        z = (weight - weight.mean()) / weight.std()
        signs = (z > ALPHA).to(z.dtype) - (z < -ALPHA).to(z.dtype)
        scale = (2.0 / weight.shape[1] * signs.numel() / signs.count_nonzero()).sqrt()
        kernel = weight + (scale * signs - weight).detach()  # dL/dK passes straight through
        return F.conv2d(x, kernel)


class Mixed(nn.Module):
    """Consecutive groups of channels, a convolution each."""

    def __init__(self, convs: list[nn.Conv2d]):
        super().__init__()
        self.convs = nn.ModuleList(convs)
        self.parts = [conv.in_channels for conv in convs]

    def forward(self, x: Tensor) -> Tensor:
        parts = torch.split(x, self.parts, 1)
        return torch.cat([conv(part) for conv, part in zip(self.convs, parts, strict=True)], 1)


def conv1x1(in_channels: int, out_channels: int, groups: int = 1) -> nn.Module:
    pairs = zip(split_channels(in_channels, groups), split_channels(out_channels, groups), strict=True)
    convs = [Ternary1x1(i, o) for i, o in pairs]
    return convs[0] if groups == 1 else Mixed(convs)


def depthwise(channels: int, kernels: tuple[int, ...], stride: int = 1) -> nn.Module:
    pairs = zip(split_channels(channels, len(kernels)), kernels, strict=True)
    convs = [nn.Conv2d(c, c, k, stride, k // 2, groups=c, bias=False) for c, k in pairs]
    return convs[0] if len(convs) == 1 else Mixed(convs)


class SqueezeExcite(nn.Module):
    def __init__(self, channels: int, reduced: int):
        super().__init__()
        self.conv_reduce = nn.Conv2d(channels, reduced, 1)
        self.act = Swish()
        self.conv_expand = nn.Conv2d(reduced, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        pooled = F.adaptive_avg_pool2d(x, 1)
        return x * torch.sigmoid(self.conv_expand(self.act(self.conv_reduce(pooled))))


class Residual(nn.Module):
    """A chain of layers, with the skip added where shapes agree."""

    def __init__(self, has_skip: bool, *layers: nn.Module):
        super().__init__()
        self.has_skip = has_skip
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layers(x)
        return y + x if self.has_skip else y


def inverted_residual(channels: int, block) -> Residual:
    wide = channels * block.expand
    act = nn.ReLU if block.act == "ReLU" else Swish
    reduced = int(channels * block.se_ratio)
    return Residual(
        block.stride == 1 and channels == block.out_channels,
        conv1x1(channels, wide, block.expand_groups),
        nn.BatchNorm2d(wide),
        act(),
        depthwise(wide, block.kernels, block.stride),
        nn.BatchNorm2d(wide),
        act(),
        SqueezeExcite(wide, reduced) if reduced else nn.Identity(),
        conv1x1(wide, block.out_channels, block.project_groups),
        nn.BatchNorm2d(block.out_channels),
    )


def released_network(num_classes: int = 100) -> nn.Module:
    """MSUNet-v3 with ternary weights, in NCHW memory."""
    separable = Residual(
        True,
        depthwise(64, (3,)),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        conv1x1(64, 64),
        nn.BatchNorm2d(64),
    )
    layers: list[nn.Module] = [
        nn.Conv2d(3, 64, 3, padding=1, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        separable,
    ]
    channels = 64
    for block in (block for stage in V3_BLOCKS for block in stage):
        layers.append(inverted_residual(channels, block))
        channels = block.out_channels
    head = [conv1x1(channels, 256), nn.BatchNorm2d(256), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, *head, nn.Linear(256, num_classes))


def consistency_loss(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """CutMix with the consistency regularizer, "as described", its choices drawn on the host."""
    count, size = len(images), images.shape[-1]
    partner = torch.randperm(count)
    side = int((1 - float(torch.rand(()))) ** 0.5 * size)
    y, x = (int(torch.randint(size, ())) for _ in range(2))
    y0, y1, x0, x1 = (
        min(max(v, 0), size) for v in (y - side // 2, y + side // 2, x - side // 2, x + side // 2)
    )
    mixed = images.clone()
    mixed[:, :, y0:y1, x0:x1] = images[partner, :, y0:y1, x0:x1]
    lam = 1 - (y1 - y0) * (x1 - x0) / size**2
    m, a, b = mixed.tensor_split(3), images.tensor_split(3), images[partner].tensor_split(3)
    first, second, third = (
        model(torch.cat(batch)).tensor_split(3)
        for batch in ((m[0], a[1], b[2]), (a[0], m[1], a[2]), (b[0], b[1], m[2]))
    )
    out = torch.cat((first[0], second[1], third[2]))
    out_a = torch.cat((second[0], first[1], second[2]))
    out_b = torch.cat((third[0], third[1], first[2]))
    entropy = lam * F.cross_entropy(out, labels) + (1 - lam) * F.cross_entropy(out, labels[partner])
    return entropy + F.mse_loss(out, lam * out_a + (1 - lam) * out_b)


class TransformedImages(torch.utils.data.Dataset):
    """uint8 images, transformed one at a time as a training image was."""

    def __init__(self, images: Tensor, labels: Tensor):
        self.images, self.labels = images.numpy(), labels
        self.transform = transforms.Compose(
            [
                transforms.RandomCrop(32, padding=4),
                transforms.RandomHorizontalFlip(),
                transforms.ColorJitter(0.4, 0.4, 0.4),
                transforms.ToTensor(),
                transforms.Normalize(MEAN, STD),
                transforms.RandomErasing(0.4, (0.02, 1 / 3), (0.3, 1 / 0.3)),  # specification §4
            ]
        )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(to_pil_image(self.images[index])), int(self.labels[index])
