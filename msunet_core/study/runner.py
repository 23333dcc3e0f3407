"""Runs one notebook headless and writes down how the run was made.

    python -m msunet_core.study.runner run NOTEBOOK OUTPUT [-p NAME VALUE]
    python -m msunet_core.study.runner refresh NOTEBOOK ...

`make reproduce` calls it by way of :mod:`msunet_core.study.make`, which knows what is out of date.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import math
import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import nbformat
import papermill
from ipykernel.kernelspec import KERNEL_NAME, get_kernel_dict
from jupyter_client import AsyncKernelManager
from papermill.clientwrap import PapermillNotebookClient
from papermill.engines import NBClientEngine, papermill_engines

from ..errors import StudyError, closest, one_line
from ..files import ROOT, atomic_write, write_fault
from ..training.interrupt import stopping
from .provenance import peak_memory_of, record
from .run import PROGRESS

WHOLE_NUMBERS = ("SEED", "LIMIT")
INTERRUPTED = 130  # the shell's exit status for Ctrl-C


class Interrupted(Exception):
    """The run was asked to stop, and the kernel had the time to write its checkpoint."""


# -- one notebook ------------------------------------------------------------------------------


def run_notebook(
    notebook: Path,
    output: Path,
    parameters: Mapping[str, str],
) -> None:
    """Execute `notebook` with `parameters` into `output`, which appears whole or not at all.

    provenance.json beside `output` gets this notebook's entry. Training that the notebook finds in its run
    folder is the notebook's own business: a stage resumes what is its past and moves aside what is not.

    Raises StudyError naming the cell that failed; Interrupted after SIGINT, SIGTERM or SIGHUP.
    """
    values = notebook_values(notebook, parameters)
    partial = output.with_name(f".{output.stem}.partial.ipynb")
    failed = output.with_name(f"{output.stem}.failed.ipynb")
    began = time.time_ns()
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.unlink(missing_ok=True)
        failed.unlink(missing_ok=True)
        try:
            peak_memory = _execute(notebook, partial, values)
        except StudyError as error:
            partial.replace(failed)
            raise StudyError(f"{error} (see {failed})") from error
        record(output, began, {**_defaults(notebook), **values}, peak_memory)
        partial.replace(output)
    except OSError as error:
        raise write_fault(error.filename or output, error) from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def refresh_notebook(notebook: Path) -> None:
    """Execute `notebook` in place with its own default parameters, for committing.

    Leaves out what differs from one machine or hour to the next without being a result: times and paths.
    """
    partial = notebook.with_name(f".{notebook.stem}.partial.ipynb")
    try:
        _execute(notebook, partial, {})
        atomic_write(notebook, nbformat.writes(_without_machine(nbformat.read(partial, 4))) + "\n")
    except OSError as error:
        raise write_fault(notebook, error) from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def notebook_values(notebook: Path, parameters: Mapping[str, str]) -> dict[str, str | int]:
    """The typed `parameters`, each of which must be named in the notebook's parameters cell."""
    if not notebook.is_file():
        raise StudyError(f"notebook {notebook} does not exist; give one of notebooks/*.ipynb")
    known = _defaults(notebook)
    for name in parameters:
        if name not in known:
            raise StudyError(f"{notebook.stem} has no parameter {name!r}; {closest(name, known)}")
    return typed(parameters)


def _defaults(notebook: Path) -> dict[str, object]:
    """Name and default of each assignment in the cell tagged `parameters`."""
    try:
        cells = nbformat.read(notebook, 4).cells
        (cell,) = [cell for cell in cells if "parameters" in cell.metadata.get("tags", ())]
        statements = [node for node in ast.parse(cell.source).body if isinstance(node, ast.Assign)]
        return {node.targets[0].id: ast.literal_eval(node.value) for node in statements}
    except (ValueError, SyntaxError, AttributeError) as error:
        raise StudyError(
            f"{notebook} has not one cell tagged 'parameters' of lines such as SEED = 0; correct it ({error})"
        ) from error


def typed(parameters: Mapping[str, str]) -> dict[str, str | int]:
    """Command line texts as notebook parameters: whole numbers as int, paths made absolute."""
    values: dict[str, str | int] = dict(parameters)
    for name in WHOLE_NUMBERS:
        if name in values:
            try:
                values[name] = int(values[name])
            except ValueError:
                raise StudyError(f"{name}={values[name]!r} is not a whole number; give digits") from None
    data = str(values.get("DATA", ""))
    if os.sep in data or data.endswith(".npz"):
        values["DATA"] = os.path.abspath(os.path.expanduser(data))
    return values


def _execute(notebook: Path, output: Path, values: Mapping[str, str | int]) -> int | None:
    """Run all cells by papermill; StudyError names the cell that failed.

    Returns the most memory in bytes that the kernel ever held (where the system tells).
    """
    paths = (str(ROOT), os.environ.get("PYTHONPATH", ""))
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, dict.fromkeys(paths)))
    os.environ.setdefault("PYDEVD_DISABLE_FILE_VALIDATION", "1")  # no debugger, so no advice about it
    name = notebook.stem
    peaks: list[int] = []

    with _forwarded_signals() as (kernel_manager, received):

        def stop_if_asked(**_) -> None:
            if received:
                raise Interrupted(f"{name}: interrupted")

        def note_memory(**_) -> None:
            peaks.extend(filter(None, map(peak_memory_of, kernel_manager.pids())))

        try:
            papermill.execute_notebook(
                _literal(notebook),
                _literal(output),
                parameters=dict(values),
                kernel_name="python3",
                language="python",
                kernel_manager_class=kernel_manager,
                on_cell_start=stop_if_asked,
                on_cell_executed=note_memory,
                engine_name=_Engine.NAME,
                progress_bar={"desc": name},
                stderr_file=sys.stderr,  # what a stage has to say
                coalesce_streams=True,
                cwd=str(ROOT),
            )
            stop_if_asked()
        except papermill.PapermillExecutionError as error:
            stop_if_asked()
            said = (error.evalue.strip() or "no message").splitlines()[0]
            raise StudyError(f"{name}: cell {error.exec_count} failed: {error.ename}: {said}") from error
        except RuntimeError as error:  # nbclient's word for a kernel that is gone
            stop_if_asked()
            raise StudyError(
                f"{name}: cell {_running_cell(output)} failed: the kernel died; was the memory enough?"
            ) from error
    return max(peaks, default=None)


class _Client(PapermillNotebookClient):
    """Shows a stage's own line of progress behind the bar of the cells: a cell may train for hours."""

    shown = -math.inf

    def process_message(self, message, cell, index):
        content, now = message["content"], time.monotonic()
        line = str(content.get("transient", {}).get("display_id", "")).startswith(PROGRESS)
        if line and self.nb_man.pbar and now - self.shown >= (0.5 if sys.stderr.isatty() else 60):
            self.shown = now  # in a log, a line a minute
            self.nb_man.pbar.set_postfix_str(content["data"]["text/plain"])
        return super().process_message(message, cell, index)


class _Engine(NBClientEngine):
    """Papermill's own, with our client."""

    NAME = "study"

    @classmethod
    def execute_managed_notebook(cls, nb_man, kernel_name, start_timeout=60, **options):
        known = PapermillNotebookClient.class_traits()
        taken = {name: value for name, value in options.items() if name in known}
        return _Client(nb_man, kernel_name=kernel_name, startup_timeout=start_timeout, **taken).execute()


papermill_engines.register(_Engine.NAME, _Engine)


@contextlib.contextmanager
def _forwarded_signals() -> Iterator[tuple[type[AsyncKernelManager], list[int]]]:
    """While it lasts, SIGINT, SIGTERM and SIGHUP reach the kernel as Ctrl-C and do not end this process.

    Yields the kernel manager to use and the list of the signals that came. The kernel is a session
    of its own, so the terminal's Ctrl-C does not reach it otherwise. A second signal kills it.
    """
    started: list[AsyncKernelManager] = []
    received: list[int] = []

    class OwnKernel(AsyncKernelManager):
        """The kernel of this very Python, whatever kernel specs the user's home holds."""

        def format_kernel_cmd(self, extra_arguments=None):
            started.append(self)
            launcher = [sys.executable, "-m", "ipykernel_launcher", "-f", self.connection_file]
            return [*launcher, "--IPKernelApp.log_level=ERROR", *(extra_arguments or [])]

        @staticmethod
        def pids() -> list[int]:
            return [
                kernel.provisioner.pid for kernel in started if kernel.provisioner and kernel.provisioner.pid
            ]

    def forward(number: int, frame) -> None:
        if number == signal.SIGHUP and received:  # a closed terminal may send it twice
            return
        received.append(number)
        for pid in OwnKernel.pids():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGINT if len(received) == 1 else signal.SIGKILL)

    before = {number: signal.signal(number, forward) for number in stopping()}
    try:
        yield OwnKernel, received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _running_cell(notebook: Path) -> int:
    """The number, counted as Jupyter counts, of the cell that was running when all ended."""
    cells = [cell for cell in nbformat.read(notebook, 4).cells if cell.cell_type == "code"]
    return sum(cell.metadata.papermill["start_time"] is not None for cell in cells)


def _literal(path: Path) -> str:
    """A path for papermill, which would fill in {names} in it."""
    return str(path).replace("{", "{{").replace("}", "}}")


# -- what is committed -------------------------------------------------------------------------


def _without_machine(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    # What JupyterLab writes into a notebook that it only opened, so that looking at one changes nothing.
    kernel = get_kernel_dict()
    spec = {"display_name": kernel["display_name"], "language": kernel["language"], "name": KERNEL_NAME}
    language = notebook.metadata.language_info  # as the kernel told it
    notebook.metadata = nbformat.from_dict({"kernelspec": spec, "language_info": language})
    # Still absolute paths, so that nbval takes them for what another machine prints there.
    here = {sys.prefix: "/home/you/python", str(ROOT): "/home/you/msunet"}
    if runs := os.environ.get("MSUNET_RUNS"):
        here = {runs: "/home/you/msunet/runs", **here}
    for cell in notebook.cells:
        for key in ("papermill", "execution"):
            cell.metadata.pop(key, None)
        if not cell.metadata.get("tags", True):  # papermill's own empty list
            del cell.metadata["tags"]
        for output in cell.get("outputs", ()):
            texts = output.get("data", output)
            for kind, text in texts.items():
                if isinstance(text, str) and not kind.startswith("image/"):
                    for path, name in here.items():
                        text = text.replace(path, name)
                    texts[kind] = text
    return notebook


# -- command line ------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 1 refused or failed (one line on stderr), 130 interrupted."""
    parser = argparse.ArgumentParser(
        prog="python -m msunet_core.study.runner", description=__doc__.splitlines()[0]
    )
    commands = parser.add_subparsers(dest="action", required=True)
    run = commands.add_parser("run", help="execute one notebook")
    run.add_argument("notebook", type=Path)
    run.add_argument("output", type=Path)
    run.add_argument("-p", dest="parameters", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"))
    refresh = commands.add_parser("refresh", help="execute notebooks in place, for committing")
    refresh.add_argument("notebooks", type=Path, nargs="+")
    asked = parser.parse_args(arguments)
    try:
        if asked.action == "run":
            run_notebook(asked.notebook, asked.output, dict(asked.parameters))
        else:
            for notebook in asked.notebooks:
                refresh_notebook(notebook)
    except Interrupted as error:
        print(f"{one_line(error)}; run the same command again to go on", file=sys.stderr)
        return INTERRUPTED
    except (StudyError, OSError) as error:
        print(one_line(error), file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
