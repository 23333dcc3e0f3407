"""MSUNet-v3, reproduced: ternary, pruned, half-precision networks for CIFAR-100 and their score."""

from __future__ import annotations

from .memory import keep_freed_memory, spin_shortly

spin_shortly()  # before PyTorch is loaded
keep_freed_memory()  # before the first large tensor

from .checkpoint import load_checkpoint  # noqa: E402
from .config import Profile, StageConfig, load_profile  # noqa: E402
from .data import ImageData, load_data  # noqa: E402
from .errors import StudyError  # noqa: E402
from .evaluation import evaluate  # noqa: E402
from .network import build_msunet  # noqa: E402
from .packed import load_network, pack, unpack  # noqa: E402
from .precision import apply_opt_level  # noqa: E402
from .scoring import Score, score  # noqa: E402
from .stages import StageResult, prune, train  # noqa: E402

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
