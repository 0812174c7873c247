"""The results of a run: metrics of its epochs, numbers of its stages, and its summary."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime

import torch

from ..measure.prediction_error import PredictionError
from ..pipeline import Pipeline
from ..typing import Json
from .config import TrainConfig


@dataclass(frozen=True)
class EpochMetrics:
    """A line of ``metrics.jsonl``: accuracy in 0..1; samples per second of training, without the test.

    For text, the loss is per character, in nats, and accuracy is the share of next characters predicted correctly.
    Where a run has metrics of the user's, ``test_accuracy`` is the first of them; ``scores`` are the other ones, by name.
    """

    epoch: int
    update: int
    train_loss: float
    test_loss: float
    test_accuracy: float
    samples_per_s: float
    elapsed_s: float
    scores: dict[str, float] = field(default_factory=dict)

    def line(self) -> dict[str, Json]:
        """The values by name; ``scores`` only where there are some."""
        return {name: value for name, value in vars(self).items() if name != "scores" or value}


@dataclass(frozen=True)
class StageSummary:
    """Numbers of a stage in a finished run: micro-batches by delay in updates, memory in bytes, times in seconds."""

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
    """Results of a finished run; ``damaged``: files in whose place others were read, since it was last resumed."""

    config: TrainConfig
    epochs: tuple[EpochMetrics, ...]
    stages: tuple[StageSummary, ...]
    damaged: tuple[str, ...] = ()

    @property
    def samples_per_s(self) -> float:
        """The median over the epochs."""
        return _median_speed(self.epochs)


def summarize_stages(pipe: Pipeline) -> list[StageSummary]:
    """The numbers of this process's stages."""
    delays, memory, peaks, keeps = pipe.delays(), pipe.memory(), pipe.activations_peak(), pipe.keeps()
    busy, errors, skipped = pipe.busy(), pipe.prediction_errors(), pipe.skipped_updates()
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


def summary(result: TrainResult) -> dict[str, Json]:
    """The contents of ``summary.json``, for `dtrp compare` and `dtrp report`."""
    config, damaged = result.config, {"damaged": list(result.damaged)} if result.damaged else {}
    return described_run(
        {**vars(config), "lr": config.base_lr}, result.epochs, result.stages, batch_size=config.batch_size, **damaged
    )


def described_run(
    config: dict[str, Json],
    epochs: Sequence[EpochMetrics],
    stages: Sequence[StageSummary],
    *,
    batch_size: float,
    **more: Json,
) -> dict[str, Json]:
    """What ``summary.json`` says of a run.

    Args:
        config: the settings by the names of their fields.
        epochs: metrics of the epochs, at least one.
        stages: numbers of the stages.
        batch_size: samples in a mini-batch.
        more: other entries.
    """
    last, samples_per_s = epochs[-1], _median_speed(epochs)
    return {
        "config": config,
        "epochs": last.epoch,
        "updates": last.update,
        **{name: getattr(last, name) for name in ("test_accuracy", "test_loss", "train_loss", "elapsed_s")},
        **({"scores": last.scores} if last.scores else {}),
        "samples_per_s": samples_per_s,
        "minibatch_s": batch_size / samples_per_s,
        "stages": [
            {**vars(stage), "prediction_errors": [error[1:] for error in stage.prediction_errors]} for stage in stages
        ],
        **more,
        "ended": datetime.now().astimezone().isoformat(timespec="seconds"),
        "environment": environment(),
    }


def _median_speed(epochs: Sequence[EpochMetrics]) -> float:
    return statistics.median_high(metrics.samples_per_s for metrics in epochs)


def environment() -> dict[str, Json]:
    """Versions and hardware, to be kept with results."""
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
    """``{0: 3, 5: 95}`` as ``0-5, mostly 5``: the steady delay, and the range that start-up and flush add."""
    if not delays:
        return "-"
    most = max(delays, key=lambda delay: (delays[delay], delay))
    return str(most) if len(delays) == 1 else f"{min(delays)}-{max(delays)}, mostly {most}"


def describe_layers(layers: Sequence[str]) -> str:
    """``("stem", "block1", "block2")`` as ``stem..block2``."""
    return layers[0] if len(layers) == 1 else f"{layers[0]}..{layers[-1]}"
