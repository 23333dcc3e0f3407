"""Looking at a notebook in JupyterLab changes nothing that is committed."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import browser as chromium
import nbformat
import pytest
from ipykernel.ipkernel import IPythonKernel
from ipykernel.kernelspec import KERNEL_NAME, get_kernel_dict
from nbformat.v4 import new_code_cell, new_notebook

from msunet_core import StudyError
from msunet_core.study.lab import keep_runtime, lab_arguments

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def without_version(metadata: dict) -> dict:
    language = {name: value for name, value in metadata["language_info"].items() if name != "version"}
    return {**metadata, "language_info": language}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_committed_notebook_holds_what_jupyterlab_would_write(path):
    notebook = nbformat.read(path, 4)
    kernel = {name: get_kernel_dict()[name] for name in ("display_name", "language")}
    expected = {"kernelspec": {**kernel, "name": KERNEL_NAME}, "language_info": IPythonKernel.language_info}
    assert without_version(notebook.metadata) == without_version(expected)
    assert re.fullmatch(r"3\.1[1-4]\.\d+", notebook.metadata.language_info.version)
    assert path.read_text() == nbformat.writes(notebook) + "\n"  # as the server lays a file out


def saved(folder: Path, before: object, kernel: str, version: str) -> dict:
    """The metadata that reach the disk when a notebook is saved over another."""
    path = folder / "a.ipynb"
    if before is not None:
        path.write_text(before if isinstance(before, str) else json.dumps(before))
    metadata = {"kernelspec": {"name": kernel}, "language_info": {"version": version}, "title": "new"}
    model = {"type": "notebook", "content": {"metadata": metadata}}
    keep_runtime(model=model, path="a.ipynb", contents_manager=SimpleNamespace(root_dir=str(folder)))
    return model["content"]["metadata"]


def test_a_saved_notebook_keeps_the_python_that_it_named(tmp_path):
    runtime = {"kernelspec": {"name": "python3"}, "language_info": {"version": "3.11.7"}}
    before = {"metadata": runtime, "cells": []}
    assert saved(tmp_path, before, "python3", "3.14.1") == {**runtime, "title": "new"}
    assert saved(tmp_path, before, "julia", "1.9")["language_info"] == {"version": "1.9"}


@pytest.mark.parametrize("before", [None, "{", "[]", "null", new_notebook()])
def test_a_new_or_broken_file_gets_what_jupyterlab_writes(tmp_path, before):
    assert saved(tmp_path, before, "python3", "3.14.1")["language_info"] == {"version": "3.14.1"}


@pytest.mark.parametrize("port", ["0", "65536", "8888x", "-1", "8e3", "²", "9" * 5000])
def test_a_port_that_there_is_not_is_refused(port):
    with pytest.raises(StudyError, match="is no port; give a whole number from 1 to 65535"):
        lab_arguments({"PORT": port})


def test_port_and_host_reach_jupyterlab_and_a_taken_port_is_not_another_one():
    arguments = lab_arguments({"PORT": "8899", "HOST": "0.0.0.0"})
    assert {"--port=8899", "--ServerApp.port_retries=0", "--ip=0.0.0.0", "--allow-root"} <= set(arguments)
    assert not [a for a in lab_arguments({}) if re.match("--(port|ip)", a)]


@pytest.mark.slow
@pytest.mark.skipif(chromium.find() is None, reason="no Chromium")
def test_what_a_real_jupyterlab_saves_is_what_is_committed(tmp_path):
    shutil.copy(ROOT / "notebooks" / "07_packed_network.ipynb", tmp_path / "committed.ipynb")
    other = (tmp_path / "committed.ipynb").read_text()
    other = re.sub(r'"version": "3\.[\d.]+"', '"version": "3.99.0"', other)  # another machine's Python
    (tmp_path / "other.ipynb").write_text(other)
    bare = new_notebook(cells=[new_code_cell("1 + 1", id="a")])
    nbformat.write(bare, tmp_path / "bare.ipynb")
    before = {path.stem: path.read_bytes() for path in tmp_path.glob("*.ipynb")}

    log = tmp_path / "log"
    options = ["--ServerApp.port=0", "--no-browser", "--expose-app-in-browser", f"--notebook-dir={tmp_path}"]
    command = [sys.executable, "-m", "jupyterlab", *lab_arguments({}), *options]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JUPYTER_CONFIG_DIR": str(tmp_path / "config")}
    with log.open("w") as file:
        server = subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + 120
        while not (found := re.search(r"http://(127\.0\.0\.1:\d+)/\S*token=(\w+)", log.read_text())):
            assert time.monotonic() < deadline and server.poll() is None, log.read_text()
            time.sleep(0.2)
        window = chromium.Browser(tmp_path / "chromium")
        window.call("Page.navigate", url=f"http://{found[1]}/lab?token={found[2]}&reset")
        window.wait_for("!!window.jupyterapp && !!document.querySelector('.jp-DirListing')", 120)
        for name in before:
            opened = json.dumps({"path": f"{name}.ipynb", "kernel": {"name": "python3"}})
            window.evaluate(
                f"jupyterapp.commands.execute('docmanager:open', {opened}).then((widget) =>"
                "widget.context.ready.then(() => widget.sessionContext.ready)"
                ".then(() => widget.sessionContext.session.kernel.info).then(() => widget.context.save()))"
            )
        window.close()
    finally:
        server.terminate()
        server.wait(60)

    after = {path.stem: path.read_bytes() for path in tmp_path.glob("*.ipynb")}
    assert all(log.read_text().count(f"Saving file at /{name}.ipynb") == 1 for name in before)
    assert after["committed"] == before["committed"] and after["other"] == before["other"]
    # What had no word of a kernel got JupyterLab's own.
    written = nbformat.reads(after["bare"].decode(), 4).metadata
    committed = nbformat.reads(before["committed"].decode(), 4).metadata
    assert without_version(written) == without_version(committed)
