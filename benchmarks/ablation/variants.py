"""What is changed, one thing at a time, from dtrp with K = 4 stages and one micro-batch."""

from __future__ import annotations

import dataclasses
from typing import Any

import dtrp
from dtrp.train import TrainConfig, make_method

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


def config(change: dict[str, Any], seed: int, data_dir: str | None) -> TrainConfig:
    return dataclasses.replace(BASE, **change, seed=seed, data_dir=data_dir)


def slots(settings: dict[str, Any], latency: float) -> float:
    """Simulated time of as many samples as a mini-batch of the base, stages of their own: F 1, B 2, a message ``latency``."""
    chosen = config(settings, 0, None)
    size, parts = chosen.batch_size / BATCH, chosen.num_microbatches
    simulated = dtrp.simulate(
        make_method(chosen), num_stages=STAGES, num_minibatches=40, num_microbatches=parts, keep=chosen.keep,  # type: ignore[arg-type]
        forward_s=size / parts, backward_s=2 * size / parts, latency_s=latency * size / parts,
    )  # fmt: skip
    return simulated.minibatch_s / size
