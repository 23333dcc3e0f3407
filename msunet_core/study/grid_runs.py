"""What a grid computes: trainings and prunings, each once, in a folder of its own.

A :class:`Run` is described whole, so any process on any machine that sees its folder can compute it; what was
cut off goes on from its last checkpoint. :mod:`.grid_results` knows what is finished.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch

from ..data.images import ImageData
from ..data.sources import SOURCES, load_data
from ..errors import StudyError, failure
from ..files import atomic_write
from ..measure.evaluation import evaluate
from ..measure.scoring import score
from ..model.checkpoint import load_checkpoint, read_momentum
from ..training.code import PACKAGE, code_digest, code_of_training
from ..training.recipe import StageConfig
from ..training.records import epoch_seconds, ran_away
from ..training.resume import recipe_of
from ..training.schedules import work_before
from ..training.stages import CHECKPOINT, prune, train
from .grid import Grid, Row
from .profile import Profile
from .provenance import git_state, hardware, recorded_stage
from .run import new_network

RESULT = "result.json"
MEASURING = ("measure/evaluation.py", "measure/packed_format.py", "measure/scoring.py")


@dataclass(frozen=True)
class Source:
    """The images of a grid, as each process loads them for itself.

    source, limit, seed : as of :func:`load_data`
    fingerprint : of what they must turn out to be
    """

    source: str
    limit: int | None
    seed: int
    fingerprint: str = ""

    def load(self) -> ImageData:
        """The images; the last ones loaded are kept by the process."""
        data = _load(self.source, self.limit, self.seed)
        if self.fingerprint not in ("", data.fingerprint):
            raise StudyError(
                f"data {self.source} have fingerprint {data.fingerprint} here, {self.fingerprint} where the "
                "grid was started; give all workers the same images"
            )
        return data


@functools.cache
def code_of_runs() -> str:
    """Digest of the code that results come from: what trains, what tests and what counts."""
    files = {**code_of_training(), **{name: code_digest(PACKAGE / name) for name in MEASURING}}
    return hashlib.blake2b(json.dumps(files).encode(), digest_size=6).hexdigest()


@functools.lru_cache(maxsize=1)
def _load(source: str, limit: int | None, seed: int) -> ImageData:
    return load_data(source, limit=limit, seed=seed)


def source_of(profile: Profile) -> Source:
    """The images that a profile's ablations take: at most ``ablation_limit`` of each class and split."""
    own = profile.data
    limits = [limit for limit in (own.limit, profile.ablation_limit) if limit is not None]
    # Workers may stand in other folders.
    name = own.source if own.source in SOURCES else os.path.abspath(os.path.expanduser(own.source))
    source = Source(name, min(limits, default=None), profile.seed)
    return dataclasses.replace(source, fingerprint=source.load().fingerprint)


@dataclass(frozen=True)
class Run:
    """One training, or one pruning of what a training ended with.

    folder : it has ``result.json`` once the run is finished, beside what a stage leaves
    seed : of the initial weights, the order of the images and their augmentation
    network : arguments of build_msunet
    config : the stage
    data : the images
    start : the training that a pruning goes on from
    device : where it is computed
    """

    folder: Path
    seed: int
    network: dict
    config: StageConfig
    data: Source
    start: Run | None = None
    device: str = "auto"

    @property
    def work(self) -> int:
        """How long it takes beside other runs: thousandths of a pass over all images at their full size."""
        config = self.config
        passes = 1 + 2 * config.cutmix_probability * (config.consistency != "off")
        return max(1, round(1000 * passes * work_before(config, config.epochs)))


@dataclass(frozen=True)
class Plan:
    """What a grid needs.

    ends : the run that each row (by its place in the grid) ends with, by seed
    runs : all of them once, a training before its prunings, seed by seed, so that an interrupted grid has
        whole seeds
    levels : the opt levels at which each run's network is tested, by its folder
    """

    ends: dict[tuple[int, int], Run]
    runs: list[Run]
    levels: dict[Path, tuple[str, ...]]


def key_of(name: str) -> tuple[str, str]:
    """What a run's folder says without its words: its kind, and the digest of what it computes."""
    kind, *_, digest = name.split("-")
    return kind, digest


def plan(grid: Grid, data: Source, out: Path) -> Plan:
    """Which runs the rows of a grid come to; rows that would compute the same thing share it."""
    runs: dict[tuple, Run] = {}
    levels: dict[Path, set[str]] = {}
    there = {key_of(path.name): path.name for path in out.glob("*-*")}

    def shared(kind: str, row: Row, seed: int, config: StageConfig, start: Run | None = None) -> Run:
        network = dataclasses.asdict(row.profile.network) | {"width": row.profile.ablation_width}
        if network["variant"] == "v2":
            network["variant"] = "v1"  # the same network, trained the same way
        came_from = start and key_of(start.folder.parent.name)[1]
        whole = [network, recipe_of(config, 1), config.epochs, data.fingerprint, came_from]
        digest = hashlib.blake2b(json.dumps(whole, sort_keys=True).encode(), digest_size=4).hexdigest()
        words = "".join(c if c.isalnum() or c == "." else "-" for c in f"{row.choice}-{row.value}")
        # The words are for people, and of the row that came first when the folder was made.
        folder = out / there.get((kind, digest), f"{kind}-{words}-{digest}") / f"seed-{seed}"
        run = Run(folder, seed, network, config, data, start, row.profile.device)
        return runs.setdefault((kind, digest, seed), run)

    ends = {}
    for seed in grid.seeds:
        for place, row in enumerate(grid.rows):
            run = shared("train", row, seed, row.profile.ablation)
            if row.profile.ablation_prune.pruner != "none":
                run = shared("prune", row, seed, row.profile.ablation_prune, run)
            ends[place, seed] = run
            levels.setdefault(run.folder, set()).add(row.profile.ablation_opt_level)
    return Plan(ends, list(runs.values()), {folder: tuple(sorted(of)) for folder, of in levels.items()})


def perform(run: Run, levels: tuple[str, ...], before: dict | None, report: Callable[[float], None]) -> dict:
    """Compute a run, or what of it is missing.

    Parameters
    ----------
    levels : opt levels at which its network is tested
    before : what the run that it starts from came to
    report : told the share that is done, 0 to 1, after every step

    Returns
    -------
    dict of ``tests`` (by level: top1, top5, loss, params, flops, score), ``curve`` (by epoch: train_loss,
    top1), ``ran_away`` (how many of its ternary layers did), ``seconds``, ``cpu``, ``threads``, ``commit``,
    ``code``; or of ``failed``, one line that says why
    """
    if before and "failed" in before:
        return {"failed": f"its training failed: {before['failed']}"}
    try:
        with recorded_stage(run.folder, run.folder.parent.parent.name, run.seed):
            return _perform(run, levels, report)
    except Exception as error:  # whatever it was, the other rows go on
        why = failure(error)
        # The table may be published, and where this machine has its files is no part of it.
        for folder in (run.folder.parents[1], Path(run.data.source).parent):
            why = why.replace(f"{folder}/", "")
        return {"failed": why}


def _perform(run: Run, levels: tuple[str, ...], report: Callable[[float], None]) -> dict:
    data = run.data.load()
    options = {
        "seed": run.seed,
        "device": run.device,
        "aside": True,  # what other code left there
        "progress": lambda done, total, text: report(0.95 * done / total),  # the rest is the test
    }
    if run.start is None:
        network = new_network(Profile(seed=run.seed), data.num_classes, **run.network)
        ended = train(network, data, run.config, run.folder, **options)
    else:
        path = run.start.folder / CHECKPOINT
        network, momentum = load_checkpoint(path, run.network["variant"])[0], read_momentum(path)
        ended = prune(network, data, run.config, run.folder, momentum=momentum, **options)
    tests = {}
    for level in levels:
        found, cost = (
            evaluate(ended.model, data.test_images, data.test_labels, level),
            score(ended.model, level),
        )
        tests[level] = {**found, "params": cost.params, "flops": cost.flops, "score": cost.value}
    history = ended.history[["epoch", "train_loss", "test_top1"]].rename(columns={"test_top1": "top1"})
    result = {
        "tests": tests,
        # JSON knows no NaN: epochs that were not tested have None.
        "curve": history.astype(object).where(history.notna(), None).to_dict("records"),
        "ran_away": layers_that_ran_away(run.folder),
        "seconds": round(sum(epoch_seconds(run.folder).values()), 1),  # of all sittings
        "cpu": hardware()["cpu"],
        "threads": torch.get_num_threads(),
        "commit": (git_state() or {}).get("commit"),
        "code": code_of_runs(),
    }
    atomic_write(
        run.folder / RESULT, json.dumps(result, indent=1) + "\n"
    )  # last: with it, the run is finished
    return result


def layers_that_ran_away(folder: Path) -> int:
    """How many ternary layers of a stage ran away, by its ``layers.csv``; 0 of a network without any."""
    with contextlib.suppress(pd.errors.EmptyDataError):
        return len(ran_away(pd.read_csv(folder / "layers.csv").to_dict("records")))
    return 0
