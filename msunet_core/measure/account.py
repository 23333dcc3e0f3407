"""What the score counts beside what lies on the disk, layer by layer."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from ..errors import StudyError
from .packed_format import PARTS
from .packed_reader import Reader
from .scoring import FULL_BITS, score
from .unpack import network_of


def account(path: str | Path) -> pd.DataFrame:
    """What the score counts and what lies on the disk, layer by layer.

    Parameters
    ----------
    path : a packed file

    Returns
    -------
    DataFrame, a row for each layer that stores something and two for what is no layer, indexed by name:
        ``kind``; ``scored`` (bits that the score at O3 counts); the bytes of ``mask``, ``sign``, ``values``,
        ``scale``, ``shift``, ``statistics`` and ``header`` (in eighths, since layers share bytes); ``bytes``,
        their sum; ``difference`` (``bytes`` less the scored ones) and its ``reason``. The sum of ``bytes`` is
        the size of the file, that of ``scored`` 32 times the score's parameters.
    """
    found = Reader(path).read()
    counted = score(network_of(found), "O3").layers.set_index("name")["params"]
    rows = [
        {"layer": name, "kind": kind, "scored": round(counted.pop(name) * FULL_BITS), **found.bits[name]}
        for name, kind in found.kinds.items()
    ]
    if counted.sum():
        raise StudyError(f"the score counts parameters of {counted.idxmax()}, which no packed file has")
    fill = {part: -sum(bits.get(part, 0) for bits in found.bits.values()) % 8 for part in ("mask", "sign")}
    rows.append({"layer": "last byte of the bit streams", "kind": "file", **fill})
    rows.append({"layer": "header", "kind": "file", "header": 8 * found.header})
    table = pd.DataFrame(rows).set_index("layer").reindex(columns=["kind", "scored", *PARTS])
    table = table.fillna(dict.fromkeys(["scored", *PARTS], 0))
    table["scored"] = table["scored"].astype(int)
    table[list(PARTS)] /= 8
    table["bytes"] = table[list(PARTS)].sum(axis=1)
    table["difference"] = table["bytes"] - table["scored"] / 8
    table["reason"] = [_reason(row) for row in table.itertuples()]
    return table


def _reason(row) -> str:
    if row.difference == 0:
        return ""
    if row.Index == "header":
        return "metadata: network, provenance, digest"
    if row.kind == "file":
        return "bits that fill a byte"
    if row.Index == "classifier":
        return "the score leaves out the bias of a linear layer"
    if row.statistics:
        return "not merged: all four vectors are kept"
    return "one scale a channel cannot hide in the layer's one number"
