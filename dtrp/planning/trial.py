"""A few steps of the real thing: the chosen stages on the engine, in this process.

Sums of layers leave out what a stage does beside its layers, and layers that are measured one by one find their
memory warmer than in a run. So the stages that have been chosen are run, and their times corrected by what that shows.
"""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..engine.local import LocalEngine
from ..measure.trace import Tracer
from ..methods import Keep, Method
from ..schedule import lead
from ..splitting.stages import stage_of
from ..stage.forward import LossFn
from ..stage.stage import Stage
from ..tensors.pytree import tensors_of
from .neighbours import busy_neighbours


class StageTrial(NamedTuple):
    """Seconds of a stage's work for a mini-batch: the median, and the interquartile range over it."""

    minibatch_s: float
    spread: float


def try_stages(
    layers: Sequence[tuple[str, nn.Module]],
    batch: tuple[Any, Any],
    loss_fn: LossFn,
    optimizer: Callable[[list[nn.Parameter]], Optimizer] | None,
    method: Method,
    cuts: Sequence[int],
    keep: Sequence[Keep],
    num_microbatches: int,
    *,
    neighbours: int,
    steps: int,
    autocast: Callable[[], AbstractContextManager[Any]] | None = None,
) -> list[StageTrial]:
    """Train copies of the layers for some steps, at a learning rate of 0.

    Args:
        layers: with their names, where they are to be tried.
        batch: one mini-batch, for every step.
        loss_fn: as `Pipeline`'s.
        optimizer: as `Pipeline`'s; None: SGD.
        method: the row.
        cuts: the first layer of each later stage.
        keep: what each stage keeps.
        num_microbatches: A.
        neighbours: processes that work meanwhile.
        steps: to be timed, after the start-up.
        autocast: makes the region in which steps run.
    """
    copies = copy.deepcopy([layer for _, layer in layers])
    bounds = [0, *cuts, len(layers)]
    num_stages = len(cuts) + 1

    def still(parameters: list[nn.Parameter]) -> Optimizer:
        made = optimizer(parameters) if optimizer is not None else torch.optim.SGD(parameters, lr=0.0)
        for group in made.param_groups:
            group["lr"] = torch.zeros_like(group["lr"]) if isinstance(group["lr"], Tensor) else 0.0
        return made

    # Not a Pipeline, which under torchrun would be one of several ranks.
    stages = [
        Stage(
            k,
            num_stages,
            stage_of((str(i), copies[i]) for i in range(bounds[k], bounds[k + 1])),
            method.keeping(keep[k]),
            still,
            None,
            loss_fn=loss_fn if k == num_stages - 1 else None,
            needs_input_grad=any(p.requires_grad for layer in copies[: bounds[k]] for p in layer.parameters()),
            device=tensors_of(batch[0])[0].device,
            seed=0,
        )
        for k in range(num_stages)
    ]
    engine = LocalEngine(stages, method, num_microbatches, Tracer(False))
    startup = math.ceil(lead(method, num_stages, 0) / num_microbatches) + 3
    times: list[list[float]] = [[] for _ in range(num_stages)]
    with busy_neighbours(neighbours, copies, batch[0]):
        for step in range(startup + steps):
            before = [spent.seconds()["busy"] for spent in engine.working_times]
            with autocast() if autocast is not None else nullcontext():
                engine.step(*batch)
            if step >= startup:
                for own, spent, then in zip(times, engine.working_times, before, strict=True):
                    own.append(spent.seconds()["busy"] - then)
    engine.close()
    return [StageTrial(statistics.median(own), relative_spread(own)) for own in times]


def relative_spread(times: Sequence[float]) -> float:
    """The interquartile range over the median."""
    median = statistics.median(times)
    if len(times) < 4 or not median:
        return 0.0
    low, _, high = statistics.quantiles(times, n=4)
    return (high - low) / median
