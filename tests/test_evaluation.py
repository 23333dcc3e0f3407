"""Accuracy is counted as a person would count it, and a network that cannot tell is right by chance."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from msunet_core import StudyError, evaluate
from msunet_core.measure.evaluation import accuracy, class_scores


def counted(scores, labels, k):
    """Top-k in percent, image by image: how many classes come first, equal ones in class order."""
    right = 0
    for row, label in zip(scores.tolist(), labels.tolist(), strict=True):
        ahead = sum(value > row[label] or (value == row[label] and i < label) for i, value in enumerate(row))
        right += ahead < k
    return 100 * right / len(labels)


@pytest.mark.parametrize("rounded", [False, True], ids=["distinct", "with-ties"])
def test_top1_and_top5_agree_with_a_slow_count(rounded):
    scores = torch.randn(300, 20)
    scores = scores.mul(2).round() if rounded else scores
    labels = torch.randint(0, 20, (300,))
    found = accuracy(scores, labels)
    assert found["top1"] == pytest.approx(counted(scores, labels, 1))
    assert found["top5"] == pytest.approx(counted(scores, labels, 5))
    if not rounded:
        assert found["top1"] == pytest.approx(100 * (scores.argmax(1) == labels).double().mean().item())
    of_each = [
        math.log(sum(map(math.exp, row))) - row[label]
        for row, label in zip(scores.tolist(), labels.tolist(), strict=True)
    ]
    assert found["loss"] == pytest.approx(math.fsum(of_each) / len(labels), rel=1e-6)


def test_constant_scores_are_right_by_chance_only():
    found = accuracy(torch.zeros(40, 10), torch.arange(40) % 10)
    assert (found["top1"], found["top5"]) == (10.0, 50.0)
    assert found["loss"] == pytest.approx(torch.tensor(10.0).log().item())


def test_with_fewer_than_five_classes_every_distinct_score_is_in_the_top_5():
    assert accuracy(torch.randn(30, 4), torch.arange(30) % 4)["top5"] == 100.0


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_scores_that_are_not_finite_are_refused(value):
    scores = torch.zeros(4, 10)
    scores[2, 3] = value
    with pytest.raises(StudyError, match="scores are not finite"):
        accuracy(scores, torch.zeros(4, dtype=torch.int64))


@pytest.mark.parametrize("level", ["O0", "O1", "O2", "O3"])
def test_each_published_level_runs_on_a_cpu_and_leaves_the_model_as_it_was(new_network, images, level):
    network = new_network(width=0.125).train()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    found = evaluate(network, images.test_images, images.test_labels, level)
    assert set(found) == {"top1", "top5", "loss"}
    assert network.training
    assert not hasattr(network, "opt_level")
    after = network.state_dict()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []


def test_the_levels_agree_but_for_half_precision(new_network, images):
    network = new_network(width=0.125)
    plain = class_scores(network, images.test_images, "O0")
    for level in ("O1", "O2", "O3"):
        scores = class_scores(network, images.test_images, level)
        # 2^-11 relative per stored activation, some 30 layers deep, on scores of order 1.
        torch.testing.assert_close(scores, plain, rtol=0.05, atol=0.05)
        assert not torch.equal(scores, plain), level


def test_the_mode_is_set_back_when_the_evaluation_fails():
    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))

        def forward(self, x):
            assert not self.training
            raise RuntimeError("broken")

    network = Broken().train()
    with pytest.raises(RuntimeError, match="broken"):
        evaluate(network, torch.zeros(2, 32, 32, 3, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64))
    assert network.training


def test_the_batch_size_changes_nothing_but_rounding(new_network, images):
    network = new_network()
    whole = class_scores(network, images.test_images)
    parts = class_scores(network, images.test_images, batch_size=5)
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-5)  # FP32 sums in another order


@pytest.mark.parametrize(
    ("count", "labels", "message"),
    [
        (0, [], "0 images and labels"),
        (3, [0, 1], r"3 images and labels torch.int64 \(2,\)"),
        (2, [[0], [1]], r"2 images and labels torch.int64 \(2, 1\)"),
        (2, [0.0, 1.5], r"2 images and labels torch.float32 \(2,\)"),
        (2, [0, 4], "labels 0 .. 4 do not fit 4 classes"),
        (2, [-1, 0], "labels -1 .. 0 do not fit 4 classes"),
    ],
)
def test_labels_that_do_not_fit_are_refused(new_network, count, labels, message):
    with pytest.raises(StudyError, match=message):
        evaluate(new_network(), torch.zeros(count, 32, 32, 3, dtype=torch.uint8), torch.tensor(labels))


@pytest.mark.parametrize(
    "images",
    [
        torch.zeros(2, 32, 32, 3),  # scaled to 0..1 already, which would count as black
        torch.zeros(2, 32, 32, 3, dtype=torch.int8),
        torch.zeros(2, 3, 32, 32, dtype=torch.uint8),
        torch.zeros(2, 16, 32, 3, dtype=torch.uint8),
    ],
)
def test_images_that_are_not_as_they_are_stored_are_refused(new_network, images):
    with pytest.raises(StudyError, match=r"not uint8 \(N, 32, 32, 3\)"):
        evaluate(new_network(), images, torch.tensor([0, 1]))


def test_labels_of_any_integer_type_count(new_network, images):
    network, labels = new_network(), images.test_labels
    expected = evaluate(network, images.test_images, labels)
    for other in (labels.int(), labels.to(torch.uint8), labels.numpy(), labels.tolist()):
        assert evaluate(network, images.test_images, other) == expected
