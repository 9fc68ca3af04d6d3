"""Sphinx's settings for the book. tools/build_book.py copies this folder beside the pages and runs Sphinx there."""

from __future__ import annotations

import gc
import re
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.transforms import SphinxTransform

import aprillab

project = "aprillab"
author = "The aprillab authors"
copyright = "The aprillab authors; text and figures CC BY 4.0, code MIT"
release = version = aprillab.__version__
language = "en"

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax", "sphinx.ext.viewcode"]
exclude_patterns = ["extra"]
source_suffix = {".rst": "restructuredtext", ".md": "myst-nb", ".ipynb": "myst-nb"}
smartquotes = False

# Notebooks as they are committed: nothing runs here.
nb_execution_mode = "off"
nb_merge_streams = True
nb_mime_priority_overrides = [("html", "text/html", 0)]
nb_code_prompt_show, nb_code_prompt_hide = "Show the code", "Hide the code"  # of set-up and of drawings

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 6
myst_dmath_allow_labels = False

add_module_names = False
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
viewcode_follow_imported_members = False
napoleon_google_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False

# MathJax from the installed package, in one file: no network, neither here nor in the reader's browser.
mathjax_path = "mathjax/tex-svg-full.js"
mathjax3_config = {"svg": {"fontCache": "local", "scale": 0.95}}

html_theme = "furo"
html_title = "aprillab"
html_static_path = ["_static"]
html_css_files = ["book.css"]
html_domain_indices = False
html_search_scorer = str(Path(__file__).with_name("search_scorer.js"))
html_copy_source = False
html_show_sphinx = False
html_extra_path = ["extra"]


class Displayed(SphinxTransform):
    """Displayed formulas reach MathJax as they stand: wrapped anew, a ``\\tag`` would be inside ``split``."""

    default_priority = 500

    def apply(self, **_: Any) -> None:
        for node in list(self.document.findall(nodes.math_block)):
            if not node.get("no-wrap") and not node.get("nowrap"):
                node["no-wrap"] = node["nowrap"] = True
                node.children = [nodes.Text(f"\\[{node.astext().strip()}\\]")]
            if node["ids"]:  # the theme would write it twice
                node.parent.insert(node.parent.index(node), nodes.target(ids=node["ids"]))
                node["ids"] = []


SHORT = 40  # characters of TeX: a longer formula may fill a line of a telephone by itself


class Unbroken(SphinxTransform):
    """No line ends between a short formula and the comma behind it, or the bracket before it."""

    default_priority = 500

    def apply(self, **_: Any) -> None:
        for node in list(self.document.findall(nodes.math)):
            if len(node.astext()) > SHORT:
                continue
            parent, at = node.parent, node.parent.index(node)
            behind = parent[at + 1] if at + 1 < len(parent) else None
            before = parent[at - 1] if at else None
            mark = re.match(r"[^\s\w(\[–—-]+", behind.astext()) if isinstance(behind, nodes.Text) else None
            bracket = re.search(r"[(\[]+$", before.astext()) if isinstance(before, nodes.Text) else None
            if not mark and not bracket:
                continue
            kept = nodes.inline(classes=["unbroken"])
            if mark:
                parent.replace(behind, nodes.Text(behind.astext()[mark.end() :]))
            if bracket:
                parent.replace(before, nodes.Text(before.astext()[: bracket.start()]))
            parent.replace(node, kept)
            kept += [nodes.Text(bracket[0])] if bracket else []
            kept += node
            kept += [nodes.Text(mark[0])] if mark else []


class TypesInWords(SphinxTransform):
    """A type told in words, ``tensor of labels``, refers to nothing, although some attribute is called ``labels``."""

    default_priority = 500

    def apply(self, **_: Any) -> None:
        for node in list(self.document.findall(addnodes.pending_xref)):
            in_words = not re.fullmatch(r"(\w+\.)*[A-Z]\w*[a-z]\w*", node.get("reftarget", ""))
            if node.get("refdomain") == "py" and node.get("reftype") == "class" and in_words:
                node.replace_self(node.children)


def as_written(_app: Sphinx, _what: str, _name: str, _object: object, _options: object, lines: list[str]) -> None:
    """Docstrings are written to be read as they stand: blocks of formulas stay so, and |x| is an absolute value."""
    literal, sections, out = False, False, list[str]()
    for number, line in enumerate(lines):
        before = lines[number - 1].strip() if number else ""
        sections |= re.fullmatch(r"-{3,}", line.strip()) is not None  # NumPy's: what they indent is no block
        if line.strip() and not line.startswith(" "):
            literal = False
        elif line.strip() and not before and not sections and not _within_list(lines[:number]):
            last = next((text for text in reversed(out) if text.strip()), "")
            if not literal and last and not last.endswith("::"):
                out += ["::", ""]
            literal = True
        code = literal or line.lstrip().startswith((">>>", "..."))
        out.append(line if code else re.sub(r"(``.*?``)|\|", lambda match: match[1] or r"\|", line))
    lines[:] = out


def _within_list(lines: list[str]) -> bool:
    """Whether the last line at the margin begins an item of a list, whose next lines may be indented."""
    margin = next((line for line in reversed(lines) if line.strip() and not line.startswith(" ")), "")
    return re.match(r"(?:[-*•]|\d+\.) ", margin) is not None


def setup(app: Sphinx) -> None:
    gc.disable()  # a build ends before its garbage matters, and takes a quarter less time
    app.add_transform(Displayed)
    app.add_transform(Unbroken)
    app.add_transform(TypesInWords)
    app.connect("autodoc-process-docstring", as_written, priority=400)
