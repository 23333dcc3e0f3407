"""How many bytes a training step must move, and how fast this device copies."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from msunet_core.model.network import DepthwiseSeparable, InvertedResidual, MixedConv2d, SqueezeExcite

# Passes over a layer's output in memory, forward and backward, each fused as far as it can be without keeping
# a whole layer on the chip. Statistics have to be complete before they are applied, so a norm is read twice:
# forward   statistics read; apply (norm, activation) read, write
# backward  sums read dy and x; input gradient reads both and writes
NORM = 3 + 5
# forward   mean read; gate read, write.   backward   sums read dy and x; gradient reads dy and writes
SQUEEZE_EXCITE = 3 + 4
# forward   read with the norm's apply pass.   backward   two gradients read, their sum written
SKIP = 1 + 3
# A block as the CPU's kernels compute it, which keep of what lies inside it only the depthwise output y.
# forward   input x read for its moments and by the depthwise part; y written; y read, projection z written;
#           z read and result written by the last norm
# backward  dy and z read for sums, by the projection's gradient and by the depthwise one, y by the last two;
#           x read, gradient of x written; both read and the gradient written, complete
BLOCK_INPUT, BLOCK_DEPTHWISE, BLOCK_OUTPUT = 2 + 5, 2 + 2, 3 + 6
# Without a first 1x1 convolution x has no moments, and its gradient is complete at once.
SEPARABLE_INPUT = 1 + 2
# forward   read with the last norm.   backward   dy read to complete the gradient, or in a pass of its own
BLOCK_SKIP, SEPARABLE_SKIP = 1 + 1, 1 + 3
# Times its input and its output: forward, input gradient (which the first layer has not), weight gradient.
CONV = 3
# Of a parameter and step: weight read forward and backward, gradient written; SGD reads gradient, weight and
# momentum, writes weight and momentum.
PARAMETER = 3 + 5
FP32 = 4  # bytes


def step_bytes(model: nn.Module, batch: int, *, size: int = 32, whole_blocks: bool = False) -> int:
    """Bytes that a training step in FP32 moves if each fused pass reads and writes its tensors once.

    Images, scores and the vectors of a channel are left out: under 1 % of it. So are, of whole blocks, the
    partial sums of weight gradients: about 5 %.

    Parameters
    ----------
    model : an MSUNet, or modules of its kinds
    size : side of the images
    whole_blocks : a block's inner tensors stay in caches, as with the CPU's kernels; or layer by layer
    """
    values = 0
    is_first = True

    def count(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        nonlocal values, is_first
        if whole_blocks and isinstance(module, DepthwiseSeparable):
            passes_of_x = SEPARABLE_INPUT + SEPARABLE_SKIP * module.has_skip
            values += passes_of_x * args[0].numel() + BLOCK_OUTPUT * out.numel()
        elif whole_blocks and isinstance(module, InvertedResidual):
            passes_of_x = BLOCK_INPUT + BLOCK_SKIP * module.has_skip
            values += passes_of_x * args[0].numel() + BLOCK_OUTPUT * out.numel()
        elif module in depthwise:
            values += BLOCK_DEPTHWISE * out.numel()
        elif isinstance(module, nn.BatchNorm2d):
            values += NORM * out.numel()
        elif isinstance(module, SqueezeExcite):
            values += SQUEEZE_EXCITE * out.numel()
        elif isinstance(module, DepthwiseSeparable | InvertedResidual):
            values += SKIP * out.numel() * module.has_skip
        else:
            values += (CONV - is_first) * (args[0].numel() + out.numel())
            is_first = False

    model = copy.deepcopy(model).eval().float().cpu()
    inside = {
        conv for mixed in model.modules() if isinstance(mixed, MixedConv2d) for conv in mixed.children()
    }
    blocks = [
        module for module in model.modules() if isinstance(module, DepthwiseSeparable | InvertedResidual)
    ]
    depthwise = {block.conv_dw for block in blocks} if whole_blocks else set()
    if whole_blocks:
        inside |= {layer for block in blocks for layer in block.modules()} - {*blocks, *depthwise}
    counted = (nn.Conv2d, MixedConv2d, nn.BatchNorm2d, SqueezeExcite, DepthwiseSeparable, InvertedResidual)
    for module in model.modules():
        if isinstance(module, counted) and module not in inside:
            module.register_forward_hook(count)
    channels = next(p for p in model.parameters() if p.ndim == 4).shape[1]
    with torch.no_grad():
        model(torch.zeros(1, channels, size, size))
    parameters = sum(p.numel() for p in model.parameters())
    return (values * batch + parameters * PARAMETER) * FP32


def copy_bandwidth(device: torch.device, size: int = 2**30) -> float:
    """Bytes a second, read and written, of copying ``size`` bytes on a device: the fastest of some copies."""
    given = torch.zeros(size, dtype=torch.uint8, device=device)
    taken = torch.empty_like(given)
    return 2 * size / min(_times(lambda: taken.copy_(given), device, 10))


def _times(work: Callable[[], object], device: torch.device, repeats: int) -> list[float]:
    times = []
    for _ in range(repeats + 2):
        wait(device)
        began = time.perf_counter()
        work()
        wait(device)
        times.append(time.perf_counter() - began)
    return times[2:]


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
