"""Several networks on several data sets: methods beside backpropagation, at the learning rate that is best for backpropagation.

    python benchmarks/datasets/run.py --data-dir DIR     # K = 4, A = 4; at most eight hours of one core in all
    python benchmarks/shown.py --write                   # puts the tables into README.md

DIR holds cifar-10-batches-py and the folders mnist and fashion-mnist with their four files. Of each data set and network
bp is tried at three rates with the first seed, and at the next ones until the best has a worse one on either side, in
results/tuning.jsonl; the rate of its best test accuracy is that of all methods, and that run is bp's first in
results/runs.jsonl. What matters most comes first; a finished run is a line
and is not repeated. With --runs-dir a run that was broken off goes on where it was saved.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from dtrp.data import load_data
from dtrp.methods import get_method
from dtrp.train.comparison import Cell, peak_bytes

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from training import Row, add_row, cell_of, key, read_rows, train  # noqa: E402

RUNS, TUNING = (HERE / "results" / f"{name}.jsonl" for name in ("runs", "tuning"))
STAGES = 4
SEEDS = (0, 1, 2)
RATES = (0.01, 0.03, 0.1, 0.3, 1.0)
FIRST_RATES = RATES[1:4]  # and the next one where the best of those tried is the smallest or the largest
COMMON = {
    "stages": str(STAGES), "num-microbatches": str(STAGES), "batch-size": "128", "threads": "1", "warmup-updates": "50",
    "prediction-error-every": "64", "on-nonfinite": "skip",
}  # fmt: skip
FULL = {"limit-train": "16000", "limit-test": "10000", "epochs": "6"}
RECIPES = {  # a wide network takes five times as long for an update
    "resnet14-8": FULL, "mlp": FULL, "vgg11-16": FULL | {"limit-train": "10000", "epochs": "5"},
    "wrn16-2": {"limit-train": "5000", "limit-test": "4000", "epochs": "4"},
}  # fmt: skip
DATA = ("fashion-mnist", "mnist", "cifar10")
# Data sets, networks, methods: in the order in which they run, for each seed.
GRIDS: list[tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]] = [
    (DATA[:2], ("resnet14-8",), ("bp", "dtrp-1f1b", "spectrain", "dtrp")),
    (DATA[2:], ("resnet14-8",), ("bp", "dtrp-1f1b", "spectrain", "dtrp")),
    (DATA, ("resnet14-8",), ("dtrp-split", "fr", "fdg", "ddg", "dgl")),
    (DATA, ("mlp", "vgg11-16", "wrn16-2"), ("bp", "dtrp", "fdg")),
]
# The labels of the first test images as the two are published, by which another split is known.
PUBLISHED = {"mnist": [7, 2, 1, 0, 4, 1, 4, 9, 5, 9], "fashion-mnist": [9, 2, 1, 1, 6, 1, 4, 6, 5, 7]}


def cells() -> Iterator[tuple[str, str, Cell]]:
    """Data set, network and cell of every run."""
    for data, models, methods in GRIDS:
        for model in models:
            for seed in SEEDS:
                for name in data:
                    for method in methods:
                        prediction = None if get_method(method).predict is None else "linear"
                        yield name, model, Cell(method, STAGES, STAGES, seed, prediction)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", required=True, help="where the three data sets lie")
    parser.add_argument("--data", nargs="+", choices=DATA, default=DATA, help="some of them")
    parser.add_argument("--models", nargs="+", choices=list(RECIPES), default=list(RECIPES), help="some of them")
    parser.add_argument(
        "--runs-dir", type=Path, help="where runs save themselves, to go on after a stop; none: nowhere"
    )
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    for data, model, cell in cells():
        wanted = data in options.data and model in options.models
        if wanted and not any(
            (row["data"], row["model"], key(cell_of(row))) == (data, model, key(cell)) for row in read_rows(RUNS)
        ):
            rate = chosen_rate(data, model, options.data_dir, options.runs_dir)
            if (cell.method, cell.seed) == ("bp", SEEDS[0]):
                add_row(RUNS, next(row for row in tuned(data, model) if row["lr"] == rate))
            else:
                run(data, model, cell, rate, RUNS, options.data_dir, options.runs_dir)


def chosen_rate(data: str, model: str, data_dir: str, runs: Path | None) -> float:
    """That of bp's best test accuracy after the last epoch, of rates that are tried with the first seed."""
    wanted = FIRST_RATES
    while True:
        for rate in wanted:
            if rate not in [row["lr"] for row in tuned(data, model)]:
                run(data, model, Cell("bp", STAGES, STAGES, SEEDS[0]), rate, TUNING, data_dir, runs)
        best: float = max(tuned(data, model), key=lambda row: row["test_accuracy"][-1])["lr"]
        place = RATES.index(best)
        if set(wanted) >= set(RATES[max(0, place - 1) : place + 2]):
            return best
        wanted = tuple(rate for rate in RATES if rate in wanted or rate in RATES[max(0, place - 1) : place + 2])


def tuned(data: str, model: str) -> list[Row]:
    return [row for row in read_rows(TUNING) if (row["data"], row["model"]) == (data, model)]


def run(data: str, model: str, cell: Cell, rate: float, path: Path, data_dir: str, runs: Path | None) -> None:
    """Train, or go on with a run, and add its line to ``path``."""
    settings = COMMON | RECIPES[model] | {
        "data": data, "data-dir": data_dir, "model": model, "method": cell.method, "seed": str(cell.seed), "lr": str(rate),
        "prediction": cell.prediction,
    }  # fmt: skip

    def more(summary: Row) -> Row:
        skipped = [len(stage["skipped_updates"]) for stage in summary["stages"]]
        return {
            "data": data, "split": split_of(data, data_dir), "limit_test": summary["config"]["limit_test"],
            "peak_bytes": peak_bytes(summary), "skipped_updates": max(skipped),
        }  # fmt: skip

    print(data, model, cell.name, rate, flush=True)
    train(settings, f"{data}-{model}-lr{rate}-{cell.name}", path, runs, more)


@cache
def split_of(data: str, data_dir: str) -> str:
    """``published``, or ``own`` where the test images are others."""
    if data not in PUBLISHED:
        return "published"
    return "published" if load_data(data, data_dir).test_y[:10].tolist() == PUBLISHED[data] else "own"


if __name__ == "__main__":
    main()
