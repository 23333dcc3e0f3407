"""The packed network as it lies answers as the plain one does, with NumPy alone."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import can_compile, lived_in
from torch import nn

from msunet_core import PackedNetwork, StudyError, build_msunet, evaluate, unpack
from msunet_core.data.images import normalise
from msunet_core.measure import packed_network
from msunet_core.measure.pack import pack
from msunet_core.measure.packed_format import norm_parts
from msunet_core.measure.unpack import shipped
from msunet_core.model.architecture import VARIANTS, stored_layers
from msunet_core.model.pruning import smallest_mask

ROOT = Path(__file__).parent.parent
needs_kernels = pytest.mark.skipif(
    packed_network.library() is None or os.environ.get("MSUNET_FAST") == "0",
    reason="no C++ compiler or no x86-64 with AVX2",
)
# Of the largest score: FP32 sums of up to a thousand terms in another order, some 40 layers in a row.
FP32 = 2e-5


def test_the_kernels_are_there_where_they_can_be():
    """Else all tests of them would be skipped, and none fail."""
    if not can_compile() or os.environ.get("MSUNET_FAST") == "0":
        pytest.skip("no C++ compiler or no x86-64 with AVX2")
    assert packed_network.library() is not None


@pytest.mark.parametrize("variant", VARIANTS)
def test_packed_cpp_has_a_case_for_every_block_of_the_family(variant):
    """It takes what it does not know for a 7 x 7 kernel, and for 8 pixels of width."""
    size = 32
    for block in (block for stage in VARIANTS[variant] for block in stage):
        size //= block.stride
        assert set(block.kernels) <= {3, 5, 7} and block.stride in (1, 2) and size in (32, 16, 8), block


def some_images(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)


@torch.no_grad()
def plain_scores(path: Path, images: np.ndarray) -> np.ndarray:
    """What the unpacked network computes at O0, in FP64."""
    return unpack(path, "O0").double()(normalise(torch.from_numpy(images)).double()).numpy()


def deviation(found: np.ndarray, exact: np.ndarray) -> float:
    assert found.dtype == np.float32 and found.shape == exact.shape
    return np.abs(found - exact).max() / np.abs(exact).max()


@needs_kernels
@pytest.mark.parametrize("merge", [True, False], ids=["merged", "kept norms"])
@pytest.mark.parametrize(
    ("variant", "weights", "width", "alpha", "sparsity"),
    [
        ("v3", "ternary", 0.25, 0.67749, 0.5),
        ("v1", "ternary", 0.25, 0.0, 0.0),
        ("v2", "ternary", 0.125, 1.5, 0.9),
        ("v3", "ternary", 0.3, 0.3, 0.7),  # channels that fill no vector, outputs that are no multiple of 3
        ("v3", "binary", 0.125, 0.67749, 0.4),
        ("v1", "float", 0.0625, 0.67749, 0.5),
    ],
)
def test_scores_are_those_of_the_plain_network(variant, weights, width, alpha, sparsity, merge, tmp_path):
    model = build_msunet(variant, weights=weights, width=width, alpha=alpha, num_classes=37)
    with torch.no_grad():
        for layer in model.modules():
            if type(layer) is nn.Conv2d:
                layer.weight.masked_fill_(~smallest_mask(layer.weight, sparsity), 0.0)
    path = pack(lived_in(model), tmp_path / "net.safetensors", merge=merge)
    images = some_images(3)
    assert deviation(PackedNetwork(path, threads=1)(images), plain_scores(path, images)) < FP32


@needs_kernels
def test_the_shipped_network_takes_less_than_a_megabyte_and_answers_as_it_did():
    network, images = PackedNetwork(shipped()), some_images(2)
    assert 0 < network.bytes < 2**20
    assert deviation(network(images), plain_scores(shipped(), images)) < FP32


@needs_kernels
def test_threads_and_other_images_change_no_bit(new_network, tmp_path):
    path = pack(lived_in(new_network(width=0.125)), tmp_path / "net.safetensors")
    images = some_images(7)
    alone = np.concatenate([PackedNetwork(path, threads=1)(images[i : i + 1]) for i in range(7)])
    for threads in (1, 2, 3, 8):  # 7 images: some go to threads one by one, the last ones are shared
        network = PackedNetwork(path, threads)
        assert np.array_equal(network(images), alone), threads
        assert np.array_equal(network(images[:1]), alone[:1]), threads
        assert np.array_equal(network(images[::2]), alone[::2]), threads  # not contiguous
    assert network(images[:0]).shape == (0, 4)


@needs_kernels
def test_calls_from_several_threads_and_after_a_fork_are_served(new_network, tmp_path):
    network = PackedNetwork(pack(lived_in(new_network()), tmp_path / "net.safetensors"), threads=2)
    images = some_images(5)
    wanted = network(images)
    with ThreadPoolExecutor(4) as pool:
        assert all(
            np.array_equal(scores, wanted) for scores in pool.map(lambda _: network(images), range(12))
        )
    child = os.fork()
    if child == 0:  # its parent's threads are not there
        os._exit(0 if np.array_equal(network(images), wanted) else 1)
    assert os.waitpid(child, 0)[1] == 0


@needs_kernels
def test_a_process_that_only_answers_loads_no_pytorch(new_network, tmp_path):
    path = pack(new_network(), tmp_path / "net.safetensors")
    code = (
        "import sys, numpy, msunet_core;"
        f"scores = msunet_core.PackedNetwork({str(path)!r}, 2)(numpy.zeros((2, 32, 32, 3), numpy.uint8));"
        "print(scores.shape, [name for name in ('torch', 'pandas', 'onnxruntime') if name in sys.modules])"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert found.stdout.strip() == "(2, 4) []", found.stderr


@needs_kernels
def test_it_is_evaluated_as_the_unpacked_network(new_network, images, tmp_path):
    path = pack(lived_in(new_network()), tmp_path / "net.safetensors")
    found = evaluate(PackedNetwork(path), images.test_images, images.test_labels)
    plain = evaluate(unpack(path, "O0"), images.test_images, images.test_labels)
    assert found == {**plain, "loss": pytest.approx(plain["loss"], rel=1e-5)}
    with pytest.raises(StudyError, match="computes at O0, not O3; unpack the file"):
        evaluate(PackedNetwork(path), images.test_images, images.test_labels, "O3")


HOSTILE = """
import pathlib, random, sys
import numpy as np
from msunet_core import compiler
from msunet_core.errors import StudyError
from msunet_core.measure import packed_network
from msunet_core.measure.packed_format import DIGEST_AT, digest_of

flag = "-fsanitize=address,undefined"
compiled = compiler.compiled
compiler.compiled = lambda source, *_, **__: compiled(source, "-O1", flag, link=(flag,))
assert packed_network.library() is not None
content, path = pathlib.Path(sys.argv[1]).read_bytes(), pathlib.Path(sys.argv[2])
draw, accepted, header = random.Random(0), 0, 8 + int.from_bytes(content[:8], "little")
for _ in range(300):
    changed = bytearray(content)
    for _ in range(draw.randrange(4)):
        if draw.random() < 0.7:
            changed[draw.randrange(header, len(changed))] ^= 1 << draw.randrange(8)
        else:
            changed[draw.randrange(8, header)] = draw.choice(b'0123456789",:{}[]TBSD')
    path.write_bytes(changed[: DIGEST_AT.start] + digest_of(changed) + changed[DIGEST_AT.stop :])
    try:
        network = packed_network.PackedNetwork(path, draw.choice([1, 2]))
        network(np.zeros((draw.randrange(4), 32, 32, 3), np.uint8))
        accepted += changed != content
    except StudyError:
        pass
print(accepted)
"""


@needs_kernels
@pytest.mark.slow
def test_hostile_files_with_a_right_digest_reach_no_memory_that_is_not_theirs(new_network, tmp_path):
    found = []
    for kind in ("asan", "ubsan"):
        command = ["g++", f"-print-file-name=lib{kind}.so"]
        found.append(subprocess.check_output(command, text=True).strip() if shutil.which("g++") else "")
    if not all(Path(path).is_absolute() for path in found):
        pytest.skip("no g++ with AddressSanitizer")
    path = pack(lived_in(new_network()), tmp_path / "net.safetensors")
    environment = {
        **os.environ,
        **{"PYTHONPATH": str(ROOT), "LD_PRELOAD": ":".join(found), "ASAN_OPTIONS": "detect_leaks=0"},
        **{"UBSAN_OPTIONS": "halt_on_error=1", "XDG_CACHE_HOME": str(tmp_path), "CXX": "g++"},
    }
    command = [sys.executable, "-c", HOSTILE, str(path), str(tmp_path / "hostile.safetensors")]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0 and "ERROR" not in run.stderr and "runtime error" not in run.stderr, run.stderr
    assert int(run.stdout) > 30  # some changes pass the reader: those are the ones that count


def test_without_a_compiler_the_plain_network_answers(new_network, tmp_path, monkeypatch):
    path = pack(lived_in(new_network()), tmp_path / "net.safetensors")
    images = some_images(2)
    monkeypatch.setattr(packed_network, "library", lambda: None)
    network = PackedNetwork(path)
    assert network.bytes == 0
    assert deviation(network(images), plain_scores(path, images)) < FP32


def test_what_is_no_image_is_refused(new_network, tmp_path):
    path = pack(new_network(), tmp_path / "net.safetensors")
    network = PackedNetwork(path)
    for wrong in (
        np.zeros((2, 32, 32, 3)),
        np.zeros((32, 32, 3), np.uint8),
        np.zeros((1, 3, 32, 32), np.uint8),
    ):
        with pytest.raises(StudyError, match=r"not uint8 \(B, 32, 32, 3\); give them as they are stored"):
            network(wrong)
    with pytest.raises(StudyError, match="threads 0 is not a whole number >= 1"):
        PackedNetwork(path, threads=0)


@pytest.mark.parametrize("weights", ["ternary", "binary", "float"])
@pytest.mark.parametrize("variant", ["v1", "v3"])
def test_the_family_in_numbers_is_the_family_in_pytorch(variant, weights):
    arguments = dict(variant=variant, weights=weights, alpha=0.67749, num_classes=10, width=0.3)
    model = build_msunet(**arguments)
    told = {f"{layer.name}.weight": layer.shape for layer in stored_layers(**arguments)}
    told |= {f"{layer.name}.bias": layer.shape[:1] for layer in stored_layers(**arguments) if layer.has_bias}
    for layer in stored_layers(**arguments):
        if layer.is_norm:
            told |= {f"{layer.name}.{part}": layer.shape for part in norm_parts(False, "")}
    stored = {
        n: tuple(t.shape) for n, t in model.state_dict().items() if not n.endswith("num_batches_tracked")
    }
    assert told == stored
    names = [n.removesuffix(".weight") for n in stored if n.endswith(".weight")]
    assert [layer.name for layer in stored_layers(**arguments)] == names
