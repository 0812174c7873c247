"""TensorBoard events of a run: what `dtrp train --tensorboard` writes to ``tensorboard`` in the run's folder.

The step of a scalar is the number of updates made::

    loss/minibatch, lr          at each update
    samples_per_s               every 20 updates, over these 20
    loss/train, loss/test, accuracy/test                            at each epoch
    delay/stage0, prediction_error/stage0, memory_bytes/stage0      at each epoch: means over it; the peak so far
"""

from __future__ import annotations

import importlib.util
import statistics
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..measure.memory import held_at_most
from ..pipeline import Pipeline
from .callbacks.protocol import Callback, RunStart, Update
from .results import EpochMetrics, TrainResult, mean_delay

EPOCH_SCALARS = {"loss/train": "train_loss", "loss/test": "test_loss", "accuracy/test": "test_accuracy"}  # name: metric
_UPDATES_PER_FLUSH = 20  # whose losses are read from the device together


def check_tensorboard() -> None:
    """Refuse where the package tensorboard is missing.

    Raises:
        ValueError: it is missing, with what to install.
    """
    if importlib.util.find_spec("tensorboard") is None:
        raise ValueError("--tensorboard needs the package tensorboard; install it: pip install 'dtrp[tensorboard]'")


def open_writer(folder: Path, *, purge_step: int | None) -> Any:
    """A `SummaryWriter` for the event files in a folder; events there from ``purge_step`` on are no longer shown."""
    from torch.utils.tensorboard import SummaryWriter  # takes a while to import

    return SummaryWriter(str(folder), purge_step=purge_step)


class _Update(NamedTuple):
    number: int
    loss: Tensor
    lr: float | None
    samples: int
    time_s: float  # since 1970


class Events:
    """The writer of a run's events.

    Args:
        folder: folder for the event files.
        after: number of updates that a resumed run has made. Events of later updates are no longer shown.
        settings: settings of the run, shown as text.
        score: what the run is judged by.
    """

    def __init__(self, folder: Path, *, after: int, settings: str, score: str = "accuracy") -> None:
        self._score = score
        self._writer = open_writer(folder, purge_step=after + 1 if after else None)
        self._pending: list[_Update] = []
        if not after:
            self._writer.add_text("settings", "".join(f"    {line}\n" for line in settings.splitlines()))

    def update(self, number: int, loss: Tensor, lr: float | None, samples: int) -> None:
        """Record an update, without waiting for the device to compute its loss."""
        self._pending.append(_Update(number, loss.detach(), lr, samples, time.time()))
        if len(self._pending) == _UPDATES_PER_FLUSH:
            self.flush()

    def epoch(self, metrics: EpochMetrics, scalars: Sequence[Mapping[str, float]]) -> None:
        """Record an epoch; ``scalars`` are those of the stages, a mapping per rank."""
        self.flush()
        of_epoch = {name: getattr(metrics, metric) for name, metric in EPOCH_SCALARS.items()}
        of_epoch |= {f"{name}/test": value for name, value in metrics.scores.items()}
        if self._score != "accuracy":
            of_epoch[f"{self._score}/test"] = of_epoch.pop("accuracy/test")
        for values in (of_epoch, *scalars):
            for name, value in values.items():
                self._writer.add_scalar(name, value, metrics.update)
        self._writer.flush()

    def flush(self) -> None:
        """Write all events to the disk; called before a save, so that no event of an update before it is lost."""
        pending, self._pending = self._pending, []
        if pending:
            losses = torch.stack([update.loss for update in pending]).tolist()
            for update, loss in zip(pending, losses, strict=True):
                self._writer.add_scalar("loss/minibatch", loss, update.number, update.time_s)
                if update.lr is not None:
                    self._writer.add_scalar("lr", update.lr, update.number, update.time_s)
            last, elapsed_s = pending[-1], pending[-1].time_s - pending[0].time_s
            if elapsed_s > 0:
                samples = sum(update.samples for update in pending[1:])
                self._writer.add_scalar("samples_per_s", samples / elapsed_s, last.number, last.time_s)
        self._writer.flush()

    def close(self) -> None:
        """Write the pending events, and close the file."""
        self.flush()
        self._writer.close()


class TensorBoard(Callback):
    """Writes the events of a run to a folder.

    Args:
        folder: folder for the event files.
        score: what the run is judged by.
        settings: settings of the run, shown as text.
    """

    def __init__(self, folder: Path, *, score: str, settings: str) -> None:
        self._folder, self._score, self._settings = folder, score, settings
        self._events: Events | None = None

    def start(self, run: RunStart) -> None:
        self._events = Events(self._folder, after=run.update, settings=self._settings, score=self._score)

    def update(self, update: Update) -> None:
        assert self._events is not None
        self._events.update(update.number, update.loss, update.lr, update.samples)

    def epoch(self, metrics: EpochMetrics, stages: Mapping[str, float]) -> None:
        assert self._events is not None
        self._events.epoch(metrics, [stages])

    def save(self, update: int) -> None:
        assert self._events is not None
        self._events.flush()  # a run that resumes from the save lacks no event

    def finish(self, result: TrainResult | None) -> None:
        if self._events is not None:
            self._events.close()


class StageScalars:
    """The scalars of this rank's stages, epoch after epoch."""

    def __init__(self) -> None:
        self._delays: dict[int, Counter[int]] = {}
        self._num_errors: Counter[int] = Counter()  # prediction errors written already, by stage

    def since(self, pipe: Pipeline) -> dict[str, float]:
        """Mean delay and mean prediction error since the last call, and the peak of memory so far."""
        scalars: dict[str, float] = {}
        memory, activations = pipe.memory(), pipe.activations_peak()
        for k, counter in pipe.delays().items():
            new = counter - self._delays.get(k, Counter())
            self._delays[k] = Counter(counter)
            if new:
                scalars[f"delay/stage{k}"] = mean_delay(new)
            scalars[f"memory_bytes/stage{k}"] = held_at_most(memory[k], activations[k])
            errors = [error for error in pipe.prediction_errors() if error.stage == k]
            ratios = [e.read / e.stale for e in errors[self._num_errors[k] :] if e.stale > 0]
            self._num_errors[k] = len(errors)
            if ratios:
                scalars[f"prediction_error/stage{k}"] = statistics.fmean(ratios)
        return scalars
