"""A run in which stages decided for themselves, read as cycles; and how long a slot of given cycles takes."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from .greedy import Began, Parts

_MOST_SLOTS = 16  # of a cycle
_WARMUP = 15  # leads


class Cycles(NamedTuple):
    """An order for every stage, as in a row of a method: the forwards ahead, and the letters that repeat."""

    leads: tuple[int, ...]
    orders: tuple[str, ...]

    @property
    def num_slots(self) -> int:
        """Slots of a cycle; the same at every stage."""
        return self.orders[0].count("F")

    def lags(self) -> list[int]:
        """By stage, the most micro-batches that wait for their update when a forward begins."""
        lags = []
        for lead, letters in zip(self.leads, self.orders, strict=True):
            before = [letters[:place] for place, letter in enumerate(letters) if letter == "F"]
            lags.append(lead + max(done.count("F") - done.count("W") for done in before))
        return lags


class _Place(NamedTuple):
    """Between two letters of a stage, when no backward has begun."""

    letters_before: int
    start_s: float
    in_flight: int


def read_cycles(rows: Sequence[Sequence[Began]], end: int) -> list[tuple[float, Cycles]]:
    """The cycles that can be read from a run, with the time of a slot in them, the fastest first.

    A cycle is what lies between two places in which every stage is in the same state, as many micro-batches apart.

    Args:
        rows: by stage, what it did.
        end: a micro-batch of its steady state, before the last ones.
    """
    places = [_places(row) for row in rows]
    found: dict[Cycles, float] = {}
    for num_slots in range(1, _MOST_SLOTS + 1):
        for first in range(max(1, end - 2 * num_slots - 5), end - num_slots + 1):
            read = _read(rows, places, first, num_slots)
            if read is not None:
                seconds, cycles = read
                found[cycles] = min(seconds, found.get(cycles, math.inf))
    return sorted((seconds, cycles) for cycles, seconds in found.items())


def _places(row: Sequence[Began]) -> dict[int, list[_Place]]:
    """By the next forward, the places where a cycle may begin."""
    places: dict[int, list[_Place]] = defaultdict(list)
    forwards = backwards = 0
    idle = True
    for index, (letter, start) in enumerate(row):
        if idle:
            places[forwards].append(_Place(index, start, forwards - backwards))
        if letter == "F":
            forwards += 1
        else:
            idle = letter == "W"
            backwards += letter == "I"
    return places


def _read(
    rows: Sequence[Sequence[Began]], places: Sequence[dict[int, list[_Place]]], first: int, num_slots: int
) -> tuple[float, Cycles] | None:
    """The cycles from forward ``first`` on; None: the stages are not in one state again so many slots later."""
    leads, orders, longest = [], [], 0.0
    for row, by_forward in zip(rows, places, strict=True):
        for begin in reversed(by_forward.get(first, [])):  # the smallest lead first
            end = next((p for p in by_forward.get(first + num_slots, ()) if p.in_flight == begin.in_flight), None)
            letters = (
                "" if end is None else "".join(began.letter for began in row[begin.letters_before : end.letters_before])
            )
            if end is not None and _is_cycle(letters, begin.in_flight):
                break
        else:
            return None
        leads.append(begin.in_flight)
        orders.append(letters)
        longest = max(longest, end.start_s - begin.start_s)
    return longest / num_slots, Cycles(tuple(leads), tuple(orders))


def _is_cycle(letters: str, lead: int) -> bool:
    """Whether the letters are a cycle as `dtrp.Method` takes them: no backward a slot ahead of its forward."""
    waiting = 0
    for letter in letters:
        waiting += (letter == "F") - (letter == "I")
        if waiting < -1:
            return False
    # Without a lead a stage has its graph at hand, which must be that of the weights of now.
    return lead > 0 or letters.replace("R", "") == "FIW" * letters.count("F")


def slot_s(parts: Sequence[Parts], links_s: Sequence[float], cycles: Cycles) -> float:
    """Seconds of a slot in steady state when every stage works in this order; infinite: they wait for each other."""
    num_slots = cycles.num_slots
    rounds = max(12, math.ceil(_WARMUP * (max(cycles.leads) + 2) / num_slots))
    run = _Run(parts, links_s, cycles, rounds)
    ends = run.ends()
    if len(ends) < rounds * num_slots // 2:
        return math.inf
    counted = max(1, len(ends) // 4 // num_slots) * num_slots
    return (ends[-1] - ends[-1 - counted]) / counted


class _Run:
    """A run of some rounds of every stage's cycle."""

    def __init__(self, parts: Sequence[Parts], links_s: Sequence[float], cycles: Cycles, rounds: int) -> None:
        self.parts, self.links_s, self.cycles, self.rounds = parts, links_s, cycles, rounds
        count = rounds * cycles.num_slots
        self.inputs: list[list[float | None]] = [[None] * count for _ in range(len(parts) + 1)]
        self.gradients: list[list[float | None]] = [[None] * count for _ in parts]
        self.last_ends: list[float] = []

    def ends(self) -> list[float]:
        """When the forwards of the last stage end, up to the start of the flush."""
        self.inputs[0] = [0.0] * len(self.inputs[0])
        workers = [self._work(k) for k in range(len(self.parts))]
        order = [*range(len(workers)), *range(len(workers) - 2, -1, -1)]
        while sum(next(workers[k], False) for k in order):  # as far as each can go
            pass
        return self.last_ends

    def _work(self, k: int) -> Iterator[bool]:
        """A stage at work; where it waits for a message, it yields whether it has moved since."""
        forward_s, repeat_s, input_s, weight_s = self.parts[k]
        lead, letters, num_slots = self.cycles.leads[k], self.cycles.orders[k], self.cycles.num_slots
        last = k == len(self.parts) - 1
        inputs, outputs, gradients = self.inputs[k], self.inputs[k + 1], self.gradients[k]
        sent = self.gradients[k - 1] if k else None
        down = 0.0 if last else self.links_s[k]
        up = self.links_s[k - 1] if k else 0.0
        numbered = _numbered(letters, lead)
        if not lead and repeat_s:  # a forward with a graph, which no R makes again
            forward_s, repeat_s = repeat_s, 0.0
        clock, moved = 0.0, False
        for base in range(0, self.rounds * num_slots, num_slots):
            for letter, offset in numbered:
                number = base + offset
                if number < 0:
                    continue
                if letter == "F":
                    while (at := inputs[number]) is None:
                        yield moved
                        moved = False
                    clock = (at if at > clock else clock) + forward_s
                    outputs[number] = clock + down
                    if last:
                        self.last_ends.append(clock)
                elif letter == "I":
                    if not last:
                        while (at := gradients[number]) is None:
                            yield moved
                            moved = False
                        clock = at if at > clock else clock
                    clock += input_s
                    if sent is not None:
                        sent[number] = clock + up
                else:
                    clock += repeat_s if letter == "R" else weight_s
                moved = True
        yield moved


def _numbered(letters: str, lead: int) -> list[tuple[str, int]]:
    """Every letter with its micro-batch in the first round."""
    seen = dict.fromkeys("FRIW", 0)
    numbered = []
    for letter in letters:
        numbered.append((letter, seen[letter] - (0 if letter == "F" else lead)))
        seen[letter] += 1
    return numbered
