"""What the published authors held of their techniques beside what was found.

They gave no number for it: how a claim is read as one, "little" above all, is this study's choice, made
before any run of the evidence.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pandas as pd

from .ablations import Results
from .published import PUBLISHED_V3
from .statistics import CONFIDENCE, FEWEST

# Points of top-1 that "costs little" may cost: our choice.
LITTLE = 0.5


@dataclass(frozen=True)
class Statement:
    """What was held of one row against the first level of its factor.

    text : the claim
    published : how its authors' networks were made, where that differs from a short run
    criterion : what is read into it
    holds, fails : what a row of the table must satisfy to agree, and to disagree
    """

    text: str
    published: str
    criterion: str
    choice: str
    value: str
    holds: Callable[[pd.Series], bool]
    fails: Callable[[pd.Series], bool]


def _worse(row: pd.Series) -> bool:
    return row["resolved"] and row["difference"] < 0


def _better(row: pd.Series) -> bool:
    return row["resolved"] and row["difference"] > 0


def _little(row: pd.Series) -> bool:
    return row["low"] > -LITTLE


def _much(row: pd.Series) -> bool:
    return row["high"] < -LITTLE


STATEMENTS = (
    Statement(
        "Ternary weights are better than binary ones.",
        "1,050 epochs, alpha rising over 400",
        "less top-1 with binary weights",
        *("weights", "binary", _worse, _better),
    ),
    Statement(
        "CutMix's consistency helps.",
        "1,050 epochs",
        "more top-1 with it",
        *("consistency", "as released", _better, _worse),
    ),
    Statement(
        "Half precision, O3, costs little.",
        "pruned at O2",
        f"less than {LITTLE} points, from a network pruned at O0",
        *("opt level", "O3", _little, _much),
    ),
    Statement(
        "90 % of squeeze-excitation cost little.",
        "a ramp of 100 epochs, 165 more at the target",
        f"less than {LITTLE} points",
        *("pruner", "V1", _little, _much),
    ),
)


def judged(table: pd.DataFrame) -> Iterator[tuple[Statement, pd.Series | None, str, bool | None]]:
    """Each statement with what a table of ablations says to it.

    Yields the statement, its row (None where it was not measured), the level that it is compared with, and
    whether it holds: None where the interval holds both answers, or there are too few pairs for one.
    """
    for statement in STATEMENTS:
        of = table[table["choice"] == statement.choice]
        rows = of[(of["value"] == statement.value) & (of["pairs"] > 0)]
        if rows.empty:
            yield statement, None, "", None
            continue
        row = rows.iloc[0]
        holds = True if statement.holds(row) else False if statement.fails(row) else None
        yield statement, row, of["value"].iloc[0], holds


def claims_beside_findings(table: pd.DataFrame) -> pd.DataFrame:
    """By claim: ``claimed``, ``published with``, ``read here as``, ``found`` and ``at this budget``.

    The last is "agrees", "disagrees" or "undecided"; empty where the table has no such row.
    """
    verdicts = {True: "agrees", False: "disagrees", None: "undecided"}
    rows = []
    for statement, row, first, holds in judged(table):
        found, verdict = "not measured here", ""
        if row is not None:
            found, verdict = f"{statement.value} against {first}: {difference(row)}", verdicts[holds]
        rows.append((statement.text, statement.published, statement.criterion, found, verdict))
    columns = ["claimed", "published with", "read here as", "found", "at this budget"]
    return pd.DataFrame(rows, columns=columns)


def difference(row: pd.Series) -> str:
    """A row's difference with its interval and p, as text."""
    of = f"p = {row['p']:.3f}, {row['pairs']} pairs of seeds"
    if row["pairs"] < FEWEST:
        return f"{row['difference']:+.2f} points, too few for an interval; {of}"
    return f"{row['difference']:+.2f} points [{row['low']:+.2f}, {row['high']:+.2f}], {of}"


def budget_of(results: Results) -> str:
    """At which budget a table holds, and for what it does not: a list in Markdown."""
    budget, made = results.provenance["budget"], results.provenance
    base, full = results.table.iloc[0], PUBLISHED_V3
    sizes = budget["image_sizes"]
    shrunk = f", {len(sizes)} of them on images shrunk to {sizes} pixels" if sizes else ""
    hours = made["seconds_of_all_runs"] / 3600
    threads = " or ".join(f"{n} thread{'s' * (n > 1)}" for n in made["threads_per_run"])
    return "\n".join(
        (
            f"- **Images**: {budget['training_images']:,} for training and {budget['test_images']:,} for the "
            f"test, {budget['classes']} classes. The test images chose nothing.",
            f"- **Networks**: width {budget['width']:g}, batches of {budget['batch_size']}, "
            f"{budget['epochs']} epochs{shrunk}; pruned rows are pruned at once and have "
            f"{budget['pruning_epochs']} more. Learning rate and image sizes were chosen for the "
            "baseline alone, on held-out training images, in trials that were not kept.",
            f"- **Runs**: {made['rows']} rows with {len(made['seeds'])} seeds each, which share "
            f"{made['runs']} runs; {hours:.1f} hours of runs on a shared machine, each on {threads} of "
            f"{', '.join(made['processors'])}.",
            f"- **It learned**: the baseline reaches {base['mean']:.1f} % top-1; the published network, at "
            f"full width and after more than 1,000 epochs, {full['top1']:.2f} %.",
            "- **It holds** for networks this narrow, trained this briefly, and for these test images. It "
            "says nothing of long training, which is what regularizers are made for.",
        )
    )


def chance_of_resolved(pairs: int) -> float:
    """How likely so many differences of nothing, no two of one size, have a p of at most 5 %.

    p is a multiple of 2/2^n and each multiple is as likely as another.
    """
    cases = 2 ** (pairs - 1)
    return math.floor((1 - CONFIDENCE) * cases + 1e-9) / cases


def of_chance(table: pd.DataFrame) -> str:
    """How many rows would be resolved if no technique did anything, in a sentence or two."""
    compared = table[table["pairs"] > 0]
    pairs = int(compared["pairs"].min())
    smallest, chance = 2 / 2**pairs, chance_of_resolved(pairs)
    return (
        f"Of these {len(compared)} comparisons about {chance * len(compared):.1f} would be resolved by "
        f"chance if nothing had any effect: with {pairs} pairs p is never below 2/2^{pairs} = "
        f"{smallest:.3f}, however large the difference, and a p corrected for {len(compared)} comparisons "
        f"could not be below {min(1.0, smallest * len(compared)):.2f}. Rows of a factor share their "
        "reference, so one lucky or unlucky reference moves all of them."
    )


def told(table: pd.DataFrame, resolved: bool) -> list[str]:
    """A sentence for each row that is resolved, or for each that is not, in the grid's order: no ranking."""
    found = table[(table["pairs"] > 0) & (table["resolved"].fillna(False) == resolved)]
    first = table.groupby("choice", sort=False)["value"].first()
    lines = [
        f"{row['choice']}: {row['value']} instead of {first[row['choice']]}: {difference(row)}"
        for _, row in found.iterrows()
    ]
    return lines or ["none"]
