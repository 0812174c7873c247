"""A few steps of the real thing: the chosen stages on the engine, in this process.

Sums of layers leave out what a stage does beside its layers, and layers that are measured one after another find their
memory warmer than in a run. So the stages that have been chosen are run, and their times corrected by what that shows.

What is compared is run in turns, a few steps of each in every round: a machine is up to half again slower from one
minute to the next, and so it is slower for all. Stages are made anew for every turn, so that those of one trial alone
take memory.
"""

from __future__ import annotations

import copy
import itertools
import math
import statistics
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..engine.local import LocalEngine
from ..errors import StageError
from ..measure.trace import Tracer
from ..methods import Keep, Method
from ..schedule import lead
from ..splitting.stages import stage_of
from ..stage.specs import StageNetwork, StagePosition, StageTraining
from ..stage.stage import Stage
from ..tensors.pytree import tensors_of
from ..typing import OptimizerFactory, Tree
from .profile import Profiler
from .spread import relative_spread

_STEPS = 12
_STEPS_A_TURN, _LEAST_TURN_S = 3, 0.05


class StageTrial(NamedTuple):
    """A stage's seconds of work for a mini-batch.

    Attributes:
        minibatch_s: the median.
        spread: interquartile range over the median, of the rounds' medians where trials took turns; None: not
            measurable, for which there were too few.
        scatter: interquartile range of single steps, over the median; None: not measurable.
    """

    minibatch_s: float
    spread: float | None
    scatter: float | None


@dataclass(frozen=True)
class TrialSettings:
    """Stages to try.

    Attributes:
        method: method of the run.
        cuts: index of the first layer of stages 1..K-1.
        keeps: what every stage keeps.
        num_microbatches: A.
        alone: whether no other process works meanwhile; else as many as beside the profiler.
        optional: whether they may be left out, where they cannot train with this model and optimizer.
    """

    method: Method
    cuts: Sequence[int]
    keeps: Sequence[Keep]
    num_microbatches: int
    alone: bool = False
    optional: bool = False


def try_stages(profiler: Profiler, settings: TrialSettings, batch_size: int) -> list[StageTrial]:
    """Train copies of the profiler's layers for some steps, at a learning rate of 0.

    Args:
        profiler: has the layers, the example, the loss and the optimizer.
        settings: the stages.
        batch_size: samples in a mini-batch.

    Returns:
        A trial for every stage.
    """
    batch = profiler.batch(batch_size)
    with profiler.measuring(batch[0], 0 if settings.alone else None):
        by_stage = _stage_times(profiler, settings, batch, _STEPS)
    spreads = list(map(relative_spread, by_stage))
    return list(map(StageTrial, map(statistics.median, by_stage), spreads, spreads))


def try_in_turns(
    profiler: Profiler, settings: Sequence[TrialSettings], batch_size: int
) -> list[list[StageTrial] | None]:
    """As `try_stages`, with several settings that take turns, in as many rounds as the profiler repeats.

    Returns:
        By settings, a trial for every stage; None: they cannot train.
    """
    batch = profiler.batch(batch_size)
    turns: list[list[list[list[float]]]] = [[] for _ in settings]  # by settings, round and stage, the steps' seconds
    failed: set[int] = set()
    with profiler.measuring(batch[0]) as neighbours:
        for _, place in itertools.product(range(profiler.repeats), range(len(settings))):
            stages = settings[place]
            if place in failed:
                continue
            try:
                with neighbours.resting() if stages.alone else nullcontext():
                    turns[place].append(_stage_times(profiler, stages, batch, _STEPS_A_TURN, _LEAST_TURN_S))
            except (StageError, TypeError):
                if not stages.optional:
                    raise
                failed.add(place)
    return [
        None if place in failed else list(map(_trial_of_rounds, zip(*rounds, strict=True)))
        for place, rounds in enumerate(turns)
    ]


def _trial_of_rounds(rounds_s: Sequence[Sequence[float]]) -> StageTrial:
    """The trial of a stage whose steps took ``rounds_s`` seconds, by round."""
    steps_s = list(itertools.chain.from_iterable(rounds_s))
    spread = relative_spread(list(map(statistics.median, rounds_s)))
    return StageTrial(statistics.median(steps_s), spread, relative_spread(steps_s))


def _stage_times(
    profiler: Profiler, settings: TrialSettings, batch: tuple[Tree, Tree], steps: int, least_s: float = 0.0
) -> list[list[float]]:
    """By stage, the seconds of work of ``steps`` steps, or more within ``least_s`` s; after those of the start-up."""
    stages = _stages(profiler, settings, tensors_of(batch[0])[0].device)
    engine = LocalEngine(stages, settings.method, settings.num_microbatches, Tracer(False))
    startup = math.ceil(lead(settings.method, len(stages), 0) / settings.num_microbatches) + 3
    busy_s: list[list[float]] = []  # by step and stage, since the beginning
    until = time.perf_counter() + least_s
    while len(busy_s) < startup + steps or time.perf_counter() < until:
        with profiler.autocast():
            engine.step(*batch)
        busy_s.append([spent.seconds()["busy"] for spent in engine.working_times])
    engine.close()
    return [
        [after - before for before, after in itertools.pairwise(busy)]
        for busy in zip(*busy_s[startup - 1 :], strict=True)
    ]


def _stages(profiler: Profiler, settings: TrialSettings, device: torch.device) -> list[Stage]:
    """Copies of the layers in stages; no Pipeline, which under torchrun would be a rank among several."""
    layers = copy.deepcopy(profiler.layers)
    bounds = [0, *settings.cuts, len(layers)]
    last = len(settings.cuts)
    return [
        Stage(
            StagePosition(k, last + 1, device, seed=0),
            StageNetwork(
                stage_of((str(i), layers[i]) for i in range(bounds[k], bounds[k + 1])),
                loss_fn=profiler.loss_fn if k == last else None,
                needs_input_grad=any(p.requires_grad for layer in layers[: bounds[k]] for p in layer.parameters()),
            ),
            StageTraining(settings.method.keeping(keep), _at_rest(profiler.make_optimizer)),
        )
        for k, keep in enumerate(settings.keeps)
    ]


def _at_rest(make_optimizer: OptimizerFactory | None) -> OptimizerFactory:
    """The optimizer at a learning rate of 0; None: SGD."""

    def make(parameters: list[nn.Parameter]) -> Optimizer:
        optimizer = torch.optim.SGD(parameters, lr=0.0) if make_optimizer is None else make_optimizer(parameters)
        for group in optimizer.param_groups:
            group["lr"] = torch.zeros_like(group["lr"]) if isinstance(group["lr"], Tensor) else 0.0
        return optimizer

    return make
