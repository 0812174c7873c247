"""Compares the numbers in the documents with the raw files that they come from.

    python benchmarks/shown.py            # compare README.md, docs/*.md and benchmarks/*/README.md
    python benchmarks/shown.py --write    # put the numbers of the raw files into them

The shown.py of a benchmark computes TABLES, found in a document by their head, and TEXTS: the numbers of a paragraph or
list in their order, those with a unit and all decimals. A text names them: ``<!-- shown: engine/cost -->``. Both stand
under the same heading as a link to a raw file of the benchmark. Anything else that looks measured (per cent, ms, MB,
times as fast, ±, a table with decimals) is a mistake: a setting is written in words, in code, or as ``F = 20 ms``.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import re
import runpy
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parent
PAGES = [path for path in sorted((ROOT / "docs").glob("*.md")) if path.name != "cli.md"]  # which is generated
DOCUMENTS = [ROOT / "README.md", *PAGES, *sorted(HERE.glob("*/README.md"))]

_MARK = re.compile(r"<!-- shown: (\S+) -->")
_FENCED = re.compile(r"^ *(`{3,}|:{3,}).*?^ *\1 *$", re.M | re.S)
_NOT_READ = re.compile(r"<!--.*?-->|`[^`]*`|\$[^$]*\$|\]\([^)]*\)", re.S)  # comments, code, formulas, targets of links
_SECTION = re.compile(r"(?:\A|^#).*?(?=^#|\Z)", re.M | re.S)
_BLOCK = re.compile(r"^#.*|^\|.*(?:\n\|.*)*|^(?![#|]).*\S.*(?:\n(?![#|]).*\S.*)*", re.M)
_UNIT = r"\s?(?:%|per cent|ms\b|µs\b|MB\b|GB\b|samples/s|points?\b|seconds?\b|s\b|times (?:as|the|its|faster|slower)\b|x\b(?! \d))"
_NUMBER = r"(?<![\w.,/-])(?<!\b[FB] = )-?\d[\d,]*(?:\.\d+)?"
_WITH_UNIT = rf"{_NUMBER}(?=(?:(?:, | and | to | or ){_NUMBER})*{_UNIT})"
_COMPARED = re.compile(rf"{_WITH_UNIT}|(?<!torch )(?<!Python )(?<![\w.,/-])-?\d[\d,]*\.\d+(?!\w|\.\d)")
_MEASURED = re.compile(rf"{_WITH_UNIT}|±\s?\d|(?m:^\|.*(?<![\w.])\d+\.\d{{1,4}}(?![\w.]))")


class Rows(list[dict[str, Any]]):
    """Rows of a raw file."""

    def where(self, **wanted: Any) -> Rows:
        return Rows(row for row in self if wanted.items() <= row.items())

    def only(self, **wanted: Any) -> dict[str, Any]:
        (row,) = self.where(**wanted)
        return row

    def by(self, label: str) -> dict[str, Rows]:
        """Groups with equal labels, such as "{model}, {method}", in the order of the file."""
        groups: dict[str, Rows] = {}
        for row in self:
            groups.setdefault(label.format_map(row), Rows()).append(row)
        return groups


def rows(path: str) -> Rows:
    """The lines of a raw file; ``path`` from benchmarks/ on."""
    return Rows(json.loads(line) for line in (HERE / path).read_text().splitlines())


def runs(path: str) -> list[Rows]:
    """Each run of a part that may have run several times, the oldest first."""
    return list(rows(path).by("{run}").values())


def accuracy(row: dict[str, Any]) -> float:
    """In per cent, after the last epoch."""
    found = row["test_accuracy"]
    return 100 * float(found[-1] if isinstance(found, list) else found)


def less(found: Rows, base: Rows) -> list[float]:
    """By how many points the accuracy of each run is below that of the one in ``base`` with its seed."""
    return [accuracy(base.only(seed=row["seed"])) - accuracy(row) for row in found]


def join(values: Iterable[float], form: str, between: str = " ") -> str:
    return between.join(format(value, form) for value in values)


def spread(values: Sequence[float], form: str, *, error: bool = False) -> str:
    """Mean ± sample standard deviation, or standard error; a single value without them."""
    if len(values) < 2:
        return join(values, form)
    apart = statistics.stdev(values) / (math.sqrt(len(values)) if error else 1)
    return f"{statistics.fmean(values):{form}} ± {apart:{form.lstrip('+')}}"


def table(head: str, lines: Iterable[str]) -> str:
    """A table in Markdown, with ``|`` between cells."""
    written = [f"| {line} |" for line in (head, *lines)]
    written.insert(1, "|" + "---|" * (head.count("|") + 1))
    return re.sub(r"\| +(?=\|)", "| ", "\n".join(written))


def pivot(head: str, found: Rows, label: str, column: str, values: Sequence[Any], cell: Callable[[Rows], str]) -> str:
    """A table with a line for each label, and in it a cell for each value of a column."""
    groups = {name: [group.where(**{column: value}) for value in values] for name, group in found.by(label).items()}
    return table(head, [" | ".join([name, *(cell(at) if at else "" for at in groups[name])]) for name in groups])


@functools.cache
def known(benchmark: str) -> dict[str, list[str]]:
    """What the raw files of a benchmark say: each table by its head, and the numbers of each text by its name."""
    module = runpy.run_path(str(HERE / benchmark / "shown.py"))
    tables = {text.partition("\n")[0]: [text] for text in module["TABLES"]}
    assert len(tables) == len(module["TABLES"]), f"two tables of {benchmark} have the same head"
    texts = {f"{benchmark}/{name}": text.replace("±", "").split() for name, text in module.get("TEXTS", {}).items()}
    return tables | texts


def blank(match: re.Match[str]) -> str:
    return re.sub(r"[^\n]", " ", match[0])


def links(path: Path, text: str) -> set[Path]:
    """The files of results that are linked to by a text of the document at ``path``."""
    targets = [(path.parent / link).resolve() for link in re.findall(r"\]\(([^)#:]+)\)", text)]
    return {target for target in targets if target.parent.name == "results"}


def blocks(path: Path, text: str) -> list[tuple[int, str, set[Path]]]:
    """Each heading, paragraph, list and table of a document: its place, its text, what its section links to."""
    return [
        (section.start() + block.start(), block[0], links(path, section[0]))
        for section in _SECTION.finditer(_FENCED.sub(blank, text))
        for block in _BLOCK.finditer(section[0])
    ]


def compared(block: str) -> list[re.Match[str]]:
    """What is compared with the raw files: a table as a whole, the numbers of a text."""
    found = re.match(r"\|(?s:.*)", block)
    return [found] if found else list(_COMPARED.finditer(_NOT_READ.sub(blank, block)))


def expected(block: str, linked: set[Path]) -> list[str]:
    """What the raw files say that this is; LookupError if it is measured and they do not say it."""
    sources = {name: values for path in linked for name, values in known(path.parts[-3]).items()}
    names = re.findall(r"\A\|.*", block) or _MARK.findall(block)
    measured = _MEASURED.search(_NOT_READ.sub(blank, block))
    if measured and not names:
        raise LookupError(f"looks measured and names no raw numbers: {measured[0]!r}")
    unknown = [name for name in names if name not in sources]
    if unknown and (measured or not block.startswith("|")):
        raise LookupError(f"shows {unknown[0]!r}, which no raw file that is linked to under its heading has")
    if unknown or not names:
        return [match[0] for match in compared(block)]
    return [value for name in names for value in sources[name]]


def compare(path: Path, text: str) -> tuple[list[str], str]:
    """What is wrong with the numbers of the document at ``path``, and its text with those of the raw files.

    A paragraph or list whose count of numbers differs is left for a person.
    """
    name = path.relative_to(ROOT)
    wrong = [f"{name} links to {link.name}, which is not there" for link in links(path, text) if not link.is_file()]
    for start, block, linked in reversed(blocks(path, text)):
        where = f"{name}:{text[:start].count(chr(10)) + 1}"
        try:
            values = expected(block, linked)
        except LookupError as error:
            wrong.append(f"{where} {error.args[0]}")
            continue
        matches = compared(block)
        lines = ("\n".join(found).splitlines() for found in ([match[0] for match in matches], values))
        pairs = itertools.zip_longest(*lines, fillvalue="nothing")
        wrong += [f"{where} says {shown!r}, and the raw file {value!r}" for shown, value in pairs if shown != value][:1]
        if len(matches) == len(values):
            for match, value in reversed(list(zip(matches, values, strict=True))):
                text = text[: start + match.start()] + value + text[start + match.end() :]
    return wrong[::-1], text


def main() -> None:
    written = sys.argv[1:] == ["--write"]
    for path in DOCUMENTS if written else []:
        path.write_text(compare(path, path.read_text())[1])
    wrong = [problem for path in DOCUMENTS for problem in compare(path, path.read_text())[0]]
    print("\n".join(wrong) or "every number is that of its raw file")
    sys.exit(bool(wrong))


sys.path.insert(0, str(HERE))  # where the shown.py of a benchmark imports this from
if __name__ == "__main__":
    main()
