"""Checkpoints: the study's own (safetensors and JSON, no pickle) and the published ``*.pth.tar``.

Own format: one safetensors file. Tensors are named ``model/<state-dict name>``, ``momentum/<parameter>``
and ``mask/<parameter>``. The header's metadata has two entries: ``study``, a JSON object (network, stage,
epoch, history, ...), and ``digest``, a BLAKE2b over that JSON and every tensor, so that an altered file is
refused instead of trained on.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import math
import os
import pickletools
import re
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import safetensors
import torch
from safetensors.torch import save
from torch import Tensor, nn

from ..errors import StudyError, closest, reason, shown
from ..files import atomic_path, keep_as, read_bytes
from .architecture import MAX_BYTES, VARIANTS
from .network import build_msunet

FORMAT = "msunet-study-1"
PREVIOUS = ".previous"
DAMAGED = ".damaged"
# No pickle of a published checkpoint, which tells of 150 to 700 tensors, comes near either.
MAX_PICKLE = 2**20
MAX_OPCODES = 200_000
MAX_TEXT = 2**25  # characters of the JSON: a history of 10,000 epochs, with a row a layer in each
MAX_COUNT = 2**31  # of epochs, or of steps in one
# All that a published checkpoint names in its pickle. torch's own list is longer: some of it can be told
# to allocate any amount of memory.
CLASSES = re.compile(
    r"argparse Namespace|collections OrderedDict|torch (Size|device|\w+Storage)"
    r"|torch\._utils _rebuild_(tensor|tensor_v2|parameter)"
)
# torch.save before 1.6: magic number, protocol, system, the object, its storages' keys; then bytes.
LEGACY_PICKLES = 5


class DamagedError(StudyError):
    """A checkpoint that is cut off or altered: not what was once written."""


def save_checkpoint(path: str | Path, tensors: dict[str, Tensor], info: dict) -> None:
    """Write a checkpoint beside ``path``, read it back, then put it in place.

    The good checkpoint that was there before stays as ``<path>.previous``.

    Parameters
    ----------
    tensors : any devices and layouts; stored contiguous, on the CPU
    info : JSON object; floats survive exactly

    Raises
    ------
    StudyError : the disk is full, the folder cannot be written, what was read back differs, or ``info`` is
        not what a run writes
    """
    path = Path(path)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    text = json.dumps({**info, "format": FORMAT})
    _checked_info(path, text)
    digest = digest_of(text, tensors)
    with atomic_path(path) as temporary:
        temporary.write_bytes(save(tensors, {"study": text, "digest": digest}))
        try:
            read_checkpoint(temporary)  # its digest is of what is in memory now
        except StudyError as error:
            raise StudyError(
                f"{path} was not written: what was read back is not what was written; check the disk (the "
                "checkpoint before it is still there)"
            ) from error
        if path.exists():
            keep_as(path, path.with_name(path.name + PREVIOUS))


def read_checkpoint(path: str | Path) -> tuple[dict[str, Tensor], dict]:
    """Tensors and JSON of a checkpoint of the study's own, verified against its digest.

    Raises
    ------
    DamagedError : truncated or altered file
    StudyError : missing or foreign file, one that cannot be opened
    """
    path = Path(path)
    _refuse_missing(path)
    try:
        with safetensors.safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            # Copies: what was handed out lies in the file, where somebody may write.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (not a dict)
    except OSError as error:
        raise StudyError(f"{path} cannot be read ({reason(error)}); see to that, then try again") from error
    except Exception as error:  # damaged bytes can make the reader raise anything
        raise DamagedError(
            f"{path} is not a whole safetensors file ({reason(error)}); use another copy"
        ) from error
    if "study" not in metadata:
        raise StudyError(
            f"{path} is a safetensors file, but not a checkpoint of this study; give one written by it"
        )
    if metadata.get("digest") != digest_of(metadata["study"], tensors):
        raise DamagedError(f"{path} was altered or damaged: its digest does not match; use another copy")
    return tensors, _checked_info(path, metadata["study"])


def _checked_info(path: Path, text: str) -> dict:
    """The JSON of a checkpoint, each of its known entries of the kind that it must be.

    A digest only says that nobody altered the file since it was made, not who made it.
    """
    try:
        info = json.loads(text if len(text) <= MAX_TEXT else "")
    except (ValueError, RecursionError) as error:
        raise StudyError(
            f"{path} has an entry that is not JSON ({reason(error)}); use another copy"
        ) from error
    if not isinstance(info, dict) or info.get("format") != FORMAT:
        seen = shown(info.get("format") if isinstance(info, dict) else info)
        raise StudyError(f"{path} has format {seen}, this code reads {FORMAT}; use the code that wrote it")
    kinds = {
        **{name: _is_count for name in ("epoch", "step")},
        **{name: _is_mapping for name in ("identity", "network", "learner")},
        **{name: _is_table for name in ("history", "layers")},
        **{name: _is_text for name in ("stage", "opt_level")},
        "losses": _is_losses,
    }
    for name, fits in kinds.items():
        if name in info and not fits(info[name]):
            raise StudyError(f"{path} has {name} {shown(info[name])}, which no run writes; use another copy")
    return info


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < MAX_COUNT


def _is_text(value: object) -> bool:
    return isinstance(value, str) and value.isprintable()


def _is_mapping(value: object) -> bool:
    return isinstance(value, dict)


def _is_losses(value: object) -> bool:
    return isinstance(value, list) and all(type(loss) is float and math.isfinite(loss) for loss in value)


def _is_table(value: object) -> bool:
    """Rows with the same columns, of numbers and short texts."""
    return (
        isinstance(value, list)
        and all(isinstance(row, dict) and row.keys() == value[0].keys() for row in value)
        and all(
            type(cell) is float or (type(cell) is int and abs(cell) < MAX_COUNT) or _is_text(cell)
            for row in value
            for cell in row.values()
        )
    )


def latest_checkpoint(
    path: str | Path, say: Callable[[str], None] = print
) -> tuple[dict[str, Tensor], dict] | None:
    """The newest good checkpoint of a stage: ``path``, else the previous one, else None.

    A damaged ``path`` is renamed to ``<path>.damaged``, or the next save would put it in the place of the
    good one; ``say`` is given a line about it.

    Raises
    ------
    StudyError : files are there, but none of them is good; one is whole, but cannot be read or is of another
        version
    """
    path = Path(path)
    faults = []
    for candidate in (path, path.with_name(path.name + PREVIOUS)):
        if not candidate.exists():
            continue
        try:
            found = read_checkpoint(candidate)
        except DamagedError as error:
            faults.append(str(error))
            continue
        if faults:
            path.replace(path.with_name(path.name + DAMAGED))
            say(f"{faults[0]}; it is kept as *{DAMAGED}, and the checkpoint before it is used")
        return found
    if faults:
        raise StudyError(f"no usable checkpoint: {faults[0]}; remove it to start this stage again")
    return None


def load_checkpoint(path: str | Path, variant: str = "v3") -> tuple[nn.Module, dict]:
    """Load a network from a published ``*.pth.tar`` or a checkpoint of the study's own.

    Parameters
    ----------
    path : file; a published one is read by torch.load with ``weights_only=True`` and
        ``argparse.Namespace`` as the only further class (specification §10), so nothing in it can run
    variant : "v1", "v2" or "v3", the network the file must hold

    Returns
    -------
    model : FP32 network in eval mode on the CPU (FP16 files are widened exactly)
    info : dict with ``format``, ``dtype`` of the stored weights and what the file tells
        (``epoch``, ``arch``, ``metric``, ``version``, ``stage``, ``history``, ...)

    Raises
    ------
    StudyError : one line that names the fault: missing, truncated, altered, foreign or hostile file,
        another variant (with the first differing entries), NaN or Inf in a tensor
    """
    if variant not in VARIANTS:
        raise StudyError(f"variant {variant!r} is unknown; {closest(variant, VARIANTS)}")
    path = Path(path)
    try:
        _refuse_missing(path)
        state, info = _read_own(path) if _is_safetensors(path) else _read_published(path)
        config = _network_of(state, info)
        _refuse_other_network(path, state, config, variant)
        refuse_odd_tensors(path, state)
        config["variant"] = variant
        with torch.random.fork_rng(devices=[]):  # building draws weights: loading must not move the seed
            model = build_msunet(**config)
        model.load_state_dict(state)
    except StudyError:
        raise
    except Exception as error:  # a stranger's bytes can make any reader raise anything
        raise StudyError(f"{path} is refused: {reason(error)}; use another copy") from error
    info["dtype"] = str(state["conv_stem.weight"].dtype).removeprefix("torch.")
    return model.eval(), info


def read_momentum(path: str | Path) -> dict[str, Tensor]:
    """Momentum of SGD by parameter name, FP32, of a checkpoint of the study's own; empty of another file.

    Published checkpoints hold an optimizer's state by number, not by name, so theirs is not taken.
    """
    path = Path(path)
    _refuse_missing(path)
    if not _is_safetensors(path):
        return {}
    tensors, _ = read_checkpoint(path)
    momentum = {n.removeprefix("momentum/"): t for n, t in tensors.items() if n.startswith("momentum/")}
    refuse_odd_tensors(path, momentum)
    return momentum


def _refuse_missing(path: Path) -> None:
    if not os.path.isfile(path):
        raise StudyError(f"checkpoint {str(path)!r} is not a file; check the path")
    size = path.stat().st_size
    if size == 0:
        raise DamagedError(f"checkpoint {str(path)!r} is empty; use another copy")
    if size > MAX_BYTES:
        raise StudyError(
            f"checkpoint {str(path)!r} has {size} bytes, more than any MSUNet ({MAX_BYTES}); not opened"
        )


def _is_safetensors(path: Path) -> bool:
    # The header's length in 8 bytes, then JSON: no pickle and no zip begins like that.
    with path.open("rb") as file:
        head = file.read(9)
    return head[8:9] == b"{" or path.suffix == ".safetensors"


def _read_own(path: Path) -> tuple[dict[str, Tensor], dict]:
    tensors, info = read_checkpoint(path)
    return {n.removeprefix("model/"): t for n, t in tensors.items() if n.startswith("model/")}, info


def _read_published(path: Path) -> tuple[dict[str, Tensor], dict]:
    content = read_bytes(path, MAX_BYTES)
    if content.startswith(b"PK\x03\x04"):
        content = _checked_zip(path, content)
    elif not content.startswith(b"\x80"):  # as every pickle that torch wrote
        raise StudyError(
            f"{path} is refused: it is not a checkpoint, since it begins with {shown(content[:8])}; "
            "give a packed file, a published *.pth.tar or a checkpoint of this study"
        )
    else:
        pickles = io.BytesIO(content)
        for _ in range(LEGACY_PICKLES):
            _refuse_classes(path, pickles)
    # weights_only refuses every class but tensors, containers and the one named here.
    try:
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            content = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # torch's own words advise to read it without weights_only: never repeated
        raise StudyError(
            f"{path} is refused: it is no whole checkpoint of tensors and plain values "
            f"({type(error).__name__}); nothing of it was run; use another copy"
        ) from error
    state = content.get("state_dict", content) if isinstance(content, dict) else None
    if not isinstance(state, dict) or not state or not all(isinstance(t, Tensor) for t in state.values()):
        raise StudyError(f"{path} holds no state_dict of tensors; give a checkpoint with one")
    info = {"format": "pth.tar"}
    for key in ("epoch", "arch", "metric", "version"):
        value = content.get(key)
        is_number = _is_count(value) or (isinstance(value, float) and math.isfinite(value))
        if is_number or (isinstance(value, str) and len(value) <= 200):
            info[key] = value
    info["has_optimizer"] = "optimizer" in content
    named = {str(name).removeprefix("module."): tensor for name, tensor in state.items()}
    if len(named) < len(state):
        raise StudyError(f"{path} holds tensors of one name with and without 'module.'; use another copy")
    return named, info


def _checked_zip(path: Path, content: bytes) -> bytes:
    """The archive written anew from members that passed their checksums: what was checked is what is read."""
    copy = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as archive, zipfile.ZipFile(copy, "w") as checked:
        members = archive.infolist()
        if any(member.file_size > MAX_PICKLE for member in members if member.filename.endswith(".pkl")):
            raise StudyError(f"{path} has a pickle of more than {MAX_PICKLE} bytes; not opened")
        total = sum(member.file_size for member in members)
        if total > MAX_BYTES:
            raise StudyError(
                f"{path} unpacks to {total} bytes, more than any MSUNet ({MAX_BYTES}); not opened"
            )
        if len({member.filename for member in members}) < len(members):
            raise StudyError(f"{path} holds two members of one name; use another copy")
        for member in members:
            data = archive.read(member)
            if member.filename.endswith(".pkl"):
                _refuse_classes(path, io.BytesIO(data))
            checked.writestr(member.filename, data)
    return copy.getvalue()


def _refuse_classes(path: Path, stream: io.BytesIO) -> None:
    """Walk through one pickle, running nothing, and refuse any class or function but ``CLASSES``."""
    first = stream.tell()
    for number, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
        if number > MAX_OPCODES or stream.tell() - first > MAX_PICKLE:
            raise StudyError(f"{path} has a pickle longer than any MSUNet's; not opened")
        if opcode.name == "GLOBAL" and not CLASSES.fullmatch(argument):
            raise StudyError(
                f"{path} is refused: it names {argument.replace(' ', '.')[:80]!r}, and only tensors, "
                "containers and argparse.Namespace are read; nothing of it was run"
            )


def _network_of(state: dict[str, Tensor], info: dict) -> dict:
    """Arguments of build_msunet, but for the variant, that the file tells or shows."""
    classifier = state.get("classifier.bias")
    classes = len(classifier) if classifier is not None and classifier.ndim == 1 and len(classifier) else 100
    return {"num_classes": classes, **info.get("network", {})}


def _refuse_other_network(path: Path, state: dict[str, Tensor], config: dict, variant: str) -> None:
    found = {name: tuple(tensor.shape) for name, tensor in state.items()}
    own = config.get("variant", variant)
    try:
        differing = _differences(found, config, variant)
    except StudyError as error:
        raise StudyError(f"{path} tells of a network that cannot be: {error}") from error
    if not differing and VARIANTS[own] is VARIANTS[variant]:
        return
    fits = [v for v in VARIANTS if not _differences(found, config, v)]
    remedy = f"it fits {' and '.join(fits)}: give that variant" if fits else "it fits no variant"
    told = "; ".join(differing[:3]) or f"the file says {own}"
    raise StudyError(
        f"{path} is not an MSUNet-{variant}: {told}{' ...' if len(differing) > 3 else ''}; {remedy}"
    )


def _differences(found: dict[str, tuple], config: dict, variant: str) -> list[str]:
    with torch.device("meta"):  # shapes only: what a file claims is not allocated
        expected = {
            n: tuple(t.shape) for n, t in build_msunet(**{**config, "variant": variant}).state_dict().items()
        }
    lines = [f"{n} is {found.get(n, 'missing')}, not {s}" for n, s in expected.items() if found.get(n) != s]
    return lines + [f"{n[:80]} {s} is unexpected" for n, s in found.items() if n not in expected]


def refuse_odd_tensors(path: Path, state: dict[str, Tensor]) -> None:
    """Refuse tensors that no network has: other kinds of numbers, NaN, Inf, or more bytes than any MSUNet."""
    claimed = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    if claimed > MAX_BYTES:
        raise StudyError(
            f"{path} claims {claimed} bytes of tensors, more than any MSUNet ({MAX_BYTES}); not loaded"
        )
    for name, tensor in state.items():
        wanted = (torch.float32, torch.float16, torch.bfloat16)
        if name.endswith("num_batches_tracked"):
            wanted = (torch.int64,)
        plain = (
            type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided and not tensor.is_meta
        )
        if not plain or tensor.dtype not in wanted:
            kind = str(tensor.dtype if plain else tensor.layout).removeprefix("torch.")
            names = " or ".join(str(w).removeprefix("torch.") for w in wanted)
            raise StudyError(f"{path} has {name} as {kind}, not as {names}; use another checkpoint")
        if not tensor.isfinite().all():
            raise StudyError(f"{path} has NaN or Inf in {name}; use another checkpoint")
        if name.endswith(("running_var", "num_batches_tracked")) and (tensor < 0).any():
            raise StudyError(f"{path} has negative numbers in {name}; use another checkpoint")


def digest_of(text: str, tensors: dict[str, Tensor]) -> str:
    digest = hashlib.blake2b(text.encode(), digest_size=16)
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor_bytes(tensor))
    return digest.hexdigest()


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The values of a tensor of any device and layout as bytes, in the order of its dimensions."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
