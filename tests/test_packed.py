"""The packed file: the same network, in as many bytes as the score says, or refused by name."""

from __future__ import annotations

import copy
import json
import random
import zipfile

import numpy as np
import pytest
import torch
from helpers import lived_in
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from msunet_core import StudyError, apply_opt_level, build_msunet, evaluate, score
from msunet_core.fast import accelerated
from msunet_core.measure import pack as pack_module
from msunet_core.measure import packed_format
from msunet_core.measure import unpack as unpack_module
from msunet_core.measure.account import account
from msunet_core.measure.pack import MERGE_TOLERANCE, pack, provenance_of
from msunet_core.measure.packed_reader import Reader
from msunet_core.measure.unpack import load_network, unpack
from msunet_core.model.checkpoint import save_checkpoint
from msunet_core.model.pruning import prune_to_target, smallest_mask
from msunet_core.model.ternary import ternary_layers, ternary_scale


@torch.no_grad()
def any_network(seed: int) -> nn.Module:
    """A network of random variant, width, kind of weights, classes, threshold and sparsities."""
    torch.manual_seed(seed)
    draw = random.Random(seed)
    model = build_msunet(
        draw.choice(["v1", "v2", "v3"]),
        weights=draw.choice(["ternary", "ternary", "binary", "float"]),
        alpha=draw.choice([0.0, 0.3, 0.67749, 1.5]),
        num_classes=draw.choice([1, 4, 37, 100]),
        width=draw.choice([0.0625, 0.1, 0.125]),
    )
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            sparsity = draw.choice([0.0, 0.39, 0.4, 0.5, 0.7, 0.9 if layer.bias is not None else 0.6])
            layer.weight.masked_fill_(~smallest_mask(layer.weight, sparsity), 0.0)
    for layer in ternary_layers(model).values():
        if draw.random() < 0.3:  # so skewed that T is far from balanced
            layer.weight.copy_((3 * layer.weight / layer.weight.std()).exp())
    return lived_in(model)


def eight_images() -> torch.Tensor:
    return torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def exact_scores(model: nn.Module) -> torch.Tensor:
    """Of an FP32 network, in FP64."""
    return copy.deepcopy(model).double().eval()(eight_images().double())


@torch.no_grad()
def class_scores(model: nn.Module) -> torch.Tensor:
    """At O3."""
    if getattr(model, "opt_level", "O0") != "O3":
        model = apply_opt_level(copy.deepcopy(model), "O3")
    with accelerated(model):  # as evaluate does
        return model.eval()(eight_images())


@pytest.mark.parametrize(
    "seed", [*range(6), *(pytest.param(s, marks=pytest.mark.slow) for s in range(6, 30))]
)
def test_any_network_comes_back_as_it_was(seed, tmp_path):
    model = any_network(seed)
    plain = unpack(pack(model, tmp_path / "plain.safetensors", merge=False))
    merged = unpack(pack(model, tmp_path / "merged.safetensors"))
    source = apply_opt_level(copy.deepcopy(model), "O3")
    for name, layer in ternary_layers(source).items():
        assert torch.equal(ternary_layers(plain)[name].signs(), layer.signs()), name
        assert torch.equal(ternary_layers(merged)[name].signs(), layer.signs()), name
    wanted = class_scores(source)
    spread = (wanted.std(0).max() / wanted.abs().max()).item()
    assert spread > 0.01, "scores that do not depend on the image would show nothing"
    assert torch.equal(class_scores(plain), wanted)
    exact = exact_scores(model)  # the judge, for where O3 amplifies its rounding the source is wrong as well
    apart, moved = (
        ((scores - exact).abs().max() / exact.abs().max()).item() for scores in (class_scores(merged), wanted)
    )
    assert apart <= MERGE_TOLERANCE + moved
    cost = score(source, "O3")
    for unpacked in (plain, merged):
        assert score(unpacked, "O3") == cost
        assert score(unpacked, "O3").layers.equals(cost.layers)


@pytest.mark.parametrize("merge", [True, False])
@pytest.mark.parametrize("weights", ["ternary", "binary", "float"])
def test_layers_of_nothing_and_of_one_sign_come_back(new_network, tmp_path, weights, merge):
    model = lived_in(new_network(weights=weights))
    with torch.no_grad():
        model.conv_head.weight.fill_(0.5)  # no spread, so T = 0
        model.conv_stem.weight.zero_()
        only_plus = model.blocks[0][0].conv_pw
        only_plus.weight.zero_()
        only_plus.weight[0] = 1.0
    path = pack(model, tmp_path / "net.safetensors", merge=merge)
    unpacked = unpack(path)
    source = apply_opt_level(copy.deepcopy(model), "O3")
    for name, layer in ternary_layers(source).items():
        assert torch.equal(ternary_layers(unpacked)[name].signs(), layer.signs()), name
    assert unpacked.conv_stem.weight.count_nonzero() == 0
    assert score(unpacked, "O3") == score(source, "O3")
    assert account(path)["bytes"].sum() == path.stat().st_size


@pytest.mark.parametrize("merge", [True, False])
@pytest.mark.parametrize("seed", range(4))
def test_every_byte_is_accounted_for(seed, merge, tmp_path):
    model = any_network(seed)
    path = pack(model, tmp_path / "net.safetensors", merge=merge, accuracy={"top1": 12.5})
    table = account(path)
    assert table["bytes"].sum() == path.stat().st_size
    assert table["scored"].sum() == pytest.approx(32 * score(model, "O3").params, abs=1e-6)  # FP64 sums
    assert (table["difference"] == table["bytes"] - table["scored"] / 8).all()
    assert ((table["difference"] != 0) == (table["reason"] != "")).all()


def full_v3() -> nn.Module:
    model = lived_in(build_msunet("v3"))
    prune_to_target(model, "V2")
    return model


def test_v3_takes_no_more_than_a_twentieth_above_its_score(tmp_path):
    model = full_v3()
    words = {"command": "make reproduce PROFILE=paper", "hardware": "one GPU of some make", "text": "x" * 300}
    path = pack(model, tmp_path / "v3.safetensors", accuracy={"top1": 80.13, "top5": 95.0}, provenance=words)
    scored = 4 * score(model, "O3").params
    assert path.stat().st_size / scored <= 1.05
    reasons = account(path).groupby("reason")["difference"].sum()
    channels = reasons.pop("one scale a channel cannot hide in the layer's one number") / 2
    assert channels == 4288
    assert reasons.pop("the score leaves out the bias of a linear layer") == 200
    assert reasons.pop("bits that fill a byte") < 2
    assert reasons.pop("metadata: network, provenance, digest") < 2000
    assert reasons.sum() == 0


def test_a_reader_written_by_the_description_finds_the_same_numbers(new_network, tmp_path):
    model = lived_in(new_network())
    prune_to_target(model, "V2")
    path = pack(model, tmp_path / "net.safetensors")
    with safe_open(path, "np") as file:
        about = json.loads(file.metadata()["packed"])
        half = file.get_tensor("half").astype(np.float32)
        mask, sign = (np.unpackbits(file.get_tensor(n), bitorder="little") for n in ("mask", "sign"))
    unpacked = unpack(path, "O0")
    letters, kind, at = iter(about["layers"]), "", {"half": 0, "mask": 0, "sign": 0}

    def take(name, stream, count):
        at[name] += count
        return stream[at[name] - count : at[name]]

    for name, layer in unpacked.named_modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            kind, count = next(letters), layer.weight.numel()
            scale = take("half", half, 1) if kind in "TB" else 1.0
            weight = np.zeros(count, np.float32)
            nonzero = take("mask", mask, count) == 1 if kind in "TS" else np.ones(count, bool)
            kept = int(nonzero.sum())
            weight[nonzero] = (
                1.0 - 2.0 * take("sign", sign, kept) if kind in "TB" else take("half", half, kept)
            )
            assert np.array_equal(layer.weight.detach().flatten().numpy(), weight), name
            if kind == "T":
                assert scale == ternary_scale(layer.signs()).half().item()
            if layer.bias is not None:
                assert np.array_equal(layer.bias.detach().numpy(), take("half", half, len(layer.bias)))
        elif isinstance(layer, nn.BatchNorm2d):
            channels = layer.num_features
            scale = take("half", half, channels) if kind in "TB" else np.ones(channels, np.float32)
            shift = take("half", half, channels)
            x = torch.randn(2, channels, 3, 3)
            wanted = x * torch.from_numpy(scale).view(-1, 1, 1) + torch.from_numpy(shift).view(-1, 1, 1)
            torch.testing.assert_close(layer(x), wanted, rtol=1e-5, atol=1e-5)  # FP32, one sum
    assert at["half"] == len(half)
    for name, stream in (("mask", mask), ("sign", sign)):  # the last byte is filled with zeros
        rest = stream[at[name] :]
        assert len(rest) < 8 and not rest.any(), name
    assert about["layers"].count("T") == len(ternary_layers(model)) and "S" in about["layers"]


def test_a_merged_weight_never_vanishes_for_the_score_counts_zeros(new_network, tmp_path):
    model = lived_in(new_network())
    with torch.no_grad():
        model.bn1.weight.fill_(1e-9)
    path = pack(model, tmp_path / "net.safetensors")
    assert unpack(path).conv_stem.weight.count_nonzero() == model.conv_stem.weight.count_nonzero()
    assert score(unpack(path), "O3") == score(model, "O3")


def test_a_channel_that_never_varied_is_its_bias(new_network, tmp_path):
    """Its scale of 1 / sqrt(eps) would multiply what FP16 loses, and the layers behind it would once more."""
    model = lived_in(new_network())
    with torch.no_grad():
        model.bn2.running_mean[:3] = torch.tensor([-1.88, 0.3, 5.0])
        model.bn2.running_var[:3] = 0.0
    norm = unpack(pack(model, tmp_path / "net.safetensors"), "O0").bn2
    assert norm.weight[:3].tolist() == [0.0, 0.0, 0.0]
    assert torch.equal(norm.bias[:3], model.bn2.bias[:3].half().float())


def test_a_channel_that_never_varied_is_packed_however_large_its_mean(new_network, tmp_path):
    model = lived_in(new_network())
    with torch.no_grad():  # times 1 / sqrt(eps) beyond FP16
        model.bn2.running_mean[0], model.bn2.running_var[0] = 300.0, 0.0
    norm = unpack(pack(model, tmp_path / "net.safetensors"), "O0").bn2
    assert (norm.weight[0], norm.bias[0]) == (0.0, model.bn2.bias[0].half())


def test_where_the_mean_is_large_scale_and_shift_are_rounded_together(new_network, tmp_path):
    model = lived_in(new_network())
    with torch.no_grad():
        model.bn2.running_mean.uniform_(3, 30)
        model.bn2.running_var.fill_(1e-4)
    packed_norm = unpack(pack(model, tmp_path / "net.safetensors"), "O0").bn2
    at_mean = packed_norm(model.bn2.running_mean.view(1, -1, 1, 1)).flatten()
    error = (at_mean - model.bn2.bias).abs().max().item()
    # The nearest FP16 numbers alone: scale * mean up to 1.5 * 100 * 30, where one unit is 4.
    assert error < 0.2


def test_a_packed_network_packed_again_is_the_same_file(new_network, tmp_path):
    first = pack(lived_in(new_network()), tmp_path / "a.safetensors")
    for level in ("O0", "O3"):
        again = pack(unpack(first, level), tmp_path / "b.safetensors")
        assert again.read_bytes() == first.read_bytes()
    unmerged = unpack(pack(unpack(first, "O0"), tmp_path / "b.safetensors", merge=False))
    assert torch.equal(class_scores(unmerged), class_scores(unpack(first)))


def test_it_runs_at_o3_and_can_be_evaluated_at_all_levels(new_network, images, tmp_path):
    path = pack(lived_in(new_network()), tmp_path / "net.safetensors")
    assert unpack(path).opt_level == "O3"
    assert unpack(path).conv_head.weight.dtype == torch.float16
    model = unpack(path, "O0")
    found = {x: evaluate(model, images.test_images, images.test_labels, x) for x in ("O0", "O2", "O3")}
    assert evaluate(unpack(path), images.test_images, images.test_labels, "O3") == found["O3"]
    assert found["O3"]["loss"] == pytest.approx(found["O0"]["loss"], rel=0.01)  # FP16 has three digits


def test_reading_leaves_the_random_state_alone(new_network, tmp_path):
    path = pack(new_network(), tmp_path / "net.safetensors")
    before = torch.get_rng_state()
    unpack(path)
    assert torch.equal(torch.get_rng_state(), before)


def test_metadata_are_kept(new_network, tmp_path):
    told = {"accuracy": {"top1": 71.25, "level": "O3"}, "provenance": {"command": 'make "it"', "seed": 3}}
    path = pack(new_network(), tmp_path / "net.safetensors", **told)
    _, info = load_network(path)
    assert {name: info[name] for name in told} == told
    assert info["bytes"] == path.stat().st_size
    assert info["network"] == new_network().config


# -- what is refused ---------------------------------------------------------------------------


@pytest.fixture
def packed_file(new_network, tmp_path):
    model = lived_in(new_network())
    prune_to_target(model, "V2")
    return pack(model, tmp_path / "net.safetensors")


def refusal(path) -> str:
    with pytest.raises(StudyError) as refused:
        unpack(path)
    line = str(refused.value)
    assert "\n" not in line and str(path) in line and "; " in line
    return line


def test_any_altered_byte_is_noticed(packed_file):
    content = packed_file.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    draw = random.Random(0)
    # Every kind of byte in the header: half of them, all of its filling, and some of the data.
    header_bytes = [*range(0, header, 2), *range(header - 8, header)]
    for position in [*header_bytes, *draw.sample(range(header, len(content)), 100)]:
        altered = bytearray(content)
        altered[position] ^= 1 << draw.randrange(8)
        packed_file.write_bytes(altered)
        with pytest.raises(StudyError, match=packed_file.name):
            unpack(packed_file)


def test_a_cut_or_longer_file_is_noticed(packed_file):
    content = packed_file.read_bytes()
    for size in [0, 1, 8, 9, 100, 1000, len(content) - 1]:
        packed_file.write_bytes(content[:size])
        refusal(packed_file)
    packed_file.write_bytes(content + b"\0")
    assert "was altered or cut off" in refusal(packed_file)


def test_files_of_other_kinds_are_refused_by_name(new_network, tmp_path):
    path = tmp_path / "other.safetensors"
    save_file({"half": torch.zeros(3)}, path)
    assert "is a safetensors file, but not a packed network" in refusal(path)
    save_file({"half": torch.zeros(3)}, path, {"some": "words"})
    assert "is a safetensors file, but not a packed network" in refusal(path)
    save_checkpoint(path, new_network().state_dict(), {})
    assert "is a checkpoint of this study, not packed; pack it" in refusal(path)
    torch.save({"state_dict": {}}, path)
    assert "is not a packed network" in refusal(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a", "b")
    assert "is not a packed network" in refusal(path)
    path.write_text("{}")
    assert "is not a packed network" in refusal(path)
    assert "no such file or directory; give a file that can be read" in refusal(
        tmp_path / "missing.safetensors"
    )
    assert "not a regular file; give a file that can be read" in refusal(tmp_path)


def forged(path, change):
    """A file with metadata or streams changed by somebody who knows how to make a digest."""
    reader = Reader(path)
    header = reader.header()
    about = json.loads(header["__metadata__"]["packed"])
    streams = {name: stream.copy() for name, stream in reader._streams(header).items()}
    changed = change(about, streams)
    about, streams = changed if isinstance(changed, tuple) else (about, streams)
    path.write_bytes(pack_module._assemble(json.dumps(about), streams))
    return path


def network_with(**arguments):
    return lambda about, streams: about["network"].update(arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda about, streams: about.update(format="msunet-packed-9"), "has format 'msunet-packed-9'"),
        (lambda about, streams: about.update(mean=[0.5, 0.5, 0.5]), "wants images normalised by"),
        (lambda about, streams: about.pop("std"), "is refused"),
        (lambda about, streams: about.update(eps=float("nan")), "metadata that this code did not write"),
        (lambda about, streams: about.update(eps=-1.0), "metadata that this code did not write"),
        (lambda about, streams: about.update(eps=1.0), "metadata that this code did not write"),
        (lambda about, streams: about.update(layers="D" * 40), "which is not its network"),
        (lambda about, streams: about.update(layers=7), "metadata that this code did not write"),
        (lambda about, streams: about.update(merged=False), "has negative variances in bn1"),
        (network_with(variant="v4"), "variant 'v4' is unknown"),
        (network_with(variant="v1"), "has a mask of"),
        (network_with(width=4.0), "has a mask of"),
        (network_with(width=10**9), "is outside"),
        (network_with(width="wide"), "width 'wide' is outside"),
        (network_with(num_classes=10**11), "has a stream half that ends too early"),
        (network_with(num_classes=2**62), "has a stream half that ends too early"),
        (network_with(num_classes=3), "that is longer than its network"),
        (network_with(depth=3), "metadata that this code did not write"),
        (lambda about, streams: ([], streams), "is refused"),
        (lambda about, streams: streams["half"].__setitem__(5, np.nan), "holds NaN or Inf"),
        (lambda about, streams: streams["half"].__setitem__(-1, np.inf), "holds NaN or Inf"),
        (lambda about, streams: streams["mask"].__ior__(255), "as the scale of"),
        (lambda about, streams: streams["mask"].__iand__(0), "as the scale of"),
        (
            lambda about, streams: (about, streams | {"sign": streams["sign"][:-1]}),
            "sign that ends too early",
        ),
        (
            lambda about, streams: (about, streams | {"sign": np.append(streams["sign"], np.uint8(0))}),
            "sign that is longer",
        ),
        (lambda about, streams: (about, streams | {"mask": np.zeros(10**6, np.uint8)}), "has a mask of"),
    ],
)
def test_what_a_file_claims_is_checked_before_it_is_believed(packed_file, monkeypatch, change, message):
    monkeypatch.setattr(unpack_module, "build_msunet", lambda **_: pytest.fail("built from a refused file"))
    assert message in refusal(forged(packed_file, change))


def test_what_no_packer_stores_is_refused(new_network, tmp_path, monkeypatch):
    model = lived_in(new_network())
    model.conv_stem.weight.data[: model.conv_stem.out_channels // 2] = 0.0
    path = pack(model, tmp_path / "net.safetensors")
    values = refusal(forged(path, lambda about, streams: streams["half"].__setitem__(0, 0.0)))
    assert "stores zeros of conv_stem as values" in values
    with monkeypatch.context() as patch:
        patch.setattr(pack_module, "float_letter", lambda zeros, is_linear: "D")
        with pytest.raises(StudyError, match=r"calls conv_stem D, of which 50\.0% are zeros"):
            pack(model, path)
    model.bn2.running_var[0] = -1.0
    with pytest.raises(StudyError, match="has negative variances in bn2"):
        pack(model, path, merge=False)


def test_streams_must_be_where_the_header_says(packed_file):
    content = packed_file.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    for wrong in (
        lambda header: header["half"].update(dtype="F32"),
        lambda header: header["mask"].update(shape=[10**15], data_offsets=[0, 10**15]),
        lambda header: header["sign"].update(shape=[-1]),
        lambda header: header.update(more=header["sign"]),
        lambda header: header.pop("mask"),
    ):
        header = json.loads(content[8:end])
        wrong(header)
        line = json.dumps(header, separators=(",", ":")).encode()
        forgery = len(line).to_bytes(8, "little") + line + content[end:]
        at = packed_format.DIGEST_AT
        forgery = forgery[: at.start] + packed_format.digest_of(forgery) + forgery[at.stop :]
        packed_file.write_bytes(forgery)
        assert "digest" not in refusal(packed_file)


def test_what_cannot_be_packed_is_refused_and_the_old_file_stays(new_network, packed_file):
    before = packed_file.read_bytes()

    def fault(model, **options):
        with pytest.raises(StudyError) as refused:
            pack(model, packed_file, **options)
        assert packed_file.read_bytes() == before
        return str(refused.value)

    model = new_network()
    assert "is not a network of build_msunet" in fault(nn.Conv2d(3, 3, 1))
    assert "is not JSON" in fault(model, accuracy={"top1": float("nan")})
    assert "is not JSON" in fault(model, provenance={"path": packed_file})
    assert "shorten accuracy and provenance" in fault(model, provenance={"text": "x" * 2**20})
    with torch.no_grad():
        model.bn1.weight[0] = 6e4
        model.conv_stem.weight[0] = 2.0
    assert "conv_stem with its batch norm is beyond FP16" in fault(model)
    pack(model, packed_file, merge=False)
    before = packed_file.read_bytes()
    with torch.no_grad():
        model.bn1.weight[0] = 1e6
    assert "beyond 65504" in fault(model, merge=False)
    with torch.no_grad():
        model.bn1.weight[0] = float("nan")
    assert "bn1.weight holds NaN or Inf" in fault(model)
    with torch.no_grad():
        model.conv_head.weight[0, 0] = float("inf")
    assert "holds NaN or Inf" in fault(model, merge=False)
    assert "is at O2 already" in fault(apply_opt_level(new_network(), "O2"))


# -- one door for all files --------------------------------------------------------------------


def test_packed_files_checkpoints_and_published_files_open_by_one_function(new_network, tmp_path):
    model = new_network()
    own, published = tmp_path / "own.safetensors", tmp_path / "v3.pth.tar"
    save_checkpoint(own, {f"model/{n}": t for n, t in model.state_dict().items()}, {"network": model.config})
    torch.save({"state_dict": new_network(width=1.0).state_dict()}, published)
    small = pack(model, tmp_path / "packed.safetensors")
    assert torch.equal(load_network(own)[0].conv_stem.weight, model.conv_stem.weight)
    assert load_network(published)[1]["format"] == "pth.tar"
    found, info = load_network(small)
    assert (info["format"], info["dtype"], found.training) == (packed_format.FORMAT, "float16", False)
    with pytest.raises(StudyError, match="variant 'v9' is unknown"):
        load_network(small, "v9")
    with pytest.raises(StudyError, match="is not an MSUNet-v1 but an MSUNet-v3: give that variant"):
        load_network(small, "v1")
    pack(new_network(variant="v1"), small)
    assert load_network(small, "v2")[0].config["variant"] == "v1"  # the same network
    with pytest.raises(StudyError, match="is not a file"):
        load_network(tmp_path / "missing.safetensors")


def test_the_shipped_network_is_found_or_missed_by_name(tmp_path, monkeypatch):
    monkeypatch.setattr(unpack_module, "SHIPPED", tmp_path / "msunet_v3.safetensors")
    with pytest.raises(StudyError, match=r"msunet_v3\.safetensors is not there, and no checkpoint was given"):
        unpack_module.shipped()
    unpack_module.SHIPPED.touch()
    assert unpack_module.shipped() == unpack_module.SHIPPED


def test_provenance_is_what_the_run_says_and_short(tmp_path):
    stage = tmp_path / "run" / "prune"
    stage.mkdir(parents=True)
    info = {"stage": "prune", "epoch": 4, "history": [{"loss": 1.0}] * 1000}
    assert provenance_of(stage / "checkpoint.safetensors", info) == {"stage": "prune", "epoch": 4}
    run = {
        "command": "make reproduce",
        "profile": "smoke",
        "seed": 0,
        "wall_seconds": 170.5,
        "hardware": {"cpu": "one"},
        "git": {"commit": "abc", "clean": True},
        "packages": {"torch": "2"},
    }
    (stage.parent / "provenance.json").write_text(json.dumps(run))
    found = provenance_of(stage / "checkpoint.safetensors", info)
    assert found == {
        **{name: run[name] for name in ("command", "profile", "seed", "wall_seconds", "hardware")},
        **{"stage": "prune", "epoch": 4, "commit": "abc"},
    }
    (stage.parent / "provenance.json").write_text("{")
    assert provenance_of(stage / "checkpoint.safetensors", info) == {"stage": "prune", "epoch": 4}


def test_a_packed_file_packed_again_keeps_its_own_provenance(new_network, tmp_path):
    path = pack(new_network(), tmp_path / "net.safetensors", provenance={"seed": 3})
    (tmp_path / "provenance.json").write_text(json.dumps({"seed": 4}))
    _, info = load_network(path)
    assert provenance_of(path, info) == {"seed": 3}
