"""Ternary weights: specification §3 by the letter, its gradient, its schedule and its corners."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from msunet_core.errors import StudyError
from msunet_core.fast.accelerate import accelerate
from msunet_core.model.network import build_msunet
from msunet_core.model.ternary import (
    ALPHA,
    GRADIENTS,
    TernaryConv2d,
    freeze_ternary,
    set_alpha,
    set_gradient,
    ternarize,
    ternary_layers,
    ternary_scale,
)
from msunet_core.training.schedules import alpha_schedule


def slow_signs(weight: Tensor, alpha: float) -> list[int]:
    """specification §3, one weight at a time, in Python's own FP64."""
    values = weight.flatten().tolist()
    mean, std = statistics.fmean(values), statistics.stdev(values)
    signs = []
    for value in values:
        z = (value - mean) / std
        signs.append(1 if z > alpha else -1 if z < -alpha else 0)
    return signs


def layer(
    weights: str = "ternary", alpha: float = ALPHA, dtype=torch.float64, seed: int = 0
) -> TernaryConv2d:
    torch.manual_seed(seed)
    conv = TernaryConv2d(12, 8, weights=weights, alpha=alpha).to(dtype)
    with torch.no_grad():
        conv.weight.normal_(0.3, 1.0)  # a mean that matters
    return conv


@pytest.mark.parametrize("alpha", [0.0, 0.3, ALPHA, 1.5])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_signs_are_those_of_a_direct_loop(alpha, dtype):
    weight = layer(dtype=dtype).weight
    signs = ternarize(weight, alpha)
    assert signs.flatten().tolist() == slow_signs(weight, alpha)
    # Half weights are compared with the threshold in FP32: FP16 could not hold their mean.
    assert signs.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_half_of_normal_weights_become_zero_at_the_end_of_the_ramp():
    torch.manual_seed(0)
    zeros = (ternarize(torch.randn(400, 400), 0.67449) == 0).double().mean().item()
    assert zeros == pytest.approx(0.5, abs=0.005)  # four standard errors of 160,000 draws


def test_scale_is_sqrt_of_two_over_fan_in_times_inverse_density():
    signs = torch.tensor([1.0, 0, -1, 0, 0, 1, 0, 0] * 9).view(4, 2, 3, 3)  # 27 of 72 are non-zero
    expected = math.sqrt(2 / (2 * 3 * 3) * 72 / 27)
    assert ternary_scale(signs).item() == pytest.approx(expected, rel=1e-6)  # FP32 rounding


def test_scale_keeps_the_variance_of_a_kaiming_initialisation():
    kernel = layer().kernel()
    assert kernel.square().mean().item() == pytest.approx(2 / 12, rel=1e-12)  # FP64 rounding


@pytest.mark.parametrize("weights", ["ternary", "binary"])
@pytest.mark.parametrize("gradient", ["kernel", "signs"])
def test_the_gradient_of_what_is_chosen_passes_straight_through(weights, gradient):
    """That of K = sqrt(M) * T, as published, or that of T: by autograd, with that as the leaf."""
    conv = layer(weights)
    conv.gradient = gradient
    x = torch.randn(3, 12, 5, 5, dtype=torch.float64)
    out_grad = torch.randn(3, 8, 5, 5, dtype=torch.float64)
    conv.train()(x).backward(out_grad)
    signs, scale = conv.signs(), ternary_scale(conv.signs())
    assert scale < 0.7  # so that the two differ
    leaf = (signs if gradient == "signs" else scale * signs).requires_grad_()
    (F.conv2d(x, leaf) * (scale if gradient == "signs" else 1.0)).backward(out_grad)
    # FP64 sums of 75 products in another order
    torch.testing.assert_close(conv.weight.grad, leaf.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("prepared", [lambda model: model, accelerate], ids=["plain", "fast"])
def test_the_gradient_of_the_signs_is_the_kernels_times_the_scale_with_and_without_kernels(prepared):
    images, out_grad = torch.randn(4, 3, 32, 32), torch.randn(4, 100)
    gradients = {}
    for gradient in GRADIENTS:
        torch.manual_seed(0)
        model = prepared(build_msunet("v3", width=0.125)).train()
        set_gradient(model, gradient)
        model(images).backward(out_grad)
        gradients[gradient] = {n: (c.weight.grad, c.signs()) for n, c in ternary_layers(model).items()}
    for name, (of_kernel, signs) in gradients["kernel"].items():
        scaled = of_kernel * ternary_scale(signs)
        # The same FP32 sums, multiplied afterwards.
        torch.testing.assert_close(gradients["signs"][name][0], scaled, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("weights", ["ternary", "binary"])
def test_folding_the_scale_into_the_kernel_changes_nothing(weights):
    conv = layer(weights, dtype=torch.float32)
    x = torch.randn(4, 12, 6, 6)
    folded, apart = conv.train()(x), conv.eval()(x)
    # The scale is applied before or after a sum of 12 FP32 terms: a few units in the last place.
    torch.testing.assert_close(folded, apart, rtol=1e-6, atol=1e-6)


def test_alpha_may_rise_in_one_step():
    assert [alpha_schedule(epoch, 2, 2) for epoch in (1, 2, 3)] == [0.0, ALPHA, ALPHA]


def test_alpha_reaches_every_ternary_layer_and_changes_what_it_computes():
    model = build_msunet("v3", width=0.25, alpha=ALPHA)
    before = ternary_layers(model)["conv_head"].signs().count_nonzero().item()
    set_alpha(model, 0.0)
    assert {conv.alpha for conv in ternary_layers(model).values()} == {0.0}
    after = ternary_layers(model)["conv_head"].signs().count_nonzero().item()
    assert before < 0.6 * after == 0.6 * model.conv_head.weight.numel()


def test_every_1x1_but_those_of_squeeze_excitation_is_ternary():
    model = build_msunet("v3")
    one_by_one = {
        name for name, m in model.named_modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (1, 1)
    }
    assert set(ternary_layers(model)) == {name for name in one_by_one if ".se." not in name}
    assert len(ternary_layers(model)) == 18


def test_binary_weights_have_no_zero_even_at_the_mean():
    conv = layer("binary")
    with torch.no_grad():
        conv.weight.copy_(torch.tensor([-1.0, 0.0, 0.0, 1.0] * 24).view(8, 12, 1, 1))  # half lies on the mean
    assert conv.signs().unique().tolist() == [-1.0, 1.0]


def test_frozen_ternary_weights_get_no_gradient_and_the_others_do():
    model = build_msunet("v3", width=0.25)
    freeze_ternary(model)
    model(torch.randn(2, 3, 16, 16)).sum().backward()
    frozen = {f"{name}.weight" for name in ternary_layers(model)}
    without = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert without == frozen


def constant_layer() -> TernaryConv2d:
    conv = layer(dtype=torch.float32)
    nn.init.constant_(conv.weight, 0.1)  # 0.1 is no FP32 number: its mean is off by a rounding
    return conv


def emptied_layer() -> TernaryConv2d:
    return layer(alpha=1e6, dtype=torch.float32)


@pytest.mark.parametrize("corner", [constant_layer, emptied_layer])
@pytest.mark.parametrize("training", [True, False])
def test_a_layer_without_a_non_zero_weight_gives_zero_and_finite_gradients(corner, training):
    conv = corner().train(training)
    x = torch.randn(2, 12, 4, 4, requires_grad=True)
    y = conv(x)
    assert torch.equal(y, torch.zeros(2, 8, 4, 4))
    y.sum().backward()
    assert torch.equal(x.grad, torch.zeros_like(x))
    if training:  # the layer can leave the corner: its weights still have a gradient
        assert torch.isfinite(conv.weight.grad).all() and conv.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("training", [True, False])
def test_half_weights_compute_what_float_weights_of_their_values_do(training):
    half = layer(dtype=torch.float16).train(training)
    exact = TernaryConv2d(12, 8, weights="ternary", alpha=ALPHA).train(training)
    exact.load_state_dict(half.state_dict())
    x = torch.randn(1, 12, 4, 4)  # a batch of one
    y = half(x.half())
    assert y.dtype == torch.float16
    # Rounding of the image, the scale and the result to 11 bits: 2**-11 each, on sums of 12 terms.
    torch.testing.assert_close(y.float(), exact(x.half().float()), rtol=3e-3, atol=3e-3)
    if training:
        y.float().sum().backward()
        assert half.weight.grad.dtype == torch.float16 and torch.isfinite(half.weight.grad).all()


def test_a_batch_of_one_is_a_row_of_the_batch():
    conv = layer().eval()
    x = torch.randn(4, 12, 5, 5, dtype=torch.float64)
    # FP64: another batch size may sum in another order
    torch.testing.assert_close(conv(x[2:3]), conv(x)[2:3], rtol=1e-12, atol=1e-12)


def test_unknown_weights_gradients_and_thresholds_are_refused():
    with pytest.raises(StudyError, match="octal"):
        TernaryConv2d(4, 4, weights="octal", alpha=ALPHA)
    network = build_msunet(width=0.125)
    with pytest.raises(StudyError, match="gradient 'octal' is unknown"):
        set_gradient(network, "octal")
    for alpha in (-1.0, math.nan, math.inf, "0.3"):
        with pytest.raises(StudyError, match="is not a number >= 0"):
            set_alpha(network, alpha)


def test_layers_with_thresholds_of_their_own_have_no_one_config():
    """A checkpoint holds one alpha: it would be read as another network."""
    network = build_msunet(width=0.125)
    set_alpha(network, 0.3)
    assert network.config["alpha"] == 0.3
    network.conv_head.alpha = 1.5
    with pytest.raises(StudyError, match=r"2 thresholds, from 0.3 to 1.5"):
        network.config  # noqa: B018
