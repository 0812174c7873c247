"""The README on the site: its grids as pictures, and its picture of results in the light or dark of the page."""

from __future__ import annotations

import re
from typing import Any

from sphinx.application import Sphinx

_GRIDS = re.compile(r"<!-- grids -->\n```text\n(.*?)```\n", re.S)
_HEAD = re.compile(r"^(\S+): stages (\d+), mini-batches (\d+), micro-batches in each (\d+)$", re.M)
_PICTURE = re.compile(
    r'<picture>\s*<source [^>]*srcset="([^"]+)"[^>]*>\s*<img [^>]*alt="([^"]+)"[^>]*src="([^"]+)"[^>]*>\s*</picture>'
)


def for_the_site(text: str) -> str:
    """The README's Markdown with what GitHub shows in its way put in the site's."""
    grids = _GRIDS.search(text)
    if grids is not None:
        form = "```{{grid}} {}\n:stages: {}\n:minibatches: {}\n:microbatches: {}\n```\n"
        text = text.replace(grids[0], "\n".join(form.format(*head) for head in _HEAD.findall(grids[1])))
    return _PICTURE.sub(r"![\2](\3){.only-light}\n![\2](\1){.only-dark}", text)


def _read(app: Sphinx, docname: str, source: list[str]) -> None:
    if docname == "README":
        source[0] = for_the_site(source[0])


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("source-read", _read)
    return {"parallel_read_safe": True}
