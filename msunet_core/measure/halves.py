"""What FP16 does to a network: dtypes of each level, weights moved across alpha, errors by layer."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from contextlib import contextmanager

import pandas as pd
import torch
from torch import Tensor, nn

from ..data.images import IMAGE_SIZE, normalise
from ..model.precision import OPT_LEVELS, apply_opt_level
from ..model.ternary import ternary_layers

OUTPUTS = r"conv_stem|blocks\.\d\.\d|conv_head|classifier"  # modules whose outputs are compared
SHORT = {torch.float32: "FP32", torch.float16: "FP16"}


@torch.no_grad()
def dtypes_by_level(model: nn.Module) -> pd.DataFrame:
    """What is stored and what flows at each opt level, seen on copies of an MSUNet with one image.

    Returns
    -------
    DataFrame, a row a level: ``convolution weights``, ``batch norm``, ``image in``,
    ``out of a convolution``, ``out of a batch norm``, ``class scores``, "FP32" or "FP16"; ``bytes`` of all
    tensors
    """
    rows = {}
    for level in OPT_LEVELS:
        network = apply_opt_level(copy.deepcopy(model), level).eval()
        with _watched(network, ("conv_stem", "bn1")) as seen:
            scores = network(torch.zeros(1, 3, IMAGE_SIZE, IMAGE_SIZE))
        tensors = [t for t in network.state_dict().values() if t.is_floating_point()]
        found = {
            "convolution weights": network.conv_stem.weight,
            "batch norm": network.bn1.running_var,
            "image in": seen["conv_stem"][0],
            "out of a convolution": seen["conv_stem"][1],
            "out of a batch norm": seen["bn1"][1],
            "class scores": scores,
        }
        rows[level] = {name: SHORT[tensor.dtype] for name, tensor in found.items()}
        rows[level]["bytes"] = sum(t.numel() * t.element_size() for t in tensors)
    return pd.DataFrame.from_dict(rows, orient="index")


def crossings(model: nn.Module) -> pd.DataFrame:
    """The ternary weights that another T belongs to at O3, where their tensor is rounded to FP16.

    Parameters
    ----------
    model : FP32 network whose ternary layers hold float weights; left as it is

    Returns
    -------
    DataFrame, a row a weight: ``layer``, ``index`` (in the flattened tensor), ``weight`` and ``half`` (before
    and after rounding; where FP16 cannot hold W, after a rescaling too, which T does not see), ``z`` and
    ``z_half`` ((W - mean W) / std W, in FP64), ``alpha`` (0 of a binary layer), ``t`` and ``t_half``
    """
    rows = []
    at_o3 = ternary_layers(apply_opt_level(copy.deepcopy(model), "O3"))
    for name, layer in ternary_layers(model).items():
        weight, half = (x.weight.detach().double().flatten() for x in (layer, at_o3[name]))
        t, t_half = (x.signs().double().flatten() for x in (layer, at_o3[name]))
        z, z_half = _standardized(weight), _standardized(half)
        for i in (t != t_half).nonzero().flatten().tolist():
            numbers = {"weight": weight, "half": half, "z": z, "z_half": z_half, "t": t, "t_half": t_half}
            rows.append(
                {"layer": name, "index": i, "alpha": 0.0 if layer.weights == "binary" else layer.alpha}
                | {column: tensor[i].item() + 0.0 for column, tensor in numbers.items()}
            )
    columns = ["layer", "index", "weight", "half", "z", "z_half", "alpha", "t", "t_half"]
    return pd.DataFrame(rows, columns=columns)


@torch.no_grad()
def rounded(model: nn.Module) -> nn.Module:
    """A copy that computes in FP32 with weights and statistics rounded to FP16."""
    copied = copy.deepcopy(model)
    copied.load_state_dict(apply_opt_level(copy.deepcopy(model), "O3").state_dict())
    return copied


def _standardized(weight: Tensor) -> Tensor:
    return (weight - weight.mean()) / weight.std()


@torch.no_grad()
def layer_errors(exact: nn.Module, other: nn.Module, images: Tensor) -> pd.Series:
    """How far the outputs of another network are from the exact one's, layer by layer.

    Parameters
    ----------
    exact, other : networks with the same modules on the CPU, at any opt levels; left as they are
    images : uint8 (N, 32, 32, 3)

    Returns
    -------
    Series by layer (stem, each block, head, classifier): the standard deviation of the difference in parts
    of that of the exact output
    """
    outputs = []
    for model in (exact, other):
        network = copy.deepcopy(model).eval()
        names = [n for n, _ in network.named_modules() if re.fullmatch(OUTPUTS, n)]
        with _watched(network, names) as seen:
            network(normalise(images))
        outputs.append({name: out.float() for name, (_, out) in seen.items()})
    ours, theirs = outputs
    return pd.Series({n: ((theirs[n] - ours[n]).std() / ours[n].std()).item() for n in ours})


@contextmanager
def _watched(network: nn.Module, names) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """What goes into and comes out of modules, by name, while the network is called inside this context."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def hook(name: str):
        # Copies: an activation may be computed in place afterwards.
        return lambda module, args, output: seen.update({name: (args[0].clone(), output.clone())})

    handles = [network.get_submodule(name).register_forward_hook(hook(name)) for name in names]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
