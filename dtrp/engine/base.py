"""What `Pipeline` asks of an engine, and the bookkeeping of losses that engines share."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from torch import Tensor

from ..comm.message import Note
from ..comm.proposals import Proposals
from ..errors import StageError
from ..measure.trace import Span
from ..measure.wait_time import WorkingTime
from ..schedule import Action, Position
from ..stage.stage import Stage
from ..stage.stash import MicroBatch

T = TypeVar("T")


@dataclass
class Progress:
    """What an engine knows of one stage between two steps, besides what the stage itself holds.

    Args:
        num_updates: mini-batches stepped.
        next_microbatch: counted since the pipeline was made.
        position: in the stage's order of work.
        notes: of the micro-batches between their F and their B here, the oldest first.
        samples: in each mini-batch that has not had its U here.
        gradients: of the outputs of the oldest of ``notes``, from the next stage, which has had their B; None for one that
            has no gradient.
        keywords: of each of ``notes``, what the caller has given this stage for it; empty where stages are given nothing.
    """

    num_updates: int
    next_microbatch: int
    position: Position
    notes: list[Note]
    samples: list[int]
    gradients: list[Any]
    keywords: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def at_rest(cls, num_updates: int, next_microbatch: int) -> Progress:
        """Nothing is in flight."""
        return cls(
            num_updates, next_microbatch, Position(next_microbatch, next_microbatch, num_updates, ()), [], [], []
        )


class Engine(Protocol):
    """Runs the slots of this process's stages: all of them (`LocalEngine`), or one (`DistributedEngine`)."""

    @property
    def stages(self) -> Sequence[Stage]:
        """This process's stages."""

    @property
    def alone(self) -> bool:
        """Whether no other rank takes part."""

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes files."""

    @property
    def name(self) -> str:
        """Of this process, for people."""

    @property
    def takes_x(self) -> bool:
        """Whether this process hosts the first stage."""

    @property
    def takes_y(self) -> bool:
        """Whether this process hosts the last stage."""

    @property
    def working_times(self) -> Sequence[WorkingTime]:
        """Of this process's stages."""

    num_updates: int  # mini-batches stepped
    proposals: Proposals

    def step(self, x: Any, y: Any) -> Tensor | None: ...
    def flush(self) -> None: ...
    def infer(self, x: Any) -> Any: ...

    def gather(self, method: str, value: T) -> list[T]:
        """Every process's value, by rank, on every rank; ``method``, called on every rank, is for messages."""

    def spans(self) -> list[Span]:
        """What this process has traced."""

    def of_stages(self, method: str, part: Callable[[Stage], T]) -> list[T]:
        """``part`` of every stage, on every rank."""

    def of_stages_to_first(self, method: str, part: Callable[[Stage], T]) -> list[T] | None:
        """``part`` of every stage, on the first rank; None elsewhere."""

    def all_or_none(self, method: str, job: Callable[[], T], error: type[Exception] = RuntimeError) -> T:
        """Run ``job`` on every rank; if it fails on a rank, every rank raises, and the run goes on.

        Args:
            method: the caller's method, for messages.
            job: raises where it cannot be done.
            error: what the ranks raise on which it has not failed.
        """

    def progress(self, method: str) -> list[Progress]:
        """Of this process's stages; every message under way has arrived then, and stays for its backward."""

    def resume(self, progress: Sequence[Progress]) -> None:
        """Go on from there, stages and all; what was in flight is dropped. `progress` has been called before."""

    def fail(self, error: BaseException) -> None:
        """An error ends the run: let go of what is in flight, and tell the other ranks."""

    def close(self) -> None:
        """Let go of what is in flight, and of the other ranks."""


def come_to_rest(engine: Engine, num_updates: int, next_microbatch: int) -> None:
    """Bring an engine to a state in which so many updates have been made, and nothing is in flight."""
    engine.resume([Progress.at_rest(num_updates, next_microbatch)] * len(engine.stages))


class Losses:
    """The shares of a mini-batch's loss, and whether they are finite.

    Args:
        at_once: look at each before anything is learned from it. Else, since looking would make the launches of
            a slot wait for an accelerator, when the next mini-batch comes.
        stops: whether one that is not finite ends the run.
    """

    def __init__(self, last_stage: int, *, at_once: bool, stops: bool = True) -> None:
        self._last_stage = last_stage
        self._at_once = at_once
        self._stops = stops
        self._terms: list[Tensor] = []  # of the current mini-batch
        self._unseen: list[tuple[int, MicroBatch, Tensor]] = []  # with their stages

    def add(self, micro: MicroBatch, loss: Tensor) -> None:
        self._terms.append(loss)
        self.watch(self._last_stage, micro, loss)

    def watch(self, stage: int, micro: MicroBatch, loss: Tensor) -> None:
        """A loss that ``stage`` learns from."""
        if self._stops:
            self._unseen.append((stage, micro, loss))
        if self._at_once:
            self.check()

    def sum(self) -> float:
        """Of the current mini-batch's so far."""
        return sum(float(term) for term in self._terms)

    def total(self) -> Tensor:
        """The mini-batch's loss; the next one begins."""
        total = self._terms[0]
        for term in self._terms[1:]:
            total = total + term
        self._terms.clear()
        return total

    def check(self) -> None:
        """Refuse a loss that is not finite."""
        for stage, micro, loss in self._unseen:
            if not math.isfinite(value := float(loss)):
                which = f"stage {stage}, the last" if stage == self._last_stage else f"stage {stage}"
                cause = FloatingPointError(
                    f"the loss of mini-batch {micro.minibatch} is {value}; lower the learning rate, or look at "
                    f"the data of this mini-batch ({which})"
                )
                raise StageError(stage, Action("F", micro.index), micro.minibatch, cause) from cause
        self._unseen.clear()

    def drop(self) -> None:
        self._terms.clear()
        self._unseen.clear()
