"""Starts the worker processes of a run on this machine, through torchrun's Python interface."""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from .process_end import LAUNCHER_VARIABLE
from .signals import handlers_restored

_LAST_LINES = 30  # of a failed worker's log that are kept
SAVING_S = 120  # how long workers may take to save and end when they are told to stop


class WorkersError(RuntimeError):
    """A worker ended with an error.

    Attributes:
        rank: the worker's rank.
        exit_code: its exit code; the negative number of the signal that killed it.
        log: the last lines of its standard error.
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
    """All workers were told to stop by a signal to this process, and have ended.

    Attributes:
        signal: the signal's number.
        log: the last lines of the shown worker's standard error.
    """

    def __init__(self, signal: int, log: str) -> None:
        super().__init__(f"stopped by signal {signal}")
        self.signal, self.log = signal, log


def run_workers(arguments: Sequence[str], num_processes: int, *, shown: int, max_restarts: int = 0) -> None:
    """Run ``python -m ...`` in several processes, as torchrun would, and wait for them.

    Args:
        arguments: what follows ``python`` on the command line.
        num_processes: the number of workers.
        shown: the local rank whose standard output is this process's; the others write to logs that are thrown away.
        max_restarts: how often all workers are started again after one has failed.

    Raises:
        WorkersError: one failed; the others have been ended.
        WorkersStopped: Ctrl-C or SIGTERM; all workers were told, had the time to save, and have ended.
    """
    with (
        handlers_restored(("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT")),  # the launcher replaces them
        _launcher_settings(),
        tempfile.TemporaryDirectory(prefix="dtrp-") as folder,
    ):
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
            # To blame is first who was killed, then who ended with an error: the launcher ends the others by SIGTERM.
            codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
            rank = min(codes, key=lambda rank: (codes[rank] == -signal.SIGTERM, codes[rank] > 0, rank))
            raise WorkersError(rank, codes[rank], _end_of_log(Path(folder), rank)) from None
        except SignalException as error:
            raise WorkersStopped(error.sigval, _end_of_log(Path(folder), shown)) from None


@contextmanager
def _launcher_settings() -> Iterator[None]:
    """What torch's launcher needs of this process while it runs: environment variables and quiet loggers."""
    variables = dict(os.environ)
    os.environ.update(worker_variables())
    names = [name for name in logging.root.manager.loggerDict if name.startswith("torch.distributed.elastic")]
    levels = {name: logging.getLogger(name).level for name in names}
    for name in names:
        logging.getLogger(name).setLevel(logging.CRITICAL)  # a WorkersError says it better
    try:
        yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        os.environ.clear()
        os.environ.update(variables)


def worker_variables() -> dict[str, str]:
    """Environment variables of workers on this machine; those that are set already stay as they are."""
    defaults = {"OMP_NUM_THREADS": "1", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(SAVING_S)}
    if sys.platform == "linux":
        defaults["GLOO_SOCKET_IFNAME"] = "lo"
    return {name: os.environ.get(name, value) for name, value in defaults.items()} | {
        LAUNCHER_VARIABLE: str(os.getpid())
    }


def _end_of_log(folder: Path, rank: int) -> str:
    """The last lines that a worker's latest attempt wrote to standard error."""
    return next(iter(ends_of_logs(folder, f"*/attempt_*/{rank}/stderr.log")), "")


def ends_of_logs(folder: Path, pattern: str) -> list[str]:
    """The last lines of the logs whose path fits ``pattern``, the latest first."""
    logs = sorted(folder.glob(pattern), key=lambda path: path.stat().st_mtime, reverse=True)
    return ["\n".join(log.read_text(errors="replace").splitlines()[-_LAST_LINES:]) for log in logs]
