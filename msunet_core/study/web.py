"""The packed network as a script for a web page, and the names of its classes.

A page opened from the file system may load scripts but fetch no file, so the network travels as one:
``globalThis.MSUNET_FILE = {"names": [...], "packed": "..."}``, ``packed`` in base64.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from pathlib import Path

from ..errors import StudyError
from ..measure.unpack import unpack

# CIFAR-100's fine labels 0 .. 99 as the data set orders them, by the alphabet.
_NAMES = """
apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can
castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin
elephant flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard
lobster man maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear
pickup_truck pine_tree plain plate poppy porcupine possum rabbit raccoon ray road rocket rose sea seal
shark shrew skunk skyscraper snail snake spider squirrel streetcar sunflower sweet_pepper table tank
telephone television tiger tractor train trout tulip turtle wardrobe whale willow_tree wolf woman worm
"""
CIFAR100_CLASSES = tuple(_NAMES.split())


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
