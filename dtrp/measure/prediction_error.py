"""The distance from the weights that a forward has read to those of its backward.

At F(m) of a stage with a delay, the weights that it reads are copied (predicted ones, or where nothing is predicted the
present ones); at B(m), when the stage has the version that was predicted, they are compared. It costs two
copies of the weights for every micro-batch in flight that is measured, so only every n-th is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

_PRIMES = (17, 13, 11, 7, 5, 3)


class PredictionError(NamedTuple):
    """The error for one micro-batch at one stage; distances are Euclidean, divided by the norm of the true weights.

    Attributes:
        stage: k.
        minibatch: b, the version of the weights at B.
        delay: in updates.
        read: distance from the weights that F has read to the true ones.
        stale: distance from the weights at F, without a prediction, to the true ones.
    """

    stage: int
    minibatch: int
    delay: int
    read: float
    stale: float


class PredictionErrorGauge:
    """Compares weights at every n-th micro-batch of one stage."""

    def __init__(self, stage: int, every: int) -> None:
        self.stage, self.every = stage, every
        self.errors: list[PredictionError] = []
        self._pending: dict[int, tuple[int, list[Tensor], list[Tensor]]] = {}  # by micro-batch: (delay, read, then)

    @torch.no_grad()
    def forward(self, microbatch: int, delay: int, read: Sequence[Tensor], now: Sequence[Tensor]) -> None:
        """Note that F(m) is about to read the weights ``read``; the present ones are ``now``."""
        if delay > 0 and microbatch % self.every == 0:
            then = [p.detach().clone() for p in now]
            self._pending[microbatch] = (delay, [t.detach().clone() for t in read], then)

    @torch.no_grad()
    def backward(self, microbatch: int, minibatch: int, now: Sequence[Tensor]) -> None:
        """Note that B(m) is about to run, at the weights ``now``."""
        pending = self._pending.pop(microbatch, None)
        if pending is None:
            return
        delay, read, then = pending
        norm = _distance(now, [torch.zeros(()).to(p) for p in now])
        if norm > 0:
            distances = _distance(read, now) / norm, _distance(then, now) / norm
            self.errors.append(PredictionError(self.stage, minibatch, delay, *distances))

    def drop(self) -> None:
        """Forget the micro-batches in flight."""
        self._pending.clear()


def look_every(num_total: int, num_microbatches: int) -> int:
    """The n of every n-th micro-batch to measure, so that a run has at least a few measurements, at little cost.

    A prime that does not divide A, so that micro-batches at every place in a mini-batch are measured.

    Args:
        num_total: the number of micro-batches of the run.
        num_microbatches: A.
    """
    return next((n for n in _PRIMES if num_total >= 4 * n and num_microbatches % n), 1)


def _distance(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    return math.sqrt(sum(float((x - y).abs().square().sum(dtype=torch.float64)) for x, y in zip(a, b, strict=True)))
