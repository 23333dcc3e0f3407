"""The opt levels O0 to O3 of apex.amp, on plain PyTorch (specification §8).

NVIDIA removed ``amp`` from apex in May 2025, so the study carries its own. On a GPU half tensors
run in half kernels. On a CPU those kernels are 10 to 40 times slower than FP32, so there the
tensors are real ``torch.float16`` tensors, but each convolution, linear layer and batch norm
widens them, computes in FP32 and rounds its result: FP16 storage with FP32 accumulation, which is
also what the tensor cores of a GPU do.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from ..errors import StudyError, closest
from .ternary import TernaryConv2d

OPT_LEVELS = ("O0", "O1", "O2", "O3")

# Dynamic loss scale of O1 and O2: start, growth after that many good steps, cut on overflow.
LOSS_SCALE = 2.0**16
GROWTH_INTERVAL = 2000
GROWTH_FACTOR = 2.0
BACKOFF_FACTOR = 0.5

HALF_MAX = torch.finfo(torch.float16).max
# FP16 has all its digits from 2^-14 on; the threshold of ternary weights lies some 2^3 below the largest.
_SMALL = 2.0**-8

_WIDENED = {F.conv2d, F.linear, F.batch_norm}


@contextlib.contextmanager
def without_tf32() -> Iterator[None]:
    """Inside this context a GPU multiplies FP32 numbers as such, not rounded to TF32 (specification §6)."""
    kinds = torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn
    before = [kind.fp32_precision for kind in kinds]
    try:
        for kind in kinds:
            kind.fp32_precision = "ieee"
        yield
    finally:
        for kind, precision in zip(kinds, before, strict=True):
            kind.fp32_precision = precision


class WidenHalf(TorchFunctionMode):
    """Inside this context half tensors on a CPU are computed in FP32 and rounded to FP16.

    ``autocast=True`` (O1) also rounds the FP32 arguments of convolutions and linear layers.
    """

    def __init__(self, autocast: bool = False):
        super().__init__()
        self.autocast = autocast

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func not in _WIDENED or args[0].is_cuda:
            return func(*args, **kwargs)
        to_half = self.autocast and func is not F.batch_norm
        if args[0].dtype != torch.float16 and not to_half:
            return func(*args, **kwargs)
        narrow = [_round_to_half(a) if to_half else a for a in args]
        wide = [_widen(a) for a in narrow]
        wide_kwargs = {k: _widen(_round_to_half(v) if to_half else v) for k, v in kwargs.items()}
        result = func(*wide, **wide_kwargs).half()
        if func is F.batch_norm:
            _write_back(narrow[1:3], wide[1:3])  # running statistics are updated in place
        return result


def _round_to_half(value):
    return value.half() if isinstance(value, Tensor) and value.dtype == torch.float32 else value


def _widen(value):
    return value.float() if isinstance(value, Tensor) and value.dtype == torch.float16 else value


def _write_back(narrow: Iterable, wide: Iterable) -> None:
    for old, new in zip(narrow, wide, strict=True):
        if isinstance(old, Tensor) and old is not new:
            old.copy_(new)


class _Casts:
    """Forward hooks of a model: input to FP16, output back to FP32, the CPU context between."""

    def __init__(self, level: str):
        self.level = level
        self.contexts: list = []

    def before(self, module: nn.Module, args: tuple) -> tuple:
        context = None
        if args[0].device.type == "cpu":
            context = WidenHalf(autocast=self.level == "O1")
        elif self.level == "O1":
            context = torch.autocast(args[0].device.type, dtype=torch.float16)
        if context is not None:
            context.__enter__()
        self.contexts.append(context)
        return args if self.level == "O1" else (args[0].half(), *args[1:])

    def after(self, module: nn.Module, args: tuple, output):
        context = self.contexts.pop()
        if context is not None:
            context.__exit__(None, None, None)
        return output.float() if isinstance(output, Tensor) else output


def apply_opt_level(model: nn.Module, level: str = "O0", *, backend: str = "native") -> nn.Module:
    """Bring a FP32 model to an opt level, in place; its ``opt_level`` attribute then names it.

    ===== ================= ======================== ====================
    level weights           batch norm               inputs / outputs
    ===== ================= ======================== ====================
    O0    FP32              FP32                     FP32
    O1    FP32, cast per op FP32                     autocast
    O2    FP16              FP32, FP16 activations   to FP16 / back to FP32
    O3    FP16              FP16                     to FP16 / back to FP32
    ===== ================= ======================== ====================

    Parameters
    ----------
    model : FP32 module whose forward takes one tensor (B, C, H, W)
    level : "O0", "O1", "O2" or "O3" (specification §8)
    backend : "native", or "apex" for a legacy NVIDIA apex that still has ``apex.amp`` (CUDA only)

    Raises
    ------
    StudyError : unknown level, a model at another level already, a value beyond FP16, no ``apex.amp``
    """
    if level not in OPT_LEVELS:
        raise StudyError(f"opt level {level!r} is unknown; {closest(level, OPT_LEVELS)}")
    current = getattr(model, "opt_level", "O0")
    if current != "O0":
        if current == level:
            return model
        raise StudyError(
            f"the model is at {current} already, not FP32; apply {level} to a fresh FP32 copy of it"
        )
    if backend == "apex":
        model = legacy_apex().initialize(model, opt_level=level, verbosity=0)
    elif backend != "native":
        raise StudyError(f"backend {backend!r} is unknown; {closest(backend, ('native', 'apex'))}")
    elif level != "O0":
        if level in ("O2", "O3"):
            _halve(model, batch_norm=level == "O3")
        casts = _Casts(level)
        model.register_forward_pre_hook(casts.before)
        model.register_forward_hook(casts.after, always_call=True)
    model.opt_level = level
    return model


def _halve(model: nn.Module, *, batch_norm: bool) -> None:
    """Cast all that is to be FP16, or nothing where a value is beyond it."""
    parameters, buffers = [], []
    for path, module in model.named_modules():
        if isinstance(module, _BatchNorm) and not batch_norm:
            continue
        for name, parameter in module.named_parameters(recurse=False):
            values = parameter.data
            if isinstance(module, TernaryConv2d):
                values = into_half_range(values)
            parameters.append((parameter, _half(values, f"{path}.{name}")))
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_floating_point():
                buffers.append((module, name, _half(buffer, f"{path}.{name}")))
    for parameter, half in parameters:
        parameter.data = half
    for module, name, half in buffers:
        setattr(module, name, half)


def into_half_range(weights: Tensor) -> Tensor:
    """Ternary weights that FP16 can round without losing T, which does not change with the size of W.

    Where the largest is beyond FP16, or so small that those at the threshold have no digits left in it, all
    are multiplied by one power of two, which keeps their digits; else they are returned as they are.
    """
    largest = weights.abs().amax()
    _, exponent = torch.frexp(largest)
    scaled = torch.ldexp(weights, -exponent.clamp(-120, 120))  # whose power of two is an FP32 number
    return torch.where((largest > HALF_MAX) | (largest < _SMALL), scaled, weights)


def _half(values: Tensor, name: str) -> Tensor:
    half = values.half()
    if (values.isfinite() & ~half.isfinite()).any():
        raise StudyError(
            f"{name} holds {values.abs().amax().item():.3g}, beyond {HALF_MAX:g}, the largest FP16 number; "
            "use O0 or O1 for this network"
        )
    return half


def legacy_apex():
    """The module ``apex.amp`` of a legacy NVIDIA apex, or a StudyError that says why not."""
    try:
        import apex
    except ImportError as error:
        raise StudyError(
            "backend 'apex' is not installed; use backend='native', which needs no apex"
        ) from error
    amp = getattr(apex, "amp", None)
    if not hasattr(amp, "initialize"):
        raise StudyError(
            "the installed 'apex' has no apex.amp (NVIDIA removed it in May 2025, and the package of that "
            "name on the Python package index is an unrelated project); use backend='native'"
        )
    return amp
