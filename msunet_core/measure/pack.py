"""Writing the packed network (:mod:`msunet_core.measure.packed_format`)."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ..data.images import MEAN, STD
from ..errors import StudyError
from ..files import atomic_path, read_json
from ..model.precision import apply_opt_level
from ..model.ternary import TernaryConv2d, ternary_scale
from .packed_format import (
    DIGEST_AT,
    FORMAT,
    MAX_HEADER,
    STREAMS,
    digest_of,
    float_letter,
    norm_parts,
)
from .packed_reader import Reader

# How much farther from those of FP64 merging may move class scores at O3, in parts of the largest |score|.
# Source and merged network round to 11 bits at other places, some 20 layers in a row, twice each: by chance
# that comes to sqrt(40) * 2^-11 = 0.003 of the scores. Three times that is allowed, beside what FP16 moves
# the source's own scores: much, where dead channels are amplified layer after layer.
MERGE_TOLERANCE = 0.01
_TINY = 2.0**-24  # the smallest FP16 number above 0
_ROUNDING = 2.0**-12  # of a value in FP16, in parts of it, typically
_NEARBY = 64  # FP16 numbers on either side, up to 6 % away


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
    content = _content_of(model, merge, accuracy, provenance)
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)
        Reader(temporary).read()
    return path


def _content_of(
    model: nn.Module, merge: bool, accuracy: dict | None = None, provenance: dict | None = None
) -> bytes:
    if not hasattr(model, "config"):
        raise StudyError(f"{type(model).__name__} is not a network of build_msunet; only those are packed")
    for name, tensor in model.state_dict().items():
        if not tensor.isfinite().all():
            raise StudyError(f"{name} holds NaN or Inf; pack another checkpoint")
    half = apply_opt_level(copy.deepcopy(model), "O3")  # refuses what is beyond FP16
    values = {name: tensor.detach().cpu() for name, tensor in half.state_dict().items()}
    weights = [layer for _, layer in stored_modules(half) if not isinstance(layer, nn.BatchNorm2d)]
    letters = "".join(map(letter_of, weights))
    if merge:
        _merge(model, half, values)
    packed = {
        "format": FORMAT,
        "network": model.config,
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
    for name, kind in STREAMS.items():
        end = offset + streams[name].nbytes
        header[name] = {"dtype": kind, "shape": [len(streams[name])], "data_offsets": [offset, end]}
        offset = end
    line = json.dumps(header, separators=(",", ":")).encode()
    line += b" " * (-len(line) % 8)
    if len(line) > MAX_HEADER:
        raise StudyError(
            f"a header of {len(line)} bytes is more than {MAX_HEADER}; shorten accuracy and provenance"
        )
    content = len(line).to_bytes(8, "little") + line + b"".join(streams[n].tobytes() for n in STREAMS)
    return content[: DIGEST_AT.start] + digest_of(content) + content[DIGEST_AT.stop :]


def stored_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """All that stores something, in the order of the file."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear | nn.BatchNorm2d):
            yield name, module


def letter_of(layer: nn.Module) -> str:
    if isinstance(layer, TernaryConv2d):
        return "B" if layer.weights == "binary" else "T"
    zeros = 1.0 - layer.weight.count_nonzero().item() / layer.weight.numel()
    return float_letter(zeros, isinstance(layer, nn.Linear))


def _merge(model: nn.Module, half: nn.Module, values: dict[str, Tensor]) -> None:
    """Put scale and shift of each batch norm into ``values``, the scale into the weights before it.

    Computed from the weights of ``model``, in FP64, and rounded once. No weight becomes 0 by it: zeros are
    counted.
    """
    before: list[tuple[str, nn.Module]] = []
    for name, layer in stored_modules(model):
        if not isinstance(layer, nn.BatchNorm2d):
            before.append((name, layer))
            continue
        scale = (layer.weight.double() / (layer.running_var.double() + layer.eps).sqrt()).detach()
        shift = (layer.bias.double() - layer.running_mean.double() * scale).detach()
        _rounded(scale, f"the scale of {name}")
        if isinstance(before[-1][1], TernaryConv2d):
            values[f"{name}.weight"], shift = _round_together(layer, scale)
        values[f"{name}.bias"] = _rounded(shift, f"the shift of {name}")
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
    off by (scale' - scale)^2 * variance + (scale' * mean + shift' - bias)^2 on average, and by
    scale'^2 * (2^-12 * mean)^2 because x comes from rounded values. A channel that never varied so gets the
    scale 0, also where its variance is not 0 but the rounding of FP32, and nothing amplifies its rounding.
    """
    mean, variance, bias = (t.detach().double() for t in (norm.running_mean, norm.running_var, norm.bias))
    steps = torch.arange(-_NEARBY, _NEARBY + 1, device=scale.device, dtype=torch.int16).view(-1, 1)
    near = (scale.half().view(torch.int16) + steps).view(torch.float16)  # by their bits, the next numbers
    near = torch.cat([near, torch.zeros_like(near[:1])])
    shift = (bias - near.double() * mean).half()
    off = (near - scale) ** 2 * variance + (near.double() * mean + shift - bias) ** 2
    off += (near.double() * _ROUNDING * mean) ** 2
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
    for name, layer in stored_modules(half):
        if isinstance(layer, nn.BatchNorm2d):
            halves += [values[f"{name}.{part}"].cpu() for part in norm_parts(merge, kind)]
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


def provenance_of(checkpoint: str | Path, info: dict) -> dict:
    """How a checkpoint came to be, in a few hundred bytes: from its own words and its run's provenance.json.

    info : as load_network returns it; what a packed file tells is passed on
    """
    if info.get("format") == FORMAT:
        return info["provenance"]
    kept = {name: info[name] for name in ("stage", "epoch", "arch", "metric") if name in info}
    folder = Path(checkpoint).resolve().parent
    for path in (folder / "provenance.json", folder.parent / "provenance.json"):
        try:
            run = read_json(path)
        except StudyError:
            continue
        kept |= {name: run[name] for name in ("command", "profile", "seed", "wall_seconds") if name in run}
        git = run.get("git")
        commit = git.get("commit") if isinstance(git, dict) else None
        return kept | {"hardware": run.get("hardware"), "commit": commit}
    return kept
