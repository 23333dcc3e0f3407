"""What the tests share: one thread, small images that can be learnt, a narrow network, a short recipe."""

from __future__ import annotations

import dataclasses
import signal

import pytest
import torch

from msunet_core import ImageData, StageConfig, build_msunet

CLASSES = 4


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture
def sighup_ends():
    """Under nohup SIGHUP is ignored, by all that a test starts too; not in this test."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    # Several test runs may share the machine; OpenMP's threads then wait for each other.
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def fixed_random_state():
    torch.manual_seed(0)


@pytest.fixture
def images() -> ImageData:
    """24 training and 12 test images of 4 classes: noise around a colour of the class's own."""
    draw = torch.Generator().manual_seed(0)
    colours = torch.tensor([[200, 60, 60], [60, 200, 60], [60, 60, 200], [180, 180, 60]])

    def split(count: int) -> tuple[torch.Tensor, torch.Tensor]:
        labels = torch.arange(count) % CLASSES
        noise = torch.randint(-50, 50, (count, 32, 32, 3), generator=draw)
        return (colours[labels][:, None, None, :] + noise).to(torch.uint8), labels

    names = ("red", "green", "blue", "yellow")
    return ImageData(*split(24), *split(12), class_names=names, source="test")


@pytest.fixture
def new_network():
    """A function that makes the same narrow network each time; arguments as of build_msunet."""

    def make(**arguments):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            return build_msunet(**({"num_classes": CLASSES, "width": 0.0625} | arguments))

    return make


@pytest.fixture
def recipe():
    """A function that makes a stage of 3 epochs with 3 steps each; arguments as of StageConfig."""
    short = StageConfig(
        epochs=3, batch_size=8, lr=0.05, warmup_epochs=1, milestones=(2,), alpha_start=1, alpha_end=2
    )

    def make(**changes) -> StageConfig:
        return dataclasses.replace(short, **changes)

    return make
