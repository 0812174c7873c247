"""Every measured number in README.md, docs and the benchmarks' pages is that of a raw file to which there is a link."""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
SPEC = importlib.util.spec_from_file_location("shown", ROOT / "benchmarks" / "shown.py")
assert SPEC is not None
assert SPEC.loader is not None
shown = importlib.util.module_from_spec(SPEC)
sys.modules["shown"] = shown
SPEC.loader.exec_module(shown)
DOCUMENTS = {str(path.relative_to(ROOT)): path for path in shown.DOCUMENTS}


def problems(path: Path, text: str) -> list[str]:
    return shown.compare(path, text)[0]


@pytest.mark.parametrize("name", DOCUMENTS)
def test_numbers_are_those_of_the_raw_files(name: str) -> None:
    assert problems(DOCUMENTS[name], DOCUMENTS[name].read_text()) == []


@pytest.mark.parametrize("name", DOCUMENTS)
def test_a_number_that_is_changed_by_hand_is_seen(name: str) -> None:
    path = DOCUMENTS[name]
    for _, block, linked in shown.blocks(path, path.read_text()):
        links = "".join(f"\n\n[raw]({os.path.relpath(link, path.parent)})" for link in linked)
        if block.startswith("|") and any(block.partition("\n")[0] in shown.known(link.parts[-3]) for link in linked):
            places = [match.start() for match in re.finditer(r"\d+\.\d+", block)]
        elif "<!-- shown:" in block:
            places = [match.end() - 1 for match in shown.compared(block)]
            assert places, block
        else:
            continue
        assert problems(path, block + links) == []
        for place in places:
            digit = str((int(block[place]) + 1) % 10)
            changed = block[:place] + digit + block[place + 1 :]
            assert problems(path, changed + links), f"{block[max(0, place - 20) : place + 5]!r} with {digit}"


@pytest.mark.parametrize("benchmark", ["throughput", "planning"])
def test_of_a_part_that_has_run_again_the_last_run_is_shown(benchmark: str, monkeypatch: pytest.MonkeyPatch) -> None:
    runs, values = shown.runs, {head: text for head, text in shown.known(benchmark).items() if head[:5] != "| run"}

    def with_former(path: str) -> list[Any]:
        former = [
            shown.Rows({**row, "median_ms": 1.0, "rounds_ms": [1.0], "off": 0.5} for row in run) for run in runs(path)
        ]
        return former + runs(path)

    monkeypatch.setattr(shown, "runs", with_former)
    shown.known.cache_clear()
    try:
        assert {head: text for head, text in shown.known(benchmark).items() if head[:5] != "| run"} == values
    finally:
        shown.known.cache_clear()


def test_a_dead_link_and_numbers_without_one_are_seen() -> None:
    path, text = DOCUMENTS["README.md"], DOCUMENTS["README.md"].read_text()
    dead = text.replace("engine/results/engine.jsonl", "engine/results/engines.jsonl")
    assert [p.partition(" ")[2] for p in problems(path, dead)] == ["links to engines.jsonl, which is not there"]
    for linked, what in (("microbatches.jsonl", "| method, K=4 |"), ("cifar10.jsonl", "real_data/epoch")):
        (problem,) = problems(path, re.sub(rf"\[{linked}\]\([^)]*\)", linked, text))
        assert f"shows '{what}" in problem
        assert "which no raw file that is linked to under its heading has" in problem


def test_every_table_and_every_text_is_in_a_document() -> None:
    written = "".join(path.read_text() for path in DOCUMENTS.values())
    for benchmark in sorted({path.parent.name for path in ROOT.glob("benchmarks/*/shown.py")}):
        for name in shown.known(benchmark):
            assert (f"\n{name}\n" if name.startswith("|") else f"<!-- shown: {name} -->") in written, name


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
    (problem,) = problems(path, f"# New\n\n{text}\n")
    assert (
        "looks measured and names no raw numbers" in problem
        or "shows '| method | loss |', which no raw file" in problem
    )


def test_what_does_not_look_measured_is_let_be() -> None:
    path = ROOT / "docs" / "new.md"
    text = "With `lr=0.1` and 4 stages on torch 2.13, 32 x 32 images.\n\n```sh\ndtrp --x 3  # 40 ms\n```\n\n- $a = 2.5$ ms\n"
    assert problems(path, text) == []
    assert problems(path, "Sleeps of F = 20 ms, within two per cent, a limit of `100 MB`.") == []
    assert problems(path, "3 % <!-- shown: engine/nothing -->") == [
        "docs/new.md:1 shows 'engine/nothing', which no raw file that is linked to under its heading has",
    ]


def test_numbers_are_written_from_the_raw_files() -> None:
    path, text = DOCUMENTS["README.md"], DOCUMENTS["README.md"].read_text()
    wrong = text.replace("54.2 ± 0.1", "99.9 ± 0.0").replace("1.016 times", "7.777 times")
    assert wrong.count("99.9") == wrong.count("7.777") == 1
    assert shown.compare(path, wrong)[1] == text
    head = "| method, K=4 | one micro-batch |"
    assert shown.compare(path, re.sub(rf"(?<=\n)({re.escape(head)}.*\n)(?:\|.*\n)*", r"\1", text))[1] == text


@pytest.mark.parametrize("path", sorted(ROOT.glob("benchmarks/*/results/*.json*")), ids=lambda path: path.name)
def test_every_raw_file_is_on_the_page_of_results(path: Path) -> None:
    page = DOCUMENTS["docs/results.md"]
    assert path in shown.links(page, page.read_text()), f"docs/results.md does not link to {path.relative_to(ROOT)}"


@pytest.mark.parametrize("path", sorted(ROOT.glob("benchmarks/*/results/*.svg")), ids=lambda path: path.name)
def test_every_figure_is_in_a_document(path: Path) -> None:
    shown_in = [
        name
        for name, document in DOCUMENTS.items()
        for link in re.findall(r"!\[[^\]]+\]\(([^)]+)\)", document.read_text())
        if (document.parent / link).resolve() == path
    ]
    assert shown_in, f"no document shows {path.relative_to(ROOT)}; put it into the page of its benchmark"
