"""The packed network runs as it lies: no dense ternary weights, no PyTorch.

``fast/packed.cpp`` computes it in one call, from lists of inputs that are made once, when a file is opened.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Iterator
from ctypes import POINTER, c_float, c_int, c_long, c_ubyte, c_void_p
from pathlib import Path

import numpy as np

from ..compiler import load
from ..data.normalisation import IMAGE_SIZE, MEAN, STD
from ..errors import StudyError
from ..memory import usable_cores
from ..model.architecture import VARIANTS, Block, scaled, split_channels
from .packed_reader import Reader, Stored, scale_of

SOURCE = Path(__file__).parents[1] / "fast" / "packed.cpp"
SHAPE = (IMAGE_SIZE, IMAGE_SIZE, 3)
# C signature of each function: p pointer to floats, n to a network, s to sizes, u to bytes, i int, l long.
SIGNATURES = {
    "new": "lppp",
    "free": "n",
    "block": "nlllll" + "iiil" + "ppp" + "spp" + "lpppp" + "lppp",
    "head": "nllippplpp",
    "bytes": "n",
    "scores": "nulpi",
}
C_TYPES = {
    **{"p": POINTER(c_float), "n": c_void_p, "s": POINTER(c_long), "u": POINTER(c_ubyte)},
    **{"i": c_int, "l": c_long},
}
MAX_THREADS = 64  # each has buffers of its own; on more cores it was never tried
RESULTS = {"new": c_void_p, "free": None, "bytes": c_long}


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled ``packed.cpp``; None where it cannot be had, which is warned of once."""
    signatures = {
        f"msunet_packed_{name}": ([C_TYPES[letter] for letter in signature], RESULTS.get(name, c_int))
        for name, signature in SIGNATURES.items()
    }
    otherwise = "the packed network runs in PyTorch"
    return load(SOURCE, signatures, "-pthread", link=("-pthread",), otherwise=otherwise)


class PackedNetwork:
    """A packed file, ready to answer.

    Parameters
    ----------
    path : file that :func:`~msunet_core.measure.pack.pack` wrote
    threads : how many compute, at most ``MAX_THREADS``; default: as many as this process may run on

    Raises
    ------
    StudyError : as :func:`~msunet_core.measure.unpack.unpack` does; fewer threads than one

    Notes
    -----
    Where there is no compiler, or with ``MSUNET_FAST=0``, the network is unpacked and runs in PyTorch at O0.
    It may be called from several threads, one of which computes at a time (give each a network of its own for
    more), and in a process that was forked while no call was running.
    """

    def __init__(self, path: str | Path, threads: int | None = None):
        self.threads = usable_cores() if threads is None else threads
        if not (isinstance(self.threads, int) and self.threads >= 1):
            raise StudyError(f"threads {threads!r} is not a whole number >= 1; leave it out for all cores")
        stored = Reader(path).read()
        self.info = stored.info
        self.num_classes: int = stored.info["network"]["num_classes"]
        self._library = library() if os.environ.get("MSUNET_FAST") != "0" else None
        self._plain = None
        if self._library is None:
            from .unpack import network_of  # loads PyTorch

            self._plain = network_of(stored)
        else:
            self._network = _Built(self._library, stored)

    @property
    def bytes(self) -> int:
        """What the 1x1 convolutions take in memory; 0 where PyTorch computes."""
        return 0 if self._plain is not None else self._library.msunet_packed_bytes(self._network.handle)

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Class scores, float32 (B, classes), of images, uint8 (B, 32, 32, 3), RGB.

        They are those of the unpacked network at O0 up to the rounding of FP32, and do not depend on the
        number of threads or on the other images.

        Raises
        ------
        StudyError : images of another shape or type; no memory
        """
        images = np.asarray(images)
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != SHAPE:
            raise StudyError(
                f"images are {images.dtype} {images.shape}, not uint8 (B, {', '.join(map(str, SHAPE))}); "
                "give them as they are stored, not normalised"
            )
        if self._plain is not None:
            return self._scores_of_plain(images)
        images = np.ascontiguousarray(images)
        scores = np.empty((len(images), self.num_classes), np.float32)
        threads = min(self.threads, MAX_THREADS)
        arguments = images.ctypes.data_as(C_TYPES["u"]), len(images), _pointer(scores), threads
        if not self._library.msunet_packed_scores(self._network.handle, *arguments):
            raise StudyError(f"no memory for {threads} threads; give fewer")
        return scores

    def _scores_of_plain(self, images: np.ndarray) -> np.ndarray:
        import torch

        from ..data.images import normalise

        with torch.inference_mode():
            batches = torch.from_numpy(images.copy()).split(250)  # evaluation imports this file
            return torch.cat([self._plain(normalise(batch)) for batch in batches]).numpy()


def _pointer(array: np.ndarray | None):
    return None if array is None else array.ctypes.data_as(C_TYPES["p"])


class _Built:
    """The network on the side of C++."""

    def __init__(self, library: ctypes.CDLL, stored: Stored):
        self.library, self.stored = library, stored
        network = stored.info["network"]
        self.is_ternary = network["weights"] != "float"
        self.width, self.classes = network["width"], network["num_classes"]
        weight, shift = self.folded("conv_stem", "bn1")
        mean, std = np.array(MEAN), np.array(STD)
        normal = np.concatenate([1 / (255 * std), -mean / std]).astype(np.float32)
        self.handle = library.msunet_packed_new(len(weight), *map(_pointer, (weight, shift, normal)))
        self.free = library.msunet_packed_free
        self._check(self.handle)
        channels, size = len(weight), IMAGE_SIZE
        separable = Block(channels, 1, (3,), act="ReLU")
        channels = self._add("blocks.0.0", separable, channels, channels, size, is_separable=True)
        for i, stage in enumerate(VARIANTS[network["variant"]], 1):
            for j, block in enumerate(stage):
                outputs = scaled(block.out_channels, self.width)
                channels = self._add(f"blocks.{i}.{j}", block, channels, outputs, size)
                size //= block.stride
        weight, scale, shift = self.conv1x1("conv_head", 1, "bn2")
        last = stored.tensors["classifier.weight"], stored.tensors["classifier.bias"]
        arguments = self.is_ternary, _pointer(weight), _pointer(scale), _pointer(shift), self.classes
        self._check(
            library.msunet_packed_head(self.handle, channels, len(scale), *arguments, *map(_pointer, last))
        )
        del self.stored  # dense, and no longer needed

    def __del__(self):
        if getattr(self, "handle", None):
            self.free(self.handle)

    def _check(self, result: int | None) -> None:
        if not result:
            raise StudyError("no memory for the packed network; free some and load it again")

    def _add(
        self, name: str, block: Block, channels: int, outputs: int, size: int, is_separable: bool = False
    ) -> int:
        """A block, given to C++; returns how many channels come out of it."""
        wide, reduced, tensors = block.wide(channels), block.reduced(channels), self.stored.tensors
        names = ("conv_pw", "bn2", "bn1") if is_separable else ("conv_pwl", "bn3", "bn2")
        expand = (None,) * 3
        if not is_separable:
            expand = self.conv1x1(f"{name}.conv_pw", block.expand_groups, f"{name}.bn1")
        project = self.conv1x1(f"{name}.{names[0]}", block.project_groups, f"{name}.{names[1]}")
        kernels = np.repeat(block.kernels, split_channels(wide, len(block.kernels))).astype(np.int64)
        taps, shift = self.depthwise(f"{name}.conv_dw", len(block.kernels), f"{name}.{names[2]}")
        parts = [
            f"{name}.se.{layer}.{part}"
            for layer in ("conv_reduce", "conv_expand")
            for part in ("weight", "bias")
        ]
        excitation = [tensors[part] for part in parts] if reduced else (None,) * 4
        has_skip = block.has_skip(channels, outputs)
        self._check(
            self.library.msunet_packed_block(
                *(self.handle, channels, wide, outputs, size, block.stride, block.act == "SiLU", has_skip),
                *(self.is_ternary, 0 if is_separable else block.expand_groups, *map(_pointer, expand)),
                *(kernels.ctypes.data_as(C_TYPES["s"]), _pointer(taps), _pointer(shift)),
                *(reduced, *map(_pointer, excitation)),
                *(block.project_groups, *map(_pointer, project)),
            )
        )
        return outputs

    def parts(self, name: str, groups: int) -> Iterator[np.ndarray]:
        """Weights of a convolution, or of the parts of a mixed one."""
        for i in range(groups):
            yield self.stored.tensors[f"{name}.weight" if groups == 1 else f"{name}.{i}.weight"]

    def affine(self, norm: str) -> tuple[np.ndarray, np.ndarray]:
        """Scale and shift, float64, of a batch norm."""
        tensors = self.stored.tensors
        bias = tensors[f"{norm}.bias"].astype(np.float64)
        weight = tensors.get(f"{norm}.weight", np.ones_like(bias)).astype(np.float64)
        mean, variance = tensors.get(f"{norm}.running_mean", 0.0), tensors.get(f"{norm}.running_var", 1.0)
        with np.errstate(invalid="ignore", divide="ignore"):  # a file's own business, as in PyTorch
            scale = weight / np.sqrt(variance + np.float64(self.stored.info["eps"]))
        return scale, bias - mean * scale

    def conv1x1(self, name: str, groups: int, norm: str) -> tuple[np.ndarray, ...]:
        """Weights, one group after the other, and scale and shift of each output."""
        scale, shift = self.affine(norm)
        parts = list(self.parts(name, groups))
        if self.is_ternary:
            scale *= np.repeat([scale_of(part) for part in parts], [len(part) for part in parts])
        return np.concatenate([part.ravel() for part in parts]), _float(scale), _float(shift)

    def folded(self, name: str, norm: str) -> tuple[np.ndarray, np.ndarray]:
        """Weights times the scale of the norm behind them, and its shift."""
        scale, shift = self.affine(norm)
        return _float(self.stored.tensors[f"{name}.weight"] * scale[:, None, None, None]), _float(shift)

    def depthwise(self, name: str, groups: int, norm: str) -> tuple[np.ndarray, np.ndarray]:
        """As :meth:`folded`, of one convolution or of several one behind the other."""
        scale, shift = self.affine(norm)
        taps, first = [], 0
        for part in self.parts(name, groups):
            taps.append((part * scale[first : first + len(part), None, None, None]).ravel())
            first += len(part)
        return _float(np.concatenate(taps)), _float(shift)


def _float(values: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(values, np.float32)
