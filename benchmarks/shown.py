"""Holds the numbers in the documents against the raw files that they come from.

    python benchmarks/shown.py            # compare README.md, docs/*.md and benchmarks/*/README.md
    python benchmarks/shown.py --write    # put the numbers of the raw files into them

A block (a paragraph, an item of a list, a table) that holds measured numbers names the function that knows them, in a comment
in it or on the line before it, and under its heading there is a link to the raw file::

    <!-- shown: engine/table -->            table() of benchmarks/engine/shown.py
    It takes 1.005 times as long ([engine.jsonl](results/engine.jsonl)). <!-- shown: engine/cost -->

The function returns the whole table, or the numbers of the text in their order: those with a unit and all with decimals. A block
that looks measured (per cent, ms, MB, times as fast, ±, a table with decimals, ...) and names nothing is a mistake; if it is a rule
or a setting, it says so::

    The fastest within 2 %. <!-- not measured: a rule -->
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import re
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parent
GENERATED = ("cli.md",)

_MARK = re.compile(r"<!-- shown: ([\w-]+)/(\w+) -->")
_EXEMPT = re.compile(r"<!-- not measured: \S.*? -->")
_UNIT = r"\s?(?:%|per cent|ms\b|µs\b|MB\b|GB\b|samples/s|points?\b|seconds?\b|s\b|times (?:as|the|its|faster|slower)\b|x\b(?! \d))"
_NUMBER = r"(?<![\w.,/-])-?\d[\d,]*(?:\.\d+)?"
_WITH_UNIT = re.compile(rf"{_NUMBER}(?=(?:(?:, | and | to | or ){_NUMBER})*{_UNIT})")
_DECIMAL = re.compile(r"(?<!torch )(?<!Python )(?<![\w.,/-])-?\d[\d,]*\.\d+(?!\w|\.\d)")
_SPREAD = re.compile(r"±\s?\d")


# -- for the functions in benchmarks/*/shown.py -----------------------------------------------------------------


def rows(path: str) -> list[dict[str, Any]]:
    """The lines of a raw file; ``path`` from benchmarks/ on."""
    return [json.loads(line) for line in (HERE / path).read_text().splitlines()]


def last_run(lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of the rows of a part that may have run several times, those of the last: what took turns with each other."""
    return [row for row in lines if row["run"] == lines[-1]["run"]]


def spread(values: Sequence[float], digits: int) -> str:
    """Mean ± sample standard deviation."""
    return f"{statistics.fmean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"


def table(head: Iterable[str], lines: Iterable[Iterable[str]]) -> str:
    """A table in Markdown."""
    written = ["| " + " | ".join(cells) + " |" for cells in ([*head], *map(list, lines))]
    written.insert(1, "|" + "---|" * (written[0].count("|") - 1))
    return "\n".join(written).replace("|  |", "| |")


# -- blocks of a document ---------------------------------------------------------------------------------------


@dataclass
class Block:
    """Some lines of a document, from ``start`` to before ``end``."""

    path: Path
    start: int
    lines: list[str]

    @property
    def text(self) -> str:
        return "\n".join(self.lines)

    @property
    def prose(self) -> str:
        """What is read: without code, comments, formulas and the targets of links."""
        text = re.sub(r"<!--.*?-->", "", self.text, flags=re.S)
        text = re.sub(r"`[^`]*`|\$[^$]*\$", "", text)
        return re.sub(r"\]\([^)]*\)", "]", text)

    @property
    def is_table(self) -> bool:
        return any(line.startswith("|") for line in self.lines)

    @property
    def links(self) -> set[Path]:
        """The files of results that it links to."""
        found = re.findall(r"\]\(([^)#]+)\)", self.text)
        paths = {(self.path.parent / link).resolve() for link in found if "://" not in link}
        return {path for path in paths if path.parent.name == "results"}

    def looks_measured(self) -> bool:
        prose = self.prose
        if self.is_table and any(re.fullmatch(r"\s*-?\d+\.\d+\s*", cell) for cell in prose.split("|")):
            return True
        return bool(_WITH_UNIT.search(prose) or _SPREAD.search(prose))


def numbers(prose: str) -> list[re.Match[str]]:
    """The numbers of a text that are compared: those with a unit, and all decimals but versions."""
    found = {match.start(): match for pattern in (_WITH_UNIT, _DECIMAL) for match in pattern.finditer(prose)}
    return [found[start] for start in sorted(found)]


def blocks(path: Path, text: str) -> list[Block]:
    """The blocks of a document, code left out."""
    found: list[Block] = []
    fence, fresh = None, True
    for number, line in enumerate(text.splitlines()):
        stripped = line.strip()
        if fence is None and (match := re.match(r"(`{3,}|:{3,})", stripped)):
            fence = match[1]
        elif fence is not None:
            fence, fresh = (None if stripped == fence else fence), True
        elif not stripped:
            fresh = True
        elif fresh or re.match(r"\s*(?:[-*]|\d+\.) |#", line) or _starts_table(found[-1], line):
            found.append(Block(path, number, [line]))
            fresh = line.startswith("#")
        else:
            found[-1].lines.append(line)
    return found


def _starts_table(block: Block, line: str) -> bool:
    return line.startswith("|") and not block.is_table and not block.lines[-1].startswith("<!--")


def documents() -> list[Path]:
    """Every document with numbers in it."""
    pages = [path for path in sorted((ROOT / "docs").glob("*.md")) if path.name not in GENERATED]
    return [ROOT / "README.md", *pages, *sorted(HERE.glob("*/README.md"))]


# -- comparing --------------------------------------------------------------------------------------------------


def problems(path: Path, text: str) -> list[str]:
    """What is wrong with the numbers of a document that lies at ``path``, a line each."""
    found = []
    parts = blocks(path, text)
    for place, block in enumerate(parts):
        where = f"{path.relative_to(ROOT)}:{block.start + 1}"
        marks = _MARK.findall(block.text)
        near = set().union(*(other.links for other in _section(parts, place)))
        found += [f"{where} links to {link.name}, which is not there" for link in block.links if not link.is_file()]
        if not marks:
            if block.looks_measured() and not _EXEMPT.search(block.text):
                found.append(f"{where} looks measured and names no raw numbers: {block.prose.strip()[:70]!r}")
            continue
        for benchmark, _ in marks:
            if not any(link.parts[-3:-1] == (benchmark, "results") for link in near):
                found.append(f"{where} has numbers of {benchmark} and no link to its results/ under the same heading")
        try:
            expected = [value for benchmark, name in marks for value in _values(benchmark, name)]
        except LookupError as error:
            found.append(f"{where}: {error}")
            continue
        shown = _shown(block)
        if shown != expected:
            found.append(f"{where} says {_differ(shown, expected)}")
    return found


def _section(parts: list[Block], place: int) -> list[Block]:
    """The blocks between two headings around a place."""
    heads = [i for i, block in enumerate(parts) if block.text.startswith("#")]
    begin = max((i for i in heads if i <= place), default=0)
    return parts[begin : min((i for i in heads if i > place), default=len(parts))]


def _values(benchmark: str, name: str) -> list[str]:
    value = _function(benchmark, name)()
    return value.splitlines() if isinstance(value, str) else list(value)


def _shown(block: Block) -> list[str]:
    if block.is_table:
        return [line for line in block.lines if line.startswith("|")]
    return [match[0] for match in numbers(block.prose)]


def _differ(shown: list[str], expected: list[str]) -> str:
    for one, other in zip(shown, expected, strict=False):
        if one != other:
            return f"{one!r}, and the raw file {other!r}"
    return f"{len(shown)} numbers ({', '.join(shown)}), and the raw file {len(expected)} ({', '.join(expected)})"


@functools.cache
def _function(benchmark: str, name: str) -> Callable[[], str | list[str]]:
    path = HERE / benchmark / "shown.py"
    if not path.is_file():
        raise LookupError(f"there is no {path.relative_to(ROOT)}")
    if str(HERE) not in sys.path:
        sys.path.insert(0, str(HERE))
    spec = importlib.util.spec_from_file_location(f"shown_{benchmark}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, name):
        raise LookupError(f"{path.relative_to(ROOT)} has no {name}()")
    function: Callable[[], str | list[str]] = getattr(module, name)
    return function


def write(path: Path) -> None:
    """Put what the raw files hold into a document; a text whose count of numbers differs is left for a person."""
    lines = path.read_text().splitlines()
    for block in reversed(blocks(path, path.read_text())):
        marks = _MARK.findall(block.text)
        if not marks:
            continue
        expected = [value for benchmark, name in marks for value in _values(benchmark, name)]
        shown = _shown(block)
        if expected and expected[0].startswith("|"):  # a table, or the place for one
            rest = [line for line in block.lines if not line.startswith("|")]
            new = rest + expected
        elif len(shown) == len(expected):
            text, at = block.text, 0
            for old, value in zip(shown, expected, strict=True):
                at = text.index(old, at)
                text, at = text[:at] + value + text[at + len(old) :], at + len(value)
            new = text.splitlines()
        else:
            continue
        lines[block.start : block.start + len(block.lines)] = new
    path.write_text("\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the numbers of the raw files into the documents")
    if parser.parse_args().write:
        for path in documents():
            write(path)
    found = [problem for path in documents() for problem in problems(path, path.read_text())]
    print("\n".join(found) or "every number is that of its raw file")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
