"""The site of the committed notebooks: whole, legible on a phone, asking no other host for anything."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import browser as chromium
import pytest

from msunet_core.study import report
from msunet_core.study.profile import PROFILES

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
# What a browser fetches by itself, and where it says so.
FETCHED = {"img": "src", "script": "src", "source": "src", "iframe": "src", "video": "src", "audio": "src"}

pytestmark = pytest.mark.slow
needs_browser = pytest.mark.skipif(chromium.find() is None, reason="no Chromium")


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> tuple[Path, str]:
    """The site of a run whose notebooks are the committed ones, and what Sphinx complained of."""
    run = tmp_path_factory.mktemp("runs") / "smoke"
    run.mkdir()
    for path in NOTEBOOKS:
        shutil.copy(path, run)
    provenance = {
        "command": "make reproduce",
        "profile": "smoke",
        "seed": 0,
        "parameters": {"PROFILE": str(PROFILES / "smoke.yaml")},  # as somebody may name it
        "wall_seconds": 300.0,
        "git": {"commit": "0123abc", "clean": True},
        "notebooks": {path.stem: {"wall_seconds": 61.4, "peak_memory_mb": 1234} for path in NOTEBOOKS},
    }
    (run / "provenance.json").write_text(json.dumps(provenance))
    (run / "metrics.json").write_text(
        json.dumps({"05_score": {"top1": 38.125}, "data": {"source": "synthetic", "fingerprint": "f00d"}})
    )
    (run / "site").mkdir()
    (run / "site" / "stale.html").write_text("of an earlier run")
    complaints: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report.sys.stderr, "write", complaints.append)
        patch.chdir(run.parent)  # as `make reproduce` names a run: by a relative path
        report.build_site(run.name)
    return run / "site", "".join(complaints)


@pytest.fixture(scope="module")
def site(built) -> Path:
    return built[0]


class Page(HTMLParser):
    """What of a page matters here: ids, links, pictures, what is fetched, headings, words."""

    def __init__(self, path: Path):
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.images: list[dict] = []
        self.fetched: list[str] = []
        self.words: list[str] = []
        self.feed(path.read_text())

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.ids |= {given[name] for name in ("id", "name") if given.get(name)}
        if tag == "a" and given.get("href"):
            self.links.append(given["href"])
        if tag == "img":
            self.images.append(given)
        if FETCHED.get(tag) in given:
            self.fetched.append(given[FETCHED[tag]])
        if tag == "link" and given.get("rel") in (
            "stylesheet",
            "icon",
            "preload",
            "preconnect",
            "dns-prefetch",
        ):
            self.fetched.append(given["href"])

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


@pytest.fixture(scope="module")
def pages(site) -> dict[str, Page]:
    return {str(path.relative_to(site)): Page(path) for path in sorted(site.rglob("*.html"))}


def test_every_notebook_has_a_page_and_sphinx_nothing_to_complain_of(built, pages):
    assert built[1] == ""
    assert {f"{path.stem}.html" for path in NOTEBOOKS} <= pages.keys()
    assert {
        "index.html",
        "shipped.html",
        "run.html",
        "code.html",
        "about.html",
        "search.html",
    } <= pages.keys()
    assert "stale.html" not in pages


def test_every_internal_link_and_every_file_that_a_page_needs_is_there(site, pages):
    dead = []
    for name, page in pages.items():
        for address in [*page.links, *page.fetched]:
            parts = urlsplit(address)
            if parts.scheme or address == "#":
                continue
            target = (site / name).parent / unquote(parts.path) if parts.path else site / name
            if not target.is_file():
                dead.append((name, address))
            elif parts.fragment and target.suffix == ".html":
                other = pages[str(target.resolve().relative_to(site.resolve()))]
                if unquote(parts.fragment) not in other.ids:
                    dead.append((name, address))
    assert not dead


def test_any_host_serves_the_scripts_of_a_run_that_was_named_by_a_relative_path(site):
    for name in ("msunet.js", "try_it.js", "score.js", "msunet_v3.js", "msunet.css", "study.css"):
        assert (site / "_static" / name).stat().st_size > 500, name
    assert (site / ".nojekyll").is_file()  # without it GitHub Pages leaves out _static


def test_no_page_style_or_script_names_another_host_to_load_from(site, pages):
    assert [
        a for page in pages.values() for a in page.fetched if urlsplit(a).scheme not in ("", "data")
    ] == []
    for path in site.rglob("*.css"):
        assert not re.search(r"(@import|url\()\s*['\"]?(https?:)?//", path.read_text()), path
    for path in site.rglob("*.js"):
        assert not re.search(r"\b(fetch|importScripts|import)\(\s*['\"`]https?://", path.read_text()), path


def test_every_picture_says_what_it_shows(pages):
    images = [(name, image) for name, page in pages.items() for image in page.images]
    assert len(images) > 20
    told = [image.get("alt") or "" for _, image in images]
    assert min(map(len, told)) >= 5, [image for image in images if len(image[1].get("alt") or "") < 5]
    assert not [words for words in told if re.search(r"\.(png|svg)$|^Figure$|^0\d_\w+-\d+$", words)]


def test_every_page_of_a_toy_run_and_the_index_say_that_it_is_one(pages):
    for name in ("index.html", "run.html", *(f"{path.stem}.html" for path in NOTEBOOKS)):
        assert "A toy run" in pages[name].text and "synthetic images" in pages[name].text, name
    assert "A toy run" not in pages["shipped.html"].text


def test_the_front_page_begins_with_the_claims(pages):
    text = pages["index.html"].text
    assert text.index("The published claims") < text.index("The network that is shipped")
    for words in ("80.13 % top-1 at O3", "0.09853 M", "not testable here", "✓ reproduced", "36.5 M", "Wide"):
        assert words in text, words


def test_a_run_tells_how_it_was_made_and_offers_what_it_made(site, pages):
    text = pages["run.html"].text
    for words in ("make reproduce", "0123abc (clean)", "fingerprint f00d", "38.125", "5.0 minutes"):
        assert words in text, words
    assert "61 s" in pages["index.html"].text and "1,234 MiB" in pages["index.html"].text
    offered = {path.name for path in (site / "downloads").iterdir()}
    assert {
        "metrics.json",
        "provenance.json",
        "shipped_msunet_v3.safetensors",
        "shipped_train_history.csv",
    } <= offered
    assert {path.name for path in NOTEBOOKS} <= offered
    told = json.loads((site / "downloads" / "provenance.json").read_text())
    assert told["parameters"] == {"PROFILE": "smoke.yaml"}, "where this machine has it is nobody's business"


def test_a_page_leads_to_its_notebook_and_the_code_it_calls(pages):
    links = pages["05_scoring_walkthrough.html"].links
    assert "downloads/05_scoring_walkthrough.ipynb" in links
    assert "code/msunet_core.measure.scoring.html" in links
    assert "REFERENCE_PARAMS" in pages["code/msunet_core.measure.scoring.html"].text


def test_set_up_is_folded_formulas_are_mathml_and_figures_numbered(site, pages):
    page = (site / "01_data_and_cutmix.html").read_text()
    folded = re.findall(r"<details class=\"[^\"]*hide[^\"]*\">.*?</details>", page, re.DOTALL)
    assert any("PROFILE" in part for part in folded) and any("import" in part for part in folded)
    assert page.count("<math") >= 2 and "MathJax" not in page
    numbers = [int(n) for page in pages.values() for n in re.findall(r"Figure (\d+) ", page.text)]
    assert sorted(set(numbers)) == list(range(1, len(set(numbers)) + 1)) and len(set(numbers)) > 20


def test_the_site_is_small_enough_for_any_host(site):
    assert sum(path.stat().st_size for path in site.rglob("*") if path.is_file()) < 40e6


# -- in a browser ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def window(tmp_path_factory):
    opened = chromium.Browser(tmp_path_factory.mktemp("chromium"))
    yield opened
    opened.close()


@needs_browser
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [390, 1400])
def test_no_page_scrolls_sideways_complains_or_leaves_the_machine(window, site, width, dark):
    backgrounds = set()
    for path in sorted(site.glob("*.html")):
        window.open(path.as_uri(), width=width, dark=dark)
        wide = window.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        assert wide <= 0, f"{path.name} is {wide} pixels wider than {width}"
        assert window.complaints == [], path.name
        assert not [a for a in window.requests if urlsplit(a).scheme not in ("file", "data", "blob")], (
            path.name
        )
        broken = (
            "[...document.images].filter(i => i.complete && !i.naturalWidth && i.loading != 'lazy').length"
        )
        assert window.evaluate(broken) == 0, path.name
        colour = window.evaluate("getComputedStyle(document.body).backgroundColor")
        backgrounds.add(sum(map(float, re.findall(r"[\d.]+", colour)[:3])) < 200)
    assert backgrounds == {dark}


@needs_browser
def test_code_and_tables_scroll_in_their_box_on_a_phone(window, site):
    window.open((site / "05_scoring_walkthrough.html").as_uri(), width=390)
    clipped = window.evaluate(
        """[...document.querySelectorAll('article pre, article table, article figure img')].filter(e => {
            if (!e.getClientRects().length || e.getBoundingClientRect().right <= innerWidth) return false;
            for (let box = e.parentElement; box && box.tagName != 'ARTICLE'; box = box.parentElement)
                if (['auto', 'scroll'].includes(getComputedStyle(box).overflowX)) return false;
            return getComputedStyle(e).overflowX == 'visible';
        }).map(e => e.outerHTML.slice(0, 80))"""
    )
    assert clipped == []
    assert window.evaluate("parseFloat(getComputedStyle(document.querySelector('article p')).fontSize)") >= 14


@needs_browser
def test_the_search_works_from_the_file_system(window, site):
    window.open(f"{(site / 'search.html').as_uri()}?q=ternary", width=390)
    window.wait_for("document.querySelectorAll('#search-results li a').length > 3", 30)
    assert "02 · Ternary training" in window.text("#search-results")
    assert window.complaints == []
