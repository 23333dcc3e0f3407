"""The packed network as a script for a web page.

A page opened from the file system may load scripts but fetch no file, so the network travels as one:
``globalThis.MSUNET_FILE = {"names": [...], "packed": "..."}``, ``packed`` in base64.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from pathlib import Path

from ..data.sources import CIFAR100_CLASSES
from ..errors import StudyError
from ..measure.unpack import unpack


def network_script(path: str | Path, class_names: Sequence[str] = CIFAR100_CLASSES) -> str:
    """JavaScript that hands a packed network to a page as ``MSUNET_FILE``.

    Parameters
    ----------
    path : a packed file
    class_names : a name for each class of the network, in order; ``_`` is shown as a space

    Raises
    ------
    StudyError : not a packed network, or another number of names than classes
    """
    model = unpack(path)
    classes = model.config["num_classes"]
    if len(class_names) != classes:
        raise StudyError(
            f"{len(class_names)} names for the {classes} classes of {str(path)!r}; give one for each"
        )
    packed = base64.b64encode(Path(path).read_bytes()).decode()
    names = [name.replace("_", " ") for name in class_names]
    return f"globalThis.MSUNET_FILE = {json.dumps({'names': names, 'packed': packed})};\n"
