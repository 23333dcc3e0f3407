"""The CPU's hot spots as fused kernels: inverted residuals, batch norm, activation, depthwise convolution.

PyTorch computes a block layer by layer, and each layer of the many channels between its two 1x1 convolutions
passes over tensors that fit no cache. ``kernels.cpp`` goes image by image: expanded channels are made,
convolved, gated and projected while they lie in a core's caches, and the ternary 1x1 convolutions only add.
In training batch norm needs the whole batch, so a block keeps its depthwise output and makes the rest again
in the backward pass: no slower than to write it and read it back, and a quarter of the traffic.

The kernels are compiled at first use, in some ten seconds, by the C++ compiler of the machine for that
machine's processor, and kept in the user's cache folder. Where that is not to be had (no compiler, another
processor, a GPU, a dtype or memory layout that the kernels do not know, a hook that wants to see a module
called, ``MSUNET_FAST=0``), everything here computes the plain PyTorch form instead. Both agree up to the
rounding of FP32 sums in another order.
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
from ctypes import Structure, c_float, c_int, c_long, c_void_p
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from . import gpu
from .ternary import TernaryConv2d, folded_kernel, ternary_scale

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
FLOAT = {torch.float32}
# A variance so much smaller than what it is the difference of has lost two of the seven digits of FP32 sums.
CANCELLED = 1e-2

# C signature of each function of kernels.cpp, without the last argument, the threads: p pointer, i int,
# l long, f float.
SIGNATURES = {
    "moments": "iplllp",
    "norm": "pllppppffp",
    "apply": "iippplllp",
    "sums": "iipplllpp",
    "combine": "ppplllppp",
    "norm_gradient": "iippplllp",
    "conv_forward": "iiilpppppllllllppp",
    "conv_backward": "iiilpppllllllppppppppppppppppp",
    "products": "ipllllpp",
    "complete": "ipppplllpp",
    "project": "iippllppplppp",
    "project_backward": "iipppllpppppp",
    "residual": "iiilpppppllllllpppplppi",
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
    given = [_pointer(argument) for argument in arguments]
    getattr(library(), f"msunet_{name}")(*given, torch.get_num_threads())


def _pointer(argument):
    if isinstance(argument, Tensor):
        return argument.data_ptr()
    if isinstance(argument, _Weights):
        return argument.pointers
    return ctypes.byref(argument.given) if isinstance(argument, _Ternary) else argument


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
    fits = x.ndim == 4 and x.shape[1] == getattr(norm, "num_features", None)
    fits = fits and _fits(norm, act, x.numel() // x.shape[1])
    if fits and norm.training and _serves_on_gpu("batch norm", x, norm, act):
        skip_fits = skip is None or (skip.shape == x.shape and skip.dtype == x.dtype and gpu.is_images(skip))
        if skip_fits:
            return gpu.norm_act(norm, ACTS[type(act)], x, skip)
    skip_fits = skip is None or (skip.shape == x.shape and skip.dtype == x.dtype and _serves(skip))
    if not (fits and skip_fits and _serves(x, norm, act)):
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


def _combine(sums: Tensor, gate: Tensor | None, dpooled: Tensor | None, shape: tuple, affine: Tensor):
    """Gradients of the norm's weight and bias; completes ``affine`` for that of its input, of ``shape``.

    In place, of a tensor that may be saved for the backward pass: a second one writes the same again.
    """
    images, channels, height, width = shape
    dweight, dbias = torch.empty(2, channels).unbind()
    _call("combine", sums, gate, dpooled, images, height * width, channels, affine, dweight, dbias)
    return dweight, dbias


class _NormAct(Function):
    @staticmethod
    def forward(ctx, x, skip, norm, act, weight, bias):
        values = x.numel() // x.shape[1]
        affine = _norm(norm, _moments(x) if norm.training else None, values)
        y = torch.empty_like(x)
        _call("apply", _is_half(x), act, x, skip, y, *_as_pixels(x), affine)
        ctx.save_for_backward(x, affine)
        ctx.act = act
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, affine = ctx.saved_tensors
        dy, dx, sums = _in_pixels(dy), torch.empty_like(x), _sums(x)
        _call("sums", _is_half(x), ctx.act, dy, x, *_as_pixels(x), affine, sums)
        dweight, dbias = _combine(sums, None, None, x.shape, affine)
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
    """The weights of some convolutions as C arrays; keeps alive what these point to."""

    def __init__(self, weights: tuple[Tensor, ...]):
        self.tensors = [weight.detach().float().contiguous() for weight in weights]
        count = len(weights)
        sizes = (c_long * count)(*[weight.shape[-1] for weight in weights])
        channels = (c_long * count)(*[len(weight) for weight in weights])
        self.pointers = (c_void_p * count)(*[tensor.data_ptr() for tensor in self.tensors])
        self.arguments = count, sizes, channels, self.pointers


def _convolve(x, y, stride, weights, act=0, expand=None, before=None, moments=None) -> None:
    packed = _Weights(weights)
    shape = len(x), *x.shape[2:], *y.shape[2:], y.shape[1]
    _call("conv_forward", _is_half(x), act, stride, *packed.arguments, x, y, *shape, expand, before, moments)


def _convolve_back(
    dy, x, dx, stride, weights, trained, act=0, behind=(None,) * 7, expanding=None
) -> list[Tensor | None]:
    """Gradients of the weights; that of the input goes to ``dx``, or on through what came before.

    behind : output of the convolutions and what came after them, where dy is the gradient of that
    expanding : see :meth:`_Expansion.arguments`
    """
    packed = _Weights(weights)
    shape = len(x), *x.shape[2:], *dy.shape[2:], sum(map(len, weights))
    dweights = [
        torch.empty(w.shape) if is_trained else None for w, is_trained in zip(weights, trained, strict=True)
    ]
    pointers = (c_void_p * len(weights))(*[None if d is None else d.data_ptr() for d in dweights])
    given = *shape, dy, *behind, pointers, x, dx, *(expanding or (None,) * 6)
    _call("conv_backward", _is_half(x), act, stride, *packed.arguments, *given)
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
        dweights = _convolve_back(_in_pixels(dy), x, dx, ctx.stride, weights, trained)
        return dx, None, *dweights


# --- ternary 1x1 convolutions ----------------------------------------------------------------


class _GivenTernary(Structure):
    """As kernels.cpp takes a ternary convolution."""

    _fields_ = [(name, c_void_p) for name in ("signs", "scale")] + [
        (name, c_long) for name in ("groups", "in", "out")
    ]


class _Ternary:
    """Signs (groups, outputs, inputs) and the scale of each group, for the kernels; keeps them alive."""

    def __init__(self, signs: Tensor, scale: Tensor):
        groups, outputs, inputs = signs.shape
        self.signs = signs.float().contiguous()
        self.scale = scale.float()
        self._scales = self.scale.repeat_interleave(outputs)
        pointers = self.signs.data_ptr(), self._scales.data_ptr()
        self.given = _GivenTernary(*pointers, groups, groups * inputs, groups * outputs)

    @classmethod
    def folded(cls, kernel: Tensor, groups: int) -> _Ternary:
        """Of scale * T (outputs, inputs, 1, 1) with one scale a group."""
        kernel = kernel.detach().unflatten(0, (groups, -1)).flatten(2)
        return cls(kernel.sign(), kernel.abs().amax((1, 2)))

    def transposed(self) -> _Ternary:
        return _Ternary(self.signs.transpose(1, 2), self.scale)

    def weights(self) -> Tensor:
        """scale * T, float32 (groups, outputs, inputs)."""
        return self.signs * self.scale[:, None, None]


def _layers(conv1x1: nn.Module) -> tuple[nn.Module, ...]:
    return tuple(conv1x1.children()) or (conv1x1,)


def _is_ternary(conv1x1: nn.Module, channels: int, dtype: torch.dtype) -> bool:
    """Whether the kernels know a 1x1 convolution of ``channels``, or several over equal groups of them."""
    convs = _layers(conv1x1)
    return (
        all(isinstance(conv, TernaryConv2d) and conv.kernel_size == (1, 1) for conv in convs)
        and all(conv.weight.dtype == dtype for conv in convs)
        and len({conv.weight.shape for conv in convs}) == 1
        and sum(conv.in_channels for conv in convs) == channels
        and convs[0].out_channels % OUTPUTS == 0
    )


def _excitation(se: nn.Module | None) -> tuple[Tensor, ...]:
    """Weights and biases of squeeze-excitation."""
    layers = () if se is None else (se.conv_reduce, se.conv_expand)
    return tuple(parameter for layer in layers for parameter in (layer.weight, layer.bias))


def _excitation_arguments(excitation: tuple[Tensor, ...]) -> tuple:
    """As the kernels take them, the second weight transposed, and the number of reduced channels."""
    if not excitation:
        return None, 0
    reduce, reduce_bias, expand, expand_bias = excitation
    packed = _Weights((reduce, reduce_bias, expand.flatten(1).t(), expand_bias))
    return packed, len(reduce)


def _excite_back(pooled: Tensor, excitation: tuple[Tensor, ...], dgate: Tensor) -> list[Tensor]:
    """Gradients of pooled (B, C), float32, and of weights and biases from that of the gate (B, C)."""
    given = [pooled, *excitation]
    with torch.enable_grad():
        leaves = [tensor.detach().float().requires_grad_() for tensor in given]
        inner, *layers = [leaves[0], *(leaf.flatten(1) if leaf.ndim == 4 else leaf for leaf in leaves[1:])]
        gate = torch.sigmoid(F.linear(F.silu(F.linear(inner, *layers[:2])), *layers[2:]))
    found = torch.autograd.grad(gate, leaves, dgate)
    return [found[0], *(grad.to(tensor.dtype) for grad, tensor in zip(found[1:], excitation, strict=True))]


# --- a whole block ---------------------------------------------------------------------------


def residual(
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

    For ternary 1x1 convolutions, which only add: three inputs have 27 possible sums, computed once for all
    outputs.

    Parameters
    ----------
    expand, norm1, act1 : None where a block has none of them
    conv : depthwise, or several over consecutive channel groups
    se : squeeze-excitation with ``conv_reduce`` and ``conv_expand`` (Swish between, then a sigmoid gate),
        ``nn.Identity`` or None
    x : (B, C, H, W)

    Returns
    -------
    None where the kernels do not apply; the caller then computes it layer by layer.
    """
    convs, se = list(conv.children()) or [conv], None if isinstance(se, nn.Identity) else se
    stride, training = convs[0].stride[0], norm3.training
    outputs = x.shape[0] * -(-x.shape[2] // stride) * -(-x.shape[3] // stride)
    norms = [(norm2, act2, outputs), (norm3, None, outputs)]
    conv1x1s, chain = [(project, norm2.num_features)], [(project, norm3)]
    if expand is not None:
        norms.append((norm1, act1, x.numel() // x.shape[1]))
        conv1x1s.append((expand, x.shape[1]))
        chain += [(expand, norm1), (expand, norm2)]
    modules = conv, act2, se, act1, *(norm for norm, _, _ in norms), *(conv1x1 for conv1x1, _ in conv1x1s)
    served = (
        all(norm.training == training and _fits(norm, act, values) for norm, act, values in norms)
        and (expand is None or type(act1) is type(act2))
        and all(_is_ternary(conv1x1, channels, x.dtype) for conv1x1, channels in conv1x1s)
        and all(sum(layer.out_channels for layer in _layers(c)) == norm.num_features for c, norm in chain)
        and (not has_skip or (stride == 1 and norm3.num_features == x.shape[1]))
        # In training gradients go through them the other way round.
        and (not training or all(channels // len(_layers(c)) % OUTPUTS == 0 for c, channels in conv1x1s))
        and _are_depthwise(convs, x.dtype, norm2.num_features)
        and _serves(x, *(layer for module in modules if module is not None for layer in module.modules()))
    )
    if not served:
        return None
    if not training:
        return _residual_in_eval(expand, norm1, convs, norm2, act2, se, project, norm3, x, has_skip)
    kernels = [None if c is None else folded_kernel(_layers(c)) for c in (expand, project)]
    parts = _Parts(
        groups=[0 if c is None else len(_layers(c)) for c in (expand, project)],
        norms=[norm1, norm2, norm3],
        act=ACTS[type(act2)],
        stride=stride,
        convs=len(convs),
        has_skip=has_skip,
    )
    affine = [p for norm in parts.norms for p in (norm and norm.weight, norm and norm.bias)]
    weights = [layer.weight for layer in convs]
    return _Residual.apply(x, parts, *kernels, *affine, *weights, *_excitation(se))


@dataclass
class _Parts:
    """A block in training, but for its parameters."""

    groups: list[int]  # of expand (0 if there is none) and of project
    norms: list[nn.BatchNorm2d | None]
    act: int
    stride: int
    convs: int  # how many depthwise ones
    has_skip: bool


class _Residual(Function):
    @staticmethod
    def forward(ctx, x, parts, expand, project, *rest):
        weights, excitation = rest[6 : 6 + parts.convs], rest[6 + parts.convs :]
        _, norm2, norm3 = parts.norms
        expansion = None if expand is None else _Expansion(expand, parts.groups[0], parts.norms[0], x)
        expanding, before = (None, None) if expansion is None else (expansion.ternary, expansion.affine)
        y = _empty_output(x, parts.stride, norm2.num_features)
        moments = torch.empty(2, norm2.num_features, dtype=torch.float64)
        _convolve(x, y, parts.stride, weights, parts.act, expanding, before, moments)
        after = _norm(norm2, moments, y.numel() // y.shape[1])
        projecting = _Ternary.folded(project, parts.groups[1])
        z = _empty_output(y, 1, norm3.num_features)
        moments = torch.empty(2, norm3.num_features, dtype=torch.float64)
        pooled, gate = torch.empty(2, *y.shape[:2]).unbind() if excitation else (None, None)
        _call(
            *("project", _is_half(y), parts.act, y, z, *_as_pixels(y)[:2], projecting, after),
            *(*_excitation_arguments(excitation), pooled, gate, moments),
        )
        last = _norm(norm3, moments, z.numel() // z.shape[1])
        result, skip = torch.empty_like(z), x if parts.has_skip else None
        _call("apply", _is_half(z), 0, z, skip, result, *_as_pixels(z), last)
        ctx.save_for_backward(x, y, z, after, last, pooled, gate, *weights, *excitation)
        ctx.parts, ctx.expansion, ctx.projecting = parts, expansion, projecting
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, y, z, after, last, pooled, gate, *rest = ctx.saved_tensors
        parts, needed = ctx.parts, ctx.needs_input_grad
        weights, excitation = rest[: parts.convs], rest[parts.convs :]
        dy, last_sums = _in_pixels(dy), _sums(z)
        _call("sums", _is_half(z), 0, dy, z, *_as_pixels(z), last, last_sums)
        dweight3, dbias3 = _combine(last_sums, None, None, z.shape, last)
        back, sums, dpooled = ctx.projecting.transposed(), _sums(y), None
        dproject = torch.empty_like(ctx.projecting.signs) if needed[3] else None
        _call(
            *("project_backward", _is_half(y), parts.act, dy, z, y, *_as_pixels(y)[:2], back, last, after),
            *(gate, sums, dproject),
        )
        dexcitation = []
        if gate is not None:
            dpooled, *dexcitation = _excite_back(pooled, excitation, sums[:, 0, : y.shape[1]])
            dpooled = (dpooled / (y.shape[2] * y.shape[3])).contiguous()
        dweight2, dbias2 = _combine(sums, gate, dpooled, y.shape, after)
        dx = expanding = dexpand = dweight1 = dbias1 = None
        if ctx.expansion is None:
            dx = torch.empty_like(x)  # else it comes from the expansion
        else:
            expanding = ctx.expansion.arguments(x, needed[2])
        trained = needed[10 : 10 + parts.convs]
        behind = z, y, back, last, after, gate, dpooled
        dweights = _convolve_back(dy, x, dx, parts.stride, weights, trained, parts.act, behind, expanding)
        skip = dy if parts.has_skip else None
        if ctx.expansion is not None:
            dx, dexpand, dweight1, dbias1 = ctx.expansion.gradients(x, expanding, skip)
        elif skip is not None:
            dx += skip
        if dproject is not None:
            dproject = dproject.view(-1, dproject.shape[2], 1, 1).to(x.dtype)
        affine = dweight1, dbias1, dweight2, dbias2, dweight3, dbias3
        return dx, None, dexpand, dproject, *affine, *dweights, *dexcitation


def _products(u: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Sums over pixels: products (groups, inputs, inputs) and of u (groups, inputs) less the first pixel."""
    inputs = u.shape[1] // groups
    products = torch.empty(groups, inputs, inputs, dtype=torch.float64)
    sums = torch.empty(groups, inputs, dtype=torch.float64)
    _call("products", _is_half(u), u, *_as_pixels(u)[:2], groups, inputs, products, sums)
    return products.triu() + products.triu(1).transpose(1, 2), sums  # the kernel leaves one half out


def _double_products(u: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """As :func:`_products`, in FP64 throughout."""
    pixels = u.permute(0, 2, 3, 1).flatten(0, 2).double().unflatten(1, (groups, -1)).transpose(0, 1)
    pixels = pixels - pixels[:, :1]
    return pixels.transpose(1, 2) @ pixels, pixels.sum(1)


def _centred(products: Tensor, sums: Tensor, values: int) -> Tensor:
    """Sums of products (groups, inputs, inputs) of what is left of u without its mean."""
    return products - sums[:, :, None] * sums[:, None] / values


class _Expansion:
    """A block's first 1x1 convolution E and the norm behind it: both are linear in the block's input u.

    The moments of Eu are those of u, which has few channels, seen through E (and so, for halves, those before
    Eu is rounded). With g the gradient of the norm's output, that of Eu is scale * g + slope * (Eu - mean) +
    constant; slope and constant are known after the whole batch. The kernel gives E^T(scale * g) and the sum
    of u (scale * g)^T. The rest is linear in u.
    """

    def __init__(self, kernel: Tensor, groups: int, norm: nn.BatchNorm2d, u: Tensor):
        self.ternary = _Ternary.folded(kernel, groups)
        groups, _, inputs = self.ternary.signs.shape
        values = u.numel() // u.shape[1]
        weights = self.ternary.weights().double()
        products, sums = _products(u, groups)
        largest = (weights.square() * products.diagonal(dim1=1, dim2=2)[:, None]).sum(2)
        covariances = weights @ _centred(products, sums, values)  # of Eu and u, times values
        squares = (covariances * weights).sum(2)
        if (squares < CANCELLED * largest).any():  # differences of nearly equal channels, or a far pivot
            products, sums = _double_products(u, groups)
            covariances = weights @ _centred(products, sums, values)
            squares = (covariances * weights).sum(2)
        self.mean = u[0, :, 0, 0].view(groups, inputs) + sums / values
        moments = torch.stack([(weights @ self.mean[:, :, None]).flatten(), squares.clamp(min=0).flatten()])
        self.covariances = covariances.float()
        self.affine = _norm(norm, moments, values)

    def arguments(self, u: Tensor, is_trained: bool) -> tuple:
        """As the kernel takes them: E, its transposed, norm; and gives them: parts of gradients, sums."""
        groups, outputs, inputs = self.ternary.signs.shape
        du = torch.empty(len(u), *u.shape[2:], u.shape[1])
        sums = torch.zeros(len(u), SUMS, self.affine.shape[1])
        outer = torch.empty(groups, inputs, outputs) if is_trained else None
        return self.ternary, self.ternary.transposed(), self.affine, du, sums, outer

    def gradients(
        self, u: Tensor, arguments: tuple, skip: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """Of u (plus ``skip``), of E (outputs, inputs, 1, 1), and of the norm's weight and bias."""
        *_, du, sums, outer = arguments
        groups, outputs, inputs = self.ternary.signs.shape
        shape = len(u), groups * outputs, *u.shape[2:]
        dweight, dbias = _combine(sums, None, None, shape, self.affine)
        _, _, mean, _, slope, constant = (
            row[: groups * outputs].view(groups, outputs, 1) for row in self.affine
        )
        weights = self.ternary.weights()
        transposed = weights.transpose(1, 2)
        through_mean, offset = transposed @ (slope * weights), transposed @ (constant - slope * mean)
        dx = torch.empty_like(u)
        _call(
            *("complete", _is_half(u), u, du, skip, dx, du.numel() // du.shape[3], groups, inputs),
            *(through_mean.contiguous(), offset.flatten()),
        )
        dexpand = None
        if outer is not None:
            totals = self.mean[:, None].float() * (u.numel() // u.shape[1])
            dexpand = torch.baddbmm(outer.transpose(1, 2), constant, totals)
            dexpand = dexpand.addcmul_(slope, self.covariances).reshape(-1, inputs, 1, 1).to(u.dtype)
        return dx, dexpand, dweight, dbias


# --- a whole block in eval mode --------------------------------------------------------------


def _residual_in_eval(expand, norm1, convs, norm2, act2, se, project, norm3, x, has_skip) -> Tensor:
    stride = convs[0].stride[0]
    y = _empty_output(x, stride, norm3.num_features)
    packed = _Weights([conv.weight for conv in convs])
    expanding, before = (None, None) if expand is None else (_in_eval(expand, x.dtype), _norm(norm1, None, 0))
    _call(
        *("residual", _is_half(x), ACTS[type(act2)], stride, *packed.arguments, x, y),
        *(len(x), *x.shape[2:], *y.shape[2:], norm2.num_features, expanding, before, _norm(norm2, None, 0)),
        *_excitation_arguments(_excitation(se)),
        *(_in_eval(project, x.dtype), _norm(norm3, None, 0), has_skip),
    )
    return y


def _in_eval(conv1x1: nn.Module, dtype: torch.dtype) -> _Ternary:
    """With the scale as eval mode has it, a factor of the output."""
    signs = [conv.signs() for conv in _layers(conv1x1)]
    scale = torch.stack([ternary_scale(s) for s in signs]).to(dtype)
    return _Ternary(torch.stack(signs).flatten(2), scale)
