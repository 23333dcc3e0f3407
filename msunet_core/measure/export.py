"""The network for other runtimes: as an ONNX file, and timed beside PyTorch."""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import onnxruntime
import torch
from torch import Tensor, nn

from ..data.images import IMAGE_SIZE, normalise
from ..errors import StudyError
from ..files import atomic_path
from ..model.network import build_msunet
from ..model.ternary import ternary_layers, ternary_scale
from .evaluation import BATCH_SIZE


@torch.no_grad()
def plain_network(model: nn.Module) -> nn.Module:
    """The same function with an ordinary convolution of sqrt(M) * T in place of each ternary one.

    Parameters
    ----------
    model : FP32 network of build_msunet, or one unpacked at "O0"; left as it is

    Returns
    -------
    FP32 network in eval mode, on the CPU

    Raises
    ------
    StudyError : a network at another opt level
    """
    level = getattr(model, "opt_level", "O0")
    if level != "O0":
        raise StudyError(f"the network is at {level}, not FP32; export the one of opt level O0")
    with torch.random.fork_rng(devices=[]):
        network = build_msunet(**{**model.config, "weights": "float"})
    state = model.state_dict()
    for name, layer in ternary_layers(model).items():
        signs = layer.signs()
        state[f"{name}.weight"] = signs * ternary_scale(signs)
    network.load_state_dict(state)
    for ours, theirs in zip(network.modules(), model.modules(), strict=True):
        if isinstance(ours, nn.BatchNorm2d):
            ours.eps = theirs.eps
    return network.eval()


def export_onnx(model: nn.Module, path: str | Path) -> Path:
    """Write a network as an ONNX file of FP32 arithmetic, whole or not at all.

    Its input ``images`` is float32 (B, 3, 32, 32), normalised, for any B; its output ``scores`` (B, classes).
    ONNX has neither ternary nor sparse weights, so the file is as large as the dense network.

    Raises
    ------
    StudyError : a network at another opt level than O0; a file that cannot be written
    """
    network = plain_network(model)
    example = torch.zeros(2, 3, IMAGE_SIZE, IMAGE_SIZE)
    with atomic_path(path) as temporary, torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's, about PyTorch's own insides
        program = torch.onnx.export(
            network,
            (example,),
            input_names=["images"],
            output_names=["scores"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            verbose=False,
        )
        for node in program.model.graph:
            node.metadata_props.clear()  # where on this machine the code lies that called each operation
        program.save(temporary, external_data=False)
    return Path(path)


class OnnxNetwork:
    """An ONNX file in onnxruntime, on the CPU with as many threads as PyTorch uses."""

    def __init__(self, path: str | Path):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def __call__(self, images: Tensor) -> Tensor:
        """Class scores, float32 (B, classes), of normalised images, float32 (B, 3, 32, 32)."""
        (scores,) = self.session.run(["scores"], {"images": images.contiguous().numpy()})
        return torch.from_numpy(scores)

    def class_scores(self, images: Tensor) -> Tensor:
        """Class scores, float32 (N, classes), of uint8 images (N, 32, 32, 3)."""
        return torch.cat([self(normalise(batch)) for batch in images.split(BATCH_SIZE)])


@torch.no_grad()
def milliseconds(network: Callable[[Tensor], Tensor], batch: int, repeats: int = 20) -> float:
    """Median time on the CPU of a batch of that many images, after two calls that do not count."""
    images = torch.randn(batch, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(0))
    times = []
    for _ in range(repeats + 2):
        began = time.perf_counter()
        network(images)
        times.append(1000 * (time.perf_counter() - began))
    return statistics.median(times[2:])
