"""A training step in few launches: every ternary weight at once, and CUDA graphs of the whole step.

At 20,000 images a second a step of 256 takes 13 ms, in which Python cannot launch its thousand kernels.
A CUDA graph records them once and launches them as one. What differs from step to step lies in buffers
that the graph reads: the plan's choices, the learning rate, the thresholds of the ternary layers.
"""

from __future__ import annotations

import contextlib
import logging
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import fields, replace

import torch
from torch import Tensor, nn

from . import gpu
from .augment import StepPlan
from .fast import switched_off
from .ternary import TernaryConv2d, shared_kernels, ternary_groups

# Steps of a kind that run launch by launch before it is recorded: kernels are compiled, checked and timed,
# cuDNN chooses its algorithms, and none of that may happen while a graph is captured.
WARM_UP = 3

log = logging.getLogger(__name__)

# --- ternary weights -------------------------------------------------------------------------

_tables: weakref.WeakKeyDictionary[nn.Module, tuple[list[tuple[TernaryConv2d, ...]], gpu.TernaryTable | None]]
_tables = weakref.WeakKeyDictionary()


@contextlib.contextmanager
def ternarized_once(model: nn.Module) -> Iterator[None]:
    """Inside this context, that of one step, each ternary layer of ``model`` is ternarized once.

    On a GPU all of them are, by three kernels; elsewhere each when it is called first.
    """
    groups, table = _table(model)
    if table is None:
        with shared_kernels():
            yield
        return
    table.set_alphas(_alphas(groups))
    folded = gpu.fold_all(table, [layer.weight for layers in groups for layer in layers])
    with shared_kernels(dict(zip(groups, folded, strict=True))):
        yield


def _alphas(groups: list[tuple[TernaryConv2d, ...]]) -> list[float]:
    return [-1.0 if layer.weights == "binary" else layer.alpha for layers in groups for layer in layers]


def _table(model: nn.Module) -> tuple[list[tuple[TernaryConv2d, ...]], gpu.TernaryTable | None]:
    """The groups of ternary layers, and their table where the GPU's kernels apply."""
    groups, table = _tables.get(model) or (ternary_groups(model), None)
    weights = [layer.weight for layers in groups for layer in layers]
    kinds = {(weight.device, weight.dtype) for weight in weights}
    if len(kinds) != 1 or not weights[0].is_cuda or weights[0].dtype not in gpu.AGREE or switched_off():
        return groups, None
    if not gpu.works("ternary weights", weights[0].device):
        return groups, None
    if table is None or table.chunks.device != weights[0].device:
        table = gpu.TernaryTable(weights, [len(layers) for layers in groups])
        _tables[model] = groups, table
    return groups, table


def follow_alphas(model: nn.Module) -> tuple[float, ...]:
    """Hand the layers' thresholds to the device; returns those that a graph would hold fast."""
    groups, table = _table(model)
    if table is None:
        return tuple(_alphas(groups))
    table.set_alphas(_alphas(groups))
    return ()


# --- the whole step --------------------------------------------------------------------------

Step = Callable[[], Tensor]


def capture(run: Step) -> tuple[Callable[[], None], Tensor]:
    """Record what ``run`` launches as a CUDA graph: how to replay it, and the result it writes."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=_side_stream()):
        result = run()
    return graph.replay, result


def call_again(run: Step) -> tuple[Callable[[], None], Tensor]:
    """What :func:`capture` does, without a graph: for tests where there is no GPU."""
    result = torch.zeros(())
    return lambda: result.copy_(run()), result


_streams: list[torch.cuda.Stream] = []


def _side_stream() -> torch.cuda.Stream:
    if not _streams:
        _streams.append(torch.cuda.Stream())
    return _streams[0]


class StepGraphs:
    """The steps of a learner, recorded once for each kind of step and then replayed.

    Plain and CutMix steps are two kinds; another image size, batch size or data set makes new ones. Where
    this does not apply (CPU, several processes, deterministic training, ``MSUNET_FAST=0``) and after a
    failure, which is logged, steps run launch by launch.

    Parameters
    ----------
    record : :func:`capture`, or what stands in for it; None: nothing is recorded
    """

    def __init__(self, record: Callable | None):
        self.record = record
        self.seen: Counter = Counter()
        self.recorded: dict[tuple, _Recorded] = {}

    def __call__(self, learner, images: Tensor, labels: Tensor, plan: StepPlan) -> Tensor:
        """One step of a learner: the loss that its ``run_step`` returns."""
        if self.record is None or switched_off() or torch.are_deterministic_algorithms_enabled():
            return learner.run_step(images, labels, plan)
        fixed = follow_alphas(learner.model)
        where = images.data_ptr(), labels.data_ptr(), plan.order.shape, plan.augment
        common = (*where, learner.image_size, fixed)
        key = (*common, plan.use_cutmix)
        if key not in self.recorded:
            self.seen[key] += 1
            if self.seen[key] <= WARM_UP:
                return self._aside(lambda: learner.run_step(images, labels, plan))
            # Graphs of an earlier kind keep their memory; two kinds at a time is all that an epoch needs.
            self.recorded = {k: r for k, r in self.recorded.items() if k[:-1] == common}
            try:
                self.recorded[key] = self._recorded(learner, images, labels, plan)
            except Exception as error:  # whatever a driver may raise: training goes on without
                log.warning("steps are not recorded as CUDA graphs: %s", str(error).splitlines()[:1])
                self.record = None
                _forget_step(learner)
                return learner.run_step(images, labels, plan)
        return self.recorded[key](plan, learner.sgd)

    def _aside(self, run: Step) -> Tensor:
        """Run on the stream that is captured later, so that its libraries have what they need there."""
        if self.record is not capture:
            return run()
        main, side = torch.cuda.current_stream(), _side_stream()
        side.wait_stream(main)
        with torch.cuda.stream(side), _tuned():
            loss = run()
        main.wait_stream(side)
        loss.record_stream(main)
        return loss

    def _recorded(self, learner, images: Tensor, labels: Tensor, plan: StepPlan) -> _Recorded:
        main = torch.cuda.current_stream() if images.is_cuda else None
        try:
            with _tuned():
                return _Recorded(learner, images, labels, plan, self.record)
        finally:
            if main is not None:  # a capture that fails leaves its own behind
                torch.cuda.set_stream(main)


class _Recorded:
    """One recorded step: the buffers that it reads, and how to replay it."""

    def __init__(self, learner, images: Tensor, labels: Tensor, plan: StepPlan, record: Callable):
        tensors = {f.name: getattr(plan, f.name) for f in fields(plan)}
        self.plan = replace(plan, **{n: t.clone() for n, t in tensors.items() if isinstance(t, Tensor)})
        self.inputs = images, labels  # the graph knows only their addresses
        # The fused SGD of a GPU reads FP32; that of a CPU reads the number out of the tensor.
        dtype = torch.float32 if images.is_cuda else torch.float64
        self.given = [float(group["lr"]) for group in learner.sgd.param_groups]
        self.rates = [torch.full((), rate, dtype=dtype, device=images.device) for rate in self.given]

        def run() -> Tensor:
            groups = learner.sgd.param_groups
            given = [group["lr"] for group in groups]
            for group, rate in zip(groups, self.rates, strict=True):
                group["lr"] = rate
            try:
                return learner.run_step(images, labels, self.plan)
            finally:
                for group, rate in zip(groups, given, strict=True):
                    group["lr"] = rate

        self.replay, self.loss = record(run)

    def __call__(self, plan: StepPlan, sgd: torch.optim.Optimizer) -> Tensor:
        for field in fields(plan):
            if isinstance(value := getattr(plan, field.name), Tensor):
                getattr(self.plan, field.name).copy_(value)
        given = [float(group["lr"]) for group in sgd.param_groups]
        if given != self.given:
            for tensor, rate in zip(self.rates, given, strict=True):
                tensor.fill_(rate)
            self.given = given
        self.replay()
        return self.loss.clone()  # the next replay overwrites it


@contextlib.contextmanager
def _tuned() -> Iterator[None]:
    """Inside this context cuDNN times its algorithms for each new shape and keeps the fastest."""
    before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def _forget_step(learner) -> None:
    """Undo what half a step has left behind in Python."""
    for parameter in (*learner.model.parameters(), *learner.masters.parameters.values()):
        parameter.grad = None
    learner.scaler._per_optimizer_states.clear()
    for name in ("grad_scale", "found_inf"):
        learner.sgd.__dict__.pop(name, None)
