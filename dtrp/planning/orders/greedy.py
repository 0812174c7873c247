"""Stages that decide for themselves: each takes, of what is ready, the letter that comes first in its preferences.

What keeps the delay within bounds is a cap: a stage begins a forward only while no more than so many earlier
micro-batches wait for their update. Such a run, once it repeats, is a periodic order.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple


class Parts(NamedTuple):
    """Seconds of a stage's work for one micro-batch.

    Attributes:
        forward_s: of F.
        repeat_s: of R, the forward that is repeated, with a graph; 0 where the stage keeps the graph of its F.
        input_s: of I, or of a backward that is whole.
        weight_s: of W.
    """

    forward_s: float
    repeat_s: float
    input_s: float
    weight_s: float


@dataclass(frozen=True)
class Preferences:
    """How the stages decide.

    Attributes:
        caps: by stage, the most micro-batches that may wait for their update when a forward begins.
        ranks: by stage, the letters ``FRIW`` from the most urgent one to the least.
        patience: by letter, the share of its time for which a stage would rather wait, when what is more urgent is on
            its way.
    """

    caps: Sequence[int]
    ranks: Sequence[str]
    patience: Mapping[str, float]


class Began(NamedTuple):
    """A letter, and when it began."""

    letter: str
    start_s: float


def decide(parts: Sequence[Parts], links_s: Sequence[float], preferences: Preferences, count: int) -> list[list[Began]]:
    """Run ``count`` micro-batches.

    Args:
        parts: the stages' times. The last stage has its graph at hand.
        links_s: by hop, the seconds of a message, in either direction.
        preferences: how the stages decide.
        count: micro-batches.

    Returns:
        By stage, what it did, in order.
    """
    stages = [_Deciding(k, times, preferences, count, last=k == len(parts) - 1) for k, times in enumerate(parts)]
    stages[0].inputs = [0.0] * count
    heap = [(0.0, k) for k in range(len(stages))]  # when to look at which stage
    while heap:
        now, k = heapq.heappop(heap)
        stage = stages[k]
        if stage.free > now:
            continue
        letter, again = stage.choose(now)
        if letter is None:
            if again < math.inf:
                heapq.heappush(heap, (again, k))
            continue
        number, end = stage.begin(letter, now)
        heapq.heappush(heap, (end, k))
        if letter == "F" and k + 1 < len(stages):
            stages[k + 1].inputs[number] = end + links_s[k]
            heapq.heappush(heap, (max(now, stages[k + 1].free), k + 1))
        elif letter == "I" and k:
            stages[k - 1].gradients[number] = end + links_s[k - 1]
            heapq.heappush(heap, (max(now, stages[k - 1].free), k - 1))
    return [stage.began for stage in stages]


class _Deciding:
    """A stage that decides, and what it knows: also when a message will be there that has not been sent yet."""

    def __init__(self, index: int, parts: Parts, preferences: Preferences, count: int, *, last: bool) -> None:
        self.seconds = dict(zip("FRIW", parts, strict=True))
        self.cap, self.last, self.count = preferences.caps[index], last, count
        self.urgency = {letter: place for place, letter in enumerate(preferences.ranks[index])}
        self.patience = preferences.patience
        self.inputs = [math.inf] * count  # by micro-batch, when its message is there
        self.gradients = [math.inf] * count
        self.began: list[Began] = []
        self.free = 0.0
        self.forwards = self.backwards = self.weights = 0
        self.first = "R" if parts.repeat_s else "I"  # letter of a backward
        self.phase = self.first  # the backward's next letter

    def choose(self, now: float) -> tuple[str | None, float]:
        """The letter to begin now; or None, and when to look again."""
        forward_at = backward_at = math.inf
        if self.forwards < self.count and self.forwards - self.weights <= self.cap:
            forward_at = self.inputs[self.forwards]
        if self.phase == "W":
            backward_at = now
        elif self.backwards < self.forwards:
            backward_at = now if self.phase == "R" or self.last else self.gradients[self.backwards]
        f_is_more_urgent = self.urgency["F"] < self.urgency[self.phase]
        if forward_at <= now and (f_is_more_urgent or backward_at > now):
            letter, other_at, waits = "F", backward_at, not f_is_more_urgent
        elif backward_at <= now:
            letter, other_at, waits = self.phase, forward_at, f_is_more_urgent
        else:
            return None, min(forward_at, backward_at)
        if waits and now < other_at < now + self.patience[letter] * self.seconds[letter]:
            return None, other_at
        return letter, now

    def begin(self, letter: str, now: float) -> tuple[int, float]:
        """Begin the letter; (the micro-batch, when it ends)."""
        self.began.append(Began(letter, now))
        self.free = now + self.seconds[letter]
        if letter == "F":
            self.forwards += 1
            return self.forwards - 1, self.free
        if letter == "R":
            self.phase = "I"
        elif letter == "I":
            self.phase = "W"
            self.backwards += 1
            return self.backwards - 1, self.free
        else:
            self.phase = self.first
            self.weights += 1
        return self.backwards, self.free
