"""Kernels in C++, compiled at first use for this very processor and kept in the user's cache folder."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

from .errors import one_line, reason

# For this processor only, so wide vectors where it has them.
FLAGS = ("-std=c++17", "-O3", "-march=native", "-mprefer-vector-width=512", "-fPIC", "-w", "-c")
COMPILE_SECONDS = 120

log = logging.getLogger(__name__)


def load(
    source: Path,
    signatures: dict[str, tuple[list, object]],
    *flags: str,
    otherwise: str,
    link: tuple[str, ...] = (),
    version: str = "",
) -> ctypes.CDLL | None:
    """The compiled functions of a source, or None where they cannot be had, which is warned of.

    Parameters
    ----------
    signatures : by name of a C function, the types of its arguments and of its result
    otherwise : what is done without them, for the warning
    source, flags, link, version : as of :func:`compiled`
    """
    try:
        loaded = ctypes.CDLL(str(compiled(source, *flags, link=link, version=version)))
        for name, (arguments, result) in signatures.items():
            function = getattr(loaded, name)
            function.argtypes, function.restype = arguments, result
    except subprocess.CalledProcessError as error:
        lines = error.stderr.decode(errors="replace").splitlines() or [str(error)]
        log.warning("%s: the compiler failed: %s", otherwise, one_line(lines[0]))
    except (OSError, AttributeError, subprocess.SubprocessError) as error:
        log.warning("%s: %s", otherwise, reason(error))
    else:
        return loaded
    return None


def cache_folder() -> Path:
    """Where compiled kernels are kept."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "msunet"
    except RuntimeError as error:
        raise OSError("this user has no home folder; set XDG_CACHE_HOME") from error


def compiled(source: Path, *flags: str, link: tuple[str, ...] = (), version: str = "") -> Path:
    """Path of the shared library for a source, this processor and its compiler; compiled if need be.

    Parameters
    ----------
    source : its headers are those of its folder
    flags, link : further arguments to compile and to link
    version : of what else it has to fit

    Raises
    ------
    OSError, subprocess.SubprocessError : another processor, no compiler, or one that fails
    """
    if platform.machine() not in ("x86_64", "AMD64"):
        raise OSError(f"they are written for x86-64, this is {platform.machine()}")
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CXX", ""), "c++", "g++"))), None)
    if compiler is None:
        raise OSError("no C++ compiler (c++ or g++) was found")
    which = (compiler, os.stat(compiler).st_mtime, FLAGS, flags, link, version, _processor())
    content = b"".join(path.read_bytes() for path in (source, *sorted(source.parent.glob("*.h"))))
    key = hashlib.sha256(content + repr(which).encode()).hexdigest()[:20]
    path = cache_folder() / f"{source.stem}-{key}.so"
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    log.info("compiling fast CPU kernels, once: %s", path)
    # Made beside and renamed: of several processes that start at once, each ends with a whole file.
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made, linked = Path(folder) / "kernels.o", Path(folder) / "kernels.so"
        for command in (
            [*FLAGS, *flags, str(source), "-o", str(made)],
            ["-shared", str(made), *link, "-o", str(linked)],
        ):
            subprocess.run([compiler, *command], check=True, capture_output=True, timeout=COMPILE_SECONDS)
        linked.replace(path)
    return path


def _processor() -> str:
    """What decides the meaning of -march=native."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return "".join(sorted({line for line in lines if line.startswith(("model name", "flags"))}))
    return platform.processor()
