"""How Sphinx renders the site of a run; msunet_core.study.report stages the pages and calls it.

Everything a page needs lies beside it: no font, script or style comes from another host, formulas are MathML
made now, and the search index is a script, so that all of it works from the file system.
"""

import re

from docutils.nodes import SkipNode
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.util import logging

from msunet_core.study.markup import tame

project = "MSUNet-v3: a reproduction study"
author = "the authors of this study"
language = "en"

extensions = ["myst_nb"]
nb_execution_mode = "off"
nb_ipywidgets_js = {}  # would be fetched; no notebook has widgets
nb_merge_streams = True
myst_enable_extensions = ["colon_fence", "dollarmath", "amsmath", "attrs_inline", "deflist"]
myst_heading_anchors = 3

numfig = True
numfig_format = {"figure": "Figure %s"}
highlight_language = "python"
suppress_warnings = ["mystnb.unknown_mime_type"]

html_theme = "furo"
html_title = project
html_static_path = ["_static"]
html_css_files = ["study.css"]
html_favicon = "_static/favicon.svg"
html_show_sourcelink = html_copy_source = False
html_show_search_summary = False  # it fetches pages, which a browser refuses on the file system
html_show_copyright = html_use_index = False
html_domain_indices = False
html_math_renderer = "mathml"
pygments_style, pygments_dark_style = "default", "monokai"


def _mathml(self, node, as_block: bool) -> str:
    # docutils knows \\bigl( and not the plain \\big(.
    formula = re.sub(r"\\([bB]igg?)(?![a-zA-Z])", r"\\\1l", node.astext())
    try:
        return tex2mathml(formula, as_block=as_block)
    except Exception as error:  # MathError, or whatever a formula that is none makes of it
        logging.getLogger(__name__).warning("formula %r: %s", node.astext(), error, location=node)
        return f"<code>{self.encode(node.astext())}</code>"


def _inline(self, node):
    self.body.append(_mathml(self, node, False))
    raise SkipNode


def _block(self, node):
    self.body.append(f'<div class="math">{_mathml(self, node, True)}</div>\n')
    raise SkipNode


def _notebooks_run_nothing(app, doctree):
    if app.env.doc2path(app.env.docname).suffix == ".ipynb":
        tame(doctree)


def _include_no_file(app):
    app.env.settings["file_insertion_enabled"] = False


def setup(app):
    """Formulas as MathML, which every current browser draws itself; notebooks as if from a stranger."""
    app.connect("builder-inited", _include_no_file)
    app.connect("doctree-read", _notebooks_run_nothing, priority=0)  # before Sphinx copies what they name
    app.add_html_math_renderer("mathml", (_inline, None), (_block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
