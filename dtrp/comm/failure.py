"""What ends a run of several ranks, and how the threads of a rank learn of it.

Only the main thread of a rank waits for other ranks, and only in `Monitor.wait`. The helper threads of
`dtrp.comm.transport` tell the monitor what has arrived and what has failed. The wait is Python's, so that Ctrl-C and
SIGTERM are heard in it. It ends with what is waited for, with a failure on any rank, or after ``timeout_s``.
"""

from __future__ import annotations

import queue
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from ..errors import StageError, WaitTimeoutError, WorkerError, message_of
from ..launch.signals import SigtermListener

T = TypeVar("T")
GRACE_S = 2.0  # for the watch to say who broke a connection, and for threads to end after a failure
_POLL_S = 0.5  # between two looks at what is waited for, if a notification is missed
_LAST_WORDS_S = 5.0  # a process that is about to end, and to say why, ignores SIGTERM for so long
_NEWS_S = 1.0  # from the death of a process until the watch says so, at most


@dataclass(frozen=True)
class Failure:
    """Why a run ends.

    Args:
        kind: ``gone`` (a process that ended without a word), ``timeout``, ``stage`` (a `StageError`), or ``ended``
            (anything else).
        rank: the rank that failed.
        text: the reason, beginning with that rank; for ``stage`` the message of the `StageError`.
        place: (stage, microbatch, minibatch) of the `StageError`.
        trace: the traceback on that rank.
        nonfinite: the message of the `FloatingPointError` that caused the StageError, if one did.
    """

    kind: Literal["gone", "timeout", "stage", "ended"]
    rank: int
    text: str
    place: tuple[int, int | None, int] | None = None
    trace: str = ""
    nonfinite: str = ""

    @classmethod
    def from_error(cls, rank: int, error: BaseException) -> Failure:
        """The failure that the other ranks are told of when ``rank`` raises ``error``."""
        text, trace = message_of(error), _traceback_of(error)
        if isinstance(error, StageError):
            nonfinite = message_of(error.__cause__) if isinstance(error.__cause__, FloatingPointError) else ""
            return cls("stage", rank, text, (error.stage, error.microbatch, error.minibatch), trace, nonfinite)
        if isinstance(error, WorkerError):
            return cls("timeout" if isinstance(error, TimeoutError) else "ended", rank, text)
        if isinstance(error, KeyboardInterrupt):
            return cls("ended", rank, f"rank {rank} was interrupted")
        if isinstance(error, SystemExit):
            # A process may report an error and then exit, as those of torch.multiprocessing.spawn do.
            handled = error.__context__
            why = f", after {type(handled).__name__}: {message_of(handled)}" if handled else ""
            code = text if error.code else 0
            return cls("ended", rank, f"rank {rank} has ended (exit code {code}){why}", None, trace if why else "")
        return cls("ended", rank, f"rank {rank} has ended with {type(error).__name__}: {text}", None, trace)

    def exception(self, doing: str) -> Exception:
        """What another rank raises, which hears of the failure while it is ``doing`` something."""
        if self.kind == "stage":
            assert self.place is not None
            error: Exception = StageError.told(self.text, *self.place)
        else:
            kind = WaitTimeoutError if self.kind == "timeout" else WorkerError
            error = kind(f"{self.text}; this process was {doing}")
        cause: Exception | None = WorkerError(f"on rank {self.rank}:\n{self.trace}") if self.trace else None
        if self.nonfinite:
            nonfinite = FloatingPointError(self.nonfinite)
            nonfinite.__cause__, cause = cause, nonfinite
        if cause is not None:
            error.__cause__ = cause
        return error


def _traceback_of(error: BaseException) -> str:
    try:
        return "".join(traceback.format_exception(error))
    except Exception:  # the error's class may be the caller's; the other ranks must hear of the failure all the same
        return ""


class Monitor:
    """Where the main thread of a rank waits, and its other threads report to.

    Args:
        timeout_s: the longest wait.
        on_failure: called once, by the thread that reports the first failure; must not block.

    Attributes:
        doing: what the main thread is in, for messages.
        awaited: the ranks that the main thread waits for.
        explain: what keeps the awaited ranks, for messages.
        failure: why the run ends; None while it does not.
        raised: whether the main thread has raised that.
    """

    def __init__(self, timeout_s: float, on_failure: Callable[[Failure], None]) -> None:
        self.timeout_s = timeout_s
        self.doing = "starting"
        self.awaited: Sequence[int] = ()
        self.explain: Callable[[Sequence[int]], str] = lambda awaited: ""
        self.failure: Failure | None = None
        self.raised = False
        self._on_failure = on_failure
        self._failing = threading.RLock()  # reentrant: a signal handler may fail in the middle of `fail`
        self._bell: queue.SimpleQueue[None] = queue.SimpleQueue()  # written in C: a wait costs a few microseconds

    def fail(self, failure: Failure) -> None:
        """The run ends because of ``failure``, unless it already does because of another."""
        with self._failing:
            if self.failure is not None:
                return
            self.failure = failure  # before anything that may wait: a signal handler polls it
        self._on_failure(failure)
        self.notify()

    def notify(self) -> None:
        """Wake the main thread: there is something new."""
        if self._bell.empty():  # one notification that is not heard yet is enough
            self._bell.put(None)

    def failed_within(self, timeout_s: float) -> bool:
        """Whether the run fails within so many seconds; by polling, in helper threads and signal handlers."""
        until = time.monotonic() + timeout_s
        while self.failure is None and time.monotonic() < until:
            time.sleep(0.02)
        return self.failure is not None

    def check(self) -> None:
        """Raise the failure, if there is one."""
        if self.failure is not None:
            self.raised = True
            raise self.failure.exception(self.doing)

    def wait(self, take: Callable[[], T | None], describe: Callable[[], str], awaited: Sequence[int] = ()) -> T:
        """Wait until ``take`` returns something, and return that.

        Args:
            take: looks for what is waited for; None: it is not there. Must not block.
            describe: "rank 1 ... for rank 0: ...", with ``{}`` where the seconds belong.
            awaited: the ranks to wait for, where they can be asked what keeps them.

        Raises:
            WaitTimeoutError: after ``timeout_s``.
            StageError, WorkerError: the run has failed.
        """
        deadline = time.monotonic() + self.timeout_s
        while (value := take()) is None:
            self.check()
            self.awaited = awaited
            left = deadline - time.monotonic()
            if left <= 0:
                text = describe().format(f"{self.timeout_s:g} s") + self.explain(awaited)
                self.check()  # another rank may have failed meanwhile
                raise WaitTimeoutError(text)
            with suppress(queue.Empty):
                self._bell.get(timeout=min(left, _POLL_S))
        self.awaited = ()
        return value

    def wait_until(
        self, condition: Callable[[], bool], describe: Callable[[], str], awaited: Sequence[int] = ()
    ) -> None:
        """`wait` for a condition to be true."""
        self.wait(lambda: condition() or None, describe, awaited)


class HelperThread(threading.Thread):
    """A thread that runs one call at a time, while the main thread waits for it at the monitor."""

    def __init__(self, monitor: Monitor) -> None:
        super().__init__(name="dtrp helper", daemon=True)
        self._monitor = monitor
        self._jobs: queue.SimpleQueue[Callable[[], Any] | None] = queue.SimpleQueue()
        self._results: deque[tuple[Any, Exception | None]] = deque()
        self.start()

    def call(
        self,
        job: Callable[[], T],
        describe: Callable[[], str],
        poll: Callable[[], None] = lambda: None,
        awaited: Sequence[int] = (),
    ) -> T:
        """What ``job`` returns or raises.

        Args:
            job: runs in the helper thread.
            describe: as in `Monitor.wait`.
            poll: called again and again by the main thread meanwhile; may raise.
            awaited: as in `Monitor.wait`.
        """

        def take() -> tuple[T, Exception | None] | None:
            if self._results:
                return self._results.popleft()
            poll()
            return None

        self._jobs.put(job)
        result, error = self._monitor.wait(take, describe, awaited)
        if error is not None:
            # The end of another process looks like an error of the backend: what the watch says of it comes first.
            if isinstance(error, RuntimeError) and self._monitor.failed_within(GRACE_S):
                self._monitor.check()
            raise error
        return result

    def finish(self) -> None:
        """End the thread after the call that it is in."""
        self._jobs.put(None)

    def run(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                self._results.append((job(), None))
            except Exception as error:
                self._results.append((None, error))
            self._monitor.notify()


class SigtermHandler(SigtermListener):
    """Raises in the main thread at SIGTERM, with the name of the rank that failed if one did.

    torchrun ends the other workers by SIGTERM when one has died, and the signal is often faster than the news of the
    death.

    Args:
        monitor: learns of failures.
        rank: of this process.
        missing: while no news can come yet, a text that says for which ranks this one waits; otherwise an empty one.
    """

    def __init__(self, monitor: Monitor, rank: int, missing: Callable[[], str] = lambda: "") -> None:
        self._monitor, self._rank, self._missing = monitor, rank, missing
        self._ignored_until: float | None = None
        super().__init__(self._raise)

    def _raise(self, number: int) -> None:
        now, monitor = time.monotonic(), self._monitor
        if monitor.raised:  # the process is about to end and to say why; but it cannot refuse for ever
            if self._ignored_until is None:
                self._ignored_until = now + _LAST_WORDS_S
            if now < self._ignored_until:
                return
            raise SystemExit(128 + number)
        if monitor.failure is None and (text := self._missing()):
            raise WorkerError(text)
        monitor.failed_within(_NEWS_S)
        monitor.fail(Failure("ended", self._rank, f"rank {self._rank} was told to end (SIGTERM)"))
        if monitor.failure is not None and monitor.failure.rank != self._rank:
            monitor.check()
        monitor.raised = True
        raise SystemExit(128 + number)
