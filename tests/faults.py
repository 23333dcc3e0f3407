"""Break the study on purpose and count what survives: ``make faults``, or ``python tests/faults.py --help``.

A small run of the smoke profile, training and pruning, is killed at random moments and started again by
the same command; every file that the study reads is damaged, and made anew with a right digest; crafted
pickles are opened; commands and `make` get hostile values and names; pages of hostile notebooks are opened in
a browser; small file systems are filled.
Survived means: the same bits as a run never disturbed, or one line of error in time and in little memory.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import dataclasses
import functools
import io
import json
import math
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import zipfile
from collections.abc import Callable
from pathlib import Path

import safetensors.torch
import torch
from PIL import Image

import msunet_core.__main__
from msunet_core import (
    ImageData,
    StageConfig,
    StudyError,
    build_msunet,
    load_checkpoint,
    load_data,
    load_profile,
    pack,
    prune,
    unpack,
)
from msunet_core.data.sources import save_npz
from msunet_core.measure import packed_format
from msunet_core.model import checkpoint
from msunet_core.model.checkpoint import PREVIOUS, read_checkpoint
from msunet_core.training.stages import CHECKPOINT

AT_ONCE = 2  # processes; each computes in one thread
MEMORY = 3 * 2**30  # bytes that a process which opens damaged files may map beyond what it has
GROWTH = 700 * 2**20  # bytes that its resident size may grow by: twice the largest file accepted, and room
# More is a hang: seconds of computing that one file may take, and by the clock, which others' work stretches.
SECONDS, PATIENCE = 20, 400
CLOCKS = (
    (signal.SIGPROF, signal.ITIMER_PROF, SECONDS),
    (signal.SIGALRM, signal.ITIMER_REAL, PATIENCE),
)
SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER of <linux/prctl.h>
STAGES = ("train", "prune")
PARTS = ("kills", "files", "values", "pages", "disks")
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
    hangs: int = 0
    undetectable: int = 0
    megabytes: int = 0
    note: str = ""

    def bad(self) -> int:
        return self.lost + self.executed + self.tracebacks + self.hangs


# --- killed runs ------------------------------------------------------------------------------------------


def commands(folder: Path, data: Path, stages=STAGES) -> list[list[str]]:
    """Training, then pruning, as somebody would type it after ``python -m msunet_core``."""
    common = ["--profile", "smoke", "--data", str(data), "--device", "cpu"]
    first, later = str(folder / "train"), str(folder / "prune")
    lines = {
        "train": ["train", *common, "--out", first, "--set", *SHORT],
        "prune": ["prune", *common, "--checkpoint", first, "--out", later, "--set", *SHORT],
    }
    return [lines[stage] for stage in stages]


def fork(work: Callable[[], int], output: int) -> int:
    """Start a function in a fork of this process, its output and errors in a file; its pid.

    What is tried here is tried in forks: importing PyTorch each time would take longer than all the rest.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    if child := os.fork():
        return child
    status = 1
    try:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for stream in (1, 2):
            os.dup2(output, stream)
        status = work() or 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def ended(child: int, due: Callable[[float], bool], pause: float = 0.01) -> tuple[int, bool]:
    """Wait for a fork; its status, and whether it and its children were killed as ``due(seconds)`` said."""
    began = time.monotonic()
    while True:
        there, status = os.waitpid(child, os.WNOHANG)
        if there:
            return os.waitstatus_to_exitcode(status), False
        if due(time.monotonic() - began):
            os.killpg(child, signal.SIGKILL)
            status = os.waitpid(child, 0)[1]
            with contextlib.suppress(ChildProcessError):  # its children are ours now, and hold its locks yet
                while True:
                    os.waitpid(-child, 0)
            return os.waitstatus_to_exitcode(status), True
        time.sleep(pause)


def run(
    lines: list[list[str]], folder: Path, kill: Callable[[Path, float], bool] | None = None
) -> tuple[int, str]:
    """Run commands until one fails or ``kill(folder, seconds)`` says so; their status and output."""

    def work() -> int:
        os.setsid()
        for line in lines:
            status, _ = ended(
                fork(lambda line=line: msunet_core.__main__.main(line), 1), lambda seconds: False
            )
            if status:
                break
        return status

    with tempfile.TemporaryFile() as output:
        child = fork(work, output.fileno())
        due = (lambda seconds: kill(folder, computed(child))) if kill else (lambda seconds: seconds > 4000)
        status, _ = ended(child, due, 0.002 if kill else 0.02)
        output.seek(0)
        return status, output.read().decode(errors="replace")


def computed(process: int) -> float:
    """Seconds that a process and its children have computed so far: no load of the machine changes them."""
    try:
        ticks = sum(map(int, Path(f"/proc/{process}/stat").read_text().rpartition(") ")[2].split()[11:15]))
        children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    except OSError:  # it has just ended
        return 0.0
    return ticks / os.sysconf("SC_CLK_TCK") + sum(computed(int(child)) for child in children)


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


def undisturbed(scratch: Path, data: Path, stages=STAGES) -> float:
    """The run that all others must equal, in ``scratch/whole``; how many seconds it computes."""
    began = os.times()
    status, output = run(commands(scratch / "whole", data, stages), scratch / "whole")
    if status != 0:
        raise SystemExit(f"the undisturbed run failed:\n{output}")
    now = os.times()
    return now.children_user + now.children_system - began.children_user - began.children_system


def try_kills(count: int, seed: int, scratch: Path, data: Path, duration: float, stages=STAGES) -> list[Row]:
    draw = random.Random(seed)
    expected = contents(scratch / "whole", stages)
    print(f"seed {seed}; the undisturbed run computes for {duration:.1f} s", flush=True)
    rows = {
        "time": Row("SIGKILL at a random moment"),
        "write": Row("SIGKILL while a checkpoint is written"),
    }

    # Spread over the whole run: one moment in each of so many equal parts of it.
    writing = max(1, count // 5)
    timed = count - writing
    plans = [("time", duration * (part + draw.random()) / timed) for part in range(timed)]
    plans += [("write", 1 + part % (5 if len(stages) > 1 else 3)) for part in range(writing)]
    for number, (kind, moment) in enumerate(plans):
        folder = scratch / f"kill{number}"
        kill = after(moment) if kind == "time" else at_write(int(moment))
        status, first = run(commands(folder, data, stages), folder, kill)
        log = {stage: (folder / stage / "log.txt") for stage in STAGES}
        reached = sum(path.read_text().count(": epoch ") for path in log.values() if path.exists())
        again, second = run(commands(folder, data, stages), folder)
        row = rows[kind]
        if status >= 0:
            row.note = f"{int((row.note or '0').split()[0]) + 1} of them had ended before"
        row.tried += 1
        row.tracebacks += "Traceback" in first + second
        same = again == 0 and contents(folder, stages) == expected
        row.survived += same
        row.lost += not same
        name = f"{moment:5.2f} s" if kind == "time" else f"write {moment:.0f}"
        how = "killed" if status < 0 else "had ended"
        print(
            f"  kill {number:3d} at {name}: {how} after {reached} epochs, {'same' if same else 'LOST'}",
            flush=True,
        )
        if not same:
            print(second)
        shutil.rmtree(folder)
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
    size = min(draw.choice((64, 512, 4096)), len(content) // 4)
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


def packed_of(path: Path) -> dict[str, torch.Tensor]:
    return unpack(path).state_dict()


def images_of(path: Path) -> dict[str, torch.Tensor]:
    data = load_data(path)
    names = torch.frombuffer(bytearray("\0".join(data.class_names).encode()), dtype=torch.uint8)
    arrays = ("train_images", "train_labels", "test_images", "test_labels")
    return {"class_names": names} | {name: getattr(data, name) for name in arrays}


def folder_of(path: Path) -> dict[str, torch.Tensor]:
    """The data folder that a damaged picture lies in."""
    return images_of(path.parents[2])


def profile_of(path: Path) -> dict[str, torch.Tensor]:
    return {repr(load_profile(str(path))): torch.zeros(0)}


def overridden(path: Path) -> dict[str, torch.Tensor]:
    """A profile with a value of --set: a line of the file."""
    return {
        repr(load_profile(overrides=[path.read_bytes().decode(errors="surrogateescape")])): torch.zeros(0)
    }


def resumed(path: Path) -> dict[str, torch.Tensor]:
    """The pruning stage that a checkpoint is of, gone on with to its end."""
    model = prune(*small_pruning(), path.parent, device="cpu", progress=False).model
    return model.state_dict()


def small_pruning() -> tuple:
    """Arguments of a stage of two steps an epoch."""
    config = StageConfig(
        epochs=2, batch_size=4, pruner="V3", opt_level="O2", freeze_ternary=True, warmup_epochs=0, lr=0.01
    )
    draw = torch.Generator().manual_seed(0)
    pictures = torch.randint(0, 256, (8, 32, 32, 3), generator=draw, dtype=torch.uint8)
    labels = torch.arange(8) % 2
    data = ImageData(pictures, labels, pictures, labels, class_names=("a", "b"), source="faults")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build_msunet("v3", num_classes=2, width=0.0625), data, config


def half_pruned(folder: Path) -> Path:
    """A checkpoint in the middle of an epoch."""

    def stop(done: int, total: int, text: str) -> None:
        if done == 3:
            os.kill(os.getpid(), signal.SIGINT)

    def work() -> int:
        os.setsid()
        with contextlib.suppress(KeyboardInterrupt):
            prune(*small_pruning(), folder, device="cpu", progress=stop)
            return 1  # it should have been stopped
        return 0

    # In a fork, since autograd's threads do not live on in the forks of a process that has trained.
    status, _ = ended(fork(work, sys.stderr.fileno()), lambda seconds: seconds > PATIENCE)
    if status:
        raise SystemExit("the stage that was to be stopped ended or failed")
    return folder / CHECKPOINT


ODD = (
    -3, 0, 2**31, 10**9, 10**30, -1.5, 1e308, 1e-308, math.nan, math.inf, True, None, "", "x", "\x1b[31m",
    [], {}, [[]], {"a": 1}, [1, "x"], "9" * 5000,
)  # fmt: skip


def other_json(draw: random.Random, tree: object) -> None:
    """Change one thing somewhere in a JSON tree."""
    while isinstance(tree, dict | list) and tree:
        key = draw.choice(list(tree) if isinstance(tree, dict) else range(len(tree)))
        if isinstance(tree[key], dict | list) and tree[key] and draw.random() < 0.8:
            tree = tree[key]
            continue
        if draw.random() < 0.2:
            del tree[key]
        else:
            tree[key] = draw.choice(ODD)
        return


def other_tensor(draw: random.Random, tensors: dict[str, torch.Tensor]) -> None:
    name = draw.choice(sorted(tensors))
    tensor = tensors[name]
    kind = draw.randrange(8)
    if kind == 0:
        del tensors[name]
    elif kind == 1:
        tensors[f"{name}x"] = tensor.clone()
    elif kind == 2:
        tensors[name] = tensor.reshape(-1)[: draw.choice((0, 1, 3))].clone()
    elif kind == 3:
        tensors[name] = tensor.unsqueeze(0).clone()
    elif kind == 4:
        tensors[name] = tensor.to(draw.choice((torch.float16, torch.float64, torch.int32, torch.bool)))
    else:
        odd = draw.choice((math.nan, math.inf, -1.0, 1e30))
        tensors[name] = torch.full_like(tensor, odd if tensor.is_floating_point() else -1)


def own_made_anew(draw: random.Random, content: bytes) -> tuple[str, bytes]:
    """Another checkpoint of the study's own with a right digest."""
    metadata = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]
    tensors, info = safetensors.torch.load(content), json.loads(metadata["study"])
    if draw.random() < 0.6:
        other_json(draw, info)
    else:
        other_tensor(draw, tensors)
    text = json.dumps(info)
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    digest = checkpoint.digest_of(text, tensors)
    return "made anew", safetensors.torch.save(tensors, {"study": text, "digest": digest})


def packed_made_anew(draw: random.Random, content: bytes) -> tuple[str, bytes]:
    """Another packed file with a right digest."""
    kind, damaged = mutate(draw, content)
    place = packed_format.DIGEST_AT
    digest = packed_format.digest_of(damaged)
    return f"{kind}, made anew", damaged[: place.start] + digest + damaged[place.stop :]


def zip_made_anew(draw: random.Random, content: bytes) -> tuple[str, bytes]:
    """Another archive, one member of it damaged, with right checksums."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    name = draw.choice(sorted(name for name in members if members[name]))
    kind, members[name] = mutate(draw, members[name])
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        for name, member in members.items():
            archive.writestr(zipfile.ZipInfo(name), member)
    return f"{kind}, made anew", made.getvalue()


PIECES = (
    "!!timestamp x", "!!int ''", "!!python/name:os.system", "&a ", "*a", "{", "}", "[", "]", ": ", ", ", "- ",
    "? ", "<<: ", "9" * 400, "0x", "1:2:3", ".inf", ".nan", "2020-01-01", "~", "'", '"', "|", ">", "#", "%",
    "@", "`", "\t", "\n", "\0", "\x1b", "é", "train", "epochs", "seed", "=", ".", "true", "3", "-1", "1e9",
)  # fmt: skip


def other_text(draw: random.Random, content: bytes) -> tuple[str, bytes]:
    """A text with pieces of YAML put in, or one of nothing else."""
    text = (
        content.decode(errors="replace") if draw.random() < 0.7 else draw.choice(("train.epochs=", "seed: "))
    )
    for _ in range(draw.randrange(1, 6)):
        place = draw.randrange(len(text) + 1)
        piece = draw.choice(PIECES) * draw.choice((1, 1, 1, 2, 50, 2000))
        text = text[:place] + piece + text[place + draw.choice((0, 0, 3)) :]
    return "pieces", text.encode()


# By kind of file: how it is opened, how it is damaged, and whether other content in it can be told.
READERS = {
    "own checkpoint": (state_of, mutate, True),
    "own checkpoint, right digest": (state_of, own_made_anew, False),
    "resumed checkpoint, right digest": (resumed, own_made_anew, False),
    "published checkpoint, zip": (state_of, mutate, True),
    "published checkpoint, zip, right checksums": (state_of, zip_made_anew, False),
    "published checkpoint, legacy": (state_of, mutate, False),
    "packed file": (packed_of, mutate, True),
    "packed file, right digest": (packed_of, packed_made_anew, False),
    "data .npz": (images_of, mutate, True),
    "data .npz, right checksums": (images_of, zip_made_anew, False),
    "PNG in a folder": (folder_of, mutate, True),
    "YAML profile": (profile_of, other_text, False),
    "value of --set": (overridden, other_text, False),
}


class Hang(BaseException):
    """A file took longer than it may."""


def ring(*_) -> None:
    raise Hang


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def verdict(load: Callable[[Path], dict], path: Path, expected: dict) -> str:
    """What came of opening a file: "refused", "same", "other" content, "hang", or how it failed."""
    for number, timer, seconds in CLOCKS:
        signal.signal(number, ring)
        signal.setitimer(timer, seconds)
    try:
        found = load(path)
    except StudyError as error:
        return "refused" if 0 < len(str(error)) <= 300 and str(error).isprintable() else "not one line"
    except Hang:
        return "hang"
    except BaseException as error:
        return f"traceback: {type(error).__name__}: {error}"
    finally:
        for _, timer, _ in CLOCKS:
            signal.setitimer(timer, 0)
    return "same" if same(found, expected) else "other"


def open_damaged(kind: str, path: Path, count: int, seed: int) -> dict:
    """In a fork with little memory: damage one file ``count`` times and open each copy."""
    load, damage, telling = READERS[kind]
    draw, original = random.Random(f"{seed} {kind}"), path.read_bytes()
    spare = Path(tempfile.mkdtemp(prefix="faults-")) / "as it was"
    if load is resumed:
        shutil.copytree(path.parent, spare)
    expected = load(path)
    limit_memory()
    tally: dict[str, int] = {}
    with contextlib.redirect_stderr(io.StringIO()):  # a stage that goes on may say so
        for _ in range(count):
            how, damaged = damage(draw, original)
            if load is resumed:
                shutil.rmtree(path.parent)
                shutil.copytree(spare, path.parent)
                path.with_name(CHECKPOINT + PREVIOUS).unlink(missing_ok=True)
            path.write_bytes(damaged)
            found = verdict(load, path, expected)
            tally[found] = tally.get(found, 0) + 1
            if found not in ("refused", "same") and (found != "other" or telling):
                print(f"  {kind}, {how}: {found[:200]!r}", file=sys.__stderr__)
    shutil.rmtree(spare.parent)
    return tally


def limit_memory() -> None:
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + MEMORY, mapped + MEMORY))


def peak_memory() -> int:
    """Bytes that this process ever held. Not getrusage: there a child counts with its parent's memory."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


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


def in_forks(tasks: list[Callable[[], dict]], seconds: int = 3600) -> list[dict]:
    """What functions return, each in a fork of its own, some at once; how a fork ended if not well.

    ``grown`` is by how many bytes it grew, unless the function says so itself.
    """
    with contextlib.ExitStack() as files:
        answers = [files.enter_context(tempfile.TemporaryFile("w+")) for _ in tasks]

        def call(task: Callable[[], dict], answer) -> int:
            os.setsid()
            before = peak_memory()
            found = task()
            json.dump({"grown": peak_memory() - before} | found, answer)
            answer.flush()
            return 0

        def lane(first: int) -> int:
            for task, answer in list(zip(tasks, answers, strict=True))[first::AT_ONCE]:
                child = fork(functools.partial(call, task, answer), 1)
                status, hung = ended(child, lambda passed: passed > seconds, 0.05)
                if hung or status:
                    how = "hang" if hung else f"the process ended with status {status}"
                    answer.write(json.dumps({how: 1}))
                    answer.flush()
            return 0

        for child in [fork(functools.partial(lane, first), 1) for first in range(AT_ONCE)]:
            ended(child, lambda passed: False, 0.05)
        for answer in answers:
            answer.seek(0)
        return [json.loads(answer.read()) for answer in answers]


def prepared(files: Path, own: Path, data: Path) -> dict[str, Path]:
    """A good file of each kind, each in a folder of its own."""
    state = build_msunet("v3").state_dict()
    sgd = {"state": {0: {"momentum_buffer": torch.zeros(3)}}, "param_groups": [{"lr": 0.1}]}
    content = {"epoch": 3, "arch": "msunet", "state_dict": state, "optimizer": sgd, "metric": 80.13}
    content["args"] = argparse.Namespace(lr=0.1, model="msunet")
    names = {
        "published checkpoint, zip": "zip.pth.tar",
        "published checkpoint, zip, right checksums": "zip.pth.tar",
        "published checkpoint, legacy": "legacy.pth.tar",
        "data .npz": "images.npz",
        "data .npz, right checksums": "images.npz",
        "YAML profile": "own.yaml",
        "PNG in a folder": "train/a/0.png",
    }
    paths = {}
    for number, kind in enumerate(READERS):
        paths[kind] = path = files / str(number) / names.get(kind, "a.safetensors")
        if not kind.startswith("resumed"):
            path.parent.mkdir(parents=True)
        if kind.startswith("own"):
            shutil.copy(own, path)
        elif kind.startswith("resumed"):
            paths[kind] = half_pruned(files / str(number))
        elif kind.startswith("packed"):
            pack(load_checkpoint(own)[0], path)
        elif kind.startswith("published"):
            torch.save(content, path, _use_new_zipfile_serialization="zip" in kind)
        elif kind.startswith("data"):
            shutil.copy(data, path)
        elif kind == "PNG in a folder":
            for split in ("train", "test"):
                for name in "ab":
                    picture = files / str(number) / split / name / "0.png"
                    picture.parent.mkdir(parents=True, exist_ok=True)
                    Image.effect_noise((32, 32), 50).convert("RGB").save(picture)
        else:
            path.write_text("train.epochs=3" if "set" in kind else "seed: 3\ntrain: {epochs: 3}\n")
    return paths


def try_files(count: int, seed: int, scratch: Path, own: Path, data: Path) -> list[Row]:
    paths = prepared(scratch / "files", own, data)
    share = max(1, count // len(paths))
    rows = []
    folder = scratch / "crafted"
    folder.mkdir()
    tasks = [functools.partial(open_damaged, kind, paths[kind], share, seed) for kind in paths]
    *tallies, crafted = in_forks([*tasks, functools.partial(open_crafted, folder)])
    for kind, tally in zip(paths, tallies, strict=True):
        row = Row(f"damaged {kind}", tried=share)
        grown = tally.pop("grown", 0)
        row.megabytes = grown >> 20
        row.hangs = tally.pop("hang", 0)
        row.survived = tally.pop("refused", 0) + (unharmed := tally.pop("same", 0))
        other = tally.pop("other", 0)
        row.note = f"{unharmed} without effect on the content"
        if READERS[kind][2]:
            row.lost += other
        else:
            row.undetectable = other
            row.note += "; what is other here is just other content" if other else ""
        if grown > GROWTH:
            row.lost += 1
            row.note += "; too much memory"
        row.tracebacks += sum(tally.values())
        rows.append(row)
    row = Row("crafted pickle", executed=crafted.pop("executed", 0), hangs=crafted.pop("hang", 0))
    row.megabytes = crafted.pop("grown", 0) >> 20
    row.tried, row.survived = sum(crafted.values()), crafted.pop("refused", 0)
    row.tracebacks = sum(crafted.values())
    return [*rows, row]


# --- hostile names and values -----------------------------------------------------------------------------

# Each would do something, or break, in a shell, in make's own language or in a rule of its.
HOSTILE = (
    "a b", "100%", "a(b)", "it's", 'say "a"', "x`touch pwned`", "x`touch${IFS}pwned`", "$(touch pwned)",
    "$(shell touch pwned)", "${shell touch pwned}", "$$(touch pwned)", "a&touch pwned&", "cat;touch pwned;#",
    ">pwned", "a|touch pwned", "a:b", "a\\", "a#b", "-rf", "*", "~", "=", "a\ntouch pwned", "$(error no)",
    "{a,b}", "%.npz", "a,b", "(", ")", "$", "$(", "é\x1b[31m", "!!", "?",
    "$(eval x:;touch pwned)", "'`touch pwned`'",
)  # fmt: skip
STAND_IN = '#!/bin/sh\n[ "$1" = -c ] || printf "%s\\n" "$*" >> ran\n'


def call(command: list[str], folder: Path, **environment: str) -> tuple[int | None, str]:
    """Exit status (None: it hung) and output of a command."""
    kept = {
        n: v for n, v in os.environ.items() if not n.startswith(("MAKE", "MFLAGS", "STUDY_", "VIRTUAL_ENV"))
    }
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            env={**kept, **environment},
            capture_output=True,
            timeout=PATIENCE,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return None, ""
    return done.returncode, (done.stdout + done.stderr).decode(errors="replace")


def try_make(count: int, seed: int, scratch: Path) -> Row:
    """`make` with hostile values and between files of hostile names; a stand-in of Python trains nothing."""
    folder, row, draw = scratch / "make", Row("hostile value or name for make"), random.Random(seed)
    for place in ("", "notebooks", "msunet_core/study/profiles", "data/train", "runs/smoke"):
        (folder / place).mkdir(parents=True, exist_ok=True)
        for name in HOSTILE:
            if "/" not in name:
                (folder / place / f"{name}.yaml").touch()
    root = Path(__file__).parent.parent
    shutil.copy(root / "Makefile", folder)
    shutil.copy(root / "msunet_core/errors.py", folder / "msunet_core")
    for name in ("requirements.txt", "pyproject.toml"):
        (folder / name).touch()
    (folder / "python").write_text(STAND_IN)
    (folder / "python").chmod(0o755)
    before = sorted(os.listdir(folder))
    names = ("DATA", "RUN", "PROFILE", "SET", "CHECKPOINT", "OUT", "DEVICE", "BENCH", "MSUNET_RUNS")
    asked = [(name, value) for name in names for value in HOSTILE]
    for name, value in draw.sample(asked, min(count, len(asked))):
        for target in ("help", "reproduce", "score", "bench", "clean"):
            row.tried += 1
            status, output = call(["make", target, f"{name}={value}"], folder, PYTHON="./python")
            (folder / "ran").unlink(missing_ok=True)
            row.hangs += status is None
            row.executed += (ran := sorted(os.listdir(folder)) != before)
            row.tracebacks += "Traceback" in output
            # Only clean looks at a value by itself; others hand it on, or refuse what they would ignore.
            refused = f"make {target} takes no {name}; leave it out" in output
            row.lost += (told := target != "clean" and not refused and status not in (0, None))
            row.survived += not (ran or told or status is None)
            if ran or told:
                print(f"  make {target} {name}={value!r}: {status} {output[-200:]!r}", flush=True)
                (folder / "pwned").unlink(missing_ok=True)
    return row


def try_commands(count: int, seed: int, scratch: Path, data: Path) -> Row:
    """The command line with hostile values: a status other than 0 and one line, or done."""
    row, draw = Row("hostile value on the command line"), random.Random(seed)
    odd = (
        *HOSTILE,
        "",
        "/dev/zero",
        "meta",
        "cuda:99",
        "9" * 5000,
        "-1",
        "1e99",
        "nan",
        "\x1b[2J",
        "a" * 3000,
    )
    lines = [
        *(
            ["data", f"--{name}={value}"]
            for name in ("data", "limit", "seed", "device", "variant")
            for value in odd
        ),
        *(["score", f"./{value}"] for value in odd),
        *(["train", "--set", f"{value}={value}", "--out", "out"] for value in odd),
        *(["train", f"--device={value}", f"--data={data}", "--limit=1", "--out", "out"] for value in odd),
        *(["score", f"--opt-level={value}"] for value in odd),
    ]
    folder = scratch / "commands"
    folder.mkdir()
    asked = [[part.replace("\0", "") for part in line] for line in draw.sample(lines, min(count, len(lines)))]
    (folder / "asked.json").write_text(json.dumps(asked))
    [tally] = in_forks([functools.partial(run_commands, folder)])
    row.megabytes = (grown := tally.pop("grown", 0)) >> 20
    row.tried, row.survived, row.hangs = len(asked), tally.pop("fine", 0), tally.pop("hang", 0)
    row.lost = tally.pop("not so", 0) + (grown > GROWTH)
    row.tracebacks = sum(tally.values())
    row.executed = int((folder / "pwned").exists())
    return row


def run_commands(folder: Path) -> dict:
    """In a process: each command of asked.json, as ``python -m msunet_core`` runs it, in little memory."""
    tally = {"grown": 0}
    for line in json.loads((folder / "asked.json").read_text()):
        status, output, grown = forked(line, folder)
        said = output.rstrip("\n")
        refused = status == 2 and said.startswith("error: ") and said.isprintable() and len(said) <= 310
        found = "fine" if status == 0 or refused else "traceback" if "Traceback" in output else "not so"
        found = "hang" if status is None else found
        tally[found] = tally.get(found, 0) + 1
        tally["grown"] = max(tally["grown"], grown)
        if found != "fine":
            print(f"  {line}: {status} {output[-300:]!r}"[:600], file=sys.stderr)
    return tally


def forked(line: list[str], folder: Path) -> tuple[int | None, str, int]:
    """Status (None: it hung), output and growth in memory of a command."""
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile("w+", buffering=1) as memory:

        def work() -> int:
            os.setsid()
            os.chdir(folder)
            before = peak_memory()
            limit_memory()
            try:
                return msunet_core.__main__.main(line)
            finally:
                print(peak_memory() - before, file=memory)

        status, hung = ended(fork(work, output.fileno()), lambda seconds: seconds > PATIENCE)
        for file in (output, memory):
            file.seek(0)
        return None if hung else status, output.read().decode(errors="replace"), int(memory.read() or 0)


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
            status, output = run(commands(disk, data, ("train",)), disk)
            row.tracebacks += "Traceback" in output
            last = (output.splitlines() or [""])[-1]
            told = status == 2 and last.startswith("error: cannot write") and "space" in last
            print(f"  {room} bytes: {last}", flush=True)
            subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
            again, output = run(commands(disk, data, ("train",)), disk)
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
            gone = folder.rename(folder.with_name("removed"))  # at once: a file may be written meanwhile
            shutil.rmtree(gone, ignore_errors=True)
        return False

    status, output = run(commands(folder, data, ("train",)), folder, remove_it)
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
    join = {"megabytes": max}
    total = ["all", *(str(join.get(n, sum)(getattr(row, n) for row in rows)) for n in names[1:-1]), ""]
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
    parser.add_argument("--files", type=int, help="how many damaged files to open (default 3900; quick 130)")
    parser.add_argument("--seed", type=int, default=0, help="of every random choice here")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="these parts; else all")
    parser.add_argument("--quick", action="store_true", help="a short version: training alone, no disks")
    arguments = parser.parse_args()
    ctypes.CDLL(None).prctl(SUBREAPER, 1)  # whose parent was killed becomes a child of this process
    torch.set_num_threads(1)
    torch.manual_seed(arguments.seed)
    kills = arguments.kills if arguments.kills is not None else (2 if arguments.quick else 30)
    files = arguments.files if arguments.files is not None else (130 if arguments.quick else 3900)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        scratch = Path(folder)
        data = scratch / "images.npz"
        save_npz(load_data("synthetic", limit=2), data)
        stages, rows = STAGES[:1] if arguments.quick else STAGES, []
        parts = {*arguments.only} - ({"disks"} if arguments.quick else set())
        if parts & {"kills", "files", "disks"}:
            duration = undisturbed(scratch, data, stages)
        for part in (part for part in PARTS if part in parts):
            print(f"--- {part}", flush=True)
            if part == "kills":
                new = try_kills(kills, arguments.seed, scratch, data, duration, stages)
            elif part == "files":
                own = scratch / "whole" / stages[-1] / CHECKPOINT
                new = try_files(files, arguments.seed, scratch, own, data)
            elif part == "values":
                new = [try_make(3 if arguments.quick else 1000, arguments.seed, scratch)]
                new.append(try_commands(20 if arguments.quick else 1000, arguments.seed, scratch, data))
            elif part == "pages":
                from faults_pages import try_pages  # what makes pages is large

                new = [Row("hostile text on a page", **try_pages(scratch, arguments.quick))]
            else:
                new = try_disks(scratch, data, scratch / "whole" / "train" / CHECKPOINT)
                new.append(try_vanishing(scratch, data))
            print(table(new), flush=True)
            rows += new
    print(f"\n{table(rows)}\n{time.monotonic() - began:.0f} s, seed {arguments.seed}")
    return 1 if any(row.bad() for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
