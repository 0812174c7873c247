"""A run of any size, on no machine: the schedule's actions with their times, event by event.

The order is that of `StageOrder`, as in the engines. An action runs when its stage is through with the one
before and its message has arrived; a message leaves when the action ends, and before the update that may follow::

    F(m)    wait for the input; forward                     (what it predicts, it predicts before it waits)
    B(m)    repeat the forward, if the stage recomputes; wait for the gradient; backward
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
from typing import NamedTuple

from ..measure.memory import StageSizes, footprint
from ..methods import Keep, Method, get_method
from ..schedule import Action, Slot, StageOrder
from .plan_file import PlanError

Seconds = float | Callable[[Random], float]
PerStage = Seconds | Sequence[Seconds]


class SimulatedSpan(NamedTuple):
    """One action: ``F``, ``B`` or ``U``, of a micro-batch (of a mini-batch for U); seconds from the start.

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
        minibatch_s: time per mini-batch in steady state.
        total_s: of the whole run, start-up and flush included.
        utilization: ``{stage: share of the time in which it works}``, in steady state.
        peak_stash: ``{stage: most micro-batches between their F and the end of their B}``.
        delays: ``{stage: Counter({delay: micro-batches})}``, in updates, as `Pipeline.delays`.
        peak_bytes: ``{stage: bytes}``, the most that it holds at once (`dtrp.measure.memory`); None without sizes.
        update_ends: when each of the last stage's updates ended, in seconds.
    """

    minibatch_s: float
    total_s: float
    utilization: dict[int, float]
    peak_stash: dict[int, int]
    delays: dict[int, Counter[int]]
    peak_bytes: dict[int, float] | None
    update_ends: tuple[float, ...] = field(repr=False)
    _again: Callable[[], list[_Trace]] = field(repr=False)

    @property
    def bubble(self) -> dict[int, float]:
        """``{stage: share of the time in which it waits}``, in steady state."""
        return {stage: 1 - used for stage, used in self.utilization.items()}

    @cached_property
    def timeline(self) -> list[SimulatedSpan]:
        """Every action of the run, stage by stage, in the order of time (from a second run, which remembers them)."""
        return [
            SimulatedSpan(stage, action.kind, action.index, start, end)
            for stage, trace in enumerate(self._again())
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
) -> Simulation:
    """Run a method's schedule without the network.

    >>> simulate("dtrp", num_stages=4, num_minibatches=40, forward_s=1, backward_s=2).minibatch_s
    4.0
    >>> simulate("bp", num_stages=4, num_minibatches=8, num_microbatches=4, forward_s=1, backward_s=2).minibatch_s
    21.0

    A time is a number of seconds, or a function of a `random.Random` that draws one each time. Times and speeds are one
    for all stages, or a sequence of one a stage; latencies, bandwidths and message sizes one for all hops, or
    one a hop, hop k joining stages k and k+1.

    Args:
        method: a `Method` or a name.
        num_stages: K.
        num_minibatches: the length of the run. The steady state needs a few times K.
        num_microbatches: A, or one number for each mini-batch.
        forward_s: of F(m), the forward of **one micro-batch**, with a graph; also what a recompute takes. An auxiliary
            network's is part of it, here and below.
        backward_s: of B(m), without its recompute.
        nograd_forward_s: of F(m) where no graph is made; None: as ``forward_s``.
        update_s: of U.
        predict_s: of the prediction before an F, where the method predicts and there is a delay.
        latency_s: of every message.
        bandwidth_bytes_s: of a link, each way.
        message_bytes: of a micro-batch's activations, and of their gradients.
        speed: a stage of speed 2 takes half the times above.
        keep: what stages keep in place of what the method says, as in ``Pipeline(keep=)``.
        weight_bytes: of a stage's parameters, all trained; given, the result has ``peak_bytes``.
        optimizer_bytes: of its optimizer's state.
        input_bytes: of its input, a micro-batch.
        graph_bytes: of its activation graph, a micro-batch.
        seed: of the draws.

    Raises:
        ValueError: a number out of range, or as many as there are no stages or hops.
    """
    method = get_method(method) if isinstance(method, str) else method
    if not isinstance(method, Method):
        raise TypeError(f"method is a {type(method).__name__}; pass a name or what get_method returns")
    for name, count in (("num_stages", num_stages), ("num_minibatches", num_minibatches)):
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise PlanError(f"{name}={count!r}: pass a whole number of at least 1")
    given = num_microbatches
    sizes = list(given) if isinstance(given, Sequence) else [given] * num_minibatches
    if len(sizes) != num_minibatches or not all(isinstance(size, int) and size >= 1 for size in sizes):
        raise PlanError(
            f"num_microbatches={num_microbatches!r}: pass one number of at least 1, or one for each of the "
            f"num_minibatches={num_minibatches}"
        )
    stages = num_stages
    forward = _times("forward_s", forward_s, stages)
    backward = _times("backward_s", backward_s, stages)
    nograd = forward if nograd_forward_s is None else _times("nograd_forward_s", nograd_forward_s, stages)
    update = _times("update_s", update_s, stages)
    predict = _times("predict_s", predict_s, stages)
    latency = _times("latency_s", latency_s, stages - 1, "hop")
    speeds = _numbers("speed", speed, stages, above=True)
    sent = _numbers("message_bytes", message_bytes, stages - 1, "hop")
    bandwidth = _numbers("bandwidth_bytes_s", bandwidth_bytes_s, stages - 1, "hop", above=True, finite=False)
    on_wire = [size / rate for size, rate in zip(sent, bandwidth, strict=True)]
    keeps = keeps_of(method, stages, keep)
    peak_bytes = None
    if weight_bytes is not None:
        weights = _numbers("weight_bytes", weight_bytes, stages)
        states = _numbers("optimizer_bytes", optimizer_bytes, stages)
        inputs = _numbers("input_bytes", input_bytes, stages)
        graphs = _numbers("graph_bytes", graph_bytes, stages)
        peak_bytes = {}
        for k, keeps_what in enumerate(keeps):
            output = inputs[k + 1] if k < stages - 1 else 0.0
            held = StageSizes(weights[k], weights[k], states[k], inputs[k], graphs[k], output)
            peak_bytes[k] = footprint(method.keeping(keeps_what), stages, k, max(sizes), held).total

    def run(*, remember: bool) -> list[_Trace]:
        links = list(zip(on_wire, latency, strict=True))
        down = [None, *(_Link(*link, Random(f"{seed} down {k}")) for k, link in enumerate(links)), None]
        up = [None, *(_Link(*link, Random(f"{seed} up {k}")) for k, link in enumerate(links)), None]
        traces = [_Trace(partial(StageOrder, method, stages, k), sizes, remember=remember) for k in range(stages)]
        workers = []
        for k, trace in enumerate(traces):
            recomputes = keeps[k] == "input"
            predicts = method.predict is not None and k < stages - 1
            times = _Times(
                _scaled(nograd[k] if recomputes else forward[k], speeds[k]),
                _scaled(forward[k], speeds[k]) if recomputes else None,
                _scaled(backward[k], speeds[k]),
                _scaled(update[k], speeds[k]),
                _scaled(predict[k], speeds[k]) if predicts else None,
            )
            random = Random(f"{seed} stage {k}")
            gradients = (None, None) if method.local else (up[k + 1], up[k])
            workers.append(_worker(times, down[k], down[k + 1], *gradients, trace, random))
        while not all(trace.finished for trace in traces):
            for worker in itertools.chain(workers, reversed(workers)):
                next(worker, None)  # as far as it can go
        return traces

    traces = run(remember=False)
    ends = traces[-1].update_ends
    minibatch_s = steady_state(ends)
    return Simulation(
        minibatch_s=minibatch_s,
        total_s=max(trace.clock for trace in traces),
        utilization={
            k: min(1.0, trace.busy / num_minibatches / minibatch_s) if minibatch_s else 0.0
            for k, trace in enumerate(traces)
        },
        peak_stash={k: trace.peak for k, trace in enumerate(traces)},
        delays={k: trace.delays for k, trace in enumerate(traces)},
        peak_bytes=peak_bytes,
        update_ends=tuple(ends),
        _again=partial(run, remember=True),
    )


def keeps_of(method: Method, num_stages: int, keep: Keep | Sequence[Keep] | None = None) -> list[Keep]:
    """What each stage keeps: the method's choice, or ``keep`` for all or for each; the last stage has its graph at hand.

    Raises:
        PlanError: another value, or as many as there are no stages.
    """
    each = [keep] * num_stages if keep is None or isinstance(keep, str) else list(keep)
    if len(each) != num_stages or any(one not in (None, "graph", "input") for one in each):
        raise PlanError(f"keep={keep!r}: pass 'graph' or 'input', or one of them for each of the {num_stages} stages")
    return [
        "input" if method.keeping(one or method.keep).recomputes(num_stages, k) else "graph"
        for k, one in enumerate(each)
    ]


def steady_state(ends: Sequence[float]) -> float:
    """The time between ends once they repeat: over the shortest period that the last of them show, else the last half."""
    if len(ends) < 2:
        return ends[0] if ends else 0.0
    steps = [b - a for a, b in itertools.pairwise(ends)]
    tolerance = 1e-9 * ends[-1]
    half = len(ends) // 2
    for period in range(1, len(steps) // 4 + 1):
        if all(abs(steps[i] - steps[i - period]) <= tolerance for i in range(len(steps) - 1, half, -1)):
            return (ends[-1] - ends[-1 - period]) / period
    return (ends[-1] - ends[half - 1]) / (len(ends) - half)


class _Times(NamedTuple):
    forward: Seconds
    recompute: Seconds | None  # None: the stage keeps its graph
    backward: Seconds
    update: Seconds
    predict: Seconds | None


class _Link:
    """One way of a hop: when its messages arrive, in their order."""

    def __init__(self, on_wire: float, latency: Seconds, random: Random) -> None:
        self.arrivals: deque[float] = deque()
        self._on_wire, self._latency, self._random = on_wire, latency, random
        self._free = 0.0  # when it can send the next one
        self._last = 0.0

    def send(self, now: float) -> None:
        if self._on_wire:
            now = self._free = max(now, self._free) + self._on_wire
        latency = self._latency
        if callable(latency):  # messages do not overtake each other
            self._last = max(self._last, now + latency(self._random))
            self.arrivals.append(self._last)
        else:
            self.arrivals.append(now + latency)


class _Trace:
    """What has happened in one stage."""

    def __init__(self, order: Callable[[], StageOrder], sizes: Sequence[int], *, remember: bool) -> None:
        self.order, self.sizes, self.remember = order, sizes, remember
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
        """Of each mini-batch, and of the flush."""
        order = self.order()
        for size in self.sizes:
            yield order.minibatch(size)
        yield order.flush()


def _worker(
    times: _Times,
    inputs: _Link | None,
    outputs: _Link | None,
    gradients: _Link | None,
    input_gradients: _Link | None,
    trace: _Trace,
    random: Random,
) -> Iterator[None]:
    """A stage; yields where it has to wait for what has not been sent yet."""
    # One turn of this loop a slot: what it reads lies in local names.
    forward, recompute, backward, update, predict = times
    input_from = inputs.arrivals if inputs is not None else None
    gradient_from = gradients.arrivals if gradients is not None else None
    output_to = outputs.send if outputs is not None else None
    gradient_to = input_gradients.send if input_gradients is not None else None
    drawn = any(callable(one) for one in times)
    remember, starts, ends, updated = trace.remember, trace.starts.append, trace.ends.append, trace.update_ends.append
    f, b, u = (0.0 if callable(one) else one for one in (forward, backward, update))
    r, p = (0.0 if one is None or callable(one) else one for one in (recompute, predict))
    clock = busy = 0.0
    held = peak = version = 0
    predicted = -1, -1
    delays: dict[int, int] = {}
    for minibatch, slots in enumerate(trace.slots()):
        for slot in slots:
            for action in slot:
                kind = action.kind
                start = clock
                if drawn:
                    f, r, b, u, p = (
                        one(random) if callable(one) else one or 0.0
                        for one in (forward, recompute, backward, update, predict)
                    )
                if kind == "F":
                    delay = minibatch - version
                    delays[delay] = delays.get(delay, 0) + 1
                    first = bool(delay and p and predicted != (version, delay))
                    if first:
                        predicted = version, delay
                        clock += p
                        busy += p
                    if input_from is not None:
                        while not input_from:
                            yield
                        arrived = input_from.popleft()
                        if arrived > clock:
                            clock = arrived
                            if not first:
                                start = clock
                    clock += f
                    busy += f
                    if output_to is not None:
                        output_to(clock)
                    held += 1
                    if held > peak:
                        peak = held
                elif kind == "B":
                    clock += r
                    if gradient_from is not None:
                        while not gradient_from:
                            yield
                        arrived = gradient_from.popleft()
                        if arrived > clock:
                            clock = arrived
                            if not r:
                                start = clock
                    clock += b
                    busy += r + b
                    if gradient_to is not None:
                        gradient_to(clock)
                    held -= 1
                else:
                    clock += u
                    busy += u
                    version += 1
                    updated(clock)
                if remember:
                    starts(start)
                    ends(clock)
    trace.clock, trace.busy, trace.peak, trace.delays = clock, busy, peak, Counter(delays)
    trace.finished = True


def _times(name: str, value: PerStage, count: int, of: str = "stage") -> list[Seconds]:
    each = list(value) if isinstance(value, Sequence) else [value] * count
    if len(each) != count:
        raise PlanError(f"{name} has {len(each)} values; pass one, or {count}, one a {of}")
    for one in each:
        if not callable(one) and not _is_time(one):
            raise PlanError(f"{name}={one!r}: pass seconds of at least 0, or a function of a random.Random")
    return each


def _numbers(
    name: str,
    value: float | Sequence[float],
    count: int,
    of: str = "stage",
    *,
    above: bool = False,
    finite: bool = True,
) -> list[float]:
    each = list(value) if isinstance(value, Sequence) else [value] * count
    if len(each) != count:
        raise PlanError(f"{name} has {len(each)} values; pass one, or {count}, one a {of}")
    for one in each:
        if not (_is_time(one) or (not finite and one == math.inf)) or (above and one <= 0):
            raise PlanError(f"{name}={one!r}: pass a number {'above' if above else 'of at least'} 0")
    return [float(one) for one in each]


def _is_time(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value >= 0


def _scaled(time: Seconds, speed: float) -> Seconds:
    if callable(time):
        return time if speed == 1 else lambda random: time(random) / speed
    return time / speed
