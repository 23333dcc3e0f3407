"""Ctrl-C and SIGTERM as something to ask for between two steps."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Iterator


class StopSignals:
    """Turns SIGTERM and Ctrl-C into a flag that the loop reads between two steps."""

    def __init__(self):
        self.received = 0
        self.before: dict[int, object] = {}

    def __enter__(self) -> StopSignals:
        for number in (signal.SIGTERM, signal.SIGINT):
            with contextlib.suppress(ValueError):  # not the main thread: signals go to whoever is
                self.before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame) -> None:
        self.received = number


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """Inside this context SIGTERM raises SystemExit, so that whatever is open is closed, as after Ctrl-C."""

    def leave(number: int, frame) -> None:
        sys.exit(128 + number)

    try:
        before = signal.signal(signal.SIGTERM, leave)
    except ValueError:  # not the main thread: signals go to whoever is
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
