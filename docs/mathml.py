"""Formulas as MathML, which browsers draw themselves: no script, no font and no network."""

from __future__ import annotations

import re
from html import escape
from typing import Any

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.application import Sphinx


def _inline(self: Any, node: nodes.math) -> None:
    self.body.append(f'<span class="math">{convert(node.astext())}</span>')
    raise nodes.SkipNode


def _numbered(formula: str) -> tuple[str, str]:
    r"""A formula without its ``\tag{number}``, and the number."""
    found = re.search(r"\s*\\tag\{([^}]*)\}", formula)
    return (formula, "") if found is None else (formula.replace(found[0], ""), found[1])


def _display(self: Any, node: nodes.math_block) -> None:
    formula, number = _numbered(node.astext())
    self.body.append(f'<div class="math" tabindex="0">{convert(formula, display="block")}')
    if number := number or node["number"]:
        self.body.append(f'<span class="eqno">({escape(str(number))})</span>')
    self.body.append("</div>")
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_html_math_renderer("mathml", (_inline, None), (_display, None))
    app.config["html_math_renderer"] = "mathml"
    return {"parallel_read_safe": True}
