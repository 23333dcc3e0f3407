"""The packed network: an MSUNet as bytes on disk, as small as the score says, that anyone can load.

One safetensors file. Integers and floats are little-endian.

    8 bytes    H, the length of the header
    H bytes    the header, JSON, filled up with spaces: ``{"__metadata__": {"digest": ..., "packed": ...},
               "half": ..., "mask": ..., "sign": ...}`` without other spaces, in this order
    the rest   ``half`` (F16, one dimension), ``mask`` (U8), ``sign`` (U8), one directly after the other

``digest``, the 32 hexadecimal digits from byte 34 on, is the BLAKE2b of 16 bytes of the whole file with these
digits taken as 0: a file of which one bit changed is refused. ``packed`` is a text, a JSON object of its own:

    format      "msunet-packed-1"
    network     the arguments of build_msunet: variant, weights, alpha, num_classes, width
    layers      a letter for each convolution and for the classifier, in order: T ternary, B binary, S sparse,
                D dense
    merged      whether the scale of each batch norm went into the convolution before it
    eps         what batch norms add to a variance; 0 where they are merged
    mean, std   of each colour, in units of 0 .. 1, by which the images were normalised
    accuracy    what was measured with the packed network, at O3; or null
    provenance  how it was trained; or null

Bit i of ``mask`` and ``sign`` is the bit of value 2^(i mod 8) in byte floor(i / 8); the last byte is filled
up with zeros. No layer starts on a byte of its own. The layers follow each other in the order of the modules
(that of the state dict, so that a batch norm comes after its convolution), and each takes the next values of
each stream. N is the number of weights, which are in the order of (out, in, row, column):

    T           mask: N bits, 1 where the weight is not 0; sign: a bit for each 1 of them, 1 for -1; half: the
                scale sqrt(M), by which the output is multiplied
    B           sign: N bits; half: the scale sqrt(M)
    S           mask: N bits; half: the weights that are not 0
    D           half: N weights
    bias        half: a value for each output, directly after the weights (squeeze-excitation, classifier)
    batch norm  merged, after T or B: half: C scales, C shifts; x * scale + shift
                merged, after S or D: half: C shifts; x + shift
                else: half: weight, bias, running mean, running variance, C values each

That is what the score counts (SPEC section 9; T, B, S and D are its own kinds of layers), but for two
things: the scale of a batch norm behind a ternary layer, C numbers that the score merges into the one of the
layer, and the bias of the classifier. :func:`account` puts the difference down byte by byte.

All values are those that O3 computes with, T that of the weights rounded to FP16. So the unmerged network
gives the class scores of its source at O3 bit for bit. Merging multiplies before it rounds, not after, so a
merged one gives them to :data:`MERGE_TOLERANCE`. Every variant is packed in FP16, v1 too, whose published
accuracy is that of O0.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from .checkpoint import MAX_BYTES, load_checkpoint
from .data import MEAN, STD
from .errors import StudyError
from .files import atomic_path
from .network import VARIANTS, build_msunet
from .precision import apply_opt_level
from .scoring import FULL_BITS, RULES, SPARSE_FROM, score
from .ternary import TernaryConv2d, ternary_layers, ternary_scale

FORMAT = "msunet-packed-1"
# The network whose accuracy README tells. Committed, so it lies in the checkout, not where runs go.
SHIPPED = Path(__file__).resolve().parents[1] / "runs" / "pretrained" / "msunet_v3.safetensors"

# Largest |difference| of class scores at O3 that merging may make, in parts of the largest |score|. Source
# and merged network round to 11 bits at other places, some 20 layers in a row, twice each: by chance that
# comes to sqrt(40) * 2^-11 = 0.003 of the scores. Three times that is allowed, beside what FP16 moves the
# source's own scores at O3 away from those at O0: much, where dead channels are amplified layer after layer.
MERGE_TOLERANCE = 0.01

PARTS = ("mask", "sign", "values", "scale", "shift", "statistics", "header")
_STREAMS = {"half": "F16", "mask": "U8", "sign": "U8"}
_NETWORK = {"variant", "weights", "alpha", "num_classes", "width"}
_HEAD = b'{"__metadata__":{"digest":"'
_DIGEST_AT = slice(8 + len(_HEAD), 8 + len(_HEAD) + 32)
_MAX_HEADER = 2**20  # ours have about 1,500 bytes
_TINY = 2.0**-24  # the smallest FP16 number above 0
_NEARBY = 64  # FP16 numbers on either side, up to 6 % away


class GivenTernaryConv2d(TernaryConv2d):
    """A ternary convolution that was given its T: ``weight`` holds T itself and no threshold is asked."""

    def __init__(self, layer: TernaryConv2d, signs: Tensor):
        sizes = layer.in_channels, layer.out_channels, layer.kernel_size[0]
        super().__init__(*sizes, weights=layer.weights, alpha=layer.alpha)
        self.weight = nn.Parameter(signs, requires_grad=False)

    def signs(self) -> Tensor:
        """T, as it was given; float32."""
        return self.weight.detach().float()


# It computes what its parent does, so it costs the same.
RULES[GivenTernaryConv2d] = RULES[TernaryConv2d]


# -- writing -----------------------------------------------------------------------------------


def pack(
    model: nn.Module,
    path: str | Path,
    *,
    merge: bool = True,
    accuracy: dict | None = None,
    provenance: dict | None = None,
) -> Path:
    """Write a network as a packed file, whole or not at all.

    Parameters
    ----------
    model : FP32 network of build_msunet (or one at O3 already); left as it is
    path : file to write, usually ``*.safetensors``
    merge : merge the scales of batch norms, as the score counts them; False keeps all four vectors of each,
        and with them the bits of the source's class scores at O3
    accuracy, provenance : JSON objects to keep in the file; short ones, they count as its bytes

    Returns
    -------
    Path of the file

    Raises
    ------
    StudyError : not an MSUNet, values beyond FP16 or not finite, metadata too long or not JSON, a file that
        cannot be written
    """
    path = Path(path)
    content = _content(model, merge, accuracy, provenance)
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)
        _Reader(temporary).read()
    return path


def _content(
    model: nn.Module, merge: bool, accuracy: dict | None = None, provenance: dict | None = None
) -> bytes:
    if not hasattr(model, "config"):
        raise StudyError(f"{type(model).__name__} is not a network of build_msunet; only those are packed")
    half = apply_opt_level(copy.deepcopy(model), "O3")
    values = {name: tensor.detach().cpu() for name, tensor in half.state_dict().items()}
    for name, tensor in values.items():
        if not tensor.isfinite().all():
            raise StudyError(f"{name} holds NaN or Inf; pack another checkpoint")
    letters = "".join(_letter(layer) for _, layer in _layers(half) if not isinstance(layer, nn.BatchNorm2d))
    if merge:
        _merge(model, half, values)
    network = dict(model.config)
    for layer in ternary_layers(model).values():
        network["alpha"] = layer.alpha  # the schedule moves it
    packed = {
        "format": FORMAT,
        "network": network,
        "layers": letters,
        "merged": merge,
        "eps": 0.0 if merge else model.bn1.eps,
        "mean": MEAN,
        "std": STD,
        "accuracy": accuracy,
        "provenance": provenance,
    }
    try:
        text = json.dumps(packed, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise StudyError(f"accuracy or provenance is not JSON ({error}); give plain values") from error
    return _assemble(text, _streams(half, values, letters, merge))


def _assemble(text: str, streams: dict[str, np.ndarray]) -> bytes:
    header: dict = {"__metadata__": {"digest": "0" * 32, "packed": text}}
    offset = 0
    for name, kind in _STREAMS.items():
        end = offset + streams[name].nbytes
        header[name] = {"dtype": kind, "shape": [len(streams[name])], "data_offsets": [offset, end]}
        offset = end
    line = json.dumps(header, separators=(",", ":")).encode()
    line += b" " * (-len(line) % 8)
    if len(line) > _MAX_HEADER:
        raise StudyError(
            f"a header of {len(line)} bytes is more than {_MAX_HEADER}; shorten accuracy and provenance"
        )
    content = len(line).to_bytes(8, "little") + line + b"".join(streams[n].tobytes() for n in _STREAMS)
    return content[: _DIGEST_AT.start] + _digest(content) + content[_DIGEST_AT.stop :]


def _digest(content: bytes) -> bytes:
    digest = hashlib.blake2b(content[: _DIGEST_AT.start], digest_size=16)
    digest.update(b"0" * 32)
    digest.update(memoryview(content)[_DIGEST_AT.stop :])
    return digest.hexdigest().encode()


def _layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """All that stores something, in the order of the file."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear | nn.BatchNorm2d):
            yield name, module


def _letter(layer: nn.Module) -> str:
    if isinstance(layer, TernaryConv2d):
        return "B" if layer.weights == "binary" else "T"
    zeros = 1.0 - layer.weight.count_nonzero().item() / layer.weight.numel()
    # A linear layer counts as dense however many zeros it has.
    return "S" if isinstance(layer, nn.Conv2d) and zeros >= SPARSE_FROM else "D"


def _merge(model: nn.Module, half: nn.Module, values: dict[str, Tensor]) -> None:
    """Put scale and shift of each batch norm into ``values``, the scale into the weights before it.

    Computed from the weights of ``model``, in FP64, and rounded once. No weight becomes 0 by it: zeros are
    counted.
    """
    before: list[tuple[str, nn.Module]] = []
    for name, layer in _layers(model):
        if not isinstance(layer, nn.BatchNorm2d):
            before.append((name, layer))
            continue
        scale = (layer.weight.double() / (layer.running_var.double() + layer.eps).sqrt()).detach()
        shift = (layer.bias.double() - layer.running_mean.double() * scale).detach()
        _rounded(scale, f"the scale of {name}")
        values[f"{name}.bias"] = _rounded(shift, f"the shift of {name}")
        if isinstance(before[-1][1], TernaryConv2d):
            values[f"{name}.weight"], values[f"{name}.bias"] = _round_together(layer, scale)
        end = layer.num_features
        while end > 0:  # its convolutions, the last part of a mixed one first
            conv_name, conv = before.pop()
            part = scale[end - conv.out_channels : end]
            end -= conv.out_channels
            if not isinstance(conv, TernaryConv2d):
                weight = f"{conv_name}.weight"
                values[weight] = _scaled(conv.weight.double(), values[weight], part, conv_name)


def _round_together(norm: nn.BatchNorm2d, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and shift in FP16: of all scales nearby, and of 0, the one with which the outputs are off least.

    Where the mean is many deviations from 0, scale * mean and shift are large and nearly cancel: with each
    rounded to the nearest, their sum would be off by much. Over x of the norm's mean and variance outputs are
    off by (scale' - scale)^2 * variance + (scale' * mean + shift' - bias)^2 on average. A channel that never
    varied so gets the scale 0, and the layers behind it do not amplify its rounding.
    """
    mean, variance, bias = (t.detach().double() for t in (norm.running_mean, norm.running_var, norm.bias))
    steps = torch.arange(-_NEARBY, _NEARBY + 1, device=scale.device, dtype=torch.int16).view(-1, 1)
    near = (scale.half().view(torch.int16) + steps).view(torch.float16)  # by their bits, the next numbers
    near = torch.cat([near, torch.zeros_like(near[:1])])
    shift = (bias - near.double() * mean).half()
    off = (near - scale) ** 2 * variance + (near.double() * mean + shift - bias) ** 2
    best = off.nan_to_num(torch.inf, torch.inf).argmin(0, keepdim=True)
    return near.gather(0, best)[0], shift.gather(0, best)[0]


def _scaled(exact: Tensor, half: Tensor, scale: Tensor, name: str) -> Tensor:
    merged = _rounded(exact.detach() * scale.view(-1, 1, 1, 1), f"{name} with its batch norm")
    lost = (merged == 0) & (half.to(merged.device) != 0)
    merged[lost] = _TINY
    return torch.where(half.to(merged.device) == 0, 0.0, merged)


def _rounded(values: Tensor, what: str) -> Tensor:
    half = values.detach().half()
    if not half.isfinite().all():
        raise StudyError(
            f"{what} is beyond FP16 ({values.abs().amax().item():.3g}); pack it with merge=False"
        )
    return half


def _streams(half: nn.Module, values: dict[str, Tensor], letters: str, merge: bool) -> dict[str, np.ndarray]:
    halves: list[Tensor] = []
    bits: dict[str, list[Tensor]] = {"mask": [], "sign": []}
    kinds = iter(letters)
    kind = ""
    for name, layer in _layers(half):
        if isinstance(layer, nn.BatchNorm2d):
            halves += [values[f"{name}.{part}"].cpu() for part in _norm_parts(merge, kind)]
            continue
        kind = next(kinds)
        weight = values[f"{name}.weight"].cpu().flatten()
        if kind in "TB":
            signs = layer.signs().cpu()
            halves.append(ternary_scale(signs).view(1))
            weight = signs.flatten()
        if kind in "TS":
            bits["mask"].append(weight != 0)
        if kind in "TB":
            bits["sign"].append(weight[weight != 0] < 0)
        else:
            halves.append(weight[weight != 0] if kind == "S" else weight)
        if layer.bias is not None:
            halves.append(values[f"{name}.bias"])
    streams = {"half": torch.cat([part.half() for part in halves]).numpy().astype("<f2")}
    for name, parts in bits.items():
        flat = torch.cat(parts).numpy() if parts else np.zeros(0, bool)
        streams[name] = np.packbits(flat, bitorder="little")
    return streams


def _norm_parts(merged: bool, kind: str) -> tuple[str, ...]:
    """The vectors that a batch norm behind a layer of this kind keeps."""
    if not merged:
        return ("weight", "bias", "running_mean", "running_var")
    return ("weight", "bias") if kind in "TB" else ("bias",)


# -- reading -----------------------------------------------------------------------------------


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
    return apply_opt_level(_Reader(path).read().model, opt_level)


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
    reader = _Reader(path)
    if variant not in VARIANTS or not reader.is_packed():
        return load_checkpoint(path, variant)
    found = reader.read()
    own = found.info["network"]["variant"]
    if VARIANTS[own] is not VARIANTS[variant]:
        raise StudyError(f"{path} is not an MSUNet-{variant} but an MSUNet-{own}: give that variant")
    return found.model, {**found.info, "dtype": "float16"}


def shipped() -> Path:
    """The packed file of the network that this repository ships."""
    if not SHIPPED.is_file():
        raise StudyError(
            f"{SHIPPED} is not there, and no checkpoint was given; give one, or check out that file"
        )
    return SHIPPED


def provenance_of(checkpoint: str | Path, info: dict) -> dict:
    """How a checkpoint came to be, in a few hundred bytes: from its own words and its run's provenance.json.

    info : as load_checkpoint returns it
    """
    kept = {name: info[name] for name in ("stage", "epoch", "arch", "metric") if name in info}
    folder = Path(checkpoint).resolve().parent
    for path in (folder / "provenance.json", folder.parent / "provenance.json"):
        try:
            run = json.loads(path.read_text())
        except (OSError, ValueError):
            continue
        if isinstance(run, dict):
            kept |= {
                name: run[name] for name in ("command", "profile", "seed", "wall_seconds") if name in run
            }
            kept |= {"hardware": run.get("hardware"), "commit": (run.get("git") or {}).get("commit")}
            break
    return kept


@dataclass
class _Found:
    """What a packed file holds; ``bits`` of each layer by part, for :func:`account`."""

    model: nn.Module
    info: dict
    bits: dict[str, dict[str, int]] = field(default_factory=dict)
    kinds: dict[str, str] = field(default_factory=dict)
    size: int = 0
    header: int = 0


class _Reader:
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
        if not 2 <= length <= min(_MAX_HEADER, len(self.content) - 8) or self.content[8:9] != b"{":
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
        if self.content[_DIGEST_AT] != _digest(self.content):
            raise self.refuse("was altered or cut off: its digest does not match")
        if (info["mean"], info["std"]) != ([*MEAN], [*STD]):
            raise self.refuse(
                f"wants images normalised by {info['mean']} and {info['std']}, not by {MEAN} and {STD}",
                "use the code that wrote it",
            )
        return self._network(info, self._streams(header))

    def _streams(self, header: dict) -> dict[str, np.ndarray]:
        data = 8 + int.from_bytes(self.content[:8], "little")
        if list(header) != ["__metadata__", *_STREAMS]:
            raise self.refuse(f"has not the tensors {', '.join(_STREAMS)}, in this order")
        streams, offset = {}, 0
        for name, kind in _STREAMS.items():
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
        if set(network) != _NETWORK or not plain:
            raise self.refuse("has metadata that this code did not write")
        try:
            with torch.device("meta"):  # shapes only
                outline = build_msunet(**network)
        except StudyError as error:
            raise self.refuse(f"tells of a network that cannot be: {error}") from error
        weights = [layer for _, layer in _layers(outline) if not isinstance(layer, nn.BatchNorm2d)]
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
        for name, layer in _layers(outline):
            before = dict(take.used)
            if isinstance(layer, nn.BatchNorm2d):
                found = {p: take.half(layer.num_features) for p in _norm_parts(merged, kind)}
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

    def __init__(self, reader: _Reader, streams: dict[str, np.ndarray]):
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


# -- the bytes and the score -------------------------------------------------------------------


def account(source: nn.Module | str | Path, *, merge: bool = True) -> pd.DataFrame:
    """What the score counts and what lies on the disk, layer by layer.

    Parameters
    ----------
    source : a packed file, or a network, taken as :func:`pack` would write it without further metadata
    merge : of a network, as of :func:`pack`

    Returns
    -------
    DataFrame, a row for each layer that stores something and two for what is no layer, indexed by name:
        ``kind``; ``scored`` (bits that the score at O3 counts); the bytes of ``mask``, ``sign``, ``values``,
        ``scale``, ``shift``, ``statistics`` and ``header`` (in eighths, since layers share bytes); ``bytes``,
        their sum; ``difference`` (``bytes`` less the scored ones) and its ``reason``. The sum of ``bytes`` is
        the size of the file, that of ``scored`` 32 times the score's parameters.
    """
    if isinstance(source, nn.Module):
        found = _Reader("the packed network", _content(source, merge)).read()
    else:
        found = _Reader(source).read()
    counted = score(found.model, "O3").layers.set_index("name")["params"]
    rows = [
        {"layer": name, "kind": kind, "scored": round(counted.pop(name) * FULL_BITS), **found.bits[name]}
        for name, kind in found.kinds.items()
    ]
    if counted.sum():
        raise StudyError(f"the score counts parameters of {counted.idxmax()}, which no packed file has")
    fill = {part: -sum(bits.get(part, 0) for bits in found.bits.values()) % 8 for part in ("mask", "sign")}
    rows.append({"layer": "last byte of the bit streams", "kind": "file", **fill})
    rows.append({"layer": "header", "kind": "file", "header": 8 * found.header})
    table = pd.DataFrame(rows).set_index("layer").reindex(columns=["kind", "scored", *PARTS])
    table = table.fillna(dict.fromkeys(["scored", *PARTS], 0))
    table["scored"] = table["scored"].astype(int)
    table[list(PARTS)] /= 8
    table["bytes"] = table[list(PARTS)].sum(axis=1)
    table["difference"] = table["bytes"] - table["scored"] / 8
    table["reason"] = [_reason(row) for row in table.itertuples()]
    return table


def _reason(row) -> str:
    if row.difference == 0:
        return ""
    if row.Index == "header":
        return "metadata: network, provenance, digest"
    if row.kind == "file":
        return "bits that fill a byte"
    if row.Index == "classifier":
        return "the score leaves out the bias of a linear layer"
    if row.statistics:
        return "not merged: all four vectors are kept"
    return "one scale a channel cannot hide in the layer's one number"
