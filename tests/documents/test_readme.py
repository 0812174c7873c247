"""The README shows what the library does (`test_numbers.py`: what was measured)."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from dtrp import Schedule, get_method, list_methods

ROOT = Path(__file__).parents[2]
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
