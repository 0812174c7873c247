"""The processes that read samples, such as images that are decoded, behind `torch.utils.data.DataLoader`."""

from __future__ import annotations

import atexit
import multiprocessing
import signal
import sys
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from types import FrameType
from typing import Any, Generic, Protocol, TypeVar, cast

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from ..source import DataError


class _Answer(Protocol):
    """What becomes of a request; ``error``: a message that ends the run, or None."""

    @property
    def error(self) -> str | None: ...


Request = TypeVar("Request")
Answer = TypeVar("Answer", bound=_Answer)

_GRACE_S = 30  # a worker that is told to end (SIGTERM) goes on so long, so that its run can save
_STOPPING = {number for number in signal.Signals if number.name in ("SIGINT", "SIGTERM", "SIGHUP")}
_CLOSING_S, _DYING_S = 1.0, 0.2


class _Requests(Sampler[Any]):
    """The requests of the current iteration; the loader takes them for indices."""

    requests: Iterable[Any] = ()

    def __iter__(self) -> Iterator[Any]:
        return iter(self.requests)


class _Decoder(Protocol[Request, Answer]):  # type: ignore[misc]
    def __getitem__(self, request: Request) -> Answer: ...


class Workers(Generic[Request, Answer]):
    """Decodes images, or reads other samples, in processes of its own or in this one, in the order of the requests.

    The processes start with `start`, once for all epochs: early, for a forked process shares what its parent has then.

    Args:
        decoder: decodes a request.
        num_workers: number of processes; 0: none, this one decodes.
        prefetch: number of requests that each of them works ahead.
    """

    def __init__(self, decoder: _Decoder[Request, Answer], num_workers: int, prefetch: int = 2) -> None:
        self._requests = _Requests()
        self._processes: list[BaseProcess] = []
        with _quiet():
            self._loader: DataLoader[Answer] | None = DataLoader(
                cast("Dataset[Answer]", decoder),
                batch_size=None,
                sampler=self._requests,
                num_workers=num_workers,
                collate_fn=_as_it_is,
                generator=torch.Generator(),  # not the global one, from which the run draws
                persistent_workers=num_workers > 0,
                prefetch_factor=prefetch if num_workers else None,
                multiprocessing_context="fork" if num_workers and sys.platform == "linux" else None,
                worker_init_fn=_prepare,
            )
        self._num_workers = num_workers
        self._at_exit: Callable[[], None] | None = None

    def start(self) -> None:
        """Start the processes, if there are any and they do not run."""
        if not self._num_workers or self._processes or self._loader is None:
            return
        before = set(multiprocessing.active_children())
        with _child_handler_kept(), _quiet(), _deferred(_STOPPING):  # until the workers have their handlers
            self._requests.requests = ()
            iter(self._loader)
        self._processes = [process for process in multiprocessing.active_children() if process not in before]
        weak = weakref.ref(self)

        def close() -> None:
            if (workers := weak()) is not None:
                workers.close()

        self._at_exit = close  # at the end of this process nobody would tell them otherwise
        atexit.register(close)

    def decode(self, requests: Iterable[Request]) -> Iterator[Answer]:
        """What becomes of requests, in their order. An iteration that was left early is given up by the next one.

        Raises:
            DataError: a file cannot be read, or a process has died.
        """
        assert self._loader is not None, "closed"
        self.start()
        self._requests.requests = requests
        try:
            for decoded in self._loader:
                if decoded.error is not None:
                    raise DataError(decoded.error)
                yield decoded
        except (RuntimeError, OSError, EOFError) as error:  # the last two where a dead one was to hand on a tensor
            raise self._explained(error) from error

    def _explained(self, error: Exception) -> Exception:
        """An error about a process that has died, in the user's words; any other error as it is."""
        for number, process in enumerate(self._processes):
            process.join(_DYING_S if not isinstance(error, RuntimeError) else 0)
            if (code := process.exitcode) is not None:
                how = f"ended with code {code}" if code >= 0 else f"was killed by {_signal_name(-code)}"
                advice = {
                    -signal.SIGBUS: "is there room in shared memory (/dev/shm)? make it larger, or pass --loader-workers 0",
                    -signal.SIGKILL: "is the memory short? pass fewer --loader-workers",
                }.get(code, "start the run again; with --loader-workers 0 the error shows itself")
                return DataError(f"loader worker {number} (process {process.pid}) {how}; {advice}")
        return error

    def close(self) -> None:
        """End the processes."""
        self._loader = None  # whose end tells them, unless an iteration is still on
        until = time.monotonic() + _CLOSING_S
        for process in self._processes:
            process.join(max(0.0, until - time.monotonic()))
            if process.is_alive():
                process.kill()
                process.join()
        if self._at_exit is not None:
            atexit.unregister(self._at_exit)


def _as_it_is(decoded: Any) -> Any:
    return decoded


def _prepare(number: int) -> None:
    """Of a worker, before its first request: it does not end by itself, but when its loader does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # what a terminal sends to all its processes
    if hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    def end_later(number: int, frame: FrameType | None) -> None:
        signal.alarm(_GRACE_S)

    signal.signal(signal.SIGTERM, end_later)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOPPING)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the loader's advice about more workers than cores, and Python's about forks, in which threads are not used."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "This DataLoader will create", UserWarning)
        warnings.filterwarnings("ignore", ".*use of fork.*", DeprecationWarning)
        yield


@contextmanager
def _deferred(signals: set[signal.Signals]) -> Iterator[None]:
    """Signals that come within this context arrive when it ends; processes that are started in it have them deferred."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _child_handler_kept() -> Iterator[None]:
    """Keep the loader's handler of SIGCHLD out: it would raise in the middle of whatever the main thread does."""
    number = getattr(signal, "SIGCHLD", None)
    if number is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(number)
    try:
        yield
    finally:
        signal.signal(number, before or signal.SIG_DFL)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
