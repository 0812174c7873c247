"""The most memory that a stage will need, from sizes alone.

The stash is counted on the order of work itself: what waits between F and B, and which copies of the weights that
keeps alive. The rest is a multiple of a size: one micro-batch's graph, one set of gradients, one predicted copy.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, cast, get_args

import torch
from torch.optim import Optimizer

from ..methods import Keep, Method
from ..schedule import StageOrder
from ..tensors.nbytes import states_bytes, tensor_bytes


@dataclass(frozen=True)
class StageSizes:
    """The sizes of a stage, in bytes, its auxiliary network included; activations are those of one micro-batch.

    Attributes:
        weights: parameters and buffers.
        trained: the parameters that require a gradient.
        optimizer: the optimizer's state.
        input: the stage's input.
        graph: what its autograd graph saves.
        output: the stage's output.
        trains: whether the stage, or one before it, has something to train; else it keeps nothing.
        deferred: what the second part of a divided backward waits with; None: as ``graph``, about which it is.
        rule_known: whether ``linear`` foresees the optimizer's updates; where not, ``auto`` holds a copy more.
    """

    weights: float
    trained: float
    optimizer: float
    input: float
    graph: float
    output: float = 0.0
    trains: bool = True
    deferred: float | None = None
    rule_known: bool = True


@dataclass(frozen=True)
class Footprint:
    """The most memory that a stage holds, in bytes, by purpose; ``stash`` and ``graph`` when their sum is largest.

    Attributes:
        weights, optimizer, gradients: as in `Pipeline.memory`.
        predicted: the predicted copy that a forward reads, and the copies that the predictor holds.
        stash: inputs, kept graphs, and the copies of weights on which these are built; and what the second parts of
            divided backwards wait with, about a graph each.
        graph: the graph that a backward recomputes.
        messages: an input and a gradient received ahead, and what is being sent; no gradients where stages have their
            own loss.
    """

    weights: float
    optimizer: float
    gradients: float
    predicted: float
    stash: float
    graph: float
    messages: float

    @property
    def total(self) -> float:
        """All of it, in bytes."""
        return float(sum(dataclasses.astuple(self)))


def footprint(method: Method, num_stages: int, stage: int, num_microbatches: int, sizes: StageSizes) -> Footprint:
    """The most memory that ``stage`` holds in a run with mini-batches of A micro-batches.

    Args:
        method: the stage's row, with what it keeps (`Method.keeping`).
        num_stages: K.
        stage: k.
        num_microbatches: A.
        sizes: the sizes of the stage.
    """
    last = stage == num_stages - 1
    recomputes = sizes.trains and method.recomputes(num_stages, stage)
    kept = (sizes.input if recomputes else sizes.input + sizes.graph) if sizes.trains else 0.0  # of a micro-batch
    graph = sizes.graph if recomputes else 0.0
    deferred = 0.0 if not sizes.trains else sizes.graph if sizes.deferred is None else sizes.deferred
    predicts = method.predict is not None and not last
    copies = not recomputes or method.backward_at == "stashed"
    held_to_predict = method.predictor_copies + (method.predict == "auto" and not sizes.rule_known)
    order = _Order(*(getattr(method, field) for field in _Order._fields[:-1]))
    # What dtrp predicts is the same for micro-batches of one version and horizon; another predictor may differ.
    shared = not predicts or isinstance(method.predict, str)
    moments, delayed = _moments(order, num_stages, stage, num_microbatches, predicts, shared)
    stash, added = max(
        (
            (
                held * kept + (versions if copies else 0) * sizes.trained + waiting * deferred,
                graph if backward else 0.0,
            )
            for held, versions, backward, waiting in moments
        ),
        key=sum,
    )
    return Footprint(
        weights=sizes.weights,
        optimizer=sizes.optimizer,
        gradients=sizes.trained,
        predicted=sizes.trained * ((delayed and not copies) + held_to_predict) if predicts else 0.0,
        stash=stash,
        graph=added,
        messages=(1 if method.local else 2) * ((sizes.input if stage else 0.0) + (0.0 if last else sizes.output)),
    )


def choose_keep(
    method: Method, num_stages: int, stage: int, num_microbatches: int, sizes: StageSizes, limit_bytes: int
) -> Keep:
    """What the stage keeps: its graphs if they fit into ``limit_bytes``, otherwise its inputs.

    Raises:
        MemoryError: neither fits.
    """
    needs = {}
    for keep in get_args(Keep):
        needs[keep] = footprint(method.keeping(keep), num_stages, stage, num_microbatches, sizes)
        if needs[keep].total <= limit_bytes:
            return cast(Keep, keep)
    least = min(needs.values(), key=lambda need: need.total)
    parts = ", ".join(f"{name} {size:,.0f}" for name, size in dataclasses.asdict(least).items() if size)
    raise MemoryError(
        f"stage {stage} needs {least.total:,.0f} bytes at least ({parts}), {least.total - limit_bytes:,.0f} "
        f"more than memory_limit_bytes={limit_bytes:,}; raise it, or take smaller mini-batches, more micro-batches or more stages"
    )


class _Order(NamedTuple):
    """What a schedule reads of a method."""

    ahead: float
    backward_first: bool
    keep: Keep
    flush: bool
    forward_all: bool
    local: bool
    split_backward: bool
    leads: tuple[int, ...] | None
    orders: tuple[str, ...] | str | None
    name: str = "any"


@functools.lru_cache(maxsize=1024)
def _moments(
    order: _Order, num_stages: int, stage: int, num_microbatches: int, predicts: bool, shared: bool
) -> tuple[frozenset[tuple[int, int, bool, int]], bool]:
    """What a stage holds at some time: (micro-batches, versions of the weights, whether a B is on, second parts of B).

    And whether any forward has a delay.
    """
    work = StageOrder(order, num_stages, stage)
    # Up to the lead, and until every micro-batch in the stash may have read another version.
    minibatches = 2 * math.ceil((work.lead + 1) / num_microbatches) + 2
    held: deque[tuple[int, int] | None] = deque()  # the version that each micro-batch in the stash has read
    waiting: deque[tuple[int, int] | None] = deque()  # and those whose W is to come
    moments: set[tuple[int, int, bool, int]] = set()
    delayed, version, repeated = False, 0, False
    for minibatch in range(minibatches + 1):
        slots = work.minibatch(num_microbatches) if minibatch < minibatches else work.flush()
        for action in itertools.chain.from_iterable(slots):
            if action.kind == "F":
                delay = minibatch - version
                delayed = delayed or delay > 0
                horizon = delay if shared or not delay else -1 - action.index
                copied = work.lead > 0 and not work.flushes  # what is kept into a later step
                held.append((version, horizon if predicts else 0) if copied else None)
            elif action.kind == "U":
                version += 1
            repeated = repeated or action.kind in "RBI"
            moments.add((len(held), len({*held, *waiting} - {None}), repeated, len(waiting)))
            if action.kind in "BI":
                first, repeated = held.popleft(), False
                if action.kind == "I":
                    waiting.append(first)
            elif action.kind == "W":
                waiting.popleft()
    return frozenset(moments), delayed


def held_at_most(memory: Mapping[str, int], activations_peak: int) -> int:
    """The most bytes that a stage has held, from its measurements (`Pipeline.memory`, `Pipeline.activations_peak`)."""
    parts = ("weights", "buffers", "optimizer", "gradients_peak", "predicted")
    return sum(memory.get(name, 0) for name in parts) + activations_peak


def optimizer_bytes(optimizer: Optimizer) -> int:
    """Bytes of an optimizer's state after the first update of every parameter; nothing of that size is allocated.

    A copy of the optimizer makes a step on the meta device. One that cannot is assumed to hold two values per
    parameter.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    # The hooks of `dtrp.optim.extrapolated`, which keep the last update, are not copied.
    beside = sum(map(tensor_bytes, parameters)) if getattr(optimizer, "extrapolate", 0) else 0
    if all(optimizer.state.get(p) for p in parameters):
        return states_bytes(optimizer.state.values())
    try:
        shadows = [p.detach().to("meta").requires_grad_() for p in parameters]
        memo = {id(p): shadow for p, shadow in zip(parameters, shadows, strict=True)}
        shadow_optimizer = copy.deepcopy(optimizer, memo)
        for shadow in shadows:
            shadow.grad = torch.empty_like(shadow)
        shadow_optimizer.step()
        return states_bytes(shadow_optimizer.state.values()) + beside
    except Exception:
        return 2 * sum(map(tensor_bytes, parameters)) + beside
