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

_HANDLED = [
    number for number in signal.Signals if number.name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT")
]  # by the launcher
_LINES = 30  # of a failed worker's log


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


def run_workers(arguments: Sequence[str], num_processes: int, *, shown: int) -> None:
    """Run ``python -m ...`` in several processes, as torchrun would, and wait for them.

    Args:
        arguments: what follows ``python``.
        num_processes: how many.
        shown: the local rank whose standard output is this process's; the others' goes to logs that are thrown away.

    Raises:
        WorkersError: one failed; the others have been ended.
        KeyboardInterrupt: Ctrl-C, or SIGTERM; all have been ended.
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
            max_restarts=0,
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
        except SignalException:
            raise KeyboardInterrupt from None


@contextmanager
def _as_they_were() -> Iterator[None]:
    """What the launcher needs of this process while it runs: variables, quiet loggers, and its signal handlers."""
    variables = dict(os.environ)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # as torchrun does
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # all of them are on this machine
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


def _log(folder: Path, rank: int) -> str:
    files = sorted(folder.glob(f"*/attempt_*/{rank}/stderr.log"))
    return "\n".join(files[-1].read_text(errors="replace").splitlines()[-_LINES:]) if files else ""
