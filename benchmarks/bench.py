"""The study against the way the published code ran, side by side on this machine: `make bench`.

Two processes, one for each way (the C library's allocator is set for a process), take turns at the same
work; only one computes at a time. Medians and spread of the repeats go to runs/bench/bench.json and a table.
All times are of one run on one machine, perhaps a busy one: the ratios are what counts.

    python benchmarks/bench.py [--quick] [--repeats 5] [--threads N]
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import latency
from latency import summary

ROOT = Path(__file__).resolve().parent.parent
BATCH = 64  # specification §6
EVAL_BATCH = 250
HALF_IMAGES = 10  # half kernels of a CPU without FP16 arithmetic are so slow that a few images do
WARM_UP = 3  # turns: the first steps of a process are slower

# name: (method, its further arguments, unit, work of `--quick`, work of a full run); work: images, steps of
# 64 or batches of 250
TASKS = {
    "data": ("data", (), "images/s per core", 2048, 8192),
    "step": ("step", (), "images/s", 1, 4),
    "step, consistency": ("step", (True,), "images/s", 1, 2),
    "evaluation O0": ("evaluation", ("O0",), "images/s", 1, 4),
    "evaluation O3": ("evaluation", ("O3",), "images/s", 1, 2),
}


# --- the two ways, each in its own process ---------------------------------------------------


def peak_memory() -> float:
    """Largest resident size of this process so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def resident_memory() -> float:
    """Resident size of this process now, in MB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def random_images(count: int):
    import torch

    draw = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 32, 32, 3), dtype=torch.uint8, generator=draw)
    return images, torch.randint(0, 100, (count,), generator=draw)


class Released:
    """NCHW, per-image transforms in worker processes, PyTorch's modules one by one (see released.py)."""

    def __init__(self, threads: int):
        import torch
        from released import released_network

        self.threads = threads
        self.network = released_network()
        decayed = [p for p in self.network.parameters() if p.ndim > 1]
        exempt = [p for p in self.network.parameters() if p.ndim <= 1]
        groups = [{"params": decayed, "weight_decay": 1e-4}, {"params": exempt, "weight_decay": 0.0}]
        self.sgd = torch.optim.SGD(groups, lr=1e-3, momentum=0.9, nesterov=True, foreach=False)
        self.inputs = torch.randn(BATCH, 3, 32, 32)
        self.labels = random_images(BATCH)[1]

    def data(self, images: int) -> float:
        from released import TransformedImages
        from torch.utils.data import DataLoader

        data = TransformedImages(*random_images(images))
        loader = DataLoader(data, BATCH, shuffle=True, drop_last=True, num_workers=self.threads)
        batches = iter(loader)
        next(
            batches
        )  # the workers have started; they are a few of the many batches ahead, to their advantage
        return self.rate(lambda: sum(len(batch[0]) for batch in batches)) / self.threads

    @staticmethod
    def rate(work: Callable[[], int]) -> float:
        began = time.perf_counter()
        done = work()
        return done / (time.perf_counter() - began)

    def step(self, steps: int, has_consistency: bool = False) -> float:
        import torch.nn.functional as F
        from released import consistency_loss

        def train() -> int:
            self.network.train()
            for _ in range(steps):
                if has_consistency:
                    loss = consistency_loss(self.network, self.inputs, self.labels)
                else:
                    loss = F.cross_entropy(self.network(self.inputs), self.labels)
                self.sgd.zero_grad()
                loss.backward()
                self.sgd.step()
                loss.item()
            return steps * BATCH

        return self.rate(train)

    def evaluation(self, batches: int, level: str) -> float:
        import copy

        import torch

        network = self.network.eval()
        inputs = torch.randn(EVAL_BATCH, 3, 32, 32)
        if level == "O3":
            network, inputs, batches = copy.deepcopy(network).half(), inputs[:HALF_IMAGES].half(), 1

        @torch.no_grad()
        def run() -> int:
            for _ in range(batches):
                network(inputs)
            return batches * len(inputs)

        return self.rate(run)


class Ours(Released):
    """The study: ``Learner.step`` with its augmentation, ``class_scores`` with its normalisation."""

    def __init__(self, threads: int):
        import torch

        from msunet_core import StageConfig, build_msunet
        from msunet_core.training.learner import Learner

        torch.manual_seed(0)
        self.threads = threads
        self.learner = Learner(
            build_msunet(), StageConfig(epochs=1, batch_size=BATCH, lr=1e-3, alpha=0.67749)
        )
        self.images, self.labels = random_images(BATCH)

    def data(self, images: int) -> float:
        import torch

        from msunet_core.data.augment import augment, draw_epoch_plan

        pictures, _ = random_images(images)
        torch.set_num_threads(1)  # one core

        def run() -> int:
            plan = draw_epoch_plan(images, BATCH, seed=0, stage="bench", epoch=0)
            for i in range(len(plan)):
                step = plan.step(i)
                augment(pictures[step.order], step)
            return len(plan) * BATCH

        found = self.rate(run)
        torch.set_num_threads(self.threads)
        return found

    def step(self, steps: int, has_consistency: bool = False) -> float:
        from msunet_core.data.augment import draw_epoch_plan

        probability = 1.0 if has_consistency else 0.0

        def train() -> int:
            for epoch in range(steps):
                plan = draw_epoch_plan(
                    BATCH, BATCH, seed=0, stage="bench", epoch=epoch, cutmix_probability=probability
                )
                self.learner.step(self.images, self.labels, plan.step(0)).item()
            return steps * BATCH

        return self.rate(train)

    def evaluation(self, batches: int, level: str) -> float:
        import copy

        from msunet_core import apply_opt_level
        from msunet_core.measure.evaluation import class_scores

        network = copy.deepcopy(self.learner.model)
        network = apply_opt_level(network, level).eval()
        images, _ = random_images(batches * EVAL_BATCH)

        def run() -> int:
            class_scores(network, images)
            return len(images)

        return self.rate(run)

    def copy_share(self, rate: float) -> dict:
        """Bytes of a step, also layer by layer, the bandwidth of a copy, and the share that a rate takes."""
        import torch
        from bandwidth import copy_bandwidth, step_bytes

        from msunet_core.fast.library import enabled

        moved = step_bytes(self.learner.model, BATCH, whole_blocks=enabled())
        bandwidth = copy_bandwidth(torch.device("cpu"), 2**28)
        return {
            "bytes": moved,
            "bytes layer by layer": step_bytes(self.learner.model, BATCH),
            "copy GB/s": bandwidth / 1e9,
            "share": moved * rate / BATCH / bandwidth,
        }

    def scoring(self, count: int) -> float:
        """Seconds of one score."""
        from msunet_core import score

        return 1 / self.rate(lambda: [score(self.learner.model, "O3") for _ in range(count)] and count)

    def scaling(self, width: float) -> dict:
        """Seconds of an epoch of 2, 4 and 8 steps; resident MB after each of 5 more epochs of 4."""
        from msunet_core import StageConfig, build_msunet
        from msunet_core.data.augment import draw_epoch_plan
        from msunet_core.training.learner import Learner

        learner = Learner(
            build_msunet(width=width), StageConfig(epochs=1, batch_size=BATCH, lr=1e-3, alpha=0.67749)
        )

        def epoch(steps: int, number: int) -> float:
            images, labels = random_images(steps * BATCH)
            began = time.perf_counter()
            settings = dict(seed=0, stage="bench", epoch=number, cutmix_probability=0.0)  # all steps alike
            plan = draw_epoch_plan(len(images), BATCH, **settings)
            for i in range(len(plan)):
                learner.step(images, labels, plan.step(i)).item()
            return time.perf_counter() - began

        epoch(2, 0)
        seconds = {steps * BATCH: min(epoch(steps, 1) for _ in range(2)) for steps in (2, 4, 8)}
        memory = []
        for number in range(5):
            epoch(4, number)
            memory.append(resident_memory())
        return {"seconds of an epoch by images": seconds, "resident MB after each epoch": memory}


def serve(way: str, threads: int) -> None:
    """Do what the lines of standard input ask for, one at a time; answer each by a line of JSON."""
    import torch

    torch.set_num_threads(threads)
    worker = {"released": Released, "ours": Ours}[way](threads)
    for line in sys.stdin:
        method, *arguments = json.loads(line)
        found = peak_memory() if method == "peak_memory" else getattr(worker, method)(*arguments)
        print(json.dumps(found), flush=True)


class Process:
    """The other end of :func:`serve`."""

    def __init__(self, way: str, threads: int):
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join((str(ROOT), os.environ.get("PYTHONPATH", ""))),
        }
        if way == "released":
            environment["MSUNET_KEEP_MEMORY"] = "0"
        command = [sys.executable, __file__, "--serve", way, "--threads", str(threads)]
        self.process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, *request):
        print(json.dumps(request), file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            raise SystemExit(f"bench: the process that measures {request[0]!r} ended; its message is above")
        return json.loads(answer)

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


# --- measuring -------------------------------------------------------------------------------


def measure(threads: int, repeats: int, is_quick: bool) -> dict:
    """Every task by both ways in turns; the first turns of each warm up and are not counted."""
    ways = {way: Process(way, threads) for way in ("released", "ours")}
    results: dict[str, dict] = {}
    warm_up = 1 if is_quick else WARM_UP
    for task, (method, further, unit, quick, full) in TASKS.items():
        values: dict[str, list[float]] = {way: [] for way in ways}
        for turn in range(warm_up + repeats):
            for way, process in ways.items():
                found = process.ask(method, quick if is_quick else full, *further)
                if turn >= warm_up:
                    values[way].append(found)
        ratios = [ours / released for ours, released in zip(values["ours"], values["released"], strict=True)]
        results[task] = {way: summary(v) for way, v in values.items()} | {
            "ratio": summary(ratios),
            "unit": unit,
        }
        if task == "step, consistency":
            peaks = {way: process.ask("peak_memory") for way, process in ways.items()}
            results["peak memory of training"] = {way: summary([mb]) for way, mb in peaks.items()} | {
                "ratio": summary([peaks["released"] / peaks["ours"]]),
                "unit": "MB",
            }
        report_row(task, results[task])
    report_row("peak memory of training", results["peak memory of training"])
    ways["released"].close()
    imports = {
        "released": "import torch, torchvision",
        "ours": "import msunet_core; msunet_core.train",
    }  # the name loads it
    starts = {way: [start_up(code) for _ in range(repeats)] for way, code in imports.items()}
    ratios = [released / ours for ours, released in zip(starts["ours"], starts["released"], strict=True)]
    results["start-up (import)"] = {way: summary(v) for way, v in starts.items()}
    results["start-up (import)"] |= {"ratio": summary(ratios), "unit": "s"}
    report_row("start-up (import)", results["start-up (import)"])
    ours = ways["ours"]
    results["share of copy bandwidth"] = ours.ask("copy_share", results["step"]["ours"]["median"])
    found = results["share of copy bandwidth"]
    print(f"a step moves {100 * found['share']:.0f} % of what a copy would, at {found['copy GB/s']:.1f} GB/s")
    results["scoring"] = {"ours": summary([ours.ask("scoring", 1) for _ in range(repeats)]), "unit": "s"}
    report_row("scoring", results["scoring"])
    results["scaling"] = ours.ask("scaling", 0.25 if is_quick else 1.0)
    ours.close()
    results["latency"] = latency.measure(repeats)
    return results


def start_up(code: str) -> float:
    """Seconds of a new Python process that only imports."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
    return time.perf_counter() - began


def processor(cpu: str, info: str) -> str:
    """A processor's name with family, model and vector instructions, from the text of /proc/cpuinfo."""
    facts = dict(re.findall(r"^([\w ]+?)\s*: (.*)$", info, re.MULTILINE))
    if "cpu family" not in facts:
        return cpu
    known = {"avx512f": "AVX-512", "avx512_vnni": "VNNI", "avx2": "AVX2"}
    has = [name for flag, name in known.items() if flag in facts.get("flags", "").split()]
    return f"{cpu}, family {facts['cpu family']}, model {facts['model']} ({', '.join(has)})"


def report_row(task: str, result: dict) -> None:
    cells = []
    for way in ("released", "ours"):
        found = result.get(way)
        cells.append(f"{found['median']:>9.4g} ({found['low']:.4g}..{found['high']:.4g})" if found else "-")
    ratio = result.get("ratio")
    text = f"{ratio['median']:.2f} ({ratio['low']:.2f}..{ratio['high']:.2f})" if ratio else "-"
    print(f"{task:<24} {result['unit']:<18} {cells[0]:<30} {cells[1]:<30} {text}", flush=True)


# --- the table of the README -----------------------------------------------------------------

# task of the report: its name in the table
ROWS = {
    "step": "training step",
    "step, consistency": "training step with consistency",
    "data": "data pipeline, per core",
    "evaluation O0": "evaluation at O0",
    "evaluation O3": "evaluation at O3",
    "peak memory of training": "peak memory of training",
}


def markdown(report: dict) -> str:
    """The report as the tables that the README shows."""
    hardware = report["hardware"]
    lines = [
        "| v3 | as released | ours | times better (low..high) |",
        "|---|---|---|---|",
    ]
    lines += [
        _line(name, report["results"][task]) for task, name in ROWS.items() if task in report["results"]
    ]
    share = report["results"].get("share of copy bandwidth")
    cores = f"{report['threads']} threads on {hardware['cores']} cores of {report['processor']}"
    text = (
        f"{cores}; medians of {report['repeats']} alternated repeats in one run."
        f" Training in batches of {BATCH}, FP32;"
        f" evaluation in batches of {EVAL_BATCH}, as released at O3 of {HALF_IMAGES} images only."
    )
    if share:
        text += (
            f" By count, a step has to move {share['bytes'] / 1e9:.2f} GB to and from memory,"
            f" {100 * share['share']:.0f} % of what a copy at {share['copy GB/s']:.1f} GB/s moves in that"
            " time;"
            f" fused layer by layer it would have to move {share['bytes layer by layer'] / 1e9:.2f} GB."
        )
    scaling = report["results"].get("scaling")
    if scaling:
        seconds = scaling["seconds of an epoch by images"]
        each = ", ".join(f"{1000 * found / int(images):.1f}" for images, found in seconds.items())
        memory = scaling["resident MB after each epoch"]
        text += (
            f" In epochs of {', '.join(map(str, seconds))} images each image takes {each} ms;"
            f" memory grows by {memory[-1] - memory[0]:.0f} MB in {len(memory) - 1} epochs."
        )
    lines += ["", text, ""]
    if "latency" in report["results"]:
        lines += [latency.markdown(report["results"]["latency"]), ""]
    return "\n".join(lines)


def _line(name: str, result: dict) -> str:
    cells = [_with_unit(result[way]["median"], result["unit"]) for way in ("released", "ours")]
    ratio = result["ratio"]
    spread = f" ({ratio['low']:.1f}..{ratio['high']:.1f})" if len(ratio["values"]) > 1 else ""
    return f"| {name} | {cells[0]} | {cells[1]} | {ratio['median']:.1f}{spread} |"


def _with_unit(value: float, unit: str) -> str:
    if unit == "MB":
        return f"{value / 1e3:.1f} GB"
    return f"{_short(value)} {unit.removesuffix(' per core')}"


def _short(value: float) -> str:
    """Three digits: 15.8, 101, 56,600."""
    digits = 2 - len(f"{abs(value):.0f}") + 1
    return f"{round(value, digits):,.{max(0, digits)}f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="less work and fewer repeats, about two minutes")
    parser.add_argument("--repeats", type=int, help="turns of each way (default 5; quick 2)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="default: all cores")
    parser.add_argument("--serve", choices=("released", "ours"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments.serve, arguments.threads)
        return
    repeats = arguments.repeats or (2 if arguments.quick else 5)
    began, load = time.time(), os.getloadavg()
    print(f"{'':<24} {'unit':<18} {'as released (low..high)':<30} {'ours (low..high)':<30} times better")
    results = measure(arguments.threads, repeats, arguments.quick)
    import torch

    from msunet_core.fast.library import enabled
    from msunet_core.files import atomic_write
    from msunet_core.study.provenance import hardware

    scaling = results["scaling"]
    each = {n: 1e3 * s / int(n) for n, s in scaling["seconds of an epoch by images"].items()}
    print("ms an image in an epoch of so many:", ", ".join(f"{n}: {ms:.2f}" for n, ms in each.items()))
    memory = scaling["resident MB after each epoch"]
    print("MB after each epoch:", ", ".join(f"{mb:.0f}" for mb in memory))
    report = {
        "results": results,
        "threads": arguments.threads,
        "repeats": repeats,
        "quick": arguments.quick,
        "kernels": enabled(),
        "load before": load,
        "load after": os.getloadavg(),
        "hardware": hardware(),
        "processor": processor(hardware()["cpu"], Path("/proc/cpuinfo").read_text()),
        "versions": {"python": sys.version.split()[0], "torch": torch.__version__},
        "seconds": time.time() - began,
    }
    folder = Path(os.environ.get("MSUNET_RUNS") or ROOT / "runs") / "bench"
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write(folder / "bench.json", json.dumps(report, indent=1) + "\n")
    atomic_write(folder / "bench.md", markdown(report))
    print(markdown(report))
    print(
        f"Times of one run on one machine; the ratios are what counts. Written to {folder}/bench.json and .md"
    )


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
