"""`plan`: a model, a batch and some workers into a `Plan`.

For a method, A micro-batches and mini-batches of n samples: the layers are profiled on micro-batches of n/A, cut where
the slowest stage is fastest (each stage keeping its graph where that is allowed and fits), and the schedule is simulated
with the times of the stages and links. The choices, each from that one evaluation::

    cuts, keep      for the method that was asked for
    the lead        the least delay among those orders of work that are within 2 % of the fastest
    the batch       the smallest mini-batch within 5 % of the best samples/s, within the memory; as many micro-batches as cost
                    nothing; the learning rate with it
    whether to      the same job by other methods, and by one worker
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import Optimizer

from ..methods import Keep, Method, get_method
from ..schedule import steady_delay
from ..splitting.stages import equal_cuts, layers_of
from ..stage.forward import LossFn
from ..tensors.pytree import num_samples
from .link_probe import LinkSpeed, measure_link
from .plan_file import Choice, Plan, PlanError, describe_model, method_options
from .profile import Profiler, checked_example, device_of
from .search import SLOWER, Evaluated, Search, frontier, larger_batches

LR_SCALING: dict[str, Callable[[float], float]] = {
    "linear": lambda factor: factor,
    "sqrt": math.sqrt,
    "none": lambda factor: 1.0,
}
OTHERS = ("gpipe", "bp", "pipedream", "fdg", "dtrp")  # what a plan is compared with, beside one worker
_SATURATED = 0.95  # of the best throughput
_WARMUP_MINIBATCHES = 20  # for each doubling of the learning rate and more


def plan(
    model: nn.Sequential | Sequence[nn.Module],
    example: tuple[Any, Any],
    loss_fn: LossFn,
    *,
    num_workers: int,
    method: str | Method = "dtrp",
    optimizer: Callable[[list[nn.Parameter]], Optimizer] | None = None,
    num_microbatches: int | None = None,
    keep: Literal["auto"] | Keep | None = None,
    memory_limit_bytes: int | None = None,
    latency_s: float | None = None,
    bandwidth_bytes_s: float | None = None,
    choose_lead: bool | None = None,
    compensate: bool = False,
    max_batch_size: int | None = None,
    max_delay: int | None = None,
    lr_scaling: Literal["linear", "sqrt", "none"] = "linear",
    alternatives: bool = True,
    device: torch.device | str | None = None,
    neighbours: int | None = None,
    repeats: int = 7,
    autocast: Callable[[], AbstractContextManager[Any]] | None = None,
    progress: Callable[[str], None] | None = None,
) -> Plan:
    """Profile a model and choose how to train it on ``num_workers`` workers.

    Args:
        model: an `nn.Sequential`, or a list of modules, cut anywhere between its layers; or what `dtrp.split` returns, better
            in many stages, of which those of the plan are made. It is left as it is.
        example: a batch (x, y) as `Pipeline.step` takes it; its size is the base mini-batch.
        loss_fn: as `Pipeline`'s.
        num_workers: K.
        method: a name or a `Method`.
        optimizer: as `Pipeline`'s; None: updates take no time and the optimizer's state no memory.
        num_microbatches: A. None: 1, or as many as ``max_delay`` asks for; for a method that flushes, the fastest of K, 2K, 4K;
            with ``compensate`` as many as cost nothing, none smaller than the base.
        keep: None: what the method keeps, or with ``compensate`` as ``"auto"``: graphs in each stage that has room for them.
        memory_limit_bytes: of a worker.
        latency_s: of a message between workers. None: as measured on this machine's loopback, which takes a few seconds.
        bandwidth_bytes_s: of a link, each way. None: as measured with the latency, or without bound.
        choose_lead: choose ``ahead`` and the order within a slot by the latency; None: where ``method`` is a name.
        compensate: choose the mini-batch too (batch compensation), and which stages keep their graphs: with no
            ``memory_limit_bytes``, within the memory that fdg needs at the base mini-batch.
        max_batch_size: the largest to try; None: 32 times the base.
        max_delay: in updates; met by more micro-batches.
        lr_scaling: of the learning rate with the mini-batch.
        alternatives: evaluate the other methods too, and cuts into equal numbers of layers.
        device: where to measure; None: where the model is.
        neighbours: processes that work at the same time as the measured one. None: as many as there are other workers
            on this machine's CPU, none on an accelerator.
        repeats: rounds of the measurement, of which the median counts.
        autocast: makes the region in which steps run, as ``lambda: torch.autocast("cpu", torch.bfloat16)``; None: none.
        progress: called with a line before each longer part.

    Every worker, and the one worker it is compared with, is measured with the torch threads of this process: call
    `torch.set_num_threads` with those of a worker first (1 under torchrun, unless OMP_NUM_THREADS says otherwise).

    Raises:
        PlanError: (a ValueError) what cannot be planned, with what would be possible; arguments out of range.
    """
    say = progress or (lambda text: None)
    row = get_method(method) if isinstance(method, str) else method
    if not isinstance(row, Method):
        raise TypeError(f"method is a {type(method).__name__}; pass a name or what get_method returns")
    if row.local:
        raise PlanError(
            f"method={row.name!r}: a plan is made of the layers' costs, and the auxiliary networks, which depend on the cuts, are "
            "none of them; plan with method='bp' and use its cuts, or simulate with times that you know"
        )
    if lr_scaling not in LR_SCALING:
        raise PlanError(f"lr_scaling={lr_scaling!r}: choose one of {', '.join(map(repr, LR_SCALING))}")
    if keep not in (None, "auto", "graph", "input"):
        raise PlanError(f"keep={keep!r}: pass 'auto', 'graph' or 'input', or leave it out")
    _check_number("memory_limit_bytes", memory_limit_bytes, 1)
    _check_number("latency_s", latency_s, 0)
    _check_number("bandwidth_bytes_s", bandwidth_bytes_s, 0, above=True)
    for name, value in (
        ("num_microbatches", num_microbatches),
        ("max_delay", max_delay),
        ("repeats", repeats),
        ("neighbours", neighbours),
    ):
        least = 0 if name in ("max_delay", "neighbours") else 1
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least):
            raise PlanError(f"{name}={value!r}: pass a whole number of at least {least}")
    base = num_samples(checked_example(example)[0])
    if max_batch_size is not None and (not isinstance(max_batch_size, int) or max_batch_size < base):
        raise PlanError(
            f"max_batch_size={max_batch_size!r} with an example of {base} samples, the base; pass at least that"
        )
    if num_microbatches is not None and max_delay is not None and isinstance(num_workers, int):
        delay = steady_delay(row, max(1, num_workers), 0, num_microbatches, 0)
        if delay > max_delay:
            raise PlanError(
                f"num_microbatches={num_microbatches} leaves a delay of {delay}, and max_delay={max_delay}; pass one of the two"
            )
    num_layers = len(layers_of(model))
    if isinstance(num_workers, bool) or not isinstance(num_workers, int) or not 1 <= num_workers <= num_layers:
        raise PlanError(
            f"num_workers={num_workers!r}: the model has {num_layers} layers; pass a number from 1 to {num_layers}"
        )
    method_options(row)  # refuses what no file holds
    if neighbours is None:
        where = device_of(layer for _, layer in layers_of(model)) if device is None else torch.device(device)
        neighbours = num_workers - 1 if where.type == "cpu" else 0
    profiler = Profiler(
        model,
        example,
        loss_fn,
        optimizer=optimizer,
        predict=row.predict or "rollout",
        device=device,
        neighbours=neighbours,
        repeats=repeats,
        autocast=autocast,
    )
    if num_microbatches is not None and num_microbatches > base:
        raise PlanError(f"num_microbatches={num_microbatches} with an example of {base} samples; each needs one")
    link = LinkSpeed(0.0, math.inf)
    if num_workers > 1:
        if latency_s is None:
            say("measuring the link between two workers")
            measured = measure_link()
            link = LinkSpeed(measured.latency_s, bandwidth_bytes_s or measured.bandwidth_bytes_s)
        else:
            link = LinkSpeed(latency_s, bandwidth_bytes_s or math.inf)
    if compensate and keep is None:
        keep = "auto"
    search = Search(
        profiler, num_workers, link, keep, memory_limit_bytes, max_delay, num_microbatches, _tied_cuts(model), say
    )  # fmt: skip
    say(f"profiling {num_layers} layers")

    batches: list[Evaluated] = []
    if compensate:
        if memory_limit_bytes is None:
            unbound = dataclasses.replace(search, max_delay=None, num_microbatches=None)
            memory_limit_bytes = unbound.evaluate(get_method("fdg"), base, keep=None, limit=None).memory
            search = dataclasses.replace(search, limit=memory_limit_bytes)
        batches = larger_batches(search, row, base, max_batch_size or 32 * base)
        best = max(each.samples_per_s for each in batches)
        smallest = next(each for each in batches if each.samples_per_s >= _SATURATED * best)
        if search.max_delay is None:
            search = dataclasses.replace(search, num_microbatches=smallest.num_microbatches)
        chosen = search.best_of_tried(smallest)
    else:
        chosen = search.best_of_tried(search.evaluate(row, base))
    batch_size = chosen.batch_size
    search = dataclasses.replace(search, slower=statistics.mean(chosen.ratios))

    leads: list[Evaluated] = []
    if choose_lead is None:
        choose_lead = isinstance(method, str)
    if choose_lead and num_workers > 1 and not row.flush:
        say("orders of work")
        leads = search.leads(chosen)
        allowed = [each for each in leads if max_delay is None or each.delay <= max_delay] or [chosen]
        fastest = min(each.minibatch_s for each in allowed)
        chosen = min(
            (each for each in allowed if each.minibatch_s <= SLOWER * fastest),
            key=lambda each: (each.delay, each.method.ahead),
        )

    say("one worker")
    one_worker = search.one_worker(batch_size)
    others, recomputing, even = [], None, None
    if alternatives and num_workers > 1:
        for name in OTHERS:
            say(f"{name} for the same job")
            try:
                other = get_method(name)
                others.append(search.evaluate(other, batch_size, keep=None, limit=None, own=not other.flush))
            except PlanError:  # fewer samples than it needs micro-batches
                continue
        if keep == "auto":
            recomputing = search.recomputing(chosen)
        even = search.evaluate(
            chosen.method, batch_size, keep=None, limit=None, cuts=equal_cuts(num_layers, num_workers)
        )
    factor = LR_SCALING[lr_scaling](batch_size / base)
    described = [one_worker, *(each.choice() for each in others)]
    if recomputing is not None:
        described.append(dataclasses.replace(recomputing.choice(), method=f"{chosen.method.name}, recomputing"))
    if even is not None:
        described.append(dataclasses.replace(even.choice(), method=f"{chosen.method.name}, equal cuts"))
    return Plan(
        method=chosen.method.name,
        options=method_options(chosen.method),
        cuts=tuple(chosen.cuts),
        keep=tuple(chosen.keeps),
        num_microbatches=chosen.num_microbatches,
        batch_size=batch_size,
        lr_scale=factor,
        warmup_updates=math.ceil(_WARMUP_MINIBATCHES * math.log2(factor)) if factor > 1 else 0,
        model=describe_model(model),
        latency_s=link.latency_s,
        bandwidth_bytes_s=link.bandwidth_bytes_s if math.isfinite(link.bandwidth_bytes_s) else None,
        memory_limit_bytes=memory_limit_bytes,
        minibatch_s=chosen.minibatch_s,
        one_worker_s=one_worker.minibatch_s,
        advice=_advice(chosen, one_worker, others, search),
        stages=chosen.stages(profiler.names),
        alternatives=tuple(described),
        leads=tuple(each.choice() for each in frontier(leads, chosen)),
        batches=tuple(each.choice() for each in batches),
    )


def _advice(chosen: Evaluated, one_worker: Choice, others: Sequence[Evaluated], search: Search) -> str:
    workers, limit = len(chosen.keeps), math.inf if search.limit is None else search.limit
    if workers == 1:
        return "One worker: there is no pipeline to plan."
    speedup = one_worker.minibatch_s / chosen.minibatch_s
    times = f"{1e3 * chosen.minibatch_s:.3g} ms a mini-batch with {workers} workers, {1e3 * one_worker.minibatch_s:.3g} ms with one"
    slots = chosen.slots_s
    slowest = max(range(workers), key=slots.__getitem__)
    if max(slots) > 1.2 * statistics.mean(slots):
        why = f"stage {slowest} takes {1e3 * slots[slowest]:.3g} ms by itself, the slowest of an uneven split"
    elif chosen.minibatch_s > 1.2 * max(slots):
        hidden = f": {1e3 * search.link.latency_s:.3g} ms a message are not hidden"
        why = "the workers wait for each other" + ("" if chosen.method.flush else hidden)
    else:
        why = "stages repeat their forward" if "input" in chosen.keeps else "the work is evenly split"
    if speedup < 1.05:
        if one_worker.memory_bytes > limit:
            return (
                f"Slower than one worker would be ({times}; {why}), but that needs {one_worker.memory_bytes:,} bytes."
            )
        return f"Do not pipeline this: {times}; {why}. Train on one worker, or on replicas of the whole model."
    text = f"{speedup:.2f} times as fast as one worker: {times}."
    better = [
        each
        for each in others
        if each.method.flush and each.minibatch_s <= 1.02 * chosen.minibatch_s and each.memory <= limit
    ]
    if better and chosen.delay:
        best = min(better, key=lambda each: each.minibatch_s)
        text += (
            f" {best.method.name} with {best.num_microbatches} micro-batches is as fast, without any delay: prefer it."
        )
    if speedup < 0.6 * workers:
        text += f" {workers} workers could do better: {why}."
    return text


def _tied_cuts(model: nn.Sequential | Sequence[nn.Module]) -> frozenset[int]:
    """Cuts between layers that share a tensor: two stages would train it apart."""
    seen: dict[int, list[int]] = {}
    for place, (_, layer) in enumerate(layers_of(model)):
        for tensor in itertools.chain(layer.parameters(), layer.buffers()):
            seen.setdefault(id(tensor), []).append(place)
    return frozenset(cut for places in seen.values() for cut in range(places[0] + 1, places[-1] + 1))


def _check_number(name: str, value: Any, least: float, *, above: bool = False) -> None:
    if value is None:
        return
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not number or value < least or (above and value == least):
        raise PlanError(f"{name}={value!r}: pass a finite number {'above' if above else 'of at least'} {least}")
