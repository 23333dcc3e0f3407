"""The two stages of the study: epochs of training with evaluation, checkpoints and a history.

Every random choice of an epoch is drawn from (seed, stage, epoch) alone, so a checkpoint needs no
random state: what was interrupted and started again ends bit for bit where it would have.
"""

from __future__ import annotations

import contextlib
import copy
import json
import math
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import pandas as pd
import torch
from torch import Tensor, nn

from ..data.augment import augment, draw_epoch_plan
from ..data.images import ImageData
from ..errors import StudyError, reason, shown
from ..files import lock_folder
from ..measure.evaluation import BATCH_SIZE, accuracy, class_scores
from ..model.checkpoint import save_checkpoint
from ..model.precision import without_tf32
from ..model.pruning import cubic_sparsity
from ..model.ternary import layer_statistics, set_alpha
from .distributed import Processes, joined
from .interrupt import StopSignals
from .learner import MIN_LOSS_SCALE, Learner, deterministic, first_bad_layer, first_bad_tensor
from .recipe import StageConfig
from .records import Progress, Records, shown_progress
from .resume import arithmetic_of, check_saved, identity_of, other_arithmetic, saved_state
from .schedules import alpha_of_epoch, learning_rate, work_before

CHECKPOINT = "checkpoint.safetensors"
# Devices whose losses are read at each step. On others the host would wait for the device: there the losses
# of an epoch are read at its end.
LIVE_LOSS = ("cpu",)
# Of the history, and for each group of pruned tensors.
COLUMNS = (
    *("epoch", "lr", "alpha", "train_loss", "zeros_ternary", "loss_scale"),
    *("test_top1", "test_top5", "test_loss"),
)
SPARSITIES = ("target", "sparsity")


@dataclass
class StageResult:
    """What a stage ends with.

    model : FP32 network in eval mode (of an O2 stage: its masters), masks applied
    history : DataFrame, a row an epoch
    metrics : ``top1``, ``top5`` (percent) and ``loss`` on the test images after the last epoch, at the
        stage's opt level
    checkpoint : path of the last checkpoint
    """

    model: nn.Module
    history: pd.DataFrame
    metrics: dict[str, float]
    checkpoint: Path


def train(
    model: nn.Module, data: ImageData, config: StageConfig, folder: str | Path, **options
) -> StageResult:
    """Ternary training (specification §6), in ``folder``; goes on where a checkpoint there stopped.

    Parameters
    ----------
    model : FP32 network; its weights change, and at O2 it ends as FP16: go on with the result's ``model``
    data : images and labels; the test half is only looked at, it chooses nothing
    config : the recipe
    folder : gets ``checkpoint.safetensors``, ``history.csv``, ``layers.csv`` (the ternary layers after each
        epoch), ``metrics.json``, ``log.txt`` and events for TensorBoard
    seed : int, of every random choice (default 0)
    device : "auto", "cpu", "cuda", ...
    progress : True for a bar, False for silence, or a callable(steps done, steps in all, text); steps are
        those of whole images, so a step of shrunk ones is less than one
    momentum : of SGD, by parameter name, to begin with instead of 0: that of the stage before, as
        :func:`msunet_core.model.checkpoint.read_momentum` gives it (specification §6)
    aside : where the folder holds another run, rename it to ``<folder>.1``, ``.2``, ... and begin anew, with
        a line that says so, instead of refusing (default False)

    Started by ``torchrun``, its processes share each batch (:mod:`msunet_core.training.distributed`); the
    first one alone writes and shows progress, and all return the same network, history and metrics.

    Raises
    ------
    StudyError : the folder holds another run; a loss that is not finite; a disk that is full
    KeyboardInterrupt, SystemExit : on Ctrl-C or SIGTERM or SIGHUP, after the current step was checkpointed
    """
    return _run_stage("train", model, data, config, Path(folder), **options)


def prune(
    model: nn.Module, data: ImageData, config: StageConfig, folder: str | Path, **options
) -> StageResult:
    """Pruning (specification §7): as :func:`train`, from a trained network, with ``config.pruner`` set."""
    if config.pruner == "none":
        raise StudyError("pruner 'none' prunes nothing; choose V1, V2 or V3, or call train")
    return _run_stage("prune", model, data, config, Path(folder), **options)


def resolve_device(device: str = "auto") -> torch.device:
    """The device of a name; "auto" is CUDA where there is one, else the CPU."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.ones(1, device=device).item()  # "meta" is a device too, but nothing can be read from it
        return torch.device(device)
    except Exception as error:  # each kind of device has its own
        raise StudyError(
            f"device {shown(device)} cannot be used ({reason(error)}); give auto, cpu or cuda"
        ) from error


def _run_stage(
    stage: str,
    model: nn.Module,
    data: ImageData,
    config: StageConfig,
    folder: Path,
    *,
    seed: int = 0,
    device: str = "auto",
    progress: bool | Progress = True,
    momentum: dict[str, Tensor] | None = None,
    aside: bool = False,
) -> StageResult:
    with joined(device) as processes:
        device = resolve_device(processes.device_name(device))
        with contextlib.ExitStack() as held:
            if processes.writes:
                held.enter_context(lock_folder(folder))
            if config.deterministic:
                held.enter_context(deterministic(device))
            if config.opt_level == "O0":
                held.enter_context(without_tf32())
            run = _Stage(stage, model, data, config, folder, seed, device, momentum, processes)
            run.resume(aside)
            run.run(held.enter_context(shown_progress(progress if processes.writes else False)))
            return run.result()


class _Stage:
    """The loop over epochs, and everything it must not lose."""

    def __init__(self, stage, model, data, config, folder, seed, device, momentum, processes):
        if data.num_classes != model.config["num_classes"]:
            raise StudyError(
                f"the data have {data.num_classes} classes, the network {model.config['num_classes']}; "
                "build it with num_classes of the data"
            )
        self.stage, self.config, self.folder, self.seed, self.device = stage, config, folder, seed, device
        self.processes: Processes = processes
        self.path = folder / CHECKPOINT
        self.records = Records(folder, stage, processes.writes)
        self.arithmetic = arithmetic_of(device)
        self.identity = identity_of(stage, seed, config, data, model, momentum, processes)
        self.shell = copy.deepcopy(model).cpu()  # FP32, for the result
        there = data.to(device)
        self.images, self.labels = there.train_images, there.train_labels
        self.test_images, self.test_labels = there.test_images, there.test_labels
        self.steps = len(self.images) // config.batch_size
        if self.steps == 0:
            raise StudyError(
                f"batch_size {config.batch_size} is more than the {len(self.images)} training images; "
                "make it smaller"
            )
        self.learner = Learner(model.to(device), config, processes)
        self.learner.take_momentum(momentum or {})
        self.history: list[dict] = []
        self.layers = self._layer_rows(0)
        self.epoch = 0
        self.step = 0
        self.losses = torch.zeros(self.steps, dtype=torch.float64)
        # Losses that the host has not read yet: those from step `read` on.
        self.unread = torch.zeros(self.steps, device=device)
        self.read = 0
        self.live_loss = device.type in LIVE_LOSS
        self.resumed = False

    # -- what is kept ------------------------------------------------------------------------

    def resume(self, aside: bool) -> None:
        epochs = self.config.epochs
        found = saved_state(self.path, self.identity, epochs, self.processes, self.records, aside)
        if found is None:
            self.records.log(f"start: {json.dumps(self.identity)}")
            return
        tensors, info = found
        own = self.learner.state()
        check_saved(self.folder, tensors, info, own, self.steps, self._columns(), self.layers)
        self.learner.load(tensors, info["learner"])
        self.epoch, self.step, self.history = info["epoch"], info["step"], info["history"]
        self.layers = info["layers"]
        self.read = self.step
        self.losses[: self.step] = torch.tensor(info["losses"], dtype=torch.float64)
        self.resumed = self.step > 0
        set_alpha(self.learner.model, info["network"]["alpha"])
        if self.epoch < self.config.epochs:
            with_others = f" with {self.processes.world} processes" if self.processes.world > 1 else ""
            self.records.log(f"resume at epoch {self.epoch}, step {self.step}{with_others}")
            if line := other_arithmetic(info.get("arithmetic"), self.arithmetic):
                self.records.say(line)

    def save(self) -> None:
        self._read_losses()
        tensors, numbers = self.learner.state()
        if bad := first_bad_tensor(tensors):
            self._stop(f"{bad} is not finite at epoch {self.epoch}, step {self.step}")
        info = {
            "identity": self.identity,
            "arithmetic": self.arithmetic,
            "network": self.learner.model.config,
            "stage": self.stage,
            "opt_level": self.config.opt_level,
            "epoch": self.epoch,
            "step": self.step,
            "losses": self.losses[: self.step].tolist(),
            "history": self.history,
            "layers": self.layers,
            "learner": numbers,
        }
        if self.processes.writes:
            save_checkpoint(self.path, tensors, info)
        self._write()
        self.processes.greatest(0)  # nobody goes on, or leaves, before what they have is safe

    # -- the loop ----------------------------------------------------------------------------

    def run(self, show: Progress) -> None:
        if self.epoch >= self.config.epochs and self.processes.tell(self.path.exists()):
            return
        with StopSignals() as stop, self.records.events(self.epoch) as events:
            while self.epoch < self.config.epochs:
                started = time.perf_counter()
                self._run_epoch(show, stop)
                row = self._finish_epoch(stop)
                seconds = time.perf_counter() - started
                self.records.log(f"epoch {row['epoch']}: {_summary(row)}, {seconds:.1f} s")
                if events is not None:
                    events.add(row["epoch"], {**row, "seconds": seconds})
                if self.epoch % self.config.checkpoint_every == 0 or self.epoch == self.config.epochs:
                    self.save()
                self._leave_if_asked(stop)
        if not self.processes.tell(self.path.exists()):  # of 0 epochs, it still leaves its network on disk
            self.save()

    def _run_epoch(self, show: Progress, stop: StopSignals) -> None:
        config, learner = self.config, self.learner
        cutmix_on = config.cutmix_until is None or self.epoch < config.cutmix_until
        self.plan = draw_epoch_plan(
            len(self.images),
            config.batch_size,
            seed=self.seed,
            stage=self.stage,
            epoch=self.epoch,
            cutmix_probability=config.cutmix_probability if cutmix_on else 0.0,
            erase_probability=config.erase_probability,
            augment=config.augment,
        ).to(self.device)
        learner.begin_epoch(self.epoch, resumed=self.resumed)
        self.resumed = False
        text = f"{self.stage} epoch {self.epoch + 1}/{config.epochs}"
        begun, ended, total = (
            work_before(config, epochs) for epochs in (self.epoch, self.epoch + 1, config.epochs)
        )
        while self.step < self.steps:
            step_plan = self.plan.step(self.step)
            if config.schedule == "one-cycle":
                learner.set_rate(learning_rate(config, self.epoch, self.step / self.steps))
            self.unread[self.step] = learner.step(self.images, self.labels, step_plan)
            self.step += 1
            if self.live_loss or self.step == self.steps:
                self._read_losses()
            loss = f", loss {self.losses[self.read - 1]:.3f}" if self.read == self.step else ""
            done = begun + (ended - begun) * self.step / self.steps
            show(round(done * self.steps), round(total * self.steps), text + loss)
            self._leave_if_asked(stop)

    def _read_losses(self) -> None:
        """Wait for the device and bring the losses of this epoch up to date; one must not be NaN or Inf."""
        if self.read < self.step:
            self.losses[self.read : self.step] = self.unread[self.read : self.step].cpu()
            for index in range(self.read, self.step):
                if not math.isfinite(self.losses[index]):
                    self._refuse_loss(index)
            self.read = self.step

    def _finish_epoch(self, stop: StopSignals) -> dict:
        config, learner = self.config, self.learner
        scale = learner.loss_scale()
        if scale < MIN_LOSS_SCALE:
            self._stop(f"the loss scale fell to {scale:g} in epoch {self.epoch}, every step overflows")
        row = {
            "epoch": self.epoch,
            "lr": learning_rate(config, self.epoch),
            "alpha": alpha_of_epoch(config, self.epoch),
            **({"image_size": learner.image_size} if config.image_sizes else {}),
            "train_loss": self.losses.mean().item(),
            "zeros_ternary": learner.zeros(),
            "loss_scale": scale,
        }
        reached = learner.pruner.group_sparsity()
        for group, sparsity in reached.items():
            row[f"target_{group}"] = cubic_sparsity(
                self.epoch, learner.pruner.targets[group], config.ramp_epochs
            )
            row[f"sparsity_{group}"] = sparsity
        last = self.epoch + 1 == config.epochs
        tested = last or (self.epoch + 1) % config.evaluate_every == 0
        measured = self._evaluate(stop) if tested else dict.fromkeys(("top1", "top5", "loss"), math.nan)
        row.update({f"test_{name}": value for name, value in measured.items()})
        self.history.append(row)
        self.layers += self._layer_rows(self.epoch + 1)
        self.epoch, self.step, self.read = self.epoch + 1, 0, 0
        return row

    def _columns(self) -> set[str]:
        """Names of the history's columns."""
        groups = [f"{kind}_{group}" for group in self.learner.pruner.targets for kind in SPARSITIES]
        sizes = ["image_size"] if self.config.image_sizes else []
        return {*COLUMNS, *groups, *sizes}

    def _layer_rows(self, epochs: int) -> list[dict]:
        """How the ternary layers are after so many epochs."""
        return [
            {"epochs": epochs, **row} for row in layer_statistics(self.learner.model, self.learner.weights)
        ]

    def _evaluate(self, stop: StopSignals) -> dict[str, float]:
        count = len(self.test_images)
        batches = [slice(first, first + BATCH_SIZE) for first in range(0, count, BATCH_SIZE)]
        classes = self.identity["network"]["num_classes"]
        scores = torch.zeros(count, classes, device=self.device)
        for first in range(0, len(batches), self.processes.world):
            self._leave_if_asked(stop)
            own = first + self.processes.rank
            if own < len(batches):
                scores[batches[own]] = class_scores(self.learner.model, self.test_images[batches[own]])
        # Zero plus the scores that one process computed is exactly those.
        scores = self.processes.total(scores)
        if not scores.isfinite().all():
            self._stop(f"class scores are not finite after epoch {self.epoch}")
        return accuracy(scores, self.test_labels)

    def _refuse_loss(self, step: int) -> None:
        plan = self.plan.step(step)
        # The step changed no weight; where losses are read late, the steps after it did. CutMix is left out.
        inputs = self.learner.resized(augment(self.images[plan.order], plan))
        layer = first_bad_layer(self.learner.model, inputs)
        self._stop(f"loss {self.losses[step]} at epoch {self.epoch}, step {step}, first bad layer {layer}")

    def _stop(self, fault: str) -> NoReturn:
        message = (
            f"{self.stage} stopped: {fault}; lower lr {self.config.lr}, train at O0 or check the data "
            "(the last good checkpoint is kept)"
        )
        self.records.log(message)
        raise StudyError(message)

    def _leave_if_asked(self, stop: StopSignals) -> None:
        received = self.processes.greatest(stop.received)
        if not received:
            return
        self.save()
        self.records.log(
            f"stopped by {signal.Signals(received).name} at epoch {self.epoch}, step {self.step}"
        )
        if received != signal.SIGINT:
            raise SystemExit(128 + received)
        raise KeyboardInterrupt(f"{self.stage} checkpointed at epoch {self.epoch}, step {self.step}")

    # -- what it ends with -------------------------------------------------------------------

    def _write(self) -> None:
        ended = self.epoch >= self.config.epochs
        self.records.write(self.history, self.layers, self._metrics() if ended else None)

    def _metrics(self) -> dict[str, float]:
        if not self.history:
            return {}
        return {name: self.history[-1][f"test_{name}"] for name in ("top1", "top5", "loss")}

    def result(self) -> StageResult:
        self._write()
        state = {name: tensor.cpu() for name, tensor in self.learner.masters.state_dict().items()}
        self.shell.load_state_dict(state)
        set_alpha(self.shell, self.learner.model.config["alpha"])
        return StageResult(self.shell.eval(), pd.DataFrame(self.history), self._metrics(), self.path)


def _summary(row: dict) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in row.items() if name != "epoch")
