"""The baseline of `make bench` computes what the study computes: only then do its times mean anything."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from msunet_core import Profile, build_msunet, train
from msunet_core.data.cutmix import cutmix_loss
from msunet_core.model.network import Block, DepthwiseSeparable, InvertedResidual, SqueezeExcite
from msunet_core.study.grid_runs import code_of_runs
from msunet_core.study.profile import NetworkConfig
from msunet_core.study.run import new_network
from msunet_core.training.learner import Learner

sys.path += [str(Path(__file__).parent.parent / "benchmarks" / folder) for folder in (".", "recipes")]
import averaged
import latency
import same_numbers
from bandwidth import step_bytes
from bench import markdown, processor
from released import TransformedImages, consistency_loss, released_network

ROOT = Path(__file__).parent.parent


def both_networks():
    torch.manual_seed(0)
    ours, released = build_msunet(num_classes=10), released_network(num_classes=10)
    named = zip(released.state_dict().values(), ours.state_dict().values(), strict=True)
    for theirs, own in named:  # the same tensors in the same order, under other names
        theirs.copy_(own)
    return ours, released


def test_the_baseline_is_the_same_network():
    ours, released = both_networks()
    images, labels = torch.randn(4, 3, 32, 32), torch.arange(4)
    found = []
    ternary = [name for name, _ in ours.named_parameters()].index("blocks.0.0.conv_pw.weight")
    for model in (ours, released):
        loss = F.cross_entropy(model(images.to(memory_format=torch.channels_last)), labels)
        loss.backward()
        grads = [parameter.grad for parameter in model.parameters()]
        with torch.no_grad():
            scores = model.eval()(images)
        found.append((loss.detach(), scores, grads[-2], grads[0], grads[ternary]))
    names = ("loss", "scores in eval mode", "classifier", "stem", "the first ternary layer")
    for name, own, theirs in zip(names, *found, strict=True):
        # FP32 in another order; a value near a kink may fall on its other side, as the first layers see most.
        bound = 2e-2 if name.endswith(("stem", "layer")) else 1e-3
        assert (own - theirs).norm() < bound * own.norm(), name


@pytest.mark.slow
def test_the_baseline_trains_with_the_same_consistency():
    ours, released = both_networks()
    images, labels = torch.randn(6, 3, 32, 32), torch.arange(6)
    torch.manual_seed(7)
    theirs = consistency_loss(released, images, labels)
    theirs.backward()
    torch.manual_seed(7)  # what it drew, in its order: partners, the share, the box's centre
    partner, side = torch.randperm(6), int((1 - float(torch.rand(()))) ** 0.5 * 32)
    y, x = (int(torch.randint(32, ())) for _ in range(2))
    box = torch.tensor([y - side // 2, y + side // 2, x - side // 2, x + side // 2]).clamp(0, 32)
    lam = 1 - (box[1] - box[0]) * (box[3] - box[2]) / 32**2
    assert 0 < lam < 1, "nothing or all was pasted: choose another seed"
    own = cutmix_loss(ours, images, labels, partner, box, lam, "as-described")
    own.backward()
    torch.testing.assert_close(own, theirs, rtol=1e-4, atol=0)
    grads = [[*model.parameters()][-2].grad for model in (ours, released)]  # of the classifier
    assert (grads[0] - grads[1]).norm() < 1e-3 * grads[0].norm()


def test_the_baseline_transforms_image_by_image():
    images = torch.randint(0, 256, (3, 32, 32, 3), dtype=torch.uint8)
    image, label = TransformedImages(images, torch.tensor([5, 6, 7]))[1]
    assert image.shape == (3, 32, 32) and image.dtype == torch.float32 and label == 6


# --- bytes a step must move -------------------------------------------------------------------------------

SIMPLE = torch.nn.Sequential(
    torch.nn.Conv2d(3, 4, 3, padding=1, bias=False),  # 75 in, 100 out: 2 passes over both, no input gradient
    torch.nn.BatchNorm2d(4),  # 100: 8 passes
    torch.nn.ReLU(),  # within the norm's
    torch.nn.Conv2d(4, 2, 1, bias=False),  # 100 in, 50 out: 3 passes
)
SIMPLE_VALUES, SIMPLE_PARAMETERS = 2 * 175 + 8 * 100 + 3 * 150, 108 + 8 + 8


def test_bytes_of_a_step_are_those_counted_by_hand():
    assert SIMPLE_VALUES == 1600
    assert step_bytes(SIMPLE, 2, size=5) == 1600 * 2 * 4 + SIMPLE_PARAMETERS * 32
    assert not SIMPLE[0]._forward_hooks and SIMPLE.training  # counted on a copy


def test_bytes_of_skip_and_squeeze_excitation_are_those_counted_by_hand():
    def conv1x1(in_channels, out_channels, groups=1):
        return torch.nn.Conv2d(in_channels, out_channels, 1, bias=False)

    block = DepthwiseSeparable(4, 4, conv1x1)  # 100 values everywhere: 2 * 2, 8, 3 * 2, 8 and 4 for the skip
    parameters = 36 + 8 + 16 + 8
    assert step_bytes(_one_channel(block), 1, size=5) == 30 * 100 * 4 + parameters * 32
    excite = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 1, bias=False), SqueezeExcite(4, 2))
    # 25 in, 100 out, 2 passes; 7 passes over 100; inside it a vector of 4, one of 2, and back, 3 passes
    assert step_bytes(excite, 1, size=5) == (250 + 700 + 3 * 12) * 4 + (4 + 8 + 2 + 8 + 4) * 32


def test_bytes_of_a_block_computed_whole_are_those_counted_by_hand():
    def conv1x1(in_channels, out_channels, groups=1):
        return torch.nn.Conv2d(in_channels, out_channels, 1, bias=False)

    separable = _one_channel(
        DepthwiseSeparable(4, 4, conv1x1)
    )  # x, y and z of 100: 3 and 4 for the skip, 4, 9
    parameters = 36 + 8 + 16 + 8
    assert step_bytes(separable, 1, size=5, whole_blocks=True) == (7 + 4 + 9) * 100 * 4 + parameters * 32
    # x 100, y 8 channels of 3 x 3, z 2 channels of them: 7, 4, 9; squeeze-excitation reads nothing more
    block = InvertedResidual(4, 2, Block(2, 2, (3,), se_ratio=0.5, stride=2), conv1x1)
    count = sum(p.numel() for p in block.parameters())
    first = torch.nn.Conv2d(3, 4, 1, bias=False)  # 75 in, 100 out: 2 passes
    moved = step_bytes(torch.nn.Sequential(first, block), 1, size=5, whole_blocks=True)
    assert moved == (2 * 175 + 7 * 100 + 4 * 72 + 9 * 18) * 4 + (count + 12) * 32


def test_a_network_of_whole_blocks_moves_less_than_half():
    model = build_msunet()
    assert step_bytes(model, 64, whole_blocks=True) < step_bytes(model, 64) / 2


def _one_channel(block):
    """The block takes the only channels it can: those its first weight, (4, 1, 3, 3), seems to name."""
    block.register_forward_pre_hook(lambda module, args: (args[0].expand(-1, 4, -1, -1),))
    return block


def test_a_larger_batch_moves_more_activations_and_the_same_parameters():
    model = build_msunet(width=0.125)
    once, thrice = step_bytes(model, 4), step_bytes(model, 12)
    parameters = 32 * sum(p.numel() for p in model.parameters())
    assert thrice - parameters == 3 * (once - parameters) > 0


# --- the table --------------------------------------------------------------------------------------------


def both(released: float, ours: float, unit: str = "images/s") -> dict:
    ratio = {"median": ours / released, "low": 2.0, "high": 9.0, "values": [2.0, 9.0]}
    return {"released": {"median": released}, "ours": {"median": ours}, "ratio": ratio, "unit": unit}


def report() -> dict:
    memory = both(6700.0, 3600.0, "MB") | {
        "ratio": {"median": 1.86, "low": 1.86, "high": 1.86, "values": [1]}
    }
    return {
        "results": {
            "step": both(15.76, 101.4),
            "data": both(3584.0, 56611.0, "images/s per core"),
            "peak memory of training": memory,
            "share of copy bandwidth": {
                "bytes": 3.21e9,
                "bytes layer by layer": 9.14e9,
                "share": 0.42,
                "copy GB/s": 11.0,
            },
        },
        "hardware": {"cpu": "A Processor", "cores": 2},
        "processor": "A Processor, family 6",
        "threads": 2,
        "repeats": 5,
    }


def test_the_table_of_the_readme_comes_from_the_report():
    lines = markdown(report()).splitlines()
    assert lines[0].startswith("| v3 | as released | ours |")
    assert lines[2:5] == [
        "| training step | 15.8 images/s | 101 images/s | 6.4 (2.0..9.0) |",
        "| data pipeline, per core | 3,580 images/s | 56,600 images/s | 15.8 (2.0..9.0) |",
        "| peak memory of training | 6.7 GB | 3.6 GB | 1.9 |",
    ]
    assert lines[6].startswith(
        "2 threads on 2 cores of A Processor, family 6; medians of 5 alternated repeats"
    )
    assert "has to move 3.21 GB to and from memory, 42 % of what a copy at 11.0 GB/s moves" in lines[6]
    assert "layer by layer it would have to move 9.14 GB" in lines[6]


def test_a_processor_is_named_by_family_model_and_vectors():
    info = "cpu family\t: 25\nmodel\t\t: 17\nmodel name\t: AMD EPYC\nflags\t: fpu avx2 avx512f avx512_vnni\n"
    assert processor("AMD EPYC", info) == "AMD EPYC, family 25, model 17 (AVX-512, VNNI, AVX2)"
    assert processor("Neoverse-N1", "processor\t: 0\nFeatures\t: fp asimd\n") == "Neoverse-N1"


def test_the_table_of_latencies_names_the_better_runtime():
    def of(*medians):
        ways = zip(latency.WAYS, medians, strict=True)
        return {way: {"median": m, "low": m - 1, "high": m + 1} for way, m in ways}

    found = {
        "milliseconds": {"1 image, 1 thread": of(2.0, 9.0, 8.0, 4.0)},
        "seconds to the first answer": of(0.5, 6.0, 1.0, 1.0),
        "resident MB": of(41.9, 536.0, 73.2, 67.1),
        "bytes": dict.fromkeys(latency.WAYS, 390_621),
    }
    lines = latency.markdown({"v3": found}).splitlines()
    assert lines[2].startswith("| 1 image, 1 thread | 2.0 (1.0..3.0) ms |") and lines[2].endswith("| 0.50 |")
    assert "| 0.5 s | 6 s |" in lines[3] and "| 391 kB |" in lines[5]


# --- the same numbers by other code -------------------------------------------------------------


def test_runs_are_the_same_only_where_every_test_and_curve_is():
    run = {"tests": {"O3": {"top1": 41.2}}, "curve": [{"epoch": 0}], "seconds": 3.0}
    assert same_numbers.differing({"a": run}, {"a": {**run, "seconds": 9.0}}) == []
    other = {**run, "tests": {"O3": {"top1": 41.3}}}
    assert same_numbers.differing({"a": run, "b": run, "c": run}, {"a": other, "b": run, "d": run}) == list(
        "acd"
    )


def test_only_the_digest_of_the_other_code_is_carried_over(tmp_path):
    (tmp_path / "x_runs.json").write_text('{"r": {"code": "old", "n": 1}, "s": {"code": "older", "n": 2}}')
    (tmp_path / "x_provenance.json").write_text('{"code": "old", "commits": ["old"]}')
    assert same_numbers.carry(str(tmp_path / "x"), "old", "new") == 2
    assert json.loads((tmp_path / "x_runs.json").read_text())["r"] == {"code": "new", "n": 1}
    assert "older" in (tmp_path / "x_runs.json").read_text()
    assert json.loads((tmp_path / "x_provenance.json").read_text()) == {"code": "new", "commits": ["old"]}


@pytest.mark.parametrize("results", ["ablations/evidence", "recipes/short", "recipes/pruning"])
def test_the_committed_results_are_of_this_code(results):
    """Where this fails: compute them anew, or show with benchmarks/same_numbers.py that they are the same."""
    runs = json.loads((ROOT / "runs" / f"{results}_runs.json").read_text())
    made = json.loads((ROOT / "runs" / f"{results}_provenance.json").read_text())
    assert {made["code"], *(run["code"] for run in runs.values())} == {code_of_runs()}


def test_averaging_trains_as_the_trainer_does_and_averages_its_last_steps(
    images, recipe, tmp_path, monkeypatch
):
    config = recipe(cutmix_probability=0.0, alpha=0.67749)
    profile = Profile(network=NetworkConfig(width=0.0625), train=config)
    steps = []
    step = Learner.step

    def watched(learner, *arguments):
        loss = step(learner, *arguments)
        steps.append(learner.network.conv_stem.weight.detach().clone())
        return loss

    monkeypatch.setattr(averaged, "BATCHES", 2)
    monkeypatch.setattr(Learner, "step", watched)
    found = averaged.trained(images, profile, 3)
    assert len(steps) == 9
    network = new_network(Profile(seed=3), images.num_classes, width=0.0625)
    whole = train(network, images, config, tmp_path, seed=3, progress=False).model.state_dict()
    assert all(torch.equal(whole[name], value) for name, value in found["last step"].state_dict().items())
    for name, last in (("last epoch", 3), ("second half of the last epoch", 1)):
        mean = torch.stack(steps[9 - last : 9]).mean(0)
        assert torch.allclose(found[name].conv_stem.weight, mean, rtol=1e-5)
