"""The README shows what the library does (`test_numbers.py`: what was measured)."""

from __future__ import annotations

import os
import re
import subprocess
import sys
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


def test_it_is_read_in_three_minutes() -> None:
    assert len(TEXT.split()) <= 1000


def program() -> str:
    found = re.search(r"```python\n(.*?)```", TEXT, re.S)
    assert found is not None
    return found[1]


def test_the_program_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    exec(program(), {})
    assert (tmp_path / "model.pt").exists()
    assert "Counter" in capsys.readouterr().out


@pytest.mark.full
def test_the_program_prints_the_same_losses_under_torchrun(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(program())
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    printed = []
    for ranks in ([], ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3"]):
        done = subprocess.run(
            [sys.executable, *ranks, "train.py"],
            env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=200, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        printed.append(re.findall(r"^\d+ \d+\.\d+$", done.stdout, re.M))
    assert len(printed[0]) == 50
    assert printed[0] == printed[1]


QUESTIONS = {
    "how do I use two GPUs": ("docs/gpu.md", r'devices=\["cuda:0", "cuda:1"\]'),
    "my model is not a Sequential": ("docs/models.md", "## Any other model: `dtrp.split`"),
    "my batch has padding": ("docs/models.md", "### Labels that are left out"),
    "how do I resume": ("docs/resume.md", "dtrp train --resume"),
    "how do I resume my own loop": ("docs/own_loop.md", r"run.load\(\)"),
    "which method": ("docs/choose.md", "## Which method"),
    "what does it cost": ("docs/results.md", "## Accuracy(?s:.*)## Memory(?s:.*)## Speed"),
    "can I use AdamW with no decay on norms": ("docs/start.md", r"def make_optimizer\(params, \*, named\)"),
    "how do I log": ("docs/looking.md", "## TensorBoard(?s:.*)## Callbacks: W&B, MLflow"),
    "does it work with DDP": ("docs/coming_from.md", "## DistributedDataParallel"),
    "what if a worker dies": ("docs/resume.md", "## Workers that fail"),
}


@pytest.mark.parametrize("question", QUESTIONS)
def test_a_newcomers_question_is_answered_on_a_page_that_the_readme_links_to(question: str) -> None:
    page, answer = QUESTIONS[question]
    assert f"]({page})" in TEXT
    assert re.search(answer, (ROOT / page).read_text())


def test_every_method_is_in_the_table() -> None:
    for name in list_methods():
        assert f"`{name}`" in TEXT or f"**`{name}`**" in TEXT
        assert get_method(name).__doc__
