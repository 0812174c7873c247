"""What a run of `dtrp train` tells while it trains: the interface of callbacks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ...typing import Json
from ..results import EpochMetrics, TrainResult


@dataclass(frozen=True)
class RunStart:
    """A run that begins, or goes on.

    Attributes:
        settings: settings by the name of their option, as in the run's ``config``.
        folder: folder of the run, which appears with its first save or epoch; None: nothing is kept.
        update: number of updates that have been made before; 0 unless the run goes on.
        total_updates: number of updates of the whole run.
    """

    settings: Mapping[str, Json]
    folder: Path | None
    update: int
    total_updates: int


@dataclass(frozen=True)
class Update:
    """A mini-batch that has been trained on.

    Attributes:
        number: number of updates made, with this one.
        epoch: number of the epoch, from 1.
        loss: its loss, a tensor without dimensions; ``float(update.loss)`` waits for the device.
        lr: learning rate of the last stage; None: that has no optimizer.
        samples: number of samples in the mini-batch, of all replicas.
    """

    number: int
    epoch: int
    loss: Tensor
    lr: float | None
    samples: int


class Callback:
    """Is told what happens in a run; this one does nothing with it.

    A subclass has the methods that it needs. On several workers there is one, in the process that knows the loss. An
    exception ends the run, which goes on from its last save.

    Example:
        >>> class Losses(Callback):
        ...     def update(self, update):
        ...         if update.number % 100 == 0:
        ...             print(update.number, float(update.loss))
    """

    def start(self, run: RunStart) -> None:
        """The run begins; all settings have been checked."""

    def update(self, update: Update) -> None:
        """A mini-batch has been trained on."""

    def epoch(self, metrics: EpochMetrics, stages: Mapping[str, float]) -> None:
        """An epoch is through, and tested.

        Args:
            metrics: the numbers of the epoch, as in ``metrics.jsonl``.
            stages: numbers of the stages: ``delay/stage0`` and ``prediction_error/stage0``, means over the epoch, and
                ``memory_bytes/stage0``, the peak so far.
        """

    def save(self, update: int) -> None:
        """The run is about to save: what it was told so far will not be told again if it goes on from there."""

    def finish(self, result: TrainResult | None) -> None:
        """The run has ended: the last call. None: it was stopped, or has failed."""
