"""The examples run, and show what they say."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # they write their weights where they run


def run(name: str) -> None:
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def torchrun(num_ranks: int, name: str, folder: Path) -> str:
    """What all ranks print."""
    path = os.pathsep.join([str(EXAMPLES.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks), str(EXAMPLES / name)],
        cwd=folder, env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
        timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def numbers(pattern: str, text: str) -> list[float]:
    return [float(number) for number in re.findall(pattern, text)]


def test_every_example_is_listed_and_run() -> None:
    listed = re.findall(r"^\| \[(\w+\.py)\]", (EXAMPLES / "README.md").read_text(), re.M)
    assert sorted(listed) == sorted(path.name for path in EXAMPLES.glob("*.py"))
    here = Path(__file__).read_text()
    assert all(f'"{name}"' in here for name in listed)


def test_plain_loop(capsys: pytest.CaptureFixture[str]) -> None:
    run("plain_loop.py")
    shown = capsys.readouterr().out
    assert numbers(r"test accuracy ([\d.]+)%", shown)[0] > 80
    losses = numbers(r"training loss ([\d.]+)", shown)
    assert len(losses) == 10
    assert losses[-1] < 0.5 * losses[0]
    assert "3: Counter({0:" in shown


@pytest.mark.full
def test_ranks_print_what_one_process_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("ranks.py")
    alone, weights = capsys.readouterr().out, torch.load("ranks.pt")
    Path("ranks.pt").unlink()
    assert torchrun(4, "ranks.py", tmp_path) == alone
    assert alone.count("loss") == 5
    spread = torch.load("ranks.pt")
    assert spread.keys() == weights.keys()
    assert all(torch.equal(spread[name], weights[name]) for name in weights)


@pytest.mark.full
def test_drop_in(tmp_path: Path) -> None:
    shown = torchrun(2, "drop_in.py", tmp_path)
    losses = numbers(r"loss ([\d.]+)", shown)
    assert len(losses) == 5
    assert losses[-1] < 0.5 * losses[0]
    assert numbers(r"accuracy ([\d.]+)%", shown)[0] > 80


def test_fine_tuning(capsys: pytest.CaptureFixture[str]) -> None:
    run("fine_tuning.py")
    shown = capsys.readouterr().out
    losses = numbers(r"loss ([\d.]+)", shown)
    assert losses[-1] < losses[0]
    stashed = numbers(r"stage \d: +(\d+) bytes", shown.replace(",", ""))
    assert stashed[:2] == [0, 0], "frozen stages keep nothing"
    assert min(stashed[2:]) > 0
    assert "blocks trained: 4, 5, 6, 7" in shown


@pytest.mark.full
def test_hugging_face(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed; pip install 'dtrp[transformers]'")
    run("hugging_face.py")
    shown = capsys.readouterr().out
    assert "stages begin at transformer.h." in shown
    losses = numbers(r"loss ([\d.]+)", shown)
    assert losses[-1] < 0.6 * losses[0]
