"""K processes, one a rank, that run one function; a rank that fails says so and ends them all."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

GRACE_S = 10.0  # for the others to say what they saw, once a rank has failed


def launch(function: Callable[..., None], world_size: int, *args: Any, address: str = "127.0.0.1") -> None:
    """Run ``function(*args)`` in ``world_size`` new processes of one torch thread each, joined by gloo.

    ``function`` and ``args`` are pickled. A `prepare` method of an argument runs in each rank (with its number)
    before the ranks meet.

    Raises:
        SystemExit: a rank failed; the message has every rank's traceback, the earliest first.
    """
    os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")  # read when the children import torch
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        port = _free_port()
        ranks = [
            context.Process(target=_rank, args=(rank, world_size, address, port, folder, function, args))
            for rank in range(world_size)
        ]
        signal.signal(signal.SIGTERM, _end_at_once)
        try:
            for process in ranks:
                process.start()
            running = {process.sentinel: process for process in ranks}
            failed = False
            while running and not failed:
                for sentinel in wait(list(running)):
                    process = running.pop(sentinel)  # type: ignore[call-overload]
                    process.join()
                    failed |= process.exitcode != 0
            if failed:
                _await_all(ranks, GRACE_S)
        finally:
            _end(ranks)
        if failed:
            raise SystemExit(_what_failed(ranks, Path(folder)))


def _rank(
    rank: int, world_size: int, address: str, port: int, folder: str, function: Callable[..., None], args: Any
) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), MASTER_ADDR=address, MASTER_PORT=str(port)
    )
    try:
        import torch
        import torch.distributed as dist

        torch.set_num_threads(1)
        for argument in args:
            if hasattr(argument, "prepare"):
                argument.prepare(rank)
        dist.init_process_group("gloo", timeout=timedelta(seconds=300))
        function(*args)
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        Path(folder, f"{time.time():.6f} {rank}").write_text(traceback.format_exc())
        sys.stdout.flush()
        os._exit(1)  # no clean-up that could wait for the others


def _end_at_once(number: int, frame: object) -> None:
    """SIGTERM as an exception, so that the ranks end too; `timeout` sends it twice."""
    signal.signal(number, signal.SIG_IGN)
    sys.exit("ended by SIGTERM")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _await_all(processes: list[Any], seconds: float) -> None:
    end = time.monotonic() + seconds
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))


def _end(processes: list[Any]) -> None:
    processes = [process for process in processes if process.pid is not None]
    for process in processes:
        if process.is_alive():
            process.terminate()
    _await_all(processes, 5.0)
    for process in processes:
        if process.is_alive():
            process.kill()
        process.join()


def _what_failed(processes: list[Any], folder: Path) -> str:
    reports = sorted(folder.iterdir(), key=lambda path: float(path.name.split()[0]))
    parts = [f"rank {path.name.split()[1]} failed:\n{path.read_text()}" for path in reports]
    told = {int(path.name.split()[1]) for path in reports}
    parts += [
        f"rank {rank} ended with exit code {process.exitcode} and said nothing"
        for rank, process in enumerate(processes)
        if rank not in told and process.exitcode
    ]
    return "\n".join(parts)
