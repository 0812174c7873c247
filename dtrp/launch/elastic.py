"""Elastic runs: workers come and go, and the run goes on with those that are there.

torchrun starts all workers of one launcher again when one has failed, but cannot do with fewer of them. So each worker
has a launcher of its own, and the launchers meet anew at every restart:

::

    this process   hosts the store where launchers meet, and watches them
      launcher       starts its worker again when any worker has failed, or one more has come
        worker
      launcher       is killed, with its worker: the others meet without it, if enough are left
        worker
      launcher       started by hand, with the address of the store: the others meet again, with it

The store is in this process, which trains nothing, so that no launcher is needed more than another. Ranks are assigned
anew at each restart. If this process is killed the store is gone, and launchers and workers end by themselves.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path

import torch.distributed as dist

from .signals import handled_signals
from .torchrun import FAILURE, SAVING_S, WorkersError, WorkersStopped, ends_of_logs, how_ended, worker_variables

_POLL_S = 0.2
_END_S = 15.0  # how long launchers may take to end after the run is finished
_RENDEZVOUS = {
    "is_host": 0,
    "join_timeout": 600,  # seconds until enough launchers must have come
    "last_call_timeout": 5,  # seconds to wait for more when there are enough
    "keep_alive_interval": 2, "keep_alive_max_attempt": 5,  # a launcher that is silent for 10 s is gone
}  # fmt: skip


class Launchers:
    """The launchers of a run on this machine, a worker each.

    Args:
        arguments: a worker's command line after ``python``.
        least: the number of workers that the run needs to go on.
        most: the largest number of workers.
        max_restarts: the number of failures that the run survives.
        folder: where the logs go.

    Attributes:
        processes: all launchers started so far, those that have ended too.
    """

    def __init__(self, arguments: Sequence[str], least: int, most: int, *, max_restarts: int, folder: Path) -> None:
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]
        self._options = (
            f"-m torch.distributed.run --nnodes {least}:{most} --nproc-per-node 1 --max-restarts {max_restarts} "
            f"--rdzv-backend c10d --rdzv-endpoint 127.0.0.1:{self._store.port} --rdzv-id {uuid.uuid4().hex} "
            f"--rdzv-conf {','.join(f'{name}={value}' for name, value in _RENDEZVOUS.items())} --local-addr 127.0.0.1"
        ).split()
        self._arguments, self._folder, self._max_restarts = list(arguments), folder, max_restarts
        self._num_failures, self._ended = 0, set[int]()
        # With the store that launchers share by default, those that stay would look for a first one that is gone.
        self._variables = {**worker_variables(), "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        self.processes: list[subprocess.Popen[bytes]] = []

    @property
    def join_command(self) -> str:
        """The shell command that adds a worker to the run."""
        variables = [f"{name}={value}" for name, value in self._variables.items()]
        return shlex.join(["env", *variables, sys.executable, *self._options, *self._arguments])

    def start(self) -> None:
        """Start one more, in a session of its own, so that Ctrl-C comes to this process alone."""
        number = len(self.processes)
        logs = ["--redirects", "2", "--log-dir", str(self._folder / str(number))]
        command = [sys.executable, *self._options, *logs, *self._arguments]
        environment = {**os.environ, **self._variables}
        with (self._folder / f"{number}.log").open("wb") as log:
            self.processes.append(subprocess.Popen(command, stderr=log, env=environment, start_new_session=True))

    @property
    def living(self) -> list[subprocess.Popen[bytes]]:
        return [process for process in self.processes if process.poll() is None]

    @property
    def any_succeeded(self) -> bool:
        """Whether a launcher has ended with exit code 0."""
        return any(process.returncode == 0 for process in self.processes)

    def send_signal(self, number: int) -> None:
        for process in self.living:
            process.send_signal(number)

    def wait(self, timeout_s: float) -> None:
        """Wait until all have ended; kill those that have not after ``timeout_s``."""
        until = time.monotonic() + timeout_s
        while self.living and time.monotonic() < until:
            time.sleep(_POLL_S)
        self.send_signal(signal.SIGKILL)
        for process in self.processes:
            process.wait()

    def new_failures(self) -> list[str]:
        """What has happened since the last call: workers that failed, and launchers that ended."""
        news = []
        logs = [(self._folder / f"{number}.log").read_text(errors="replace") for number in range(len(self.processes))]
        codes = [list(map(int, re.findall(rf"{re.escape(FAILURE)}(-?\d+)", log))) for log in logs]
        if self._num_failures < (restart := max(map(len, codes))) <= self._max_restarts:
            self._num_failures = restart
            # To blame is first who was killed, then who ended with an error.
            failed = {number: ended[-1] for number, ended in enumerate(codes) if len(ended) == restart}
            worker = min(failed, key=lambda number: (failed[number] == -signal.SIGTERM, failed[number] > 0))
            how = how_ended(f"worker {worker}", failed[worker], self.last_line("dtrp: "))
            news.append(f"{how.removeprefix('dtrp: ')}; restart {restart} of {self._max_restarts}")
        for number, process in enumerate(self.processes):
            if process.poll() and number not in self._ended:
                self._ended.add(number)
                how = how_ended(f"the launcher of worker {number}", process.returncode, "")
                news.append(
                    f"{how.removeprefix('dtrp: ')}; {len(self.living)} of {len(self.processes)} workers are left"
                )
        return news

    def last_line(self, beginning: str) -> str:
        """The last line with this beginning in the latest log that has one; otherwise the end of the latest log."""
        ends = [end for end in ends_of_logs(self._folder, "*/*/attempt_*/*/stderr.log") if end]
        lines = (line for end in ends for line in reversed(end.splitlines()) if line.startswith(beginning))
        return next(lines, ends[0] if ends else "")


def run_elastic(
    arguments: Sequence[str],
    least: int,
    most: int,
    *,
    max_restarts: int,
    is_finished: Callable[[], bool],
    say: Callable[[str], None],
) -> None:
    """Run ``python -m ...`` in up to ``most`` processes, and go on with as few as ``least`` of them.

    Args:
        arguments: what follows ``python`` on the command line.
        least: the number of workers that the run needs to go on.
        most: the number of workers at the start, and the largest.
        max_restarts: the number of failures that the run survives.
        is_finished: () -> whether the run is finished.
        say: shows a line to the user: how to add a worker, and who failed and why.

    Raises:
        WorkersError: too few workers are left, or they have failed too often.
        WorkersStopped: Ctrl-C, SIGTERM or SIGHUP; all workers were told, had the time to save, and have ended.
    """
    received: list[int] = []
    with tempfile.TemporaryDirectory(prefix="dtrp-") as folder, handled_signals(received.append):
        launchers = Launchers(arguments, least, most, max_restarts=max_restarts, folder=Path(folder))
        try:
            for _ in range(most):
                launchers.start()
            say(f"another worker joins with: {launchers.join_command}")
            while launchers.living and not received:
                if is_finished():
                    launchers.wait(_END_S)
                    return
                if len(launchers.living) < least and not launchers.any_succeeded:
                    break
                for line in launchers.new_failures():
                    say(line)
                time.sleep(_POLL_S)
            left = len(launchers.living)
            launchers.send_signal(received[0] if received else signal.SIGTERM)
            launchers.wait(SAVING_S)
        finally:
            launchers.send_signal(signal.SIGKILL)
        if is_finished():
            return
        if received:
            raise WorkersStopped(received[0], launchers.last_line("dtrp: stopped after"))
        if launchers.any_succeeded:
            return
        last_line = launchers.last_line("dtrp: ")
        if left:
            last_line = (
                f"dtrp: {left} of {most} workers are left, and the run needs {least}; the last word was: "
                f"{last_line.removeprefix('dtrp: ')}"
            )
        raise WorkersError(0, 1, last_line)
