"""Augmentation: equal to torchvision image by image, distributed as announced, planned once an epoch."""

from __future__ import annotations

import math

import pytest
import torch
import torchvision.transforms.functional as reference

from msunet_core.data.augment import (
    JITTER_ORDERS,
    augment,
    blend_shares,
    crop_and_flip,
    draw_boxes,
    draw_epoch_plan,
    epoch_generator,
    jitter,
)
from msunet_core.data.images import MEAN, STD, normalise
from msunet_core.data.synthetic import make_synthetic
from msunet_core.errors import StudyError

ADJUST = (reference.adjust_brightness, reference.adjust_contrast, reference.adjust_saturation)


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    """200 images, (200, 32, 32, 3) uint8."""
    return torch.from_numpy(make_synthetic(0, train_per_class=2, test_per_class=1)["train_images"])


@pytest.fixture(scope="module")
def plan():
    return draw_epoch_plan(200, 64, seed=3, stage="train", epoch=5)


@pytest.fixture(scope="module")
def many():
    """The choices of 60,000 images in 6,000 steps."""
    return draw_epoch_plan(60_000, 10, seed=0, stage="train", epoch=0)


def one_by_one(image: torch.Tensor, step, i: int) -> torch.Tensor:
    """torchvision's functional operations with the parameters of image i, (3, 32, 32) before Normalize."""
    out = reference.pad(image.permute(2, 0, 1), [4])
    out = reference.crop(out, int(step.dy[i]), int(step.dx[i]), 32, 32)
    out = reference.hflip(out) if step.flip[i] else out
    out = reference.convert_image_dtype(out, torch.float32)
    for operation in JITTER_ORDERS[int(step.jitter_order[i])]:
        out = ADJUST[operation](out, float(step.factors[i, operation]))
    return out


def test_every_image_is_what_torchvision_makes_of_it_with_the_same_parameters(images, plan):
    for number in range(len(plan)):
        step = plan.step(number)
        batch = images[step.order]
        ours = augment(batch, step)
        for i in range(len(batch)):
            expected = reference.normalize(one_by_one(batch[i], step, i), MEAN, STD)
            y0, y1, x0, x1 = step.erase[i].tolist()
            expected = reference.erase(expected, y0, x0, y1 - y0, x1 - x0, 0.0)
            # 2e-6 at values up to 2.7: a few roundings of float32 (2.4e-7 each there), no more.
            torch.testing.assert_close(ours[i], expected, rtol=0, atol=2e-6)


def sides(many) -> torch.Tensor:
    """Height and width of each rectangle that is erased, float64 (2, count)."""
    y0, y1, x0, x1 = many.erase.view(-1, 4).double().unbind(1)
    return torch.stack((y1 - y0, x1 - x0))[:, y1 > y0]


def test_forty_percent_of_the_images_are_erased_by_seventeen_percent_of_their_area(many):
    erased = sides(many)
    assert erased.shape[1] / 60_000 == pytest.approx(0.4, abs=0.008)  # four standard errors
    # The mean of a uniform share in [0.02, 1/3] is 17.7 %; the few that are drawn anew for a side that is too
    # long were large ones.
    assert (erased.prod(0) / 1024).mean().item() == pytest.approx(0.175, abs=0.003)
    assert erased.min() >= 1 and erased.max() <= 31


def test_erased_rectangles_have_log_uniform_ratios_and_lie_anywhere(many):
    ratio = (sides(many)[0] / sides(many)[1]).log()
    bound = math.log(1 / 0.3)
    assert ratio.mean().item() == pytest.approx(0, abs=0.02)  # four standard errors of 24,000
    assert ratio.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)  # rounded sides, redrawn ones
    y0, y1, x0, x1 = many.erase.view(-1, 4)[many.erase.view(-1, 4)[:, 1] > 0].double().unbind(1)
    for low, high in ((y0, y1), (x0, x1)):
        assert low.min() == 0 and high.max() == 32
        place = low / (32 - (high - low))  # 0 at one end, 1 at the other
        assert place.mean().item() == pytest.approx(0.5, abs=0.01)


def test_a_profile_or_clean_training_erases_nothing():
    for changes in ({"erase_probability": 0.0}, {"augment": False}):
        assert not draw_epoch_plan(200, 64, seed=3, stage="train", epoch=5, **changes).erase.any()
    always = draw_epoch_plan(200, 64, seed=3, stage="train", epoch=5, erase_probability=1.0)
    assert (always.erase[..., 1] > 0).float().mean() > 0.99  # but for those that fit in none of ten tries


def test_before_the_normalisation_the_images_agree_to_1e_6(images, plan):
    step = plan.step(0)
    batch = images[step.order]
    planes = crop_and_flip(batch, step.dy, step.dx, step.flip).float() / 255
    ours = jitter(planes, step.blend)
    for i in range(len(batch)):
        # The mean gray is summed in another order: some 1e-7.
        torch.testing.assert_close(ours[i], one_by_one(batch[i], step, i), rtol=0, atol=1e-6)


@pytest.mark.parametrize("order", range(6))
@pytest.mark.parametrize("factor", [0.6, 1.0, 1.4])
def test_each_order_of_the_jitter_is_torchvisions(images, order, factor):
    factors = torch.tensor([[factor, 2 - factor, factor]]).repeat(4, 1)
    inputs = images[:4].permute(0, 3, 1, 2).float() / 255
    ours = jitter(inputs.clone(), blend_shares(factors, torch.full((4,), order)))
    for i in range(4):
        expected = inputs[i]
        for operation in JITTER_ORDERS[order]:
            expected = ADJUST[operation](expected, float(factors[i, operation]))
        torch.testing.assert_close(ours[i], expected, rtol=0, atol=1e-6)


def test_the_padding_is_black_before_the_normalisation():
    white = torch.full((1, 32, 32, 3), 255, dtype=torch.uint8)
    corner = crop_and_flip(white, torch.tensor([0]), torch.tensor([8]), torch.tensor([False]))[0, 0]
    assert corner[:4].max() == 0 and corner[:, 28:].max() == 0 and corner[4:, :28].min() == 255


def test_clean_training_only_normalises(images):
    step = draw_epoch_plan(200, 64, seed=0, stage="train", epoch=0, augment=False).step(1)
    batch = images[step.order]
    # The division by 255 comes before the offset or with it: one rounding.
    torch.testing.assert_close(augment(batch, step), normalise(batch), rtol=0, atol=1e-6)
    assert step.factors.eq(1).all() and step.dy.eq(4).all() and step.dx.eq(4).all() and not step.flip.any()


def test_identity_choices_change_nothing_even_when_they_are_computed(images):
    clean = draw_epoch_plan(200, 64, seed=0, stage="train", epoch=0, augment=False).step(0)
    computed = type(clean)(**{**vars(clean), "augment": True})
    batch = images[clean.order]
    torch.testing.assert_close(augment(batch, computed), augment(batch, clean), rtol=0, atol=1e-6)


def test_the_result_is_channels_last_float32_and_the_images_are_untouched(images, plan):
    step = plan.step(0)
    batch = images[step.order]
    before = batch.clone()
    out = augment(batch, step)
    assert out.shape == (64, 3, 32, 32) and out.dtype == torch.float32
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(batch, before)


def test_the_same_seed_stage_and_epoch_give_the_same_plan_and_any_other_another(plan):
    def drawn(**changes):
        return draw_epoch_plan(200, 64, **{"seed": 3, "stage": "train", "epoch": 5, **changes})

    again = drawn()
    for name, drawn_then in vars(plan).items():
        assert torch.equal(torch.as_tensor(vars(again)[name]), torch.as_tensor(drawn_then)), name
    for change in ({"seed": 4}, {"stage": "prune"}, {"epoch": 6}):
        assert not torch.equal(drawn(**change).order, plan.order), change


def test_the_first_choices_are_these_on_every_machine():
    # A change here breaks the resumption of runs begun before it.
    plan = draw_epoch_plan(100, 10, seed=0, stage="train", epoch=0)
    assert plan.order[0].tolist() == [40, 53, 12, 19, 90, 8, 25, 91, 69, 85]
    assert plan.box[0].tolist() == [19, 32, 7, 31]
    assert plan.dy[0, :4].tolist() == [1, 5, 6, 8] and plan.dx[0, :4].tolist() == [4, 2, 5, 6]
    assert plan.flip[0].nonzero().flatten().tolist() == [0, 4, 9]
    assert plan.jitter_order[0].tolist() == [3, 0, 5, 4, 0, 4, 4, 4, 3, 4]
    assert plan.erase[0, :2].tolist() == [[16, 30, 8, 21], [0, 0, 0, 0]]


def test_clean_training_sees_the_images_in_the_same_order_and_with_the_same_cutmix(plan):
    clean = draw_epoch_plan(200, 64, seed=3, stage="train", epoch=5, augment=False)
    for name in ("order", "partner", "box", "lam", "use_cutmix"):
        assert torch.equal(getattr(clean, name), getattr(plan, name)), name


def test_an_epoch_shows_each_image_at_most_once_and_drops_the_last_incomplete_batch(plan):
    assert plan.order.shape == (3, 64) == (len(plan), 64)
    assert plan.order.unique().numel() == 192


def test_partners_are_a_permutation_of_the_batch(plan):
    assert torch.equal(plan.partner.sort(dim=1).values, torch.arange(64).expand(3, 64))


def test_crop_offsets_are_uniform_over_0_to_8(many):
    for offsets in (many.dy, many.dx):
        share = offsets.flatten().bincount(minlength=9) / offsets.numel()
        # Standard error sqrt(1/9 * 8/9 / 60000) = 0.0013; five of them.
        assert share.shape == (9,) and (share - 1 / 9).abs().max() < 0.0065, share


def test_half_of_the_images_are_mirrored(many):
    assert abs(many.flip.float().mean() - 0.5) < 0.0102  # five standard errors of 0.00204


def test_factors_are_uniform_in_06_to_14_and_independent(many):
    factors = many.factors.view(-1, 3)
    assert factors.min() >= 0.6 and factors.max() <= 1.4
    # Mean 1, standard deviation 0.8 / sqrt(12); five standard errors of the mean and of a correlation.
    assert (factors.mean(0) - 1).abs().max() < 0.0048
    assert (factors.std(0) - 0.23094).abs().max() < 0.0024
    assert (torch.corrcoef(factors.T) - torch.eye(3)).abs().max() < 0.0205


def test_the_six_orders_of_the_jitter_are_equally_frequent(many):
    share = many.jitter_order.flatten().bincount(minlength=6) / many.jitter_order.numel()
    assert (share - 1 / 6).abs().max() < 0.0077, share  # five standard errors


def test_cutmix_comes_with_its_probability(many):
    assert abs(many.use_cutmix.float().mean() - 0.5) < 0.033  # five standard errors over 6,000 steps
    for probability in (0.0, 1.0):
        plan = draw_epoch_plan(640, 64, seed=0, stage="t", epoch=0, cutmix_probability=probability)
        assert plan.use_cutmix.float().mean() == probability


def test_lambda_is_the_real_share_outside_the_box(many):
    y0, y1, x0, x1 = many.box.unbind(1)
    assert (many.box >= 0).all() and (many.box <= 32).all() and (y0 <= y1).all() and (x0 <= x1).all()
    assert torch.equal(many.lam, 1 - (y1 - y0) * (x1 - x0) / 1024)


def test_a_box_that_is_not_clipped_has_even_sides_about_its_centre(many):
    y0, y1, x0, x1 = many.box.unbind(1)
    inside = (y0 > 0) & (x0 > 0) & (y1 < 32) & (x1 < 32)
    assert inside.sum() > 500
    assert ((y1 - y0)[inside] % 2 == 0).all() and ((x1 - x0)[inside] % 2 == 0).all()


def test_unclipped_boxes_are_squares_whose_area_is_uniform():
    boxes, lam = draw_boxes(20_000, 32, epoch_generator(0, "boxes", 0))
    y0, y1, x0, x1 = boxes.unbind(1)
    free = (y0 > 0) & (y1 < 32) & (x0 > 0) & (x1 < 32)
    assert torch.equal((y1 - y0)[free], (x1 - x0)[free])
    # 1 - lambda uniform gives the side t the density 2t, and a side with a uniform centre keeps t (1 - t/4)
    # on average: the mean area is the integral of 2t * t^2 (1 - t/4)^2 = 0.3208. Rounding a side down takes
    # half a pixel, some 0.02 of the area; the standard error over 20,000 boxes is 0.0017.
    assert 0.28 < (1 - lam).mean() < 0.325, (1 - lam).mean()


def test_a_share_of_a_step_computes_its_rows_of_the_whole(images, plan):
    step = plan.step(1)
    batch = images[step.order]
    whole = augment(batch, step)
    share = slice(16, 32)
    part = step.rows(share)
    # Rows are computed one by one, but a mean over another memory layout may round differently.
    torch.testing.assert_close(augment(images[part.order], part), whole[share], rtol=0, atol=1e-6)
    partners = step.rows(step.partner[share])
    expected = whole[step.partner[share]]
    torch.testing.assert_close(augment(images[partners.order], partners), expected, rtol=0, atol=1e-6)


def test_the_plan_survives_a_move_with_the_host_side_choice_on_the_host(plan):
    moved = plan.to("meta")
    assert moved.order.device.type == "meta" and moved.box.device.type == "meta"
    assert moved.use_cutmix.device.type == "cpu" and isinstance(moved.step(0).use_cutmix, bool)


@pytest.mark.parametrize("num_images, batch_size", [(10, 64), (0, 64), (10, 0)])
def test_a_batch_that_does_not_fit_is_refused(num_images, batch_size):
    with pytest.raises(
        StudyError, match=f"batch_size {batch_size} does not fit {num_images} training images"
    ):
        draw_epoch_plan(num_images, batch_size, seed=0, stage="train", epoch=0)


def test_a_probability_above_one_is_refused():
    with pytest.raises(StudyError, match=r"cutmix_probability 1.5"):
        draw_epoch_plan(64, 64, seed=0, stage="train", epoch=0, cutmix_probability=1.5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_computes_the_same_inside_a_cuda_graph(images, plan):
    step, batch = plan.to("cuda").step(0), images[plan.step(0).order]
    on_gpu = batch.cuda()
    augment(on_gpu, step)  # warm-up: a graph may not load kernels
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = augment(on_gpu, step)
    graph.replay()
    # Fused multiply-adds and another order of summation: a few roundings of float32.
    torch.testing.assert_close(captured.cpu(), augment(batch, plan.step(0)), rtol=0, atol=3e-6)
