"""Stages that sleep instead of computing: the order of work and the messages alone, on any number of cores.

F sleeps 20 ms a mini-batch and B 40 ms, a micro-batch its share of that; the messages are real.
"""

from __future__ import annotations

import itertools
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from contenders import Contender, chosen, start
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from turns import Turns, check, table, take_turn, write

FORWARD_S, BACKWARD_S = 0.020, 0.040  # of a stage, a mini-batch
BATCH, WIDTH = 32, 64
LATENCY = "DTRP_MESSAGE_LATENCY_S"


class Sleeper:
    """Sleeps that last as long as they say, on average: what one oversleeps (0.1 to 0.5 ms) is taken off the next."""

    def __init__(self) -> None:
        self._late = 0.0

    def sleep(self, seconds: float) -> None:
        begin = time.perf_counter()
        time.sleep(max(0.0, seconds - self._late))
        self._late += time.perf_counter() - begin - seconds


_SLEEPER = Sleeper()  # of this process


class _Sleep(torch.autograd.Function):
    """The identity, whose backward takes a time."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, seconds: float) -> Tensor:
        ctx.seconds = seconds
        return x.clone()  # no view: the zero-bubble schedule detaches a stage's output in place

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        _SLEEPER.sleep(ctx.seconds)
        return grad, None


class SleepingStage(nn.Module):
    """x + w: (N, WIDTH) to (N, WIDTH), in a time of its own.

    ::

        w -- sleep B/2 --+
                         + -- sleep B/2 -- output          (in the backward; the forward sleeps F)
        x ---------------+

    So a whole backward takes B, and one that a schedule splits takes B/2 for the input's gradient and B/2 for the
    weights', as in a linear layer or a convolution.
    """

    def __init__(self, forward_s: float, backward_s: float) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(WIDTH))
        self.forward_s, self.backward_s = forward_s, backward_s

    def forward(self, x: Tensor) -> Tensor:
        _SLEEPER.sleep(self.forward_s)
        w: Tensor = _Sleep.apply(self.w, self.backward_s / 2)
        out: Tensor = _Sleep.apply(x + w, self.backward_s / 2)
        return out


@dataclass(frozen=True)
class Options:
    rounds: int
    minibatches: int
    only: tuple[str, ...]
    out: Path
    run: dict[str, object]  # when, and the load of the machine before


def optimizer(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.01, momentum=0.9)


def stages_for(contender: Contender, num_ranks: int) -> list[nn.Module]:
    """Stages of equal work, the same on a rank for every contender: half the sleep where a rank has two stages."""
    pieces = contender.num_microbatches * contender.stages_per_rank()
    num_stages = num_ranks * contender.stages_per_rank()
    return [SleepingStage(FORWARD_S / pieces, BACKWARD_S / pieces) for _ in range(num_stages)]


def data() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(BATCH, WIDTH, generator=generator), torch.randint(WIDTH, (BATCH,), generator=generator))
        for _ in range(4)
    ]


def latency_in_transport(seconds: float) -> None:
    """dtrp's transport adds it to every training message of the pipelines that are made from now on."""
    os.environ[LATENCY] = str(seconds)


def rounds_of(
    part: str,
    cases: Sequence[tuple[Contender, float]],
    options: Options,
    *,
    set_latency: Callable[[float], None] = latency_in_transport,
    link: str = "loopback",
    measured_s: dict[float, float] | None = None,
) -> list[Turns]:
    """Every case in turn, round after round. A case: a contender, and the latency added to its messages.

    ``set_latency`` brings that about; ``measured_s`` is what was measured for each.
    """
    num_ranks = dist.get_world_size()
    warmup = 4 * (num_ranks - 1) + 4  # twice the longest start-up, and some
    batches = data()
    all_turns = [
        Turns(
            {
                "part": part,
                "contender": contender.name,
                "engine": contender.engine,
                "stages": num_ranks,
                "stages_per_rank": contender.stages_per_rank(),
                "num_microbatches": contender.num_microbatches,
                "delay": contender.delay(num_ranks),
                "forward_ms": 1e3 * FORWARD_S,
                "backward_ms": 1e3 * BACKWARD_S,
                "batch": BATCH,
                "width": WIDTH,
                "latency_ms": round(1e3 * latency_s, 3),
                **({} if measured_s is None else {"measured_latency_ms": 1e3 * measured_s[latency_s]}),
                "link": link,
                "warmup": warmup,
                "timed": options.minibatches,
            }
        )
        for contender, latency_s in cases
    ]
    for number in range(options.rounds):
        for (contender, latency_s), turns in zip(cases, all_turns, strict=True):
            set_latency(latency_s)
            begin = partial(start, contender, stages_for(contender, num_ranks), optimizer, cross_entropy, batches[0][0])
            turns.turns.append(take_turn(begin, batches, warmup=warmup, timed=options.minibatches))
        if dist.get_rank() == 0:
            print(f"K={num_ranks}: round {number + 1} of {options.rounds}", flush=True)
    if dist.get_rank() == 0:
        write(options.out, options.run, all_turns)
    return all_turns


# -- part sleeping ----------------------------------------------------------------------------------------


def contenders(num_stages: int) -> list[Contender]:
    return [
        Contender("dtrp", "dtrp"),
        Contender("dtrp", "fdg"),
        Contender("dtrp", "spectrain"),
        Contender("dtrp", "bp", num_stages),
        Contender("torch", "GPipe", num_stages),
        Contender("torch", "1F1B", num_stages),
        Contender("torch", "InterleavedZeroBubble", num_stages),
    ]


def sleeping(options: Options) -> None:
    """All contenders side by side, on one K; runs on every rank."""
    num_stages = dist.get_world_size()
    all_turns = rounds_of(
        "sleeping", [(contender, 0.0) for contender in chosen(contenders(num_stages), options.only)], options
    )
    if dist.get_rank() == 0:
        report(num_stages, all_turns)


def report(num_stages: int, all_turns: Sequence[Turns]) -> None:
    named = {turns.config["contender"]: turns for turns in all_turns}
    work, recompute = FORWARD_S + BACKWARD_S, 2 * FORWARD_S + BACKWARD_S
    synchronous = named["torch 1F1B"].median_s if "torch 1F1B" in named else math.nan
    rows = [
        [
            name,
            str(turns.config["num_microbatches"]),
            str(turns.config["delay"]),
            f"{1e3 * turns.median_s:.1f}",
            turns.spread(),
            f"{turns.median_s / work:.3f}",
            f"{synchronous / turns.median_s:.2f}",
        ]
        for name, turns in named.items()
    ]
    header = [f"K={num_stages}", "A", "delay", "ms", "spread", "/ (F+B)", "x torch 1F1B"]
    print(f"\n{table(header, rows)}\n")
    for name, slot, length in (("dtrp", "2F+B", recompute), ("fdg", "F+B", work), ("spectrain", "F+B", work)):
        if name in named:
            print(check(f"K={num_stages} {name} / ({slot})", named[name].median_s / length, most=1.06))
    for name, least in (("dtrp", {4: 1.25, 8: 1.3}), ("fdg", {4: 1.6, 8: 1.75})):
        if num_stages in least and name in named:
            speed = synchronous / named[name].median_s
            print(check(f"K={num_stages} {name}, times torch 1F1B's speed", speed, least=least[num_stages]))
    print(flush=True)


# -- part links -------------------------------------------------------------------------------------------


def contenders_on_links(num_stages: int) -> list[Contender]:
    decoupled = [Contender("dtrp", name) for name in ("dtrp", "dtrp-1f1b", "fdg")]
    return [*decoupled, Contender("dtrp", "bp", num_stages)]


def links(options: Options) -> None:
    """The methods on slower and slower links, on one K; runs on every rank."""
    num_stages = dist.get_world_size()
    slot = 2 * FORWARD_S + BACKWARD_S
    latencies = [0.0, FORWARD_S / 4, FORWARD_S / 2, 0.9 * FORWARD_S, FORWARD_S, 2 * FORWARD_S, slot]
    methods = chosen(contenders_on_links(num_stages), options.only)
    cases = list(itertools.product(methods, latencies))
    all_turns = rounds_of("links", cases, options)
    if dist.get_rank() == 0:
        report_losses(num_stages, all_turns, {0.5: ("dtrp", "dtrp-1f1b", "fdg"), 0.9: ("dtrp", "fdg")})


def report_losses(num_stages: int, all_turns: Sequence[Turns], targets: dict[float, tuple[str, ...]]) -> None:
    """Throughput lost to the latency, each method against itself without. ``targets``: latency / F -> at most 5 %."""
    by_case = {(turns.config["contender"], turns.config["latency_ms"]): turns for turns in all_turns}
    methods = list(dict.fromkeys(name for name, _ in by_case))
    latencies = sorted({latency for _, latency in by_case})

    def lost(name: str, latency: float) -> float:
        return 100 * (1 - by_case[name, 0.0].median_s / by_case[name, latency].median_s)

    rows = []
    for name in methods:
        cells = [f"{1e3 * by_case[name, t].median_s:.1f} ({lost(name, t):+.1f} %)" for t in latencies]
        rows.append([name, str(by_case[name, 0.0].config["num_microbatches"]), *cells])
    header = [f"K={num_stages}, ms (lost)", "A", *(f"{t:g} ms" for t in latencies)]
    print(f"\n{table(header, rows)}\n")
    for share, names in targets.items():
        latency = round(1e3 * FORWARD_S * share, 3)
        for name in (name for name in names if name in methods):
            print(check(f"{name}, % lost at {share:g} F", lost(name, latency), most=5.0))
    print(flush=True)
