"""The formulas in the docstrings of methods, typeset on the methods' pages.

A docstring is read in a terminal too (``dtrp methods``), so it has them in the letters of the code: ``w_k(b+1) = w_k(b) - eta *
grad_k f_b``. On a page an update becomes a line of its own, and what is shorter stays in its sentence.
"""

from __future__ import annotations

import re
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx

_IS_FORMULA = re.compile(r"w'?_|ceil\(|out_k = |gamma\*\*")
_RULES = [
    (r"\(d (.+) / d (\w+)\)\^T", r"\\left(\\frac{\\partial \1}{\\partial \2}\\right)^{\\top}"),
    (r"ceil\(((?:[^()]|\([^()]*\))*)\)", r"\\lceil \1 \\rceil"),
    (r"(\w+)\*\*(\w)", r"\1^{\2}"),
    (r"\bgrad(?=_|\b)", r"\\nabla"),
    (r"_\(([^()]*)\)", r"_{\1}"),
    (r"\bw'_(\w)", r"\\hat w_\1"),
    (r"\b(eta|beta|gamma)(?![a-z])", r"\\\1"),
    (r"\b(out|aux|mean)(?=_|\(|\b)", r"\\mathrm{\1}"),
    (r"\bl\(", r"\\ell("),
    (r" \* ", r"\\, "),
]


def latex(text: str) -> str | None:
    """A formula in the code's letters as LaTeX; None for what is code."""
    if not _IS_FORMULA.match(text):
        return None
    for pattern, form in _RULES:
        text = re.sub(pattern, form, text)
    return text


def typeset(app: Sphinx, doctree: nodes.document) -> None:
    """Replace formulas that are written as code."""
    if not app.env.docname.startswith("docs/methods/"):
        return
    for code in list(doctree.findall(nodes.literal)):
        written = latex(" ".join(code.astext().split()))
        if written is None:
            continue
        if "w_k(b+1)" in code.astext() and isinstance(code.parent, nodes.paragraph):
            _on_its_own_line(code, written)
        else:
            code.replace_self(nodes.math(written, written))


def _on_its_own_line(code: nodes.literal, written: str) -> None:
    """Divide the paragraph of a formula; a mark that follows it stays with it."""
    paragraph = code.parent
    at = paragraph.index(code)
    before, after = paragraph.children[:at], paragraph.children[at + 1 :]
    if after and isinstance(after[0], nodes.Text) and (mark := re.match(r"[,.:;]", after[0].astext())):
        written += rf"\,\text{{{mark[0]}}}"
        after[0] = nodes.Text(after[0].astext()[1:].lstrip())
    block = nodes.math_block(written, written, number=None, label=None, nowrap=False, docname="")
    parts: list[nodes.Node] = [nodes.paragraph("", "", *before), block]
    parts += [nodes.paragraph("", "", *after)] if "".join(node.astext() for node in after).strip() else []
    paragraph.replace_self(parts)


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("doctree-read", typeset)
    return {"parallel_read_safe": True}
