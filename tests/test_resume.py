"""What a stage goes on from: its own past alone, believed only as far as a run can have written it."""

from __future__ import annotations

import hashlib
import math
import os
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch
from helpers import forge

from msunet_core import StudyError, prune, train
from msunet_core.fast import library
from msunet_core.files import lock_folder
from msunet_core.model.checkpoint import read_checkpoint, read_momentum
from msunet_core.training import code, resume
from msunet_core.training.stages import CHECKPOINT


@pytest.fixture(scope="module")
def half_done(tmp_path_factory):
    return tmp_path_factory.mktemp("half") / "stage"


@pytest.fixture
def begun(images, new_network, recipe, half_done, tmp_path):
    """A pruning stage at O2 stopped by Ctrl-C in its third epoch; a function that goes on with it."""
    config = recipe(pruner="V3", freeze_ternary=True, ramp_epochs=2, opt_level="O2")

    def stop(done, total, text):
        if done == 7:
            os.kill(os.getpid(), signal.SIGINT)

    if not half_done.exists():
        with pytest.raises(KeyboardInterrupt):
            prune(new_network(), images, config, half_done, progress=stop, device="cpu")
    shutil.copytree(half_done, tmp_path / "stage")

    def go_on(**options):
        options = {"progress": False, "device": "cpu", **options}
        return prune(new_network(), images, options.pop("config", config), tmp_path / "stage", **options)

    go_on.folder, go_on.path, go_on.config = tmp_path / "stage", tmp_path / "stage" / CHECKPOINT, config
    return go_on


def test_the_stage_of_these_tests_is_half_done_and_can_be_gone_on_with(begun):
    _, info = read_checkpoint(begun.path)
    assert (info["epoch"], info["step"]) == (2, 1)
    assert len(begun().history) == 3


def changed(**entries):
    return lambda tensors, info: info.update(entries)


def put(name: str, tensor: torch.Tensor):
    def change(tensors, info):
        assert name in tensors
        tensors[name] = tensor

    return change


def fill(name: str, value: float):
    def change(tensors, info):
        tensors[name] = torch.full_like(tensors[name], value)

    return change


def row(table: str, **cells):
    def change(tensors, info):
        info[table] = [{**entry, **cells} for entry in info[table]]

    return change


def scaler(**entries):
    def change(tensors, info):
        info["learner"]["scaler"].update(entries)

    return change


def without(*path: str):
    def change(tensors, info):
        place = info
        for name in path[:-1]:
            place = place[name]
        del place[path[-1]]

    return change


STEM, PRUNED = "conv_stem.weight", "blocks.2.0.se.conv_reduce.weight"
CRAFTED = {
    "epoch -3": changed(epoch=-3),
    "epoch 10^9": changed(epoch=10**9),
    "epoch of no history": changed(epoch=1),
    "epoch a text": changed(epoch="1"),
    "epoch true": changed(epoch=True),
    "step 10^9": changed(step=10**9),
    "step -1": changed(step=-1),
    "step of no losses": changed(losses=[]),
    "losses NaN": lambda tensors, info: info.update(losses=[math.nan] * info["step"]),
    "losses lists": lambda tensors, info: info.update(losses=[[1.0]] * info["step"]),
    "no losses": without("losses"),
    "no learner": without("learner"),
    "no scaler": without("learner", "scaler"),
    "no network": without("network"),
    "no alpha": without("network", "alpha"),
    "alpha NaN": lambda tensors, info: info["network"].update(alpha=math.nan),
    "alpha a list": lambda tensors, info: info["network"].update(alpha=[0.3]),
    "learner a list": changed(learner=[1]),
    "history empty": changed(history=[]),
    "history numbers": changed(history=[1]),
    "history other columns": row("history", extra=1.0),
    "history other epochs": row("history", epoch=7),
    "history words": row("history", train_loss="x"),
    "layers empty": changed(layers=[]),
    "layers other columns": row("layers", extra=1.0),
    "layers deep": row("layers", epochs={}),
    "scale negative": scaler(scale=-1.0),
    "scale 0": scaler(scale=0.0),
    "scale infinite": scaler(scale=math.inf),
    "scale a text": scaler(scale="1"),
    "scale growth": scaler(growth_factor=1e9),
    "scale tracker": scaler(_growth_tracker=10**9),
    "scale more": scaler(more=1),
    "momentum that broadcasts": put(f"momentum/{PRUNED}", torch.zeros(1)),
    "momentum transposed": lambda tensors, info: tensors.update(
        {f"momentum/{PRUNED}": tensors[f"momentum/{PRUNED}"].transpose(0, 1)}
    ),
    "momentum NaN": fill(f"momentum/{PRUNED}", math.nan),
    "momentum halves": lambda tensors, info: tensors.update(
        {f"momentum/{PRUNED}": tensors[f"momentum/{PRUNED}"].half()}
    ),
    "no momentum": lambda tensors, info: tensors.pop(f"momentum/{PRUNED}"),
    "another tensor": lambda tensors, info: tensors.update({"model/more": torch.zeros(1)}),
    "mask of numbers": put(f"mask/{PRUNED}", torch.zeros(3)),
    "weights NaN": fill(f"model/{STEM}", math.nan),
    "weights Inf": fill(f"model/{STEM}", math.inf),
    "weights of another shape": put(f"model/{STEM}", torch.zeros(1)),
    "variance negative": fill("model/bn1.running_var", -1.0),
    "batches negative": fill("model/bn1.num_batches_tracked", -1),
}


@pytest.mark.parametrize("kind", CRAFTED)
def test_what_no_run_can_have_written_is_refused_in_one_line(begun, kind):
    tensors, info = read_checkpoint(begun.path)
    CRAFTED[kind](tensors, info)
    (begun.folder / f"{CHECKPOINT}.previous").unlink(missing_ok=True)
    forge(begun.path, tensors, info)
    before = begun.path.read_bytes()
    with pytest.raises(StudyError) as refused:
        begun()
    assert str(refused.value).isprintable() and len(str(refused.value)) <= 300
    assert begun.path.read_bytes() == before


def test_momentum_of_another_stage_is_believed_no_more(begun, images, new_network, tmp_path):
    tensors, info = read_checkpoint(begun.path)
    name = f"momentum/{PRUNED}"
    tensors[name] = torch.full_like(tensors[name], math.inf)
    forge(begun.path, tensors, info)
    with pytest.raises(StudyError, match="NaN or Inf"):
        read_momentum(begun.path)
    with pytest.raises(StudyError, match=r"momentum of .* has shape \(1,\)"):
        begun.folder = tmp_path / "other"
        prune(
            new_network(), images, begun.config, tmp_path / "other", device="cpu", progress=False,
            momentum={PRUNED: torch.zeros(1)},
        )  # fmt: skip


# --- links and pipes in a run folder ----------------------------------------------------------------------


@pytest.mark.parametrize("name", [".lock", "log.txt"])
def test_a_link_in_a_run_folder_is_not_written_through(begun, tmp_path, name):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (begun.folder / name).unlink(missing_ok=True)
    (begun.folder / name).symlink_to(victim)
    with pytest.raises(StudyError, match="symbolic link"):
        begun()
    assert victim.read_text() == "precious"


@pytest.mark.parametrize("name", [".lock", "log.txt", CHECKPOINT])
def test_a_pipe_in_a_run_folder_is_refused_and_not_waited_for(begun, name):
    (begun.folder / name).unlink(missing_ok=True)
    (begun.folder / f"{CHECKPOINT}.previous").unlink(missing_ok=True)
    os.mkfifo(begun.folder / name)
    with pytest.raises(StudyError, match=r"pipe|not a file"):
        begun()


# --- what would replace a stage moves it aside ------------------------------------------------------------


def state(folder: Path) -> dict:
    """Time and digest of every file of a stage, but for its lock and log."""
    return {
        path.name: (path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest())
        for path in folder.iterdir()
        if path.name not in (".lock", "log.txt")
    }


@pytest.fixture
def finished(images, new_network, recipe, tmp_path):
    """A finished stage, and a function that asks for it again."""

    def ask(**options):
        config = options.pop("config", recipe(epochs=1))
        options = {"progress": False, "device": "cpu", "aside": True, **options}
        return train(new_network(), images, config, tmp_path / "train", **options)

    ask()
    ask.folder = tmp_path / "train"
    return ask


def test_a_finished_stage_survives_every_other_edit(finished, monkeypatch):
    before = state(finished.folder)
    sources = {path: path.read_text() for path in code.PACKAGE.rglob("*.py")}
    read_text = Path.read_text

    read = set()

    def commented(path, *arguments, **options):
        if path not in sources:
            return read_text(path, *arguments, **options)
        read.add(path.name)
        return '"""Another docstring."""\n# another comment\n' + sources[path].replace("\n\n\n", "\n\n\n\n")

    monkeypatch.setattr(Path, "read_text", commented)
    code.code_of_training.cache_clear()
    finished()
    code.code_of_training.cache_clear()
    assert {"stages.py", "learner.py", "ternary.py"} <= read, "nothing was put into what is compared"
    assert state(finished.folder) == before
    assert list(finished.folder.parent.iterdir()) == [finished.folder]


@pytest.mark.parametrize("what", ["seed", "recipe", "code"])
def test_a_stage_that_would_be_replaced_is_moved_aside_by_name(finished, recipe, monkeypatch, capfd, what):
    before, names = state(finished.folder), ["train"]
    for number in (1, 2):
        options = {
            "seed": {"seed": number},
            "recipe": {"config": recipe(epochs=1, lr=0.05 + number / 100)},
            "code": {},
        }[what]
        if what == "code":
            monkeypatch.setattr(resume, "code_of_training", lambda number=number: {"fast/layers.py": number})
        finished(**options)
        aside = finished.folder.with_name(f"train.{number}")
        names.append(aside.name)
        assert state(aside) == before
        assert not (aside / ".lock").exists()
        said = capfd.readouterr().err
        assert said.count("\n") == 1 and f"it is kept as {aside}, and this stage begins anew" in said
        assert "it is kept as" in (finished.folder / "log.txt").read_text()
        before = state(finished.folder)
    assert sorted(path.name for path in finished.folder.parent.iterdir()) == names
    with lock_folder(finished.folder), lock_folder(finished.folder.with_name("train.1")):
        pass


def test_a_half_done_stage_is_moved_aside_too_and_can_be_taken_back(begun, images, new_network, recipe):
    before = state(begun.folder)
    other = recipe(pruner="V3", freeze_ternary=True, ramp_epochs=1, opt_level="O2")
    begun(config=other, aside=True)
    aside = begun.folder.with_name("stage.1")
    assert state(aside) == before
    shutil.rmtree(begun.folder)
    aside.rename(begun.folder)
    assert len(begun().history) == 3


def test_a_stage_from_before_code_was_recorded_is_believed(finished):
    tensors, info = read_checkpoint(finished.folder / CHECKPOINT)
    del info["identity"]["code"], info["arithmetic"]
    forge(finished.folder / CHECKPOINT, tensors, info)
    before = (finished.folder / CHECKPOINT).read_bytes()
    finished()
    assert (finished.folder / CHECKPOINT).read_bytes() == before


# --- other threads, other kernels -------------------------------------------------------------------------


def test_going_on_with_other_threads_or_kernels_is_said_and_the_same_is_not(begun, monkeypatch, capfd):
    shutil.copytree(begun.folder, begun.folder.with_name("again"))
    begun()
    assert "arithmetic" not in capfd.readouterr().err
    shutil.rmtree(begun.folder)
    begun.folder.with_name("again").rename(begun.folder)
    threads = torch.get_num_threads()
    kernels = "compiled" if library.enabled() else "PyTorch's"
    monkeypatch.setattr(library, "enabled", lambda: kernels != "compiled")
    torch.set_num_threads(threads + 1)
    try:
        begun()
    finally:
        torch.set_num_threads(threads)
    said = capfd.readouterr().err
    assert said.count("\n") == 1
    assert f"threads {threads} there, {threads + 1} now" in said and f"kernels {kernels!r} there" in said
    assert "not to the last bit" in said
    assert "another arithmetic" in (begun.folder / "log.txt").read_text()


# --- what code says ---------------------------------------------------------------------------------------

PLAIN = "import math\n\n\ndef area(r: float) -> float:\n    return math.pi * r**2\n"
SAME = {
    "a comment": PLAIN.replace("**2\n", "**2  # of a circle\n"),
    "a docstring": PLAIN.replace("float:\n", 'float:\n    """Of a circle."""\n'),
    "layout": PLAIN.replace("math.pi * r**2", "(\n        math.pi\n        * r ** 2\n    )"),
    "the head": '"""Circles."""\n' + PLAIN,
}
OTHER = {
    "a number": PLAIN.replace("**2", "**3"),
    "a name": PLAIN.replace("pi", "e"),
    "an operator": PLAIN.replace("math.pi *", "math.pi /"),
    "a statement": PLAIN.replace("    return", "    r = abs(r)\n    return"),
    "a text that is used": PLAIN + 'mode = "fast"\n',
    "none for zero": PLAIN + "mode = None\n",
    "zero": PLAIN + "mode = 0\n",
}


def digest_of(tmp_path, text: str, name: str = "a.py") -> str:
    (tmp_path / name).write_text(text)
    return code.code_digest(tmp_path / name)


def test_words_about_code_do_not_change_what_it_says(tmp_path):
    digests = {kind: digest_of(tmp_path, text) for kind, text in SAME.items()}
    assert set(digests.values()) == {digest_of(tmp_path, PLAIN)}


def test_whatever_changes_a_number_changes_what_code_says(tmp_path):
    digests = [digest_of(tmp_path, text) for text in (PLAIN, *OTHER.values())]
    assert len(set(digests)) == len(digests)


def test_the_words_of_an_error_are_not_counted_but_that_it_is_raised_is(tmp_path):
    one, other = (digest_of(tmp_path, f"if x:\n    raise ValueError({text!r})\n") for text in ("a", "b"))
    assert one == other != digest_of(tmp_path, "if x:\n    pass\n")


def test_comments_in_kernels_are_not_counted_and_texts_are(tmp_path):
    plain = 'int f() { return 3; }\nconst char *s = "a // b";\n'
    told = 'int f() {  // three\n  /* really\n  */ return 3; }\nconst char *s = "a // b";\n'
    one = digest_of(tmp_path, plain, "a.cpp")
    assert one == digest_of(tmp_path, told, "a.cpp")
    assert one != digest_of(tmp_path, plain.replace("// b", "// c"), "a.cpp")
    assert one != digest_of(tmp_path, plain.replace("3", "4"), "a.cpp")


def test_a_stage_is_bound_to_what_makes_its_numbers_and_to_nothing_else():
    found = code.code_of_training()
    assert {"training/learner.py", "model/ternary.py", "data/augment.py", "fast/layers.py"} <= found.keys()
    included = re.findall('#include "(.+)"', (code.PACKAGE / "fast" / "kernels.cpp").read_text())
    assert {"compiler.py", "fast/kernels.cpp", *(f"fast/{name}" for name in included)} <= found.keys()
    assert not [name for name in found if name.startswith(("measure/", "study/"))]
    assert found.keys() & code.NO_NUMBERS == set()
    assert all((code.PACKAGE / name).is_file() for name in {*found, *code.NO_NUMBERS})
