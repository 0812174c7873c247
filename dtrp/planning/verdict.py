"""Whether to pipeline: the rows of a plan's table compared, as far as their spread lets them be.

A verdict is about times that were measured. Where a row scatters by more than 10 %, or nobody knows by how much, there
is none, but what to do for one; where a plan is as fast as one worker within the scatter, there is none either.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ..methods import get_method, list_methods
from .plan_file import Choice, Verdict, fastest_row

MOST_SPREAD = 0.10  # of a row, for a verdict
_LEAST_DIFFERENCE = 0.05  # of two times, for a verdict
_LEAST_ROUNDS = 4  # for quartiles
_MOST_NAMED = 3  # rows that scatter


class Judgement(NamedTuple):
    """A verdict, or None, and its reason in a sentence or two."""

    verdict: Verdict | None
    advice: str


@dataclass(frozen=True)
class Comparison:
    """What a verdict is about.

    Attributes:
        plan: the plan's row.
        one_worker: the row of one worker.
        others: the other rows.
        bottleneck: what keeps the plan from being faster.
        latency_scatter_s: seconds by which the measured time of a message scatters.
        memory_limit_bytes: bytes that a worker may hold.
        repeats: rounds of the measurement.
    """

    plan: Choice
    one_worker: Choice
    others: Sequence[Choice]
    bottleneck: str
    latency_scatter_s: float
    memory_limit_bytes: float
    repeats: int

    def judge(self) -> Judgement:
        """The verdict."""
        if self.plan.num_workers == 1:
            return Judgement("one worker", "One worker: there is no pipeline to plan.")
        if (noise := self._noise()) is not None:
            return Judgement(None, f"No verdict: {noise}. As measured: {self._times}. {self._fastest}")
        speedup = self.one_worker.minibatch_s / self.plan.minibatch_s
        spreads = self.plan.spread or 0.0, self.one_worker.spread or 0.0
        margin = 1 + max(_LEAST_DIFFERENCE, math.hypot(*spreads))
        needed = self.one_worker.memory_bytes
        if speedup < margin and needed > self.memory_limit_bytes:
            text = "Slower than" if speedup < 1 else "No faster than"
            reason = f"({self._times}; {self.bottleneck}), but that needs {needed:,} bytes."
            return Judgement("pipeline", f"{text} one worker would be {reason}")
        if speedup < 1 / margin:
            return Judgement("one worker", self._against())
        if speedup < margin:
            return Judgement(
                None,
                f"No verdict: as fast as one worker, within {margin - 1:.0%} ({self._times}; {self.bottleneck}). One worker "
                f"is simpler. {self._fastest}",
            )
        return Judgement("pipeline", self._in_favour(speedup))

    def _noise(self) -> str | None:
        """Why the times cannot be compared, and what to do; None if they can be."""
        rows = {"this plan": self.plan, **{row.method: row for row in (self.one_worker, *self.others)}}
        if any(row.minibatch_s <= 0 for row in rows.values()):
            return "the times are too short to measure. Plan with larger mini-batches"
        if any(row.spread is None for row in rows.values()):
            return (
                f"{self.repeats} rounds do not tell how the times scatter. Plan again with repeats of at least "
                f"{_LEAST_ROUNDS}"
            )
        wide = {name: row.spread for name, row in rows.items() if row.spread is not None and row.spread > MOST_SPREAD}
        what_to_do = f"Plan again on an idle machine, or with more repeats than {self.repeats}"
        if wide:
            widest = sorted(wide, key=wide.__getitem__, reverse=True)[:_MOST_NAMED]
            shown = "; ".join(f"{name} by {wide[name]:.0%}" for name in widest)
            more = f"; and {len(wide) - len(widest)} more" if len(wide) > len(widest) else ""
            return (
                f"the times scatter too much to be compared: {shown}{more} (the interquartile range of a row may be at "
                f"most {MOST_SPREAD:.0%} of its median). {what_to_do}"
            )
        if self.latency_scatter_s > MOST_SPREAD * self.plan.minibatch_s:
            return (
                f"the time of a message scatters by {1e3 * self.latency_scatter_s:.3g} ms, which is more than "
                f"{MOST_SPREAD:.0%} of a mini-batch. {what_to_do}, or pass the latency of your links"
            )
        return None

    @property
    def _times(self) -> str:
        together, alone = 1e3 * self.plan.minibatch_s, 1e3 * self.one_worker.minibatch_s
        return f"{together:.3g} ms a mini-batch with {self.plan.num_workers} workers, {alone:.3g} ms with one"

    @property
    def _fastest(self) -> str:
        """The best row of the table, by name."""
        best = fastest_row(self.plan, (self.one_worker, *self.others), self.memory_limit_bytes)
        if best is self.plan:
            return "This plan is the fastest row of the table."
        return f"The fastest row of the table is {best.method}, with {1e3 * best.minibatch_s:.3g} ms."

    def _against(self) -> str:
        return (
            f"Do not pipeline this: {self._times}; {self.bottleneck}. Train on one worker, or on replicas of the whole "
            f"model. {self._fastest}"
        )

    def _in_favour(self, speedup: float) -> str:
        text = f"{speedup:.2f} times as fast as one worker: {self._times}. {self._fastest}"
        flushing = [row for row in self.others if _flushes(row) and row.memory_bytes <= self.memory_limit_bytes]
        best = min(flushing, key=lambda row: row.minibatch_s, default=self.plan)
        if self.plan.delay and best is not self.plan and best.minibatch_s <= 1.02 * self.plan.minibatch_s:
            count = best.num_microbatches
            text += f" {best.method} with {count} micro-batches is as fast, without any delay: prefer it."
        if speedup < 0.6 * self.plan.num_workers:
            text += f" {self.plan.num_workers} workers could do better: {self.bottleneck}."
        return text


def _flushes(row: Choice) -> bool:
    return row.method in list_methods() and get_method(row.method).flush
