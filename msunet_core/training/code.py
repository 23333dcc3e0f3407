"""What the code says, apart from how it is written: a digest that a comment does not change.

A stage is bound to the code that its numbers come from (:func:`code_of_training`), and a page to the code
that it runs. Neither is bound to the times of files, to comments, to docstrings or to layout.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import re
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]
FOLDERS = ("data", "model", "fast", "training")
# The loop of a stage: what it imports from these folders, directly or not, makes the numbers ...
LOOP = "training/stages.py"
# ... but for what only reads images (the fingerprint of the data stands for them), writes, or shows.
NO_NUMBERS = {
    "data/sources.py",
    "data/synthetic.py",
    "model/checkpoint.py",
    "training/code.py",
    "training/events.py",
    "training/interrupt.py",
    "training/records.py",
    "training/resume.py",
}
# What no import leads to: the kernels, and how they are compiled.
KERNELS = {"compiler.py", "fast/kernels.cpp", "fast/vectors.h"}
# Fields of syntax trees that say nothing or that only some versions of Python have.
SILENT = {"ctx", "kind", "type_comment", "type_params", "type_ignores"}


@functools.cache
def code_of_training() -> dict[str, str]:
    """Digest by name of each file whose code the numbers of a stage come from."""
    found, waiting = set(KERNELS), [LOOP]
    while waiting:
        name = waiting.pop()
        if name not in found | NO_NUMBERS and (PACKAGE / name).is_file():
            found.add(name)
            waiting += _imported(name)
    return {name: code_digest(PACKAGE / name) for name in sorted(found)}


def code_digest(path: Path) -> str:
    """Digest of a .py or C++ file that comments, docstrings, layout and the words of errors do not change."""
    text = path.read_text()
    told = repr(_said(ast.parse(text))) if path.suffix == ".py" else _without_comments(text)
    return hashlib.blake2b(told.encode(), digest_size=6).hexdigest()


def _imported(name: str) -> list[str]:
    """Files of ``FOLDERS`` that a file imports, anywhere in it."""
    here = Path(name).parent.parts
    found = []
    for node in ast.walk(ast.parse((PACKAGE / name).read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            room = (*here[: len(here) - node.level + 1], *(node.module or "").split("."))
            rooms = [room, *((*room, alias.name) for alias in node.names)]
            found += ["/".join(filter(None, parts)) + ".py" for parts in rooms if parts[0] in FOLDERS]
    return found


def _said(node: object) -> object:
    """A syntax tree as nested tuples, the same for every version of Python; errors raised are left out."""
    if isinstance(node, list):
        return [_said(each) for each in node if not _is_text(each)]
    if not isinstance(node, ast.AST):
        return repr(node)
    if isinstance(node, ast.Raise):
        return ("Raise",)
    fields = [(name, value) for name, value in ast.iter_fields(node) if name not in SILENT]
    return (type(node).__name__, [(name, _said(value)) for name, value in fields if value not in (None, [])])


def _is_text(statement: object) -> bool:
    """Whether a statement is a string alone: a docstring."""
    return (
        isinstance(statement, ast.Expr)
        and isinstance(statement.value, ast.Constant)
        and isinstance(statement.value.value, str)
    )


def _without_comments(text: str) -> str:
    token = r'"(?:\\.|[^"\\\n])*"|//[^\n]*|/\*.*?\*/'
    kept = re.sub(token, lambda m: m[0] if m[0][0] == '"' else " ", text, flags=re.DOTALL)
    return " ".join(kept.split())
