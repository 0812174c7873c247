"""Who does what, and when: the schedule of every method, as data.

This is the file to read first. It needs nothing but the standard library.

A network of K stages trains on mini-batches that are cut into micro-batches. With ``d = K-1-k``
stages after it, stage k runs ``lead = ceil(ahead * d)`` forwards before its first backward, and then,
micro-batch by micro-batch, one slot each::

    slot m of stage k    backward_first    B(m - lead)  then  F(m)
                         forward_first     F(m)  then  B(m - lead)
                         the last stage    F(m)  then  B(m)           (its lead is 0)
    U                    right after the last backward of a mini-batch
    flush                the backwards that are left, in order

A method whose stages each have a loss of their own (``local``) has lead 0 at every stage, and no gradient travels.

That is everything: ``StageOrder`` below says it in code, one stage at a time, and the engines, the
simulator and the report only ever ask it (or a `Schedule` of `schedule_grid.py`, which writes down a whole
run) what comes next. None of them knows a method by name.

From the order follows the delay. ``B(m)`` of mini-batch b happens after exactly b updates, at every
stage and in every method; ``F(m)`` happens earlier::

    delay(m) = b - updates made when F(m) runs
             = ceil((lead - backward_first - j) / A)   in steady state, never below 0,
               j the position of m among the A micro-batches of its mini-batch

(With A = 1: the level of staleness of the ADL paper, arXiv:2012.03747.)
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol


class Order(Protocol):
    """What a schedule needs to know of a method (a `dtrp.Method` is one)."""

    @property
    def name(self) -> str: ...
    @property
    def ahead(self) -> float: ...
    @property
    def backward_first(self) -> bool: ...
    @property
    def flush(self) -> bool: ...
    @property
    def forward_all(self) -> bool: ...
    @property
    def local(self) -> bool: ...


@dataclass(frozen=True, slots=True)
class Action:
    """One thing a stage does: ``F`` or ``B`` of a micro-batch, or ``U`` of a mini-batch (counted from 0)."""

    kind: Literal["F", "B", "U"]
    index: int

    def __str__(self) -> str:
        return "U" if self.kind == "U" else f"{self.kind}{self.index}"


Slot = tuple[Action, ...]


def lead(order: Order, num_stages: int, stage: int) -> int:
    """The number of forwards before the first backward: ``ceil(ahead * d)``, d stages after it; 0 with local losses."""
    if order.local:
        return 0
    # The small number keeps 1.1 * 10 = 11.000000000000002 at 11.
    return math.ceil(order.ahead * (num_stages - 1 - stage) - 1e-9)


def steady_delay(order: Order, num_stages: int, stage: int, num_microbatches: int, position: int) -> int:
    """The delay, in updates, of the ``position``-th micro-batch of a mini-batch in steady state."""
    if order.flush:
        return 0
    ahead = lead(order, num_stages, stage) - order.backward_first
    return max(0, math.ceil((ahead - position) / num_microbatches))


def num_parts(num_samples: int, num_microbatches: int, microbatch_samples: int = 1) -> int:
    """The number of micro-batches of a mini-batch.

    >>> [num_parts(samples, 4) for samples in (1, 3, 64)], [num_parts(samples, 4, 2) for samples in (1, 7, 64)]
    ([1, 3, 4], [1, 3, 4])

    Args:
        num_samples: samples in the mini-batch, at least 1.
        num_microbatches: A, the number of micro-batches where the mini-batch has the samples.
        microbatch_samples: the least number of samples in a micro-batch, but for a mini-batch that has fewer.
    """
    return max(1, min(num_microbatches, num_samples // microbatch_samples))


class Position(NamedTuple):
    """Where a stage is in its order between two mini-batches.

    Args:
        next_forward, next_backward: micro-batches.
        next_update: mini-batch.
        left: backwards left in each mini-batch that has not had its update.
    """

    next_forward: int
    next_backward: int
    next_update: int
    left: tuple[int, ...]


class StageOrder:
    """The order of work of one stage, slot by slot, for a run whose length nobody knows yet.

    >>> from dtrp import get_method
    >>> order = StageOrder(get_method("dtrp"), num_stages=2, stage=0)
    >>> [" ".join(map(str, slot)) for _ in range(4) for slot in order.minibatch(1)]
    ['F0', 'F1', 'B0 U F2', 'B1 U F3']
    >>> [" ".join(map(str, slot)) for slot in order.flush()]
    ['B2 U', 'B3 U']
    """

    def __init__(self, order: Order, num_stages: int, stage: int) -> None:
        self.lead = lead(order, num_stages, stage)
        self.backward_first = order.backward_first and self.lead > 0
        self.flushes = order.flush
        self.forward_all = order.forward_all
        self.next_forward = 0  # micro-batch
        self.next_backward = 0  # micro-batch
        self.next_update = 0  # mini-batch
        self._left: deque[int] = deque()  # backwards left in each open mini-batch
        self._begun = False  # whether the B of the next slot has been handed out by `begin`

    def position(self) -> Position:
        """Where the stage is, between two mini-batches."""
        assert not self._begun
        return Position(self.next_forward, self.next_backward, self.next_update, tuple(self._left))

    def resume(self, position: Position) -> None:
        """Go on from there."""
        self.next_forward, self.next_backward, self.next_update, left = position
        self._left = deque(left)
        self._begun = False

    def begin(self) -> Slot:
        """What comes before the first F of the next mini-batch, of whatever size it is; `minibatch` gives the rest.

        For a stage that learns the number of micro-batches from its first input.
        """
        if self._begun or not self.backward_first or not self._due():
            return ()
        self._begun = True
        return self._backward()

    def minibatch(self, num_microbatches: int) -> list[Slot]:
        """The slots of the next mini-batch, which has ``num_microbatches`` micro-batches."""
        self._left.append(num_microbatches)
        slots = [self._slot() for _ in range(num_microbatches)]
        return slots + self.flush() if self.flushes else slots

    def flush(self) -> list[Slot]:
        """The slots of the backwards that are left."""
        return [self._backward() for _ in range(self.next_backward, self.next_forward)]

    def _slot(self) -> Slot:
        forward: Slot = (Action("F", self.next_forward),)
        due = not self._begun and self._due()
        self._begun = False
        self.next_forward += 1
        if not due:
            return forward
        return self._backward() + forward if self.backward_first else forward + self._backward()

    def _due(self) -> bool:
        """Whether the next slot has a B; after a flush the lead builds up again: its B may be long done."""
        return not self.forward_all and self.next_forward - self.lead >= self.next_backward

    def _backward(self) -> Slot:
        backward = Action("B", self.next_backward)
        self.next_backward += 1
        self._left[0] -= 1
        if self._left[0]:
            return (backward,)
        self._left.popleft()
        self.next_update += 1
        return (backward, Action("U", self.next_update - 1))
