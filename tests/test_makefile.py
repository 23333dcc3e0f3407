"""What the Makefile hands on, as it was typed. A stand-in of Python writes down what it was asked to do."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
from faults import HOSTILE
from nbformat.v4 import new_code_cell, new_notebook

from msunet_core.files import lock_folder
from msunet_core.study.make import NOTEBOOKS
from msunet_core.study.run import COMMITTED

ROOT = Path(__file__).parent.parent
# Set by the make, the shell or the environment that runs these tests, and not for the make under test.
INHERITED = re.compile(r"MAKE|MFLAGS|MSUNET_|PYTHON|VIRTUAL_ENV|CONDA_")

# Writes down its arguments and the variables of the study, each between angle brackets.
PYTHON = """#!/usr/bin/env bash
[ "$1" = -c ] && exit 0
printf '%s\\n' "$*" >> log
for name in PROFILE RUN DATA DEVICE SEED LIMIT VARIANT SET CHECKPOINT OPT_LEVEL OUT BENCH GOALS; do
  variable=STUDY_$name
  printf '%s=<%s>\\n' "$name" "${!variable}" >> variables
done
"""


class Checkout:
    """A copy of the Makefile with stand-ins for everything else."""

    def __init__(self, folder: Path):
        self.folder = folder
        shutil.copy(ROOT / "Makefile", folder)
        self.write("python", PYTHON).chmod(0o755)
        self.write("requirements.txt", "")
        self.write("pyproject.toml", "")
        (folder / "notebooks").mkdir()
        self.write("msunet_core/errors.py", (ROOT / "msunet_core/errors.py").read_text())

    def write(self, name: str, text: str) -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    def call(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
        kept = {name: value for name, value in os.environ.items() if not INHERITED.match(name)}
        return subprocess.run(
            ["make", *arguments],
            cwd=self.folder,
            env={**kept, "PYTHON": "./python", **environment},
            capture_output=True,
            text=True,
            check=False,
        )

    def make(self, *arguments: str, **environment: str) -> list[str]:
        """What Python was asked to do."""
        result = self.call(*arguments, **environment)
        assert result.returncode == 0, result.stderr
        return self.ran()

    def ran(self) -> list[str]:
        log = self.folder / "log"
        lines = log.read_text().splitlines() if log.exists() else []
        log.unlink(missing_ok=True)
        return lines

    def variables(self) -> dict[str, str]:
        """What of the study's variables reached Python, those that were given."""
        text = (self.folder / "variables").read_text()
        (self.folder / "variables").unlink()
        found = re.findall(r"^([A-Z_]+)=<(.*?)>$", text, re.MULTILINE | re.DOTALL)
        return {name: value for name, value in found if value and name != "GOALS"}

    def touch(self, name: str) -> None:
        os.utime(self.folder / name)

    def age(self) -> None:
        """Everything is 100 s older, so that an edit after it is a later one."""
        for path in self.folder.rglob("*"):
            os.utime(path, ns=(0, path.stat().st_mtime_ns - 100 * 10**9))


@pytest.fixture
def checkout(tmp_path):
    return Checkout(tmp_path)


STUDY = ["reproduce", "train", "prune", "ablations", "report", "score", "validate", "pack", "pretrained"]


@pytest.mark.parametrize("target", STUDY)
def test_a_target_hands_the_variables_on_and_decides_nothing(checkout, target):
    assert checkout.make(target, "SEED=7", "SET=train.epochs=3 prune.lr=1e-3", "OUT=b") == [
        f"-m msunet_core.study.make {target}"
    ]
    assert checkout.variables() == {"SEED": "7", "SET": "train.epochs=3 prune.lr=1e-3", "OUT": "b"}


# All variables take one way (`make faults` tries each value with each); so one has all values here.
@pytest.mark.parametrize(
    ("name", "value"),
    [("DATA", value) for value in HOSTILE]
    + [(name, value) for name in ("RUN", "PROFILE", "CHECKPOINT") for value in HOSTILE[:4]],
)
def test_a_value_arrives_as_it_was_typed_and_runs_nothing(checkout, name, value):
    before = sorted(os.listdir(checkout.folder))
    for target in ("help", "-n"):
        checkout.call(target, f"{name}={value}")
        assert sorted(os.listdir(checkout.folder)) == before
    checkout.make("reproduce", f"{name}={value}")
    assert checkout.variables() == {name: value}
    assert sorted(os.listdir(checkout.folder)) == before


@pytest.mark.parametrize("value", HOSTILE)
def test_no_folder_name_turns_clean_into_something_else(checkout, value):
    checkout.write("runs/other/kept", "")
    before = sorted(os.listdir(checkout.folder))
    result = checkout.call("clean", f"RUN={value}")
    assert result.returncode != 0 and "give RUN=another" in result.stderr
    assert sorted(os.listdir(checkout.folder)) == before
    assert (checkout.folder / "runs/other/kept").exists()


@pytest.mark.parametrize("value", HOSTILE)
def test_names_that_lie_in_the_checkout_run_nothing(checkout, value):
    for folder in ("", "data/train/", "msunet_core/study/profiles/", "runs/smoke/"):
        if value not in ("~", "-rf"):
            checkout.write(f"{folder}{value}.npz", "")
    before = sorted(os.listdir(checkout.folder))
    assert checkout.make("reproduce", "DATA=data") == ["-m msunet_core.study.make reproduce"]
    (checkout.folder / "variables").unlink()
    assert sorted(os.listdir(checkout.folder)) == before


def test_a_path_of_the_python_may_hold_anything(checkout):
    python = checkout.write("it's $(touch pwned)`a b`/python", PYTHON)
    python.chmod(0o755)
    checkout.make("score", PYTHON=str(python))
    checkout.make("score", f"PYTHON={python}")
    assert not (checkout.folder / "pwned").exists()


def test_bench_gets_its_options_one_by_one_and_nothing_runs(checkout):
    assert checkout.make("bench", "BENCH=--quick --out `touch pwned` *") == [
        "benchmarks/bench.py --quick --out `touch pwned` *"
    ]
    assert not (checkout.folder / "pwned").exists()


def test_a_parameter_in_the_environment_is_not_meant_for_the_study(checkout):
    checkout.make("reproduce", DATA="cifar100", SEED="1", RUN="other", PROFILE="quick", STUDY_LIMIT="3")
    assert checkout.variables() == {}


@pytest.mark.parametrize(
    ("given", "near"),
    [("PROFIL=paper", "PROFILE"), ("SEDE=1", "SEED"), ("DTA=cifar100", "DATA"), ("seed=1", None)],
)
@pytest.mark.parametrize("target", ["reproduce", "score", "clean", "help", "lint"])
def test_a_variable_that_there_is_not_is_refused_with_the_nearest(checkout, given, near, target):
    result = checkout.call(target, given)
    assert result.returncode != 0
    line = result.stderr.splitlines()[0]
    assert line.startswith(f"no variable {given.partition('=')[0]!r};")
    assert "choose one of PROFILE, RUN, DATA" in line
    assert near is None or f"did you mean {near!r}?" in line
    assert checkout.ran() == []


def test_clean_removes_the_run_and_only_the_run(checkout):
    for name in (
        "runs/smoke/a",
        "runs/other/a",
        "runs/mine/a",
        "data/cifar100.npz",
        "tests/__pycache__/a.pyc",
    ):
        checkout.write(name, "")
    assert checkout.call("clean").returncode == 0
    assert sorted(path.name for path in (checkout.folder / "runs").iterdir()) == ["mine", "other"]
    assert checkout.call("clean", "PROFILE=some/mine.yaml").returncode == 0
    assert sorted(path.name for path in (checkout.folder / "runs").iterdir()) == ["other"]
    assert (checkout.folder / "data/cifar100.npz").exists()
    assert not (checkout.folder / "tests/__pycache__").exists()


def test_clean_leaves_a_run_that_is_being_written(checkout):
    checkout.write("tests/a", "")
    for held in ("runs/smoke", "runs/smoke/train"):  # by make, and by a stage alone
        with lock_folder(checkout.folder / held, "make train"):
            refused = checkout.call("clean")
            assert refused.returncode != 0 and "runs/smoke is in use; wait for it" in refused.stderr
            assert (checkout.folder / "runs" / "smoke").exists()
    assert checkout.call("clean").returncode == 0
    assert not (checkout.folder / "runs" / "smoke").exists()


@pytest.mark.parametrize(
    ("goals", "given"),
    [("lab", "PROFILE=quick"), ("bench", "DEVICE=cuda"), ("lint clean", "DATA=x"), ("test", "SEED=1")],
)
def test_a_variable_that_a_target_would_ignore_is_refused(checkout, goals, given):
    refused = checkout.call(*goals.split(), given)
    name = given.partition("=")[0]
    assert refused.returncode != 0
    assert refused.stderr.startswith(f"make {goals} takes no {name}; leave it out")
    assert checkout.ran() == []


@pytest.mark.parametrize("folder", COMMITTED)
def test_a_folder_of_committed_results_is_not_cleaned(checkout, folder):
    checkout.write(f"runs/{folder}/kept", "")
    assert checkout.call("clean", f"RUN={folder}").returncode != 0
    assert (checkout.folder / "runs" / folder / "kept").exists()


def test_help_names_every_target_and_variable_in_a_line(checkout):
    helped = [line.rstrip() for line in checkout.call().stdout.splitlines()]
    named = {line.split()[1] for line in helped if line.startswith("  make ")}
    makefile = (ROOT / "Makefile").read_text()
    public = {
        target
        for line in re.findall(r"^\.PHONY: (.+)$", makefile, re.MULTILINE)
        for target in line.split()
        if not target.startswith(".")
    }
    assert named == public
    assert {"reproduce", "test", "test-fast", "lab", "lint", "report", "score", "validate", "clean"} <= named
    shown = {line.split()[0].rstrip("=") for line in helped if re.match(r"  [A-Z]", line)}
    assert shown == set(re.search(r"^NAMES := (.+)$", makefile, re.MULTILINE)[1].split())
    assert all(len(line) < 110 for line in helped)
    assert helped.index("targets for maintainers:") > helped.index("targets:")


# -- the environment ---------------------------------------------------------------------------

# `python -m venv` of a stand-in makes a copy of it; its pip leaves a note, or fails as a cut download does.
SYSTEM_PYTHON = """#!/usr/bin/env bash
case "$*" in
"-c "*) exit 0 ;;
--version) echo "Python 3.12.99" ;;
"-m venv "*) echo "venv" >> log; mkdir -p "$3/bin"; cp "$0" "$3/bin/python" ;;
"-m pip install"*) echo "pip" >> log; [ ! -e cut ] ;;
esac
"""


@pytest.fixture
def bare(checkout):
    """A machine whose Pythons are found but do not run, as pyenv's shims, all but python3.12."""
    for minor in (11, 13, 14):
        checkout.write(f"bin/python3.{minor}", "#!/bin/sh\nexit 127\n").chmod(0o755)
    checkout.write("bin/python3.12", SYSTEM_PYTHON).chmod(0o755)
    checkout.path = f"{checkout.folder}/bin:{os.environ['PATH']}"
    return checkout


def test_an_environment_is_made_once_from_the_first_python_that_runs(bare):
    assert bare.make(".python", PYTHON="", PATH=bare.path) == ["venv", "pip", "pip"]
    assert bare.make(".python", PYTHON="", PATH=bare.path) == []
    bare.age()
    bare.touch("requirements.txt")
    assert bare.make(".python", PYTHON="", PATH=bare.path) == ["pip", "pip"]


def test_an_environment_that_was_cut_off_is_made_anew(bare):
    bare.write("cut", "")
    assert bare.call(".python", PYTHON="", PATH=bare.path).returncode != 0
    assert bare.ran() == ["venv", "pip"]
    (bare.folder / "cut").unlink()
    bare.write(".venv/half", "")
    assert bare.make(".python", PYTHON="", PATH=bare.path) == ["venv", "pip", "pip"]
    assert not (bare.folder / ".venv/half").exists()


def test_an_environment_made_by_hand_is_completed_and_not_removed(bare):
    bare.write(".venv/bin/python", SYSTEM_PYTHON).chmod(0o755)
    bare.write(".venv/mine", "")
    assert bare.make(".python", PYTHON="", PATH=bare.path) == ["pip", "pip"]
    assert (bare.folder / ".venv/mine").exists()
    bare.age()
    bare.touch("requirements.txt")
    bare.write("cut", "")  # without a network, say
    assert bare.call(".python", PYTHON="", PATH=bare.path).returncode != 0
    (bare.folder / "cut").unlink()
    assert bare.make(".python", PYTHON="", PATH=bare.path) == ["pip", "pip", "pip"]
    assert (bare.folder / ".venv/mine").exists()


def test_an_environment_without_pip_is_refused_and_not_removed(bare):
    bare.write(".venv/bin/python", "#!/bin/sh\nexit 1\n").chmod(0o755)
    refused = bare.call(".python", PYTHON="", PATH=bare.path)
    assert refused.returncode != 0 and refused.stderr.startswith(".venv has no pip")
    assert (bare.folder / ".venv/bin/python").exists() and bare.ran() == []


def test_a_second_make_does_not_touch_an_environment_that_is_being_made(bare):
    with open(bare.folder / "Makefile") as makefile:
        fcntl.flock(makefile, fcntl.LOCK_EX)
        refused = bare.call(".python", PYTHON="", PATH=bare.path)
    assert refused.returncode != 0 and refused.stderr.startswith("another make is making .venv; wait")
    assert bare.ran() == [] and not (bare.folder / ".venv").exists()


def test_the_own_environment_follows_the_requirements_when_it_is_active_too(bare):
    assert bare.make(".python", PYTHON="", PATH=bare.path) == ["venv", "pip", "pip"]
    bare.age()
    bare.touch("requirements.txt")
    active = dict(PYTHON="", PATH=bare.path, VIRTUAL_ENV=str(bare.folder / ".venv"))
    assert bare.make(".python", **active) == ["pip", "pip"]


def test_a_dry_run_in_a_fresh_checkout_makes_nothing(bare):
    told = bare.call("-n", "reproduce", PYTHON="", PATH=bare.path)
    assert told.returncode == 0 and told.stdout.splitlines()[-1] == "all of it, and .venv before"
    assert bare.ran() == [] and not (bare.folder / ".venv").exists()


def test_no_suitable_python_is_one_clear_line(bare):
    for name in (*(f"python3.{minor}" for minor in range(11, 15)), "python3"):
        bare.write(f"bin/{name}", "#!/bin/sh\nexit 1\n").chmod(0o755)
    result = bare.call(".python", PYTHON="", PATH=bare.path)
    assert result.returncode != 0
    assert result.stderr.startswith("no Python 3.11 to 3.14 with venv found; install one")
    assert not (bare.folder / ".venv").exists()


@pytest.mark.parametrize("name", ["VIRTUAL_ENV", "CONDA_PREFIX"])
def test_an_active_environment_is_used_as_it_is(checkout, name):
    checkout.write("my env/bin/python", PYTHON).chmod(0o755)
    result = checkout.call("reproduce", PYTHON="", **{name: str(checkout.folder / "my env")})
    assert result.returncode == 0, result.stderr
    assert checkout.ran() == ["-m msunet_core.study.make reproduce"]
    assert not (checkout.folder / ".venv").exists()


def test_an_active_environment_without_the_packages_is_one_clear_line(checkout):
    checkout.write("python", "#!/bin/sh\nexit 1\n")
    result = checkout.call("reproduce")
    assert result.returncode != 0
    assert "./python is not Python 3.11 to 3.14 with the packages" in result.stderr.splitlines()[0]


# -- with nothing faked but the notebooks ------------------------------------------------------


@pytest.mark.slow
def test_a_real_run_is_whole_and_refuses_a_second_one_at_the_same_time(checkout):
    shutil.rmtree(checkout.folder / "msunet_core")
    shutil.copytree(ROOT / "msunet_core", checkout.folder / "msunet_core")
    shutil.copytree(ROOT / "docs", checkout.folder / "docs")
    for name in NOTEBOOKS:
        cells = [
            new_code_cell('PROFILE = "smoke"\nRUN = "lab"\nSEED = 0', metadata={"tags": ["parameters"]}),
            new_code_cell(
                "import pathlib, time\nprint(RUN, SEED)\npathlib.Path('here').touch()\ntime.sleep(1)"
            ),
        ]
        nbformat.write(new_notebook(cells=cells), checkout.folder / "notebooks" / f"{name}.ipynb")
    environment = {name: value for name, value in os.environ.items() if not INHERITED.match(name)}
    command = ["make", "reproduce", "SEED=3", f"PYTHON={sys.executable}"]
    with subprocess.Popen(
        command, cwd=checkout.folder, env=environment, stderr=subprocess.PIPE, text=True
    ) as first:
        deadline = time.monotonic() + 60
        while not (checkout.folder / "here").exists() and first.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        second = checkout.call("reproduce", "SEED=3", PYTHON=sys.executable)
        _, err = first.communicate()
    assert first.returncode == 0, err
    assert second.returncode != 0
    assert re.match(
        r"runs/smoke is in use by process \d+ since .* \(make reproduce .*SEED=3.*\); wait for it",
        second.stderr,
    ), second.stderr

    run = checkout.folder / "runs" / "smoke"
    shown = sorted(path.name for path in run.iterdir() if path.is_file() and not path.name.startswith("."))
    assert shown == sorted([*(f"{name}.ipynb" for name in NOTEBOOKS), "provenance.json"])
    index = (run / "site" / "index.html").read_text()
    assert all(f'href="{name}.html"' in index for name in NOTEBOOKS)
    told = (run / "site" / "run.html").read_text()
    assert "make reproduce" in told and "SEED=3" in told
    assert "smoke 3" in (run / "site" / "06_ablations.html").read_text()

    again = checkout.call("reproduce", "SEED=3", PYTHON=sys.executable)
    assert again.returncode == 0 and "cell/s" not in again.stderr
