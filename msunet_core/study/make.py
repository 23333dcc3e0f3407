"""What `make` asks for: its variables read, the bad ones refused, and what is out of date run.

    STUDY_PROFILE=smoke python -m msunet_core.study.make reproduce

Each variable comes as STUDY_<name> in the environment, as it was typed; no shell and no rule of make's sees
it. A notebook is out of date when what it depends on says something else than when it was made: its cells,
the code, the profile, the parameters, the data, an earlier notebook. A comment changes nothing, a time only
where a folder of images is the data.
Stages look after themselves: a notebook that is run again finds its finished training and goes on from there.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shlex
import stat
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import nbformat

from ..data.sources import SOURCES, is_image, load_data
from ..errors import StudyError, one_line, reason
from ..files import ROOT, atomic_write, lock_folder, read_json, read_text
from ..measure.unpack import SHIPPED
from ..training.code import PACKAGE, code_digest
from ..training.stages import resolve_device
from .profile import PROFILES, Profile, profile_of, read_yaml
from .provenance import FILES
from .run import check_run_name, new_network
from .runner import INTERRUPTED, Interrupted, run_notebook, typed
from .ship import check_finished, ship

# Each notebook, with the earlier ones whose results it looks at.
NOTEBOOKS = {
    "01_data_and_cutmix": (),
    "02_ternary_training": (),
    "03_fp16_pruning": ("02_ternary_training",),
    "04_o3_validation": ("03_fp16_pruning",),
    "05_scoring_walkthrough": ("03_fp16_pruning",),
    "06_ablations": (),
    "07_packed_network": ("03_fp16_pruning",),
}
# What of the committed results each notebook looks at, or does on the real CIFAR-100.
SHIPPED_FILE = "runs/pretrained/*.safetensors"
ABLATIONS = ("runs/ablations/evidence*.csv", "runs/ablations/evidence_provenance.json")
LOOKS_AT = {
    "01_data_and_cutmix": (SHIPPED_FILE,),
    "02_ternary_training": ("runs/record/*.csv", "runs/recipes/*.csv"),
    "04_o3_validation": (SHIPPED_FILE, "runs/pretrained/levels.csv"),
    "05_scoring_walkthrough": (SHIPPED_FILE,),
    "06_ablations": ABLATIONS,
    "07_packed_network": (SHIPPED_FILE,),
}
TARGETS = {
    "reproduce": tuple(NOTEBOOKS),
    "train": ("02_ternary_training",),
    "prune": ("02_ternary_training", "03_fp16_pruning"),
}
# What a request may be given, in the order in which its command is told, and what of it each target takes.
OF_A_RUN = ("PROFILE", "DATA", "RUN", "DEVICE", "SEED", "LIMIT", "VARIANT", "SET")
VARIABLES = (*OF_A_RUN, "JOBS", "SCHEDULER", "CHECKPOINT", "OPT_LEVEL", "OUT")
VARIABLES += ("PORT", "HOST", "BENCH", "SECONDS")  # of targets that do not come here
TAKES = {
    **dict.fromkeys(TARGETS, OF_A_RUN),
    "report": ("PROFILE", "RUN"),
    "score": ("CHECKPOINT", "VARIANT", "OPT_LEVEL"),
    "validate": ("CHECKPOINT", "VARIANT", "OPT_LEVEL", "DATA", "LIMIT", "DEVICE"),
    "pack": ("CHECKPOINT", "OUT", "VARIANT", "DATA", "LIMIT", "DEVICE"),
    "ablations": ("PROFILE", "JOBS", "SCHEDULER", "DATA", "LIMIT", "DEVICE", "OUT", "SET"),
    "pretrained": ("PROFILE", "RUN", "DATA", "OUT"),
}
INSTEAD = {  # of what the ablations do not take
    "RUN": "give a folder, OUT=",
    **dict.fromkeys(("SEED", "VARIANT"), "edit msunet_core/study/ablations.yaml"),
}
NEEDS = {"validate": ("DATA",), "pack": ("CHECKPOINT", "OUT"), "pretrained": ("DATA",)}
# What builds the site, and what the site shows besides a run: files of the checkout.
SITE = tuple(f"study/{name}.py" for name in ("claims", "markup", "pages", "report", "shipped_page", "web"))
SHOWN = ("docs/*", "docs/_static/*", "runs/pretrained/*", "runs/pretrained/*/*")
SHOWN += ("runs/ablations/evidence*", "runs/recipes/*", "runs/record/*", "CITATION.cff")
INDEX = Path("site", "index.html")
# No notebook uses these: they run notebooks, or show what they left.
NOT_USED = {
    "__main__.py",
    *(f"study/{name}.py" for name in ("lab", "make", "runner", "ship")),
    *SITE,
}
MADE = ".made.json"


class Request:
    """What was asked for: the variables given, and the run folder they mean."""

    def __init__(self, given: Mapping[str, str], goals: str):
        self.given = {name: value for name, value in given.items() if value}
        self.run = self.given.get("RUN") or Path(self.given.get("PROFILE", "smoke")).stem
        self.goals = [goal for goal in goals.split() if goal in TAKES]
        self.folder = Path(os.environ.get("MSUNET_RUNS") or "runs") / self.run
        # It goes into provenance, which is published: of a file the name, not where this machine has it.
        shown = {name: Path(value).name if name in FILES else value for name, value in self.given.items()}
        typed_values = [shlex.quote(f"{name}={value}") for name, value in shown.items()]
        self.command = " ".join(["make", goals, *typed_values])

    @property
    def shipped(self) -> Path:
        """The folder that `make pretrained` fills."""
        return Path(self.given.get("OUT") or SHIPPED.parent)

    @property
    def parameters(self) -> dict[str, str]:
        """The notebooks' parameters as texts."""
        names = ("PROFILE", "DATA", "DEVICE", "SEED", "LIMIT", "VARIANT")
        found = {name: self.given[name] for name in names if name in self.given}
        if "SET" in self.given:
            found["OVERRIDES"] = self.given["SET"]
        return {"PROFILE": "smoke", "RUN": self.run} | found

    @property
    def profile(self) -> Profile:
        """The profile as the notebooks will have it."""
        return profile_of(typed(self.parameters))

    def check_variables(self, target: str) -> None:
        """Refuse a variable that none of the goals takes, which would be ignored; ask for what is needed."""
        taken = {name for goal in self.goals for name in TAKES[goal]}
        for name, value in self.given.items():
            if self.goals and name not in taken:
                remedy = "leave it out"
                if name in ("RUN", "PROFILE") and "CHECKPOINT" in taken:
                    remedy = f"give CHECKPOINT=runs/{Path(value).stem}/prune"
                elif "ablations" in self.goals:
                    remedy = INSTEAD.get(name, remedy)
                raise StudyError(
                    f"{name}={value} is nothing that make {' and '.join(self.goals)} takes; {remedy}"
                )
        if "RUN" in TAKES[target]:
            check_run_name(self.run)
        examples = {"DATA": "cifar100 or the path of an .npz", "CHECKPOINT": "runs/smoke/prune"}
        for name in NEEDS.get(target, ()):
            if name not in self.given:
                example = examples.get(name, "smoke.safetensors")
                raise StudyError(f"give {name}=..., for example {name}={example}")

    def check(self) -> None:
        """Refuse what no notebook could use, before anything of an earlier run is touched."""
        profile = self.profile
        resolve_device(profile.device)
        new_network(profile)
        if profile.data.source != "synthetic":
            load_data(profile.data.source, limit=profile.data.limit)


# -- what is out of date -----------------------------------------------------------------------


def inputs_of(name: str, made: Mapping[str, object], common: Mapping[str, str]) -> dict[str, str]:
    """Digests by name of all that a notebook depends on; an earlier notebook counts by its own ones."""
    found = {f"notebooks/{name}.ipynb": notebook_digest(ROOT / "notebooks" / f"{name}.ipynb"), **common}
    for path in sorted(path for pattern in LOOKS_AT.get(name, ()) for path in ROOT.glob(pattern)):
        found[str(path.relative_to(ROOT))] = file_digest(path)
    for earlier in NOTEBOOKS[name]:
        found[earlier] = _digest(json.dumps(made.get(earlier)).encode())
    return found


def common_inputs(request: Request) -> dict[str, str]:
    """Digests of what every notebook depends on: code, profile, parameters, data."""
    values = typed(request.parameters)
    profile = str(values["PROFILE"])
    path = Path(profile) if profile.endswith((".yaml", ".yml")) else PROFILES / f"{profile}.yaml"
    found = {"the parameters": _digest(json.dumps(values, sort_keys=True).encode())}
    found["the profile"] = yaml_digest(path)
    if (data := request.profile.data.source) not in SOURCES:
        found["the data"] = data_digest(data)
    for path in sorted(PACKAGE.rglob("*")):
        inside = path.relative_to(PACKAGE).as_posix()
        if path.suffix in (".py", ".cpp", ".h") and inside not in NOT_USED:
            found[f"msunet_core/{inside}"] = code_digest(path)
        elif path.suffix == ".yaml" and path.parent != PROFILES:  # the grid of the ablations
            found[f"msunet_core/{inside}"] = yaml_digest(path)
    return found


def site_inputs() -> dict[str, str]:
    """Digests of what the site is made from, but for the run's own notebooks."""
    found = {f"msunet_core/{name}": code_digest(PACKAGE / name) for name in SITE}
    found["the published recipe"] = yaml_digest(PROFILES / "paper.yaml")
    files = sorted(path for pattern in SHOWN for path in ROOT.glob(pattern))
    return found | {str(path.relative_to(ROOT)): file_digest(path) for path in files}


def notebook_digest(path: Path) -> str:
    """Digest of a notebook's cells; outputs and what Jupyter writes on opening are left out."""
    try:
        cells = nbformat.reads(read_text(path), 4).cells
    except Exception as error:  # nbformat raises its own and others' kinds
        raise StudyError(f"{path} is not a notebook ({reason(error)}); restore it") from error
    kept = [[cell.cell_type, cell.source, sorted(map(str, cell.metadata.get("tags", ())))] for cell in cells]
    return _digest(json.dumps(kept).encode())


def file_digest(path: Path) -> str:
    """Digest of a file's bytes; "" where there is no regular file."""
    if not os.path.isfile(path):
        return ""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()[:16]


def yaml_digest(path: Path) -> str:
    """Digest of what a YAML file says, whatever its comments; "" where there is none that can be read."""
    with contextlib.suppress(StudyError):
        return _digest(json.dumps(read_yaml(path), sort_keys=True).encode())
    return ""


def data_digest(data: str) -> str:
    """Digest of an .npz; of a folder of images the names, sizes and times, since reading takes minutes."""
    path = Path(os.path.expanduser(data))
    if not os.path.isdir(path):
        return file_digest(path)
    digest = hashlib.blake2b(digest_size=8)
    for folder, folders, files in os.walk(path, followlinks=True):
        folders.sort()
        for name in sorted(name for name in files if is_image(name)):
            status = os.stat(os.path.join(folder, name))
            if stat.S_ISREG(status.st_mode):
                digest.update(os.fsencode(f"{folder}/{name}\0{status.st_size} {status.st_mtime_ns}\0"))
    return digest.hexdigest()


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=8).hexdigest()


def changed(made: object, inputs: Mapping[str, str]) -> str | None:
    """What of its inputs is other than when a notebook was made; None if nothing is."""
    if not isinstance(made, dict):
        return "it was not made yet"
    name = next((name for name in {**inputs, **made} if made.get(name) != inputs.get(name)), None)
    return name and f"{name} changed"


# -- making it ---------------------------------------------------------------------------------


def reproduce(request: Request, target: str, *, dry: bool = False) -> int:
    """Run the notebooks of a target that are out of date, and their pages; returns how many are or were.

    dry : only say which
    """
    made = _read_made(request.folder)
    common, count, checked = common_inputs(request), 0, False
    for name in TARGETS[target]:
        output = request.folder / f"{name}.ipynb"
        inputs = inputs_of(name, made, common)
        why = changed(made.get(name), inputs) if output.is_file() else "it was not made yet"
        if why is None:
            continue
        count += 1
        made.pop("pages", None)  # which are of what was there before
        if dry:
            print(f"{name}: {why}")
            for later in (later for later, needs in NOTEBOOKS.items() if name in needs):
                made[later] = {name: "about to be made anew"}
            continue
        if not checked:
            request.check()
            checked = True
        print(f"{name}: {why}", file=sys.stderr)
        run_notebook(ROOT / "notebooks" / f"{name}.ipynb", output, request.parameters)
        made[name] = inputs
        _write_made(request.folder, made)
    if target == "reproduce":
        pages = site_inputs()
        if not (request.folder / INDEX).is_file() or changed(made.get("pages"), pages):
            count += 1
            if dry:
                print("the pages")
                return count
            render(request)
            made["pages"] = pages
            _write_made(request.folder, made)
    return count


def render(request: Request) -> None:
    """The pages, in a process of their own: what makes them is large, and no notebook needs it."""
    command = [sys.executable, "-m", "msunet_core.study.report", str(request.folder)]
    if status := subprocess.run(command, check=False).returncode:
        raise SystemExit(status)


def _read_made(folder: Path) -> dict:
    try:
        return read_json(folder / MADE)
    except StudyError:  # not there, or of no use: everything is made anew, stages go on
        return {}


def _write_made(folder: Path, made: dict) -> None:
    atomic_write(folder / MADE, json.dumps(made, indent=1) + "\n")


# -- what the command line does ----------------------------------------------------------------


def command_line(target: str, request: Request) -> list[str]:
    """Arguments of `python -m msunet_core` for score, validate, pack and ablations."""
    given = {name: request.given[name] for name in TAKES[target] if name in request.given}
    files = [given.pop(name) for name in ("CHECKPOINT", "OUT")[: 1 + (target == "pack")] if name in given]
    changes = ["--set", *given.pop("SET").split()] if "SET" in given else []
    options = [f"--{name.lower().replace('_', '-')}={value}" for name, value in given.items()]
    return [target, *(f"./{file}" if file.startswith("-") else file for file in files), *options, *changes]


def make_pretrained(request: Request) -> None:
    """Pack, measure and ship what a run pruned; what was shipped stays until all of it is there."""
    data, module = request.given["DATA"], [sys.executable, "-m", "msunet_core"]
    check_finished(request.folder)
    with (
        lock_folder(request.folder, request.command),
        tempfile.TemporaryDirectory(prefix=".shipping", dir=request.folder) as scratch,
    ):
        network, levels = Path(scratch, SHIPPED.name), Path(scratch, "levels.csv")
        for arguments in (
            ["pack", str(request.folder / "prune"), str(network), f"--data={data}"],
            ["validate", str(network), f"--data={data}", f"--out={levels}"],
        ):
            if status := subprocess.run([*module, *arguments], check=False).returncode:
                raise SystemExit(status)
        ship(request.folder, (network, levels), request.shipped)
    from .shipped_page import save_budget  # importing SciPy takes a second

    save_budget(SHIPPED.with_name("budget.png"))
    print(f"shipped into {request.shipped}")


def run(target: str, request: Request) -> int:
    os.environ["MSUNET_COMMAND"] = request.command  # for provenance.json
    request.check_variables(target)
    if target in TARGETS:
        request.profile  # noqa: B018 (refused here, before a folder is made for it)
        flags = f"-{os.environ.get('MAKEFLAGS', '')}".split()[0]
        if not flags.startswith("--") and re.search("[nq]", flags):
            stale = reproduce(request, target, dry=True)
            return int("q" in flags and stale > 0)
        with lock_folder(request.folder, request.command):
            reproduce(request, target)
        return 0
    if target == "report":
        render(request)
        return 0
    if target == "pretrained":
        make_pretrained(request)
        return 0
    command = [sys.executable, "-m", "msunet_core", *command_line(target, request)]
    # In this process's place, so that Ctrl-C and SIGTERM reach what has something to save.
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, command)


def main(arguments: list[str]) -> int:
    """Exit status: 0 done, 1 refused or failed (one line on stderr), 130 interrupted."""
    given = {name: os.environ.get(f"STUDY_{name}", "") for name in VARIABLES}
    goals = os.environ.get("STUDY_GOALS") or " ".join(arguments)
    try:
        return run(arguments[0], Request(given, goals))
    except Interrupted as error:
        print(f"{one_line(error)}; run the same command again to go on", file=sys.stderr)
    except KeyboardInterrupt:
        print("interrupted; run the same command again to go on", file=sys.stderr)
    except (StudyError, OSError) as error:
        print(one_line(error), file=sys.stderr)
        return 1
    return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
