"""A few steps of the real thing: the chosen stages on the engine, in this process.

Sums of layers leave out what a stage does beside its layers, and layers that are measured one by one find their
memory warmer than in a run. So the stages that have been chosen are run, and their times corrected by what that shows.
"""

from __future__ import annotations

import copy
import math
import statistics
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..methods import Method
from ..pipeline import Keep, Pipeline
from ..schedule import lead
from .neighbours import busy_neighbours


class StageTrial(NamedTuple):
    """Seconds of a stage's work for a mini-batch: the median, and the interquartile range over it."""

    minibatch_s: float
    spread: float


def try_stages(
    layers: Sequence[tuple[str, nn.Module]],
    batch: tuple[Tensor, Tensor],
    loss_fn: Callable[[Tensor, Tensor], Tensor],
    optimizer: Callable[[list[nn.Parameter]], Optimizer] | None,
    method: Method,
    cuts: Sequence[int],
    keep: Sequence[Keep],
    num_microbatches: int,
    *,
    neighbours: int,
    steps: int,
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
    """
    model = nn.Sequential(OrderedDict((name, copy.deepcopy(layer)) for name, layer in layers))
    num_stages = len(cuts) + 1

    def still(parameters: list[nn.Parameter]) -> Optimizer:
        made = optimizer(parameters) if optimizer is not None else torch.optim.SGD(parameters, lr=0.0)
        for group in made.param_groups:
            group["lr"] = torch.zeros_like(group["lr"]) if isinstance(group["lr"], Tensor) else 0.0
        return made

    device = batch[0].device
    pipe = Pipeline(
        model, still, loss_fn, cuts=list(cuts), method=method, keep=list(keep), num_microbatches=num_microbatches, seed=0,
        devices=device,
    )  # fmt: skip
    module = torch.get_device_module(device) if device.type != "cpu" else None
    times: list[list[float]] = [[] for _ in range(num_stages)]
    with pipe, busy_neighbours(neighbours, [layer for _, layer in layers], batch[0]):
        for step in range(math.ceil(lead(method, num_stages, 0) / num_microbatches) + 3 + steps):
            before = pipe.busy()
            pipe.step(*batch)
            if module is not None:
                module.synchronize(device)
            for k, seconds in pipe.busy().items():
                if step >= math.ceil(lead(method, num_stages, 0) / num_microbatches) + 3:
                    times[k].append(seconds["busy"] - before[k]["busy"])
    return [StageTrial(statistics.median(own), relative_spread(own)) for own in times]


def relative_spread(times: Sequence[float]) -> float:
    """The interquartile range over the median."""
    median = statistics.median(times)
    if len(times) < 4 or not median:
        return 0.0
    low, _, high = statistics.quantiles(times, n=4)
    return (high - low) / median
