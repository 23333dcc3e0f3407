"""What a stage is recognised by, so that only its own past is resumed."""

from __future__ import annotations

import dataclasses
import hashlib
import json

from torch import nn

from ..model.checkpoint import tensor_bytes
from .recipe import StageConfig


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


def fingerprint_of(model: nn.Module) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor_bytes(tensor))
    return digest.hexdigest()


def difference(theirs: dict, own: dict) -> str:
    key = next(key for key in own if theirs[key] != own[key])
    if key == "start":
        return "it began with other weights"
    there, now = theirs[key], own[key]
    if isinstance(now, dict) and isinstance(there, dict):
        key = next(name for name in {**now, **there} if there.get(name) != now.get(name))
        there, now = there.get(key), now.get(key)
    return f"{key} {there!r} there, {now!r} now"
