"""The time that a message between two workers of this machine takes.

Two processes send a message to and fro over gloo, as stages do: a small message, then a large one. Half a round trip is
a hop, and the time that a large message takes longer is its size over the bandwidth.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from subprocess import DEVNULL, PIPE, TimeoutExpired
from typing import NamedTuple

import torch
import torch.distributed as dist

from .helper_processes import helper_processes

_SMALL_BYTES, _LARGE_BYTES = 1024, 4 * 2**20
_ROUNDS = 30
_TIMEOUT_S = 60.0
_RESULT = "link.json"


class LinkSpeed(NamedTuple):
    """One hop: a message of n bytes takes ``latency_s + n / bandwidth_bytes_s``."""

    latency_s: float
    bandwidth_bytes_s: float


def measure_link() -> LinkSpeed:
    """Measure the loopback of this machine, with two processes; takes a few seconds.

    Raises:
        RuntimeError: the processes could not talk to each other, with their last line of stderr.
    """
    with tempfile.TemporaryDirectory(prefix="dtrp-") as folder:
        calls = [f"from {__name__} import work; work({rank}, {folder!r})" for rank in range(2)]
        with helper_processes(calls, stdout=DEVNULL, stderr=PIPE) as processes:
            try:
                errors = [process.communicate(timeout=_TIMEOUT_S)[1] for process in processes]
            except TimeoutExpired:
                errors = [f"it took more than {_TIMEOUT_S:g} s"]
        if any(process.returncode for process in processes):
            reason = next((text.strip().splitlines()[-1] for text in errors if text.strip()), "they said nothing")
            raise RuntimeError(f"the link between two processes could not be measured ({reason}); pass latency_s")
        small, large = json.loads(Path(folder, _RESULT).read_text())
    return LinkSpeed(small, (_LARGE_BYTES - _SMALL_BYTES) / max(1e-9, large - small))


def work(rank: int, folder: str) -> None:
    """The work of one of the two processes."""
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=Path(folder, "store").as_uri(), rank=rank, world_size=2)
    torch.set_num_threads(1)
    medians = []
    for size in (_SMALL_BYTES, _LARGE_BYTES):
        buffer = torch.zeros(size, dtype=torch.uint8)
        hops = []
        for _ in range(_ROUNDS):
            time.sleep(0.005)  # a stage works in between, and its threads sleep
            start = time.perf_counter()
            for transfer in (dist.send, dist.recv) if rank == 0 else (dist.recv, dist.send):
                transfer(buffer, 1 - rank)
            hops.append((time.perf_counter() - start) / 2)
        medians.append(statistics.median(hops))
    if rank == 0:
        Path(folder, _RESULT).write_text(json.dumps(medians))
    dist.barrier()
    dist.destroy_process_group()
