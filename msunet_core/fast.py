"""The CPU's hot spots as fused kernels: batch norm, activation, depthwise convolution, squeeze-excitation.

PyTorch computes them well but one by one: batch norm and activation each pass over tensors that fit no
cache, and the weight gradient of a 5x5 or 7x7 depthwise convolution takes several times its forward pass.
``kernels.cpp`` does the same sums in fewer passes; in eval mode a whole block is one, and its ternary 1x1
convolutions only add. It is compiled at first use, in some seconds, by the C++
compiler of the machine for that machine's processor, and kept in the user's cache folder.

Where that is not to be had (no compiler, another processor, a GPU, a dtype or memory layout that the
kernels do not know, a hook that wants to see a module called, ``MSUNET_FAST=0``), everything here computes
the plain PyTorch form instead. Both agree up to the rounding of FP32 sums in another order.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from ctypes import c_float, c_int, c_long, c_void_p
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from . import gpu
from .ternary import TernaryConv2d, ternary_scale

SOURCE = Path(__file__).with_name("kernels.cpp")
# Kernels are for this processor only, so wide vectors where it has them. Nothing links OpenMP's library:
# its functions are found in the copy that PyTorch has loaded, so that both use the same threads.
COMPILE = ("-std=c++17", "-O3", "-march=native", "-mprefer-vector-width=512", "-fopenmp", "-fPIC", "-w", "-c")
COMPILE_SECONDS = 120

ACTS = {type(None): 0, nn.ReLU: 1, nn.SiLU: 2}
KERNELS, STRIDES = (3, 5, 7), (1, 2)
# As in kernels.cpp: channels that buffers are padded to, rows of Affine, SUMS, and outputs of a ternary
# convolution come in multiples of OUTPUTS.
WIDTH, AFFINE, SUMS, OUTPUTS = 16, 6, 5, 4

# C signature of each function of kernels.cpp, without the last argument, the threads: p pointer, i int,
# l long, f float.
SIGNATURES = {
    "moments": "iplllp",
    "norm": "pllppppffp",
    "apply": "iippppplllp",
    "sums": "iipplllpip",
    "combine": "ppplllppp",
    "norm_gradient": "iippplllp",
    "conv_forward": "iiilpppppllllllpp",
    "conv_backward": "iiilpppppppllllllpppppp",
    "residual": "iiilpppppllllllllpplppplpplpi",
}
C_TYPES = {"p": c_void_p, "i": c_int, "l": c_long, "f": c_float}

log = logging.getLogger(__name__)
_plain = False


def enabled() -> bool:
    """Whether the kernels are there and not switched off."""
    return not switched_off() and library() is not None


def switched_off() -> bool:
    """Whether the plain PyTorch form is asked for, on a CPU and on a GPU."""
    return _plain or os.environ.get("MSUNET_FAST") == "0"


@contextlib.contextmanager
def plain() -> Iterator[None]:
    """Inside this context everything is computed in the plain PyTorch form."""
    global _plain
    before, _plain = _plain, True
    try:
        yield
    finally:
        _plain = before


# --- compiling -------------------------------------------------------------------------------


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels; None where they cannot be had, for a reason that is logged once."""
    try:
        loaded = ctypes.CDLL(str(_compiled()))
        for name, signature in SIGNATURES.items():
            function = getattr(loaded, f"msunet_{name}")
            function.argtypes, function.restype = [C_TYPES[letter] for letter in signature + "i"], None
    except (OSError, AttributeError, subprocess.SubprocessError) as error:
        log.info("no fast CPU kernels, PyTorch's own are used: %s", str(error).splitlines()[0])
        return None
    return loaded


def cache_folder() -> Path:
    """Where compiled kernels are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "msunet"


def _compiled() -> Path:
    """Path of the shared library for this source, processor, compiler and PyTorch, compiled if need be."""
    if platform.machine() not in ("x86_64", "AMD64") or not torch.backends.openmp.is_available():
        raise OSError(f"they are written for x86-64 and OpenMP, this is {platform.machine()}")
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CXX", ""), "c++", "g++"))), None)
    if compiler is None:
        raise OSError("no C++ compiler (c++ or g++) was found")
    which = (compiler, os.stat(compiler).st_mtime, COMPILE, torch.__version__, _processor())
    key = hashlib.sha256(SOURCE.read_bytes() + repr(which).encode()).hexdigest()[:20]
    path = cache_folder() / f"kernels-{key}.so"
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    log.info("compiling fast CPU kernels, once: %s", path)
    # Made beside and renamed: of several processes that start at once, each ends with a whole file.
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made, linked = Path(folder) / "kernels.o", Path(folder) / "kernels.so"
        for command in (
            [*COMPILE, str(SOURCE), "-o", str(made)],
            ["-shared", str(made), "-o", str(linked)],
        ):
            subprocess.run([compiler, *command], check=True, capture_output=True, timeout=COMPILE_SECONDS)
        linked.replace(path)
    return path


def _processor() -> str:
    """What decides the meaning of -march=native."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return "".join(sorted({line for line in lines if line.startswith(("model name", "flags"))}))
    return platform.processor()


# --- when they apply -------------------------------------------------------------------------


def _serves(x: Tensor, *modules: nn.Module | None) -> bool:
    """Whether the kernels may stand in for calling ``modules`` one after the other on ``x``."""
    return (
        x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.float16)
        and x.ndim == 4
        and x.numel() > 0
        and x.is_contiguous(memory_format=torch.channels_last)
        and enabled()
        and not any(_is_watched(module) for module in modules)
    )


def _serves_on_gpu(family: str, x: Tensor, *modules: nn.Module | None) -> bool:
    """As :func:`_serves`, for a family of the GPU's kernels."""
    return (
        x.is_cuda
        and gpu.is_images(x)
        and not switched_off()
        and not torch.is_autocast_enabled("cuda")
        and not any(_is_watched(module) for module in modules)
        and gpu.works(family, x.device)
    )


def _is_watched(module: nn.Module | None) -> bool:
    """Whether somebody waits for this very module to be called."""
    return module is not None and bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def _call(name: str, *arguments) -> None:
    given = [argument.data_ptr() if isinstance(argument, Tensor) else argument for argument in arguments]
    getattr(library(), f"msunet_{name}")(*given, torch.get_num_threads())


def _is_half(x: Tensor) -> bool:
    return x.dtype == torch.float16


def _as_pixels(x: Tensor) -> tuple[int, int, int]:
    """Images, pixels of each, channels."""
    return x.shape[0], x.shape[2] * x.shape[3], x.shape[1]


def _in_pixels(x: Tensor) -> Tensor:
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
    if norm.training and _serves_on_gpu("batch norm", x, norm, act):
        skip_fits = skip is None or (skip.shape == x.shape and skip.dtype == x.dtype and gpu.is_images(skip))
        if skip_fits and _fits(norm, act, x.numel() // x.shape[1]):
            return gpu.norm_act(norm, ACTS[type(act)], x, skip)
    skip_fits = skip is None or (skip.shape == x.shape and skip.dtype == x.dtype and _serves(skip))
    if not (skip_fits and _fits(norm, act, x.numel() // x.shape[1]) and _serves(x, norm, act)):
        y = norm(x)
        y = y if act is None else act(y)
        return y if skip is None else y + skip
    return _NormAct.apply(x, skip, norm, ACTS[type(act)], norm.weight, norm.bias)


def _fits(norm: nn.Module, act: nn.Module | None, values: int) -> bool:
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
            (norm.weight.dtype == torch.float32 and values > 1)
            if norm.training
            else not torch.is_grad_enabled()
        )
    )


def _moments(x: Tensor) -> Tensor:
    """Mean and sum of squared deviations of each channel, float64 (2, C)."""
    moments = torch.empty(2, x.shape[1], dtype=torch.float64)
    _call("moments", _is_half(x), x, *_as_pixels(x), moments)
    return moments


def _norm(norm: nn.BatchNorm2d, moments: Tensor | None, values: int) -> Tensor:
    """The norm as the kernels use it (``Affine``); moments of a batch enter its running statistics."""
    channels = norm.num_features
    affine = torch.zeros(AFFINE, _padded(channels))
    # Halves (O3) are only read.
    state = [
        t.float() for t in (norm.weight.detach(), norm.bias.detach(), norm.running_mean, norm.running_var)
    ]
    _call("norm", moments, values, channels, *state, norm.momentum, norm.eps, affine)
    if moments is not None:
        norm.num_batches_tracked.add_(1)
    return affine


def _padded(channels: int) -> int:
    return -(-channels // WIDTH) * WIDTH


def _sums(x: Tensor) -> Tensor:
    return torch.zeros(len(x), SUMS, _padded(x.shape[1]))


def _combine(sums: Tensor, gate: Tensor | None, dpooled: Tensor | None, x: Tensor, affine: Tensor):
    """Gradients of the norm's weight and bias; completes ``affine`` for the gradient of ``x``."""
    dweight, dbias = torch.empty(2, x.shape[1]).unbind()
    _call("combine", sums, gate, dpooled, *_as_pixels(x), affine, dweight, dbias)
    return dweight, dbias


class _NormAct(Function):
    @staticmethod
    def forward(ctx, x, skip, norm, act, weight, bias):
        values = x.numel() // x.shape[1]
        affine = _norm(norm, _moments(x) if norm.training else None, values)
        y = torch.empty_like(x)
        _call("apply", _is_half(x), act, x, skip, None, y, None, *_as_pixels(x), affine)
        ctx.save_for_backward(x, affine)
        ctx.act = act
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, affine = ctx.saved_tensors
        dy, dx, sums = _in_pixels(dy), torch.empty_like(x), _sums(x)
        _call("sums", _is_half(x), ctx.act, dy, x, *_as_pixels(x), affine, False, sums)
        dweight, dbias = _combine(sums, None, None, x, affine)
        _call("norm_gradient", _is_half(x), ctx.act, dy, x, dx, *_as_pixels(x), affine)
        return dx, dy if ctx.needs_input_grad[1] else None, None, None, dweight, dbias


# --- depthwise convolution -------------------------------------------------------------------


def depthwise_conv(conv: nn.Module, x: Tensor) -> Tensor:
    """``conv(x)`` of a depthwise convolution, or of several over consecutive channel groups of ``x``.

    Groups are read from and written to where they lie.
    """
    convs = list(conv.children()) or [conv]
    are_depthwise = _are_depthwise(convs, x.dtype, x.shape[1])
    if are_depthwise and _serves_on_gpu("depthwise convolution", x, conv, *convs):
        layers = convs[0].stride[0], [layer.weight for layer in convs]
        return gpu.depthwise(x, *layers) if gpu.depthwise_pays(conv, x, *layers) else conv(x)
    if not (are_depthwise and _serves(x, conv, *convs)):
        return conv(x)
    return _Depthwise.apply(x, convs[0].stride[0], *[conv.weight for conv in convs])


def _are_depthwise(convs: list[nn.Module], dtype: torch.dtype, channels: int) -> bool:
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


def _empty_output(x: Tensor, stride: int, channels: int) -> Tensor:
    size = [(n - 1) // stride + 1 for n in x.shape[2:]]
    return torch.empty(len(x), channels, *size, dtype=x.dtype, memory_format=torch.channels_last)


class _Weights:
    """The kernels of some convolutions as C arrays; keeps alive what these point to."""

    def __init__(self, weights: tuple[Tensor, ...]):
        self.tensors = [weight.detach().float().contiguous() for weight in weights]
        count = len(weights)
        self.arguments = (
            count,
            (c_long * count)(*[weight.shape[-1] for weight in weights]),
            (c_long * count)(*[len(weight) for weight in weights]),
            (c_void_p * count)(*[tensor.data_ptr() for tensor in self.tensors]),
        )


def _convolve(x, y, stride, weights, act=0, before=None, moments=None) -> None:
    packed = _Weights(weights)
    shape = len(x), *x.shape[2:], *y.shape[2:], x.shape[1]
    _call("conv_forward", _is_half(x), act, stride, *packed.arguments, x, y, *shape, before, moments)


def _convolve_back(
    dy, y, x, dx, stride, weights, trained, act=0, before=None, after=None, gate=None, dpooled=None, sums=None
) -> list[Tensor | None]:
    """Gradients of the weights; that of the input goes to ``dx``."""
    packed = _Weights(weights)
    shape = len(x), *x.shape[2:], *dy.shape[2:], x.shape[1]
    dweights = [
        torch.empty(w.shape) if is_trained else None for w, is_trained in zip(weights, trained, strict=True)
    ]
    pointers = (c_void_p * len(weights))(*[None if d is None else d.data_ptr() for d in dweights])
    given = before, after, gate, dpooled, sums, pointers
    _call("conv_backward", _is_half(x), act, stride, *packed.arguments, dy, y, x, dx, *shape, *given)
    return [None if d is None else d.to(w.dtype) for d, w in zip(dweights, weights, strict=True)]


class _Depthwise(Function):
    @staticmethod
    def forward(ctx, x, stride, *weights):
        y = _empty_output(x, stride, x.shape[1])
        _convolve(x, y, stride, weights)
        ctx.save_for_backward(x, *weights)
        ctx.stride = stride
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, *weights = ctx.saved_tensors
        dx = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        trained = ctx.needs_input_grad[2:]
        dweights = _convolve_back(_in_pixels(dy), None, x, dx, ctx.stride, weights, trained)
        return dx, None, *dweights


# --- the middle of an inverted residual ------------------------------------------------------


def depthwise_stage(
    norm1: nn.BatchNorm2d,
    act1: nn.Module,
    conv: nn.Module,
    norm2: nn.BatchNorm2d,
    act2: nn.Module,
    se: nn.Module,
    x: Tensor,
) -> Tensor:
    """``se(act2(norm2(conv(act1(norm1(x))))))``: what lies between the two 1x1 convolutions.

    In training nothing between x, the convolution's output and the result is written to memory, and
    nothing else is kept for the backward pass, which computes it again row by row.

    Parameters
    ----------
    conv : depthwise, or several over consecutive channel groups
    se : squeeze-excitation with a method ``excite`` (pooled (B, C, 1, 1) -> gate), or ``nn.Identity``
    """
    convs = list(conv.children()) or [conv]
    stride = convs[0].stride[0]
    outputs = x.shape[0] * -(-x.shape[2] // stride) * -(-x.shape[3] // stride)
    served = (
        type(act1) is type(act2)
        and norm1.training
        and norm2.training
        and _fits(norm1, act1, x.numel() // x.shape[1])
        and _fits(norm2, act2, outputs)
        and _are_depthwise(convs, x.dtype, x.shape[1])
        and _serves(x, norm1, act1, conv, *convs, norm2, act2, *se.modules())
    )
    if not served:
        return se(norm_act(norm2, act2, depthwise_conv(conv, norm_act(norm1, act1, x))))
    excite = None if isinstance(se, nn.Identity) else se.excite
    weights = [conv.weight for conv in convs]
    norms = norm1.weight, norm1.bias, norm2.weight, norm2.bias
    parts = norm1, ACTS[type(act1)], stride, len(weights), norm2, excite
    return _Stage.apply(x, parts, *norms, *weights, *se.parameters())


class _Stage(Function):
    @staticmethod
    def forward(ctx, x, parts, weight1, bias1, weight2, bias2, *rest):
        norm1, act, stride, count, norm2, excite = parts
        weights = rest[:count]
        y = _empty_output(x, stride, x.shape[1])
        moments = torch.empty(2, x.shape[1], dtype=torch.float64)
        before = _norm(norm1, _moments(x), x.numel() // x.shape[1])
        _convolve(x, y, stride, weights, act, before, moments=moments)
        after = _norm(norm2, moments, y.numel() // y.shape[1])
        gate = None
        if excite is not None:
            pooled = torch.empty(x.shape[:2])
            _call("apply", _is_half(y), act, y, None, None, None, pooled, *_as_pixels(y), after)
            # A graph of its own: the mean comes from a kernel, and its gradient goes into one.
            ctx.pooled = pooled.to(x.dtype)[:, :, None, None].requires_grad_()
            with torch.enable_grad():
                ctx.gate = excite(ctx.pooled)
            gate = ctx.gate.detach().float().contiguous()
        result = torch.empty_like(y)
        _call("apply", _is_half(y), act, y, None, gate, result, None, *_as_pixels(y), after)
        ctx.save_for_backward(x, y, before, after, gate, *rest)
        ctx.act, ctx.stride, ctx.count = act, stride, count
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, y, before, after, gate, *rest = ctx.saved_tensors
        weights, se_weights = rest[: ctx.count], rest[ctx.count :]
        trained, se_trained = ctx.needs_input_grad[6 : 6 + ctx.count], ctx.needs_input_grad[6 + ctx.count :]
        dy, sums, dpooled = _in_pixels(dy), _sums(y), None
        _call("sums", _is_half(y), ctx.act, dy, y, *_as_pixels(y), after, gate is not None, sums)
        se_grads: list[Tensor | None] = [None] * len(se_weights)
        if gate is not None:
            dgate = sums[:, 0, : y.shape[1], None, None].to(y.dtype)
            wanted = [i for i, is_trained in enumerate(se_trained) if is_trained]
            found = torch.autograd.grad(ctx.gate, [ctx.pooled, *(se_weights[i] for i in wanted)], dgate)
            dpooled = (found[0].float() / (y.shape[2] * y.shape[3])).contiguous()
            for i, grad in zip(wanted, found[1:], strict=True):
                se_grads[i] = grad
        dweight2, dbias2 = _combine(sums, gate, dpooled, y, after)
        dx, sums = torch.empty_like(x), _sums(x)
        dweights = _convolve_back(
            *(dy, y, x, dx, ctx.stride, weights, trained),
            *(ctx.act, before, after, gate, dpooled, sums),
        )
        dweight1, dbias1 = _combine(sums, None, None, x, before)
        _call("norm_gradient", _is_half(x), 0, dx, x, dx, *_as_pixels(x), before)
        return dx, None, dweight1, dbias1, dweight2, dbias2, *dweights, *se_grads


# --- a whole block in eval mode --------------------------------------------------------------


def residual_in_eval(
    expand: nn.Module | None,
    norm1: nn.BatchNorm2d | None,
    act1: nn.Module | None,
    conv: nn.Module,
    norm2: nn.BatchNorm2d,
    act2: nn.Module,
    se: nn.Module | None,
    project: nn.Module,
    norm3: nn.BatchNorm2d,
    x: Tensor,
    has_skip: bool,
) -> Tensor | None:
    """``norm3(project(se(act2(norm2(conv(act1(norm1(expand(x)))))))))``, plus ``x`` where ``has_skip``.

    For ternary 1x1 convolutions. These only add: three inputs have 27 possible sums, which are computed once
    for all outputs. The kernel goes image by image, so that what lies between x and the result stays in a
    core's caches.

    Parameters
    ----------
    expand, norm1, act1 : None where a block has none of them
    conv : depthwise, or several over consecutive channel groups
    se : squeeze-excitation with ``conv_reduce`` and ``conv_expand`` (Swish between, then a sigmoid gate),
        ``nn.Identity`` or None
    x : (B, C, H, W)

    Returns
    -------
    None where the kernel does not apply; the caller then computes it layer by layer.
    """
    convs, se = list(conv.children()) or [conv], None if isinstance(se, nn.Identity) else se
    channels, norms = norm2.num_features, [norm2, norm3]
    layers = [conv, norm2, act2, project, norm3]
    if expand is not None:
        norms, layers = [norm1, *norms], [expand, norm1, act1, *layers]
    if se is not None:
        layers.append(se)
    served = (
        all(not norm.training and _fits(norm, act2, 0) for norm in norms)
        and (expand is None or (type(act1) is type(act2) and _is_ternary(expand, x.shape[1])))
        and _is_ternary(project, channels)
        and _are_depthwise(convs, x.dtype, channels)
        and _serves(x, *(module for layer in layers for module in layer.modules()))
    )
    if not served:
        return None
    stride = convs[0].stride[0]
    y = _empty_output(x, stride, norm3.num_features)
    packed = _Weights([conv.weight for conv in convs])
    excitation, reduced = None, 0
    if se is not None:
        reduced, transposed = se.conv_reduce.out_channels, se.conv_expand.weight.flatten(1).t()
        weights = se.conv_reduce.weight, se.conv_reduce.bias, transposed, se.conv_expand.bias
        excitation = _Weights(weights)
    _call(
        *("residual", _is_half(x), ACTS[type(act2)], stride, *packed.arguments, x, y),
        *(len(x), *x.shape[2:], *y.shape[2:], x.shape[1], channels, y.shape[1]),
        *((None, None, 0, None) if expand is None else (*_signs(expand, x.dtype), _norm(norm1, None, 0))),
        *(_norm(norm2, None, 0), excitation and excitation.arguments[-1], reduced),
        *(*_signs(project, x.dtype), _norm(norm3, None, 0), has_skip),
    )
    return y


def _is_ternary(conv1x1: nn.Module, channels: int) -> bool:
    """Whether the kernels know a 1x1 convolution of ``channels``, or several over equal groups of them."""
    convs = list(conv1x1.children()) or [conv1x1]
    return (
        all(isinstance(conv, TernaryConv2d) and conv.kernel_size == (1, 1) for conv in convs)
        and len({conv.weight.shape for conv in convs}) == 1
        and sum(conv.in_channels for conv in convs) == channels
        and convs[0].out_channels % OUTPUTS == 0
    )


def _signs(conv1x1: nn.Module, dtype: torch.dtype) -> tuple[Tensor, Tensor, int]:
    """Signs and scales of all outputs as the kernels take them, and the number of groups."""
    signs = [conv.signs() for conv in list(conv1x1.children()) or [conv1x1]]
    scale = torch.cat([ternary_scale(s).expand(len(s)) for s in signs]).to(dtype)
    return torch.cat(signs).float(), scale.float(), len(signs)
