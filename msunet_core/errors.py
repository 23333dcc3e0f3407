"""The one exception of the study: what was wrong, the value seen, what to do, in one line."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterable

LONGEST = 300  # characters of a message; what is longer loses its middle


class StudyError(ValueError):
    """Bad input or a fault of the outside world, told in one line that a person can act on."""

    def __init__(self, message: object):
        super().__init__(one_line(message))


def one_line(message: object) -> str:
    """A message as one line of at most 300 characters that a terminal only shows.

    Messages repeat names and values that strangers chose: line ends, control and escape characters and lone
    surrogates are written as Python escapes. The end is kept, since the remedy stands there.
    """
    text = str(message)
    half = LONGEST * 2 // 3
    if len(text) > 4 * LONGEST:  # not walked through, however long
        text = text[: 2 * LONGEST] + text[-2 * LONGEST :]
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return line if len(line) <= LONGEST else f"{line[:half]} ... {line[half + 5 - LONGEST :]}"


def reason(error: BaseException) -> str:
    """Why something failed, to be put into a message: the first line of an exception, or its kind."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def failure(error: BaseException) -> str:
    """What failed, where any exception may come: the line of a StudyError, else kind and first line."""
    kind, why = type(error).__name__, reason(error)
    return why if isinstance(error, StudyError) or why == kind else f"{kind}: {why}"


def shown(value: object) -> str:
    """``repr`` of a value that somebody gave, short however large or deep it is."""
    if isinstance(value, int) and abs(value) >= 10**40:
        return f"a whole number of {value.bit_length()} bits"
    return reprlib.repr(value)


def closest(value: object, choices: Iterable[str]) -> str:
    """The remedy for an unknown name: the nearest known one, then all of them."""
    choices = list(choices)
    near = difflib.get_close_matches(str(value)[:LONGEST], choices, n=1)
    return (f"did you mean {near[0]!r}? " if near else "") + "choose one of " + ", ".join(choices)
