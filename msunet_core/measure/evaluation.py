"""Top-1 and top-5 of a network on test images, at any opt level."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data.images import IMAGE_SIZE, normalise
from ..errors import StudyError
from ..fast.accelerate import accelerated
from ..model.precision import apply_opt_level, without_tf32
from .packed_network import PackedNetwork

BATCH_SIZE = 250  # images at once: 10,000 test images in whole batches, and small enough for a core's cache


@torch.no_grad()
def class_scores(
    model: nn.Module | PackedNetwork,
    images: Tensor,
    opt_level: str | None = None,
    *,
    batch_size: int = BATCH_SIZE,
) -> Tensor:
    """Class scores of uint8 images in eval mode.

    Parameters
    ----------
    model : left as it was, but all of it in one mode. Or a PackedNetwork, which runs as it lies, at O0
    images : uint8 (N, 32, 32, 3)
    opt_level : "O0" .. "O3", evaluated on a copy; None: the model as it is

    Returns
    -------
    float32 (N, classes), on the model's device; of a PackedNetwork on the CPU

    Raises
    ------
    StudyError : images of another type or shape, or a PackedNetwork asked for another level
    """
    images = torch.as_tensor(images)
    if images.dtype != torch.uint8 or images.shape[1:] != (IMAGE_SIZE, IMAGE_SIZE, 3):
        raise StudyError(
            f"images are {images.dtype} {tuple(images.shape)}, not uint8 (N, {IMAGE_SIZE}, {IMAGE_SIZE}, 3); "
            "give them as they are stored, not normalised"
        )
    if isinstance(model, PackedNetwork):
        if opt_level not in (None, "O0"):
            raise StudyError(f"a PackedNetwork computes at O0, not {opt_level}; unpack the file for that")
        return torch.from_numpy(model(images.cpu().numpy()))
    if opt_level is not None and opt_level != getattr(model, "opt_level", "O0"):
        model = apply_opt_level(copy.deepcopy(model), opt_level)
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    try:
        with accelerated(model), without_tf32():
            batches = images.split(batch_size)
            parts = [model(normalise(batch.to(device))).float() for batch in batches]
    finally:
        model.train(was_training)
    return torch.cat(parts)


def evaluate(
    model: nn.Module | PackedNetwork,
    images: Tensor,
    labels: Tensor,
    opt_level: str | None = "O0",
    *,
    batch_size: int = BATCH_SIZE,
) -> dict[str, float]:
    """Accuracy and loss of a network on uint8 images.

    Parameters
    ----------
    model : FP32 network; a copy of it is brought to ``opt_level`` (None: used as it is). Or a PackedNetwork,
        of which 10,000 images take seconds; its level is O0
    images : uint8 (N, 32, 32, 3), N >= 1
    labels : int64 (N,)

    Returns
    -------
    dict of ``top1`` and ``top5`` in percent and ``loss``, the mean cross entropy

    Raises
    ------
    StudyError : no image, images of another type or shape, labels that are not one whole number for each
        image, or scores that are not finite
    """
    labels = torch.as_tensor(labels)
    if len(images) == 0 or labels.shape != (len(images),) or labels.is_floating_point():
        raise StudyError(
            f"{len(images)} images and labels {labels.dtype} {tuple(labels.shape)}; "
            "give one whole number for each of 1 or more images"
        )
    return accuracy(class_scores(model, images, opt_level, batch_size=batch_size), labels.long())


def accuracy(scores: Tensor, labels: Tensor) -> dict[str, float]:
    """``top1``, ``top5`` (percent) and ``loss`` of class scores (N, classes) against labels (N,).

    Scores that are not finite raise StudyError: they have no rank.
    """
    labels = labels.to(scores.device)
    if labels.amin() < 0 or labels.amax() >= scores.shape[1]:
        raise StudyError(
            f"labels {labels.amin().item()} .. {labels.amax().item()} do not fit {scores.shape[1]} classes; "
            "give the data that the network was trained on"
        )
    if not scores.isfinite().all():
        raise StudyError(
            "class scores are not finite (NaN or Inf): the network is broken; evaluate another checkpoint"
        )
    # A rank, not topk: equal scores count in class order on every machine, so a constant network is right
    # about one class only. Ties are real at O3, where scores have 11 bits.
    own = scores.gather(1, labels[:, None])
    earlier = torch.arange(scores.shape[1], device=scores.device) < labels[:, None]
    rank = ((scores > own) | ((scores == own) & earlier)).sum(1)
    return {
        "top1": 100.0 * (rank < 1).double().mean().item(),
        "top5": 100.0 * (rank < 5).double().mean().item(),
        "loss": F.cross_entropy(scores.double(), labels).item(),
    }
