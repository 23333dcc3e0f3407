"""MSUNet-v3, reproduced: ternary, pruned, half-precision networks for CIFAR-100 and their score."""

from __future__ import annotations

from .memory import keep_freed_memory, spin_shortly

spin_shortly()  # before PyTorch is loaded
keep_freed_memory()  # before the first large tensor

from .data.images import ImageData  # noqa: E402
from .data.sources import load_data  # noqa: E402
from .errors import StudyError  # noqa: E402
from .measure.evaluation import evaluate  # noqa: E402
from .measure.pack import pack  # noqa: E402
from .measure.scoring import Score, score  # noqa: E402
from .measure.unpack import load_network, unpack  # noqa: E402
from .model.checkpoint import load_checkpoint  # noqa: E402
from .model.network import build_msunet  # noqa: E402
from .model.precision import apply_opt_level  # noqa: E402
from .study.profile import Profile, load_profile  # noqa: E402
from .training.recipe import StageConfig  # noqa: E402
from .training.stages import StageResult, prune, train  # noqa: E402

__version__ = "1.0.0"

__all__ = [
    "ImageData",
    "Profile",
    "Score",
    "StageConfig",
    "StageResult",
    "StudyError",
    "apply_opt_level",
    "build_msunet",
    "evaluate",
    "load_checkpoint",
    "load_data",
    "load_network",
    "load_profile",
    "pack",
    "prune",
    "score",
    "train",
    "unpack",
]
