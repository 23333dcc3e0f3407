"""The grid of ablations as data: ``ablations.yaml`` read, checked and made into rows."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ..errors import StudyError, closest
from .profile import Profile, overridden, read_yaml

GRID = Path(__file__).with_name("ablations.yaml")
PARTS = ("seeds", "baseline", "factors")
BASELINE = "baseline"


@dataclass(frozen=True)
class Row:
    """A level of a factor: what it is called and how its profile differs from the study's.

    profile : the whole study as this row has it
    """

    choice: str
    value: str
    profile: Profile

    @property
    def label(self) -> str:
        return f"{self.choice}: {self.value}"


@dataclass(frozen=True)
class Grid:
    """Rows, the seeds that each is trained with, and the names that the baseline sets for all of them."""

    rows: tuple[Row, ...]
    seeds: tuple[int, ...]
    fixed: frozenset[str]


def load_grid(
    profile: Profile,
    path: str | Path = GRID,
    *,
    only: Iterable[str] = (),
    seeds: Iterable[int] | None = None,
    factors: dict[str, dict] | None = None,
) -> Grid:
    """Read a grid and lay its rows over a profile.

    Parameters
    ----------
    profile : gives everything that the grid does not
    path : a file of the form of ``ablations.yaml``
    only : the factors to keep, all if none is named
    seeds : instead of the file's
    factors : instead of the file's, ``{factor: {level: {name: value}}}``, the level to compare with first

    Raises
    ------
    StudyError : an unknown factor, name or value, with the nearest known one; fewer than one seed
    """
    tree = read_yaml(path)
    for part in tree:
        if part not in PARTS:
            raise StudyError(f"{path}: {part!r} is unknown; {closest(part, PARTS)}")
    factors = _mapping(tree.get("factors") if factors is None else factors, f"{path}: factors")
    for factor in (only := tuple(only)):
        if factor not in factors:
            raise StudyError(f"factor {factor!r} is unknown; {closest(factor, factors)}")
    baseline = _mapping(tree.get("baseline"), f"{path}: baseline")
    base = overridden(profile, baseline)
    rows = [Row(BASELINE, base.network.variant, base)]
    for factor, levels in factors.items():
        if only and factor not in only:
            continue
        for level, changes in _mapping(levels, f"{path}: factor {factor}").items():
            try:
                own = overridden(base, _mapping(changes, "its changes"))
            except StudyError as error:
                raise StudyError(f"row {factor}: {level}: {error}") from error
            rows.append(Row(str(factor), str(level), own))
    seeds = _seeds(tree.get("seeds") if seeds is None else seeds, path)
    return Grid(tuple(rows), seeds, frozenset(baseline))


def _seeds(seeds: object, path) -> tuple[int, ...]:
    numbers = tuple(seeds) if isinstance(seeds, (list, tuple, range)) else ()
    whole = all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in numbers)
    if not numbers or not whole or len(set(numbers)) < len(numbers):
        raise StudyError(
            f"{path}: seeds {seeds!r} are not different whole numbers, one or more; correct them"
        )
    return numbers


def _mapping(value: object, where: str) -> dict:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise StudyError(f"{where} is {value!r:.60}, not a mapping; correct it")
    return value
