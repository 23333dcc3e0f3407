"""The study without Jupyter, for a server: ``python -m msunet_core {data,train,prune,validate,score}``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from . import StudyError, evaluate, load_checkpoint, load_data, load_profile, prune, score, train
from .config import Profile, profile_names
from .data import save_npz
from .precision import OPT_LEVELS
from .stages import CHECKPOINT, resolve_device
from .study import new_network

SOURCES_HELP = "synthetic, cifar100, an .npz or a folder"


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m msunet_core", description=__doc__.splitlines()[0])
    commands = top.add_subparsers(dest="command", required=True, metavar="{data,train,prune,validate,score}")

    choice = argparse.ArgumentParser(add_help=False)
    known = ", ".join(profile_names())
    choice.add_argument("--profile", default="smoke", help=f"{known}, or a .yaml file (default smoke)")
    choice.add_argument("--variant", help="v1, v2 or v3 (default: the profile's)")
    choice.add_argument("--data", metavar="SOURCE", help=f"{SOURCES_HELP} (default: the profile's)")
    choice.add_argument("--limit", type=int, help="keep the first N images of each class and split")
    choice.add_argument("--seed", type=int, help="of every random choice (default: the profile's)")
    choice.add_argument("--device", help="auto, cpu, cuda, ... (default: the profile's)")
    choice.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="such as train.epochs=3")

    data = commands.add_parser("data", parents=[choice], help="load, check and describe a data set")
    data.add_argument("--out", type=Path, help="write the images to this .npz")
    data.set_defaults(run=run_data)

    training = commands.add_parser("train", parents=[choice], help="train; goes on where it was stopped")
    training.add_argument("--out", type=Path, required=True, help="folder of the stage")
    training.set_defaults(run=run_train)

    pruning = commands.add_parser("prune", parents=[choice], help="prune; goes on where it was stopped")
    pruning.add_argument(
        "--checkpoint", type=Path, required=True, help="file or folder of the training stage"
    )
    pruning.add_argument("--out", type=Path, required=True, help="folder of the stage")
    pruning.set_defaults(run=run_prune)

    validating = commands.add_parser("validate", help="top-1, top-5 and loss of a checkpoint on test images")
    validating.add_argument("checkpoint", type=Path, help="published *.pth.tar or the study's own")
    validating.add_argument("--data", required=True, metavar="SOURCE", help=SOURCES_HELP)
    validating.add_argument("--limit", type=int, help="first N test images of each class")
    validating.add_argument("--device", default="auto")
    validating.set_defaults(run=run_validate)

    scoring = commands.add_parser("score", help="parameters, operations and score of a checkpoint")
    scoring.add_argument("checkpoint", type=Path, help="published *.pth.tar or the study's own")
    scoring.add_argument("--layers", action="store_true", help="print the row of each module too")
    scoring.set_defaults(run=run_score)

    for command in (validating, scoring):
        command.add_argument("--variant", default="v3", help="v1, v2 or v3 (default v3)")
        command.add_argument("--opt-level", nargs="+", default=["O0", "O2", "O3"], choices=OPT_LEVELS)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    try:
        arguments.run(arguments)
    except StudyError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stopped:
        print(f"stopped: {str(stopped) or 'by Ctrl-C'}; the same command goes on from there", file=sys.stderr)
        return 130
    except BrokenPipeError:  # | head
        sys.stderr.close()
        return 141
    return 0


def run_data(arguments: argparse.Namespace) -> None:
    profile = _profile(arguments)
    data = _data(profile)
    print(f"{profile.data.source}: {len(data.train_images)} training and {len(data.test_images)} test images")
    more = ", ..." if data.num_classes > 8 else ""
    print(f"{data.num_classes} classes: {', '.join(data.class_names[:8])}{more}")
    print(f"fingerprint {data.fingerprint}")
    if arguments.out:
        save_npz(data, arguments.out)
        print(f"written to {arguments.out}")


def run_train(arguments: argparse.Namespace) -> None:
    profile = _profile(arguments)
    data = _data(profile)
    model = new_network(profile, data.num_classes)
    _tell(train(model, data, profile.train, arguments.out, seed=profile.seed, device=profile.device))


def run_prune(arguments: argparse.Namespace) -> None:
    profile = _profile(arguments)
    path = arguments.checkpoint / CHECKPOINT if arguments.checkpoint.is_dir() else arguments.checkpoint
    model, _ = load_checkpoint(path, profile.network.variant)
    data = _data(profile)
    _tell(prune(model, data, profile.prune, arguments.out, seed=profile.seed, device=profile.device))


def run_validate(arguments: argparse.Namespace) -> None:
    model, _ = load_checkpoint(arguments.checkpoint, arguments.variant)
    model.to(resolve_device(arguments.device))
    data = load_data(arguments.data, limit=arguments.limit)
    classes = model.config["num_classes"]
    if data.num_classes != classes:
        raise StudyError(
            f"the data have {data.num_classes} classes, the network {classes}; give the data of its training"
        )
    print(f"{arguments.checkpoint}: {len(data.test_images)} test images of {arguments.data}")
    print(f"{'level':6}{'top-1 %':>9}{'top-5 %':>9}{'loss':>9}")
    for level in arguments.opt_level:
        found = evaluate(model, data.test_images, data.test_labels, level)
        print(f"{level:6}{found['top1']:9.2f}{found['top5']:9.2f}{found['loss']:9.4f}")


def run_score(arguments: argparse.Namespace) -> None:
    model, _ = load_checkpoint(arguments.checkpoint, arguments.variant)
    for level in arguments.opt_level:
        scored = score(model, level)
        if arguments.layers:
            print(scored.layers.to_string(index=False))
        print(f"{level}\n{scored}")


def _profile(arguments: argparse.Namespace) -> Profile:
    return load_profile(
        arguments.profile,
        variant=arguments.variant,
        data=arguments.data,
        limit=arguments.limit,
        seed=arguments.seed,
        device=arguments.device,
        overrides=arguments.set,
    )


def _data(profile: Profile):
    return load_data(profile.data.source, limit=profile.data.limit, seed=profile.seed)


def _tell(result) -> None:
    measured = ", ".join(f"{name} {value:.2f}" for name, value in result.metrics.items())
    print(f"{result.checkpoint}: {measured}")


if __name__ == "__main__":
    sys.exit(main())
