"""Ctrl-C, SIGTERM and a closed terminal as something to ask for between two steps."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Iterator


def stopping() -> list[signal.Signals]:
    """What asks a process to stop: SIGINT, SIGTERM, and SIGHUP (a terminal closed) unless under nohup."""
    ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return [signal.SIGINT, signal.SIGTERM, *([] if ignored else [signal.SIGHUP])]


class StopSignals:
    """Turns what asks to stop into a flag that the loop reads between two steps."""

    def __init__(self):
        self.received = 0
        self.before: dict[int, object] = {}

    def __enter__(self) -> StopSignals:
        for number in stopping():
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
    """Inside this context SIGTERM and SIGHUP raise SystemExit, so that all is closed as after Ctrl-C."""

    def leave(number: int, frame) -> None:
        if number == signal.SIGHUP:  # a closed terminal may send it twice, the second time amid the clean-up
            signal.signal(signal.SIGHUP, signal.SIG_IGN)
        sys.exit(128 + number)

    before = {}
    for number in stopping()[1:]:
        with contextlib.suppress(ValueError):  # not the main thread: signals go to whoever is
            before[number] = signal.signal(number, leave)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
