"""The GPU part of ``bench.py``: the released way and ours on one device, in turns, at O2.

The released way: NCHW, PyTorch's modules one by one, FP32 masters, loss scaling that asks the host at each
step, images transformed one by one in worker processes. Ours: ``Learner.step``, with all it does.
"""

from __future__ import annotations

import contextlib
import functools
import os
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from bandwidth import copy_bandwidth, seconds, step_bytes, wait
from released import TransformedImages, consistency_loss, released_network
from torch import Tensor
from torch.utils.data import DataLoader

from msunet_core import StageConfig, apply_opt_level, build_msunet, fast, gpu
from msunet_core.augment import augment, draw_epoch_plan
from msunet_core.evaluation import class_scores
from msunet_core.precision import LOSS_SCALE, MasterWeights
from msunet_core.training import Learner

WARM_UP = 8  # steps: kernels are compiled, timed and recorded


def random_images(count: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 32, 32, 3), dtype=torch.uint8, generator=draw)
    return images, torch.randint(0, 100, (count,), generator=draw)


class Released:
    def __init__(self, batch: int, device: torch.device):
        self.batch, self.device = batch, device
        network = released_network().to(device)
        self.masters = MasterWeights(network, "O2")
        parameters = self.masters.parameters.values()
        groups = [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": 1e-4},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ]
        self.sgd = torch.optim.SGD(groups, lr=1e-3, momentum=0.9, nesterov=True, foreach=False)
        self.scaler = torch.amp.GradScaler(device.type, init_scale=LOSS_SCALE)
        self.inputs = torch.randn(batch, 3, 32, 32, device=device)
        self.labels = random_images(batch)[1].to(device)

    def train(self, inputs: Tensor, labels: Tensor, has_consistency: bool) -> None:
        network = self.masters.model.train()
        if has_consistency:
            loss = consistency_loss(network, inputs, labels)
        else:
            loss = F.cross_entropy(network(inputs), labels)
        self.scaler.scale(loss).backward()
        self.masters.take_gradients()
        self.scaler.step(self.sgd)
        self.scaler.update()
        self.sgd.zero_grad()
        self.masters.publish()
        loss.item()

    def steps(self, count: int, has_consistency: bool) -> None:
        for _ in range(count):
            self.train(self.inputs, self.labels, has_consistency)

    def epoch(self, images: int) -> None:
        data = TransformedImages(*random_images(images))
        workers = min(os.cpu_count(), 16)
        loader = DataLoader(
            data,
            self.batch,
            shuffle=True,
            drop_last=True,
            num_workers=workers,
            pin_memory=self.device.type == "cuda",
        )
        for inputs, labels in loader:
            self.train(inputs.to(self.device), labels.to(self.device), False)


class Ours:
    def __init__(self, batch: int, device: torch.device):
        self.batch, self.device = batch, device
        torch.manual_seed(0)
        config = StageConfig(epochs=1, batch_size=batch, lr=1e-3, alpha=0.67749, opt_level="O2")
        self.learner = Learner(build_msunet().to(device), config)
        self.learner.begin_epoch(0)
        self.learner.set_rate(1e-3)
        self.images, self.labels = (t.to(device) for t in random_images(batch))
        self.plans = {
            has_consistency: self.plan(batch, float(has_consistency)).step(0)
            for has_consistency in (False, True)
        }

    def plan(self, images: int, cutmix_probability: float = 0.0):
        names = {"seed": 0, "stage": "bench", "epoch": 0}
        return draw_epoch_plan(images, self.batch, cutmix_probability=cutmix_probability, **names).to(
            self.device
        )

    def steps(self, count: int, has_consistency: bool) -> None:
        for _ in range(count):
            self.learner.step(self.images, self.labels, self.plans[has_consistency])

    def epoch(self, images: int) -> None:
        pictures, labels = self.data_set(images)
        plan = self.plan(images)
        for i in range(len(plan)):
            self.learner.step(pictures, labels, plan.step(i))

    @functools.cache  # noqa: B019, a graph knows its data by their address
    def data_set(self, images: int) -> tuple[Tensor, ...]:
        return tuple(tensor.to(self.device) for tensor in random_images(images))


def compare(work: dict[str, Callable[[], None]], images: int, device: torch.device, repeats: int) -> dict:
    """Images a second of each way, in turns; the first turn warms up."""
    rates: dict[str, list[float]] = {way: [] for way in work}
    for turn in range(repeats + 1):
        for way, run in work.items():
            wait(device)
            began = time.perf_counter()
            run()
            wait(device)
            if turn:
                rates[way].append(images / (time.perf_counter() - began))
    found = {
        way: {"median": statistics.median(v), "low": min(v), "high": max(v), "values": v}
        for way, v in rates.items()
    }
    ratios = [ours / released for ours, released in zip(rates["ours"], rates["released"], strict=True)]
    ratio = {"median": statistics.median(ratios), "low": min(ratios), "high": max(ratios), "values": ratios}
    return found | {"ratio": ratio, "unit": "images/s"}


def measure_gpu(
    repeats: int,
    device: torch.device | str = "cuda",
    *,
    batches: tuple[int, ...] = (64, 256),
    steps: int = 30,
    images: int = 8192,
    copied: int = 2**30,
) -> dict:
    """Rates of every task both ways, and of ours the share of copy bandwidth, data's share, top kernels."""
    device = torch.device(device)
    bandwidth = copy_bandwidth(device, copied)
    report: dict = {"copy GB/s": bandwidth / 1e9, "results": {}, "ours": {}}
    for batch in batches:
        released, ours = Released(batch, device), Ours(batch, device)
        rates = {}
        for has_consistency in (False, True):
            name = f"training step{', consistency' if has_consistency else ''}, O2, batch {batch}"
            for way in (released, ours):
                way.steps(min(steps, WARM_UP), has_consistency)
            work = {
                "released": lambda c=has_consistency, way=released: way.steps(steps, c),
                "ours": lambda c=has_consistency, way=ours: way.steps(steps, c),
            }
            found = compare(work, steps * batch, device, repeats)
            rates[has_consistency] = found["ours"]["median"]
            with fast.plain():
                plain = seconds(lambda c=has_consistency, way=ours: way.steps(1, c), device, repeats)
            passes = 3 if has_consistency else 1
            moved = step_bytes(ours.learner.model, batch, "O2", passes=passes)
            found |= {
                "ours without graphs and fused kernels": batch / plain,
                "bytes a step must move": moved,
                "share of copy bandwidth": moved * found["ours"]["median"] / batch / bandwidth,
            }
            report["results"][name] = found
        # A step of each kind takes its own time: the rate at p 0.5 is the harmonic mean.
        mixed = 2 / (1 / rates[False] + 1 / rates[True])
        plan = ours.plans[False]
        data = _device_seconds(lambda o=ours, p=plan: augment(o.images[p.order], p), device)
        report["ours"][f"batch {batch}"] = {
            "images/s with CutMix and consistency at p 0.5": mixed,
            "data pipeline's share of a step": data * rates[False] / batch,
            "kinds of step recorded as CUDA graphs": len(ours.learner.graphs.recorded),
            "kernels, ms a step": top_kernels(lambda o=ours: o.steps(3, False), 3),
        }
        if batch == batches[0]:
            work = {"released": lambda r=released: r.epoch(images), "ours": lambda o=ours: o.epoch(images)}
            report["results"][f"training with its data, O2, batch {batch}"] = compare(
                work, images, device, repeats
            )
    report["results"] |= evaluations(device, repeats, min(images, 5000))
    report["families that passed their check"] = {f"{f} on {d}": ok for (f, d), ok in gpu._works.items()}
    report["fused depthwise convolution faster than cuDNN"] = {str(k[2:]): v for k, v in gpu._pays.items()}
    if device.type == "cuda":
        report["device"] = torch.cuda.get_device_name(device)
        report["peak GB allocated"] = torch.cuda.max_memory_allocated(device) / 1e9
    return report


def evaluations(device: torch.device, repeats: int, images: int) -> dict:
    pictures = random_images(images)[0].to(device)
    inputs = torch.randn(min(images, 250), 3, 32, 32, device=device)
    found = {}
    for level in ("O0", "O3"):
        released = released_network().to(device).eval()
        ours = apply_opt_level(build_msunet().to(device), level).eval()
        given = inputs
        if level == "O3":
            released, given = released.half(), inputs.half()

        def run(network=released, given=given) -> None:
            for _ in range(images // len(given)):
                network(given)

        with torch.no_grad():
            work = {"released": run, "ours": lambda network=ours: class_scores(network, pictures)}
            found[f"evaluation {level}"] = compare(work, images // len(given) * len(given), device, repeats)
    return found


def _device_seconds(work: Callable[[], object], device: torch.device, repeats: int = 20) -> float:
    """Time on the device alone: replayed as a CUDA graph, so that launching costs nothing."""
    if device.type != "cuda":
        return seconds(work, device)
    work()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return seconds(lambda: [graph.replay() for _ in range(repeats)], device) / repeats


def top_kernels(work: Callable[[], None], steps: int, count: int = 10) -> dict[str, float]:
    """The kernels that take most of a step, in ms."""
    with contextlib.suppress(RuntimeError):  # the profiler's library is missing in some containers
        kinds = torch.profiler.ProfilerActivity
        activity = kinds.CUDA if torch.cuda.is_available() else kinds.CPU
        with torch.profiler.profile(activities=[activity]) as profile:
            work()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
        events = profile.key_averages()
        name = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        events = sorted(events, key=lambda event: -getattr(event, name))[:count]
        return {event.key: getattr(event, name) / 1e3 / steps for event in events}
    return {}
