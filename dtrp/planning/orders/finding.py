"""The search: runs in which stages decide, with caps and preferences varied, of which the best cycles are kept."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random

from ...errors import PlanError
from ...validation import is_number
from .cycles import Cycles, read_cycles, slot_s
from .greedy import Parts, Preferences, decide

_PATIENCE = (0.0, 0.1, 0.2, 0.35, 0.5, 0.8)
_RANKS = ("IFRW", "FIRW", "IRFW", "IFWR", "FIWR")
_WORK = 320  # preferences for a delay, times stages
_LEAST_TRIED, _MOST_TRIED = 12, 60  # preferences for a delay
_READ = 3  # cycles of a run
_AS_GOOD = 1.002  # times the fastest possible slot
_SLOWEST = 1.6  # times the fastest possible slot


@dataclass(frozen=True)
class FoundOrder:
    """An order of work for every stage.

    Attributes:
        leads, orders: as the fields of `dtrp.Method`.
        slot_s: seconds of a slot in steady state.
        delay: the largest delay with one micro-batch a mini-batch, in updates.
    """

    leads: tuple[int, ...]
    orders: tuple[str, ...]
    slot_s: float
    delay: int


def find_orders(parts: Sequence[Parts], links_s: Sequence[float], *, repeats: bool) -> list[FoundOrder]:
    """Orders of work for backwards in two parts, on the frontier of slot length against largest delay.

    >>> found = find_orders([Parts(1, 1, 1, 1)] * 3 + [Parts(1, 0, 1, 1)], [0.0] * 3, repeats=True)
    >>> [(order.delay, order.slot_s) for order in found if order.slot_s <= 4]
    [(2, 4.0)]

    Each stage decides, micro-batch by micro-batch, what of that which is ready to do next; a cap on what waits for its
    update bounds the delay. What such runs repeat are the candidates, for many preferences at every cap.

    Args:
        parts: by stage, the seconds of its parts.
        links_s: by hop, the seconds of a message.
        repeats: whether stages repeat forwards before their backwards (the method keeps inputs), so that their orders
            have an R; of no length where ``repeat_s`` is 0.

    Returns:
        From the least delay and the longest slot to the shortest slot; those over 1.6 times the shortest are left out.

    Raises:
        PlanError: times that are negative, not finite or all 0; not one link less than stages.
    """
    _check(parts, links_s)
    if len(parts) == 1:
        return [FoundOrder((0,), ("FIW",), sum(parts[0]) - parts[0].repeat_s, 0)]
    search = _Search([*parts[:-1], parts[-1]._replace(repeat_s=0.0)], links_s, repeats=repeats)
    return search.frontier()


class _Search:
    def __init__(self, parts: Sequence[Parts], links_s: Sequence[float], *, repeats: bool) -> None:
        self.parts, self.links_s, self.repeats = parts, links_s, repeats
        self.fastest = max(map(sum, parts))
        self.slots: dict[Cycles, float] = {}
        self.random = Random(len(parts))

    def frontier(self) -> list[FoundOrder]:
        """For each delay the fastest order, as long as more delay makes it faster."""
        num_stages = len(self.parts)
        round_trip = sum(p.forward_s + p.input_s for p in self.parts) + 2 * sum(self.links_s) + self.parts[0].weight_s
        delay = max(1, math.ceil(round_trip / (_SLOWEST * self.fastest)) - 1)
        step, stale, best = max(1, num_stages // 16), 0, math.inf
        while best > _AS_GOOD * self.fastest and stale < 4:
            self._try_caps(delay)
            before, best = best, min(self.slots.values(), default=math.inf)
            stale = 0 if best < 0.998 * before else stale + 1
            delay += step
        return self._best()

    def _best(self) -> list[FoundOrder]:
        ranked = sorted(
            (max(cycles.lags()), seconds, sum(cycles.lags()), cycles) for cycles, seconds in self.slots.items()
        )
        found: list[FoundOrder] = []
        for delay, seconds, _, cycles in ranked:
            if seconds <= _SLOWEST * self.fastest and (not found or seconds < 0.999 * found[-1].slot_s):
                found.append(FoundOrder(cycles.leads, self._letters(cycles), seconds, delay))
        return found

    def _letters(self, cycles: Cycles) -> tuple[str, ...]:
        """The orders as a method's, with an R where the stage repeats a forward, of whatever length."""
        orders = []
        for lead, letters in zip(cycles.leads, cycles.orders, strict=True):
            plain = letters.replace("R", "") if not lead else letters
            orders.append(_once(plain.replace("I", "RI") if self.repeats and lead and "R" not in plain else plain))
        return tuple(orders)

    def _try_caps(self, delay: int) -> None:
        """The orders that runs with this largest delay come to."""
        count = 60 + 3 * delay + 2 * len(self.parts)
        tried = min(_MOST_TRIED, max(_LEAST_TRIED, _WORK // len(self.parts)))
        best = min((seconds for cycles, seconds in self.slots.items() if max(cycles.lags()) <= delay), default=math.inf)
        for _, preferences in zip(range(tried), self._preferences(delay), strict=False):
            rows = decide(self.parts, self.links_s, preferences, count)
            for estimated, cycles in read_cycles(rows, count - 2 * delay)[:_READ]:
                if estimated > 1.01 * best:
                    break
                if cycles not in self.slots:
                    self.slots[cycles] = slot_s(self.parts, self.links_s, cycles)
                    best = min(best, self.slots[cycles])
            if best <= _AS_GOOD * self.fastest:
                break

    def _preferences(self, delay: int) -> Iterator[Preferences]:
        """Plain ones first, the same at every stage; then drawn ones, whose caps become smaller from stage to stage."""
        num_stages = len(self.parts)
        flat = [delay] * (num_stages - 1) + [0]
        for patience in _PATIENCE:
            for ranks in _RANKS[:2]:
                yield Preferences(flat, [ranks] * num_stages, dict.fromkeys("FRIW", patience))
        while True:
            patience_of = {letter: self.random.choice(_PATIENCE) for letter in "FRIW"}
            if self.random.random() < 0.5:
                yield Preferences(flat, [self.random.choice(_RANKS) for _ in self.parts], patience_of)
            room = self.random.choice((0, 1, 2))
            caps = [
                min(delay, math.ceil(delay * (num_stages - 1 - k) / (num_stages - 1)) + self.random.choice((0, room)))
                for k in range(num_stages)
            ]
            yield Preferences([*caps[:-1], 0], [self.random.choice(_RANKS[:2])] * num_stages, patience_of)


def _once(letters: str) -> str:
    """The shortest cycle of which the letters are repetitions."""
    return letters[: (letters + letters).index(letters, 1)]


def _check(parts: Sequence[Parts], links_s: Sequence[float]) -> None:
    if len(links_s) != len(parts) - 1:
        raise PlanError(f"links_s has {len(links_s)} values for {len(parts)} stages; pass {len(parts) - 1}, one a hop")
    for time in (*links_s, *(value for stage in parts for value in stage)):
        if not is_number(time, 0):
            raise PlanError(f"a time of {time!r}: pass seconds of at least 0")
    if not all(stage.forward_s > 0 and stage.input_s > 0 for stage in parts):
        raise PlanError("a stage's forward and backward take no time: pass measured times above 0")
