"""Layers on the CPU's kernels: batch norm with its activation, depthwise and ternary convolutions.

Each stands in for calling PyTorch's modules one after the other, and does call them where the kernels do not
apply: a GPU, a dtype or memory layout that they do not know, a hook that wants to see a module called. Both
agree up to the rounding of FP32 sums in another order.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from ctypes import Structure, c_long, c_void_p

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from ..model.network import MixedConv2d, SqueezeExcite
from ..model.ternary import TernaryConv2d, ternary_scale
from .library import call, enabled

ACTS = {type(None): 0, nn.ReLU: 1, nn.SiLU: 2}
KERNELS, STRIDES = (3, 5, 7), (1, 2)
# As in kernels.cpp: channels that buffers are padded to, rows of Affine, SUMS, and outputs of a ternary
# convolution come in multiples of OUTPUTS.
WIDTH, AFFINE, SUMS, OUTPUTS = 16, 6, 5, 4
FLOAT = {torch.float32}


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Inside this context PyTorch uses one thread: on some processors more of them sum small matrix products
    in another order, and a training must not depend on their number.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def serves(x: Tensor, *modules: nn.Module | None) -> bool:
    """Whether the kernels may stand in for calling ``modules`` one after the other on ``x``."""
    return (
        # They read memory: nothing is there while a network is traced or exported.
        type(x) is Tensor
        and not torch.jit.is_tracing()
        and not torch.compiler.is_compiling()
        and x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.float16)
        and x.ndim == 4
        and x.numel() > 0
        and x.is_contiguous(memory_format=torch.channels_last)
        and enabled()
        and not any(_is_watched(module) or _is_elsewhere(module) for module in modules)
    )


def _is_elsewhere(module: nn.Module | None) -> bool:
    """Whether a module has a parameter or statistic that is not in this computer's memory."""
    tensors = () if module is None else (*module._parameters.values(), *module._buffers.values())
    return any(tensor is not None and tensor.device.type != "cpu" for tensor in tensors)


def _is_watched(module: nn.Module | None) -> bool:
    """Whether somebody waits for this very module to be called."""
    return module is not None and bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def is_half(x: Tensor) -> bool:
    return x.dtype == torch.float16


def as_pixels(x: Tensor) -> tuple[int, int, int]:
    """Images, pixels of each, channels."""
    return x.shape[0], x.shape[2] * x.shape[3], x.shape[1]


def in_pixels(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


# --- batch norm and activation ---------------------------------------------------------------


def norm_act(norm: nn.BatchNorm2d, act: nn.Module | None, x: Tensor, skip: Tensor | None = None) -> Tensor:
    """``act(norm(x))``, plus ``skip`` where one is given.

    Parameters
    ----------
    norm : in training its running statistics are updated as PyTorch does
    act : ``nn.ReLU``, ``nn.SiLU`` or None
    x, skip : (B, C, H, W)
    """
    fits = x.ndim == 4 and x.shape[1] == getattr(norm, "num_features", None)
    fits = fits and norm_fits(norm, act, x.numel() // x.shape[1])
    skip_fits = skip is None or (skip.shape == x.shape and skip.dtype == x.dtype and serves(skip))
    if not (fits and skip_fits and serves(x, norm, act)):
        y = norm(x)
        y = y if act is None else act(y)
        return y if skip is None else y + skip
    return _NormAct.apply(x, skip, norm, ACTS[type(act)], norm.weight, norm.bias)


def norm_fits(norm: nn.Module, act: nn.Module | None, values: int) -> bool:
    """Whether the kernels know this norm and activation; ``values`` of each channel."""
    return (
        type(norm) is nn.BatchNorm2d
        and type(act) in ACTS
        and norm.affine
        and norm.track_running_stats
        and norm.momentum is not None
        # A single value has no variance, which PyTorch refuses in its own words; gradients through running
        # statistics are nothing that the study computes.
        and (
            (
                values > 1
                and {t.dtype for t in (norm.weight, norm.bias, norm.running_mean, norm.running_var)} == FLOAT
            )
            if norm.training
            else not torch.is_grad_enabled()
        )
    )


def _moments(x: Tensor) -> Tensor:
    """Mean and sum of squared deviations of each channel, float64 (2, C)."""
    moments = torch.empty(2, x.shape[1], dtype=torch.float64)
    call("moments", is_half(x), x, *as_pixels(x), moments)
    return moments


def as_affine(norm: nn.BatchNorm2d, moments: Tensor | None, values: int) -> Tensor:
    """The norm as the kernels use it (``Affine``); moments of a batch enter its running statistics."""
    channels = norm.num_features
    affine = torch.zeros(AFFINE, _padded(channels))
    # Halves (O3) are only read.
    state = [
        t.float() for t in (norm.weight.detach(), norm.bias.detach(), norm.running_mean, norm.running_var)
    ]
    call("norm", moments, values, channels, *state, norm.momentum, norm.eps, affine)
    if moments is not None:
        norm.num_batches_tracked.add_(1)
    return affine


def _padded(channels: int) -> int:
    return -(-channels // WIDTH) * WIDTH


def empty_sums(x: Tensor) -> Tensor:
    return torch.zeros(len(x), SUMS, _padded(x.shape[1]))


def combine(sums: Tensor, gate: Tensor | None, dpooled: Tensor | None, shape: tuple, affine: Tensor):
    """Gradients of the norm's weight and bias; completes ``affine`` for that of its input, of ``shape``.

    In place, of a tensor that may be saved for the backward pass: a second one writes the same again.
    """
    images, channels, height, width = shape
    dweight, dbias = torch.empty(2, channels).unbind()
    call("combine", sums, gate, dpooled, images, height * width, channels, affine, dweight, dbias)
    return dweight, dbias


class _NormAct(Function):
    @staticmethod
    def forward(ctx, x, skip, norm, act, weight, bias):
        values = x.numel() // x.shape[1]
        affine = as_affine(norm, _moments(x) if norm.training else None, values)
        y = torch.empty_like(x)
        call("apply", is_half(x), act, x, skip, y, *as_pixels(x), affine)
        ctx.save_for_backward(x, affine)
        ctx.act = act
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, affine = ctx.saved_tensors
        dy, dx, sums = in_pixels(dy), torch.empty_like(x), empty_sums(x)
        call("sums", is_half(x), ctx.act, dy, x, *as_pixels(x), affine, sums)
        dweight, dbias = combine(sums, None, None, x.shape, affine)
        call("norm_gradient", is_half(x), ctx.act, dy, x, dx, *as_pixels(x), affine)
        return dx, dy if ctx.needs_input_grad[1] else None, None, None, dweight, dbias


# --- depthwise convolution -------------------------------------------------------------------


def depthwise_conv(conv: nn.Module, x: Tensor) -> Tensor:
    """``conv(x)`` of a depthwise convolution, or of several over consecutive channel groups of ``x``.

    Groups are read from and written to where they lie.
    """
    convs = list(conv.children()) or [conv]
    if not (are_depthwise(convs, x.dtype, x.shape[1]) and serves(x, conv, *convs)):
        return conv(x)
    return _Depthwise.apply(x, convs[0].stride[0], *[conv.weight for conv in convs])


def are_depthwise(convs: list[nn.Module], dtype: torch.dtype, channels: int) -> bool:
    return (
        all(_is_depthwise(conv, dtype) for conv in convs)
        and sum(conv.in_channels for conv in convs) == channels
        and len({conv.stride for conv in convs}) == 1
    )


def _is_depthwise(conv: nn.Module, dtype: torch.dtype) -> bool:
    if type(conv) is not nn.Conv2d:
        return False
    k, s = conv.kernel_size[0], conv.stride[0]
    return (
        conv.in_channels == conv.out_channels == conv.groups
        and conv.weight.dtype == dtype
        and conv.kernel_size == (k, k)
        and k in KERNELS
        and conv.stride == (s, s)
        and s in STRIDES
        and conv.padding == (k // 2, k // 2)
        and conv.dilation == (1, 1)
        and conv.padding_mode == "zeros"
        and conv.bias is None
    )


def empty_output(x: Tensor, stride: int, channels: int) -> Tensor:
    size = [(n - 1) // stride + 1 for n in x.shape[2:]]
    return torch.empty(len(x), channels, *size, dtype=x.dtype, memory_format=torch.channels_last)


class Weights:
    """The weights of some convolutions as C arrays; keeps alive what these point to."""

    def __init__(self, weights: tuple[Tensor, ...]):
        self.tensors = [weight.detach().float().contiguous() for weight in weights]
        count = len(weights)
        sizes = (c_long * count)(*[weight.shape[-1] for weight in weights])
        channels = (c_long * count)(*[len(weight) for weight in weights])
        self.as_argument = (c_void_p * count)(*[tensor.data_ptr() for tensor in self.tensors])
        self.arguments = count, sizes, channels, self.as_argument


def convolve(x, y, stride, weights, act=0, expand=None, before=None, moments=None) -> None:
    packed = Weights(weights)
    shape = len(x), *x.shape[2:], *y.shape[2:], y.shape[1]
    call("conv_forward", is_half(x), act, stride, *packed.arguments, x, y, *shape, expand, before, moments)


def convolve_back(
    dy, x, dx, stride, weights, trained, act=0, behind=(None,) * 7, expanding=None
) -> list[Tensor | None]:
    """Gradients of the weights; that of the input goes to ``dx``, or on through what came before.

    behind : output of the convolutions and what came after them, where dy is the gradient of that
    expanding : see :meth:`_Expansion.arguments`
    """
    packed = Weights(weights)
    shape = len(x), *x.shape[2:], *dy.shape[2:], sum(map(len, weights))
    dweights = [
        torch.empty(w.shape) if is_trained else None for w, is_trained in zip(weights, trained, strict=True)
    ]
    pointers = (c_void_p * len(weights))(*[None if d is None else d.data_ptr() for d in dweights])
    given = *shape, dy, *behind, pointers, x, dx, *(expanding or (None,) * 6)
    call("conv_backward", is_half(x), act, stride, *packed.arguments, *given)
    return [None if d is None else d.to(w.dtype) for d, w in zip(dweights, weights, strict=True)]


class _Depthwise(Function):
    @staticmethod
    def forward(ctx, x, stride, *weights):
        y = empty_output(x, stride, x.shape[1])
        convolve(x, y, stride, weights)
        ctx.save_for_backward(x, *weights)
        ctx.stride = stride
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, *weights = ctx.saved_tensors
        dx = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        trained = ctx.needs_input_grad[2:]
        dweights = convolve_back(in_pixels(dy), x, dx, ctx.stride, weights, trained)
        return dx, None, *dweights


# --- ternary 1x1 convolutions ----------------------------------------------------------------


class _GivenTernary(Structure):
    """As kernels.cpp takes a ternary convolution."""

    _fields_ = [(name, c_void_p) for name in ("signs", "scale")] + [
        (name, c_long) for name in ("groups", "in", "out")
    ]


class TernaryKernel:
    """Signs (groups, outputs, inputs) and the scale of each group, for the kernels; keeps them alive."""

    def __init__(self, signs: Tensor, scale: Tensor):
        groups, outputs, inputs = signs.shape
        self.signs = signs.float().contiguous()
        self.scale = scale.float()
        self._scales = self.scale.repeat_interleave(outputs)
        pointers = self.signs.data_ptr(), self._scales.data_ptr()
        self._given = _GivenTernary(*pointers, groups, groups * inputs, groups * outputs)
        self.as_argument = ctypes.byref(self._given)

    @classmethod
    def folded(cls, kernel: Tensor, groups: int) -> TernaryKernel:
        """Of scale * T (outputs, inputs, 1, 1) with one scale a group."""
        kernel = kernel.detach().unflatten(0, (groups, -1)).flatten(2)
        return cls(kernel.sign(), kernel.abs().amax((1, 2)))

    def transposed(self) -> TernaryKernel:
        return TernaryKernel(self.signs.transpose(1, 2), self.scale)

    def weights(self) -> Tensor:
        """scale * T, float32 (groups, outputs, inputs)."""
        return self.signs * self.scale[:, None, None]


class FastMixedConv2d(MixedConv2d):
    """:class:`MixedConv2d` whose equal 1x1 parts run as one grouped convolution: one pass over memory."""

    def forward(self, x: Tensor) -> Tensor:
        convs = list(self.values())
        are_equal = len({conv.weight.shape for conv in convs}) == 1 and convs[0].kernel_size == (1, 1)
        if x.device.type != "cpu" or not are_equal or any(_is_watched(conv) for conv in convs):
            return super().forward(x)
        if not isinstance(convs[0], TernaryConv2d):
            return F.conv2d(x, torch.cat([conv.weight for conv in convs]), groups=len(convs))
        if self.training:
            return F.conv2d(x, kernel_of(self), groups=len(convs))
        signs = [conv.signs() for conv in convs]
        scale = torch.cat([ternary_scale(s).expand(len(s)) for s in signs]).to(x.dtype)
        return F.conv2d(x, torch.cat(signs).to(x.dtype), groups=len(convs)).mul_(scale.view(1, -1, 1, 1))


def kernel_of(conv1x1: nn.Module) -> Tensor:
    """sqrt(M) * T of a ternary convolution, or of the parts of a mixed one, each with its own scale."""
    kernels = [conv.kernel() for conv in parts_of(conv1x1)]
    return kernels[0] if len(kernels) == 1 else torch.cat(kernels)


def parts_of(conv1x1: nn.Module) -> tuple[nn.Module, ...]:
    return tuple(conv1x1.children()) or (conv1x1,)


def is_ternary(conv1x1: nn.Module, channels: int, dtype: torch.dtype) -> bool:
    """Whether the kernels know a 1x1 convolution of ``channels``, or several over equal groups of them."""
    convs = parts_of(conv1x1)
    return (
        all(isinstance(conv, TernaryConv2d) and conv.kernel_size == (1, 1) for conv in convs)
        and all(conv.weight.dtype == dtype for conv in convs)
        and len({conv.weight.shape for conv in convs}) == 1
        and sum(conv.in_channels for conv in convs) == channels
        and convs[0].out_channels % OUTPUTS == 0
    )


def is_excitation(se: nn.Module | None) -> bool:
    """Whether the kernels know a squeeze-excitation, or its absence."""
    if type(se) is not SqueezeExcite:
        return se is None or type(se) is nn.Identity
    return (type(se.act), type(se.gate)) == (nn.SiLU, nn.Sigmoid)


def excitation_of(se: nn.Module | None) -> tuple[Tensor, ...]:
    """Weights and biases of squeeze-excitation, none of its absence."""
    layers = (se.conv_reduce, se.conv_expand) if type(se) is SqueezeExcite else ()
    return tuple(parameter for layer in layers for parameter in (layer.weight, layer.bias))


def excitation_arguments(excitation: tuple[Tensor, ...]) -> tuple:
    """Weights as the kernels take them, the second transposed, and the number of reduced channels."""
    if not excitation:
        return None, 0
    reduce, reduce_bias, expand, expand_bias = excitation
    packed = Weights((reduce, reduce_bias, expand.flatten(1).t(), expand_bias))
    return packed, len(reduce)


@one_thread()
def excite_back(pooled: Tensor, excitation: tuple[Tensor, ...], dgate: Tensor) -> list[Tensor]:
    """Gradients of pooled (B, C), float32, and of weights and biases from that of the gate (B, C)."""
    given = [pooled, *excitation]
    with torch.enable_grad():
        leaves = [tensor.detach().float().requires_grad_() for tensor in given]
        inner, *layers = [leaves[0], *(leaf.flatten(1) if leaf.ndim == 4 else leaf for leaf in leaves[1:])]
        gate = torch.sigmoid(F.linear(F.silu(F.linear(inner, *layers[:2])), *layers[2:]))
        found = torch.autograd.grad(gate, leaves, dgate)
    return [found[0], *(grad.to(tensor.dtype) for grad, tensor in zip(found[1:], excitation, strict=True))]
