"""Reading the packed network (:mod:`msunet_core.measure.packed_format`), which may come from a stranger."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ..data.images import MEAN, STD
from ..errors import StudyError
from ..files import ROOT
from ..model.checkpoint import MAX_BYTES, load_checkpoint
from ..model.network import VARIANTS, build_msunet
from ..model.precision import apply_opt_level
from ..model.ternary import GivenTernaryConv2d, TernaryConv2d, ternary_layers, ternary_scale
from .packed_format import (
    DIGEST_AT,
    FORMAT,
    MAX_HEADER,
    NETWORK_KEYS,
    STREAMS,
    digest_of,
    norm_parts,
    stored_layers,
)

# The network whose accuracy README tells. Committed, so it lies in the checkout, not where runs go.
SHIPPED = ROOT / "runs" / "pretrained" / "msunet_v3.safetensors"


def unpack(path: str | Path, opt_level: str = "O3") -> nn.Module:
    """The network of a packed file, in eval mode, on the CPU.

    Parameters
    ----------
    path : file that :func:`pack` wrote
    opt_level : the precision to run at. The values are those of FP16 at any of them; "O0" computes with them
        in FP32 and is what evaluate, score and apply_opt_level bring to another level

    Raises
    ------
    StudyError : one line that names the file and the fault: missing, truncated, altered, foreign, of another
        version, or its metadata do not belong to its data
    """
    return apply_opt_level(Reader(path).read().model, opt_level)


def load_network(path: str | Path, variant: str = "v3") -> tuple[nn.Module, dict]:
    """A network from a packed file, a checkpoint of the study's own or a published ``*.pth.tar``.

    Returns
    -------
    model : FP32 network in eval mode on the CPU
    info : what the file tells, as of load_checkpoint; of a packed file its metadata

    Raises
    ------
    StudyError : as :func:`unpack` and load_checkpoint do; the file holds another variant
    """
    reader = Reader(path)
    if variant not in VARIANTS or not reader.is_packed():
        return load_checkpoint(path, variant)
    found = reader.read()
    own = found.info["network"]["variant"]
    if VARIANTS[own] is not VARIANTS[variant]:
        raise StudyError(f"{path} is not an MSUNet-{variant} but an MSUNet-{own}: give that variant")
    return found.model, {**found.info, "dtype": "float16"}


def is_shipped() -> bool:
    """Whether the repository's network is there."""
    return SHIPPED.is_file()


def shipped() -> Path:
    """The packed file of the network that this repository ships."""
    if not is_shipped():
        raise StudyError(
            f"{SHIPPED} is not there, and no checkpoint was given; give one, or check out that file"
        )
    return SHIPPED


@dataclass
class _Found:
    """What a packed file holds; ``bits`` of each layer by part, for :func:`account`."""

    model: nn.Module
    info: dict
    bits: dict[str, dict[str, int]] = field(default_factory=dict)
    kinds: dict[str, str] = field(default_factory=dict)
    size: int = 0
    header: int = 0


class Reader:
    """One file, believed step by step: nothing is allocated by what it claims before the bytes are there."""

    def __init__(self, path: str | Path, content: bytes | None = None):
        self.path = path
        self.content = content

    def refuse(self, fault: str, remedy: str = "use another copy") -> StudyError:
        return StudyError(f"{self.path} {fault}; {remedy}")

    def is_packed(self) -> bool:
        """Whether this says of itself to be a packed file."""
        try:
            return "packed" in self.header()["__metadata__"]
        except (StudyError, LookupError, TypeError):
            return False

    def read(self) -> _Found:
        try:
            return self._read()
        except StudyError:
            raise
        except Exception as error:  # a stranger's bytes can make any reader raise anything
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
            raise self.refuse(f"is refused: {reason}") from error

    def header(self) -> dict:
        if self.content is None:
            self.content = self._bytes()
        length = int.from_bytes(self.content[:8], "little")
        if not 2 <= length <= min(MAX_HEADER, len(self.content) - 8) or self.content[8:9] != b"{":
            raise self.refuse("is not a packed network, or cut off", "give a file that pack wrote")
        try:
            return json.loads(self.content[8 : 8 + length])
        except (ValueError, RecursionError) as error:
            raise self.refuse("has a header that is not JSON") from error

    def _bytes(self) -> bytes:
        path = Path(self.path)
        if not path.is_file():
            raise StudyError(f"packed network {str(path)!r} is not a file; check the path")
        if path.stat().st_size > MAX_BYTES:
            raise self.refuse(
                f"has {path.stat().st_size} bytes, more than any MSUNet ({MAX_BYTES}); not opened"
            )
        try:
            return path.read_bytes()
        except OSError as error:
            raise self.refuse(f"cannot be read ({error.strerror})", "check its permissions") from error

    def _read(self) -> _Found:
        header = self.header()
        metadata = header.get("__metadata__")
        if not isinstance(metadata, dict) or "packed" not in metadata:
            if isinstance(metadata, dict) and "study" in metadata:
                raise self.refuse(
                    "is a checkpoint of this study, not packed", "pack it: python -m msunet_core pack"
                )
            raise self.refuse("is a safetensors file, but not a packed network", "give one that pack wrote")
        info = json.loads(metadata["packed"])
        if info.get("format") != FORMAT:
            raise self.refuse(
                f"has format {str(info.get('format'))[:40]!r}, this code reads {FORMAT!r}",
                "use the code that wrote it",
            )
        if self.content[DIGEST_AT] != digest_of(self.content):
            raise self.refuse("was altered or cut off: its digest does not match")
        if (info["mean"], info["std"]) != ([*MEAN], [*STD]):
            raise self.refuse(
                f"wants images normalised by {info['mean']} and {info['std']}, not by {MEAN} and {STD}",
                "use the code that wrote it",
            )
        return self._network(info, self._streams(header))

    def _streams(self, header: dict) -> dict[str, np.ndarray]:
        data = 8 + int.from_bytes(self.content[:8], "little")
        if list(header) != ["__metadata__", *STREAMS]:
            raise self.refuse(f"has not the tensors {', '.join(STREAMS)}, in this order")
        streams, offset = {}, 0
        for name, kind in STREAMS.items():
            width = 2 if kind == "F16" else 1
            (count,) = header[name]["shape"]
            end = offset + width * count if type(count) is int else -1
            wanted = {"dtype": kind, "shape": [count], "data_offsets": [offset, end]}
            if header[name] != wanted or not offset <= end <= len(self.content) - data:
                raise self.refuse(f"has a stream {name} that does not fit its bytes")
            streams[name] = np.frombuffer(self.content, "<f2" if width == 2 else "u1", count, data + offset)
            offset = end
        if data + offset != len(self.content):
            raise self.refuse(f"has {len(self.content) - data - offset} bytes behind its streams")
        return streams

    def _network(self, info: dict, streams: dict[str, np.ndarray]) -> _Found:
        network, letters, merged = info["network"], info["layers"], info["merged"]
        plain = isinstance(letters, str) and isinstance(merged, bool) and 0.0 <= info["eps"] <= 1.0
        if set(network) != NETWORK_KEYS or not plain:
            raise self.refuse("has metadata that this code did not write")
        try:
            with torch.device("meta"):  # shapes only
                outline = build_msunet(**network)
        except StudyError as error:
            raise self.refuse(f"tells of a network that cannot be: {error}") from error
        weights = [layer for _, layer in stored_layers(outline) if not isinstance(layer, nn.BatchNorm2d)]
        if len(letters) != len(weights) or any(map(_is_odd, letters, weights)):
            raise self.refuse(f"calls its layers {letters[:60]!r}, which is not its network")
        masked = sum(layer.weight.numel() for k, layer in zip(letters, weights, strict=True) if k in "TS")
        if len(streams["mask"]) != -(-masked // 8):
            raise self.refuse(f"has a mask of {len(streams['mask'])} bytes for {masked} weights")
        take = _Take(self, streams)
        tensors, bits, kinds = self._take_all(outline, letters, merged, take)
        take.finish()
        with torch.random.fork_rng(devices=[]):  # building draws weights: loading must not move the seed
            model = build_msunet(**network)
            _fill(model, tensors, info["eps"])
        info = {**info, "bytes": len(self.content)}
        size, header = len(self.content), 8 + int.from_bytes(self.content[:8], "little")
        return _Found(model, info, bits, kinds, size, header)

    def _take_all(self, outline, letters, merged, take):
        tensors, bits, kinds = {}, {}, {}
        names = iter(letters)
        kind = ""
        for name, layer in stored_layers(outline):
            before = dict(take.used)
            if isinstance(layer, nn.BatchNorm2d):
                found = {p: take.half(layer.num_features) for p in norm_parts(merged, kind)}
                kinds[name] = "batch norm behind " + ("ternary" if kind in "TB" else "FP16")
                bits[name] = {"scale": 16 * len(found.get("weight", ())), "shift": 16 * layer.num_features}
                bits[name]["statistics"] = 32 * layer.num_features * (not merged)
            else:
                kind = next(names)
                found = self._weights(name, layer, kind, take)
                kinds[name] = {"T": "ternary", "B": "binary", "S": "sparse", "D": "dense"}[kind]
                bits[name] = {part: take.used[part] - before[part] for part in ("mask", "sign")}
                bits[name]["scale"] = 16 * (kind in "TB")
                bits[name]["shift"] = 16 * len(found.get("bias", ()))
                bits[name]["values"] = (
                    16 * (take.used["half"] - before["half"]) - bits[name]["scale"] - bits[name]["shift"]
                )
            tensors |= {f"{name}.{part}": tensor for part, tensor in found.items()}
        return tensors, bits, kinds

    def _weights(self, name: str, layer: nn.Module, kind: str, take: _Take) -> dict[str, Tensor]:
        count, shape = layer.weight.numel(), layer.weight.shape
        if kind in "TB":
            scale = take.half(1)
            nonzero = take.bits("mask", count) if kind == "T" else np.ones(count, bool)
            weight = np.zeros(count, np.float32)
            weight[nonzero] = 1.0 - 2.0 * take.bits("sign", int(nonzero.sum()))
            signs = torch.from_numpy(weight).view(shape)
            wanted = ternary_scale(signs)
            if not torch.isclose(scale[0], wanted, rtol=2.0**-10, atol=0.0):  # a unit in FP16's last place
                raise self.refuse(f"has {scale.item():.5g} as the scale of {name}, not {wanted.item():.5g}")
            found = {"weight": signs}
        elif kind == "S":
            nonzero = torch.from_numpy(take.bits("mask", count))
            weight = torch.zeros(count)
            weight[nonzero] = take.half(int(nonzero.sum()))
            found = {"weight": weight.view(shape)}
        else:
            found = {"weight": take.half(count).view(shape)}
        return found if layer.bias is None else {**found, "bias": take.half(len(layer.bias))}


class _Take:
    """The three streams, each read from its start to its end; what is not there is refused, not allocated."""

    def __init__(self, reader: Reader, streams: dict[str, np.ndarray]):
        self.reader, self.streams = reader, streams
        self.used = dict.fromkeys(streams, 0)

    def _next(self, name: str, count: int, there: int) -> tuple[int, int]:
        start = self.used[name]
        if start + count > there:
            raise self.reader.refuse(f"has a stream {name} that ends too early")
        self.used[name] = start + count
        return start, start + count

    def half(self, count: int) -> Tensor:
        start, end = self._next("half", count, len(self.streams["half"]))
        return torch.from_numpy(self.streams["half"][start:end].astype(np.float32))

    def bits(self, name: str, count: int) -> np.ndarray:
        start, end = self._next(name, count, 8 * len(self.streams[name]))
        some = np.unpackbits(self.streams[name][start // 8 : -(-end // 8)], bitorder="little")
        return some[start % 8 : start % 8 + count].astype(bool)

    def finish(self) -> None:
        """Refuse streams with more than was taken, and values that are not finite."""
        for name, stream in self.streams.items():
            left = len(stream) - (self.used[name] if name == "half" else -(-self.used[name] // 8))
            filling = name != "half" and self.used[name] % 8 and stream[-1] >> self.used[name] % 8
            if left or filling:
                raise self.reader.refuse(f"has a stream {name} that is longer than its network")
        if not np.isfinite(self.streams["half"]).all():
            raise self.reader.refuse("holds NaN or Inf")


def _is_odd(letter: str, layer: nn.Module) -> bool:
    if isinstance(layer, TernaryConv2d):
        return letter != ("B" if layer.weights == "binary" else "T")
    return letter not in ("SD" if isinstance(layer, nn.Conv2d) else "D")


def _fill(model: nn.Module, tensors: dict[str, Tensor], eps: float) -> None:
    for name, layer in ternary_layers(model).items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, GivenTernaryConv2d(layer, tensors[f"{name}.weight"]))
    # Built as x * 1 + 0 where the file has no values: mean 0, variance 1.
    state = {**model.state_dict(), **tensors}
    model.load_state_dict(state)
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.eps = eps  # 0 where the scale has it already
    model.to(memory_format=torch.channels_last).eval()
