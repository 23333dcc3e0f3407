"""Magnitude pruning of squeeze-excitation, depthwise and classifier weights (specification §7).

The sparsity climbs along the cubic schedule of arXiv:1710.01878; masks are chosen anew at the
start of each epoch and a pruned weight stays exactly 0.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn

from ..errors import StudyError, closest

RAMP_EPOCHS = 100
SE_SPARSITY, DW_SPARSITY, CLASSIFIER_SPARSITY = 0.9, 0.5, 0.9
# Group: (which parameters, share of zeros at the end of the ramp).
GROUPS: dict[str, tuple[str, float]] = {
    "se": (r"blocks\.[23]\.[01]\.se\.conv_(reduce|expand)\.weight", SE_SPARSITY),
    "dw": (r"blocks\.[23]\.[01]\.conv_dw(\.[012])?\.weight", DW_SPARSITY),
    "classifier": (r"classifier\.weight", CLASSIFIER_SPARSITY),
}
PRUNERS: dict[str, tuple[str, ...]] = {
    "none": (),
    "V1": ("se",),
    "V2": ("se", "dw"),
    "V3": ("se", "dw", "classifier"),
}


def cubic_sparsity(epoch: int, target: float, ramp_epochs: int = RAMP_EPOCHS) -> float:
    """s_e = s - s*(1 - e/ramp)^3, and s from e = ramp on."""
    if epoch >= ramp_epochs:
        return target
    return target - target * (1.0 - epoch / ramp_epochs) ** 3


def smallest_mask(weight: Tensor, sparsity: float) -> Tensor:
    """Boolean mask of ``weight``'s shape, False at its int(sparsity * numel) smallest magnitudes.

    Exactly so many: of equal magnitudes the earlier ones go first. StudyError: a sparsity outside 0..1.
    """
    if not 0 <= sparsity <= 1:
        raise StudyError(f"sparsity {sparsity!r} is not a share of zeros; give a number from 0 to 1")
    mask = torch.ones(weight.numel(), dtype=torch.bool, device=weight.device)
    order = weight.detach().abs().flatten().argsort(stable=True)
    mask[order[: int(sparsity * weight.numel())]] = False
    return mask.view(weight.shape)


def targets_of(pruner: str, se_sparsity: float = SE_SPARSITY) -> dict[str, float]:
    """The share of zeros that each group of a pruner ends with; StudyError: an unknown one."""
    if pruner not in PRUNERS:
        raise StudyError(f"pruner {pruner!r} is unknown; {closest(pruner, PRUNERS)}")
    return {group: se_sparsity if group == "se" else GROUPS[group][1] for group in PRUNERS[pruner]}


class Pruner:
    """Masks over named FP32 tensors: ``update`` at the start of an epoch, ``apply`` around each step.

    Parameters
    ----------
    weights : FP32 (master) weights by state-dict name, at least one of each group that is pruned
    pruner : "none", "V1" (se), "V2" (se + dw) or "V3" (se + dw + classifier)
    ramp_epochs : epochs until the target sparsity is reached
    se_sparsity : target of the group "se"

    Raises
    ------
    StudyError : an unknown pruner, or a group of which ``weights`` has none
    """

    def __init__(
        self,
        weights: dict[str, Tensor],
        pruner: str = "V2",
        ramp_epochs: int = RAMP_EPOCHS,
        se_sparsity: float = SE_SPARSITY,
    ):
        self.ramp_epochs = ramp_epochs
        self.weights: dict[str, Tensor] = {}
        self.group: dict[str, str] = {}
        self.targets = targets_of(pruner, se_sparsity)
        for group in self.targets:
            for name, weight in weights.items():
                if re.fullmatch(GROUPS[group][0], name):
                    self.weights[name], self.group[name] = weight, group
            if group not in self.group.values():
                raise StudyError(
                    f"no weight is called like those of group {group!r}, {GROUPS[group][0]}; "
                    "give those of a network of build_msunet, by their names there"
                )
        self.masks = {name: torch.ones_like(w, dtype=torch.bool) for name, w in self.weights.items()}

    def update(self, epoch: int) -> None:
        """Choose the masks of an epoch from the magnitudes the weights have now."""
        for name, weight in self.weights.items():
            sparsity = cubic_sparsity(epoch, self.targets[self.group[name]], self.ramp_epochs)
            self.masks[name].copy_(smallest_mask(weight, sparsity))

    @torch.no_grad()
    def apply(self) -> None:
        """Set every pruned weight to exactly 0."""
        for name, weight in self.weights.items():
            weight.masked_fill_(~self.masks[name], 0.0)

    def group_sparsity(self) -> dict[str, float]:
        """Share of exact zeros per group."""
        zeros: dict[str, list[int]] = {}
        for name, weight in self.weights.items():
            tally = zeros.setdefault(self.group[name], [0, 0])
            tally[0] += int((weight == 0).sum())
            tally[1] += weight.numel()
        return {group: zero / count for group, (zero, count) in zeros.items()}


@torch.no_grad()
def prune_to_target(model: nn.Module, pruner: str = "V2") -> None:
    """Prune an MSUNet at once, in place, to the published sparsities."""
    one_shot = Pruner(dict(model.named_parameters()), pruner, ramp_epochs=0)
    one_shot.update(0)
    one_shot.apply()
