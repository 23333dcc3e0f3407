"""A file is whole or not there; a folder has one writer."""

from __future__ import annotations

import errno
import itertools
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from msunet_core.errors import StudyError
from msunet_core.files import (
    append_line,
    atomic_path,
    atomic_write,
    lock_folder,
    move_aside,
    read_bytes,
    read_text,
)
from msunet_core.model.checkpoint import latest_checkpoint, save_checkpoint

HOLD = """
import sys, time
from msunet_core.files import lock_folder
with lock_folder(sys.argv[1], "make reproduce RUN=first"):
    print("held", flush=True)
    time.sleep(60)
"""


def test_text_and_bytes_arrive_whole(tmp_path):
    atomic_write(tmp_path / "a.txt", "σ = 0.67749\n")
    atomic_write(tmp_path / "a.bin", b"\x00\xff")
    assert (tmp_path / "a.txt").read_bytes() == "σ = 0.67749\n".encode()
    assert (tmp_path / "a.bin").read_bytes() == b"\x00\xff"
    assert sorted(os.listdir(tmp_path)) == ["a.bin", "a.txt"]


def test_a_file_that_holds_the_content_already_keeps_its_time(tmp_path):
    path, link = tmp_path / "a.csv", tmp_path / "link.csv"
    atomic_write(path, "one\n")
    os.utime(path, (1, 1))
    link.symlink_to(path)
    atomic_write(path, "one\n")
    assert path.stat().st_mtime == 1
    atomic_write(link, "one\n")
    assert not link.is_symlink() and path.stat().st_mtime == 1
    atomic_write(path, "two\n")
    assert path.stat().st_mtime > 1 and path.read_text() == "two\n"


def test_a_block_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "metrics.json"
    atomic_write(path, "old")
    with pytest.raises(ZeroDivisionError), atomic_path(path) as temporary:
        temporary.write_text("half")
        raise ZeroDivisionError
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["metrics.json"]


def test_the_new_content_is_not_seen_before_the_block_ends(tmp_path):
    path = tmp_path / "data.npz"
    with atomic_path(path) as temporary:
        temporary.write_text("new")
        assert temporary.suffix == ".npz" and temporary.parent == tmp_path
        assert not path.exists()
    assert path.read_text() == "new"


def test_a_killed_writer_leaves_the_old_file_and_the_next_one_clears_up(tmp_path):
    path = tmp_path / "checkpoint.bin"
    atomic_write(path, "old")
    writer = (
        "import os, signal, sys\n"
        "from msunet_core.files import atomic_path\n"
        "with atomic_path(sys.argv[1]) as temporary:\n"
        "    temporary.write_text('half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    ended = subprocess.run([sys.executable, "-c", writer, str(path)], check=False)
    assert ended.returncode == -signal.SIGKILL
    assert path.read_text() == "old"
    assert len(os.listdir(tmp_path)) == 2
    atomic_write(path, "new")
    assert os.listdir(tmp_path) == ["checkpoint.bin"]
    assert path.read_text() == "new"


def test_a_full_disk_is_one_line_and_keeps_the_old_file(tmp_path):
    path = tmp_path / "metrics.json"
    atomic_write(path, "old")
    # /dev/full answers every write with ENOSPC, as a full disk does.
    with pytest.raises(StudyError) as refused, atomic_path(path), open("/dev/full", "w") as full:
        full.write("x")
    assert str(refused.value) == (
        f"cannot write {path}: no space left on device; free some space and run the same command again"
    )
    assert path.read_text() == "old"


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("gone/metrics.json", "its folder does not exist"),
        ("file/metrics.json", "a part of the path is a file"),
    ],
)
def test_a_folder_that_is_not_there_is_named_with_its_remedy(tmp_path, place, said):
    (tmp_path / "file").write_text("")
    with pytest.raises(StudyError, match=said):
        atomic_write(tmp_path / place, "x")
    assert not (tmp_path / "gone").exists()


def test_a_folder_that_may_not_be_written_is_one_line(tmp_path):
    if os.geteuid() == 0:  # permissions do not bind root, so the refusal comes from the kernel's own files
        place = "/proc/metrics.json"
    else:
        tmp_path.chmod(0o500)
        place = tmp_path / "metrics.json"
    with pytest.raises(StudyError, match=r"cannot write .*metrics\.json: ") as refused:
        atomic_write(place, "x")
    assert "\n" not in str(refused.value)


def test_a_block_that_cannot_read_something_else_says_so_itself(tmp_path):
    with pytest.raises(FileNotFoundError) as fault, atomic_path(tmp_path / "out"):
        (tmp_path / "input").read_text()
    assert fault.value.errno == errno.ENOENT


def test_a_second_process_is_refused_and_told_about_the_first(tmp_path):
    folder = tmp_path / "runs" / "smoke"
    with subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE) as first:
        try:
            assert first.stdout.readline() == b"held\n"
            with pytest.raises(StudyError) as refused, lock_folder(folder):
                pass
            today = time.strftime("%Y-")
            assert f"{folder} is in use by process {first.pid} since {today}" in str(refused.value)
            assert "(make reproduce RUN=first)" in str(refused.value)
        finally:
            first.kill()
    with lock_folder(folder):  # a killed holder leaves nothing to remove by hand
        pass


def test_two_folders_do_not_disturb_each_other_and_a_lock_ends_with_its_block(tmp_path):
    with lock_folder(tmp_path / "a"), lock_folder(tmp_path / "b"):
        pass
    with lock_folder(tmp_path / "a"):
        pass


def test_an_error_inside_the_lock_is_passed_on_as_it_is(tmp_path):
    with pytest.raises(FileNotFoundError), lock_folder(tmp_path / "a"):
        (tmp_path / "nothing").read_text()


# --- links, pipes, and a cut of power ---------------------------------------------------------------------


def test_a_lock_or_a_log_that_is_a_link_is_not_followed(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / ".lock").symlink_to(victim)
    (tmp_path / "log.txt").symlink_to(victim)
    with pytest.raises(StudyError, match="symbolic link"), lock_folder(tmp_path):
        pass
    with pytest.raises(StudyError, match="symbolic link"):
        append_line(tmp_path / "log.txt", "x")
    assert victim.read_text() == "precious"


def test_a_temporary_file_that_is_a_link_is_not_written_through(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / f".a.{os.getpid()}.tmp.txt").symlink_to(victim)
    atomic_write(tmp_path / "a.txt", "new")
    assert victim.read_text() == "precious" and (tmp_path / "a.txt").read_text() == "new"
    assert not (tmp_path / "a.txt").is_symlink()


@pytest.mark.parametrize("kind", ["pipe", "folder", "device"])
def test_what_is_no_regular_file_is_neither_read_nor_written_nor_waited_for(tmp_path, kind):
    path = {"device": Path("/dev/zero")}.get(kind, tmp_path / "a")
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    with pytest.raises(StudyError, match="cannot read"):
        read_bytes(path)
    with pytest.raises(StudyError, match="cannot write"):
        append_line(path, "x")


def test_what_is_read_is_text_and_not_too_long(tmp_path):
    path = tmp_path / "a"
    path.write_bytes("σ".encode() * 10)
    assert read_text(path, 20) == "σ" * 10
    for most, content in ((19, path.read_bytes()), (20, b"\xff")):
        path.write_bytes(content)
        with pytest.raises(StudyError):
            read_text(path, most)
    with pytest.raises(StudyError, match="cannot read"):
        read_bytes("a\0b")


def test_moving_aside_keeps_everything_takes_the_next_free_name_and_the_lock(tmp_path):
    folder = tmp_path / "train"
    for number in (1, 2):
        with lock_folder(folder, "first"):
            (folder / "a").write_text(str(number))
            assert move_aside(folder) == tmp_path / f"train.{number}"
            assert (tmp_path / f"train.{number}" / "a").read_text() == str(number)
            assert os.listdir(folder) == [".lock"]
            with pytest.raises(StudyError, match="in use by process"), lock_folder(folder):
                pass
    with lock_folder(tmp_path / "train.1"), lock_folder(folder):
        pass
    assert sorted(os.listdir(tmp_path)) == ["train", "train.1", "train.2"]


class Disk:
    """Writes down what a save asks of a file system, and what may be left of it when the power is cut.

    As journals may do it: content is safe once its file was synced, a name once its folder was; until then
    names may be kept or lost each by itself, in any order, and of content any part.
    """

    def __init__(self, folder: Path, monkeypatch):
        self.folder, self.events = folder, []
        self.names = {name: os.stat(folder / name).st_ino for name in os.listdir(folder)}
        self.safe = {os.stat(path).st_ino: path.read_bytes() for path in folder.iterdir()}
        for name in ("fsync", "replace", "rename", "link", "unlink"):
            monkeypatch.setattr(os, name, self.noting(name, getattr(os, name)))

    def noting(self, kind, call):
        def noted(*arguments, **options):
            if kind == "fsync":
                status = os.fstat(arguments[0])
                path = os.readlink(f"/proc/self/fd/{arguments[0]}")
                if os.path.isdir(path):
                    self.events.append(("names", None, None))
                else:
                    self.events.append(("content", status.st_ino, Path(path).read_bytes()))
            else:
                paths = [Path(path) for path in arguments]
                there = os.path.lexists(paths[0])
                if there and paths[0].parent == self.folder:
                    inode = os.lstat(paths[0]).st_ino
                    gone = {} if kind == "link" else {paths[0].name: None}
                    made = {} if kind == "unlink" else {paths[1].name: inode}
                    self.events.append(("name", gone | made, None))
            return call(*arguments, **options)

        return noted

    def states(self):
        """Every folder, as content by name, that a cut of power at any moment may leave."""
        for cut in range(len(self.events) + 1):
            names, safe, pending = dict(self.names), dict(self.safe), []
            for kind, what, content in self.events[:cut]:
                if kind == "content":
                    safe[what] = content
                elif kind == "name":
                    pending.append(what)
                else:
                    for change in pending:
                        names |= change
                    pending = []
            for kept in itertools.product((False, True), repeat=len(pending)):
                left = dict(names)
                for change, holds in zip(pending, kept, strict=True):
                    left |= change if holds else {}
                for torn in (b"", b"torn", None):
                    found = {n: safe.get(i, torn) for n, i in left.items() if i is not None}
                    yield cut == len(self.events), {n: c for n, c in found.items() if c is not None}


@pytest.mark.parametrize("links", [True, False], ids=["hard links", "copies"])
def test_a_cut_of_power_at_any_moment_of_a_save_leaves_a_state_that_loads(tmp_path, monkeypatch, links):
    folder, left = tmp_path / "run", tmp_path / "left"
    folder.mkdir()
    if not links:

        def refuse(*_, **__):
            raise PermissionError(1, "Operation not permitted")

        monkeypatch.setattr(os, "link", refuse)
    path = folder / "checkpoint.safetensors"
    for number in range(2):
        save_checkpoint(path, {"model/x": torch.full((100,), float(number))}, {"epoch": number})
    for number in (2, 3):
        with monkeypatch.context() as patch:
            disk = Disk(folder, patch)
            save_checkpoint(path, {"model/x": torch.full((100,), float(number))}, {"epoch": number})
        kinds = [kind for kind, *_ in disk.events]
        assert kinds[-3:] == ["content", "name", "names"]
        count, seen = 0, set()
        for ended, files in disk.states():
            count += 1
            shutil.rmtree(left, ignore_errors=True)
            left.mkdir()
            for name, content in files.items():
                (left / name).write_bytes(content)
            found = latest_checkpoint(left / path.name)[1]["epoch"]
            assert found == number if ended else found in (number - 1, number), (files.keys(), found)
            seen.add(found)
        assert count > 20 and seen == {number - 1, number}


def test_a_number_that_is_no_process_stops_no_write(tmp_path):
    left = [tmp_path / f".a.{number}.tmp.txt" for number in (9 * "9", 20 * "9")]
    for path in left:
        path.write_text("half")
    atomic_write(tmp_path / "a.txt", "whole")
    assert (tmp_path / "a.txt").read_text() == "whole"
    assert [path.exists() for path in left] == [False, True], "only what was a process number is an orphan"


def test_the_disk_of_these_tests_would_notice_a_save_that_does_not_sync(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "a").write_text("old")
    with monkeypatch.context() as patch:
        disk = Disk(folder, patch)
        (folder / "b").write_text("new")
        os.replace(folder / "b", folder / "a")
    assert {files["a"] for _, files in disk.states() if "a" in files} == {b"old", b"", b"torn"}
