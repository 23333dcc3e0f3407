"""The CPU kernels of ``kernels.cpp``: compiled at first use for this very processor, loaded, called.

That takes some ten seconds, once; what was compiled is kept in the user's cache folder. Where it is not to be
had (no compiler, another processor, ``MSUNET_FAST=0``) :func:`enabled` says so.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
from ctypes import c_float, c_int, c_long, c_void_p
from pathlib import Path

import torch
from torch import Tensor

from ..compiler import load

SOURCE = Path(__file__).with_name("kernels.cpp")

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
    """The compiled kernels; None where they cannot be had, which is warned of once."""
    otherwise = "no fast CPU kernels, PyTorch's own are used"
    if not torch.backends.openmp.is_available():
        log.warning("%s: they need OpenMP, which this PyTorch does without", otherwise)
        return None
    signatures = {
        f"msunet_{name}": ([C_TYPES[letter] for letter in signature + "i"], None)
        for name, signature in SIGNATURES.items()
    }
    # Nothing links OpenMP's library: its functions are found in the copy that PyTorch has loaded, so that
    # both use the same threads.
    return load(SOURCE, signatures, "-fopenmp", otherwise=otherwise, version=torch.__version__)


def call(name: str, *arguments) -> None:
    """Call ``msunet_<name>`` with tensors, numbers and what has an ``as_argument`` of its own."""
    given = [_pointer(argument) for argument in arguments]
    getattr(library(), f"msunet_{name}")(*given, torch.get_num_threads())


def _pointer(argument):
    if isinstance(argument, Tensor):
        return argument.data_ptr()
    return getattr(argument, "as_argument", argument)
