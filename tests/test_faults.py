"""The short version of `make faults`, and that its judgement can be trusted."""

from __future__ import annotations

import importlib.util
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import browser
import faults_pages
import pytest
import torch

from msunet_core import StudyError
from msunet_core.model.checkpoint import read_checkpoint, save_checkpoint

PROGRAM = Path(__file__).with_name("faults.py")


@pytest.fixture(scope="module")
def faults():
    spec = importlib.util.spec_from_file_location("faults", PROGRAM)
    module = importlib.util.module_from_spec(spec)
    sys.modules["faults"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["faults"]


@pytest.mark.slow
def test_a_run_that_is_killed_and_files_that_are_damaged_lose_nothing():
    done = subprocess.run(
        [sys.executable, PROGRAM, "--quick"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(PROGRAM.parents[1])},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    *_, total = (line for line in done.stdout.splitlines() if line.startswith("all "))  # of all parts
    _, tried, survived, lost, executed, tracebacks, hangs, undetectable, megabytes = total.split()[:9]
    assert (lost, executed, tracebacks, hangs) == ("0", "0", "0", "0"), done.stdout
    assert int(tried) == int(survived) + int(undetectable) >= 130
    assert 0 < int(megabytes) < 700


def test_a_fork_that_ends_badly_is_told(faults):
    tasks = [lambda: {"same": 1}, lambda: os._exit(3), lambda: 1 / 0, lambda: time.sleep(60)]
    well, *badly = faults.in_forks(tasks, seconds=1)
    assert well["same"] == 1 and 0 <= well["grown"] < 100 * 2**20
    assert badly == [{f"the process ended with status {status}": 1} for status in (3, 1)] + [{"hang": 1}]


def test_a_fault_is_called_by_its_name(faults, tmp_path):
    expected = {"x": torch.arange(3)}

    def opens(outcome):
        def load(path):
            if isinstance(outcome, BaseException):
                raise outcome
            return outcome

        return faults.verdict(load, tmp_path, expected)

    assert opens({"x": torch.arange(3)}) == "same"
    assert opens({"x": torch.arange(3) + 1}) == "other"
    assert opens({}) == "other"
    assert opens(StudyError("one line")) == "refused"
    assert opens(StudyError("two\nlines")) == "refused"  # an error is one line, whatever it is made of
    assert opens(StudyError("")) == "not one line"
    assert opens(MemoryError("all of it")) == "traceback: MemoryError: all of it"
    assert opens(SystemExit(1)) == "traceback: SystemExit: 1"


def compute_for_ever(path):
    while True:
        pass


@pytest.mark.parametrize("wait", [lambda path: time.sleep(30), compute_for_ever], ids=["waits", "computes"])
def test_what_takes_too_long_is_a_hang(faults, tmp_path, monkeypatch, wait):
    monkeypatch.setattr(faults, "CLOCKS", [(number, timer, 0.5) for number, timer, _ in faults.CLOCKS])
    assert faults.verdict(wait, tmp_path, {}) == "hang"


def test_a_file_made_anew_differs_and_has_a_right_digest(faults, tmp_path):
    path = tmp_path / "own.safetensors"
    save_checkpoint(path, {"model/x": torch.arange(4.0)}, {"epoch": 1, "history": [{"epoch": 0}]})
    draw = random.Random(0)
    told = set()
    for _ in range(30):
        other = tmp_path / "other.safetensors"
        other.write_bytes(faults.own_made_anew(draw, path.read_bytes())[1])
        assert other.read_bytes() != path.read_bytes()
        try:
            read_checkpoint(other)
            told.add("read")
        except StudyError as error:
            assert "digest" not in str(error)
            told.add("refused")
    assert told == {"read", "refused"}


def test_every_mutation_changes_a_file_and_repeats_with_its_seed(faults):
    content = bytes(range(256)) * 40
    kinds = set()
    for seed in range(60):
        kind, damaged = faults.mutate(random.Random(seed), content)
        assert damaged != content
        assert (kind, damaged) == faults.mutate(random.Random(seed), content)
        kinds.add(kind)
    assert kinds == {mutation.__name__ for mutation in faults.MUTATIONS}


def test_the_table_counts_what_was_lost(faults):
    rows = [faults.Row("one", 3, 2, 1, megabytes=7), faults.Row("two", 2, 2, megabytes=5, note="fine")]
    lines = faults.table(rows).splitlines()
    assert lines[-1].split() == ["all", "5", "4", "1", "0", "0", "0", "0", "7"]
    assert [row.bad() for row in [*rows, faults.Row("three", hangs=1)]] == [1, 0, 1]


@pytest.mark.slow
@pytest.mark.skipif(browser.find() is None, reason="no Chromium")
def test_what_runs_or_fetches_on_a_page_is_noticed(tmp_path):
    # A page that sends its reader elsewhere is never seen whole: opening it fails, which is noticed too.
    forms = [form for form in faults_pages.FORMS if form.startswith("<") and "http-equiv" not in form]
    payloads = faults_pages.Payloads()
    site = tmp_path / "site"
    site.mkdir()
    for number, form in enumerate(forms):
        (site / f"{number}.html").write_text(f"<!doctype html><p>{payloads(form, str(number))}")
    (site / "search.html").write_text("<!doctype html><p>nothing here")
    ran, asked = faults_pages.look(site, tmp_path / "profile")
    told = {forms[number] for number in ran}
    for tag in (
        "<script>",
        "<img src=x",
        "<svg/",
        "<iframe src=",
        "<details",
        "<input",
        "<a href=java",
        "<form",
        "<x ",
    ):
        assert any(form.startswith(tag) for form in told), tag
    for name in ("a.png", "a.css", "b.css", "c.png", "d.png"):
        assert f"{faults_pages.ELSEWHERE}/{name}" in asked
