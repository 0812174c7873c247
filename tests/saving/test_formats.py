"""What an older version has written loads, and training goes on from it to the same weights.

`formats/v1` was written by version 0.1.0 (`formats/write.py`, and `dtrp train` and `dtrp plan` on text.txt).
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

import dtrp
from dtrp.cli import run

# Schedulers of torch 2.6 have other entries than those that torch 2.13 has written, and are refused by name.
pytestmark = pytest.mark.skipif(
    "_is_initial" not in vars(torch.optim.lr_scheduler.LambdaLR(torch.optim.SGD([torch.zeros(1)]), lambda n: 1.0)),
    reason="the files were written with a newer torch",
)
FORMATS = Path(__file__).parent / "formats"
V1 = FORMATS / "v1"


@pytest.fixture
def write() -> object:
    sys.path.insert(0, str(FORMATS))
    try:
        import write

        yield write
    finally:
        sys.path.remove(str(FORMATS))


def check_close(state: dict[str, Tensor], path: Path) -> None:
    """To rounding: the files come from another processor, whose kernels add in another order."""
    expected = torch.load(path)
    assert state.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            state[name], value, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.filterwarnings("ignore:.*saved with:UserWarning")  # another version of torch
@pytest.mark.parametrize(
    ("folder", "method"), [("exact-dtrp", "dtrp"), ("exact-spectrain", "spectrain"), ("portable", "dtrp")]
)
def test_a_checkpoint_loads_and_goes_on(folder: str, method: str, write: object, tmp_path: Path) -> None:
    shutil.copytree(V1 / folder, tmp_path / folder)
    with write.pipe(method) as pipe:
        assert pipe.load(tmp_path / folder) == {"at": 5}
        for x, y in write.batches()[5:]:
            pipe.step(x, y)
        pipe.flush()
        check_close(pipe.model_state_dict(), V1 / f"expected-{folder.removeprefix('exact-')}.pt")


def test_a_run_that_was_killed_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(V1, tmp_path / "v1")
    monkeypatch.chdir(tmp_path / "v1")
    assert run(["train", "--resume", "stopped"]) == 0
    check_close(torch.load("stopped/model.pt"), V1 / "expected-stopped.pt")
    assert len(Path("stopped/metrics.jsonl").read_text().splitlines()) == 3


def test_a_finished_run_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(V1, tmp_path / "v1")
    monkeypatch.chdir(tmp_path / "v1")
    assert run(["report", "run", "--out", "report.html"]) == 0
    assert "dtrp" in Path("report.html").read_text()
    assert run(["train", "--resume", "run", "--epochs", "3"]) == 0


def test_a_plan_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = dtrp.Plan.load(V1 / "plan.json")
    assert len(plan.keep) == 2
    assert plan.verdict is plan.spread is plan.alternatives[0].spread is None, "which it does not tell"
    plan.save(tmp_path / "again.json")
    assert dtrp.Plan.load(tmp_path / "again.json") == plan
    shutil.copytree(V1, tmp_path / "v1")
    monkeypatch.chdir(tmp_path / "v1")
    words = (
        "train --data text --model gpt --data-dir text.txt --layers 2 --width 8 --heads 2 --context 8 "
        "--plan plan.json --epochs 1"
    )
    assert run([*words.split(), "--out", "planned"]) == 0
