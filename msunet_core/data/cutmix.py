"""CutMix (arXiv:1905.04899) and the self-supervised consistency regularizer (specification §5)."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import StudyError, closest

CONSISTENCY = ("as-released", "as-described", "off")

Forward = Callable[[Tensor], Tensor]


def cutmix(images: Tensor, partners: Tensor, box: Tensor) -> Tensor:
    """Paste the box of each partner image into each image.

    Parameters
    ----------
    images, partners : (B, C, H, W), same dtype
    box : integer tensor (4,) of y0, y1, x0, x1, end exclusive; may be empty

    Returns
    -------
    Tensor (B, C, H, W), a new one.
    """
    y = torch.arange(images.shape[-2], device=images.device)
    x = torch.arange(images.shape[-1], device=images.device)
    y0, y1, x0, x1 = box.unbind()
    inside = ((y >= y0) & (y < y1))[:, None] & ((x >= x0) & (x < x1))[None, :]
    return torch.where(inside, partners, images)


def thirds(batch: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A batch cut in three nearly equal parts, the last the longest: of 64 images 21, 21 and 22."""
    return batch.tensor_split((len(batch) // 3, 2 * len(batch) // 3))


def exchange_thirds(mix: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The three batches (mix1, a2, b3), (a1, mix2, a3), (b1, b2, mix3) of the consistency passes."""
    mix1, mix2, mix3 = thirds(mix)
    a1, a2, a3 = thirds(a)
    b1, b2, b3 = thirds(b)
    return torch.cat([mix1, a2, b3]), torch.cat([a1, mix2, a3]), torch.cat([b1, b2, mix3])


def restore_thirds(first: Tensor, second: Tensor, third: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Undo :func:`exchange_thirds` on the three outputs: mix, a, b in their own order."""
    f1, f2, f3 = thirds(first)
    s1, s2, s3 = thirds(second)
    t1, t2, t3 = thirds(third)
    return torch.cat([f1, s2, t3]), torch.cat([s1, f2, s3]), torch.cat([t1, t2, f3])


def mixed_cross_entropy(
    scores: Tensor, labels_a: Tensor, labels_b: Tensor, lam: Tensor, label_smoothing: float = 0.0
) -> Tensor:
    """lam * CE(scores, labels_a) + (1 - lam) * CE(scores, labels_b)."""
    loss_a, loss_b = (
        F.cross_entropy(scores, labels, label_smoothing=label_smoothing) for labels in (labels_a, labels_b)
    )
    return lam * loss_a + (1 - lam) * loss_b


def cutmix_loss(
    model: Forward,
    images: Tensor,
    labels: Tensor,
    partner: Tensor,
    box: Tensor,
    lam: Tensor,
    consistency: str = "as-released",
    label_smoothing: float = 0.0,
) -> Tensor:
    """The loss of a CutMix batch: a 0-d tensor, with gradients through all its terms.

    Parameters
    ----------
    model : images (B, C, H, W) -> class scores (B, classes)
    images, labels : float (B, C, H, W), int64 (B,)
    partner : int64 (B,), a permutation; ``images[partner]`` are the b of each a
    box : int64 (4,), y0, y1, x0, x1
    lam : 0-d float, the share of a left after the box was clipped
    consistency : "as-released", where a is the already pasted image (an aliasing slip of the released
        code, behind all published numbers); "as-described"; or "off", cross entropy of the mixed images alone
    label_smoothing : share of each target that is spread over all classes, in [0, 1)
    """
    partners = images[partner], labels, labels[partner]
    return mixed_loss(model, images, *partners, box, lam, consistency, label_smoothing)


def mixed_loss(
    model: Forward,
    images: Tensor,
    partners: Tensor,
    labels: Tensor,
    labels_b: Tensor,
    box: Tensor,
    lam: Tensor,
    consistency: str = "as-released",
    label_smoothing: float = 0.0,
) -> Tensor:
    """As :func:`cutmix_loss`, the partners given: those of a part of a batch may lie outside of it.

    partners : float (B, C, H, W), the b of each image
    labels, labels_b : int64 (B,), of the images and of their partners
    """
    if consistency not in CONSISTENCY:
        raise StudyError(f"consistency {consistency!r} is unknown; {closest(consistency, CONSISTENCY)}")
    mix = cutmix(images, partners, box)
    if consistency == "off":
        scores = model(mix)
        return mixed_cross_entropy(scores, labels, labels_b, lam, label_smoothing)
    first_image = mix if consistency == "as-released" else images
    passes = [model(batch) for batch in exchange_thirds(mix, first_image, partners)]
    scores, scores_a, scores_b = restore_thirds(*passes)
    regularizer = F.mse_loss(scores, lam * scores_a + (1 - lam) * scores_b)
    return mixed_cross_entropy(scores, labels, labels_b, lam, label_smoothing) + regularizer
