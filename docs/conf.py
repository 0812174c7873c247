"""The documentation site: Sphinx over the repository's Markdown, so that a link that works in the source works here.

``sphinx-build -c docs . build/docs`` takes the repository for its sources. Pages need no network: the theme brings its own files,
pictures are SVG in the page, and formulas are MathML.
"""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

import dtrp  # noqa: E402

project = "dtrp"
author = "the authors of dtrp"
version = release = dtrp.__version__
html_title = f"dtrp {version}"

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "mathml",
    "formulas",
    "pictures",
    "pages",
    "readme",
]
root_doc = "docs/index"
include_patterns = [
    "docs/**",
    "benchmarks/*/README.md",
    "examples/README.md",
    "README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
]
exclude_patterns = [".*", "build", "dist", "runs", "tests", "dtrp", "shared", "**/__pycache__"]

myst_enable_extensions = ["dollarmath", "deflist", "attrs_inline"]
myst_heading_anchors = 4
myst_links_external_new_tab = False

smartquotes_action = "D"  # dashes; quotes stay as they are typed
default_role = "py:obj"  # `Pipeline` in a docstring links to it, and is code where there is nothing to link to
add_module_names = False
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # signatures say them
autodoc_default_options = {"members": True, "inherited-members": True}
autodoc_preserve_defaults = True
napoleon_use_rtype = False

html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["dtrp.css"]
html_show_sphinx = False
html_show_copyright = False
html_copy_source = False
html_additional_pages = {"index": "first.html"}
templates_path = ["_templates"]
pygments_style = "a11y-high-contrast-light"
pygments_dark_style = "a11y-high-contrast-dark"
