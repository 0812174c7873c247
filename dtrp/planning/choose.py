"""`plan`: a model, a batch and some workers into a `Plan`.

A method with A micro-batches and mini-batches of n samples is evaluated so: the layers are profiled on micro-batches
of n/A samples and cut where the slowest stage is fastest (stages keep their graphs where that is allowed and fits), and
the schedule is simulated with the times of the stages and links. By such evaluations are chosen::

    cuts, keep      for the method that was asked for
    the lead        the least delay among those orders of work that are within 2 % of the fastest
    the batch       the smallest mini-batch within 5 % of the best samples/s, within the memory; as many micro-batches
                    as cost nothing; the learning rate with it
    whether to      the same job by other methods, and by one worker, measured in turns (`verdict`)
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Literal

import torch
from torch import nn

from ..errors import PlanError
from ..methods import Keep, Method, as_method, get_method
from ..schedule import steady_delay
from ..splitting.stages import equal_cuts, layers_of
from ..tensors.module_mode import writes_buffer
from ..tensors.pytree import num_samples
from ..typing import AutocastFactory, LossFn, OptimizerFactory, Tree
from ..validation import is_number, is_whole, whole
from .link_probe import LinkSpeed, measure_link
from .plan_file import Plan, describe_model, method_options
from .profile import Profiler, checked_example, device_of
from .search import Evaluated, Search, frontier, larger_batches, least_delay
from .verdict import Comparison

LR_SCALING: dict[str, Callable[[float], float]] = {"linear": float, "sqrt": math.sqrt, "none": lambda factor: 1.0}
OTHERS = ("gpipe", "bp", "pipedream", "fdg", "dtrp")  # methods that a plan is compared with, beside one worker
_SATURATED = 0.95  # of the best throughput
_WARMUP_MINIBATCHES = 20  # for a doubling of the learning rate
_ABOUT_FASTEST = 0.02  # the share by which an order of work may be slower than the fastest


def plan(
    model: nn.Sequential | Sequence[nn.Module],
    example: tuple[Tree, Tree],
    loss_fn: LossFn,
    *,
    num_workers: int,
    method: str | Method = "dtrp",
    optimizer: OptimizerFactory | None = None,
    num_microbatches: int | None = None,
    keep: Literal["auto"] | Keep | None = None,
    memory_limit_bytes: int | None = None,
    latency_s: float | None = None,
    bandwidth_bytes_s: float | None = None,
    choose_lead: bool | None = None,
    compensate: bool = False,
    max_batch_size: int | None = None,
    max_delay: int | None = None,
    max_slowdown: float | None = None,
    lr_scaling: Literal["linear", "sqrt", "none"] = "linear",
    alternatives: bool = True,
    device: torch.device | str | None = None,
    neighbours: int | None = None,
    repeats: int = 7,
    autocast: AutocastFactory | None = None,
    progress: Callable[[str], None] | None = None,
) -> Plan:
    """Profile a model and choose how to train it on ``num_workers`` workers.

    Args:
        model: an `nn.Sequential`, or a list of modules, cut anywhere between its layers; or what `dtrp.split` returns,
            better in many stages, of which those of the plan are made. It is left as it is.
        example: a batch (x, y) as `Pipeline.step` takes it; its size is the base mini-batch.
        loss_fn: the loss, as in `Pipeline`.
        num_workers: K.
        method: a name or a `Method`.
        optimizer: makes the optimizer, as in `Pipeline`; None: updates take no time, and the optimizer no memory.
        num_microbatches: A. None: 1, or as many as ``max_delay`` asks for; for a method that flushes, the fastest of K,
            2K, 4K; with ``compensate`` as many as cost nothing, none smaller than the base.
        keep: what stages keep. None: what the method keeps, or with ``compensate`` as ``"auto"``: graphs in each stage
            that has room for them.
        memory_limit_bytes: bytes that a worker may hold.
        latency_s: seconds that a message between workers takes. None: as measured on this machine's loopback, in a few
            seconds.
        bandwidth_bytes_s: bytes per second of a link, in either direction. None: as measured with the latency;
            without bound where that was given, or where the bandwidth was not measurable.
        choose_lead: choose ``ahead`` and the order within a slot by the latency; None: where ``method`` is a name.
        compensate: choose the mini-batch too (batch compensation), and which stages keep their graphs: with no
            ``memory_limit_bytes``, within the memory that fdg needs at the base mini-batch.
        max_batch_size: samples in the largest mini-batch to try; None: 32 times the base.
        max_delay: largest delay, in updates; met by more micro-batches, or with backwards in two parts by an order of
            work with less delay, whichever is faster.
        max_slowdown: of the orders of work, take the one with the least delay whose mini-batch takes no more than this
            share longer than the fastest order's; None: 0.02.
        lr_scaling: how the learning rate grows with the mini-batch.
        alternatives: evaluate the other methods too, and cuts into equal numbers of layers.
        device: device to measure on; None: where the model is.
        neighbours: processes that work at the same time as the measured one. None: as many as there are other workers
            on this machine's CPU, none on an accelerator.
        repeats: rounds of the measurement, of which the median counts; a verdict needs at least 4.
        autocast: makes the region in which steps run, as ``lambda: torch.autocast("cpu", torch.bfloat16)``; None: none.
        progress: called with a line before each longer part.

    Every worker, and the one worker it is compared with, is measured with the torch threads of this process: call
    `torch.set_num_threads` with those of a worker first (1 under torchrun, unless OMP_NUM_THREADS says otherwise).

    Raises:
        PlanError: (a ValueError) what cannot be planned, with what would be possible; arguments out of range.
    """
    row, say = as_method(method), progress or (lambda text: None)
    layers, base = layers_of(model), num_samples(checked_example(example)[0])
    _check_choices(row, keep, lr_scaling)
    _check_number("memory_limit_bytes", memory_limit_bytes, 1)
    _check_number("latency_s", latency_s)
    _check_number("bandwidth_bytes_s", bandwidth_bytes_s, above=True)
    whole("repeats", repeats, error=PlanError)
    _check_sizes(base, len(layers), num_workers, max_batch_size, neighbours)
    chooses_lead = (
        num_workers > 1 and not row.flush and (isinstance(method, str) if choose_lead is None else choose_lead)
    )
    _check_slowdown(max_slowdown, chooses_lead=chooses_lead)
    _check_microbatches(row, base, num_workers, num_microbatches, max_delay, chooses_lead=chooses_lead)
    method_options(row)  # refuses what no file holds
    if neighbours is None:
        on_cpu = (device_of(layer for _, layer in layers) if device is None else torch.device(device)).type == "cpu"
        neighbours = num_workers - 1 if on_cpu else 0
    profiler = Profiler(
        model, example, loss_fn, optimizer=optimizer, predict=row.predict or "rollout", device=device,
        neighbours=neighbours, repeats=repeats, autocast=autocast,
    )  # fmt: skip
    link = _link(num_workers, latency_s, bandwidth_bytes_s, say)
    keep = "auto" if compensate and keep is None else keep
    limit, tied = memory_limit_bytes or math.inf, _tied_cuts(layers)
    search = Search(profiler, num_workers, link, keep, limit, max_delay, num_microbatches, tied, say)
    say(f"profiling {len(layers)} layers")
    builder = _PlanBuilder(search, row, base)
    if compensate:
        builder.choose_batch(max_batch_size or 32 * base)
    builder.choose_cuts()
    builder.compare(alternatives=alternatives)
    if chooses_lead:
        builder.choose_lead(_ABOUT_FASTEST if max_slowdown is None else max_slowdown)
    return builder.plan(model, LR_SCALING[lr_scaling](builder.chosen.batch_size / base))


class _PlanBuilder:
    """The steps of a plan; every step goes on from what those before it have chosen.

    Args:
        search: evaluates methods.
        method: method to plan for.
        base: samples in the base mini-batch.
    """

    def __init__(self, search: Search, method: Method, base: int) -> None:
        self.search, self.method, self.base = search, method, base
        self.batches: list[Evaluated] = []
        self.leads: list[Evaluated] = []
        self.others: dict[str, Evaluated] = {}  # rows of the table, by name
        self.variants: list[str] = []  # names of those in the order of work of the chosen method

    def choose_batch(self, most: int) -> None:
        """The smallest mini-batch of those up to ``most`` samples that comes near the best throughput."""
        if self.search.limit == math.inf:
            free = dataclasses.replace(self.search, max_delay=None, num_microbatches=None, keep=None)
            self.search = dataclasses.replace(self.search, limit=free.evaluate(get_method("fdg"), self.base).memory)
        self.batches = larger_batches(self.search, self.method, self.base, most)

    def choose_cuts(self) -> None:
        """The cuts that are fastest when they are tried."""
        if self.batches:
            best = max(batch.samples_per_s for batch in self.batches)
            first = next(batch for batch in self.batches if batch.samples_per_s >= _SATURATED * best)
            if self.search.max_delay is None:
                self.search = dataclasses.replace(self.search, num_microbatches=first.num_microbatches)
        else:
            first = self.search.evaluate(self.method, self.base)
        self.chosen = self.search.best_of_tried(first)
        self.search = dataclasses.replace(
            self.search,
            slower=statistics.mean(self.chosen.ratios),
            weight_share=statistics.mean(self.chosen.weight_shares),
        )

    def compare(self, *, alternatives: bool) -> None:
        """The same job by one worker, and by ``alternatives``: other methods, and other ways of the chosen method."""
        if alternatives and self.search.num_workers > 1:
            self._add_alternatives()
        self.chosen, self.others, self.one_worker = self.search.in_turns(self.chosen, self.others)
        self.chosen = self.search.with_shares(self.chosen)
        size = self.chosen.batch_size, self.chosen.num_microbatches
        self.batches = [self.chosen if (b.batch_size, b.num_microbatches) == size else b for b in self.batches]

    def _add_alternatives(self) -> None:
        search, chosen = self.search, self.chosen
        usual = dataclasses.replace(search, keep=None, limit=math.inf)
        for other in map(get_method, OTHERS):
            search.say(f"{other.name} for the same job")
            counted = dataclasses.replace(usual, num_microbatches=None) if other.flush else usual
            with suppress(PlanError):  # fewer samples than it needs micro-batches
                self.others[other.name] = counted.evaluate(other, chosen.batch_size)
        variants = {}
        if search.keep == "auto" and (recomputing := search.recomputing(chosen)) is not None:
            variants["recomputing"] = recomputing
        even = equal_cuts(len(search.profiler.names), search.num_workers)
        variants["equal cuts"] = usual.evaluate(chosen.method, chosen.batch_size, cuts=even)
        self.variants = [f"{chosen.method.name}, {way}" for way in variants]
        self.others |= dict(zip(self.variants, variants.values(), strict=True))

    def choose_lead(self, max_slowdown: float) -> None:
        """The order of work with the least delay among those that are about as fast as the fastest."""
        self.search.say("orders of work")
        self.leads = self.search.leads(self.chosen)
        max_delay = math.inf if self.search.max_delay is None else self.search.max_delay
        allowed = [lead for lead in self.leads if lead.delay <= max_delay]
        if not allowed and self.chosen.method.split_backward:
            raise PlanError(
                f"max_delay={max_delay} with num_microbatches={self.chosen.num_microbatches}: the least delay of the orders of "
                f"work is {self.leads[0].delay}; raise it, or pass more micro-batches"
            )
        self.chosen = least_delay(allowed or [self.chosen], max_slowdown)
        for name, other in self.others.items():
            if name in self.variants and other.method.split_backward:  # other stages have orders of their own
                found = [lead for lead in self.search.leads(other) if lead.delay <= max_delay]
                self.others[name] = least_delay(found or [other], max_slowdown)
            elif name in self.variants:
                self.others[name] = self.search.reordered(other, self.chosen.method)

    def plan(self, model: nn.Module | Sequence[nn.Module], lr_scale: float) -> Plan:
        """The plan of what has been chosen."""
        chosen, link, limit = self.chosen, self.search.link, self.search.limit
        others = tuple(dataclasses.replace(other.choice(), method=name) for name, other in self.others.items())
        judgement = Comparison(
            plan=chosen.choice(), one_worker=self.one_worker, others=others, bottleneck=_bottleneck(chosen, link),
            latency_scatter_s=link.latency_s * (link.spread or 0.0), memory_limit_bytes=limit,
            repeats=self.search.profiler.repeats,
        ).judge()  # fmt: skip
        return Plan(
            method=chosen.method.name,
            options=method_options(chosen.method),
            cuts=tuple(chosen.cuts),
            keep=tuple(chosen.keeps),
            num_microbatches=chosen.num_microbatches,
            batch_size=chosen.batch_size,
            lr_scale=lr_scale,
            warmup_updates=math.ceil(_WARMUP_MINIBATCHES * math.log2(lr_scale)) if lr_scale > 1 else 0,
            model=describe_model(model),
            latency_s=link.latency_s,
            bandwidth_bytes_s=link.bandwidth_bytes_s,
            memory_limit_bytes=None if limit == math.inf else int(limit),
            minibatch_s=chosen.minibatch_s,
            one_worker_s=self.one_worker.minibatch_s,
            spread=chosen.spread,
            verdict=judgement.verdict,
            advice=judgement.advice,
            stages=chosen.stages(self.search.profiler.names),
            alternatives=(self.one_worker, *others),
            leads=tuple(lead.choice() for lead in frontier(self.leads, chosen)),
            batches=tuple(batch.choice() for batch in self.batches),
        )


def _bottleneck(chosen: Evaluated, link: LinkSpeed) -> str:
    """What keeps a plan from being faster."""
    slots = chosen.slots_s
    slowest = max(range(len(slots)), key=slots.__getitem__)
    if max(slots) > 1.2 * statistics.mean(slots):
        return f"stage {slowest} takes {1e3 * slots[slowest]:.3g} ms by itself, the slowest of an uneven split"
    if chosen.minibatch_s > 1.2 * max(slots):
        hidden = f": {1e3 * link.latency_s:.3g} ms a message are not hidden"
        return "the workers wait for each other" + ("" if chosen.method.flush else hidden)
    return "stages repeat their forward" if "input" in chosen.keeps else "the work is evenly split"


def _link(
    num_workers: int, latency_s: float | None, bandwidth_bytes_s: float | None, say: Callable[[str], None]
) -> LinkSpeed:
    """The link between two workers, measured where its latency was not given."""
    if num_workers == 1:
        return LinkSpeed(0.0, None)
    if latency_s is not None:
        return LinkSpeed(latency_s, bandwidth_bytes_s)
    say("measuring the link between two workers")
    measured = measure_link()
    if bandwidth_bytes_s is not None:
        return measured._replace(bandwidth_bytes_s=bandwidth_bytes_s)
    if measured.bandwidth_bytes_s is None:
        say("its bandwidth was not measurable, and counts as without bound; pass it if you know it")
    return measured


def _tied_cuts(layers: Sequence[tuple[str, nn.Module]]) -> frozenset[int]:
    """Cuts between layers that share a tensor which two stages would move apart."""
    seen: dict[int, list[int]] = {}
    for place, (_, layer) in enumerate(layers):
        written = (buffer for name, buffer in layer.named_buffers() if writes_buffer(layer, name))
        for tensor in itertools.chain(layer.parameters(), written):
            seen.setdefault(id(tensor), []).append(place)
    return frozenset(cut for places in seen.values() for cut in range(places[0] + 1, places[-1] + 1))


def _check_choices(method: Method, keep: object, lr_scaling: str) -> None:
    if method.local:
        raise PlanError(
            f"method={method.name!r}: a plan is made of the layers' costs, and the auxiliary networks, which depend on "
            "the cuts, are none of them; plan with method='bp' and use its cuts, or simulate with times that you know"
        )
    if lr_scaling not in LR_SCALING:
        raise PlanError(f"lr_scaling={lr_scaling!r}: choose one of {', '.join(map(repr, LR_SCALING))}")
    if keep not in (None, "auto", "graph", "input"):
        raise PlanError(f"keep={keep!r}: pass 'auto', 'graph' or 'input', or leave it out")


def _check_sizes(
    base: int, num_layers: int, num_workers: int, max_batch_size: int | None, neighbours: int | None
) -> None:
    _check_count("neighbours", neighbours, 0)
    if not is_whole(num_workers) or num_workers > num_layers:
        raise PlanError(
            f"num_workers={num_workers!r}: the model has {num_layers} layers; pass a number from 1 to {num_layers}"
        )
    if max_batch_size is not None and not is_whole(max_batch_size, base):
        raise PlanError(
            f"max_batch_size={max_batch_size!r} with an example of {base} samples, the base; pass at least that"
        )


def _check_microbatches(
    method: Method, base: int, num_workers: int, count: int | None, max_delay: int | None, *, chooses_lead: bool
) -> None:
    _check_count("num_microbatches", count)
    _check_count("max_delay", max_delay, 0)
    if count is not None and count > base:
        raise PlanError(f"num_microbatches={count} with an example of {base} samples; each needs one")
    delay = 0 if count is None else steady_delay(method, num_workers, 0, count, 0)
    by_order = chooses_lead and method.split_backward  # an order of work may keep the delay within the bound
    if max_delay is not None and delay > max_delay and not by_order:
        raise PlanError(
            f"num_microbatches={count} leaves a delay of {delay}, and max_delay={max_delay}; pass one of the two"
        )


def _check_slowdown(value: float | None, *, chooses_lead: bool) -> None:
    _check_number("max_slowdown", value)
    if value is not None and not chooses_lead:
        raise PlanError(
            f"max_slowdown={value!r} is for the choice of an order of work, and there is none to make: pass several "
            "workers, the name of a method that does not flush, and not choose_lead=False; or leave it out"
        )


def _check_count(name: str, value: int | None, least: int = 1) -> None:
    if value is not None:
        whole(name, value, least, PlanError)


def _check_number(name: str, value: float | None, least: float = 0, *, above: bool = False) -> None:
    if value is not None and (not is_number(value, least) or (above and value == least)):
        raise PlanError(f"{name}={value!r}: pass a finite number {'above' if above else 'of at least'} {least}")
