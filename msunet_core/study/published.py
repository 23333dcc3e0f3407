"""Single figures of the published run record of MSUNet-v3's training, to hold a trainer against.

The source is specification §1, which quotes them; the record itself is not part of this repository. Epoch 0
is the first trained one, tested after it. ``train_loss`` is the mean over an epoch's steps, in nats, and
includes the consistency term as released; ``top1`` is that of the 10,000 test images in percent.
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from ..files import ROOT
from ..measure.scoring import published_table

PUBLISHED_V3 = published_table().loc["MSUNet-v3"]
SOURCE = "published run record of MSUNet-v3, as quoted in specification §1"
# Where the first epochs of the recipe `paper`, trained on the real CIFAR-100, are committed.
OWN_RECORD = ROOT / "runs" / "record" / "history.csv"

FIRST_LOSSES = (4.632, 4.187, 3.823, 3.492, 3.278, 3.074, 2.862, 2.795, 2.665, 2.572, 2.531)
FIRST_TOP1 = (2.19, 13.72, 23.43, 32.75, 38.75, 38.01, 46.17, 51.48, 53.01, 54.26, 56.37)
LATER_TOP1 = {
    20: 63.3,
    50: 68.9,
    100: 70.4,
    200: 71.8,
    299: 72.2,
    300: 77.1,  # the first decay of the learning rate
    399: 76.1,
    400: 78.7,
    500: 79.9,
    924: 80.91,  # the best
    1035: 80.61,  # where the published pruning started from
    1049: 80.17,  # the last
}


def published_record() -> pd.DataFrame:
    """Columns ``epoch`` (int), ``train_loss`` (nats, NaN where none is quoted), ``top1`` (percent); by epoch.

    Its ``attrs["source"]`` names the source.
    """
    first = zip(range(len(FIRST_LOSSES)), FIRST_LOSSES, FIRST_TOP1, strict=True)
    later = ((epoch, float("nan"), top1) for epoch, top1 in LATER_TOP1.items())
    record = pd.DataFrame([*first, *later], columns=["epoch", "train_loss", "top1"])
    record.attrs["source"] = SOURCE
    return record


def own_record(path: Path = OWN_RECORD) -> pd.DataFrame | None:
    """The committed first epochs of this repository's own run of the recipe; None where there are none."""
    return pd.read_csv(path) if path.is_file() else None


def against_published(history: pd.DataFrame) -> pd.DataFrame:
    """A stage's history beside the published figures: a row for each epoch that both have.

    Parameters
    ----------
    history : columns ``epoch``, ``train_loss``, ``test_top1`` at least

    Returns
    -------
    Index ``epoch``; ``train_loss``, ``published train_loss``, ``difference of train_loss`` (nats) and the
    same for ``top1`` (percentage points). Differences are ours less the published figure.
    """
    ours = history.set_index("epoch").rename(columns={"test_top1": "top1"})
    theirs = published_record().set_index("epoch")
    both = ours.index.intersection(theirs.index)
    table = {}
    for name in ("train_loss", "top1"):
        table[name] = ours.loc[both, name]
        table[f"published {name}"] = theirs.loc[both, name]
        table[f"difference of {name}"] = ours.loc[both, name] - theirs.loc[both, name]
    return pd.DataFrame(table)
