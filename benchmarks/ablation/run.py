"""What each part of dtrp contributes: one change at a time from dtrp with K = 4 stages and one micro-batch.

    python benchmarks/ablation/run.py --data-dir DIR --seeds 0 1 2     # DIR holds cifar-10-batches-py
    python benchmarks/ablation/run.py                                  # the table again, from the raw lines

A 14-layer ResNet of width 8 on the first 10,000 CIFAR-10 images, 6 epochs, mini-batches of 128, SGD (lr 0.05, momentum 0.9,
weight decay 5e-4, cosine to 0), crop and flip, one thread: one to two minutes a run on a core of its own. A finished run is a
line of results/ablation.jsonl; one that is there is not repeated.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dtrp
from dtrp.compare import largest_delay, peak_bytes, prediction_error
from dtrp.train import EpochMetrics, Reporter, TrainConfig, Trainer, make_method, summary

RESULTS = Path(__file__).parent / "results" / "ablation.jsonl"
STAGES, BATCH, LR = 4, 128, 0.05
BASE = TrainConfig(
    data="cifar10", model="resnet14-8", method="dtrp", stages=STAGES, num_microbatches=1, batch_size=BATCH, lr=LR, epochs=6,
    limit_train=10_000, threads=1, prediction_error_every=16,
)  # fmt: skip

# What is asked, the change, and the settings that make it; they run in this order, and are shown by what is asked.
VARIANTS: list[tuple[str, str, dict[str, Any]]] = [
    ("", "dtrp", {}),
    ("", "backpropagation", {"method": "bp"}),
    ("prediction", "none", {"prediction": "none"}),
    ("re-computation", "graphs kept, gradient at the predicted weights", {"keep": "graph"}),
    ("order", "ahead 1, forward first: delay d", {"ahead": 1.0, "order": "forward-first"}),
    ("micro-batches", "4", {"num_microbatches": 4}),
    ("gamma", "0.9", {"lr_shrink": 0.9}),
    ("batch compensation", "256, learning rate times 2", {"batch_size": 2 * BATCH, "lr": 2 * LR}),
    ("order", "forward first: delay 2d", {"order": "forward-first"}),
    ("prediction", "linear", {"prediction": "linear"}),
    ("re-computation", "graphs kept, and no prediction", {"keep": "graph", "prediction": "none"}),
    ("micro-batches", "2", {"num_microbatches": 2}),
    ("batch compensation", "256, learning rate as it was", {"batch_size": 2 * BATCH}),
    ("gamma", "0.8", {"lr_shrink": 0.8}),
    ("order", "ahead 1, backward first: delay d-1", {"ahead": 1.0}),
    ("micro-batches", "8", {"num_microbatches": 8}),
    ("batch compensation", "256, times 2, four micro-batches",
     {"batch_size": 2 * BATCH, "lr": 2 * LR, "num_microbatches": 4}),
    ("batch compensation", "backpropagation, 256, times 2", {"method": "bp", "batch_size": 2 * BATCH, "lr": 2 * LR}),
]  # fmt: skip


class Work(Reporter):
    """CPU time of a step: what one thread computed, however many others wanted the core."""

    def __init__(self) -> None:
        self._last = math.nan
        self.steps: list[float] = []

    def update(self, epoch: int, update: int, loss: Callable[[], float], samples: int) -> None:
        now = time.process_time()
        if not math.isnan(self._last) and samples == BATCH:
            self.steps.append(now - self._last)
        self._last = now

    def epoch(self, metrics: EpochMetrics) -> None:
        self._last = math.nan  # the test lies between


def config(change: dict[str, Any], seed: int, data_dir: str | None) -> TrainConfig:
    return dataclasses.replace(BASE, **change, seed=seed, data_dir=data_dir)


def train(question: str, change: str, settings: dict[str, Any], seed: int, data_dir: str) -> dict[str, Any]:
    """One run; its line."""
    work = Work()
    result = Trainer(config(settings, seed, data_dir)).run(work)
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
        "cpu_s_a_sample": statistics.median(work.steps) / BATCH,
        "config": {key: value for key, value in told["config"].items() if key not in ("data_dir", "out")},
        **told["environment"],
    }


def slots(settings: dict[str, Any], latency: float) -> float:
    """Simulated time of as many samples as a mini-batch of the base, stages of their own: F 1, B 2, a message ``latency``."""
    chosen = config(settings, 0, None)
    size, parts = chosen.batch_size / BATCH, chosen.num_microbatches
    simulated = dtrp.simulate(
        make_method(chosen), num_stages=STAGES, num_minibatches=40, num_microbatches=parts, keep=chosen.keep,  # type: ignore[arg-type]
        forward_s=size / parts, backward_s=2 * size / parts, latency_s=latency * size / parts,
    )  # fmt: skip
    return simulated.minibatch_s / size


def read() -> list[dict[str, Any]]:
    return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []


def show(rows: list[dict[str, Any]]) -> None:
    print(
        "| | change | seeds | accuracy, % | gained over dtrp (paired) | delay | prediction error | memory, all stages | "
        "CPU time of a sample | slot, c=0 | slot, c=F/2 |\n|" + "---|" * 11
    )
    base = {row["seed"]: row for row in rows if row["change"] == "dtrp"}
    questions = list(dict.fromkeys(question for question, _, _ in VARIANTS))
    for question, change, settings in sorted(VARIANTS, key=lambda variant: questions.index(variant[0])):
        runs = [row for row in rows if (row["question"], row["change"]) == (question, change)]
        if not runs:
            continue
        gained = [
            100 * (r["test_accuracy"][-1] - base[r["seed"]]["test_accuracy"][-1]) for r in runs if r["seed"] in base
        ]
        errors = [r["prediction_error"] for r in runs if r["prediction_error"] is not None]
        megabytes = statistics.fmean(sum(r["peak_bytes"]) for r in runs) / 1e6
        cells = [
            question, change, str(len(runs)), mean([100 * r["test_accuracy"][-1] for r in runs]),
            "" if change == "dtrp" else mean(gained, sign="+"), str(max(r["largest_delay"] for r in runs)),
            f"{statistics.fmean(errors):.2f}" if errors else "", f"{megabytes:.0f} MB",
            f"{1e3 * statistics.median(r['cpu_s_a_sample'] for r in runs):.2f} ms",
            f"{slots(settings, 0):.2f}", f"{slots(settings, 0.5):.2f}",
        ]  # fmt: skip
        print(f"| {' | '.join(cells)} |")


def mean(values: list[float], sign: str = "") -> str:
    """Mean ± standard deviation."""
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):{sign}.1f}{spread}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", help="where cifar-10-batches-py lies; without it nothing is run")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    done = {(row["question"], row["change"], row["seed"]) for row in read()}
    if options.data_dir is not None:
        RESULTS.parent.mkdir(exist_ok=True)
        for seed in options.seeds:
            for question, change, settings in VARIANTS:
                if (question, change, seed) in done:
                    continue
                row = train(question, change, settings, seed, options.data_dir)
                with RESULTS.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                print(f"seed {seed}  {question} {change}: {row['test_accuracy'][-1]:.2%}", flush=True)
    show(read())


if __name__ == "__main__":
    main()
