"""The CPU's hot spots as fused kernels: batch norm with its activation, and depthwise convolution.

PyTorch computes them well but one by one: batch norm and activation each pass over tensors that fit no
cache, and the weight gradient of a 5x5 or 7x7 depthwise convolution takes several times its forward pass.
``kernels.cpp`` does the same sums in fewer passes. It is compiled at first use, in some seconds, by the C++
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

SOURCE = Path(__file__).with_name("kernels.cpp")
# Kernels are for this processor only, so wide vectors where it has them. Nothing links OpenMP's library:
# its functions are found in the copy that PyTorch has loaded, so that both use the same threads.
COMPILE = ("-std=c++17", "-O3", "-march=native", "-mprefer-vector-width=512", "-fopenmp", "-fPIC", "-w", "-c")
COMPILE_SECONDS = 120

ACTS = {type(None): 0, nn.ReLU: 1, nn.SiLU: 2}
KERNELS, STRIDES = (3, 5, 7), (1, 2)

# C signature of each function of kernels.cpp: p pointer, i int, l long, f float.
SIGNATURES = {
    "msunet_norm_forward": "iiipppllppppffpi",
    "msunet_norm_backward": "iipppllpppppi",
    "msunet_conv_forward": "iiippplllllllli",
    "msunet_conv_backward": "iiippppplllllllli",
}
C_TYPES = {"p": c_void_p, "i": c_int, "l": c_long, "f": c_float}

log = logging.getLogger(__name__)
_plain = False


def enabled() -> bool:
    """Whether the kernels are there and not switched off."""
    return not _plain and os.environ.get("MSUNET_FAST") != "0" and library() is not None


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
    except (OSError, subprocess.SubprocessError) as error:
        log.info("no fast CPU kernels, PyTorch's own are used: %s", str(error).splitlines()[0])
        return None
    for name, signature in SIGNATURES.items():
        function = getattr(loaded, name)
        function.argtypes, function.restype = [C_TYPES[letter] for letter in signature], None
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
    getattr(library(), name)(*given, torch.get_num_threads())


def _like_pixels(x: Tensor) -> Tensor:
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
    if not _norm_is_served(norm, act, x, skip):
        y = norm(x)
        y = y if act is None else act(y)
        return y if skip is None else y + skip
    if norm.training:
        norm.num_batches_tracked.add_(1)
    if norm.weight.dtype == torch.float32:
        state = norm.weight, norm.bias, norm.running_mean, norm.running_var
    else:  # O3, eval mode only
        state = [t.float() for t in (norm.weight, norm.bias, norm.running_mean, norm.running_var)]
    return _NormAct.apply(x, skip, *state, norm.training, norm.momentum, norm.eps, ACTS[type(act)])


def _norm_is_served(norm: nn.BatchNorm2d, act: nn.Module | None, x: Tensor, skip: Tensor | None) -> bool:
    return (
        type(norm) is nn.BatchNorm2d
        and type(act) in ACTS
        and norm.affine
        and norm.track_running_stats
        and norm.momentum is not None
        and norm.num_features == x.shape[1]
        and (skip is None or (skip.shape == x.shape and skip.dtype == x.dtype and _serves(skip)))
        # Training needs more than one value a channel, which PyTorch refuses in its own words; gradients
        # through running statistics are nothing that the study computes.
        and (
            (norm.weight.dtype == torch.float32 and x.numel() > x.shape[1])
            if norm.training
            else not torch.is_grad_enabled()
        )
        and _serves(x, norm, act)
    )


class _NormAct(Function):
    @staticmethod
    def forward(ctx, x, skip, weight, bias, running_mean, running_var, training, momentum, eps, act):
        y = torch.empty_like(x)
        channels = x.shape[1]
        rows = x.numel() // channels
        saved = weight.new_empty(2 * channels)
        is_half = x.dtype == torch.float16
        _call(
            *("msunet_norm_forward", is_half, act, training, x, skip, y, rows, channels),
            *(weight, bias, running_mean, running_var, momentum, eps, saved),
        )
        ctx.save_for_backward(x, weight, bias, saved)
        ctx.act = act
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight, bias, saved = ctx.saved_tensors
        dy = _like_pixels(dy)
        dx, dweight, dbias = torch.empty_like(x), torch.empty_like(weight), torch.empty_like(bias)
        channels = x.shape[1]
        is_half = x.dtype == torch.float16
        _call(
            *("msunet_norm_backward", is_half, ctx.act, dy, x, dx, x.numel() // channels, channels),
            *(weight, bias, saved, dweight, dbias),
        )
        return dx, dy if ctx.needs_input_grad[1] else None, dweight, dbias, *[None] * 6


# --- depthwise convolution -------------------------------------------------------------------


def depthwise_conv(convs: list[nn.Conv2d], x: Tensor) -> Tensor | None:
    """Depthwise convolutions of consecutive channel groups of ``x``, outputs concatenated.

    Groups are read from and written to where they lie. None where the kernels do not apply.
    """
    if not all(_is_depthwise(conv, x.dtype) for conv in convs) or not _serves(x, *convs):
        return None
    if sum(conv.in_channels for conv in convs) != x.shape[1] or len({conv.stride for conv in convs}) != 1:
        return None
    return _Depthwise.apply(x, convs[0].stride[0], *[conv.weight for conv in convs])


def _is_depthwise(conv: nn.Module, dtype: torch.dtype) -> bool:
    k, s = conv.kernel_size[0], conv.stride[0]
    return (
        type(conv) is nn.Conv2d
        and conv.in_channels == conv.out_channels == conv.groups
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


class _Depthwise(Function):
    @staticmethod
    def forward(ctx, x, stride, *weights):
        count, channels, height, width = x.shape
        size = (height - 1) // stride + 1, (width - 1) // stride + 1
        y = torch.empty(count, channels, *size, dtype=x.dtype, memory_format=torch.channels_last)
        first = 0
        for weight in weights:
            _call(
                *("msunet_conv_forward", x.dtype == torch.float16, weight.shape[-1], stride, x, y),
                *(weight.float().contiguous(), count, height, width, *size, channels, first, len(weight)),
            )
            first += len(weight)
        ctx.save_for_backward(x, *weights)
        ctx.stride = stride
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, *weights = ctx.saved_tensors
        dy = _like_pixels(dy)
        count, channels, height, width = x.shape
        dx = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        dweights, first = [], 0
        for weight, is_trained in zip(weights, ctx.needs_input_grad[2:], strict=True):
            dweight = weight.new_empty(weight.shape, dtype=torch.float32) if is_trained else None
            _call(
                *("msunet_conv_backward", x.dtype == torch.float16, weight.shape[-1], ctx.stride, dy, x, dx),
                *(
                    weight.float().contiguous(),
                    dweight,
                    count,
                    height,
                    width,
                    *dy.shape[2:],
                    channels,
                    first,
                    len(weight),
                ),
            )
            dweights.append(dweight if dweight is None else dweight.to(weight.dtype))
            first += len(weight)
        return dx, None, *dweights
