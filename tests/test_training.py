"""One training step: rates, weight decay, ternary weights, masks, loss scale (specification §5 to §8)."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from msunet_core import StageConfig, StudyError, load_profile
from msunet_core.data.augment import augment, draw_epoch_plan
from msunet_core.model.ternary import ternary_layers
from msunet_core.training.learner import Learner, deterministic, first_bad_layer
from msunet_core.training.schedules import alpha_of_epoch, learning_rate


def plan_for(images, batch_size=8, epoch=0, **choices):
    choices = {"cutmix_probability": 0.0, **choices}
    return draw_epoch_plan(
        len(images.train_images), batch_size, seed=0, stage="train", epoch=epoch, **choices
    )


def take_steps(learner, images, plan):
    """Train on each step of a plan; returns the losses."""
    return [
        learner.step(images.train_images, images.train_labels, plan.step(i)).item() for i in range(len(plan))
    ]


def copies(tensors):
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def set_scale(learner, scale):
    learner.scaler.load_state_dict(learner.scaler.state_dict() | {"scale": scale})


# --- rates and alpha --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("epoch", "rate"),
    [
        (0, 1e-4),
        (1, 1e-4 + 0.2 * (0.1 - 1e-4)),
        (4, 1e-4 + 0.8 * (0.1 - 1e-4)),
        (5, 0.1),
        (299, 0.1),
        (300, 0.1 / 4),
        (399, 0.1 / 4),
        (400, 0.1 / 16),
        (999, 0.1 / 4**7),
        (1000, 0.1 / 4**8),
        (1049, 0.1 / 4**8),
    ],
)
def test_the_rate_of_the_ternary_stage_is_the_published_one(epoch, rate):
    # Equal but for the last bits of 0.1 * 0.25 ** n, which is exact, and of the warm-up's sum.
    assert learning_rate(load_profile("paper").train, epoch) == pytest.approx(rate, rel=1e-12)


@pytest.mark.parametrize(
    ("epoch", "rate"),
    [(0, 1e-3), (119, 1e-3), (120, 1e-3 / 4), (170, 1e-3 / 16), (200, 1e-3 / 64), (250, 1e-3 / 1024)],
)
def test_the_rate_of_the_pruning_stage_is_the_published_one(epoch, rate):
    assert learning_rate(load_profile("paper").prune, epoch) == pytest.approx(rate, rel=1e-12)


def test_v1_prunes_with_a_cosine_from_1e_3_to_5e_4():
    config = load_profile("paper", variant="v1").prune
    rates = [learning_rate(config, epoch) for epoch in range(config.epochs + 1)]
    # It begins anew at epoch 150, before the epoch of the published checkpoint, 156.
    assert (rates[0], rates[75], rates[150]) == pytest.approx((1e-3, 7.5e-4, 1e-3), rel=1e-12)
    assert min(rates) == rates[149] == pytest.approx(5e-4, rel=1e-3)
    assert rates[:150] == sorted(rates[:150], reverse=True)


def test_one_cycle_climbs_to_the_peak_and_falls_to_the_end_within_epochs():
    config = StageConfig(
        epochs=10, schedule="one-cycle", lr=0.4, warmup_epochs=2, warmup_lr=0.1, final_lr=0.0
    )
    found = [learning_rate(config, epoch, part) for epoch, part in ((0, 0.0), (1, 0.5), (2, 0.0), (6, 0.0))]
    assert found == pytest.approx([0.1, 0.325, 0.4, 0.2])
    assert learning_rate(config, 9, 0.5) == pytest.approx(0.025)


@pytest.mark.parametrize(
    ("epoch", "alpha"),
    [(0, 0.0), (20, 0.0), (21, 0.0017749737), (210, 0.337245), (399, 0.6727150263), (400, 0.67749)],
)
def test_alpha_follows_the_published_schedule_unless_it_is_fixed(epoch, alpha):
    """It climbs by 0.67449 / 380 an epoch from 20 on, and jumps to 0.67749 at 400."""
    paper = load_profile("paper")
    assert alpha_of_epoch(paper.train, epoch) == pytest.approx(alpha, abs=1e-9)
    assert alpha_of_epoch(paper.train, 1049) == 0.67749
    assert alpha_of_epoch(paper.prune, epoch) == 0.67749


def test_progressive_resizing_shrinks_the_images_of_the_epochs_it_names(images, new_network, recipe):
    learner = Learner(new_network(), recipe(image_sizes=(16, 24)))
    seen = []
    learner.model.register_forward_pre_hook(lambda module, args: seen.append(tuple(args[0].shape[1:])))
    inputs = torch.rand(2, 3, 32, 32)
    for epoch in range(3):
        learner.begin_epoch(epoch)
        learner.step(images.train_images, images.train_labels, plan_for(images).step(0))
        learner.scores(inputs)
    assert list(dict.fromkeys(seen)) == [(3, size, size) for size in (16, 24, 32)]
    assert seen == sorted(seen)


def test_a_shrunk_image_is_the_mean_of_the_pixels_it_covers(new_network, recipe):
    learner = Learner(new_network(), recipe(image_sizes=(16,)))
    learner.begin_epoch(0)
    learner.model.register_forward_pre_hook(lambda module, args: given.append(args[0]))
    given: list[torch.Tensor] = []
    inputs = torch.rand(2, 3, 32, 32)
    learner.scores(inputs)
    means = inputs.unfold(2, 2, 2).unfold(3, 2, 2).mean((-1, -2))
    torch.testing.assert_close(given[0], means)


# --- the step ---------------------------------------------------------------------------------------------


def test_one_step_is_nesterov_sgd_with_decay_on_weights_of_two_dimensions_or_more(
    images, new_network, recipe
):
    config = recipe(weight_decay=0.01, momentum=0.9)
    learner = Learner(new_network(weights="float"), config)
    learner.set_rate(0.1)
    plan = plan_for(images)
    momenta = {name: torch.zeros_like(w) for name, w in learner.model.named_parameters()}
    for index in range(2):
        step, expected = plan.step(index), {}
        learner.model.train()
        inputs = augment(images.train_images[step.order], step)
        # The same loss by autograd alone, on the weights as they are now.
        loss = F.cross_entropy(learner.model(inputs), images.train_labels[step.order])
        gradients = torch.autograd.grad(loss, list(learner.model.parameters()))
        for (name, weight), gradient in zip(learner.model.named_parameters(), gradients, strict=True):
            if weight.ndim > 1:
                gradient = gradient + 0.01 * weight.detach()
            momenta[name] = 0.9 * momenta[name] + gradient
            expected[name] = weight.detach() - 0.1 * (gradient + 0.9 * momenta[name])
        assert learner.step(images.train_images, images.train_labels, step).item() == loss.item()
        for name, weight in learner.model.named_parameters():
            # The fused kernel multiplies and adds in one rounding where this test has two.
            torch.testing.assert_close(weight.detach(), expected[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("gradient", ["kernel", "signs"])
def test_the_recipe_chooses_the_gradient_of_every_ternary_layer(new_network, recipe, gradient):
    learner = Learner(new_network(), recipe(ternary_gradient=gradient))
    assert {layer.gradient for layer in ternary_layers(learner.model).values()} == {gradient}


@pytest.mark.parametrize("level", ["O0", "O1", "O2"])
def test_frozen_ternary_weights_do_not_move(images, new_network, recipe, level):
    learner = Learner(new_network(), recipe(freeze_ternary=True, opt_level=level))
    names = [f"{name}.weight" for name in ternary_layers(learner.model)]
    before = copies(learner.masters.state_dict())
    learner.begin_epoch(0)
    take_steps(learner, images, plan_for(images))
    after = learner.masters.state_dict()
    assert names
    moved = [name for name in names if not torch.equal(before[name], after[name])]
    assert moved == []
    assert not torch.equal(before["classifier.weight"], after["classifier.weight"])


@pytest.mark.parametrize("level", ["O0", "O1", "O2"])
@pytest.mark.parametrize(("pruner", "tensors"), [("V1", 8), ("V2", 18), ("V3", 19)])
def test_pruned_weights_are_exactly_zero_after_a_step(images, new_network, recipe, level, pruner, tensors):
    learner = Learner(new_network(), recipe(pruner=pruner, opt_level=level, ramp_epochs=0))
    learner.begin_epoch(0)
    take_steps(learner, images, plan_for(images))
    masters = learner.masters.state_dict()
    halves = dict(learner.model.named_parameters())
    assert len(learner.pruner.masks) == tensors
    for name, mask in learner.pruner.masks.items():
        share = 0.5 if ".conv_dw" in name else 0.9  # squeeze-excitation and classifier: 0.9
        assert (name, int((~mask).sum())) == (name, int(share * mask.numel()))
        assert (name, int(masters[name][~mask].count_nonzero())) == (name, 0)
        assert (name, int(halves[name][~mask].count_nonzero())) == (name, 0)
    assert masters["blocks.2.0.se.conv_reduce.weight"].count_nonzero() > 0


def test_at_o2_the_halves_are_the_rounded_masters_after_each_step(images, new_network, recipe):
    learner = Learner(new_network(), recipe(opt_level="O2"))
    learner.begin_epoch(0)
    take_steps(learner, images, plan_for(images))
    assert learner.masters.halves
    for name, half in learner.masters.halves.items():
        assert half.dtype == torch.float16
        assert torch.equal(half, learner.masters.parameters[name].half()), name


def test_the_loss_scale_starts_at_2_to_the_16_and_doubles_after_2000_good_steps(images, new_network, recipe):
    learner = Learner(new_network(), recipe(opt_level="O2"))
    assert learner.loss_scale() == 65536
    learner.begin_epoch(0)
    learner.scaler.load_state_dict(learner.scaler.state_dict() | {"scale": 256.0, "_growth_tracker": 1998})
    scales = []
    for step in range(2):
        learner.step(images.train_images, images.train_labels, plan_for(images).step(step))
        scales.append(learner.loss_scale())
    assert scales == [256, 512]


@pytest.mark.parametrize("level", ["O1", "O2"])
def test_an_overflow_halves_the_scale_and_changes_no_weight(images, new_network, recipe, level):
    learner = Learner(new_network(), recipe(opt_level=level))
    learner.begin_epoch(0)
    set_scale(learner, 2.0**40)  # so that the very first gradients overflow
    before = copies(dict(learner.model.named_parameters()))
    momenta = copies({n: t for n, t in learner.state()[0].items() if n.startswith("momentum/")})
    learner.step(images.train_images, images.train_labels, plan_for(images).step(0))
    assert learner.loss_scale() == 2.0**39
    changed = [n for n, w in learner.model.named_parameters() if not torch.equal(w, before[n])]
    assert changed == []
    after = learner.state()[0]
    assert [name for name, value in momenta.items() if not torch.equal(value, after[name])] == []


def test_after_a_first_step_that_overflows_training_goes_on_as_if_it_had_not_been(
    images, new_network, recipe
):
    """The momentum of a skipped first step must be zero, not whatever memory it was given."""
    plan = plan_for(images)
    learners = [Learner(new_network(), recipe(opt_level="O2")) for _ in range(2)]
    buffers = [torch.full((2**16,), float("nan")) for _ in range(64)]  # what freed memory may hold
    del buffers
    for learner, overflows in zip(learners, (True, False), strict=True):
        learner.begin_epoch(0)
        if overflows:
            state = copies(learner.model.state_dict())
            set_scale(learner, 2.0**40)
            learner.step(images.train_images, images.train_labels, plan.step(0))
            learner.model.load_state_dict(state)  # batch norm has seen the batch
        set_scale(learner, 2.0**8)
        learner.step(images.train_images, images.train_labels, plan.step(1))
    first, second = (learner.masters.state_dict() for learner in learners)
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_without_cutmix_the_loss_is_plain_cross_entropy(images, new_network, recipe, smoothing):
    learner = Learner(new_network(), recipe(cutmix_probability=0.0, label_smoothing=smoothing))
    step = plan_for(images).step(0)
    inputs = augment(images.train_images[step.order], step)
    targets = images.train_labels[step.order]
    scores = learner.model.train()(inputs).double()
    logs = [s - s.exp().sum().log() for s in scores]
    shares = [(1 - smoothing) * log[t] + smoothing * log.mean() for log, t in zip(logs, targets, strict=True)]
    by_hand = -torch.stack(shares).mean()
    # FP32 sums against FP64 ones.
    assert learner.loss(inputs, targets, step).item() == pytest.approx(by_hand.item(), rel=1e-5)


@pytest.mark.parametrize("consistency", ["off", "as-described", "as-released"])
def test_a_batch_of_one_trains_to_finite_weights(images, new_network, recipe, consistency):
    learner = Learner(new_network(), recipe(batch_size=1, consistency=consistency))
    learner.begin_epoch(0)
    plan = plan_for(images, batch_size=1, cutmix_probability=1.0)
    loss = learner.step(images.train_images, images.train_labels, plan.step(0))
    assert loss.isfinite()
    assert [n for n, t in learner.model.state_dict().items() if not t.isfinite().all()] == []


@pytest.mark.parametrize(
    ("weight", "alpha"),
    [(0.0, None), (0.3, None), (None, 100.0)],  # no weight is 100 standard deviations off: all signs are 0
    ids=["zero", "constant", "none left"],
)
def test_a_degenerate_ternary_layer_keeps_training_finite(images, new_network, recipe, weight, alpha):
    network = new_network()
    if weight is not None:
        torch.nn.init.constant_(network.conv_head.weight, weight)
    learner = Learner(network, recipe(alpha=alpha))
    learner.begin_epoch(2)
    losses = take_steps(learner, images, plan_for(images))
    assert all(torch.tensor(losses).isfinite()), losses
    assert [n for n, t in learner.model.state_dict().items() if not t.isfinite().all()] == []
    assert (learner.zeros() == 1.0) == (alpha == 100.0)


def test_training_reduces_the_loss_on_a_few_images(images, new_network, recipe):
    learner = Learner(new_network(width=0.125), recipe(lr=0.05, alpha=0.67749))
    learner.set_rate(0.05)
    means = []
    for epoch in range(6):
        losses = take_steps(learner, images, plan_for(images, epoch=epoch, augment=False))
        means.append(sum(losses) / len(losses))
    assert means[-1] < 0.7 * means[0], means


# --- faults -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", ["O0", "O2"])
def test_a_loss_that_is_not_finite_changes_no_weight(images, new_network, recipe, level):
    learner = Learner(new_network(), recipe(opt_level=level))
    learner.begin_epoch(0)
    with torch.no_grad():
        learner.model.bn2.bias.fill_(float("inf"))
    before = copies(dict(learner.model.named_parameters()))
    loss = learner.step(images.train_images, images.train_labels, plan_for(images).step(0))
    assert not loss.isfinite()
    assert [n for n, w in learner.model.named_parameters() if not torch.equal(w, before[n])] == []


def test_the_first_bad_layer_is_named_by_weight_or_by_output(new_network):
    network, inputs = new_network(), torch.zeros(2, 3, 32, 32)
    assert first_bad_layer(network, inputs) == "the loss itself"
    # Weights are finite, products are not.
    torch.nn.init.constant_(network.blocks[2][0].conv_dw.get_submodule("0").weight, 3e38)
    assert first_bad_layer(network, inputs + 1).startswith("blocks.2.0.conv_dw.0 (its output")
    with torch.no_grad():
        network.blocks[1][0].bn1.weight[0] = float("nan")
    assert first_bad_layer(network, inputs) == "blocks.1.0.bn1.weight (its weights are not finite)"


def test_a_network_that_is_not_fp32_and_level_o3_are_refused(new_network, recipe):
    network = new_network()
    Learner(network, recipe(opt_level="O2"))
    with pytest.raises(StudyError, match="the model is at O2, not FP32"):
        Learner(network, recipe(opt_level="O2"))
    with pytest.raises(StudyError, match="'O3' is for testing"):
        Learner(new_network(), recipe(opt_level="O3"))


def test_on_a_cpu_deterministic_mode_changes_nothing():
    with deterministic(torch.device("cpu")):
        assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("given", [None, ":16:8"])
def test_cublas_is_told_to_repeat_itself_before_pytorch_looks_unless_the_user_says_otherwise(given):
    environment = {name: value for name, value in os.environ.items() if name != "CUBLAS_WORKSPACE_CONFIG"}
    environment |= {"CUBLAS_WORKSPACE_CONFIG": given} if given else {}
    code = "import os, sys, msunet_core; print(os.environ['CUBLAS_WORKSPACE_CONFIG'], 'torch' in sys.modules)"
    told = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert told.stdout.split() == [given or ":4096:8", "False"]


@pytest.mark.gpu
def test_on_a_gpu_deterministic_mode_is_set_and_set_back():
    fills = torch.utils.deterministic.fill_uninitialized_memory
    with deterministic(torch.device("cuda")):
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.utils.deterministic.fill_uninitialized_memory
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory == fills
