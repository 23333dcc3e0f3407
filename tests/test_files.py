"""A file is whole or not there; a folder has one writer."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time

import pytest

from msunet_core.errors import StudyError
from msunet_core.files import atomic_path, atomic_write, lock_folder

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
