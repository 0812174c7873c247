"""What a message between two workers of this machine takes.

Two processes send one message to and fro over gloo, as stages do, small ones and large ones; half a round trip is a
hop, and what a large one takes longer is its size over the bandwidth.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

_SMALL_BYTES, _LARGE_BYTES = 1024, 4 * 2**20
_ROUNDS = 30


class LinkSpeed(NamedTuple):
    """One hop: a message of n bytes takes ``latency_s + n / bandwidth_bytes_s``."""

    latency_s: float
    bandwidth_bytes_s: float


def measure_link() -> LinkSpeed:
    """Measure the loopback of this machine, with two processes; takes a few seconds."""
    from ..workers import run_workers  # torchrun's interface takes a while to import

    with tempfile.TemporaryDirectory(prefix="dtrp-") as folder:
        file = Path(folder) / "link.json"
        run_workers(["-c", f"from {__name__} import work; work({str(file)!r})"], 2, shown=0)
        small, large = json.loads(file.read_text())
    return LinkSpeed(small, (_LARGE_BYTES - _SMALL_BYTES) / max(1e-9, large - small))


def work(file: str) -> None:
    """What each of the two does."""
    from ..ranks import join

    join(60.0)
    torch.set_num_threads(1)
    rank = dist.get_rank()
    medians = []
    for size in (_SMALL_BYTES, _LARGE_BYTES):
        buffer = torch.zeros(size, dtype=torch.uint8)
        hops = []
        for _ in range(_ROUNDS):
            time.sleep(0.005)  # a stage works in between, and its threads sleep
            start = time.perf_counter()
            if rank == 0:
                dist.send(buffer, 1)
                dist.recv(buffer, 1)
            else:
                dist.recv(buffer, 0)
                dist.send(buffer, 0)
            hops.append((time.perf_counter() - start) / 2)
        medians.append(statistics.median(hops))
    if rank == 0:
        Path(file).write_text(json.dumps(medians))
    dist.barrier()
    dist.destroy_process_group()
