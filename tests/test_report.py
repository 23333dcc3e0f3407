"""The pages of a run: every notebook linked, every number and figure shown, nothing fetched or made up."""

from __future__ import annotations

import json

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from msunet_core.errors import StudyError
from msunet_core.study import report


@pytest.fixture
def run(tmp_path):
    """A run folder with two executed notebooks, and a failed one that is no result."""
    folder = tmp_path / "runs" / "smoke"
    folder.mkdir(parents=True)
    for name, title in (("01_data", "The data: `32 x 32` & more"), ("05_score", "The score")):
        output = new_output("stream", text=f"shown by {name}\n")
        cells = [new_markdown_cell(f"# {title}"), new_code_cell("run()", outputs=[output], execution_count=1)]
        nbformat.write(new_notebook(cells=cells), folder / f"{name}.ipynb")
    (folder / "03_prune.failed.ipynb").write_text("{}")
    return folder


def test_every_executed_notebook_gets_a_page_that_the_index_links(run):
    index = report.render_pages(run).read_text()
    assert sorted(path.name for path in run.glob("*.html")) == ["01_data.html", "05_score.html", "index.html"]
    assert '<a href="01_data.html">The data: 32 x 32 &amp; more</a>' in index
    page = (run / "05_score.html").read_text()
    assert "shown by 05_score" in page
    assert "<title>The score</title>" in page
    assert '<a href="index.html">' in page


def test_numbers_figures_and_provenance_are_on_the_index(run):
    metrics = {
        "score": 0.0108312345,
        "o3": {"top1": 80.13, "differs": False, "layers": [1, 2]},
        "best <>": None,
    }
    (run / "metrics.json").write_text(json.dumps(metrics))
    made = {
        "command": "make reproduce SEED=3",
        "git": {"commit": "abc123", "clean": True},
        "notebooks": {"05_score": {"wall_seconds": 61.4, "peak_memory_mb": 1234}},
    }
    (run / "provenance.json").write_text(json.dumps(made))
    (run / "figures").mkdir()
    (run / "figures" / "05_where_it_goes.png").write_bytes(b"")
    index = report.render_pages(run).read_text()
    for shown in (
        "0.0108312",
        "80.13",
        "<td>layers</td><td>1, 2</td>",
        "make reproduce SEED=3",
        "abc123",
        "61 s",
        "1,234 MiB",
        '<img src="figures/05_where_it_goes.png" alt="05 where it goes"',
    ):
        assert shown in index, shown


def test_the_index_needs_no_network_and_a_page_only_one_for_formulas(run):
    assert "http" not in report.render_pages(run).read_text()
    page = (run / "01_data.html").read_text()
    fetched = [part.split('"')[0] for part in page.split('src="')[1:] if part.startswith("http")]
    assert all("mathjax" in address for address in fetched), fetched


def test_a_run_without_a_notebook_and_a_broken_file_are_refused_in_a_line(run, tmp_path, capfd):
    assert report.main([str(tmp_path / "runs" / "none")]) == 1
    assert "make reproduce RUN=none" in capfd.readouterr().err
    (run / "metrics.json").write_text("{half")
    with pytest.raises(StudyError, match=r"metrics\.json is not JSON"):
        report.render_pages(run)
