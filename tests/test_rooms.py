"""The house has an order: a module imports only from rooms before it."""

from __future__ import annotations

import ast
from pathlib import Path

import msunet_core

PACKAGE = Path(msunet_core.__file__).parent
# data -> cutmix -> network (ternary) -> training (pruning, precision) -> evaluation -> scoring -> report
ORDER = [
    "errors",
    "memory",
    "files",
    "events",
    "synthetic",
    "data",
    "distributed",
    "augment",
    "cutmix",
    "ternary",
    "triton_kernels",
    "gpu",
    "fast",
    "graphs",
    "network",
    "precision",
    "pruning",
    "config",
    "checkpoint",
    "training",
    "evaluation",
    "wide_resnet",
    "scoring",
    "packed",
    "export",
    "stages",
    "study",
    "ablations",
    "figures",
    "report",
    "runner",
]
SEE_EVERYTHING = {"__init__", "__main__"}


def imported(path: Path) -> set[str]:
    """Rooms that a module imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            found |= {node.module.split(".")[0]} if node.module else {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == PACKAGE.name:
            found |= {*node.module.split(".")[1:2]} or {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
            found |= {name[1] for name in names if name[0] == PACKAGE.name and len(name) > 1}
    return found


def test_every_module_has_its_place_in_the_order():
    modules = {path.stem for path in PACKAGE.glob("*.py")} - SEE_EVERYTHING
    assert modules - set(ORDER) == set()


def test_a_module_imports_only_from_rooms_before_it():
    later = [
        f"{name} imports {other}"
        for position, name in enumerate(ORDER)
        if (PACKAGE / f"{name}.py").exists()
        for other in imported(PACKAGE / f"{name}.py")
        if other not in ORDER[:position]
    ]
    assert later == []


def test_there_is_no_room_for_odds_and_ends():
    assert [path.stem for path in PACKAGE.glob("*.py") if "util" in path.stem or "helper" in path.stem] == []
