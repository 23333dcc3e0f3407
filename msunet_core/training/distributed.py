"""Several processes, on one machine or more, that train one network as one process would.

``torchrun`` starts and watches the processes and PyTorch's DistributedDataParallel averages the gradients;
here is only what the study adds: which images of a batch are whose, a batch norm over all of them, and
agreement on whether to stop. A process that was not started by ``torchrun`` is one of one, and nothing here
costs it anything.

Every process draws the same plan of an epoch (see :mod:`msunet_core.data.augment`) and takes its rows of it.
Gradients, losses and statistics are reduced before they are used, so that all processes hold the same
weights, bit for bit, and come to the same decisions.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn.parallel import DistributedDataParallel

from ..data.cutmix import thirds
from ..errors import StudyError

FIRST_FAULT = "msunet/first-fault"


@dataclass(frozen=True)
class Processes:
    """This process among those of the run; the default is a process alone.

    Attributes
    ----------
    rank, world : number of this process, and of how many
    local_rank : its number on its own machine, which is also its GPU's
    host : group for what the hosts tell each other, so that no GPU is waited for
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    host: object = field(default=None, repr=False)

    @property
    def writes(self) -> bool:
        """Whether this is the one process that writes files and shows progress."""
        return self.rank == 0

    def share(self, batch_size: int) -> Tensor:
        """Rows int64 (n,) of this process in a batch: its part of each third.

        So the three passes of CutMix with consistency (specification §5), which exchange thirds within a
        process, are together exactly those of the whole batch: cutting the share in three falls on the
        same borders. Shares of two processes differ by three images at most.
        """
        if batch_size < 3 * self.world:
            raise StudyError(
                f"batch_size {batch_size} is too small for {self.world} processes; give at least "
                f"{3 * self.world} or start fewer"
            )
        whole = thirds(torch.arange(batch_size))
        return torch.cat([third.tensor_split(self.world)[self.rank] for third in whole])

    def parallel(self, model: nn.Module) -> nn.Module:
        """``model`` with gradients that are means over the processes; the module itself if alone.

        Buffers are left alone: synchronised batch norm keeps them equal, else :meth:`average` does.
        """
        if self.world == 1:
            return model
        # Of 1x1 kernels, whose two memory layouts are one and the same.
        warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
        device = next(model.parameters()).device
        devices = [device] if device.type == "cuda" else None
        return DistributedDataParallel(model, device_ids=devices, broadcast_buffers=False)

    def total(self, tensor: Tensor) -> Tensor:
        """``tensor``, overwritten by its sum over the processes; the host does not wait for a GPU."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def average(self, tensors: list[Tensor], weight: float) -> None:
        """Overwrite float tensors by their means over the processes, this one counting ``weight``."""
        if self.world > 1 and tensors:
            flat = self.total(torch.cat([t.flatten() for t in tensors]).mul_(weight))
            for tensor, mean in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
                tensor.copy_(mean.view_as(tensor))

    def greatest(self, number: int) -> int:
        """The greatest of the processes' numbers; all wait here for each other."""
        if self.world == 1:
            return number
        found = torch.tensor(number)
        dist.all_reduce(found, dist.ReduceOp.MAX, group=self.host)
        return int(found)

    def tell(self, value):
        """The value that process 0 has, told to all."""
        if self.world == 1:
            return value
        told = [value]
        dist.broadcast_object_list(told, src=0, group=self.host, device=torch.device("cpu"))
        return told[0]

    def device_name(self, name: str) -> str:
        """The device of this process where the user named ``name``: of several, each has a GPU of its own."""
        if self.world == 1 or name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
            return name
        if name not in ("auto", "cuda"):
            raise StudyError(
                f"device {name!r} with {self.world} processes; give cuda (a GPU for each) or cpu"
            )
        if self.local_rank >= torch.cuda.device_count():
            raise StudyError(
                f"process {self.local_rank} of this machine has no GPU ({torch.cuda.device_count()} found); "
                "start fewer processes or give device cpu"
            )
        return f"cuda:{self.local_rank}"


def rank() -> int:
    """Number of this process, as torchrun says; 0 without it."""
    return int(os.environ.get("RANK", "0")) if _world() > 1 else 0


def _world() -> int:
    return int(os.environ.get("WORLD_SIZE", "1")) if "TORCHELASTIC_RUN_ID" in os.environ else 1


def _store() -> dist.Store:
    return next(iter(dist.rendezvous("env://")))[0]


def first_to_fail() -> bool:
    """Whether no other process of the run has failed before: only the first one's fault is worth telling.

    What the others raise is that they lost it. Call it only to report a fault.
    """
    if _world() == 1:
        return True
    own = str(rank())
    try:
        return _store().compare_set(FIRST_FAULT, "", own).decode() == own
    except RuntimeError:  # torchrun itself is gone
        return True


@contextlib.contextmanager
def joined(device: str) -> Iterator[Processes]:
    """This process among those that torchrun started, connected from the first stage to the process's end.

    Parameters
    ----------
    device : as the user named it: with a GPU for each process they speak NCCL, else Gloo

    Raises
    ------
    StudyError : in a process that fails because another one did
    """
    if _world() == 1:
        yield Processes()
        return
    alone = Processes(rank(), _world(), int(os.environ["LOCAL_RANK"]))
    try:
        host = _connect(alone, alone.device_name(device).startswith("cuda"))
        yield Processes(alone.rank, alone.world, alone.local_rank, host)
    except Exception as error:
        # A process that fails must end, and closing its connections could wait for one that is gone.
        atexit.unregister(dist.destroy_process_group)
        if not first_to_fail() and isinstance(error, RuntimeError):
            raise StudyError("another process of this run failed; its error line says why") from error
        raise


@functools.cache
def _connect(process: Processes, on_gpu: bool) -> dist.ProcessGroup:
    """Connect the processes, once; returns the group that speaks without a GPU."""
    if on_gpu:
        torch.cuda.set_device(process.local_rank)
    store = dist.PrefixStore("msunet", _store())
    backend = "nccl" if on_gpu else "gloo"
    dist.init_process_group(backend, store=store, rank=process.rank, world_size=process.world)
    # A group that goes with the last DistributedDataParallel that holds it can deadlock: its threads want
    # Python's lock from the one that waits for them. So it never goes: this reference is not given back.
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(dist.group.WORLD))
    atexit.register(dist.destroy_process_group)
    return dist.new_group(backend="gloo") if on_gpu else dist.group.WORLD


# --- batch norm --------------------------------------------------------------------------------------------


class SyncBatchNorm2d(nn.BatchNorm2d):
    """Batch norm whose training statistics are those of all processes' images together.

    PyTorch's own does not run on a CPU, and on a GPU it reads its counts on the host in every layer.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        y, mean, var, count = _SyncNorm.apply(x, self.weight, self.bias, self.eps)
        with torch.no_grad():
            unbiased = var * (count / (count - 1))
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
            self.running_var.lerp_(unbiased.to(self.running_var.dtype), self.momentum)
            self.num_batches_tracked.add_(1)
        return y


def synchronise_batch_norm(model: nn.Module) -> None:
    """Make every batch norm of a model a synchronised one, in place; names and tensors stay."""
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = SyncBatchNorm2d  # the same state, so nothing that refers to it is lost


class _SyncNorm(Function):
    """Normalise by the moments of all processes; also returns mean, biased variance and count (0-d)."""

    @staticmethod
    def forward(ctx, x, weight, bias, eps):
        wide = _wide(x)
        var, mean = torch.var_mean(wide, _ALL_BUT_CHANNELS, correction=0)
        own = torch.cat([mean, var, mean.new_full((1,), x.numel() // x.shape[1])])
        parts = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, own)
        # Chan's rule, in the processes' order, so that all of them get the same bits.
        means, variances, counts = torch.stack(parts).split([len(mean), len(mean), 1], dim=1)
        count = counts.sum()
        mean = (counts * means).sum(0) / count
        var = (counts * (variances + (means - mean).square())).sum(0) / count
        scale = (var + eps).rsqrt()
        ctx.save_for_backward(x, weight, mean, scale, count)
        ctx.mark_non_differentiable(mean, var, count)
        slope = scale * weight
        y = torch.addcmul(_pixel(bias), wide - _pixel(mean), _pixel(slope))
        return y.to(x.dtype), mean, var, count

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, *_):
        x, weight, mean, scale, count = ctx.saved_tensors
        wide_dy = _wide(dy)
        normal = (_wide(x) - _pixel(mean)) * _pixel(scale)
        dbias, dweight = wide_dy.sum(_ALL_BUT_CHANNELS), (wide_dy * normal).sum(_ALL_BUT_CHANNELS)
        sums = torch.stack([dbias, dweight])
        dist.all_reduce(sums)
        of_dy, of_product = (sums / count).unbind()
        dx = (wide_dy - _pixel(of_dy) - normal * _pixel(of_product)) * _pixel(scale * weight)
        # The parameters' own gradients stay this process's: DistributedDataParallel reduces them.
        return dx.to(x.dtype), dweight.to(weight.dtype), dbias.to(weight.dtype), None


_ALL_BUT_CHANNELS = (0, 2, 3)


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype == torch.float16 else x


def _pixel(of_channels: Tensor) -> Tensor:
    return of_channels[:, None, None]
