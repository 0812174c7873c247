"""The search of a plan: a method for a job, cut, simulated, and tried.

An evaluation profiles the layers on micro-batches of n/A samples, cuts where the slowest stage is fastest (stages keep
their graphs where that is allowed and fits), and simulates the schedule with the times of the stages and links.
"""

from __future__ import annotations

import dataclasses
import math
import operator
import statistics
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, cached_property, partial
from typing import Literal

from ..errors import PlanError
from ..measure.memory import StageSizes, footprint
from ..methods import Keep, Method, get_method
from ..schedule import lead, steady_delay
from ..splitting.stages import equal_cuts
from .balance import cuts_within
from .link_probe import LinkSpeed
from .orders import Parts, find_orders
from .plan_file import Choice, StagePlan, samples_per_s
from .profile import Profiler, StageProfile
from .simulate import Seconds, Simulation, simulate
from .trial import StageTrial, TrialSettings, try_in_turns, try_stages

_LEADS = (1.0, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0, 32.0, 48.0, 64.0)
_LEAST_SCATTER = 0.04  # no stage takes the same time twice
# A wider scatter is that of other programs, or of times too short to measure, and not the stages'. Drawn from, it would
# make times of any size.
_MOST_SCATTER = 0.25
_QUARTILE = statistics.NormalDist().inv_cdf(0.75)
_MOST_TRIED = 5  # cuts
_FEWER = (1, 2, 4, 8)  # micro-batches than those that meet a bound on the delay
_WORTH_TRYING = 1.12  # of the time of the fastest, by the sums of layers
_MINIBATCH_S = operator.attrgetter("minibatch_s")


@dataclass(frozen=True)
class StageOption:
    """Some of the layers as a stage, with a choice of what the stage keeps.

    Attributes:
        method: method, with what this stage keeps.
        num_stages, index: K, and the place of the stage, from 0.
        num_microbatches: A.
        bandwidth_bytes_s: bytes per second of its links.
        layers: time and memory that its layers need.
    """

    method: Method
    num_stages: int
    index: int
    num_microbatches: int
    bandwidth_bytes_s: float
    layers: StageProfile

    @property
    def keep(self) -> Keep:
        """``"input"`` where the stage recomputes."""
        recomputes = self.layers.sizes.trains and self.method.recomputes(self.num_stages, self.index)
        return "input" if recomputes else "graph"

    @property
    def work_s(self) -> float:
        """Seconds of work for a mini-batch, by the sum of the layers."""
        forward_s = self.layers.forward_s + (self.layers.nograd_forward_s if self.keep == "input" else 0.0)
        predicts = self.method.predict is not None and self.index < self.num_stages - 1
        work_s = self.num_microbatches * (forward_s + self.layers.backward_s) + self.layers.update_s
        return work_s + self.layers.predict_s if predicts else work_s

    def parts(self, ratio: float, weight_share: float) -> Parts:
        """Seconds of the parts of a micro-batch; its share of an update is counted to W, of a prediction to F."""
        layers, count = self.layers, self.num_microbatches
        predicts = self.method.predict is not None and self.index < self.num_stages - 1
        repeats = self.keep == "input"
        forward_s = layers.nograd_forward_s if repeats else layers.forward_s
        return Parts(
            forward_s=ratio * (forward_s + (layers.predict_s / count if predicts else 0.0)),
            repeat_s=ratio * layers.forward_s if repeats else 0.0,
            input_s=ratio * (1 - weight_share) * layers.backward_s,
            weight_s=ratio * (weight_share * layers.backward_s + layers.update_s / count),
        )

    def slot_s(self, ratio: float = 1.0) -> float:
        """Seconds for a mini-batch: of its work, ``ratio`` times the sum of the layers, or of its slower link."""
        received = self.layers.sizes.input if self.index else 0.0
        sent = self.layers.sizes.output if self.index < self.num_stages - 1 else 0.0
        return max(ratio * self.work_s, self.num_microbatches * max(received, sent) / self.bandwidth_bytes_s)

    @cached_property
    def memory_bytes(self) -> float:
        """The most that the stage holds."""
        return footprint(self.method, self.num_stages, self.index, self.num_microbatches, self.layers.sizes).total


@dataclass(frozen=True)
class Evaluated:
    """A method for a job, cut and simulated.

    Attributes:
        method: method evaluated.
        num_microbatches, batch_size: A, and samples in a mini-batch.
        cuts: index of the first layer of stages 1..K-1.
        options: the stages, with what they keep.
        ratios: by stage, the time that it takes over the sum of its layers.
        spread: interquartile range of the slowest stage's time, over its median; None: not measurable.
        scatter: as ``spread``, of single steps.
        simulation: the schedule, with times that scatter so.
        weight_shares: by stage, the share of its backward that is its second part, where backwards are in two.
    """

    method: Method
    num_microbatches: int
    batch_size: int
    cuts: list[int]
    options: list[StageOption]
    ratios: list[float]
    spread: float | None
    scatter: float | None
    simulation: Simulation
    weight_shares: list[float]

    @property
    def keeps(self) -> list[Keep]:
        return [option.keep for option in self.options]

    @property
    def delay(self) -> int:
        """The largest delay, in updates."""
        return steady_delay(self.method, len(self.options), 0, self.num_microbatches, 0)

    @property
    def minibatch_s(self) -> float:
        return self.simulation.minibatch_s

    @property
    def slots_s(self) -> list[float]:
        """By stage, seconds for a mini-batch: of its work, or of its link if that is more."""
        return [option.slot_s(ratio) for option, ratio in zip(self.options, self.ratios, strict=True)]

    @property
    def samples_per_s(self) -> float:
        return self.batch_size / self.minibatch_s if self.minibatch_s else math.inf

    @property
    def memory(self) -> int:
        """Bytes of the stage that holds most."""
        return math.ceil(max(option.memory_bytes for option in self.options))

    def stages(self, names: Sequence[str]) -> tuple[StagePlan, ...]:
        """The stages as a plan tells of them; ``names`` are those of the layers."""
        bounds = [0, *self.cuts, len(names)]
        used = self.simulation.utilization
        return tuple(
            StagePlan(
                tuple(names[bounds[k] : bounds[k + 1]]),
                option.keep,
                slot_s,
                math.ceil(option.memory_bytes),
                used[k],
                self.weight_shares[k] if self.method.split_backward else None,
            )
            for k, (option, slot_s) in enumerate(zip(self.options, self.slots_s, strict=True))
        )

    def choice(self) -> Choice:
        """This evaluation as a row of a plan's tables."""
        return Choice(
            method=self.method.name,
            ahead=self.method.ahead,
            order="backward-first" if self.method.backward_first else "forward-first",
            num_workers=len(self.options),
            num_microbatches=self.num_microbatches,
            batch_size=self.batch_size,
            cuts=tuple(self.cuts),
            minibatch_s=self.minibatch_s,
            spread=self.spread,
            samples_per_s=samples_per_s(self.batch_size, self.minibatch_s),
            memory_bytes=self.memory,
            delay=self.delay,
            utilization=tuple(self.simulation.utilization.values()),
            leads=self.method.leads,
            orders=self.method.orders,
        )


@dataclass(frozen=True)
class Search:
    """What all evaluations of a plan share.

    Attributes:
        profiler: measures the layers.
        num_workers: K.
        link: latency and bandwidth between workers.
        keep: what stages keep; ``"auto"``: graphs where they fit; None: what the method says.
        limit: bytes that a worker may hold.
        max_delay: updates; met by more micro-batches. None: any delay.
        num_microbatches: A; None: as many as the method or ``max_delay`` asks for.
        forbidden: cuts that would part a tensor from itself.
        say: called with a line before a longer part.
        slower: time that a stage takes over the sum of its layers.
        weight_share: share of a backward that is its second part, where that has not been measured.
    """

    profiler: Profiler
    num_workers: int
    link: LinkSpeed
    keep: Literal["auto"] | Keep | None
    limit: float
    max_delay: int | None
    num_microbatches: int | None
    forbidden: frozenset[int]
    say: Callable[[str], None]
    slower: float = 1.0
    weight_share: float = 0.5

    def evaluate(
        self, method: Method, batch_size: int, *, cuts: list[int] | None = None, like: Evaluated | None = None
    ) -> Evaluated:
        """A method at the cuts and the A that are best for it.

        Args:
            method: method to evaluate.
            batch_size: samples in a mini-batch.
            cuts: index of the first layer of stages 1..K-1, where they are known.
            like: an evaluation of the same stages, which have been tried.
        """
        counts = self._microbatch_counts(method, batch_size)
        tried = _all_possible(partial(self._evaluate_with, method, batch_size, count, cuts, like) for count in counts)
        return min(tried, key=_MINIBATCH_S)

    def _microbatch_counts(self, method: Method, batch_size: int) -> list[int]:
        """The numbers of micro-batches to evaluate."""
        if self.num_microbatches is not None:
            return [self.num_microbatches]
        if self.num_workers == 1:
            return [1]
        if method.flush:
            if batch_size < self.num_workers:
                raise PlanError(f"a mini-batch of {batch_size} samples has fewer than {self.num_workers} micro-batches")
            # Of two samples at least: not every layer trains on one.
            counts = [factor * self.num_workers for factor in (2, 4) if 2 * factor * self.num_workers <= batch_size]
            return [self.num_workers, *counts]
        max_delay = math.inf if self.max_delay is None else self.max_delay
        for count in range(1, batch_size + 1):
            delay = steady_delay(method, self.num_workers, 0, count, 0)
            if delay <= max_delay:
                return [count]
        raise PlanError(
            f"max_delay={self.max_delay} with mini-batches of {batch_size} samples: as many micro-batches leave a "
            f"delay of {delay}; raise it, or take a method that flushes"
        )

    def _evaluate_with(
        self,
        method: Method,
        batch_size: int,
        num_microbatches: int,
        cuts: list[int] | None = None,
        like: Evaluated | None = None,
    ) -> Evaluated:
        """A method with so many micro-batches, at other cuts than ``cuts`` where those do not fit the memory."""
        profile = self.profiler.at(math.ceil(batch_size / num_microbatches))
        num_layers, num_stages = len(profile.layers), self.num_workers
        keeps: Sequence[Keep] = ("graph", "input") if self.keep == "auto" else (self.keep or method.keep,)
        rows = [method.keeping(keep) for keep in keeps]

        @cache
        def best(first: int, end: int, stage: int) -> StageOption:
            common = num_stages, stage, num_microbatches, self.bandwidth_bytes_s, profile.stage(first, end)
            return self._fastest([StageOption(row, *common) for row in rows])

        def slot_s(first: int, end: int, stage: int) -> float:
            return best(first, end, stage).slot_s()

        def memory_bytes(first: int, end: int, stage: int) -> float:
            return best(first, end, stage).memory_bytes

        if cuts is None:
            cuts = cuts_within(num_layers, num_stages, slot_s, memory_bytes, self.limit, self.forbidden)
        options = list(map(best, [0, *cuts], [*cuts, num_layers], range(num_stages)))
        if max(option.memory_bytes for option in options) > self.limit:  # at cuts that were given
            return self._evaluate_with(method, batch_size, num_microbatches)
        ratios = [self.slower] * num_stages if like is None else like.ratios
        shares = [self.weight_share] * num_stages if like is None else like.weight_shares
        spread, scatter = (profile.spread, profile.spread) if like is None else (like.spread, like.scatter)
        simulation = self._simulate(method, options, ratios, scatter, shares)
        return Evaluated(
            method, num_microbatches, batch_size, cuts, options, ratios, spread, scatter, simulation, shares
        )

    def _fastest(self, options: Sequence[StageOption]) -> StageOption:
        """The fastest option that fits the memory, else the smallest; of equals the first."""
        if self.limit == math.inf:
            return min(options, key=StageOption.slot_s)
        fitting = [option for option in options if option.memory_bytes <= self.limit]
        if not fitting:
            return min(options, key=lambda option: option.memory_bytes)
        return min(fitting, key=lambda option: (option.slot_s(), option.memory_bytes))

    def _simulate(
        self,
        method: Method,
        options: Sequence[StageOption],
        ratios: Sequence[float],
        scatter: float | None,
        weight_shares: Sequence[float],
    ) -> Simulation:
        def times(name: str) -> list[Seconds]:
            medians = [ratio * getattr(option.layers, name) for ratio, option in zip(ratios, options, strict=True)]
            return [lognormal(median, scatter) for median in medians]

        num_microbatches = options[0].num_microbatches
        minibatches = 4 * math.ceil((lead(method, len(options), 0) + 1) / num_microbatches) + 20
        return simulate(
            method,
            num_stages=len(options),
            num_minibatches=max(200, 4 * minibatches),
            num_microbatches=num_microbatches,
            forward_s=times("forward_s"),
            backward_s=times("backward_s"),
            weight_share=weight_shares,
            nograd_forward_s=times("nograd_forward_s"),
            update_s=times("update_s"),
            predict_s=times("predict_s"),
            latency_s=self.link.latency_s,
            bandwidth_bytes_s=self.bandwidth_bytes_s,
            message_bytes=[option.layers.sizes.output for option in options[:-1]],
            keep=[option.keep for option in options],
        )

    @property
    def bandwidth_bytes_s(self) -> float:
        """Bytes per second of a link; without bound where that is not known."""
        return math.inf if self.link.bandwidth_bytes_s is None else self.link.bandwidth_bytes_s

    @property
    def _tries(self) -> bool:
        """Whether stages are tried: accelerators are profiled as they run."""
        return self.profiler.device.type == "cpu"

    def tried(self, untried: Evaluated) -> Evaluated:
        """With the times of its stages corrected by some steps of them."""
        if not self._tries:
            return untried
        self.say(f"trying the stages on mini-batches of {untried.batch_size}")
        return self._corrected(untried, self._trials(untried))

    def _trials(self, untried: Evaluated) -> list[StageTrial]:
        return try_stages(self.profiler, _settings(untried), untried.batch_size)

    def with_shares(self, chosen: Evaluated) -> Evaluated:
        """With the measured shares of its backwards' second parts, where trials have not measured them yet."""
        if self._tries or not chosen.method.split_backward:
            return chosen
        self.say("the two parts of the stages' backwards")
        shares = _weight_shares(chosen, self._trials(chosen))
        simulation = self._simulate(chosen.method, chosen.options, chosen.ratios, chosen.scatter, shares)
        return dataclasses.replace(chosen, weight_shares=shares, simulation=simulation)

    def _corrected(self, untried: Evaluated, trials: Sequence[StageTrial]) -> Evaluated:
        """With the times of its stages as in these trials."""
        pairs = zip(trials, untried.options, strict=True)
        ratios = [trial.minibatch_s / option.work_s if option.work_s else 1.0 for trial, option in pairs]
        slowest = max(trials, key=lambda trial: trial.minibatch_s)
        shares = _weight_shares(untried, trials)
        simulation = self._simulate(untried.method, untried.options, ratios, slowest.scatter, shares)
        return dataclasses.replace(
            untried, ratios=ratios, spread=slowest.spread, scatter=slowest.scatter, simulation=simulation,
            weight_shares=shares,
        )  # fmt: skip

    def in_turns(
        self, chosen: Evaluated, others: Mapping[str, Evaluated]
    ) -> tuple[Evaluated, dict[str, Evaluated], Choice]:
        """The chosen evaluation, others, and one worker alone on the machine, with times that were measured in turns.

        Rows with the same work are measured as one: they differ by their order of work alone. Others that cannot train
        with this model and optimizer are left out.
        """
        batch_size = chosen.batch_size
        if not self._tries:
            self.say("one worker")
            profile = self.profiler.at(batch_size, neighbours=0)
            whole = profile.whole
            minibatch_s = whole.forward_s + whole.backward_s + whole.update_s
            return chosen, dict(others), _one_worker(batch_size, minibatch_s, profile.spread, whole.sizes)
        settings: dict[Hashable, TrialSettings] = {_work(chosen): _settings(chosen)}
        for row in others.values():
            settings.setdefault(_work(row), dataclasses.replace(_settings(row), optional=True))
        self.say(f"one worker and {len(settings)} pipelines, in turns")
        alone = TrialSettings(get_method("bp"), (), ("graph",), 1, alone=True)
        alone_trials, *trials = try_in_turns(self.profiler, [alone, *settings.values()], batch_size)
        by_work = {work: trial for work, trial in zip(settings, trials, strict=True) if trial is not None}
        corrected = {
            name: self._corrected(row, by_work[_work(row)]) for name, row in others.items() if _work(row) in by_work
        }
        for name in others:
            if name not in corrected:
                self.say(f"{name} cannot train this model with this optimizer, and is left out")
        assert alone_trials is not None
        (trial,) = alone_trials
        one_worker = _one_worker(batch_size, trial.minibatch_s, trial.spread, self.profiler.at(batch_size).whole.sizes)
        return self._corrected(chosen, by_work[_work(chosen)]), corrected, one_worker

    def reordered(self, row: Evaluated, method: Method) -> Evaluated:
        """The same stages in another order of work of their method."""
        options = [dataclasses.replace(o, method=method.keeping(o.method.keep)) for o in row.options]
        simulation = self._simulate(method, options, row.ratios, row.scatter, row.weight_shares)
        return dataclasses.replace(row, method=method, options=options, simulation=simulation)

    def best_of_tried(self, first: Evaluated) -> Evaluated:
        """The fastest, when tried, of the cuts found, cuts into equal numbers of layers, and cuts moved by a layer.

        Sums of layers are good to some percent, and which of two cuts is better is often a matter of less.
        """
        if not self._tries or self.num_workers == 1:
            return first
        tried: dict[tuple[int, ...], Evaluated] = {}
        known = {tuple(first.cuts): first}
        best = first
        while len(tried) < _MOST_TRIED:
            for cuts in self._near(best.cuts):
                if cuts not in known:
                    moved = self._evaluate_with(first.method, first.batch_size, first.num_microbatches, list(cuts))
                    if tuple(moved.cuts) == cuts:  # else they do not fit the memory
                        known[cuts] = moved
            limit = _WORTH_TRYING * min(map(_MINIBATCH_S, known.values()))
            untried = [cuts for cuts in known if cuts not in tried and known[cuts].minibatch_s <= limit]
            if not untried:
                break
            cuts = min(untried, key=lambda cuts: (cuts != tuple(first.cuts), known[cuts].minibatch_s))
            tried[cuts] = self.tried(known[cuts])
            best = min(tried.values(), key=_MINIBATCH_S)
        return best

    def _near(self, cuts: Sequence[int]) -> list[tuple[int, ...]]:
        """Cuts into equal numbers of layers, and these cuts with a cut moved by a layer, where that is allowed."""
        num_layers = len(self.profiler.names)
        moved = [[*cuts[:k], cuts[k] + step, *cuts[k + 1 :]] for k in range(len(cuts)) for step in (-1, 1)]
        near = [equal_cuts(num_layers, self.num_workers), *moved]
        rising = [cuts for cuts in near if [0, *cuts, num_layers] == sorted({0, *cuts, num_layers})]
        return [tuple(cuts) for cuts in rising if not self.forbidden.intersection(cuts)]

    def leads(self, chosen: Evaluated) -> list[Evaluated]:
        """The same method in other orders of work, at the same cuts."""
        if chosen.method.split_backward:
            return self._found_orders(chosen)

        def order(method: Method) -> tuple[tuple[int, ...], bool]:
            return tuple(lead(method, self.num_workers, k) for k in range(self.num_workers)), method.backward_first

        known = {order(chosen.method): chosen}
        best, stale = chosen.minibatch_s, 0
        for ahead in _LEADS:
            for backward_first in (True, False):
                method = dataclasses.replace(chosen.method, ahead=ahead, backward_first=backward_first)
                if order(method) not in known:
                    with suppress(PlanError):  # a longer lead does not fit the memory
                        known[order(method)] = self.evaluate(method, chosen.batch_size, cuts=chosen.cuts, like=chosen)
            fastest = min(map(_MINIBATCH_S, known.values()))
            stale = 0 if fastest < 0.99 * best else stale + 1
            best = min(best, fastest)
            if ahead > chosen.method.ahead and stale >= 3:  # more of it brings nothing
                break
        return sorted(known.values(), key=lambda evaluated: (evaluated.delay, evaluated.method.ahead))

    def _found_orders(self, chosen: Evaluated) -> list[Evaluated]:
        """The same method in the orders that a search finds for the stages' parts; also with fewer micro-batches.

        A bound on the delay is met by more micro-batches, or by an order with less delay, whichever is faster.
        """
        counts = [chosen.num_microbatches]
        if self.max_delay is not None and self.num_microbatches is None:
            counts += [count for count in _FEWER if count < chosen.num_microbatches]
        known = [chosen]
        for count in counts:
            search = dataclasses.replace(self, num_microbatches=count)
            same = chosen
            if count != chosen.num_microbatches:
                same = search.evaluate(chosen.method, chosen.batch_size, cuts=chosen.cuts, like=chosen)
            times = zip(same.options, same.ratios, same.weight_shares, strict=True)
            parts = [option.parts(ratio, share) for option, ratio, share in times]
            sent = [option.layers.sizes.output / self.bandwidth_bytes_s for option in same.options[:-1]]
            links_s = [self.link.latency_s + seconds for seconds in sent]
            for found in find_orders(parts, links_s, repeats=chosen.method.keep == "input"):
                method = dataclasses.replace(chosen.method, leads=found.leads, orders=found.orders)
                with suppress(PlanError):  # it does not fit the memory
                    known.append(search.evaluate(method, chosen.batch_size, cuts=same.cuts, like=same))
        return sorted(known, key=lambda evaluated: (evaluated.delay, evaluated.minibatch_s))

    def recomputing(self, chosen: Evaluated) -> Evaluated | None:
        """The same job at the same cuts, where stages recompute as their method says; None: that is what was chosen."""
        usual = dataclasses.replace(self, num_microbatches=chosen.num_microbatches, keep=None, limit=math.inf)
        same = usual.evaluate(chosen.method, chosen.batch_size, cuts=chosen.cuts, like=chosen)
        return same if same.keeps != chosen.keeps and "input" in same.keeps else None


def _settings(row: Evaluated) -> TrialSettings:
    """The stages to try."""
    return TrialSettings(row.method, row.cuts, row.keeps, row.num_microbatches)


def _work(row: Evaluated) -> Hashable:
    """The same for rows that do the same work, whatever its order and the method's name."""
    method = row.method
    if not method.flush:
        method = dataclasses.replace(method, leads=None, orders=None)
        # A stage may predict, and repeat its forward, only where its forwards run ahead.
        ahead = 2.0 if lead(method, len(row.options), 0) else 1.0
        method = dataclasses.replace(method, name="any", ahead=ahead, backward_first=False)
    return method, tuple(row.cuts), tuple(row.keeps), row.num_microbatches


def _weight_shares(row: Evaluated, trials: Sequence[StageTrial]) -> list[float]:
    """By stage, the share that its trial has shown; as before, where it shows none."""
    shares = zip(trials, row.weight_shares, strict=True)
    return [before if trial.weight_share is None else trial.weight_share for trial, before in shares]


def _one_worker(batch_size: int, minibatch_s: float, spread: float | None, sizes: StageSizes) -> Choice:
    """Backpropagation without a pipeline."""
    return Choice(
        method="one worker", ahead=1, order="forward-first", num_workers=1, num_microbatches=1,
        batch_size=batch_size, cuts=(), minibatch_s=minibatch_s, spread=spread,
        samples_per_s=samples_per_s(batch_size, minibatch_s),
        memory_bytes=math.ceil(footprint(get_method("bp"), 1, 0, 1, sizes).total), delay=0, utilization=(1.0,),
    )  # fmt: skip


def larger_batches(search: Search, method: Method, base: int, most: int) -> list[Evaluated]:
    """Mini-batches from the base on, doubling while they fit and until twice the size brings nothing.

    Where nothing says how many micro-batches, a larger mini-batch is cut into parts of the base's size or more: into as
    many as cost nothing, since every part lessens the delay.

    Args:
        search: evaluates the mini-batches.
        method: method to evaluate.
        base: samples in the smallest mini-batch.
        most: samples in the largest mini-batch.
    """
    evaluated: list[Evaluated] = []
    size, stale = base, 0
    while size <= most and stale < 2:
        search.say(f"mini-batches of {size}")
        free = search.num_microbatches is None and search.max_delay is None and not method.flush
        counts = [2**n for n in range((size // base).bit_length())] if free else [search.num_microbatches]
        searches = [dataclasses.replace(search, num_microbatches=count) for count in counts]
        try:
            options = _all_possible(partial(counted.evaluate, method, size) for counted in searches)
        except PlanError:
            if not evaluated:
                raise
            break
        tried = search.tried(max(about_fastest(options), key=lambda option: option.num_microbatches))
        best = max((other.samples_per_s for other in evaluated), default=0.0)
        stale = stale + 1 if tried.samples_per_s < 1.02 * best else 0
        evaluated.append(tried)
        size *= 2
    return evaluated


def about_fastest(evaluated: Sequence[Evaluated], slower: float = 0.02) -> list[Evaluated]:
    """The fastest evaluation, and those that take no more than a share of ``slower`` longer."""
    limit = (1 + slower) * min(map(_MINIBATCH_S, evaluated))
    return [option for option in evaluated if option.minibatch_s <= limit]


def least_delay(orders: Sequence[Evaluated], slower: float) -> Evaluated:
    """The evaluation with the least delay among those that are about as fast as the fastest."""
    return min(about_fastest(orders, slower), key=lambda order: (order.delay, order.method.ahead, order.minibatch_s))


def frontier(leads: Sequence[Evaluated], chosen: Evaluated) -> list[Evaluated]:
    """For each delay the fastest, as long as more delay makes it faster; and the chosen one, which is about as fast."""
    order = operator.attrgetter("delay", "minibatch_s")
    fastest: list[Evaluated] = []
    for evaluated in sorted(leads, key=order):
        if not fastest or evaluated.minibatch_s < 0.999 * fastest[-1].minibatch_s:
            fastest.append(evaluated)
    if leads and chosen not in fastest:
        fastest.append(chosen)
    return sorted(fastest, key=order)


def _all_possible(evaluations: Iterable[Callable[[], Evaluated]]) -> list[Evaluated]:
    """The evaluations that can be made (another number of micro-batches may fit); raises where none can."""
    made: list[Evaluated] = []
    failures: list[PlanError] = []
    for evaluate in evaluations:
        try:
            made.append(evaluate())
        except PlanError as error:
            failures.append(error)
    if not made:
        raise failures[-1]
    return made


def lognormal(median: float, scatter: float | None) -> Seconds:
    """Times around ``median`` s with a relative interquartile range of ``scatter``, within what stages may scatter."""
    if median <= 0:
        return 0.0
    bounded = min(max(scatter or 0.0, _LEAST_SCATTER), _MOST_SCATTER)
    mu, sigma = math.log(median), math.asinh(bounded / 2) / _QUARTILE
    return lambda random: random.lognormvariate(mu, sigma)
