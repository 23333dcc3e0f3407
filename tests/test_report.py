"""The pages of a run, piece by piece: what they say, what they fold away, whom they trust."""

from __future__ import annotations

import base64
import json
from io import BytesIO

import matplotlib.pyplot as plt
import nbformat
import pytest
from markdown_it import MarkdownIt
from matplotlib.figure import Figure
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from msunet_core.errors import StudyError
from msunet_core.files import ROOT
from msunet_core.study import pages, report
from msunet_core.study.alt_text import describe, title_of
from msunet_core.study.profile import load_profile

HOSTILE = '<script>alert(1)</script> `x` *y* $z^2$ {raw} [a](b) "q" \\n |'


def picture(**metadata):
    """An output with a picture of 20 x 10 pixels."""
    content = BytesIO()
    figure = Figure(figsize=(2, 1), dpi=10)
    figure.savefig(content, format="png")
    data = {"image/png": base64.b64encode(content.getvalue()).decode(), "text/plain": "<Figure>"}
    return new_output("display_data", data=data, metadata={"image/png": metadata} if metadata else {})


def said(words):
    return new_output("stream", text=words)


def made(tmp_path, *cells):
    notebook = new_notebook(cells=[new_markdown_cell("# The title"), *cells])
    return pages.site_notebook(notebook, "05_score", "The note.", tmp_path).cells[1:-1]


def test_any_text_shows_as_itself():
    shown = MarkdownIt("commonmark").render(pages.text(HOSTILE))
    assert "<script>" not in shown and "<em>" not in shown and "<a" not in shown and "<code>" not in shown
    assert shown.strip() == (
        "<p>&lt;script&gt;alert(1)&lt;/script&gt; `x` *y* $z^2$ {raw} [a](b) &quot;q&quot; \\n |</p>"
    )
    assert "\n" not in pages.text("two\nlines\n\n# no heading")


def test_a_table_holds_numbers_to_six_digits_and_no_markup_of_a_name():
    shown = pages.table(("name", "value"), [(HOSTILE, 0.0108312345), ("many", 1234567)], numbers=1)
    assert "<script>" not in shown
    assert '<td class="number">0.0108312</td>' in shown and '<td class="number">1,234,567</td>' in shown


def test_a_link_into_the_documentation_leads_to_its_page_on_the_site(tmp_path):
    cells = made(tmp_path, new_markdown_cell("More in [speed](../docs/speed.md) and [05](05.ipynb)."))
    assert "More in [speed](speed.md) and [05](05.ipynb)." in [cell.source for cell in cells]


def test_set_up_is_folded_and_what_follows_is_not(tmp_path):
    cells = made(
        tmp_path,
        new_code_cell("SEED = 0", metadata={"tags": ["parameters"]}),
        new_code_cell("SEED = 1", metadata={"tags": ["injected-parameters"]}),
        new_code_cell("import torch\nx = 1"),
        new_code_cell("print(x)"),
        new_code_cell("import late"),
    )
    assert cells[0].source == "The note."
    folded = [cell.source for cell in cells[1:] if "hide-input" in cell.metadata.get("tags", ())]
    assert folded == ["SEED = 0", "SEED = 1", "import torch\nx = 1"]


def test_a_picture_becomes_a_figure_in_its_place_among_the_outputs(tmp_path):
    outputs = [
        said("before"),
        picture(width=50, alt="A line rises.", title="It rises"),
        said("after"),
        picture(),
    ]
    cells = made(tmp_path, new_code_cell("draw(title='Shown')", outputs=outputs))[1:]
    assert [cell.cell_type for cell in cells] == ["code", "markdown", "code", "markdown"]
    assert [cell.outputs[0].text for cell in cells[::2]] == ["before", "after"]
    assert "remove-input" in cells[2].metadata["tags"] and "remove-input" not in cells[0].metadata["tags"]
    first, second = cells[1].source, cells[3].source
    assert ':alt: "A line rises."' in first and "It rises" in first and ":width: 50px" in first
    assert ':alt: "Shown"' in second and ":width: 20px" in second  # from the code, and the file's own size
    for number in (1, 2):
        assert (tmp_path / f"05_score-{number}.png").read_bytes().startswith(b"\x89PNG")


def test_a_live_line_of_training_is_no_result(tmp_path):
    live = new_output(
        "display_data", data={"text/plain": "train epoch 3/3, loss 4.1, step 138 of 138, 0:00 left"}
    )
    cells = made(tmp_path, new_code_cell("train()", outputs=[live, said("top-1 38 %")]))
    assert [output.get("text") for output in cells[1].outputs] == ["top-1 38 %"]


def test_a_picture_without_a_word_is_named_after_its_section(tmp_path):
    cells = made(tmp_path, new_markdown_cell("## Training"), new_code_cell("draw()", outputs=[picture()]))
    assert ':alt: "A picture to: Training"' in cells[3].source


def test_the_author_of_a_notebook_has_the_last_word_on_a_picture(tmp_path):
    own = {"mystnb": {"figure": {"caption": "With $\\alpha$"}, "image": {"alt": "Mine"}}}
    cell = new_code_cell("draw()", outputs=[picture(alt="Theirs", title="T")], metadata=own)
    source = made(tmp_path, cell)[2].source
    assert "With $\\alpha$" in source and ':alt: "Mine"' in source


def test_a_caption_of_a_hostile_name_ends_no_directive(tmp_path):
    cell = new_code_cell("draw()", outputs=[picture(title="```\n# gone\n:alt: x", alt='a"\n:name: b')])
    lines = made(tmp_path, cell)[2].source.splitlines()
    assert [line for line in lines if line.startswith("```")] == [lines[0], "```"]
    assert not [line for line in lines if line.startswith("#")]
    assert sum(line.startswith((":alt:", ":name:")) for line in lines) == 2


def test_the_modules_that_a_notebook_calls_are_those_that_define_what_it_imports():
    source = "from msunet_core import train, score\nfrom msunet_core.data import cutmix\n"
    source += "from msunet_core.model.ternary import ALPHA"
    found = pages.modules_of(new_notebook(cells=[new_code_cell(source), new_code_cell("%magic")]))
    assert found == [
        "msunet_core.training.stages",
        "msunet_core.measure.scoring",
        "msunet_core.data.cutmix",
        "msunet_core.model.ternary",
    ]


def test_a_toy_says_so_in_words_and_the_full_study_does_not():
    toy = load_profile("smoke")
    said = pages.run_statement(toy, "smoke")
    assert "A toy run" in said
    assert "synthetic images, at most 30 of each class, a network of 0.125 times the published width" in said
    assert load_profile("cpu", limit=5).shortfalls() == ["at most 5 of each class"]
    assert load_profile("paper").shortfalls() == []
    assert "toy" not in pages.run_statement(load_profile("paper"), "paper").replace("class: note real", "")
    assert "How this run was made is not recorded" in pages.run_statement(pages.profile_of_run({}), "run")
    assert pages.profile_of_run({"parameters": {"PROFILE": "gone.yaml"}}) is None


def test_a_page_tells_paths_from_the_checkout(tmp_path):
    path = tmp_path / "07_page.ipynb"
    printed = said(f"{ROOT}/runs/smoke/x.safetensors was altered")
    nbformat.write(new_notebook(cells=[new_code_cell("print()", outputs=[printed])]), path)
    assert report._notebook(path).cells[0].outputs[0].text == "runs/smoke/x.safetensors was altered"


def test_provenance_is_told_without_the_folders_of_a_machine():
    told = pages.provenance_table(
        {
            "command": "make reproduce DATA=/home/me/cifar100.npz",
            "parameters": {"DATA": "/home/me/cifar100.npz"},
            "git": {"commit": "abc123", "clean": False},
            "hardware": {"cpu": "A <CPU>", "cores": 2, "memory_gib": 4, "gpu": None},
            "wall_seconds": 7200,
        },
        {"data": {"source": "cifar100.npz", "fingerprint": "f00d"}},
    )
    assert "/home/me" not in told and "DATA=cifar100.npz" in told
    for words in (
        "abc123 (with changes that are not committed)",
        "fingerprint f00d",
        "2.0 hours",
        "A &lt;CPU&gt;",
    ):
        assert words in told, words


def test_a_figure_is_described_by_what_it_holds():
    figure, (left, right) = plt.subplots(1, 2)
    left.plot([1, 2, 3], [4.0, 2.0, 3.0], label="training")
    left.axhline(3, label="published")
    left.set(title="Does it fall?", xlabel="epoch", ylabel="loss")
    right.bar(["a", "b"], [1, 2.5])
    words = describe(figure)
    for part in (
        "Does it fall?",
        "loss against epoch",
        "training goes from 4 to 3 within 2 to 4",
        "a 1, b 2.5",
    ):
        assert part in words, words
    assert "published" in words and title_of(figure) == "Does it fall?"
    sheet, axes = plt.subplots(2, 5)
    for number, ax in enumerate(axes.flat):
        ax.imshow([[0, 1]])
        ax.set_title(f"class {number}")
    sheet.suptitle("One of each")
    assert describe(sheet).startswith("One of each. 10 images: class 0, class 1")
    plt.close("all")


def test_a_folder_without_a_notebook_and_broken_files_are_refused_in_a_line(tmp_path, capfd):
    run = tmp_path / "none"
    run.mkdir()
    (run / "03_prune.failed.ipynb").write_text("{}")
    assert report.main([str(run)]) == 1
    assert "make reproduce RUN=none" in capfd.readouterr().err
    (run / "01_data.ipynb").write_text("{half")
    with pytest.raises(StudyError, match=r"01_data\.ipynb is not a notebook"):
        report.build_site(run)
    nbformat.write(new_notebook(), run / "01_data.ipynb")
    (run / "metrics.json").write_text("{half")
    with pytest.raises(StudyError, match=r"metrics\.json is not JSON"):
        report.build_site(run)
    assert sorted(path.name for path in run.iterdir()) == [
        "01_data.ipynb",
        "03_prune.failed.ipynb",
        "metrics.json",
    ]


@pytest.mark.parametrize("name", ["<img src=x onerror=y>", 'a"b', "a b", "[a](b)", "a*"])
def test_a_notebook_whose_name_is_no_plain_word_is_no_page(tmp_path, name):
    nbformat.write(new_notebook(), tmp_path / f"{name}.ipynb")
    with pytest.raises(StudyError, match="rename it"):
        report.build_site(tmp_path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("provenance.json", {"parameters": 3}),
        ("provenance.json", {"notebooks": {"01_a": 3}}),
        ("provenance.json", {"packages": "x"}),
        (
            "01_a.ipynb",
            {"nbformat": 4, "nbformat_minor": 5, "metadata": {}, "cells": [{"cell_type": "code"}]},
        ),
        ("01_a.ipynb", {"nbformat": 4, "nbformat_minor": 5, "metadata": {}, "cells": 3}),
    ],
)
def test_what_no_run_writes_is_refused_in_one_line(tmp_path, monkeypatch, name, content):
    monkeypatch.setattr(report, "_render", lambda source, out: None)
    nbformat.write(new_notebook(cells=[new_markdown_cell("# One")]), tmp_path / "01_a.ipynb")
    (tmp_path / name).write_text(json.dumps(content))
    with pytest.raises(StudyError, match=r"run (its notebooks|it) again") as refused:
        report.build_site(tmp_path)
    assert str(refused.value).isprintable()


def test_json_too_deep_to_read_is_refused_in_one_line(tmp_path):
    (tmp_path / "metrics.json").write_text("[" * 100_000)
    with pytest.raises(StudyError, match=r"metrics.json is not JSON"):
        report._read(tmp_path / "metrics.json")


def test_a_page_that_breaks_sphinx_is_one_line(tmp_path, monkeypatch):
    def broken(*_):
        raise AttributeError("no attribute\nof two lines")

    monkeypatch.setattr("sphinx.application.Sphinx", broken)
    with pytest.raises(StudyError, match="cannot be built: no attribute; correct that page"):
        report._render(tmp_path, tmp_path / "out")


def test_a_place_that_nothing_fills_is_named(tmp_path):
    (tmp_path / "index.md").write_text("# A\n\n{{ clams }}\n")
    with pytest.raises(StudyError, match=r"docs/index\.md has a place 'clams'"):
        report._fill(tmp_path, {"claims": ""})
