"""The study without Jupyter, for a server: ``python -m msunet_core COMMAND --help``."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from .data.sources import CIFAR100_CLASSES, hold_out, load_data, save_npz
from .errors import StudyError, one_line
from .files import atomic_write, read_json
from .measure.evaluation import evaluate
from .measure.pack import pack, provenance_of
from .measure.packed_network import PackedNetwork
from .measure.packed_reader import Reader
from .measure.scoring import score
from .measure.unpack import is_shipped, load_network, shipped, unpack
from .memory import usable_cores
from .model.checkpoint import load_checkpoint, read_momentum
from .model.precision import OPT_LEVELS
from .study.grid import GRID, load_grid
from .study.profile import Profile, load_profile, profile_names
from .study.provenance import recorded_stage
from .study.run import new_network, runs_folder
from .training.distributed import first_to_fail, rank
from .training.stages import CHECKPOINT, prune, resolve_device, train

SOURCES_HELP = "synthetic, cifar100, an .npz or a folder"


class OneLine(argparse.ArgumentParser):
    """Refuses in one line, as everything here does; ``--help`` says how it is used."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {one_line(f'{message}; see {self.prog} --help')}\n")


def parser() -> argparse.ArgumentParser:
    top = OneLine(prog="python -m msunet_core", description=__doc__.splitlines()[0])
    commands = top.add_subparsers(
        dest="command", required=True, metavar="{data,train,prune,ablations,validate,score,pack}"
    )

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
    data.add_argument(
        "--hold-out",
        type=int,
        metavar="N",
        help="test on N training images of each class, and train on the others: for choosing a recipe",
    )
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

    ablating = commands.add_parser(
        "ablations", parents=[choice], help="every row of the grid, compared seed by seed; goes on likewise"
    )
    ablating.add_argument("--grid", type=Path, default=GRID, help="a file such as ablations.yaml")
    ablating.add_argument("--only", nargs="+", default=[], metavar="FACTOR", help="these factors alone")
    ablating.add_argument("--jobs", type=int, default=usable_cores(), help="processes that share the cores")
    ablating.add_argument("--scheduler", metavar="ADDRESS", help="a running Dask cluster, as tcp://host:8786")
    ablating.add_argument("--out", type=Path, help="folder of tables and runs (default runs/ablations)")
    ablating.set_defaults(run=run_grid)

    files = "packed file, published *.pth.tar or the study's own; a folder stands for the checkpoint in it"
    validating = commands.add_parser("validate", help="top-1, top-5 and score of a network on test images")
    validating.add_argument("--data", required=True, metavar="SOURCE", help=SOURCES_HELP)
    validating.add_argument("--limit", type=int, help="first N test images of each class")
    validating.add_argument("--device", default="auto")
    validating.add_argument("--out", type=Path, metavar="CSV", help="write the table to this file, too")
    validating.set_defaults(run=run_validate)

    scoring = commands.add_parser("score", help="parameters, operations and score of a network")
    scoring.add_argument("--layers", action="store_true", help="print the row of each module too")
    scoring.set_defaults(run=run_score)

    packing = commands.add_parser("pack", help="write a network as a packed file, as small as its score says")
    packing.add_argument("checkpoint", type=Path, help=files)
    packing.add_argument("out", type=Path, help="file to write, such as msunet_v3.safetensors")
    packing.add_argument("--variant", default="v3", help="v1, v2 or v3 (default v3)")
    packing.add_argument("--no-merge", action="store_true", help="keep all four vectors of each batch norm")
    packing.add_argument(
        "--data", metavar="SOURCE", help=f"measure top-1 and keep it in the file; {SOURCES_HELP}"
    )
    packing.add_argument(
        "--provenance", type=Path, metavar="JSON", help="keep this instead of the run's own words"
    )
    packing.add_argument("--limit", type=int, help="first N test images of each class")
    packing.add_argument("--device", default="auto")
    packing.set_defaults(run=run_pack)

    for command in (validating, scoring):
        command.add_argument(
            "checkpoint", type=Path, nargs="?", help=f"{files} (default: the shipped network)"
        )
        command.add_argument("--variant", default="v3", help="v1, v2 or v3 (default v3)")
        command.add_argument("--opt-level", nargs="+", default=["O0", "O2", "O3"], choices=OPT_LEVELS)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    if rank() and arguments.run not in (run_train, run_prune):
        return 0  # torchrun started several, and these commands are for one
    try:
        arguments.run(arguments)
    except BrokenPipeError:  # | head
        sys.stderr.close()
        return 141
    except (StudyError, OSError) as error:
        if first_to_fail():
            print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stopped:
        if rank() == 0:
            goes_on = arguments.run in (run_train, run_prune, run_grid)
            again = "; the same command goes on from there" if goes_on else ""
            print(f"stopped: {str(stopped) or 'by Ctrl-C'}{again}", file=sys.stderr)
        return 130
    return 0


def run_data(arguments: argparse.Namespace) -> None:
    profile = _profile(arguments)
    data = _data(profile)
    if arguments.hold_out is not None:
        data = hold_out(data, arguments.hold_out)
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
    with _recorded(arguments.out, profile):
        _tell(train(model, data, profile.train, arguments.out, seed=profile.seed, device=profile.device))


def run_prune(arguments: argparse.Namespace) -> None:
    profile = _profile(arguments)
    start = _file(arguments.checkpoint)
    model, _ = load_checkpoint(start, profile.network.variant)
    options = dict(seed=profile.seed, device=profile.device, momentum=read_momentum(start))
    with _recorded(arguments.out, profile):
        _tell(prune(model, _data(profile), profile.prune, arguments.out, **options))


def _recorded(folder: Path, profile: Profile) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext() if rank() else recorded_stage(folder, profile.name, profile.seed)


def run_grid(arguments: argparse.Namespace) -> None:
    from .study.ablations import run_ablations  # importing SciPy takes a second

    if not arguments.out:
        if arguments.only:
            raise StudyError("--only makes tables of a part of the grid: give a folder of their own, --out")
        if arguments.grid != GRID:
            raise StudyError(f"--grid {arguments.grid} is another grid: give a folder for its tables, --out")
    for name, value in (("--variant", arguments.variant), ("--seed", arguments.seed)):
        if value is not None:
            raise StudyError(f"{name} {value}: variants and seeds are the grid's; edit {arguments.grid}")
    profile = _profile(arguments)
    grid = load_grid(profile, arguments.grid, only=arguments.only)
    for name in (override.partition("=")[0] for override in arguments.set):
        if name in grid.fixed:
            raise StudyError(f"--set {name}: the grid's baseline sets it for all rows; edit {arguments.grid}")
        if name == "network.width":
            raise StudyError("--set network.width: networks of the grid have ablation_width; set that")
    out = arguments.out or runs_folder() / "ablations"
    options = dict(jobs=arguments.jobs, scheduler=arguments.scheduler, replace=bool(arguments.out))
    found = run_ablations(profile, grid, out, **options)
    shown = found.table.drop(columns=["params", "flops", "failed"])
    print(shown.to_string(index=False, na_rep="", float_format=lambda value: f"{value:.6g}"))
    print(f"{out / profile.name}.csv: {len(found.table)} rows of {len(grid.seeds)} seeds")
    if failed := [f"{row.choice}: {row.value}" for row in found.table.dropna(subset="failed").itertuples()]:
        raise StudyError(
            f"{len(failed)} of {len(found.table)} rows failed ({', '.join(failed)}), the table says why; "
            "the same command tries them again"
        )


def run_validate(arguments: argparse.Namespace) -> None:
    if arguments.out:
        _check_can_hold(arguments.out)
    path = _file(arguments.checkpoint) if arguments.checkpoint else shipped()
    model, _ = load_network(path, arguments.variant)
    data = _test_data(arguments, model)
    if is_shipped() and path.samefile(shipped()) and data.class_names != CIFAR100_CLASSES:
        print(
            f"warning: the 100 classes of {arguments.data} are not those that the shipped network learnt, "
            "CIFAR-100's: its accuracy on them says nothing",
            file=sys.stderr,
        )
    print(f"{path}: {path.stat().st_size:,} bytes, {len(data.test_images)} test images of {arguments.data}")
    print(f"{'level':6}{'top-1 %':>9}{'top-5 %':>9}{'loss':>9}{'score':>10}")
    rows = ["level,top1,top5,loss,score,images"]
    for level in arguments.opt_level:
        as_it_lies = level == "O0" and Reader(path).is_packed() and next(model.parameters()).is_cpu
        runner = PackedNetwork(path) if as_it_lies else model
        found = evaluate(runner, data.test_images, data.test_labels, level)
        value = score(model, level).value
        print(f"{level:6}{found['top1']:9.2f}{found['top5']:9.2f}{found['loss']:9.4f}{value:10.5f}")
        numbers = f"{found['top1']:.2f},{found['top5']:.2f},{found['loss']:.4f},{value:.5f}"
        rows.append(f"{level},{numbers},{len(data.test_images)}")
    if arguments.out:
        atomic_write(arguments.out, "\n".join([*rows, ""]))


def run_score(arguments: argparse.Namespace) -> None:
    model, _ = load_network(
        _file(arguments.checkpoint) if arguments.checkpoint else shipped(), arguments.variant
    )
    for level in arguments.opt_level:
        scored = score(model, level)
        if arguments.layers:
            print(scored.layers.to_string(index=False))
        print(f"{level}\n{scored}")


def run_pack(arguments: argparse.Namespace) -> None:
    _check_can_hold(arguments.out)
    path = _file(arguments.checkpoint)
    model, info = load_network(path, arguments.variant)
    kept = {"merge": not arguments.no_merge, "provenance": provenance_of(path, info)}
    if arguments.provenance:
        kept["provenance"] = read_json(arguments.provenance, "correct it")
    if arguments.data:  # first, so that data of no use leave the file that is there
        with tempfile.TemporaryDirectory() as scratch:
            pack(model, Path(scratch, "packed.safetensors"), **kept)
            packed = unpack(Path(scratch, "packed.safetensors"), "O0")
        data = _test_data(arguments, packed)
        found = evaluate(packed, data.test_images, data.test_labels, "O3")
        accuracy = {"level": "O3", "images": len(data.test_images), "fingerprint": data.fingerprint}
        accuracy |= {name: round(value, 4) for name, value in found.items()}
        kept["accuracy"] = accuracy
        print(f"O3: top-1 {found['top1']:.2f} %, top-5 {found['top5']:.2f} %, loss {found['loss']:.4f}")
    pack(model, arguments.out, **kept)
    size, counted = arguments.out.stat().st_size, 4 * score(model, "O3").params
    print(f"{arguments.out}: {size:,} bytes, {size / counted:.4f} x the {counted:,.0f} that the score counts")


def _file(path: Path) -> Path:
    return path / CHECKPOINT if os.path.isdir(path) else path


def _check_can_hold(out: Path) -> None:
    if not out.parent.is_dir():  # before minutes of measuring
        raise StudyError(f"cannot write {out}: {out.parent} is no folder; make it, or choose another")


def _test_data(arguments: argparse.Namespace, model):
    """The data that a network is tested on; the network is on its device afterwards."""
    model.to(resolve_device(arguments.device))
    data = load_data(arguments.data, limit=arguments.limit)
    classes = model.config["num_classes"]
    if data.num_classes != classes:
        raise StudyError(
            f"the data have {data.num_classes} classes, the network {classes}; give the data of its training"
        )
    return data


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
    if rank():
        return
    measured = ", ".join(f"{name} {value:.2f}" for name, value in result.metrics.items())
    print(f"{result.checkpoint}: {measured}")


if __name__ == "__main__":
    sys.exit(main())
