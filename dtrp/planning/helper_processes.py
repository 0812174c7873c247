"""Python processes beside this one, for the time of a measurement."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager


@contextmanager
def helper_processes(
    calls: Sequence[str], *, stdout: int, stderr: int | None = None, stdin: int = subprocess.DEVNULL
) -> Iterator[list[subprocess.Popen[str]]]:
    """Within it every call runs in a process with one thread, which is no rank of a run; afterwards they are killed.

    Args:
        calls: Python code, a string for every process.
        stdout: where the output goes, as in `subprocess.Popen`.
        stderr: where errors go.
        stdin: where the input comes from.
    """
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    environment["OMP_NUM_THREADS"] = "1"
    with ExitStack() as stack:
        processes = []
        for call in calls:
            command = [sys.executable, "-c", call]
            process = subprocess.Popen(command, stdin=stdin, stdout=stdout, stderr=stderr, env=environment, text=True)
            processes.append(stack.enter_context(process))
            stack.callback(process.kill)
        yield processes
