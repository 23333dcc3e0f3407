"""The one exception of the study: what was wrong, the value seen, what to do, in one line."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class StudyError(ValueError):
    """Bad input or a fault of the outside world, told in one line that a person can act on."""


def closest(value: object, choices: Iterable[str]) -> str:
    """The remedy for an unknown name: the nearest known one, then all of them."""
    choices = list(choices)
    near = difflib.get_close_matches(str(value), choices, n=1)
    return (f"did you mean {near[0]!r}? " if near else "") + "choose one of " + ", ".join(choices)
