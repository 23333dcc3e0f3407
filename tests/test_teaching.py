"""The small experiments of notebooks 01 to 03, and the published figures that a trainer is held against."""

from __future__ import annotations

import dataclasses
import re

import matplotlib.pyplot as plt
import pandas as pd
import pytest
import torch
from torch import nn

from msunet_core import StudyError
from msunet_core.data.augment import draw_boxes, draw_epoch_plan
from msunet_core.files import ROOT
from msunet_core.model.checkpoint import load_checkpoint
from msunet_core.model.pruning import targets_of
from msunet_core.study import published, teaching
from msunet_core.study.run import Study
from msunet_core.training.learner import Learner
from msunet_core.training.recipe import StageConfig
from msunet_core.training.schedules import learning_rate
from msunet_core.training.stages import CHECKPOINT


@pytest.fixture
def study(tmp_path, monkeypatch):
    monkeypatch.setenv("MSUNET_RUNS", str(tmp_path))
    return Study("smoke", limit=2, overrides="train.epochs=1 prune.epochs=1")


# -- what a run says of itself -----------------------------------------------------------------


def test_a_run_that_falls_short_of_the_published_set_up_says_in_what(study):
    assert (
        "synthetic images" in study.about()
        and "0.125 times" in study.about()
        and "at most 2" in study.about()
    )
    assert study.about().count("\n") == 0
    assert study.about("the shipped network") == ""


def test_the_real_thing_says_nothing_and_each_shortfall_alone_is_enough(tmp_path, monkeypatch):
    monkeypatch.setenv("MSUNET_RUNS", str(tmp_path))
    assert Study("paper").about() == ""
    assert "at most 5 of each class" in Study("paper", limit=5).about()
    assert "0.5 times" in Study("paper", overrides="network.width=0.5").about()


def test_pruning_finds_the_trained_network_or_makes_it_and_says_so(study, capsys):
    first = study.start_of_pruning()
    assert "training it now" in capsys.readouterr().out
    written = (study.folder / "train" / CHECKPOINT).read_bytes()
    again = study.start_of_pruning()
    assert capsys.readouterr().out == ""
    assert (study.folder / "train" / CHECKPOINT).read_bytes() == written
    saved = load_checkpoint(study.folder / "train" / CHECKPOINT)[0].state_dict()
    for network in (first, again):
        assert all(torch.equal(tensor, saved[name]) for name, tensor in network.state_dict().items())


# -- published figures -------------------------------------------------------------------------


def test_the_published_figures_are_those_of_the_specification():
    section = (ROOT / "docs" / "specification.md").read_text().split("## 2.")[0].replace("\n", " ")
    record = published.published_record()
    losses = re.search(r"train_loss (4\.632[\d., ]+) and top-1", section)[1]
    top1 = re.search(r"and top-1 ([\d., ]+) for epochs 0 to 10", section)[1]
    first = record[record["epoch"] <= 10]
    assert first["train_loss"].tolist() == [float(value) for value in losses.split(",")]
    assert first["top1"].tolist() == [float(value) for value in top1.split(",")]
    for epoch, value in record[record["epoch"] > 10][["epoch", "top1"]].itertuples(index=False):
        if epoch <= 500:
            assert re.search(rf"\b{value:g} at {epoch:g}\b", section), (epoch, value)
        else:
            assert f"{value:g} %" in section, (epoch, value)
    assert record["epoch"].is_monotonic_increasing and record["epoch"].is_unique


def test_a_history_is_compared_where_both_have_an_epoch():
    history = pd.DataFrame(
        {"epoch": [0, 1, 15], "train_loss": [4.7, 4.1, 2.4], "test_top1": [2.19, float("nan"), 60.0]}
    )
    table = published.against_published(history)
    assert table.index.tolist() == [0, 1]
    assert table.loc[0, "difference of train_loss"] == pytest.approx(0.068)
    assert table.loc[1, "difference of train_loss"] == pytest.approx(-0.087)
    assert table.loc[0, "difference of top1"] == 0 and pd.isna(table.loc[1, "difference of top1"])


def test_a_record_that_is_not_there_is_none(tmp_path):
    assert published.own_record(tmp_path / "history.csv") is None
    pd.DataFrame({"epoch": [0]}).to_csv(tmp_path / "history.csv", index=False)
    assert published.own_record(tmp_path / "history.csv")["epoch"].tolist() == [0]


# -- notebook 01 -------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [2, 10, 100, 1000])
def test_one_image_of_each_class_however_many_there_are(classes):
    labels = torch.arange(classes).repeat(3)
    labels = labels[labels != 1]  # a class without any image
    chosen = teaching.one_of_each(labels, 40)
    assert len(chosen) == min(40, classes - 1)
    assert len(labels[chosen].unique()) == len(chosen)
    assert labels[chosen][0] == 0 and labels[chosen][-1] == labels.max()


@pytest.mark.parametrize("size", [4, 8, 31, 32])
def test_the_mean_lambda_is_that_of_the_boxes_which_are_drawn(size):
    lam = draw_boxes(100_000, size, torch.Generator().manual_seed(1))[1]
    # five standard errors of the drawn mean
    assert abs(teaching.mean_lambda(size) - lam.mean().item()) < 5 * lam.std().item() / 100_000**0.5


def test_statistics_of_a_batch_and_itself_are_not_apart_and_a_shift_is_seen():
    model = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()).eval()
    images = torch.randn(8, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    assert teaching.statistics_apart(model, images, images) == {"0": 0.0}
    shifted = images + 2 * images.std((0, 2, 3), keepdim=True)
    assert teaching.statistics_apart(model, shifted, images)["0"] == pytest.approx(2, rel=1e-4)
    assert not model[0]._forward_pre_hooks


# -- notebook 02 -------------------------------------------------------------------------------


def test_the_scale_keeps_the_variance_of_the_output_at_two():
    table = teaching.output_variances([0, 0.67749, 2], fan_in=32, images=5000)
    assert table["with the scale"].between(1.9, 2.1).all()
    # without it the variance is the number of weights that are left
    assert table["without"].tolist() == pytest.approx((32 * (1 - table["zeros"])).tolist(), rel=0.05)


@pytest.mark.parametrize("schedule", ["one-cycle", "cosine", "step"])
def test_the_first_epochs_of_a_recipe_have_the_rates_of_the_whole(schedule):
    whole = StageConfig(epochs=12, schedule=schedule, warmup_epochs=2, milestones=(3, 9), final_lr=1e-3)
    first = teaching.first_epochs(whole, 5)
    assert first.epochs == 5
    for epoch in range(5):
        for part in (0.0, 0.5):
            assert learning_rate(first, epoch, part) == pytest.approx(learning_rate(whole, epoch, part))
    assert teaching.first_epochs(first, 5) is first


def layers_of(**spreads) -> pd.DataFrame:
    return pd.DataFrame(
        [
            {"epochs": epoch, "layer": name, "spread": spread, "zeros": 0.1 * epoch, "empty_channels": 0.25}
            for epoch in range(3)
            for name, values in spreads.items()
            for spread in values[epoch : epoch + 1]
        ]
    )


def test_a_layer_that_ran_away_is_told_by_name_even_if_it_came_back():
    layers = layers_of(calm=(0.5, 0.55, 0.45), ran=(0.1, 30.0, 0.1), shrank=(1.0, 0.5, 0.2))
    table = teaching.stability(layers)
    assert table.index.tolist() == ["calm", "ran", "shrank"]
    assert table["furthest"].tolist() == pytest.approx([0.9, 300, 0.2])
    assert table["spread of W"].tolist() == pytest.approx([0.9, 1.0, 0.2])
    told = teaching.told_stability(table)
    assert told.startswith("1 of 3 layers ran away") and "ran (× 300" in told and "20% zeros" in told
    assert "calm" not in told and "shrank" not in told and "stayed within 0.20 .. 0.90" in told


def test_a_calm_run_says_so():
    told = teaching.told_stability(teaching.stability(layers_of(a=(1.0, 1.1, 1.05), b=(2.0, 1.9, 1.8))))
    assert told.startswith("No layer ran away") and "0.90 .. 1.10" in told and "25%" in told


def test_the_picture_names_who_ran_away_and_nobody_else():
    figure = teaching.plot_stability(layers_of(calm=(0.5, 0.5, 0.5), ran=(0.1, 30.0, 0.1)))
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == ["ran"]
    assert all(ax.get_xlabel() and ax.get_ylabel() and ax.get_title() for ax in figure.axes)
    plt.close(figure)


# -- notebook 03 -------------------------------------------------------------------------------


def test_accuracy_is_that_of_the_network_with_one_group_pruned(study):
    model = study.network()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    images, labels = study.data.test_images[:20], study.data.test_labels[:20]
    table = teaching.accuracy_when_pruned(model, images, labels, [0.0, 0.9], ["se", "dw"])
    assert table[["group", "zeros"]].values.tolist() == [["se", 0.0], ["se", 0.9], ["dw", 0.0], ["dw", 0.9]]
    assert table["top1"].between(0, 100).all() and table["top1"][0] == table["top1"][2]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_group_is_pruned_alone(study):
    model = study.network()
    teaching._prune_group(model, "dw", 0.5)
    zeros = {name: (w == 0).float().mean().item() for name, w in model.named_parameters() if w.ndim == 4}
    dw = {name: share for name, share in zeros.items() if re.match(r"blocks\.[23].*conv_dw", name)}
    assert len(dw) == 10 and all(0.45 < share <= 0.5 for share in dw.values())
    assert not any(share for name, share in zeros.items() if name not in dw)
    with pytest.raises(StudyError, match="'dv' is unknown"):
        teaching._prune_group(model, "dv", 0.5)


def test_a_ramp_ends_at_its_target_whatever_its_power():
    for power in (1, 3, 5):
        assert teaching.power_ramp(0, 0.9, 100, power) == 0
        assert teaching.power_ramp(100, 0.9, 100, power) == teaching.power_ramp(130, 0.9, 100, power) == 0.9
    assert teaching.power_ramp(50, 0.8, 100, 1) == pytest.approx(0.4)
    assert teaching.power_ramp(50, 0.8, 100, 3) == pytest.approx(0.7)


def test_small_steps_are_lost_in_half_precision_and_kept_by_a_master():
    steps = teaching.small_steps(1.0, 1e-4, 20)
    assert len(steps) == 21 and (steps["FP16 alone"] == 1).all()
    assert steps["FP32 master"].iloc[-1] == pytest.approx(1.002, abs=1e-6)
    assert steps["FP16 copy of it"].iloc[[4, 5]].tolist() == [1.0, 1 + 2**-10]


def test_a_planted_loss_scale_overflows_until_it_has_fallen_and_no_weight_moves_meanwhile(study):
    config = dataclasses.replace(study.profile.prune, batch_size=16)
    learner = Learner(study.network(), config)
    plan = draw_epoch_plan(200, 16, seed=0, stage="show", epoch=0, cutmix_probability=0)
    steps = teaching.loss_scale_steps(learner, study.data, plan, 2.0**30, 12)
    skipped = steps[steps["overflow"]]
    assert len(skipped) and (skipped["largest change of a weight"] == 0).all()
    assert skipped["loss scale"].tolist() == [2.0 ** (30 - k) for k in range(len(skipped))]
    good = steps[~steps["overflow"]]
    assert len(good) and (good["largest change of a weight"] > 0).all()
    plain = Learner(study.network(), dataclasses.replace(config, opt_level="O0"))
    with pytest.raises(StudyError, match="O0 has no loss scale"):
        teaching.loss_scale_steps(plain, study.data, plan, 2.0**30, 1)


def test_the_epoch_of_the_targets_is_the_first_with_all_of_them_or_none():
    targets = targets_of("V2", se_sparsity=0.8)
    assert targets == {"se": 0.8, "dw": 0.5}
    history = pd.DataFrame({"epoch": [3, 4, 5], "target_se": [0.7, 0.8, 0.8], "target_dw": [0.4, 0.4, 0.5]})
    assert teaching.epoch_of_targets(history, targets) == 5
    assert teaching.epoch_of_targets(history[:2], targets) is None
