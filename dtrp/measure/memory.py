"""How much memory a stage will need at most, from sizes alone.

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
from typing import NamedTuple

import torch
from torch.optim import Optimizer

from ..methods import Method
from ..schedule import StageOrder
from ..tensors.nbytes import states_bytes, tensor_bytes


@dataclass(frozen=True)
class StageSizes:
    """What a stage is made of, in bytes, its auxiliary network included; activations of one micro-batch.

    Attributes:
        weights: parameters and buffers.
        trained: the parameters that require a gradient.
        optimizer: the optimizer's state.
        input: the stage's input.
        graph: what its autograd graph saves.
        output: the stage's output.
        trains: whether it, or a stage before it, has something to train; else it keeps nothing.
    """

    weights: float
    trained: float
    optimizer: float
    input: float
    graph: float
    output: float = 0.0
    trains: bool = True


@dataclass(frozen=True)
class Footprint:
    """The most that a stage holds, in bytes, by what it is; ``stash`` and ``graph`` at the moment of their sum's maximum.

    Attributes:
        weights, optimizer, gradients: as in `Pipeline.memory`.
        predicted: the predicted copy that a forward reads.
        stash: inputs, kept graphs, and the copies of weights that these stand on.
        graph: the one that a backward recomputes.
        messages: an input and a gradient received ahead, and what is being sent; no gradients where stages have their own loss.
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
    """The most that ``stage`` holds in a run with mini-batches of A micro-batches.

    Args:
        method: with this stage's own ``keep`` (`Method.keeping`).
        num_stages: K.
        stage: k.
        num_microbatches: A.
        sizes: of the stage.
    """
    last = stage == num_stages - 1
    recomputes = sizes.trains and method.recomputes(num_stages, stage)
    each = sizes.input if recomputes else sizes.input + sizes.graph
    each = each if sizes.trains else 0.0
    graph = sizes.graph if recomputes else 0.0
    predicts = method.predict is not None and not last
    copies = not recomputes or method.backward_at == "stashed"
    order = (method.ahead, method.backward_first, method.flush, method.forward_all, method.local)
    # What dtrp predicts is the same for micro-batches of one version and horizon; another predictor may differ.
    shared = not predicts or isinstance(method.predict, str)
    moments, delayed = _moments(order, num_stages, stage, num_microbatches, predicts, shared)
    stash, added = max(
        (
            (held * each + (versions if copies else 0) * sizes.trained, graph if backward else 0.0)
            for held, versions, backward in moments
        ),
        key=sum,
    )
    return Footprint(
        weights=sizes.weights,
        optimizer=sizes.optimizer,
        gradients=sizes.trained,
        predicted=sizes.trained if predicts and delayed and not copies else 0.0,
        stash=stash,
        graph=added,
        messages=(1 if method.local else 2) * ((sizes.input if stage else 0.0) + (0.0 if last else sizes.output)),
    )


class _Order(NamedTuple):
    """What a schedule asks of a method."""

    ahead: float
    backward_first: bool
    flush: bool
    forward_all: bool
    local: bool
    name: str = "any"


@functools.lru_cache(maxsize=1024)
def _moments(
    order: tuple[float, bool, bool, bool, bool],
    num_stages: int,
    stage: int,
    num_microbatches: int,
    predicts: bool,
    shared: bool,
) -> tuple[frozenset[tuple[int, int, bool]], bool]:
    """What a stage holds at a time: (micro-batches, versions of the weights that these read, whether one is in its B).

    And whether any forward has a delay.
    """
    work = StageOrder(_Order(*order), num_stages, stage)
    # Up to the lead, and until each has its own version.
    minibatches = 2 * math.ceil((work.lead + 1) / num_microbatches) + 2
    held: deque[tuple[int, int] | None] = deque()  # the version that each micro-batch in the stash has read
    moments: set[tuple[int, int, bool]] = set()
    delayed, version = False, 0
    for minibatch in range(minibatches + 1):
        slots = work.minibatch(num_microbatches) if minibatch < minibatches else work.flush()
        for action in itertools.chain.from_iterable(slots):
            if action.kind == "F":
                delay = minibatch - version
                delayed = delayed or delay > 0
                own = delay if shared or not delay else -1 - action.index
                copied = work.lead > 0 and not work.flushes  # what is kept into a later step
                held.append((version, own if predicts else 0) if copied else None)
            elif action.kind == "U":
                version += 1
            moments.add((len(held), len({one for one in held if one is not None}), action.kind == "B"))
            if action.kind == "B":
                held.popleft()
    return frozenset(moments), delayed


def held_at_most(memory: Mapping[str, int], activations_peak: int) -> int:
    """Bytes that a stage has held at most, by what it measured of itself (`Pipeline.memory`, `Pipeline.activations_peak`)."""
    return (
        sum(memory.get(name, 0) for name in ("weights", "buffers", "optimizer", "gradients_peak", "predicted"))
        + activations_peak
    )


def optimizer_bytes(optimizer: Optimizer) -> int:
    """Of an optimizer's state once every parameter has had an update; nothing of that size is made.

    A copy makes a step on the meta device. One that cannot is taken to hold two values for each of the parameters'.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if all(optimizer.state.get(p) for p in parameters):
        return states_bytes(optimizer.state.values())
    try:
        shadows = [p.detach().to("meta").requires_grad_() for p in parameters]
        memo = {id(p): shadow for p, shadow in zip(parameters, shadows, strict=True)}
        shadow_optimizer = copy.deepcopy(optimizer, memo)
        for shadow in shadows:
            shadow.grad = torch.empty_like(shadow)
        shadow_optimizer.step()
        return states_bytes(shadow_optimizer.state.values())
    except Exception:
        return 2 * sum(map(tensor_bytes, parameters))
