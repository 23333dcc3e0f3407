"""HTML that a notebook brings along, made harmless: what shows text, tables and pictures stays, nothing runs.

A run folder may come from a stranger, and names of classes from one more. Whatever of a notebook reaches a
page as HTML (outputs, Markdown, directives) passes :func:`tame`: docs/conf.py calls it at the one place where
all of it has the same form, the tree that Sphinx has read.
"""

from __future__ import annotations

import html
import re
from html.parser import HTMLParser

from docutils import nodes
from sphinx.addnodes import download_reference, toctree

TAGS = re.compile(
    "a|b|blockquote|br|caption|code|dd|del|details|div|dl|dt|em|h[1-6]|hr|i|img|ins|kbd|li|mark|ol|p|pre|s|small"
    "|span|strong|sub|summary|sup|table|tbody|td|tfoot|th|thead|tr|u|ul|var"
)
ATTRIBUTES = re.compile("alt|class|colspan|download|height|href|rowspan|scope|src|title|width")
# Between their tags stands no text for a reader, or what is text for one browser and markup for another.
SILENT = re.compile(
    "embed|iframe|math|noembed|noframes|noscript|object|plaintext|script|style|svg|template|textarea|title|xmp"
)
LINK = re.compile(r"https?://|mailto:|[^:]*$")  # of its scheme, or relative
# Embedded, or beside the page: a path that stays there.
PICTURE = re.compile(r"data:image/(png|jpeg|gif|webp);base64,[A-Za-z0-9+/=\s]*$|(?!/|.*\.\.)[^:\\\0-\x20]*$")


def harmless(markup: str) -> str:
    """HTML put together anew from the tags, attributes and addresses above and from the text between them.

    Nothing is passed through as it was written, so it does not matter how a browser would have read it.
    A piece that only opens or closes an element stays one.
    """
    kept = _Kept()
    kept.feed(markup)
    kept.close()
    return "".join(kept.parts)


class _Kept(HTMLParser):
    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self.silent: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if SILENT.fullmatch(tag):
            self.silent.append(tag)
        elif TAGS.fullmatch(tag) and not self.silent:
            told = "".join(
                f' {name}="{html.escape(value or "")}"' for name, value in attributes if _fits(name, value)
            )
            self.parts.append(f"<{tag}{told}>")

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if not SILENT.fullmatch(tag):
            self.handle_starttag(tag, attributes)

    def handle_endtag(self, tag: str) -> None:
        if tag in self.silent:
            del self.silent[self.silent.index(tag) :]
        elif TAGS.fullmatch(tag) and not self.silent:
            self.parts.append(f"</{tag}>")

    def handle_data(self, data: str) -> None:
        if not self.silent:
            self.parts.append(html.escape(data))


def _fits(name: str, value: str | None) -> bool:
    address = {"href": LINK, "src": PICTURE}.get(name)
    return ATTRIBUTES.fullmatch(name) is not None and (
        address is None or address.match((value or "").strip()) is not None
    )


def tame(doctree: nodes.document) -> None:
    """The same for a notebook as docutils has read it, with what directives can do besides.

    Links that run something, pictures from elsewhere, downloads of other files, contents and headers of the
    page go; what they showed as text stays.
    """
    for raw in list(doctree.findall(nodes.raw)):
        raw.replace_self(
            nodes.raw("", harmless(raw.astext()), format="html") if "html" in raw["format"] else []
        )
    for link in list(doctree.findall(nodes.reference)):
        if not LINK.match(link.get("refuri", "").strip()):
            link.replace_self(link.children)
    for picture in list(doctree.findall(nodes.image)):
        if not PICTURE.match(picture["uri"].strip()):
            picture.replace_self(nodes.Text(picture.get("alt", "")))
    for kind in (nodes.meta, toctree):
        for node in list(doctree.findall(kind)):
            node.parent.remove(node)
    for download in list(doctree.findall(download_reference)):
        download.replace_self(download.children)
