"""Who cites the specification cites a section that it has."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).parent.parent
SPECIFICATION = ROOT / "docs" / "specification.md"
SECTIONS = set(re.findall(r"^## (\d+)\.", SPECIFICATION.read_text(), re.MULTILINE))
CITATION = re.compile(r"specification §(\d+)((?:(?:, | and | to )§\d+)*)", re.IGNORECASE)


def texts() -> dict[str, str]:
    """What is committed and can be read, by name."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    kinds = (".py", ".cpp", ".h", ".md", ".ipynb", ".yaml", ".js")
    return {
        n: (ROOT / n).read_text() for n in listed.splitlines() if n.endswith(kinds) and (ROOT / n).exists()
    }


def cited(text: str) -> list[str]:
    return [number for first, more in CITATION.findall(text) for number in (first, *re.findall(r"\d+", more))]


def test_citations_are_read_as_they_are_written():
    assert cited("(specification §3), Specification §5 to §8; specification §4 and §5") == [*"35845"]


def test_every_citation_names_a_section_that_exists():
    assert len(SECTIONS) == 10
    found = {name: cited(text) for name, text in texts().items()}
    assert sum(map(len, found.values())) > 30
    assert {name: odd for name, numbers in found.items() if (odd := set(numbers) - SECTIONS)} == {}


def test_nobody_cites_a_document_that_no_reader_has():
    old = re.compile("SPEC" + " (section|[0-9])")
    assert [name for name, text in texts().items() if old.search(text)] == []
