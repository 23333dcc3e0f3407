"""The CPU kernels of ``kernels.cpp``: compiled at first use for this very processor, loaded, called.

That takes some ten seconds, once; what was compiled is kept in the user's cache folder. Where it is not to be
had (no compiler, another processor, ``MSUNET_FAST=0``) :func:`enabled` says so.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from ctypes import c_float, c_int, c_long, c_void_p
from pathlib import Path

import torch
from torch import Tensor

SOURCE = Path(__file__).with_name("kernels.cpp")
# Kernels are for this processor only, so wide vectors where it has them. Nothing links OpenMP's library:
# its functions are found in the copy that PyTorch has loaded, so that both use the same threads.
COMPILE = ("-std=c++17", "-O3", "-march=native", "-mprefer-vector-width=512", "-fopenmp", "-fPIC", "-w", "-c")
COMPILE_SECONDS = 120


# C signature of each function of kernels.cpp, without the last argument, the threads: p pointer, i int,
# l long, f float.
SIGNATURES = {
    "moments": "iplllp",
    "norm": "pllppppffp",
    "apply": "iippplllp",
    "sums": "iipplllpp",
    "combine": "ppplllppp",
    "norm_gradient": "iippplllp",
    "conv_forward": "iiilpppppllllllppp",
    "conv_backward": "iiilpppllllllppppppppppppppppp",
    "products": "ipllllpp",
    "complete": "ipppplllpp",
    "project": "iippllppplppp",
    "project_backward": "iipppllpppppp",
    "residual": "iiilpppppllllllpppplppi",
}
C_TYPES = {"p": c_void_p, "i": c_int, "l": c_long, "f": c_float}

log = logging.getLogger(__name__)


def enabled() -> bool:
    """Whether the kernels are there and not switched off."""
    return os.environ.get("MSUNET_FAST") != "0" and library() is not None


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels; None where they cannot be had, for a reason that is logged once."""
    try:
        loaded = ctypes.CDLL(str(_compiled()))
        for name, signature in SIGNATURES.items():
            function = getattr(loaded, f"msunet_{name}")
            function.argtypes, function.restype = [C_TYPES[letter] for letter in signature + "i"], None
    except (OSError, AttributeError, subprocess.SubprocessError) as error:
        log.info("no fast CPU kernels, PyTorch's own are used: %s", str(error).splitlines()[0])
        return None
    return loaded


def cache_folder() -> Path:
    """Where compiled kernels are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "msunet"


def _compiled() -> Path:
    """Path of the shared library for this source, processor, compiler and PyTorch, compiled if need be."""
    if platform.machine() not in ("x86_64", "AMD64") or not torch.backends.openmp.is_available():
        raise OSError(f"they are written for x86-64 and OpenMP, this is {platform.machine()}")
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CXX", ""), "c++", "g++"))), None)
    if compiler is None:
        raise OSError("no C++ compiler (c++ or g++) was found")
    which = (compiler, os.stat(compiler).st_mtime, COMPILE, torch.__version__, _processor())
    key = hashlib.sha256(SOURCE.read_bytes() + repr(which).encode()).hexdigest()[:20]
    path = cache_folder() / f"kernels-{key}.so"
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    log.info("compiling fast CPU kernels, once: %s", path)
    # Made beside and renamed: of several processes that start at once, each ends with a whole file.
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made, linked = Path(folder) / "kernels.o", Path(folder) / "kernels.so"
        for command in (
            [*COMPILE, str(SOURCE), "-o", str(made)],
            ["-shared", str(made), "-o", str(linked)],
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


def call(name: str, *arguments) -> None:
    """Call ``msunet_<name>`` with tensors, numbers and what has ``pointers`` or is ``given`` to C."""
    given = [_pointer(argument) for argument in arguments]
    getattr(library(), f"msunet_{name}")(*given, torch.get_num_threads())


def _pointer(argument):
    if isinstance(argument, Tensor):
        return argument.data_ptr()
    return getattr(argument, "as_argument", argument)
