"""The recipe of one training stage: a dataclass, checked when it is made (specification §6)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from ..data.augment import CUTMIX_PROBABILITY, ERASE_PROBABILITY
from ..data.cutmix import CONSISTENCY
from ..data.images import IMAGE_SIZE
from ..errors import StudyError, closest
from ..model.precision import OPT_LEVELS
from ..model.pruning import PRUNERS, RAMP_EPOCHS, SE_SPARSITY
from ..model.ternary import GRADIENTS

SCHEDULES = ("step", "cosine", "one-cycle")
# Of a field that came later than checkpoints which are still resumed: its default is what they had.
LATER = {"later": True}


@dataclass(frozen=True)
class StageConfig:
    """One training stage (specification §6); epochs count from 0, rates and alpha hold for an epoch."""

    epochs: int = 1
    batch_size: int = 64
    # Learning rate: warm-up from warmup_lr, then "step" (x gamma at each milestone), "cosine" from
    # lr to final_lr, or "one-cycle" (linear up over warmup_epochs, linear down to final_lr, per step).
    lr: float = 0.1
    schedule: str = "step"
    milestones: tuple[int, ...] = ()
    gamma: float = 0.25
    warmup_epochs: int = 5
    warmup_lr: float = 1e-4
    final_lr: float = 0.0
    cycle_epochs: int | None = None  # "cosine" starts anew after so many; None: one over all epochs
    momentum: float = 0.9
    weight_decay: float = 1e-4
    label_smoothing: float = 0.0
    augment: bool = True  # False: "clean" images, none of crop, flip, jitter and erasing
    erase_probability: float = ERASE_PROBABILITY  # random erasing, per image
    # Progressive resizing: side in pixels of the training images of each epoch, whole ones after the last.
    image_sizes: tuple[int, ...] = ()
    cutmix_probability: float = CUTMIX_PROBABILITY
    cutmix_until: int | None = None  # first epoch without CutMix; None: on to the end
    consistency: str = "as-released"
    alpha: float | None = None  # fixed threshold; None: the schedule from alpha_start to alpha_end
    alpha_start: int = 20
    alpha_end: int = 400
    freeze_ternary: bool = False
    # What the float weights get: dL/dK ("kernel", as published) or dL/dT ("signs").
    ternary_gradient: str = field(default="kernel", metadata=LATER)
    opt_level: str = "O0"
    pruner: str = "none"
    ramp_epochs: int = RAMP_EPOCHS
    se_sparsity: float = field(default=SE_SPARSITY, metadata=LATER)
    checkpoint_every: int = 1
    evaluate_every: int = 1
    # With several processes: batch norm over the whole batch, as one process has it. False, over the images
    # of each process, is faster and another training.
    sync_batch_norm: bool = True
    deterministic: bool = False  # on a GPU: the same bits each time, slower; a CPU always repeats

    def __post_init__(self):
        for name, low, high in (
            ("epochs", 0, 100_000),
            ("batch_size", 1, 65_536),
            ("lr", 0, 100),
            ("gamma", 0, 1),
            ("warmup_epochs", 0, 100_000),
            ("warmup_lr", 0, 100),
            ("final_lr", 0, 100),
            ("momentum", 0, 1),
            ("weight_decay", 0, 1),
            ("label_smoothing", 0, 1),
            ("erase_probability", 0, 1),
            ("cutmix_probability", 0, 1),
            ("ramp_epochs", 0, 100_000),
            ("se_sparsity", 0, 1),
            ("checkpoint_every", 1, 100_000),
            ("evaluate_every", 1, 100_000),
        ):
            value = getattr(self, name)
            if not (math.isfinite(value) and low <= value <= high):
                raise StudyError(f"{name} {value!r} is outside {low} .. {high}; correct it in the profile")
        for size in self.image_sizes:
            if not 8 <= size <= IMAGE_SIZE:
                raise StudyError(
                    f"image_sizes holds {size}, outside 8 .. {IMAGE_SIZE}; correct it in the profile"
                )
        for name, choices in (
            ("schedule", SCHEDULES),
            ("consistency", CONSISTENCY),
            ("opt_level", OPT_LEVELS),
            ("pruner", PRUNERS),
            ("ternary_gradient", GRADIENTS),
        ):
            value = getattr(self, name)
            if value not in choices:
                raise StudyError(f"{name} {value!r} is unknown; {closest(value, choices)}")
        if self.cycle_epochs is not None and self.cycle_epochs < 1:
            raise StudyError(f"cycle_epochs {self.cycle_epochs} is not 1 or more; correct it in the profile")
        if self.alpha is not None and not (math.isfinite(self.alpha) and self.alpha >= 0):
            raise StudyError(f"alpha {self.alpha!r} is not a number >= 0; 0.67749 is the published threshold")
        if not 0 <= self.alpha_start <= self.alpha_end:
            raise StudyError(f"alpha_start {self.alpha_start} is not in 0 .. alpha_end {self.alpha_end}")
