"""Settings of the documentation: ``python -m sphinx -W -b html docs OUT``, with the extra ``docs``, without a network.

Pages are Markdown that GitHub shows, too: they link to files of the repository, and write formulas as GitHub reads
them. This file translates both.

Environment:
    ECORE_INTERSPHINX  1 links names of Python, PyTorch and NumPy to their documentation; it needs a network.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any

import math_core
from docutils import nodes
from sphinx.util import logging

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]  # the operators of this checkout are the documented ones

project = "E-CORE"
author = "The E-CORE kernels authors"
project_copyright = author
release = re.findall(
    r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE
)[0]
version = release

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
if os.environ.get("ECORE_INTERSPHINX") == "1":
    extensions.append("sphinx.ext.intersphinx")
    intersphinx_mapping = {
        "python": ("https://docs.python.org/3", None),
        "torch": ("https://docs.pytorch.org/docs/stable", None),
        "numpy": ("https://numpy.org/doc/stable", None),
    }

myst_enable_extensions = ["dollarmath"]
myst_fence_as_directive = ["math"]
myst_heading_anchors = 4

autodoc_typehints = "none"  # signatures and docstrings have types and shapes
autodoc_member_order = "bysource"
napoleon_numpy_docstring = False

highlight_language = "none"  # of blocks that name none: most are output

html_theme = "furo"
html_title = f"E-CORE {release}"
html_math_renderer = "mathml"
html_copy_source = False
html_show_sourcelink = False

_logger = logging.getLogger(__name__)


# Links ----------------------------------------------------------------------------------------------------------------


def _standing_for() -> dict[Path, Path]:
    """Files outside this folder, each with the page that includes it."""
    pages = {}
    for page in DOCS.rglob("*.md"):
        for target in re.findall(r"^```\{include\} (\S+)$", page.read_text(encoding="utf-8"), re.MULTILINE):
            pages[(page.parent / target).resolve()] = page
    return pages


_PAGE_OF = _standing_for()
_LINK = re.compile(r"\[([^\[\]]*)\]\(([^()#\s]+)(#[^()\s]*)?\)")


def translate_links(text: str, file: Path, page: Path) -> str:
    """Return ``text`` of ``file`` with its links as they must be on ``page``.

    A link to a file that a page includes leads to that page, one to another file outside this folder to a copy for
    download. A folder has no place on the site: of its link the words stay. Links that lead nowhere are left as they
    are, and Sphinx reports them.
    """

    def translated(link: re.Match[str]) -> str:
        words, target, anchor = link.group(1), link.group(2), link.group(3) or ""
        if "://" in target:
            return link.group()
        path = (file.parent / target).resolve()
        if path.is_dir():
            return words
        if not path.exists():
            return link.group()
        return f"[{words}]({os.path.relpath(_PAGE_OF.get(path, path), page.parent)}{anchor})"

    return _LINK.sub(translated, text)


def _read_page(app: Any, docname: str, content: list[str]) -> None:
    page = Path(app.env.doc2path(docname))
    if page.suffix == ".md":
        content[0] = translate_links(content[0], page, page)


def _read_included(app: Any, path: Path, docname: str, content: list[str]) -> None:
    file = (DOCS / path).resolve()
    content[0] = translate_links(content[0], file, _PAGE_OF[file])


# Formulas -------------------------------------------------------------------------------------------------------------
# As MathML, which browsers draw themselves: MathJax and KaTeX would be scripts and fonts of another host.

_to_mathml = math_core.LatexToMathML(fancy_error=False).convert_with_local_state


def _visit_math(translator: Any, node: nodes.math | nodes.math_block) -> None:
    latex = node.astext().strip("`")  # GitHub's $`...`$
    try:
        mathml = _to_mathml(latex, displaystyle=isinstance(node, nodes.math_block))
    except math_core.LatexError as error:
        _logger.warning("%s: %s", latex, error, location=node)
        mathml = translator.encode(latex)
    translator.body.append(mathml)
    raise nodes.SkipNode


# Docstrings -----------------------------------------------------------------------------------------------------------


def _list_results(
    app: Any, what: str, name: str, documented: object, options: object, lines: list[str]
) -> None:
    """Make a list of a section ``Returns`` that names several results: Napoleon knows but one."""
    if "Returns:" not in lines:
        return
    first = lines.index("Returns:") + 1
    last = next((n for n in range(first, len(lines)) if lines[n][:1].strip()), len(lines))
    section = lines[first:last]
    if not section or not re.match(r"    \w+: ", section[0]):
        return
    results, indent = [":returns:"], 4
    for line in section:
        if result := re.fullmatch(r"    (\w+): (.*)", line):
            results.append(f"    - **{result[1]}** – {result[2]}")
            indent = 6
        elif re.match(r"    \S", line):  # of all results
            results += ["", line]
            indent = 4
        else:
            results.append(" " * indent + line.strip() if line.strip() else "")
    lines[first - 1 : last] = results


def setup(app: Any) -> None:
    app.connect("autodoc-process-docstring", _list_results, priority=400)  # before Napoleon's, at 500
    app.add_html_math_renderer("mathml", (_visit_math, None), (_visit_math, None))
    app.connect("source-read", _read_page)
    app.connect("include-read", _read_included)
