"""Opt levels: which tensors are half where, and that FP32 accumulation agrees with half arithmetic."""

from __future__ import annotations

import copy
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from msunet_core import StudyError, apply_opt_level, build_msunet
from msunet_core.model.precision import WidenHalf
from msunet_core.model.ternary import layer_statistics
from msunet_core.training.masters import MasterWeights


@pytest.fixture
def network():
    torch.manual_seed(0)
    return build_msunet("v3", width=0.25, num_classes=10).eval()


@pytest.fixture
def images():
    return torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("level", "convolution", "batch_norm", "between"),
    [
        ("O0", torch.float32, torch.float32, torch.float32),
        ("O1", torch.float32, torch.float32, torch.float16),
        ("O2", torch.float16, torch.float32, torch.float16),
        ("O3", torch.float16, torch.float16, torch.float16),
    ],
)
def test_each_level_stores_and_passes_on_the_dtypes_of_the_table(
    network, images, level, convolution, batch_norm, between
):
    apply_opt_level(network, level)
    seen = {}
    for name in ("conv_stem", "bn1", "blocks.2.0.se", "classifier"):
        module = network.get_submodule(name)
        module.register_forward_hook(lambda m, args, out, name=name: seen.update({name: out.dtype}))
    scores = network(images)
    assert network.conv_stem.weight.dtype == convolution
    assert network.bn1.weight.dtype == network.bn1.running_var.dtype == batch_norm
    assert set(seen.values()) == {between}
    assert scores.dtype == torch.float32
    assert network.bn1.num_batches_tracked.dtype == torch.int64


@pytest.mark.parametrize(
    "operation",
    [
        lambda x, w: F.conv2d(x, w, padding=1),
        lambda x, w: F.linear(x.flatten(1)[:, : w[0].numel()], w.flatten(1)),
        lambda x, w: F.batch_norm(x, w[:, 0, 0, 0], w[:, 0, 0, 1].abs(), w[:, 0, 1, 0], w[:, 0, 1, 1]),
    ],
    ids=["conv2d", "linear", "batch_norm"],
)
def test_widened_half_agrees_with_true_half_arithmetic(operation):
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(3, 8, 9, 9, generator=generator).half()
    w = (torch.randn(8, 8, 3, 3, generator=generator) / 8).half()
    with WidenHalf():
        ours = operation(x, w)
    true = operation(x, w)  # PyTorch's own half kernels
    exact = operation(x.double(), w.double())
    assert ours.dtype == torch.float16
    # One rounding at the end: half a unit in the last place of FP16 (2^-11), on top of FP32's own error.
    torch.testing.assert_close(ours.double(), exact, rtol=2**-11 * 1.01, atol=2**-20)
    # Half kernels may round more often; they may not be closer to the exact value than a rounding allows.
    torch.testing.assert_close(ours, true, rtol=2**-9, atol=2**-9)


def test_o3_scores_are_near_fp32_scores_and_not_equal_to_them(network, images):
    plain = network(images)
    half = apply_opt_level(copy.deepcopy(network), "O3")(images)
    spread = plain.std()
    difference = (plain - half).abs().max()
    # Some 20 layers, each rounding to 11 bits: far below the spread of the scores, but not nothing.
    assert 0 < difference < 0.02 * spread, (difference, spread)


def test_gradients_of_half_weights_are_half_and_those_of_batch_norm_single(network, images):
    apply_opt_level(network, "O2").train()
    network(images).sum().backward()
    assert network.conv_stem.weight.grad.dtype == torch.float16
    assert network.bn1.weight.grad.dtype == torch.float32


def test_running_statistics_move_at_o2(network, images):
    apply_opt_level(network, "O2").train()
    before = network.bn1.running_mean.clone()
    network(images)
    assert not torch.equal(before, network.bn1.running_mean)


def test_a_copy_of_a_half_network_is_one_too(network, images):
    apply_opt_level(network, "O3")
    torch.testing.assert_close(copy.deepcopy(network)(images), network(images), rtol=0, atol=0)


def test_the_context_is_left_when_a_forward_pass_fails(network):
    apply_opt_level(network, "O1")
    with pytest.raises(RuntimeError):
        network(torch.zeros(1, 5, 32, 32))
    x = torch.ones(1, 1, 1, 1)
    with WidenHalf(autocast=True):
        assert F.conv2d(x, x).dtype == torch.float16
    assert F.conv2d(x, x).dtype == torch.float32


def test_masters_keep_what_half_loses(network):
    exact = {name: p.detach().clone() for name, p in network.named_parameters()}
    masters = MasterWeights(network, "O2")
    for name, value in masters.state_dict().items():
        if name in exact:
            assert torch.equal(value, exact[name]), name
    half = network.conv_stem.weight
    assert half.dtype == torch.float16
    assert torch.equal(half, exact["conv_stem.weight"].half())


def test_a_small_update_reaches_the_masters_and_later_the_half_weights(network):
    masters = MasterWeights(network, "O2")
    half, master = network.conv_stem.weight, masters.parameters["conv_stem.weight"]
    with torch.no_grad():
        master.fill_(1.0)
        masters.publish()
        for _ in range(4):  # each is a quarter of half's step at 1.0, which is 2^-10
            master.add_(2.0**-12)
            masters.publish()
    assert (half == 1.0 + 2.0**-10).all(), half.flatten()[0]


def test_unknown_and_repeated_levels_are_refused(network):
    with pytest.raises(StudyError, match="'O4' is unknown"):
        apply_opt_level(network, "O4")
    apply_opt_level(network, "O3")
    assert apply_opt_level(network, "O3") is network
    with pytest.raises(StudyError, match="at O3 already"):
        apply_opt_level(network, "O2")


@pytest.mark.parametrize(
    "module", [None, types.ModuleType("apex")], ids=["not installed", "unrelated or too new"]
)
def test_the_apex_backend_is_refused_where_there_is_no_legacy_apex(network, monkeypatch, module):
    monkeypatch.setitem(sys.modules, "apex", module)
    with pytest.raises(StudyError, match="backend='native'"):
        apply_opt_level(network, "O2", backend="apex")


def test_a_legacy_apex_is_used_where_there_is_one(network, monkeypatch):
    calls = []
    apex = types.ModuleType("apex")
    apex.amp = types.SimpleNamespace(initialize=lambda model, **options: calls.append(options) or model)
    monkeypatch.setitem(sys.modules, "apex", apex)
    assert apply_opt_level(network, "O2", backend="apex") is network
    assert calls == [{"opt_level": "O2", "verbosity": 0}]


def test_a_module_without_batch_norm_works_too(images):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    assert apply_opt_level(model, "O3")(images).dtype == torch.float32
    assert model[0].weight.dtype == torch.float16


def test_a_ternary_weight_beyond_fp16_keeps_its_signs(network, images):
    layer = network.blocks[2][0].conv_pw
    with torch.no_grad():
        layer.weight.mul_(2.0**20)
    signs, plain = layer.signs(), network(images)
    half = apply_opt_level(copy.deepcopy(network), "O3")
    assert half.blocks[2][0].conv_pw.weight.isfinite().all()
    flipped = (half.blocks[2][0].conv_pw.signs() != signs).double().mean().item()
    assert flipped < 0.005, flipped  # rounding may move one across its threshold, overflow moved all
    assert (half(images) - plain).abs().max() < plain.std()


@pytest.mark.parametrize("exponent", [-100, -22, 20, 100])
def test_t_at_o3_does_not_depend_on_the_size_of_w(network, exponent):
    plain = apply_opt_level(copy.deepcopy(network), "O3").conv_head.signs()
    with torch.no_grad():
        network.conv_head.weight.mul_(2.0**exponent)
    assert torch.equal(apply_opt_level(network, "O3").conv_head.signs(), plain)


@pytest.mark.parametrize("frozen", [True, False])
def test_masters_beyond_fp16_are_published_and_loaded_without_losing_t(network, frozen):
    layer = network.conv_head
    with torch.no_grad():
        layer.weight.mul_(2.0**20)
    layer.weight.requires_grad_(not frozen)
    masters = MasterWeights(network, "O2")
    signs, state = layer.signs(), {n: t.clone() for n, t in masters.state_dict().items()}
    assert state["conv_head.weight"].abs().max() > 65504 and signs.count_nonzero()
    masters.publish()
    assert torch.equal(layer.signs(), signs)
    masters.load_state_dict(state)
    assert torch.equal(layer.signs(), signs)
    assert torch.equal(masters.state_dict()["conv_head.weight"], state["conv_head.weight"])


def test_a_ternary_weight_that_is_not_finite_stays_so(network):
    """It is for who trains, tests or packs to name it."""
    with torch.no_grad():
        network.conv_head.weight[0, 0] = float("inf")
    assert not apply_opt_level(network, "O3").conv_head.weight.isfinite().all()


def test_any_other_value_beyond_fp16_is_refused_by_name(network):
    with torch.no_grad():
        network.conv_stem.weight[0, 0, 0, 0] = 1e6
    with pytest.raises(StudyError, match=r"conv_stem\.weight holds 1e\+06, beyond 65504"):
        apply_opt_level(network, "O2")


def test_a_network_that_could_not_be_cast_is_as_it_was_and_can_be_used_at_o0(network, images):
    with torch.no_grad():
        network.classifier.weight[0, 0] = 1e6  # the last one that is cast
    with pytest.raises(StudyError, match=r"classifier\.weight holds"):
        apply_opt_level(network, "O3")
    assert {tensor.dtype for tensor in network.state_dict().values()} <= {torch.float32, torch.int64}
    assert apply_opt_level(network, "O0")(images).shape[0] == len(images)


def test_the_spread_of_half_weights_is_that_of_their_masters(network):
    masters = MasterWeights(network, "O2")
    before = {row["layer"]: row["spread"] for row in layer_statistics(network, masters.parameters)}
    with torch.no_grad():
        masters.parameters["conv_head.weight"].mul_(2.0**20)  # beyond FP16: the halves are scaled down
    masters.publish()
    after = {row["layer"]: row["spread"] for row in layer_statistics(network, masters.parameters)}
    assert after["conv_head"] == pytest.approx(2.0**20 * before["conv_head"], rel=1e-6)
    assert layer_statistics(network)[-1]["spread"] < 1e4
