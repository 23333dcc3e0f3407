"""Opens the notebooks in JupyterLab, in such a way that looking at one leaves the checkout clean.

    STUDY_PORT=8899 STUDY_HOST=0.0.0.0 python -m msunet_core.study.lab

JupyterLab writes the Python it runs on into each notebook that is open for two minutes. The committed ones
hold what it writes, but for the version of the reader's own Python: that stays as it is on disk.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path

from ..errors import StudyError, one_line, shown

RUNTIME = ("kernelspec", "language_info")


def keep_runtime(model: dict, path: str, contents_manager, **_) -> None:
    """A hook of Jupyter's, before each save: what the file on disk says of its kernel stays.

    A notebook that was given another kernel says so, and a new one gets what JupyterLab writes.
    """
    if model["type"] != "notebook":
        return
    try:
        before = json.loads(Path(contents_manager.root_dir, path).read_bytes())["metadata"]
        same = before["kernelspec"]["name"] == model["content"]["metadata"]["kernelspec"]["name"]
    except (OSError, ValueError, KeyError, TypeError):
        return
    if same:
        model["content"]["metadata"].update({name: before[name] for name in RUNTIME if name in before})


def lab_arguments(given: Mapping[str, str]) -> list[str]:
    """JupyterLab's arguments for PORT and HOST, either of which may be missing or empty.

    Raises StudyError for a port that there is not.
    """
    arguments = [
        "--LabApp.default_url=/lab/tree/notebooks",
        f"--ContentsManager.pre_save_hook={__package__}.lab.keep_runtime",
        "--allow-root",  # who is root in a container has no other name to take
    ]
    if port := given.get("PORT"):
        if not (port.isascii() and port.isdecimal() and len(port) <= 5 and 0 < int(port) < 2**16):
            raise StudyError(f"PORT={shown(port)} is no port; give a whole number from 1 to 65535")
        arguments += [f"--port={port}", "--ServerApp.port_retries=0"]
    if host := given.get("HOST"):
        arguments.append(f"--ip={host}")
    return arguments


def main() -> int:
    """Exit status: 0 closed, 1 refused (one line on stderr)."""
    try:
        arguments = lab_arguments({name: os.environ.get(f"STUDY_{name}", "") for name in ("PORT", "HOST")})
    except StudyError as error:
        print(one_line(error), file=sys.stderr)
        return 1
    from jupyterlab.labapp import main as jupyterlab

    return jupyterlab(arguments) or 0


if __name__ == "__main__":
    sys.exit(main())
