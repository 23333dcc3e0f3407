"""The embedded images: the same bytes everywhere, every class drawable, neither trivial nor hopeless."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from msunet_core import load_data
from msunet_core.data.synthetic import CLASS_NAMES, CLASSES, make_synthetic
from msunet_core.errors import StudyError


@pytest.fixture(scope="module")
def arrays() -> dict[str, np.ndarray]:
    return make_synthetic(0, train_per_class=20, test_per_class=5)


def test_there_are_100_classes_with_names_that_describe_them():
    assert len(set(CLASS_NAMES)) == 100
    assert "red-striped-star" in CLASS_NAMES and "violet-plain-disc" in CLASS_NAMES


def test_arrays_have_the_types_and_shapes_of_the_npz(arrays):
    assert arrays["train_images"].shape == (2000, 32, 32, 3) and arrays["train_images"].dtype == np.uint8
    assert arrays["test_images"].shape == (500, 32, 32, 3)
    assert np.bincount(arrays["train_labels"]).tolist() == [20] * 100
    assert arrays["test_labels"].dtype == np.int64


def test_the_pictures_are_the_same_bytes_on_every_machine():
    arrays = make_synthetic(0, train_per_class=1, test_per_class=1)
    digest = hashlib.sha256(arrays["train_images"]).hexdigest()[:16]
    # A change of the drawing changes every result on synthetic data, the stored notebooks' too.
    assert digest == "7145ef9a6899bdcd"


def test_the_first_pictures_do_not_depend_on_how_many_are_drawn(arrays):
    few = make_synthetic(0, train_per_class=3, test_per_class=2)
    first = arrays["train_images"].reshape(100, 20, 32, 32, 3)[:, :3]
    assert np.array_equal(few["train_images"].reshape(first.shape), first)


def test_limit_takes_the_first_pictures():
    few = make_synthetic(0, train_per_class=3, test_per_class=3)
    assert np.array_equal(load_data("synthetic", limit=3).train_images.numpy(), few["train_images"])


def test_another_seed_and_the_test_split_are_other_pictures(arrays):
    other = make_synthetic(1, train_per_class=5, test_per_class=5)
    test = arrays["test_images"]
    train = arrays["train_images"].reshape(100, 20, 32, 32, 3)[:, :5].reshape(test.shape)
    assert not (other["test_images"] == test).all((1, 2, 3)).any()
    assert not (train == test).all((1, 2, 3)).any()


def test_no_two_pictures_are_equal_and_none_is_flat(arrays):
    images = arrays["train_images"].reshape(2000, -1)
    assert len(np.unique(images, axis=0)) == 2000
    assert images.std(axis=1).min() > 8  # of 255; grain alone gives about 10 in mid-gray, less where clipped


def test_the_average_picture_of_a_class_looks_like_any_other_of_its_hue(arrays):
    """Position, size and turn vary enough that the mean pixel shows the hue, hardly the shape."""
    mean = arrays["train_images"].reshape(100, 20, 32, 32, 3).mean(1)
    hues = [hue for hue, _, _ in CLASSES]
    nearest = np.array([_nearest(image, mean) for image in arrays["test_images"]])
    top1 = (nearest == arrays["test_labels"]).mean()
    hue = np.mean([hues[a] == hues[b] for a, b in zip(nearest, arrays["test_labels"], strict=True)])
    assert 0.01 < top1 < 0.25, f"nearest class mean: top-1 {top1:.3f}, hue {hue:.3f}"


def _nearest(image: np.ndarray, means: np.ndarray) -> int:
    return int(((means - image) ** 2).sum((1, 2, 3)).argmin())


@pytest.mark.parametrize(
    "options, words", [({"seed": -1}, "-1"), ({"train_per_class": 0}, "0 train and 20 test")]
)
def test_impossible_requests_are_refused(options, words):
    with pytest.raises(StudyError, match=words):
        make_synthetic(**options)
