"""The parts of which the site is made (`make docs` builds the whole, and walks its links)."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path

import pytest
from browser import needs_chromium, open_page

from dtrp import Schedule, get_method, list_methods

pytest.importorskip("sphinx", reason="the extra 'docs' is not installed")
DOCS = Path(__file__).parents[2] / "docs"
SITE = DOCS.parent / "build" / "docs"
sys.path.insert(0, str(DOCS))

import check  # noqa: E402
import formulas  # noqa: E402
import pages  # noqa: E402
import pictures  # noqa: E402
import readme  # noqa: E402


@pytest.mark.parametrize("name", list_methods())
def test_every_method_has_a_page_from_its_docstring(name: str) -> None:
    page = pages.page(name)
    said = re.sub(r"[*\s]", "", page)
    for word in (get_method(name).__doc__ or "").split():
        assert re.sub(r"[*\s]", "", pages.linked(word)) in said, word
    assert f"{{grid}} {name}" in page
    assert "| 3 |" in page.split("## Delay")[1]


@pytest.mark.parametrize("name", list_methods())
def test_the_formulas_of_every_docstring_are_typeset(name: str) -> None:
    for code in re.findall(r"``([^`]+)``", get_method(name).__doc__ or ""):
        if "w_k" in code or code.startswith("ceil"):
            written = formulas.latex(" ".join(code.split()))
            assert written is not None, code
            assert not re.search(r"\*|(?<!\\)\b(?:grad|eta|beta|gamma|ceil)|\bd ", written), written


def test_the_readme_on_the_site_has_pictures() -> None:
    text = readme.for_the_site((DOCS.parent / "README.md").read_text())
    assert "```{grid} bp\n:stages: 3\n:minibatches: 2\n:microbatches: 3\n```" in text
    assert "```{grid} dtrp\n:stages: 3\n:minibatches: 8\n:microbatches: 1\n```" in text
    assert "<picture>" not in text
    assert re.findall(r"\]\(docs/_static/results-(\w+)\.svg\)\{\.only-(\w+)\}", text) == [
        ("light", "light"),
        ("dark", "dark"),
    ]


@pytest.mark.parametrize("name", list_methods())
def test_the_picture_of_a_method_fits_a_small_screen(name: str) -> None:
    options = dict(re.findall(r":(stages|minibatches|microbatches): (\d+)", pages.page(name)))
    schedule = Schedule.build(name, *(int(options[n]) for n in ("stages", "minibatches", "microbatches")))
    width = re.search(r'<svg [^>]*width="(\d+)"', pictures.draw_grid(schedule, show="versions"))
    assert width is not None
    assert int(width[1]) <= 800  # the text of a page in a window of 1366 pixels


def test_the_numbers_on_a_methods_page() -> None:
    page = pages.page("dtrp")
    assert "| 0 | 6 | 5 | 6 | 1 or 2 | 6 |" in page
    assert "| A=1 | 4.00 | 4.00 | 4.00 | 5.00 |" in page  # the table of leads and latencies


@pytest.mark.parametrize(("name", "parts"), [("dtrp", 1), ("bp", 3), ("gpipe", 2), ("fdg", 1)])
def test_a_picture_has_the_cells_of_its_schedule(name: str, parts: int) -> None:
    schedule = Schedule.build(name, 3, 5, parts)
    picture = pictures.draw_grid(schedule, show="versions")
    shown = re.findall(r'<text class="(?:forward|backward)"[^>]*>([FB]\d+)</text>', picture)
    assert sorted(shown) == sorted(str(a) for row in schedule.stages for a in row if a.kind != "U")
    assert picture.count('class="update"') == 3 * 5
    versions = [int(v) for v in re.findall(r">v(\d+)</text>", picture)]
    counted = []
    for row in schedule.stages:
        updates = 0
        for action in row:
            updates += action.kind == "U"
            counted += [updates] if action.kind != "U" else []
    assert versions == counted


def test_a_timeline_is_to_scale() -> None:
    picture = pictures.draw_timeline([("spectrain", 1)], num_stages=2, num_minibatches=2, latency=0.0)
    widths = {float(width) for width in re.findall(r'<rect class="backward"[^>]* width="([\d.]+)"', picture)}
    assert widths == {2.0 * pictures.SCALE}


def test_every_command_and_option_is_on_the_page_of_commands() -> None:
    text = pages.commands()
    for name in ("train", "compare", "report", "demo", "plan", "simulate", "schedule", "methods"):
        assert f"## dtrp {name}" in text
    assert "`--num-microbatches NUMBER|AUTO`\n: " in text
    assert "One of `digits`, `cifar10`" in text


# Packages with a list of names, but for the command line, whose page is its own.
LISTS = (path.parent.name for path in DOCS.parent.glob("dtrp/*/__init__.py") if "__all__ =" in path.read_text())
PUBLIC = ["dtrp", *(f"dtrp.{name}" for name in sorted(LISTS) if name != "cli")]


@pytest.mark.skipif(not (SITE / "docs").is_dir(), reason="the site is not built: make docs")
@pytest.mark.parametrize("package", PUBLIC)
def test_the_page_of_the_interface_has_every_public_name(package: str) -> None:
    page = (SITE / "docs" / "api.html").read_text()
    section = re.search(rf"(?ms)^## {re.escape(package)}$.*?(?=^## |\Z)", (DOCS / "api.md").read_text())
    assert section, f"docs/api.md has no heading {package}"
    # A name has an entry, or is in the section's text, where it is a value or has its entry in another section.
    names = [name for name in importlib.import_module(package).__all__ if f'id="{package}.{name}"' not in page]
    assert [name for name in names if f"`{name}`" not in section[0]] == []


@needs_chromium
@pytest.mark.skipif(not (SITE / "docs").is_dir(), reason="the site is not built: make docs")
@pytest.mark.parametrize(
    ("page", "width"),
    [
        ("docs/concepts", 390),
        ("docs/concepts", 1400),
        ("docs/theory", 390),
        ("docs/methods/dtrp", 390),
        ("README", 390),
    ],
)
def test_the_site_opens_in_a_browser(tmp_path: Path, page: str, width: int) -> None:
    shown = open_page(SITE / f"{page}.html", width, tmp_path)
    assert "<math" in shown or page != "docs/theory"
    assert 'role="img"' in shown or page in ("docs/theory", "README")


@needs_chromium
def test_what_a_page_may_not_do_is_seen(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text('<!doctype html><div style="width: 600px">wide</div>')
    with pytest.raises(AssertionError, match="is 6[0-9][0-9] pixels wide in a window of 390"):
        open_page(page, 390, tmp_path)
    page.write_text('<!doctype html><script src="https://example.org/x.js"></script>')
    with pytest.raises(AssertionError, match="asks for .*https://example.org/x.js"):
        open_page(page, 390, tmp_path)


def test_dead_links_and_loads_from_the_network_are_found(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text('<h1 id="top"></h1><a href="b.html#here">b</a><a href="https://example.org">c</a>')
    (tmp_path / "b.html").write_text('<p id="here"></p><a href="a.html#top">a</a>')
    assert check.problems(tmp_path) == []
    (tmp_path / "b.html").write_text('<script src="https://example.org/x.js"></script><a href="gone.html">a</a>')
    assert check.problems(tmp_path) == [
        "a.html links to b.html#here, and there is no such place in it",
        "b.html loads https://example.org/x.js from the network",
        "b.html links to gone.html, which is not there",
    ]
