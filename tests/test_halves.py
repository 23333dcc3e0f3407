"""What FP16 does to a network: dtypes by level, weights moved across alpha, errors by layer."""

from __future__ import annotations

import copy

import pytest
import torch

from msunet_core.measure.halves import OUTPUTS, crossings, dtypes_by_level, layer_errors, rounded
from msunet_core.model.precision import apply_opt_level
from msunet_core.model.ternary import ternary_layers


def test_each_level_differs_from_the_next_in_what_specification_8_says(new_network):
    network = new_network()
    table = dtypes_by_level(network)
    dtypes = table.drop(columns="bytes")
    assert list(table.index) == ["O0", "O1", "O2", "O3"]
    assert set(dtypes.loc["O0"]) == {"FP32"}
    assert [*dtypes.columns[dtypes.loc["O1"] == "FP16"]] == ["out of a convolution", "out of a batch norm"]
    assert [*dtypes.columns[dtypes.loc["O2"] == "FP32"]] == ["batch norm", "class scores"]
    assert [*dtypes.columns[dtypes.loc["O3"] == "FP32"]] == ["class scores"]
    assert table.loc["O3", "bytes"] * 2 == table.loc["O1", "bytes"] == table.loc["O0", "bytes"]
    assert table.loc["O3", "bytes"] < table.loc["O2", "bytes"] < table.loc["O0", "bytes"]
    assert network.conv_stem.weight.dtype == torch.float32


def test_a_weight_below_the_threshold_that_rounds_to_above_it_is_found(new_network):
    """Of (1, -1, 0.6639, -0.6639) the small are at 0.6774 deviations, rounded at 0.6775; alpha between."""
    network = new_network(alpha=0.67749)
    for layer in ternary_layers(network).values():
        layer.weight.data.zero_()
        layer.weight.data.view(-1)[:2] = torch.tensor([1.0, -1.0])  # far from any threshold
    layer = network.conv_head
    pattern = torch.tensor([1.0, -1.0, 0.6639, -0.6639])
    layer.weight.data = pattern.repeat(layer.weight.numel() // 4).view_as(layer.weight)
    # Many copies have the deviation of n, not n - 1, values: a threshold a little lower.
    layer.alpha = 0.6639 / layer.weight.double().std().item() + 5e-5
    found = crossings(network)
    assert set(found["layer"]) == {"conv_head"} and len(found) == layer.weight.numel() // 2
    assert (found["z"].abs() < found["alpha"]).all() and (found["z_half"].abs() > found["alpha"]).all()
    assert set(found["half"]) == {0.6640625, -0.6640625}
    assert (found["t"] == 0).all() and (found["t_half"] == found["half"] / 0.6640625).all()


def test_weights_that_fp16_holds_exactly_cross_nothing(new_network):
    network = new_network()
    for layer in ternary_layers(network).values():
        layer.weight.data = layer.weight.data.half().float()
    found = crossings(network)
    assert len(found) == 0 and "z_half" in found


@pytest.mark.parametrize("weights", ["ternary", "binary"])
def test_what_crosses_is_what_differs_at_o3_whatever_the_size_of_w(new_network, weights):
    network = new_network(weights=weights, width=0.5)
    with torch.no_grad():
        network.conv_head.weight.mul_(2.0**20)
    half = ternary_layers(apply_opt_level(copy.deepcopy(network), "O3"))
    differing = [
        (name, index)
        for name, layer in ternary_layers(network).items()
        for index in (layer.signs() != half[name].signs()).flatten().nonzero().flatten().tolist()
    ]
    found = crossings(network)
    assert list(zip(found["layer"], found["index"], strict=True)) == differing
    for name, crossed in found.groupby("layer"):  # rounded, and all of a layer rescaled by one number
        ratio = crossed["half"] / crossed["weight"]
        assert weights == "binary" or ratio.max() <= ratio.min() * (1 + 2**-10), name
    assert rounded(network).conv_head.weight.isfinite().all() and not (found["half"].abs() > 65504).any()
    assert weights == "binary" or differing


def test_the_error_of_a_layer_is_in_parts_of_the_spread_of_its_output(new_network, images):
    network = new_network().eval()
    larger = copy.deepcopy(network)
    larger.conv_stem.weight.data *= 1.25  # an output of 5/4 is off by a quarter of its own spread
    same = layer_errors(network, network, images.test_images)
    assert len(same) == 9 and (same == 0).all()
    errors = layer_errors(network, larger, images.test_images)
    torch.testing.assert_close(errors["conv_stem"], 0.25, rtol=1e-5, atol=0)
    assert "blocks.3.1" in errors and "blocks.3" not in errors, OUTPUTS


def test_networks_at_different_levels_are_compared_and_left_as_they_are(new_network, images):
    network = new_network().eval()
    half = apply_opt_level(copy.deepcopy(network), "O3")
    errors = layer_errors(network, half, images.test_images)
    assert 2.0**-14 < errors["conv_stem"] < 2.0**-9  # some units in the last of 11 bits
    assert half.opt_level == "O3" and not network.conv_stem._forward_hooks


def test_a_rounded_copy_holds_what_fp16_holds_and_computes_in_fp32(new_network):
    network = new_network()
    copied = rounded(network)
    weight, theirs = network.conv_stem.weight, copied.conv_stem.weight
    assert theirs.dtype == torch.float32 and not torch.equal(theirs, weight)
    assert torch.equal(theirs, weight.half().float()) and copied.bn1.num_batches_tracked == 0
    assert len(crossings(copied)) == 0
