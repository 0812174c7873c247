"""Runs of `dtrp train` as lines of a raw file: what benchmarks/accuracy and benchmarks/datasets share.

A run is a line and is not repeated. One with a folder of its own saves itself there, and goes on after a stop.
"""

from __future__ import annotations

import gc
import json
import math
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dtrp.cli import run as dtrp
from dtrp.methods import get_method
from dtrp.train.comparison import Cell, largest_delay, prediction_error, read_summary

Row = dict[str, Any]
SETTINGS = ("method", "prediction", "stages", "num_microbatches", "seed", "model", "lr", "batch_size", "warmup_updates",
            "limit_train", "epochs")  # fmt: skip


def read_rows(path: Path) -> list[Row]:
    """The lines that are there."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def add_row(path: Path, row: Row) -> None:
    path.parent.mkdir(exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")


def train(
    settings: Mapping[str, str | None],
    name: str,
    path: Path,
    folder: Path | None,
    more: Callable[[Row], Row] = lambda summary: {},
) -> Row:
    """Train, or go on where ``folder`` has the run, and add its line to the file at ``path``.

    Args:
        settings: options of `dtrp train`; None: left out.
        name: name of the run.
        path: the raw file.
        folder: folder of the folders of runs, which save themselves there and are removed when they are through. None:
            the run is kept nowhere.
        more: what else the line says, from the run's summary.
    """
    saving = ["--keep-last", "0"] if folder is None else ["--save-every", "3m", "--keep-last", "1"]
    with tempfile.TemporaryDirectory(prefix="dtrp-") as elsewhere:
        out = Path(elsewhere) / "run" if folder is None else folder / name.replace(" ", "-")
        words = [word for option, value in settings.items() if value is not None for word in (f"--{option}", value)]
        if dtrp(["train", *words, *saving, "--out", str(out)]):
            raise SystemExit(f"{name} failed")
        row = described(out, more)
    gc.collect()  # the run's data, which refers to itself
    add_row(path, row)
    if folder is not None:
        shutil.rmtree(out)
    return row


def described(folder: Path, more: Callable[[Row], Row] = lambda summary: {}) -> Row:
    """What a finished run came to."""
    summary = read_summary(folder)
    assert summary is not None, f"{folder} is not finished"
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    error = prediction_error(summary)
    return {
        **{name: summary["config"][name] for name in SETTINGS},
        "test_accuracy": [line["test_accuracy"] for line in metrics],
        "test_loss": [line["test_loss"] for line in metrics],
        "largest_delay": largest_delay(summary),
        "prediction_error": None if math.isnan(error) else error,
        "minibatch_s": summary["minibatch_s"],
        **{name: summary["environment"][name] for name in ("torch", "dtrp")},
        **({} if summary["config"]["device"] == "cpu" else {"gpu": summary["environment"]["gpu"]}),
        **({} if summary["config"]["dtype"] == "float32" else {"dtype": summary["config"]["dtype"]}),
        **more(summary),
    }


def key(cell: Cell) -> tuple[Any, ...]:
    """What a cell is known by. A method that flushes comes to the same at every K, so one K stands for all with its A."""
    stages = None if get_method(cell.method).flush else cell.stages
    return cell.method, cell.prediction, stages, cell.num_microbatches, cell.seed


def cell_of(row: Row) -> Cell:
    return Cell(row["method"], row["stages"], row["num_microbatches"], row["seed"], row["prediction"])
