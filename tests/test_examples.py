"""The examples run, and show what they say."""

from __future__ import annotations

import contextlib
import os
import re
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from run_folders import Page, check_same

from dtrp.cli import run as command

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # they write their weights where they run


def run(name: str) -> None:
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def program(name: str, *words: str, num_ranks: int = 1) -> dict[str, Any]:
    """The arguments for `subprocess` of an example in a process of its own, or on ranks."""
    ranks = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks)] if num_ranks > 1 else []
    path = os.pathsep.join([str(EXAMPLES.parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return {"args": [sys.executable, *ranks, str(EXAMPLES / name), *words], "env": environment, "text": True}


def torchrun(num_ranks: int, name: str, folder: Path, *words: str) -> str:
    """What all ranks print."""
    done = subprocess.run(
        **program(name, *words, num_ranks=num_ranks), cwd=folder, capture_output=True, timeout=200, check=False
    )
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


def own_loop(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["examples/own_loop.py", folder])
    run("own_loop.py")


def check_same_updates(folder: Path, whole: Path) -> None:
    check_same(folder, whole)
    assert (folder / "updates.jsonl").read_text() == (whole / "updates.jsonl").read_text()
    a, b = (torch.load(each / "best.pt") for each in (folder, whole))
    assert all(torch.equal(a[name], b[name]) for name in a)


def kill_after(save: Path, process: subprocess.Popen[str]) -> None:
    """`kill -9` when a save is there, with no regard to what the process is doing."""
    until = time.monotonic() + 150
    while not (save / "manifest.json").exists():
        assert time.monotonic() < until
        assert process.poll() is None
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.mark.timeout(300)
def test_own_loop_killed_and_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert len((EXAMPLES / "own_loop.py").read_text().splitlines()) < 80
    own_loop("whole", monkeypatch)
    whole = capsys.readouterr().out
    assert numbers(r"accuracy ([\d.]+)%", whole)[-1] > 85
    killed = subprocess.Popen(**program("own_loop.py", "own"), start_new_session=True, stdout=subprocess.DEVNULL)
    kill_after(Path("own/saves/update-00000040"), killed)
    assert not Path("own/summary.json").exists()
    own_loop("own", monkeypatch)
    shown = capsys.readouterr().out
    assert "going on after update" in shown
    check_same_updates(Path("own"), Path("whole"))
    assert whole.splitlines()[-1] == shown.splitlines()[-1]
    pytest.importorskip("matplotlib")
    assert command(["report", "own", "whole", "--out", "report.html"]) == 0
    assert len(Page(Path("report.html")).data["runs"]) == 2


@pytest.mark.full
@pytest.mark.timeout(600)
def test_own_loop_on_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All ranks killed, and gone on with, are one process."""
    own_loop("whole", monkeypatch)
    killed = subprocess.Popen(
        **program("own_loop.py", "own", num_ranks=3), start_new_session=True, stdout=subprocess.DEVNULL
    )
    children = [int(pid) for pid in Path(f"/proc/{killed.pid}/task/{killed.pid}/children").read_text().split()]
    kill_after(Path("own/saves/update-00000040"), killed)
    for pid in children:  # torchrun's workers have sessions of their own
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    torchrun(3, "own_loop.py", tmp_path, "own")
    check_same_updates(Path("own"), Path("whole"))


def test_images(capsys: pytest.CaptureFixture[str]) -> None:
    run("images.py")
    shown = capsys.readouterr().out
    assert numbers(r"accuracy ([\d.]+)%", shown)[-1] > 95
    losses = numbers(r"loss ([\d.]+)", shown)
    assert len(losses) == 4
    assert losses[-1] < 0.1 * losses[0]


@pytest.mark.full
def test_images_are_read_by_the_first_rank_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("images.py")
    assert torchrun(3, "images.py", tmp_path) == capsys.readouterr().out


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
