"""What ends a run of several ranks, said once and heard on every rank.

A `Board` is where a rank's threads meet: the helper threads of `dtrp.comm.transport` put up what arrives and what
fails, and the main thread waits there, and only there. The wait is Python's own, so that Ctrl-C and
SIGTERM are heard in it; it ends with what was waited for, with a failure on any rank, or after ``timeout_s``.
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
_SLICE_S = 0.5  # the longest that a notice which slipped through goes unseen
GRACE_S = 2.0  # for the watch to say whose end broke a connection, and for threads to finish after a failure
_LAST_WORDS_S = 5.0  # from a SIGTERM that meets a process that is ending anyway to one that is obeyed
_NEWS_S = 1.0  # from a process's death to the watch's word of it, at most


@dataclass(frozen=True)
class Failure:
    """Why a run ends.

    Args:
        kind: ``gone`` (a process that ended without a word), ``timeout``, ``stage`` (a `StageError`), ``ended``
            (anything else).
        rank: who is to blame.
        text: the reason, beginning with the rank it is about; a `StageError`'s message for ``stage``.
        place: a `StageError`'s (stage, microbatch, minibatch).
        trace: the traceback on that rank.
        nonfinite: what the `FloatingPointError` says that is a StageError's cause, if one is.
    """

    kind: Literal["gone", "timeout", "stage", "ended"]
    rank: int
    text: str
    place: tuple[int, int | None, int] | None = None
    trace: str = ""
    nonfinite: str = ""

    @classmethod
    def of(cls, rank: int, error: BaseException) -> Failure:
        """What ``error``, raised on ``rank``, is for the other ranks."""
        text, trace = message_of(error), _trace_of(error)
        if isinstance(error, StageError):
            nonfinite = message_of(error.__cause__) if isinstance(error.__cause__, FloatingPointError) else ""
            return cls("stage", rank, text, (error.stage, error.microbatch, error.minibatch), trace, nonfinite)
        if isinstance(error, WorkerError):
            return cls("timeout" if isinstance(error, TimeoutError) else "ended", rank, text)
        if isinstance(error, KeyboardInterrupt):
            return cls("ended", rank, f"rank {rank} was interrupted")
        if isinstance(error, SystemExit):
            # Who reports an error and exits, as torch.multiprocessing.spawn does in its processes, has one in hand.
            held = error.__context__
            why = f", after {type(held).__name__}: {message_of(held)}" if held else ""
            code = text if error.code else 0
            return cls("ended", rank, f"rank {rank} has ended (exit code {code}){why}", None, trace if why else "")
        return cls("ended", rank, f"rank {rank} has ended with {type(error).__name__}: {text}", None, trace)

    def error(self, doing: str) -> Exception:
        """The exception for a rank that hears of it while it was ``doing`` something."""
        if self.kind == "stage":
            assert self.place is not None
            error: Exception = StageError.told(self.text, *self.place)
        elif self.kind == "timeout":
            error = WaitTimeoutError(f"{self.text}; this process was {doing}")
        else:
            error = WorkerError(f"{self.text}; this process was {doing}")
        there = WorkerError(f"on rank {self.rank}:\n{self.trace}") if self.trace else None
        if self.nonfinite:
            error.__cause__ = FloatingPointError(self.nonfinite)
            error.__cause__.__cause__ = there
        elif there is not None:
            error.__cause__ = there
        return error


def _trace_of(error: BaseException) -> str:
    try:
        return "".join(traceback.format_exception(error))
    except Exception:  # an error's class can be anything, and the other ranks must hear all the same
        return ""


class Board:
    """Where the threads of one rank meet.

    Args:
        timeout_s: the longest wait.
        on_failure: called once, by the thread that brings the first failure; must not block.
    """

    def __init__(self, timeout_s: float, on_failure: Callable[[Failure], None]) -> None:
        self.timeout_s = timeout_s
        self.doing = "starting"  # for messages
        self.awaited: Sequence[int] = ()  # the ranks that the main thread waits for
        self.explain: Callable[[Sequence[int]], str] = lambda awaited: ""  # what keeps them, for messages
        self.failure: Failure | None = None
        self.raised = False  # whether the main thread knows
        self._on_failure = on_failure
        self._first = threading.RLock()  # a signal handler may come in between
        self._bell: queue.SimpleQueue[None] = queue.SimpleQueue()  # written in C: a wait costs a few microseconds

    def fail(self, failure: Failure) -> None:
        """The run ends because of ``failure``, unless it already does because of another."""
        with self._first:
            if self.failure is not None:
                return
            self.failure = failure  # before anything that may wait: a signal handler polls it
        self._on_failure(failure)
        self.notify()

    def notify(self) -> None:
        """Something has been put up."""
        if self._bell.empty():  # a ring that is not heard yet is as good as another
            self._bell.put(None)

    def check(self) -> None:
        """Raise what has failed."""
        if self.failure is not None:
            self.raised = True
            raise self.failure.error(self.doing)

    def wait(self, take: Callable[[], T | None], describe: Callable[[], str], awaited: Sequence[int] = ()) -> T:
        """Wait until ``take`` returns something.

        Args:
            take: looks for what is waited for; must not block.
            describe: who waits for what, "rank 1 ... for rank 0: ...", with ``{}`` where the seconds belong.
            awaited: those ranks, where they can be asked what keeps them.

        Raises:
            WaitTimeoutError: after ``timeout_s``.
            StageError, WorkerError: the run has failed.
        """
        deadline = time.monotonic() + self.timeout_s
        while True:
            value = take()
            if value is not None:
                self.awaited = ()
                return value
            self.check()
            self.awaited = awaited
            left = deadline - time.monotonic()
            if left <= 0:
                text = describe().format(f"{self.timeout_s:g} s") + self.explain(awaited)
                self.check()  # another may have said so first
                raise WaitTimeoutError(text)
            with suppress(queue.Empty):
                self._bell.get(timeout=min(left, _SLICE_S))


class Helper:
    """Runs one thing at a time beside the main thread, which waits for it on the board."""

    def __init__(self, board: Board) -> None:
        self._board = board
        self._jobs: queue.SimpleQueue[Callable[[], Any] | None] = queue.SimpleQueue()
        self._results: deque[tuple[Any, BaseException | None]] = deque()
        self._thread = threading.Thread(target=self._work, name="dtrp helper", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def run(
        self,
        job: Callable[[], Any],
        describe: Callable[[], str],
        meanwhile: Callable[[], None] = lambda: None,
        awaited: Sequence[int] = (),
    ) -> Any:
        """What ``job`` returns or raises; ``meanwhile`` is called again and again, and may raise too."""

        def take() -> tuple[Any, BaseException | None] | None:
            if self._results:
                return self._results.popleft()
            meanwhile()
            return None

        self._jobs.put(job)
        result, error = self._board.wait(take, describe, awaited)
        if error is not None:
            # A peer's end looks like an error of the backend: what the watch says of it comes first.
            until = time.monotonic() + GRACE_S
            while isinstance(error, RuntimeError) and time.monotonic() < until:
                self._board.check()
                time.sleep(0.02)
            raise error
        return result

    def finish(self) -> None:
        self._jobs.put(None)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                self._results.append((job(), None))
            except Exception as error:
                self._results.append((None, error))
            self._board.notify()


class SigtermHandler(SigtermListener):
    """SIGTERM as an exception in the main thread, one that names who failed.

    torchrun ends the other workers so when one has died, and the signal is often faster than the news.

    Args:
        board: where the news comes.
        rank: of this process.
        missed: while no news can come yet, a text that says for whom this rank waits; else an empty one.
    """

    def __init__(self, board: Board, rank: int, missed: Callable[[], str] = lambda: "") -> None:
        self._board, self._rank, self._missed = board, rank, missed
        self._ignored_until: float | None = None
        super().__init__(self._obey)

    def _obey(self, number: int) -> None:
        now = time.monotonic()
        if self._board.raised:  # the process is about to end and to say why; but it cannot refuse for ever
            if self._ignored_until is None:
                self._ignored_until = now + _LAST_WORDS_S
            if now < self._ignored_until:
                return
            raise SystemExit(128 + number)
        if self._board.failure is None and (text := self._missed()):
            raise WorkerError(text)
        while self._board.failure is None and time.monotonic() < now + _NEWS_S:
            time.sleep(0.01)
        self._board.fail(Failure("ended", self._rank, f"rank {self._rank} was told to end (SIGTERM)"))
        own = self._board.failure is not None and self._board.failure.rank == self._rank
        if not own:
            self._board.check()
        self._board.raised = True
        raise SystemExit(128 + number)
