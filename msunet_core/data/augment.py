"""Training augmentation as batch arithmetic, an epoch's choices drawn beforehand (specification §4 and §5).

The per-image pipeline of torchvision, RandomCrop(32, padding=4), RandomHorizontalFlip, ColorJitter(0.4, 0.4,
0.4), ToTensor, Normalize, RandomErasing(0.4), spends its time in Python. Here the choices of a whole epoch
are tensors, drawn on the CPU from one generator that depends on seed, stage and epoch alone; a step only
looks its row up and computes. So a resumed run needs no random state to be restored, a GPU sees the choices
a CPU sees, processes share one plan by taking rows of it, and a step never waits for the host.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import StudyError
from .images import IMAGE_SIZE, normalise, standardise

PADDING = 4  # pixels of value 0 on each side before the crop, specification §4
JITTER = 0.4  # brightness, contrast and saturation factors lie in [1 - JITTER, 1 + JITTER], specification §4
CUTMIX_PROBABILITY = 0.5  # per batch, specification §5
ERASE_PROBABILITY = 0.4  # per image, specification §4
ERASE_AREA = (0.02, 1 / 3)  # share of the image
ERASE_RATIO = (0.3, 1 / 0.3)  # height to width, uniform in its logarithm
ERASE_TRIES = 10  # until both sides are shorter than the image's
GRAY = (0.2989, 0.587, 0.114)  # luma of ITU-R BT.601 as torchvision rounds it

BRIGHTNESS, CONTRAST, SATURATION = range(3)
JITTER_ORDERS = ((0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0))


@dataclass(frozen=True, eq=False)
class StepPlan:
    """The choices of one step: the fields of :class:`EpochPlan` without their first dimension.

    ``use_cutmix`` is a Python bool, so that choosing what to run never waits for a device.
    """

    order: Tensor
    dy: Tensor
    dx: Tensor
    flip: Tensor
    factors: Tensor
    jitter_order: Tensor
    blend: Tensor
    erase: Tensor
    partner: Tensor
    box: Tensor
    lam: Tensor
    use_cutmix: bool
    augment: bool

    def rows(self, which: slice | Tensor) -> StepPlan:
        """The plan of some images of this batch: a slice (a process's share) or an int64 tensor of rows.

        ``partner`` still counts in the whole batch, so ``step.rows(step.partner[share])`` is what a
        process needs to make the partners of its share itself. Box and lambda are the batch's own.
        """
        chosen = {name: getattr(self, name)[which] for name in PER_IMAGE if name != "blend"}
        return StepPlan(
            **chosen,
            blend=self.blend[..., which],
            box=self.box,
            lam=self.lam,
            use_cutmix=self.use_cutmix,
            augment=self.augment,
        )


@dataclass(frozen=True, eq=False)
class EpochPlan:
    """Every random choice of one training epoch; S steps of B images.

    Attributes
    ----------
    order : int64 (S, B), which image; each image at most once, the last incomplete batch dropped
    dy, dx : int64 (S, B) in 0..8, top left corner of the crop in the padded 40 x 40 image (4, 4: in place)
    flip : bool (S, B), mirror left and right
    factors : float32 (S, B, 3), brightness, contrast, saturation, each uniform in [0.6, 1.4]
    jitter_order : int64 (S, B), row of ``JITTER_ORDERS``: which of the three comes first, second, third
    blend : float32 (S, 3, 3, B), factors and jitter_order restated for :func:`jitter`: for the first,
        second and third operation the shares of the image itself, of its mean gray, of its gray
    erase : int64 (S, B, 4), y0, y1, x0, x1 of the erased rectangle, end exclusive; all 0 where none is
    partner : int64 (S, B), a permutation of the batch: image b of each image a in CutMix
    box : int64 (S, 4), y0, y1, x0, x1, end exclusive, clipped to the image; may be empty
    lam : float32 (S,), share of the image outside the box, after clipping
    use_cutmix : bool (S,), stays on the CPU: the host decides by it what to run
    augment : False for "clean" training: crop, flip, jitter and erasing are the identity and are skipped
    """

    order: Tensor
    dy: Tensor
    dx: Tensor
    flip: Tensor
    factors: Tensor
    jitter_order: Tensor
    blend: Tensor
    erase: Tensor
    partner: Tensor
    box: Tensor
    lam: Tensor
    use_cutmix: Tensor
    augment: bool

    def __len__(self) -> int:
        return len(self.order)

    def step(self, index: int) -> StepPlan:
        """The choices of one step, as views."""
        tensors = {name: getattr(self, name)[index] for name in (*PER_IMAGE, "box", "lam")}
        return StepPlan(**tensors, use_cutmix=bool(self.use_cutmix[index]), augment=self.augment)

    def to(self, device: torch.device | str) -> EpochPlan:
        """The same plan with its tensors on ``device``, ``use_cutmix`` excepted."""
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        for name in (*PER_IMAGE, "box", "lam"):
            moved[name] = moved[name].to(device)
        return EpochPlan(**moved)


PER_IMAGE = ("order", "dy", "dx", "flip", "factors", "jitter_order", "blend", "erase", "partner")


def epoch_generator(seed: int, stage: str, epoch: int) -> torch.Generator:
    """A CPU generator that depends on these three alone, the same in every process and version of Python."""
    digest = hashlib.blake2b(f"{seed}/{stage}/{epoch}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)  # 63 bits: always a valid seed


def draw_epoch_plan(
    num_images: int,
    batch_size: int,
    *,
    seed: int,
    stage: str,
    epoch: int,
    cutmix_probability: float = CUTMIX_PROBABILITY,
    erase_probability: float = ERASE_PROBABILITY,
    augment: bool = True,
) -> EpochPlan:
    """Draw all choices of one epoch at once.

    Parameters
    ----------
    num_images : size of the training set, at least ``batch_size``
    seed, stage, epoch : name the plan; equal names give equal plans, and one differing part another plan
    cutmix_probability : per step, in [0, 1]
    erase_probability : per image, in [0, 1]
    augment : False draws the same order and the same CutMix, with crop, flip, jitter and erasing the identity

    Raises
    ------
    StudyError : a batch that does not fit the data, a probability outside [0, 1]
    """
    if not 1 <= batch_size <= num_images:
        raise StudyError(
            f"batch_size {batch_size} does not fit {num_images} training images; "
            "choose a smaller batch, at least 1, or give more images"
        )
    for name, value in (("cutmix", cutmix_probability), ("erase", erase_probability)):
        if not 0 <= value <= 1:
            raise StudyError(f"{name}_probability {value} is not a probability; choose one in 0..1")
    draw = epoch_generator(seed, stage, epoch)
    steps = num_images // batch_size
    batch = (steps, batch_size)

    order = torch.randperm(num_images, generator=draw)[: steps * batch_size].view(batch)
    partner = torch.rand(batch, generator=draw, dtype=torch.float64).argsort(dim=1, stable=True)
    use_cutmix = torch.rand(steps, generator=draw) < cutmix_probability
    box, lam = draw_boxes(steps, IMAGE_SIZE, draw)

    dy = dx = torch.full(batch, PADDING)
    flip = torch.zeros(batch, dtype=torch.bool)
    factors = torch.ones(*batch, 3)
    jitter_order = torch.zeros(batch, dtype=torch.int64)
    erase = torch.zeros(*batch, 4, dtype=torch.int64)
    if augment:
        dy = torch.randint(0, 2 * PADDING + 1, batch, generator=draw)
        dx = torch.randint(0, 2 * PADDING + 1, batch, generator=draw)
        flip = torch.rand(batch, generator=draw) < 0.5
        factors = 1 + JITTER * (2 * torch.rand(*batch, 3, generator=draw) - 1)
        jitter_order = torch.randint(0, len(JITTER_ORDERS), batch, generator=draw)
        erase = draw_erasing(batch, IMAGE_SIZE, erase_probability, draw)
    return EpochPlan(
        order=order,
        dy=dy,
        dx=dx,
        flip=flip,
        factors=factors,
        jitter_order=jitter_order,
        blend=blend_shares(factors, jitter_order),
        erase=erase,
        partner=partner,
        box=box,
        lam=lam,
        use_cutmix=use_cutmix,
        augment=augment,
    )


def draw_boxes(count: int, image_size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """CutMix boxes int64 (count, 4) and the lambda float32 (count,) of their real areas (specification §5).

    Lambda ~ Beta(1, 1), which is the uniform distribution; side sqrt(1 - lambda) x image_size, rounded
    down to whole pixels, half of it (rounded down again) on each side of a uniform pixel; then clipped to
    the image.
    """
    lam = torch.rand(count, generator=generator, dtype=torch.float64)
    half = ((1 - lam).sqrt() * image_size).long() // 2
    centre = torch.randint(0, image_size, (2, count), generator=generator)
    (y0, x0), (y1, x1) = (centre - half).clamp(min=0), (centre + half).clamp(max=image_size)
    area = (y1 - y0) * (x1 - x0)
    return torch.stack((y0, y1, x0, x1), dim=1), 1 - area.float() / image_size**2


def draw_erasing(
    shape: tuple[int, ...], image_size: int, probability: float, generator: torch.Generator
) -> Tensor:
    """Rectangles of random erasing, int64 (*shape, 4), all 0 where nothing is erased (arXiv:1708.04896).

    Area and aspect ratio as ``ERASE_AREA`` and ``ERASE_RATIO`` say, rounded to whole sides, drawn anew where
    a side is not shorter than the image's, then placed uniformly (specification §4).
    """
    is_erased = torch.rand(shape, generator=generator) < probability
    area, ratio = torch.rand(2, ERASE_TRIES, *shape, generator=generator, dtype=torch.float64)
    area = (ERASE_AREA[0] + (ERASE_AREA[1] - ERASE_AREA[0]) * area) * image_size**2
    low, high = (math.log(bound) for bound in ERASE_RATIO)
    ratio = (low + (high - low) * ratio).exp()
    sides = torch.stack(((area * ratio).sqrt(), (area / ratio).sqrt())).round().long()
    fits = (sides < image_size).all(0)
    first = fits.to(torch.uint8).argmax(0)  # the first try that fits
    sides = sides.gather(1, first.expand(2, 1, *shape)).squeeze(1) * (is_erased & fits.any(0))
    start = torch.rand(2, *shape, generator=generator, dtype=torch.float64)
    start = (start * (image_size - sides + 1)).long() * (sides > 0)
    (y0, x0), (y1, x1) = start, start + sides
    return torch.stack((y0, y1, x0, x1), dim=-1)


def blend_shares(factors: Tensor, jitter_order: Tensor) -> Tensor:
    """Restate jitter factors (..., B, 3) and orders (..., B) as shares (..., 3, 3, B) for :func:`jitter`."""
    operation = torch.tensor(JITTER_ORDERS, device=factors.device)[jitter_order]  # (..., B, position)
    own = factors.gather(-1, operation)
    of_mean = (1 - own) * (operation == CONTRAST)
    of_gray = (1 - own) * (operation == SATURATION)
    return torch.stack((own, of_mean, of_gray)).movedim(0, -1).movedim(-3, -1).contiguous()


def augment(images: Tensor, plan: StepPlan) -> Tensor:
    """Crop, flip, jitter, standardise and erase a batch.

    Parameters
    ----------
    images : uint8 (B, 32, 32, 3), the images ``plan.order`` names
    plan : the choices for them, on the same device

    Returns
    -------
    float32 (B, 3, 32, 32) in channels_last memory, standardised as by
    :func:`msunet_core.data.images.normalise`.
    Nothing in here waits for the device, so it can be part of a CUDA graph.
    """
    if not plan.augment:
        return normalise(images)
    planes = crop_and_flip(images, plan.dy, plan.dx, plan.flip)
    return erase(standardise(jitter(planes.float().div_(255), plan.blend)), plan.erase)


def crop_and_flip(images: Tensor, dy: Tensor, dx: Tensor, flip: Tensor) -> Tensor:
    """Crop the zero-padded images at (dy, dx), then mirror those marked; each pixel is moved once.

    images : (B, H, W, C) of any dtype; dy, dx : int64 (B,); flip : bool (B,). Returns (B, C, H, W).
    """
    count, height, width, channels = images.shape
    # Planes before the gather would need a gather each; pixels of C bytes are moved whole.
    padded = F.pad(images, (0, 0, PADDING, PADDING, PADDING, PADDING))
    rows, columns = (torch.arange(n, device=images.device) for n in (height, width))
    y = dy[:, None] + rows
    x = dx[:, None] + torch.where(flip[:, None], columns.flip(0), columns)
    first = torch.arange(count, device=images.device)[:, None] * padded.shape[1]
    pixel = ((first + y) * padded.shape[2])[:, :, None] + x[:, None, :]
    moved = padded.view(-1, channels).index_select(0, pixel.view(-1))
    return moved.view(count, height, width, channels).permute(0, 3, 1, 2).contiguous()


def jitter(images: Tensor, blend: Tensor) -> Tensor:
    """Brightness, contrast and saturation in each image's own order, for the whole batch in three passes.

    All three are clamp(f * image + (1 - f) * reference, 0, 1) with reference 0, the image's mean gray and
    its gray (torchvision's adjust_brightness, _contrast and _saturation on float images), so that one pass
    applies a different one to each image: the shares of the references that do not apply are 0.

    images : float32 (B, 3, H, W) in [0, 1], overwritten: another buffer would fall out of a core's cache.
    blend : float32 (3, 3, B), see :func:`blend_shares`. Returns ``images``.
    """
    shares = blend[..., None, None]
    for own, of_mean, of_gray in shares.unbind():
        gray = images[:, 0] * GRAY[0]
        gray.add_(images[:, 1], alpha=GRAY[1]).add_(images[:, 2], alpha=GRAY[2])
        mean = gray.mean(dim=(1, 2), keepdim=True)
        reference = gray.mul_(of_gray).add_(mean * of_mean)
        torch.addcmul(reference[:, None], images, own[:, None], out=images).clamp_(0, 1)
    return images


def erase(images: Tensor, rectangles: Tensor) -> Tensor:
    """Set a rectangle of each image to 0, in standardised values the mean colour; in place.

    images : (B, C, H, W); rectangles : int64 (B, 4) of y0, y1, x0, x1, end exclusive. Returns ``images``.
    """
    y0, y1, x0, x1 = rectangles[..., None].unbind(1)
    y, x = (torch.arange(n, device=images.device) for n in images.shape[-2:])
    inside = ((y >= y0) & (y < y1))[:, :, None] & ((x >= x0) & (x < x1))[:, None, :]
    return images.masked_fill_(inside[:, None], 0.0)
