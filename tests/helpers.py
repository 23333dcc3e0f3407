"""What several tests make: a network as training leaves it, a checkpoint that tells anything."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor, nn

from msunet_core.model.checkpoint import digest_of


def can_compile() -> bool:
    """Whether kernels are to be had here: a C++ compiler and an x86-64 with AVX2."""
    compiler = any(shutil.which(name) for name in ("c++", "g++", "clang++"))
    return compiler and torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")


@torch.no_grad()
def lived_in(model: nn.Module) -> nn.Module:
    """Batch norms and biases as training leaves them: away from 1 and 0, statistics of some images."""
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.weight.uniform_(0.3, 1.5)
            layer.momentum = 1.0
        if getattr(layer, "bias", None) is not None:
            layer.bias.normal_(0, 0.3)
    model.train()(torch.randn(4, 3, 32, 32))
    return model.eval()


def forge(path: Path, tensors: dict[str, Tensor], info: dict) -> None:
    """Write a checkpoint with a right digest, whatever it tells."""
    text = json.dumps(info)
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    path.write_bytes(save(tensors, {"study": text, "digest": digest_of(text, tensors)}))
