"""The README shows what the library does."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from dtrp import Schedule, get_method, list_methods

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text()


def test_the_grids_are_the_librarys() -> None:
    shown = re.search(r"<!-- grids -->\n```text\n(.*?)```", TEXT, re.S)
    assert shown is not None
    grids = [str(Schedule.build("bp", 3, 2, 3)), str(Schedule.build("dtrp", 3, 8))]
    without_delays = ["\n".join(line for line in grid.splitlines() if not line.startswith("delay")) for grid in grids]
    assert shown[1].strip().split("\n\n") == without_delays


def test_the_program_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    program = re.search(r"```python\n(.*?)```", TEXT, re.S)
    assert program is not None
    monkeypatch.chdir(tmp_path)
    exec(program[1], {})
    assert (tmp_path / "model.pt").exists()
    assert "Counter" in capsys.readouterr().out


def test_every_method_is_in_the_table() -> None:
    for name in list_methods():
        assert f"`{name}`" in TEXT or f"**`{name}`**" in TEXT
        assert get_method(name).__doc__


def test_every_measured_number_links_to_a_file_that_holds_it() -> None:
    """A table that is measured ends with a line `raw: [file](file)`; its cells are means over that file's lines."""
    for link in re.findall(r"\]\((benchmarks/[^)]+)\)", TEXT):
        assert (ROOT / link).exists(), link
    table = re.search(r"<!-- microbatches -->\n(.*?)\n\n", TEXT, re.S)
    assert table is not None
    rows = [
        json.loads(x) for x in (ROOT / "benchmarks/microbatches/results/microbatches.jsonl").read_text().splitlines()
    ]
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table[1].splitlines()[2:]]
    assert len(lines) >= 4
    for name, *cells in lines:
        for micro, cell in zip((1, 4), cells, strict=True):
            found = [
                r["test_accuracy"] for r in rows if r["method"] == name.strip("`*") and r["num_microbatches"] == micro
            ]
            mean = sum(found) / len(found)
            deviation = (sum((a - mean) ** 2 for a in found) / max(1, len(found) - 1)) ** 0.5
            assert cell == f"{100 * mean:.1f} ± {100 * deviation:.1f}", f"{name}, A={micro}: {cell}"


def test_the_engines_cost_is_that_of_its_file() -> None:
    record = json.loads((ROOT / "benchmarks/engine/results/engine.jsonl").read_text().splitlines()[-1])
    shown = re.search(r"K=1 takes ([\d.]+) times a plain\s+PyTorch loop, `dtrp` at K=4 ([\d.]+) times", TEXT)
    assert shown is not None
    assert [float(text) for text in shown.groups()] == [round(record["ratios"][name], 3) for name in ("bp", "dtrp")]
    assert f"medians of {record['rounds']} turns" in TEXT


def test_the_epoch_on_cifar10_is_that_of_its_file() -> None:
    rows = [json.loads(line) for line in (ROOT / "benchmarks/real_data/results/cifar10.jsonl").read_text().splitlines()]
    shown = re.search(
        r"bp ([\d., ]+) %, dtrp ([\d., ]+) %: ([\d.]+) points less in the mean, ([\d.]+) to ([\d.]+) by", TEXT
    )
    assert shown is not None
    found = {(row["method"], row["seed"]): 100 * row["test_accuracy"] for row in rows}
    for method, text in zip(("bp", "dtrp"), shown.groups()[:2], strict=True):
        assert text.split(", ") == [f"{found[method, seed]:.1f}" for seed in range(4)]
    less = [found["bp", seed] - found["dtrp", seed] for seed in range(4)]
    assert [float(text) for text in shown.groups()[2:]] == [round(x, 1) for x in (sum(less) / 4, min(less), max(less))]
