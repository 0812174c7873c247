"""Ctrl-C and SIGTERM as a wish to stop, which a run fulfils when it can: after a step that all ranks have made, with a save.

A launcher sends SIGTERM to the living when a rank has died, too. That wish is never fulfilled: a save needs all ranks, and
each of the living hears of the death in the step that it is in, and ends with that.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Any

_ECHO_S = 2.0  # what a terminal, a shell and a launcher send for one Ctrl-C arrives within this


class StopSignals:
    """Within this context a first signal calls ``on_first``, and a second one ends the process as it would have without.

    Only in the main thread of a process; elsewhere it does nothing.

    Args:
        on_first: called in the signal handler.

    Attributes:
        asked: the signal, if one has come.
    """

    def __init__(self, on_first: Callable[[], None]) -> None:
        self.asked: int | None = None
        self._on_first = on_first
        self._since = 0.0
        self._process = os.getpid()
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
            for number in self._before:
                signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            if handler is not None:  # None: not installed from Python, and so not to be put back from it
                signal.signal(number, handler)
        self._before = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._process != os.getpid():  # a child that was forked with the handler, and has no part in the run
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        elif self.asked is None:
            self.asked, self._since = number, time.monotonic()
            self._on_first()
        elif time.monotonic() > self._since + _ECHO_S:
            self._restore()
            os.kill(os.getpid(), number)


class SigtermListener:
    """Hears SIGTERM in the main thread of this process, where nobody else listens; `restore` puts things back.

    Args:
        hear: called with the signal's number; may raise.
    """

    def __init__(self, hear: Callable[[int], None]) -> None:
        self._hear, self._process = hear, os.getpid()
        before = signal.getsignal(signal.SIGTERM)
        self._installed = before is signal.SIG_DFL or isinstance(getattr(before, "__self__", None), SigtermListener)
        try:
            if self._installed:
                signal.signal(signal.SIGTERM, self._handle)
        except ValueError:  # not the main thread
            self._installed = False

    def restore(self) -> None:
        """Listen no more, unless somebody else does by now."""
        if self._installed and signal.getsignal(signal.SIGTERM) == self._handle:
            with suppress(ValueError):
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
        self._installed = False

    def _handle(self, number: int, frame: Any) -> None:
        if os.getpid() != self._process:  # a child that was forked with the handler, and has no part in the run
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        else:
            self._hear(number)
