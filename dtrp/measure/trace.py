"""When each F, B, U, send and receive ran: spans, as a Chrome trace (chrome://tracing, ui.perfetto.dev)."""

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
    """Something that ran: times in nanoseconds since the epoch, ``lane`` the row that shows it."""

    name: str
    kind: str
    lane: str
    begin_ns: int
    end_ns: int


_NO_SPAN = nullcontext()
_MOST_SPANS = 1_000_000


class Tracer:
    """Collects the spans of one process, if ``on``; of a long run the last million."""

    def __init__(self, on: bool) -> None:
        self.on = on
        self.spans: deque[Span] = deque(maxlen=_MOST_SPANS)
        self._lock = threading.Lock()

    def action(self, action: Action, stage: int) -> AbstractContextManager[None]:
        """A span around what a stage does within it, and a range of `torch.profiler`."""
        return self._span(f"{action.kind}{action.index}", action.kind, stage) if self.on else _NO_SPAN

    def wait(self, direction: str, microbatch: int, stage: int) -> AbstractContextManager[None]:
        """The same around a stage's wait for a message, forward or backward."""
        return self._span(f"wait {direction} {microbatch}", "wait", stage) if self.on else _NO_SPAN

    def add(self, name: str, kind: str, lane: str, begin_ns: int) -> None:
        """A span that ends now."""
        if self.on:
            with self._lock:
                self.spans.append(Span(name, kind, lane, begin_ns, time.time_ns()))

    def range(self, name: str) -> AbstractContextManager[Any]:
        """A range of `torch.profiler` alone, for what `add` records.

        In a helper thread: a profiler sees it if it looks at all threads.
        """
        return torch.profiler.record_function(name) if self.on else _NO_SPAN

    @contextmanager
    def _span(self, name: str, kind: str, stage: int) -> Iterator[None]:
        begin_ns = time.time_ns()
        with torch.profiler.record_function(name):
            yield
        self.add(name, kind, f"stage {stage}", begin_ns)


def write_chrome_trace(path: str | os.PathLike[str], processes: Sequence[tuple[str, Sequence[Span]]]) -> None:
    """Write the spans of some processes, each with its name, whole or not at all.

    A process becomes a ``pid``, each of its lanes a ``tid``, or several: viewers show spans of one ``tid`` right only where they
    are nested or apart. Times are microseconds since the first span.
    """
    begin = min((span.begin_ns for _, spans in processes for span in spans), default=0)
    events: list[dict[str, Any]] = []
    for pid, (name, spans) in enumerate(processes):
        events.append({"name": "process_name", "ph": "M", "pid": pid, "args": {"name": name}})
        for tid, (lane, own) in enumerate(_rows(spans)):
            events.append({"name": "thread_name", "ph": "M", "pid": pid, "tid": tid, "args": {"name": lane}})
            events += [
                {
                    "name": span.name,
                    "cat": span.kind,
                    "ph": "X",
                    "pid": pid,
                    "tid": tid,
                    "ts": (span.begin_ns - begin) / 1000,
                    "dur": (span.end_ns - span.begin_ns) / 1000,
                }
                for span in own
            ]
    with whole_file(path) as file:
        file.write(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}).encode())


def _rows(spans: Sequence[Span]) -> list[tuple[str, list[Span]]]:
    """The spans of each lane, in as many rows as it takes that those of a row are nested or apart."""
    rows: dict[str, list[_Row]] = {span.lane: [] for span in spans}
    for span in sorted(spans, key=lambda span: (span.begin_ns, -span.end_ns)):
        row = next((row for row in rows[span.lane] if row.has_place(span)), None)
        if row is None:
            row = _Row([], [])
            rows[span.lane].append(row)
        row.spans.append(span)
        row.ends.append(span.end_ns)
    return [(lane, row.spans) for lane, own in rows.items() for row in own]


class _Row(NamedTuple):
    """Spans in the order of their begin, and the ends of those that are open, the innermost last."""

    spans: list[Span]
    ends: list[int]

    def has_place(self, span: Span) -> bool:
        while self.ends and self.ends[-1] <= span.begin_ns:
            self.ends.pop()
        return not self.ends or span.end_ns <= self.ends[-1]
