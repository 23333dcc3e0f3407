"""What a stage leaves for people to read, and what it shows while it runs."""

from __future__ import annotations

import contextlib
import csv
import datetime
import io
import json
import math
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from tqdm import tqdm

from ..errors import one_line
from ..files import append_line, atomic_write, read_text
from .events import Events

Progress = Callable[[int, int, str], None]  # steps done, steps in all, text
# A ternary layer whose spread of W grows so many times over has run away; others change by a few times.
RAN_AWAY = 10.0


class Records:
    """``log.txt``, ``history.csv``, ``layers.csv``, ``metrics.json`` and TensorBoard's scalars of a stage.

    Parameters
    ----------
    folder : of the stage
    stage : its name, on each line of the log
    writes : False: nothing is written, as by all processes but the first
    """

    def __init__(self, folder: Path, stage: str, writes: bool):
        self.folder, self.stage, self.writes = folder, stage, writes
        self.told: set[str] = set()  # layers of which the log says that they ran away

    def log(self, line: str) -> None:
        """Append a line with the time to ``log.txt``."""
        if not self.writes:
            return
        now = datetime.datetime.now().isoformat(" ", "seconds")
        append_line(self.folder / "log.txt", f"{now} {self.stage}: {line}")

    def say(self, line: str) -> None:
        """Log a line, and show it to whoever is there."""
        if self.writes:
            self.log(line)
            print(f"{self.stage}: {one_line(line)}", file=sys.stderr)

    def write(self, history: list[dict], layers: list[dict], metrics: dict[str, float] | None) -> None:
        """Write the tables, each whole or not at all; ``metrics`` only once a stage has ended.

        A layer that ran away gets a line in the log, once a sitting.
        """
        if not self.writes:
            return
        for name, epochs in ran_away(layers).items():
            if name not in self.told:
                self.log(
                    f"{name} ran away by epoch {epochs - 1}: its spread of W grew over {RAN_AWAY:g}-fold"
                )
                self.told.add(name)
        atomic_write(self.folder / "history.csv", _table(history))
        atomic_write(self.folder / "layers.csv", _table(layers))
        if metrics is not None:
            atomic_write(self.folder / "metrics.json", json.dumps(metrics, indent=1) + "\n")
        else:  # of fewer epochs, which were the end then
            (self.folder / "metrics.json").unlink(missing_ok=True)

    def events(self, first_epoch: int) -> contextlib.AbstractContextManager[Events | None]:
        """TensorBoard's scalars from that epoch on."""
        return Events(self.folder, first_epoch) if self.writes else contextlib.nullcontext()


def ran_away(layers: Iterable[Mapping]) -> dict[str, int]:
    """Ternary layers whose W ran away, each with the epochs after which it had.

    layers : rows of ``layers.csv`` in its order. Run away is a spread of W that is more than ``RAN_AWAY``
        times the least that it was before (docs/stability.md)
    """
    least, found = {}, {}
    for row in layers:
        name, spread = row["layer"], row["spread"]
        if spread > RAN_AWAY * least.get(name, math.inf):
            found.setdefault(name, row["epochs"])
        least[name] = min(spread, least.get(name, math.inf))
    return found


def epoch_seconds(folder: Path) -> dict[int, float]:
    """Wall seconds by epoch, as ``log.txt`` of a stage has them; pauses between its sittings do not count."""
    path = folder / "log.txt"
    log = read_text(path) if path.is_file() else ""
    found, before, since = {}, 0.0, None
    for time, text in re.findall(r"^(\S+ \S+) \w+: (.*)$", log, re.MULTILINE):
        now = datetime.datetime.fromisoformat(time)
        if ended := re.match(r"epoch (\d+): .*, ([\d.]+) s$", text):
            found[int(ended[1])] = before + float(ended[2])  # an epoch's own seconds are those since a resume
            before = 0.0
        elif text.startswith("stopped by") and since:
            before += (now - since).total_seconds()
        since = now
    return found


def _table(rows: list[dict]) -> str:
    text = io.StringIO()
    if rows:
        writer = csv.DictWriter(text, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return text.getvalue()


@contextlib.contextmanager
def shown_progress(progress: bool | Progress, smoothing: float = 0.3) -> Iterator[Progress]:
    """A callable itself, a bar in the terminal (True), or silence (False).

    smoothing : as of tqdm: the ETA is of the last steps (1), of all since the start (0), or between
    """
    if callable(progress):
        yield progress
        return
    bar = tqdm(
        disable=not progress,
        unit="step",
        mininterval=0.5,
        miniters=1,  # or a jump, as of a run that was there already, silences what follows
        smoothing=smoothing,
        dynamic_ncols=True,
    )
    with bar:

        def show(done: int, total: int, text: str) -> None:
            if bar.total != total:
                bar.total, bar.initial, bar.n = total, done, done
            bar.set_description(text, refresh=False)
            bar.update(done - bar.n)

        yield show
