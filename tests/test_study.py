"""What a notebook stands on: its folder, its metrics, its bands, its progress line."""

from __future__ import annotations

import itertools
import json

import matplotlib.pyplot as plt
import pandas as pd
import pytest
import torch

from msunet_core import ImageData, StudyError, pack
from msunet_core.data.sources import CIFAR100_CLASSES
from msunet_core.measure import unpack as unpack_module
from msunet_core.model.checkpoint import save_checkpoint
from msunet_core.study import figures
from msunet_core.study.ablation_figures import plot_front
from msunet_core.study.profile import load_profile
from msunet_core.study.run import Study, _LiveLine, new_network
from msunet_core.training.stages import CHECKPOINT


@pytest.fixture
def study(tmp_path, monkeypatch):
    monkeypatch.setenv("MSUNET_RUNS", str(tmp_path))
    return Study("smoke", limit=2)


def banded(study, **bands):
    object.__setattr__(study.profile, "expect", bands)
    return study


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (10.0, "top1: within 10 .. 20, as expected"),
        (19.99, "top1: within 10 .. 20, as expected"),
        (20.01, "top1: 20.01 is OUTSIDE 10 .. 20"),
        (float("nan"), "top1: nan is OUTSIDE 10 .. 20"),
    ],
)
def test_a_number_outside_of_its_band_changes_what_the_page_says(study, value, says):
    assert banded(study, top1=[10.0, 20.0]).expected("top1", value) == says


def test_without_a_band_the_number_itself_is_shown(study):
    assert study.expected("new", 3.14159) == "new: 3.142 (this profile and data have no band for it)"


def test_metrics_of_one_notebook_replace_only_its_own(study):
    study.record("02", top1=1.0, top5=2.0)
    study.record("01", images=3)
    study.record("02", top1=4.0)
    assert json.loads((study.folder / "metrics.json").read_text()) == {
        "01": {"images": 3},
        "02": {"top1": 4.0},
    }


def test_a_broken_metrics_file_is_refused_not_overwritten(study):
    for content, told in {"{": "is not JSON .*; remove it", "[]": "of names and values; remove it"}.items():
        (study.folder / "metrics.json").write_text(content)
        with pytest.raises(StudyError, match=told):
            study.record("01", images=3)
        assert (study.folder / "metrics.json").read_text() == content


@pytest.mark.parametrize("run", ["", "../elsewhere", "a b", ".hidden"])
def test_a_run_is_one_folder_below_runs(run):
    with pytest.raises(StudyError, match="is not a folder name"):
        Study("smoke", run=run)


def test_a_missing_stage_names_the_notebook_that_makes_it(study):
    with pytest.raises(StudyError, match="run notebook 02_ternary_training with this RUN first"):
        study.checkpoint("train")


@pytest.fixture
def shipped(tmp_path, monkeypatch, new_network):
    """A stand-in for the shipped network, of a width that no profile has."""
    path = tmp_path / "msunet_v3.safetensors"
    pack(new_network(num_classes=100, width=0.0625), path)
    monkeypatch.setattr(unpack_module, "SHIPPED", path)
    return path


def study_of(names, *overrides, **given) -> Study:
    """A study whose data have classes of these names, an image each."""
    study = Study("smoke", data="some.npz", overrides=" ".join(overrides), **given)
    labels, images = torch.arange(len(names)), torch.zeros(len(names), 32, 32, 3, dtype=torch.uint8)
    study._data = ImageData(images, labels, images, labels, class_names=tuple(names), source="some.npz")
    return study


def prune_one(study: Study, finished: bool = True, **arguments) -> None:
    """Leave a checkpoint in the study's folder as notebook 03 does."""
    model = new_network(study.profile, **arguments)
    (study.folder / "prune").mkdir()
    state = {f"model/{name}": tensor for name, tensor in model.state_dict().items()}
    save_checkpoint(study.folder / "prune" / CHECKPOINT, state, {"network": model.config})
    if finished:
        (study.folder / "prune" / "metrics.json").write_text("{}")


CIFAR100 = list(CIFAR100_CLASSES)


def test_the_real_cifar100_alone_is_looked_at_with_the_shipped_network(study, shipped):
    name, model = study_of(CIFAR100).trained()
    assert (name, model.config["width"]) == ("the shipped network", 0.0625)
    for other in (study, study_of(CIFAR100[:50]), study_of(CIFAR100[::-1]), study_of(CIFAR100, variant="v1")):
        with pytest.raises(StudyError, match="run notebook 03_fp16_pruning with this RUN first"):
            other.trained()


def test_a_run_looks_at_its_own_network_where_that_is_a_whole_one(study, shipped):
    narrow = study_of(CIFAR100)
    prune_one(narrow)
    assert narrow.trained()[0] == "the shipped network"
    assert study_of(CIFAR100, "network.width=1.0", limit=5).trained()[0] == "the shipped network"
    whole = study_of(CIFAR100, "network.width=1.0", "data.limit=null").trained()
    assert (whole[0], whole[1].config["width"]) == ("the network of this run", 0.125)
    assert study.trained()[0] == "the network of this run"
    shipped.unlink()
    assert narrow.trained()[0] == "the network of this run"


def test_a_stage_that_was_stopped_is_not_taken_as_trained(study):
    prune_one(study, finished=False)
    with pytest.raises(StudyError, match="prune came to no end yet; run notebook 03_fp16_pruning"):
        study.trained()


def test_the_same_seed_builds_the_same_network_whatever_was_drawn_before():
    profile = load_profile("smoke")
    first = new_network(profile).state_dict()
    torch.rand(7)
    second = new_network(profile).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


def live_lines(seconds: float, steps: int) -> list[str]:
    """What a line of progress showed of so many steps that took so long each."""
    shown = []

    class Handle:
        def update(self, line, raw):
            shown.append(line["text/plain"])

    def display(line, raw, display_id):
        shown.append(line["text/plain"])
        return Handle()

    line = _LiveLine(display)
    line.clock = itertools.count(100.0, seconds).__next__
    for step in range(1, steps + 1):
        line(step, steps, "train")
    return shown


def test_the_progress_line_knows_the_time_left_from_the_second_step_on():
    """1,000 steps of 3 s; how long the first one took nobody saw."""
    shown = live_lines(3.0, 1000)
    assert shown[0] == "train, step 1 of 1000, ? left"
    assert shown[1] == "train, step 2 of 1000, 49:54 left"
    assert shown[-1] == "train, step 1000 of 1000, 00:00 left"
    assert live_lines(60.0, 1000)[1].endswith(", 16:38:00 left")


def test_the_progress_line_is_updated_twice_a_second_at_most_and_at_the_end():
    steps = [int(line.split()[2]) for line in live_lines(0.125, 11)]
    assert steps == [1, 5, 9, 11]


def test_a_picture_is_the_image_whether_normalised_or_not(study):
    from msunet_core.data.images import normalise

    images = study.data.train_images[:2]
    plain, back = figures.as_picture(images[0]), figures.as_picture(normalise(images)[0])
    assert abs(plain - back).max() < 1e-6  # float32 of values up to 1
    sheet = figures.show_images(images, ["red-plain-disc", "b"], columns=2)
    study.save_figure(sheet, "sheet")
    plt.close(sheet)
    assert (study.folder / "figures" / "sheet.png").stat().st_size > 1000


@pytest.mark.parametrize("name", ["$x^$", "$", "a$b$c", r"\frac{", "_x", "100%", "x" * 200, "<b>", "a\u0301"])
def test_a_class_may_have_any_name_in_a_figure(name, tmp_path):
    pictures = torch.zeros(2, 32, 32, 3, dtype=torch.uint8)
    sheet = figures.show_images(pictures, [name, name], title=name)
    bars = figures.plot_by_layer({name: 0.5}, name)
    table = pd.DataFrame({"choice": [name], "value": [name], "mean": [1.0], "sd": [0.1], "score": [0.5]})
    for figure in (sheet, bars, plot_front(table)):
        figure.savefig(tmp_path / "a.png")
        plt.close(figure)


def test_a_logarithmic_axis_shows_numbers_and_no_formula_in_letters():
    table = pd.DataFrame({"choice": ["a"] * 3, "value": ["x", "y", "z"], "mean": [1.0, 2.0, 3.0]})
    figure = plot_front(table.assign(sd=0.1, score=[0.001, 0.03, 0.9]))
    figure.draw_without_rendering()
    shown = [label.get_text() for label in figure.axes[0].get_xticklabels()]
    assert {"0.001", "0.01", "0.1"} <= set(shown) and not [text for text in shown if "math" in text]
    plt.close(figure)


@pytest.mark.parametrize("count", [1, 2, 11])
def test_a_sheet_takes_any_number_of_pictures(count):
    sheet = figures.show_images(torch.zeros(count, 32, 32, 3, dtype=torch.uint8), ["a"])
    assert sum(bool(ax.images) for ax in sheet.axes) == count
    plt.close(sheet)
