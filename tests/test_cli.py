"""The command line: the same study without Jupyter, and one line of error for whatever is wrong."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys

import pytest
import torch

from msunet_core import ImageData, build_msunet, load_checkpoint, pack
from msunet_core import __main__ as main_module
from msunet_core.__main__ import main
from msunet_core.data.sources import CIFAR100_CLASSES, save_npz
from msunet_core.errors import StudyError, failure
from msunet_core.measure import unpack as unpack_module
from msunet_core.measure.unpack import load_network
from msunet_core.training.stages import CHECKPOINT

SHORT = [
    "network.width=0.0625",
    "train.epochs=1",
    "train.batch_size=8",
    "prune.epochs=1",
    "prune.batch_size=8",
]


@pytest.fixture
def npz(images, tmp_path):
    path = tmp_path / "images.npz"
    save_npz(images, path)
    return str(path)


def error_of(capsys, *arguments) -> str:
    """The one line with which a command ends badly."""
    try:
        status = main([str(argument) for argument in arguments])
    except SystemExit as stopped:  # argparse prints its usage before
        status = stopped.code
    shown = capsys.readouterr()
    assert status == 2, (status, shown)
    line = shown.err.splitlines()[-1]
    assert "error: " in line
    assert "Traceback" not in shown.err
    if line.startswith("error: "):
        assert shown.err.count("\n") == 1, shown.err
    return line


@pytest.mark.parametrize("command", ["", "data", "train", "prune", "ablations", "validate", "score", "pack"])
def test_every_command_explains_itself(capsys, command):
    with pytest.raises(SystemExit) as stopped:
        main([*command.split(), "--help"])
    assert stopped.value.code == 0
    assert "usage: python -m msunet_core" in capsys.readouterr().out


def test_the_study_runs_from_data_to_score(capsys, npz, tmp_path):
    def run(*arguments):
        assert main([str(argument) for argument in arguments]) == 0
        return capsys.readouterr().out

    assert "24 training and 12 test images\n4 classes: red, green" in run("data", "--data", npz)
    trained, pruned = tmp_path / "train", tmp_path / "prune"
    out = run("train", "--data", npz, "--out", trained, "--device", "cpu", "--set", *SHORT)
    accuracy = float(re.search(r"top1 ([\d.]+)", out)[1])
    assert run("train", "--data", npz, "--out", trained, "--device", "cpu", "--set", *SHORT) == out
    run("prune", "--data", npz, "--out", pruned, "--checkpoint", trained, "--device", "cpu", "--set", *SHORT)
    table = run("validate", trained / CHECKPOINT, "--data", npz, "--opt-level", "O0", "O3")
    level, top1, top5, _, _ = table.splitlines()[2].split()
    assert (level, float(top1), float(top5)) == ("O0", pytest.approx(accuracy, abs=0.006), 100.0)
    assert table.splitlines()[3].split()[0] == "O3"
    assert run("score", pruned / CHECKPOINT, "--opt-level", "O3").startswith("O3\n")
    model, info = load_checkpoint(pruned / CHECKPOINT)
    assert (info["stage"], info["opt_level"]) == ("prune", "O2")
    assert model.config["num_classes"] == 4

    out = run("pack", pruned, tmp_path / "net.safetensors", "--data", npz)
    packed_top1 = re.search(r"O3: top-1 ([\d.]+) %", out)[1]
    table = run("validate", tmp_path / "net.safetensors", "--data", npz, "--opt-level", "O3")
    counted = run("score", pruned, "--opt-level", "O3")
    assert run("score", tmp_path / "net.safetensors", "--opt-level", "O3") == counted
    size = (tmp_path / "net.safetensors").stat().st_size
    assert f"net.safetensors: {size:,} bytes, 12 test images" in table
    level, top1, _, _, value = table.splitlines()[2].split()
    assert (level, top1) == ("O3", packed_top1)
    assert value in counted
    _, info = load_network(tmp_path / "net.safetensors")
    assert info["accuracy"]["images"] == 12
    assert info["accuracy"]["top1"] == pytest.approx(float(top1), abs=0.006)
    assert {"stage": "prune", "epoch": 1}.items() <= info["provenance"].items()
    before = (tmp_path / "net.safetensors").read_bytes()
    error_of(
        capsys, "pack", str(pruned), str(tmp_path / "net.safetensors"), "--data", str(tmp_path / "no.npz")
    )
    assert (tmp_path / "net.safetensors").read_bytes() == before, "data that are not there cost the file"
    levels = tmp_path / "levels.csv"
    table = run("validate", pruned, "--data", npz, "--opt-level", "O0", "O3", "--out", levels)
    assert [row.split(",")[:2] for row in levels.read_text().splitlines()[1:]] == [
        row.split()[:2] for row in table.splitlines()[2:]
    ]


def test_without_a_checkpoint_the_shipped_network_is_taken(capsys, npz, new_network, tmp_path, monkeypatch):
    monkeypatch.setattr(unpack_module, "SHIPPED", tmp_path / "shipped.safetensors")
    assert "shipped.safetensors is not there, and no checkpoint was given" in error_of(capsys, "score")
    pack(new_network(), unpack_module.SHIPPED)
    assert main(["score", "--opt-level", "O3"]) == 0
    assert main(["validate", "--data", npz, "--opt-level", "O0", "O3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-4].startswith(str(unpack_module.SHIPPED))
    assert [line.split()[0] for line in lines[-2:]] == ["O0", "O3"]


@pytest.mark.slow
def test_the_shipped_network_warns_of_images_of_other_classes(capsys, tmp_path):
    level = ["--opt-level", "O0", "--limit", "1"]
    assert main(["validate", "--data", "synthetic", *level]) == 0
    warned = capsys.readouterr().err
    assert "the 100 classes of synthetic are not those that the shipped network learnt" in warned
    assert warned.count("\n") == 1
    pixels, labels = torch.zeros(100, 32, 32, 3, dtype=torch.uint8), torch.arange(100)
    same = ImageData(pixels, labels, pixels, labels, CIFAR100_CLASSES, "mine")
    save_npz(same, tmp_path / "same.npz")
    assert main(["validate", "--data", str(tmp_path / "same.npz"), *level]) == 0
    assert "warning" not in capsys.readouterr().err


def test_a_packed_file_keeps_the_provenance_that_is_given(capsys, new_network, tmp_path):
    told, out = tmp_path / "provenance.json", tmp_path / "net.safetensors"
    pack(new_network(), tmp_path / "source.safetensors")
    command = ["pack", str(tmp_path / "source.safetensors"), str(out), "--provenance", str(told)]
    assert "provenance.json: no such file" in error_of(capsys, *command)
    told.write_text("[]")
    assert "provenance.json is not JSON of names and values; correct it" in error_of(capsys, *command)
    told.write_text('{"command": "make"}')
    assert main([*command, "--no-merge"]) == 0
    assert "that the score counts" in capsys.readouterr().out
    info = load_network(out)[1]
    assert (info["provenance"], info["merged"]) == ({"command": "make"}, False)


def test_data_are_written_as_an_npz_that_is_read_again(capsys, npz, tmp_path):
    assert main(["data", "--data", npz, "--limit", "2", "--out", str(tmp_path / "few.npz")]) == 0
    fingerprint = re.search(r"fingerprint (\w+)", capsys.readouterr().out)[1]
    assert main(["data", "--data", str(tmp_path / "few.npz")]) == 0
    assert (
        f"8 training and 8 test images\n4 classes: red, green, blue, yellow\nfingerprint {fingerprint}"
        in (capsys.readouterr().out)
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--profile", "smokey"], "profile 'smokey' is unknown; did you mean 'smoke'?"),
        (["--variant", "v33"], "variant 'v33' is unknown; did you mean 'v3'?"),
        (["--data", "synthetik"], "unknown data source 'synthetik': did you mean 'synthetic'?"),
        (["--data", "missing/images.npz"], "missing/images.npz"),
        (["--limit", "0"], "limit 0"),
        (["--limit", "few"], "argument --limit: invalid int value: 'few'"),
        (["--seed", "-1"], "seed -1 is outside"),
        (["--device", "abacus"], "device 'abacus' cannot be used"),
        (["--set", "train.epoch=3"], "parameter train.epoch is unknown; did you mean 'epochs'?"),
        (["--set", "train.epochs=many"], "parameter train.epochs is 'many', not of type int"),
        (["--set", "network.width=0"], "width 0.0 is outside"),
        (["--colour", "red"], "unrecognized arguments: --colour red"),
    ],
)
def test_a_wrong_argument_of_train_is_one_line(capsys, npz, tmp_path, arguments, message):
    out = tmp_path / "out"
    data = [] if "--data" in arguments else ["--data", npz]
    assert message in error_of(capsys, "train", "--out", out, *data, *arguments)
    assert not (out / CHECKPOINT).exists()
    assert not (out / "metrics.json").exists()


def test_a_wrong_checkpoint_is_one_line(capsys, npz, tmp_path):
    network = build_msunet("v1")
    path = tmp_path / "v1.pth.tar"
    torch.save({"state_dict": network.state_dict()}, path)
    assert "is not an MSUNet-v3: blocks.2.0.conv_pw.weight" in error_of(capsys, "score", path)
    assert "is not an MSUNet-v3" in error_of(capsys, "validate", path, "--data", npz)
    fitting = error_of(capsys, "validate", path, "--data", npz, "--variant", "v1")
    assert "the data have 4 classes, the network 100" in fitting
    assert "choose one of v1, v2, v3" in error_of(capsys, "score", path, "--variant", "v9")
    assert "is not a file" in error_of(capsys, "score", tmp_path / "missing.pth.tar")
    assert "is not a file" in error_of(capsys, "score", tmp_path)
    assert "is not a file" in error_of(capsys, "pack", tmp_path, tmp_path / "net.safetensors")
    assert "is not an MSUNet-v3" in error_of(capsys, "pack", path, tmp_path / "net.safetensors")
    assert "invalid choice: 'O9'" in error_of(capsys, "score", path, "--opt-level", "O9")
    missing = error_of(
        capsys, "prune", "--checkpoint", tmp_path / "no", "--out", tmp_path / "out", "--data", npz
    )
    assert "is not a file" in missing
    assert not (tmp_path / "out").exists()


def test_a_place_that_cannot_be_written_is_one_line(capsys, npz, tmp_path):
    (tmp_path / "file").touch()
    assert "cannot write" in error_of(capsys, "data", "--data", npz, "--out", tmp_path / "file" / "x.npz")
    assert "cannot write" in error_of(
        capsys, "train", "--data", npz, "--out", tmp_path / "file", "--set", *SHORT
    )


def test_a_command_is_needed(capsys):
    assert "the following arguments are required" in error_of(capsys)


def test_a_process_ends_with_status_2_and_no_traceback(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "msunet_core", "score", tmp_path / "missing"],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    expected = f"error: checkpoint '{tmp_path / 'missing'}' is not a file; check the path\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", expected)


def test_a_stage_says_how_it_was_made_and_in_how_many_sittings(npz, tmp_path):
    command = ["train", "--data", str(npz), "--out", str(tmp_path / "train")]
    changes = ["train.epochs=1", "train.batch_size=8", "network.width=0.0625", "train.schedule=step"]
    assert main([*command, "--set", *changes]) == 0
    assert main([*command, "--set", "train.epochs=2", *changes[1:]]) == 0
    made = json.loads((tmp_path / "train" / "provenance.json").read_text())
    assert (made["profile"], made["seed"], len(made["sittings"])) == ("smoke", 0, 2)
    assert made["wall_seconds"] == pytest.approx(sum(s["wall_seconds"] for s in made["sittings"]), abs=0.02)
    assert made["hardware"]["cores"] >= 1 and made["packages"]["torch"]
    assert main([*command, "--seed", "7", "--set", "train.epochs=2", *changes[1:]]) == 2
    assert json.loads((tmp_path / "train" / "provenance.json").read_text()) == made, (
        "who was refused made nothing"
    )


ODD_NAMES = ("$x^$", "100%", "it's `a`", "<b>&amp;", "_hidden", "{curly}", "é ü", "a\\b", "#1", "-1")


def data_of(classes: int, path) -> str:
    """An .npz of so many classes: two training images and one test image each, a shade of its own."""
    shades = torch.linspace(0, 255, classes).to(torch.uint8)
    images = shades.repeat_interleave(3)[:, None, None, None].expand(-1, 32, 32, 3).clone()
    labels = torch.arange(classes).repeat_interleave(3)
    test = torch.arange(3 * classes) % 3 == 2
    names = tuple(f"{ODD_NAMES[n % len(ODD_NAMES)]}{n // len(ODD_NAMES) or ''}" for n in range(classes))
    save_npz(ImageData(images[~test], labels[~test], images[test], labels[test], names, "test"), path)
    return str(path)


@pytest.mark.parametrize("classes", [1, 2, 10, pytest.param(1000, marks=pytest.mark.slow)])
def test_the_study_runs_on_data_of_any_number_of_classes_however_they_are_called(capsys, tmp_path, classes):
    data = data_of(classes, tmp_path / "own.npz")
    short = [*SHORT[:2], f"train.batch_size={classes}", "prune.epochs=1", f"prune.batch_size={classes}"]
    assert main(["data", "--data", data]) == 0
    out, common = tmp_path / "train", ["--data", data, "--device", "cpu", "--set", *short]
    assert main(["train", "--out", str(out), *common]) == 0
    assert main(["prune", "--checkpoint", str(out), "--out", str(tmp_path / "prune"), *common]) == 0
    assert main(["validate", str(tmp_path / "prune"), "--data", data, "--device", "cpu"]) == 0
    assert main(["score", str(tmp_path / "prune")]) == 0
    assert main(["pack", str(tmp_path / "prune"), str(tmp_path / "p.safetensors"), "--data", data]) == 0
    assert main(["validate", str(tmp_path / "p.safetensors"), "--data", data, "--opt-level", "O3"]) == 0
    assert load_network(tmp_path / "p.safetensors")[0].config["num_classes"] == classes
    assert capsys.readouterr().err.count("rror") == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--device", "meta"], "device 'meta' cannot be used"),
        (["--device", "cuda:99"], "device 'cuda:99' cannot be used"),
        (["--device", "x" * 3000], "cannot be used"),
        (["--seed", "9" * 5000], "argument --seed: invalid int value"),
        (["--seed", "9223372036854775808"], "seed 9223372036854775808 is outside"),
        (["--set", "train.lr=\x1b[31m"], "override 'train.lr' is not readable YAML"),
        (["--set", "train.lr=red"], "not of type float"),
        (["--set", "network.variant=v1"], "give VARIANT (--variant) instead"),
        (["--data", "a\nb"], "unknown data source"),
        (["--nothing"], "unrecognized arguments"),
    ],
)
def test_a_hostile_value_is_refused_in_one_line(capsys, npz, tmp_path, arguments, said):
    line = error_of(capsys, "train", "--data", npz, "--out", tmp_path / "out", "--device", "cpu", *arguments)
    assert line.startswith("error: ") and said in line and len(line) <= 307 and line.isprintable()


@pytest.mark.parametrize(
    "arguments", [["score"], ["validate", "--data", "synthetic"]], ids=["score", "validate"]
)
def test_a_name_too_long_for_a_file_is_refused_in_one_line(capsys, arguments):
    assert "is not a file" in error_of(capsys, *arguments, "9" * 5000)
    assert "is unknown" in error_of(capsys, "data", "--profile", "9" * 5000 + ".yaml")


def test_tables_of_a_part_of_the_grid_replace_no_whole_ones(capsys):
    assert "give a folder of their own, --out" in error_of(capsys, "ablations", "--only", "alpha")
    for typed, told in {
        "--variant=v1": "--variant v1: variants and seeds are the grid's",
        "--seed=7": "--seed 7: variants and seeds are the grid's",
        "--set=ablation.cutmix_probability=0.5": "the grid's baseline sets it for all rows",
        "--set=network.width=0.5": "networks of the grid have ablation_width",
    }.items():
        assert told in error_of(capsys, "ablations", typed)


def test_a_fault_of_the_system_is_one_line(capsys, monkeypatch):
    def broken(*_, **__):
        raise OSError(errno.EIO, "Input/output error", "images")

    monkeypatch.setattr(main_module, "load_data", broken)
    assert "[Errno 5] Input/output error: 'images'" in error_of(capsys, "data", "--data", "synthetic")


def test_the_largest_seed_trains(capsys, npz, tmp_path):
    common = ["--data", npz, "--device", "cpu", "--set", *SHORT]
    assert main(["train", "--out", str(tmp_path), "--seed", str(2**63 - 1), *common]) == 0


@pytest.mark.parametrize("level", ["O0", "O1", "O2"])
def test_a_rate_that_is_far_too_high_advises_a_lower_one(capsys, npz, tmp_path, level):
    high = ["train.lr=100", "train.warmup_lr=100", f"train.opt_level={level}", "train.epochs=20", *SHORT[2:]]
    common = ["--data", npz, "--device", "cpu", "--set", SHORT[0], *high]
    assert main(["train", "--out", str(tmp_path / "out"), *common]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: ") and "lower lr 100" in line


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (StudyError("lr is -1; give a number above 0"), "lr is -1; give a number above 0"),
        (MemoryError(), "MemoryError"),  # a kind without words
        (RuntimeError("\nno kernel image\nfor this device"), "RuntimeError: no kernel image"),
    ],
)
def test_whatever_fails_is_told_in_one_line_with_its_kind_where_that_says_something(error, told):
    assert failure(error) == told
