"""`--tensorboard`: the events of a run hold what its files hold, each step once."""

from __future__ import annotations

import importlib.util
import json
import shutil
import statistics
from pathlib import Path
from typing import Any

import pytest

from dtrp.cli import run
from dtrp.train.comparison import peak_bytes

pytest.importorskip("tensorboard")

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

SMALL = ["train", "--model", "mlp", "--limit-train", "500", "--limit-test", "100", "--stages", "3", "--threads", "1", "--quiet",
         "--num-microbatches", "2", "--warmup-updates", "4", "--prediction-error-every", "1", "--tensorboard"]  # fmt: skip


def scalars(folder: Path, inside: str = "tensorboard") -> dict[str, dict[int, float]]:
    """Every scalar's values by step; each step is there once."""
    accumulator = EventAccumulator(str(folder / inside), size_guidance={"scalars": 0})
    accumulator.Reload()
    found: dict[str, dict[int, float]] = {}
    for tag in accumulator.Tags()["scalars"]:
        events = accumulator.Scalars(tag)
        steps = [event.step for event in events]
        assert steps == sorted(set(steps)), tag
        found[tag] = {event.step: event.value for event in events}
    return found


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert run([*SMALL, "--epochs", "3", "--save-every", "3", "--keep-last", "9", "--out", str(folder)]) == 0
    return folder


def test_the_events_hold_what_the_files_hold(whole: Path) -> None:
    found = scalars(whole)
    summary = json.loads((whole / "summary.json").read_text())
    for tag, name in (("loss/train", "train_loss"), ("loss/test", "test_loss"), ("accuracy/test", "test_accuracy")):
        assert found[tag] == {line["update"]: pytest.approx(line[name]) for line in lines(whole)}
    updates = range(1, 25)
    assert list(found["loss/minibatch"]) == list(found["lr"]) == list(updates)
    epoch = [found["loss/minibatch"][n] * (64 if n < 8 else 500 - 7 * 64) for n in range(1, 9)]
    assert sum(epoch) / 500 == pytest.approx(lines(whole)[0]["train_loss"])
    assert found["lr"][1] == pytest.approx(0.03 / 5), "that of the update, in its warm-up"
    assert all(value > 0 for value in found["samples_per_s"].values())
    for stage, peak in zip(summary["stages"], peak_bytes(summary), strict=True):
        k = stage["stage"]
        assert list(found[f"delay/stage{k}"]) == [8, 16, 24]
        counts = {int(delay): count for delay, count in stage["delays"].items()}
        mean = sum(delay * count for delay, count in counts.items()) / sum(counts.values())
        assert sum(found[f"delay/stage{k}"].values()) / 3 == pytest.approx(mean), "epochs are equally long"
        assert found[f"memory_bytes/stage{k}"][24] == peak
        ratios = [read / stale for _, _, read, stale in stage["prediction_errors"] if stale > 0]
        if not ratios:
            assert f"prediction_error/stage{k}" not in found
        else:
            assert min(ratios) <= found[f"prediction_error/stage{k}"][24] <= max(ratios)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("update", [6, 16])
def test_a_run_that_goes_on_doubles_no_step_and_lacks_none(whole: Path, tmp_path: Path, update: int) -> None:
    """As after a kill: events of later updates than the last save are there, and are made again."""
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    (folder / "summary.json").unlink()
    for save in (folder / "saves").iterdir():
        if int(save.name.split("-")[1]) > update:
            shutil.rmtree(save)
    assert run(["train", "--resume", str(folder), "--quiet"]) == 0
    found, expected = scalars(folder), scalars(whole)
    assert len(list((folder / "tensorboard").iterdir())) == 2
    assert found.keys() == expected.keys()
    for tag in found:
        if not tag.startswith(("samples_per_s", "prediction_error", "delay", "memory_bytes")):
            assert found[tag] == expected[tag], tag
    assert list(found["delay/stage0"]) == [8, 16, 24]


@pytest.mark.full
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # torch's launcher leaves logs open
def test_one_writer_tells_of_all_workers(whole: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    assert run([*SMALL, "--epochs", "2", "--workers", "3", "--out", str(folder)]) == 0, capfd.readouterr().err
    assert len(list((folder / "tensorboard").iterdir())) == 1
    found, local = scalars(folder), scalars(whole)
    assert found.keys() == local.keys()
    for k in range(3):
        assert found[f"delay/stage{k}"] == {step: local[f"delay/stage{k}"][step] for step in (8, 16)}
    assert len(found["loss/minibatch"]) == 16


def test_cells_of_a_comparison_have_theirs(tmp_path: Path) -> None:
    out = tmp_path / "grid"
    options = [option for option in SMALL[1:] if option not in ("--quiet", "--stages", "3", "--num-microbatches", "2")]
    arguments = [
        "compare",
        *options,
        "--one-process",
        "--methods",
        "bp,dtr",
        "--stages",
        "2",
        "--seeds",
        "1",
        "--epochs",
        "1",
        "--out",
        str(out),
    ]
    assert run(arguments) == 0
    for cell in ("bp-K2-A2-seed0", "dtr-K2-A2-seed0"):
        assert list(scalars(out / cell)["accuracy/test"]) == [8]


def test_a_report_writes_those_of_its_runs(whole: Path, tmp_path: Path) -> None:
    """Of runs that have none of their own; the second report voids the first."""
    pytest.importorskip("matplotlib")
    for folder in ("a", "b"):
        shutil.copytree(whole, tmp_path / folder / "run", ignore=shutil.ignore_patterns("tensorboard", "saves"))
    arguments = ["report", *(str(tmp_path / folder / "run") for folder in ("a", "b")), "--tensorboard"]
    for _ in range(2):
        assert run([*arguments, "--out", str(tmp_path / "out" / "report.html")]) == 0
    own = scalars(whole)
    for name in ("run", "run-2"):
        found = scalars(tmp_path / "out", f"tensorboard/{name}")
        for tag in ("loss/train", "loss/test", "accuracy/test"):
            assert found[tag] == own[tag]
        for k, stage in enumerate(json.loads((whole / "summary.json").read_text())["stages"]):
            assert found[f"memory_bytes/stage{k}"] == {24: own[f"memory_bytes/stage{k}"][24]}
            assert found[f"delay/stage{k}"][24] == pytest.approx(sum(own[f"delay/stage{k}"].values()) / 3)
            ratios: dict[int, list[float]] = {}
            for minibatch, _, read, stale in stage["prediction_errors"]:
                if stale > 0:
                    ratios.setdefault(int(minibatch), []).append(read / stale)
            means = {minibatch: pytest.approx(statistics.fmean(own)) for minibatch, own in ratios.items()}
            assert found.get(f"prediction_error/stage{k}", {}) == means


def test_wrong_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(SMALL) == 2
    assert "--tensorboard without --out" in capsys.readouterr().err
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert run([*SMALL, "--out", str(tmp_path / "run")]) == 2
    assert "pip install 'dtrp[tensorboard]'" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
