"""The GPU's kernels compute what PyTorch computes, and a recorded step is the step.

Without a GPU the kernels run in Triton's interpreter, on a CPU and very small; tests marked ``gpu`` need one.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import os
import subprocess
import sys
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from msunet_core import fast, gpu
from msunet_core.augment import draw_epoch_plan
from msunet_core.graphs import StepGraphs, call_again, capture, ternarized_once
from msunet_core.network import build_msunet
from msunet_core.ternary import binarize, folded_kernel, ternarize, ternary_groups, ternary_scale
from msunet_core.training import Learner

ROOT = Path(__file__).parent.parent
needs_triton = pytest.mark.skipif(
    find_spec("triton") is None, reason="no Triton: it comes with CUDA's PyTorch"
)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Relative to the largest value. FP32: sums of up to some thousand terms in another order. FP16: 11 bits.
BOUNDS = {torch.float32: 1e-5, torch.float16: 1e-3}
dtypes = pytest.mark.parametrize("dtype", BOUNDS)


def deviation(ours: Tensor, exact: Tensor) -> float:
    exact = exact.detach().cpu().double()
    worst = (ours.detach().cpu().double() - exact).abs().max()
    return (worst / exact.abs().max().clamp(min=1e-30)).item()


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)
    return values.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else values


def leaves(*tensors: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Leaves of two graphs: the tensors themselves, and their values in FP64 on the CPU."""
    exact = [tensor.detach().cpu().double().requires_grad_() for tensor in tensors]
    return [tensor.requires_grad_() for tensor in tensors], exact


def count_calls(monkeypatch, *names: str) -> Counter:
    """How often functions of ``gpu`` are called from now on."""
    used: Counter = Counter()

    def counted(name: str):
        function = getattr(gpu, name)

        def call(*arguments):
            used[name] += 1
            return function(*arguments)

        return call

    for name in names:
        monkeypatch.setattr(gpu, name, counted(name))
    return used


# --- the kernels ------------------------------------------------------------------------------------------


@needs_triton
@dtypes
@pytest.mark.parametrize(
    "family",
    [
        "ternary weights",
        "batch norm",
        pytest.param("depthwise convolution", marks=pytest.mark.slow),  # Triton's interpreter is
    ],
)
def test_the_check_before_first_use_passes(family, dtype):
    pairs = gpu.CHECKS[family](DEVICE, dtype)
    assert max(deviation(ours, plain) for ours, plain in pairs) < BOUNDS[dtype]


LAYERS = {"one chunk": (8, 12), "one element": (1, 1), "chunks": (90, 100), "a full chunk": (64, 64)}


def weights_of_layers(dtype: torch.dtype) -> list[Tensor]:
    found = [0.3 + randn(*shape, 1, 1, seed=i) for i, shape in enumerate(LAYERS.values())]
    found.append(
        torch.full((6, 5, 1, 1), 0.1, device=DEVICE)
    )  # no FP32 number: its mean is off by a rounding
    return [weight.to(dtype) for weight in found]


@needs_triton
@dtypes
@pytest.mark.parametrize("alpha", [0.0, 0.67749, 1e6, -1.0])
def test_fused_ternary_weights_are_those_of_each_layer(alpha, dtype):
    weights = weights_of_layers(dtype)
    table = gpu.TernaryTable(weights, [1] * len(weights))
    table.set_alphas([alpha] * len(weights))
    folded, signs, scales = table.fold(weights)
    plain = [binarize(w) if alpha < 0 else ternarize(w, alpha) for w in weights]
    for part, expected in zip(signs.split(table.sizes), plain, strict=True):
        # No weight lies within a rounding of its threshold here; else one might fall on its other side.
        assert torch.equal(part.float(), expected.flatten())
    for scale, expected in zip(scales, plain, strict=True):
        assert scale.item() == pytest.approx(ternary_scale(expected).item(), rel=2e-7)  # FP32 rounding
    expected = torch.cat([(s * ternary_scale(s)).to(dtype).flatten() for s in plain])
    assert deviation(folded, expected) <= torch.finfo(dtype).eps


@needs_triton
@dtypes
def test_fused_ternary_weights_pass_gradients_straight_through(dtype):
    weights = [randn(6, 10, 1, 1, seed=seed, dtype=dtype).requires_grad_() for seed in range(3)]
    table = gpu.TernaryTable(weights, [1, 2])
    table.set_alphas([0.5] * 3)
    folded = gpu.fold_all(table, weights)
    assert [tuple(kernel.shape) for kernel in folded] == [(6, 10, 1, 1), (12, 10, 1, 1)]
    grads = [randn(*kernel.shape, seed=9, dtype=dtype) for kernel in folded]
    torch.autograd.backward(folded, grads)
    for weight, grad in zip(weights, [grads[0], *grads[1].split(6)], strict=True):
        scale = ternary_scale(ternarize(weight, 0.5))
        assert weight.grad.dtype == dtype
        assert deviation(weight.grad, grad.float() * scale) < 2 * torch.finfo(dtype).eps


@needs_triton
@dtypes
@pytest.mark.parametrize("act", [None, nn.ReLU(), nn.SiLU()])
@pytest.mark.parametrize(
    ("shape", "with_skip"), [((2, 1, 1, 1), True), ((3, 70, 5, 7), True), ((1, 16, 31, 9), False)]
)
def test_norm_and_activation_equal_the_plain_form(shape, with_skip, act, dtype, monkeypatch):
    monkeypatch.setattr(gpu, "STRIPS", 3)  # so that a strip has several tiles
    norm = nn.BatchNorm2d(shape[1])
    nn.init.uniform_(norm.weight, 0.5, 2.0)
    nn.init.uniform_(norm.bias, -1.0, 1.0)
    exact_norm, norm = copy.deepcopy(norm).double(), norm.to(DEVICE)
    # Far from zero, where a variance by E[x^2] - E[x]^2 would lose its digits.
    inputs = 10 + randn(*shape), randn(*shape, seed=1)
    given, exact = leaves(*(x.to(dtype).contiguous(memory_format=torch.channels_last) for x in inputs))
    y = gpu.norm_act(norm, fast.ACTS[type(act)], given[0], given[1] if with_skip else None)
    z = exact_norm(exact[0])
    z = (z if act is None else act(z)) + (exact[1] if with_skip else 0)
    dy = randn(*shape, seed=2, dtype=dtype)
    y.backward(dy)
    z.backward(dy.cpu().double())
    pairs = [(y, z), (given[0].grad, exact[0].grad)]
    pairs += [(a.grad, b.grad) for a, b in zip(norm.parameters(), exact_norm.parameters(), strict=True)]
    pairs += zip(norm.buffers(), exact_norm.buffers(), strict=True)
    if with_skip:
        pairs.append((given[1].grad, exact[1].grad))
    if shape[0] * shape[2] * shape[3] == 2:
        pairs[1:3] = []  # of two values a channel's gradient is 0 but for rounding
    # A mean of 10 standard deviations costs a digit; in FP16 it costs the input three bits before we see it.
    assert max(deviation(ours, plain) for ours, plain in pairs) < 10 * BOUNDS[dtype]


@needs_triton
@pytest.mark.parametrize("act", [0, 1, 2])
def test_a_nan_is_not_lost_in_an_activation(act):
    x = randn(2, 4, 3, 3)
    x[0, 1] = torch.nan
    y = gpu.norm_act(nn.BatchNorm2d(4).to(DEVICE), act, x)
    assert y.isnan().any(dim=(0, 2, 3)).tolist() == [False, True, False, False]


@needs_triton
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(
    ("kernel", "channels", "size", "dtype"),
    [
        (3, 70, (9, 4), torch.float32),
        (3, 20, (9, 4), torch.float16),
        (5, 20, (4, 6), torch.float16),
        (7, 20, (2, 5), torch.float32),
    ],
)
def test_depthwise_convolution_equals_the_plain_form(kernel, channels, size, stride, dtype):
    inputs = randn(2, channels, *size, dtype=dtype), randn(channels - 3, 1, kernel, kernel, dtype=dtype)
    inputs += (randn(3, 1, 3, 3, seed=2, dtype=dtype),)
    (x, *weights), exact = leaves(*inputs)
    y = gpu.depthwise(x, stride, weights)
    parts = zip(exact[0].split([channels - 3, 3], 1), exact[1:], strict=True)
    z = torch.cat([F.conv2d(p, w, None, stride, w.shape[-1] // 2, groups=len(w)) for p, w in parts], 1)
    dy = randn(*y.shape, seed=3, dtype=dtype)
    y.backward(dy)
    z.backward(dy.cpu().double())
    pairs = [(y, z), *((a.grad, b.grad) for a, b in zip((x, *weights), exact, strict=True))]
    assert max(deviation(ours, plain) for ours, plain in pairs) < BOUNDS[dtype]


@needs_triton
@pytest.mark.slow
def test_a_network_of_fused_kernels_computes_what_the_plain_one_does(monkeypatch):
    monkeypatch.setattr(fast, "_serves_on_gpu", lambda family, x, *modules: not fast.switched_off())
    monkeypatch.setattr(fast, "_serves", lambda *_: False)  # not those of a CPU
    monkeypatch.setattr(gpu, "depthwise_pays", lambda *_: True)
    used = count_calls(monkeypatch, "norm_act", "depthwise")
    x, found = randn(2, 3, 8, 8), []
    for plain in (False, True):
        torch.manual_seed(0)
        model = build_msunet(width=0.0625, num_classes=5).to(DEVICE)
        with fast.plain() if plain else contextlib.nullcontext():
            y = model(x)
            F.cross_entropy(y, torch.arange(2, device=DEVICE)).backward()
        found.append([y, model.bn1.running_var, *(p.grad for p in model.parameters())])
        # 2 of stem and head, 2 and 5 times 3 of the blocks; a depthwise convolution in each block.
        assert used == {"norm_act": 19, "depthwise": 6}, "the plain form counted, too" if plain else used
    # A value near a ReLU's kink may fall on its other side, so the norm of the difference, not its largest.
    for ours, exact in zip(*found, strict=True):
        assert (ours - exact).norm() < 1e-3 * exact.norm() + 1e-6


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from msunet_core import triton_kernels

CONSTANTS = {"BLOCK": 4096, "PARTS": 512, "STRIPS": 512, "ACT": 2, "HAS_SKIP": True, "K": 5, "STRIDE": 2}
INTEGERS = {"chunks": "*i32", "layers": "*i32", "counts": "*i32", "signs": "*i8"}
FP32 = "moments affine sums parts running_mean running_var alphas factors scales".split()
for name, kernel in vars(triton_kernels).items():
    if name.startswith("_") or not hasattr(kernel, "arg_names"):
        continue
    pixels, channels = (32, 64) if name.startswith("depthwise") else (64, 64)
    constants = CONSTANTS | {"BLOCK_P": pixels, "BLOCK_C": 16 if name == "norm_affine" else channels}
    signature = {}
    for argument in kernel.arg_names:
        if argument in constants:
            signature[argument] = "constexpr"
        elif argument in INTEGERS:
            signature[argument] = INTEGERS[argument]
        elif argument in FP32 or (name == "norm_affine" and argument in ("weight", "bias")):
            signature[argument] = "*fp32"
        elif argument in "x y dy dx skip weight flat folded grads result".split():
            signature[argument] = "*fp16"
        else:
            signature[argument] = "fp32" if argument in ("momentum", "eps") else "i32"
    given = {(kernel.arg_names.index(n),): v for n, v in constants.items() if n in kernel.arg_names}
    source = ASTSource(kernel, signature, given)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8})
    print(name, len(made.asm["cubin"]) > 0)
"""


@pytest.mark.slow
def test_every_kernel_compiles_for_an_h100(tmp_path):
    pytest.importorskip("triton.backends.nvidia")
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], env=environment, cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.splitlines()
    assert len(lines) == 12 and all(line.endswith(" True") for line in lines), lines


# --- the check before first use ---------------------------------------------------------------------------


def wrong(device, dtype):
    return [(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.1], dtype=torch.float64))]


def failing(device, dtype):
    raise RuntimeError("no such instruction\nand more")


def lost(device, dtype):
    return [(torch.tensor([torch.nan]), torch.tensor([1.0], dtype=torch.float64))]


@pytest.mark.parametrize(
    ("check", "message"),
    [(wrong, "off by 0.0476"), (failing, "RuntimeError: no such instruction"), (lost, "off by nan")],
)
def test_kernels_that_fail_or_disagree_are_not_used_and_that_is_said_once(
    check, message, monkeypatch, caplog
):
    monkeypatch.setitem(gpu.CHECKS, "batch norm", check)
    monkeypatch.setattr(gpu, "_works", {})
    with caplog.at_level(logging.WARNING):
        assert [gpu.works("batch norm", DEVICE) for _ in range(3)] == [False] * 3
    assert len(caplog.messages) == 1 and message in caplog.messages[0]
    assert "\n" not in caplog.messages[0]


# --- recorded steps ---------------------------------------------------------------------------------------


SMALL = {"image_sizes": (8,) * 3}


def steps_of(learner: Learner, images, epochs: int = 2, device: str = "cpu", **choices) -> list[float]:
    """Train some epochs of 6 steps; returns the losses."""
    choices = {"cutmix_probability": 0.5, **choices}
    pictures, labels = images.train_images.to(device), images.train_labels.to(device)
    losses = []
    for epoch in range(epochs):
        learner.begin_epoch(epoch)
        plan = draw_epoch_plan(len(pictures), 4, seed=1, stage="train", epoch=epoch, **choices).to(device)
        losses += [learner.step(pictures, labels, plan.step(i)) for i in range(plan.steps)]
    return [loss.item() for loss in losses]


@pytest.mark.parametrize("level", ["O0", "O2"])
def test_recorded_steps_are_the_steps_to_the_bit(images, new_network, recipe, level):
    config = recipe(opt_level=level, pruner="V3", schedule="cosine", **SMALL)
    eager, recorded = Learner(new_network(), config), Learner(new_network(), config)
    recorded.graphs = StepGraphs(call_again)
    losses = steps_of(eager, images), steps_of(recorded, images)
    assert losses[0] == losses[1]
    kinds = [key[-1] for key in recorded.graphs.recorded]
    assert sorted(kinds) == [False, True]  # both were replayed: neither test is of eager steps alone
    for (name, ours), theirs in zip(recorded.state()[0].items(), eager.state()[0].values(), strict=True):
        assert torch.equal(ours, theirs), name


def test_another_image_size_or_alpha_is_recorded_anew(images, new_network, recipe):
    config = recipe(image_sizes=(8, 8, 12), alpha_start=0, alpha_end=3)
    eager, recorded = Learner(new_network(), config), Learner(new_network(), config)
    recorded.graphs = StepGraphs(call_again)
    assert steps_of(recorded, images, 3) == steps_of(eager, images, 3)
    assert len(recorded.graphs.seen) > 2 >= len(recorded.graphs.recorded)


def test_a_step_that_cannot_be_recorded_runs_launch_by_launch(images, new_network, recipe, caplog):
    def breaks_halfway(run):
        run_step = learner.scaler.update
        learner.scaler.update = lambda: (_ for _ in ()).throw(RuntimeError("operation not permitted"))
        kept = copy.deepcopy(learner.state())  # a capture launches nothing, so nothing changes
        try:
            run()
        finally:
            learner.scaler.update = run_step
            learner.load(*kept)

    config = recipe(opt_level="O2", **SMALL)
    eager, learner = Learner(new_network(), config), Learner(new_network(), config)
    learner.graphs = StepGraphs(breaks_halfway)
    with caplog.at_level(logging.WARNING):
        losses = steps_of(learner, images)
    assert losses == steps_of(eager, images)
    assert len(caplog.messages) == 1 and "operation not permitted" in caplog.messages[0]


# --- on a GPU ---------------------------------------------------------------------------------------------


@pytest.fixture
def trained_on_gpu(images, new_network, recipe):
    def train(level: str, record, **changes) -> tuple[list[float], Learner]:
        learner = Learner(new_network().cuda(), recipe(opt_level=level, **changes))
        learner.graphs = StepGraphs(record)
        return steps_of(learner, images, 3, "cuda"), learner

    return train


@pytest.mark.gpu
def test_every_family_is_used_on_this_gpu():
    assert {family: gpu.works(family, torch.device("cuda", 0)) for family in gpu.CHECKS} == dict.fromkeys(
        gpu.CHECKS, True
    )


@pytest.mark.gpu
@pytest.mark.parametrize("level", ["O0", "O2"])
def test_replayed_graphs_train_as_eager_steps_do(trained_on_gpu, level):
    eager, _ = trained_on_gpu(level, None, pruner="V3")
    replayed, learner = trained_on_gpu(level, capture, pruner="V3")
    assert learner.graphs.record is capture and len(learner.graphs.recorded) == 2
    # cuDNN may choose other algorithms under its own timing; the rate is FP32 instead of FP64. Some steps on,
    # a ternary weight may have crossed its threshold in one of the two.
    assert replayed[:4] == pytest.approx(eager[:4], rel=1e-2)
    assert replayed == pytest.approx(eager, rel=0.1)


@pytest.mark.gpu
@pytest.mark.parametrize("level", ["O0", "O2"])
def test_fused_kernels_train_as_plain_ones_do(trained_on_gpu, level):
    fused, _ = trained_on_gpu(level, capture)
    with fast.plain():
        plain, _ = trained_on_gpu(level, None)
    # Roundings differ, and with them single ternary weights.
    assert fused[:4] == pytest.approx(plain[:4], rel=1e-2)
    assert fused == pytest.approx(plain, rel=0.1)


@pytest.mark.gpu
@pytest.mark.parametrize("level", ["O0", "O2"])
@pytest.mark.parametrize("record", [capture, None])
def test_no_step_waits_for_the_device(images, new_network, recipe, level, record):
    learner = Learner(new_network().cuda(), recipe(opt_level=level, pruner="V3"))
    learner.graphs = StepGraphs(record)
    steps_of(learner, images, 3, "cuda")  # checks, timings and captures may wait, each once
    pictures, labels = images.train_images.cuda(), images.train_labels.cuda()
    plan = draw_epoch_plan(len(pictures), 4, seed=1, stage="train", epoch=9, cutmix_probability=0.5).to(
        "cuda"
    )
    assert 0 < plan.use_cutmix.sum() < plan.steps
    torch.cuda.set_sync_debug_mode("error")
    try:
        for i in range(plan.steps):
            learner.step(pictures, labels, plan.step(i))
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_the_network_uses_the_fused_kernels_and_the_switch_turns_them_off(monkeypatch):
    model = build_msunet(width=0.25).cuda().half()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.float()
    monkeypatch.setattr(gpu, "depthwise_pays", lambda *_: True)
    used = count_calls(monkeypatch, "norm_act", "depthwise", "fold_all")
    x = torch.randn(8, 3, 32, 32, device="cuda").half().contiguous(memory_format=torch.channels_last)
    with ternarized_once(model):
        model(x).sum().backward()
    assert used == {"norm_act": 19, "depthwise": 6, "fold_all": 1}
    with fast.plain(), ternarized_once(model):
        model(x).sum().backward()
    assert used == {"norm_act": 19, "depthwise": 6, "fold_all": 1}


@pytest.mark.gpu
def test_alpha_reaches_a_recorded_graph(images, new_network, recipe):
    learner = Learner(new_network().cuda(), recipe(opt_level="O2", alpha_start=0, alpha_end=3))
    steps_of(learner, images, 3, "cuda")
    assert len(learner.graphs.seen) == 2  # two kinds, though alpha changed twice
    groups = ternary_groups(learner.model)
    with ternarized_once(learner.model):
        found = [folded_kernel(layers) for layers in groups]
    for layers, kernel in zip(groups, found, strict=True):
        plain = torch.cat([layer.signs() for layer in layers])
        assert ((kernel != 0) == (plain != 0)).float().mean() > 0.999


@pytest.mark.gpu
def test_timing_a_depthwise_convolution_gives_an_answer_and_no_gradient():
    conv = nn.Conv2d(64, 64, 3, padding=1, groups=64, bias=False).cuda().half()
    conv = conv.to(memory_format=torch.channels_last)
    x = torch.randn(4, 64, 16, 16, device="cuda").half().contiguous(memory_format=torch.channels_last)
    assert gpu.depthwise_pays(conv, x.requires_grad_(), 1, [conv.weight]) in (True, False)
    assert conv.weight.grad is None and x.grad is None
