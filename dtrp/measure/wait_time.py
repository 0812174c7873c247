"""How long a worker has worked, how long it has waited, and for what."""

from __future__ import annotations

import time
from types import TracebackType


class WorkingTime:
    """Seconds of one stage, by what they went into.

    Attributes:
        working: the context in which the stage works.
    """

    WAITS = ("forward", "gradient", "send", "replicas")

    def __init__(self) -> None:
        self.working = _Measured(None)
        self._waits = {name: _Measured(self.working) for name in self.WAITS}
        self._began: float | None = None

    def waiting(self, what: str) -> _Measured:
        """Within it the stage waits: for the ``forward`` input, the ``gradient``, to ``send``, for its ``replicas``.

        Within work or outside it; a wait within work is not work.
        """
        return self._waits[what]

    def begin(self) -> None:
        """The run begins, unless it has."""
        if self._began is None:
            self._began = time.perf_counter()

    def seconds(self) -> dict[str, float]:
        """As in `Pipeline.busy`."""
        contexts = [self.working, *self._waits.values()]
        elapsed = 0.0 if self._began is None else max(self._began, *(each.ended for each in contexts)) - self._began
        waits = {f"wait_{name}": wait.seconds for name, wait in self._waits.items()}
        rest = elapsed - self.working.seconds - sum(waits.values())
        return {"elapsed": elapsed, "busy": self.working.seconds, **waits, "outside": max(0.0, rest)}


class _Measured:
    """A context whose time is added up; it may be entered again, but not within itself.

    Args:
        around: the context whose time this one's is not, where it is within that.
    """

    __slots__ = ("_around", "_start", "ended", "entered", "seconds")

    def __init__(self, around: _Measured | None) -> None:
        self._around = around
        self._start = self.ended = 0.0
        self.seconds = 0.0
        self.entered = False

    def __enter__(self) -> None:
        self.entered = True
        self._start = time.perf_counter()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.ended = time.perf_counter()
        spent = self.ended - self._start
        self.seconds += spent
        if self._around is not None and self._around.entered:
            self._around.seconds -= spent
        self.entered = False
