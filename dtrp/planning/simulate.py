"""A run of any size, on no machine: the schedule's actions with their times, event by event.

The order is that of `StageOrder`, as in the engines. An action runs when its stage is through with the one
before and its message has arrived; a message leaves when the action ends, and before the update that may follow::

    F(m)    wait for the input; forward                     (what it predicts, it predicts before it waits)
    B(m)    repeat the forward, if the stage recomputes; wait for the gradient; backward
    R(m), I(m), W(m)    of a backward in two parts: repeat the forward; wait for the gradient, first part; second part
    U       update

    message    waits until the link has sent those before it (bytes / bandwidth each), then takes the latency
"""

from __future__ import annotations

import itertools
import math
from array import array
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from random import Random
from typing import NamedTuple, cast

from ..errors import PlanError
from ..measure.memory import StageSizes, footprint
from ..methods import Keep, Method, as_method
from ..schedule import Action, Slot, StageOrder
from ..validation import is_number, whole

Seconds = float | Callable[[Random], float]
PerStage = Seconds | Sequence[Seconds]
# Of the forward, its recompute, the backward or its first part, the second part, the update and the prediction.
_StageTimes = tuple[Seconds, ...]
_PLACES = {"F": 0, "R": 1, "B": 2, "I": 2, "W": 3, "U": 4}  # among them, of an action's own


class SimulatedSpan(NamedTuple):
    """One action, as `dtrp.schedule.Action`, of a micro-batch (U: of a mini-batch); seconds from the start.

    A B that recomputes starts when it begins to recompute, and may wait for its gradient in between.
    """

    stage: int
    kind: str
    number: int
    start_s: float
    end_s: float


@dataclass(frozen=True, eq=False)
class Simulation:
    """What `simulate` found.

    Attributes:
        minibatch_s: seconds per mini-batch in steady state.
        total_s: seconds of the whole run, start-up and flush included.
        utilization: ``{stage: share of the time in which it works}``, in steady state.
        peak_stash: ``{stage: most micro-batches between their F and the end of their B}``.
        delays: ``{stage: Counter({delay: micro-batches})}``, in updates, as `Pipeline.delays`.
        peak_bytes: ``{stage: bytes}``, the most that it holds at once (`dtrp.measure.memory`); None without sizes.
        update_ends: times in seconds at which the updates of the last stage ended.
    """

    minibatch_s: float
    total_s: float
    utilization: dict[int, float]
    peak_stash: dict[int, int]
    delays: dict[int, Counter[int]]
    peak_bytes: dict[int, float] | None
    update_ends: tuple[float, ...] = field(repr=False)
    _play_again: Callable[[], list[_Trace]] = field(repr=False)

    @property
    def bubble(self) -> dict[int, float]:
        """``{stage: share of the time in which it waits}``, in steady state."""
        return {stage: 1 - used for stage, used in self.utilization.items()}

    @cached_property
    def timeline(self) -> list[SimulatedSpan]:
        """Every action of the run, stage by stage, in the order of time (from a second run, which remembers them)."""
        return [
            SimulatedSpan(stage, action.kind, action.index, start, end)
            for stage, trace in enumerate(self._play_again())
            for action, start, end in zip(trace.actions(), trace.starts, trace.ends, strict=True)
        ]


def simulate(
    method: Method | str,
    *,
    num_stages: int,
    num_minibatches: int,
    num_microbatches: int | Sequence[int] = 1,
    forward_s: PerStage,
    backward_s: PerStage,
    weight_s: PerStage | None = None,
    nograd_forward_s: PerStage | None = None,
    update_s: PerStage = 0.0,
    predict_s: PerStage = 0.0,
    latency_s: PerStage = 0.0,
    bandwidth_bytes_s: float | Sequence[float] = math.inf,
    message_bytes: float | Sequence[float] = 0.0,
    speed: float | Sequence[float] = 1.0,
    keep: Keep | Sequence[Keep] | None = None,
    weight_bytes: float | Sequence[float] | None = None,
    optimizer_bytes: float | Sequence[float] = 0.0,
    input_bytes: float | Sequence[float] = 0.0,
    graph_bytes: float | Sequence[float] = 0.0,
    seed: int = 0,
    weight_share: float | Sequence[float] = 0.5,
) -> Simulation:
    """Run a method's schedule without the network.

    >>> simulate("dtrp", num_stages=4, num_minibatches=40, forward_s=1, backward_s=2).minibatch_s
    4.0
    >>> simulate("bp", num_stages=4, num_minibatches=8, num_microbatches=4, forward_s=1, backward_s=2).minibatch_s
    21.0
    >>> simulate("bp-zb", num_stages=4, num_minibatches=8, num_microbatches=4, forward_s=1, backward_s=2).minibatch_s
    15.0

    A time is a number of seconds, or a function of a `random.Random` that draws a new time at every use. Times and
    speeds hold for all stages, or are a sequence with a value for every stage; latencies, bandwidths and message sizes
    hold for all hops, or are a sequence with a value for every hop, hop k joining stages k and k+1.

    Args:
        method: a `Method` or a name.
        num_stages: K.
        num_minibatches: length of the run. The steady state needs a few times K.
        num_microbatches: A, or a sequence with a number for every mini-batch.
        forward_s: seconds of F(m), the forward of **one micro-batch**, with a graph; a recompute takes as long. The
            time of an auxiliary network is a part of it, and of the times below.
        backward_s: seconds of B(m), without its recompute.
        weight_s: seconds of W(m), the part of ``backward_s`` that waits where the method has its backwards in two parts;
            None: ``weight_share`` of it.
        nograd_forward_s: seconds of F(m) where no graph is made; None: as ``forward_s``.
        update_s: seconds of U.
        predict_s: seconds of the prediction before an F, where the method predicts and there is a delay.
        latency_s: seconds that every message takes.
        bandwidth_bytes_s: bytes per second of a link, in either direction.
        message_bytes: bytes of a micro-batch's activations, and of their gradients.
        speed: factor on the speed; a stage of speed 2 takes half the times above.
        keep: what stages keep in place of what the method says, as in ``Pipeline(keep=)``.
        weight_bytes: bytes of a stage's parameters, all trained; given, the result has ``peak_bytes``.
        optimizer_bytes: bytes of its optimizer's state.
        input_bytes: bytes of its input, a micro-batch.
        graph_bytes: bytes of its activation graph, a micro-batch.
        seed: seed of the draws.
        weight_share: the share of ``backward_s`` that is W(m), from 0 to 1; of every stage, or one for each.

    Raises:
        ValueError: a number out of range, or as many as there are no stages or hops.
    """
    method = as_method(method)
    whole("num_stages", num_stages, error=PlanError)
    whole("num_minibatches", num_minibatches, error=PlanError)
    sizes = _sizes(num_microbatches, num_minibatches)
    hops = num_stages - 1
    speeds = _numbers("speed", speed, num_stages, above=True)
    forward = _times("forward_s", forward_s, speeds)
    nograd = forward if nograd_forward_s is None else _times("nograd_forward_s", nograd_forward_s, speeds)
    backward = _times("backward_s", backward_s, speeds)
    first_part, second_part = _divided(method, backward, weight_s, weight_share, speeds)
    update = _times("update_s", update_s, speeds)
    predict = _times("predict_s", predict_s, speeds)
    latency = _times("latency_s", latency_s, [1.0] * hops, "hop")
    sent = _numbers("message_bytes", message_bytes, hops, "hop")
    bandwidth = _numbers("bandwidth_bytes_s", bandwidth_bytes_s, hops, "hop", above=True, most=math.inf)
    keeps = keeps_of(method, num_stages, keep)
    peak_bytes = None
    if weight_bytes is not None:
        weights = _numbers("weight_bytes", weight_bytes, num_stages)
        states = _numbers("optimizer_bytes", optimizer_bytes, num_stages)
        inputs = _numbers("input_bytes", input_bytes, num_stages)
        graphs = _numbers("graph_bytes", graph_bytes, num_stages)
        held = map(StageSizes, weights, weights, states, inputs, graphs, [*inputs[1:], 0.0])
        needs = [footprint(method.keeping(keeps[k]), num_stages, k, max(sizes), stage) for k, stage in enumerate(held)]
        peak_bytes = {k: need.total for k, need in enumerate(needs)}
    first = [nograd[k] if kept == "input" else forward[k] for k, kept in enumerate(keeps)]
    again = [forward[k] if kept == "input" else 0.0 for k, kept in enumerate(keeps)]
    predict = [predict[k] if method.predict is not None and k < hops else 0.0 for k in range(num_stages)]
    stages = list(zip(first, again, first_part, second_part, update, predict, strict=True))
    links = [(size / rate, time) for size, rate, time in zip(sent, bandwidth, latency, strict=True)]
    return _Run(method, sizes, stages, links, seed).simulation(peak_bytes)


def _divided(
    method: Method,
    backward: list[Seconds],
    weight_s: PerStage | None,
    weight_share: float | Sequence[float],
    speeds: Sequence[float],
) -> tuple[list[Seconds], list[Seconds]]:
    """The times of I and W, by stage; those of B and none, where the method has its backwards whole."""
    if not method.split_backward:
        return backward, [0.0] * len(backward)
    if weight_s is None:
        shares = _shares(weight_share, len(backward))
        first = [_portion(time, 1 - share) for time, share in zip(backward, shares, strict=True)]
        return first, list(map(_portion, backward, shares))
    weights = _times("weight_s", weight_s, speeds)
    if any(callable(time) for time in (*backward, *weights)):
        raise PlanError("weight_s: leave it out where a time of backward_s or weight_s is drawn, and pass weight_share")
    parts = [(cast(float, whole), cast(float, part)) for whole, part in zip(backward, weights, strict=True)]
    for whole_s, part_s in parts:
        if part_s > whole_s:
            raise PlanError(f"weight_s={part_s:g}: W is a part of the backward, which takes {whole_s:g}")
    return [whole_s - part_s for whole_s, part_s in parts], weights


def keeps_of(method: Method, num_stages: int, keep: Keep | Sequence[Keep] | None = None) -> list[Keep]:
    """What every stage keeps: ``keep``, or the method's choice; the last stage has its graph at hand.

    Raises:
        PlanError: another value, or as many as there are no stages.
    """
    keeps = [keep] * num_stages if keep is None or isinstance(keep, str) else list(keep)
    if len(keeps) != num_stages or any(kept not in (None, "graph", "input") for kept in keeps):
        raise PlanError(f"keep={keep!r}: pass 'graph' or 'input', or one of them for each of the {num_stages} stages")
    rows = [method.keeping(kept or method.keep) for kept in keeps]
    return ["input" if row.recomputes(num_stages, k) else "graph" for k, row in enumerate(rows)]


def steady_state(ends: Sequence[float]) -> float:
    """The time between two ends once they repeat: over the shortest period that the last ends show, else their half."""
    if len(ends) < 2:
        return ends[0] if ends else 0.0
    steps = [b - a for a, b in itertools.pairwise(ends)]
    tolerance = 1e-9 * ends[-1]
    half = len(ends) // 2
    for period in range(1, len(steps) // 4 + 1):
        if all(abs(steps[i] - steps[i - period]) <= tolerance for i in range(len(steps) - 1, half, -1)):
            return (ends[-1] - ends[-1 - period]) / period
    return (ends[-1] - ends[half - 1]) / (len(ends) - half)


class _Link:
    """A hop in one direction: when its messages arrive, in their order."""

    def __init__(self, wire_s: float, latency: Seconds, random: Random) -> None:
        self.arrivals: deque[float] = deque()
        self._wire_s, self._latency, self._random = wire_s, latency, random
        self._free = 0.0  # when it can send the next message
        self._last = 0.0

    def send(self, now: float) -> None:
        if self._wire_s:
            now = self._free = max(now, self._free) + self._wire_s
        latency = self._latency
        if callable(latency):  # messages do not overtake each other
            self._last = max(self._last, now + latency(self._random))
            self.arrivals.append(self._last)
        else:
            self.arrivals.append(now + latency)


_Wires = tuple[
    deque[float] | None, Callable[[float], None] | None
]  # what brings an action's input, and takes its output
_Links = tuple[_Link | None, _Link | None]


class _Trace:
    """What has happened in a stage."""

    def __init__(self, run: _Run, stage: int, *, remember: bool) -> None:
        self.run, self.stage, self.remember = run, stage, remember
        self.starts, self.ends = array("d"), array("d")
        self.update_ends: list[float] = []
        self.delays: Counter[int] = Counter()
        self.clock = self.busy = 0.0
        self.peak = 0
        self.finished = False

    def actions(self) -> Iterator[Action]:
        """In the order of ``starts`` and ``ends``."""
        return (action for slots in self.slots() for slot in slots for action in slot)

    def slots(self) -> Iterator[list[Slot]]:
        """The slots of every mini-batch, then those of the flush."""
        order = StageOrder(self.run.method, len(self.run.stages), self.stage)
        yield from map(order.minibatch, self.run.sizes)
        yield order.flush()


@dataclass(frozen=True)
class _Run:
    """A schedule and its times.

    Attributes:
        method: method whose order of work it is.
        sizes: by mini-batch, its micro-batches.
        stages: by stage, its times.
        links: by hop, the seconds for which a message occupies it, and the latency.
        seed: seed of the draws.
    """

    method: Method
    sizes: Sequence[int]
    stages: Sequence[_StageTimes]
    links: Sequence[tuple[float, Seconds]]
    seed: int

    def simulation(self, peak_bytes: dict[int, float] | None) -> Simulation:
        """What the run shows; ``peak_bytes`` is passed on."""
        traces = self.play(remember=False)
        ends = traces[-1].update_ends
        minibatch_s = steady_state(ends)
        shares = [trace.busy / len(self.sizes) / minibatch_s if minibatch_s else 0.0 for trace in traces]
        return Simulation(
            minibatch_s=minibatch_s,
            total_s=max(trace.clock for trace in traces),
            utilization={k: min(1.0, share) for k, share in enumerate(shares)},
            peak_stash={k: trace.peak for k, trace in enumerate(traces)},
            delays={k: trace.delays for k, trace in enumerate(traces)},
            peak_bytes=peak_bytes,
            update_ends=tuple(ends),
            _play_again=partial(self.play, remember=True),
        )

    def play(self, *, remember: bool) -> list[_Trace]:
        """Every stage's trace; ``remember``: with the times of its actions."""
        down = [None, *self._links("down"), None]
        up = [None, *([None] * len(self.links) if self.method.local else self._links("up")), None]
        traces: list[_Trace] = []
        workers = []
        for k, times in enumerate(self.stages):
            traces.append(_Trace(self, k, remember=remember))
            random = Random(f"{self.seed} stage {k}")
            workers.append(_work(traces[k], times, random, received=(down[k], up[k + 1]), sent=(down[k + 1], up[k])))
        while not all(trace.finished for trace in traces):
            ended = sum(trace.finished for trace in traces)
            moved = [
                next(worker, False) for worker in itertools.chain(workers, reversed(workers))
            ]  # as far as each can go
            if not any(moved) and ended == sum(trace.finished for trace in traces):
                raise PlanError(
                    f"the orders of method {self.method.name!r} deadlock: each stage waits for what another one sends later; "
                    "change leads and orders (a stage's lead is at least that of the next one)"
                )
        return traces

    def _links(self, direction: str) -> list[_Link]:
        return [_Link(*link, Random(f"{self.seed} {direction} {k}")) for k, link in enumerate(self.links)]


def _wires(received: _Links, sent: _Links, updated: Callable[[float], None]) -> dict[str, _Wires]:
    """By kind of action what brings its input, and what is told of its end."""
    inputs, gradients = (None if link is None else link.arrivals for link in received)
    send_output, send_gradient = (None if link is None else link.send for link in sent)
    backward: _Wires = (gradients, send_gradient)
    return {
        "F": (inputs, send_output), "B": backward, "I": backward, "R": (None, None), "W": (None, None), "U": (None, updated)
    }  # fmt: skip


def _work(trace: _Trace, times: _StageTimes, random: Random, received: _Links, sent: _Links) -> Iterator[bool]:
    """A stage at work; where it has to wait for what has not been sent yet, it yields whether it has moved since.

    Args:
        trace: what happens is written into it.
        times: times of the stage.
        random: draws the times that are functions.
        received: links that bring the inputs and the gradients.
        sent: links that take the outputs and the gradients of the inputs.
    """
    # The loop runs once an action: what it reads lies in local names.
    remember, starts, ends, updated = trace.remember, trace.starts.append, trace.ends.append, trace.update_ends.append
    wires = _wires(received, sent, updated)
    drawn = any(map(callable, times))
    now = [0.0 if callable(time) else time for time in times]
    clock = busy = 0.0
    held = peak = version = 0
    predicted = -1, -1
    moved = False
    delays: dict[int, int] = {}
    for minibatch, slots in enumerate(trace.slots()):
        for action in itertools.chain.from_iterable(slots):
            start = clock
            if drawn:
                now = [time(random) if callable(time) else time for time in times]
            kind = action.kind
            before, work = 0.0, now[_PLACES[kind]]
            arrivals, send = wires[kind]
            if kind == "F":
                delay = minibatch - version
                delays[delay] = delays.get(delay, 0) + 1
                if delay and predicted != (version, delay):
                    predicted = version, delay
                    before = now[-1]
                held += 1
                if held > peak:
                    peak = held
            elif kind == "B":
                before = now[_PLACES["R"]]
                held -= 1
            elif kind == "W":
                held -= 1
            elif kind == "U":
                version += 1
            busy += before + work
            clock += before
            if arrivals is not None:
                while not arrivals:
                    yield moved
                    moved = False
                arrived = arrivals.popleft()
                if arrived > clock:
                    clock = arrived
                    if not before:
                        start = clock
            clock += work
            moved = True
            if send is not None:
                send(clock)
            if remember:
                starts(start)
                ends(clock)
    trace.clock, trace.busy, trace.peak, trace.delays = clock, busy, peak, Counter(delays)
    trace.finished = True


def _sizes(num_microbatches: int | Sequence[int], num_minibatches: int) -> list[int]:
    """The number of micro-batches of every mini-batch."""
    sizes = list(num_microbatches) if isinstance(num_microbatches, Sequence) else [num_microbatches] * num_minibatches
    if len(sizes) != num_minibatches or not all(isinstance(size, int) and size >= 1 for size in sizes):
        raise PlanError(
            f"num_microbatches={num_microbatches!r}: pass one number of at least 1, or one for each of the "
            f"num_minibatches={num_minibatches}"
        )
    return sizes


def _values(
    name: str, value: PerStage, count: int, place: str, valid: Callable[[Seconds], bool], rule: str
) -> list[Seconds]:
    """A value for every stage or hop, checked."""
    values = list(value) if isinstance(value, Sequence) else [value] * count
    if len(values) != count:
        raise PlanError(f"{name} has {len(values)} values; pass one, or {count}, one a {place}")
    for number in values:
        if not valid(number):
            raise PlanError(f"{name}={number!r}: pass {rule}")
    return values


def _times(name: str, value: PerStage, speeds: Sequence[float], place: str = "stage") -> list[Seconds]:
    def valid(time: Seconds) -> bool:
        return callable(time) or is_number(time, 0)

    rule = "seconds of at least 0, or a function of a random.Random"
    return list(map(_scaled, _values(name, value, len(speeds), place, valid, rule), speeds))


def _numbers(
    name: str, value: float | Sequence[float], count: int, place: str = "stage", *, above: bool = False, most: float = 0
) -> list[float]:
    def valid(number: Seconds) -> bool:
        return (is_number(number, 0) or number == most) and not (above and number == 0)

    rule = f"a number {'above' if above else 'of at least'} 0"
    return cast(list[float], _values(name, value, count, place, valid, rule))


def _shares(value: float | Sequence[float], count: int) -> list[float]:
    def valid(share: Seconds) -> bool:
        return is_number(share, 0) and cast(float, share) <= 1

    return cast(list[float], _values("weight_share", value, count, "stage", valid, "a number from 0 to 1"))


def _portion(time: Seconds, share: float) -> Seconds:
    return (lambda random: share * time(random)) if callable(time) else share * time


def _scaled(time: Seconds, speed: float) -> Seconds:
    if callable(time):
        return time if speed == 1 else lambda random: time(random) / speed
    return time / speed
