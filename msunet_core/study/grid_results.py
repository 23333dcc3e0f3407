"""What the runs of a grid came to, as they left it in their folders and as it travels without them.

``<profile>_runs.json`` is a line a run: who has that file and not the folders, as in a fresh clone of this
repository, computes nothing anew but what was added to the grid. What other code found counts for nothing.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from ..errors import StudyError, shown
from ..files import atomic_write, read_json
from ..training.stages import CHECKPOINT
from .grid_runs import RESULT, Plan, Run, code_of_runs, key_of

FIELDS = {"tests", "curve", "ran_away", "seconds", "cpu", "threads", "commit", "code"}


def finished(run: Run, levels: tuple[str, ...]) -> dict | None:
    """What a run came to, where its folder says so, by the code of now and at these opt levels."""
    try:
        return _tested(read_json(run.folder / RESULT), levels)
    except StudyError:  # not there, or cut off by who copied it
        return None


def known_results(todo: Plan, kept: Path) -> dict[Path, dict]:
    """The results, by folder, of the runs of a plan that need not be computed.

    Parameters
    ----------
    kept : the file that :func:`keep_results` writes; it may be missing. A training whose result alone is
        there, not its network, is not among them while a pruning that starts from it is to be computed

    Raises
    ------
    StudyError : that file is no such file
    """
    lines = _read(kept)
    names = _by_key(lines)
    found = {}
    for run in todo.runs:
        levels = todo.levels.get(run.folder, ())
        result = finished(run, levels) or _tested(lines.get(names.get(_key(_name(run)))), levels)
        if result is not None:
            found[run.folder] = result
    for run in todo.runs:
        if run.folder not in found and run.start and not _has_network(run.start):
            found.pop(run.start.folder, None)
    return found


def _has_network(run: Run) -> bool:
    """Whether its folder holds the network that it ended with, by the code of now."""
    return finished(run, ()) is not None and (run.folder / CHECKPOINT).exists()


def keep_results(todo: Plan, kept: Path) -> None:
    """Write the results of all finished runs to the file, beside those that it had."""
    lines = _read(kept)
    names = _by_key(lines)
    for run in todo.runs:
        result = finished(run, todo.levels.get(run.folder, ()))
        if result is not None:
            name = _name(run)
            lines[names.get(_key(name), name)] = result
    if lines:
        text = ",\n".join(f"{json.dumps(name)}: {json.dumps(lines[name])}" for name in sorted(lines))
        atomic_write(kept, f"{{\n{text}\n}}\n")


def _read(kept: Path) -> dict:
    remedy = "remove it or restore it from git"
    lines = read_json(kept, remedy) if kept.exists() else {}
    if odd := next((name for name in lines if not re.fullmatch(r"\w+-.*-[0-9a-f]{8}/seed-\d+", name)), None):
        raise StudyError(f"{kept} has a line {shown(odd)}, which is no run; {remedy}")
    return lines


def _tested(result: object, levels: tuple[str, ...]) -> dict | None:
    whole = isinstance(result, dict) and set(result) >= FIELDS and result["code"] == code_of_runs()
    tests = result["tests"] if whole else None
    return result if isinstance(tests, dict) and set(levels) <= set(tests) else None


def _name(run: Run) -> str:
    return f"{run.folder.parent.name}/{run.folder.name}"


def _key(name: str) -> tuple[str, ...]:
    folder, _, seed = name.partition("/")
    return *key_of(folder), seed


def _by_key(lines: dict) -> dict[tuple[str, ...], str]:
    """The names of lines; another order of the grid's rows calls the same run by other words."""
    return {_key(name): name for name in lines}
