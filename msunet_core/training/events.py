"""Scalars of a stage for TensorBoard."""

from __future__ import annotations

import math
import os
import socket
import time
from pathlib import Path

from ..files import write_fault


class Events:
    """Scalars for TensorBoard, written before the next step begins.

    SummaryWriter has a thread write them: on a full disk that thread dies, and closing waits for it.
    """

    def __init__(self, folder: Path, first_epoch: int):
        from tensorboard.compat.proto import event_pb2, summary_pb2  # only a stage that trains needs them
        from tensorboard.summary.writer.record_writer import RecordWriter

        self.event, self.summary = event_pb2.Event, summary_pb2.Summary
        # TensorBoard takes the order of the files' names for the order of what is in them.
        self.path = folder / f"events.out.tfevents.{time.time_ns()}.{socket.gethostname()}.{os.getpid()}"
        try:
            self.file = self.path.open("wb", buffering=0)
        except OSError as error:
            raise write_fault(self.path, error) from error
        self.records = RecordWriter(self.file)
        self._write(file_version="brain.Event:2")
        # Whatever an interrupted process wrote of this epoch or later is not to be shown.
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._write(step=first_epoch, session_log=start)

    def add(self, epoch: int, scalars: dict[str, float]) -> None:
        values = [
            self.summary.Value(tag=name, simple_value=value)
            for name, value in scalars.items()
            if name != "epoch" and math.isfinite(value)
        ]
        self._write(step=epoch, summary=self.summary(value=values))

    def _write(self, **fields) -> None:
        try:
            self.records.write(self.event(wall_time=time.time(), **fields).SerializeToString())
        except OSError as error:
            raise write_fault(self.path, error) from error

    def __enter__(self) -> Events:
        return self

    def __exit__(self, *exception) -> None:
        self.file.close()
