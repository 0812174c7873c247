"""What both engines share: the interface that a pipeline uses, the stages' progress, and the mini-batch's losses."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import Tensor

from ..comm.message import Note
from ..comm.proposals import Proposals
from ..errors import StageError
from ..measure.trace import Span, Tracer
from ..measure.wait_time import WorkingTime
from ..methods import Method
from ..schedule import Action, Position, StageOrder, num_parts
from ..stage.stage import Stage
from ..stage.stash import MicroBatch
from ..tensors.pytree import num_samples, split
from ..typing import Tree

T = TypeVar("T")
NO_WEIGHT = "has no mean: loss_weight gave 0 for all of its targets; leave such a mini-batch out"


@dataclass
class Progress:
    """What an engine knows of one stage between two steps, besides what the stage itself holds.

    Args:
        num_updates: the number of mini-batches stepped.
        next_microbatch: the number of the next micro-batch, counted since the pipeline was made.
        position: of the stage in its order of work.
        notes: of the micro-batches between their F and their B, the oldest first.
        samples: the numbers of samples of the mini-batches that have not had their U.
        gradients: of the stage's outputs for the oldest of ``notes``, those that the next stage has returned; None for
            one that has no gradient.
        keywords: for each of ``notes`` the keyword arguments that the caller has given this stage; empty where there
            are none.
    """

    num_updates: int
    next_microbatch: int
    position: Position
    notes: list[Note] = field(default_factory=list)
    samples: list[int] = field(default_factory=list)
    gradients: list[Tree | None] = field(default_factory=list)
    keywords: list[dict[str, Any]] = field(default_factory=list)


class Engine(ABC):
    """Runs the slots of this process's stages: all of them (`LocalEngine`), or one (`DistributedEngine`).

    In the methods below ``method`` is the name of the pipeline's method that every rank has called, for messages.

    Args:
        stages: the stages of this process.
        method: the row of the method that trains.
        num_microbatches: A.
        tracer: records every action.
        microbatch_samples: the least number of samples in a micro-batch, as `dtrp.schedule.num_parts` takes it.

    Attributes:
        alone: whether no other rank takes part.
        ranks: all ranks, in the order of `gather`; of one process [0].
        is_first: whether this is the process that writes files.
        name: of this process, for people.
        takes_x: whether this process hosts the first stage.
        takes_y: whether this process hosts the last stage.
        working_times: of the stages of this process.
        num_updates: the number of mini-batches stepped.
        proposals: what this process has proposed to all ranks, and what they have agreed on.
    """

    alone: bool
    ranks: list[int]
    is_first: bool
    name: str
    takes_x: bool
    takes_y: bool

    def __init__(
        self,
        stages: Sequence[Stage],
        method: Method,
        num_microbatches: int,
        tracer: Tracer,
        microbatch_samples: int = 1,
    ) -> None:
        last = stages[-1]
        self.stages = stages
        self.working_times = [WorkingTime() for _ in stages]
        self.num_updates = 0
        self.proposals = Proposals()
        self._num_microbatches, self._microbatch_samples, self._tracer = num_microbatches, microbatch_samples, tracer
        self._next_microbatch = 0
        self._has_local_losses = method.local
        self._orders = [StageOrder(method, stage.num_stages, stage.index) for stage in stages]
        stops = last.rule.on_nonfinite == "stop"
        self._losses = Losses(last.num_stages - 1, at_once=last.device.type == "cpu", stops=stops)

    @abstractmethod
    def step(self, x: Tree, y: Tree, weights: Sequence[float] | None = None) -> Tensor | None:
        """Train on a mini-batch; its mean loss, where the last stage is.

        Args:
            x: the input of the mini-batch.
            y: the targets.
            weights: what each micro-batch counts for, where the targets are read; None: its samples.
        """

    def divide_by(self, num_microbatches: int, microbatch_samples: int) -> None:
        """Cut mini-batches so from the next one on, as the run did that a checkpoint is of."""
        self._num_microbatches, self._microbatch_samples = num_microbatches, microbatch_samples
        for stage in self.stages:
            stage.num_microbatches = num_microbatches

    def num_parts(self, samples: int) -> int:
        """The number of micro-batches that so many samples make."""
        return num_parts(samples, self._num_microbatches, self._microbatch_samples)

    def cut(self, value: Tree) -> Sequence[Tree]:
        """The micro-batches of a mini-batch's inputs or targets."""
        return split(value, self.num_parts(num_samples(value)))

    @abstractmethod
    def flush(self) -> None:
        """Run the backwards and updates that are left."""

    @abstractmethod
    def infer(self, x: Tree) -> Tree:
        """The model's output in eval mode; None on ranks without the last stage."""

    @abstractmethod
    def gather(self, method: str, value: T) -> list[T]:
        """Every process's value, by rank, on every rank."""

    @abstractmethod
    def gather_stages(self, method: str, part: Callable[[Stage], T]) -> list[T]:
        """``part`` of every stage, on every rank."""

    @abstractmethod
    def gather_stages_to_first(self, method: str, part: Callable[[Stage], T]) -> list[T] | None:
        """``part`` of every stage, on the first rank; None elsewhere."""

    def try_on_all(
        self, method: str, job: Callable[[], T], reason: Callable[[Exception], str]
    ) -> tuple[T | None, Exception | None, dict[int, str]]:
        """Run ``job`` on every rank, and tell all ranks where it has failed.

        Args:
            method: the caller's method, for messages.
            job: raises where it cannot be done.
            reason: what the other ranks are told of an error.

        Returns:
            What ``job`` has returned here, or what it has raised, and the reasons of the ranks where it has failed.
        """
        result, error = None, None
        try:
            result = job()
        except Exception as failed:
            error = failed
        reasons = self.gather(method, None if error is None else reason(error))
        return result, error, {rank: text for rank, text in zip(self.ranks, reasons, strict=True) if text is not None}

    @abstractmethod
    def all_or_none(self, method: str, job: Callable[[], T], error: type[Exception] = RuntimeError) -> T:
        """Run ``job`` on every rank; if it fails on a rank, every rank raises, and the run goes on.

        Args:
            method: the caller's method, for messages.
            job: raises where it cannot be done.
            error: what the ranks raise on which it has not failed.
        """

    def spans(self) -> list[Span]:
        """What this process has traced."""
        return list(self._tracer.spans)

    @abstractmethod
    def progress(self, method: str) -> list[Progress]:
        """Of the stages of this process. Every message under way has arrived then, and stays for its backward."""

    def resume(self, progress: Sequence[Progress]) -> None:
        """Go on from there, after a call of `progress`; what was in flight is dropped."""
        self._forget()
        for index, saved in enumerate(progress):
            self._orders[index].resume(saved.position)
            self.stages[index].version = saved.position.next_update
            self.num_updates, self._next_microbatch = saved.num_updates, saved.next_microbatch
            self._restore(index, saved)

    def resume_at_rest(self, num_updates: int, next_microbatch: int) -> None:
        """Go on after so many updates with nothing in flight."""
        position = Position(next_microbatch, next_microbatch, num_updates, ())
        self.resume([Progress(num_updates, next_microbatch, position)] * len(self.stages))

    def fail(self, error: BaseException) -> None:
        """An error ends the run: drop what is in flight, and tell the other ranks."""
        self._drop()

    def close(self) -> None:
        """Drop what is in flight, and leave the other ranks."""
        self._drop()

    @abstractmethod
    def _restore(self, index: int, saved: Progress) -> None:
        """Take back what is in flight at a stage of this process."""

    def _drop(self) -> None:
        for stage in self.stages:
            stage.drop()
        self._forget()

    def _forget(self) -> None:
        """Drop what is in flight, but for what the stages hold."""
        self._losses.drop()

    def _check_losses(self) -> None:
        """Refuse a loss that is not finite."""
        self._losses.check()

    def _check_finite(self) -> None:
        """Refuse a loss, or a gradient, that is not finite."""
        self._check_losses()
        for stage in self.stages:
            stage.check_gradients()


class Losses:
    """The micro-batches' shares of a mini-batch's loss, and whether they are finite.

    Args:
        last_stage: K-1.
        at_once: check each share before anything is learned from it. Otherwise check when the next mini-batch comes: an
            accelerator would have to be waited for in the middle of a slot.
        stops: whether a loss that is not finite ends the run.
    """

    def __init__(self, last_stage: int, *, at_once: bool, stops: bool = True) -> None:
        self._last_stage, self._at_once, self._stops = last_stage, at_once, stops
        self._terms: list[Tensor] = []  # of the current mini-batch
        self._unchecked: list[tuple[int, MicroBatch, Tensor]] = []  # with their stages

    def add(self, micro: MicroBatch, loss: Tensor, added: Tensor | None = None) -> None:
        """Add the last stage's part of the loss, and the terms that earlier stages have ``added``."""
        if added is not None and micro.factor:
            loss = loss + added.to(loss.device) * micro.factor
        self._terms.append(loss)
        self.watch(self._last_stage, micro, loss)

    def watch(self, stage: int, micro: MicroBatch, loss: Tensor) -> None:
        """A loss that ``stage`` learns from."""
        if self._stops:
            self._unchecked.append((stage, micro, loss))
        if self._at_once:
            self.check()

    def sum(self) -> float:
        """The loss of the current mini-batch so far."""
        return sum(float(term) for term in self._terms)

    def total(self) -> Tensor:
        """The mini-batch's loss; the next mini-batch begins."""
        total = self._terms[0]
        for term in self._terms[1:]:
            total = total + term
        self._terms.clear()
        return total

    def check(self) -> None:
        """Refuse a loss that is not finite."""
        for stage, micro, loss in self._unchecked:
            if not math.isfinite(value := float(loss)):
                where = "" if stage == self._last_stage else f" (stage {stage})"
                reason = f"is {value}; lower the learning rate, or look at the data of this mini-batch"
                if math.isnan(micro.factor):
                    reason = NO_WEIGHT
                cause = FloatingPointError(f"the loss of mini-batch {micro.minibatch} {reason}{where}")
                raise StageError(stage, Action("F", micro.index), micro.minibatch, cause) from cause
        self._unchecked.clear()

    def drop(self) -> None:
        self._terms.clear()
        self._unchecked.clear()
