"""The score told in numbers: rules with numbers put in, savings by order, what the official counter adds."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from msunet_core.errors import StudyError
from msunet_core.measure.explain import (
    official_differences,
    savings_by_order,
    scales_left_out,
    ternary_zeros_by_block,
    worked,
)
from msunet_core.measure.scoring import score
from msunet_core.model.network import SqueezeExcite, build_msunet
from msunet_core.model.pruning import prune_to_target
from msunet_core.model.ternary import TernaryConv2d


@pytest.mark.parametrize("weights", ["ternary", "binary", "float"])
@pytest.mark.parametrize("level", ["O0", "O3"])
def test_the_numbers_put_in_come_to_what_is_counted(weights, level):
    model = build_msunet(width=0.5, weights=weights)  # wide enough that every sum has a term
    prune_to_target(model, "V3")
    layers = score(model, level).layers
    layers = layers[layers["fan_in"] > 0]
    assert {"sparse conv", "linear"} < set(layers["kind"])
    for _, row in layers.iterrows():
        table = worked(row)
        for name, text in table["numbers"].items():
            by_pencil = eval(text.replace(",", "").replace("×", "*").replace("−", "-"))
            assert by_pencil == pytest.approx(row[name], rel=1e-12), (row["name"], name, text)
            assert table.loc[name, "count"] == row[name]


def test_a_ternary_layer_reads_as_one_writes_it_on_paper():
    conv = TernaryConv2d(8, 16, weights="ternary", alpha=0.67749)
    conv.weight.data = torch.tensor([0.0, 1.0, 0.0, -1.0] * 32).view(16, 8, 1, 1)  # half of 128 are zeros
    table = worked(score(conv, "O3", input_size=(8, 4, 4)).layers.iloc[0])
    assert list(table["numbers"]) == ["128 / 32 + 64 / 32 + 1 / 2", "64 × 16 / 32 + 256 / 2", "64 × 16 − 256"]
    assert list(table["count"]) == [6.5, 160, 768]


def test_a_layer_without_weights_has_no_such_rule():
    (row,) = score(nn.ReLU(), input_size=(3, 4, 4)).layers.iloc
    with pytest.raises(StudyError, match="'ReLU' has no weights"):
        worked(row)


def test_what_multiplies_saves_most_when_it_comes_first():
    """A cost of 100 that "half" halves and "tenth" divides by ten: 50 + 45 or 90 + 5."""
    asked = []

    def cost(taken):
        asked.append(taken)
        return 100 / (2 if "half" in taken else 1) / (10 if "tenth" in taken else 1)

    table = savings_by_order(cost, ["half", "tenth"])
    assert table.loc["half, tenth"].to_dict() == {"half": 50, "tenth": 45}
    assert table.loc["tenth, half"].to_dict() == {"half": 5, "tenth": 90}
    assert table.loc["mean"].to_dict() == {"half": 27.5, "tenth": 67.5}
    assert len(asked) == len(set(asked)) == 4


def test_the_official_counter_adds_bias_and_whole_sums():
    """By hand at O3: 16 channels of 4x4, so SE sums 15 * 16 and the pool as many, halves each."""
    model = nn.Sequential(SqueezeExcite(16, 4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))
    table = official_differences(_at(model), "O3")
    bias, linear, dense, sums = table[["params", "flops"]].to_numpy().tolist()
    assert bias == [10 / 2, 10]
    assert linear == dense == [0, 0]
    assert sums == [0, 15 * 16 / 2 + 15 * 16 / 2]
    assert table["score"].iloc[0] == 5 / 36.5e6 + 10 / 10.49e9


def test_a_ternary_layer_cannot_take_the_scales_of_the_norm_behind_it():
    """16 channels have a scale each, of which the layer's one is counted; at O2 norms are counted whole."""
    model = _at(nn.Sequential(TernaryConv2d(16, 16, weights="ternary", alpha=0.6), nn.BatchNorm2d(16)))
    assert [scales_left_out(score(model, level)) for level in ("O0", "O2", "O3")] == [15, 0, 15 / 2]


def _at(model):
    """The layers behind a stem that brings 3 colours to their 16 channels of 4x4."""
    return nn.Sequential(nn.Conv2d(3, 16, 3, stride=8, padding=1, bias=False), *model)


def test_a_linear_layer_with_few_zeros_stays_dense_there_too():
    model = _at(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10, bias=False)))
    with torch.no_grad():
        model[-1].weight[0, 0] = 0.0  # a bitmask is 5 numbers
    assert official_differences(model, "O0").iloc[1].tolist() == [0, 0, 0]


def test_zeros_of_a_linear_layer_pay_at_the_official_counter_only():
    model = _at(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10, bias=False)))
    with torch.no_grad():
        model[-1].weight[:8] = 0.0  # 128 of 160, 32 are left
    table = official_differences(model, "O0")
    before = score(model).layers.set_index("name").iloc[-1]
    assert (before["params"], before["mults"], before["adds"]) == (160, 160, 150)
    after = (160 / 32 + 32, 32, 32 - 10)
    assert table.iloc[1][["params", "flops"]].tolist() == [after[0] - 160, after[1] + after[2] - 310]


@pytest.mark.parametrize(("zeros", "change"), [(5, [0, 0]), (150, [432 / 32 - 150, -150 * 16 * 2])])
def test_a_bitmask_is_taken_for_a_dense_convolution_only_where_it_pays(zeros, change):
    """432 weights at 16 positions: a mask is 13.5 numbers, a zero saves one, 16 products and additions."""
    model = _at(nn.Sequential(nn.AdaptiveAvgPool2d(1)))
    with torch.no_grad():
        model[0].weight.view(-1)[:zeros] = 0.0
    assert official_differences(model, "O0").iloc[2][["params", "flops"]].tolist() == change


def test_zeros_of_a_block_are_weighted_by_its_products():
    """An addition is left for each product with a non-zero weight, less one for each output."""
    counted = score(build_msunet(width=0.125))
    table = ternary_zeros_by_block(counted)
    assert [*table.index] == [f"blocks.{b}" for b in ("0.0", "1.0", "2.0", "2.1", "3.0", "3.1")] + [
        "conv_head"
    ]
    layers = counted.layers.set_index("name")
    parts = layers.loc[[f"blocks.3.1.{part}" for part in ("conv_pw", "conv_pwl.0", "conv_pwl.1")]]
    products, zeros = table.loc["blocks.3.1"]
    assert products == 64 * (32 * 128 + 2 * 64 * 16)  # positions, expand, project in two parts
    assert products * (1 - zeros) == pytest.approx((parts["adds"] + parts["outputs"]).sum())
