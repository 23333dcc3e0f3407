"""How long the packed network takes to answer, beside onnxruntime in FP32 and INT8 and beside plain PyTorch.

Each way has a process of its own, for threads that wait for work may spin; they take turns, and only one
computes at a time. Part of `make bench`; by itself:

    python benchmarks/latency.py [--quick] [--repeats 5]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WAYS = ("packed", "plain PyTorch", "onnxruntime FP32", "onnxruntime INT8")
BATCHES = (1, 64)
THREADS = (1, 2)
CALLS = {1: 20, 64: 2}  # in a row, of which the median counts; one more before them does not
CALIBRATION = 64  # images from which INT8 takes its ranges


# --- files -----------------------------------------------------------------------------------


def make_files(folder: Path) -> dict[str, dict[str, str]]:
    """The shipped v3 and a fresh v1 at its published sparsities: the file of each way."""
    import torch

    from msunet_core import build_msunet, pack
    from msunet_core.measure.unpack import shipped
    from msunet_core.model.pruning import prune_to_target

    torch.manual_seed(0)
    fresh = build_msunet("v1")
    for layer in fresh.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.momentum = 1.0  # statistics of one batch, so that activations have a usual size
    with torch.no_grad():
        fresh.train()(torch.randn(64, 3, 32, 32))
    prune_to_target(fresh.eval(), "V1")
    packed = {"v3, shipped": shipped(), "v1, fresh": pack(fresh, folder / "v1.safetensors")}
    return {name: _files_of(path, folder / f"network{i}") for i, (name, path) in enumerate(packed.items())}


def _files_of(packed: Path, stem: Path) -> dict[str, str]:
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    from msunet_core.measure.export import export_onnx
    from msunet_core.measure.unpack import unpack

    class Ranges(quantization.CalibrationDataReader):
        def __init__(self):
            self.batches = iter(normalised(CALIBRATION).split(16))

        def get_next(self):
            batch = next(self.batches, None)
            return None if batch is None else {"images": batch.contiguous().numpy()}

    whole, ready, small = (str(stem) + end for end in (".onnx", ".ready.onnx", ".int8.onnx"))
    export_onnx(unpack(packed, "O0"), whole)
    quant_pre_process(whole, ready)
    kinds = {"activation_type": quantization.QuantType.QUInt8, "weight_type": quantization.QuantType.QInt8}
    quantization.quantize_static(ready, small, Ranges(), per_channel=True, **kinds)
    return {"packed": str(packed), "plain PyTorch": str(packed), WAYS[2]: whole, WAYS[3]: small}


def some_images(count: int):
    import numpy as np

    return np.random.default_rng(0).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)


def normalised(count: int):
    import torch

    from msunet_core.data.images import normalise

    return normalise(torch.from_numpy(some_images(count)))


# --- a way, in its own process -------------------------------------------------------------------


def caller(way: str, path: str, threads: int, batch: int):
    """A function without arguments that computes the class scores of a batch."""
    if way == "packed":
        from msunet_core import PackedNetwork

        network, images = PackedNetwork(path, threads), some_images(batch)
        return lambda: network(images)
    import torch

    inputs = normalised(batch)
    if way == "plain PyTorch":
        from msunet_core import unpack
        from msunet_core.measure.export import plain_network

        torch.set_num_threads(threads)
        model = plain_network(unpack(path, "O0"))

        def answer():
            with torch.inference_mode():
                return model(inputs)

        return answer
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    array = inputs.contiguous().numpy()
    return lambda: session.run(None, {"images": array})


def serve(way: str, threads: int) -> None:
    """Time what the lines of standard input ask for: path, batch. Answers are milliseconds."""
    callers = {}
    for line in sys.stdin:
        path, batch = json.loads(line)
        if (path, batch) not in callers:
            callers[path, batch] = caller(way, path, threads, batch)
        answer = callers[path, batch]
        answer()
        times = []
        for _ in range(CALLS[batch]):
            began = time.perf_counter()
            answer()
            times.append(1000 * (time.perf_counter() - began))
        print(statistics.median(times), flush=True)


# Python text that answers for one image, from nothing.
FIRST = {
    "packed": "import numpy, msunet_core; network = msunet_core.PackedNetwork({path!r});"
    "network(numpy.zeros((1, 32, 32, 3), numpy.uint8))",
    "onnxruntime FP32": "import numpy, onnxruntime; session = onnxruntime.InferenceSession({path!r});"
    "session.run(None, {{'images': numpy.zeros((1, 3, 32, 32), 'f')}})",
    "plain PyTorch": "import torch; from msunet_core import unpack; model = unpack({path!r}, 'O0');\n"
    "with torch.inference_mode(): model(torch.zeros(1, 3, 32, 32))",
}
FIRST["onnxruntime INT8"] = FIRST["onnxruntime FP32"]
RESIDENT = (
    "\nimport os; print(int(open('/proc/self/statm').read().split()[1]) * os.sysconf('SC_PAGE_SIZE') / 2**20)"
)


def first_answer(code: str) -> tuple[float, float]:
    """Seconds of a process from its start to its end behind an answer, and its resident MB then."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    began = time.perf_counter()
    command = [sys.executable, "-c", code + RESIDENT]
    found = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return time.perf_counter() - began, float(found.stdout)


# --- measuring -------------------------------------------------------------------------------


def summary(values: list[float]) -> dict:
    return {"median": statistics.median(values), "low": min(values), "high": max(values), "values": values}


def measure(repeats: int) -> dict:
    """Of each network: milliseconds by threads, batch and way; seconds and MB of a first answer; bytes."""
    sys.path.insert(0, str(ROOT))
    results: dict[str, dict] = {}
    with tempfile.TemporaryDirectory() as folder:
        files = make_files(Path(folder))
        for threads in THREADS:
            processes = {way: _start(way, threads) for way in WAYS}
            for name, paths in files.items():
                for batch in BATCHES:
                    values: dict[str, list[float]] = {way: [] for way in WAYS}
                    for turn in range(repeats + 1):  # the first warms up
                        for way in WAYS:
                            found = _ask(processes[way], paths[way], batch)
                            if turn:
                                values[way].append(found)
                    key = f"{batch} image{'s' * (batch > 1)}, {threads} thread{'s' * (threads > 1)}"
                    rows = results.setdefault(name, {}).setdefault("milliseconds", {})
                    rows[key] = {way: summary(v) for way, v in values.items()}
                    cells = ", ".join(f"{way} {summary(v)['median']:.2f}" for way, v in values.items())
                    print(f"{name}, {key}: {cells}", flush=True)
            for process in processes.values():
                process.stdin.close()
                process.wait()
        for name, paths in files.items():
            starts = {w: [first_answer(FIRST[w].format(path=paths[w])) for _ in range(repeats)] for w in WAYS}
            nothing = [first_answer("import numpy") for _ in range(repeats)]
            for i, what in enumerate(("seconds to the first answer", "resident MB")):
                found = {way: summary([pair[i] for pair in pairs]) for way, pairs in starts.items()}
                results[name][what] = found | {"NumPy alone": summary([pair[i] for pair in nothing])}
            results[name]["bytes"] = {way: Path(path).stat().st_size for way, path in paths.items()}
    return results


def _start(way: str, threads: int) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MSUNET_FAST": "1"}
    command = [sys.executable, __file__, "--serve", way, "--threads", str(threads)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=environment, **pipes)


def _ask(process: subprocess.Popen, path: str, batch: int) -> float:
    print(json.dumps([path, batch]), file=process.stdin, flush=True)
    answer = process.stdout.readline()
    if not answer:
        raise SystemExit(f"latency: {' '.join(process.args[1:])} ended; its message is above")
    return float(answer)


def markdown(results: dict) -> str:
    """A table of each network, a row for what was measured, with medians and in brackets low..high."""
    lines = []
    for name, found in results.items():
        lines += [f"| {name} | {' | '.join(WAYS)} | packed by the better onnxruntime |", "|---" * 6 + "|"]
        for key, ways in found["milliseconds"].items():
            best = min(ways[way]["median"] for way in WAYS[2:])
            cells = [
                f"{ways[w]['median']:.1f} ({ways[w]['low']:.1f}..{ways[w]['high']:.1f}) ms" for w in WAYS
            ]
            lines.append(f"| {key} | {' | '.join(cells)} | {ways['packed']['median'] / best:.2f} |")
        for what, unit in (("seconds to the first answer", "s"), ("resident MB", "MB")):
            cells = [f"{found[what][way]['median']:.3g} {unit}" for way in WAYS]
            lines.append(f"| {what.removesuffix(' MB')} | {' | '.join(cells)} | |")
        cells = [f"{found['bytes'][way] / 1000:.0f} kB" for way in WAYS]
        lines += [f"| file | {' | '.join(cells)} | |", ""]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two repeats")
    parser.add_argument("--repeats", type=int, help="turns of each way (default 5; quick 2)")
    parser.add_argument("--serve", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--threads", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments.serve, arguments.threads)
        return
    print(markdown(measure(arguments.repeats or (2 if arguments.quick else 5))))


if __name__ == "__main__":
    main()
