"""Each defect of one line is noticed by the test that is there for it; see `support/mutants.py`."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from mutants import MUTANTS, Mutant

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_its_line_is_there(mutant: Mutant) -> None:
    assert (ROOT / "dtrp" / mutant.path).read_text().count(mutant.line) == 1
    assert (ROOT / mutant.test.split("::")[0]).is_file()


@pytest.mark.full
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_it_is_caught(mutant: Mutant, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "dtrp", tmp_path / "dtrp", ignore=shutil.ignore_patterns("__pycache__"))
    path = tmp_path / "dtrp" / mutant.path
    path.write_text(path.read_text().replace(mutant.line, mutant.mutated))
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    # -P: the working folder, in which the library lies unharmed, is not looked into
    command = [sys.executable, "-P", "-m", "pytest", "-x", "-q", "-m", "full or not full", "-p", "no:cacheprovider"]
    done = subprocess.run([*command, mutant.test], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 1, done.stdout[-3000:] + done.stderr[-2000:]
    assert "AssertionError" in done.stdout or "Error" in done.stdout
