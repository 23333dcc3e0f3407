"""What the pages of a site say: functions that make MyST Markdown of a run folder or of committed files.

Names that come from a run (classes, folders, commands) may hold anything: they pass :func:`text` or
html.escape before they reach a page.
"""

from __future__ import annotations

import ast
import base64
import contextlib
import html
import importlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import nbformat
import pandas as pd
import yaml
from docutils.nodes import make_id
from nbformat.v4 import new_code_cell, new_markdown_cell

from ..errors import StudyError, reason
from ..files import ROOT
from .claims import NOT_REPRODUCED, REPRODUCED, Claim
from .profile import Profile, profile_of
from .provenance import without_folders

MARKS = {REPRODUCED: "✓", NOT_REPRODUCED: "✗"}  # beside the word, never instead of it
ORIGINAL = "https://github.com/AIoT-MLSys-Lab/MSUNet"
LIVE_LINE = re.compile(r", step \d+ of \d+, (\?|\d+(:\d\d)+) left$")  # of training (run.py), no result
WIDE = 700  # CSS pixels from which a picture scrolls in its box on a phone instead of shrinking

# -- small pieces ------------------------------------------------------------------------------


def text(value: object) -> str:
    """Any text as Markdown that shows just that: on one line, no character of it is markup."""
    return re.sub(r"([!-/:-@\[-`{-~])", r"\\\1", " ".join(str(value).split()))


def raw(markup: str) -> str:
    """HTML as a block of a page."""
    return f"````{{raw}} html\n{markup}\n````\n"


def table(head: Sequence[str], rows: Iterable[Sequence[object]], numbers: int = 0, kind: str = "") -> str:
    """An HTML table that scrolls in its box; the last ``numbers`` columns are aligned as numbers."""
    first = len(head) - numbers

    def line(cells: Sequence[object], tag: str) -> str:
        shown = []
        for i, cell in enumerate(cells):
            kind = ' class="number"' if i >= first else ""
            inside = cell if isinstance(cell, Html) else html.escape(number(cell))
            shown.append(f"<{tag}{kind}>{inside}</{tag}>")
        return f"<tr>{''.join(shown)}</tr>"

    body = "\n".join(line(row, "td") for row in rows)
    top = f"<thead>{line(head, 'th')}</thead>" if any(head) else ""
    inside = f'<table class="docutils {kind}">{top}<tbody>\n{body}\n</tbody></table>'
    return raw(f'<div class="scroll" tabindex="0" role="region" aria-label="table">{inside}</div>')


class Html(str):
    """Markup that a table takes as it is."""


def number(value: object) -> str:
    """A value as a reader wants it: six digits, thousands apart."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,.6g}" if isinstance(value, float) else f"{value:,}"


def figure(file: str, alt: str, caption: str, name: str, width: int | None = None) -> str:
    """A numbered figure; ``caption`` is Markdown, ``alt`` plain text, ``width`` CSS pixels."""
    lines = [f"```{{figure}} {file}", f":alt: {json.dumps(' '.join(alt.split()), ensure_ascii=False)}"]
    lines += [f":name: {name}"]
    if width:
        lines += [f":width: {width}px"]
        if width > WIDE:
            lines += [":figclass: wide"]
    return "\n".join([*lines, "", caption, "```", ""])


def link(file: str, label: str) -> Html:
    return Html(f'<a href="{html.escape(file)}">{html.escape(label)}</a>')


# -- claims ------------------------------------------------------------------------------------


def claims_table(
    rows: Sequence[Claim], pages: Mapping[str, str], headings: Mapping[str, Sequence[str]]
) -> str:
    """The front page's table; on a phone each row becomes a card with its columns named.

    pages : titles of the pages there are, by name; a claim whose page is not there has no link
    headings : of each page; a claim leads to the first one that speaks of it
    """
    names = ("claim as published", "what was run", "n", "result (95 % interval or range)", "verdict")
    lines = []
    for row in rows:
        cells = [f'<th scope="row">{html.escape(row.published)}</th>']
        for name, cell in zip(names[1:4], (row.ran, row.n, row.result), strict=True):
            absent = "" if cell else ' class="absent"'
            cells.append(f'<td data-name="{name.split(" (")[0]}"{absent}>{html.escape(cell or "–")}</td>')
        place = f"{row.page}.html{_anchor(row.about, headings.get(row.page, ()))}"
        more = f" More: {link(place, pages[row.page])}." if row.page in pages else ""
        cells.append(
            f'<td><strong class="verdict">{MARKS.get(row.verdict, "○")} {row.verdict}</strong>'
            f"<small>{html.escape(row.reason)}{more}</small></td>"
        )
        lines.append(f'<tr class="{row.verdict.replace(" ", "-")}">{"".join(cells)}</tr>')
    head = "".join(f'<th scope="col">{name}</th>' for name in names)
    body = "\n".join(lines)
    return raw(
        f'<table class="docutils claims"><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table>'
    )


def _anchor(about: str, headings: Sequence[str]) -> str:
    found = (heading for heading in headings if re.search(about, heading, re.IGNORECASE)) if about else ()
    return next((f"#{make_id(heading)}" for heading in found), "")


# -- the run -----------------------------------------------------------------------------------


def profile_of_run(provenance: Mapping) -> Profile | None:
    """The profile with which a run was made; None where that is not written down or not there any more."""
    with contextlib.suppress(StudyError):
        return profile_of(provenance.get("parameters") or {})
    return None


def run_statement(profile: Profile | None, run: str) -> str:
    """The words, on each page of a run, that tell a toy from the real thing."""
    if profile is None:
        return (
            ":::{admonition} How this run was made is not recorded\n:class: caution toy\n"
            f"Run {text(run)} has no provenance, or its profile is gone: "
            "take its numbers for an illustration.\n:::\n"
        )
    shortfalls, epochs = profile.shortfalls(), profile.train.epochs + profile.prune.epochs
    if not shortfalls:
        return (
            ":::{admonition} The full network on all of its images\n:class: note real\n"
            f"Run {text(run)}: profile {text(profile.name)}, {epochs:,} epochs of training and pruning; "
            "full width, every image.\n:::\n"
        )
    return (
        ":::{admonition} A toy run\n:class: caution toy\n"
        f"Run {text(run)}, profile {text(profile.name)}: {', '.join(shortfalls)}. "
        f"It shows how each technique works, in {epochs:,} epochs. Accuracies and scores of what it trained "
        "say nothing about MSUNet on CIFAR-100 and do not compare with published ones; "
        "those of the [shipped network](shipped.md) do, and a page says so where it shows them.\n:::\n"
    )


def notebook_table(titles: Mapping[str, str], made: Mapping) -> str:
    """Title, wall time, peak memory and download of each notebook."""
    rows = []
    for name, title in titles.items():
        entry = made.get(name) or {}
        seconds, memory = entry.get("wall_seconds"), entry.get("peak_memory_mb")
        rows.append(
            (
                link(f"{name}.html", title),
                "" if seconds is None else f"{seconds:,.0f} s",
                "" if memory is None else f"{memory:,.0f} MiB",
            )
        )
    return table(("page", "time to run", "peak memory"), rows, numbers=2)


def provenance_table(provenance: Mapping, metrics: Mapping | None = None) -> str:
    """How something was made, for a person: command, commit, data, versions, hardware, time."""
    if not provenance:
        return "Nothing is written down about it.\n"
    parameters, git = provenance.get("parameters") or {}, provenance.get("git") or {}
    hardware = provenance.get("hardware") or {}
    data = dict((metrics or {}).get("data") or {})
    source = Path(str(data.get("source") or parameters.get("DATA") or "the profile's own")).name
    told = {
        "command": without_folders(str(provenance.get("command", "")), parameters),
        "profile and seed": without_folders(
            f"{provenance.get('profile')}, seed {provenance.get('seed')}", parameters
        ),
        "commit": git
        and f"{git.get('commit')} ({'clean' if git.get('clean') else 'with changes that are not committed'})",
        "data": source + (f", fingerprint {data['fingerprint']}" if data.get("fingerprint") else ""),
        "started": provenance.get("started"),
        "took": _duration(provenance.get("wall_seconds")),
        "hardware": hardware
        and f"{hardware.get('cores')} cores of {hardware.get('cpu')}, {hardware.get('memory_gib')} GiB, "
        f"{hardware.get('gpu') or 'no GPU'}",
        "Python": provenance.get("python"),
        "packages": ", ".join(f"{name} {v}" for name, v in (provenance.get("packages") or {}).items()),
    }
    return table(("", ""), [(name, str(value)) for name, value in told.items() if value], kind="pairs")


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return ""
    return f"{seconds / 3600:.1f} hours" if seconds >= 5400 else f"{seconds / 60:.1f} minutes"


def metrics_tables(metrics: Mapping) -> str:
    """Each section of metrics.json as a table."""
    parts = []
    for section, values in metrics.items():
        rows = _flat(values if isinstance(values, dict) else {section: values})
        if rows:
            parts.append(f"### {text(section)}\n\n{table(('', ''), rows.items(), numbers=1, kind='pairs')}")
    return "\n".join(parts) or "No notebook has left a number yet.\n"


def _flat(tree: Mapping, prefix: str = "") -> dict[str, object]:
    rows: dict[str, object] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            rows.update(_flat(value, f"{prefix}{name}: "))
        elif isinstance(value, list):
            rows[f"{prefix}{name}"] = ", ".join(map(number, value))
        elif value is not None:
            rows[f"{prefix}{name}"] = value
    return rows


# -- notebooks ---------------------------------------------------------------------------------


def title_of(notebook: nbformat.NotebookNode) -> str | None:
    """The first heading of a notebook, without its markup."""
    for cell in notebook.cells:
        if cell.cell_type == "markdown" and (heading := re.search(r"^#\s+(.+)$", cell.source, re.MULTILINE)):
            return re.sub(r"[`*$]", "", heading[1]).strip()
    return None


def headings_of(notebook: nbformat.NotebookNode) -> list[str]:
    """The headings below the title as they are shown, but for those with formulas."""
    found = [
        heading
        for cell in notebook.cells
        if cell.cell_type == "markdown"
        for heading in re.findall(r"^##+\s+(.+)$", cell.source, re.MULTILINE)
    ]
    return [re.sub(r"[`*]", "", heading).strip() for heading in found if "$" not in heading]


def site_notebook(
    notebook: nbformat.NotebookNode, name: str, note: str, folder: Path
) -> nbformat.NotebookNode:
    """A copy of an executed notebook for the site.

    Set-up cells are folded, lines of progress left out, each picture becomes a numbered figure with alt text
    (its file in ``folder``), and the page says of what run it is (``note``, after the title) and where its
    notebook and its code are.
    """
    cells, images, begun, section = [], 0, False, name
    for cell in notebook.cells:
        if cell.cell_type != "code":
            if headings := re.findall(r"^#+\s+(.+)$", cell.source, re.MULTILINE):
                section = headings[-1]
            here = cell.source.replace("](../docs/", "](")  # pages lie beside each other on the site
            cells.append(nbformat.from_dict({**cell, "source": here}))
            continue
        tags = list(cell.metadata.get("tags", ()))
        imports = cell.source.lstrip().startswith(("import ", "from "))
        if {"parameters", "injected-parameters"} & set(tags) or (imports and not begun):
            tags = list(dict.fromkeys([*tags, "hide-input"]))
        begun |= not tags
        part, rest = new_code_cell(cell.source), []
        for output in cell.get("outputs", ()):
            picture = output.get("data", {}).get("image/png")
            if not picture:
                if not LIVE_LINE.search(str(output.get("data", {}).get("text/plain", ""))):
                    rest.append(output)
                continue
            images += 1
            file = f"{name}-{images}.png"
            content = base64.b64decode("".join(picture))
            (folder / file).write_bytes(content)
            cells.append(_part(cell, part, tags, rest))
            part, rest = None, []
            cells.append(
                new_markdown_cell(
                    _picture(cell, output, content, f"figures/{file}", f"{name}-{images}", section)
                )
            )
        if part or rest:
            cells.append(_part(cell, part, tags, rest))
    if title_of(notebook) is None:
        cells.insert(0, new_markdown_cell(f"# {text(name)}"))
    cells.insert(1, new_markdown_cell(note))
    cells.append(new_markdown_cell(_foot(notebook, name)))
    kept = nbformat.v4.new_notebook(cells=cells)
    kept.metadata = nbformat.from_dict({"kernelspec": {"name": "python3", "display_name": "Python 3"}})
    kept.metadata["language_info"] = nbformat.from_dict({"name": "python"})
    return kept


def _part(cell, part, tags: list[str], outputs: list):
    """The cell with some of its outputs; after a picture, only those that followed it."""
    tags = tags if part else [*tags, "remove-input"]
    made = part or new_code_cell(cell.source)
    made.metadata = nbformat.from_dict({**cell.metadata, "tags": tags})
    made.execution_count, made.outputs = cell.get("execution_count"), outputs
    return made


def _picture(cell, output, content: bytes, file: str, name: str, section: str) -> str:
    """The figure of an image output.

    Its words come from the cell's metadata as MyST-NB has it, else from the output (alt_text.py describes
    each picture), else from the titles in the cell's own code, else from the heading above it.
    """
    own = cell.metadata.get("mystnb", {})
    told = output.get("metadata", {}).get("image/png", {})
    titles = _titles(cell.source) or f"A picture to: {section}"
    caption = own.get("figure", {}).get("caption") or text(told.get("title") or titles)
    alt = own.get("image", {}).get("alt") or told.get("alt") or titles
    width = told.get("width") or int.from_bytes(content[16:20], "big")
    return figure(file, alt, caption, f"fig-{name}", int(width))


def _titles(source: str) -> str:
    """What a cell's code gives its pictures as titles, where it does so in plain words."""
    try:
        calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    except SyntaxError:
        return ""
    found = []
    for call in sorted(calls, key=lambda call: call.lineno):
        name = getattr(call.func, "attr", "")
        values = [word.value for word in call.keywords if word.arg == "title"]
        values += call.args[:1] if name in ("set_title", "suptitle") else []
        for value in values:
            parts = value.values if isinstance(value, ast.JoinedStr) else [value]
            words = "".join(str(p.value) if isinstance(p, ast.Constant) else "…" for p in parts)
            if words.strip("… "):
                found.append(" ".join(words.split()))
    return "; ".join(dict.fromkeys(found))


def _foot(notebook: nbformat.NotebookNode, name: str) -> str:
    links = ", ".join(f"[`{module}`](code/{module}.md)" for module in modules_of(notebook))
    return (
        "## This page\n\n"
        f'Its notebook: <a href="downloads/{name}.ipynb" download>{name}.ipynb</a>, as it was executed. '
        "How: [this run](run.md).\n\n" + (f"The code it calls: {links}.\n" if links else "")
    )


def modules_of(notebook: nbformat.NotebookNode) -> list[str]:
    """Modules of the package that a notebook imports, by full name."""
    found: dict[str, None] = {}
    for cell in notebook.cells:
        if cell.cell_type != "code":
            continue
        try:
            nodes = [*ast.walk(ast.parse(cell.source))]
        except SyntaxError:  # IPython's own syntax
            continue
        for node in nodes:
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "msunet_core":
                for alias in node.names:
                    found[_module(node.module, alias.name)] = None
    return [module for module in found if source_of(module)]


def _module(module: str, name: str) -> str:
    """Where ``from module import name`` finds it: a module below, or the module that defines it."""
    if source_of(f"{module}.{name}"):
        return f"{module}.{name}"
    return getattr(getattr(importlib.import_module(module), name, None), "__module__", None) or module


def source_of(module: str) -> Path | None:
    """The file of a module of the package; None where there is none."""
    path = ROOT / module.replace(".", "/")
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)


# -- the code ----------------------------------------------------------------------------------


def code_pages() -> dict[str, str]:
    """A page for each module, by its full name: what its docstring says first, and its source."""
    pages = {}
    for path in sorted((ROOT / "msunet_core").rglob("*.py")):
        source = path.read_text()
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        fence = "`" * (3 + max(map(len, re.findall(r"`+", source)), default=0))
        pages[module] = (
            f"---\norphan: true\n---\n\n# {text(module)}\n\n{summary_of(source)}\n\n"
            f"Part of [the code](../code.md), file `{path.relative_to(ROOT)}`.\n\n"
            f"{fence}python\n{source}{fence}\n"
        )
    return pages


def summary_of(source: str) -> str:
    """The first paragraph of a module's docstring as Markdown."""
    words = (ast.get_docstring(ast.parse(source)) or "").split("\n\n")[0]
    parts = re.split(r"(?::\w+:)?(`+[^`]+`+)", words)
    return "".join(f"`{part.strip('`')}`" if part.startswith("`") else _kept(part) for part in parts)


def _kept(words: str) -> str:
    """As text(), with the spaces at its ends."""
    return f"{' ' * words[:1].isspace()}{text(words)}{' ' * words[-1:].isspace()}" if words.strip() else words


def code_list(modules: Iterable[str]) -> str:
    """The modules by folder, in the order the data flows."""
    order = ["data", "model", "fast", "measure", "training", "study"]
    rooms: dict[str, list[str]] = {}
    for module in modules:
        room = module.split(".")[1] if module.count(".") > 1 or module.split(".")[-1] in order else ""
        rooms.setdefault(room, []).append(module)
    parts = []
    for room in sorted(rooms, key=lambda room: order.index(room) if room in order else len(order)):
        parts.append(f"## {room or 'beside the folders'}\n")
        for module in rooms[room]:
            summary = summary_of(source_of(module).read_text())
            parts.append(f"- [`{module.removeprefix('msunet_core.')}`](code/{module}.md): {summary}")
        parts.append("")
    return "\n".join(parts)


# -- tables of the shipped network -------------------------------------------------------------


def kinds_table(counted: pd.DataFrame) -> str:
    """What each kind of layer costs (Score.by_kind)."""
    total = counted["score"].sum()
    rows = [
        (
            kind,
            f"{row.params / 1e3:,.1f}",
            f"{row.mults / 1e6:,.2f}",
            f"{row.adds / 1e6:,.2f}",
            f"{100 * row.score / total:.1f} %",
        )
        for kind, row in zip(counted.index, counted.itertuples(), strict=True)
    ]
    head = ("kind of layer", "parameters, thousands", "multiplications, M", "additions, M", "share of score")
    return table(head, rows, numbers=4)


# -- citation ----------------------------------------------------------------------------------


def authors(cff: str) -> str:
    """Works that CITATION.cff refers to, with their authors."""
    try:
        works = (yaml.safe_load(cff) or {}).get("references") or []
    except yaml.YAMLError as error:
        raise StudyError(f"CITATION.cff is not YAML ({reason(error)}); correct it") from error
    lines = []
    for work in works:
        names = ", ".join(
            " ".join(filter(None, (one.get("given-names"), one.get("family-names"), one.get("name"))))
            for one in work.get("authors") or []
        )
        address = work.get("url") or work.get("repository-code")
        title = f"[{text(work.get('title'))}]({address})" if address else text(work.get("title"))
        lines.append(f"- {text(names)}: {title}" + (f", {work['year']}" if work.get("year") else ""))
    return "\n".join(lines or [f"Their code: [{ORIGINAL}]({ORIGINAL})."]) + "\n"


def citation(cff: str) -> str:
    """How to cite the study."""
    if not cff:
        return "Cite the repository with the commit that [this run](run.md) names.\n"
    linked = '<a href="downloads/CITATION.cff" download>CITATION.cff</a>'
    return f"Cite it as {linked} says:\n\n```yaml\n{cff.strip()}\n```\n"
