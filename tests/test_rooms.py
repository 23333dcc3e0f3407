"""The house has an order: a folder imports only from folders before it."""

from __future__ import annotations

import ast
from pathlib import Path

import msunet_core

PACKAGE = Path(msunet_core.__file__).parent
# As the data flow. What is no folder (errors, files, memory, compiler) is for all of them.
ORDER = ["data", "model", "fast", "measure", "training", "study"]
FOR_ALL = ["errors", "files", "memory", "compiler"]
SEE_EVERYTHING = {"__init__", "__main__"}


def imported(path: Path) -> set[str]:
    """Rooms, with their folder, that a module imports, anywhere in it: "errors", "model.network"."""
    here = path.relative_to(PACKAGE).parent.parts
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            above = here[: len(here) - node.level + 1]
            names = [node.module] if node.module else [alias.name for alias in node.names]
            found |= {".".join((*above, name)) for name in names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == PACKAGE.name:
            inside = node.module.split(".")[1:]
            found |= {".".join(inside)} if inside else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
            found |= {".".join(name[1:]) for name in names if name[0] == PACKAGE.name and len(name) > 1}
    return found


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def test_every_module_lies_in_a_folder_of_the_order():
    places = {path.relative_to(PACKAGE).parts for path in modules()}
    assert {place[0] for place in places if len(place) == 2} == set(ORDER)
    assert {place[0].removesuffix(".py") for place in places if len(place) == 1} == {
        *FOR_ALL,
        *SEE_EVERYTHING,
    }
    assert max(map(len, places)) == 2


def test_a_folder_imports_only_from_folders_before_it():
    later, seen = [], set()
    for path in modules():
        folder, *inside = path.relative_to(PACKAGE).parts
        if not inside:
            continue
        for room in imported(path):
            other = room.split(".")[0]
            seen.add((folder, other))
            if other not in [*FOR_ALL, *ORDER[: ORDER.index(folder) + 1]]:
                later.append(f"{path.relative_to(PACKAGE)} imports {room}")
    print("; ".join(f"{folder} <- {other}" for folder, other in sorted(seen) if folder != other))
    assert later == []
    assert ("training", "model") in seen  # or nothing was read


def test_rooms_of_a_folder_do_not_import_each_other_in_a_circle():
    needs = {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts): imported(path)
        for path in modules()
        if path.stem not in SEE_EVERYTHING
    }
    while needs:
        free = [room for room, others in needs.items() if not others & needs.keys()]
        assert free, f"a circle among {sorted(needs)}"
        for room in free:
            del needs[room]


def test_the_network_knows_nothing_of_what_makes_it_faster():
    assert [
        path.name for path in (PACKAGE / "model").glob("*.py") if any("fast" in r for r in imported(path))
    ] == []
