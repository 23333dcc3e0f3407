"""The fused CPU kernels compute what plain PyTorch computes, and stand back where they do not apply."""

from __future__ import annotations

import contextlib
import copy
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from msunet_core import apply_opt_level, build_msunet, score
from msunet_core.fast import accelerate, accelerated, blocks, library
from msunet_core.fast.blocks import FastInvertedResidual
from msunet_core.fast.layers import depthwise_conv, norm_act
from msunet_core.measure import packed_network
from msunet_core.model import precision
from msunet_core.model.network import Block, DepthwiseSeparable, InvertedResidual, MixedConv2d, split_channels
from msunet_core.model.ternary import TernaryConv2d

ROOT = Path(__file__).parent.parent
needs_kernels = pytest.mark.skipif(not library.enabled(), reason="no C++ compiler or no x86-64 with AVX2")
ACTS = {"none": None, "relu": nn.ReLU(), "silu": nn.SiLU()}
# Relative to the largest element: FP32 sums of up to some thousand terms, against FP64.
FP32 = 2e-6
# FP16 has 11 bits: half of the last one for the result, and as much for the value before the activation.
FP16 = 1e-3


def pixels(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=draw).to(dtype).contiguous(memory_format=torch.channels_last)


def deviation(ours: Tensor, exact: Tensor) -> float:
    return ((ours.double() - exact.double()).abs().max() / exact.double().abs().max().clamp(min=1e-30)).item()


def assert_same_bits_with_any_number_of_threads(compute: Callable[[], dict[str, Tensor]]) -> None:
    """And each time."""
    found = []
    try:
        for threads in (1, 1, 2, 3):
            torch.set_num_threads(threads)
            found.append(compute())
    finally:
        torch.set_num_threads(1)
    for other in found[1:]:
        assert [name for name, tensor in found[0].items() if not torch.equal(tensor, other[name])] == []


def is_fused(y: Tensor) -> bool:
    return y.grad_fn.name() in ("_NormActBackward", "_DepthwiseBackward")


def assert_close(ours: dict[str, Tensor], exact: dict[str, Tensor], bound: float) -> None:
    assert ours.keys() == exact.keys()
    found = {name: deviation(tensor, exact[name]) for name, tensor in ours.items()}
    assert max(found.values()) < bound, found


def new_norm(channels: int) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(channels)
    nn.init.uniform_(norm.weight, 0.5, 2.0)
    nn.init.uniform_(norm.bias, -1.0, 1.0)
    nn.init.uniform_(norm.running_var, 0.5, 2.0)
    return norm


def norm_step(
    norm: nn.BatchNorm2d, act: nn.Module | None, x: Tensor, skip: Tensor | None
) -> dict[str, Tensor]:
    """Outputs, gradients and running statistics of norm_act; `norm` and the inputs are left alone."""
    norm = copy.deepcopy(norm).to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    x = x.clone().requires_grad_()
    skip = None if skip is None else skip.clone().requires_grad_()
    y = norm_act(norm, act, x, skip)
    y.backward(pixels(*x.shape, seed=9).to(x.dtype))
    found = {"y": y.detach(), "dx": x.grad, "dweight": norm.weight.grad, "dbias": norm.bias.grad}
    if skip is not None:
        found["dskip"] = skip.grad
    return found | {"mean": norm.running_mean, "var": norm.running_var, "batches": norm.num_batches_tracked}


@needs_kernels
@pytest.mark.parametrize("with_skip", [False, True])
@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("shape", [(4, 1, 5, 3), (3, 3, 7, 9), (1, 13, 6, 6), (5, 16, 4, 4), (2, 106, 8, 8)])
def test_norm_and_activation_equal_the_plain_form(shape, act, with_skip):
    # Far from zero, where a variance by E[x^2] - E[x]^2 would lose its digits.
    x, norm = pixels(*shape) + 10, new_norm(shape[1])
    x = x.contiguous(memory_format=torch.channels_last)
    skip = pixels(*shape, seed=1) if with_skip else None
    ours = norm_step(norm, ACTS[act], x, skip)
    exact = norm_step(norm, ACTS[act], x.double(), None if skip is None else skip.double())
    # The mean of 10 standard deviations costs one digit of x * scale + shift.
    assert_close(ours, exact, 10 * FP32)


@needs_kernels
@pytest.mark.parametrize("act", ACTS)
def test_half_precision_rounds_where_the_plain_form_does(act):
    x, norm = pixels(3, 21, 6, 6, dtype=torch.float16), new_norm(21)
    skip = pixels(3, 21, 6, 6, seed=1, dtype=torch.float16)
    ours = norm_step(norm, ACTS[act], x, skip)
    assert ours["y"].dtype == ours["dx"].dtype == torch.float16
    exact = norm_step(norm, ACTS[act], x.double(), skip.double())
    assert_close(ours, exact, 2 * FP16)


@needs_kernels
@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@torch.no_grad()
def test_eval_mode_uses_and_keeps_the_running_statistics(act, dtype):
    norm, x = new_norm(13).eval(), pixels(2, 13, 5, 5, dtype=dtype)
    norm.to(dtype)
    before = copy.deepcopy(norm.state_dict())
    ours = norm_act(norm, ACTS[act], x)
    assert all(torch.equal(tensor, before[name]) for name, tensor in norm.state_dict().items())
    exact = norm_act(norm.double(), ACTS[act], x.double())
    assert deviation(ours, exact) < (FP32 if dtype == torch.float32 else FP16)


@needs_kernels
@torch.no_grad()
def test_swish_has_the_digits_of_fp32_over_its_whole_range():
    # The norm is the identity: 1 / sqrt(1 - eps + eps). Below -87 the result is 0 within 1e-35.
    norm, z = nn.BatchNorm2d(1).eval(), torch.linspace(-86, 86, 20001)
    norm.running_var.fill_(1 - norm.eps)
    exact = F.silu(z.double())
    ours = norm_act(norm, nn.SiLU(), pixels(1, 1, 1, len(z)).copy_(z)).flatten()
    # An exponential to 1 unit in the last place, of an argument that is rounded (z times 6e-8), an addition,
    # a reciprocal and a product of half a unit each.
    bound = (4e-7 + 6e-8 * z.clamp(max=0).abs()) * exact.abs()
    assert ((ours - exact).abs() <= bound).all(), ((ours - exact).abs() / bound).max()
    far = torch.tensor([-1e30, -200.0, -88.0, 88.0, 200.0, 1e30])
    ours = norm_act(norm, nn.SiLU(), pixels(1, 1, 1, len(far)).copy_(far)).flatten()
    assert torch.equal(ours[3:], far[3:]) and (ours[1:3].abs() < 1e-35).all() and ours[0].abs() < 1e-7


def conv_step(convs: list[nn.Conv2d], x: Tensor) -> dict[str, Tensor]:
    convs = copy.deepcopy(convs)
    x = x.clone().requires_grad_()
    y = depthwise_conv(MixedConv2d(convs), x)
    assert is_fused(y)
    y.backward(pixels(*y.shape, seed=9).to(x.dtype))
    return {"y": y.detach(), "dx": x.grad} | {f"dw{i}": conv.weight.grad for i, conv in enumerate(convs)}


def exact_conv_step(convs: list[nn.Conv2d], x: Tensor) -> dict[str, Tensor]:
    convs = [copy.deepcopy(conv).double() for conv in convs]
    x = x.double().requires_grad_()
    parts = x.split([conv.in_channels for conv in convs], dim=1)
    y = torch.cat([conv(part) for conv, part in zip(convs, parts, strict=True)], dim=1)
    y.backward(pixels(*y.shape, seed=9).double())
    return {"y": y.detach(), "dx": x.grad} | {f"dw{i}": conv.weight.grad for i, conv in enumerate(convs)}


def depthwise_convs(channels: int, kernels: tuple[int, ...], stride: int) -> list[nn.Conv2d]:
    parts = split_channels(channels, len(kernels))
    return [
        nn.Conv2d(part, part, k, stride, padding=k // 2, groups=part, bias=False)
        for part, k in zip(parts, kernels, strict=True)
    ]


@needs_kernels
@pytest.mark.parametrize("size", [(1, 1), (2, 3), (7, 9), (16, 16)])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(
    ("channels", "kernels"), [(1, (3,)), (3, (7,)), (13, (5,)), (40, (3, 5, 7)), (106, (7,)), (32, (3, 5))]
)
def test_depthwise_convolution_equals_the_plain_form(channels, kernels, stride, size):
    convs, x = depthwise_convs(channels, kernels, stride), pixels(3, channels, *size)
    assert_close(conv_step(convs, x), exact_conv_step(convs, x), FP32)


# --- a whole block ---------------------------------------------------------------------------


def ternary_1x1(in_channels: int, out_channels: int, groups: int = 1, weights: str = "ternary") -> nn.Module:
    parts = zip(split_channels(in_channels, groups), split_channels(out_channels, groups), strict=True)
    convs = [TernaryConv2d(i, o, weights=weights, alpha=0.67749) for i, o in parts]
    return convs[0] if groups == 1 else MixedConv2d(convs)


def in_eval_mode(block: nn.Module) -> nn.Module:
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.load_state_dict(new_norm(module.num_features).state_dict())
            nn.init.uniform_(module.running_mean, -1.0, 1.0)
    return block.eval()


def new_block(in_channels: int, out_channels: int, *shape, conv1x1=ternary_1x1, **named) -> nn.Module:
    torch.manual_seed(3)
    return in_eval_mode(
        InvertedResidual(in_channels, out_channels, Block(out_channels, *shape, **named), conv1x1)
    )


BLOCKS = {
    "separable": lambda: in_eval_mode(DepthwiseSeparable(12, 12, ternary_1x1)),
    "ReLU, in groups": lambda: new_block(16, 16, 6, (3,), expand_groups=2, project_groups=2, act="ReLU"),
    "stride 2": lambda: new_block(20, 8, 5, (3, 5, 7), se_ratio=0.5, stride=2),
    "skip": lambda: new_block(8, 8, 6, (3, 5), se_ratio=0.5, project_groups=2),
    "wide": lambda: new_block(128, 32, 1, (7,), se_ratio=0.25),
    "binary": lambda: new_block(
        8, 4, 3, (5,), se_ratio=0.5, conv1x1=lambda i, o, g=1: ternary_1x1(i, o, g, "binary")
    ),
}


def block_input(block: nn.Module, *size: int, dtype: torch.dtype) -> Tensor:
    convs = [module for module in block.conv_pw.modules() if isinstance(module, nn.Conv2d)]
    return pixels(3, sum(conv.in_channels for conv in convs), *size, dtype=dtype)


@contextlib.contextmanager
def called_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Names of the kernels that blocks call, as they are called."""
    called, call = [], blocks.call
    with monkeypatch.context() as patch:
        patch.setattr(blocks, "call", lambda name, *rest: (called.append(name), call(name, *rest)))
        yield called


def serves_in_eval(block: nn.Module, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> tuple[Tensor, bool]:
    """The block's output, and whether one kernel made it."""
    with called_kernels(monkeypatch) as called, torch.no_grad(), precision.WidenHalf(), accelerated(block):
        return block(x), "residual" in called


@needs_kernels
@pytest.mark.parametrize("size", [(1, 1), (9, 5), (8, 8), (20, 33)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_in_eval_mode_equals_the_plain_form(name, dtype, size, monkeypatch):
    block = BLOCKS[name]().to(dtype)
    x = block_input(block, *size, dtype=dtype)
    plain = copy.deepcopy(block).double()
    ours, is_served = serves_in_eval(block, x, monkeypatch)
    with torch.no_grad():
        exact = plain(x.double())
    assert is_served
    # In FP16 some ten values on the way are rounded, and the scales; their errors are of either sign.
    assert deviation(ours, exact) < (FP32 if dtype == torch.float32 else 3 * FP16)


@needs_kernels
@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_in_eval_mode_rounds_to_fp16_where_the_plain_form_does(name, monkeypatch):
    block = BLOCKS[name]().half()
    x = block_input(block, 16, 16, dtype=torch.float16)
    ours, is_served = serves_in_eval(block, x, monkeypatch)
    with precision.WidenHalf(), torch.no_grad():
        plain = block(x)
    assert is_served
    # FP32 sums in another order, rounded to FP16, now and then fall to the other side (0.2 % of them); a
    # rounding at another place changes a fifth of them.
    assert (ours != plain).double().mean() < 0.01, (ours != plain).double().mean()


@needs_kernels
@torch.no_grad()
def test_a_block_in_eval_mode_gives_the_same_bits_with_any_number_of_threads():
    block, x = accelerate(BLOCKS["stride 2"]()), pixels(7, 20, 12, 12)
    assert_same_bits_with_any_number_of_threads(lambda: {"y": block(x)})


def in_training_mode(block: nn.Module, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Weights in ``dtype``, norms in FP32: O0 and O2."""
    for module in block.train().modules():
        if not isinstance(module, nn.BatchNorm2d):
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.to(dtype)
    return block


def serves_in_training(
    block: nn.Module, x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> tuple[dict[str, Tensor], bool]:
    """Output, gradients and running statistics of a step, and whether the block's kernels made them."""
    with called_kernels(monkeypatch) as called, accelerated(block):
        return block_step(block, x), "project_backward" in called


def block_step(block: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Output, gradients and running statistics of a step."""
    x = x.clone().requires_grad_()
    with precision.WidenHalf():
        y = block(x)
        y.backward(pixels(*y.shape, seed=9).to(x.dtype))
    grads = {f"d {name}": p.grad for name, p in block.named_parameters() if p.grad is not None}
    buffers = {name: buffer for name, buffer in block.named_buffers() if buffer.is_floating_point()}
    return {"y": y.detach(), "dx": x.grad, **grads, **buffers}


def exact_block_step(block: nn.Module, x: Tensor) -> dict[str, Tensor]:
    return block_step(copy.deepcopy(block).double(), x.double())


@needs_kernels
@pytest.mark.parametrize("size", [(2, 1), (9, 5), (8, 8), (20, 33)])
@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_in_training_equals_the_plain_form(name, size, monkeypatch):
    block = in_training_mode(BLOCKS[name]())
    x = block_input(block, *size, dtype=torch.float32)
    exact = exact_block_step(block, x)
    ours, is_served = serves_in_training(block, x, monkeypatch)
    assert is_served
    # Three norms one after the other: each divides by a standard deviation and adds its own rounding.
    assert_close(ours, exact, 10 * FP32)


@needs_kernels
@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_trains_in_half_precision(name, monkeypatch):
    block = in_training_mode(BLOCKS[name](), torch.float16)
    x = block_input(block, 8, 8, dtype=torch.float16)
    exact = exact_block_step(block, x)
    plain = block_step(copy.deepcopy(block), x)
    ours, is_served = serves_in_training(block, x, monkeypatch)
    assert is_served and ours["dx"].dtype == ours["y"].dtype == torch.float16
    # Every intermediate value is rounded, and near a kink ReLU's derivative may differ, in either form; so
    # their errors and not their digits.
    errors = [
        {
            name: ((found[name].double() - of).norm() / of.norm().clamp(min=1e-30)).item()
            for name, of in exact.items()
        }
        for found in (ours, plain)
    ]
    worse = {
        name: (error, errors[1][name]) for name, error in errors[0].items() if error > 2 * errors[1][name]
    }
    assert all(error < 5 * FP16 for error, _ in worse.values()), worse
    assert max(errors[0].values()) < max(2 * max(errors[1].values()), 5 * FP16), errors


@needs_kernels
def test_moments_of_expanded_channels_do_not_suffer_from_a_mean_far_from_zero(monkeypatch):
    # They come from products of the block's input, which would lose two digits for each one of its mean.
    block = in_training_mode(BLOCKS["skip"]())
    x = block_input(block, 9, 9, dtype=torch.float32) + 100
    x = x.contiguous(memory_format=torch.channels_last)
    exact = exact_block_step(block, x)
    ours, is_served = serves_in_training(block, x, monkeypatch)
    assert is_served
    # x itself is rounded to 4e-6 of its standard deviation, and so is every sum of its channels.
    assert_close(ours, exact, 2e-4)


@needs_kernels
@pytest.mark.parametrize("kind", ["nearly equal channels", "an outlier first"])
def test_moments_that_cancel_are_summed_again_in_double(kind, monkeypatch):
    block = in_training_mode(BLOCKS["skip"]())
    x = block_input(block, 16, 16, dtype=torch.float32)
    if kind == "an outlier first":
        x[0, :, 0, 0] = 1000.0
    else:
        x = (x[:, :1] + 0.01 * x).contiguous(memory_format=torch.channels_last)
    exact = exact_block_step(block, x)
    plain = block_step(copy.deepcopy(block), x)
    doubles = []
    again = blocks._double_products
    monkeypatch.setattr(blocks, "_double_products", lambda *given: doubles.append(1) or again(*given))
    ours, is_served = serves_in_training(copy.deepcopy(block), x, monkeypatch)
    assert is_served and doubles == [1]
    errors = [max(deviation(found[name], exact[name]) for name in exact) for found in (ours, plain)]
    # Without it ours is some hundred times as far off as the plain form.
    assert errors[0] < max(10 * errors[1], 10 * FP32), errors


@needs_kernels
def test_a_channel_without_variance_is_left_at_its_shift(monkeypatch):
    block = in_training_mode(BLOCKS["skip"]())
    with torch.no_grad():
        for conv in block.conv_pw.modules():
            if isinstance(conv, TernaryConv2d):
                conv.weight[0] = conv.weight.mean()  # T is 0 there
    x = block_input(block, 8, 8, dtype=torch.float32)
    x[:, 3] = 7.0
    exact, before = exact_block_step(block, x), block.bn1.running_var[0].item()
    ours, is_served = serves_in_training(block, x, monkeypatch)
    assert is_served and ours["bn1.running_var"][0] == pytest.approx(0.9 * before, rel=1e-6)
    assert_close(ours, exact, 10 * FP32)


@needs_kernels
@pytest.mark.parametrize("batch", [1, 5, 70])
def test_a_block_sums_any_batch_whole(batch, monkeypatch):
    block = in_training_mode(BLOCKS["stride 2"]())
    x = pixels(batch, 20, 6, 6)
    exact = exact_block_step(block, x)
    ours, is_served = serves_in_training(block, x, monkeypatch)
    assert is_served
    assert_close(ours, exact, 10 * FP32)


@needs_kernels
@pytest.mark.parametrize("frozen", ["conv_pw.", "conv_pwl", "conv_dw.0", "se.conv_expand", "bn2"])
def test_frozen_weights_of_a_block_get_no_gradient(frozen, monkeypatch):
    block = in_training_mode(BLOCKS["skip"]())
    x = block_input(block, 8, 8, dtype=torch.float32)
    whole, _ = serves_in_training(copy.deepcopy(block), x, monkeypatch)
    names = [name for name, _ in block.named_parameters() if name.startswith(frozen)]
    for name in names:
        block.get_parameter(name).requires_grad_(False)
    ours, is_served = serves_in_training(block, x, monkeypatch)
    assert is_served and names
    assert whole.keys() - ours.keys() == {f"d {name}" for name in names}
    assert all(torch.equal(tensor, whole[name]) for name, tensor in ours.items())


@needs_kernels
@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_in_training_gives_the_same_bits_with_any_number_of_threads(name, monkeypatch):
    block = in_training_mode(BLOCKS[name]())
    x = block_input(block, 12, 12, dtype=torch.float32).repeat(3, 1, 1, 1)
    x = x.contiguous(memory_format=torch.channels_last)
    assert_same_bits_with_any_number_of_threads(
        lambda: serves_in_training(copy.deepcopy(block), x, monkeypatch)[0]
    )


@needs_kernels
def test_other_blocks_are_computed_layer_by_layer(monkeypatch):
    x = pixels(2, 8, 6, 6)
    others = {
        "float weights": lambda: new_block(
            8, 8, 2, (3,), conv1x1=lambda i, o, g=1: nn.Conv2d(i, o, 1, bias=False)
        ),
        "2 outputs a group": lambda: new_block(8, 4, 2, (3,), project_groups=2),
        "unequal groups": lambda: new_block(8, 8, 2, (3,), project_groups=3),
        "a kernel of 9": lambda: new_block(8, 8, 2, (9,)),
        "another activation": lambda: new_block(8, 8, 2, (3,), act="GELU"),
    }
    for name, make in others.items():
        assert not serves_in_eval(make(), x, monkeypatch)[1], name
        assert not serves_in_training(make().train(), x, monkeypatch)[1], name
    block = new_block(8, 8, 2, (3,))
    assert serves_in_eval(block, x, monkeypatch)[1]
    assert not serves_in_eval(block, x.contiguous(), monkeypatch)[1]
    assert not serves_in_training(block, x, monkeypatch)[1]  # gradients in eval mode: PyTorch's own functions
    assert serves_in_training(block.train(), x, monkeypatch)[1]
    assert not serves_in_training(block, x.contiguous(), monkeypatch)[1]
    block.bn2.eval()  # statistics that are not trained: neither mode
    assert not serves_in_training(block, x, monkeypatch)[1]
    block.bn2.train().running_mean = block.bn2.running_mean.double()
    with pytest.raises(RuntimeError, match="Float"):  # as PyTorch says it
        accelerate(block)(x)
    few = pixels(2, 6, 6, 6)  # backward, 6 inputs are outputs, which come in fours
    assert serves_in_eval(new_block(6, 8, 2, (3,)), few, monkeypatch)[1]
    assert not serves_in_training(new_block(6, 8, 2, (3,)).train(), few, monkeypatch)[1]


@needs_kernels
@pytest.mark.parametrize("training", [False, True])
def test_a_block_that_does_not_fit_together_is_left_to_pytorch_which_refuses_it(training):
    for name in ("bn1", "bn2", "bn3"):
        block = BLOCKS["skip"]().train(training)
        setattr(block, name, new_norm(getattr(block, name).num_features - 4).train(training))
        with torch.no_grad(), pytest.raises(RuntimeError, match="running_mean"):
            accelerate(block)(pixels(2, 8, 6, 6))


@needs_kernels
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    "watched", ["conv_pw", "bn1", "act1", "conv_dw.1", "bn2", "act2", "se", "se.gate", "conv_pwl", "bn3"]
)
def test_a_hook_sees_its_module_called_in_a_block(watched, training, monkeypatch):
    serves = serves_in_training if training else serves_in_eval
    for block in (BLOCKS["skip"](), new_block(8, 8, 2, (3, 5))):  # the second has an nn.Identity for se
        seen = []
        if watched != "se.gate" or not isinstance(block.se, nn.Identity):
            block.train(training).get_submodule(watched).register_forward_hook(lambda *_, s=seen: s.append(1))
            assert not serves(block, pixels(2, 8, 6, 6), monkeypatch)[1]
            assert seen


@needs_kernels
@pytest.mark.parametrize("changed", ["act", "gate"])
def test_another_squeeze_excitation_is_computed_as_it_is(changed, monkeypatch):
    block = BLOCKS["skip"]()
    setattr(block.se, changed, nn.ReLU())
    x, plain = pixels(2, 8, 6, 6), copy.deepcopy(block).eval()
    ours, is_served = serves_in_eval(block.eval(), x, monkeypatch)
    with torch.no_grad():
        assert not is_served and deviation(ours, plain(x)) < FP32


@needs_kernels
@pytest.mark.filterwarnings("ignore")  # the tracer warns of every number it takes for a constant
def test_an_accelerated_network_can_be_traced():
    """The kernels read memory, of which there is none while a graph is made."""
    network = accelerate(build_msunet(width=0.125)).eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        traced = torch.jit.trace(network, x)
        assert deviation(traced(x + 1), network(x + 1)) < 10 * FP32


def test_parameters_elsewhere_are_refused_as_pytorch_does():
    with pytest.raises(RuntimeError, match="meta"):
        norm_act(nn.BatchNorm2d(8, device="meta"), None, pixels(2, 8, 6, 6))


@needs_kernels
@pytest.mark.slow
def test_the_kernels_of_processors_without_avx512_agree_too():
    """Compiled as for one of those, in a process of its own."""
    code = (
        "import sys, pytest; from msunet_core import compiler;"
        "compiler.FLAGS = (*compiler.FLAGS, '-mno-avx512f');"
        "from msunet_core.fast import library; assert library.enabled();"
        "sys.exit(pytest.main(['-q', '-p', 'no:cacheprovider', '-p', 'no:xdist', '-m', 'not slow',"
        " 'tests/test_fast.py', 'tests/test_packed_network.py']))"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-3000:]


@needs_kernels
@pytest.mark.parametrize("batch", [1, 70])
def test_any_batch_is_summed_whole(batch):
    convs, x = depthwise_convs(5, (3, 5), 2), pixels(batch, 5, 6, 6)
    assert_close(conv_step(convs, x), exact_conv_step(convs, x), FP32)


@needs_kernels
@pytest.mark.parametrize("stride", [1, 2])
def test_depthwise_convolution_of_halves_sums_in_fp32(stride):
    convs = [conv.half() for conv in depthwise_convs(40, (3, 5, 7), stride)]
    x = pixels(3, 40, 9, 9, dtype=torch.float16)
    ours = conv_step(convs, x)
    assert all(tensor.dtype == torch.float16 for tensor in ours.values())
    assert_close(ours, exact_conv_step(convs, x), FP16)


@needs_kernels
def test_a_frozen_weight_gets_no_gradient():
    convs, x = depthwise_convs(8, (3,), 1), pixels(2, 8, 4, 4).requires_grad_()
    convs[0].weight.requires_grad_(False)
    depthwise_conv(convs[0], x).sum().backward()
    assert convs[0].weight.grad is None and x.grad is not None


@needs_kernels
def test_nan_passes_through():
    x = pixels(2, 4, 3, 3)
    x[0, 1, 1, 1] = float("nan")
    for act in ACTS.values():
        y = norm_act(nn.BatchNorm2d(4), act, x)
        assert y[:, 1].isnan().all() and y[:, [0, 2, 3]].isfinite().all()


@needs_kernels
def test_norms_and_depthwise_give_the_same_bits_with_any_number_of_threads():
    norm, convs, x = new_norm(40), depthwise_convs(40, (3, 5, 7), 2), pixels(7, 40, 12, 12)
    assert_same_bits_with_any_number_of_threads(
        lambda: conv_step(convs, x) | {f"norm {k}": t for k, t in norm_step(norm, nn.SiLU(), x, x).items()}
    )


# --- the network -----------------------------------------------------------------------------


def gradients(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    model = copy.deepcopy(model)
    loss = F.cross_entropy(model(images.to(model.classifier.weight.dtype)), labels)
    loss.backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    buffers = {name: b for name, b in model.named_buffers() if b.is_floating_point()}
    return loss.detach(), {**grads, **buffers}


@needs_kernels
def test_a_training_step_is_as_exact_as_the_plain_one():
    model, images, labels = build_msunet(width=0.125), pixels(16, 3, 32, 32), torch.arange(16)
    ours = gradients(accelerate(copy.deepcopy(model)), images, labels)
    plain = gradients(model, images, labels)
    exact = gradients(copy.deepcopy(model).double(), images, labels)
    assert ours[0].item() == pytest.approx(exact[0].item(), rel=1e-5)
    # The bias of a norm that another norm follows with nothing but linear layers between has gradient 0.
    names = [name for name, tensor in exact[1].items() if tensor.norm() > 1e-10]
    assert len(names) > len(exact[1]) - 12
    errors = [
        max(((found[name] - exact[1][name]).norm() / exact[1][name].norm()).item() for name in names)
        for found in (ours[1], plain[1])
    ]
    # A value near a ReLU's kink may fall on either side, in either form; so their errors, not their digits.
    assert errors[0] < max(2 * errors[1], 1e-3), errors


@needs_kernels
def test_half_precision_networks_agree_with_the_plain_form():
    images = pixels(8, 3, 32, 32)
    for level in ("O2", "O3"):
        model = apply_opt_level(build_msunet(width=0.125).eval(), level)
        with torch.no_grad():
            plain = model(images)
            ours = accelerate(model)(images)
        # Some 40 roundings to FP16 on the way, at other places.
        torch.testing.assert_close(ours, plain, rtol=0.03, atol=0.03 * plain.abs().max().item())


def test_the_score_is_the_same_and_its_hooks_see_every_module():
    model = build_msunet(width=0.125)
    plain = score(model, "O3")
    ours = score(accelerate(model), "O3")
    assert ours.layers.equals(plain.layers)


def test_an_accelerated_network_keeps_its_state_and_is_put_back():
    model = build_msunet(width=0.0625)
    kinds, state = [type(module) for module in model.modules()], model.state_dict()
    with accelerated(model) as fast:
        assert fast is model and isinstance(model.blocks[1][0], FastInvertedResidual)
        assert list(model.state_dict()) == list(state)
        assert all(tensor.data_ptr() == state[name].data_ptr() for name, tensor in model.state_dict().items())
    assert [type(module) for module in model.modules()] == kinds


def test_a_block_derived_from_ours_keeps_what_was_derived():
    class Doubled(DepthwiseSeparable):
        def forward(self, x):
            return 2 * super().forward(x)

    block = in_eval_mode(Doubled(12, 12, ternary_1x1))
    x = pixels(2, 12, 5, 5)
    with torch.no_grad():
        assert torch.equal(accelerate(block)(x), 2 * DepthwiseSeparable.forward(block, x))


# --- where the kernels do not apply ----------------------------------------------------------


@needs_kernels
def test_other_tensors_take_the_plain_form():
    norm, relu = new_norm(8), nn.ReLU()
    fused = pixels(2, 8, 4, 4)
    assert is_fused(norm_act(norm, relu, fused))
    for x in (fused.contiguous(), fused[..., 1:], fused.double()):
        norm.to(x.dtype)
        assert not is_fused(norm_act(norm, relu, x))
    convs = depthwise_convs(8, (3,), 1)
    assert is_fused(depthwise_conv(convs[0], fused))
    assert not is_fused(depthwise_conv(convs[0], fused.contiguous()))
    for conv in (nn.Conv2d(8, 8, 3, padding=1), *depthwise_convs(8, (9,), 1), nn.Conv2d(8, 8, 3, groups=8)):
        assert not is_fused(depthwise_conv(conv, fused))


@needs_kernels
@pytest.mark.parametrize("watched", ["norm", "act", "conv", "conv.0"])
def test_a_hook_sees_its_module_called(watched):
    convs = depthwise_convs(12, (3, 5), 1)
    layers = nn.ModuleDict({"norm": new_norm(12), "act": nn.SiLU(), "conv": MixedConv2d(convs)})
    seen = []
    layers.get_submodule(watched).register_forward_hook(lambda *_: seen.append(1))
    y = depthwise_conv(layers["conv"], pixels(2, 12, 6, 6))
    z = norm_act(layers["norm"], layers["act"], y)
    assert is_fused(y) == (not watched.startswith("conv")) and is_fused(z) == watched.startswith("conv")
    assert seen == [1]


def test_one_value_a_channel_is_refused_as_pytorch_does():
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        norm_act(nn.BatchNorm2d(4), None, pixels(1, 4, 1, 1))


@pytest.mark.parametrize("module", [library, packed_network])
def test_what_ctypes_is_told_of_each_function_is_what_its_source_says(module):
    """ctypes takes any pointer for another one, and more arguments than there are."""
    letters = {"p": "pointer", "n": "pointer", "s": "pointer", "u": "pointer"} | {
        "i": "int",
        "l": "long",
        "f": "float",
    }
    source = module.SOURCE.read_text()
    source = re.sub(r"/\*.*?\*/|//[^\n]*", "", source[source.index('extern "C"') :])
    prefix = "msunet_packed_" if module is packed_network else "msunet_"
    found = {
        name.removeprefix(prefix): [
            "pointer" if "*" in part else re.search(r"\b(int|long|float)\b", part)[1]
            for part in given.split(",")
        ]
        for name, given in re.findall(rf"\b({prefix}\w+)\(([^)]*)\)[^;{{]*{{", source)
    }
    threads = ["int"] if module is library else []
    told = {
        name: [letters[of] for of in signature] + threads for name, signature in module.SIGNATURES.items()
    }
    assert found == told


def run_in_new_process(**environment: str) -> tuple[str, str]:
    code = (
        "import torch; from msunet_core import build_msunet;"
        "from msunet_core.fast import accelerate, library;"
        "torch.manual_seed(0); model = accelerate(build_msunet(width=0.0625));"
        "print(library.enabled(), model(torch.randn(2, 3, 32, 32)).shape)"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, env={**os.environ, **environment}, cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip(), done.stderr.strip()


def test_without_a_compiler_the_study_still_runs_and_says_why_it_is_slow(tmp_path):
    alone = {"XDG_CACHE_HOME": str(tmp_path), "PATH": str(tmp_path)}
    shown, warned = run_in_new_process(**alone)
    assert shown == "False torch.Size([2, 100])"
    assert warned == ("no fast CPU kernels, PyTorch's own are used: no C++ compiler (c++ or g++) was found")


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("switched off", ""),
        ("failing", "the compiler failed: it is out of order"),
        ("no cache", "File exists"),
        ("no home", "this user has no home folder; set XDG_CACHE_HOME"),
    ],
)
def test_without_kernels_the_plain_form_runs_and_says_why(fault, told, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    if fault == "switched off":
        monkeypatch.setenv("MSUNET_FAST", "0")
    elif fault == "failing":
        (tmp_path / "c++").write_text("#!/bin/sh\necho it is out of order >&2\nexit 1\n")
        (tmp_path / "c++").chmod(0o755)
        monkeypatch.setenv("CXX", str(tmp_path / "c++"))
    elif fault == "no cache":
        (tmp_path / "msunet").write_text("a file where the folder should be")
    else:
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setattr(Path, "home", no_home)
    library.library.cache_clear()
    try:
        assert not library.enabled()
        assert "NormAct" not in norm_act(new_norm(4), None, pixels(2, 4, 3, 3)).grad_fn.name()
    finally:
        library.library.cache_clear()
    assert told in caplog.text and bool(told) == bool(caplog.text)


def no_home() -> Path:
    raise RuntimeError("Could not determine home directory.")
