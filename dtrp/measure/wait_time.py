"""The time that a stage has worked, and the time that it has waited, by what for."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager


class WorkingTime:
    """Seconds of one stage, by what they were spent on."""

    WAITS = ("forward", "gradient", "send", "replicas")

    def __init__(self) -> None:
        self._seconds = dict.fromkeys(("busy", *(f"wait_{name}" for name in self.WAITS)), 0.0)
        self._works = False
        self._began: float | None = None
        self._ended = 0.0

    def working(self) -> AbstractContextManager[None]:
        """Within it the stage works."""
        return self._spending("busy")

    def waiting(self, what: str) -> AbstractContextManager[None]:
        """Within it the stage waits: for the ``forward`` input, the ``gradient``, to ``send``, for its ``replicas``.

        Within work or outside of it; a wait within work is not work.
        """
        return self._spending(f"wait_{what}")

    @contextmanager
    def _spending(self, what: str) -> Iterator[None]:
        within_work = self._works
        self._works = within_work or what == "busy"
        start = time.perf_counter()
        try:
            yield
        finally:
            self._ended = time.perf_counter()
            self._seconds[what] += self._ended - start
            if within_work:
                self._seconds["busy"] -= self._ended - start
            self._works = within_work

    def begin(self) -> None:
        """The run begins, unless it has."""
        if self._began is None:
            self._began = time.perf_counter()

    def seconds(self) -> dict[str, float]:
        """The seconds of the run, as in `Pipeline.busy`."""
        elapsed = 0.0 if self._began is None else max(self._began, self._ended) - self._began
        rest = elapsed - sum(self._seconds.values())
        return {"elapsed": elapsed, **self._seconds, "outside": max(0.0, rest)}
