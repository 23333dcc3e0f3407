"""Reading the bytes of a packed network (:mod:`msunet_core.measure.packed_format`), perhaps a stranger's.

NumPy is all this needs. What it returns was checked to the last bit: the digest is right, the streams hold
what the network of the metadata asks for and nothing else, every scale belongs to its layer.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..data.normalisation import MEAN, STD
from ..errors import StudyError, reason
from ..files import read_bytes
from ..model.architecture import MAX_BYTES, Layer, stored_layers
from .packed_format import (
    DIGEST_AT,
    FORMAT,
    KINDS,
    MAX_HEADER,
    NETWORK_KEYS,
    STREAMS,
    digest_of,
    float_letter,
    norm_parts,
)


@dataclass
class Stored:
    """What a packed file holds.

    Attributes
    ----------
    info : its metadata, and ``bytes``, its size
    tensors : float32 by name and part, in the shapes of the state dict; of ternary layers the weight is T.
        Parts of batch norms that are not stored are not here: weight 1, mean 0, variance 1
    bits : of each layer by part, for ``account``
    kinds : what each layer is, in words
    header : bytes before the streams
    """

    info: dict
    tensors: dict[str, np.ndarray]
    bits: dict[str, dict[str, int]]
    kinds: dict[str, str]
    header: int


class Reader:
    """One file, believed step by step: nothing is allocated by what it claims before the bytes are there."""

    def __init__(self, path: str | Path):
        self.path = path
        self.content: bytes | None = None  # None until the file was read

    def refuse(self, fault: str, remedy: str = "use another copy") -> StudyError:
        return StudyError(f"{self.path} {fault}; {remedy}")

    def is_packed(self) -> bool:
        """Whether this says of itself to be a packed file."""
        try:
            return "packed" in self.header()["__metadata__"]
        except (StudyError, LookupError, TypeError):
            return False

    def read(self) -> Stored:
        try:
            return self._read()
        except StudyError:
            raise
        except Exception as error:  # a stranger's bytes can make any reader raise anything
            raise self.refuse(f"is refused: {reason(error)[:200]}") from error

    def header(self) -> dict:
        if self.content is None:
            self.content = read_bytes(self.path, MAX_BYTES)
        length = int.from_bytes(self.content[:8], "little")
        if not 2 <= length <= min(MAX_HEADER, len(self.content) - 8) or self.content[8:9] != b"{":
            raise self.refuse("is not a packed network, or cut off", "give a file that pack wrote")
        try:
            return json.loads(self.content[8 : 8 + length])
        except (ValueError, RecursionError) as error:
            raise self.refuse("has a header that is not JSON") from error

    def _read(self) -> Stored:
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

    def _network(self, info: dict, streams: dict[str, np.ndarray]) -> Stored:
        network, letters, merged = info["network"], info["layers"], info["merged"]
        plain = isinstance(letters, str) and isinstance(merged, bool) and 0.0 <= info["eps"] <= 1.0
        plain = plain and not (merged and info["eps"])
        if set(network) != NETWORK_KEYS or not plain:
            raise self.refuse("has metadata that this code did not write")
        try:
            layers = list(stored_layers(**network))
        except StudyError as error:
            raise self.refuse(f"tells of a network that cannot be: {error}") from error
        weights = [layer for layer in layers if not layer.is_norm]
        is_binary = network["weights"] == "binary"
        if len(letters) != len(weights) or any(
            letter not in _letters(layer, is_binary) for letter, layer in zip(letters, weights, strict=True)
        ):
            raise self.refuse(f"calls its layers {letters[:60]!r}, which is not its network")
        masked = sum(math.prod(layer.shape) for k, layer in zip(letters, weights, strict=True) if k in "TS")
        if len(streams["mask"]) != -(-masked // 8):
            raise self.refuse(f"has a mask of {len(streams['mask'])} bytes for {masked} weights")
        take = _Take(self, streams)
        tensors, bits, kinds = self._take_all(layers, letters, merged, take)
        take.finish()
        header = 8 + int.from_bytes(self.content[:8], "little")
        return Stored({**info, "bytes": len(self.content)}, tensors, bits, kinds, header)

    def _take_all(self, layers: list[Layer], letters: str, merged: bool, take: _Take):
        tensors, bits, kinds = {}, {}, {}
        names = iter(letters)
        kind = ""
        for layer in layers:
            name, before = layer.name, dict(take.used)
            if layer.is_norm:
                (channels,) = layer.shape
                found = {part: take.half(channels) for part in norm_parts(merged, kind)}
                if "running_var" in found and (found["running_var"] < 0).any():
                    raise self.refuse(f"has negative variances in {name}")
                kinds[name] = "batch norm behind " + ("ternary" if kind in "TB" else "FP16")
                bits[name] = {"scale": 16 * len(found.get("weight", ())), "shift": 16 * channels}
                bits[name]["statistics"] = 32 * channels * (not merged)
            else:
                kind = next(names)
                found = self._weights(layer, kind, take)
                kinds[name] = KINDS[kind]
                bits[name] = {part: take.used[part] - before[part] for part in ("mask", "sign")}
                bits[name]["scale"] = 16 * (kind in "TB")
                bits[name]["shift"] = 16 * len(found.get("bias", ()))
                bits[name]["values"] = (
                    16 * (take.used["half"] - before["half"]) - bits[name]["scale"] - bits[name]["shift"]
                )
            tensors |= {f"{name}.{part}": array for part, array in found.items()}
        return tensors, bits, kinds

    def _weights(self, layer: Layer, kind: str, take: _Take) -> dict[str, np.ndarray]:
        count = math.prod(layer.shape)
        if kind in "TB":
            scale = take.half(1).item()
            nonzero = take.bits("mask", count) if kind == "T" else np.ones(count, bool)
            weight = np.zeros(count, np.float32)
            weight[nonzero] = 1.0 - 2.0 * take.bits("sign", int(nonzero.sum()))
            wanted = scale_of(weight.reshape(layer.shape))
            if not abs(scale - wanted) <= 2.0**-10 * wanted:  # a unit in FP16's last place
                raise self.refuse(f"has {scale:.5g} as the scale of {layer.name}, not {wanted:.5g}")
        elif kind == "S":
            nonzero = take.bits("mask", count)
            weight = np.zeros(count, np.float32)
            weight[nonzero] = values = take.half(int(nonzero.sum()))
            if not values.all():
                raise self.refuse(f"stores zeros of {layer.name} as values")
        else:
            weight = take.half(count)
        zeros = 1.0 - np.count_nonzero(weight) / count
        if kind in "SD" and kind != float_letter(zeros, layer.is_linear):
            raise self.refuse(f"calls {layer.name} {kind}, of which {zeros:.1%} are zeros")
        found = {"weight": weight.reshape(layer.shape)}
        return {**found, "bias": take.half(layer.shape[0])} if layer.has_bias else found


def scale_of(signs: np.ndarray) -> float:
    """sqrt(M) of a kernel of signs, as :func:`~msunet_core.model.ternary.ternary_scale`, in FP64."""
    nonzeros = max(1, np.count_nonzero(signs))
    return math.sqrt(2.0 / math.prod(signs.shape[1:]) * signs.size / nonzeros)


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

    def half(self, count: int) -> np.ndarray:
        start, end = self._next("half", count, len(self.streams["half"]))
        return self.streams["half"][start:end].astype(np.float32)

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


def _letters(layer: Layer, is_binary: bool) -> str:
    if layer.is_ternary:
        return "B" if is_binary else "T"
    return "D" if layer.is_linear else "SD"
