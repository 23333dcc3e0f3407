"""What of a finished run is committed beside its network."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from ..errors import StudyError
from ..files import atomic_path, atomic_write, read_text
from ..training.records import epoch_seconds

# What of a run is shipped beside its network: how it went, and how it was made.
EVIDENCE = {
    "train/history.csv": "train_history.csv",
    "train/layers.csv": "train_layers.csv",
    "prune/history.csv": "prune_history.csv",
    "figures/02_curves.png": "train_curves.png",
    "figures/03_curves.png": "prune_curves.png",
    "figures/03_schedule.png": "prune_schedule.png",
}


def check_finished(run: Path) -> None:
    """Refuse a run that has not all that is shipped."""
    missing = [name for name in (*EVIDENCE, "provenance.json") if not (run / name).is_file()]
    if missing:
        raise StudyError(f"{run} has no {missing[0]}; run notebooks 02 and 03 there first: make prune")


def ship(run: Path, folder: Path) -> None:
    """Copy histories, curves and provenance of a finished run into ``folder``, no path of this machine."""
    check_finished(run)
    provenance = json.loads(read_text(run / "provenance.json"))
    data = provenance["parameters"].get("DATA")
    if data:
        provenance["parameters"]["DATA"] = Path(data).name
    provenance["epoch_seconds"] = {
        stage: list(epoch_seconds(run / stage).values()) for stage in ("train", "prune")
    }
    folder.mkdir(parents=True, exist_ok=True)
    for source, name in EVIDENCE.items():
        with atomic_path(folder / name) as partial:
            shutil.copyfile(run / source, partial)
    atomic_write(folder / "provenance.json", json.dumps(provenance, indent=1) + "\n")
