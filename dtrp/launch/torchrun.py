"""Starts the processes of a run on this machine, through torchrun's own interface."""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
import threading
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from .ranks import LAUNCHER_VARIABLE

_HANDLED = [
    number for number in signal.Signals if number.name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT")
]  # by the launcher
_LINES = 30  # of a failed worker's log
SAVING_S = 120  # that workers have to save and end when they are told to


class WorkersError(RuntimeError):
    """A worker ended with an error.

    Attributes:
        rank, exit_code: whose, and which.
        log: the end of what it wrote to its standard error.
    """

    def __init__(self, rank: int, exit_code: int, log: str) -> None:
        self.rank, self.exit_code, self.log = rank, exit_code, log
        if exit_code < 0:
            super().__init__(f"dtrp: rank {rank} was killed by signal {-exit_code} ({signal.Signals(-exit_code).name})")
        elif log.strip():
            super().__init__(log.strip().splitlines()[-1])
        else:
            super().__init__(f"dtrp: rank {rank} ended with exit code {exit_code}, and nothing in its log")


class WorkersStopped(Exception):
    """All were told to end by a signal to this process, and have ended.

    Attributes:
        signal: the signal.
        log: the end of what the one that is shown wrote to its standard error.
    """

    def __init__(self, signal: int, log: str) -> None:
        super().__init__(f"stopped by signal {signal}")
        self.signal, self.log = signal, log


def run_workers(arguments: Sequence[str], num_processes: int, *, shown: int, max_restarts: int = 0) -> None:
    """Run ``python -m ...`` in several processes, as torchrun would, and wait for them.

    Args:
        arguments: what follows ``python``.
        num_processes: how many.
        shown: the local rank whose standard output is this process's; the others' goes to logs that are thrown away.
        max_restarts: how often all are started again after one has failed.

    Raises:
        WorkersError: one failed; the others have been ended.
        WorkersStopped: Ctrl-C, or SIGTERM; all were told, had the time to save, and have ended.
    """
    with _as_they_were(), tempfile.TemporaryDirectory(prefix="dtrp-") as folder:
        redirects = {rank: Std.ERR if rank == shown else Std.ALL for rank in range(num_processes)}
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=num_processes,
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            max_restarts=max_restarts,
            monitor_interval=0.1,
            logs_specs=DefaultLogsSpecs(log_dir=folder, redirects=redirects),
        )
        try:
            elastic_launch(config, sys.executable)(*arguments)
        except ChildFailedError as error:
            # First who was killed, then who ended with an error; SIGTERM is how the launcher ends the others.
            ended = {rank: failure.exitcode for rank, failure in error.failures.items()}
            rank = min(ended, key=lambda rank: (ended[rank] == -signal.SIGTERM, ended[rank] > 0, rank))
            raise WorkersError(rank, ended[rank], _log(Path(folder), rank)) from None
        except SignalException as error:
            raise WorkersStopped(error.sigval, _log(Path(folder), shown)) from None


@contextmanager
def _as_they_were() -> Iterator[None]:
    """What the launcher needs of this process while it runs: variables, quiet loggers, and its signal handlers."""
    variables = dict(os.environ)
    os.environ.update(variables_of_workers())
    names = [name for name in logging.root.manager.loggerDict if name.startswith("torch.distributed.elastic")]
    levels = {name: logging.getLogger(name).level for name in names}
    for name in names:
        logging.getLogger(name).setLevel(logging.CRITICAL)  # what they would say is said better in a WorkersError
    here = threading.current_thread() is threading.main_thread()
    handlers = {number: signal.getsignal(number) for number in _HANDLED} if here else {}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            if handler is not None:  # None: not installed from Python, and so not to be put back from it
                signal.signal(number, handler)
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        os.environ.clear()
        os.environ.update(variables)


def variables_of_workers() -> dict[str, str]:
    """What workers on this machine find in their environment, unless it is there already."""
    variables = {"OMP_NUM_THREADS": "1", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(SAVING_S)}
    if sys.platform == "linux":
        variables["GLOO_SOCKET_IFNAME"] = "lo"
    return {LAUNCHER_VARIABLE: str(os.getpid())} | {
        name: os.environ.get(name, value) for name, value in variables.items()
    }


def _log(folder: Path, rank: int) -> str:
    files = list(folder.glob(f"*/attempt_*/{rank}/stderr.log"))
    return end_of(max(files, key=lambda path: path.stat().st_mtime)) if files else ""


def end_of(log: Path) -> str:
    """The last lines of a log."""
    return "\n".join(log.read_text(errors="replace").splitlines()[-_LINES:])
