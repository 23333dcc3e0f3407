"""What a stage is recognised by, so that only its own past is resumed."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

from torch import Tensor, nn

from ..data.images import ImageData
from ..errors import StudyError
from ..model.checkpoint import latest_checkpoint, tensor_bytes
from .distributed import Processes
from .recipe import StageConfig


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
    }


def saved_state(
    path: Path, identity: dict, epochs: int, processes: Processes
) -> tuple[dict[str, Tensor], dict] | None:
    """Tensors and words of the checkpoint to go on from, the same in all processes; None: there is none.

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
    found = processes.tell(latest_checkpoint(path) if processes.writes else None)
    if found is None:
        return None
    _, info = found
    theirs = info.get("identity", {})
    theirs = {key: theirs.get(key) for key in identity}
    if theirs != identity:
        raise StudyError(
            f"{path.parent} holds another run ({difference(theirs, identity)}); "
            "give another folder or RUN, or remove this one"
        )
    if info["epoch"] + (info["step"] > 0) > epochs:
        raise StudyError(
            f"{path.parent} holds {info['epoch']} epochs and {info['step']} steps, more than epochs "
            f"{epochs}; raise epochs or give another folder or RUN"
        )
    return found


def recipe_of(config: StageConfig, world: int) -> dict:
    """What of a stage's configuration its past depends on.

    A run may be continued for more epochs. With batch norm over the whole batch, another number of processes
    may continue it; without, what a norm sees depends on that number. A field that came later says nothing
    where it is at its default, so that a checkpoint from before it is still resumed.
    """
    recipe = json.loads(json.dumps(dataclasses.asdict(config)))
    del recipe["checkpoint_every"], recipe["sync_batch_norm"]
    for later in dataclasses.fields(config):
        if later.metadata.get("later") and getattr(config, later.name) == later.default:
            del recipe[later.name]
    if world > 1 and not config.sync_batch_norm:
        recipe["batch_norm_processes"] = world
    if config.schedule == "step":
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
    if isinstance(now, dict) and isinstance(there, dict):
        key = next(name for name in {**now, **there} if there.get(name) != now.get(name))
        there, now = there.get(key), now.get(key)
    return f"{key} {there!r} there, {now!r} now"
