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

A backward may be divided (``split_backward``). I(m) is the gradient of the stage's input, for which the stage before
waits; W(m) the gradients of the weights, for which nobody waits; R(m) the forward that a stage repeats before its I.
A slot is then a word of these letters, and a stage's order a cycle of one slot or of several::

    RFIW    at an even d   the forward of m before both parts of the backward of m - lead, but for its repetition
    RIFW    at an odd d    between the two parts (``ahead`` below 1, where a lead is half of what it was)
    RIWF    backward_first
    FIW     a stage that keeps its graph repeats nothing

U comes after the W of the last micro-batch of a mini-batch. What counts for the delay is whether W, and with it U,
comes before F.

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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol, TypeVar

T = TypeVar("T")


class Order(Protocol):
    """What a schedule needs to know of a method (a `dtrp.Method` is one)."""

    @property
    def name(self) -> str: ...
    @property
    def ahead(self) -> float: ...
    @property
    def backward_first(self) -> bool: ...
    @property
    def keep(self) -> Literal["graph", "input"]: ...
    @property
    def flush(self) -> bool: ...
    @property
    def forward_all(self) -> bool: ...
    @property
    def local(self) -> bool: ...
    @property
    def split_backward(self) -> bool: ...
    @property
    def leads(self) -> Sequence[int] | None: ...
    @property
    def orders(self) -> Sequence[str] | str | None: ...


@dataclass(frozen=True, slots=True)
class Action:
    """One thing a stage does (numbers count from 0).

    ``F`` or ``B`` of a micro-batch; of a backward in two parts ``R``, ``I`` or ``W``; or ``U`` of a mini-batch.
    """

    kind: Literal["F", "B", "U", "R", "I", "W"]
    index: int

    def __str__(self) -> str:
        return "U" if self.kind == "U" else f"{self.kind}{self.index}"


Slot = tuple[Action, ...]


def lead(order: Order, num_stages: int, stage: int) -> int:
    """The number of forwards before the first backward: ``ceil(ahead * d)``, d stages after it; 0 with local losses.

    Raises:
        ValueError: the method has leads of its own, for another number of stages.
    """
    if order.leads is not None:
        return int(_own("leads", order.leads, num_stages)[stage])
    if order.local:
        return 0
    # The small number keeps 1.1 * 10 = 11.000000000000002 at 11.
    return math.ceil(order.ahead * (num_stages - 1 - stage) - 1e-9)


def cycle(order: Order, num_stages: int, stage: int) -> str:
    """The letters of a stage's slots, which it repeats from the first forward on.

    A stage without a lead has its graph at hand, and so no R.

    Raises:
        ValueError: the method has orders of its own, for another number of stages.
    """
    waits = lead(order, num_stages, stage) > 0
    if order.orders is not None:
        own = order.orders
        letters = own if isinstance(own, str) else _own("orders", own, num_stages)[stage]
        return letters if waits else letters.replace("R", "")
    backward_first = order.backward_first and waits
    if not order.split_backward:
        return "F" if order.forward_all else "BF" if backward_first else "FB"
    again = "R" if waits and order.keep == "input" else ""
    if backward_first:
        return again + "IWF"
    return again + ("IFW" if waits and order.ahead < 1 and (num_stages - 1 - stage) % 2 else "FIW")


def _own(field: str, values: Sequence[T], num_stages: int) -> Sequence[T]:
    if len(values) != num_stages:
        raise ValueError(
            f"{field}={values!r} are for {len(values)} stages, and there are {num_stages}; pass one for each stage"
        )
    return values


def most_in_flight(order: Order, num_stages: int, stage: int) -> int:
    """The most micro-batches between their F and their B at a stage when a mini-batch's forwards are through."""
    return lead(order, num_stages, stage) + cycle(order, num_stages, stage).count("F") - 1


def through(letters: str) -> list[int]:
    """For each forward of a cycle, how many of its backwards, both their parts, come before it."""
    before = [letters[:place] for place, letter in enumerate(letters) if letter == "F"]
    return [part.count("B") + part.count("W") for part in before]


def lag(order: Order, num_stages: int, stage: int) -> int:
    """The most micro-batches that have had their F, and not yet what U comes after, when another F runs."""
    ends = through(cycle(order, num_stages, stage))
    return lead(order, num_stages, stage) + max(i - done for i, done in enumerate(ends))


def steady_delay(order: Order, num_stages: int, stage: int, num_microbatches: int, position: int) -> int:
    """The delay, in updates, of the ``position``-th micro-batch of a mini-batch in steady state.

    In an order of several slots the largest that such a micro-batch can have.
    """
    if order.flush:
        return 0
    return max(0, math.ceil((lag(order, num_stages, stage) - position) / num_microbatches))


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
        left: backwards left in each mini-batch that has not had its update; in two parts, second parts.
        place: of the next letter in the stage's cycle of slots.
        next_weights: the micro-batch of the next W; None: ``next_backward``.
    """

    next_forward: int
    next_backward: int
    next_update: int
    left: tuple[int, ...]
    place: int = 0
    next_weights: int | None = None


class StageOrder:
    """The order of work of one stage, slot by slot, for a run whose length nobody knows yet.

    >>> from dtrp import get_method
    >>> order = StageOrder(get_method("dtrp"), num_stages=2, stage=0)
    >>> [" ".join(map(str, slot)) for _ in range(4) for slot in order.minibatch(1)]
    ['F0', 'F1', 'B0 U F2', 'B1 U F3']
    >>> [" ".join(map(str, slot)) for slot in order.flush()]
    ['B2 U', 'B3 U']
    >>> order = StageOrder(get_method("dtrp-split"), num_stages=2, stage=0)
    >>> [" ".join(map(str, slot)) for _ in range(3) for slot in order.minibatch(1)]
    ['F0', 'R0 I0 F1 W0 U', 'R1 I1 F2 W1 U']
    """

    def __init__(self, order: Order, num_stages: int, stage: int) -> None:
        self.lead = lead(order, num_stages, stage)
        self.cycle = cycle(order, num_stages, stage)
        self.flushes = order.flush
        self.splits = order.split_backward
        self.fills_bubble = order.flush and order.split_backward and order.orders is None
        self.num_stages = num_stages
        self.next_forward = 0  # micro-batch
        self.next_backward = 0  # micro-batch
        self.next_weights = 0  # micro-batch, of a backward in two parts
        self.next_update = 0  # mini-batch
        self._left: deque[int] = deque()  # backwards left in each open mini-batch
        self._place = 0  # of the next letter in the cycle
        self._begun = False  # whether `begin` has handed out what comes before the next F

    def position(self) -> Position:
        """Where the stage is, between two mini-batches."""
        assert not self._begun
        left = tuple(self._left)
        if not self.splits:
            return Position(self.next_forward, self.next_backward, self.next_update, left)
        return Position(self.next_forward, self.next_backward, self.next_update, left, self._place, self.next_weights)

    def resume(self, position: Position) -> None:
        """Go on from there."""
        self.next_forward, self.next_backward, self.next_update, left, self._place, weights = position
        self.next_weights = self.next_backward if weights is None else weights
        self._left = deque(left)
        self._begun = False

    def begin(self) -> Slot:
        """What comes before the first F of the next mini-batch, of whatever size it is; `minibatch` gives the rest.

        For a stage that learns the number of micro-batches from its first input.
        """
        if self._begun or self.fills_bubble or self.cycle[self._place] == "F":
            return ()
        self._begun = True
        return tuple(self._until_forward())

    def minibatch(self, num_microbatches: int) -> list[Slot]:
        """The slots of the next mini-batch, which has ``num_microbatches`` micro-batches."""
        self._left.append(num_microbatches)
        if self.fills_bubble:
            return [tuple(self._zero_bubble(num_microbatches))]
        slots = [self._slot() for _ in range(num_microbatches)]
        self._begun = False
        return slots + self.flush() if self.flushes else slots

    def flush(self) -> list[Slot]:
        """The slots of the backwards that are left."""
        slots = []
        while self.next_backward < self.next_forward or (self.splits and self.next_weights < self.next_forward):
            slots.append(tuple(self._rest_of_cycle()))
        self._place = 0
        return [slot for slot in slots if slot]

    def _slot(self) -> Slot:
        """All up to the next F, that F, and what follows it up to what belongs to the next slot."""
        actions = [*self._until_forward(), *self._letter()]
        while self._place and self.cycle[self._place] != "F" and not self._is_of_next_slot():
            actions += self._letter()
        return tuple(actions)

    def _until_forward(self) -> Iterator[Action]:
        while self.cycle[self._place] != "F":
            yield from self._letter()

    def _is_of_next_slot(self) -> bool:
        """Whether the next letter is of a slot whose F has not been."""
        letter, past = self.cycle[self._place], self.cycle[: self._place]
        return letter in "RIB" and past.count(letter) >= past.count("F")

    def _rest_of_cycle(self) -> Iterator[Action]:
        """To the end of the cycle, without forwards: each backward that is left when its place is reached."""
        letters = self.cycle.replace("F", "") or "B"
        place = len(self.cycle[: self._place].replace("F", ""))
        self._place = 0
        for letter in letters[place:]:
            if letter in "BI" and self.next_backward < self.next_forward:
                yield from self._backward(letter)
            elif letter == "R" and self.next_backward < self.next_forward:
                yield Action("R", self.next_backward)
            elif letter == "W" and self.next_weights < self.next_backward:
                yield from self._weights()

    def _letter(self) -> Iterator[Action]:
        """What the next letter of the cycle stands for; nothing, while the lead is built up (again, after a flush)."""
        letter, past = self.cycle[self._place], self.cycle[: self._place]
        self._place = (self._place + 1) % len(self.cycle)
        if letter == "F":
            yield self._forward()
            return
        microbatch = self.next_forward - past.count("F") + past.count(letter) - self.lead
        if letter == "W":
            if microbatch >= self.next_weights and self.next_weights < self.next_backward:
                yield from self._weights()
        elif microbatch >= self.next_backward:
            yield from [Action("R", self.next_backward)] if letter == "R" else self._backward(letter)

    def _zero_bubble(self, count: int) -> Iterator[Action]:
        """A mini-batch in the order ZB-H1, where every stage may hold as many graphs as there are stages.

        As 1F1B, but a W waits until the stage would hold more graphs than that; when there are no more forwards, one W
        stands between two I, whose gradients come a slot apart. Source: Qi et al., Zero bubble (almost) pipeline
        parallelism, ICLR 2024; arXiv:2401.10241.
        """
        end, again = self.next_forward + count, "R" in self.cycle
        for _ in range(min(count, self.lead)):
            yield self._forward()
        while self.next_backward < end:
            if self.next_forward < end:
                if self.next_forward - self.next_weights >= self.num_stages:
                    yield from self._weights()
                yield self._forward()
            elif self.next_weights < self.next_backward:
                yield from self._weights()
            if again:
                yield Action("R", self.next_backward)
            yield from self._backward("I")
        while self.next_weights < end:
            yield from self._weights()

    def _forward(self) -> Action:
        self.next_forward += 1
        return Action("F", self.next_forward - 1)

    def _backward(self, letter: str) -> Slot:
        """B, or the I of a backward in two parts."""
        self.next_backward += 1
        if letter == "I":
            return (Action("I", self.next_backward - 1),)
        return (Action("B", self.next_backward - 1), *self._update())

    def _weights(self) -> Slot:
        self.next_weights += 1
        return (Action("W", self.next_weights - 1), *self._update())

    def _update(self) -> Slot:
        """U, after the last backward of a mini-batch."""
        self._left[0] -= 1
        if self._left[0]:
            return ()
        self._left.popleft()
        self.next_update += 1
        return (Action("U", self.next_update - 1),)


def check_orders(order: Order, num_stages: int) -> None:
    """Refuse leads and orders of a method's own with which a run would stand still.

    Raises:
        ValueError: they are for another number of stages, a stage waits for what another one does later, or one without a
            lead has an update between a forward and its backward, which has the graph of that forward.
    """
    if order.leads is None and order.orders is None:
        return
    for stage in range(num_stages):
        if not order.flush and not lead(order, num_stages, stage) and lag(order, num_stages, stage):
            raise ValueError(
                f"leads={order.leads!r} and orders={order.orders!r}: stage {stage} has no lead, so it repeats no forward, and "
                f"{cycle(order, num_stages, stage)!r} puts an update between a forward and its backward; pass a lead of at least "
                "1 there, or an order in which each backward follows its forward"
            )
    slots = 2 * max(most_in_flight(order, num_stages, k) for k in range(num_stages)) + 2
    rows = []
    for stage in range(num_stages):
        work = StageOrder(order, num_stages, stage)
        rows.append(deque(action for slot in [*work.minibatch(slots), *work.flush()] for action in slot))
    done: set[tuple[int, Action]] = set()
    while any(rows):
        before = len(done)
        for stage, row in enumerate(rows):
            while row:
                kind, index = row[0].kind, row[0].index
                source = stage - 1 if kind == "F" else stage + 1 if kind in "BI" else -1
                if 0 <= source < num_stages and (source, row[0]) not in done:
                    break
                if kind in "BI" and (stage, Action("F", index)) not in done:
                    break
                done.add((stage, row.popleft()))
        if len(done) == before:
            waits = ", ".join(f"stage {stage} with {row[0]}" for stage, row in enumerate(rows) if row)
            raise ValueError(
                f"leads={order.leads!r} and orders={order.orders!r} deadlock: {waits} wait for each other; a stage's lead is at "
                "least that of the next one"
            )
