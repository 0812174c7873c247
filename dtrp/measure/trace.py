"""Spans of time in which each F, B, U, send and receive ran, as a Chrome trace (chrome://tracing, ui.perfetto.dev)."""

from __future__ import annotations

import json
import os
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch

from ..atomic_file import whole_file
from ..schedule import Action


class Span(NamedTuple):
    """A piece of work: times in nanoseconds since the epoch; ``lane`` names the row of the trace that shows it."""

    name: str
    kind: str
    lane: str
    begin_ns: int
    end_ns: int


_NO_SPAN = nullcontext()
_MOST_SPANS = 1_000_000


class Tracer:
    """Collects the spans of one process, if ``on``; in a long run only the last million are kept."""

    def __init__(self, on: bool) -> None:
        self.on = on
        self.spans: deque[Span] = deque(maxlen=_MOST_SPANS)
        self._lock = threading.Lock()

    def action(self, action: Action, stage: int) -> AbstractContextManager[None]:
        """Within it a stage does ``action``: records a span, and a range of `torch.profiler`."""
        return self._span(f"{action.kind}{action.index}", action.kind, stage) if self.on else _NO_SPAN

    def wait(self, direction: str, microbatch: int, stage: int) -> AbstractContextManager[None]:
        """Within it a stage waits for a message, forward or backward: records the same."""
        return self._span(f"wait {direction} {microbatch}", "wait", stage) if self.on else _NO_SPAN

    def add(self, name: str, kind: str, lane: str, begin_ns: int) -> None:
        """Record a span that ends now."""
        if self.on:
            with self._lock:
                self.spans.append(Span(name, kind, lane, begin_ns, time.time_ns()))

    def range(self, name: str) -> AbstractContextManager[Any]:
        """Records a range of `torch.profiler` alone, for a span that `add` records.

        For helper threads: a profiler sees the range if it looks at all threads.
        """
        return torch.profiler.record_function(name) if self.on else _NO_SPAN

    @contextmanager
    def _span(self, name: str, kind: str, stage: int) -> Iterator[None]:
        begin_ns = time.time_ns()
        with torch.profiler.record_function(name):
            yield
        self.add(name, kind, f"stage {stage}", begin_ns)


def write_chrome_trace(path: str | os.PathLike[str], processes: Sequence[tuple[str, Sequence[Span]]]) -> None:
    """Write the spans of processes, given with their names, whole or not at all.

    A process becomes a ``pid``, and each of its lanes one ``tid`` or several: viewers show spans of a ``tid`` correctly
    only where they are nested or apart. Times are microseconds since the first span.
    """
    begin = min((span.begin_ns for _, spans in processes for span in spans), default=0)
    events: list[dict[str, Any]] = []
    for pid, (name, spans) in enumerate(processes):
        events.append({"name": "process_name", "ph": "M", "pid": pid, "args": {"name": name}})
        for tid, (lane, row) in enumerate(_rows(spans)):
            place = {"pid": pid, "tid": tid}
            events.append({"name": "thread_name", "ph": "M", **place, "args": {"name": lane}})
            for span in row:
                times = {"ts": (span.begin_ns - begin) / 1000, "dur": (span.end_ns - span.begin_ns) / 1000}
                events.append({"name": span.name, "cat": span.kind, "ph": "X", **place, **times})
    with whole_file(path) as file:
        file.write(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}).encode())


def _rows(spans: Sequence[Span]) -> list[tuple[str, list[Span]]]:
    """The spans of each lane, in as many rows as are needed for the spans of a row to be nested or apart."""
    rows: dict[str, list[list[Span]]] = {span.lane: [] for span in spans}
    open_ends: dict[int, list[int]] = {}  # by row: the ends of its open spans, the innermost last

    def has_room(row: list[Span], span: Span) -> bool:
        ends = open_ends[id(row)]
        while ends and ends[-1] <= span.begin_ns:
            ends.pop()
        return not ends or span.end_ns <= ends[-1]

    for span in sorted(spans, key=lambda span: (span.begin_ns, -span.end_ns)):
        row = next((row for row in rows[span.lane] if has_room(row, span)), None)
        if row is None:
            rows[span.lane].append(row := [])
            open_ends[id(row)] = []
        row.append(span)
        open_ends[id(row)].append(span.end_ns)
    return [(lane, row) for lane, lane_rows in rows.items() for row in lane_rows]
