"""One notebook headless: whole or not there, the failing cell named, the run written down."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from msunet_core.errors import StudyError
from msunet_core.study import runner

pytestmark = pytest.mark.slow  # each starts a kernel

ROOT = Path(__file__).parent.parent
PARAMETERS = 'PROFILE = "smoke"\nSEED = 0\nDATA = None\nVARIANT = None\nOVERRIDES = ""'


@pytest.fixture
def notebook(tmp_path):
    """Writes tmp_path/05_walk.ipynb: a title, the parameters cell, then the given cells."""

    def write(*cells: str) -> Path:
        parameters = new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]})
        content = new_notebook(cells=[new_markdown_cell("# Walk"), parameters, *map(new_code_cell, cells)])
        content.metadata["kernelspec"] = {
            "name": "of-another-machine",
            "language": "python",
            "display_name": "x",
        }
        path = tmp_path / "05_walk.ipynb"
        nbformat.write(content, path)
        return path

    return write


@pytest.fixture
def output(tmp_path):
    return tmp_path / "runs" / "smoke" / "05_walk.ipynb"


def visible(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def printed(path: Path) -> str:
    return "".join(
        output.text
        for cell in nbformat.read(path, 4).cells
        for output in cell.get("outputs", [])
        if "text" in output
    )


def test_a_notebook_runs_with_its_parameters_and_the_run_is_written_down(notebook, output, monkeypatch):
    monkeypatch.setenv("MSUNET_COMMAND", "make reproduce SEED=7")
    path = notebook(
        "import os\nballast = b'x' * 300 * 2**20",
        "print(repr(SEED), repr(DATA), repr(OVERRIDES), os.getcwd())",
    )
    runner.run_notebook(path, output, {"SEED": "7", "DATA": "some/data.npz", "OVERRIDES": "train.epochs=3"})
    assert visible(output.parent) == ["05_walk.ipynb", "provenance.json"]
    assert printed(output) == f"7 '{os.getcwd()}/some/data.npz' 'train.epochs=3' {ROOT}\n"

    made = json.loads((output.parent / "provenance.json").read_text())
    assert made["command"] == "make reproduce SEED=7"
    assert (made["profile"], made["seed"]) == ("smoke", 7)
    assert made["parameters"]["OVERRIDES"] == "train.epochs=3"
    assert made["parameters"]["VARIANT"] is None  # a default counts as much as what was given
    assert made["packages"]["torch"].startswith("2.")
    assert made["hardware"]["cores"] >= 1 and made["hardware"]["memory_gib"] > 0
    assert set(made["git"] or {"commit", "clean"}) == {"commit", "clean"}
    entry = made["notebooks"]["05_walk"]
    assert 0 < entry["wall_seconds"] < 120
    # The ballast and a bare Python: not the memory of the runner, which has torch loaded.
    assert 300 < entry["peak_memory_mb"] < 450


def test_a_failing_cell_is_named_and_leaves_no_target(notebook, output):
    path = notebook("x = 1", "raise ValueError('score 3 is odd\\nsecond line')", "print('never')")
    output.parent.mkdir(parents=True)
    output.write_text("an earlier result, out of date")
    with pytest.raises(StudyError) as refused:
        runner.run_notebook(path, output, {"SEED": "1"})
    failed = output.with_name("05_walk.failed.ipynb")
    # Counted as the opened notebook shows it: parameters 1, injected parameters 2, x 3.
    assert str(refused.value) == f"05_walk: cell 4 failed: ValueError: score 3 is odd (see {failed})"
    assert visible(output.parent) == ["05_walk.failed.ipynb"]
    assert "never" not in printed(failed)

    runner.run_notebook(notebook("x = 1"), output, {})
    assert visible(output.parent) == ["05_walk.ipynb", "provenance.json"]


def test_a_kernel_that_dies_is_a_failing_cell(notebook, output):
    path = notebook("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)")
    with pytest.raises(StudyError, match="05_walk: cell 2 failed: the kernel died"):
        runner.run_notebook(path, output, {})
    assert not output.exists()


def test_a_stage_that_trains_for_hours_shows_how_far_it_is(notebook, output, capfd):
    path = notebook(
        "from msunet_core.study.run import live_line",
        "show = live_line()",
        "show(1, 9, 'train epoch 1/3, loss 4.100')",
        "display({'text/plain': 'a table'}, raw=True)",
    )
    runner.run_notebook(path, output, {})
    shown = capfd.readouterr().err
    assert "train epoch 1/3, loss 4.100, step 1 of 9" in shown
    assert "a table" not in shown
    assert "step 1 of 9" in nbformat.read(output, 4).cells[-2].outputs[0].data["text/plain"]


def test_parameters_that_the_notebook_has_not_are_refused_before_anything_is_touched(notebook, output):
    path = notebook()
    output.parent.mkdir(parents=True)
    output.write_text("kept")
    with pytest.raises(StudyError, match=r"05_walk has no parameter 'SEEDS'; did you mean 'SEED'\?"):
        runner.run_notebook(path, output, {"SEEDS": "1"})
    with pytest.raises(StudyError, match="SEED='one' is not a whole number"):
        runner.run_notebook(path, output, {"SEED": "one"})
    with pytest.raises(StudyError, match=r"06_gone\.ipynb does not exist"):
        runner.run_notebook(path.with_name("06_gone.ipynb"), output, {})
    assert output.read_text() == "kept"


def test_a_folder_that_cannot_be_written_is_one_line(notebook, tmp_path, capfd):
    path = notebook("x = 1")
    (tmp_path / "runs").write_text("a file where the folder should be")
    assert runner.main(["run", str(path), str(tmp_path / "runs" / "smoke" / "05_walk.ipynb")]) == 1
    assert "cannot write" in (err := capfd.readouterr().err) and err.count("\n") == 1


@pytest.mark.usefixtures("sighup_ends")
@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupt_reaches_the_cell_and_leaves_no_target(notebook, output, tmp_path, number):
    """The training loop writes its checkpoint on Ctrl-C, so the kernel must get the time for it."""
    running, saved = tmp_path / "running", tmp_path / "saved"
    path = notebook(
        "import pathlib, time\n"
        "try:\n"
        f"    pathlib.Path({str(running)!r}).touch()\n"
        "    time.sleep(60)\n"
        "except KeyboardInterrupt:\n"
        "    time.sleep(1)\n"
        f"    pathlib.Path({str(saved)!r}).touch()\n"
        "    raise"
    )
    command = [sys.executable, "-m", "msunet_core.study.runner", "run", str(path), str(output)]
    # A group of its own, as a terminal gives it: the signal is for the runner, not for the tests.
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, cwd=ROOT, start_new_session=True
    ) as run:
        wait_for(running)
        run.send_signal(number)
        if number == signal.SIGHUP:  # which a closed terminal may send twice; a second Ctrl-C kills
            time.sleep(0.3)
            run.send_signal(number)
        _, err = run.communicate(timeout=30)
    assert run.returncode == runner.INTERRUPTED
    assert saved.exists()
    assert err.splitlines()[-1] == "05_walk: interrupted; run the same command again to go on"
    assert "Traceback" not in err
    assert visible(output.parent) == []


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not appear in 30 s"
        time.sleep(0.02)


def test_refreshing_a_notebook_in_place_leaves_nothing_of_the_machine(notebook, monkeypatch, tmp_path):
    monkeypatch.setenv("MSUNET_RUNS", str(tmp_path / "runs-of-today"))
    path = notebook("import os\nprint(os.getcwd(), os.environ['MSUNET_RUNS'] + '/lab')", "1 + 1")
    runner.refresh_notebook(path)
    first = path.read_text()
    assert printed(path) == "/home/you/msunet /home/you/msunet/runs/lab\n"
    for word in (
        "papermill",
        "start_time",
        "of-another-machine",
        str(ROOT),
        sys.prefix,
    ):
        assert word not in first
    runner.refresh_notebook(path)
    assert path.read_text() == first


def test_refreshing_a_notebook_that_fails_keeps_the_committed_one(notebook):
    path = notebook("1 / 0")
    before = path.read_text()
    with pytest.raises(StudyError, match="cell 2 failed: ZeroDivisionError: division by zero"):
        runner.refresh_notebook(path)
    assert path.read_text() == before
    assert visible(path.parent) == ["05_walk.ipynb"]
