"""A few steps of the real thing: the chosen stages on the engine, in this process.

Sums of layers leave out what a stage does beside its layers, and layers that are measured one after another find their
memory warmer than in a run. So the stages that have been chosen are run, and their times corrected by what that shows.
"""

from __future__ import annotations

import copy
import itertools
import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..engine.local import LocalEngine
from ..measure.trace import Tracer
from ..methods import Keep, Method
from ..schedule import lead
from ..splitting.stages import stage_of
from ..stage.specs import StageNetwork, StagePosition, StageTraining
from ..stage.stage import Stage
from ..tensors.pytree import tensors_of
from ..typing import OptimizerFactory
from .profile import Profiler, relative_spread

_STEPS = 12


class StageTrial(NamedTuple):
    """A stage's seconds of work for a mini-batch: the median, and the interquartile range over it."""

    minibatch_s: float
    spread: float


def try_stages(
    profiler: Profiler,
    method: Method,
    cuts: Sequence[int],
    keeps: Sequence[Keep],
    num_microbatches: int,
    batch_size: int,
    *,
    neighbours: int | None = None,
) -> list[StageTrial]:
    """Train copies of the profiler's layers for some steps, at a learning rate of 0.

    Args:
        profiler: has the layers, the example, the loss and the optimizer.
        method: method of the run.
        cuts: index of the first layer of stages 1..K-1.
        keeps: what every stage keeps.
        num_microbatches: A.
        batch_size: samples in a mini-batch.
        neighbours: processes that work meanwhile; None: as many as beside the profiler.

    Returns:
        A trial for every stage.
    """
    batch = profiler.batch(batch_size)
    with profiler.measuring(batch[0], neighbours):
        stages = _stages(profiler, method, cuts, keeps, tensors_of(batch[0])[0].device)
        engine = LocalEngine(stages, method, num_microbatches, Tracer(False))
        startup = math.ceil(lead(method, len(stages), 0) / num_microbatches) + 3
        busy_s = []  # by step and stage, since the beginning
        for _ in range(startup + _STEPS):
            with profiler.autocast():
                engine.step(*batch)
            busy_s.append([spent.seconds()["busy"] for spent in engine.working_times])
        engine.close()
    trials = []
    for busy in zip(*busy_s[startup - 1 :], strict=True):
        times = [after - before for before, after in itertools.pairwise(busy)]
        trials.append(StageTrial(statistics.median(times), relative_spread(times)))
    return trials


def _stages(
    profiler: Profiler, method: Method, cuts: Sequence[int], keeps: Sequence[Keep], device: torch.device
) -> list[Stage]:
    """Copies of the layers in stages; no Pipeline, which under torchrun would be a rank among several."""
    layers = copy.deepcopy(profiler.layers)
    bounds = [0, *cuts, len(layers)]
    last = len(cuts)
    return [
        Stage(
            StagePosition(k, last + 1, device, seed=0),
            StageNetwork(
                stage_of((str(i), layers[i]) for i in range(bounds[k], bounds[k + 1])),
                loss_fn=profiler.loss_fn if k == last else None,
                needs_input_grad=any(p.requires_grad for layer in layers[: bounds[k]] for p in layer.parameters()),
            ),
            StageTraining(method.keeping(keep), _at_rest(profiler.make_optimizer)),
        )
        for k, keep in enumerate(keeps)
    ]


def _at_rest(make_optimizer: OptimizerFactory | None) -> OptimizerFactory:
    """The optimizer at a learning rate of 0; None: SGD."""

    def make(parameters: list[nn.Parameter]) -> Optimizer:
        optimizer = torch.optim.SGD(parameters, lr=0.0) if make_optimizer is None else make_optimizer(parameters)
        for group in optimizer.param_groups:
            group["lr"] = torch.zeros_like(group["lr"]) if isinstance(group["lr"], Tensor) else 0.0
        return optimizer

    return make
