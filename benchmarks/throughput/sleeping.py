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
from torch_schedules import minibatch_s
from turns import Turns, check, table, take_turn, write

import dtrp
from dtrp.planning import Parts, find_orders

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


class _Divided(torch.autograd.Function):
    """x + w, whose backward sleeps for the gradient of x, and for that of w when it is asked for."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: nn.Parameter, seconds: float) -> Tensor:
        ctx.w, ctx.seconds = w, seconds
        return x + w

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        seconds = ctx.seconds

        def weight_gradient() -> Tensor:
            _SLEEPER.sleep(seconds)
            return grad.sum(0)

        _SLEEPER.sleep(seconds)
        dtrp.defer(ctx.w, weight_gradient)
        return grad, None, None


class DividedStage(SleepingStage):
    """As `SleepingStage`, with a backward that dtrp divides: an ``autograd.Function`` that defers the gradient of w."""

    def forward(self, x: Tensor) -> Tensor:
        _SLEEPER.sleep(self.forward_s)
        out: Tensor = _Divided.apply(x, self.w, self.backward_s / 2)
        return out


@dataclass(frozen=True)
class Options:
    rounds: int
    minibatches: int
    only: tuple[str, ...]
    out: Path
    run: dict[str, object]  # when, and the load of the machine before
    link_s: float = 0.0  # of a message on this machine, as measured before


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
    make_stages: Callable[[Contender, int], list[nn.Module]] = stages_for,
    more: Callable[[Contender], dict[str, Any]] = lambda contender: {},
) -> list[Turns]:
    """Every case in turn, round after round. A case: a contender, and the latency added to its messages.

    ``set_latency`` brings that about; ``measured_s`` is what was measured for each. ``more`` gives entries to write down.
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
                **more(contender),
            }
        )
        for contender, latency_s in cases
    ]
    for number in range(options.rounds):
        for (contender, latency_s), turns in zip(cases, all_turns, strict=True):
            set_latency(latency_s)
            begin = partial(
                start, contender, make_stages(contender, num_ranks), optimizer, cross_entropy, batches[0][0]
            )
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


# -- part split -------------------------------------------------------------------------------------------

PART_S = 0.020  # F, R, I and W of a micro-batch
MAX_SLOWDOWN = 0.05


def planned(num_stages: int, link_s: float) -> Contender:
    """dtrp-split in the order that the planner takes for this link."""
    parts = [Parts(*[PART_S] * 4)] * num_stages
    found = find_orders(parts, [link_s] * (num_stages - 1), repeats=True)
    limit = (1 + MAX_SLOWDOWN) * min(order.slot_s for order in found)
    order = min((order for order in found if order.slot_s <= limit), key=lambda order: order.delay)
    return Contender("dtrp", "dtrp-split", 1, "planned", (("leads", order.leads), ("orders", order.orders)))


def contenders_in_parts(num_stages: int, link_s: float = 0.0) -> list[Contender]:
    """One micro-batch, with a delay; then as many as stages, without any."""
    return [
        Contender("dtrp", "dtrp"),
        planned(num_stages, link_s),
        Contender("dtrp", "dtrp-split"),
        Contender("dtrp", "bp", num_stages),
        Contender("dtrp", "bp-zb", num_stages),
        Contender("torch", "1F1B", num_stages),
        Contender("torch", "InterleavedZeroBubble", num_stages),
        Contender("torch", "ZBVZeroBubble", num_stages),
    ]


def stages_in_parts(contender: Contender, num_ranks: int) -> list[nn.Module]:
    """Stages whose F, I and W of a micro-batch each sleep as long; half of it where a rank has two stages."""
    count = contender.stages_per_rank()
    kind = DividedStage if contender.engine == "dtrp" else SleepingStage
    return [kind(PART_S / count, 2 * PART_S / count) for _ in range(num_ranks * count)]


def ideal_s(contender: Contender, num_ranks: int) -> float:
    """Seconds of a mini-batch if messages, updates and the machine took no time; collective."""
    if contender.stages_per_rank() > 1:
        running: Any = start(contender, stages_in_parts(contender, num_ranks), optimizer, cross_entropy, data()[0][0])
        part_s = {
            "FORWARD": PART_S / 2,
            "BACKWARD_INPUT": PART_S / 2,
            "BACKWARD_WEIGHT": PART_S / 2,
            "FULL_BACKWARD": PART_S,
        }
        return minibatch_s(running.schedule.pipeline_order, part_s)
    row = contender.row if contender.engine == "dtrp" else dtrp.get_method("bp")
    return dtrp.simulate(
        row, num_stages=num_ranks, num_minibatches=20 + 8 * num_ranks, num_microbatches=contender.num_microbatches,
        forward_s=PART_S, backward_s=2 * PART_S, weight_s=PART_S,
    ).minibatch_s  # fmt: skip


def split(options: Options) -> None:
    """Backwards in two parts, on one K; runs on every rank."""
    num_stages = dist.get_world_size()
    cases = chosen(contenders_in_parts(num_stages, options.link_s), options.only)
    ideals = {contender: ideal_s(contender, num_stages) for contender in cases}

    def more(contender: Contender) -> dict[str, Any]:
        return {
            "part_ms": 1e3 * PART_S,
            "link_ms": 1e3 * options.link_s,
            "ideal_ms": 1e3 * ideals[contender],
            "options": dict(contender.options),
        }

    all_turns = rounds_of(
        "split", [(contender, 0.0) for contender in cases], options, make_stages=stages_in_parts, more=more
    )
    if dist.get_rank() == 0:
        report_parts(num_stages, all_turns)


def report_parts(num_stages: int, all_turns: Sequence[Turns]) -> None:
    named = {turns.config["contender"]: turns for turns in all_turns}
    rows = []
    for name, turns in named.items():
        ideal_ms, ms = turns.config["ideal_ms"], 1e3 * turns.median_s
        numbers = [str(turns.config["num_microbatches"]), str(turns.config["delay"]), f"{ms:.1f}", turns.spread()]
        rows.append([name, *numbers, f"{ideal_ms:.1f}", f"{ms / ideal_ms:.3f}"])
    print(f"\n{table([f'K={num_stages}', 'A', 'delay', 'ms', 'spread', 'ideal, ms', '/ ideal'], rows)}\n")
    slot = named["dtrp"].median_s if "dtrp" in named else math.nan
    for name in ("dtrp-split planned", "dtrp-split"):
        if name in named:
            most = 1.06 if name.endswith("planned") else None
            ratio = named[name].median_s / slot
            label = f"K={num_stages} {name} / dtrp's slot"
            print(f"        {label}: {ratio:.3f}" if most is None else check(label, ratio, most=most))
    least = {4: 1.25, 8: 1.3}.get(num_stages)
    if least and {"bp-zb", "torch 1F1B"} <= named.keys():
        speed = named["torch 1F1B"].median_s / named["bp-zb"].median_s
        print(check(f"K={num_stages} bp-zb, times torch 1F1B's speed", speed, least=least))
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
