"""The search of a plan: a method for a job, cut, simulated, and tried.

An evaluation profiles the layers on micro-batches of n/A, cuts where the slowest stage is fastest (each stage keeping its
graph where that is allowed and fits), and simulates the schedule with the times of the stages and links.
"""

from __future__ import annotations

import dataclasses
import enum
import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, Literal

from ..measure.memory import footprint
from ..methods import Keep, Method, get_method
from ..schedule import lead, steady_delay
from ..splitting.stages import equal_cuts
from .balance import partition
from .link_probe import LinkSpeed
from .plan_file import Choice, PlanError, StagePlan
from .profile import Profiler, StageProfile
from .simulate import Seconds, Simulation, simulate

SLOWER = 1.02  # what is this much slower than the fastest is as fast
_LEADS = (1.0, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0, 32.0, 48.0, 64.0)
_LEAST_JITTER = 0.03  # no stage takes the same time twice
_TRIAL_STEPS = 12
_MOST_TRIED = 5  # cuts
_WORTH_TRYING = 1.12  # of the time of the fastest, by the sums of layers


@dataclass(frozen=True)
class Evaluated:
    """A method for a job, cut and simulated."""

    method: Method
    num_microbatches: int
    batch_size: int
    cuts: list[int]
    keeps: list[Keep]
    work_s: list[float]  # of each stage, a mini-batch
    wire_s: list[float]  # of its slower link, a mini-batch
    bytes: list[float]
    delay: int
    ratios: list[float]  # of what each stage takes, to the sum of its layers
    spread: float  # of its times
    simulation: Simulation  # with times that scatter so

    @property
    def minibatch_s(self) -> float:
        return self.simulation.minibatch_s

    @property
    def slots_s(self) -> list[float]:
        """What a stage takes for a mini-batch, or its link if that is more."""
        return [max(pair) for pair in zip(self.work_s, self.wire_s, strict=True)]

    @property
    def samples_per_s(self) -> float:
        return self.batch_size / self.minibatch_s

    @property
    def memory(self) -> int:
        return math.ceil(max(self.bytes))

    def stages(self, names: Sequence[str]) -> tuple[StagePlan, ...]:
        bounds = [0, *self.cuts, len(names)]
        return tuple(
            StagePlan(
                layers=tuple(names[bounds[k] : bounds[k + 1]]),
                keep=keep,
                slot_s=self.slots_s[k],
                memory_bytes=math.ceil(self.bytes[k]),
                utilization=self.simulation.utilization[k],
            )
            for k, keep in enumerate(self.keeps)
        )

    def choice(self) -> Choice:
        return Choice(
            method=self.method.name,
            ahead=self.method.ahead,
            order="backward-first" if self.method.backward_first else "forward-first",
            num_workers=len(self.keeps),
            num_microbatches=self.num_microbatches,
            batch_size=self.batch_size,
            cuts=tuple(self.cuts),
            minibatch_s=self.minibatch_s,
            samples_per_s=self.samples_per_s,
            memory_bytes=self.memory,
            delay=self.delay,
            utilization=tuple(self.simulation.utilization.values()),
        )


class _Plans(enum.Enum):
    """For an argument that is the plan's own unless another is given; None is another."""

    OWN = enum.auto()


@dataclass(frozen=True)
class Search:
    """What all evaluations of one plan share."""

    profiler: Profiler
    num_workers: int
    link: LinkSpeed
    keep: Literal["auto"] | Keep | None
    limit: float | None
    max_delay: int | None
    num_microbatches: int | None
    forbidden: frozenset[int]  # cuts that would part a tensor from itself
    say: Callable[[str], None]
    slower: float = 1.0  # what a stage takes, over the sum of its layers

    def evaluate(
        self,
        method: Method,
        batch_size: int,
        *,
        keep: Literal["auto"] | Keep | _Plans | None = _Plans.OWN,
        limit: float | _Plans | None = _Plans.OWN,
        own: bool = True,
        cuts: list[int] | None = None,
        like: Evaluated | None = None,
    ) -> Evaluated:
        """A method at its best cuts and A.

        Args:
            method: the row.
            batch_size: samples in a mini-batch.
            keep: what stages keep; the plan's, unless given.
            limit: bytes of a worker; the plan's, unless given.
            own: whether the plan's own A counts for it.
            cuts: where they are known.
            like: has the same stages, which have been tried.
        """
        keep = self.keep if isinstance(keep, _Plans) else keep
        limit = self.limit if isinstance(limit, _Plans) else limit
        tried: list[Evaluated] = []
        failed: PlanError | None = None
        for num in self._microbatches(method, batch_size, own=own):
            try:
                tried.append(self._at(method, batch_size, num, keep, limit, cuts, like))
            except PlanError as error:  # more micro-batches may fit
                failed = error
        if failed is not None and not tried:
            raise failed
        return min(tried, key=lambda each: each.minibatch_s)

    def _microbatches(self, method: Method, batch_size: int, *, own: bool) -> list[int]:
        if own and self.num_microbatches is not None:
            return [self.num_microbatches]
        if self.num_workers == 1:
            return [1]
        if method.flush:
            if batch_size < self.num_workers:
                raise PlanError(f"a mini-batch of {batch_size} samples has fewer than {self.num_workers} micro-batches")
            # Of two samples at least: not every layer trains on one.
            counts = [factor * self.num_workers for factor in (2, 4) if 2 * factor * self.num_workers <= batch_size]
            return [self.num_workers, *counts]
        if self.max_delay is None:
            return [1]
        for num in range(1, batch_size + 1):
            if steady_delay(method, self.num_workers, 0, num, 0) <= self.max_delay:
                return [num]
        raise PlanError(
            f"max_delay={self.max_delay} with mini-batches of {batch_size} samples: as many micro-batches leave a delay of "
            f"{steady_delay(method, self.num_workers, 0, batch_size, 0)}; raise it, or take a method that flushes"
        )

    def _at(
        self,
        method: Method,
        batch_size: int,
        num_microbatches: int,
        keep: Literal["auto"] | Keep | None,
        limit: float | None,
        cuts: list[int] | None,
        like: Evaluated | None,
    ) -> Evaluated:
        profile = self.profiler.at(math.ceil(batch_size / num_microbatches))
        num_stages, num_layers = self.num_workers, len(profile.layers)
        keeps: Sequence[Keep] = ("graph", "input") if keep == "auto" else (keep or method.keep,)
        rows = {one: method.keeping(one) for one in keeps}

        def best(first: int, end: int, stage: int) -> tuple[float, float, Keep]:
            """(seconds a mini-batch, bytes, what it keeps): the fastest that fits, else the smallest."""
            own = profile.stage(first, end)
            options = []
            for one in keeps:
                needs = (
                    footprint(rows[one], num_stages, stage, num_microbatches, own.sizes).total
                    if limit is not None
                    else 0.0
                )
                recomputes = own.sizes.trains and rows[one].recomputes(num_stages, stage)
                work = self._work_s(own, method, stage, num_microbatches, recomputes)
                options.append((max(work, self._wire_s(own, stage, num_microbatches)), needs, one))
            fitting = [option for option in options if limit is None or option[1] <= limit]
            return min(fitting) if fitting else min(options, key=lambda option: option[1])

        if cuts is None:
            cuts = partition(
                num_layers,
                num_stages,
                lambda first, end, stage: best(first, end, stage)[0],
                (lambda first, end, stage: best(first, end, stage)[1]) if limit is not None else None,
                limit,
                self.forbidden,
            )
        bounds = [0, *cuts, num_layers]
        spans = [(bounds[k], bounds[k + 1], k) for k in range(num_stages)]
        chosen = [best(*span) for span in spans]
        stages = [profile.stage(first, end) for first, end, _ in spans]
        chosen_keeps: list[Keep] = [
            "input" if own.sizes.trains and rows[one].recomputes(num_stages, k) else "graph"
            for k, (own, (_, _, one)) in enumerate(zip(stages, chosen, strict=True))
        ]
        needs = [
            footprint(method.keeping(one), num_stages, k, num_microbatches, own.sizes).total
            for k, (own, (_, _, one)) in enumerate(zip(stages, chosen, strict=True))
        ]
        if limit is not None and max(needs) > limit:  # of cuts that were given
            return self._at(method, batch_size, num_microbatches, keep, limit, None, None)
        ratios = [self.slower] * num_stages if like is None else like.ratios
        spread = profile.spread if like is None else like.spread
        return Evaluated(
            method=method,
            num_microbatches=num_microbatches,
            batch_size=batch_size,
            cuts=list(cuts),
            keeps=chosen_keeps,
            work_s=[
                ratio * self._work_s(own, method, k, num_microbatches, chosen_keeps[k] == "input")
                for k, (ratio, own) in enumerate(zip(ratios, stages, strict=True))
            ],
            wire_s=[self._wire_s(own, k, num_microbatches) for k, own in enumerate(stages)],
            bytes=needs,
            delay=max(steady_delay(method, num_stages, k, num_microbatches, 0) for k in range(num_stages)),
            ratios=ratios,
            spread=spread,
            simulation=self._simulate(method, num_microbatches, stages, chosen_keeps, ratios, spread),
        )

    def tried(self, each: Evaluated) -> Evaluated:
        """With the times of its stages corrected by some steps of them; accelerators are profiled as they run."""
        if self.profiler.device.type != "cpu":
            return each
        self.say(f"trying the stages on mini-batches of {each.batch_size}")
        trials = self.profiler.try_stages(
            each.method, each.cuts, each.keeps, each.num_microbatches, each.batch_size, steps=_TRIAL_STEPS
        )
        sums = [work / ratio for work, ratio in zip(each.work_s, each.ratios, strict=True)]
        ratios = [trial.minibatch_s / own for trial, own in zip(trials, sums, strict=True)]
        spread = statistics.median(trial.spread for trial in trials)
        like = dataclasses.replace(each, ratios=ratios, spread=spread)
        return self._at(each.method, each.batch_size, each.num_microbatches, self.keep, self.limit, each.cuts, like)

    def best_of_tried(self, first: Evaluated) -> Evaluated:
        """Of the cuts found, cuts into equal numbers of layers, and these cuts moved by a layer: the fastest when tried.

        Sums of layers are good to some percent, and which of two cuts is better is often a matter of less.
        """
        if self.profiler.device.type != "cpu" or self.num_workers == 1:
            return first
        tried: dict[tuple[int, ...], Evaluated] = {}
        known = {tuple(first.cuts): first}
        best = first
        while len(tried) < _MOST_TRIED:
            for cuts in self._near(best.cuts):
                if cuts not in known:
                    each = self._at(
                        first.method, first.batch_size, first.num_microbatches, self.keep, self.limit, list(cuts), None
                    )
                    if tuple(each.cuts) == cuts:  # else they do not fit the memory
                        known[cuts] = each
            fastest = min(each.minibatch_s for each in known.values())
            left = [
                cuts
                for cuts, each in known.items()
                if each.minibatch_s <= _WORTH_TRYING * fastest and cuts not in tried
            ]
            if not left:
                break
            cuts = min(left, key=lambda cuts: (cuts != tuple(first.cuts), known[cuts].minibatch_s))
            tried[cuts] = self.tried(known[cuts])
            best = min(tried.values(), key=lambda each: each.minibatch_s)
        return best

    def _near(self, cuts: Sequence[int]) -> list[tuple[int, ...]]:
        """Cuts into equal numbers of layers, and these cuts with one moved by a layer; those that may be."""
        num_layers = len(self.profiler.names)
        near = [tuple(equal_cuts(num_layers, self.num_workers))]
        for place, step in itertools.product(range(len(cuts)), (-1, 1)):
            near.append(tuple(cut + step * (k == place) for k, cut in enumerate(cuts)))
        return [
            moved
            for moved in near
            if all(a < b for a, b in itertools.pairwise([0, *moved, num_layers]))
            and not self.forbidden.intersection(moved)
        ]

    def _work_s(self, own: StageProfile, method: Method, stage: int, num_microbatches: int, recomputes: bool) -> float:
        forward = own.nograd_forward_s + own.forward_s if recomputes else own.forward_s
        work = num_microbatches * (forward + own.backward_s) + own.update_s
        return work + own.predict_s if method.predict is not None and stage < self.num_workers - 1 else work

    def _wire_s(self, own: StageProfile, stage: int, num_microbatches: int) -> float:
        messages = [own.sizes.output] if stage < self.num_workers - 1 else []
        messages += [own.sizes.input] if stage else []
        return max((num_microbatches * size / self.link.bandwidth_bytes_s for size in messages), default=0.0)

    def _simulate(
        self,
        method: Method,
        num_microbatches: int,
        stages: Sequence[StageProfile],
        keeps: Sequence[Keep],
        ratios: Sequence[float],
        spread: float,
    ) -> Simulation:
        sigma = max(_LEAST_JITTER, spread / 1.35)  # of a normal distribution with that interquartile range

        def times(name: str) -> list[Seconds]:
            return [
                _lognormal(ratio * getattr(stage, name), sigma) for ratio, stage in zip(ratios, stages, strict=True)
            ]

        longest = lead(method, len(stages), 0)
        minibatches = 4 * math.ceil((longest + 1) / num_microbatches) + 20
        return simulate(
            method,
            num_stages=len(stages),
            num_minibatches=max(200, 4 * minibatches),
            num_microbatches=num_microbatches,
            forward_s=times("forward_s"),
            backward_s=times("backward_s"),
            nograd_forward_s=times("nograd_forward_s"),
            update_s=times("update_s"),
            predict_s=times("predict_s"),
            latency_s=self.link.latency_s,
            bandwidth_bytes_s=self.link.bandwidth_bytes_s,
            message_bytes=[stage.sizes.output for stage in stages[:-1]],
            keep=list(keeps),
        )

    def leads(self, chosen: Evaluated) -> list[Evaluated]:
        """The same method in other orders of work, at the same cuts."""
        own = chosen.method
        known = {self._leads_of(own): chosen}
        best, since = chosen.minibatch_s, 0
        for ahead in _LEADS:
            for backward_first in (True, False):
                row = dataclasses.replace(own, ahead=ahead, backward_first=backward_first)
                if self._leads_of(row) not in known:
                    try:
                        known[self._leads_of(row)] = self.evaluate(
                            row, chosen.batch_size, cuts=chosen.cuts, like=chosen
                        )
                    except PlanError:  # a longer lead does not fit the memory
                        continue
            fastest = min(each.minibatch_s for each in known.values())
            since = 0 if fastest < 0.99 * best else since + 1
            best = min(best, fastest)
            if ahead > own.ahead and since >= 3:  # more of it brings nothing
                break
        return sorted(known.values(), key=lambda each: (each.delay, each.method.ahead))

    def recomputing(self, chosen: Evaluated) -> Evaluated | None:
        """The same job at the same cuts, where each stage recomputes as its method says; None: that is what was chosen."""
        same = dataclasses.replace(self, num_microbatches=chosen.num_microbatches)
        own = same.evaluate(chosen.method, chosen.batch_size, keep=None, limit=None, cuts=chosen.cuts, like=chosen)
        return own if own.keeps != chosen.keeps and "input" in own.keeps else None

    def _leads_of(self, method: Method) -> tuple[Any, ...]:
        """What tells one order of work from another, on so many stages."""
        leads = tuple(lead(method, self.num_workers, k) for k in range(self.num_workers))
        return leads, method.backward_first

    def one_worker(self, batch_size: int) -> Choice:
        """Backpropagation without a pipeline, alone on the machine."""
        profile = self.profiler.at(batch_size, neighbours=0)
        whole = profile.whole
        seconds = whole.forward_s + whole.backward_s + whole.update_s
        if self.profiler.device.type == "cpu":
            row = get_method("bp")
            seconds = self.profiler.try_stages(row, [], ["graph"], 1, batch_size, steps=_TRIAL_STEPS, neighbours=0)[
                0
            ].minibatch_s
        needs = footprint(get_method("bp"), 1, 0, 1, whole.sizes)
        return Choice(
            "one worker", 1, "forward-first", 1, 1, batch_size, (), seconds, batch_size / seconds, math.ceil(needs.total), 0,
            (1.0,),
        )  # fmt: skip


def larger_batches(search: Search, row: Method, base: int, most: int) -> list[Evaluated]:
    """Mini-batches from the base on, doubling while they fit and until twice the size brings nothing.

    Where nothing says how many micro-batches, a larger one is cut into parts of the base's size or more: into as many as
    cost nothing, since each of them lessens the delay.
    """
    evaluated: list[Evaluated] = []
    size, stale = base, 0
    while size <= most and stale < 2:
        search.say(f"mini-batches of {size}")
        free = search.num_microbatches is None and search.max_delay is None and not row.flush
        counts = [2**n for n in range((size // base).bit_length())] if free else [search.num_microbatches]
        options: list[Evaluated] = []
        failed: PlanError | None = None
        for count in counts:
            try:
                options.append(dataclasses.replace(search, num_microbatches=count).evaluate(row, size))
            except PlanError as error:
                failed = error
        if not options:
            if not evaluated and failed is not None:
                raise failed
            break
        fastest = min(each.minibatch_s for each in options)
        as_fast = [each for each in options if each.minibatch_s <= SLOWER * fastest]
        each = search.tried(max(as_fast, key=lambda each: each.num_microbatches))
        best = max((other.samples_per_s for other in evaluated), default=0.0)
        stale = stale + 1 if each.samples_per_s < 1.02 * best else 0
        evaluated.append(each)
        size *= 2
    return evaluated


def frontier(leads: Sequence[Evaluated], chosen: Evaluated) -> list[Evaluated]:
    """For each delay the fastest, as long as more delay makes it faster; and the chosen one, which is about as fast."""
    fastest: list[Evaluated] = []
    for each in sorted(leads, key=lambda each: (each.delay, each.minibatch_s)):
        if not fastest or each.minibatch_s < 0.999 * fastest[-1].minibatch_s:
            fastest.append(each)
    if leads and all(each is not chosen for each in fastest):
        fastest.append(chosen)
    return sorted(fastest, key=lambda each: (each.delay, each.minibatch_s))


def _lognormal(mean: float, sigma: float) -> Seconds:
    mu = math.log(mean) - sigma * sigma / 2 if mean > 0 else 0.0

    def draw(random: Random) -> float:
        return random.lognormvariate(mu, sigma) if mean > 0 else 0.0

    return draw
