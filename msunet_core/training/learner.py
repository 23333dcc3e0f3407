"""One training step and all that it changes (specification §5 to §8)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data.augment import StepPlan, augment
from ..data.cutmix import cutmix_loss, mixed_loss
from ..data.images import IMAGE_SIZE
from ..errors import StudyError
from ..fast.accelerate import accelerate
from ..model.precision import BACKOFF_FACTOR, GROWTH_FACTOR, GROWTH_INTERVAL, LOSS_SCALE
from ..model.pruning import Pruner
from ..model.ternary import freeze_ternary, set_alpha, set_gradient, ternary_layers
from .distributed import Processes, synchronise_batch_norm
from .masters import MasterWeights
from .recipe import StageConfig
from .schedules import alpha_of_epoch, image_size_of_epoch, learning_rate

# Below this a dynamic loss scale no longer answers to overflowing gradients but to broken ones.
MIN_LOSS_SCALE = 2.0**-14


@contextlib.contextmanager
def deterministic(device: torch.device) -> Iterator[None]:
    """On a GPU, only algorithms that give the same bits each time; everything is set back afterwards.

    A CPU with the same number of threads gives the same bits anyway, so there nothing is changed.
    """
    if device.type != "cuda":
        yield
        return
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    fills = torch.utils.deterministic.fill_uninitialized_memory
    cudnn = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    try:
        torch.utils.deterministic.fill_uninitialized_memory = False  # nothing here reads what nobody wrote
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = cudnn
        torch.utils.deterministic.fill_uninitialized_memory = fills


class Learner:
    """Network, FP32 masters, SGD, loss scaler and pruner: everything that a step changes.

    Parameters
    ----------
    model : FP32 network; brought to ``config.opt_level`` in place
    config : the stage; O3 is refused, it has no master weights to train
    processes : this one among those that train together

    Nesterov SGD; weight decay only on tensors of two or more dimensions (specification §6).
    """

    def __init__(self, model: nn.Module, config: StageConfig, processes: Processes | None = None):
        if getattr(model, "opt_level", "O0") != "O0":
            raise StudyError(f"the model is at {model.opt_level}, not FP32; give a fresh FP32 network")
        if config.opt_level == "O3":
            raise StudyError(
                "opt_level 'O3' is for testing: it has no FP32 master weights; train at O0, O1 or O2"
            )
        self.config = config
        self.model = model
        if config.freeze_ternary:
            freeze_ternary(model)
        set_gradient(model, config.ternary_gradient)
        self.processes = processes or Processes()
        self.rows = self.unsynchronised = None
        if self.processes.world > 1:
            device = next(model.parameters()).device
            self.rows = self.processes.share(config.batch_size).to(device)
            if config.sync_batch_norm:
                synchronise_batch_norm(model)
            else:
                self.unsynchronised = [b for b in model.buffers() if b.is_floating_point()]
        self.masters = MasterWeights(accelerate(model), config.opt_level)
        self.network = self.processes.parallel(model)
        parameters = self.masters.parameters
        decayed = [p for p in parameters.values() if p.ndim > 1]
        exempt = [p for p in parameters.values() if p.ndim <= 1]
        self.sgd = torch.optim.SGD(
            [
                {"params": decayed, "weight_decay": config.weight_decay},
                {"params": exempt, "weight_decay": 0.0},
            ],
            lr=config.lr,
            momentum=config.momentum,
            nesterov=config.momentum > 0,
            fused=True,  # one pass over memory, and it honours the loss scaler without a host synchronisation
        )
        # From zero, not left to SGD: when the first step overflows, its fused kernel writes nothing into
        # buffers that it then takes for filled.
        for parameter in parameters.values():
            self.sgd.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter, requires_grad=False)
        device = next(model.parameters()).device.type
        self.scaler = torch.amp.GradScaler(
            device,
            init_scale=LOSS_SCALE,
            growth_interval=GROWTH_INTERVAL,
            growth_factor=GROWTH_FACTOR,
            backoff_factor=BACKOFF_FACTOR,
            enabled=config.opt_level in ("O1", "O2"),
        )
        self.weights = {**self.masters.frozen, **parameters}  # FP32, by name
        self.pruner = Pruner(self.weights, config.pruner, config.ramp_epochs, config.se_sparsity)
        self.image_size = IMAGE_SIZE

    def take_momentum(self, momentum: dict[str, Tensor]) -> None:
        """Begin with this momentum of SGD, by parameter name; what is not named, or frozen now, with none."""
        for name, parameter in self.masters.parameters.items():
            if name in momentum:
                if momentum[name].shape != parameter.shape:
                    raise StudyError(
                        f"the momentum of {name} has shape {tuple(momentum[name].shape)}, "
                        f"not {tuple(parameter.shape)}; give that of this network's training"
                    )
                self.sgd.state[parameter]["momentum_buffer"].copy_(momentum[name])

    def begin_epoch(self, epoch: int, *, resumed: bool = False) -> None:
        """Set alpha, rate and image size; choose this epoch's masks, unless they came with a checkpoint."""
        self.image_size = image_size_of_epoch(self.config, epoch)
        set_alpha(self.model, alpha_of_epoch(self.config, epoch))
        self.set_rate(learning_rate(self.config, epoch))
        if not resumed:
            self.pruner.update(epoch)
            self._mask()

    def set_rate(self, rate: float) -> None:
        for group in self.sgd.param_groups:
            group["lr"] = rate

    def step(self, images: Tensor, labels: Tensor, plan: StepPlan) -> Tensor:
        """Train on one batch; returns the unscaled loss, a detached 0-d FP32 tensor on the device.

        images : uint8 (N, 32, 32, 3), the whole training set; labels : int64 (N,)
        plan : which of them, and every random choice made for them

        Nothing in here waits for the device. Of several processes each computes its share of the batch;
        weights and the returned loss are those of the whole of it, the same in all.
        """
        self.model.train()
        backward = self._backward if self.rows is None else self._backward_share
        loss = backward(images, labels, plan)
        self.masters.take_gradients()
        if not self.scaler.is_enabled():
            # A loss that is not finite must not reach the weights: the first bad layer is still to be named.
            self.sgd.found_inf = (~loss.isfinite()).float()
        self.scaler.step(self.sgd)
        self.scaler.update()
        self.sgd.zero_grad(set_to_none=True)
        self._mask()
        return loss

    def _backward(self, images: Tensor, labels: Tensor, plan: StepPlan) -> Tensor:
        loss = self.loss(augment(images[plan.order], plan), labels[plan.order], plan)
        self.scaler.scale(loss).backward()
        return loss.detach()

    def _backward_share(self, images: Tensor, labels: Tensor, plan: StepPlan) -> Tensor:
        own = plan.rows(self.rows)
        loss = self._share_loss(images, labels, plan, own)
        part = len(own.order) / len(plan.order)
        # Gradients become means over the processes, whose shares may differ by a few images.
        self.scaler.scale(loss * (part * self.processes.world)).backward()
        if self.unsynchronised:
            self.processes.average(self.unsynchronised, part)
        return self.processes.total(loss.detach() * part)

    def _share_loss(self, images: Tensor, labels: Tensor, plan: StepPlan, own: StepPlan) -> Tensor:
        inputs, targets = augment(images[own.order], own), labels[own.order]
        if not plan.use_cutmix:
            return self.cross_entropy(inputs, targets)
        others = plan.rows(plan.partner[self.rows])  # anywhere in the batch
        partners = augment(images[others.order], others), targets, labels[others.order]
        return mixed_loss(self.scores, inputs, *partners, plan.box, plan.lam, *self._mixing)

    def loss(self, inputs: Tensor, targets: Tensor, plan: StepPlan) -> Tensor:
        if plan.use_cutmix:
            chosen = plan.partner, plan.box, plan.lam
            return cutmix_loss(self.scores, inputs, targets, *chosen, *self._mixing)
        return self.cross_entropy(inputs, targets)

    @property
    def _mixing(self) -> tuple[str, float]:
        return self.config.consistency, self.config.label_smoothing

    def cross_entropy(self, inputs: Tensor, targets: Tensor) -> Tensor:
        smoothing = self.config.label_smoothing
        return F.cross_entropy(self.scores(inputs), targets, label_smoothing=smoothing)

    def scores(self, inputs: Tensor) -> Tensor:
        """Class scores of images (B, 3, 32, 32), at this epoch's size."""
        return self.network(self.resized(inputs))

    def resized(self, inputs: Tensor) -> Tensor:
        """Images (B, 3, 32, 32) shrunk to this epoch's size by the mean of their pixels."""
        if self.image_size == inputs.shape[-1]:
            return inputs
        inputs = F.interpolate(inputs, size=(self.image_size, self.image_size), mode="area")
        return inputs.contiguous(memory_format=torch.channels_last)

    def _mask(self) -> None:
        self.pruner.apply()
        self.masters.publish()

    def zeros(self) -> float:
        """Share of zeros over all ternary weights, as the network uses them now; 0 with none."""
        signs = [layer.signs() for layer in ternary_layers(self.model).values()]
        count = sum(s.numel() for s in signs)
        return 1.0 - sum(int(s.count_nonzero()) for s in signs) / count if count else 0.0

    def loss_scale(self) -> float:
        return self.scaler.get_scale()

    def state(self) -> tuple[dict[str, Tensor], dict]:
        """Tensors and numbers from which :meth:`load` restores this learner exactly."""
        tensors = {f"model/{name}": tensor for name, tensor in self.masters.state_dict().items()}
        for name, parameter in self.masters.parameters.items():
            tensors[f"momentum/{name}"] = self.sgd.state[parameter]["momentum_buffer"]
        tensors.update({f"mask/{name}": mask for name, mask in self.pruner.masks.items()})
        return tensors, {"scaler": self.scaler.state_dict()}

    def load(self, tensors: dict[str, Tensor], numbers: dict) -> None:
        self.masters.load_state_dict({n[6:]: t for n, t in tensors.items() if n.startswith("model/")})
        for name, parameter in self.masters.parameters.items():
            self.sgd.state[parameter]["momentum_buffer"].copy_(tensors[f"momentum/{name}"])
        for name, mask in self.pruner.masks.items():
            mask.copy_(tensors[f"mask/{name}"])
        if numbers["scaler"]:
            self.scaler.load_state_dict(numbers["scaler"])


def first_bad_tensor(tensors: dict[str, Tensor]) -> str | None:
    """Name of the first tensor with a NaN or Inf in it."""
    return next((name for name, tensor in tensors.items() if not tensor.isfinite().all()), None)


def first_bad_layer(model: nn.Module, inputs: Tensor) -> str:
    """Name of the first module with a NaN or Inf in its weights or its output for ``inputs``."""
    if bad := first_bad_tensor(dict(model.named_parameters())):
        return f"{bad} (its weights are not finite)"
    found: list[str] = []

    def look(name: str):
        def hook(module, args, output):
            if isinstance(output, Tensor) and not found and not output.isfinite().all():
                found.append(f"{name} (its output is not finite)")

        return hook

    hooks = [
        m.register_forward_hook(look(n)) for n, m in model.named_modules() if n and not list(m.children())
    ]
    try:
        with torch.no_grad():
            model(inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else "the loss itself"
