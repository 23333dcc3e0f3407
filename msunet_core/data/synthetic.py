"""The embedded data set: 100 classes of 32x32 colour pictures, drawn from a seed in about two seconds.

A class is one of 2 shapes in one of 5 fills and 10 hues: "red-striped-star". Position, size, rotation, light,
background and clutter vary from picture to picture, and scraps in all hues lie about. Measured with the
default sizes and batches of 64: the ternary network of width 0.125 has a top-1 of 46 % after 400 steps and is
still learning, a linear classifier of the pixels 25 % after 1,500. Mirroring changes no class and brightness
is no cue, because training flips its images and jitters their light (specification §4).

The pictures are the same bytes on every machine: PCG64 streams, and only additions, multiplications,
divisions, square roots, minima and maxima, all of which IEEE 754 rounds in one way. Rotations therefore come
from the rational points of the circle, not from sin and cos, whose last bit depends on the processor; and
there is no sum over an array, whose order does.
"""

from __future__ import annotations

import numpy as np

from ..errors import StudyError
from .normalisation import IMAGE_SIZE

TRAIN_PER_CLASS = 60  # 6,000 images: an epoch is 93 steps of 64, seconds with the narrow network
TEST_PER_CLASS = 20  # 2,000 images: the standard error of a top-1 near 50 % is 1.1 points

SHAPES = ("disc", "star")
FILLS = ("plain", "striped", "checked", "ringed", "speckled")
HUES = {  # RGB in [0, 1]; far enough apart to survive the jitter of each picture
    "red": (0.88, 0.16, 0.16),
    "orange": (0.96, 0.52, 0.10),
    "yellow": (0.94, 0.84, 0.16),
    "lime": (0.58, 0.84, 0.16),
    "green": (0.12, 0.56, 0.24),
    "cyan": (0.16, 0.76, 0.80),
    "blue": (0.16, 0.34, 0.88),
    "violet": (0.52, 0.22, 0.78),
    "pink": (0.96, 0.44, 0.70),
    "brown": (0.48, 0.28, 0.14),
}
CLASSES = tuple((hue, fill, shape) for shape in SHAPES for fill in FILLS for hue in HUES)
CLASS_NAMES = tuple("-".join(parts) for parts in CLASSES)

PERIOD = 6.0  # pixels of a stripe, check or ring; finer fills blur into a paler plain
PALE = (0.95, 0.93, 0.88)  # RGB, the second colour of every fill but plain
RIM = 1.4  # pixels; without it a light fill on a light ground has no outline, and shapes are hardly learnt
RIM_COLOUR = (0.10, 0.09, 0.12)
SCRAPS = 4
CHOICES = 20 + 10 * SCRAPS  # random numbers of one picture: no fewer than are taken below

# Outward normals of the five lines of a pentagram: cos and sin written out (see the module's head).
STAR_LINES = (
    (0.0, 1.0),
    (-0.95105652, 0.30901699),
    (-0.58778525, -0.80901699),
    (0.58778525, -0.80901699),
    (0.95105652, 0.30901699),
)


def make_synthetic(
    seed: int = 0, *, train_per_class: int = TRAIN_PER_CLASS, test_per_class: int = TEST_PER_CLASS
) -> dict[str, np.ndarray]:
    """Draw the data set; the first k pictures of a class do not depend on how many are asked for.

    Parameters
    ----------
    seed : 0 or more; every seed is another data set of the same 100 classes
    train_per_class, test_per_class : pictures of each class, 1 or more

    Returns
    -------
    The five arrays of the study's .npz: ``train_images`` uint8 (100 * train_per_class, 32, 32, 3),
    ``train_labels`` int64, ``test_images``, ``test_labels``, ``class_names``; in class order.

    Raises
    ------
    StudyError : a negative seed, or less than one picture per class
    """
    if seed < 0:
        raise StudyError(f"the seed of the synthetic data is {seed}; give 0 or a positive whole number")
    if min(train_per_class, test_per_class) < 1:
        raise StudyError(
            f"{train_per_class} train and {test_per_class} test images per class; ask for at least 1 of each"
        )
    arrays = {"class_names": np.array(CLASS_NAMES)}
    for split, (name, count) in enumerate((("train", train_per_class), ("test", test_per_class))):
        pictures = [_draw_class(label, count, (seed, split, label)) for label in range(len(CLASS_NAMES))]
        arrays[f"{name}_images"] = np.concatenate(pictures)
        arrays[f"{name}_labels"] = np.repeat(np.arange(len(CLASS_NAMES), dtype=np.int64), count)
    return arrays


def _draw_class(label: int, count: int, entropy: tuple[int, int, int]) -> np.ndarray:
    """Pictures of one class, uint8 (count, 32, 32, 3), back to front: background, scraps, object, grain."""
    hue, fill, shape = CLASSES[label]
    choices, grain = (
        np.random.Generator(np.random.PCG64(s)) for s in np.random.SeedSequence(entropy).spawn(2)
    )
    # One row a picture, filled row by row: the first rows stay the same when more are drawn.
    chance = choices.random((count, CHOICES), dtype=np.float32)
    column = iter(np.ascontiguousarray(chance.T)[:, :, None, None])
    speckle, *noise = np.moveaxis(grain.random((count, IMAGE_SIZE, IMAGE_SIZE, 4), dtype=np.float32), -1, 0)

    def between(low: float, high: float) -> np.ndarray:
        """The next random choice of every picture, uniform in [low, high), as (count, 1, 1)."""
        return np.float32(low) + np.float32(high - low) * next(column)

    y, x = np.mgrid[:IMAGE_SIZE, :IMAGE_SIZE].astype(np.float32)[:, None] - np.float32((IMAGE_SIZE - 1) / 2)

    # Background: a muted colour with a gradient. The canvas is three colour planes, (count, 32, 32).
    along, _ = _turn(x, y, between(-1, 1))
    light, slope = between(0.2, 0.8), between(-0.012, 0.012)
    canvas = [light + between(-0.12, 0.12) + slope * along for _ in range(3)]

    # Scraps: small rectangles in the hues of the classes, so that a hue alone tells little.
    palette = np.array(tuple(HUES.values()), np.float32)
    for _ in range(SCRAPS):
        u, v = _turn(x - between(-16, 16), y - between(-16, 16), between(-1, 1))
        long, wide = between(1.5, 4.5), between(1.2, 2.6)
        colour = palette[np.int64(between(0, len(palette)))]
        strength = between(0.45, 0.9)
        cover = strength * _cover(np.maximum(np.abs(u) - long, np.abs(v) - wide))
        canvas = [plane + cover * (colour[..., c] - plane) for c, plane in enumerate(canvas)]

    # The object: a turned, moved and scaled shape in its fill, under a light of its own.
    radius = between(8.5, 13)
    u, v = _turn(x - between(-5.5, 5.5), y - between(-5.5, 5.5), between(-0.2, 0.2))
    distance = _distance(shape, u / radius, v / radius) * radius
    cover, rim = _cover(distance - np.float32(RIM)), _cover(-distance)
    pale = _pale(fill, *_turn(u, v, between(-1, 1)), between(0, 1), between(0, 1), speckle)
    light = between(0.75, 1.1)
    for c, base in enumerate(HUES[hue]):
        coat = np.float32(base) + between(-0.05, 0.05)
        coat = light * (coat + pale * (np.float32(PALE[c]) - coat))
        coat = coat + rim * (np.float32(RIM_COLOUR[c]) - coat)
        canvas[c] = canvas[c] + cover * (coat - canvas[c]) + np.float32(0.08) * (noise[c] - np.float32(0.5))

    pictures = np.clip(np.stack(canvas, axis=-1), 0, 1)
    return np.floor(pictures * np.float32(255) + np.float32(0.5)).astype(np.uint8)


def _pale(
    fill: str, u: np.ndarray, v: np.ndarray, a: np.ndarray, b: np.ndarray, speckle: np.ndarray
) -> np.ndarray:
    """Share of the pale colour in each pixel; a and b in [0, 1) shift the pattern, speckle is noise."""
    if fill == "plain":
        return np.zeros_like(u)
    if fill == "striped":
        wave = _wave(u, a)
    elif fill == "checked":
        wave = _wave(u, a) * _wave(v, b) * np.float32(2)
    elif fill == "ringed":
        wave = _wave(_length(u, v), a)
    else:
        wave = np.float32(8) * (speckle - np.float32(0.6))
    return np.clip(np.float32(0.5) + np.float32(1.2) * wave, 0, 1)


def _wave(distance: np.ndarray, phase: np.ndarray) -> np.ndarray:
    """A triangle wave in [-1, 1] of period PERIOD: sin, but rounded alike everywhere."""
    turns = distance / np.float32(PERIOD) + phase
    return np.abs(turns - np.floor(turns) - np.float32(0.5)) * np.float32(4) - np.float32(1)


def _turn(x: np.ndarray, y: np.ndarray, t: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates turned by the angle 2 atan(t): t in [-1, 1] is [-90, 90] degrees."""
    cosine = (1 - t * t) / (1 + t * t)
    sine = 2 * t / (1 + t * t)
    return x * cosine - y * sine, x * sine + y * cosine


def _cover(distance: np.ndarray) -> np.ndarray:
    """How much of a pixel lies inside an outline at this signed distance in pixels (inside is negative)."""
    return np.clip(np.float32(0.5) - distance, 0, 1)


def _distance(shape: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Signed distance to the outline of a shape of radius about 1, near enough to smooth its edge."""
    if shape == "disc":
        return _length(u, v) - 1
    lines = [np.float32(a) * u + np.float32(b) * v for a, b in STAR_LINES]
    # A point is in a pentagram when it is on the inner side of at least four of its five lines.
    return np.sort(np.stack(lines), axis=0)[-2] - np.float32(0.4)


def _length(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.sqrt(u * u + v * v)
