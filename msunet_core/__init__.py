"""MSUNet-v3: a reproduction study: ternary, pruned, half-precision networks for CIFAR-100 and their score."""

from __future__ import annotations

import importlib

from .memory import keep_freed_memory, repeat_exactly, spin_shortly

spin_shortly()  # before PyTorch is loaded
repeat_exactly()
keep_freed_memory()  # before the first large tensor

__version__ = "1.0.0"

# Loaded when first asked for: who only runs a packed network waits for no PyTorch.
_ROOMS = {
    "ImageData": "data.images",
    "PackedNetwork": "measure.packed_network",
    "Profile": "study.profile",
    "Score": "measure.scoring",
    "StageConfig": "training.recipe",
    "StageResult": "training.stages",
    "StudyError": "errors",
    "apply_opt_level": "model.precision",
    "build_msunet": "model.network",
    "evaluate": "measure.evaluation",
    "load_checkpoint": "model.checkpoint",
    "load_data": "data.sources",
    "load_network": "measure.unpack",
    "load_profile": "study.profile",
    "pack": "measure.pack",
    "prune": "training.stages",
    "score": "measure.scoring",
    "train": "training.stages",
    "unpack": "measure.unpack",
}
__all__ = [*_ROOMS]


def __getattr__(name: str):
    if name not in _ROOMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(importlib.import_module(f".{_ROOMS[name]}", __name__), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
