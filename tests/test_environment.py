"""requirements.txt, pyproject.toml and environment.yml name the same packages at the same versions."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions, version
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
REQUIREMENTS = [
    line for line in (ROOT / "requirements.txt").read_text().splitlines() if line and not line.startswith("#")
]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CONDA = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]


def test_every_requirement_is_an_exact_pin():
    assert all(re.fullmatch(r"[a-z0-9-]+==[0-9][0-9.]*", line) for line in REQUIREMENTS), REQUIREMENTS


def test_pyproject_and_conda_agree_with_the_requirements():
    assert sorted(PROJECT["dependencies"] + PROJECT["optional-dependencies"]["test"]) == sorted(REQUIREMENTS)
    (by_pip,) = [entry["pip"] for entry in CONDA if isinstance(entry, dict)]
    assert sorted(by_pip) == sorted(REQUIREMENTS)


def test_conda_makes_a_python_that_the_project_supports():
    (python,) = [entry for entry in CONDA if str(entry).startswith("python=")]
    assert python in {f"python=3.{minor}" for minor in range(11, 15)}
    assert PROJECT["requires-python"] == ">=3.11,<3.15"
    assert (3, 11) <= sys.version_info[:2] <= (3, 14)


@pytest.mark.parametrize("line", REQUIREMENTS)
def test_the_pinned_version_is_the_one_installed(line):
    name, pinned = line.split("==")
    # torch may carry a local label such as 2.12.0+cpu: the same release, built for another device.
    assert version(name).split("+")[0] == pinned


def test_apex_is_never_installed():
    """The name `apex` on the package index belongs to an unrelated project (specification §8)."""
    named = [re.split(r"[=<>~\[ ]", line)[0] for line in (*REQUIREMENTS, *PROJECT["dependencies"])]
    assert "apex" not in named
    for path in (ROOT / "Makefile", ROOT / ".ci" / "run", ROOT / "environment.yml"):
        assert "apex" not in path.read_text(), path


# Imported by name, and part of what a pinned package promises.
COMES_WITH = {
    "IPython": "ipykernel",
    "PIL": "torchvision",
    "jupyter_client": "papermill",
    "nbformat": "papermill",
    "docutils": "sphinx",
}


def test_every_package_that_the_code_imports_is_pinned():
    distributions = packages_distributions()
    pinned = {line.split("==")[0] for line in REQUIREMENTS}
    unpinned = {}
    modules = sorted((ROOT / "msunet_core").rglob("*.py"))
    assert len(modules) > 30  # or nothing was read
    for path in modules:
        for name in _imported(path) - set(sys.stdlib_module_names) - {"msunet_core", "apex"}:
            owners = {owner.lower() for owner in distributions.get(COMES_WITH.get(name, name), [name])}
            if not owners & pinned:
                unpinned.setdefault(path.name, []).append(name)
    assert not unpinned


def _imported(path: Path) -> set[str]:
    modules = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            modules.append(node.module)
    return {module.split(".")[0] for module in modules}
