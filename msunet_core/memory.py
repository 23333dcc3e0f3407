"""How this process uses memory and cores, settled before PyTorch starts.

Memory: keep what is freed instead of returning it to the kernel after every layer. glibc maps each
large tensor anew and unmaps it when it is freed, so a training step on a CPU touches hundreds of
megabytes of fresh pages: about half of the step is page faults. Two allocator settings end that, at the
price of a resident size that stays at its peak.

Cores: a thread of OpenMP that waits for the others spins, by default for long. Where another process
wants the core, as on a shared machine, that makes a step ten times slower; a short spin costs nothing
measurable.
"""

from __future__ import annotations

import ctypes
import os
import sys

# Parameters of mallopt(3), from glibc's <malloc.h>.
M_TRIM_THRESHOLD = -1
M_MMAP_MAX = -4

# Rounds that a waiting thread of GNU OpenMP spins before it sleeps.
SPIN_COUNT = "20000"


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0))


def spin_shortly() -> None:
    """Set GOMP_SPINCOUNT where the user did not; takes effect if PyTorch is not loaded yet."""
    if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = SPIN_COUNT


def repeat_exactly() -> None:
    """Set CUBLAS_WORKSPACE_CONFIG where the user did not, without which a GPU's matrix products may differ.

    PyTorch looks at it once, before the first product, so a stage that is to be deterministic is too late.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def keep_freed_memory() -> bool:
    """Tell the C library to reuse freed memory; True where that took effect.

    Does nothing off Linux, without glibc's ``mallopt``, or with ``MSUNET_KEEP_MEMORY=0``.
    """
    if not sys.platform.startswith("linux") or os.environ.get("MSUNET_KEEP_MEMORY") == "0":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    # mallopt answers 1 for success; musl has no such symbol. -1 turns trimming off.
    return mallopt is not None and bool(mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, -1))
