"""CutMix (arXiv:1905.04899) and the self-supervised consistency regularizer (SPEC section 5)."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import StudyError, closest

CONSISTENCY = ("as-described", "as-released", "off")

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


def exchange_thirds(mix: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The three batches (mix1, a2, b3), (a1, mix2, a3), (b1, b2, mix3) of the consistency passes."""
    mix1, mix2, mix3 = mix.tensor_split(3)
    a1, a2, a3 = a.tensor_split(3)
    b1, b2, b3 = b.tensor_split(3)
    return torch.cat([mix1, a2, b3]), torch.cat([a1, mix2, a3]), torch.cat([b1, b2, mix3])


def restore_thirds(first: Tensor, second: Tensor, third: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Undo :func:`exchange_thirds` on the three outputs: mix, a, b in their own order."""
    f1, f2, f3 = first.tensor_split(3)
    s1, s2, s3 = second.tensor_split(3)
    t1, t2, t3 = third.tensor_split(3)
    return torch.cat([f1, s2, t3]), torch.cat([s1, f2, s3]), torch.cat([t1, t2, f3])


def mixed_cross_entropy(scores: Tensor, labels_a: Tensor, labels_b: Tensor, lam: Tensor) -> Tensor:
    """lam * CE(scores, labels_a) + (1 - lam) * CE(scores, labels_b)."""
    return lam * F.cross_entropy(scores, labels_a) + (1 - lam) * F.cross_entropy(scores, labels_b)


def cutmix_loss(
    model: Forward,
    images: Tensor,
    labels: Tensor,
    partner: Tensor,
    box: Tensor,
    lam: Tensor,
    consistency: str = "as-described",
) -> tuple[Tensor, Tensor]:
    """The loss of a CutMix batch.

    Parameters
    ----------
    model : images (B, C, H, W) -> class scores (B, classes)
    images, labels : float (B, C, H, W), int64 (B,)
    partner : int64 (B,), a permutation; ``images[partner]`` are the b of each a
    box : int64 (4,), y0, y1, x0, x1
    lam : 0-d float, the share of a left after the box was clipped
    consistency : "as-described"; "as-released", where a is the already pasted image (an aliasing
        slip of the released code); or "off", cross entropy of the mixed images alone

    Returns
    -------
    loss : 0-d tensor, gradients through all its terms
    scores : (B, classes) of the mixed images
    """
    return mixed_loss(model, images, images[partner], labels, labels[partner], box, lam, consistency)


def mixed_loss(
    model: Forward,
    images: Tensor,
    partners: Tensor,
    labels: Tensor,
    labels_b: Tensor,
    box: Tensor,
    lam: Tensor,
    consistency: str = "as-described",
) -> tuple[Tensor, Tensor]:
    """As :func:`cutmix_loss`, the partners given: those of a part of a batch may lie outside of it."""
    if consistency not in CONSISTENCY:
        raise StudyError(f"consistency {consistency!r} is unknown; {closest(consistency, CONSISTENCY)}")
    mix = cutmix(images, partners, box)
    if consistency == "off":
        scores = model(mix)
        return mixed_cross_entropy(scores, labels, labels_b, lam), scores
    first_image = mix if consistency == "as-released" else images
    passes = [model(batch) for batch in exchange_thirds(mix, first_image, partners)]
    scores, scores_a, scores_b = restore_thirds(*passes)
    regularizer = F.mse_loss(scores, lam * scores_a + (1 - lam) * scores_b)
    return mixed_cross_entropy(scores, labels, labels_b, lam) + regularizer, scores
