"""The results of a run: metrics of its epochs, numbers of its stages, and its summary."""

from __future__ import annotations

import dataclasses
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..measure.prediction_error import PredictionError
from ..pipeline import Pipeline
from .config import TrainConfig


@dataclass(frozen=True)
class EpochMetrics:
    """A line of ``metrics.jsonl``. Accuracy in 0..1; throughput over the epoch's training alone.

    Of a text, losses are of a character, in nats, and accuracy is the share of next characters told right.
    """

    epoch: int
    update: int
    train_loss: float
    test_loss: float
    test_accuracy: float
    samples_per_s: float
    elapsed_s: float


@dataclass(frozen=True)
class StageSummary:
    """A line of the table at the end: delays in updates, peaks in bytes."""

    stage: int
    layers: tuple[str, ...]
    parameters: int
    delays: dict[int, int]
    memory: dict[str, int]
    activations_peak: int
    keep: str
    busy: dict[str, float]
    prediction_errors: tuple[PredictionError, ...]
    skipped_updates: tuple[int, ...] = ()


@dataclass(frozen=True)
class TrainResult:
    """How a run ended."""

    config: TrainConfig
    epochs: tuple[EpochMetrics, ...]
    stages: tuple[StageSummary, ...]

    @property
    def samples_per_s(self) -> float:
        """The median over epochs."""
        return sorted(e.samples_per_s for e in self.epochs)[len(self.epochs) // 2]


def summarize_stages(pipe: Pipeline) -> list[StageSummary]:
    """The stages that this process holds."""
    delays, memory, peaks = pipe.delays(), pipe.memory(), pipe.activations_peak()
    keeps, busy, errors = pipe.keeps(), pipe.busy(), pipe.prediction_errors()
    skipped = pipe.skipped_updates()
    return [
        StageSummary(
            stage=k,
            layers=tuple(name for name, _ in module.named_children()),
            parameters=sum(p.numel() for p in module.parameters()),
            delays=dict(sorted(delays[k].items())),
            memory=memory[k],
            activations_peak=peaks[k],
            keep=keeps[k] or "graph",
            busy=busy[k],
            prediction_errors=tuple(error for error in errors if error.stage == k),
            skipped_updates=tuple(skipped[k]),
        )
        for k, module in zip(delays, pipe.stages, strict=True)
    ]


def summary(result: TrainResult) -> dict[str, Any]:
    """What ``summary.json`` says of a finished run, for `dtrp compare` and `dtrp report`."""
    config = {field.name: getattr(result.config, field.name) for field in dataclasses.fields(result.config)}
    last = result.epochs[-1]
    return {
        "config": {name: list(value) if isinstance(value, tuple) else value for name, value in config.items()},
        "epochs": last.epoch,
        "updates": last.update,
        "test_accuracy": last.test_accuracy,
        "test_loss": last.test_loss,
        "train_loss": last.train_loss,
        "samples_per_s": result.samples_per_s,
        "minibatch_s": result.config.batch_size / result.samples_per_s,
        "elapsed_s": last.elapsed_s,
        "stages": [
            {
                **{
                    name: getattr(stage, name)
                    for name in ("stage", "parameters", "memory", "activations_peak", "keep", "busy")
                },
                "layers": list(stage.layers),
                "delays": {str(delay): count for delay, count in stage.delays.items()},
                "prediction_errors": [[e.minibatch, e.delay, e.read, e.stale] for e in stage.prediction_errors],
                "skipped_updates": list(stage.skipped_updates),
            }
            for stage in result.stages
        ],
        "environment": environment(),
    }


def environment() -> dict[str, Any]:
    """Versions and hardware, for results that are kept."""
    from .. import __version__

    return {
        "dtrp": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def mean_delay(counts: Mapping[int, int]) -> float:
    """The mean of delays; ``counts``: number of micro-batches by their delay in updates."""
    return sum(delay * count for delay, count in counts.items()) / sum(counts.values())


def summarize_delays(delays: dict[int, int]) -> str:
    """``{0: 3, 5: 95}`` as ``0-5, mostly 5``; steady delays matter, start-up and flush are few."""
    if not delays:
        return "-"
    most = max(delays, key=lambda delay: (delays[delay], delay))
    return str(most) if len(delays) == 1 else f"{min(delays)}-{max(delays)}, mostly {most}"


def describe_layers(layers: Sequence[str]) -> str:
    """``("stem", "block1", "block2")`` as ``stem..block2``."""
    return layers[0] if len(layers) == 1 else f"{layers[0]}..{layers[-1]}"
