"""What a stage is recognised by, so that only its own past is resumed, and what of that past is believed."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from pathlib import Path

import torch
from torch import Tensor, nn

from ..data.images import ImageData
from ..errors import StudyError
from ..fast import library
from ..files import move_aside
from ..model.checkpoint import latest_checkpoint, refuse_odd_tensors, tensor_bytes
from .code import code_of_training
from .distributed import Processes
from .recipe import StageConfig
from .records import Records

MAX_SCALE = 2.0**64  # of the losses at half precision, from 2^16 on doubled every 2000 good steps


def identity_of(
    stage: str,
    seed: int,
    config: StageConfig,
    data: ImageData,
    model: nn.Module,
    momentum: dict[str, Tensor] | None,
    processes: Processes,
) -> dict:
    """What makes a stage this one: JSON, equal for equal trainings."""
    return {
        "stage": stage,
        "seed": seed,
        "config": recipe_of(config, processes.world),
        "data": data.fingerprint,
        "network": model.config,
        "start": fingerprint_of(model.state_dict()),
        "momentum": fingerprint_of(momentum) if momentum else None,
        "code": code_of_training(),
    }


def arithmetic_of(device: torch.device) -> dict:
    """What the last bits of a stage depend on besides: JSON. Another one may go on, to other bits."""
    found = {"device": device.type, "torch": torch.__version__}
    if device.type == "cpu":
        found["threads"] = torch.get_num_threads()
        found["kernels"] = "compiled" if library.enabled() else "PyTorch's"
    return found


def saved_state(
    path: Path, identity: dict, epochs: int, processes: Processes, records: Records, aside: bool
) -> tuple[dict[str, Tensor], dict] | None:
    """Tensors and words of the checkpoint to go on from, the same in all processes; None: there is none.

    aside : a folder that holds another run is renamed, and a line says so, instead of being refused

    Raises
    ------
    StudyError : it is of another stage, or of more epochs than are asked for
    """
    first = processes.tell(identity)
    if first != identity:
        raise StudyError(
            f"process {processes.rank} does not train what process 0 does "
            f"({difference(first, identity)}); give all the same data, network and seed"
        )
    # The first process reads for all: the others may have no such folder.
    found = processes.tell(latest_checkpoint(path, records.say) if processes.writes else None)
    if found is None:
        return None
    _, info = found
    # A checkpoint without a record of its code is taken to come from the present code.
    theirs = {"code": identity["code"], **info.get("identity", {})}
    theirs = {key: theirs.get(key) for key in identity}
    if theirs != identity:
        fault = f"{path.parent} holds another run ({difference(theirs, identity)})"
        remedy = "give another folder or RUN, or rename this one"
    elif info.get("epoch", 0) + (info.get("step", 0) > 0) > epochs:
        held = f"{info['epoch']} epochs and {info.get('step', 0)} steps"
        fault = f"{path.parent} holds {held}, more than epochs {epochs}"
        remedy = "raise epochs or give another folder or RUN"
    else:
        return found
    if not aside:
        raise StudyError(f"{fault}; {remedy}")
    if processes.writes:
        moved = move_aside(path.parent)
        records.say(f"{fault}: it is kept as {moved}, and this stage begins anew")
    processes.greatest(0)  # nobody goes on before it is moved
    return None


def check_saved(
    folder: Path,
    tensors: dict[str, Tensor],
    info: dict,
    own: tuple[dict[str, Tensor], dict],
    steps: int,
    columns: set[str],
    layers: list[dict],
) -> None:
    """Refuse a checkpoint of this very stage that no run of it can have written.

    A digest only says that nobody altered the file since it was made, so nothing in it is believed for that.

    own : tensors and numbers of the learner that is to go on, as ``Learner.state`` gives them
    steps : of an epoch
    columns : of the history; layers : rows that each epoch adds to the table of layers
    """
    needed = {"epoch", "step", "losses", "history", "layers", "learner", "network"}
    fault = None
    if missing := sorted(needed - info.keys()):
        fault = f"it has no {missing[0]}"
    elif info["step"] > steps or len(info["losses"]) != info["step"]:
        fault = f"it is at step {info['step']} of {steps} with {len(info['losses'])} losses"
    elif [row.get("epoch") for row in info["history"]] != list(range(info["epoch"])):
        fault = f"its history is not that of {info['epoch']} epochs"
    elif info["history"] and info["history"][0].keys() != columns:
        fault = "its history has other columns"
    elif any(isinstance(cell, str) for row in info["history"] for cell in row.values()):
        fault = "its history has words among the numbers"
    elif [row.keys() for row in info["layers"]] != [row.keys() for row in layers] * (info["epoch"] + 1):
        fault = "its table of layers is not that of its epochs"
    elif not _is_threshold(info["network"].get("alpha")):
        fault = f"its alpha is {info['network'].get('alpha')!r}"
    else:
        fault = _odd_scaler(info["learner"].get("scaler"), own[1]["scaler"]) or _odd_state(tensors, own[0])
    if fault:
        raise StudyError(f"{folder} cannot be resumed: {fault}; rename the folder to begin this stage again")
    refuse_odd_tensors(folder, {name: t for name, t in tensors.items() if not name.startswith("mask/")})


def _is_threshold(alpha: object) -> bool:
    return type(alpha) in (int, float) and math.isfinite(alpha) and alpha >= 0


def _odd_scaler(scaler: object, own: dict) -> str | None:
    if not isinstance(scaler, dict) or scaler.keys() != own.keys():
        return "its loss scale is of another opt level"
    fixed = {name: scaler[name] for name in scaler if name not in ("scale", "_growth_tracker")}
    if not scaler:
        return None
    scale, good = scaler["scale"], scaler["_growth_tracker"]
    sound = type(scale) is float and 0 < scale <= MAX_SCALE and type(good) is int
    if not sound or not 0 <= good < own["growth_interval"] or any(fixed[name] != own[name] for name in fixed):
        return f"its loss scale is {scale!r} after {good!r} good steps"
    return None


def _odd_state(tensors: dict[str, Tensor], own: dict[str, Tensor]) -> str | None:
    if other := sorted(tensors.keys() ^ own.keys()):
        return f"it {'lacks' if other[0] in own else 'also has'} {other[0]}"
    for name, tensor in own.items():
        there = tensors[name]
        if there.shape != tensor.shape or there.dtype != tensor.dtype:
            return f"{name} is {there.dtype} {tuple(there.shape)}, not {tensor.dtype} {tuple(tensor.shape)}"
    return None


def other_arithmetic(theirs: object, own: dict) -> str | None:
    """A line for a stage that goes on with other threads, kernels or versions; None if they are the same."""
    if not isinstance(theirs, dict) or theirs == own:
        return None
    there = {name: theirs.get(name) for name in own if theirs.get(name) != own[name]} or theirs
    told = ", ".join(f"{name} {value!r} there, {own.get(name)!r} now" for name, value in there.items())
    return (
        f"goes on with another arithmetic ({told}): as good a result, "
        "but not to the last bit that of a run never interrupted"
    )


def recipe_of(config: StageConfig, world: int) -> dict:
    """What of a stage's configuration its past depends on.

    A run may be continued for more epochs. With batch norm over the whole batch, another number of processes
    may continue it; without, what a norm sees depends on that number. A field that came later says nothing
    where it is at its default, so that a checkpoint from before it is still resumed.
    """
    recipe = json.loads(json.dumps(dataclasses.asdict(config)))
    del recipe["checkpoint_every"], recipe["evaluate_every"], recipe["sync_batch_norm"]
    for later in dataclasses.fields(config):
        if later.metadata.get("later") and getattr(config, later.name) == later.default:
            del recipe[later.name]
    if world > 1 and not config.sync_batch_norm:
        recipe["batch_norm_processes"] = world
    if config.schedule == "step" or (config.schedule == "cosine" and config.cycle_epochs):
        del recipe["epochs"]
    return recipe


def fingerprint_of(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for name, tensor in tensors.items():
        digest.update(name.encode())
        digest.update(tensor_bytes(tensor))
    return digest.hexdigest()


def difference(theirs: dict, own: dict) -> str:
    key = next(key for key in own if theirs[key] != own[key])
    if key in ("start", "momentum"):
        return f"it began with other {'weights' if key == 'start' else key}"
    there, now = theirs[key], own[key]
    if key == "code" and isinstance(there, dict):
        name = next(name for name in {**now, **there} if there.get(name) != now.get(name))
        return f"msunet_core/{name} said something else when it was trained"
    if isinstance(now, dict) and isinstance(there, dict):
        key = next(name for name in {**now, **there} if there.get(name) != now.get(name))
        there, now = there.get(key), now.get(key)
    return f"{key} {there!r} there, {now!r} now"
