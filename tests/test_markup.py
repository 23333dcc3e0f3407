"""What a notebook brings to a page shows and does not run. `make faults` opens such pages in a browser."""

from __future__ import annotations

import pytest
from docutils import nodes
from docutils.utils import new_document
from sphinx.addnodes import download_reference, toctree

from msunet_core.study.markup import harmless, tame

DOT = "data:image/png;base64,AAAA"


@pytest.mark.parametrize(
    "markup",
    [
        '<table class="dataframe"><thead><tr><th scope="col">a</th></tr></thead></table>',
        '<a href="downloads/a.ipynb" download="">a &amp; b</a>',
        '<a href="https://example.org/?a=1&amp;b=2#c">x</a>',
        f'<img src="{DOT}" alt="a &lt; b">',
        '<img src="figures/a.png">',
        "<details><summary>more</summary>x</details>",
        "</a>",
    ],
)
def test_what_shows_text_tables_and_pictures_stays_as_it_is(markup):
    assert harmless(markup) == markup


@pytest.mark.parametrize(
    ("markup", "kept"),
    [
        ("a<script>b</script>c", "ac"),
        ("<style>@import 'x'</style>c", "c"),
        ("<svg><svg>a</svg><script>b</script></svg>c", "c"),
        ("<svg/onload=x>", ""),
        ("<!--><script>x</script>-->a", "a"),
        ("<form action=javascript:x><button>a</button>", "a"),
        ("<b onclick=x style=y id=z>a</b>", "<b>a</b>"),
        ("<details open ontoggle=x>", "<details>"),
        ("<a href=javascript:x>a</a>", "<a>a</a>"),
        ('<a href="java\tscript:x">a</a>', "<a>a</a>"),
        ("<a href=' &#1;javascript&colon;x'>a</a>", "<a>a</a>"),
        ("<a title='\"><img src=x onerror=y>'>", '<a title="&quot;&gt;&lt;img src=x onerror=y&gt;">'),
        ("<img src=//elsewhere/a.png>", "<img>"),
        ("<img src='/\t/elsewhere/a.png'>", "<img>"),
        ("<img src=http://elsewhere/a.png>", "<img>"),
        ("<img src=../../a.png>", "<img>"),
        ("<img src='data:image/svg+xml,<svg onload=x>'>", "<img>"),
    ],
)
def test_what_runs_or_fetches_goes_and_the_text_stays(markup, kept):
    assert harmless(markup) == kept


@pytest.mark.parametrize(
    "markup", ["<img src=x onerror=y", "<title><script></title><img src=x", "<", "<!", "<![CDATA[<b"]
)
def test_what_is_cut_off_becomes_no_element(markup):
    assert "<" not in harmless(markup)


def test_a_notebook_as_a_tree_keeps_its_text_and_nothing_that_acts():
    tree = new_document("notebook")
    image = nodes.image(uri="http://elsewhere/a.png", alt="words")
    good = nodes.image(uri="figures/a.png")
    link = nodes.reference("", "follow", refuri="javascript:x")
    outside = nodes.reference("", "outside", refuri="https://example.org")
    raw = nodes.raw("", "<b onclick=x>bold</b><script>x</script>", format="html")
    page = nodes.meta(content="0;url=javascript:x")
    contents = toctree(entries=[("x", "javascript://%0ax")])
    download = download_reference("", "secret", reftarget="/../secret")
    tree += [
        nodes.paragraph("", "", each) for each in (image, good, link, outside, raw, page, contents, download)
    ]
    tame(tree)
    assert [node["uri"] for node in tree.findall(nodes.image)] == ["figures/a.png"]
    assert [node["refuri"] for node in tree.findall(nodes.reference)] == ["https://example.org"]
    assert [node.astext() for node in tree.findall(nodes.raw)] == ["<b>bold</b>"]
    for kind in (nodes.meta, toctree, download_reference):
        assert not list(tree.findall(kind))
    assert tree.astext().split() == ["words", "follow", "outside", "<b>bold</b>", "secret"]
