"""`dtrp compare`: the grid, what is repeated and what is not, and the numbers it shows."""

from __future__ import annotations

import dataclasses
import gc
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import time
import weakref
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers import minibatches, network, pipeline, sgd
from rich.console import Console
from run_folders import write_run

import dtrp
from dtrp.cli import Stopped, run
from dtrp.cli.console import show_comparison
from dtrp.measure.prediction_error import look_every
from dtrp.train import TrainConfig
from dtrp.train.comparison import (
    Cell,
    Comparison,
    grid,
    group_cells,
    largest_delay,
    megabytes_by_stage,
    peak_bytes,
    prediction_error,
    read_summary,
    shown_delay,
    weight_distance,
)  # fmt: skip

SMALL = [
    "--data",
    "digits",
    "--model",
    "mlp",
    "--epochs",
    "1",
    "--limit-train",
    "100",
    "--limit-test",
    "50",
    "--threads",
    "1",
]
BASE = TrainConfig(data="digits", model="mlp", epochs=1, limit_train=100, limit_test=50, threads=1)


def test_a_grid_is_every_combination_once() -> None:
    cells = grid(["bp", "fdg", "dtrp"], [2, 4], ["1", "K"], [0, 1], ["linear", "rollout"], once=True)
    assert len(cells) == len(set(cells))
    assert {(c.stages, c.num_microbatches) for c in cells if c.method == "bp"} == {(2, 1), (2, 2), (4, 4)}, (
        "once for each A"
    )
    assert {c.prediction for c in cells if c.method == "fdg"} == {None}
    assert {c.prediction for c in cells if c.method == "dtrp"} == {"linear", "rollout"}
    assert {(c.stages, c.num_microbatches) for c in cells if c.method == "dtrp"} == {(2, 1), (2, 2), (4, 1), (4, 4)}
    assert [c.seed for c in cells] == sorted(c.seed for c in cells)
    assert len({c.name for c in cells}) == len(cells)
    assert {c.stages for c in grid(["bp"], [2, 4], ["1"], [0])} == {2, 4}
    both = grid(["bp", "gpipe"], [2, 4], ["1"], [0, 1], once=True)
    assert [(c.method, c.stages, c.seed) for c in both] == [(m, 2, seed) for seed in (0, 1) for m in ("bp", "gpipe")]
    with pytest.raises(ValueError, match="--num-microbatches x"):
        grid(["bp"], [2], ["x"], [0])


def command(out: Path, *options: str) -> list[str]:
    grid = ["--methods", "bp,dtrp", "--stages", "2", "--num-microbatches", "1", "--seeds", "2", "--one-process"]
    return ["compare", *SMALL, *grid, "--out", str(out), *options]


def test_the_command_runs_the_grid_and_repeats_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "grid"
    assert run(command(out, "--prediction-error-every", "1")) == 0
    shown = capsys.readouterr().out
    assert "cell 4 of 4: dtrp-K2-A1-seed1" in shown
    for word in ("accuracy", "±", "memory by stage, MB", "distance of weights, %", "prediction error"):
        assert word in shown
    folders = sorted(path.name for path in out.iterdir())
    cells = ["bp-K2-A1-seed0", "bp-K2-A1-seed1", "dtrp-K2-A1-seed0", "dtrp-K2-A1-seed1"]
    assert folders == sorted([*cells, "compare.yaml", "results.json"])
    times = {path: path.stat().st_mtime_ns for path in out.glob("*/summary.json")}
    assert run(command(out, "--prediction-error-every", "1")) == 0
    assert "4 of 4 cells are finished already" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in out.glob("*/summary.json")} == times
    assert run(command(out, "--prediction-error-every", "1", "--seeds", "3")) == 0
    assert "cell 2 of 2" in capsys.readouterr().out
    assert run(command(out, "--lr", "0.5")) == 2
    assert "holds runs of other settings" in capsys.readouterr().err


def test_what_it_does_unless_it_is_told_otherwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Comparison] = []
    monkeypatch.setattr(Comparison, "run", lambda self, work, say: seen.append(self) or [])
    arguments = ["compare", "--methods", "bp,dtrp", "--stages", "2,4", "--seeds", "1", "--out", str(tmp_path / "grid")]
    for options in ([], ["--workers"], ["--once"], ["--workers", "--once"]):
        assert run([*arguments, *options]) == 0
    flushing = [[cell.stages for cell in comparison.cells if cell.method == "bp"] for comparison in seen]
    assert flushing == [[2, 4], [2, 4], [2], [2]], "all of the grid: time and memory are those of a K"
    assert seen[0].base.prediction_error_every == "auto"
    assert {(cell.stages, cell.num_microbatches) for cell in seen[0].cells} == {(2, 2), (4, 4)}
    assert seen[0].base.microbatch_samples == 2
    assert run([*arguments, "--num-microbatches", "1,K"]) == 0
    assert {(cell.stages, cell.num_microbatches) for cell in seen[-1].cells} == {(2, 1), (2, 2), (4, 1), (4, 4)}
    assert seen[-1].base.microbatch_samples is None


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="counts the cores of Linux")
@pytest.mark.parametrize(
    ("cores", "words", "in_workers"),
    [
        (5, [], True),
        (4, [], False),
        (4, ["--workers"], True),
        (5, ["--one-process"], False),
        (5, ["--device", "meta"], False),
        (2, ["--stages", "1"], False),
    ],
)
def test_a_process_for_each_stage_where_it_shows_the_time(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    cores: int,
    words: list[str],
    in_workers: bool,
) -> None:
    """And what is said of times; a comparison that is gone on with stays what it was."""
    seen: list[Comparison] = []
    monkeypatch.setattr(Comparison, "run", lambda self, work, say: seen.append(self) or [])
    monkeypatch.setattr(Comparison, "groups", lambda self: [True])
    monkeypatch.setattr("dtrp.cli.console.show_comparison", lambda groups: None)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)))
    out = tmp_path / "grid"
    command = ["compare", "--methods", "dtrp", "--stages", "4", "--out", str(out), *words]
    assert run(command) == 0
    assert (seen[0].base.workers is not None) == in_workers
    said = capsys.readouterr().out.strip()
    if in_workers:
        assert said.startswith("times are of workers")
    elif words:
        assert said.startswith("times are of one process")
    else:
        assert said.endswith(
            "4 workers need a core each and one more, and this machine has 4; --workers measures it all the same"
        )
    out.mkdir()
    (out / "compare.yaml").write_text(seen[0]._settings)
    for now in (1, 64):
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid, now=now: set(range(now)))
        assert run(command) == 0
        assert seen[-1].base.workers == seen[0].base.workers


def test_where_predictions_are_looked_at() -> None:
    for parts in range(1, 17):
        for total in (*range(1, 80), 1000):
            every = look_every(total, parts)
            assert every == 1 or total // every >= 4, "a short run has looks too"
            places = {microbatch % parts for microbatch in range(0, parts * every, every)}
            assert places == set(range(parts)), "every place in a mini-batch is looked at"
        assert look_every(1000, parts) == 17
    assert look_every(1000, 17) == 13


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_what_is_told_to_stop_begins_no_other_cell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: int, code: int
) -> None:
    def stopped(config: TrainConfig) -> None:
        raise Stopped("interrupted", 128 + number)

    monkeypatch.setattr("dtrp.cli.running.train_in_workers", stopped)
    assert run(command(tmp_path / "grid", "--workers")) == code
    shown = capsys.readouterr()
    assert shown.err == "dtrp: interrupted\n"
    assert "cell 1 of 4" in shown.out
    assert "cell 2 of 4" not in shown.out
    assert [path.name for path in (tmp_path / "grid").iterdir()] == ["compare.yaml"], "nothing has failed"


@pytest.mark.full
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_end_it_on_workers_too(tmp_path: Path, number: int) -> None:
    arguments = [sys.executable, "-m", "dtrp", *command(tmp_path / "grid", "--epochs", "100000", "--workers")]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        while "epoch   2" not in process.stdout.readline():
            assert process.poll() is None
        process.send_signal(number)
        text, error = process.communicate(timeout=60)
    finally:
        process.kill()
    assert (process.returncode, error) == (128 + number, "dtrp: interrupted\n")
    assert "cell 2" not in text
    assert not list((tmp_path / "grid").glob("*.failed"))


def test_what_a_cell_held_is_gone_before_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its data too, which a run refers to in a circle: many cells run in one process."""

    class Held:
        def __init__(self) -> None:
            self.itself = self

    held: list[weakref.ref[Held]] = []

    def work(config: TrainConfig) -> None:
        assert all(ref() is None for ref in held)
        held.append(weakref.ref(Held()))

    monkeypatch.setattr("dtrp.train.comparison.COLLECT_FROM_S", 0.0)
    gc.disable()
    try:
        Comparison(BASE, grid(["bp", "dtrp", "fdg"], [2], ["1"], [0]), str(tmp_path / "grid")).run(
            work, lambda line: None
        )
    finally:
        gc.enable()
    assert len(held) == 3


def test_a_cell_that_fails_loses_nothing_of_the_others(tmp_path: Path) -> None:
    cells = grid(["bp", "dtrp", "fdg"], [2], ["1"], [0])
    comparison = Comparison(BASE, cells, str(tmp_path / "grid"))
    said: list[str] = []

    def work(config: TrainConfig) -> None:
        folder = Path(str(config.out))
        folder.mkdir()
        (folder / "half").write_text("")
        if config.method == "dtrp":
            raise RuntimeError("no\nluck")
        (folder / "summary.json").write_text(json.dumps({"stages": [], "test_accuracy": 1.0}))

    assert comparison.run(work, said.append) == [cells[1]]
    assert "dtrp-K2-A1-seed0 failed: no luck" in said
    assert comparison.failure(cells[1]) == "no luck"
    assert [group.cell.method for group in comparison.groups()] == ["bp", "fdg"]

    def luckier(config: TrainConfig) -> None:
        assert config.method == "dtrp", "the others are not repeated"
        assert not Path(str(config.out)).exists(), "what was half done is gone"
        Path(str(config.out)).mkdir()
        Path(str(config.out), "summary.json").write_text(json.dumps({"stages": [], "test_accuracy": 1.0}))

    assert comparison.run(luckier, said.append) == []
    assert comparison.failure(cells[1]) is None
    assert len(comparison.groups()) == 3


@pytest.mark.full
def test_a_comparison_that_is_killed_goes_on_where_it_was(tmp_path: Path) -> None:
    out = tmp_path / "grid"
    arguments = [sys.executable, "-m", "dtrp", *command(out, "--epochs", "8", "--seeds", "4")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, env=environment, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("cell 3 "):
            time.sleep(0.1)
            process.send_signal(signal.SIGKILL)
            break
    process.communicate()
    finished = {path: path.stat().st_mtime_ns for path in out.glob("*/summary.json")}
    assert 2 <= len(finished) < 8
    again = subprocess.run(arguments, capture_output=True, env=environment, text=True, check=True)
    assert f"{len(finished)} of 8 cells are finished already" in again.stdout
    assert len(list(out.glob("*/summary.json"))) == 8
    assert {path: path.stat().st_mtime_ns for path in finished} == finished


def test_what_a_kill_leaves_is_no_hindrance(tmp_path: Path) -> None:
    cells = grid(["bp"], [2], ["1"], [0])
    out = tmp_path / "grid"
    out.mkdir()
    (out / ".compare.yaml.x1y2").write_text("half of the sett")
    comparison = Comparison(BASE, cells, str(out))
    (out / ".bp-K2-A1-seed0.ab12").mkdir()
    (out / ".bp-K2-A1-seed0.ab12" / "metrics.jsonl").touch()
    (out / ".bp-K2-A1-seed0.failed.cd34").write_text("half of a no")
    (out / "bp-K2-A1-seed0.failed").touch()
    assert comparison.failure(cells[0]) == "its note is empty"
    assert comparison.run(lambda config: None, lambda line: None) == []
    assert sorted(path.name for path in out.iterdir()) == [".compare.yaml.x1y2", "compare.yaml"]
    written = (out / "compare.yaml").stat().st_ino
    Comparison(BASE, cells, str(out)).run(lambda config: None, lambda line: None)
    assert (out / "compare.yaml").stat().st_ino == written, "settings that agree are not written again"


def test_notes_and_settings_are_there_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(config: TrainConfig) -> None:
        raise RuntimeError("no luck")

    replaced: list[str] = []
    replace = Path.replace
    monkeypatch.setattr(Path, "replace", lambda self, to: replaced.append(Path(to).name) or replace(self, to))
    cells = grid(["bp"], [2], ["1"], [0])
    assert Comparison(BASE, cells, str(tmp_path / "grid")).run(broken, lambda line: None) == cells
    assert replaced == ["compare.yaml", "bp-K2-A1-seed0.failed"]


def test_a_cell_is_the_run_of_dtrp_train(tmp_path: Path) -> None:
    assert run(command(tmp_path / "grid")) == 0
    train = ["train", *SMALL, "--method", "dtrp", "--stages", "2", "--num-microbatches", "1", "--seed", "1",
             "--out", str(tmp_path / "run")]  # fmt: skip
    assert run(train) == 0
    a, b = (read_summary(tmp_path / name) for name in ("grid/dtrp-K2-A1-seed1", "run"))
    assert a is not None
    assert b is not None
    assert a["test_loss"] == b["test_loss"]
    assert [stage["delays"] for stage in a["stages"]] == [stage["delays"] for stage in b["stages"]]


@pytest.mark.full
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # torch's launcher leaves logs open
def test_in_workers(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "grid"
    arguments = ["compare", *SMALL, "--methods", "dtrp", "--stages", "2", "--seeds", "1", "--out", str(out)]
    assert run([*arguments, "--workers"]) == 0
    local = tmp_path / "local"
    assert run([*arguments[:-1], str(local), "--one-process"]) == 0
    a, b = (read_summary(folder / "dtrp-K2-A2-seed0") for folder in (out, local))
    assert a is not None
    assert b is not None
    assert a["test_loss"] == b["test_loss"]
    assert [stage["stage"] for stage in a["stages"]] == [0, 1]
    assert a["stages"][1]["busy"]["wait_forward"] > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--methods", "bp,dtrq"], "did you mean 'dtr"),
        (["--stages", "two"], "no list of whole numbers"),
        (["--stages", "0"], "--stages 0: at least 1"),
        (["--stages", "2,50"], "num_stages=50 but the model has"),
        (["--num-microbatches", "k"], "--num-microbatches k"),
        (["--predictions", "cubic"], "cubic"),
        (
            ["--prediction-error-every", "often"],
            "--prediction-error-every often: a whole number of at least 0, or auto",
        ),
        (["--lr", "-1"], "--lr -1.0"),
    ],
)
def test_wrong_use(tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str) -> None:
    assert run(command(tmp_path / "grid", *options)) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "grid").exists()


def test_settings_that_an_older_version_did_not_have(tmp_path: Path) -> None:
    cells = grid(["bp"], [2], ["1"], [0])
    known = tmp_path / "grid" / "compare.yaml"
    Comparison(BASE, cells, str(known.parent)).run(lambda config: None, lambda line: None)
    settings = yaml.safe_load(known.read_text())
    assert settings.pop("tensorboard") is False
    known.write_text(yaml.safe_dump(settings))
    Comparison(BASE, cells, str(known.parent))
    for other in (yaml.safe_dump({**settings, "momentum": 0.5}), "[", "dtrp"):
        known.write_text(other)
        with pytest.raises(
            ValueError, match=r"holds runs of other settings \((momentum 0.5 and not 0.9|no settings), in "
        ):
            Comparison(BASE, cells, str(known.parent))
    with pytest.raises(ValueError, match="holds runs of other settings"):
        known.write_text(yaml.safe_dump(settings))
        Comparison(dataclasses.replace(BASE, momentum=0.5), cells, str(known.parent))


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine").write_text("")
    assert run(command(tmp_path)) == 2
    assert "is no comparison" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_a_short_run_has_every_number_of_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*command(tmp_path / "grid"), "--methods", " bp, dtrp", "--stages", "1, 2"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in lines]
    assert [row[:4] for row in rows] == [[m, k, "1", "2"] for k in "12" for m in ("bp", "dtrp")]
    summaries = [read_summary(tmp_path / "grid" / f"dtrp-K2-A1-seed{seed}") for seed in range(2)]
    assert all(summaries)
    assert all(datetime.fromisoformat(summary["ended"]).tzinfo for summary in summaries if summary)
    for row in rows[:3]:
        assert row[8:] == ["0", "-", "-"], "without a delay weights are those of then"
    for cell, number, factor in ((rows[3][9], weight_distance, 100), (rows[3][10], prediction_error, 1)):
        each = [factor * number(summary) for summary in summaries if summary]
        shown = [float(word) for word in cell.split(" ± ")]
        assert shown == pytest.approx([statistics.fmean(each), statistics.stdev(each)], abs=0.01)
    assert rows[3][8] == "1"


def write_cells(folder: Path, cells: dict[str, list[float]], **config: Any) -> Comparison:
    """A comparison of finished runs with such test losses, whose accuracies are 1 less the loss."""
    found = []
    for name, losses in cells.items():
        method, stages, seed = name.split()
        cell = Cell(method, int(stages), 1, int(seed))
        write_run(folder / cell.name, method, cell.seed, stages=cell.stages, epochs=len(losses), **config)
        lines = [
            {"epoch": e, "update": 10 * e, "train_loss": 1.0, "test_loss": loss, "test_accuracy": 1 - loss,
             "samples_per_s": 1.0, "elapsed_s": 1.0}
            for e, loss in enumerate(losses, 1)
        ]  # fmt: skip
        (folder / cell.name / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        found.append(cell)
    (folder / "compare.yaml").write_text(Comparison(BASE, found, str(folder.parent / "new"))._settings)
    return Comparison(BASE, found, str(folder))


def test_how_much_more_training_than_bp(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In the table and in results.json, of a folder that an older version has left without it."""
    comparison = write_cells(
        tmp_path / "grid",
        {
            "bp 2 0": [0.9, 0.4], "bp 2 1": [0.9, 0.2],  # on average 0.3 at 20 updates
            "fdg 2 0": [0.9, 0.8, 0.8], "fdg 2 1": [0.9, 0.8, 0.8],
            "dtrp 2 0": [0.9, 0.5, 0.1], "dtrp 2 1": [0.9, 0.5, 0.1],
            "dtrp 4 0": [0.3, 0.2, 0.1], "dtrp 4 1": [0.3, 0.3, 0.3],  # beside bp with 2 stages
        },
    )  # fmt: skip
    assert comparison.run(lambda config: pytest.fail("all are finished"), lambda line: None) == []
    show_comparison(comparison.groups())
    shown = capsys.readouterr().out
    table = [line.split() for line in shown[shown.index("samples to come to") :].splitlines()[4:7]]
    # At 25 updates, by seed at 22.5 and 27.5.
    needed = ["1.25", "(1.12", "to", "1.38)"]
    assert table == [
        ["fdg", "2", "1", *["not", "reached"] * 2],
        ["dtrp", "2", "1", *needed * 2],
        ["dtrp", "4", "1", *["0.50", "(1", "of", "2", "seeds)"] * 2],
    ]
    rows = json.loads((tmp_path / "grid" / "results.json").read_text())
    assert [(row["method"], row["stages"], row["seeds"]) for row in rows] == [
        ("bp", 2, [0, 1]), ("fdg", 2, [0, 1]), ("dtrp", 2, [0, 1]), ("dtrp", 4, [0, 1]),
    ]  # fmt: skip
    loss = [row["samples_over_bp"]["test_loss"] for row in rows]
    assert loss[0] == {
        "level": pytest.approx(0.3),
        "bp_updates": pytest.approx(20.0),
        "ratio": 1.0,
        "by_seed": [1.0, 1.0],
    }
    assert (loss[1]["ratio"], loss[1]["by_seed"]) == (None, [None, None])
    assert (loss[2]["ratio"], loss[2]["by_seed"]) == (pytest.approx(1.25), pytest.approx([1.125, 1.375]))
    accuracy = rows[2]["samples_over_bp"]["test_accuracy"]
    assert (accuracy["level"], accuracy["ratio"]) == (pytest.approx(0.7), pytest.approx(1.25))


@pytest.mark.parametrize("missing", ["bp", "its seed 1", "a line", "lines", "its last loss"])
def test_how_much_more_training_where_something_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], missing: str
) -> None:
    cells = {f"{method} 2 {seed}": [0.9, 0.4] for method in ("bp", "dtrp") for seed in range(2)}
    gone = {"bp": ["bp 2 0", "bp 2 1"], "its seed 1": ["bp 2 1"]}.get(missing, [])
    comparison = write_cells(tmp_path / "grid", {name: losses for name, losses in cells.items() if name not in gone})
    metrics = tmp_path / "grid" / "bp-K2-A1-seed0" / "metrics.jsonl"
    if missing == "a line":
        metrics.write_text(metrics.read_text() + '{"epoch": 4')
    elif missing == "lines":
        metrics.unlink()
    elif missing == "its last loss":
        metrics.write_text(metrics.read_text().replace('"test_loss": 0.4', '"test_loss": NaN'))
    show_comparison(comparison.groups())
    shown = capsys.readouterr().out
    ends = {"its seed 1": "1.00 1.00", "its last loss": "1.00 (1.00 to 1.00) -"}.get(missing)
    assert ("samples to come to" in shown) == (ends is not None)
    if ends is not None:
        assert f"dtrp 2 1 {ends}" in " ".join(shown.split())


def test_text_is_compared_in_its_loss(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    comparison = write_cells(tmp_path / "grid", {"bp 2 0": [0.9, 0.5], "dtrp 2 0": [0.7, 0.5]}, data="text")
    show_comparison(comparison.groups())
    shown = capsys.readouterr().out
    assert "bp's test loss" in shown
    assert "bp's accuracy" not in shown
    assert shown.splitlines()[-2].split() == ["dtrp", "2", "1", "1.00"]


def test_a_folder_that_takes_no_file_is_shown_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    comparison = write_cells(tmp_path / "grid", {"bp 2 0": [0.9, 0.5]})

    def full(path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("dtrp.train.comparison.whole_file", full)
    said: list[str] = []
    assert comparison.run(lambda config: None, said.append) == []
    assert said[-1].endswith("results.json cannot be written (No space left on device)")


@pytest.mark.parametrize("width", [80, 220])
def test_the_table_fits_the_terminal(
    width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    memory = {"weights": 10**7, "optimizer": 0, "predicted": 0, "gradients": 0, "gradients_peak": 0}
    stages = [
        {"memory": memory, "activations_peak": 0, "delays": {"5": 1}, "prediction_errors": [[1, 5, 0.00123, 0.01]]}
    ] * 4
    summary = {"stages": stages, "test_accuracy": 0.6543, "test_loss": 1.234, "minibatch_s": 0.1234}
    cells = [
        (Cell("dtrp-1f1b", 4, 2, seed, "rollout"), {**summary, "minibatch_s": 0.1234 + 0.01 * seed})
        for seed in range(3)
    ]
    monkeypatch.setattr("dtrp.cli.console._wide_console", lambda: Console(width=width))
    show_comparison(group_cells(cells))
    lines = capsys.readouterr().out.splitlines()
    text = " ".join(lines)
    assert max(map(len, lines)) <= width
    assert "…" not in text
    accuracy_and_time = ("65.43 ± 0.00 %", "1.234 ± 0.000", "133 ± 10 ms")
    for words in ("(rollout)", *accuracy_and_time, " 0.123 ± 0.000", "0.12 ± 0.00"):
        assert words in text
    assert text.count("10.0") == 4
    assert text.count("dtrp-1f1b") == (2 if width == 80 else 1)


def test_memory_and_delay_have_a_spread_where_seeds_differ() -> None:
    def summary(weights: int, delay: str) -> dict[str, Any]:
        memory = {"weights": weights, "optimizer": 0, "predicted": 0, "gradients": 0, "gradients_peak": 0}
        stage = {"memory": memory, "activations_peak": 40_000, "delays": {"0": 1, delay: 1}, "prediction_errors": []}
        return {"stages": [stage, {**stage, "memory": {**memory, "weights": 123_000_000}}]}

    same = [summary(10_000, "3")] * 2
    assert (megabytes_by_stage(same), shown_delay(same)) == (["0.05", "123"], "3")
    assert (megabytes_by_stage(same[:1]), shown_delay(same[:1])) == (["0.05", "123"], "3")
    other = [summary(1_000_000, "3"), summary(3_000_000, "6")]
    assert (megabytes_by_stage(other), shown_delay(other)) == (["2.0±1.4", "123"], "4.5 ± 2.1")


def test_means_and_deviations() -> None:
    def summary(accuracy: float) -> dict[str, Any]:
        return {"stages": [], "test_accuracy": accuracy}

    cells = [Cell("bp", 2, 1, 0), Cell("dtrp", 2, 1, 0), Cell("bp", 2, 1, 1)]
    bp, dtrp_ = group_cells([(cell, summary(0.5 + 0.1 * cell.seed)) for cell in cells])
    assert bp.mean(lambda s: s["test_accuracy"]) == (pytest.approx(0.55), pytest.approx(0.1 / math.sqrt(2)))
    assert dtrp_.mean(lambda s: s["test_accuracy"])[0] == 0.5
    assert math.isnan(dtrp_.mean(lambda s: s["test_accuracy"])[1])
    none = dataclasses.replace(bp, summaries=(summary(math.nan), summary(0.5)))
    assert all(math.isnan(value) for value in none.mean(lambda s: s["test_accuracy"]))


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("method", ["fdg", "dtrp", "spectrain", "dtr"])
def test_the_prediction_error_is_the_distance_of_the_weights(method: str) -> None:
    """By the equations, from the weights of every version."""
    pipe = pipeline(network(), sgd, num_stages=3, method=method)
    pipe.watch_prediction(every=2)
    versions: list[list[list[torch.Tensor]]] = [
        [[p.detach().clone() for p in stage.parameters()]] for stage in pipe.stages
    ]
    for x, y in minibatches(14):
        pipe.step(x, y)
        for own, stage, inner in zip(versions, pipe.stages, pipe._engine.stages, strict=True):
            if inner.version == len(own):
                own.append([p.detach().clone() for p in stage.parameters()])
    errors = pipe.prediction_errors()
    assert {error.stage for error in errors} == {0, 1}, "the last stage has no delay"
    for error in errors:
        if error.minibatch >= len(versions[error.stage]):
            continue
        true = torch.cat([p.flatten() for p in versions[error.stage][error.minibatch]])
        then = torch.cat([p.flatten() for p in versions[error.stage][error.minibatch - error.delay]])
        assert error.stale == pytest.approx(float((then - true).norm() / true.norm()), rel=1e-9)
        if method in ("fdg", "dtr"):
            assert error.read == error.stale
        elif error.minibatch > error.delay:  # later than the first update, before which nothing is predicted
            assert error.read != error.stale
    assert len(errors) >= 8


def test_numbers_of_a_summary() -> None:
    memory = {
        "weights": 10,
        "optimizer": 20,
        "predicted": 5,
        "gradients": 0,
        "gradients_peak": 6,
        "stash": 0,
        "stash_peak": 7,
    }
    stages = [
        {"memory": memory, "activations_peak": 9, "delays": {"0": 3, "10": 2}, "prediction_errors": [[1, 2, 0.5, 1.0]]},
        {
            "memory": memory,
            "activations_peak": 1,
            "delays": {"9": 1},
            "prediction_errors": [[1, 2, 0.1, 0.1], [1, 1, 0.0, 0.0]],
        },
    ]
    summary = {"stages": stages}
    assert peak_bytes(summary) == [50, 42]
    assert largest_delay(summary) == 10
    assert prediction_error(summary) == pytest.approx(0.75)
    assert weight_distance(summary) == pytest.approx(0.2)
    assert math.isnan(weight_distance({"stages": []}))
    assert math.isnan(prediction_error({"stages": []}))


def test_watching_changes_nothing() -> None:
    def losses(*, watch: bool) -> list[float]:
        torch.manual_seed(0)
        pipe = dtrp.Pipeline(
            network(), sgd, torch.nn.functional.cross_entropy, num_stages=4, seed=0, num_microbatches=1
        )
        if watch:
            pipe.watch_prediction()
        return [float(pipe.step(x, y)) for x, y in minibatches(8)]  # type: ignore[arg-type]

    assert losses(watch=True) == losses(watch=False)
