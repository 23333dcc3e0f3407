"""Learning rate, threshold and image size of each epoch (specification §3 and §6)."""

from __future__ import annotations

import math

from ..data.images import IMAGE_SIZE
from ..model.ternary import ALPHA
from .recipe import StageConfig

ALPHA_RAMP_END = 0.67449


def alpha_schedule(epoch: int, start: int, end: int) -> float:
    """Alpha of an epoch: 0 up to ``start``, linear up to 0.67449 at ``end``, 0.67749 from there on."""
    if epoch >= end:
        return ALPHA
    if epoch <= start:
        return 0.0
    return (epoch - start) / (end - start) * ALPHA_RAMP_END


def learning_rate(config: StageConfig, epoch: int, part: float = 0.0) -> float:
    """Learning rate of an epoch (and, for "one-cycle" only, of the part of it that is done)."""
    if config.schedule == "one-cycle":
        at = epoch + part
        if at < config.warmup_epochs:
            return config.warmup_lr + (config.lr - config.warmup_lr) * at / config.warmup_epochs
        left = (config.epochs - at) / max(1, config.epochs - config.warmup_epochs)
        return config.final_lr + (config.lr - config.final_lr) * left
    if epoch < config.warmup_epochs:
        return config.warmup_lr + (config.lr - config.warmup_lr) * epoch / config.warmup_epochs
    if config.schedule == "cosine":
        at = (epoch - config.warmup_epochs) % (config.cycle_epochs or math.inf)
        turn = math.pi * at / (config.cycle_epochs or max(1, config.epochs - config.warmup_epochs))
        return config.final_lr + (config.lr - config.final_lr) * (1 + math.cos(turn)) / 2
    return config.lr * config.gamma ** sum(epoch >= milestone for milestone in config.milestones)


def alpha_of_epoch(config: StageConfig, epoch: int) -> float:
    """The fixed alpha of a stage, or the published schedule's."""
    if config.alpha is not None:
        return config.alpha
    return alpha_schedule(epoch, config.alpha_start, config.alpha_end)


def work_before(config: StageConfig, epoch: int) -> float:
    """Work of all epochs before this one, in epochs of whole images: it goes with their pixels."""
    return sum((image_size_of_epoch(config, earlier) / IMAGE_SIZE) ** 2 for earlier in range(epoch))


def image_size_of_epoch(config: StageConfig, epoch: int) -> int:
    """Side in pixels of an epoch's training images (progressive resizing; 32: not shrunk)."""
    return config.image_sizes[epoch] if epoch < len(config.image_sizes) else IMAGE_SIZE
