"""Starts the worker processes of a run on this machine, through torchrun's Python interface."""

from __future__ import annotations

import itertools
import logging
import os
import signal
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from .process_end import LAUNCHER_VARIABLE
from .signals import handlers_restored, stop_signals

FAILURE = "failed (exitcode: "  # how torch's launcher begins the record of a worker's failure
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
        super().__init__(how_ended(f"rank {rank}", exit_code, log))


def how_ended(worker: str, exit_code: int, log: str) -> str:
    """The signal that killed a worker, or the last line of its log."""
    if exit_code < 0:
        return f"dtrp: {worker} was killed by signal {-exit_code} ({signal.Signals(-exit_code).name})"
    if log.strip():
        return log.strip().splitlines()[-1]
    return f"dtrp: {worker} ended with exit code {exit_code}, and nothing in its log"


class WorkersStopped(Exception):
    """All workers were told to stop by a signal to this process, and have ended.

    Attributes:
        signal: the signal's number.
        log: the last lines of the shown worker's standard error.
    """

    def __init__(self, signal: int, log: str) -> None:
        super().__init__(f"stopped by signal {signal}")
        self.signal, self.log = signal, log


def run_workers(
    arguments: Sequence[str],
    num_processes: int,
    *,
    shown: int,
    max_restarts: int = 0,
    say: Callable[[str], None],
) -> None:
    """Run ``python -m ...`` in several processes, as torchrun would, and wait for them.

    Args:
        arguments: what follows ``python`` on the command line.
        num_processes: the number of workers.
        shown: the local rank whose standard output is this process's; the others write to logs that are thrown away.
        max_restarts: how often all workers are started again after one has failed.
        say: shows a line to the user: before each restart, who failed and why.

    Raises:
        WorkersError: one failed; the others have been ended.
        WorkersStopped: Ctrl-C, SIGTERM or SIGHUP; all workers were told, had the time to save, and have ended.
    """
    with (
        tempfile.TemporaryDirectory(prefix="dtrp-") as folder,
        handlers_restored(("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT")),  # the launcher replaces them
        _launcher_settings(),
        _report_restarts(Path(folder), max_restarts, say),
    ):
        redirects = {rank: Std.ERR if rank == shown else Std.ALL for rank in range(num_processes)}
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=num_processes,
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="127.0.0.1:0",
            local_addr="127.0.0.1",  # else the name of this host, which it may not be able to resolve
            max_restarts=max_restarts,
            monitor_interval=0.1,
            logs_specs=DefaultLogsSpecs(log_dir=folder, redirects=redirects),
            **_handled_by_launcher(),
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


@contextmanager
def _report_restarts(folder: Path, max_restarts: int, say: Callable[[str], None]) -> Iterator[None]:
    """The context in which ``say`` is told of each failure after which all workers start again."""
    logger = logging.getLogger("torch.distributed.elastic.multiprocessing.api")
    restarts = itertools.count(1)

    def tell(record: logging.LogRecord) -> bool:
        if str(record.msg).startswith(FAILURE) and record.args and (restart := next(restarts)) <= max_restarts:
            exit_code, rank = tuple(record.args)[:2]
            how = how_ended(f"rank {rank}", int(str(exit_code)), _end_of_log(folder, int(str(rank))))
            say(f"{how.removeprefix('dtrp: ')}; restart {restart} of {max_restarts}")
        return False

    logger.addFilter(tell)
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.removeFilter(tell)


def _handled_by_launcher() -> dict[str, Any]:
    """The setting by which torch's launcher, where it has it, ignores the signals that this process ignores."""
    names = ",".join([*(number.name for number in stop_signals()), "SIGQUIT"])
    return {"signals_to_handle": names} if hasattr(LaunchConfig, "signals_to_handle") else {}


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
