"""``--callback``: what a run tells, to whom, in which order, and what becomes of a callback that fails."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from run_folders import metrics
from user_files import user_files

import dtrp
from dtrp.cli import run
from dtrp.train import EpochMetrics, RunStart, TrainConfig, Trainer, TrainResult, Update
from dtrp.train.config import config_text, read_settings

ROOT = Path(__file__).parents[2]
SOURCE = """
import json
import dtrp


class Log(dtrp.Callback):
    def __init__(self, fails=""):
        self.fails = fails

    def tell(self, method, **values):
        with open("told.jsonl", "a") as file:
            file.write(json.dumps([method, values]) + "\\n")
        if method == self.fails:
            raise RuntimeError("no network")

    def start(self, run):
        self.tell("start", update=run.update, total=run.total_updates, folder=str(run.folder), lr=run.settings["lr-schedule"])

    def update(self, update):
        self.tell("update", number=update.number, epoch=update.epoch, loss=float(update.loss), lr=update.lr, samples=update.samples)

    def epoch(self, metrics, stages):
        self.tell("epoch", update=metrics.update, accuracy=metrics.test_accuracy, stages=stages)

    def save(self, update):
        self.tell("save", update=update)

    def finish(self, result):
        self.tell("finish", whole=result is not None)


class Some:
    \"\"\"No subclass, and one method alone.\"\"\"

    def epoch(self, metrics, stages):
        print("epoch", metrics.epoch, "told")


def failing_update():
    return Log("update")


def failing_start():
    return Log("start")


def failing_finish():
    return Log("finish")


def failing_epoch():
    return Log("epoch")


def nothing():
    return 3


def no_key():
    raise KeyError("WANDB_API_KEY")
"""
LOGS = "logs_of_a_test.py"
SMALL = ["train", "--model", "mlp", "--limit-train", "200", "--limit-test", "50", "--stages", "2", "--threads", "1", "--quiet",
         "--num-microbatches", "2", "--batch-size", "50", "--epochs", "2"]  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    with user_files(tmp_path, monkeypatch, {LOGS: SOURCE}) as place:
        yield place


def told() -> list[tuple[str, dict[str, Any]]]:
    import json

    return [tuple(json.loads(line)) for line in Path("told.jsonl").read_text().splitlines()]


def test_what_is_told_and_when(folder: Path) -> None:
    assert run([*SMALL, "--callback", f"{LOGS}:Log", "--save-every", "3", "--out", "run"]) == 0
    lines = told()
    assert [method for method, _ in lines] == [
        "start", "update", "update", "update", "save", "update", "epoch", "save",
        "update", "update", "save", "update", "update", "epoch", "save", "finish",
    ]  # fmt: skip
    assert lines[0][1] == {"update": 0, "total": 8, "folder": str(folder / "run"), "lr": "cosine"}
    updates = [values for method, values in lines if method == "update"]
    assert [(u["number"], u["epoch"], u["samples"]) for u in updates] == [(n, (n + 3) // 4, 50) for n in range(1, 9)]
    written = metrics(Path("run"))
    for epoch, line in enumerate(written):
        losses = [u["loss"] for u in updates[4 * epoch : 4 * epoch + 4]]
        assert sum(losses) / 4 == pytest.approx(line["train_loss"])
    assert updates[0]["lr"] == 0.03
    epochs = [values for method, values in lines if method == "epoch"]
    assert [values["accuracy"] for values in epochs] == [line["test_accuracy"] for line in written]
    assert {"delay/stage0", "delay/stage1", "memory_bytes/stage0"} <= epochs[0]["stages"].keys()
    assert lines[-1][1] == {"whole": True}
    assert "callback:\n- logs_of_a_test.py:Log" in Path("run/config").read_text()
    assert "logs_of_a_test.py:Log" in Path("run/code.json").read_text()
    assert run(["train", "--resume", "run", "--epochs", "3", "--quiet"]) == 0
    again = told()[len(lines) :]
    assert again[0][1]["update"] == 8
    assert [values["number"] for method, values in again if method == "update"] == [9, 10, 11, 12]


def test_several_callbacks_beside_tensorboard_and_console(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tensorboard")
    both = ["--callback", f"{LOGS}:Log", "--callback", "logs_of_a_test:Some"]
    assert run([*SMALL, *both, "--tensorboard", "--out", "run"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert [line for line in out if line.endswith("told")] == ["epoch 1 told", "epoch 2 told"]
    assert len([line for line in out if line.startswith("epoch   ")]) == 2
    assert len([method for method, _ in told() if method == "epoch"]) == 2
    assert len(list(Path("run/tensorboard").iterdir())) == 1


def test_they_change_nothing(folder: Path) -> None:
    assert run([*SMALL, "--callback", f"{LOGS}:Log", "--out", "told"]) == 0
    assert run([*SMALL, "--out", "silent"]) == 0
    assert metrics(Path("told")) == metrics(Path("silent"))


@pytest.mark.parametrize("method", ["start", "update", "epoch", "finish"])
def test_one_that_fails_ends_the_run_by_name(folder: Path, method: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*SMALL, "--callback", f"{LOGS}:Log", "--callback", f"{LOGS}:failing_{method}", "--save-every", "1"]
    assert run([*words, "--epochs", "1", "--out", "run"]) == 2
    error = capsys.readouterr().err
    assert f"--callback {LOGS}:failing_{method}, {method}: {LOGS}, line 14: RuntimeError: no network" in error
    assert len(error.splitlines()) == 1
    assert ("go on with: dtrp train --resume run" in error) == (method == "epoch")
    assert ("; the run itself is finished" in error) == (method == "finish")
    finishes = [values for name, values in told() if name == "finish"]
    assert finishes == [{"whole": method == "finish"}] * 2, "all are told of the end"
    assert Path("run/summary.json").exists() == (method == "finish")
    if method == "epoch":
        (folder / LOGS).write_text(SOURCE.replace('Log("epoch")', "Log()"))
        for name in [name for name in sys.modules if "logs_of_a_test" in name]:
            del sys.modules[name]
        assert run(["train", "--resume", "run", "--quiet"]) == 0
        assert "has changed since this run began" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Log", "--callback Log: pass package.module:name"),
        (f"{LOGS}:Lug", "unknown function 'Lug'; did you mean 'Log'"),
        (f"{LOGS}:nothing", "is a int without start, update, epoch, save and finish; name a subclass of dtrp.Callback"),
        (f"{LOGS}:no_key", "KeyError: 'WANDB_API_KEY'"),
    ],
)
def test_what_is_no_callback(folder: Path, name: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*SMALL, "--callback", name, "--out", "run"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1
    assert not Path("run").exists()


def test_callbacks_of_a_program() -> None:
    class Count(dtrp.Callback):
        def __init__(self) -> None:
            self.starts: list[RunStart] = []
            self.updates: list[Update] = []
            self.epochs: list[EpochMetrics] = []
            self.end: TrainResult | None = None

        def start(self, run: RunStart) -> None:
            self.starts.append(run)

        def update(self, update: Update) -> None:
            self.updates.append(update)

        def epoch(self, metrics: EpochMetrics, stages: Mapping[str, float]) -> None:
            self.epochs.append(metrics)

        def finish(self, result: TrainResult | None) -> None:
            self.end = result

    count = Count()
    result = Trainer(TrainConfig(model="mlp", limit_train=100, limit_test=20, epochs=2, stages=1)).run(
        callbacks=[count]
    )
    assert [update.number for update in count.updates] == [1, 2, 3, 4]
    assert count.end is result
    assert tuple(count.epochs) == result.epochs
    assert count.starts[0].folder is None


def test_the_setting_comes_back_from_a_file() -> None:
    settings = read_settings(config_text(TrainConfig(callback=("a.py:B", "c:D"))))
    assert settings is not None
    assert settings["callback"] == ["a.py:B", "c:D"]


class _Recorded(types.ModuleType):
    """A package that notes how its functions are called."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def call(*arguments: Any, **keywords: Any) -> Any:
            self.calls.append((name, arguments, keywords))
            return self

        return call


@pytest.mark.parametrize("package", ["wandb", "mlflow"])
def test_the_examples_of_the_documents(folder: Path, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "looking.md").read_text(), re.S)
    (block,) = [block for block in blocks if f"import {package}" in block]
    assert len([line for line in block.splitlines() if line.strip()]) <= 20
    (folder / f"{package}_of_a_test.py").write_text(block)
    fake = _Recorded(package)
    monkeypatch.setitem(sys.modules, package, fake)
    name = re.search(r"class (\w+)", block)
    assert name is not None
    assert run([*SMALL, "--callback", f"{package}_of_a_test.py:{name[1]}", "--out", "run"]) == 0
    names = [call[0] for call in fake.calls]
    logged = [call for call in fake.calls if "step" in call[2]]
    assert {call[2]["step"] for call in logged} >= {4, 8}
    assert any("accuracy" in str(call[1]) for call in logged)
    assert names[-1] in ("finish", "end_run")


@pytest.mark.full
def test_one_worker_of_several_tells(folder: Path) -> None:
    words = [*SMALL, "--callback", f"{LOGS}:Log", "--workers", "2", "--out", "run"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "dtrp", *words], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    lines = told()
    assert [method for method, _ in lines].count("start") == 1
    assert [values["number"] for method, values in lines if method == "update"] == list(range(1, 9))
    assert {"delay/stage0", "delay/stage1"} <= next(v for m, v in lines if m == "epoch")["stages"].keys()
    words[words.index(f"{LOGS}:Log")] = f"{LOGS}:failing_update"
    failed = subprocess.run(
        [sys.executable, "-m", "dtrp", *words, "--overwrite"],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert failed.returncode == 2
    assert failed.stderr.count("\n") == 1
    assert "line 14: RuntimeError: no network" in failed.stderr
