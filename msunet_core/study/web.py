"""The packed network as a script for a web page.

A page opened from the file system may load scripts but fetch no file, so the network travels as one:
``globalThis.MSUNET_FILE = {"names": [...], "packed": "..."}``, ``packed`` in base64.
"""

from __future__ import annotations

import base64
import json
from pathlib import Path

from ..data.sources import CIFAR100_CLASSES
from ..errors import StudyError
from ..files import read_bytes
from ..measure.packed_reader import Reader


def network_script(path: str | Path) -> str:
    """JavaScript that hands a packed network to a page as ``MSUNET_FILE``.

    Parameters
    ----------
    path : a packed file of a network of CIFAR-100

    Raises
    ------
    StudyError : not a packed network, or of another number of classes
    """
    classes = Reader(path).read().info["network"]["num_classes"]
    if classes != len(CIFAR100_CLASSES):
        raise StudyError(f"{path} has {classes} classes, not those of CIFAR-100; give a file that has them")
    packed = base64.b64encode(read_bytes(path)).decode()
    names = [name.replace("_", " ") for name in CIFAR100_CLASSES]
    return f"globalThis.MSUNET_FILE = {json.dumps({'names': names, 'packed': packed})};\n"
