"""Ablation rows come from runs, and rows that need the same run share it."""

from __future__ import annotations

import pytest

from msunet_core import evaluate, load_checkpoint, score
from msunet_core.data.sources import save_npz
from msunet_core.study.ablations import BASELINE, ROWS, Row, run_ablations
from msunet_core.study.run import Study
from msunet_core.training.stages import CHECKPOINT


@pytest.fixture
def study(images, tmp_path, monkeypatch):
    monkeypatch.setenv("MSUNET_RUNS", str(tmp_path))
    save_npz(images, tmp_path / "images.npz")
    tiny = "ablation_width=0.0625"
    for stage in ("ablation", "ablation_prune"):
        tiny += f" {stage}.epochs=1 {stage}.batch_size=8"
    return Study("smoke", data=str(tmp_path / "images.npz"), run="tiny", device="cpu", overrides=tiny)


def test_every_choice_of_the_study_has_its_rows():
    values = {(row.choice.split(" ")[0], row.value.split(" ")[0]) for row in ROWS}
    assert values >= {
        *(("weights", value) for value in ("float", "binary")),
        ("CutMix", "off"),
        ("opt", "O0"),
        ("opt", "O2"),
        *(("consistency", value) for value in ("off", "as")),
        *(("pruner", value) for value in ("V1", "V2", "V3")),
        *(("variant", value) for value in ("v1", "v2")),
    }
    assert len({(row.choice, row.value) for row in ROWS}) == len(ROWS)


def test_a_row_is_what_its_run_says_and_shared_runs_are_trained_once(study, images):
    rows = (
        BASELINE,
        Row("weights", "float", network={"weights": "float"}),
        Row("pruner", "V2", pruner="V2"),
        Row("opt level", "O0", pruner="V2", opt_level="O0"),
    )
    table = run_ablations(study, rows)
    assert list(table["value"]) == [row.value for row in rows]
    folders = sorted(path.name for path in (study.folder / "ablations").iterdir())
    assert len(folders) == 3, folders
    pruned = next(name for name in folders if name.endswith("-V2"))
    model, _ = load_checkpoint(study.folder / "ablations" / pruned / CHECKPOINT)
    for index, level in ((2, "O3"), (3, "O0")):
        found = evaluate(model, images.test_images, images.test_labels, level)
        row = table.iloc[index]
        assert {key: row[key] for key in found} == found
        assert (row["params"], row["score"]) == (score(model, level).params, score(model, level).value)
    assert table["params"][2] < table["params"][0] < table["params"][1]
    again = run_ablations(study, rows)  # everything is there already
    assert again.equals(table)
