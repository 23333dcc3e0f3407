"""Pruning follows the cubic schedule, and what is pruned stays zero."""

from __future__ import annotations

import pytest
import torch

from msunet_core import StudyError, build_msunet
from msunet_core.model.pruning import Pruner, cubic_sparsity, prune_to_target, smallest_mask


def named(model):
    return dict(model.named_parameters())


@pytest.mark.parametrize(
    ("epoch", "expected"),
    [(0, 0.0), (50, 0.9 - 0.9 * 0.125), (99, 0.9 - 0.9 * 1e-6), (100, 0.9), (264, 0.9)],
)
def test_the_schedule_is_the_published_cubic(epoch, expected):
    assert cubic_sparsity(epoch, 0.9) == pytest.approx(expected, rel=1e-12)


def test_a_mask_zeroes_exactly_int_s_numel_smallest_magnitudes():
    weight = torch.tensor([[0.3, -0.1, 0.2], [0.0, -0.5, 0.1]])
    mask = smallest_mask(weight, 0.55)  # int(0.55 * 6) = 3: the 0.0 and both 0.1
    assert mask.tolist() == [[True, False, True], [False, True, False]]


def test_equal_magnitudes_do_not_change_the_count():
    assert int((~smallest_mask(torch.ones(10), 0.3)).sum()) == 3


@pytest.mark.parametrize(("pruner", "tensors"), [("none", 0), ("V1", 8), ("V2", 8 + 10), ("V3", 8 + 10 + 1)])
def test_each_pruner_takes_its_groups(pruner, tensors):
    # 4 blocks with SE, two 1x1 each; depthwise kernels 3 + 2 + 3 + 2 in blocks 2 and 3.
    assert len(Pruner(named(build_msunet("v3", width=0.25)), pruner).weights) == tensors


def test_stem_and_early_depthwise_are_never_pruned():
    names = Pruner(named(build_msunet("v3", width=0.25)), "V3").weights
    assert not [n for n in names if n.startswith(("conv_stem", "blocks.0", "blocks.1"))]


def test_masked_weights_are_zero_and_the_others_untouched():
    model = build_msunet("v3", width=0.25)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    pruner = Pruner(named(model), "V2")
    pruner.update(50)
    pruner.apply()
    for name, weight in pruner.weights.items():
        mask = pruner.masks[name]
        # Half-way up: 7/8 of the target, 0.9 of squeeze-excitation and 0.5 of the depthwise weights.
        assert int((~mask).sum()) == int((0.7875 if ".se." in name else 0.4375) * weight.numel())
        assert (weight[~mask] == 0).all()
        assert torch.equal(weight[mask], before[name][mask])
    assert torch.equal(model.conv_stem.weight, before["conv_stem.weight"])


def test_what_was_pruned_stays_pruned_as_sparsity_climbs():
    pruner = Pruner(named(build_msunet("v3", width=0.25)), "V2")
    pruner.update(20)
    pruner.apply()
    early = {name: mask.clone() for name, mask in pruner.masks.items()}
    for weight in pruner.weights.values():  # as a step does, before the masks are applied again
        weight.data += 0.1 * torch.randn_like(weight)
    pruner.apply()
    pruner.update(60)
    for name, mask in pruner.masks.items():
        assert not (mask & ~early[name]).any(), name


def test_prune_to_target_reaches_the_published_sparsities():
    model = build_msunet("v3")
    prune_to_target(model, "V2")
    for name, weight in Pruner(named(model), "V2").weights.items():
        zeros = (weight == 0).double().mean().item()
        # int() may leave one weight of the smallest tensor, 53*9 weights, unpruned.
        assert zeros == pytest.approx(0.9 if ".se." in name else 0.5, abs=1 / 400), name


def test_what_would_prune_nothing_or_the_wrong_weights_is_refused():
    network = build_msunet("v3", width=0.25)
    with pytest.raises(StudyError, match="pruner 'V4' is unknown"):
        Pruner(named(network), "V4")
    with pytest.raises(StudyError, match="no weight is called like those of group 'se'"):
        prune_to_target(torch.nn.Sequential(network))  # names have a prefix
    for sparsity in (-0.1, 1.5, float("nan")):
        with pytest.raises(StudyError, match=f"sparsity {sparsity} is not a share"):
            smallest_mask(torch.ones(4), sparsity)
