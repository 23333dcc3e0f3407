"""The packed network (:mod:`msunet_core.measure.packed_format`) as a network in PyTorch."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import StudyError
from ..files import ROOT
from ..model.architecture import VARIANTS
from ..model.checkpoint import load_checkpoint
from ..model.network import build_msunet
from ..model.precision import apply_opt_level
from ..model.ternary import GivenTernaryConv2d, ternary_layers
from .packed_reader import Reader, Stored

# The network whose accuracy README tells. Committed, so it lies in the checkout, not where runs go.
SHIPPED = ROOT / "runs" / "pretrained" / "msunet_v3.safetensors"


def unpack(path: str | Path, opt_level: str = "O3") -> nn.Module:
    """The network of a packed file, in eval mode, on the CPU.

    Parameters
    ----------
    path : file that :func:`pack` wrote
    opt_level : the precision to run at. The values are those of FP16 at any of them; "O0" computes with them
        in FP32 and is what evaluate, score and apply_opt_level bring to another level

    Raises
    ------
    StudyError : one line that names the file and the fault: missing, truncated, altered, foreign, of another
        version, or its metadata do not belong to its data
    """
    return apply_opt_level(network_of(Reader(path).read()), opt_level)


def load_network(path: str | Path, variant: str = "v3") -> tuple[nn.Module, dict]:
    """A network from a packed file, a checkpoint of the study's own or a published ``*.pth.tar``.

    Returns
    -------
    model : FP32 network in eval mode on the CPU
    info : what the file tells, as of load_checkpoint; of a packed file its metadata

    Raises
    ------
    StudyError : as :func:`unpack` and load_checkpoint do; the file holds another variant
    """
    reader = Reader(path)
    if variant not in VARIANTS or not reader.is_packed():
        return load_checkpoint(path, variant)
    found = reader.read()
    own = found.info["network"]["variant"]
    if VARIANTS[own] is not VARIANTS[variant]:
        raise StudyError(f"{path} is not an MSUNet-{variant} but an MSUNet-{own}: give that variant")
    return network_of(found), {**found.info, "dtype": "float16"}


def is_shipped() -> bool:
    """Whether the repository's network is there."""
    return SHIPPED.is_file()


def shipped() -> Path:
    """The packed file of the network that this repository ships."""
    if not is_shipped():
        raise StudyError(
            f"{SHIPPED} is not there, and no checkpoint was given; give one, or check out that file"
        )
    return SHIPPED


def network_of(stored: Stored) -> nn.Module:
    """The FP32 network, in eval mode on the CPU, of what a packed file holds."""
    with torch.random.fork_rng(devices=[]):  # building draws weights: loading must not move the seed
        model = build_msunet(**stored.info["network"])
        _fill(model, {name: torch.from_numpy(x) for name, x in stored.tensors.items()}, stored.info["eps"])
    return model


def _fill(model: nn.Module, tensors: dict[str, Tensor], eps: float) -> None:
    for name, layer in ternary_layers(model).items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, GivenTernaryConv2d(layer, tensors[f"{name}.weight"]))
    # Built as x * 1 + 0 where the file has no values: mean 0, variance 1.
    state = {**model.state_dict(), **tensors}
    model.load_state_dict(state)
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.eps = eps  # 0 where the scale has it already
    model.to(memory_format=torch.channels_last).eval()
