"""What of a finished run is committed beside its network."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path

from ..errors import StudyError
from ..files import atomic_path, atomic_write, read_json
from ..training.records import epoch_seconds
from .provenance import published

# What of a run is shipped beside its network: how it went, and how it was made.
COPIED = {
    "train/history.csv": "train_history.csv",
    "train/layers.csv": "train_layers.csv",
    "prune/history.csv": "prune_history.csv",
    "figures/02_curves.png": "train_curves.png",
    "figures/03_curves.png": "prune_curves.png",
    "figures/03_schedule.png": "prune_schedule.png",
}


def check_finished(run: Path) -> dict:
    """What a run's provenance says, once it is sure that the run has all that is shipped.

    Raises StudyError where something is missing, or of no use.
    """
    # A stage writes metrics.json at its end alone.
    needed = ("train/metrics.json", "prune/metrics.json", *COPIED, "provenance.json")
    missing = [name for name in needed if not (run / name).is_file()]
    if missing:
        raise StudyError(f"{run} has no {missing[0]}; run notebooks 02 and 03 there first: make prune")
    provenance = read_json(run / "provenance.json", "run notebook 03 there")
    if not isinstance(provenance.get("parameters"), dict):
        raise StudyError(f"{run}/provenance.json was written by no run; run notebook 03 there")
    return provenance


def ship(run: Path, measured: Iterable[Path], folder: Path) -> None:
    """Put a finished run into ``folder``: its packed network, what was measured of it, and how it was made.

    measured : the files of the former two. Histories, curves and provenance come from the run, without a path
        of this machine
    """
    provenance = check_finished(run)
    provenance["epoch_seconds"] = {
        stage: list(epoch_seconds(run / stage).values()) for stage in ("train", "prune")
    }
    told = json.dumps(published(provenance, provenance["parameters"]), indent=1, ensure_ascii=False)
    copies = {path.name: path for path in measured} | {name: run / source for source, name in COPIED.items()}
    folder.mkdir(parents=True, exist_ok=True)
    for name, path in copies.items():
        with atomic_path(folder / name) as partial:
            shutil.copyfile(path, partial)
    atomic_write(folder / "provenance.json", told + "\n")
