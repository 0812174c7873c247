"""A run whose number of workers changes: they come and go, and it goes on with those there are.

torchrun starts all workers of one launcher again when one has failed, but cannot do with fewer of them. So each worker
has a launcher of its own, and these meet anew at every start:

::

    this process   hosts the place where launchers meet, and watches them
      launcher       starts its worker again when one of all has failed, or when one more has come
        worker
      launcher       is killed, with its worker: the others meet without it, if enough are left
        worker
      launcher       started by hand, with the address of the place: the others meet again, with it

The place is here, in a process that trains nothing, so that no launcher is needed more than another. Ranks are dealt anew
at each start. If this process is killed the place is gone, and launchers and workers end by themselves.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist

from .torchrun import SAVING_S, WorkersError, WorkersStopped, end_of, variables_of_workers

_POLL_S = 0.2
_LATE_S = 5  # that launchers wait for more, when there are enough
_ALIVE = {"keep_alive_interval": 2, "keep_alive_max_attempt": 5}  # a launcher that is silent for 10 s is gone
_WAIT_S = 600  # for as many as are needed
_END_S = 15.0  # for launchers to end after the run is finished


class Launchers:
    """The launchers of a run on this machine, a worker each.

    Args:
        arguments: of a worker: what follows ``python``.
        least: how many there must be for a run to go on.
        most: how many there may be.
        max_restarts: failures that the run survives.
        folder: of their logs.
    """

    def __init__(self, arguments: Sequence[str], least: int, most: int, *, max_restarts: int, folder: Path) -> None:
        self._place = dist.TCPStore(  # type: ignore[attr-defined]
            "127.0.0.1", 0, is_master=True, wait_for_workers=False
        )
        conf: dict[str, int] = {"is_host": 0, "join_timeout": _WAIT_S, "last_call_timeout": _LATE_S, **_ALIVE}
        self._options = ["-m", "torch.distributed.run", "--nnodes", f"{least}:{most}", "--nproc-per-node", "1"]
        self._options += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{self._place.port}"]
        self._options += ["--rdzv-id", uuid.uuid4().hex, "--rdzv-conf", ",".join(f"{k}={v}" for k, v in conf.items())]
        self._options += ["--max-restarts", str(max_restarts), "--local-addr", "127.0.0.1"]
        self._arguments, self._folder = list(arguments), folder
        # With the store that launchers share, those that stay would look for a first one that is gone.
        self._variables = {**variables_of_workers(), "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        self.processes: list[subprocess.Popen[bytes]] = []

    @property
    def joining(self) -> str:
        """The command that brings another worker."""
        variables = [f"{name}={value}" for name, value in self._variables.items()]
        return shlex.join(["env", *variables, sys.executable, *self._options, *self._arguments])

    def start(self) -> None:
        """One more; a session of its own, so that Ctrl-C comes to this process alone."""
        number = len(self.processes)
        logs = ["--redirects", "2", "--log-dir", str(self._folder / str(number))]
        with (self._folder / f"{number}.log").open("wb") as log:
            self.processes.append(
                subprocess.Popen(
                    [sys.executable, *self._options, *logs, *self._arguments],
                    stderr=log,
                    env={**os.environ, **self._variables},
                    start_new_session=True,
                )
            )

    @property
    def living(self) -> list[subprocess.Popen[bytes]]:
        return [process for process in self.processes if process.poll() is None]

    def tell(self, number: int) -> None:
        """Send a signal to all."""
        for process in self.living:
            process.send_signal(number)

    def wait(self, timeout_s: float) -> None:
        """Until all have ended; those that have not by then are killed."""
        until = time.monotonic() + timeout_s
        while self.living and time.monotonic() < until:
            time.sleep(_POLL_S)
        self.tell(signal.SIGKILL)
        for process in self.processes:
            process.wait()

    def says(self, *beginnings: str) -> str:
        """The last line of a worker, the latest first, that begins so; what one wrote last, if there is none."""
        logs = sorted(
            self._folder.glob("*/*/attempt_*/*/stderr.log"), key=lambda path: path.stat().st_mtime, reverse=True
        )
        ends = [end_of(log) for log in logs if log.stat().st_size]
        lines = [line for end in ends for line in reversed(end.splitlines())]
        for beginning in beginnings:
            for line in lines:
                if line.startswith(beginning):
                    return line
        return ends[0] if ends else ""


def run_elastic(
    arguments: Sequence[str],
    least: int,
    most: int,
    *,
    max_restarts: int,
    is_finished: Callable[[], bool],
    say: Callable[[str], None],
) -> None:
    """Run ``python -m ...`` in up to ``most`` processes, which go on with as few as ``least`` of them.

    Args:
        arguments: what follows ``python``.
        least: of the processes.
        most: of the processes.
        max_restarts: failures that the run survives.
        is_finished: whether the run is through.
        say: shows a line.

    Raises:
        WorkersError: too few are left, or they have failed too often.
        WorkersStopped: Ctrl-C, or SIGTERM; all were told, had the time to save, and have ended.
    """
    with tempfile.TemporaryDirectory(prefix="dtrp-") as folder, _signals() as heard:
        launchers = Launchers(arguments, least, most, max_restarts=max_restarts, folder=Path(folder))
        try:
            for _ in range(most):
                launchers.start()
            say(f"another worker joins with: {launchers.joining}")
            while launchers.living and not heard:
                if is_finished():
                    launchers.wait(_END_S)
                    return
                if len(launchers.living) < least and not any(p.returncode == 0 for p in launchers.processes):
                    break
                time.sleep(_POLL_S)
            if heard:
                launchers.tell(heard[0])
                launchers.wait(SAVING_S)
                if not is_finished():
                    raise WorkersStopped(heard[0], launchers.says("dtrp: stopped after"))
                return
            left = len(launchers.living)
            launchers.tell(signal.SIGTERM)
            launchers.wait(SAVING_S)
        finally:
            launchers.tell(signal.SIGKILL)
        if any(process.returncode == 0 for process in launchers.processes) or is_finished():
            return
        text = (
            f"dtrp: {left} of {most} workers are left, and the run needs {least}; the last word was: " if left else ""
        )
        raise WorkersError(0, 1, text + launchers.says("dtrp: ").removeprefix("dtrp: " if left else ""))


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Ctrl-C and SIGTERM, as they come, in place of what they would do; nothing outside the main thread."""
    heard: list[int] = []
    before: dict[int, Any] = {}
    try:
        for each in (signal.SIGINT, signal.SIGTERM):
            before[each] = signal.signal(each, lambda number, frame: heard.append(number))
    except ValueError:
        before = {}
    try:
        yield heard
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
