"""How long a worker has worked, how long it has waited, and for what."""

from __future__ import annotations

import time
from types import TracebackType


class WorkingTime:
    """Seconds of one stage, by what they went into; `working` and `waiting` are contexts, waits within work or outside it."""

    WAITS = ("forward", "gradient", "send", "replicas")

    def __init__(self) -> None:
        self._waited = dict.fromkeys(self.WAITS, 0.0)
        self._worked = 0.0
        self._began: float | None = None
        self._ended = 0.0
        self._contexts = {name: _Measured(self, name) for name in self.WAITS}
        self.working = _Measured(self, None)

    def waiting(self, what: str) -> _Measured:
        """Within it the stage waits: for the ``forward`` input, the ``gradient``, to ``send``, for its ``replicas``."""
        return self._contexts[what]

    def begin(self) -> None:
        """The run begins, unless it has."""
        if self._began is None:
            self._began = self._ended = time.perf_counter()

    def add(self, what: str | None, start: float, end: float) -> None:
        """What lasted from ``start`` to ``end``; waits within work are not work."""
        if what is None:
            self._worked += end - start
        else:
            self._waited[what] += end - start
            if self.working.entered:
                self._worked -= end - start
        self._ended = end

    def seconds(self) -> dict[str, float]:
        """As in `Pipeline.busy`."""
        elapsed = 0.0 if self._began is None else self._ended - self._began
        waits = {f"wait_{name}": waited for name, waited in self._waited.items()}
        rest = elapsed - self._worked - sum(waits.values())
        return {"elapsed": elapsed, "busy": self._worked, **waits, "outside": max(0.0, rest)}


class _Measured:
    """A context whose time is added up; it may be entered again, but not within itself."""

    __slots__ = ("_start", "_time", "_what", "entered")

    def __init__(self, working_time: WorkingTime, what: str | None) -> None:
        self._time, self._what = working_time, what
        self._start = 0.0
        self.entered = False

    def __enter__(self) -> None:
        self.entered = True
        self._start = time.perf_counter()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._time.add(self._what, self._start, time.perf_counter())
        self.entered = False
