"""A stage can be stopped anywhere and ends as if it had not been; what it cannot do, it says in one line."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from msunet_core import (
    ImageData,
    StageConfig,
    StudyError,
    build_msunet,
    evaluate,
    load_checkpoint,
    load_data,
    prune,
    train,
)
from msunet_core.data.augment import EpochPlan
from msunet_core.fast import library
from msunet_core.measure.evaluation import accuracy, class_scores
from msunet_core.model.checkpoint import DAMAGED, read_checkpoint, read_momentum, save_checkpoint
from msunet_core.model.ternary import ternary_layers
from msunet_core.training.records import Records, epoch_seconds, ran_away
from msunet_core.training.stages import CHECKPOINT

STAGES = {
    "train-O0": (train, {}),
    "train-O2": (train, {"opt_level": "O2"}),
    "prune-O0": (prune, {"pruner": "V3", "freeze_ternary": True, "ramp_epochs": 2}),
    "prune-O2": (prune, {"pruner": "V2", "freeze_ternary": True, "ramp_epochs": 2, "opt_level": "O2"}),
    "one-cycle": (train, {"schedule": "one-cycle", "evaluate_every": 2}),
}


class Killed(BaseException):
    """Ends a stage with nothing tidied up, as SIGKILL does; no code of the study catches it."""


def contents(folder: Path) -> dict:
    """All that a stage ended with, comparable bit for bit."""
    tensors, info = read_checkpoint(folder / CHECKPOINT)
    found = {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}
    # JSON text, since NaN is not equal to itself.
    found |= {key: json.dumps(value) for key, value in info.items()}
    return found | {
        name: (folder / name).read_text() for name in ("history.csv", "layers.csv", "metrics.json")
    }


def assert_same(folder: Path, other: Path) -> None:
    one, two = contents(folder), contents(other)
    assert one.keys() == two.keys()
    assert [name for name in one if one[name] != two[name]] == []


def perturb(*_) -> None:
    """A progress that throws every global random state about: no result may depend on one."""
    seed = time.time_ns() % 2**32
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


def stop_at(step: int, how):
    def progress(done: int, total: int, text: str) -> None:
        perturb()
        if done == step:
            if how is Killed:
                raise Killed
            os.kill(os.getpid(), how)

    return progress


@pytest.fixture(scope="module")
def whole_runs(tmp_path_factory) -> dict:
    """Each kind of stage run once without being stopped, when first asked for."""
    return {"folder": tmp_path_factory.mktemp("whole")}


@pytest.mark.parametrize(
    ("step", "how"),
    [(2, signal.SIGTERM), (3, signal.SIGINT), (5, Killed), (9, signal.SIGHUP)],
    ids=["SIGTERM-in-an-epoch", "Ctrl-C-at-its-last-step", "killed", "SIGHUP-at-the-very-last-step"],
)
@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[] if kind == "prune-O2" else pytest.mark.slow) for kind in STAGES]
)
@pytest.mark.usefixtures("sighup_ends")
def test_a_stopped_stage_ends_bit_for_bit_as_one_never_stopped(
    images, new_network, recipe, tmp_path, whole_runs, kind, step, how
):
    run, changes = STAGES[kind]
    config = recipe(**changes)
    if kind not in whole_runs:
        whole_runs[kind] = run(new_network(), images, config, whole_runs["folder"] / kind, progress=perturb)
    whole = whole_runs[kind]
    stopped = {Killed: Killed, signal.SIGINT: KeyboardInterrupt}.get(how, SystemExit)
    with pytest.raises(stopped):
        run(new_network(), images, config, tmp_path, progress=stop_at(step, how))
    if how is not Killed:
        info = read_checkpoint(tmp_path / CHECKPOINT)[1]
        assert info["epoch"] * 3 + info["step"] == step  # the end of the current step, not of the epoch
    assert not (tmp_path / "metrics.json").exists()  # nothing that looks finished
    resumed = run(new_network(), images, config, tmp_path, progress=perturb)
    assert_same(tmp_path, whole_runs["folder"] / kind)
    assert resumed.metrics == whole.metrics
    pd.testing.assert_frame_equal(resumed.history, whole.history, check_exact=True)
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, resumed.model.state_dict()[name]), name


def test_a_signal_during_the_evaluation_does_not_wait_for_its_end(
    images, new_network, recipe, tmp_path, monkeypatch
):
    monkeypatch.setattr("msunet_core.training.stages.BATCH_SIZE", 5)  # 12 test images, so 3 batches
    train(new_network(), images, recipe(), tmp_path / "whole", progress=False)
    batches = []

    def signalled(model, batch, **options):
        batches.append(len(batch))
        os.kill(os.getpid(), signal.SIGTERM)
        return class_scores(model, batch, **options)

    with monkeypatch.context() as patch:
        patch.setattr("msunet_core.training.stages.class_scores", signalled)
        with pytest.raises(SystemExit):
            train(new_network(), images, recipe(), tmp_path / "stopped", progress=False)
    assert batches == [5]
    info = read_checkpoint(tmp_path / "stopped" / CHECKPOINT)[1]
    assert (info["epoch"], info["step"], info["history"]) == (0, 3, [])
    train(new_network(), images, recipe(), tmp_path / "stopped", progress=False)
    assert_same(tmp_path / "stopped", tmp_path / "whole")


@pytest.mark.parametrize("damage", ["truncated", "flipped", "removed"])
def test_with_a_bad_newest_checkpoint_the_previous_one_is_used(images, new_network, recipe, tmp_path, damage):
    train(new_network(), images, recipe(), tmp_path / "whole", progress=False)
    shutil.copytree(tmp_path / "whole", tmp_path / "damaged")
    path = tmp_path / "damaged" / CHECKPOINT
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content[:-1] if damage == "truncated" else content)
    if damage == "removed":
        path.unlink()
    steps = []
    result = train(
        new_network(), images, recipe(), tmp_path / "damaged", progress=lambda done, *_: steps.append(done)
    )
    assert steps == [7, 8, 9]  # the last epoch again, nothing more
    assert result.checkpoint == path
    kept = path.with_name(path.name + DAMAGED)
    assert (
        kept.exists() == ("it is kept as" in (path.parent / "log.txt").read_text()) == (damage != "removed")
    )
    assert_same(tmp_path / "damaged", tmp_path / "whole")


def test_with_no_good_checkpoint_left_the_stage_says_so(images, new_network, recipe, tmp_path):
    train(new_network(), images, recipe(), tmp_path, progress=False)
    for path in tmp_path.glob(f"{CHECKPOINT}*"):
        path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(StudyError, match=r"no usable checkpoint: .*not a whole safetensors.*remove it"):
        train(new_network(), images, recipe(), tmp_path, progress=False)


@pytest.mark.slow
def test_killed_while_the_checkpoint_is_written_the_last_one_is_used(
    images, new_network, recipe, tmp_path, monkeypatch
):
    """In a process of its own that dies at the n-th rename of a checkpoint, before and after it."""
    train(new_network(), images, recipe(), tmp_path / "whole", progress=False)
    for number in range(1, 7):
        folder = tmp_path / str(number)
        if (child := os.fork()) == 0:
            renames = []
            real = os.replace

            def replace(source, target, renames=renames, real=real, number=number):
                renames.append(target)
                if len(renames) == number:
                    os._exit(7)
                real(source, target)

            os.replace = replace
            Path.replace = lambda self, target: replace(self, target)
            try:
                train(new_network(), images, recipe(), folder, progress=False)
            finally:
                os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        train(new_network(), images, recipe(), folder, progress=False)
        assert_same(folder, tmp_path / "whole")
        assert [entry.name for entry in folder.iterdir() if ".tmp" in entry.name] == []


def test_a_step_schedule_can_be_continued_for_more_epochs(images, new_network, recipe, tmp_path):
    train(new_network(), images, recipe(epochs=3), tmp_path / "whole", progress=False)
    train(new_network(), images, recipe(epochs=1), tmp_path / "longer", progress=False)
    assert (tmp_path / "longer" / "metrics.json").exists()
    with pytest.raises(Killed):
        train(new_network(), images, recipe(epochs=3), tmp_path / "longer", progress=stop_at(7, Killed))
    assert not (tmp_path / "longer" / "metrics.json").exists(), "a half-done stage is not finished"
    train(new_network(), images, recipe(epochs=3), tmp_path / "longer", progress=False)
    assert_same(tmp_path / "longer", tmp_path / "whole")
    with pytest.raises(StudyError, match=r"holds 3 epochs and 0 steps, more than epochs 2; raise epochs"):
        train(new_network(), images, recipe(epochs=2), tmp_path / "longer", progress=False)


def test_a_cosine_that_begins_anew_can_be_continued_and_tests_may_come_more_often(
    images, new_network, recipe, tmp_path
):
    cosine = dict(schedule="cosine", cycle_epochs=2, milestones=())
    train(new_network(), images, recipe(epochs=3, **cosine), tmp_path / "whole", progress=False)
    sparse = recipe(epochs=2, evaluate_every=2, **cosine)
    train(new_network(), images, sparse, tmp_path / "longer", progress=False)
    result = train(new_network(), images, recipe(epochs=3, **cosine), tmp_path / "longer", progress=False)
    whole, longer = (read_checkpoint(tmp_path / name / CHECKPOINT)[0] for name in ("whole", "longer"))
    assert all(torch.equal(whole[name], longer[name]) for name in whole)
    assert result.history["test_top1"].isna().tolist() == [True, False, False]


def test_a_finished_stage_is_not_run_again_and_gives_the_same_result(images, new_network, recipe, tmp_path):
    first = train(new_network(), images, recipe(), tmp_path, progress=False)
    before = (tmp_path / CHECKPOINT).stat().st_mtime_ns

    def never(*_):
        raise AssertionError("a finished stage took a step")

    again = train(new_network(), images, recipe(), tmp_path, progress=never)
    assert (tmp_path / CHECKPOINT).stat().st_mtime_ns == before
    pd.testing.assert_frame_equal(again.history, first.history, check_exact=True)
    sample = images.test_images
    assert torch.equal(class_scores(again.model, sample), class_scores(first.model, sample))


def test_the_loaded_checkpoint_is_the_network_whose_accuracy_was_recorded(
    images, new_network, recipe, tmp_path
):
    config = recipe(alpha_start=0, alpha_end=30)  # alpha is far from its last value when training ends
    result = train(new_network(), images, config, tmp_path, progress=False)
    model, info = load_checkpoint(result.checkpoint)
    assert model.config["alpha"] == result.model.config["alpha"] == result.history["alpha"].iloc[-1]
    found = evaluate(model, images.test_images, images.test_labels)
    recorded = json.loads((tmp_path / "metrics.json").read_text())
    assert found == recorded == result.metrics
    assert info["history"][-1]["test_top1"] == found["top1"]
    by_hand = accuracy(class_scores(result.model, images.test_images), images.test_labels)
    assert by_hand == recorded


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"lr": 0.01}, "lr 0.05 there, 0.01 now"),
        ({"opt_level": "O2"}, "opt_level 'O0' there, 'O2' now"),
        ({"milestones": (1,)}, r"milestones \[2\] there, \[1\] now"),
        # Fields that came later: a checkpoint without them is one of their defaults, and of nothing else.
        ({"ternary_gradient": "signs"}, "ternary_gradient None there, 'signs' now"),
        ({"se_sparsity": 0.8}, "se_sparsity None there, 0.8 now"),
    ],
)
def test_a_folder_of_another_recipe_is_refused_by_the_name_that_differs(
    images, new_network, recipe, tmp_path, change, named
):
    train(new_network(), images, recipe(epochs=1), tmp_path, progress=False)
    with pytest.raises(StudyError, match=f"holds another run .{named}"):
        train(new_network(), images, recipe(epochs=1, **change), tmp_path, progress=False)


def test_a_folder_of_another_seed_network_stage_or_data_is_refused(images, new_network, recipe, tmp_path):
    config = recipe(epochs=1)
    train(new_network(), images, config, tmp_path, progress=False)
    darker = dataclasses.replace(images, train_images=images.train_images // 2)
    for message, attempt in {
        "seed 0 there, 5 now": lambda: train(new_network(), images, config, tmp_path, seed=5),
        "it began with other weights": lambda: train(
            new_network().apply(lambda m: m.reset_parameters() if hasattr(m, "weight") else None),
            images,
            config,
            tmp_path,
        ),
        "variant 'v3' there, 'v1' now": lambda: train(new_network(variant="v1"), images, config, tmp_path),
        "stage 'train' there, 'prune' now": lambda: prune(
            new_network(), images, recipe(epochs=1, pruner="V1"), tmp_path
        ),
        "data '": lambda: train(new_network(), darker, config, tmp_path),
    }.items():
        with pytest.raises(StudyError, match=f"holds another run .{message}"):
            attempt()


def test_a_checkpoint_that_is_none_of_a_stage_is_refused_in_one_line(images, new_network, recipe, tmp_path):
    save_checkpoint(tmp_path / CHECKPOINT, {"model/x": torch.zeros(1)}, {"network": {}})
    with pytest.raises(StudyError, match=r"holds another run .stage None there, 'train' now"):
        train(new_network(), images, recipe(), tmp_path, progress=False)


def test_a_second_process_in_the_folder_is_refused_and_the_first_named(images, new_network, recipe, tmp_path):
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys; from msunet_core.files import lock_folder\n"
            "with lock_folder(sys.argv[1]): print('held', flush=True); sys.stdin.read()",
            str(tmp_path),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(StudyError, match=f"in use by process {holder.pid} since"):
            train(new_network(), images, recipe(), tmp_path, progress=False)
        assert not (tmp_path / CHECKPOINT).exists()
    finally:
        holder.communicate()


# --- what the stage records -------------------------------------------------------------------------------


def test_cutmix_ends_at_the_epoch_that_the_recipe_names(images, new_network, recipe, tmp_path):
    """A step of CutMix with consistency is three passes, one without it is one."""
    network, passes, after_step = new_network(), [], {0: 0}

    def count(module, inputs):
        if module.training:
            passes.append(len(inputs[0]))

    network.register_forward_pre_hook(count)
    config = recipe(epochs=2, cutmix_probability=1.0, cutmix_until=1, consistency="as-described")
    train(network, images, config, tmp_path, progress=lambda done, *_: after_step.update({done: len(passes)}))
    assert list(after_step.values()) == [0, 3, 6, 9, 10, 11, 12]


def test_random_erasing_of_the_recipe_reaches_the_images(images, new_network, recipe, tmp_path):
    """Erased pixels are 0 after normalisation in all channels, which hardly any other pixel is."""
    erased = {}
    for share in (0.0, 1.0):
        config, network, seen = recipe(epochs=1, erase_probability=share), new_network(), []
        network.register_forward_pre_hook(lambda module, args, seen=seen: seen.append(args[0].detach()))
        train(network, images, config, tmp_path / str(share), progress=False)
        trained = torch.cat([batch for batch in seen if len(batch) == config.batch_size])
        erased[share] = ((trained == 0).all(1).flatten(1).sum(1) > 20).float().mean().item()
    assert erased[0.0] == 0 and erased[1.0] == 1


def test_level_o0_multiplies_no_tf32_and_sets_it_back(images, new_network, recipe, tmp_path):
    kinds, seen = (torch.backends.cuda.matmul, torch.backends.cudnn.conv), []
    before = [kind.fp32_precision for kind in kinds]
    try:
        for kind in kinds:
            kind.fp32_precision = "tf32"
        train(
            *(new_network(), images, recipe(epochs=1), tmp_path),
            progress=lambda *_: seen.extend(kind.fp32_precision for kind in kinds),
        )
        assert [kind.fp32_precision for kind in kinds] == ["tf32", "tf32"]
    finally:
        for kind, precision in zip(kinds, before, strict=True):
            kind.fp32_precision = precision
    assert set(seen) == {"ieee"}


def test_the_last_incomplete_batch_is_dropped(images, new_network, recipe, tmp_path):
    steps = []
    config = recipe(epochs=1, batch_size=10)  # 24 images
    train(
        new_network(), images, config, tmp_path, progress=lambda done, total, _: steps.append((done, total))
    )
    assert steps == [(1, 2), (2, 2)]


def test_progress_counts_shrunk_images_as_the_share_of_work_that_they_are(
    images, new_network, recipe, tmp_path
):
    """24 images of 16, then of 32 pixels, 12 steps each: 3 steps' worth of whole images, then 12."""
    seen = []
    train(
        *(new_network(), images, recipe(epochs=2, batch_size=2, image_sizes=(16,)), tmp_path),
        progress=lambda done, total, _: seen.append((done, total)),
    )
    assert seen == [(done, 15) for done in (0, 0, 1, 1, 1, 2, 2, 2, 2, 2, 3, 3, *range(4, 16))]


def test_the_history_and_the_events_tell_the_same_curve(images, new_network, recipe, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with pytest.raises(Killed):  # whose events of the second epoch must be purged
        train(new_network(), images, recipe(checkpoint_every=3), tmp_path, progress=stop_at(7, Killed))
    result = train(new_network(), images, recipe(checkpoint_every=3), tmp_path, progress=False)
    shown = EventAccumulator(str(tmp_path))
    shown.Reload()
    for name in ("train_loss", "test_top1", "lr", "alpha"):
        points = {event.step: event.value for event in shown.Scalars(name)}
        # TensorBoard keeps FP32.
        assert points == pytest.approx(dict(enumerate(result.history[name])), rel=1e-6), name
    stored = pd.read_csv(tmp_path / "history.csv")
    pd.testing.assert_frame_equal(stored, result.history, check_exact=True)


def test_a_stage_of_no_epochs_leaves_its_network(images, new_network, recipe, tmp_path):
    network = new_network()
    result = train(network, images, recipe(epochs=0), tmp_path, progress=False)
    loaded, _ = load_checkpoint(result.checkpoint)
    assert (result.metrics, len(result.history)) == ({}, 0)
    for name, tensor in new_network().state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name


def test_the_pruning_history_reaches_the_targets(images, new_network, recipe, tmp_path):
    config = recipe(pruner="V2", ramp_epochs=2, opt_level="O2", freeze_ternary=True)
    result = prune(new_network(), images, config, tmp_path, progress=False)
    assert list(result.history["target_se"]) == pytest.approx([0.0, 0.9 * 7 / 8, 0.9])
    # int(s * numel) of each small tensor rounds down, by less than one weight of 32 or more.
    assert result.history["sparsity_se"].iloc[-1] == pytest.approx(0.9, abs=1 / 32)
    weight = result.model.blocks[2][0].se.conv_reduce.weight
    assert (weight == 0).sum().item() == int(0.9 * weight.numel())
    assert weight.dtype == torch.float32


def test_squeeze_excitation_can_be_pruned_to_another_share(images, new_network, recipe, tmp_path):
    config = recipe(pruner="V2", ramp_epochs=0, se_sparsity=0.8)
    result = prune(new_network(), images, config, tmp_path, progress=False)
    weight = result.model.blocks[2][0].se.conv_reduce.weight
    assert (weight == 0).sum().item() == int(0.8 * weight.numel())
    assert set(result.history["target_se"]) == {0.8} and set(result.history["target_dw"]) == {0.5}


def test_pruning_with_no_pruner_is_refused(images, new_network, recipe, tmp_path):
    with pytest.raises(StudyError, match="choose V1, V2 or V3"):
        prune(new_network(), images, recipe(), tmp_path)


def test_data_that_do_not_fit_are_refused(images, new_network, recipe, tmp_path):
    with pytest.raises(StudyError, match="the data have 4 classes, the network 10"):
        train(new_network(num_classes=10), images, recipe(), tmp_path)
    with pytest.raises(StudyError, match="batch_size 25 is more than the 24 training images"):
        train(new_network(), images, recipe(batch_size=25), tmp_path)
    with pytest.raises(StudyError, match="device 'abacus' cannot be used"):
        train(new_network(), images, recipe(), tmp_path, device="abacus")


# --- faults -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", ["O0", "O2"])
def test_a_loss_that_is_not_finite_stops_naming_epoch_step_and_layer(
    images, new_network, recipe, tmp_path, level
):
    network = new_network()
    # `conv_stem` is the second layer's input: the first whose output cannot be finite is bn1.
    config = recipe(opt_level=level, cutmix_probability=0.0)

    def spoil(done, total, text):
        if done == 4:
            network.bn1.weight.data.fill_(float("inf"))

    with pytest.raises(StudyError) as caught:
        train(network, images, config, tmp_path, progress=spoil)
    message = str(caught.value)
    assert "loss nan at epoch 1, step 1, first bad layer bn1.weight (its weights are not finite)" in message
    assert "\n" not in message
    info = read_checkpoint(tmp_path / CHECKPOINT)[1]
    assert (info["epoch"], info["step"]) == (1, 0)
    assert message in (tmp_path / "log.txt").read_text()
    train(new_network(), images, config, tmp_path, progress=False)  # the last good state goes on
    train(new_network(), images, config, tmp_path / "whole", progress=False)
    assert_same(tmp_path, tmp_path / "whole")


def test_a_loss_that_explodes_names_a_layer_by_its_output(images, new_network, recipe, tmp_path):
    network = new_network()
    torch.nn.init.constant_(network.conv_stem.weight, 3e38)
    with pytest.raises(StudyError, match=r"epoch 0, step 0, first bad layer conv_stem \(its output is not"):
        train(network, images, recipe(), tmp_path, progress=False)
    assert not (tmp_path / CHECKPOINT).exists()


def test_weights_that_are_not_finite_are_never_saved(images, new_network, recipe, tmp_path):
    network = new_network()

    def spoil(done, total, text):
        if done == 6:  # after the last step of the second epoch: no loss shows it any more
            network.classifier.bias.data.fill_(float("nan"))

    with pytest.raises(StudyError, match=r"classifier.bias is not finite at epoch 2, step 0"):
        train(network, images, recipe(evaluate_every=3), tmp_path, progress=spoil)
    assert read_checkpoint(tmp_path / CHECKPOINT)[1]["epoch"] == 1


def test_a_loss_scale_that_falls_without_end_stops_the_stage(
    images, new_network, recipe, tmp_path, monkeypatch
):
    monkeypatch.setattr("msunet_core.training.stages.MIN_LOSS_SCALE", 2.0**17)  # above what it starts with
    with pytest.raises(
        StudyError, match=r"the loss scale fell to .* in epoch 0, .*lower lr 0.05, train at O0"
    ):
        train(new_network(), images, recipe(opt_level="O2"), tmp_path, progress=False)
    assert not (tmp_path / CHECKPOINT).exists()


# --- losses that are read late, as on a GPU ---------------------------------------------------------------


class HostReads(TorchDispatchMode):
    """Notes each operation that hands a value to Python: on a GPU the host would wait for it."""

    NAMES = (
        "aten::_local_scalar_dense",
        "aten::nonzero",
        "aten::masked_select",
        "aten::equal",
        "aten::is_nonzero",
    )

    def __init__(self):
        super().__init__()
        self.seen: list[str] = []
        self.paused = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        by_mask = func is torch.ops.aten.index.Tensor and any(
            i is not None and i.dtype == torch.bool for i in args[1]
        )
        if not self.paused and (by_mask or func.name() in self.NAMES):
            self.seen.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["train-O0", "prune-O2"])
@pytest.mark.parametrize("late", [False, True])
def test_within_an_epoch_no_value_is_read_where_losses_are_read_late(
    images, new_network, recipe, tmp_path, monkeypatch, kind, late
):
    run, changes = STAGES[kind]
    config = recipe(**changes, epochs=1, batch_size=4, cutmix_probability=0.5)  # 6 steps, some with CutMix
    reads, of_plan = HostReads(), EpochPlan.step

    def planned(plan, index):
        reads.paused = True  # what to run is read from a tensor that stays with the host
        try:
            return of_plan(plan, index)
        finally:
            reads.paused = False

    def watch(done, total, text):
        if done == 1:
            reads.__enter__()
        elif done == 5:
            reads.__exit__(None, None, None)

    monkeypatch.setattr(EpochPlan, "step", planned)
    if late:
        monkeypatch.setattr("msunet_core.training.stages.LIVE_LOSS", ())
    monkeypatch.setenv("MSUNET_FAST", "0")  # as on a device that the CPU's kernels do not serve
    run(new_network(), images, config, tmp_path, progress=watch)
    if late:
        assert not reads.seen, reads.seen
    else:
        assert len(reads.seen) >= 4, reads.seen


@pytest.mark.parametrize("step", [None, 5])
def test_losses_read_late_are_the_same_losses(images, new_network, recipe, tmp_path, monkeypatch, step):
    config = recipe(opt_level="O2")
    train(new_network(), images, config, tmp_path / "live", progress=False)
    monkeypatch.setattr("msunet_core.training.stages.LIVE_LOSS", ())
    if step:
        with pytest.raises(SystemExit):
            train(new_network(), images, config, tmp_path / "late", progress=stop_at(step, signal.SIGTERM))
        losses = read_checkpoint(tmp_path / "late" / CHECKPOINT)[1]["losses"]
        assert len(losses) == step - 3
        assert 0 not in losses
    train(new_network(), images, config, tmp_path / "late", progress=False)
    assert_same(tmp_path / "late", tmp_path / "live")


def test_a_loss_that_is_not_finite_is_named_at_the_end_of_its_epoch_where_losses_are_read_late(
    images, new_network, recipe, tmp_path, monkeypatch
):
    monkeypatch.setattr("msunet_core.training.stages.LIVE_LOSS", ())
    network, steps = new_network(), []

    def spoil(done, total, text):
        steps.append(done)
        if done == 4:
            network.bn1.weight.data.fill_(float("inf"))

    with pytest.raises(StudyError, match=r"loss nan at epoch 1, step 1, first bad layer bn1.weight"):
        train(network, images, recipe(cutmix_probability=0.0), tmp_path, progress=spoil)
    assert steps == [1, 2, 3, 4, 5]
    assert read_checkpoint(tmp_path / CHECKPOINT)[1]["epoch"] == 1


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["train-O0", "train-O2", "prune-O2"])
def test_within_an_epoch_the_host_does_not_wait_for_a_gpu(images, new_network, recipe, tmp_path, kind):
    run, changes = STAGES[kind]
    config = recipe(**changes, epochs=1, batch_size=2, cutmix_probability=1.0)

    def watch(done, total, text):  # of 12 steps, once kernels are compiled and steps are recorded
        torch.cuda.set_sync_debug_mode("error" if 6 <= done < 11 else "default")

    try:
        run(new_network(), images, config, tmp_path, device="cuda", progress=watch)
    finally:
        torch.cuda.set_sync_debug_mode("default")


# --- the fast way is the plain way ------------------------------------------------------------------------


def mean_losses(images, folder: Path, **changes) -> np.ndarray:
    """Training losses (seeds, epochs) of three seeds; weights and batches differ between them."""
    curves = []
    for seed in range(3):
        torch.manual_seed(seed)
        network = build_msunet(num_classes=images.num_classes, width=0.0625)
        settings = dict(epochs=5, batch_size=16, lr=0.05, warmup_epochs=1, alpha=0.67749, evaluate_every=5)
        config = StageConfig(**(settings | changes))
        result = train(network, images, config, folder / str(seed), seed=seed, progress=False)
        curves.append(result.history["train_loss"].to_numpy())
    return np.stack(curves)


@pytest.mark.slow
@pytest.mark.skipif(not library.enabled(), reason="no fast way here")
def test_the_fast_way_trains_along_the_same_curve_within_the_noise_of_three_seeds(tmp_path, monkeypatch):
    """Difference of the seeds' mean curves, over the epochs' mean, against their spread between seeds."""
    everything = load_data("synthetic", limit=16)
    few, few_test = everything.train_labels < 8, everything.test_labels < 8
    images = ImageData(
        everything.train_images[few],
        everything.train_labels[few],
        everything.test_images[few_test],
        everything.test_labels[few_test],
        class_names=everything.class_names[:8],
        source="few",
    )
    quick = mean_losses(images, tmp_path / "fast")
    monkeypatch.setenv("MSUNET_FAST", "0")
    plain = mean_losses(images, tmp_path / "plain")
    other = mean_losses(images, tmp_path / "other", lr=0.2)
    spread = plain.std(axis=0, ddof=1).mean()

    def ratio(curves: np.ndarray) -> float:
        return np.abs((curves - plain).mean(axis=0)).mean() / spread

    # Half a spread is what four times the learning rate goes beyond.
    assert ratio(quick) < 0.5 < ratio(other), (ratio(quick), ratio(other))


def can_mount() -> bool:
    if os.geteuid() != 0 or not shutil.which("mount"):
        return False
    probe = subprocess.run(["unshare", "-m", "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True)
    return probe.returncode == 0


@pytest.fixture
def small_disk(tmp_path):
    """A function that mounts a file system of so many KiB."""
    if not can_mount():
        pytest.skip("mounting a small file system needs root")
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(kilobytes: int) -> Path:
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", folder], check=True)
        return folder

    yield mount
    subprocess.run(["umount", folder], capture_output=True)


def test_a_full_disk_gives_one_line_and_the_last_good_state_goes_on(
    images, new_network, recipe, tmp_path, small_disk
):
    train(new_network(), images, recipe(), tmp_path / "whole", progress=False)
    size = (tmp_path / "whole" / CHECKPOINT).stat().st_size // 1024
    disk = small_disk(4 * size)
    filler = disk / "filler"

    def fill(done, total, text):
        if done == 4:  # one epoch is safe by now
            with pytest.raises(OSError, match="No space"), filler.open("wb", buffering=0) as file:
                while True:
                    file.write(bytes(4096))

    with pytest.raises(StudyError) as caught:
        train(new_network(), images, recipe(), disk / "run", progress=fill)
    assert str(caught.value).endswith(
        "no space left on device; free some space and run the same command again"
    )
    assert "\n" not in str(caught.value)
    filler.unlink()
    assert read_checkpoint(disk / "run" / CHECKPOINT)[1]["epoch"] == 1
    train(new_network(), images, recipe(), disk / "run", progress=False)
    assert_same(disk / "run", tmp_path / "whole")


def test_a_folder_that_cannot_be_written_gives_one_line(images, new_network, recipe, tmp_path, small_disk):
    disk = small_disk(64)
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    with pytest.raises(StudyError, match=r"cannot write .*read-only.*choose a folder on a writable"):
        train(new_network(), images, recipe(), disk / "run", progress=False)
    (tmp_path / "file").touch()
    with pytest.raises(StudyError, match=r"cannot write .*file.*choose another"):
        train(new_network(), images, recipe(), tmp_path / "file" / "run", progress=False)


@pytest.mark.parametrize("step", [1, 3, 6])
def test_a_run_folder_that_vanishes_gives_one_line(images, new_network, recipe, tmp_path, step):
    folder = tmp_path / "run"

    def vanish(done, total, text):
        if done == step:
            shutil.rmtree(folder)

    with pytest.raises(StudyError, match=r"cannot write .*run.*does not exist: create it or choose another"):
        train(new_network(), images, recipe(), folder, progress=vanish)
    assert not folder.exists()


def test_deterministic_mode_is_accepted_on_a_cpu(images, new_network, recipe, tmp_path):
    train(new_network(), images, recipe(epochs=1), tmp_path / "plain", progress=False)
    train(new_network(), images, recipe(epochs=1, deterministic=True), tmp_path / "exact", progress=False)
    plain, exact = contents(tmp_path / "plain"), contents(tmp_path / "exact")
    assert [name for name in plain if plain[name] != exact[name]] == ["identity"]


@pytest.mark.gpu
@pytest.mark.parametrize("level", ["O0", "O2"])
def test_deterministic_mode_resumes_bit_for_bit_on_a_gpu(images, new_network, recipe, tmp_path, level):
    config = recipe(deterministic=True, opt_level=level)
    train(new_network(), images, config, tmp_path / "whole", device="cuda", progress=False)
    with pytest.raises(Killed):
        train(new_network(), images, config, tmp_path / "stopped", device="cuda", progress=stop_at(5, Killed))
    train(new_network(), images, config, tmp_path / "stopped", device="cuda", progress=False)
    assert_same(tmp_path / "stopped", tmp_path / "whole")


def test_pruning_goes_on_with_the_momentum_of_training(images, new_network, recipe, tmp_path):
    trained = train(new_network(), images, recipe(), tmp_path / "train", progress=False)
    momentum = read_momentum(trained.checkpoint)
    assert any(tensor.abs().sum() > 0 for tensor in momentum.values())
    # At rate 0 no weight moves; the momentum decays and takes in gradients, from what it began with.
    config = recipe(pruner="V2", freeze_ternary=True, lr=0.0, warmup_epochs=0, epochs=1)
    found = {}
    for name, given in (("with", momentum), ("without", None)):
        start = copy.deepcopy(trained.model)
        result = prune(start, images, config, tmp_path / name, momentum=given, progress=False)
        found[name] = read_momentum(result.checkpoint)
    ternary = {f"{name}.weight" for name in ternary_layers(trained.model)}
    assert found["with"].keys() == momentum.keys() - ternary  # frozen ones have none
    for name, tensor in found["with"].items():
        # Three steps of momentum 0.9 on the same gradients: what it began with is left by 0.9^3.
        left = 0.9**3 * momentum[name]
        torch.testing.assert_close(tensor, found["without"][name] + left, rtol=1e-4, atol=1e-6)
    with pytest.raises(StudyError, match="it began with other momentum"):
        prune(copy.deepcopy(trained.model), images, config, tmp_path / "with", progress=False)


def test_each_epoch_leaves_a_row_for_each_ternary_layer(images, new_network, recipe, tmp_path):
    model = new_network()
    before = {name: layer.weight.std().item() for name, layer in ternary_layers(model).items()}
    result = train(model, images, recipe(), tmp_path, progress=False)
    table = pd.read_csv(tmp_path / "layers.csv")
    assert table["epochs"].tolist() == [epoch for epoch in range(4) for _ in before]
    first = table[table["epochs"] == 0].set_index("layer")["spread"]
    assert first.to_dict() == pytest.approx(before, rel=1e-6)
    last = table[table["epochs"] == 3].set_index("layer")
    for name, layer in ternary_layers(result.model).items():
        signs = layer.signs()
        assert last.loc[name, "zeros"] == (signs == 0).double().mean().item()
        assert last.loc[name, "empty_channels"] == (signs.abs().sum((1, 2, 3)) == 0).double().mean().item()


def test_seconds_of_an_epoch_are_those_of_its_sittings_without_the_pauses(tmp_path):
    assert epoch_seconds(tmp_path) == {}
    (tmp_path / "log.txt").write_text(
        "2026-11-24 10:00:00 train: start: {}\n"
        "2026-11-24 10:01:30 train: epoch 0: lr 0.1, test_top1 nan, 90.2 s\n"
        "2026-11-24 10:02:00 train: stopped by SIGTERM at epoch 1, step 3\n"
        "2026-11-25 09:00:00 train: resume at epoch 1, step 3\n"
        "2026-11-25 09:00:10 train: stopped by SIGINT at epoch 1, step 4\n"
        "2026-11-25 11:00:00 train: resume at epoch 1, step 4\n"
        "2026-11-25 11:00:00 train: other threads than before\n"
        "2026-11-25 11:01:00 train: epoch 1: lr 0.05, test_top1 50, 59.5 s\n"
        "2026-11-25 11:02:00 train: epoch 2: lr 0.01, test_top1 nan, 60.0 s\n"
    )
    assert epoch_seconds(tmp_path) == {0: 90.2, 1: 30 + 10 + 59.5, 2: 60.0}


def test_a_layer_ran_away_when_its_spread_grew_tenfold_from_its_least_and_the_log_says_so_once(tmp_path):
    spreads = {"calm": (1, 1.4, 0.7, 6.9), "shrank": (1, 0.5, 0.1, 0.05), "ran": (1, 0.2, 2.1, 900)}
    layers = [
        {"epochs": epochs, "layer": name, "spread": spread[epochs]}
        for epochs in range(4)
        for name, spread in spreads.items()
    ]
    assert ran_away(layers) == {"ran": 2}
    assert ran_away(layers[:6]) == {}
    records = Records(tmp_path, "train", True)
    for epochs in (1, 2, 3):
        records.write([], layers[: 3 * (epochs + 1)], None)
    (line,) = (tmp_path / "log.txt").read_text().splitlines()
    assert line.endswith(" train: ran ran away by epoch 1: its spread of W grew over 10-fold")
