"""Break the study on purpose and count what survives: ``make faults``, or ``python tests/faults.py --help``.

A small run of the smoke profile, training and pruning, is killed at random moments and started again by
the same command; checkpoints and data files are damaged; crafted pickles are opened; small file systems
are filled. Survived means: the same bits as a run never disturbed, or one line of error.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import io
import json
import os
import pickle
import random
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from msunet_core import StudyError, build_msunet, load_checkpoint, load_data
from msunet_core.data.sources import save_npz
from msunet_core.model.checkpoint import read_checkpoint
from msunet_core.training.stages import CHECKPOINT

AT_ONCE = 2  # processes; each computes in one thread
MEMORY = 3 * 2**30  # bytes that a process which opens damaged files may map beyond what it has
GROWTH = 700 * 2**20  # bytes that its resident size may grow by: twice the largest file accepted, and room
STAGES = ("train", "prune")
# The smoke profile, narrower and with fewer images: 30 steps and 5 checkpoints in some seconds.
SHORT = [
    "network.width=0.0625",
    "train.epochs=3",
    "train.warmup_epochs=1",
    "train.alpha_start=1",
    "train.alpha_end=3",
    "train.batch_size=32",
    "prune.epochs=2",
    "prune.batch_size=32",
]


@dataclasses.dataclass
class Row:
    """A line of the table."""

    fault: str
    tried: int = 0
    survived: int = 0
    lost: int = 0
    executed: int = 0
    tracebacks: int = 0
    undetectable: int = 0
    note: str = ""

    def bad(self) -> int:
        return self.lost + self.executed + self.tracebacks


# --- killed runs ------------------------------------------------------------------------------------------


def command(folder: Path, data: Path, stages=STAGES) -> str:
    """Training, then pruning, as somebody would type it."""
    python = [sys.executable, "-m", "msunet_core"]
    common = ["--profile", "smoke", "--data", str(data), "--device", "cpu"]
    lines = {
        "train": [*python, "train", *common, "--out", str(folder / "train"), "--set", *SHORT],
        "prune": [
            *python, "prune", *common, "--checkpoint", str(folder / "train"),
            "--out", str(folder / "prune"), "--set", *SHORT,
        ],
    }  # fmt: skip
    return " && ".join(shlex.join(lines[stage]) for stage in stages)


def run(line: str, folder: Path, kill: Callable[[Path, float], bool] | None = None) -> tuple[int, str]:
    """Run a command until it ends or ``kill(folder, seconds)`` says so; its status and its output."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            ["bash", "-c", line],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
        began = time.monotonic()
        try:
            while process.poll() is None:
                if kill is not None and kill(folder, time.monotonic() - began):
                    break
                time.sleep(0.0005 if kill else 0.02)
        finally:  # it is due, or somebody stopped this program
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        status = process.wait()
        output.seek(0)
        return status, output.read().decode(errors="replace")


def contents(folder: Path, stages=STAGES) -> dict[str, bytes]:
    """Everything that must come out the same: every tensor, the history, the metrics."""
    found = {}
    for stage in stages:
        tensors, info = read_checkpoint(folder / stage / CHECKPOINT)
        found |= {f"{stage} {name}": tensor.numpy().tobytes() for name, tensor in tensors.items()}
        found[f"{stage} history"] = json.dumps(info["history"]).encode()
        for name in ("history.csv", "metrics.json"):
            found[f"{stage} {name}"] = (folder / stage / name).read_bytes()
    return found


def after(moment: float) -> Callable[[Path, float], bool]:
    return lambda folder, seconds: seconds >= moment


def at_write(number: int) -> Callable[[Path, float], bool]:
    """Kill while the n-th checkpoint is being written: its temporary file is there."""
    seen: set[tuple] = set()

    def due(folder: Path, seconds: float) -> bool:
        for stage in STAGES:
            if (folder / stage).is_dir():
                for entry in os.scandir(folder / stage):
                    if entry.name.startswith(".checkpoint") and ".tmp" in entry.name:
                        # A new one for each epoch: the good checkpoint beside it has changed in between.
                        good = folder / stage / CHECKPOINT
                        seen.add((stage, good.stat().st_ino if good.exists() else 0))
        return len(seen) >= number

    return due


def try_kills(count: int, seed: int, scratch: Path, data: Path, stages=STAGES) -> list[Row]:
    draw = random.Random(seed)
    whole = scratch / "whole"
    began = time.monotonic()
    status, output = run(command(whole, data, stages), whole)
    duration = time.monotonic() - began
    if status != 0:
        raise SystemExit(f"the undisturbed run failed:\n{output}")
    expected = contents(whole, stages)
    print(f"seed {seed}; the undisturbed run takes {duration:.1f} s, {AT_ONCE} at once", flush=True)
    rows = {
        "time": Row("SIGKILL at a random moment"),
        "write": Row("SIGKILL while a checkpoint is written"),
    }

    def one(number: int, kind: str, moment: float) -> None:
        folder = scratch / f"kill{number}"
        kill = after(moment) if kind == "time" else at_write(int(moment))
        status, first = run(command(folder, data, stages), folder, kill)
        log = {stage: (folder / stage / "log.txt") for stage in STAGES}
        reached = sum(path.read_text().count(": epoch ") for path in log.values() if path.exists())
        again, second = run(command(folder, data, stages), folder)
        row = rows[kind]
        row.tried += 1
        row.tracebacks += "Traceback" in first + second
        same = again == 0 and contents(folder, stages) == expected
        row.survived += same
        row.lost += not same
        name = f"{moment:5.2f} s" if kind == "time" else f"write {moment:.0f}"
        ended = "killed" if status < 0 else "had ended"
        print(
            f"  kill {number:3d} at {name}: {ended} after {reached} epochs, {'same' if same else 'LOST'}",
            flush=True,
        )
        if not same:
            print(second)
        shutil.rmtree(folder)

    # Spread over the whole run: one moment in each of so many equal parts of it.
    writing = max(1, count // 5)
    timed = count - writing
    plans = [("time", duration * (part + draw.random()) / timed) for part in range(timed)]
    plans += [("write", 1 + part % (5 if len(stages) > 1 else 3)) for part in range(writing)]
    with concurrent.futures.ThreadPoolExecutor(AT_ONCE) as pool:
        for done in [pool.submit(one, number, *plan) for number, plan in enumerate(plans)]:
            done.result()
    return list(rows.values())


# --- damaged files ----------------------------------------------------------------------------------------


def flip(draw: random.Random, content: bytearray) -> None:
    for _ in range(draw.choice((1, 1, 1, 8))):
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)


def truncate(draw: random.Random, content: bytearray) -> None:
    del content[draw.choice((draw.randrange(len(content)), -draw.randrange(1, 100))) :]


def zero(draw: random.Random, content: bytearray) -> None:
    size = draw.choice((16, 512, 4096))
    place = draw.randrange(len(content))
    content[place : place + size] = bytes(len(content[place : place + size]))


def swap(draw: random.Random, content: bytearray) -> None:
    size = draw.choice((64, 512, 4096))
    one, other = (size * draw.randrange(len(content) // size) for _ in range(2))
    content[one : one + size], content[other : other + size] = (
        content[other : other + size],
        content[one : one + size],
    )


def append(draw: random.Random, content: bytearray) -> None:
    content += draw.randbytes(draw.choice((1, 22, 4096)))


def remove(draw: random.Random, content: bytearray) -> None:
    place = draw.randrange(len(content))
    del content[place : place + draw.choice((1, 8, 512))]


def edit_header(draw: random.Random, content: bytearray) -> None:
    """Other digits and bytes where the formats keep names, sizes and offsets: at both ends."""
    ends = [*range(min(2048, len(content))), *range(max(0, len(content) - 2048), len(content))]
    digits = [place for place in ends if chr(content[place]).isdigit()]
    for _ in range(draw.randrange(1, 4)):
        if digits and draw.random() < 0.5:
            content[draw.choice(digits)] = ord(str(draw.randrange(10)))
        else:
            content[draw.choice(ends)] = draw.choice((0, 1, 0x7F, 0x80, 0xFF, draw.randrange(256)))


MUTATIONS = (flip, truncate, zero, swap, append, remove, edit_header)


def mutate(draw: random.Random, content: bytes) -> tuple[str, bytes]:
    """A damaged copy that differs, and what was done to it."""
    while True:
        mutation, damaged = draw.choice(MUTATIONS), bytearray(content)
        mutation(draw, damaged)
        if damaged != content:
            return mutation.__name__, bytes(damaged)


def state_of(path: Path) -> dict[str, torch.Tensor]:
    return load_checkpoint(path)[0].state_dict()


def images_of(path: Path) -> dict[str, torch.Tensor]:
    data = load_data(path)
    names = torch.frombuffer(bytearray("\0".join(data.class_names).encode()), dtype=torch.uint8)
    arrays = ("train_images", "train_labels", "test_images", "test_labels")
    return {"class_names": names} | {name: getattr(data, name) for name in arrays}


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def verdict(load: Callable[[Path], dict], path: Path, expected: dict) -> str:
    """What came of opening a file: "refused", "same", "other" content, or how it failed."""
    try:
        found = load(path)
    except StudyError as error:
        return "refused" if "\n" not in str(error) and str(error) else "more than one line"
    except BaseException as error:
        return f"traceback: {type(error).__name__}: {error}"
    return "same" if same(found, expected) else "other"


def open_damaged(path: Path, count: int, seed: int) -> dict:
    """In a process with little memory: damage one file ``count`` times and open each copy."""
    load = images_of if path.suffix == ".npz" else state_of
    draw, original = random.Random(f"{seed} {path.name}"), path.read_bytes()
    expected = load(path)
    limit_memory()
    tally: dict[str, int] = {}
    copy = path.with_name(f"damaged-{path.name}")
    for _ in range(count):
        kind, damaged = mutate(draw, original)
        copy.write_bytes(damaged)
        found = verdict(load, copy, expected)
        tally[found] = tally.get(found, 0) + 1
        if found not in ("refused", "same") and not (found == "other" and "legacy" in path.name):
            print(f"  {path.name}, {kind}: {found}", file=sys.stderr)
    return tally


def limit_memory() -> None:
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + MEMORY, mapped + MEMORY))


class Call:
    """Pickles as a call of any function."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


def write_crafted(folder: Path) -> list[Path]:
    """Hostile checkpoints; what runs when one is opened leaves a file ``ran-...`` behind."""
    weights = build_msunet("v3").state_dict()
    paths = []
    for number, (where, zipped) in enumerate(
        (where, zipped)
        for where in ("args", "state_dict", "epoch", "bare", "Namespace", "eval")
        for zipped in (1, 0)
    ):
        marker = folder / f"ran-{number}"
        nasty = Call(os.system, f"touch {marker}")
        content = {"state_dict": dict(weights), "epoch": 3}
        if where == "state_dict":
            content["state_dict"]["conv_stem.weight"] = nasty
        elif where == "Namespace":
            content["args"] = argparse.Namespace(a=[argparse.Namespace(b={"c": nasty})])
        elif where == "eval":
            content["args"] = Call(eval, f"open({str(marker)!r}, 'w')")
        else:
            content[where] = nasty
        path = folder / f"crafted-{number}.pth.tar"
        torch.save(nasty if where == "bare" else content, path, _use_new_zipfile_serialization=bool(zipped))
        paths.append(path)
    for protocol in range(6):
        path = folder / f"crafted-protocol{protocol}.pth.tar"
        path.write_bytes(pickle.dumps(Call(os.system, f"touch {folder}/ran-p{protocol}"), protocol))
        paths.append(path)
    return paths


def open_crafted(folder: Path) -> dict:
    paths = write_crafted(folder)
    limit_memory()
    tally: dict[str, int] = {}
    for path in paths:
        found = verdict(state_of, path, {})
        tally[found] = tally.get(found, 0) + 1
    return tally | {"executed": len(list(folder.glob("ran-*")))}


def in_a_process(*arguments) -> dict:
    """One of the two functions above in a process of its own; how it ended if it did not end well."""
    done = subprocess.run(
        [sys.executable, __file__, "--open", *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    print(done.stderr, end="", flush=True)
    if done.returncode != 0:
        return {f"the process ended with status {done.returncode}": 1}
    return json.loads(done.stdout)


def try_files(count: int, seed: int, scratch: Path, own: Path, data: Path) -> list[Row]:
    files = scratch / "files"
    files.mkdir()
    state = build_msunet("v3").state_dict()
    sgd = {"state": {0: {"momentum_buffer": torch.zeros(3)}}, "param_groups": [{"lr": 0.1}]}
    content = {"epoch": 3, "arch": "msunet", "state_dict": state, "optimizer": sgd, "metric": 80.13}
    content["args"] = argparse.Namespace(lr=0.1, model="msunet")
    paths = {
        "own checkpoint": files / "own.safetensors",
        "published checkpoint, zip": files / "zip.pth.tar",
        "published checkpoint, legacy": files / "legacy.pth.tar",
        "data .npz": files / "images.npz",
    }
    shutil.copy(own, paths["own checkpoint"])
    shutil.copy(data, paths["data .npz"])
    torch.save(content, paths["published checkpoint, zip"])
    torch.save(content, paths["published checkpoint, legacy"], _use_new_zipfile_serialization=False)
    rows = []
    with concurrent.futures.ThreadPoolExecutor(AT_ONCE) as pool:
        shares = [count * (number + 1) // 4 - count * number // 4 for number in range(4)]
        tallies = pool.map(lambda path, share: in_a_process(path, share, seed), paths.values(), shares)
        for name, share, tally in zip(paths, shares, tallies, strict=True):
            row = Row(f"damaged {name}", tried=share)
            peak = tally.pop("grown", 0)
            row.survived = tally.pop("refused", 0) + (unharmed := tally.pop("same", 0))
            other = tally.pop("other", 0)
            row.note = f"{unharmed} without effect on the content"
            if "legacy" in name:
                row.undetectable = other
                row.note += "; this format has no checksum, so other numbers in it are just other numbers"
            else:
                row.lost += other
            if peak > GROWTH:
                row.lost += 1
                row.note += f"; memory grew by {peak >> 20} MB"
            row.tracebacks += sum(tally.values())
            rows.append(row)
    folder = scratch / "crafted"
    folder.mkdir()
    tally = in_a_process(folder)
    row = Row("crafted pickle", executed=tally.pop("executed", 0))
    tally.pop("grown", 0)
    row.tried, row.survived = sum(tally.values()), tally.pop("refused", 0)
    row.tracebacks = sum(tally.values())
    return [*rows, row]


# --- full and vanished disks ------------------------------------------------------------------------------


def try_disks(scratch: Path, data: Path, own: Path) -> list[Row]:
    """Fill a small tmpfs at each of the moments at which a stage writes."""
    row = Row("file system full")
    disk = scratch / "disk"
    disk.mkdir()
    whole = contents(scratch / "whole", ("train",))
    size = own.stat().st_size
    # The log's first line; the first checkpoint; the second; the third, with a previous one kept.
    for share in (0.0, 0.5, 1.5, 2.5):
        room = max(4096, int(share * size))
        mounted = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={room},nr_inodes=64", "tmpfs", str(disk)],
            capture_output=True,
        )
        if mounted.returncode != 0:
            row.note = "skipped: mounting a small file system needs root"
            return [row]
        try:
            if share == 0.0:
                (disk / "filler").write_bytes(bytes(4096))
            row.tried += 1
            status, output = run(command(disk, data, ("train",)), disk)
            row.tracebacks += "Traceback" in output
            last = (output.splitlines() or [""])[-1]
            told = status == 2 and last.startswith("error: cannot write") and "space" in last
            print(f"  {room} bytes: {last}", flush=True)
            subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
            again, output = run(command(disk, data, ("train",)), disk)
            row.tracebacks += "Traceback" in output
            row.survived += (kept := told and again == 0 and contents(disk, ("train",)) == whole)
            row.lost += not kept
        finally:
            subprocess.run(["umount", str(disk)], check=True)
    return [row]


def try_vanishing(scratch: Path, data: Path) -> Row:
    """Remove the run folder once the first epoch is safe."""
    row = Row("run folder removed meanwhile", tried=1)
    folder = scratch / "vanishing"

    def remove_it(folder: Path, seconds: float) -> bool:
        if (folder / "train" / CHECKPOINT).exists():
            shutil.rmtree(folder)
        return False

    status, output = run(command(folder, data, ("train",)), folder, remove_it)
    last = (output.splitlines() or [""])[-1]
    print(f"  {last}", flush=True)
    row.tracebacks += "Traceback" in output
    row.survived += (told := status == 2 and last.startswith("error: cannot write"))
    row.lost += not told
    return row


# --- the program ------------------------------------------------------------------------------------------


def table(rows: list[Row]) -> str:
    names = [field.name for field in dataclasses.fields(Row)]
    lines = [names] + [[str(getattr(row, name)) for name in names] for row in rows]
    total = ["all", *(str(sum(getattr(row, name) for row in rows)) for name in names[1:-1]), ""]
    lines.append(total)
    widths = [max(len(line[column]) for line in lines) for column in range(len(names))]
    text = io.StringIO()
    for line in lines:
        cells = [line[0].ljust(widths[0])] + [
            c.rjust(w) for c, w in zip(line[1:-1], widths[1:-1], strict=True)
        ]
        print("  ".join([*cells, line[-1]]).rstrip(), file=text)
    return text.getvalue()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, help="how many runs to kill (default 30; quick 2)")
    parser.add_argument("--files", type=int, help="how many damaged files to open (default 1000; quick 60)")
    parser.add_argument("--seed", type=int, default=0, help="of every random choice here")
    parser.add_argument("--quick", action="store_true", help="a short version: training alone, no disks")
    parser.add_argument("--open", nargs="+", help=argparse.SUPPRESS)  # the process for damaged files
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(arguments.seed)
    if arguments.open:
        path, *rest = arguments.open
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        found = open_damaged(Path(path), *map(int, rest)) if rest else open_crafted(Path(path))
        found["grown"] = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
        print(json.dumps(found))
        return 0
    kills = arguments.kills if arguments.kills is not None else (2 if arguments.quick else 30)
    files = arguments.files if arguments.files is not None else (60 if arguments.quick else 1000)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        scratch = Path(folder)
        data = scratch / "images.npz"
        save_npz(load_data("synthetic", limit=2), data)
        stages = STAGES[:1] if arguments.quick else STAGES
        rows = try_kills(kills, arguments.seed, scratch, data, stages)
        own = scratch / "whole" / stages[-1] / CHECKPOINT
        print(f"opening {files} damaged files", flush=True)
        rows += try_files(files, arguments.seed, scratch, own, data)
        if not arguments.quick:
            print("filling small file systems, removing a run folder", flush=True)
            rows += try_disks(scratch, data, scratch / "whole" / "train" / CHECKPOINT)
            rows.append(try_vanishing(scratch, data))
    print(f"\n{table(rows)}\n{time.monotonic() - began:.0f} s, seed {arguments.seed}")
    return 1 if any(row.bad() for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
