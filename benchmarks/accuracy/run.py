"""Accuracy on CIFAR-10 of every method, side by side, over seeds.

    python benchmarks/accuracy/run.py small --data-dir DIR       # ResNet-14 of width 8, 20,000 images, 8 epochs
    python benchmarks/accuracy/run.py resnet20 --data-dir DIR    # ResNet-20, K = 4, four methods
    python benchmarks/shown.py --write                           # puts the table into README.md

Both are grids of runs, seed after seed and what is checked first. A finished run is a line of results/<part>.jsonl and is not
repeated: break it off, start it again, elsewhere too; several may work on different --stages at the same time, or on different
--methods and --predictions.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dtrp.cli import run as dtrp
from dtrp.compare import Cell, grid, largest_delay, prediction_error, read_summary
from dtrp.methods import get_method

HERE = Path(__file__).parent
COMMON = {
    "data": "cifar10", "threads": "1", "warmup-updates": "100", "prediction-error-every": "64", "limit-train": "20000",
    "epochs": "8", "batch-size": "128", "lr": "0.1",
}  # fmt: skip
MODELS = {"small": "resnet14-8", "resnet20": "resnet20"}
# Methods, stages, micro-batches: in the order in which they run, for each seed.
GRIDS: dict[str, list[tuple[str, str, str]]] = {
    "small": [
        ("bp,spectrain,dtrp,fdg,fr", "4,8", "K"),
        ("bp,dgl,dtr,dtrp-1f1b,adl,ddg", "4,8", "K"),
        ("bp,spectrain,dtrp,fdg,fr,dgl,dtr,dtrp-1f1b,ddg", "4,8", "1"),
        ("bp,spectrain,dtrp,fdg,fr,dgl,dtr,dtrp-1f1b,adl,ddg", "2", "K,1"),
    ],
    "resnet20": [("bp,spectrain,dtrp,fdg", "4", "4")],
}
PREDICTIONS = ("linear", "rollout")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=[*GRIDS])
    parser.add_argument("--data-dir", help="where cifar-10-batches-py lies")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--stages", help="some of the part's, as 4,8")
    parser.add_argument("--methods", help="some of the part's, as bp,dtrp,fdg")
    parser.add_argument("--predictions", default=",".join(PREDICTIONS), help="for the methods that predict")
    parser.add_argument("--microbatches", help="some of the part's, as K (as many as stages)")
    options = parser.parse_args()
    if not options.data_dir:
        parser.error("--data-dir: say where cifar-10-batches-py lies")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    methods = None if options.methods is None else options.methods.split(",")
    for cell in cells(options.part, range(options.seeds), options.stages):
        if methods is not None and cell.method not in methods:
            continue
        parts = str(cell.num_microbatches), "K" if cell.num_microbatches == cell.stages else ""
        if options.microbatches is not None and not set(parts) & set(options.microbatches.split(",")):
            continue
        if cell.prediction is not None and cell.prediction not in options.predictions.split(","):
            continue
        if key(cell) not in {key_of(row) for row in finished(options.part)}:
            print(cell.name, flush=True)
            run(options.part, cell, options.data_dir)


def cells(part: str, seeds: range, only: str | None) -> Iterator[Cell]:
    """The cells, each once. A method that flushes comes to the same at every K, so one K stands for all with its A."""
    known: set[Any] = set()
    for seed in seeds:
        for methods, stages, microbatches in GRIDS[part]:
            counts = [int(k) for k in stages.split(",") if only is None or k in only.split(",")]
            for cell in grid(methods.split(","), counts, microbatches.split(","), [seed], PREDICTIONS):
                if key(cell) not in known:
                    known.add(key(cell))
                    yield cell


def key(cell: Cell) -> tuple[Any, ...]:
    stages = None if get_method(cell.method).flush else cell.stages
    return cell.method, cell.prediction, stages, cell.num_microbatches, cell.seed


def key_of(row: dict[str, Any]) -> tuple[Any, ...]:
    return key(Cell(row["method"], row["stages"], row["num_microbatches"], row["seed"], row["prediction"]))


def finished(part: str) -> list[dict[str, Any]]:
    path = HERE / "results" / f"{part}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def run(part: str, cell: Cell, data_dir: str) -> None:
    """Train one cell, and add its line."""
    settings = {**COMMON, "data-dir": data_dir, "model": MODELS[part], "method": cell.method, "seed": str(cell.seed)}
    settings |= {"stages": str(cell.stages), "num-microbatches": str(cell.num_microbatches)}
    if cell.prediction is not None:
        settings["prediction"] = cell.prediction
    with tempfile.TemporaryDirectory(prefix="dtrp-") as folder:
        out = Path(folder) / "run"
        words = [word for name, value in settings.items() for word in (f"--{name}", value)]
        if dtrp(["train", *words, "--keep-last", "0", "--out", str(out)]):
            raise SystemExit(f"{cell.name} failed")
        line = described(out)
    (HERE / "results").mkdir(exist_ok=True)
    with open(HERE / "results" / f"{part}.jsonl", "a") as file:
        file.write(json.dumps(line) + "\n")


def described(folder: Path) -> dict[str, Any]:
    """What a finished run came to."""
    summary = read_summary(folder)
    assert summary is not None, f"{folder} is not finished"
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    error = prediction_error(summary)
    names = ("method", "prediction", "stages", "num_microbatches", "seed", "model", "lr", "batch_size", "warmup_updates",
             "limit_train", "epochs")  # fmt: skip
    return {
        **{name: summary["config"][name] for name in names},
        "test_accuracy": [line["test_accuracy"] for line in metrics],
        "test_loss": [line["test_loss"] for line in metrics],
        "largest_delay": largest_delay(summary),
        "prediction_error": None if math.isnan(error) else error,
        "minibatch_s": summary["minibatch_s"],
        **{name: summary["environment"][name] for name in ("torch", "dtrp")},
    }


if __name__ == "__main__":
    main()
