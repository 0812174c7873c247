"""Handlers for Ctrl-C, SIGTERM and SIGHUP; no other module installs any.

While ``dtrp train`` runs, a first signal is a request to stop: the run saves after a step that all ranks have made, and
ends. A launcher also sends SIGTERM to the living workers when one of them has died. That request is never fulfilled: a
save needs all ranks, and each of the living hears of the death in the step that it is in, and ends with that.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import FrameType
from typing import Any

_ECHO_S = 2.0  # what a terminal, a shell and a launcher send for one Ctrl-C arrives within this


class SignalHandlers:
    """Handlers for some signals in the main thread of this process; in another thread nothing is installed.

    A child that was forked with the handlers has no part in the run: there the signals do what they do by default.

    Args:
        numbers: the signals' numbers.
        handle: called with the number of the signal that came; may raise.
    """

    def __init__(self, numbers: Iterable[int], handle: Callable[[int], None]) -> None:
        self._handle, self._process = handle, os.getpid()
        self._before = _current_handlers(numbers)
        for number in self._before:
            signal.signal(number, self._receive)

    def restore(self) -> None:
        """Put back the handlers that were there before."""
        _put_back(self._before)
        self._before = {}

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() == self._process:
            self._handle(number)
        else:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


class SigtermListener(SignalHandlers):
    """A handler for SIGTERM, installed only where there is none, or another `SigtermListener`.

    Args:
        handle: called with the signal's number; may raise.
    """

    def __init__(self, handle: Callable[[int], None]) -> None:
        present = signal.getsignal(signal.SIGTERM)
        free = present is signal.SIG_DFL or isinstance(getattr(present, "__self__", None), SigtermListener)
        super().__init__([signal.SIGTERM] if free else [], handle)
        self._before = dict.fromkeys(self._before, signal.SIG_DFL)

    def restore(self) -> None:
        """Put back the default handler, unless another one has been installed since."""
        if signal.getsignal(signal.SIGTERM) == self._receive:
            super().restore()


@dataclass
class StopRequest:
    """Whether the process was asked to stop.

    Attributes:
        signal: the number of the first signal; None until one comes.
    """

    signal: int | None = None


def stop_signals() -> list[signal.Signals]:
    """Ctrl-C, SIGTERM and, unless this process ignores it, as under nohup, SIGHUP: its terminal is closed."""
    numbers = [number for number in signal.Signals if number.name in ("SIGINT", "SIGTERM", "SIGHUP")]
    return [n for n in numbers if n.name != "SIGHUP" or signal.getsignal(n) is not signal.SIG_IGN]


@contextmanager
def handled_signals(handle: Callable[[int], None]) -> Iterator[SignalHandlers]:
    """Within this context `stop_signals` call ``handle`` with their number, in the main thread of a process."""
    handlers = SignalHandlers(stop_signals(), handle)
    try:
        yield handlers
    finally:
        handlers.restore()


@contextmanager
def stop_on_signal(on_first: Callable[[], None]) -> Iterator[StopRequest]:
    """Within this context a first signal calls ``on_first``; a second one ends the process as it would have without.

    Only in the main thread of a process; elsewhere it does nothing.

    Args:
        on_first: called in the signal handler.
    """
    request, first_s = StopRequest(), 0.0

    def handle(number: int) -> None:
        nonlocal first_s
        if request.signal is None:
            request.signal, first_s = number, time.monotonic()
            on_first()
        elif time.monotonic() > first_s + _ECHO_S:
            handlers.restore()
            os.kill(os.getpid(), number)

    with handled_signals(handle) as handlers:
        yield request


@contextmanager
def handlers_restored(names: Iterable[str]) -> Iterator[None]:
    """After this context the signals of these names, of those that the system has, are handled as before it."""
    before = _current_handlers(number for number in signal.Signals if number.name in names)
    try:
        yield
    finally:
        _put_back(before)


def _current_handlers(numbers: Iterable[int]) -> dict[int, Any]:
    """The handlers by signal; none outside the main thread, which alone may change them."""
    in_main_thread = threading.current_thread() is threading.main_thread()
    return {number: signal.getsignal(number) for number in numbers} if in_main_thread else {}


def _put_back(handlers: dict[int, Any]) -> None:
    with suppress(ValueError):  # not the main thread
        for number, handler in handlers.items():
            signal.signal(number, handler or signal.SIG_DFL)  # None: a handler of native code, which Python cannot set
