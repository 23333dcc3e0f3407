"""Renders a run folder as pages: one per executed notebook, and an index with numbers and figures.

    python -m msunet_core.report RUN_FOLDER

Pages only show what the notebooks left in the folder. Nothing that a notebook uses may move here:
Make renders the pages again when this file changes, but runs no notebook again for it.
"""

from __future__ import annotations

import html
import json
import re
import sys
from pathlib import Path
from urllib.parse import quote

import nbformat
from nbconvert import HTMLExporter

from ..errors import StudyError
from ..files import atomic_write

STYLE = """
:root { color-scheme: light dark; --line: #8884; --faint: #8881; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.5rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .25rem 1rem .25rem 0; border-bottom: 1px solid var(--line);
         vertical-align: top; }
td.number, th.number { text-align: right; }
code { background: var(--faint); padding: .1em .3em; overflow-wrap: anywhere; }
.tables { display: flex; flex-wrap: wrap; align-items: flex-start; gap: 1rem 3rem; }
.figures { display: grid; gap: 1.5rem;
           grid-template-columns: repeat(auto-fit, minmax(min(28rem, 100%), 1fr)); }
figure { margin: 0; } figure img { width: 100%; background: white; border: 1px solid var(--line); }
figcaption { font-size: .9rem; }
"""

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
{body}
</body>
</html>
"""


def render_pages(run_folder: str | Path) -> Path:
    """Write NAME.html beside each executed NAME.ipynb, then index.html; returns the index.

    metrics.json, provenance.json and figures/ are shown where they are there.

    Raises StudyError when the folder holds no executed notebook, or a file cannot be written.
    """
    folder = Path(run_folder)
    notebooks = sorted(
        path
        for path in folder.glob("*.ipynb")
        if not path.name.startswith(".") and not path.name.endswith(".failed.ipynb")
    )
    if not notebooks:
        raise StudyError(f"{folder} has no executed notebook; run `make reproduce RUN={folder.name}` first")
    titles = {}
    for path in notebooks:
        notebook = nbformat.read(path, 4)
        titles[path.stem] = _title(notebook) or path.stem
        atomic_write(path.with_suffix(".html"), _notebook_page(notebook, titles[path.stem]))
    index = folder / "index.html"
    atomic_write(index, _index_page(folder, titles))
    return index


def _title(notebook: nbformat.NotebookNode) -> str | None:
    for cell in notebook.cells:
        if cell.cell_type == "markdown" and (heading := re.search(r"^#\s+(.+)$", cell.source, re.MULTILINE)):
            return re.sub(r"[`*$]", "", heading[1]).strip()
    return None


def _notebook_page(notebook: nbformat.NotebookNode, title: str) -> str:
    notebook.metadata["title"] = title
    exporter = HTMLExporter(embed_images=True)
    page, _ = exporter.from_notebook_node(notebook)
    # Only widgets need require.js, and no notebook has one: the page must not wait for a network.
    page = re.sub(r'<script src="[^"]*require[^"]*"></script>', "", page)
    back = '<p style="padding: 0 1rem"><a href="index.html">All pages of this run</a></p>'
    return re.sub(r"(<body[^>]*>)", lambda body: body[1] + back, page, count=1)


def _index_page(folder: Path, titles: dict[str, str]) -> str:
    provenance = _read(folder / "provenance.json")
    body = [f"<h1>MSUNet study: run {html.escape(folder.name)}</h1>"]
    if command := provenance.get("command"):
        body.append(f"<p>Made by <code>{html.escape(str(command))}</code></p>")
    body += ["<h2>Notebooks</h2>", _notebook_table(titles, provenance.get("notebooks", {}))]
    if metrics := _read(folder / "metrics.json"):
        body += ["<h2>Numbers</h2>", _metric_tables(metrics)]
    if figures := sorted((folder / "figures").glob("*.png")):
        body += ["<h2>Figures</h2>", '<div class="figures">', *map(_figure, figures), "</div>"]
    if provenance:
        rest = {name: value for name, value in provenance.items() if name not in ("command", "notebooks")}
        body += ["<h2>How this run was made</h2>", _table(_flat(rest))]
    return PAGE.format(title=f"MSUNet: {html.escape(folder.name)}", style=STYLE, body="\n".join(body))


def _notebook_table(titles: dict[str, str], made: dict) -> str:
    rows = []
    for name, title in titles.items():
        entry = made.get(name, {})
        seconds, memory = entry.get("wall_seconds"), entry.get("peak_memory_mb")
        rows.append(
            f'<tr><td><a href="{quote(name)}.html">{html.escape(title)}</a></td>'
            f'<td class="number">{"" if seconds is None else f"{seconds:,.0f} s"}</td>'
            f'<td class="number">{"" if memory is None else f"{memory:,.0f} MiB"}</td>'
            f'<td><a href="{quote(name)}.ipynb">notebook</a></td></tr>'
        )
    head = '<tr><th></th><th class="number">time</th><th class="number">peak memory</th><th></th></tr>'
    return f"<table>{head}{''.join(rows)}</table>"


def _metric_tables(metrics: dict) -> str:
    """Numbers that stand alone in one table, each section of metrics.json in a table of its own."""
    alone = {name: value for name, value in metrics.items() if not isinstance(value, dict)}
    sections = {"": alone, **{name: value for name, value in metrics.items() if isinstance(value, dict)}}
    tables = [_table(_flat(section), heading=name) for name, section in sections.items() if section]
    return f'<div class="tables">{"".join(tables)}</div>'


def _table(rows: dict[str, object], heading: str = "") -> str:
    head = f"<tr><th colspan=2>{html.escape(heading)}</th></tr>" if heading else ""
    cells = []
    for name, value in rows.items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        shown = f"{value:,.6g}" if isinstance(value, float) else str(value)
        kind = ' class="number"' if number else ""
        cells.append(f"<tr><td>{html.escape(name)}</td><td{kind}>{html.escape(shown)}</td></tr>")
    return f"<table>{head}{''.join(cells)}</table>"


def _flat(tree: dict, prefix: str = "") -> dict[str, object]:
    rows: dict[str, object] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            rows.update(_flat(value, f"{prefix}{name}."))
        elif isinstance(value, list):
            rows[f"{prefix}{name}"] = ", ".join(map(str, value))
        elif value is not None:
            rows[f"{prefix}{name}"] = value
    return rows


def _figure(path: Path) -> str:
    link = f"figures/{quote(path.name)}"
    caption = html.escape(path.stem.replace("_", " "))
    return (
        f'<figure><a href="{link}"><img src="{link}" alt="{caption}" loading="lazy"></a>'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def _read(path: Path) -> dict:
    """The JSON object at `path`; empty while no notebook has come so far."""
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise StudyError(f"{path} is not JSON ({error}); remove it and run its notebook again") from error
    return content if isinstance(content, dict) else {}


def main(arguments: list[str]) -> int:
    """Exit status: 0 rendered, 1 refused (one line on stderr)."""
    if len(arguments) != 1:
        print("usage: python -m msunet_core.report RUN_FOLDER", file=sys.stderr)
        return 2
    try:
        print(f"wrote {render_pages(arguments[0])}")
    except StudyError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
