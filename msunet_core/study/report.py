"""Builds the site of a run folder: its executed notebooks, the claims, the shipped network, the code.

    python -m msunet_core.study.report RUN_FOLDER

writes ``RUN_FOLDER/site/``, which opens from the file system and asks no other host for anything. Pages only
show what notebooks and commits left; nothing that a notebook uses may move here, or into claims.py, pages.py
and shipped_page.py: Make builds the site again when these change, but runs no notebook again for it.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path

import matplotlib
import nbformat

from ..errors import StudyError, failure, one_line, reason
from ..files import ROOT, read_json, write_fault
from ..measure.unpack import SHIPPED
from . import pages
from .claims import EVIDENCE, claims, load_shipped, shipped_beside
from .profile import Profile
from .provenance import published
from .shipped_page import shipped_parts

DOCS = ROOT / "docs"
# In the contents, in this order, where the page is there.
FIRST = ("shipped", "try_it", "score_explorer")
LAST = ("run", "code", "specification", "about")
PLACE = re.compile(r"^\{\{ (\w+) \}\}$", re.MULTILINE)
# What of a run folder its site offers, beside the notebooks.
OFFERED = (
    "metrics.json",
    "provenance.json",
    "packed.safetensors",
    "packed.onnx",
    "train/history.csv",
    "prune/history.csv",
)


def build_site(run_folder: str | Path) -> Path:
    """Build ``run_folder/site`` anew, whole or not at all; returns its index.html.

    Raises
    ------
    StudyError : the folder holds no executed notebook, a file of it cannot be read, the site not be written
    """
    folder = Path(run_folder)
    notebooks = {
        path.stem: _notebook(path)
        for path in sorted(folder.glob("*.ipynb"))
        if not path.name.startswith(".") and not path.name.endswith(".failed.ipynb")
    }
    if not notebooks:
        raise StudyError(f"{folder} has no executed notebook; run `make reproduce RUN={folder.name}` first")
    try:
        with tempfile.TemporaryDirectory(prefix=".site.", dir=folder) as scratch:
            source, out = Path(scratch, "source"), Path(scratch, "html")
            _stage(folder, notebooks, source)
            _render(source, out)
            _offer(folder, notebooks, out / "downloads")
            (out / ".nojekyll").touch()  # or GitHub Pages leaves out every folder that begins with _
            _replace(folder / "site", out, Path(scratch, "old"))
    except StudyError:
        raise
    except OSError as error:
        raise write_fault(error.filename or folder / "site", error) from error
    except Exception as error:  # a folder of a stranger may hold anything in the place of anything
        raise StudyError(
            f"{folder} has a notebook, provenance.json or metrics.json that no run writes "
            f"({failure(error)}); run its notebooks again"
        ) from error
    return folder / "site" / "index.html"


def _notebook(path: Path) -> nbformat.NotebookNode:
    if not re.fullmatch(r"\w[\w-]*", path.stem):  # it names a page and stands in links
        raise StudyError(f"{path} cannot be a page; rename it to letters, digits, _ and -, or remove it")
    try:
        return nbformat.from_dict(published(nbformat.read(path, 4), {}))
    except Exception as error:  # nbformat raises its own and others' kinds
        raise StudyError(
            f"{path} is not a notebook ({type(error).__name__}); remove it and run it again"
        ) from error


def _stage(folder: Path, notebooks: dict[str, nbformat.NotebookNode], source: Path) -> None:
    """Everything that Sphinx reads, in one folder: our pages filled in, notebooks, pictures, code."""
    shutil.copytree(DOCS, source, ignore=shutil.ignore_patterns("__pycache__", "conf.py"))
    pictures = source / "figures"
    pictures.mkdir()
    provenance, metrics = _read(folder / "provenance.json"), _read(folder / "metrics.json")
    profile = pages.profile_of_run(provenance)
    statement = pages.run_statement(profile, folder.name)
    titles = {name: pages.title_of(notebook) or name for name, notebook in notebooks.items()}
    for name, notebook in notebooks.items():
        made = pages.site_notebook(notebook, name, statement, pictures)
        nbformat.write(made, source / f"{name}.ipynb")
    headings = {name: pages.headings_of(notebook) for name, notebook in notebooks.items()}
    code = pages.code_pages()
    (source / "code").mkdir()
    for module, page in code.items():
        (source / "code" / f"{module}.md").write_text(page)
    shipped = load_shipped()
    if shipped and (source / "try_it.md").exists():
        from .web import network_script

        (source / "_static" / "msunet_v3.js").write_text(network_script(shipped.path))
    with matplotlib.rc_context({"backend": "Agg"}):
        parts = shipped_parts(shipped, shipped_beside(), pictures)
    _fill(
        source,
        {
            **parts,
            "claims": pages.claims_table(
                claims(shipped=shipped), {**titles, "shipped": "The shipped network"}, headings
            ),
            "run_statement": statement,
            "notebooks": pages.notebook_table(titles, provenance.get("notebooks") or {}),
            "provenance": pages.provenance_table(provenance, metrics),
            "metrics": pages.metrics_tables({name: metrics[name] for name in metrics if name != "data"}),
            "downloads": _downloads(folder, notebooks),
            "code": pages.code_list(code),
            "authors": pages.authors(_text(ROOT / "CITATION.cff")),
            "citation": pages.citation(_text(ROOT / "CITATION.cff")),
            "contents": _contents(source, list(notebooks), profile),
        },
    )


def _fill(source: Path, places: dict[str, str]) -> None:
    for path in sorted(source.glob("*.md")):
        page = path.read_text()
        if unknown := set(PLACE.findall(page)) - places.keys():
            raise StudyError(
                f"docs/{path.name} has a place {min(unknown)!r} that nothing fills; correct its name"
            )
        path.write_text(PLACE.sub(lambda found: places[found[1]], page))


def _contents(source: Path, notebooks: list[str], profile: Profile | None) -> str:
    others = {path.stem for path in source.glob("*.md")} - {"index", *FIRST, *LAST}
    parts = {
        "The study": [name for name in FIRST if (source / f"{name}.md").exists()],
        "Notebooks, a toy run" if not profile or profile.shortfalls() else "Notebooks": notebooks,
        "Reference": [name for name in (*sorted(others), *LAST) if (source / f"{name}.md").exists()],
    }
    return "\n".join(
        "\n".join(["```{toctree}", ":hidden:", f":caption: {json.dumps(caption)}", "", *names, "```", ""])
        for caption, names in parts.items()
    )


def _render(source: Path, out: Path) -> None:
    from sphinx.application import Sphinx

    # Ours, and what was made for this site. Sphinx takes a relative path for one beside conf.py.
    own = {"html_static_path": [str((source / "_static").resolve())]}
    warnings = io.StringIO()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            app = Sphinx(source, DOCS, out, out.parent / "doctrees", "html", own, None, warnings)
            app.build(force_all=True)
    except OSError:  # of the disk: told by who called
        raise
    except Exception as error:  # SphinxError, or whatever a page of a stranger makes of it
        raise StudyError(f"the site cannot be built: {reason(error)}; correct that page") from error
    told = re.sub(r"\x1b\[[\d;]*m", "", warnings.getvalue()).replace(f"{source}{os.sep}", "")
    sys.stderr.write("".join(f"{one_line(line)}\n" for line in told.splitlines()))
    for left in (".buildinfo", "objects.inv"):
        (out / left).unlink(missing_ok=True)


def _replace(site: Path, new: Path, old: Path) -> None:
    """Put ``new`` where ``site`` is; the former one goes with the scratch folder."""
    if site.exists() or site.is_symlink():
        site.rename(old)
    new.rename(site)


# -- downloads ---------------------------------------------------------------------------------


def _offers(folder: Path) -> dict[str, tuple[Path, str]]:
    """What the site offers for download: file and what it is, by the name it gets."""
    found = {}
    for name in OFFERED:
        if (folder / name).is_file():
            found[name.replace("/", "_")] = (folder / name, "of this run")
    for path in sorted(SHIPPED.parent.glob("*")):
        if path.suffix in (".safetensors", ".csv", ".json"):
            found[f"shipped_{path.name}"] = (path, "of the shipped network")
    for group, begin in (("ablations", EVIDENCE), ("recipes", ""), ("record", "")):
        for path in sorted((ROOT / "runs" / group).glob(f"{begin}*.[cj]s*")):
            found[f"{group}_{path.name}"] = (path, f"evidence, {group}")
    if (ROOT / "CITATION.cff").is_file():
        found["CITATION.cff"] = (ROOT / "CITATION.cff", "how to cite")
    return found


def _downloads(folder: Path, notebooks: dict) -> str:
    rows = [
        (
            pages.link(f"downloads/{name}", name),
            what,
            f"{path.stat().st_size / 1000:,.1f} kB",
        )
        for name, (path, what) in _offers(folder).items()
    ]
    rows += [
        (
            pages.link(f"downloads/{name}.ipynb", f"{name}.ipynb"),
            "executed notebook",
            f"{size / 1000:,.1f} kB",
        )
        for name in notebooks
        for size in [(folder / f"{name}.ipynb").stat().st_size]
    ]
    return pages.table(("file", "what", "size"), rows, numbers=1)


def _offer(folder: Path, notebooks: dict, downloads: Path) -> None:
    downloads.mkdir()
    parameters = _read(folder / "provenance.json").get("parameters") or {}
    for name, (path, _) in _offers(folder).items():
        shutil.copyfile(path, downloads / name)
    for name in ["provenance.json", *(f"{name}.ipynb" for name in notebooks)]:
        if (folder / name).is_file():
            told = published(read_json(folder / name), parameters)
            (downloads / name).write_text(json.dumps(told, indent=1, ensure_ascii=False) + "\n")


def _read(path: Path) -> dict:
    """The JSON object at `path`; empty while no notebook has come so far."""
    return read_json(path, "remove it and run its notebook again") if path.exists() else {}


def _text(path: Path) -> str:
    return path.read_text() if path.is_file() else ""


def main(arguments: list[str]) -> int:
    """Exit status: 0 built, 1 refused (one line on stderr)."""
    if len(arguments) != 1:
        print("usage: python -m msunet_core.study.report RUN_FOLDER", file=sys.stderr)
        return 2
    try:
        print(f"wrote {build_site(arguments[0])}")
    except StudyError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
