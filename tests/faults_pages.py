"""A site of hostile notebooks and names, opened in a browser: nothing of theirs may run or fetch anything.

Each payload would put its number into ``ran`` of the page, by itself or when its link is followed.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import browser
import nbformat
import numpy as np
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from msunet_core import StudyError
from msunet_core.data.images import ARRAYS
from msunet_core.files import ROOT
from msunet_core.study.report import build_site
from msunet_core.study.runner import run_notebook

ELSEWHERE = "http://elsewhere.invalid"  # a host that nobody has
# JS stands for a call that puts the payload's number into `ran`.
FORMS = (
    "<script>JS</script>",
    "<SCRIPT\n>JS</SCRIPT >",
    "</script><script>JS</script>",
    "<img src=x onerror=JS>",
    '"><img src=x onerror=JS>',
    "'><img src=x onerror=JS>",
    "<svg/onload=JS>",
    "<svg><script>JS</script></svg>",
    '<iframe srcdoc="<script>JS</script>"></iframe>',
    '<iframe src="javascript:JS"></iframe>',
    "<details open ontoggle=JS>x</details>",
    "<input autofocus onfocus=JS>",
    "<style>@keyframes a{}p{animation:a}</style><p onanimationstart=JS>x</p>",
    "<object data='javascript:JS'></object>",
    '<math><mtext><table><mglyph><style><!--</style><img title="--&gt;&lt;img src onerror=JS&gt;">',
    "<noscript><p title='</noscript><img src=x onerror=JS>'></noscript>",
    "<!--><img src=x onerror=JS>-->",
    "<a href=javascript:JS>x</a>",
    '<a href="java\tscript:JS">x</a>',
    "<a href=' &#1;javascript&colon;JS'>x</a>",
    "<form action=javascript:JS><button>x</button></form>",
    "<x onclick=JS>x</x>",
    "[x](javascript:JS)",
    "[x](<java\tscript:JS>)",
    "<javascript:JS>",
    "![x](x 'y\"onerror=JS z=\"')",
    "`x`{=html}<img src=x onerror=JS>",
    "$</annotation></semantics></math><script>JS</script>$",
    "$\\text{<img src=x onerror=JS>}$",
    "\\href{javascript:JS}{x}",
    "$$\n\\href{javascript:JS}{x}\n$$",
    "```{raw} html\n<script>JS</script>\n```",
    "```{figure} x.png\n:target: javascript:JS\n```",
    "```{eval-rst}\n.. raw:: html\n\n   <script>JS</script>\n\n`x <javascript:JS>`__\n```",
    "```{toctree}\nx <javascript://%0aJS>\n```",
    f"<img src={ELSEWHERE}/a.png>",
    "<img src='/\t/elsewhere.invalid/a.png'>",
    f"<link rel=stylesheet href={ELSEWHERE}/a.css>",
    f"<style>@import '{ELSEWHERE}/b.css'; p {{background: url({ELSEWHERE}/c.png)}}</style><p>x</p>",
    f"<p style='background: url({ELSEWHERE}/d.png)'>x</p>",
    f"<meta http-equiv=refresh content='0;url={ELSEWHERE}'>",
    f"![x]({ELSEWHERE}/e.png)",
    f"```{{image}} {ELSEWHERE}/f.png\n```",
    f"```{{meta}}\n:http-equiv=Refresh: 0; url={ELSEWHERE}\n```",
    f"<base href={ELSEWHERE}/>",
    "```{include} /etc/hostname\n```",
    "```{literalinclude} /etc/hostname\n```",
    "{download}`/../../../../../../../../../etc/hostname`",
)  # fmt: skip
DOT = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR4nGP4z8AAAAMBAQDJ/pLvAAAAAElFTkSuQmCC"


def shows(kind: str) -> Callable[[str], nbformat.NotebookNode]:
    """A cell with the text as an output of a kind."""
    return lambda text: new_code_cell("x", outputs=[new_output("display_data", data={kind: text})])


def picture(text: str) -> nbformat.NotebookNode:
    told = {"image/png": {"alt": text, "title": text}}
    return new_code_cell("x", outputs=[new_output("display_data", data={"image/png": DOT}, metadata=told)])


def captioned(text: str) -> nbformat.NotebookNode:
    own = {"figure": {"caption": text}, "image": {"alt": text, "classes": text}}
    cell = picture("x")
    cell.metadata = nbformat.from_dict({"mystnb": own, "tags": [text]})
    return cell


def failed(text: str) -> nbformat.NotebookNode:
    return new_code_cell(
        "x", outputs=[new_output("error", ename=text, evalue=text, traceback=[f"\x1b[31m{text}"])]
    )


def svg(text: str) -> nbformat.NotebookNode:
    return shows("image/svg+xml")(f"<svg xmlns='http://www.w3.org/2000/svg'>{text}</svg>")


# Where in a notebook a text of a stranger may stand.
DOORS: dict[str, Callable[[str], nbformat.NotebookNode]] = {
    "markdown": new_markdown_cell,
    "heading": lambda text: new_markdown_cell("## needle " + " ".join(text.split())),
    "source": new_code_cell,
    "raw": nbformat.v4.new_raw_cell,
    "stream": lambda text: new_code_cell("x", outputs=[new_output("stream", text=text)]),
    "plain": shows("text/plain"),
    "html": shows("text/html"),
    "outmarkdown": shows("text/markdown"),
    "latex": shows("text/latex"),
    "javascript": lambda text: shows("application/javascript")(
        text.partition("<script>")[2].partition("<")[0] or text
    ),
    "widget": lambda text: shows("application/vnd.jupyter.widget-view+json")({"model_id": text}),
    "svg": svg,
    "picture": picture,
    "captioned": captioned,
    "failed": failed,
}


class Payloads:
    """Texts that would run, numbered, and where each was put."""

    def __init__(self):
        self.places: list[str] = []

    def __call__(self, form: str, place: str) -> str:
        self.places.append(f"{place}: {form!r}")
        return form.replace("JS", f"(top.ran=top.ran||[]).push({len(self.places) - 1})")


def write_run(run: Path, payloads: Payloads) -> None:
    """A run folder whose notebooks, numbers and provenance are full of payloads."""
    for door, cell in DOORS.items():
        cells = [new_markdown_cell(f"# {payloads('<img src=x onerror=JS>', f'title of {door}')}")]
        cells += [cell(payloads(form, door)) for form in FORMS]
        nbformat.write(new_notebook(cells=cells), run / f"{door}.ipynb")
    values = {payloads(form, "name of a number"): payloads(form, "number") for form in FORMS}
    (run / "metrics.json").write_text(
        json.dumps({payloads(FORMS[0], "section of numbers"): values, "data": values})
    )
    told = {form: payloads(form, "provenance") for form in FORMS}
    named = {payloads(form, "package"): payloads(form, "version") for form in FORMS}
    one = payloads(FORMS[3], "provenance")
    provenance = {
        **dict.fromkeys(("command", "profile", "seed", "started", "python"), " ".join(told.values())),
        "parameters": {"PROFILE": one, "DATA": one, "OVERRIDES": one},
        "git": {"commit": one, "clean": one},
        "hardware": dict.fromkeys(("cores", "cpu", "memory_gib", "gpu"), one),
        "packages": named,
        "notebooks": {},
    }
    (run / "provenance.json").write_text(json.dumps(provenance))


def write_class_names(run: Path, payloads: Payloads) -> None:
    """Notebook 01 executed on classes that are called like payloads, or like formulas of matplotlib."""
    names = [payloads(form, "class name") for form in FORMS if form.isprintable()]
    names += ["$x^$", "\\", "%s", "{x}", "a" * 200]
    pictures = np.random.default_rng(0).integers(0, 256, (2 * len(names), 32, 32, 3), np.uint8)
    labels = np.arange(2 * len(names)) % len(names)
    data = run.parent / "names.npz"
    np.savez(data, **dict(zip(ARRAYS, (pictures, labels, pictures, labels, np.array(names)), strict=True)))
    given = {"PROFILE": "smoke", "RUN": "names", "DATA": str(data)}
    run_notebook(ROOT / "notebooks" / "01_data_and_cutmix.ipynb", run / "01_data_and_cutmix.ipynb", given)


def names_refused(folder: Path, payloads: Payloads) -> int:
    """How many notebooks that are called like a payload become no page."""
    refused = 0
    for number, form in enumerate(form for form in FORMS if "/" not in form and "\n" not in form):
        run = folder / str(number)
        run.mkdir(parents=True)
        nbformat.write(new_notebook(), run / f"{payloads(form, 'file name')}.ipynb")
        try:
            build_site(run)
        except StudyError:
            refused += 1
    return refused


def look(site: Path, profile: Path) -> tuple[set[int], set[str]]:
    """Open every page, follow what looks like a script, search: numbers that ran, addresses asked for."""
    ran, asked = set(), set()
    window = browser.Browser(profile)
    try:
        pages = [path.as_uri() for path in sorted(site.glob("*.html"))]
        for address in [*pages, (site / "search.html").as_uri() + "?q=needle"]:
            window.open(address)
            window.evaluate(
                "for (const e of document.querySelectorAll('a, button, x, [onclick]'))"
                " if (!e.href || e.protocol == 'javascript:') { try { e.click() } catch {} }"
            )
            time.sleep(0.3)  # what fetches something fails, and its onerror runs
            ran |= set(window.evaluate("top.ran || []"))
            asked |= {
                url for url in window.requests if not url.startswith(("file:", "data:", "blob:", "about:"))
            }
    finally:
        window.close()
    return ran, asked


def try_pages(scratch: Path, quick: bool = False) -> dict:
    """Counts for a row of the table."""
    payloads, run = Payloads(), scratch / "pages" / "<img src=x onerror=top.ran=[-1]>"
    run.mkdir(parents=True)
    write_run(run, payloads)
    if not quick:
        os.environ["MSUNET_RUNS"] = str(run.parent)
        write_class_names(run, payloads)
    with contextlib.redirect_stderr(io.StringIO()) as complaints:
        site = build_site(run).parent
    refused = names_refused(scratch / "names", names := Payloads())
    if browser.find() is None:
        return {"note": "skipped: no Chromium"}
    ran, others = look(site, scratch / "chromium")
    for number in sorted(ran):
        print(f"  ran: {payloads.places[number] if number >= 0 else 'name of the run folder'}", flush=True)
    secret = Path("/etc/hostname").read_text().strip()
    others |= {path.name for path in site.rglob("hostname")}
    others |= {path.name for path in site.rglob("*.html") if f">{secret}\n" in path.read_text()}
    for what in others:
        print(f"  fetched from elsewhere, or shown: {what}", flush=True)
    tried = len(payloads.places) + 1
    return {
        "tried": tried + len(names.places),
        "survived": tried - len(ran) + refused,
        "executed": len(ran),
        "lost": len(others) + len(names.places) - refused,
        "tracebacks": int("Traceback" in complaints.getvalue()),
    }


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        print(try_pages(Path(folder)))
