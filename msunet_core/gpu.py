"""The GPU's hot spots as fused Triton kernels: ternary weights, batch norm, depthwise convolution.

Each kernel has a plain PyTorch form. Before a family of kernels is used for the first time both are computed
on a small input, the plain form in FP64 on the CPU: where they disagree, or anything fails, that is logged
once and PyTorch's own are used: a GPU or a Triton that these kernels do not suit makes a training slower,
never wrong.

``MSUNET_FAST=0`` and :func:`msunet_core.fast.plain` turn all of it off, as they do for the CPU's kernels.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

CHUNK = 4096  # ternary weights that one program handles
# Tiles of pixels by channels; most sums over pixels are cut into this many strips.
NORM_TILE = (64, 64)
CONV_TILE = (32, 64)
WEIGHT_GRADIENT_TILE = (128, 32)
CONV_WARPS = 8  # with 4 the kernels of 7x7 spill registers
STRIPS = 512
# Largest deviation over the largest value: FP32 sums in another order; FP16's 11 bits after several of them.
AGREE = {torch.float32: 1e-4, torch.float16: 2e-2}

log = logging.getLogger(__name__)


@functools.cache
def kernels() -> ModuleType:
    """The Triton kernels; imported late, a CPU has no use for them."""
    from . import triton_kernels

    return triton_kernels


def is_capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


# --- whether to use them ---------------------------------------------------------------------

_works: dict[tuple[str, torch.device], bool] = {}


def works(family: str, device: torch.device) -> bool:
    """Whether a family of ``CHECKS`` computes on this GPU what PyTorch does; found out at first use."""
    key = family, device
    if device.type == "cuda" and device.index not in (None, torch.cuda.current_device()):
        return False  # Triton launches on the current device
    if key not in _works:
        if is_capturing():  # a capture may not wait for the device
            return False
        _works[key] = _passes(family, device)
    return _works[key]


def _passes(family: str, device: torch.device) -> bool:
    try:
        with torch.enable_grad(), torch.autocast(device.type, enabled=False):
            for dtype, bound in AGREE.items():
                for ours, plain in CHECKS[family](device, dtype):
                    worst = _deviation(ours, plain)
                    if not worst <= bound:
                        raise ArithmeticError(f"off by {worst:.3g} of the largest value in {dtype}")
    except Exception as error:  # whatever a compiler or driver may raise: training goes on without
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        log.warning("no fused %s on %s, PyTorch's own are used: %s", family, device, reason)
        return False
    return True


def _deviation(ours: Tensor, plain: Tensor) -> float:
    worst = (ours.cpu().double() - plain).abs().max()
    return (worst / plain.abs().max().clamp(min=1e-30)).item()


def _waves(*shape: int, device: torch.device, dtype: torch.dtype, seed: int = 1) -> Tensor:
    """Some numbers in [-1, 1] that take nothing from a random state."""
    count = torch.Size(shape).numel()
    waves = (torch.arange(count, dtype=torch.float64) * (seed + 0.618)).sin().view(shape)
    waves = waves.to(device, dtype)
    return waves.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else waves


def is_images(x: Tensor) -> bool:
    """Whether x is (B, C, H, W) in channels_last memory, FP16 or FP32."""
    return (
        x.dtype in AGREE
        and x.ndim == 4
        and x.numel() > 0
        and x.is_contiguous(memory_format=torch.channels_last)
    )


def _in_pixels(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _tiles(pixels: int, channels: int, tile: tuple[int, int]) -> tuple[tuple[int, int], dict[str, int]]:
    """The grid of programs, and the size of a tile as the kernels name it."""
    block = min(tile[1], max(16, 1 << (channels - 1).bit_length()))
    return (-(-pixels // tile[0]), -(-channels // block)), {"BLOCK_P": tile[0], "BLOCK_C": block}


# --- ternary weights -------------------------------------------------------------------------


class TernaryTable:
    """Where the elements of some weights lie in one flat buffer, on the weights' device.

    Parameters
    ----------
    weights : the layers' kernels (out, in, k, k), FP16 or FP32, one dtype and device
    groups : layers whose kernels are used as one, as numbers of consecutive weights that sum to all
    """

    def __init__(self, weights: Sequence[Tensor], groups: Sequence[int]):
        device = weights[0].device
        self.sizes, self.groups = [weight.numel() for weight in weights], list(groups)
        chunks, layers, first = [], [], 0
        for layer, size in enumerate(self.sizes):
            layers.append((len(chunks), -(-size // CHUNK), size))
            for begin in range(0, size, CHUNK):
                chunks.append((first + begin, min(CHUNK, size - begin), layer))
            first += size
        factors = [2.0 / w[0].numel() * w.numel() for w in weights]
        self.chunks = torch.tensor(chunks, dtype=torch.int32, device=device)
        self.layers = torch.tensor(layers, dtype=torch.int32, device=device)
        self.factors = torch.tensor(factors, dtype=torch.float32, device=device)
        self.alphas = torch.zeros(len(layers), dtype=torch.float32, device=device)
        self.constants = {
            "BLOCK": CHUNK,
            "PARTS": max(2, 1 << (max(n for _, n, _ in layers) - 1).bit_length()),
        }
        self._alphas: list[float] = []

    def set_alphas(self, alphas: list[float]) -> None:
        """Thresholds in standard deviations; a negative one stands for binary weights.

        They lie on the device, so that a captured graph follows them; called while one is captured, this
        finds them set already.
        """
        if alphas != self._alphas:
            for i, alpha in enumerate(alphas):
                self.alphas[i].fill_(alpha)
            self._alphas = list(alphas)

    def fold(self, weights: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """All sqrt(M) * T in a row, in the weights' dtype; all T, int8; sqrt(M) of each layer, FP32."""
        flat = torch.cat([weight.reshape(-1) for weight in weights])
        count, k = len(self.chunks), kernels()
        moments = torch.empty(count, 3, device=flat.device)
        counts = torch.empty(count, dtype=torch.int32, device=flat.device)
        signs = torch.empty(flat.shape, dtype=torch.int8, device=flat.device)
        folded, scales = torch.empty_like(flat), torch.empty_like(self.alphas)
        where = self.chunks, self.layers
        k.ternary_moments[(count,)](flat, self.chunks, moments, BLOCK=CHUNK)
        k.ternary_signs[(count,)](flat, *where, moments, self.alphas, signs, counts, **self.constants)
        k.ternary_fold[(count,)](signs, *where, counts, self.factors, folded, scales, **self.constants)
        return folded, signs, scales

    def gradient(self, grads: Sequence[Tensor], scales: Tensor) -> Tensor:
        """The gradients of all kernels, given one for each group, times their layers' scales, in a row."""
        flat = torch.cat([grad.reshape(-1) for grad in grads])
        result = torch.empty_like(flat)
        kernels().ternary_gradient[(len(self.chunks),)](flat, self.chunks, scales, result, BLOCK=CHUNK)
        return result


class _Fold(Function):
    """Forward: sqrt(M) * T of each group of layers. Backward: straight through, as in ``ternary``."""

    @staticmethod
    def forward(ctx, table: TernaryTable, *weights: Tensor) -> tuple[Tensor, ...]:
        folded, _, scales = table.fold(weights)
        ctx.table = table
        ctx.save_for_backward(scales)
        ctx.shapes = [weight.shape for weight in weights]
        found, layer = [], 0
        parts = folded.split(table.sizes)
        for count in table.groups:
            shape = weights[layer].shape
            size = sum(table.sizes[layer : layer + count])
            start = parts[layer].storage_offset()
            found.append(folded[start : start + size].view(count * shape[0], *shape[1:]))
            layer += count
        return tuple(found)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (scales,) = ctx.saved_tensors
        parts = ctx.table.gradient(grads, scales).split(ctx.table.sizes)
        found = [part.view(shape) for part, shape in zip(parts, ctx.shapes, strict=True)]
        return None, *(g if need else None for g, need in zip(found, ctx.needs_input_grad[1:], strict=True))


def fold_all(table: TernaryTable, weights: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """sqrt(M) * T of each group of ``table``, (out of the group, in, k, k), with gradients to ``weights``."""
    return _Fold.apply(table, *weights)


# --- batch norm and activation ---------------------------------------------------------------


def norm_act(norm: nn.BatchNorm2d, act: int, x: Tensor, skip: Tensor | None = None) -> Tensor:
    """``act(norm(x))``, plus ``skip`` where one is given, in training; act 0 none, 1 ReLU, 2 SiLU."""
    return _NormAct.apply(x, skip, norm, act, norm.weight, norm.bias)


def _strips(pixels: int) -> tuple[int, int]:
    """Rows of a strip, a whole number of tiles, and how many strips that makes."""
    tile = NORM_TILE[0]
    strip = tile * max(1, -(-pixels // (tile * STRIPS)))
    return strip, -(-pixels // strip)


class _NormAct(Function):
    @staticmethod
    def forward(ctx, x, skip, norm, act, weight, bias):
        k, channels = kernels(), x.shape[1]
        pixels = x.numel() // channels
        strip, strips = _strips(pixels)
        grid, tile = _tiles(pixels, channels, NORM_TILE)
        moments = torch.empty(2, strips, channels, device=x.device)
        affine = torch.empty(4, channels, device=x.device)
        k.norm_moments[(strips, grid[1])](x, moments, pixels, strip, channels, STRIPS=strips, **tile)
        k.norm_affine[(-(-channels // 16),)](
            *(moments, weight, bias, norm.running_mean, norm.running_var, affine),
            *(pixels, strip, strips, channels, norm.momentum, norm.eps),
            STRIPS=strips,
            PARTS=max(2, 1 << (strips - 1).bit_length()),
            BLOCK_C=16,
        )
        norm.num_batches_tracked.add_(1)
        y = torch.empty_like(x)
        given = x if skip is None else skip
        k.norm_apply[grid](x, given, y, affine, pixels, channels, ACT=act, HAS_SKIP=skip is not None, **tile)
        ctx.save_for_backward(x, affine)
        ctx.act = act
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, affine = ctx.saved_tensors
        k, channels, dy = kernels(), x.shape[1], _in_pixels(dy)
        pixels = x.numel() // channels
        strip, strips = _strips(pixels)
        grid, tile = _tiles(pixels, channels, NORM_TILE)
        sums = torch.empty(2, strips, channels, device=x.device)
        k.norm_sums[(strips, grid[1])](
            dy, x, affine, sums, pixels, strip, channels, ACT=ctx.act, STRIPS=strips, **tile
        )
        sums, dx = sums.sum(1), torch.empty_like(x)
        k.norm_gradient[grid](dy, x, dx, affine, sums, pixels, channels, ACT=ctx.act, **tile)
        return dx, dy if ctx.needs_input_grad[1] else None, None, None, sums[1], sums[0]


# --- depthwise convolution -------------------------------------------------------------------


def depthwise(x: Tensor, stride: int, weights: Sequence[Tensor]) -> Tensor:
    """Convolutions with "same" padding of consecutive channel groups of x; weights (part, 1, k, k)."""
    return _Depthwise.apply(x, stride, *weights)


def _groups(weights: Sequence[Tensor]) -> list[tuple[Tensor, int]]:
    """Each weight with the channel that it begins at."""
    first, found = 0, []
    for weight in weights:
        found.append((weight, first))
        first += len(weight)
    return found


class _Depthwise(Function):
    @staticmethod
    def forward(ctx, x, stride, *weights):
        size = [(n - 1) // stride + 1 for n in x.shape[2:]]
        y = torch.empty(
            *x.shape[:2], *size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last
        )
        weights = [weight.contiguous() for weight in weights]
        pixels = y.numel() // y.shape[1]
        for weight, first in _groups(weights):
            grid, tile = _tiles(pixels, len(weight), CONV_TILE)
            shape = pixels, *x.shape[2:], *size, first, len(weight), x.shape[1]
            kernels().depthwise_forward[grid](
                x, weight, y, *shape, K=weight.shape[-1], STRIDE=stride, num_warps=CONV_WARPS, **tile
            )
        ctx.save_for_backward(x, *weights)
        ctx.stride = stride
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, *weights = ctx.saved_tensors
        k, dy, stride, sizes = kernels(), _in_pixels(dy), ctx.stride, (*x.shape[2:], *dy.shape[2:])
        dx = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        dweights: list[Tensor | None] = [None] * len(weights)
        for i, (weight, first) in enumerate(_groups(weights)):
            channels = len(weight)
            constants = {"K": weight.shape[-1], "STRIDE": stride, "num_warps": CONV_WARPS}
            if dx is not None:
                pixels = x.numel() // x.shape[1]
                grid, tile = _tiles(pixels, channels, CONV_TILE)
                shape = pixels, *sizes, first, channels, x.shape[1]
                k.depthwise_input_gradient[grid](dy, weight, dx, *shape, **constants, **tile)
            if ctx.needs_input_grad[2 + i]:
                pixels = dy.numel() // dy.shape[1]
                grid, tile = _tiles(pixels, channels, WEIGHT_GRADIENT_TILE)
                shape = pixels, *sizes, first, channels, x.shape[1]
                parts = torch.empty(grid[0], weight[0].numel(), channels, device=x.device)
                k.depthwise_weight_gradient[grid](dy, x, parts, *shape, **constants, **tile)
                dweights[i] = parts.sum(0).t().reshape(weight.shape).to(weight.dtype)
        return dx, None, *dweights


_pays: dict[tuple, bool] = {}


def depthwise_pays(conv: nn.Module, x: Tensor, stride: int, weights: Sequence[Tensor]) -> bool:
    """Whether :func:`depthwise` is faster than ``conv``, forward and backward; timed once for each shape.

    What is faster may differ between two runs, and with it the last bits: deterministic training does
    without. So does evaluation, where it would be timed for little.
    """
    if not torch.is_grad_enabled() or torch.are_deterministic_algorithms_enabled():
        return False
    key = x.device, x.dtype, x.shape, stride, *(w.shape for w in weights)
    if key not in _pays:
        if is_capturing():  # a capture may not wait for the device
            return False
        try:
            ours, cudnn = (
                _seconds(run, x, weights) for run in (lambda x: depthwise(x, stride, weights), conv)
            )
        except RuntimeError as error:
            log.warning("depthwise kernels not timed, cuDNN's are used: %s", str(error).splitlines()[0])
            ours = cudnn = 0.0
        _pays[key] = ours < cudnn
        log.info("depthwise %s: %.0f us, cuDNN %.0f us", tuple(x.shape), 1e6 * ours, 1e6 * cudnn)
    return _pays[key]


def _seconds(run: Callable[[Tensor], Tensor], x: Tensor, weights: Sequence[Tensor]) -> float:
    """Time on the device of one forward and backward pass: replayed, so that launching it costs nothing."""
    x = x.detach().requires_grad_()
    inputs = [x, *(weight for weight in weights if weight.requires_grad)]

    def once() -> None:
        y = run(x)
        torch.autograd.grad(y, inputs, y.detach())

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        once()
    torch.cuda.current_stream().wait_stream(side)
    graph, repeats = torch.cuda.CUDAGraph(), 20
    with torch.cuda.graph(graph):
        once()
    graph.replay()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(repeats):
        graph.replay()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / repeats


# --- each family against its plain form, in FP64 on the CPU ----------------------------------

Pairs = list[tuple[Tensor, Tensor]]


def _leaves(*tensors: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Leaves of two graphs: the tensors as they are, and what they hold in FP64 on the CPU."""
    return [t.requires_grad_() for t in tensors], [
        t.detach().cpu().double().requires_grad_() for t in tensors
    ]


def _check_ternary(device: torch.device, dtype: torch.dtype) -> Pairs:
    shapes = (70, 64, 1, 1), (30, 20, 1, 1)
    weights, exact = _leaves(*(_waves(*shape, device=device, dtype=dtype) for shape in shapes))
    table = TernaryTable(weights, [1, 1])
    table.set_alphas([0.6, 0.6])
    pairs = []
    for folded, weight, w in zip(fold_all(table, weights), weights, exact, strict=True):
        z = (w.detach() - w.detach().mean()) / w.detach().std()
        signs = z.sign() * (z.abs() > 0.6)
        scale = (2.0 / w.shape[1] * signs.numel() / signs.count_nonzero()).sqrt()
        (grad,) = torch.autograd.grad(folded, weight, torch.ones_like(folded), retain_graph=True)
        pairs += [(folded.detach(), signs * scale), (grad, scale.expand_as(grad))]
    return pairs


def _check_norm(device: torch.device, dtype: torch.dtype) -> Pairs:
    pairs: Pairs = []
    for act, plain_act in enumerate((lambda z: z, F.relu, F.silu)):
        inputs = (_waves(3, 20, 9, 7, device=device, dtype=dtype, seed=seed) for seed in (1, 2, 3))
        (x, skip, dy), exact = _leaves(*inputs)
        norms = nn.BatchNorm2d(20, device=device), nn.BatchNorm2d(20, dtype=torch.float64)
        results = norm_act(norms[0], act, x, skip), plain_act(norms[1](exact[0])) + exact[1]
        sides = []
        for y, norm, leaves in zip(results, norms, ((x, skip, dy), exact), strict=True):
            grads = torch.autograd.grad(y, (*leaves[:2], *norm.parameters()), leaves[2].detach())
            sides.append([y.detach(), *grads, norm.running_mean, norm.running_var])
        pairs += zip(*sides, strict=True)
    return pairs


def _check_depthwise(device: torch.device, dtype: torch.dtype) -> Pairs:
    pairs: Pairs = []
    for stride in (1, 2):
        inputs = [_waves(9, 1, k, k, device=device, dtype=dtype) for k in (3, 5, 7)]
        inputs.append(_waves(1, 27, 6, 7, device=device, dtype=dtype, seed=2))
        (*weights, x), exact = _leaves(*inputs)
        plain = [
            F.conv2d(part, w, None, stride, w.shape[-1] // 2, groups=9)
            for part, w in zip(exact[-1].split(9, 1), exact, strict=False)
        ]
        y, z = depthwise(x, stride, weights), torch.cat(plain, 1)
        dy = _waves(*y.shape, device=device, dtype=dtype, seed=3)
        grads = torch.autograd.grad(y, (*weights, x), dy)
        exact_grads = torch.autograd.grad(z, exact, dy.cpu().double())
        pairs += [(y.detach(), z.detach()), *zip(grads, exact_grads, strict=True)]
    return pairs


CHECKS: dict[str, Callable[[torch.device, torch.dtype], Pairs]] = {
    "ternary weights": _check_ternary,
    "batch norm": _check_norm,
    "depthwise convolution": _check_depthwise,
}
