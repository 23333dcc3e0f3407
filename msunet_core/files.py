"""Files that are either whole or not there, and folders that one process writes at a time.

A folder may come from a stranger: what is written in place is never written through a link, and a pipe or a
device under the name of a file is refused, not waited for.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import shutil
import stat
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from .errors import StudyError, reason

ROOT = Path(__file__).resolve().parents[1]  # the checkout
LOCK = ".lock"  # in every folder that has one writer

REMEDIES = {
    errno.ENOSPC: "free some space and run the same command again",
    errno.EDQUOT: "free some of your quota and run the same command again",
    errno.EACCES: "make the folder writable or choose another",
    errno.EPERM: "make the folder writable or choose another",
    errno.EROFS: "choose a folder on a writable file system",
    errno.ENOENT: "its folder does not exist: create it or choose another",
    errno.ENOTDIR: "a part of the path is a file: choose another folder",
    errno.EISDIR: "a folder has this name: remove it or choose another name",
    errno.ELOOP: "it is a symbolic link, which is not followed: remove it",
    errno.ENXIO: "it is a pipe or a device: remove it",
    errno.EINVAL: "it is a pipe or a device: remove it",
}


def write_fault(path: str | os.PathLike, error: OSError) -> StudyError:
    """The one line that tells a person why `path` could not be written, and what to do."""
    why = (error.strerror or str(error)).lower()
    return StudyError(f"cannot write {path}: {why}; {REMEDIES.get(error.errno, 'check the disk')}")


def read_bytes(path: str | os.PathLike, most: int = 2**33) -> bytes:
    """All of a regular file of at most ``most`` bytes.

    Raises StudyError for what is missing, larger, or a folder, pipe or device.
    """
    try:
        with open(_open_regular(path, os.O_RDONLY), "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > most:
                raise StudyError(f"{path} has {size} bytes, more than the {most} that are read; not opened")
            return file.read(size)
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        if isinstance(error, StudyError):
            raise
        why = (getattr(error, "strerror", None) or reason(error)).lower()
        raise StudyError(f"cannot read {path}: {why}; give a file that can be read") from error


def read_text(path: str | os.PathLike, most: int = 2**27) -> str:
    """The UTF-8 text of a regular file; StudyError as :func:`read_bytes`, and for other bytes."""
    try:
        return read_bytes(path, most).decode()
    except UnicodeDecodeError as error:
        raise StudyError(f"{path} is not UTF-8 text ({reason(error)}); use another copy") from error


def read_json(path: str | os.PathLike, remedy: str = "use another copy") -> dict:
    """The JSON object that a file holds; StudyError as :func:`read_text`, and for anything else."""
    text = read_text(path)
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise StudyError(f"{path} is not JSON ({reason(error)}); {remedy}") from error
    if not isinstance(found, dict):
        raise StudyError(f"{path} is not JSON of names and values; {remedy}")
    return found


def append_line(path: str | os.PathLike, line: str) -> None:
    """Add a line to a text file that is no link, made if it is not there; StudyError if that fails."""
    try:
        with open(_open_regular(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW), "a") as file:
            file.write(line + "\n")
    except OSError as error:
        raise write_fault(path, error) from error


def _open_regular(path: str | os.PathLike, flags: int) -> int:
    """A descriptor of a regular file; OSError for anything else, without waiting for a pipe's other end."""
    descriptor = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        number = errno.EISDIR if stat.S_ISDIR(mode) else errno.EINVAL
        raise OSError(number, "not a regular file", os.fspath(path))
    return descriptor


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary path beside `path`; what the block wrote there becomes `path` when it ends well.

    The temporary file keeps the suffix (some writers choose the format by it) and is on the disk
    before it is renamed, the folder after, so that a crash or a cut of power leaves the old file or the new
    one, and once the block has ended the new one. If the block raises,
    `path` is untouched and the temporary file is gone. The folder must exist: a run folder that
    vanished is a fault, not something to make anew in silence.

    Raises StudyError when the file system refuses.
    """
    path = Path(path)
    _remove_orphans(path)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()  # whatever it is: the block would write through a link
        yield temporary
        flush_to_disk(temporary)
        temporary.replace(path)
        flush_to_disk(path.parent)
    except OSError as error:
        # A block that fails to read something else says so itself.
        if error.filename is not None and Path(error.filename) not in (temporary, path.parent):
            raise
        raise write_fault(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def atomic_write(path: str | os.PathLike, content: bytes | str) -> None:
    """Write `content` (a str as UTF-8) to `path`, whole or not at all; if it holds that already, it stays."""
    path, content = Path(path), content.encode() if isinstance(content, str) else content
    with contextlib.suppress(OSError):
        is_plain = path.is_file() and not path.is_symlink()
        if is_plain and path.stat().st_size == len(content) and path.read_bytes() == content:
            return
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)


def keep_as(path: Path, kept: Path) -> None:
    """Give the content of ``path`` the second name ``kept``, in one step; its own name stays."""
    spare = kept.with_name(f"{kept.name}.spare")
    try:
        spare.unlink(missing_ok=True)
        try:
            os.link(path, spare, follow_symlinks=False)
        except (OSError, NotImplementedError):  # a file system without hard links
            shutil.copyfile(path, spare)
            flush_to_disk(spare)
        os.replace(spare, kept)
    except OSError as error:
        raise write_fault(kept, error) from error


def move_aside(folder: Path) -> Path:
    """Rename ``folder``, which this process holds, to the first free ``<name>.1``, ``.2``, ...; make it anew.

    The lock stays with the new folder: no other process comes in between. Returns the old one's new name.
    """
    number = 1
    while os.path.lexists(aside := folder.with_name(f"{folder.name}.{number}")):
        number += 1
    new = folder.with_name(f".{folder.name}.new")
    try:
        shutil.rmtree(new, ignore_errors=True)  # of a process that was killed in here
        new.mkdir()
        try:
            os.link(folder / LOCK, new / LOCK)
        except (OSError, NotImplementedError):  # without hard links, it is unheld between two renames
            os.rename(folder / LOCK, new / LOCK)
        os.rename(folder, aside)
        os.rename(new, folder)  # fails if somebody made that folder meanwhile
        (aside / LOCK).unlink(missing_ok=True)
        flush_to_disk(folder.parent)
    except OSError as error:
        raise write_fault(aside, error) from error
    return aside


def flush_to_disk(path: Path) -> None:
    """Wait until the content of a file, or the names in a folder, would survive a cut of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove_orphans(path: Path) -> None:
    """Remove what a killed process left half-written for this very `path`."""
    pattern = re.compile(rf"\.{re.escape(path.stem)}\.(\d{{1,9}})\.tmp{re.escape(path.suffix)}")
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
    descriptor = _open_lock(folder)
    try:
        _take(descriptor, folder, command or " ".join(sys.argv))
        yield descriptor
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def taking_turns(folder: Path) -> Iterator[None]:
    """Make `folder`, wait until no other process is in here with it, and keep them out meanwhile."""
    descriptor = _open_lock(folder)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _open_lock(folder: Path) -> int:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return _open_regular(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW)
    except OSError as error:
        raise write_fault(error.filename or folder, error) from error


def _take(descriptor: int, folder: Path, command: str) -> None:
    holder = {"pid": os.getpid(), "started": time.strftime("%Y-%m-%d %H:%M:%S"), "command": command}
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Written in place, not renamed: the lock belongs to this inode.
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(holder).encode(), 0)
    except BlockingIOError:
        raise StudyError(
            f"{folder} is in use by {_holder(descriptor)}; wait for it to end or choose another folder"
        ) from None
    except OSError as error:
        raise write_fault(folder, error) from error


def _holder(descriptor: int) -> str:
    try:
        holder = json.loads(os.pread(descriptor, 65536, 0))
        told = {name: str(holder[name])[:150] for name in ("pid", "started", "command")}
        return "process {pid} since {started} ({command})".format_map(told)
    except (ValueError, KeyError, TypeError):  # read between its truncation and its writing
        return "another process"
