"""CutMix boxes, mixed labels and the consistency regularizer, against the sums of specification §5."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from msunet_core import StudyError
from msunet_core.data.cutmix import cutmix, cutmix_loss, exchange_thirds, restore_thirds, thirds


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(8, 3, 32, 32, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 5, (8,), generator=generator)
    partner = torch.randperm(8, generator=generator)
    return images, labels, partner, torch.tensor([4, 20, 10, 32]), torch.tensor(1 - 16 * 22 / 1024).double()


def linear_network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 5)).double()


def test_the_box_is_the_partners_and_the_rest_the_images_own(batch):
    images, _, partner, box, _ = batch
    mix = cutmix(images, images[partner], box)
    assert torch.equal(mix[:, :, 4:20, 10:32], images[partner][:, :, 4:20, 10:32])
    outside = torch.ones(32, 32, dtype=torch.bool)
    outside[4:20, 10:32] = False
    assert torch.equal(mix[..., outside], images[..., outside])


def test_an_empty_box_changes_nothing(batch):
    images, _, partner, _, _ = batch
    assert torch.equal(cutmix(images, images[partner], torch.tensor([5, 5, 7, 20])), images)


@pytest.mark.parametrize("size", [1, 2, 3, 8, 64])
def test_thirds_come_back_in_their_places(size):
    mix, a, b = (torch.arange(size) + 1000 * k for k in range(3))
    first, second, third = exchange_thirds(mix, a, b)
    for got, sent in zip(restore_thirds(first, second, third), (mix, a, b), strict=True):
        assert torch.equal(got, sent)


def test_each_pass_mixes_the_three_batches_as_published():
    mix, a, b = (torch.full((9,), v) for v in (0, 1, 2))
    passes = [p.view(3, 3)[:, 0].tolist() for p in exchange_thirds(mix, a, b)]
    assert passes == [[0, 1, 2], [1, 0, 1], [2, 2, 0]]


def test_a_batch_of_64_is_cut_in_21_21_and_22():
    assert [len(third) for third in thirds(torch.arange(64))] == [21, 21, 22]


def test_smoothed_labels_give_each_class_its_share(batch):
    images, labels, partner, box, lam = batch
    f = linear_network()
    loss = cutmix_loss(f, images, labels, partner, box, lam, "off", 0.1)
    scores = f(cutmix(images, images[partner], box))
    count = scores.shape[1]
    target = (
        0.9 * (lam * F.one_hot(labels, count) + (1 - lam) * F.one_hot(labels[partner], count)) + 0.1 / count
    )
    expected = -(target * scores.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)  # FP64: only the order of sums differs


def test_the_loss_is_the_sum_of_its_three_terms_and_its_gradient_goes_through_all(batch):
    images, labels, partner, box, lam = batch
    f = linear_network()  # no batch norm: the arrangement of the passes cannot matter here
    loss = cutmix_loss(f, images, labels, partner, box, lam, "as-described")
    mix = cutmix(images, images[partner], box)
    expected = (
        lam * F.cross_entropy(f(mix), labels)
        + (1 - lam) * F.cross_entropy(f(mix), labels[partner])
        + ((f(mix) - lam * f(images) - (1 - lam) * f(images[partner])) ** 2).mean()
    )
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)  # FP64: only the order of sums differs
    weights = list(f.parameters())
    for found, by_hand in zip(*(torch.autograd.grad(x, weights) for x in (loss, expected)), strict=True):
        torch.testing.assert_close(found, by_hand, rtol=1e-10, atol=1e-12)


def test_as_released_takes_the_pasted_image_for_a(batch):
    images, labels, partner, box, lam = batch
    f = linear_network()
    loss = cutmix_loss(f, images, labels, partner, box, lam, "as-released")
    off = cutmix_loss(f, images, labels, partner, box, lam, "off")
    mix, b = f(cutmix(images, images[partner], box)), f(images[partner])
    torch.testing.assert_close(loss - off, ((1 - lam) ** 2 * (mix - b) ** 2).mean(), rtol=1e-10, atol=0)


def test_batch_norm_sees_the_exchanged_thirds_and_not_one_batch(batch):
    images, labels, partner, box, lam = batch
    torch.manual_seed(1)
    f = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(3600, 5)
    ).double()
    seen = []
    f[0].register_forward_hook(lambda m, args, out: seen.append(args[0]))
    cutmix_loss(f, images, labels, partner, box, lam, "as-described")
    expected = exchange_thirds(cutmix(images, images[partner], box), images, images[partner])
    assert len(seen) == 3
    assert all(torch.equal(x, y) for x, y in zip(seen, expected, strict=True))


def test_an_unknown_mode_is_refused(batch):
    images, labels, partner, box, lam = batch
    with pytest.raises(StudyError, match="'as-published' is unknown"):
        cutmix_loss(linear_network(), images, labels, partner, box, lam, "as-published")
