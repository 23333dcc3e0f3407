"""One run of the study as a notebook sees it: its profile, data, folder, figures and metrics."""

from __future__ import annotations

import json
import math
import os
import re
import time
import uuid
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..data.images import ImageData
from ..data.sources import CIFAR100_CLASSES, load_data
from ..errors import StudyError
from ..files import ROOT, atomic_path, atomic_write, read_json, write_fault
from ..measure.unpack import is_shipped, load_network, shipped
from ..model.checkpoint import load_checkpoint, read_momentum
from ..model.network import build_msunet
from ..training.records import Progress
from ..training.stages import CHECKPOINT, train
from .alt_text import enable
from .profile import Profile, load_profile


def runs_folder() -> Path:
    """Where runs go: the environment variable MSUNET_RUNS, else ``runs/`` of the checkout."""
    return Path(os.environ.get("MSUNET_RUNS") or ROOT / "runs").absolute()


# Folders below runs/ that hold what the repository has committed.
COMMITTED = ("ablations", "pretrained", "recipes", "record")


def check_run_name(run: str) -> None:
    """Refuse a RUN that is not the plain name of a folder, or that of committed results."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", run):
        raise StudyError(
            f"RUN {run!r} is not a folder name of letters, digits, '.', '_' and '-'; give another, RUN=... "
            "(by default it is the profile's name)"
        )
    if run in COMMITTED:
        raise StudyError(f"RUN {run!r} is the folder of committed results; choose another name")


def new_network(profile: Profile, num_classes: int = 100, **changes) -> nn.Module:
    """The profile's network with the fresh weights of its seed; ``changes`` go to build_msunet."""
    network = profile.network
    arguments = dict(weights=network.weights, width=network.width, num_classes=num_classes)
    arguments.update(changes)
    variant = arguments.pop("variant", network.variant)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(profile.seed)
        return build_msunet(variant, **arguments)


class Study:
    """A run's profile, data and folder, opened by the parameters that each notebook has.

    Parameters
    ----------
    profile : "smoke", "evidence", "cpu2h", "cpu", "quick", "paper" or a .yaml file
    data : "synthetic", "cifar100", an .npz or a folder; None: the profile's
    run : name of the folder below ``runs/``
    device, seed, limit, variant : replace the profile's own where not None
    overrides : "train.epochs=3 data.limit=20" and the like

    Raises
    ------
    StudyError : any of these unknown or unusable, in one line
    """

    def __init__(
        self, profile, data=None, run="lab", device=None, seed=None, limit=None, variant=None, overrides=""
    ):
        check_run_name(str(run))
        self.profile = load_profile(
            profile, variant=variant, data=data, limit=limit, seed=seed, device=device, overrides=overrides
        )
        self.folder = runs_folder() / str(run)
        self._data: ImageData | None = None
        enable()  # pictures of this notebook come with words
        try:
            (self.folder / "figures").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise write_fault(self.folder, error) from error

    @property
    def data(self) -> ImageData:
        """The images, loaded at first use."""
        if self._data is None:
            source = self.profile.data
            self._data = load_data(source.source, limit=source.limit, seed=self.profile.seed)
        return self._data

    @property
    def options(self) -> dict:
        """Keyword arguments of train and prune: seed, device and a progress line that pages can show.

        A stage folder of another run is renamed, never removed.
        """
        profile = self.profile
        return {"seed": profile.seed, "device": profile.device, "progress": live_line(), "aside": True}

    def network(self, **changes) -> nn.Module:
        """A network with the fresh weights of the profile's seed."""
        return new_network(self.profile, **{"num_classes": self.data.num_classes, **changes})

    def about(self, name: str = "the network of this run") -> str:
        """What tells a toy from the real thing, made from the profile; empty for the latter.

        name : what :meth:`trained` calls the network that is spoken of; the shipped one is no toy
        """
        shortfalls = self.profile.shortfalls()
        if name == "the shipped network" or not shortfalls:
            return ""
        return (
            f"A toy: {', '.join(shortfalls)} (profile {self.profile.name}). "
            "It shows how each technique works; its accuracies say nothing about MSUNet's."
        )

    def start_of_pruning(self) -> nn.Module:
        """The network that training ended with; trained now, which is said, where notebook 02 has not."""
        if not self.has_finished("train"):
            print(f"Run {self.folder.name} has no trained network yet: training it now, as notebook 02 does.")
            train(self.network(), self.data, self.profile.train, self.folder / "train", **self.options)
        return self.checkpoint("train")

    def checkpoint(self, stage: str) -> nn.Module:
        """The network that a stage of this run ended with."""
        if not self.has_finished(stage):
            notebook = {"train": "02_ternary_training", "prune": "03_fp16_pruning"}.get(stage, stage)
            raise StudyError(
                f"{self.folder / stage} came to no end yet; run notebook {notebook} with this RUN first"
            )
        return load_checkpoint(self.folder / stage / CHECKPOINT, self.profile.network.variant)[0]

    def has_finished(self, stage: str) -> bool:
        """Whether a stage of this run came to its end; a checkpoint alone may be of any epoch."""
        return all((self.folder / stage / name).is_file() for name in (CHECKPOINT, "metrics.json"))

    def momentum(self, stage: str) -> dict[str, Tensor]:
        """The momentum that a stage of this run ended with, for the stage after it."""
        return read_momentum(self.folder / stage / CHECKPOINT)

    def trained(self) -> tuple[str, nn.Module]:
        """The trained network that pages look at, after what it is called.

        That is what this run pruned; but with the real CIFAR-100 the network that the repository ships,
        unless this run trained one of its own at full width on all images.
        """
        own = self.has_finished("prune")
        whole = self.profile.network.width == 1.0 and self.profile.data.limit is None
        if self.fits_shipped and is_shipped() and not (own and whole):
            return "the shipped network", load_network(shipped(), self.profile.network.variant)[0]
        return "the network of this run", self.checkpoint("prune")

    @property
    def fits_shipped(self) -> bool:
        """Whether the data are CIFAR-100, by its classes, and the profile's variant the shipped one."""
        if self.profile.data.source == "synthetic" or self.profile.network.variant != "v3":
            return False
        return tuple(self.data.class_names) == CIFAR100_CLASSES

    def save_figure(self, figure, name: str) -> None:
        """Write a matplotlib figure to ``figures/<name>.png``."""
        with atomic_path(self.folder / "figures" / f"{name}.png") as path:
            figure.savefig(path, dpi=110, bbox_inches="tight")

    def record(self, section: str, **numbers) -> None:
        """Put measured numbers into ``metrics.json`` under a section, replacing what it held."""
        path = self.folder / "metrics.json"
        metrics = read_json(path, "remove it and run the notebooks again") if path.exists() else {}
        metrics[section] = numbers
        if self._data is not None:
            source = Path(self.profile.data.source).name
            metrics["data"] = {"source": source, "fingerprint": self.data.fingerprint}
        atomic_write(path, json.dumps(dict(sorted(metrics.items())), indent=1) + "\n")

    def expected(self, name: str, value: float) -> str:
        """Whether a measured number lies in its profile's band: the part of a page that must repeat.

        Accuracies of training differ by a little from machine to machine, since sums in another
        order round otherwise. The band is that little; a value outside of it is shown.
        """
        band = self.profile.expect.get(name)
        if band is None:
            return f"{name}: {value:.4g} (this profile and data have no band for it)"
        low, high = band
        if math.isfinite(value) and low <= value <= high:
            return f"{name}: within {low:g} .. {high:g}, as expected"
        return f"{name}: {value:.4g} is OUTSIDE {low:g} .. {high:g}"


# Display ids that begin so are of a line of progress; the runner shows those in the terminal.
PROGRESS = "msunet-progress"


def live_line() -> Progress | bool:
    """In a notebook, one line updated in place with an ETA; elsewhere the terminal's progress bar."""
    try:
        from IPython import get_ipython
        from IPython.display import display
    except ImportError:
        return True
    if get_ipython() is None:
        return True
    return _LiveLine(display)


class _LiveLine:
    """A progress callable for a notebook: at most twice a second, and always at the end."""

    def __init__(self, display):
        self.display, self.clock = display, time.perf_counter
        self.handle = None
        self.began = self.shown = self.clock()
        self.first = 0  # step of the first call, whose own time nobody saw

    def __call__(self, done: int, total: int, text: str) -> None:
        now = self.clock()
        if self.handle is None:
            self.began, self.first = now, done
        if self.handle is not None and done < total and now - self.shown < 0.5:
            return
        self.shown = now
        left = "?"
        if done > self.first:
            left = tqdm.format_interval((now - self.began) / (done - self.first) * (total - done))
        line = {"text/plain": f"{text}, step {done} of {total}, {left} left"}
        if self.handle is None:
            self.handle = self.display(line, raw=True, display_id=f"{PROGRESS}-{uuid.uuid4().hex}")
        else:
            self.handle.update(line, raw=True)
