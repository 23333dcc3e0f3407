"""FP32 masters of half-precision weights, for training at O2 (specification §8)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ..model.precision import apply_opt_level, into_half_range
from ..model.ternary import ternary_layers


class MasterWeights:
    """FP32 masters of a model's half parameters (O2); FP32 parameters are their own masters.

    Made from the FP32 model *before* it is cast, so that no bit of it is lost.
    """

    def __init__(self, model: nn.Module, level: str):
        self.model = model
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        exact = {n: p.detach().clone() for n, p in model.named_parameters()}
        apply_opt_level(model, level)
        self.parameters: dict[str, Tensor] = {}
        self.halves: dict[str, Tensor] = {}
        self.frozen: dict[str, Tensor] = {}
        for name, parameter in model.named_parameters():
            if parameter.dtype != torch.float16:
                if name in trained:
                    self.parameters[name] = parameter
            elif name in trained:
                self.parameters[name] = exact[name].requires_grad_()
                self.halves[name] = parameter
            else:
                self.frozen[name] = exact[name]
        self._half_list = list(self.halves.values())
        self._master_list = [self.parameters[name] for name in self.halves]
        masters = {**self.frozen, **self.parameters}
        ternary = {f"{name}.weight": layer.weight for name, layer in ternary_layers(model).items()}
        self._ternary = {n: (half, masters[n]) for n, half in ternary.items() if half.dtype == torch.float16}

    def take_gradients(self) -> None:
        """Move the half gradients to FP32 gradients of the masters."""
        for half, master in zip(self._half_list, self._master_list, strict=True):
            master.grad = None if half.grad is None else half.grad.float()
            half.grad = None

    @torch.no_grad()
    def publish(self) -> None:
        """Round the masters into the half parameters that the network computes with."""
        if self._half_list:
            torch._foreach_copy_(self._half_list, self._master_list)
            self._publish_ternary(self._ternary.keys() & self.halves.keys())

    def _publish_ternary(self, names: Iterable[str]) -> None:
        for name in names:
            half, master = self._ternary[name]
            half.copy_(into_half_range(master))

    def state_dict(self) -> dict[str, Tensor]:
        """The model's state dict with FP32 masters in place of every half parameter."""
        return {
            **self.model.state_dict(),
            **self.frozen,
            **{n: p.detach() for n, p in self.parameters.items()},
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Load FP32 values into masters and, rounded, into the model."""
        self.model.load_state_dict(state)
        for name, master in (*self.parameters.items(), *self.frozen.items()):
            master.copy_(state[name])
        self._publish_ternary(self._ternary)
