"""The network is the published one: names, counts, shapes, initial weights, and timm's outputs."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from msunet_core.errors import StudyError
from msunet_core.fast import accelerate
from msunet_core.model.network import MixedConv2d, build_msunet, split_channels
from msunet_core.model.ternary import TernaryConv2d


def words(text: str) -> list[str]:
    return text.split()


# Weights of the published v3 checkpoint, typed from specification §2.
CONVS = words("""
    conv_stem
    blocks.0.0.conv_dw  blocks.0.0.conv_pw
    blocks.1.0.conv_pw.0  blocks.1.0.conv_pw.1
    blocks.1.0.conv_dw
    blocks.1.0.conv_pwl.0  blocks.1.0.conv_pwl.1
    blocks.2.0.conv_pw
    blocks.2.0.conv_dw.0  blocks.2.0.conv_dw.1  blocks.2.0.conv_dw.2
    blocks.2.0.conv_pwl
    blocks.2.1.conv_pw.0  blocks.2.1.conv_pw.1
    blocks.2.1.conv_dw.0  blocks.2.1.conv_dw.1
    blocks.2.1.conv_pwl.0  blocks.2.1.conv_pwl.1
    blocks.3.0.conv_pw
    blocks.3.0.conv_dw.0  blocks.3.0.conv_dw.1  blocks.3.0.conv_dw.2
    blocks.3.0.conv_pwl.0  blocks.3.0.conv_pwl.1
    blocks.3.1.conv_pw
    blocks.3.1.conv_dw.0  blocks.3.1.conv_dw.1
    blocks.3.1.conv_pwl.0  blocks.3.1.conv_pwl.1
    conv_head
""")
WITH_BIAS = words("""
    blocks.2.0.se.conv_reduce  blocks.2.0.se.conv_expand
    blocks.2.1.se.conv_reduce  blocks.2.1.se.conv_expand
    blocks.3.0.se.conv_reduce  blocks.3.0.se.conv_expand
    blocks.3.1.se.conv_reduce  blocks.3.1.se.conv_expand
    classifier
""")
BATCH_NORMS = words("""
    bn1  bn2
    blocks.0.0.bn1  blocks.0.0.bn2
    blocks.1.0.bn1  blocks.1.0.bn2  blocks.1.0.bn3
    blocks.2.0.bn1  blocks.2.0.bn2  blocks.2.0.bn3
    blocks.2.1.bn1  blocks.2.1.bn2  blocks.2.1.bn3
    blocks.3.0.bn1  blocks.3.0.bn2  blocks.3.0.bn3
    blocks.3.1.bn1  blocks.3.1.bn2  blocks.3.1.bn3
""")
PUBLISHED_NAMES = (
    [f"{name}.weight" for name in CONVS]
    + [f"{name}.{part}" for name in WITH_BIAS for part in ("weight", "bias")]
    + [
        f"{name}.{part}"
        for name in BATCH_NORMS
        for part in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    ]
)


@pytest.mark.parametrize("weights", ["ternary", "binary", "float"])
@pytest.mark.parametrize("variant", ["v1", "v2", "v3"])
def test_state_dict_has_the_published_names(variant, weights):
    names = list(build_msunet(variant, weights=weights).state_dict())
    assert len(names) == 144
    assert sorted(names) == sorted(PUBLISHED_NAMES)


@pytest.mark.parametrize(("variant", "count"), [("v1", 1_545_380), ("v2", 1_545_380), ("v3", 1_208_300)])
def test_dense_parameter_count(variant, count):
    assert sum(parameter.numel() for parameter in build_msunet(variant).parameters()) == count


# Kernel shapes, by hand from the table of specification §2.
@pytest.mark.parametrize(
    ("variant", "name", "shape"),
    [
        ("v3", "blocks.1.0.conv_pw.0", (192, 32, 1, 1)),  # 64 * 6 split in 2
        ("v3", "blocks.2.0.conv_dw.0", (108, 1, 3, 3)),  # 320 in 3, the first takes the remainder
        ("v3", "blocks.2.0.conv_dw.2", (106, 1, 7, 7)),
        ("v1", "blocks.2.0.conv_dw.1", (128, 1, 5, 5)),  # 384 in 3
        ("v3", "blocks.2.0.se.conv_reduce", (32, 320, 1, 1)),  # 0.5 of the 64 input channels
        ("v3", "blocks.2.1.se.conv_reduce", (64, 768, 1, 1)),
        ("v3", "blocks.3.0.se.conv_reduce", (32, 640, 1, 1)),
        ("v3", "blocks.3.1.se.conv_expand", (1024, 64, 1, 1)),
        ("v1", "blocks.3.1.se.conv_expand", (1536, 64, 1, 1)),
        ("v3", "blocks.3.0.conv_pwl.1", (128, 320, 1, 1)),
        ("v3", "conv_head", (256, 256, 1, 1)),
    ],
)
def test_kernel_shapes_follow_the_table(variant, name, shape):
    assert tuple(build_msunet(variant).get_submodule(name).weight.shape) == shape


@pytest.mark.parametrize(
    ("channels", "groups", "parts"), [(320, 3, [108, 106, 106]), (7, 2, [4, 3]), (9, 1, [9])]
)
def test_channels_split_near_equally_with_the_remainder_first(channels, groups, parts):
    assert split_channels(channels, groups) == parts


@pytest.mark.parametrize("weights", ["ternary", "binary", "float"])
@pytest.mark.parametrize(("width", "num_classes"), [(0.0625, 3), (0.25, 100), (0.7, 10), (1.0, 1)])
def test_any_width_gives_one_score_for_each_class(width, num_classes, weights):
    model = build_msunet("v3", weights=weights, width=width, num_classes=num_classes).eval()
    with torch.no_grad():
        scores = model(torch.randn(2, 3, 32, 32))
    assert scores.shape == (2, num_classes)
    assert torch.isfinite(scores).all()


def test_resolution_halves_twice():
    model = build_msunet("v3", width=0.25).eval()
    seen = []
    for stage in model.blocks:
        stage.register_forward_hook(lambda module, args, output: seen.append(output.shape[2]))
    with torch.no_grad():
        model(torch.randn(1, 3, 32, 32))
    assert seen == [32, 32, 16, 8]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"variant": "v4"}, "'v4'"),
        ({"weights": "ternery"}, "did you mean 'ternary'"),
        ({"width": 0.0}, "0.0"),
        ({"width": 4.01}, "4.01"),
        ({"width": math.nan}, "nan"),
        ({"alpha": -1.0}, "-1.0"),
        ({"num_classes": 0}, "num_classes 0"),
    ],
)
def test_bad_arguments_are_named(arguments, said):
    with pytest.raises(StudyError, match=said):
        build_msunet(**arguments)


def test_initial_weights_are_drawn_as_published():
    torch.manual_seed(0)
    model = build_msunet("v3")
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            k = module.kernel_size[0]
            std = math.sqrt(2 / (k * k * module.out_channels))
            count = module.weight.numel()
            # The standard error of a sample std is std / sqrt(2n); of a mean std / sqrt(n). Five of them.
            assert module.weight.std().item() == pytest.approx(std, rel=5 / math.sqrt(2 * count)), name
            assert module.weight.mean().item() == pytest.approx(0, abs=5 * std / math.sqrt(count)), name
            assert module.bias is None or torch.equal(module.bias, torch.zeros_like(module.bias)), name
        elif isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all() and (module.bias == 0).all(), name
            assert (module.eps, module.momentum) == (1e-5, 0.1), name
    bound = 1 / math.sqrt(100)
    weight = model.classifier.weight
    assert 0.99 * bound < weight.abs().max() <= bound  # 25,600 uniform draws come close to the ends
    assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)  # of a uniform distribution
    assert (model.classifier.bias == 0).all()


def mixed_1x1(weights: str) -> MixedConv2d:
    torch.manual_seed(1)
    if weights == "float":
        return MixedConv2d([nn.Conv2d(6, 10, 1, bias=False) for _ in range(2)]).double()
    return MixedConv2d([TernaryConv2d(6, 10, weights=weights, alpha=0.67749) for _ in range(2)]).double()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("weights", ["ternary", "binary", "float"])
def test_one_grouped_convolution_is_the_separate_ones(weights, training):
    separate = mixed_1x1(weights).train(training)
    grouped = accelerate(copy.deepcopy(separate))
    assert type(grouped) is not type(separate)
    x = torch.randn(3, 12, 5, 5, dtype=torch.float64)
    out_grad = torch.randn(3, 20, 5, 5, dtype=torch.float64)
    results = []
    for module in (grouped, separate):
        image = x.clone().requires_grad_()
        output = module(image)
        output.backward(out_grad)
        weight_grads = [conv.weight.grad for conv in module.values() if conv.weight.grad is not None]
        results.append([output.detach(), image.grad, *weight_grads])
    assert len(results[0]) == len(results[1]) == (4 if training or weights == "float" else 2)
    for ours, plain in zip(*results, strict=True):
        # FP64 sums of at most 75 products in another order
        torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "convs",
    [
        [nn.Conv2d(4, 4, 1, bias=False), nn.Conv2d(3, 3, 1, bias=False)],
        [nn.Conv2d(4, 4, k, padding=k // 2, groups=4, bias=False) for k in (3, 5)],
    ],
)
def test_unequal_parts_stay_separate(convs):
    separate = MixedConv2d(convs)
    x = torch.randn(2, sum(conv.in_channels for conv in convs), 6, 6)
    with torch.no_grad():
        assert torch.equal(accelerate(copy.deepcopy(separate))(x), separate(x))


@pytest.mark.parametrize(
    ("stage", "block", "skips"),
    [(0, 0, True), (1, 0, True), (2, 0, False), (2, 1, True), (3, 0, False), (3, 1, True)],
)
def test_skip_is_added_where_stride_is_1_and_channels_agree(stage, block, skips):
    model = build_msunet("v3", width=0.25).eval()
    module = model.blocks[stage][block]
    last = module.bn2 if stage == 0 else module.bn3
    nn.init.zeros_(last.weight)  # now only the skip is left
    with torch.no_grad():
        x = torch.randn(2, input_channels(module), 8, 8)
        y = module(x)
    assert module.has_skip == skips
    assert torch.equal(y, x if skips else torch.zeros_like(y))


def input_channels(block: nn.Module) -> int:
    first = block.conv_pw  # of a depthwise-separable block the second, of as many channels
    return sum(first.in_parts) if isinstance(first, MixedConv2d) else first.in_channels


def test_same_seed_same_network():
    states = []
    for _ in range(2):
        torch.manual_seed(3)
        states.append(build_msunet("v3", width=0.25).state_dict())
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


def test_config_says_how_the_network_was_built():
    model = build_msunet("v2", weights="binary", alpha=0.5, num_classes=10, width=0.25)
    assert model.config == dict(variant="v2", weights="binary", alpha=0.5, num_classes=10, width=0.25)


# --- against timm ----------------------------------------------------------------------------------

# specification §2 in timm's words: k kernels, s stride, e expansion, c channels, se ratio of the
# block's input, a1.1 / p1.1 a 1x1 split in two, nre / nsw ReLU / Swish.
TIMM_BLOCKS = {
    "v3": [
        ["ds_r1_k3_s1_c64_nre"],
        ["ir_r1_k3_s1_e6_c64_a1.1_p1.1_nre"],
        ["ir_r1_k3.5.7_s2_e5_c128_se0.5_nsw", "ir_r1_k3.5_s1_e6_c128_a1.1_p1.1_se0.5_nsw"],
        ["ir_r1_k3.5.7_s2_e5_c256_p1.1_se0.25_nsw", "ir_r1_k3.5_s1_e4_c256_p1.1_se0.25_nsw"],
    ],
    "v1": [
        ["ds_r1_k3_s1_c64_nre"],
        ["ir_r1_k3_s1_e6_c64_a1.1_p1.1_nre"],
        ["ir_r1_k3.5.7_s2_e6_c128_se0.5_nsw", "ir_r1_k3.5_s1_e6_c128_a1.1_p1.1_se0.5_nsw"],
        ["ir_r1_k3.5.7_s2_e6_c256_p1.1_se0.25_nsw", "ir_r1_k3.5_s1_e6_c256_p1.1_se0.25_nsw"],
    ],
}


def timm_msunet(variant: str) -> nn.Module:
    pytest.importorskip("timm", reason="timm is a test dependency: pip install timm")
    from timm.models._efficientnet_builder import decode_arch_def
    from timm.models.efficientnet import EfficientNet

    model = EfficientNet(
        decode_arch_def(TIMM_BLOCKS[variant]),
        num_classes=100,
        num_features=256,
        stem_size=64,
        act_layer=nn.ReLU,
    )
    model.conv_stem.stride = (1, 1)  # timm's stem halves the image, ours keeps its 32x32
    return model


@torch.no_grad()
def randomize(model: nn.Module) -> nn.Module:
    """Everything that a fresh network leaves at 0 or 1 gets a value that shows."""
    torch.manual_seed(5)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0.0, 0.2)
            module.running_var.uniform_(0.5, 1.5)
            module.weight.uniform_(0.7, 1.3)
            module.bias.normal_(0.0, 0.2)
        elif getattr(module, "bias", None) is not None:
            module.bias.normal_(0.0, 0.5)
    return model


@pytest.mark.parametrize("variant", ["v1", "v3"])
def test_timm_gives_the_same_outputs_from_the_same_state_dict(variant):
    theirs = timm_msunet(variant).eval()
    ours = randomize(build_msunet(variant, weights="float")).eval()
    theirs.load_state_dict(ours.state_dict())  # strict: the names are timm's too
    images = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        expected, got = theirs(images), ours(images)
    assert expected.std() > 0.1  # the comparison is about something
    # FP32 through 20 layers with other kernels and memory layout
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_timm_gives_the_same_outputs_from_ternary_kernels():
    """The ternary network is a float one whose 1x1 kernels are sqrt(M) * T."""
    theirs = timm_msunet("v3").eval()
    ours = randomize(build_msunet("v3")).eval()
    state: dict[str, Tensor] = dict(ours.state_dict())
    for name, module in ours.named_modules():
        if isinstance(module, TernaryConv2d):
            state[f"{name}.weight"] = module.kernel().detach()
    theirs.load_state_dict(state)
    images = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        expected, got = theirs(images), ours(images)
    # FP32 through 20 layers, the scale before or after each sum
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
