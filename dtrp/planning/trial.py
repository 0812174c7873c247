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
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..engine.local import LocalEngine
from ..errors import StageError
from ..measure.trace import Tracer
from ..methods import Keep, Method
from ..optim.factories import with_keywords
from ..schedule import Action, lead
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
        weight_share: share of its backwards' time that their second parts take; None where backwards are whole.
    """

    minibatch_s: float
    spread: float | None
    scatter: float | None
    weight_share: float | None = None


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
    trials = []
    for times in by_stage:
        spread = relative_spread(times.steps_s)
        trials.append(StageTrial(statistics.median(times.steps_s), spread, spread, times.weight_share))
    return trials


def try_in_turns(
    profiler: Profiler, settings: Sequence[TrialSettings], batch_size: int
) -> list[list[StageTrial] | None]:
    """As `try_stages`, with several settings that take turns, in as many rounds as the profiler repeats.

    Returns:
        By settings, a trial for every stage; None: they cannot train.
    """
    batch = profiler.batch(batch_size)
    turns: list[list[list[_StageTimes]]] = [[] for _ in settings]  # by settings, round and stage
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


class _StageTimes(NamedTuple):
    """The seconds of a stage's work in each step, and the share of its backwards that their second parts take."""

    steps_s: list[float]
    weight_share: float | None


def _trial_of_rounds(rounds: Sequence[_StageTimes]) -> StageTrial:
    """The trial of a stage, of which there are times by round."""
    steps_s = [seconds for times in rounds for seconds in times.steps_s]
    spread = relative_spread([statistics.median(times.steps_s) for times in rounds])
    shares = [times.weight_share for times in rounds if times.weight_share is not None]
    share = statistics.median(shares) if shares else None
    return StageTrial(statistics.median(steps_s), spread, relative_spread(steps_s), share)


class _PartTimes(Tracer):
    """Takes the time of the two parts of every backward, by stage.

    Args:
        device: device of the stages; another one than the CPU is waited for.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__(False)
        self.seconds: dict[tuple[int, str], list[float]] = defaultdict(list)
        self._device = device

    @contextmanager
    def action(self, action: Action, stage: int) -> Iterator[None]:
        start = self._now()
        yield
        if action.kind in "IW":
            self.seconds[stage, action.kind].append(self._now() - start)

    def _now(self) -> float:
        if self._device.type != "cpu":
            torch.get_device_module(self._device).synchronize(self._device)
        return time.perf_counter()

    def share(self, stage: int) -> float | None:
        """The share of the second parts; None: not measurable."""
        first, second = (statistics.median(self.seconds[stage, kind] or [0.0]) for kind in "IW")
        return second / (first + second) if first + second else None


def _stage_times(
    profiler: Profiler, settings: TrialSettings, batch: tuple[Tree, Tree], steps: int, least_s: float = 0.0
) -> list[_StageTimes]:
    """By stage, the seconds of work of ``steps`` steps, or more within ``least_s`` s; after those of the start-up."""
    device = tensors_of(batch[0])[0].device
    stages = _stages(profiler, settings, device)
    parts = _PartTimes(device) if settings.method.split_backward else None
    engine = LocalEngine(stages, settings.method, settings.num_microbatches, parts or Tracer(False))
    startup = math.ceil(lead(settings.method, len(stages), 0) / settings.num_microbatches) + 3
    busy_s: list[list[float]] = []  # by step and stage, since the beginning
    until = time.perf_counter() + least_s
    while len(busy_s) < startup + steps or time.perf_counter() < until:
        if parts is not None and len(busy_s) == startup:
            parts.seconds.clear()  # those of the start-up
        with profiler.autocast():
            engine.step(*batch)
        busy_s.append([spent.seconds()["busy"] for spent in engine.working_times])
    engine.close()
    return [
        _StageTimes([b - a for a, b in itertools.pairwise(busy)], None if parts is None else parts.share(stage))
        for stage, busy in enumerate(zip(*busy_s[startup - 1 :], strict=True))
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

    def make(parameters: list[nn.Parameter], *, stage: int, num_stages: int, delay: int, named: Any) -> Optimizer:
        if make_optimizer is None:
            return torch.optim.SGD(parameters, lr=0.0)
        optimizer = with_keywords(
            make_optimizer, parameters, stage=stage, num_stages=num_stages, delay=delay, named=named
        )
        for group in optimizer.param_groups:
            group["lr"] = torch.zeros_like(group["lr"]) if isinstance(group["lr"], Tensor) else 0.0
        return optimizer

    return make
