"""What was published about MSUNet-v3, and what the evidence in this repository says to it.

Each claim is held against committed files (the shipped network and its provenance, ablation tables, the first
epochs of the paper recipe) or against a count made now. No result is written here, only what was published
(specification §1; what its authors held of their techniques, :mod:`.findings`). A claim without evidence says
so instead of a result.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from scipy import stats
from torch import nn

from ..errors import StudyError, reason
from ..files import ROOT, read_json
from ..measure.scoring import (
    RANKED_FROM,
    REFERENCE_FLOPS,
    REFERENCE_PARAMS,
    Score,
    score,
    score_of,
    ternary_sparsity_at,
)
from ..measure.unpack import SHIPPED, load_network
from ..measure.wide_resnet import wide_resnet
from ..model.network import build_msunet
from ..model.pruning import prune_to_target
from .ablations import read_results
from .findings import LITTLE, judged
from .profile import load_profile
from .published import FIRST_LOSSES, PUBLISHED_V3, against_published

REPRODUCED, NOT_REPRODUCED, NOT_TESTABLE = "reproduced", "not reproduced", "not testable here"
# Of short trainings: they can agree with a claim on long ones, and neither reproduce nor refute it.
AGREES, DISAGREES = "agrees at this budget", "disagrees at this budget"
UNDECIDED = "undecided at this budget"

# A choice, made after first trials and before the run that is committed: how far two seeds of the recipe lie
# apart in an epoch's training loss has not been measured.
RECORD_TOLERANCE = 0.04
# A count that only depends on where random weights put their zeros: one part in 200.
COUNT_TOLERANCE = 0.005
SEEDS = 5
NOTHING = pd.DataFrame(columns=["choice", "value", "pairs"])  # no table of ablations
EVIDENCE = "evidence"  # the profile of the committed ablations; others are trials of whoever ran them


@dataclass(frozen=True)
class Claim:
    """One row of the table: what was published and what was found.

    published : the claim in a few words
    ran : what was run or counted to test it
    n : of how many images, seeds or epochs; "" where a count has no spread
    result : with its 95 % interval or range; "" without evidence
    verdict : "reproduced", "not reproduced" or "not testable here"; "agrees", "disagrees" or "undecided at
        this budget" where only short trainings speak
    reason : why, in a sentence
    page : name of the page that tells more
    about : pattern of the heading on that page that speaks of it
    """

    published: str
    ran: str
    n: str
    result: str
    verdict: str
    reason: str
    page: str
    about: str = ""


@dataclass(frozen=True)
class Shipped:
    """The committed network: its metadata, its score at O3, the histories and the provenance beside it."""

    model: nn.Module
    info: dict
    score: Score
    histories: dict[str, pd.DataFrame]
    provenance: dict
    path: Path

    @property
    def epochs(self) -> int:
        """Epochs of all stages together."""
        return sum(map(len, self.histories.values()))

    def course(self) -> pd.DataFrame:
        """Top-1 over all stages: ``stage``, ``epochs`` and ``hours`` spent, ``top1`` (%); a row where tested.

        Hours are NaN where the provenance has not the seconds of each epoch.
        """
        parts, seconds = [], self.provenance.get("epoch_seconds", {})
        for stage, history in self.histories.items():
            spent = seconds.get(stage, ())
            if len(spent) != len(history):
                spent = [math.nan] * len(history)
            parts.append(pd.DataFrame({"stage": stage, "hours": spent, "top1": history["test_top1"]}))
        course = pd.concat(parts, ignore_index=True)
        course["hours"] = course["hours"].cumsum(skipna=False) / 3600
        course["epochs"] = course.index + 1
        return course.dropna(subset="top1")

    @property
    def top1(self) -> tuple[float, float, float] | None:
        """Measured top-1 in percent and its 95 % interval; None where the file has none."""
        found = self.info.get("accuracy")
        if not found:
            return None
        return found["top1"], *wilson(found["top1"] / 100, found["images"])


def load_shipped(folder: Path = SHIPPED.parent) -> Shipped | None:
    """What a folder that `make pretrained` filled holds; None where no network is."""
    path = folder / SHIPPED.name
    if not path.is_file():
        return None
    model, info = load_network(path)
    histories = {
        stage: pd.read_csv(folder / f"{stage}_history.csv")
        for stage in ("train", "prune")
        if (folder / f"{stage}_history.csv").is_file()
    }
    written = folder / "provenance.json"
    provenance = read_json(written) if written.is_file() else {}
    return Shipped(model, info, score(model, "O3"), histories, provenance, path)


def shipped_beside(folder: Path = SHIPPED.parent) -> list[Shipped]:
    """The networks in folders of that folder: of smaller budgets, to compare with."""
    found = (load_shipped(path.parent) for path in sorted(folder.glob(f"*/{SHIPPED.name}")))
    return [one for one in found if one]


def wilson(share: float, n: int) -> tuple[float, float]:
    """The 95 % interval of a share measured on ``n`` independent images, in percent (Wilson 1927)."""
    found = stats.binomtest(round(share * n), n).proportion_ci(0.95, "wilson")
    return 100 * found.low, 100 * found.high


def claims(runs: Path = ROOT / "runs", shipped: Shipped | None = None) -> list[Claim]:
    """Every published claim with what this repository has to say to it.

    runs : folder with ``pretrained/``, and ``ablations/*.csv`` and ``record/history.csv`` where there are any
    shipped : what :func:`load_shipped` gave, if it was read already

    Raises StudyError for evidence that cannot be read.
    """
    shipped = shipped or load_shipped(runs / "pretrained")
    fresh = [_fresh(seed) for seed in range(SEEDS)]
    return [
        _accuracy(shipped),
        _params(fresh),
        _flops(fresh, shipped),
        _score(shipped),
        *ablation_claims(runs / "ablations"),
        *half_precision_claim(runs / "pretrained" / "levels.csv"),
        record_claim(runs / "record" / "history.csv"),
        *_unit(),
    ]


def published_epochs() -> int:
    """Epochs of the published recipe of v3."""
    recipe = load_profile("paper")
    return recipe.train.epochs + recipe.prune.epochs


def _fresh(seed: int) -> Score:
    """The score at O3 of a network with fresh weights, pruned at once to the published sparsities."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build_msunet("v3")
    prune_to_target(model, "V2")
    return score(model, "O3")


def _accuracy(shipped: Shipped | None) -> Claim:
    published = f"{PUBLISHED_V3['top1']:.2f} % top-1 at O3"
    if shipped is None or shipped.top1 is None:
        return Claim(published, "nothing", "", "", NOT_TESTABLE, "No measured network is shipped.", "shipped")
    top1, low, high = shipped.top1
    whole = published_epochs()
    return Claim(
        published,
        f"the shipped network: profile {shipped.provenance.get('profile')}, {shipped.epochs:,} epochs",
        f"{shipped.info['accuracy']['images']:,} test images",
        f"{top1:.2f} % ({low:.2f} to {high:.2f})",
        REPRODUCED if _is_as_good(shipped) else NOT_REPRODUCED,
        f"The published recipe takes {whole:,} epochs; it has not been run to its end here."
        if shipped.epochs < whole
        else "Trained as long as the published network.",
        "shipped",
    )


def _params(fresh: list[Score]) -> Claim:
    counts = [one.params / 1e6 for one in fresh]
    mean = sum(counts) / len(counts)
    published = PUBLISHED_V3["params"] / 1e6
    close = abs(mean / published - 1) <= COUNT_TOLERANCE
    return Claim(
        f"{published:.5f} M parameters",
        "count of fresh networks, pruned to the published sparsities, at O3",
        f"{len(counts)} seeds",
        f"{mean:.5f} M ({min(counts):.5f} to {max(counts):.5f})",
        REPRODUCED if close else NOT_REPRODUCED,
        f"{100 * (mean / published - 1):+.2f} % beside the published count; ternary zeros move it.",
        "05_scoring_walkthrough",
        "published",
    )


def _is_as_good(shipped: Shipped | None) -> bool:
    """Whether the challenge would have ranked it, and the published accuracy is not above its interval."""
    if not (shipped and shipped.top1):
        return False
    top1, _, high = shipped.top1
    return top1 >= RANKED_FROM and high >= PUBLISHED_V3["top1"]


def _flops(fresh: list[Score], shipped: Shipped | None) -> Claim:
    counts = [one.flops / 1e6 for one in fresh]
    mean, published = sum(counts) / len(counts), PUBLISHED_V3["flops"]
    result = f"{mean:.2f} M ({min(counts):.2f} to {max(counts):.2f}) with fresh weights"
    verdict = NOT_TESTABLE
    reason = (
        f"It depends on where training left zeros: the count is met at "
        f"{100 * ternary_sparsity_at(fresh[0], published):.1f} % zeros in ternary layers, weighted by their "
        "operations. The published checkpoint is not here."
    )
    if shipped:
        result += f"; {shipped.score.flops / 1e6:.2f} M of the shipped network"
    if _is_as_good(shipped):
        verdict = REPRODUCED if shipped.score.flops <= published * (1 + COUNT_TOLERANCE) else NOT_REPRODUCED
        reason = "Counted on a network of the published accuracy."
    return Claim(
        f"{published / 1e6:.2f} M operations",
        "count of fresh networks, pruned to the published sparsities, at O3",
        f"{len(counts)} seeds",
        result,
        verdict,
        reason,
        "05_scoring_walkthrough",
        "published",
    )


def _score(shipped: Shipped | None) -> Claim:
    added = score_of(PUBLISHED_V3["params"], PUBLISHED_V3["flops"])
    reason = f"The two published counts do add up to {added:.5f}"
    if shipped is None:
        return Claim(
            f"score {PUBLISHED_V3['score']:.5f}", "nothing", "", "", NOT_TESTABLE, f"{reason}.", "shipped"
        )
    verdict = NOT_TESTABLE
    if _is_as_good(shipped):
        met = shipped.score.value <= PUBLISHED_V3["score"] * (1 + COUNT_TOLERANCE)
        verdict, reason = REPRODUCED if met else NOT_REPRODUCED, f"{reason}, and this network is as accurate."
    else:
        reason += ". A score only compares networks of one accuracy, and the shipped one is less accurate."
    return Claim(
        f"score {PUBLISHED_V3['score']:.5f}",
        "the shipped network, counted at O3",
        "",
        f"{shipped.score.value:.5f}",
        verdict,
        reason,
        "shipped",
    )


# -- ablations: a row's difference to the first level of its factor, in points of top-1 ---------


def ablation_claims(folder: Path) -> Iterator[Claim]:
    """What the committed ablations in ``folder`` say to the published statements on techniques."""
    found = read_results(folder, EVIDENCE) if (folder / f"{EVIDENCE}.csv").is_file() else None
    verdicts = {
        True: (AGREES, "The whole interval agrees"),
        False: (DISAGREES, "The whole interval is against it"),
        None: (UNDECIDED, "The interval holds both answers, or there are too few seeds for one"),
    }
    for statement, row, first, holds in judged(found.table if found else NOTHING):
        published = statement.text.rstrip(".")
        if row is None:
            why = "No ablation with several seeds is among the evidence; single runs do not answer it."
            yield Claim(published, "nothing", "", "", NOT_TESTABLE, why, "06_ablations", statement.choice)
            continue
        budget, (verdict, reason) = found.provenance["budget"], verdicts[holds]
        yield Claim(
            published,
            f"{statement.value} against {first}: networks of width {budget['width']:g}, "
            f"{budget['training_images']:,} images, {budget['epochs']} epochs",
            f"{row['pairs']} pairs of seeds",
            f"{row['difference']:+.2f} points"
            + (f" ({row['low']:+.2f} to {row['high']:+.2f})" if pd.notna(row["low"]) else ""),
            verdict,
            f"{reason}. Read as: {statement.criterion}. Published with: {statement.published}.",
            "06_ablations",
            statement.choice,
        )


def half_precision_claim(path: Path) -> Iterator[Claim]:
    """What O3 costs the shipped network, from its accuracy at each level; nothing where that is not there."""
    if path.is_file():
        levels = pd.read_csv(path).set_index("level")
        cost = levels.loc["O3", "top1"] - levels.loc["O0", "top1"]
        yield Claim(
            "Half precision, O3, costs little: in the shipped network",
            "the shipped network at O0 and at O3",
            f"{levels.loc['O3', 'images']:,} test images",
            f"{cost:+.2f} points",
            AGREES if cost > -LITTLE else DISAGREES,
            "Pruned at O2 as published, at full width. Its file holds weights that are rounded already, so "
            f"this is what arithmetic in FP16 costs. Read as: less than {LITTLE} points.",
            "04_o3_validation",
        )


# -- record, unit --------------------------------------------------------------------


def record_claim(path: Path) -> Claim:
    """The training loss of the paper recipe's first epochs beside the published run record."""
    published = f"training loss {FIRST_LOSSES[0]}, {FIRST_LOSSES[1]}, ... in the first epochs"
    if not path.is_file():
        why = "The first epochs of the paper recipe are not among the evidence yet."
        return Claim(published, "nothing", "", "", NOT_TESTABLE, why, "02_ternary_training")
    try:
        apart = against_published(pd.read_csv(path))["difference of train_loss"].abs().dropna()
    except (ValueError, KeyError, OSError) as error:
        raise StudyError(f"{path} is no history of a stage ({reason(error)}); write it again") from error
    if apart.empty:
        raise StudyError(f"{path} has none of the epochs of the published record; write it again")
    worst = apart.max()
    return Claim(
        published,
        "the first epochs of profile paper on CIFAR-100",
        f"{len(apart)} epochs",
        f"largest difference {worst:.3f} (epoch {apart.idxmax()})",
        REPRODUCED if worst <= RECORD_TOLERANCE else NOT_REPRODUCED,
        f"Asked is a loss within {RECORD_TOLERANCE} of the published run record in each epoch.",
        "02_ternary_training",
        "record|published|training",
    )


def _unit() -> Iterator[Claim]:
    counted = score(wide_resnet(), "O0")
    for found, reference, unit, power, digits, name in (
        (counted.params, REFERENCE_PARAMS, "M", 1e6, 1, "parameters"),
        (counted.flops, REFERENCE_FLOPS, "G", 1e9, 2, "operations"),
    ):
        same = round(found / power, digits) == round(reference / power, digits)
        yield Claim(
            f"WideResNet-28-10: {reference / power:.{digits}f} {unit} {name}",
            "count of WideResNet-28-10 by this counter",
            "",
            f"{found / power:.{digits + 2}f} {unit}",
            REPRODUCED if same else NOT_REPRODUCED,
            f"The unit of the score, to the {digits + len(str(int(reference / power)))} digits published.",
            "05_scoring_walkthrough",
            "WideResNet|unit",
        )
