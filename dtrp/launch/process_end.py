"""How a process ends that cannot end by itself, or whose launcher is gone."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing import parent_process

LAUNCHER_VARIABLE = "DTRP_LAUNCHER"  # the process that has started the launcher, or is it
_GRACE_S = 5.0  # for a process whose launcher is gone to end by itself


def end_at_once() -> None:
    """End this process with exit code 1, without the exit handlers that are left.

    For a process with a thread in the backend, which nothing can stop: if the thread comes back while the interpreter
    shuts down, it aborts the process. And for one whose main thread does not hear that it is to end.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


def end_with_failure() -> None:
    """Give exit code 1 to a process that is ending as if it had succeeded; its exit handlers still run."""
    if parent_process() is not None:  # a child of multiprocessing: its exit code is decided, its exit handlers have run
        end_at_once()
    sys.__dict__["_dtrp_failed"] = _EndsWithFailure()  # deleted when the interpreter clears `sys`, the last module


class _EndsWithFailure:
    def __del__(self, end: Callable[[int], None] = os._exit) -> None:
        end(1)


def launcher_pid() -> int:
    """The launcher of this process: its parent, also where that has died since and process 1 is the parent."""
    parent = os.getppid()
    return int(os.environ.get(LAUNCHER_VARIABLE, parent)) if parent == 1 else parent


def watch_launcher(on_gone: Callable[[], None], is_over: Callable[[], bool]) -> None:
    """Watch, in a thread, the torchrun agent that started this process. When the agent is gone, end the process.

    ``on_gone`` is called first. Then come signals that the main thread hears, and, if they do not help, `end_at_once`.

    Args:
        on_gone: must not block.
        is_over: () -> whether there is nothing to watch for any more.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    launcher = launcher_pid()

    def watch() -> None:
        while os.getppid() == launcher:
            if is_over():
                return
            time.sleep(0.5)
        on_gone()
        for _ in range(2):  # a process that is about to end by itself ignores the first
            time.sleep(_GRACE_S)
            has_handler = callable(signal.getsignal(signal.SIGTERM))
            os.kill(os.getpid(), signal.SIGTERM if has_handler else signal.SIGINT)
        time.sleep(_GRACE_S)
        end_at_once()

    threading.Thread(target=watch, name="dtrp launcher", daemon=True).start()
