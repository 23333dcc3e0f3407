"""Checkpoints, the study's own and strangers': read rightly, or refused in one line with nothing run."""

from __future__ import annotations

import argparse
import collections
import json
import math
import os
import pickle
import re
import struct
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch
from helpers import forge

from msunet_core import StudyError, build_msunet, load_checkpoint
from msunet_core.model.architecture import MAX_BYTES, MAX_WIDTH
from msunet_core.model.checkpoint import PREVIOUS, latest_checkpoint, read_checkpoint, save_checkpoint

FORMATS = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])


@pytest.fixture(scope="module")
def published_state() -> dict:
    """Weights of a full-width v3, as a published checkpoint holds them."""
    torch.manual_seed(3)
    model = build_msunet("v3")
    return {name: tensor.contiguous() for name, tensor in model.state_dict().items()}


def write(path, content, zipped=True):
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    return path


def refusal(path, variant="v3") -> str:
    """The one line that refuses a file."""
    with pytest.raises(StudyError) as caught:
        load_checkpoint(path, variant)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 1000
    assert path.name in message
    return message


# --- published files --------------------------------------------------------------------------------------


@FORMATS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_published_checkpoint_loads(published_state, tmp_path, zipped, dtype, prefix):
    state = {
        prefix + name: tensor.to(dtype) if tensor.is_floating_point() else tensor
        for name, tensor in published_state.items()
    }
    parameters = [torch.nn.Parameter(tensor.float()) for tensor in state.values() if tensor.ndim > 1]
    optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
    sum(p.sum() for p in parameters).backward()
    optimizer.step()
    content = {
        "epoch": 269,
        "arch": "msunet",
        "state_dict": collections.OrderedDict(state),
        "optimizer": optimizer.state_dict(),
        "args": argparse.Namespace(lr=0.1, model="msunet", more=argparse.Namespace(deep=[1, (2, None)])),
        "version": 2,
        "metric": 80.13,
        "amp": {"loss_scaler0": {"loss_scale": 65536.0, "unskipped": 12}},
    }
    before = torch.get_rng_state()
    model, info = load_checkpoint(write(tmp_path / "model_best.pth.tar", content, zipped))
    assert torch.equal(before, torch.get_rng_state())
    expected = {"format": "pth.tar", "epoch": 269, "arch": "msunet", "metric": 80.13, "version": 2}
    assert {key: info[key] for key in expected} == expected
    assert info["has_optimizer"]
    assert info["dtype"] == str(dtype).removeprefix("torch.")
    assert not model.training
    loaded = model.state_dict()
    for name, tensor in state.items():
        name = name.removeprefix(prefix)
        assert torch.equal(loaded[name], tensor.to(loaded[name].dtype)), name
    assert loaded["conv_stem.weight"].dtype == torch.float32


def test_a_bare_state_dict_loads_without_optimizer(published_state, tmp_path):
    _, info = load_checkpoint(write(tmp_path / "bare.pth", published_state))
    assert not info["has_optimizer"]


@FORMATS
def test_odd_but_whole_tensors_load_as_their_values(published_state, tmp_path, zipped):
    state = dict(published_state)
    weight = state["conv_head.weight"]
    state["conv_head.weight"] = weight.transpose(0, 1).contiguous().transpose(0, 1)  # not contiguous
    state["classifier.bias"] = torch.tensor(0.5).expand(100)  # 100 times the same element
    state["bn1.weight"] = torch.nn.Parameter(state["bn1.weight"])
    state["bn1.bias"] = torch.zeros(1000)[7 : 7 + len(state["bn1.bias"])]  # a view into more
    state["conv_stem.weight"] = state["conv_stem.weight"].bfloat16()
    model, _ = load_checkpoint(write(tmp_path / "odd.pth.tar", {"state_dict": state}, zipped))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name].to(tensor.dtype)), name


ODD = {
    "int": lambda w: w.to(torch.int32),
    "bool": lambda w: w > 0,
    "float64": lambda w: w.double(),
    "complex": lambda w: w.to(torch.complex64),
    "float8": lambda w: w.to(torch.float8_e4m3fn),
    "sparse": lambda w: w.to_sparse(),
    "csr": lambda w: torch.zeros(3, 3).to_sparse_csr(),
    "quantized": lambda w: torch.quantize_per_tensor(w, 0.1, 0, torch.qint8),
    "meta": lambda w: w.to("meta"),
    "nested": lambda w: torch.nested.nested_tensor([w[0], w[1]]),
    "none": lambda w: None,
    "number": lambda w: 3.5,
    "text": lambda w: "weights",
    "scalar": lambda w: torch.tensor(1.0),
    "empty": lambda w: torch.zeros(0),
    "transposed": lambda w: w.transpose(0, 1),
    "nan": lambda w: torch.full_like(w, float("nan")),
    "inf": lambda w: torch.full_like(w, -float("inf")),
}


@FORMATS
@pytest.mark.parametrize("kind", ODD)
@pytest.mark.filterwarnings("ignore")
def test_a_weight_that_is_no_plain_finite_float_is_refused(published_state, tmp_path, zipped, kind):
    state = dict(published_state)
    state["blocks.2.0.conv_pw.weight"] = ODD[kind](state["blocks.2.0.conv_pw.weight"])
    try:
        path = write(tmp_path / "odd.pth.tar", {"state_dict": state}, zipped)
    except Exception as error:
        pytest.skip(f"torch.save itself refuses it: {error}")
    message = refusal(path)
    if kind in ("nan", "inf", "int", "bool", "float64", "complex", "scalar", "transposed", "empty"):
        assert "blocks.2.0.conv_pw.weight" in message


def test_two_tensors_of_one_name_are_refused(published_state, tmp_path):
    state = published_state | {"module.conv_stem.weight": torch.zeros(32, 3, 3, 3)}
    assert "with and without 'module.'" in refusal(write(tmp_path / "two.pth.tar", {"state_dict": state}))


def test_a_metric_that_is_not_a_number_is_left_out(published_state, tmp_path):
    path = write(tmp_path / "nan.pth.tar", {"state_dict": published_state, "metric": math.nan, "epoch": 3})
    _, info = load_checkpoint(path)
    assert "metric" not in info and info["epoch"] == 3


def test_a_counter_that_is_no_integer_is_refused(published_state, tmp_path):
    state = published_state | {"bn1.num_batches_tracked": torch.tensor(3.0)}
    message = refusal(write(tmp_path / "odd.pth.tar", {"state_dict": state}))
    assert "bn1.num_batches_tracked as float32, not as int64" in message


def test_a_checkpoint_of_another_variant_is_refused_by_its_first_differing_entries(tmp_path):
    path = write(tmp_path / "v1.pth.tar", {"state_dict": build_msunet("v1").state_dict()})
    message = refusal(path, "v3")
    assert "is not an MSUNet-v3: blocks.2.0.conv_pw.weight is (384, 64, 1, 1), not (320, 64, 1, 1)" in message
    assert message.endswith("it fits v1 and v2: give that variant")
    load_checkpoint(path, "v2")  # the same network
    with pytest.raises(StudyError, match="variant 'v9' is unknown"):
        load_checkpoint(path, "v9")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"state_dict": {}}, "no state_dict of tensors"),
        ({}, "no state_dict of tensors"),
        ([1, 2], "no state_dict of tensors"),
        ({"state_dict": [torch.zeros(1)]}, "no state_dict of tensors"),
        ({"state_dict": {"fc.weight": torch.zeros(2, 3)}}, "it fits no variant"),
        ({3: torch.zeros(1)}, "it fits no variant"),
        ({"classifier.bias": torch.zeros(0)}, "it fits no variant"),
        ({"classifier.bias": torch.zeros(2, 2)}, "it fits no variant"),
        (torch.zeros(3), "no state_dict of tensors"),
    ],
)
@FORMATS
def test_other_contents_are_refused(tmp_path, content, message, zipped):
    assert message in refusal(write(tmp_path / "other.pth.tar", content, zipped))


# --- files that are damaged -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"\0", "is not a checkpoint"),
        (b"PK\x03\x04", "is refused"),
        (b"{}", "is not a checkpoint"),
        (b"<html>404 Not Found</html>", "is not a checkpoint"),
        (b"\x80\x02.", "is refused"),
        (struct.pack("<Q", 2**62) + b"{}", "not a whole safetensors file"),
        (struct.pack("<Q", 2) + b"{}", "not a checkpoint of this study"),
        (struct.pack("<Q", 40) + b'{"a":' * 8, "not a whole safetensors file"),
    ],
)
def test_bytes_that_are_no_checkpoint_are_refused(tmp_path, content, message):
    path = tmp_path / "file.pth.tar"
    path.write_bytes(content)
    assert message in refusal(path)


def test_what_is_no_file_is_refused(tmp_path):
    assert "is not a file" in refusal(tmp_path / "missing.pth.tar")
    assert "is not a file" in refusal(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    assert "is not a file" in refusal(tmp_path / "pipe")
    with pytest.raises(StudyError):
        load_checkpoint("x" * 5000)
    with pytest.raises(StudyError):
        load_checkpoint("nul\0byte")


def test_a_file_larger_than_any_msunet_is_not_opened(tmp_path):
    path = tmp_path / "large.pth.tar"
    with path.open("wb") as file:
        file.truncate(MAX_BYTES + 1)
    assert "not opened" in refusal(path)


@FORMATS
def test_a_truncated_file_is_refused(published_state, tmp_path, zipped):
    path = write(tmp_path / "cut.pth.tar", {"state_dict": published_state}, zipped)
    content = path.read_bytes()
    for length in (1, 4, 9, 100, len(content) // 2, len(content) - 30, len(content) - 1):
        path.write_bytes(content[:length])
        refusal(path)


@pytest.mark.slow
def test_every_flipped_bit_of_a_zip_is_found_or_changes_nothing(published_state, tmp_path):
    path = write(tmp_path / "flipped.pth.tar", {"state_dict": published_state})
    content = path.read_bytes()
    draw = np.random.default_rng(0)
    found = 0
    places = [*draw.integers(0, len(content), 25), *range(30), *range(len(content) - 40, len(content), 3)]
    for place in places:
        damaged = bytearray(content)
        damaged[place] ^= 1 << int(draw.integers(8))
        path.write_bytes(damaged)
        try:
            state = load_checkpoint(path)[0].state_dict()
        except StudyError as error:
            assert "\n" not in str(error)
            found += 1
        else:
            for name, tensor in published_state.items():
                assert torch.equal(state[name], tensor), (place, name)
    assert found >= 25


# --- files that are hostile -------------------------------------------------------------------------------


class Call:
    """Pickles as a call of any function."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


def crafted(marker):
    touch = f"touch {marker}"
    code = f"open({str(marker)!r}, 'w')"
    return {
        "os.system": Call(os.system, touch),
        "eval": Call(eval, code),
        "exec": Call(exec, code),
        "open": Call(open, str(marker), "w"),
        "subprocess": Call(subprocess.Popen, ["touch", str(marker)]),
        "import": Call(__import__, "this"),
        "getattr": Call(getattr, "text", "upper"),
        "in a Namespace": argparse.Namespace(deep=[{"x": argparse.Namespace(y=Call(os.system, touch))}]),
        "as a key": {Call(str, 1): 2, "x": Call(os.system, touch)},
        "numpy": np.arange(3),
        "numpy scalar": np.float64(80.13),
        "torch.load": Call(torch.load, str(marker)),
        "torch.hub.load": Call(torch.hub.load, "x/y", "z"),
        "partial": Call(__import__("functools").partial, os.system, touch),
        "class": Call,
        "bytearray": Call(bytearray, 2**40),
        "tensor of any size": Call(torch.Tensor, 2**20, 2**20),
        "set": {1, 2},
    }


@FORMATS
@pytest.mark.parametrize("kind", crafted("x"))
def test_a_crafted_pickle_is_refused_and_nothing_of_it_runs(published_state, tmp_path, zipped, kind):
    marker = tmp_path / "ran"
    content = {"state_dict": published_state, "args": crafted(marker)[kind]}
    path = write(tmp_path / "crafted.pth.tar", content, zipped)
    assert "is refused: it names" in refusal(path)
    assert not marker.exists()


@pytest.mark.parametrize("protocol", range(6))
def test_a_bare_crafted_pickle_of_any_protocol_is_refused(tmp_path, protocol):
    marker = tmp_path / "ran"
    path = tmp_path / "crafted.pth.tar"
    path.write_bytes(pickle.dumps(Call(os.system, f"touch {marker}"), protocol))
    refusal(path)
    assert not marker.exists()


def repacked(source, target, change, method=zipfile.ZIP_STORED):
    """The zip again with ``change(name, data)`` in place of each member."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", method) as new:
        for member in old.infolist():
            new.writestr(member.filename, change(member.filename, old.read(member)))
    return target


def test_a_compressed_archive_loads_and_a_bomb_is_not_opened(published_state, tmp_path):
    path = write(tmp_path / "whole.pth.tar", {"state_dict": published_state})
    small = repacked(path, tmp_path / "small.pth.tar", lambda _, data: data, zipfile.ZIP_DEFLATED)
    assert small.stat().st_size < path.stat().st_size
    load_checkpoint(small)
    bomb = repacked(
        path,
        tmp_path / "bomb.pth.tar",
        lambda name, data: bytes(MAX_BYTES) if name.endswith("/data/0") else data,
        zipfile.ZIP_DEFLATED,
    )
    assert bomb.stat().st_size < 2**24
    assert "unpacks to" in refusal(bomb)


def test_a_zip_with_two_members_of_one_name_is_refused(published_state, tmp_path):
    path = write(tmp_path / "twice.pth.tar", {"state_dict": published_state})
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr(archive.namelist()[0], b"other")
    assert "two members of one name" in refusal(path)


def giants(state):
    one = torch.zeros(1)
    return {
        "a weight of 4 TB in one element": state
        | {"conv_head.weight": one.expand(2**20, 2**20).as_strided((2**20, 2**20, 1, 1), (0, 0, 0, 0))},
        "a billion classes": state
        | {
            "classifier.bias": one.expand(10**9),
            "classifier.weight": one.as_strided((10**9, 256), (0, 0)),
        },
    }


GIANTS_PROGRAM = """
import resource, sys, torch
from msunet_core import StudyError, load_checkpoint
small = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in sys.argv[1:]:
    try:
        load_checkpoint(path)
    except StudyError as error:
        print("refused:", error)
print("grown:", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - small)
"""


@pytest.mark.slow
def test_what_a_file_claims_is_not_allocated(published_state, tmp_path):
    """In a process of its own, whose memory's peak is measured."""
    paths = []
    for number, state in enumerate(giants(published_state).values()):
        for zipped in (True, False):
            paths.append(write(tmp_path / f"{number}-{zipped}.pth.tar", {"state_dict": state}, zipped))
    # A legacy file whose pickle claims a storage of 2^33 elements: the number stands there as text.
    whole = write(tmp_path / "storage.pth.tar", {"state_dict": {"x": torch.zeros(77_777)}}, zipped=False)
    content = whole.read_bytes()
    for claim in (2**31 - 1, 2**24):
        path = tmp_path / f"claim-{claim}.pth.tar"
        path.write_bytes(content.replace(struct.pack("<i", 77_777), struct.pack("<i", claim)))
        paths.append(path)
    hostile = {"network": {"num_classes": 10**9, "width": 1.0}}
    save_checkpoint(
        tmp_path / "own.safetensors", {f"model/{n}": t for n, t in published_state.items()}, hostile
    )
    save_checkpoint(tmp_path / "wide.safetensors", {"model/x": torch.zeros(1)}, {"network": {"width": 1e9}})
    paths += [tmp_path / "own.safetensors", tmp_path / "wide.safetensors"]
    done = subprocess.run(
        [sys.executable, "-c", GIANTS_PROGRAM, *paths],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    *lines, grown = done.stdout.splitlines()
    assert [line.split(":")[0] for line in lines] == ["refused"] * len(paths), done.stdout
    # kB; the largest whole file here takes some 20 MB to read and check.
    assert int(grown.split()[1]) < 400_000, grown


# --- the study's own --------------------------------------------------------------------------------------


@pytest.fixture
def own(new_network, tmp_path):
    """A checkpoint of the study's own, and the network in it."""
    network = new_network()
    tensors = {f"model/{name}": tensor for name, tensor in network.state_dict().items()}
    save_checkpoint(
        tmp_path / "own.safetensors", tensors, {"network": network.config, "epoch": 3, "loss": 0.1}
    )
    return tmp_path / "own.safetensors", network


def test_an_own_checkpoint_loads_as_it_was_saved(own):
    path, network = own
    loaded, info = load_checkpoint(path)
    assert (info["epoch"], info["loss"], info["dtype"]) == (3, 0.1, "float32")
    assert loaded.config == network.config
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name


def test_layouts_and_types_survive_saving(tmp_path):
    tensors = {
        "channels_last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "transposed": torch.randn(3, 4).t(),
        "half": torch.randn(7).half(),
        "mask": torch.tensor([True, False]),
        "counter": torch.tensor(12),
        "empty": torch.zeros(0, 3),
    }
    numbers = {"x": 0.1 + 0.2, "tiny": 5e-324, "list": [1, None, "text \u00e9"]}
    save_checkpoint(tmp_path / "x.safetensors", tensors, numbers)
    found, info = read_checkpoint(tmp_path / "x.safetensors")
    assert {name: info[name] for name in numbers} == numbers
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


def test_the_widest_network_with_its_momentum_fits_into_a_checkpoint():
    with torch.device("meta"):
        network = build_msunet("v1", width=MAX_WIDTH, num_classes=1000)
    values = sum(2 * p.numel() for p in network.parameters()) + sum(b.numel() for b in network.buffers())
    assert 4 * values < 0.9 * MAX_BYTES  # of FP32


def test_there_is_no_pickle_in_an_own_checkpoint(own):
    path, _ = own
    content = path.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    assert set(header["__metadata__"]) == {"study", "digest"}
    json.loads(header["__metadata__"]["study"])


def test_every_flipped_bit_of_an_own_checkpoint_is_found(own):
    path, _ = own
    content = path.read_bytes()
    draw = np.random.default_rng(1)
    for place in (*draw.integers(0, len(content), 60), *range(24), *range(len(content) - 8, len(content))):
        damaged = bytearray(content)
        damaged[place] ^= 1 << int(draw.integers(8))
        path.write_bytes(damaged)
        refusal(path)
    for damaged in (content[:-1], content + b"\0", content[:100], content[:8]):
        path.write_bytes(damaged)
        refusal(path)


@pytest.mark.parametrize(
    "info",
    [
        {"network": 3},
        {"network": {"variant": "v9"}},
        {"network": {"width": "wide"}},
        {"network": {"width": float("nan")}},
        {"network": {"num_classes": -1}},
        {"network": {"colour": "red"}},
        {"network": {"weights": ["ternary"]}},
        {"format": "other"},
        {"network": [[]]},
        {"epoch": -3},
        {"epoch": 2**40},
        {"epoch": True},
        {"step": 1.5},
        {"losses": [math.nan]},
        {"losses": "many"},
        {"history": [{"epoch": 0}, {"other": 0}]},
        {"history": [[0]]},
        {"history": [{"epoch": {}}]},
        {"stage": "train\x1b[31m"},
        {"identity": 7},
    ],
)
def test_an_own_checkpoint_that_tells_nonsense_is_refused(own, tmp_path, info):
    tensors, told = read_checkpoint(own[0])
    path = tmp_path / "odd.safetensors"
    forge(path, tensors, told)
    load_checkpoint(path)
    forge(path, tensors, {**told, **info})
    message = refusal(path).split(path.name)[1]
    assert any(key in message for key in re.findall(r'"(\w+)":', json.dumps(info))), message


def test_a_safetensors_file_of_something_else_is_refused(tmp_path):
    from safetensors.torch import save_file

    save_file({"weight": torch.zeros(3)}, tmp_path / "other.safetensors", {"format": "pt"})
    assert "not a checkpoint of this study" in refusal(tmp_path / "other.safetensors")


def test_the_previous_checkpoint_stays_until_the_new_one_is_good(tmp_path, monkeypatch):
    path = tmp_path / "x.safetensors"
    for number in range(3):
        save_checkpoint(path, {"x": torch.tensor(number)}, {"number": number})
    assert read_checkpoint(path)[1]["number"] == 2
    assert read_checkpoint(path.with_name(path.name + PREVIOUS))[1]["number"] == 1
    with monkeypatch.context() as patch:  # a disk that returns other bytes than it was given
        patch.setattr("msunet_core.model.checkpoint.save", lambda tensors, metadata: b"\0" * 64)
        with pytest.raises(StudyError, match="was not written: what was read back"):
            save_checkpoint(path, {"x": torch.tensor(3)}, {"number": 3})
    assert latest_checkpoint(path)[1]["number"] == 2
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [path.name, path.name + PREVIOUS]


def test_a_whole_checkpoint_that_cannot_be_used_is_not_put_aside(tmp_path, monkeypatch):
    path = tmp_path / "x.safetensors"
    for number in range(2):
        save_checkpoint(path, {"x": torch.tensor(number)}, {"number": number})

    def fail(*_):
        raise OSError(24, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr("safetensors.safe_open", fail)
        with pytest.raises(StudyError, match=r"cannot be read .*Too many open files"):
            latest_checkpoint(path)
    forge(path, {"x": torch.tensor(1)}, {"format": "msunet-study-9"})
    with pytest.raises(StudyError, match="use the code that wrote it"):
        latest_checkpoint(path)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [path.name, path.name + PREVIOUS]


def test_what_no_run_writes_is_not_saved_and_the_disk_is_not_blamed(tmp_path):
    with pytest.raises(StudyError, match=r"has losses \[nan\], which no run writes"):
        save_checkpoint(tmp_path / "x.safetensors", {}, {"losses": [math.nan]})
    assert not list(tmp_path.iterdir())


def test_without_hard_links_the_previous_checkpoint_is_a_copy(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    path = tmp_path / "x.safetensors"
    for number in range(2):
        save_checkpoint(path, {}, {"number": number})
    assert read_checkpoint(path.with_name(path.name + PREVIOUS))[1]["number"] == 0


def test_a_file_that_may_not_grow_is_one_line(tmp_path):
    """RLIMIT_FSIZE stands for a quota; SIGXFSZ is ignored, so that write() fails as on a full disk."""
    program = (
        "import resource, signal, sys, torch\n"
        "from msunet_core import StudyError\n"
        "from msunet_core.model.checkpoint import save_checkpoint\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "save_checkpoint(sys.argv[1], {}, {'number': 0})\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))\n"
        "try: save_checkpoint(sys.argv[1], {'x': torch.zeros(9999)}, {'number': 1})\n"
        "except StudyError as error: print(error)\n"
    )
    path = tmp_path / "x.safetensors"
    done = subprocess.run([sys.executable, "-c", program, path], capture_output=True, text=True)
    assert done.stderr == ""
    assert done.stdout == f"cannot write {path}: file too large; check the disk\n"
    assert read_checkpoint(path)[1]["number"] == 0
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
