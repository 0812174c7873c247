"""What each part of dtrp contributes: one change at a time from dtrp with K = 4 stages and one micro-batch.

    python benchmarks/ablation/run.py --data-dir DIR --seeds 0 1 2     # DIR holds cifar-10-batches-py
    python benchmarks/shown.py --write                                 # puts the table into README.md

A 14-layer ResNet of width 8 on the first 10,000 CIFAR-10 images, 6 epochs, mini-batches of 128, SGD (lr 0.05, momentum 0.9,
weight decay 5e-4, cosine to 0), crop and flip, one thread: one to two minutes a run on a core of its own. A finished run is a
line of results/ablation.jsonl; one that is there is not repeated.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from variants import VARIANTS, config

from dtrp.train import EpochMetrics, Reporter, Trainer, summary
from dtrp.train.comparison import largest_delay, peak_bytes, prediction_error

RESULTS = Path(__file__).parent / "results" / "ablation.jsonl"


class Work(Reporter):
    """CPU time of a step: what one thread computed, however many others wanted the core."""

    def __init__(self, batch_size: int) -> None:
        self._batch_size, self._last = batch_size, math.nan
        self.steps: list[float] = []

    def update(self, epoch: int, update: int, loss: Callable[[], float], samples: int) -> None:
        now = time.process_time()
        if not math.isnan(self._last) and samples == self._batch_size:
            self.steps.append(now - self._last)
        self._last = now

    def epoch(self, metrics: EpochMetrics) -> None:
        self._last = math.nan  # the test lies between


def train(question: str, change: str, settings: dict[str, Any], seed: int, data_dir: str) -> dict[str, Any]:
    """One run; its line."""
    chosen = config(settings, seed, data_dir)
    work = Work(chosen.batch_size)
    result = Trainer(chosen).run(work)
    told = summary(result)
    error = prediction_error(told)
    return {
        "question": question,
        "change": change,
        "settings": settings,
        "seed": seed,
        "test_accuracy": [epoch.test_accuracy for epoch in result.epochs],
        "test_loss": [epoch.test_loss for epoch in result.epochs],
        "train_loss": [epoch.train_loss for epoch in result.epochs],
        "largest_delay": largest_delay(told),
        "prediction_error": None if math.isnan(error) else error,
        "peak_bytes": peak_bytes(told),
        "activations_peak": [stage["activations_peak"] for stage in told["stages"]],
        "cpu_s_a_sample": statistics.median(work.steps) / chosen.batch_size,
        "config": {key: value for key, value in told["config"].items() if key not in ("data_dir", "out")},
        **told["environment"],
    }


def read() -> list[dict[str, Any]]:
    return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", required=True, help="where cifar-10-batches-py lies")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--share", type=int, nargs=2, default=[1, 1], metavar=("I", "N"),
                        help="the I-th of N shares of the variants, for N processes at once")  # fmt: skip
    options = parser.parse_args()
    share, shares = options.share
    if not 1 <= share <= shares:
        parser.error(f"--share {share} {shares}: the first number is one of 1..{shares}")
    done = {(row["question"], row["change"], row["seed"]) for row in read()}
    RESULTS.parent.mkdir(exist_ok=True)
    for seed, (question, change, settings) in itertools.product(options.seeds, VARIANTS[share - 1 :: shares]):
        if (question, change, seed) in done:
            continue
        row = train(question, change, settings, seed, options.data_dir)
        with RESULTS.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(f"seed {seed}  {question} {change}: {row['test_accuracy'][-1]:.2%}", flush=True)


if __name__ == "__main__":
    main()
