"""What the published authors held of their techniques beside what was found, told from the numbers alone.

They gave no number for it: how much is "little" is this study's choice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pandas as pd

from .ablations import Results

# Points of top-1 that "costs little" may cost: our choice.
LITTLE = 0.5


@dataclass(frozen=True)
class Statement:
    """What was held of one row against the first level of its factor.

    text : the claim
    holds : what the interval (low, high) must satisfy for "as claimed", and for "against the claim"
    """

    text: str
    choice: str
    value: str
    holds: Callable[[float, float], bool]
    fails: Callable[[float, float], bool]


def _worse(low: float, high: float) -> bool:
    return high < 0


def _better(low: float, high: float) -> bool:
    return low > 0


def _little(low: float, high: float) -> bool:
    return low > -LITTLE


def _much(low: float, high: float) -> bool:
    return high < -LITTLE


STATEMENTS = (
    Statement("Ternary weights are better than binary ones.", "weights", "binary", _worse, _better),
    Statement("CutMix's consistency helps.", "consistency", "as released", _better, _worse),
    Statement(f"Half precision, O3, costs less than {LITTLE} points.", "opt level", "O3", _little, _much),
    Statement(f"90 % of squeeze-excitation cost less than {LITTLE} points.", "pruner", "V1", _little, _much),
)


def judged(table: pd.DataFrame) -> Iterator[tuple[Statement, pd.Series | None, str, bool | None]]:
    """Each statement with what a table of ablations says to it.

    Yields the statement, its row (None where it was not measured), the level that it is compared with, and
    whether it holds: None where the interval holds both answers.
    """
    for statement in STATEMENTS:
        of = table[table["choice"] == statement.choice]
        row = of[of["value"] == statement.value]
        if row.empty or pd.isna(row["low"].iloc[0]):
            yield statement, None, "", None
            continue
        ends = row["low"].iloc[0], row["high"].iloc[0]
        holds = True if statement.holds(*ends) else False if statement.fails(*ends) else None
        yield statement, row.iloc[0], of["value"].iloc[0], holds


def claims_beside_findings(table: pd.DataFrame) -> pd.DataFrame:
    """By claim: ``claimed``, ``found`` and ``verdict``.

    The verdict is "as claimed", "against the claim" or "not resolved"; empty where the table has no such row.
    """
    verdicts = {True: "as claimed", False: "against the claim", None: "not resolved"}
    rows = []
    for statement, row, first, holds in judged(table):
        if row is None:
            rows.append((statement.text, "not measured here", ""))
        else:
            found = f"{statement.value} against {first}: {difference(row)}"
            rows.append((statement.text, found, verdicts[holds]))
    return pd.DataFrame(rows, columns=["claimed", "found", "verdict"])


def difference(row: pd.Series) -> str:
    """A row's difference with its interval and p, as text."""
    return (
        f"{row['difference']:+.2f} points [{row['low']:+.2f}, {row['high']:+.2f}], "
        f"p = {row['p']:.3f}, {row['pairs']} pairs of seeds"
    )


def budget_of(results: Results) -> str:
    """At which budget a table holds, and for what it does not."""
    budget, made = results.provenance["budget"], results.provenance
    base = results.table.iloc[0]
    sizes = budget["image_sizes"]
    shrunk = f", {len(sizes)} of them on images shrunk to {sizes} pixels" if sizes else ""
    hours = made["seconds_of_all_runs"] / 3600
    threads = " or ".join(f"{n} thread{'s' * (n > 1)}" for n in made["threads_per_run"])
    return (
        f"{budget['training_images']:,} training and {budget['test_images']:,} test images of "
        f"{budget['classes']} classes; networks of width {budget['width']:g}; "
        f"{budget['epochs']} epochs{shrunk}; "
        f"{len(made['seeds'])} seeds a row. The baseline reaches {base['mean']:.1f} % top-1, where the "
        f"published network at full width and 1,050 epochs reached 80.1 %. {made['runs']} runs took "
        f"{hours:.1f} hours together, each on {threads} of {', '.join(made['processors'])}. "
        "What is found here holds for networks this narrow, trained this briefly; it says nothing of long "
        "training, which is what regularizers are made for."
    )


def resolved_rows(table: pd.DataFrame) -> list[str]:
    """A sentence for each row whose difference is resolved, in the order of the grid: no ranking."""
    found = table[table["resolved"].fillna(False)]
    first = table.groupby("choice", sort=False)["value"].first()
    return [
        f"{row['choice']}: {row['value']} instead of {first[row['choice']]}: {difference(row)}"
        for _, row in found.iterrows()
    ]
