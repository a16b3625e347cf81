"""How Sphinx builds these pages: ``tox -e docs``.

All pages but those in ``api/`` are plain reStructuredText, and their links are relative paths, so that they can be read
on the repository's own page as well. `_follow_links` makes these links work in what Sphinx builds.
"""

from __future__ import annotations

import os
from pathlib import Path

import click
from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx

import ndcache

project = "ndcache"
author = "The ndcache authors"
version = release = ndcache.__version__

extensions = ["sphinx.ext.autodoc", "sphinx.ext.autosummary", "numpydoc", "sphinx_click"]
# autosummary is here for its role, `autolink`; it generates no pages.
autosummary_generate = False
default_role = "autolink"
# Messages are found by their words as they are printed.
smartquotes = False
# The docstrings say the types, and what they mean.
autodoc_typehints = "none"
autodoc_member_order = "bysource"
numpydoc_show_class_members = False
# The pages need no cluster.
autodoc_mock_imports = ["distributed", "ray"]
nitpicky = True
# What other projects document, which is not looked up (that would need a network), and attributes named in their class.
nitpick_ignore_regex = [
    ("py:.*", r"(numpy|wgpu|distributed|requests|threading|logging|pathlib|collections|typing)\..+")
]
nitpick_ignore = [("py:obj", "nbytes")]

# Quotation marks and ellipses, but no dashes: the commands' own texts name options such as --json.
smartquotes_action = "qe"

html_theme = "alabaster"
html_theme_options = {
    "page_width": "1100px",
    "description": "Model weights from a URL",
}
html_copy_source = False

_DOCS = Path(__file__).parent
_ROOT = _DOCS.parent
#: The pages that stand for files outside this folder.
_PAGES = {
    "README.rst": "index",
    "CHANGELOG.rst": "changelog",
    "CONTRIBUTING.rst": "contributing",
    "SECURITY.rst": "security",
}


def _page_of(path: str) -> str | None:
    """Return the page that shows a file of the repository, or None if there is none."""
    if path in _PAGES:
        return _PAGES[path]
    is_page = path.startswith("docs/") and path.endswith(".rst")
    return path.removeprefix("docs/").removesuffix(".rst") if is_page else None


def _source_of(node: nodes.Node, page: str) -> Path:
    """Return the file that a node was written in, which is another one than the page's if that includes it."""
    while node is not None and not node.source:
        node = node.parent
    return Path(node.source) if node is not None and os.path.isfile(node.source) else _DOCS / page


def _follow_links(app: Sphinx, doctree: nodes.document) -> None:
    """Turn relative links to files of the repository into links to pages, or to copies of the files."""
    page = app.env.docname
    for link in list(doctree.findall(nodes.reference)):
        target = link.get("refuri", "").partition("#")[0]
        if not target or "://" in target or target.startswith("mailto:"):
            continue
        file = os.path.normpath(_source_of(link, f"{page}.rst").parent / target)
        name = os.path.relpath(file, _ROOT).replace(os.sep, "/")
        if (other := _page_of(name)) is not None:
            new: nodes.Element = addnodes.pending_xref(
                "", refdomain="std", reftype="doc", refdoc=page, reftarget=f"/{other}", refexplicit=True, refwarn=True
            )
        else:
            relative = os.path.relpath(file, (_DOCS / page).parent)
            new = addnodes.download_reference("", refdoc=page, reftarget=relative, refexplicit=True, refwarn=True)
        new.source, new.line = link.source, link.line
        new += nodes.inline("", "", *link.children)
        link.replace_self(new)


def _escape_stars(app: Sphinx, context: click.Context, lines: list[str]) -> None:
    """Keep the asterisks of a command's help, which is plain text."""
    lines[:] = [line.replace("*", r"\*") for line in lines]


def setup(app: Sphinx) -> None:
    """Register what this file adds to Sphinx."""
    app.connect("doctree-read", _follow_links, priority=100)
    app.connect("sphinx-click-process-description", _escape_stars)
