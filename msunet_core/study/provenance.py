"""How a run was made: command, versions, hardware, commit, memory and time."""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import json
import os
import platform
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from ..errors import StudyError
from ..files import ROOT, atomic_write, read_json
from ..memory import usable_cores
from .profile import profile_of

# Parameters of a run that name a file.
FILES = ("DATA", "PROFILE")
PACKAGES = ("torch", "torchvision", "numpy", "pandas", "matplotlib", "papermill", "ipykernel", "sphinx")


def seed_of(values: Mapping[str, object]) -> object:
    """The seed of the run: that of OVERRIDES, else SEED, else what the profile says."""
    with contextlib.suppress(StudyError):
        return profile_of(values).seed
    return values.get("SEED")


def record(output: Path, began: int, values: Mapping[str, object], peak_memory: int | None) -> None:
    """Merge this notebook's entry into provenance.json of its run folder."""
    path = output.parent / "provenance.json"
    notebooks = _kept(path, "notebooks", {})
    notebooks[output.stem] = {**_sitting(began), "peak_memory_mb": peak_memory and round(peak_memory / 2**20)}
    parts = {"notebooks": dict(sorted(notebooks.items()))}
    about = {"profile": values.get("PROFILE"), "seed": seed_of(values), "parameters": dict(values)}
    _write(path, about, parts)


@contextlib.contextmanager
def recorded_stage(folder: Path, profile: str, seed: int) -> Iterator[None]:
    """Inside this context a sitting of the stage in ``folder`` runs; provenance.json there tells of it.

    A stage that was refused, as it writes nothing into its log, leaves the provenance of who is there.
    """
    path, log = folder / "provenance.json", folder / "log.txt"
    began, before = time.time_ns(), _mark(log)
    try:
        yield
    finally:
        if _mark(log) not in (None, before):
            parts = {"sittings": [*_kept(path, "sittings", []), _sitting(began)]}
            _write(path, {"profile": profile, "seed": seed}, parts)


def _mark(path: Path) -> tuple[int, int] | None:
    """Which file it is and how long; None where there is none."""
    with contextlib.suppress(OSError):
        status = path.stat()
        return status.st_ino, status.st_size
    return None


def _kept(path: Path, name: str, empty: dict | list) -> dict | list:
    """An entry of a provenance.json; ``empty`` where there is none yet, or a file of no use."""
    try:
        found = read_json(path)[name]
    except (StudyError, KeyError):
        return empty
    return found if isinstance(found, type(empty)) else empty


def _sitting(began: int) -> dict[str, object]:
    """When it began (nanoseconds since 1970), how long it took until now, and from which commit."""
    started = datetime.datetime.fromtimestamp(began / 1e9).astimezone().isoformat(timespec="seconds")
    seconds = round((time.time_ns() - began) / 1e9, 2)
    return {"started": started, "wall_seconds": seconds, "git": git_state()}


def command() -> str:
    """How this process was started, as a reader would type it; of absolute paths the name, of hosts none.

    That is what `make` was asked for, where it was make.
    """
    program, *arguments = sys.argv
    program = ["-m", "msunet_core"] if Path(program).name == "__main__.py" else [Path(program).name]
    words = shlex.split(os.environ.get("MSUNET_COMMAND", "")) or ["python", *program, *arguments]
    shown = [re.sub(r"(^|[=\s])/\S*/", r"\1", word) for word in words]
    return shlex.join(re.sub(r"\btcp://\S*", "tcp://HOST:PORT", word) for word in shown)


def without_folders(text: str, parameters: Mapping[str, object]) -> str:
    """A text as it is published: of files that a run's parameters name the name, others from the checkout.

    Where runs lie elsewhere (``MSUNET_RUNS``), theirs begin with ``runs/`` all the same.
    """
    for path in (str(parameters.get(name) or "") for name in FILES):
        if "/" in path:
            text = text.replace(path, Path(path).name)
    if runs := os.environ.get("MSUNET_RUNS"):
        text = text.replace(f"{os.path.abspath(runs)}/", "runs/")
    return text.replace(f"{ROOT}/", "")


def published(value: object, parameters: Mapping[str, object]) -> object:
    """JSON values as they are published, each text :func:`without_folders`."""
    if isinstance(value, dict):
        return {name: published(each, parameters) for name, each in value.items()}
    if isinstance(value, list):
        return [published(each, parameters) for each in value]
    return without_folders(value, parameters) if isinstance(value, str) else value


def versions(packages: Iterable[str]) -> dict[str, object]:
    """What numbers depend on besides the recipe: Python, these packages, hardware, commit."""
    return {
        "python": platform.python_version(),
        "packages": {name: importlib.metadata.version(name) for name in packages},
        "hardware": hardware(),
        "git": git_state(),
    }


def _write(path: Path, about: dict, parts: dict) -> None:
    (entries,) = parts.values()
    entries = list(entries.values()) if isinstance(entries, dict) else entries
    provenance = {
        "command": command(),
        **about,
        "started": min(entry["started"] for entry in entries),
        "wall_seconds": round(sum(entry["wall_seconds"] for entry in entries), 2),
        **versions(PACKAGES),
        **parts,
    }
    atomic_write(path, json.dumps(provenance, indent=1) + "\n")


def peak_memory_of(pid: int) -> int | None:
    """Bytes that a process ever held at once, by Linux's own account (VmHWM); None elsewhere."""
    # Not getrusage(RUSAGE_CHILDREN): a child counts there with at least the memory of its parent.
    with contextlib.suppress(OSError):
        if found := re.search(r"^VmHWM:\s*(\d+) kB", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE):
            return int(found[1]) * 1024
    return None


def hardware() -> dict[str, object]:
    """What the numbers of a run depend on: processor, usable cores, memory in GiB, GPU."""
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        names = re.findall(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        cpu = names[0] if names else cpu
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    gpu = _output_of("nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader")
    return {"cpu": cpu, "cores": usable_cores(), "memory_gib": round(memory, 1), "gpu": gpu or None}


def git_state() -> dict[str, object] | None:
    """Commit of this checkout and whether it was clean; None outside git."""
    commit = _output_of("git", "-C", str(ROOT), "rev-parse", "HEAD")
    if not commit:
        return None
    return {"commit": commit, "clean": _output_of("git", "-C", str(ROOT), "status", "--porcelain") == ""}


def _output_of(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
