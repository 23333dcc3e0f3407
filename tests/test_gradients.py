"""The gradients of training are the specification's: derived a second time, compared one by one.

Of the package only its public doors are used. Network, ternary weights and their gradients are written here
from specification §2 and §3 alone, in FP64, with nothing but ``torch.nn.functional``.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
import os

import pytest
import torch
import torch.nn.functional as F
from helpers import can_compile
from torch import Tensor

from msunet_core import ImageData, StageConfig, build_msunet, train
from msunet_core.fast import accelerate

IMAGES = 6
ALPHA = 0.67749  # specification §3, from epoch 400 on
# FP32 and FP64 must agree on the sign of each Z - alpha and of each ReLU's input: a single one that differs
# changes gradients by up to 4e-3, which says nothing of either. So none may lie this near 0. Of FP32's errors
# the largest seen were 6e-7 in Z, and 3e-5 among the millions of inputs of ReLUs.
NEAR_ALPHA = 1e-5
NEAR_KINK = 1e-4
# Of FP64 sums in another order.
EXACT = 1e-10
# Of FP32: dozens of layers, forth and back, of sums of up to 6,144 terms. The largest seen was 2e-5.
FP32 = 1e-4

CASES = [
    ("v1", "ternary", ALPHA),
    ("v2", "ternary", 0.0),
    ("v3", "ternary", ALPHA),
    ("v3", "ternary", 0.0),
    pytest.param(("v3", "binary", ALPHA), marks=pytest.mark.slow),
]

# A constant added to each channel here is taken away by the batch norm after the next 1x1 convolution, and by
# the one after the skip: the gradient is zero, and what is computed is rounding.
WITHOUT_EFFECT = {
    "blocks.0.0.bn2.bias",
    "blocks.1.0.bn3.bias",
    "blocks.2.0.bn3.bias",
    "blocks.2.1.bn3.bias",
    "blocks.3.0.bn3.bias",
    "blocks.3.1.bn3.bias",
}


# ---- the reference, from the specification's text ----------------------------------------------------------


def is_ternary(name: str, parameter: Tensor) -> bool:
    """Every 1x1 convolution but those of squeeze-excitation."""
    return parameter.dim() == 4 and parameter.shape[2:] == (1, 1) and ".se." not in name


def standardised(weight: Tensor) -> Tensor:
    return (weight - weight.mean()) / weight.std(unbiased=True)


def root_m(weight: Tensor, signs: Tensor) -> float:
    fan_in = weight.shape[1] * weight.shape[2] * weight.shape[3]
    return math.sqrt(2 / fan_in * signs.numel() / int(signs.count_nonzero()))


def ternary_signs(weight: Tensor, alpha: float) -> Tensor:
    z = standardised(weight)
    return (z > alpha).to(weight.dtype) - (z < -alpha).to(weight.dtype)


def near_equal(channels: int, parts: int) -> list[int]:
    small = channels // parts
    return [channels - small * (parts - 1)] + [small] * (parts - 1)


class Reference:
    """The network of one state dict; ``leaves`` are its parameters in FP64, K in place of a ternary W."""

    def __init__(self, parameters: dict[str, Tensor], alpha: float):
        self.root_m = {}
        self.leaves = {}
        for name, parameter in parameters.items():
            value = parameter.detach().double().contiguous()
            if is_ternary(name, value):
                signs = ternary_signs(value, alpha)
                self.root_m[name] = root_m(value, signs)
                value = self.root_m[name] * signs
            self.leaves[name] = value.clone().requires_grad_()

    def loss(self, images: Tensor, labels: Tensor, variant: str) -> Tensor:
        return F.cross_entropy(self.scores(images.double(), variant), labels)

    def scores(self, x: Tensor, variant: str, passes: int = 1) -> Tensor:
        """Class scores; ``x`` holds the images of so many passes, each with batch statistics of its own."""
        self.passes = passes
        x = self.norm_relu("bn1", self.conv("conv_stem", x, (3,)))
        skip = x
        x = self.norm_relu("blocks.0.0.bn1", self.depthwise("blocks.0.0.conv_dw", x, (3,), 1))
        x = skip + self.norm("blocks.0.0.bn2", self.conv("blocks.0.0.conv_pw", x, (1,)))

        def block(name, x, kernels, expand, splits, out_channels, stride, act, squeeze):
            skip, inner = x, x.shape[1] * expand
            x = act(f"{name}.bn1", self.conv(f"{name}.conv_pw", x, (1,) * splits[0]))
            assert x.shape[1] == inner, f"{name}: {x.shape[1]} channels inside, {inner} specified"
            x = act(f"{name}.bn2", self.depthwise(f"{name}.conv_dw", x, kernels, stride))
            if squeeze:
                x = self.squeeze_excite(f"{name}.se", x, int(squeeze * skip.shape[1]))
            x = self.norm(f"{name}.bn3", self.conv(f"{name}.conv_pwl", x, (1,) * splits[1]))
            assert x.shape[1] == out_channels, f"{name}: {x.shape[1]} channels out, {out_channels} specified"
            return x + skip if stride == 1 and x.shape[1] == skip.shape[1] else x

        wide = variant in ("v1", "v2")
        relu, swish = self.norm_relu, self.norm_swish
        x = block("blocks.1.0", x, (3,), 6, (2, 2), 64, 1, relu, None)
        x = block("blocks.2.0", x, (3, 5, 7), 6 if wide else 5, (1, 1), 128, 2, swish, 0.5)
        x = block("blocks.2.1", x, (3, 5), 6, (2, 2), 128, 1, swish, 0.5)
        x = block("blocks.3.0", x, (3, 5, 7), 6 if wide else 5, (1, 2), 256, 2, swish, 0.25)
        x = block("blocks.3.1", x, (3, 5), 6 if wide else 4, (1, 2), 256, 1, swish, 0.25)
        x = self.norm_relu("bn2", self.conv("conv_head", x, (1,)))
        return F.linear(x.mean((2, 3)), self.leaves["classifier.weight"], self.leaves["classifier.bias"])

    def norm(self, name: str, x: Tensor) -> Tensor:
        weight, bias = self.leaves[f"{name}.weight"], self.leaves[f"{name}.bias"]
        return torch.cat(
            [
                F.batch_norm(part, None, None, weight, bias, training=True, eps=1e-5)
                for part in x.chunk(self.passes)
            ]
        )

    def norm_swish(self, name: str, x: Tensor) -> Tensor:
        return F.silu(self.norm(name, x))

    def norm_relu(self, name: str, x: Tensor) -> Tensor:
        """Moves the norm's bias, channel by channel, until no input of the ReLU is near 0."""
        x = self.norm(name, x)
        bias = self.leaves[f"{name}.bias"]
        shift = torch.zeros_like(bias)
        while True:
            # As FP32 can hold it: the model gets the same bias.
            shift = (bias.detach() + shift).float().double() - bias.detach()
            near = ((x.detach() + shift[:, None, None]).abs() < NEAR_KINK).any(dim=(0, 2, 3))
            if not near.any():
                bias.data += shift
                return F.relu(x + shift[:, None, None])
            shift[near] += 1e-3

    def conv(self, name: str, x: Tensor, kernels: tuple[int, ...], stride: int = 1, depthwise: bool = False):
        if len(kernels) == 1:
            names, parts = [f"{name}.weight"], [x]
        else:
            names = [f"{name}.{number}.weight" for number in range(len(kernels))]
            parts = x.split(near_equal(x.shape[1], len(kernels)), dim=1)
        outputs = [
            F.conv2d(
                part,
                self.leaves[leaf],
                stride=stride,
                padding=(kernel - 1) // 2,
                groups=part.shape[1] if depthwise else 1,
            )
            for leaf, part, kernel in zip(names, parts, kernels, strict=True)
        ]
        return torch.cat(outputs, dim=1)

    def depthwise(self, name: str, x: Tensor, kernels: tuple[int, ...], stride: int) -> Tensor:
        return self.conv(name, x, kernels, stride, depthwise=True)

    def squeeze_excite(self, name: str, x: Tensor, reduced: int) -> Tensor:
        gate = x.mean((2, 3), keepdim=True)
        weights = self.leaves
        gate = F.silu(
            F.conv2d(gate, weights[f"{name}.conv_reduce.weight"], weights[f"{name}.conv_reduce.bias"])
        )
        assert gate.shape[1] == reduced, f"{name}: reduced to {gate.shape[1]} channels, {reduced} specified"
        gate = F.conv2d(gate, weights[f"{name}.conv_expand.weight"], weights[f"{name}.conv_expand.bias"])
        return x * torch.sigmoid(gate)


# ---- what is compared --------------------------------------------------------------------------------------


def leave_first_values(model: torch.nn.Module, alpha: float) -> None:
    """Moves W off mean 0 and norms off 1 and 0, which hide terms of a gradient, and every Z off alpha."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if is_ternary(name, parameter):
                spread = parameter.std()
                parameter += 0.3 * spread
                while (near := (standardised(parameter.double()).abs() - alpha).abs() < NEAR_ALPHA).any():
                    parameter[near] += 1e-3 * spread
            elif parameter.dim() == 1:
                parameter += 0.2 * torch.randn_like(parameter)


def take_moved_biases(parameters: dict[str, Tensor], reference: Reference) -> None:
    """Gives the network the biases that its reference moved."""
    for name, leaf in reference.leaves.items():
        if leaf.dim() == 1:
            parameters[name].data.copy_(leaf.data)


class Problem:
    """A network in training mode, a batch, and the reference's loss, dL/dK and sqrt(M) by parameter name."""

    def __init__(self, variant: str, weights: str, alpha: float):
        threshold = 0.0 if weights == "binary" else alpha
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.model = build_msunet(variant, weights=weights, alpha=alpha).train()
            leave_first_values(self.model, threshold)
            self.images = torch.randn(IMAGES, 3, 32, 32).contiguous(memory_format=torch.channels_last)
            self.labels = torch.randint(0, 100, (IMAGES,))

        parameters = dict(self.model.named_parameters())
        reference = Reference(parameters, threshold)
        self.loss = reference.loss(self.images, self.labels, variant)
        self.loss.backward()
        self.gradients = {name: leaf.grad for name, leaf in reference.leaves.items()}
        self.root_m = reference.root_m
        take_moved_biases(parameters, reference)

    def step(self, dtype: torch.dtype = torch.float32) -> tuple[float, dict[str, Tensor]]:
        """The package's loss and gradients, of a copy so that no test sees another's."""
        model = copy.deepcopy(self.model).to(dtype)
        if os.environ.get("MSUNET_FAST") != "0":
            accelerate(model)
        loss = F.cross_entropy(model(self.images.to(dtype)), self.labels)
        loss.backward()
        return loss.item(), {name: parameter.grad.double() for name, parameter in model.named_parameters()}

    def compare(self, loss: float, gradients: dict[str, Tensor], tolerance: float) -> None:
        assert loss == pytest.approx(self.loss.item(), rel=tolerance)
        assert_same_gradients(gradients, self.gradients, tolerance)


def assert_same_gradients(
    gradients: dict[str, Tensor], reference: dict[str, Tensor], tolerance: float
) -> None:
    """Each within ``tolerance`` of the norm of the reference's; so are their norms, then."""
    assert gradients.keys() == reference.keys()
    wrong = []
    for name, exact in reference.items():
        ours, scale = gradients[name], exact.norm()
        if name in WITHOUT_EFFECT:
            scale = reference[name.replace("bias", "weight")].norm()
            assert exact.norm() < EXACT * scale, f"{name} has an effect: {exact.norm()}"
        off = (ours - exact).norm() / scale
        if not off <= tolerance:
            wrong.append(f"{name}: norm {ours.norm():.6g}, reference {exact.norm():.6g}, off by {off:.2g}")
    assert not wrong, "\n".join(wrong)


@functools.cache
def problem(*case) -> Problem:
    return Problem(*case)


@pytest.fixture(params=["kernels", "plain"])
def path(request, monkeypatch) -> str:
    if request.param == "plain":
        monkeypatch.setenv("MSUNET_FAST", "0")
    else:
        monkeypatch.delenv("MSUNET_FAST", raising=False)
    return request.param


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_loss_and_every_gradient_are_the_specifications(case, path):
    of_case = problem(*case)
    of_case.compare(*of_case.step(), FP32)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES[:4], ids=lambda case: "-".join(map(str, case)))
def test_without_rounding_they_agree_to_ten_digits(case, monkeypatch):
    monkeypatch.setenv("MSUNET_FAST", "0")
    of_case = problem(*case)
    of_case.compare(*of_case.step(torch.float64), EXACT)


def test_kernels_compute_what_was_compared_as_kernels(monkeypatch):
    """Were both paths one, comparing both would say nothing: their sums differ in the last bits."""
    if not can_compile():
        pytest.skip("no C++ compiler or no x86-64 with AVX2")
    of_case = problem("v3", "ternary", ALPHA)
    monkeypatch.delenv("MSUNET_FAST", raising=False)
    _, with_kernels = of_case.step()
    monkeypatch.setenv("MSUNET_FAST", "0")
    _, plain = of_case.step()
    same = [name for name in plain if torch.equal(plain[name], with_kernels[name])]
    assert len(same) < len(plain) / 2, f"{len(same)} of {len(plain)} gradients are the same bit for bit"


def test_gradient_of_a_ternary_weight_is_that_of_k_and_not_of_t(path):
    """dL/dT is sqrt(M) * dL/dK, at published width a third of it or less: each layer says which it is."""
    of_case = problem("v3", "ternary", ALPHA)
    _, gradients = of_case.step()
    assert len(of_case.root_m) == 18, sorted(of_case.root_m)
    for name, root in of_case.root_m.items():
        of_k = of_case.gradients[name]
        factor = float((gradients[name] * of_k).sum() / of_k.square().sum())
        assert root < 0.5, f"{name}: sqrt(M) is {root}, too near 1 to tell the two apart"
        assert factor == pytest.approx(1, abs=FP32), f"{name}: {factor} of dL/dK; sqrt(M) is {root}"


def test_one_layer_of_six_weights_by_hand(path):
    """Two inputs, three outputs, one pixel.

    The mean of W is 20, the squares of W - 20 sum to 2000, so its unbiased deviation is sqrt(2000 / 5) = 20:

        W = 45   4      Z = 1.25  -0.80      T = 1  -1
            27 -10          0.35  -1.50          0  -1
            33  21          0.65   0.05          0   0

    (By the biased deviation, 18.3, the Z of 33 were 0.71 and its T 1; without the mean, the T of 4 were 0.)
    M = 2 / 2 inputs * 6 weights / 3 nonzeros = 2.

        x = (2, 5)                y = sqrt(2) * T x = sqrt(2) * (-3, -5, 0)
        dL/dy = (1, 10, 100)      dL/dx = sqrt(2) * T' dL/dy = sqrt(2) * (1, -11)

    dL/dK is the product of each dL/dy with each x, and is dL/dW, at the zeros of T too:

            2    5
           20   50
          200  500
    """
    layer = type(build_msunet(width=0.0625).conv_head)(2, 3, weights="ternary", alpha=ALPHA).train()
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([45.0, 4, 27, -10, 33, 21]).view(3, 2, 1, 1))
    x = torch.tensor([2.0, 5]).view(1, 2, 1, 1).requires_grad_()
    y = layer(x)
    y.backward(torch.tensor([1.0, 10, 100]).view(1, 3, 1, 1))

    root = math.sqrt(2)
    torch.testing.assert_close(y.flatten(), torch.tensor([-3 * root, -5 * root, 0]))
    torch.testing.assert_close(x.grad.flatten(), torch.tensor([root, -11 * root]))
    torch.testing.assert_close(layer.weight.grad.flatten(), torch.tensor([2.0, 5, 20, 50, 200, 500]))


# ---- the trainer's own step --------------------------------------------------------------------------------

LABELS = torch.tensor([7, 50, 3, 99, 0, 21])


@pytest.fixture
def six_images() -> ImageData:
    """Noise, in order of redness, by which the images can be told apart."""
    pixels = torch.randint(0, 256, (IMAGES, 32, 32, 3), dtype=torch.uint8)
    pixels = pixels[pixels[..., 0].double().mean((1, 2)).argsort()]
    names = tuple(map(str, range(100)))
    return ImageData(pixels, LABELS, pixels, LABELS, class_names=names, source="test")


def first_step(
    data: ImageData, folder, **changes
) -> tuple[dict[str, Tensor], list[Tensor], dict[str, Tensor]]:
    """Parameters before, the batches that the network saw in training, and the gradients that moved it."""
    recipe = StageConfig(
        epochs=1, batch_size=IMAGES, lr=10.0, warmup_epochs=0, augment=False, alpha=ALPHA, **changes
    )
    model = build_msunet("v3", alpha=ALPHA)
    leave_first_values(model, ALPHA)
    parameters = dict(model.named_parameters())
    seen = []

    def see(module, inputs):
        if module.training:
            seen.append(inputs[0].detach().double())

    model.register_forward_pre_hook(see)
    train(model, data, dataclasses.replace(recipe, lr=0.0), folder / "look", device="cpu", progress=False)
    reference = Reference(parameters, ALPHA)
    with torch.no_grad():
        reference.scores(torch.cat(seen), "v3", passes=len(seen))
    take_moved_biases(parameters, reference)

    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    looked_at = list(seen)
    seen.clear()
    train(model, data, recipe, folder / "step", device="cpu", progress=False)
    assert all(map(torch.equal, seen, looked_at)), "a training of the same seed saw other batches"

    gradients = {}
    for name, parameter in parameters.items():
        # The first step of SGD with Nesterov's momentum m goes by (1 + m) times gradient and weight decay.
        moved = (before[name].double() - parameter.detach().double()) / (recipe.lr * (1 + recipe.momentum))
        decay = recipe.weight_decay if parameter.dim() > 1 else 0.0
        gradients[name] = moved - decay * before[name].double()
    return before, seen, gradients


def labels_of(images: Tensor) -> Tensor:
    return LABELS[images[:, 0].mean((1, 2)).argsort().argsort()]


def test_trainer_steps_along_the_specifications_gradient(six_images, path, tmp_path):
    before, seen, gradients = first_step(six_images, tmp_path, cutmix_probability=0.0)
    assert len(seen) == 1
    reference = Reference(before, ALPHA)
    reference.loss(seen[0], labels_of(seen[0]), "v3").backward()
    exact = {name: leaf.grad for name, leaf in reference.leaves.items()}
    assert_same_gradients(gradients, exact, FP32)


@pytest.mark.slow
@pytest.mark.parametrize("consistency", ["as-released", "as-described"])
def test_trainer_steps_along_the_gradient_of_cutmix_with_consistency(six_images, path, consistency, tmp_path):
    """Specification §5, from the three batches that the network saw; gradients of their one K add up."""
    before, seen, gradients = first_step(
        six_images, tmp_path, cutmix_probability=1.0, consistency=consistency
    )
    assert len(seen) == 3
    thirds = [batch.chunk(3) for batch in seen]

    def put_back(passes, batches):
        return torch.cat([batches[number][third] for third, number in enumerate(passes)])

    of_mix, of_a, of_b = (0, 1, 2), (1, 0, 1), (2, 2, 0)
    mix, a, b = (put_back(passes, thirds) for passes in (of_mix, of_a, of_b))
    assert torch.equal(a, mix) == (consistency == "as-released")

    # All images are among b, whole. A pixel of mix that is not its b's is its first image's.
    pasted = (mix == b).all(dim=1)
    share = 1 - pasted.double().mean((1, 2)).min().item()
    assert 0 < 1 - share < 1, "nothing or all was pasted: choose another seed"
    matches = ((mix[:, None] == b[None]).all(dim=2) | pasted[:, None]).all(dim=(2, 3))
    matches[pasted.all(dim=(1, 2))] = torch.eye(IMAGES, dtype=torch.bool)[pasted.all(dim=(1, 2))]
    assert (matches.sum(dim=1) == 1).all()
    labels_b = labels_of(b)
    labels_a = labels_b[matches.int().argmax(dim=1)]

    reference = Reference(before, ALPHA)
    scores = [each.chunk(3) for each in reference.scores(torch.cat(seen), "v3", passes=3).chunk(3)]
    f_mix, f_a, f_b = (put_back(passes, scores) for passes in (of_mix, of_a, of_b))
    loss = share * F.cross_entropy(f_mix, labels_a) + (1 - share) * F.cross_entropy(f_mix, labels_b)
    loss = loss + (f_mix - share * f_a - (1 - share) * f_b).square().mean()
    loss.backward()
    exact = {name: leaf.grad for name, leaf in reference.leaves.items()}
    assert_same_gradients(gradients, exact, FP32)
