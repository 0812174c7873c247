"""A run as TensorBoard events: what `dtrp train --tensorboard` writes to ``tensorboard`` in the run's folder.

A scalar's step is the number of updates made::

    loss/minibatch, lr          each update
    samples_per_s               every 20 updates, of those 20
    loss/train, loss/test, accuracy/test                            each epoch
    delay/stage0, prediction_error/stage0, memory_bytes/stage0      each epoch: means over it; the most held so far
"""

from __future__ import annotations

import importlib.util
import itertools
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
from .results import EpochMetrics

OF_AN_EPOCH = {"loss/train": "train_loss", "loss/test": "test_loss", "accuracy/test": "test_accuracy"}  # scalar: metric
_TOGETHER = 20  # updates whose losses are read from the device at once


def check_tensorboard() -> None:
    """
    Raises:
        ValueError: the package is not there, with what to do.
    """
    if importlib.util.find_spec("tensorboard") is None:
        raise ValueError("--tensorboard needs the package tensorboard; install it: pip install 'dtrp[tensorboard]'")


class _Update(NamedTuple):
    number: int
    loss: Tensor
    lr: float | None
    samples: int
    at: float  # seconds since the epoch


class Events:
    """The one writer of a run.

    Args:
        folder: for the event files.
        after: updates that a run which goes on has made. What was written of later ones is void.
        settings: of the run, shown as a text.
    """

    def __init__(self, folder: Path, *, after: int, settings: str) -> None:
        from torch.utils.tensorboard import SummaryWriter  # takes a while to import

        self._writer: Any = SummaryWriter(str(folder), purge_step=after + 1 if after else None)
        self._pending: list[_Update] = []
        if not after:
            self._writer.add_text("settings", "".join(f"    {line}\n" for line in settings.splitlines()))

    def update(self, number: int, loss: Tensor, lr: float | None, samples: int) -> None:
        """An update has been made; its loss is not waited for."""
        self._pending.append(_Update(number, loss.detach(), lr, samples, time.time()))
        if len(self._pending) == _TOGETHER:
            self.flush()

    def epoch(self, metrics: EpochMetrics, scalars: Sequence[Mapping[str, float]]) -> None:
        """An epoch is through; ``scalars`` are each rank's, of its stages."""
        self.flush()
        own = {name: getattr(metrics, metric) for name, metric in OF_AN_EPOCH.items()}
        for name, value in itertools.chain.from_iterable(each.items() for each in [own, *scalars]):
            self._writer.add_scalar(name, value, metrics.update)
        self._writer.flush()

    def flush(self) -> None:
        """Write what there is to the disk; before a save, so that a run that goes on from it lacks nothing."""
        pending, self._pending = self._pending, []
        if pending:
            losses = torch.stack([each.loss for each in pending]).tolist()
            for each, loss in zip(pending, losses, strict=True):
                self._writer.add_scalar("loss/minibatch", loss, each.number, each.at)
                if each.lr is not None:
                    self._writer.add_scalar("lr", each.lr, each.number, each.at)
            first, last = pending[0], pending[-1]
            if last.at > first.at:
                samples = sum(each.samples for each in pending[1:])
                self._writer.add_scalar("samples_per_s", samples / (last.at - first.at), last.number, last.at)
        self._writer.flush()

    def close(self) -> None:
        """Write the rest, and close the file."""
        self.flush()
        self._writer.close()


class StageScalars:
    """What there is to say of this rank's stages, epoch after epoch."""

    def __init__(self) -> None:
        self._delays: dict[int, Counter[int]] = {}
        self._seen: Counter[int] = Counter()  # prediction errors, by stage

    def since(self, pipe: Pipeline) -> dict[str, float]:
        """Delay and prediction error since the last call, as means, and the most memory held so far."""
        scalars: dict[str, float] = {}
        memory, activations = pipe.memory(), pipe.activations_peak()
        for k, counter in pipe.delays().items():
            new = counter - self._delays.get(k, Counter())
            self._delays[k] = Counter(counter)
            if new:
                scalars[f"delay/stage{k}"] = sum(delay * count for delay, count in new.items()) / new.total()
            scalars[f"memory_bytes/stage{k}"] = held_at_most(memory[k], activations[k])
        for k in memory:
            errors = [error for error in pipe.prediction_errors() if error.stage == k]
            ratios = [e.read / e.stale for e in errors[self._seen[k] :] if e.stale > 0]
            self._seen[k] = len(errors)
            if ratios:
                scalars[f"prediction_error/stage{k}"] = statistics.fmean(ratios)
        return scalars
