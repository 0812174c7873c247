"""How far the weights that a forward read were from those of its backward.

At F(m) of a stage that has a delay the weights that it read are copied, the predicted ones or, where nothing is
predicted, those of then; at B(m), when the stage has the version that they were to be, they are compared. It costs two
copies of the weights for each micro-batch under way that is looked at, so only every n-th is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

_PRIMES = (17, 13, 11, 7, 5, 3)


class PredictionError(NamedTuple):
    """One micro-batch at one stage; distances are Euclidean over all trained weights, over the norm of the true ones.

    Attributes:
        stage: k.
        minibatch: b, whose version B meets.
        delay: in updates.
        read: from the weights that F read to the true ones.
        stale: from the weights as they were at F to the true ones: what no prediction would have given.
    """

    stage: int
    minibatch: int
    delay: int
    read: float
    stale: float


class Gauge:
    """Compares weights at every n-th micro-batch of one stage."""

    def __init__(self, stage: int, every: int) -> None:
        self.stage, self.every = stage, every
        self.errors: list[PredictionError] = []
        self._pending: dict[int, tuple[int, list[Tensor], list[Tensor]]] = {}  # by micro-batch: (delay, read, then)

    @torch.no_grad()
    def forward(self, microbatch: int, delay: int, read: Sequence[Tensor], now: Sequence[Tensor]) -> None:
        """F(m) is about to read ``read``."""
        if delay > 0 and microbatch % self.every == 0:
            then = [p.detach().clone() for p in now]
            self._pending[microbatch] = (delay, [t.detach().clone() for t in read], then)

    @torch.no_grad()
    def backward(self, microbatch: int, minibatch: int, now: Sequence[Tensor]) -> None:
        """B(m) is about to run, at ``now``."""
        pending = self._pending.pop(microbatch, None)
        if pending is None:
            return
        delay, read, then = pending
        norm = _distance(now, [torch.zeros(()).to(p) for p in now])
        if norm > 0:
            distances = _distance(read, now) / norm, _distance(then, now) / norm
            self.errors.append(PredictionError(self.stage, minibatch, delay, *distances))

    def drop(self) -> None:
        """Forget the micro-batches under way."""
        self._pending.clear()


def look_every(num_total: int, num_microbatches: int) -> int:
    """The n of every n-th micro-batch to look at, so that a run has a few looks at least, at little cost.

    A prime that A has not, so that micro-batches at every place in a mini-batch are looked at.

    Args:
        num_total: micro-batches of the run.
        num_microbatches: A.
    """
    return next((n for n in _PRIMES if num_total >= 4 * n and num_microbatches % n), 1)


def _distance(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    return math.sqrt(sum(float((x - y).abs().square().sum(dtype=torch.float64)) for x, y in zip(a, b, strict=True)))
