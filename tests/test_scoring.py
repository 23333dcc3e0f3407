"""The score: specification §9 by hand, the published counts, and the network that is its unit."""

from __future__ import annotations

import copy
import itertools
import re

import pandas as pd
import pytest
import torch
from torch import nn

from msunet_core.errors import StudyError
from msunet_core.fast import accelerate
from msunet_core.measure.scoring import Score, published_table, score, ternary_sparsity_at
from msunet_core.measure.wide_resnet import wide_resnet
from msunet_core.model.network import MixedConv2d, SqueezeExcite, build_msunet
from msunet_core.model.precision import apply_opt_level
from msunet_core.model.ternary import TernaryConv2d

SE = r"blocks\.[23]\.[01]\.se\.conv_(reduce|expand)\.weight"
DEPTHWISE = r"blocks\.[23]\.[01]\.conv_dw\.[012]\.weight"


@torch.no_grad()
def zero_smallest(model: nn.Module, names: str, sparsity: float) -> None:
    for name, weight in model.named_parameters():
        if re.fullmatch(names, name):
            smallest = weight.abs().flatten().argsort()[: int(sparsity * weight.numel())]
            weight.view(-1)[smallest] = 0.0


@pytest.fixture(scope="module")
def v3_pruned() -> nn.Module:
    return pruned("v3", depthwise=0.5)


def pruned(variant: str, depthwise: float) -> nn.Module:
    torch.manual_seed(0)
    model = build_msunet(variant)
    zero_smallest(model, SE, 0.9)
    zero_smallest(model, DEPTHWISE, depthwise)
    return model


# --- by hand -------------------------------------------------------------------------------------


@torch.no_grad()
def tiny_network() -> nn.Module:
    """Ternary 1x1 (8 -> 16), batch norm, ReLU, SE (16 -> 4 -> 16), pool, Linear (16 -> 10)."""
    conv = TernaryConv2d(8, 16, weights="ternary", alpha=0.67749)
    # 64 zeros, 32 ones, 32 minus ones: std 0.71, so the threshold 0.48 leaves T = W, half of it zeros.
    conv.weight.copy_(torch.tensor([0.0, 1.0, 0.0, -1.0] * 32).view(16, 8, 1, 1))
    se = SqueezeExcite(16, 4)
    se.conv_reduce.weight.fill_(1.0)
    se.conv_expand.weight.copy_(torch.tensor([0.0, 1.0] * 32).view(16, 4, 1, 1))  # half zeros: sparse
    return nn.Sequential(
        conv, nn.BatchNorm2d(16), nn.ReLU(), se, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)
    )


# An 8x4x4 image: every feature map is 16x4x4 = 256 elements. (params, multiplications, additions) at O0:
#   ternary 1x1  K=8, N=128, s=1/2   128/32 + 64/32 + 1 = 7    4*256/32 + 256 = 288   (4-1)*256 = 768
#   batch norm   merged              C = 16                    0                      256
#   ReLU                             0                         256                    0
#   reduce 1x1   K=16, N=64, dense   64 + bias 4 = 68          16*4 = 64              15*4 + bias 4 = 64
#   Swish        of 4                0                         3*4 = 12               4
#   expand 1x1   K=4, N=64, s=1/2    64/32 + 32 + bias 16 = 50 2*16 = 32              (2-1)*16 + bias 16 = 32
#   sigmoid      of 16               0                         2*16 = 32              16
#   SE itself                        0                         2*256 = 512            (16-1)*16 = 240
#   pool         4x4 -> 16           0                         16                     15*16 = 240
#   Linear       no bias             160                       16*10 = 160            15*10 = 150
HAND_O0 = {
    "0": (7, 288, 768),
    "1": (16, 0, 256),
    "2": (0, 256, 0),
    "3.conv_reduce": (68, 64, 64),
    "3.act": (0, 12, 4),
    "3.conv_expand": (50, 32, 32),
    "3.gate": (0, 32, 16),
    "3": (0, 512, 240),
    "4": (0, 16, 240),
    "6": (160, 160, 150),
}
# O3, d = 2 everywhere: bits of masks and signs, the products with signs, and the additions inside
# convolutions and Linear stay; all else halves.
HAND_O3 = {
    "0": (4 + 2 + 0.5, 32 + 128, 768),
    "1": (8, 0, 128),
    "2": (0, 128, 0),
    "3.conv_reduce": (34, 32, 64),
    "3.act": (0, 6, 2),
    "3.conv_expand": (2 + 16 + 8, 16, 32),
    "3.gate": (0, 16, 8),
    "3": (0, 256, 120),
    "4": (0, 8, 120),
    "6": (80, 80, 150),
}
# O2: an FP32 batch norm behind FP16 convolutions cannot merge: scale and shift, d = 1.
HAND_O2 = HAND_O3 | {"1": (32, 256, 256)}


@pytest.mark.parametrize(
    ("level", "by_hand", "totals"),
    [
        ("O0", HAND_O0, (301, 1372, 1770)),
        ("O2", HAND_O2, (178.5, 958, 1520)),
        ("O3", HAND_O3, (154.5, 702, 1392)),
    ],
)
def test_tiny_network_costs_what_a_pencil_says(level, by_hand, totals):
    result = score(tiny_network(), level, input_size=(8, 4, 4))
    counted = result.layers.set_index("name")[["params", "mults", "adds"]]
    # Exact: every number above is a sum of powers of two in FP64.
    assert {name: tuple(row) for name, row in counted.iterrows()} == by_hand
    assert (result.params, result.mults, result.adds) == totals
    assert result.value == totals[0] / 36.5e6 + (totals[1] + totals[2]) / 10.49e9


def test_binary_layer_stores_one_bit_a_weight():
    result = score(TernaryConv2d(8, 16, weights="binary", alpha=0.0), "O3", input_size=(8, 4, 4))
    # 128/32 + 1/2; 8*256/32 + 256/2; (8-1)*256
    assert (result.params, result.mults, result.adds) == (4.5, 192, 1792)


def test_fewer_than_forty_percent_zeros_is_counted_dense():
    conv = nn.Conv2d(10, 10, 1, bias=False)
    for zeros, kind, params in [(39, "dense conv", 100), (40, "sparse conv", 100 / 32 + 60)]:
        nn.init.ones_(conv.weight)
        with torch.no_grad():
            conv.weight.view(-1)[:zeros] = 0.0
        layer = score(conv, input_size=(10, 4, 4)).layers.iloc[0]
        assert (layer["kind"], layer["params"]) == (kind, pytest.approx(params, abs=1e-9)), zeros
        assert layer["mults"] == pytest.approx((6 if kind == "sparse conv" else 10) * 160, abs=1e-9)


def test_the_strided_mixed_depthwise_convolution_counts_each_kernel_by_its_share_of_outputs():
    layers = score(build_msunet("v3", weights="float")).layers.set_index("name")
    # 320 channels -> 108, 106, 106 at 16x16 outputs; 9, 25, 49 products each.
    assert list(layers.loc[[f"blocks.2.0.conv_dw.{i}" for i in range(3)], "mults"]) == [
        9 * 108 * 256,
        25 * 106 * 256,
        49 * 106 * 256,
    ]


@pytest.mark.parametrize("weights", ["ternary", "binary", "float"])
def test_a_grouped_1x1_costs_the_sum_of_its_parts_and_none_is_counted_twice(weights):
    model = accelerate(build_msunet("v3", weights=weights, width=0.5))
    expand = model.blocks[2][1].conv_pw
    parts = sum(
        (
            score(conv, input_size=(conv.in_channels, 16, 16)).layers[["params", "mults", "adds"]].iloc[0]
            for conv in expand.values()
        ),
        start=pd.Series(0.0, index=["params", "mults", "adds"]),
    )
    layers = score(model).layers
    mixed = layers[layers["name"].str.startswith("blocks.2.1.conv_pw.")]
    assert list(mixed["name"]) == ["blocks.2.1.conv_pw.0", "blocks.2.1.conv_pw.1"]
    assert mixed[["params", "mults", "adds"]].sum().to_dict() == parts.to_dict()


def test_batch_norm_stays_apart_only_where_weights_are_stored_as_halves():
    """At O1 they are FP32, so a scale merges into them before they are cast."""
    model = build_msunet("v3", width=0.25)
    costs = {level: score(model, level).by_kind() for level in ("O0", "O1", "O2")}
    kinds = {level: [kind for kind in cost.index if "batch norm" in kind] for level, cost in costs.items()}
    assert kinds == {"O0": ["batch norm, merged"], "O1": ["batch norm, merged"], "O2": ["batch norm, apart"]}
    assert costs["O2"]["params"]["batch norm, apart"] == 2 * costs["O1"]["params"]["batch norm, merged"]


def test_every_parameter_of_a_float_network_is_counted_once():
    model = build_msunet("v3", weights="float")
    counted = score(model).params
    # Merged batch norm keeps one of its two vectors, and the classifier's bias is left out.
    merged = sum(m.num_features for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    assert counted == 1_208_300 - merged - 100


@pytest.mark.parametrize(("level", "d"), [("O0", 1), ("O2", 2), ("O3", 2)])
def test_each_skip_adds_its_feature_map_once(level, d):
    layers = score(build_msunet("v3"), level).layers
    skips = layers[layers["kind"] == "skip addition"].set_index("name")
    assert skips["adds"].to_dict() == {
        "blocks.0.0 + skip": 64 * 32 * 32 / d,
        "blocks.1.0 + skip": 64 * 32 * 32 / d,
        "blocks.2.1 + skip": 128 * 16 * 16 / d,
        "blocks.3.1 + skip": 256 * 8 * 8 / d,
    }
    assert (skips["flops"] == skips["adds"]).all() and (skips["params"] == 0).all()


def test_a_layer_run_twice_is_stored_once():
    conv = nn.Conv2d(4, 4, 1, bias=False)
    once, twice = score(conv, input_size=(4, 2, 2)), score(nn.Sequential(conv, conv), input_size=(4, 2, 2))
    assert (twice.params, twice.mults, twice.adds) == (once.params, 2 * once.mults, 2 * once.adds)


def test_an_all_zero_ternary_layer_costs_no_negative_additions():
    conv = TernaryConv2d(8, 16, weights="ternary", alpha=1e9)
    result = score(conv, input_size=(8, 4, 4))
    assert (result.params, result.mults, result.adds) == (4 + 1, 256, 0)


# --- the published counts ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variant", "depthwise", "tolerance"),
    # Fresh normal weights leave half of the ternary weights zero; trained ones differ by a few
    # hundredths, worth up to 1 % of the parameters. For v3 the published network is closer than that.
    [("v1", 0.0, 0.01), ("v2", 0.5, 0.01), ("v3", 0.5, 0.001)],
)
def test_parameter_counts_are_the_published_ones(variant, depthwise, tolerance):
    row = published_table().loc[f"MSUNet-{variant}"]
    counted = score(pruned(variant, depthwise), row["opt_level"]).params
    assert counted == pytest.approx(row["params"], rel=tolerance)


def test_published_flops_need_a_little_more_zeros_than_fresh_weights_have(v3_pruned):
    result = score(v3_pruned, "O3")
    published = published_table().loc["MSUNet-v3", "flops"]
    fresh = ternary_sparsity_at(result, result.flops)
    trained = ternary_sparsity_at(result, published)
    # Phi(0.67749) - Phi(-0.67749) = 0.502; 0.002 is about twice its sampling error here
    assert fresh == pytest.approx(0.502, abs=0.002)
    assert trained == pytest.approx(0.538, abs=0.002)
    # The inverse: raise alpha until ternary layers have that share of zeros; the operations follow.
    model = copy.deepcopy(v3_pruned)
    for module in model.modules():
        if isinstance(module, TernaryConv2d):
            module.alpha = 0.7355  # Phi^-1(0.5 + 0.538 / 2)
    assert score(model, "O3").flops == pytest.approx(published, rel=0.003)


def test_published_rows_agree_with_the_definition_of_the_score():
    table = published_table()
    derived = table["params"] / 36.5e6 + table["flops"] / 10.49e9
    # Five decimals are printed, of counts with four digits.
    assert list(derived.round(5)) == list(table["score"])


def test_score_falls_with_every_technique(v3_pruned):
    torch.manual_seed(0)
    values = {
        "float": score(build_msunet("v3", weights="float")).value,
        "ternary": score(build_msunet("v3")).value,
        "pruned": score(v3_pruned).value,
        "pruned, O2": score(v3_pruned, "O2").value,
        "pruned, O3": score(v3_pruned, "O3").value,
    }
    assert all(before > after for before, after in itertools.pairwise(values.values())), values


def test_wide_resnet_28_10_is_the_unit():
    result = score(wide_resnet(28, 10, 100))
    # To three digits the published 36.5 M, and to four 10.49 G.
    assert f"{result.params / 1e6:.1f} M" == "36.5 M"
    assert f"{result.flops / 1e9:.2f} G" == "10.49 G"
    kinds = result.by_kind()
    # 36,536,884 is the usual count of this network; merged batch norm (8,976 channels) stores one
    # vector where that counts two, and the bias of the classifier (100) is left out.
    assert result.params == 36_536_884 - 8_976 - 100
    # Products of its convolutions, summed by hand over stem, three groups of 8 convolutions, 1x1 shortcuts.
    products = 27 * 16 * 1024
    for pixels, before, channels in [(1024, 16, 160), (256, 160, 320), (64, 320, 640)]:
        products += pixels * channels * (9 * before + 7 * 9 * channels + before)
    assert kinds.loc["dense conv", "mults"] == products


# --- the counter and its caller --------------------------------------------------------------------


def test_scoring_leaves_the_model_as_it_was(v3_pruned):
    model = copy.deepcopy(v3_pruned).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random_state = torch.get_rng_state()
    score(model, "O3")
    assert model.training and all(module.training for module in model.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert getattr(model, "opt_level", "O0") == "O0"
    assert torch.equal(torch.get_rng_state(), random_state)
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == before[name].dtype and torch.equal(tensor, before[name]), name


def test_a_model_at_the_level_already_scores_the_same(v3_pruned):
    ready = apply_opt_level(copy.deepcopy(v3_pruned), "O3")
    pd.testing.assert_frame_equal(score(ready, "O3").layers, score(v3_pruned, "O3").layers)
    with pytest.raises(StudyError, match="O3"):
        score(ready, "O0")


def test_divisor_is_read_from_the_real_types(v3_pruned):
    divisors = {level: set(score(v3_pruned, level).layers["d"]) for level in ("O0", "O3")}
    assert divisors == {"O0": {1}, "O3": {2}}
    at_o2 = score(v3_pruned, "O2").layers
    assert set(at_o2.loc[at_o2["d"] == 1, "kind"]) == {"batch norm, apart"}


def test_o1_stores_fp32(v3_pruned):
    # Autocast rounds copies: the stored weights, and so d of every layer that has some, stay FP32.
    at_o1, at_o0 = score(v3_pruned, "O1"), score(v3_pruned, "O0")
    costs = [cost.layers[~cost.layers["kind"].str.startswith("batch norm")] for cost in (at_o1, at_o0)]
    assert costs[0]["params"].equals(costs[1]["params"])
    assert costs[0]["flops"].sum() < costs[1]["flops"].sum()  # layers without weights run in FP16


def test_a_layer_without_a_rule_is_refused_by_name():
    with pytest.raises(StudyError, match=r"ConvTranspose2d \(1\)"):
        score(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ConvTranspose2d(4, 4, 2)))
    with pytest.raises(StudyError, match=r"GELU \(1\)"):
        score(nn.Sequential(nn.Conv2d(3, 4, 1), nn.GELU()))

    class OwnExcite(SqueezeExcite):  # has no parameters but those of its children
        pass

    with pytest.raises(StudyError, match=r"OwnExcite \(1\)"):
        score(nn.Sequential(nn.Conv2d(3, 4, 1), OwnExcite(4, 2)))


def test_parameters_that_no_image_reaches_are_refused():
    class Unused(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)

        def forward(self, x):
            return self.used(x)

    with pytest.raises(StudyError, match="unused has parameters"):
        score(Unused())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"opt_level": "O4"}, "O4"),
        ({"input_size": (32, 32)}, r"\(32, 32\)"),
        ({"input_size": (3, 0, 32)}, r"\(3, 0, 32\)"),
        ({"input_size": (4, 32, 32)}, r"\(4, 32, 32\)"),
    ],
)
def test_bad_arguments_are_named(arguments, said):
    with pytest.raises(StudyError, match=said):
        score(build_msunet("v3", width=0.25), **arguments)


def test_wide_resnet_refuses_a_depth_of_no_whole_blocks():
    with pytest.raises(StudyError, match="27"):
        wide_resnet(27)


def test_a_printed_score_has_the_published_lines():
    printed = str(Score(98_530.0, 20e6, 65.27e6, "O3", pd.DataFrame())).splitlines()
    assert [line.split()[0] for line in printed] == ["#params", "#mults", "#adds", "#FLOPs", "score"]
    for line, number in zip(
        printed, ("0.09853 M", "20.000 M", "65.270 M", "85.270 M", "0.01083"), strict=True
    ):
        assert number in line, line


def test_a_mixed_convolution_alone_is_counted_too():
    mixed = MixedConv2d([nn.Conv2d(4, 6, 1, bias=False), nn.Conv2d(4, 6, 1, bias=False)])
    result = score(mixed, "O3", input_size=(8, 2, 2))
    # Each: 24 FP16 weights, 4 * 24 outputs products, (4-1) * 24 additions.
    assert (result.params, result.mults, result.adds) == (24, 96, 144)
