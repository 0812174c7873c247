"""A contender's turn: started, warmed up, timed step by step, ended. And what is written down of it."""

from __future__ import annotations

import dataclasses
import gc
import itertools
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from contenders import Running
from torch import Tensor

import dtrp


@dataclass(frozen=True)
class Turn:
    """Seconds a mini-batch in steady state, and the last loss.

    Args:
        last_rank_s: the time of all timed steps on the last rank over their number.
        typical_s: the median of those steps.
        slowest_rank_s: as the first, on the rank where it is longest.
        loss: of the last mini-batch.
    """

    last_rank_s: float
    typical_s: float
    slowest_rank_s: float
    loss: float


@dataclass
class Turns:
    """All turns of one configuration, a turn in each round."""

    config: dict[str, Any]
    turns: list[Turn] = field(default_factory=list)

    @property
    def times(self) -> list[float]:
        return [turn.last_rank_s for turn in self.turns]

    @property
    def median_s(self) -> float:
        return statistics.median(self.times)

    def spread(self) -> str:
        """The least and the largest, in milliseconds."""
        return f"{1e3 * min(self.times):.1f}-{1e3 * max(self.times):.1f}"


def take_turn(start: Callable[[], Running], data: Sequence[tuple[Tensor, Tensor]], *, warmup: int, timed: int) -> Turn:
    """One turn, on all ranks; every rank gets the same answer.

    ::

        start | warm-up steps | timed steps | as many as ranks | flush, close
                              ^ stamp       ^ stamp

    Each rank stamps the end of each of its steps with its own clock; only differences on one rank are taken. The
    steps after the last stamp keep the first ranks at work, which are some mini-batches ahead of the last.
    """
    gc.collect()
    dist.barrier()
    running = start()
    stamps, loss = [], None
    for step in range(warmup + timed + dist.get_world_size()):
        value = running.step(*data[step % len(data)])
        stamps.append(time.perf_counter())
        loss = loss if value is None else value
    running.close()
    steps = [after - before for before, after in itertools.pairwise(stamps[warmup - 1 : warmup + timed])]
    mine = Turn(
        last_rank_s=statistics.mean(steps),
        typical_s=statistics.median(steps),
        slowest_rank_s=0.0,
        loss=math.nan if loss is None else float(loss),
    )
    report: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(report, mine if running.works else None)
    at_work: list[Turn] = [turn for turn in report if turn is not None]
    return dataclasses.replace(at_work[-1], slowest_rank_s=max(turn.last_rank_s for turn in at_work))


def environment() -> dict[str, Any]:
    """Versions and hardware."""
    cpu = platform.processor()
    if os.path.exists("/proc/cpuinfo"):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), cpu)
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "dtrp": dtrp.__version__,
        "machine": platform.machine(),
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads_a_rank": torch.get_num_threads(),
        "backend": "gloo",
    }


def write(path: Path, run: dict[str, Any], all_turns: Sequence[Turns]) -> None:
    """Append a line for each configuration. ``run``: the same for all that were measured side by side."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        for turns in all_turns:
            record = {
                **run,
                **turns.config,
                "median_ms": 1e3 * turns.median_s,
                "rounds_ms": [1e3 * t for t in turns.times],
                "rounds_typical_ms": [1e3 * turn.typical_s for turn in turns.turns],
                "slowest_rank_ms": [1e3 * turn.slowest_rank_s for turn in turns.turns],
                "losses": [turn.loss for turn in turns.turns],
                **environment(),
            }
            file.write(json.dumps(record) + "\n")


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns, the first to the left and the others to the right."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = []
    for row in [header, ["-" * width for width in widths], *rows]:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def check(label: str, value: float, *, least: float | None = None, most: float | None = None) -> str:
    """A line that holds a number against its target."""
    met = (least is None or value >= least) and (most is None or value <= most)
    target = f">= {least}" if least is not None else f"<= {most}"
    return f"{'met   ' if met else 'MISSED'}  {label}: {value:.3f} ({target})"
