"""What a notebook stands on: its folder, its metrics, its bands, its progress line."""

from __future__ import annotations

import json

import matplotlib.pyplot as plt
import pytest
import torch

from msunet_core import StudyError, figures
from msunet_core.config import load_profile
from msunet_core.study import Study, _LiveLine, new_network


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


def test_bands_hold_for_the_profiles_own_data_only():
    assert load_profile("smoke").expect
    assert load_profile("smoke", data="some.npz").expect == {}
    assert load_profile("smoke", limit=3).expect == {}


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
    (study.folder / "metrics.json").write_text("{")
    with pytest.raises(StudyError, match="is not JSON; remove it"):
        study.record("01", images=3)


@pytest.mark.parametrize("run", ["", "../elsewhere", "a b", ".hidden"])
def test_a_run_is_one_folder_below_runs(run):
    with pytest.raises(StudyError, match="is not a folder name"):
        Study("smoke", run=run)


def test_a_missing_stage_names_the_notebook_that_makes_it(study):
    with pytest.raises(StudyError, match="run notebook 02_ternary_training with this RUN first"):
        study.checkpoint("train")


def test_the_same_seed_builds_the_same_network_whatever_was_drawn_before():
    profile = load_profile("smoke")
    first = new_network(profile).state_dict()
    torch.rand(7)
    second = new_network(profile).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_limit_takes_no_more_images_than_the_profile_has(study):
    assert study.limited_data(None) is study.limited_data(5) is study.data
    assert len(study.limited_data(1).train_images) == study.data.num_classes


def test_the_progress_line_is_one_display_updated_in_place():
    shown = []

    class Handle:
        def update(self, line, raw):
            shown.append(line["text/plain"])

    def display(line, raw, display_id):
        shown.append(line["text/plain"])
        return Handle()

    line = _LiveLine(display)
    for step in (1, 2, 3):
        line(step, 3, "train")
    # The first and the last step always show; those between at most twice a second.
    assert shown[0].startswith("train, step 1 of 3") and shown[-1] == "train, step 3 of 3, 0:00 left"


def test_a_picture_is_the_image_whether_normalised_or_not(study):
    from msunet_core.data import normalise

    images = study.data.train_images[:2]
    plain, back = figures.as_picture(images[0]), figures.as_picture(normalise(images)[0])
    assert abs(plain - back).max() < 1e-6  # float32 of values up to 1
    sheet = figures.show_images(images, ["red-plain-disc", "b"], columns=2)
    study.save_figure(sheet, "sheet")
    plt.close(sheet)
    assert (study.folder / "figures" / "sheet.png").stat().st_size > 1000
