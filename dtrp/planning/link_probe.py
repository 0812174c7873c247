"""The time that a message between two workers of this machine takes.

Two processes send a message to and fro over gloo, as stages do: a small message, then a large one. Half a round trip is
a hop, and the time that a large message takes longer is its size over the bandwidth. Both sizes take turns, so that
a machine that becomes slower meanwhile slows both.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from subprocess import DEVNULL, PIPE, TimeoutExpired
from typing import NamedTuple

import torch
import torch.distributed as dist

from .helper_processes import helper_processes
from .spread import relative_spread

_SMALL_BYTES, _LARGE_BYTES = 1024, 4 * 2**20
_ROUNDS = 30
_TIMEOUT_S = 60.0
_RESULT = "link.json"


class LinkSpeed(NamedTuple):
    """One hop: a message of n bytes takes ``latency_s + n / bandwidth_bytes_s``.

    Attributes:
        latency_s: seconds that a small message takes.
        bandwidth_bytes_s: bytes per second; None: not measurable, a large message took no longer than a small one.
        spread: interquartile range of the latency over its median; None: not measured.
    """

    latency_s: float
    bandwidth_bytes_s: float | None
    spread: float | None = None


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
        return link_speed(*json.loads(Path(folder, _RESULT).read_text()))


def link_speed(small_s: Sequence[float], large_s: Sequence[float]) -> LinkSpeed:
    """The speed of a link on which hops of a small message took ``small_s`` seconds, and of a large one ``large_s``.

    A difference within the scatter of the two says nothing of the bandwidth.
    """
    latency_s = statistics.median(small_s)
    slower_small, faster_large = statistics.quantiles(small_s, n=4)[2], statistics.quantiles(large_s, n=4)[0]
    bandwidth_bytes_s = None
    if faster_large > slower_small:
        bandwidth_bytes_s = (_LARGE_BYTES - _SMALL_BYTES) / (statistics.median(large_s) - latency_s)
    return LinkSpeed(latency_s, bandwidth_bytes_s, relative_spread(small_s))


def work(rank: int, folder: str) -> None:
    """The work of one of the two processes."""
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=Path(folder, "store").as_uri(), rank=rank, world_size=2)
    torch.set_num_threads(1)
    buffers = [torch.zeros(size, dtype=torch.uint8) for size in (_SMALL_BYTES, _LARGE_BYTES)]
    hops_s: list[list[float]] = [[] for _ in buffers]
    for _ in range(_ROUNDS):
        for buffer, seconds in zip(buffers, hops_s, strict=True):
            time.sleep(0.005)  # a stage works in between, and its threads sleep
            start = time.perf_counter()
            for transfer in (dist.send, dist.recv) if rank == 0 else (dist.recv, dist.send):
                transfer(buffer, 1 - rank)
            seconds.append((time.perf_counter() - start) / 2)
    if rank == 0:
        Path(folder, _RESULT).write_text(json.dumps(hops_s))
    dist.barrier()
    dist.destroy_process_group()
