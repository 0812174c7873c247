"""ResNets on two ranks of one thread each: every contender at its own best cut, beside one worker of one thread."""

from __future__ import annotations

import itertools
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from contenders import Contender, chosen, start
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from turns import Turn, Turns, check, table, take_turn, write

from dtrp.models import get_model

Cuts = tuple[int, ...]
WARMUP = 4  # past the start-up at K=2, whose longest lead is 2 micro-batches
MOST_CANDIDATES = 8  # cuts that are tried for one contender
TRIALS = 2  # of a candidate; the better counts


@dataclass(frozen=True)
class Options:
    model: str
    batch: int
    rounds: int
    minibatches: int
    trial: int
    microbatches: tuple[int, ...]
    only: tuple[str, ...]
    known_cuts: bool
    channels_last: bool
    out: Path
    run: dict[str, object]  # when, and the load of the machine before


def optimizer(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.01, momentum=0.9, weight_decay=5e-4)


def new_model(options: Options) -> nn.Sequential:
    """The same weights every time and on every rank."""
    torch.manual_seed(0)
    model = get_model(options.model, 3, 10, image_size=32)
    return model.to(memory_format=torch.channels_last) if options.channels_last else model


def contenders(microbatches: Sequence[int]) -> list[Contender]:
    decoupled = [Contender("dtrp", name, a) for name in ("dtrp", "spectrain", "fdg") for a in microbatches]
    schedules = ("GPipe", "1F1B", "InterleavedZeroBubble")
    synchronous = [Contender("torch", name, a) for name in schedules for a in microbatches if a > 1]
    return [Contender("plain"), *decoupled, *synchronous]


# -- where to cut -----------------------------------------------------------------------------------------


def layer_times(model: nn.Sequential, x: Tensor, repeats: int = 5) -> list[tuple[float, float]]:
    """Seconds of each layer's F and B, on rank 0 with the others at rest; the same answer on every rank."""
    times: list[list[tuple[float, float]]] = [[] for _ in model]
    for _ in range(repeats if dist.get_rank() == 0 else 0):
        h = x
        for layer, own in zip(model, times, strict=True):
            h = h.detach().requires_grad_()
            begin = time.perf_counter()
            out = layer(h)
            middle = time.perf_counter()
            out.backward(torch.ones_like(out))
            own.append((middle - begin, time.perf_counter() - middle))
            h = out
    medians = [tuple(map(statistics.median, zip(*own, strict=True))) for own in times if own]
    answer = [medians]
    dist.broadcast_object_list(answer, src=0)
    return answer[0]  # type: ignore[return-value]


def balanced(times: Sequence[tuple[float, float]], contender: Contender, num_stages: int) -> Cuts:
    """The cuts whose longest stage is shortest, a stage that recomputes counted as 2F+B and any other as F+B."""

    def longest(cuts: Cuts) -> float:
        bounds = [0, *cuts, len(times)]
        return max(
            sum((1 + contender.recomputes(num_stages, stage)) * f + b for f, b in times[first:end])
            for stage, (first, end) in enumerate(itertools.pairwise(bounds))
        )

    return min(itertools.combinations(range(1, len(times)), num_stages - 1), key=longest)


def neighbours(cuts: Cuts, num_layers: int) -> Iterator[Cuts]:
    """One cut moved by one layer."""
    for place, move in itertools.product(range(len(cuts)), (-1, 1)):
        moved = (*cuts[:place], cuts[place] + move, *cuts[place + 1 :])
        if all(a < b for a, b in itertools.pairwise((0, *moved, num_layers))):
            yield moved


def search(begin: Cuts, num_layers: int, trial: Callable[[Cuts], float]) -> dict[Cuts, float]:
    """Downhill from ``begin``, by trials of the neighbours, until none is faster: ``{cuts: seconds}`` of all tried."""
    tried = {begin: trial(begin)}
    best = begin
    while True:
        for cuts in neighbours(best, num_layers):
            if cuts not in tried and len(tried) < MOST_CANDIDATES:
                tried[cuts] = trial(cuts)
        if min(tried, key=tried.__getitem__) == best:
            return tried
        best = min(tried, key=tried.__getitem__)


def known(options: Options, contender: Contender) -> tuple[str, dict[Cuts, float]]:
    """The run that last tried cuts for this contender, and its ``{cuts: seconds}``."""
    world = dist.get_world_size()
    own = (options.model, options.batch, contender.name, contender.num_microbatches, world, options.channels_last)
    for line in reversed(options.out.read_text().splitlines() if options.out.exists() else []):
        row = json.loads(line)
        names = ("model", "batch", "contender", "num_microbatches", "stages")
        if (*(row[name] for name in names), row.get("channels_last", False)) == own:
            return str(row.get("cuts_of", row["run"])), {tuple(cuts): ms / 1e3 for cuts, ms in row["tried_ms"]}
    raise ValueError(
        f"{options.out} has no cuts of {contender.name} A={own[3]} on {own[0]}; leave out --known-cuts once"
    )


# -- the run ----------------------------------------------------------------------------------------------


def compute(options: Options) -> None:
    """One model, all contenders; runs on every rank."""
    generator = torch.Generator().manual_seed(0)
    data = [
        (
            torch.randn(options.batch, 3, 32, 32, generator=generator),
            torch.randint(10, (options.batch,), generator=generator),
        )
        for _ in range(4)
    ]
    times = layer_times(new_model(options), data[0][0])

    def turn(contender: Contender, cuts: Cuts, timed: int) -> Turn:
        layers = list(new_model(options))
        stages = [nn.Sequential(*layers[first:end]) for first, end in itertools.pairwise([0, *cuts, len(layers)])]
        begin = partial(start, contender, stages, optimizer, cross_entropy, data[0][0])
        return take_turn(begin, data, warmup=WARMUP, timed=timed)

    def trial(contender: Contender, cuts: Cuts) -> float:
        return min(turn(contender, cuts, options.trial).typical_s for _ in range(TRIALS))

    all_turns: dict[Contender, Turns] = {}
    for contender in chosen(contenders(options.microbatches), options.only):
        tried: dict[Cuts, float] = {(): 0.0}
        tried_by = str(options.run["run"])
        if contender.engine != "plain" and options.known_cuts:
            tried_by, tried = known(options, contender)
        elif contender.engine != "plain":
            num_stages = dist.get_world_size() * contender.stages_per_rank()
            first = balanced(times, contender, num_stages)
            tried = search(first, len(times), partial(trial, contender))
        cuts = min(tried, key=tried.__getitem__)
        all_turns[contender] = Turns(configuration(contender, cuts, tried, tried_by, times, options))
        say(f"{options.model}: {contender.name} A={contender.num_microbatches}: cuts {list(cuts)}")
    for number in range(options.rounds):
        for contender, turns in all_turns.items():
            turns.turns.append(turn(contender, tuple(turns.config["cuts"]), options.minibatches))
        say(f"{options.model}: round {number + 1} of {options.rounds}")
    if dist.get_rank() == 0:
        write(options.out, options.run, list(all_turns.values()))
        report(options.model, all_turns, len(times))


def configuration(
    contender: Contender,
    cuts: Cuts,
    tried: dict[Cuts, float],
    tried_by: str,
    times: list[tuple[float, float]],
    options: Options,
) -> dict[str, object]:
    world = dist.get_world_size()
    return {
        "part": "compute",
        "model": options.model,
        "batch": options.batch,
        "channels_last": options.channels_last,
        "contender": contender.name,
        "engine": contender.engine,
        "stages": 1 if contender.engine == "plain" else world,
        "stages_per_rank": contender.stages_per_rank(),
        "num_microbatches": contender.num_microbatches,
        "delay": contender.delay(world),
        "cuts": list(cuts),
        "cuts_of": tried_by,
        "tried_ms": [[list(c), 1e3 * seconds] for c, seconds in tried.items() if c],
        "layer_ms": [[1e3 * f, 1e3 * b] for f, b in times],
        "warmup": WARMUP,
        "timed": options.minibatches,
    }


def say(text: str) -> None:
    if dist.get_rank() == 0:
        print(text, flush=True)


# -- the table --------------------------------------------------------------------------------------------


def report(model: str, all_turns: dict[Contender, Turns], num_layers: int) -> None:
    median = {contender: turns.median_s for contender, turns in all_turns.items()}
    plain = median.get(Contender("plain"), math.nan)
    synchronous: dict[int, float] = {}  # the better of the two at each A
    for contender, seconds in median.items():
        if contender.method in ("GPipe", "1F1B"):
            a = contender.num_microbatches
            synchronous[a] = min(seconds, synchronous.get(a, math.inf))
    rows = [
        [
            contender.name,
            str(contender.num_microbatches),
            str(turns.config["delay"]),
            " ".join(map(str, turns.config["cuts"])) or "-",
            f"{1e3 * turns.median_s:.1f}",
            turns.spread(),
            f"{plain / turns.median_s:.2f}",
            f"{synchronous.get(contender.num_microbatches, math.nan) / turns.median_s:.2f}",
        ]
        for contender, turns in all_turns.items()
    ]
    header = [f"{model}, {num_layers} layers", "A", "delay", "cuts", "ms", "spread", "x one worker", "x torch at A"]
    print(f"\n{table(header, rows)}\n")
    best_synchronous = min(synchronous.values(), default=math.nan)
    for method, same, own, alone in (("spectrain", 1.2, 1.05, 1.6), ("dtrp", 1.05, 0.95, 1.45)):
        times = {contender.num_microbatches: t for contender, t in median.items() if contender.method == method}
        if not times:
            continue
        for a in sorted({2, 4} & set(times) & set(synchronous)):
            label = f"{model} {method} A={a}, times the better of torch GPipe and 1F1B at A={a}"
            print(check(label, synchronous[a] / times[a], least=same))
        best = min(times, key=times.__getitem__)
        label = f"{model} {method} at its best A={best}, times the better of torch's at theirs"
        print(check(label, best_synchronous / times[best], least=own))
        label = f"{model} {method} at its best A={best}, times one worker"
        print(check(label, plain / times[best], least=alone))
    print(flush=True)
