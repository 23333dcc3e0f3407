"""Does it help a ternary network to average its weights at the end of a short training?

    python benchmarks/recipes/averaged.py held.npz runs/recipes/averaged.csv

The short training of ``short.yaml``, in which recipes are compared, three times (seeds 0, 1 and 2). Each
network is tested as its last step left it, and with W averaged over the last epoch or its second half: T is
chosen from the averaged W, and batch norm's statistics are made anew, from augmented training images. Without
the averages the loop is the trainer's, bit for bit. Some 20 minutes of one core a seed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, update_bn

from msunet_core import ImageData, evaluate, load_data
from msunet_core.data.augment import augment, draw_epoch_plan
from msunet_core.files import atomic_write
from msunet_core.study.profile import Profile, load_profile
from msunet_core.study.run import new_network
from msunet_core.training.learner import Learner
from msunet_core.training.schedules import learning_rate

SHARES = {"last step": 0.0, "second half of the last epoch": 0.5, "last epoch": 1.0}
BATCHES = 200  # from which batch norm's statistics are made anew


def plan_of(data: ImageData, profile: Profile, seed: int, epoch: int):
    """The choices that the trainer makes in an epoch."""
    config = profile.train
    return draw_epoch_plan(
        len(data.train_images),
        config.batch_size,
        seed=seed,
        stage="train",
        epoch=epoch,
        cutmix_probability=config.cutmix_probability,
        erase_probability=config.erase_probability,
    )


def trained(data: ImageData, profile: Profile, seed: int) -> dict[str, nn.Module]:
    """The network of the last step, and those averaged over the end of its training."""
    config, images, labels = profile.train, data.train_images, data.train_labels
    network = new_network(Profile(seed=seed), data.num_classes, width=profile.network.width)
    learner = Learner(network, config)
    found = {name: network if not share else AveragedModel(network) for name, share in SHARES.items()}
    for epoch in range(config.epochs):
        learner.begin_epoch(epoch)
        plan = plan_of(data, profile, seed, epoch)
        steps = len(plan.order)
        for index in range(steps):
            learner.set_rate(learning_rate(config, epoch, index / steps))
            learner.step(images, labels, plan.step(index))
            for name, share in SHARES.items():
                if share and epoch == config.epochs - 1 and index >= (1 - share) * steps:
                    found[name].update_parameters(network)
        print(f"seed {seed}: epoch {epoch + 1} of {config.epochs}", file=sys.stderr)
    for name, share in SHARES.items():
        if share:
            update_bn(batches(data, profile, seed), found[name])
            found[name] = found[name].module
    return found


def batches(data: ImageData, profile: Profile, seed: int) -> Iterator[Tensor]:
    """Augmented training images of an epoch that no step has seen."""
    plan = plan_of(data, profile, seed, profile.train.epochs)
    for step in map(plan.step, range(BATCHES)):
        yield augment(data.train_images[step.order], step)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", help="the held-out set that docs/recipes.md makes")
    parser.add_argument("out", type=Path, help="the .csv to write")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    asked = parser.parse_args()
    torch.set_num_threads(1)
    profile, data = load_profile(str(Path(__file__).with_name("short.yaml"))), load_data(asked.data)
    rows = []
    for seed in asked.seeds:
        for name, network in trained(data, profile, seed).items():
            top1 = evaluate(network, data.test_images, data.test_labels, "O0")["top1"]
            rows.append({"averaged over": name, "seed": seed, "top1": round(top1, 2)})
        atomic_write(asked.out, pd.DataFrame(rows).to_csv(index=False))
    print(pd.DataFrame(rows).pivot(index="averaged over", columns="seed", values="top1").to_string())


if __name__ == "__main__":
    main()
