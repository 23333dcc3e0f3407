"""Files that are either whole or not there, and folders that one process writes at a time."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from .errors import StudyError

ROOT = Path(__file__).resolve().parents[1]  # the checkout

REMEDIES = {
    errno.ENOSPC: "free some space and run the same command again",
    errno.EDQUOT: "free some of your quota and run the same command again",
    errno.EACCES: "make the folder writable or choose another",
    errno.EPERM: "make the folder writable or choose another",
    errno.EROFS: "choose a folder on a writable file system",
    errno.ENOENT: "its folder does not exist: create it or choose another",
    errno.ENOTDIR: "a part of the path is a file: choose another folder",
    errno.EISDIR: "a folder has this name: remove it or choose another name",
}


def write_fault(path: str | os.PathLike, error: OSError) -> StudyError:
    """The one line that tells a person why `path` could not be written, and what to do."""
    reason = (error.strerror or str(error)).lower()
    return StudyError(f"cannot write {path}: {reason}; {REMEDIES.get(error.errno, 'check the disk')}")


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary path beside `path`; what the block wrote there becomes `path` when it ends well.

    The temporary file keeps the suffix (some writers choose the format by it) and is on the disk
    before it is renamed, so that a crash leaves the old file or the new one. If the block raises,
    `path` is untouched and the temporary file is gone. The folder must exist: a run folder that
    vanished is a fault, not something to make anew in silence.

    Raises StudyError when the file system refuses.
    """
    path = Path(path)
    _remove_orphans(path)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        yield temporary
        _flush_to_disk(temporary)
        temporary.replace(path)
        _flush_to_disk(path.parent)
    except OSError as error:
        # A block that fails to read something else says so itself.
        if error.filename is not None and Path(error.filename) not in (temporary, path.parent):
            raise
        raise write_fault(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def atomic_write(path: str | os.PathLike, content: bytes | str) -> None:
    """Write `content` (a str as UTF-8) to `path`, whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def _flush_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove_orphans(path: Path) -> None:
    """Remove what a killed process left half-written for this very `path`."""
    pattern = re.compile(rf"\.{re.escape(path.stem)}\.(\d+)\.tmp{re.escape(path.suffix)}")
    with contextlib.suppress(OSError):
        for entry in os.scandir(path.parent):
            if (match := pattern.fullmatch(entry.name)) and not _is_alive(int(match[1])):
                os.unlink(entry.path)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


@contextlib.contextmanager
def lock_folder(folder: str | os.PathLike, command: str | None = None) -> Iterator[int]:
    """Make `folder` and hold it for this process; yields the lock's file descriptor.

    The kernel drops the lock when the last process that holds the descriptor ends, however it
    ends, so no stale lock ever has to be removed by hand. `command` is what a refused second
    process is told about the first (default: this process's command line).

    Raises StudyError naming pid, start time and command of the process that holds the folder.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise write_fault(folder, error) from error
    try:
        _take(descriptor, folder, command or " ".join(sys.argv))
        yield descriptor
    finally:
        os.close(descriptor)


def _take(descriptor: int, folder: Path, command: str) -> None:
    holder = {"pid": os.getpid(), "started": time.strftime("%Y-%m-%d %H:%M:%S"), "command": command}
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Written in place, not renamed: the lock belongs to this inode.
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(holder).encode(), 0)
    except BlockingIOError:
        raise StudyError(
            f"{folder} is in use by {_holder(descriptor)}; wait for it to end or choose another RUN"
        ) from None
    except OSError as error:
        raise write_fault(folder, error) from error


def _holder(descriptor: int) -> str:
    try:
        holder = json.loads(os.pread(descriptor, 65536, 0))
        return "process {pid} since {started} ({command})".format_map(holder)
    except (ValueError, KeyError):  # read between its truncation and its writing
        return "another process"
