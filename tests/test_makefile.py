"""What Make runs, and what it leaves alone. Python is a stand-in that writes down what it was asked to do."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

ROOT = Path(__file__).parent.parent
NOTEBOOKS = [
    "01_data_and_cutmix",
    "02_ternary_training",
    "03_fp16_pruning",
    "04_o3_validation",
    "05_scoring_walkthrough",
    "06_ablations",
    "07_packed_network",
]
ALL = [*NOTEBOOKS, "pages"]
LOOK_AT_PRUNED = [*NOTEBOOKS[3:5], "07_packed_network"]
SHIPPED = "runs/pretrained/msunet_v3.safetensors"
SITE = ["claims", "pages", "report", "shipped_page", "web"]
MODULES = ["__init__", "__main__", "data/sources", "model/network", "study/runner"]
MODULES += [f"study/{name}" for name in SITE]
# Set by the make, the shell or the environment that runs these tests, and not for the make under test.
INHERITED = re.compile(r"MAKE|MFLAGS|MSUNET_|PYTHON|VIRTUAL_ENV|CONDA_")

PYTHON = """#!/usr/bin/env bash
set -e
[ "$1" = -c ] && exit 0
[ "$1 $2" = "-m msunet_core.study.report" ] && {
  echo pages >> log; mkdir -p "$3/site"; touch "$3/site/index.html"; exit
}
[ "$1 $2" = "-m msunet_core.study.runner" ] || { echo "$*" >> log; exit; }
case "$3" in
check)
  [[ "$*" != *BAD* ]] || { echo "refused" >&2; exit 1; } ;;
lock)
  echo "$4" >> locks; shift 5; exec "$@" ;;
run)
  name=$(basename "$4" .ipynb)
  echo "$*" >> commands
  [ ! -e "fail-$name" ] || { echo "$name: cell 7 failed" >&2; exit 1; }
  echo "$name" >> log; touch "$5" ;;
esac
"""


class Checkout:
    """A copy of the Makefile with stand-ins for everything else."""

    def __init__(self, folder: Path):
        self.folder = folder
        shutil.copy(ROOT / "Makefile", folder)
        self.write("python", PYTHON).chmod(0o755)
        self.write("requirements.txt", "")
        self.write("pyproject.toml", "")
        self.write("images.npz", "")
        for name in ("smoke", "quick"):
            self.write(f"msunet_core/study/profiles/{name}.yaml", "")
        for name in MODULES:
            self.write(f"msunet_core/{name}.py", "")
        for name in NOTEBOOKS:
            self.write(f"notebooks/{name}.ipynb", "")

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
        """What ran. Everything is 100 s old beforehand, so that an edit between two calls is a later one."""
        result = self.call(*arguments, **environment)
        assert result.returncode == 0, result.stderr
        return self.ran()

    def ran(self) -> list[str]:
        log = self.folder / "log"
        lines = log.read_text().splitlines() if log.exists() else []
        log.unlink(missing_ok=True)
        for path in sorted(self.folder.rglob("*")):
            os.utime(path, ns=(0, path.stat().st_mtime_ns - 100 * 10**9))
        return lines

    def touch(self, name: str) -> None:
        os.utime(self.folder / name)


@pytest.fixture
def checkout(tmp_path):
    return Checkout(tmp_path)


@pytest.fixture
def done(checkout):
    """A checkout after one whole run."""
    assert checkout.make("reproduce") == ALL
    return checkout


def test_the_first_run_runs_everything_in_the_order_of_what_needs_what(checkout):
    assert checkout.make("reproduce", "-j4") == ALL
    assert (checkout.folder / "locks").read_text() == "runs/smoke\n"


def test_a_second_run_runs_nothing(done):
    assert done.make("reproduce") == []


def test_a_dry_run_says_what_would_run_and_does_nothing(done):
    done.write("notebooks/05_scoring_walkthrough.ipynb", "edited")
    (done.folder / "locks").unlink()
    told = done.call("-n", "reproduce").stdout
    assert re.findall(r"runner run notebooks/(\w+)", told) == ["05_scoring_walkthrough"]
    assert done.ran() == []
    assert not (done.folder / "locks").exists()


@pytest.mark.parametrize(
    ("edited", "reruns"),
    [
        ("notebooks/05_scoring_walkthrough.ipynb", ["05_scoring_walkthrough", "pages"]),
        ("notebooks/01_data_and_cutmix.ipynb", ["01_data_and_cutmix", "pages"]),
        ("notebooks/03_fp16_pruning.ipynb", ["03_fp16_pruning", *LOOK_AT_PRUNED, "pages"]),
        ("notebooks/02_ternary_training.ipynb", [*NOTEBOOKS[1:3], *LOOK_AT_PRUNED, "pages"]),
        ("msunet_core/model/network.py", ALL),
        ("msunet_core/study/profiles/smoke.yaml", ALL),
        ("msunet_core/study/report.py", ["pages"]),
        ("msunet_core/study/claims.py", ["pages"]),
        ("docs/index.md", ["pages"]),
        ("docs/_static/study.css", ["pages"]),
        ("msunet_core/study/profiles/quick.yaml", []),
        ("msunet_core/study/runner.py", []),
        ("msunet_core/__main__.py", []),
        ("README.md", []),
    ],
)
def test_an_edit_reruns_what_depends_on_it_and_nothing_else(done, edited, reruns):
    done.write(edited, "edited")
    assert done.make("reproduce") == reruns
    assert done.make("reproduce") == []


def test_what_make_leaves_out_is_used_by_no_notebook():
    """The other half of the test above: an edit of these files cannot change a notebook's outputs."""
    left_out = {"__main__", "runner", *SITE}
    names = "|".join(left_out)
    for path in (ROOT / "msunet_core").rglob("*.py"):
        if path.stem in left_out:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                used = {*(node.module or "").split("."), *(alias.name for alias in node.names)}
                assert not (node.level and left_out & used), path
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        source = "\n".join(cell.source for cell in nbformat.read(path, 4).cells if cell.cell_type == "code")
        assert not re.search(rf"msunet_core[\w.]*(\.| import.*\b)({names})\b", source), path


@pytest.mark.parametrize(
    "given", ["SEED=1", "DATA=cifar100", "DEVICE=cpu", "LIMIT=3", "VARIANT=v1", "SET=train.epochs=3"]
)
def test_a_changed_parameter_reruns_all_and_the_same_again_nothing(done, given):
    assert done.make("reproduce", given) == ALL
    assert done.make("reproduce", given) == []
    assert done.make("reproduce") == ALL


def test_a_parameter_in_the_environment_is_not_meant_for_the_study(done):
    assert done.make("reproduce", DATA="cifar100", SEED="1", RUN="other", PROFILE="quick") == []


def test_changed_images_rerun_all(checkout):
    assert checkout.make("reproduce", "DATA=images.npz") == ALL
    assert checkout.make("reproduce", "DATA=images.npz") == []
    checkout.touch("images.npz")
    assert checkout.make("reproduce", "DATA=images.npz") == ALL


def test_another_shipped_network_reruns_what_may_look_at_it(checkout):
    checkout.write(SHIPPED, "")
    assert checkout.make("reproduce") == ALL
    checkout.touch(SHIPPED)
    assert checkout.make("reproduce") == [*LOOK_AT_PRUNED, "pages"]


def test_an_image_more_in_a_class_folder_reruns_all(checkout):
    checkout.write("images/train/apple/1.png", "")
    assert checkout.make("reproduce", "DATA=images") == ALL
    assert checkout.make("reproduce", "DATA=images") == []
    checkout.write("images/train/apple/2.png", "")
    assert checkout.make("reproduce", "DATA=images") == ALL


def test_a_run_is_named_after_its_profile_and_leaves_the_others_alone(done):
    assert done.make("reproduce", "PROFILE=quick") == ALL
    assert (done.folder / "runs/quick/site/index.html").exists()
    assert done.make("reproduce", "RUN=again") == ALL
    assert done.make("reproduce") == []


def test_runs_go_where_the_environment_says(checkout, tmp_path):
    elsewhere = tmp_path / "big disk".replace(" ", "_")
    assert checkout.make("reproduce", MSUNET_RUNS=str(elsewhere)) == ALL
    assert (elsewhere / "smoke/site/index.html").exists()
    assert not (checkout.folder / "runs").exists()


def test_a_refused_parameter_does_not_make_a_finished_run_out_of_date(done):
    result = done.call("reproduce", "VARIANT=BAD")
    assert result.returncode != 0 and "refused" in result.stderr
    assert done.ran() == []
    assert done.make("reproduce") == []


@pytest.mark.parametrize("name", ["a/b", "..", "", "a b"])
def test_a_run_name_that_is_no_folder_name_is_refused(done, name):
    result = done.call("reproduce", f"RUN={name}")
    assert result.returncode != 0
    assert f"RUN='{name}' is no folder name" in result.stderr
    assert done.ran() == []


def test_a_failing_notebook_stops_the_run_which_then_goes_on_where_it_stopped(checkout):
    checkout.write("fail-03_fp16_pruning", "")
    result = checkout.call("reproduce")
    assert result.returncode != 0
    assert "03_fp16_pruning: cell 7 failed" in result.stderr
    assert checkout.ran() == NOTEBOOKS[:2]
    (checkout.folder / "fail-03_fp16_pruning").unlink()
    assert checkout.make("reproduce") == ALL[2:]


def test_parts_of_the_study_run_what_they_need(checkout):
    assert checkout.make("prune") == NOTEBOOKS[1:3]
    assert checkout.make("train") == []
    assert checkout.make("reproduce") == [
        "01_data_and_cutmix",
        *LOOK_AT_PRUNED[:2],
        "06_ablations",
        *LOOK_AT_PRUNED[2:],
        "pages",
    ]


def test_the_grid_of_ablations_gets_what_it_was_given(checkout):
    assert checkout.make("ablations") == ["-m msunet_core ablations --profile smoke"]
    (line,) = checkout.make("ablations", "JOBS=2", "DATA=it's.npz", "SET=ablation.epochs=1 prune.lr=1")
    assert line == (
        "-m msunet_core ablations --profile smoke --jobs 2 --data it's.npz --set ablation.epochs=1 prune.lr=1"
    )
    assert "--scheduler tcp://far:8786" in checkout.make("ablations", "SCHEDULER=tcp://far:8786")[0]


def test_notebooks_get_their_parameters_and_stages_the_inputs_they_depend_on(checkout):
    checkout.make("reproduce", "SEED=7", "SET=train.epochs=3 prune.lr=1e-3", "DATA=it's.npz")
    commands = {line.split()[3]: line for line in (checkout.folder / "commands").read_text().splitlines()}
    given = (
        "-p PROFILE smoke -p RUN smoke -p DATA it's.npz -p SEED 7 -p OVERRIDES train.epochs=3 prune.lr=1e-3"
    )
    assert all(given in command for command in commands.values())
    stages = {
        re.search(r"--stage (\S+)", command)[1]: re.search(r"--inputs (.*)", command)[1].split()
        for command in commands.values()
        if "--stage" in command
    }
    code = {"msunet_core/__init__.py", "msunet_core/data/sources.py", "msunet_core/model/network.py"}
    common = {*code, "msunet_core/study/profiles/smoke.yaml", "runs/smoke/.parameters"}
    assert {stage: set(inputs) for stage, inputs in stages.items()} == {
        "runs/smoke/train": common,
        "runs/smoke/prune": common | {"runs/smoke/02_ternary_training.ipynb"},
        "runs/smoke/ablations": common,
    }


def test_score_validate_and_pack_ask_for_what_they_need(checkout):
    needed = (["validate"], "DATA"), (["pack"], "CHECKPOINT"), (["pack", "CHECKPOINT=a"], "OUT")
    for arguments, missing in needed:
        result = checkout.call(*arguments)
        assert result.returncode != 0 and f"give {missing}=" in result.stderr
    assert checkout.make("score") == ["-m msunet_core score"]
    assert checkout.make("validate", "DATA=images.npz") == ["-m msunet_core validate --data images.npz"]
    assert checkout.make("pack", "CHECKPOINT=it's here", "OUT=a b.safetensors") == [
        "-m msunet_core pack it's here a b.safetensors"
    ]
    assert checkout.make("pack", "CHECKPOINT=a", "OUT=b", "VARIANT=v1", "DATA=images.npz", "LIMIT=3") == [
        "-m msunet_core pack a b --variant v1 --data images.npz --limit 3"
    ]
    assert checkout.make("score", "CHECKPOINT=it's here.pth.tar", "VARIANT=v1", "OPT_LEVEL=O3") == [
        "-m msunet_core score it's here.pth.tar --variant v1 --opt-level O3"
    ]
    assert checkout.make("validate", "CHECKPOINT=a.pth.tar", "DATA=images.npz") == [
        "-m msunet_core validate a.pth.tar --data images.npz"
    ]


def test_the_folder_of_the_shipped_network_is_no_run(checkout):
    checkout.write(SHIPPED, "")
    for target in ("reproduce", "clean"):
        result = checkout.call(target, "RUN=pretrained")
        assert result.returncode != 0 and "choose another name" in result.stderr
    assert (checkout.folder / SHIPPED).exists()


def test_clean_removes_the_run_and_only_the_run(done):
    done.make("reproduce", "RUN=other")
    done.write("data/cifar100.npz", "")
    done.make("clean")
    assert sorted(path.name for path in (done.folder / "runs").iterdir()) == ["other"]
    assert (done.folder / "data/cifar100.npz").exists()


def test_help_names_every_target_in_a_line(checkout):
    helped = checkout.call().stdout.splitlines()
    named = {line.split()[1] for line in helped}
    public = {
        target
        for line in re.findall(r"^\.PHONY: (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
        for target in line.split()
        if not target.startswith(".") and target != "FORCE"
    }
    assert named == public
    assert {"reproduce", "test", "test-fast", "lab", "lint", "report", "score", "validate", "clean"} <= named
    assert all(len(line) < 110 for line in helped)


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
    """A machine whose python3.12 is found but does not run, as a pyenv shim, and whose python3.11 does."""
    checkout.write("bin/python3.12", "#!/bin/sh\nexit 127\n").chmod(0o755)
    checkout.write("bin/python3.11", SYSTEM_PYTHON).chmod(0o755)
    checkout.path = f"{checkout.folder}/bin:{os.environ['PATH']}"
    return checkout


def test_an_environment_is_made_once_from_the_first_python_that_runs(bare):
    assert bare.make(".python", PYTHON="", PATH=bare.path) == ["venv", "pip", "pip"]
    assert bare.make(".python", PYTHON="", PATH=bare.path) == []
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


def test_no_suitable_python_is_one_clear_line(bare):
    for name in ("python3.12", "python3.11", "python3"):
        bare.write(f"bin/{name}", "#!/bin/sh\nexit 1\n").chmod(0o755)
    result = bare.call(".python", PYTHON="", PATH=bare.path)
    assert result.returncode != 0
    assert result.stderr.startswith("no Python 3.11 or 3.12 with venv found; install one")
    assert not (bare.folder / ".venv").exists()


@pytest.mark.parametrize("name", ["VIRTUAL_ENV", "CONDA_PREFIX"])
def test_an_active_environment_is_used_as_it_is(checkout, name):
    checkout.write("my env/bin/python", PYTHON).chmod(0o755)
    result = checkout.call("reproduce", PYTHON="", **{name: str(checkout.folder / "my env")})
    assert result.returncode == 0, result.stderr
    assert checkout.ran() == ALL
    assert not (checkout.folder / ".venv").exists()


def test_an_active_environment_without_the_packages_is_one_clear_line(checkout):
    checkout.write("python", "#!/bin/sh\nexit 1\n")
    result = checkout.call("reproduce")
    assert result.returncode != 0
    assert "./python is not Python 3.11 or 3.12 with the packages" in result.stderr.splitlines()[0]


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
