"""Ablations: every row of a grid for every seed, then each row compared with the first of its factor.

``ablations.yaml`` says which rows there are (:mod:`.grid`), :mod:`.grid_runs` computes what they need,
:mod:`.statistics` says what the differences tell.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import functools
import hashlib
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from ..errors import StudyError
from ..files import atomic_write, lock_folder, read_json
from ..training.interrupt import terminable
from ..training.records import Progress, shown_progress
from .grid import Grid
from .grid_results import keep_results, known_results
from .grid_runs import Plan, Run, code_of_runs, perform, plan, source_of
from .profile import Profile
from .provenance import command, versions
from .statistics import effect

PACKAGES = ("torch", "numpy", "scipy", "dask", "distributed")
COMPARED = ("difference", "sd_difference", "low", "high", "p")
MEASURED = ("top1", "top5", "loss", "params", "flops", "score")
COLUMNS = (
    *("choice", "value", "n", "mean", "sd", *COMPARED, "resolved", "pairs"),
    *("params", "flops", "score", "score_change", "ran_away", "failed"),
)
# Digits of the tables: a hundredth of a percent is one of 10,000 images.
DIGITS = {
    **dict.fromkeys(("mean", "sd", "difference", "sd_difference", "low", "high", "top1", "top5"), 3),
    **{"score_change": 2, "loss": 4, "train_loss": 4, "p": 5, "params": 1, "flops": 0, "score": 8},
}


@dataclass(frozen=True)
class Results:
    """What a grid came to.

    table : by row: ``choice``, ``value``; ``n`` seeds; top-1 in percent of the test images as ``mean`` and
        ``sd`` over them; the ``difference`` to the first level of its factor, pair by pair, in points, with
        its ``sd_difference``, 95 % interval ``low`` .. ``high``, ``p``, whether it is ``resolved`` and of how
        many ``pairs``; ``params``, ``flops`` and ``score``, means over seeds; ``score_change``, in percent of
        the reference's score; of how many seeds a ternary layer ``ran_away`` in training; what ``failed``
    seeds : by row and ``seed``: ``top1``, ``top5``, ``loss``, ``params``, ``flops``, ``score``, how many
        layers ``ran_away`` in its training, ``failed``
    curves : by row, ``seed`` and ``epoch`` of training: ``train_loss`` (nats), ``top1`` (percent); rows of a
        factor that share their training are one, "v2 = v1"
    provenance : how it was made
    """

    table: pd.DataFrame
    seeds: pd.DataFrame
    curves: pd.DataFrame
    provenance: dict


def run_ablations(
    profile: Profile,
    grid: Grid,
    out: str | Path,
    *,
    jobs: int = 1,
    scheduler: str | None = None,
    replace: bool = True,
    progress: bool | Progress = True,
) -> Results:
    """Compute what is not finished yet of a grid, write its tables, and return them.

    Parameters
    ----------
    profile, grid : as of :func:`load_grid`
    out : folder; gets ``<profile>.csv``, ``<profile>_seeds.csv``, ``<profile>_curves.csv``,
        ``<profile>_provenance.json``, ``<profile>_runs.json`` (:mod:`.grid_results`) and, in ``<profile>/``,
        a folder for each run and seed
    jobs : processes of this machine, which share its cores; 1 is this process itself
    scheduler : address of a running Dask cluster instead, whose workers see ``out`` and the data
    replace : whether tables of other images or another budget may be written over
    progress : True for one line with an ETA over all rows, False for silence, or a callable

    A row that fails says why in the table and the others go on; the same call tries it again.

    Raises
    ------
    StudyError : no such data or scheduler, a folder that cannot be written or is in use, or holds other
        results that are not to be replaced
    KeyboardInterrupt, SystemExit : on Ctrl-C; on SIGTERM or SIGHUP; after what was finished was written
    """
    if jobs < 1:
        raise StudyError(f"jobs {jobs} is not 1 or more; give the number of processes")
    began = time.time()
    out = Path(out).absolute()
    with lock_folder(out / profile.name):
        todo = plan(grid, source_of(profile), out / profile.name)
        path, kept = (out / f"{profile.name}_{what}.json" for what in ("provenance", "runs"))
        made, before = _made(profile, grid, todo), {}
        with contextlib.suppress(StudyError):  # not there yet, or of no use
            before = read_json(path)
        others = [part for part in ("budget", "data") if before.get(part, made[part]) != made[part]]
        if others and not replace:
            raise StudyError(
                f"{out}/{profile.name}.csv is of another {' and '.join(others)} than this; give a folder of "
                "its own, --out (OUT= with make)"
            )
        results = known_results(todo, kept)
        ran = len(todo.runs) - len(results)
        try:
            if ran:
                with terminable():
                    _compute(todo, results, jobs, scheduler, progress)
        finally:  # what was finished before a stop too
            keep_results(todo, kept)
        seeds = _by_seed(grid, todo, results)
        provenance = _provenance(made, before, todo, results, began, ran)
        found = Results(tabulate(seeds), seeds, _curves(grid, todo, results), provenance)
        for suffix, table in (("", found.table), ("_seeds", found.seeds), ("_curves", found.curves)):
            atomic_write(out / f"{profile.name}{suffix}.csv", table.to_csv(index=False, lineterminator="\n"))
        atomic_write(path, json.dumps(provenance, indent=1) + "\n")
    return found


def read_results(out: str | Path, name: str) -> Results:
    """The results that :func:`run_ablations` wrote for the profile of this name."""
    out = Path(out)
    try:
        kinds = {**dict.fromkeys(("choice", "value", "failed"), str), "resolved": "boolean"}
        tables = [
            pd.read_csv(out / f"{name}{suffix}.csv", dtype=kinds, keep_default_na=False, na_values=[""])
            for suffix in ("", "_seeds", "_curves")
        ]
        return Results(*tables, read_json(out / f"{name}_provenance.json"))
    except (OSError, ValueError) as error:
        raise StudyError(
            f"{out}/{name}*.csv cannot be read ({error}); restore it from git or compute it again"
        ) from error


def _compute(todo: Plan, results: dict[Path, dict], jobs: int, scheduler, progress) -> None:
    left = [run for run in todo.runs if run.folder not in results]
    total = sum(run.work for run in left)
    done = dict.fromkeys([run.folder for run in left], 0.0)
    work = {run.folder: run.work for run in left}

    # Runs of shrunk and of whole images take turns: an ETA of the last steps alone would swing between them.
    with shown_progress(progress, smoothing=0) as show:

        def at(folder: Path, part: float) -> None:
            done[folder] = max(done[folder], part)
            ended = sum(part == 1 for part in done.values())
            share = sum(work[folder] * part for folder, part in done.items())
            show(min(total, int(share)), total, f"ablations, {ended} of {len(left)} runs")

        if scheduler or jobs > 1:
            from .cluster import on_cluster  # importing Dask takes a second

            results |= on_cluster(left, todo.levels, dict(results), at, jobs=jobs, scheduler=scheduler)
            return
        for run in left:
            before = results.get(run.start.folder) if run.start else None
            report = functools.partial(at, run.folder)
            results[run.folder] = perform(run, todo.levels.get(run.folder, ()), before, report)
            report(1.0)


# -- tables ------------------------------------------------------------------------------------


def _by_seed(grid: Grid, todo: Plan, results: dict[Path, dict]) -> pd.DataFrame:
    rows = []
    for place, row in enumerate(grid.rows):
        for seed in grid.seeds:
            run = todo.ends[place, seed]
            result, training = results[run.folder], results[(run.start or run).folder]
            tested = result.get("tests", {}).get(row.profile.ablation_opt_level, {})
            rows.append(
                {
                    **{"choice": row.choice, "value": row.value, "seed": seed},
                    **{name: tested.get(name, math.nan) for name in MEASURED},
                    "ran_away": training.get("ran_away", math.nan),
                    "failed": result.get("failed"),
                }
            )
    return pd.DataFrame(rows).astype({"failed": str}).round(DIGITS)


def tabulate(seeds: pd.DataFrame) -> pd.DataFrame:
    """The table of :class:`Results` from its rows by seed; the first level of a factor is its reference."""
    rows, references = [], {}
    for (choice, value), row in seeds.groupby(["choice", "value"], sort=False):
        tested = row.set_index("seed").dropna(subset="top1")
        reference = references.setdefault(choice, tested)
        top1, cost = tested["top1"], {name: tested[name].mean() for name in ("params", "flops", "score")}
        line = {"choice": choice, "value": value, "n": len(top1), "mean": top1.mean(), "sd": top1.std()}
        cost["ran_away"] = (tested["ran_away"] > 0).sum()
        rows.append({**line, **_compared(tested, reference), **cost, "failed": _failures(row)})
    kinds = {**dict.fromkeys((*COMPARED, "score_change"), float), "resolved": "boolean", "failed": str}
    return pd.DataFrame(rows, columns=COLUMNS).astype(kinds).round(DIGITS)


def _compared(row: pd.DataFrame, reference: pd.DataFrame) -> dict:
    """A row, by seed, against the first level of its factor; empty where it is that or shares no seed."""
    both = row.index.intersection(reference.index)
    if row is reference or both.empty:
        return {"pairs": 0}
    found = effect(row["top1"][both], reference["top1"][both])
    change = 100 * (row["score"][both] / reference["score"][both] - 1).mean()
    return {
        **{"difference": found.difference, "sd_difference": found.sd, "low": found.low, "high": found.high},
        **{"p": found.p, "resolved": found.resolved, "pairs": found.pairs, "score_change": change},
    }


def _failures(row: pd.DataFrame) -> str | None:
    failed = row.dropna(subset="failed")
    if failed.empty:
        return None
    first = failed.iloc[0]
    return f"{len(failed)} of {len(row)} seeds, seed {first['seed']}: {first['failed']}"


def _curves(grid: Grid, todo: Plan, results: dict[Path, dict]) -> pd.DataFrame:
    """Every training of each factor once, under the names of all its rows that share it."""
    shown: dict[tuple[str, Path], tuple[list[str], list[Run]]] = {}
    for place, row in enumerate(grid.rows):
        runs = [todo.ends[place, seed] for seed in grid.seeds]
        trainings = [run.start or run for run in runs]
        names, _ = shown.setdefault((row.choice, trainings[0].folder), ([], trainings))
        names.append(row.value)
    columns = ["choice", "value", "seed", "epoch", "train_loss", "top1"]
    lines = [
        {"choice": choice, "value": " = ".join(names), "seed": seed, **line}
        for (choice, _), (names, trainings) in shown.items()
        for seed, run in zip(grid.seeds, trainings, strict=True)
        for line in results[run.folder].get("curve", [])
    ]
    kinds = {"seed": int, "epoch": int, "train_loss": float, "top1": float}
    return pd.DataFrame(lines, columns=columns).astype(kinds).round(DIGITS)


def _made(profile: Profile, grid: Grid, todo: Plan) -> dict:
    """What the tables are of; without a path, since they are published."""
    base, data = grid.rows[0].profile, todo.runs[0].data.load()
    rows = [(row.label, dataclasses.asdict(row.profile)) for row in grid.rows]
    for _, profile_of_row in rows:  # the same grid wherever the images lie and whatever computes
        for name in ("name", "data", "device", "seed", "expect"):
            profile_of_row.pop(name)
    return {
        "profile": profile.name,
        "grid": hashlib.sha256(repr(rows).encode()).hexdigest()[:16],
        "seeds": list(grid.seeds),
        "rows": len(grid.rows),
        "runs": len(todo.runs),
        "budget": {
            "width": base.ablation_width,
            "training_images": len(data.train_images),
            "test_images": len(data.test_images),
            "classes": data.num_classes,
            "epochs": base.ablation.epochs,
            "image_sizes": list(base.ablation.image_sizes),
            "batch_size": base.ablation.batch_size,
            "pruning_epochs": base.ablation_prune.epochs,
        },
        "data": data.fingerprint,
        "code": code_of_runs(),
    }


def _provenance(made: dict, before: dict, todo: Plan, results: dict, began: float, ran: int) -> dict:
    """How the tables were made: as before, where nothing of it is new."""
    before = before if {**before, **made} == before else {}
    if before and not ran:
        return before
    now = datetime.datetime.fromtimestamp(began).astimezone().isoformat(timespec="seconds")
    succeeded = [result for result in results.values() if "tests" in result]
    return {
        **made,
        "command": command(),
        "started": before.get("started", now),
        # A sitting that was stopped left its runs and not its time.
        "wall_seconds": round((before.get("wall_seconds") or 0) + time.time() - began)
        if ran == len(todo.runs) or before.get("wall_seconds")
        else None,
        "seconds_of_all_runs": round(sum(result["seconds"] for result in succeeded)),
        "processors": sorted({result["cpu"] for result in succeeded}),
        "threads_per_run": sorted({result["threads"] for result in succeeded}),
        "commits": sorted({str(result["commit"]) for result in succeeded}),
        **versions(PACKAGES),
    }
