"""A grid is data; its runs are shared, resumed and never repeated, wherever they are computed."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import pytest

from msunet_core import StudyError, evaluate, load_checkpoint, score
from msunet_core.__main__ import main
from msunet_core.data.sources import save_npz
from msunet_core.files import ROOT
from msunet_core.study import ablations, cluster, grid_results, grid_runs
from msunet_core.study.ablation_figures import pareto, plot_effects, plot_factor_curves, plot_front
from msunet_core.study.ablations import read_results, run_ablations, tabulate
from msunet_core.study.findings import budget_of, chance_of_resolved, claims_beside_findings, of_chance, told
from msunet_core.study.grid import GRID, load_grid
from msunet_core.study.profile import load_profile, profile_names, read_yaml
from msunet_core.training import resume
from msunet_core.training.stages import CHECKPOINT

TINY = ["ablation_width=0.0625", "ablation_limit=6", "ablation.image_sizes=[]"]
for stage in ("ablation", "ablation_prune"):
    TINY += [f"{stage}.epochs=1", f"{stage}.batch_size=8"]
FACTORS = {
    "weights": {"ternary": {}, "float": {"network.weights": "float"}},
    "pruner": {"none": {}, "V2": {"ablation_prune.pruner": "V2"}},
    "opt level": {
        "O3": {"ablation_prune.pruner": "V2"},
        "O0": {"ablation_prune.pruner": "V2", "ablation_opt_level": "O0"},
    },
}


# Weight decay that turns weights over and makes them a hundred times larger in every step.
WILD = {"ablation.lr": 100, "ablation.weight_decay": 1, "ablation.epochs": 20}


@pytest.fixture
def data(images, tmp_path):
    save_npz(images, tmp_path / "images.npz")
    return str(tmp_path / "images.npz")


@pytest.fixture
def tiny(data):
    """The smoke profile with a network and stages that take a tenth of a second; and overrides."""

    def make(*overrides):
        return load_profile("smoke", data=data, device="cpu", overrides=[*TINY, *overrides])

    return make


@pytest.fixture
def computed(monkeypatch):
    """Folders of the runs that are computed, in the order in which they begin."""
    folders, perform = [], ablations.perform

    def noted(run, *rest):
        folders.append(run.folder)
        return perform(run, *rest)

    monkeypatch.setattr(ablations, "perform", noted)
    return folders


def kinds(folders: list[Path]) -> list[str]:
    """Of runs: "train-baseline-v3"."""
    return [folder.parent.name.rsplit("-", 1)[0] for folder in folders]


# -- the grid ----------------------------------------------------------------------------------


def test_the_study_has_a_row_for_every_choice_it_asks_about():
    grid = load_grid(load_profile("smoke"))
    levels = {}
    for row in grid.rows:
        levels.setdefault(row.choice, []).append(row.value)
    wanted = {
        "baseline": ["v3"],
        "weights": ["ternary", "binary", "float"],
        "gradient": ["dL/dK", "dL/dT"],
        "alpha": ["0.67749", "0.3", "1.0", "ramped"],
        "CutMix": ["off", "on"],
        "consistency": ["off", "as described", "as released"],
        "random erasing": ["off", "on"],
        "pruner": ["none", "V1", "V2", "V3"],
        "SE sparsity": ["0.9", "0.8", "0.95"],
        "opt level": ["O0", "O2", "O3"],
        "variant": ["v3", "v2", "v1 (V1, O0)"],
    }
    assert all(set(wanted[choice]) <= set(levels[choice]) for choice in wanted)
    # What the others of a factor are compared with.
    assert {choice: levels[choice][0] for choice in wanted} == {
        choice: of[0] for choice, of in wanted.items()
    }
    assert len(grid.seeds) >= 6


@pytest.mark.parametrize("name", profile_names())
def test_the_levels_of_a_factor_differ_and_one_is_compared_with(name):
    rows = load_grid(load_profile(name)).rows
    for choice in {row.choice for row in rows}:
        of = [row for row in rows if row.choice == choice]
        assert len({repr(row.profile) for row in of}) == len(of), choice


def test_adding_a_row_is_editing_the_file(tmp_path):
    edited = read_yaml(GRID)
    edited["factors"]["alpha"]["2"] = {"ablation.alpha": 2}
    (tmp_path / "grid.yaml").write_text(json.dumps(edited))  # which is YAML, too
    before, after = (load_grid(load_profile("smoke"), path) for path in (GRID, tmp_path / "grid.yaml"))
    (added,) = set(row.label for row in after.rows) - set(row.label for row in before.rows)
    assert added == "alpha: 2"
    assert next(row for row in after.rows if row.label == added).profile.ablation.alpha == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"only": ["wieghts"]}, "factor 'wieghts' is unknown; did you mean 'weights'"),
        (
            {"factors": {"alpha": {"1": {"ablation.alhpa": 1}}}},
            "row alpha: 1: parameter ablation.alhpa is unknown; did",
        ),
        (
            {"factors": {"weights": {"x": {"network.weights": "trinary"}}}},
            "weights 'trinary' is unknown; did you mean",
        ),
        (
            {"factors": {"alpha": {"1": {"ablation.alpha": "much"}}}},
            "ablation.alpha is 'much', not of type float",
        ),
        ({"factors": {"alpha": ["1", "2"]}}, "factor alpha is .*, not a mapping"),
        ({"seeds": []}, r"seeds \[\] are not"),
        ({"seeds": [1, 1]}, r"seeds \[1, 1\] are not"),
    ],
)
def test_a_grid_that_is_wrong_is_refused_by_name(change, message):
    with pytest.raises(StudyError, match=message) as refused:
        load_grid(load_profile("smoke"), **change)
    assert "\n" not in str(refused.value)


# -- rows and runs -----------------------------------------------------------------------------


def test_rows_are_what_their_runs_say_and_equal_runs_are_computed_once(tiny, images, tmp_path, computed):
    profile = tiny()
    grid = load_grid(profile, factors=FACTORS, seeds=[0, 1])
    found = run_ablations(profile, grid, tmp_path / "out", progress=False)
    assert sorted(set(kinds(computed))) == ["prune-pruner-V2", "train-baseline-v3", "train-weights-float"]
    assert len(computed) == len(set(computed)) == 6
    (pruned,) = (tmp_path / "out/smoke").glob("prune-*/seed-1")
    model, _ = load_checkpoint(pruned / CHECKPOINT)
    by = found.seeds.set_index(["choice", "value", "seed"]).sort_index()
    for choice, value, level in (("pruner", "V2", "O3"), ("opt level", "O0", "O0")):
        tested = evaluate(model, images.test_images, images.test_labels, level)
        row = by.loc[choice, value, 1]
        assert row["top1"] == pytest.approx(tested["top1"], abs=5e-4)  # three digits are written
        assert row["score"] == pytest.approx(score(model, level).value, abs=5e-9)
    assert by.loc["weights", "ternary"].equals(by.loc["baseline", "v3"])
    assert by.loc["pruner", "none"].equals(by.loc["baseline", "v3"])
    computed.clear()
    again = run_ablations(profile, grid, tmp_path / "out", progress=False)
    assert computed == []
    pd.testing.assert_frame_equal(again.table, found.table)
    assert again.provenance == found.provenance


def test_what_is_written_is_what_was_found_and_names_no_path(tiny, tmp_path, monkeypatch):
    monkeypatch.delenv("MSUNET_COMMAND", raising=False)
    asked = ["ablations", f"--grid={tmp_path}/mine.yaml", "--data", f"{tmp_path}/images.npz"]
    asked += ["--set", "ablation.lr=0.1", "--scheduler", "tcp://10.0.0.7:8786"]
    monkeypatch.setattr(sys, "argv", ["/home/me/msunet_core/__main__.py", *asked])
    profile, own_grid = tiny(), shutil.copy(GRID, tmp_path / "mine.yaml")
    grid = load_grid(profile, own_grid, factors={"weights": FACTORS["weights"]}, seeds=[0, 1])
    found = run_ablations(profile, grid, tmp_path / "out", progress=False)
    read = read_results(tmp_path / "out", "smoke")
    for name in ("table", "seeds", "curves"):
        written, own = getattr(read, name), getattr(found, name)
        pd.testing.assert_frame_equal(written, own, check_dtype=False, obj=name)
    assert ",".join(found.table) == (
        "choice,value,n,mean,sd,difference,sd_difference,low,high,p,resolved,pairs,"
        "params,flops,score,score_change,ran_away,failed"
    )
    for path in (tmp_path / "out").glob("smoke*.*"):
        assert str(tmp_path) not in path.read_text(), path
    made = read.provenance
    assert (
        made["seeds"] == [0, 1] and made["budget"]["epochs"] == 1 and made["budget"]["training_images"] == 24
    )
    assert made["runs"] == 4 and made["wall_seconds"] >= 0 and made["processors"]
    assert made["command"] == (
        "python -m msunet_core ablations --grid=mine.yaml --data images.npz --set ablation.lr=0.1 "
        "--scheduler tcp://HOST:PORT"
    )
    by_make = "make ablations SCHEDULER=tcp://10.0.0.7:8786 'SET=data.source=/home/me/x.npz ablation.lr=0.1'"
    monkeypatch.setenv("MSUNET_COMMAND", by_make)
    told = "make ablations SCHEDULER=tcp://HOST:PORT 'SET=data.source=x.npz ablation.lr=0.1'"
    assert ablations.command() == told


def test_tables_of_other_images_or_another_budget_are_not_written_over_unasked(tiny, tmp_path, data):
    def run(profile, replace):
        grid = load_grid(profile, factors={"weights": FACTORS["weights"]}, seeds=[0])
        return run_ablations(profile, grid, tmp_path, replace=replace, progress=False)

    made = run(tiny(), False).provenance
    table = (tmp_path / "smoke.csv").read_bytes()
    with pytest.raises(StudyError, match="is of another budget and data than this; give a folder of its own"):
        run(tiny("ablation_limit=1"), False)
    assert (tmp_path / "smoke.csv").read_bytes() == table
    moved = str(shutil.copy(data, tmp_path / "elsewhere.npz"))
    again = load_profile("smoke", data=moved, device="auto", overrides=TINY)
    assert run(again, False).provenance == made, "nothing was computed, so nothing of it changes"
    assert run(tiny("ablation_limit=1"), True).provenance["budget"]["training_images"] == 4


def test_finished_runs_that_came_with_the_folder_are_kept_too(tiny, tmp_path):
    grid = load_grid(tiny(), factors={"weights": FACTORS["weights"]}, seeds=[0])
    run_ablations(tiny(), grid, tmp_path, progress=False)
    kept = (tmp_path / "smoke_runs.json").read_bytes()
    (tmp_path / "smoke_runs.json").unlink()
    run_ablations(tiny(), grid, tmp_path, progress=False)
    assert (tmp_path / "smoke_runs.json").read_bytes() == kept


def test_a_cut_off_grid_goes_on_to_the_same_table(tiny, tmp_path, computed):
    profile = tiny()
    grid = load_grid(profile, factors=FACTORS, seeds=[0, 1])
    whole = run_ablations(profile, grid, tmp_path / "whole", progress=False)
    computed.clear()

    def stop_after_three(done, total, text):
        if text == "ablations, 3 of 6 runs":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_ablations(profile, grid, tmp_path / "cut", progress=stop_after_three)
    cut = run_ablations(profile, grid, tmp_path / "cut", progress=False)
    pd.testing.assert_frame_equal(cut.table, whole.table)
    assert len(computed) == len(set(computed)) == 6


def test_results_travel_without_their_folders_and_only_what_is_added_is_computed(tiny, tmp_path, computed):
    """As in a fresh clone: the file of the runs is there, their folders are not."""

    def terminate_after_two(done, total, text):
        if text == "ablations, 2 of 3 runs":
            os.kill(os.getpid(), signal.SIGTERM)

    first = load_grid(tiny(), factors={"weights": FACTORS["weights"], "pruner": FACTORS["pruner"]}, seeds=[0])
    with pytest.raises(SystemExit):
        run_ablations(tiny(), first, tmp_path, progress=terminate_after_two)
    assert kinds(computed) == ["train-baseline-v3", "train-weights-float"]
    shutil.rmtree(tmp_path / "smoke")
    found = run_ablations(tiny(), first, tmp_path, progress=False)
    assert found.provenance["wall_seconds"] is None, "the time of the stopped sitting is not known"
    # A pruning goes on from weights, so its training is needed again; the float network is not.
    assert kinds(computed[2:]) == ["train-baseline-v3", "prune-pruner-V2"]
    shutil.rmtree(tmp_path / "smoke")
    pd.testing.assert_frame_equal(run_ablations(tiny(), first, tmp_path, progress=False).table, found.table)
    assert len(computed) == 4
    more = load_grid(
        tiny(),
        factors={"weights": {**FACTORS["weights"], "binary": {"network.weights": "binary"}}},
        seeds=[0],
    )
    found = run_ablations(tiny(), more, tmp_path, progress=False)
    assert kinds(computed[4:]) == ["train-weights-binary"]
    assert found.table["n"].tolist() == [1] * 4
    pruned = json.loads((tmp_path / "smoke_runs.json").read_text())
    assert sum(name.startswith("prune-pruner-V2") for name in pruned) == 1, "what another grid needs is kept"


def test_a_run_is_known_whatever_row_asked_for_it_first(tiny, tmp_path, computed):
    """Its folder and its line are called after a row; another order of rows calls it otherwise."""
    pruned = {"ablation.alpha": 1.0, "ablation_prune.pruner": "V2"}
    alphas = {"0.7": {}, "1.0": {"ablation.alpha": 1.0}, "1.0, pruned": pruned}
    factors = {"weights": FACTORS["weights"], "alpha": alphas}
    run_ablations(tiny(), load_grid(tiny(), factors=factors, seeds=[0]), tmp_path, progress=False)
    mine = {"c": pruned, "b": {"ablation.alpha": 1.0}, "a": {}}
    other = load_grid(tiny(), factors={"mine": mine}, seeds=[0])
    lines = (tmp_path / "smoke_runs.json").read_text()
    computed.clear()
    run_ablations(tiny(), other, tmp_path, progress=False)
    shutil.rmtree(tmp_path / "smoke")
    run_ablations(tiny(), other, tmp_path, progress=False)
    assert computed == []
    assert (tmp_path / "smoke_runs.json").read_text() == lines


def test_a_pruning_does_not_start_from_a_training_that_was_stopped(tiny, tmp_path, computed):
    """Its result is in the file of runs, what lies in its folder is a first part of it, begun anew."""
    grid = load_grid(tiny(), factors={"pruner": FACTORS["pruner"]}, seeds=[0])
    found = run_ablations(tiny(), grid, tmp_path, progress=False)
    (training,) = tmp_path.glob("smoke/train-*/seed-0")
    (pruning,) = tmp_path.glob("smoke/prune-*/seed-0")
    shutil.rmtree(pruning)
    (training / "result.json").unlink()
    path = tmp_path / "smoke_runs.json"
    kept = json.loads(path.read_text())
    path.write_text(json.dumps({name: kept[name] for name in kept if name.startswith("train")}))
    computed.clear()
    again = run_ablations(tiny(), grid, tmp_path, progress=False)
    assert computed == [training, pruning]
    pd.testing.assert_frame_equal(again.table, found.table)


def test_other_code_computes_a_grid_anew(tiny, tmp_path, monkeypatch):
    """Whether it only tests otherwise, or trains otherwise too."""
    grid = load_grid(tiny(), factors={"pruner": FACTORS["pruner"]}, seeds=[0])
    table = run_ablations(tiny(), grid, tmp_path, progress=False).table
    folder = next(tmp_path.glob("smoke/train-*/seed-0"))
    told = json.loads((tmp_path / "smoke_runs.json").read_text()).values()
    seconds = sorted(result["seconds"] for result in told)
    for module in (grid_runs, grid_results):
        monkeypatch.setattr(module, "code_of_runs", lambda: "tests otherwise")
    monkeypatch.setattr(grid_runs, "evaluate", lambda *_: {"top1": 12.0, "top5": 34.0, "loss": 5.0})
    assert set(run_ablations(tiny(), grid, tmp_path, progress=False).table["mean"]) == {12.0}
    assert not folder.with_name("seed-0.1").exists(), "a training is not made anew because tests changed"
    told = json.loads((tmp_path / "smoke_runs.json").read_text()).values()
    assert sorted(result["seconds"] for result in told) == seconds, "a run took what its training took"

    monkeypatch.setattr(grid_runs, "evaluate", evaluate)
    for module in (grid_runs, grid_results):
        monkeypatch.setattr(module, "code_of_runs", lambda: "trains otherwise")
    monkeypatch.setattr(resume, "code_of_training", lambda: {"fast/layers.py": "other"})
    again = run_ablations(tiny(), grid, tmp_path, progress=False).table
    assert folder.with_name("seed-0.1").exists()
    pd.testing.assert_frame_equal(again, table)  # it only says that it is other code


def test_a_file_of_runs_that_cannot_be_read_is_named(tiny, tmp_path):
    (tmp_path / "smoke_runs.json").write_text("{")
    with pytest.raises(StudyError, match=r"smoke_runs\.json is not JSON .* remove it or restore it"):
        run_ablations(tiny(), load_grid(tiny(), seeds=[0]), tmp_path, progress=False)
    (tmp_path / "smoke_runs.json").write_text('{"foo": {}}')
    with pytest.raises(StudyError, match=r"smoke_runs\.json has a line 'foo', which is no run; remove it"):
        run_ablations(tiny(), load_grid(tiny(), seeds=[0]), tmp_path, progress=False)


def test_another_grid_does_not_write_over_the_committed_tables(tmp_path, capsys):
    own = shutil.copy(GRID, tmp_path / "mine.yaml")
    assert main(["ablations", "--profile", "smoke", "--grid", str(own)]) != 0
    assert "mine.yaml is another grid: give a folder for its tables, --out" in capsys.readouterr().err


def test_a_row_that_diverges_is_reported_and_the_others_go_on(tiny, tmp_path, data, capsys):
    factors = tmp_path / "grid.yaml"
    factors.write_text(
        "seeds: [0, 1]\nbaseline: {ablation.cutmix_probability: 0}\nfactors:\n"
        "  rate: {sane: {}, wild: {ablation.lr: 100, ablation.weight_decay: 1, ablation.epochs: 20}}\n"
    )
    arguments = ["ablations", "--grid", str(factors), "--data", data, "--device", "cpu", "--jobs", "1"]
    arguments += ["--out", str(tmp_path / "out"), "--set", *TINY]
    assert main(arguments) == 2
    shown = capsys.readouterr()
    (line,) = [line for line in shown.err.splitlines() if line.startswith("error: ")]
    assert "1 of 3 rows failed (rate: wild), the table says why" in line
    table = read_results(tmp_path / "out", "smoke").table.set_index(["choice", "value"])
    wild = table.loc["rate", "wild"]
    assert wild["n"] == 0 and pd.isna(wild["mean"]) and pd.isna(wild["difference"])
    assert wild["failed"].startswith("2 of 2 seeds, seed 0: train stopped: ")
    assert table.loc["rate", "sane"]["n"] == 2 and pd.isna(table.loc["rate", "sane"]["failed"])
    plot_effects(table.reset_index())  # and can be drawn


def test_a_pruning_whose_training_failed_says_so(tiny, tmp_path):
    wild = {**WILD, "ablation_prune.pruner": "V1"}
    grid = load_grid(tiny(), factors={"rate": {"sane": {}, "wild": wild}}, seeds=[0])
    found = run_ablations(tiny(), grid, tmp_path, progress=False)
    assert found.seeds.iloc[-1]["failed"].startswith("its training failed: train stopped: ")


def test_other_images_than_the_grid_was_started_with_are_refused(tiny, images, data, tmp_path):
    source = ablations.source_of(tiny())
    darker = dataclasses.replace(images, train_images=images.train_images // 2)
    save_npz(darker, data)
    grid_runs._load.cache_clear()
    with pytest.raises(StudyError, match=r"have fingerprint .* give all workers the same images"):
        source.load()


def test_v1_and_v2_are_one_training_pruned_in_two_ways(tiny, tmp_path):
    v1 = {"network.variant": "v1", "ablation_prune.pruner": "V1"}
    v2 = {"network.variant": "v2", "ablation_prune.pruner": "V2"}
    grid = load_grid(tiny(), factors={"variant": {"v1": v1, "v2": v2}}, seeds=[0])
    found = run_ablations(tiny(), grid, tmp_path, progress=False)
    assert found.table["failed"].isna().all(), found.table["failed"].tolist()
    stages = sorted(path.name.split("-")[0] for path in (tmp_path / "smoke").iterdir() if path.is_dir())
    assert stages == ["prune", "prune", "train", "train"]  # the baseline's and that of both
    assert found.table["score"].iloc[1] > found.table["score"].iloc[2]
    assert found.curves["value"].unique().tolist() == ["v3", "v1 = v2"]


def test_progress_is_one_line_over_all_rows(tiny, tmp_path):
    told = []
    grid = load_grid(tiny(), factors=FACTORS, seeds=[0])
    run_ablations(tiny(), grid, tmp_path, progress=lambda *state: told.append(state))
    done = [state[0] for state in told]
    assert done == sorted(done) and len({state[1] for state in told}) == 1
    assert told[-1] == (told[0][1], told[0][1], "ablations, 3 of 3 runs")


# -- tables and pictures ------------------------------------------------------------------------


def by_seed(score=None, ran_away=None, **rows) -> pd.DataFrame:
    """Rows by seed of "choice_value": top-1 values; cost 1 and score 0.01 each, or what ``score`` says.

    ran_away : by row, how many layers ran away for each seed (0)
    """
    table = []
    for name, values in rows.items():
        choice, value = name.split("_")
        for seed, top1 in enumerate(values):
            table.append(dict(choice=choice, value=value, seed=seed, top1=top1, top5=0, loss=0))
            failed = None if top1 == top1 else "it broke"
            table[-1] |= dict(params=1, flops=1, score=(score or {}).get(name, 0.01), failed=failed)
            table[-1]["ran_away"] = (ran_away or {}).get(name, [0] * len(values))[seed]
    return pd.DataFrame(table)


def test_a_row_is_compared_with_the_first_of_its_factor_on_the_seeds_they_share():
    """b is 1, 2, 3 above a on the seeds that both have; its fourth seed failed."""
    nan = float("nan")
    rows = dict(f_a=[10, 20, 30, 40], f_b=[11, 22, 33, nan], g_c=[50, 60, 70, 80])
    table = tabulate(by_seed(score={"f_b": 0.008}, ran_away={"f_b": [2, 0, 1, 5]}, **rows))
    a, b, c = table.to_dict("records")
    assert (a["n"], a["mean"]) == (4, 25) and pd.isna(a["difference"]) and pd.isna(a["resolved"])
    assert (b["n"], b["mean"], b["difference"], b["sd_difference"], b["p"]) == (3, 22, 2, 1, 2 / 8)
    assert b["score_change"] == -20 and b["pairs"] == 3
    assert (a["ran_away"], b["ran_away"]) == (0, 2)  # seeds, not layers, and none of what failed
    assert b["failed"] == "1 of 4 seeds, seed 3: it broke"
    assert pd.isna(c["difference"])  # the first of another factor


TABLE = tabulate(
    by_seed(
        baseline_v3=[40, 41, 42, 43, 44, 45],
        weights_ternary=[40, 41, 42, 43, 44, 45],
        weights_binary=[38, 39.5, 40, 41.2, 42, 43],
        consistency_off=[40, 41, 42, 43, 44, 45],
        **{"consistency_as released": [39, 42, 41, 44, 43, 46]},
        pruner_none=[40, 41, 42, 43, 44, 45],
        pruner_V1=[39, 40.1, 40.8, 42, 43.1, 43.9],
    )
)


def test_claims_stand_beside_what_was_found():
    beside = claims_beside_findings(TABLE)
    assert beside["at this budget"].tolist() == ["agrees", "undecided", "", "disagrees"]
    assert "binary against ternary: -1.88 points" in beside["found"].iloc[0]
    assert beside["found"].iloc[2] == "not measured here"
    few = claims_beside_findings(tabulate(by_seed(weights_ternary=[40, 41], weights_binary=[38, 39])))
    assert few["at this budget"].iloc[0] == "undecided" and "too few for an interval" in few["found"].iloc[0]


def test_what_is_resolved_and_what_is_not_are_told_apart_in_the_order_of_the_grid():
    found, open_ = (
        [line.split(" instead")[0] for line in told(TABLE, resolved=yes)] for yes in (True, False)
    )
    assert (found, open_) == (["weights: binary", "pruner: V1"], ["consistency: as released"])
    assert told(TABLE.iloc[:2], resolved=True) == ["none"]
    # Three comparisons of six pairs, each resolved by chance in 2 of 64.
    assert of_chance(TABLE).startswith("Of these 3 comparisons about 0.1 would")


@pytest.mark.parametrize("pairs", [5, 6, 7, 8])
def test_the_chance_to_be_resolved_is_that_of_random_signs(pairs):
    """All 2^n signs of differences of which no two are of one size, and p counted over them."""
    sizes = 2.0 ** np.arange(pairs)
    signs = np.array(list(itertools.product((-1, 1), repeat=pairs)))
    means = np.abs((signs * sizes).sum(1))
    p = np.array([(means >= mean).mean() for mean in means])
    assert chance_of_resolved(pairs) == pytest.approx((p <= 0.05).mean())


def test_resolved_rows_are_filled_the_others_hollow_and_few_seeds_a_cross():
    few = tabulate(by_seed(alpha_a=[40, 41], alpha_b=[38, 39]))
    axes = plot_effects(pd.concat([TABLE, few])).axes[0]
    drawn = [(line.get_marker(), line.get_markerfacecolor() == "white") for line in axes.lines]
    assert [each for each in drawn if each[0] in "ox"] == [
        ("o", False),  # binary
        ("o", True),  # as released
        ("o", False),  # V1
        ("x", False),  # of two seeds
    ]


def test_the_front_is_of_rows_that_no_other_beats():
    table = pd.DataFrame({"value": list("abcde"), "score": [1, 2, 3, 4, 2.5], "mean": [10, 30, 20, 40, 30]})
    assert list(pareto(table)["value"]) == ["a", "b", "d"]


def test_pictures_hold_what_they_promise(tiny, tmp_path):
    grid = load_grid(tiny("ablation.epochs=2"), factors={"weights": FACTORS["weights"]}, seeds=[0, 1])
    found = run_ablations(tiny("ablation.epochs=2"), grid, tmp_path, progress=False)
    assert found.curves.groupby(["choice", "value", "seed"])["epoch"].apply(list).tolist() == [[0, 1]] * 6
    figures = plot_effects(found.table), plot_front(found.table), plot_factor_curves(found.curves)
    for figure in figures:
        assert figure.get_size_inches()[0] <= 4.5  # at 8 points and more, as large on a phone
        assert (
            min(text.get_fontsize() for text in figure.findobj(match=lambda o: hasattr(o, "get_fontsize")))
            >= 8
        )
    figures[1].draw_without_rendering()
    low, high = figures[1].axes[0].get_xlim()
    ticks = [label.get_text() for label in figures[1].axes[0].get_xticklabels()]
    assert sum(low <= float(text) <= high for text in ticks if text) >= 2, "an axis without numbers"
    drawn = {tuple(line.get_xdata()) for line in figures[1].axes[1].lines}
    assert (0.01711, 0.01255, 0.01083) in drawn and (0.004169, 0.0054) in drawn
    assert "published network" in budget_of(found) and "2 epochs" in budget_of(found)
    assert all(line.startswith("- **") for line in budget_of(found).splitlines())


# -- Dask ---------------------------------------------------------------------------------------


@pytest.fixture
def two_cores():
    """Two processes then have one thread each, as the tests themselves: the same sums, to the digit."""
    if not hasattr(os, "sched_setaffinity"):
        pytest.skip("no way to keep processes to two cores")
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(before)[:2])
    yield
    os.sched_setaffinity(0, before)


def test_a_scheduler_that_is_not_there_is_told_in_one_line(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(cluster, "PATIENCE", 1)
    grid = load_grid(tiny(), factors={"weights": FACTORS["weights"]}, seeds=[0])
    with pytest.raises(StudyError, match=r"no scheduler answers at 'tcp://127\.0\.0\.1:9'") as refused:
        run_ablations(tiny(), grid, tmp_path, scheduler="tcp://127.0.0.1:9", progress=False)
    assert "\n" not in str(refused.value)


@contextlib.contextmanager
def dask(kind: str, *arguments: str, folder: Path):
    """A scheduler or worker as a person would start it, ended with what it started."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", f"distributed.cli.dask_{kind}", *arguments],
        cwd=folder,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield process
    finally:
        for each in [*psutil.Process(process.pid).children(recursive=True)] if process.poll() is None else []:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
        process.kill()
        process.wait()


@contextlib.contextmanager
def scheduler(folder: Path):
    found = folder / "scheduler.json"
    options = ("--port", "0", "--no-dashboard", "--scheduler-file", str(found), "--host", "127.0.0.1")
    with dask("scheduler", *options, folder=folder):
        deadline = time.monotonic() + 60
        while not found.exists():
            assert time.monotonic() < deadline, "no scheduler after a minute"
            time.sleep(0.1)
        time.sleep(0.5)  # the file is there before its end is
        yield json.loads(found.read_text())["address"]


@pytest.mark.slow
def test_two_processes_come_to_the_table_of_one(tiny, tmp_path, two_cores):
    grid = load_grid(tiny(), factors=FACTORS, seeds=[0])
    alone = run_ablations(tiny(), grid, tmp_path / "alone", progress=False)
    two = run_ablations(tiny(), grid, tmp_path / "two", jobs=2, progress=False)
    pd.testing.assert_frame_equal(two.table, alone.table)


@pytest.mark.slow
def test_a_cluster_that_loses_a_worker_comes_to_the_same_table(tiny, tmp_path, two_cores):
    profile = tiny("ablation.epochs=25")
    grid = load_grid(profile, factors={"weights": FACTORS["weights"]}, seeds=[0, 1])
    alone = run_ablations(profile, grid, tmp_path / "alone", progress=False)
    killed = []

    def kill_one(done, total, text):
        """Once the first of the two workers has left a checkpoint of a run, kill it."""
        for lock in (tmp_path / "cluster/smoke").glob("*/seed-*/.lock"):
            holder = json.loads(lock.read_text() or "{}").get("pid")
            unfinished = (lock.parent / CHECKPOINT).exists() and not (lock.parent / "result.json").exists()
            if not killed and unfinished and holder == worker.pid:
                os.kill(worker.pid, signal.SIGKILL)
                killed.append(lock.parent)

    with scheduler(tmp_path) as address:
        options = (address, "--no-nanny", "--nthreads", "1", "--no-dashboard")
        with dask("worker", *options, folder=tmp_path) as worker, dask("worker", *options, folder=tmp_path):
            wait_for_workers(address, 2)
            found = run_ablations(profile, grid, tmp_path / "cluster", scheduler=address, progress=kill_one)
    assert killed, "no worker was caught in the middle of a run"
    pd.testing.assert_frame_equal(found.table, alone.table)
    log = (killed[0] / "log.txt").read_text()
    assert "resume at epoch" in log, log  # not from the beginning


@pytest.mark.slow
def test_a_worker_that_comes_late_gets_its_share(tiny, tmp_path, two_cores):
    from distributed import Client

    profile = tiny("ablation.epochs=10")
    grid = load_grid(profile, factors={"weights": FACTORS["weights"]}, seeds=[0, 1, 2, 3])
    with contextlib.ExitStack() as stack:
        address = stack.enter_context(scheduler(tmp_path))
        options = (address, "--no-nanny", "--nthreads", "1", "--no-dashboard")
        workers, computed = [stack.enter_context(dask("worker", *options, folder=tmp_path))], {}
        observer, most = stack.enter_context(Client(address, set_as_default=False)), 0

        def look(done, total, text):
            """Start the second worker once the first is at work; note which of them has which run."""
            nonlocal most
            most = max(most, *map(len, observer.processing().values()))
            for lock in (tmp_path / "cluster/smoke").glob("*/seed-*/.lock"):
                if holder := json.loads(lock.read_text() or "{}").get("pid"):
                    computed[lock.parent] = holder
            if computed and len(workers) == 1:
                workers.append(stack.enter_context(dask("worker", *options, folder=tmp_path)))

        wait_for_workers(address, 1)
        run_ablations(profile, grid, tmp_path / "cluster", scheduler=address, progress=look)
    assert set(computed.values()) == {worker.pid for worker in workers}
    assert most == 1, f"{most} runs waited at one worker"


@pytest.mark.slow
def test_a_worker_out_of_memory_is_told_in_one_line(tiny, tmp_path):
    """Its limit is less than the libraries need, so its nanny ends it each time the run is tried."""
    grid = load_grid(tiny(), factors={"weights": {"ternary": {}}}, seeds=[0])
    with scheduler(tmp_path) as address:
        options = (address, "--nthreads", "1", "--no-dashboard", "--memory-limit", "200MiB")
        with dask("worker", *options, folder=tmp_path):
            wait_for_workers(address, 1)
            found = run_ablations(tiny(), grid, tmp_path / "out", scheduler=address, progress=False)
    assert found.table["n"].tolist() == [0, 0]
    assert "its worker died 4 times; was the memory enough?" in found.table["failed"].iloc[0]


def wait_for_workers(address: str, count: int) -> None:
    from distributed import Client

    with Client(address, timeout=30) as client:
        client.wait_for_workers(count, timeout=60)
