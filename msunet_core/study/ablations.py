"""Ablations: one choice changed at a time, each row trained, pruned, tested and scored by itself."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass, field

import pandas as pd
from torch import nn

from ..measure.evaluation import evaluate
from ..measure.scoring import score
from ..training.stages import prune, train
from .run import Study


@dataclass(frozen=True)
class Row:
    """One line of the table: what differs from the baseline.

    network : changes to :func:`build_msunet`'s arguments
    train : changes to the profile's ``ablation`` stage
    pruner : "none", "V1", "V2" or "V3", run as the profile's ``ablation_prune`` stage after training
    opt_level : at which the result is tested and scored
    """

    choice: str
    value: str
    network: dict = field(default_factory=dict)
    train: dict = field(default_factory=dict)
    pruner: str = "none"
    opt_level: str = "O3"


# v3, ternary, CutMix with consistency as described, not pruned, O3.
BASELINE = Row("baseline", "v3")
# The baseline's value of each choice is the baseline row itself.
ROWS: tuple[Row, ...] = (
    BASELINE,
    Row("weights", "float", network={"weights": "float"}),
    Row("weights", "binary", network={"weights": "binary"}),
    Row("alpha", "0.3", train={"alpha": 0.3}),
    Row("alpha", "1.0", train={"alpha": 1.0}),
    Row("CutMix", "off", train={"cutmix_probability": 0.0}),
    Row("consistency", "off", train={"consistency": "off"}),
    Row("consistency", "as released", train={"consistency": "as-released"}),
    Row("pruner", "V1", pruner="V1"),
    Row("pruner", "V2", pruner="V2"),
    Row("pruner", "V3", pruner="V3"),
    Row("opt level", "O0", pruner="V2", opt_level="O0"),
    Row("opt level", "O2", pruner="V2", opt_level="O2"),
    Row("variant", "v1 (pruner V1, O0)", network={"variant": "v1"}, pruner="V1", opt_level="O0"),
    Row("variant", "v2 (pruner V2)", network={"variant": "v2"}, pruner="V2"),
)


def run_ablations(study: Study, rows: Iterable[Row] = ROWS) -> pd.DataFrame:
    """Run every row and tabulate it; rows that share a training or pruning run share it on disk too.

    Returns
    -------
    DataFrame: choice, value, top1, top5 (percent of the test images), loss, params, flops, score
    """
    profile = study.profile
    data = study.limited_data(profile.ablation_limit)
    networks: dict[str, nn.Module] = {}
    table = []
    for row in rows:
        shape = {"width": profile.ablation_width, **row.network}
        if shape.get("variant") == "v2":
            shape["variant"] = "v1"  # the same network, trained the same way: the run is shared
        trained = _slug(shape | row.train)
        if trained not in networks:
            config = dataclasses.replace(profile.ablation, **row.train)
            folder = study.folder / "ablations" / trained
            networks[trained] = train(study.network(**shape), data, config, folder, **study.options).model
        ended = trained
        if row.pruner != "none":
            ended = f"{trained}-{row.pruner}"
            if ended not in networks:
                config = dataclasses.replace(profile.ablation_prune, pruner=row.pruner)
                folder = study.folder / "ablations" / ended
                start = copy.deepcopy(networks[trained])
                momentum = study.momentum(f"ablations/{trained}")
                found = prune(start, data, config, folder, momentum=momentum, **study.options)
                networks[ended] = found.model
        model = networks[ended]
        found = evaluate(model, data.test_images, data.test_labels, row.opt_level)
        cost = score(model, row.opt_level)
        table.append(
            {
                "choice": row.choice,
                "value": row.value,
                **found,
                "params": cost.params,
                "flops": cost.flops,
                "score": cost.value,
            }
        )
    return pd.DataFrame(table)


def _slug(changes: dict) -> str:
    return "_".join(f"{name}-{value}" for name, value in sorted(changes.items())) or "baseline"
