"""Every measured number in README.md, docs and the benchmarks' pages is that of a raw file to which there is a link."""

from __future__ import annotations

import importlib.util
import itertools
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SPEC = importlib.util.spec_from_file_location("shown", ROOT / "benchmarks" / "shown.py")
assert SPEC is not None
assert SPEC.loader is not None
shown = importlib.util.module_from_spec(SPEC)
sys.modules["shown"] = shown
SPEC.loader.exec_module(shown)
DOCUMENTS = {str(path.relative_to(ROOT)): path for path in shown.documents()}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_numbers_are_those_of_the_raw_files(name: str) -> None:
    assert shown.problems(DOCUMENTS[name], DOCUMENTS[name].read_text()) == []


@pytest.mark.parametrize("name", DOCUMENTS)
def test_a_number_that_is_changed_by_hand_is_seen(name: str) -> None:
    path, whole = DOCUMENTS[name], DOCUMENTS[name].read_text()
    for section in sections(path, whole):
        check_section(path, section)


def sections(path: Path, text: str) -> list[str]:
    """A document, cut at its headings."""
    lines = text.splitlines(keepends=True)
    heads = [block.start for block in shown.blocks(path, text) if block.text.startswith("#")]
    return ["".join(lines[a:b]) for a, b in itertools.pairwise([0, *heads, len(lines)])]


def check_section(path: Path, text: str) -> None:
    for block in shown.blocks(path, text):
        if "<!-- shown:" not in block.text:
            continue
        start = text.index(block.text)
        prose = re.sub(r"<!--.*?-->|`[^`]*`|\$[^$]*\$|\]\([^)]*\)", lambda m: " " * len(m[0]), block.text)
        if block.is_table:
            places = [m.start() for m in re.finditer(r"\d+\.\d+", prose)]
        else:
            places = [m.end() - 1 for m in shown.numbers(prose)]
        assert places, block.text
        for place in places:
            digit = str((int(prose[place]) + 1) % 10)
            changed = text[: start + place] + digit + text[start + place + 1 :]
            assert shown.problems(path, changed), f"{prose[max(0, place - 20) : place + 5]!r} with {digit}"


@pytest.mark.parametrize(
    "name", ["throughput/sleeping", "throughput/links", "throughput/resnet20", "throughput/one_worker_56",
             "planning/simulator", "planning/keep", "planning/memory"]
)  # fmt: skip
def test_of_a_part_that_has_run_again_the_last_run_is_shown(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, values = shown.rows, shown._values(*name.split("/"))
    monkeypatch.setattr(shown, "rows", lambda path: [*({**row, "run": "before"} for row in rows(path)), *rows(path)])
    shown._function.cache_clear()
    try:
        assert shown._values(*name.split("/")) == values
    finally:
        shown._function.cache_clear()


def test_a_dead_link_and_numbers_without_one_are_seen() -> None:
    path, text = DOCUMENTS["README.md"], DOCUMENTS["README.md"].read_text()
    dead = text.replace("engine/results/engine.jsonl", "engine/results/engines.jsonl")
    assert [p.partition(" ")[2] for p in shown.problems(path, dead)] == ["links to engines.jsonl, which is not there"]
    unlinked = re.sub(r"\[microbatches\.jsonl\]\([^)]*\)", "microbatches.jsonl", text)
    assert any("no link to its results/" in problem for problem in shown.problems(path, unlinked))


@pytest.mark.parametrize(
    "text",
    [
        "dtrp is 12 % faster.",
        "It takes 1.3 times as long.",
        "It is 1.3x faster.",
        "A step takes 30ms.",
        "A step takes 30 and 40 ms.",
        "54.2 ± 0.1",
        "It holds 45 MB.",
        "2 points less",
        "| method | loss |\n|---|---|\n| `bp` | 2.19 |",
    ],
)
def test_what_looks_measured_and_names_no_raw_file_is_seen(text: str) -> None:
    path = ROOT / "docs" / "new.md"
    (problem,) = shown.problems(path, f"# New\n\n{text}\n")
    assert "looks measured and names no raw numbers" in problem
    assert shown.problems(path, f"# New\n\n{text} <!-- not measured: a rule -->\n") == []


def test_what_does_not_look_measured_is_let_be() -> None:
    path = ROOT / "docs" / "new.md"
    text = "With `lr=0.1` and 4 stages on torch 2.13, 32 x 32 images.\n\n```sh\ndtrp --x 3  # 40 ms\n```\n\n- $a = 2.5$ ms\n"
    assert shown.problems(path, text) == []
    assert shown.problems(path, "3 % <!-- shown: engine/nothing -->") == [
        "docs/new.md:1 has numbers of engine and no link to its results/ under the same heading",
        "docs/new.md:1: benchmarks/engine/shown.py has no nothing()",
    ]


def test_numbers_are_written_from_the_raw_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (ROOT / "README.md").read_text()
    wrong = text.replace("54.2 ± 0.1", "99.9 ± 0.0").replace("1.005 times", "7.777 times")
    assert wrong != text
    (tmp_path / "README.md").write_text(wrong)
    shown.write(tmp_path / "README.md")
    assert (tmp_path / "README.md").read_text() == text


@pytest.mark.parametrize("path", sorted(ROOT.glob("benchmarks/*/results/*.json*")), ids=lambda path: path.name)
def test_every_raw_file_is_on_the_page_of_results(path: Path) -> None:
    page = DOCUMENTS["docs/results.md"]
    linked = {link for block in shown.blocks(page, page.read_text()) for link in block.links}
    assert path in linked, f"docs/results.md does not link to {path.relative_to(ROOT)}"


@pytest.mark.parametrize("path", sorted(ROOT.glob("benchmarks/*/results/*.svg")), ids=lambda path: path.name)
def test_every_figure_is_in_a_document(path: Path) -> None:
    shown_in = [
        name
        for name, document in DOCUMENTS.items()
        for link in re.findall(r"!\[[^\]]+\]\(([^)]+)\)", document.read_text())
        if (document.parent / link).resolve() == path
    ]
    assert shown_in, f"no document shows {path.relative_to(ROOT)}; put it into the page of its benchmark"
