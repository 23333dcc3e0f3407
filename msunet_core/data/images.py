"""A data set in memory, and how its images are normalised (specification §4)."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .normalisation import IMAGE_SIZE, MEAN, STD

__all__ = ["IMAGE_SIZE", "MEAN", "STD", "ImageData", "normalise", "standardise"]
ARRAYS = ("train_images", "train_labels", "test_images", "test_labels", "class_names")


@dataclass(frozen=True, eq=False)
class ImageData:
    """A data set in memory.

    Attributes
    ----------
    train_images, test_images : uint8 (N, 32, 32, 3), RGB
    train_labels, test_labels : int64 (N,), index into ``class_names``
    class_names : one name a class
    source : what was asked for: "synthetic", "cifar100" or the path
    """

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    class_names: tuple[str, ...]
    source: str

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @cached_property
    def fingerprint(self) -> str:
        """16 hexadecimal digits of the SHA-256 of the arrays and class names; not of where they came from."""
        digest = hashlib.sha256("\0".join(self.class_names).encode())
        for name in ARRAYS[:4]:
            array = getattr(self, name).cpu().contiguous().numpy()
            digest.update(f"{name} {array.dtype} {array.shape}".encode())
            digest.update(array)
        return digest.hexdigest()[:16]

    def to(self, device: torch.device | str) -> ImageData:
        """The same data with its tensors on ``device``."""
        moved = [getattr(self, name).to(device) for name in ARRAYS[:4]]
        return ImageData(*moved, class_names=self.class_names, source=self.source)


def normalise(images: Tensor) -> Tensor:
    """uint8 (B, 32, 32, 3) -> float32 (B, 3, 32, 32) in channels_last memory, (x / 255 - MEAN) / STD."""
    return _standardised(images.permute(0, 3, 1, 2), 255)


def standardise(images: Tensor) -> Tensor:
    """float32 (B, 3, H, W) in [0, 1] -> (x - MEAN) / STD, the same shape in channels_last memory."""
    return _standardised(images, 1)


def _standardised(images: Tensor, white: int) -> Tensor:
    """(x / white - MEAN) / STD, each plane read and written once; the constants stay on the host."""
    out = torch.empty_like(images, dtype=torch.float32, memory_format=torch.channels_last)
    for channel, (mean, std) in enumerate(zip(MEAN, STD, strict=True)):
        offset = torch.tensor(-mean / std)  # 0-d on the CPU: a kernel of any device takes it as a number
        torch.add(offset, images[:, channel], alpha=1 / (white * std), out=out[:, channel])
    return out
