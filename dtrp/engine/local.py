"""The engine that runs all stages in one process."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from torch import Tensor

from ..comm.message import Note
from ..errors import StageError, naming
from ..measure.trace import Tracer
from ..methods import Method
from ..schedule import Action, StageOrder
from ..stage.stage import Stage
from ..stage.stash import MicroBatch
from ..tensors.pytree import num_samples, split
from ..typing import Tree
from .base import Engine, Progress
from .loss_weights import part_of_loss, weight_of

T = TypeVar("T")


class LocalEngine(Engine):
    """All stages in one process: each slot runs as soon as its inputs are there.

    The result does not depend on how the stages' slots interleave, since stages share nothing but messages, and
    parameters that change only when all stages have finished a mini-batch. The order chosen, a slot of each stage in
    turn, keeps at most one message waiting, and on several devices launches the work of all before it waits for any.
    """

    alone = is_first = takes_x = takes_y = True
    name = "all stages, in one process"

    def __init__(
        self,
        stages: Sequence[Stage],
        method: Method,
        num_microbatches: int,
        tracer: Tracer,
        microbatch_samples: int = 1,
    ) -> None:
        super().__init__(stages, method, num_microbatches, tracer, microbatch_samples)
        self.ranks = [0]
        self._queues: list[deque[deque[Action]]] = [deque() for _ in stages]  # the slots of each stage
        # By stage and micro-batch; micro-batches and targets are the same for all stages.
        self._inputs: list[dict[int, Tree]] = [{} for _ in stages]
        self._gradients: list[dict[int, Tree | None]] = [{} for _ in stages]
        self._micros: dict[int, MicroBatch] = {}
        self._targets: dict[int, Tree] = {}
        self._added: dict[int, Tensor] = {}  # the sum of the terms that stages have added to the loss
        self._clips_together = stages[0].rule.together
        self._ties = [tie for stage in stages for tie in stage.ties if tie.trained and tie.owner == stage.index]
        self._ready_to_update: set[int] = set()  # stages before their U, where all wait for the last
        self._norms: list[float] | None = None  # of the mini-batch's gradient, by stage, where all count for all

    def step(self, x: Tree, y: Tree, weights: Sequence[float] | None = None) -> Tensor:
        self._check_losses()
        self._ready_to_update.clear()
        for working_time in self.working_times:
            working_time.begin()
        samples, inputs = num_samples(x), self.cut(x)
        parts = len(inputs)
        shares = [None] * parts if weights is None else [part_of_loss(weight, sum(weights)) for weight in weights]
        numbers = range(self._next_microbatch, self._next_microbatch + parts)
        for m, part, target, share in zip(numbers, inputs, split(y, parts), shares, strict=True):
            self._micros[m] = MicroBatch(m, self.num_updates, num_samples(part) / samples, share)
            self._inputs[0][m], self._targets[m] = part, target
        self._next_microbatch += parts
        self.num_updates += 1
        self._run(lambda order: order.minibatch(parts))
        self.proposals.agreed = self.proposals.take()
        return self._losses.total()

    def flush(self) -> None:
        self._run(StageOrder.flush)
        self._check_finite()
        for stage in self.stages:
            stage.rest()

    def infer(self, x: Tree) -> Tree:
        for stage in self.stages:
            x = stage.infer(x)
        return x

    def gather(self, method: str, value: T) -> list[T]:
        return [value]

    def gather_stages(self, method: str, part: Callable[[Stage], T]) -> list[T]:
        return [part(stage) for stage in self.stages]

    gather_stages_to_first = gather_stages

    def all_or_none(self, method: str, job: Callable[[], T], error: type[Exception] = RuntimeError) -> T:
        return job()

    def progress(self, method: str) -> list[Progress]:
        self._check_finite()
        return [
            Progress(
                self.num_updates,
                self._next_microbatch,
                order.position(),
                [_note_of(self._micros[m]) for m in range(order.next_backward, order.next_forward)],
                [1] * (self.num_updates - order.next_update),
                [gradients[m] for m in sorted(gradients)],
            )
            for order, gradients in zip(self._orders, self._gradients, strict=True)
        ]

    def _restore(self, index: int, saved: Progress) -> None:
        for note, gradient in zip(saved.notes, saved.gradients, strict=False):
            self._gradients[index][note.microbatch] = gradient
        for note in saved.notes:
            m = note.microbatch
            if note.weight >= 0 or m not in self._micros:  # on ranks some stages did not know the weight yet
                self._micros[m] = MicroBatch(m, note.minibatch, note.samples / note.total, weight_of(note))

    def _check_losses(self) -> None:
        """Refuse a loss that is not finite, or the gradient of an earlier mini-batch that has made it so."""
        try:
            self._losses.check()
        except StageError as error:
            causes = []
            for stage in self.stages:
                try:
                    stage.check_gradients()
                except StageError as refused:
                    causes += [refused] if refused.minibatch < error.minibatch else []
            if causes:  # it goes from stage to stage, beginning with the last
                raise min(causes, key=lambda cause: (cause.minibatch, -cause.stage)) from None
            raise

    def _forget(self) -> None:
        super()._forget()
        for queue in self._queues:
            queue.clear()
        for held in (*self._inputs, *self._gradients, self._micros, self._targets, self._added):
            held.clear()

    def _run(self, slots_of: Callable[[StageOrder], Iterable[Sequence[Action]]]) -> None:
        """Run slots of all stages, a slot of each stage in turn, as far as its inputs are there."""
        for queue, order in zip(self._queues, self._orders, strict=True):
            queue.extend(deque(slot) for slot in slots_of(order))
        while any(self._queues):
            moved = False
            for stage, queue in enumerate(self._queues):
                while queue and queue[0] and self._is_ready(stage, queue[0][0]):
                    self._do(stage, queue[0].popleft())
                    moved = True
                if queue and not queue[0]:
                    queue.popleft()
            assert moved, "the schedule deadlocks"

    def _is_ready(self, stage: int, action: Action) -> bool:
        if action.kind == "F":
            return action.index in self._inputs[stage]
        if action.kind in "BI" and stage < len(self.stages) - 1 and not self._has_local_losses:
            return action.index in self._gradients[stage]
        return action.kind != "U" or self._may_update(stage, action)

    def _may_update(self, stage: int, action: Action) -> bool:
        """Where gradients of several stages count for one, an update waits until all have finished the mini-batch."""
        self.stages[stage].settle()
        if not (self._clips_together or self._ties) or len(self._ready_to_update) == len(self.stages):
            return True
        self._ready_to_update.add(stage)
        if len(self._ready_to_update) < len(self.stages):
            return False
        for tie in self._ties:
            owner = self.stages[tie.owner]
            with naming(tie.owner, action, owner.version):
                owner.add_gradients(tie, [self.stages[k].take_gradient(tie) for k in tie.partners(tie.owner)])
        self._norms = [stage.gradient_norm() for stage in self.stages] if self._clips_together else None
        return True

    def _do(self, index: int, action: Action) -> None:
        stage, m = self.stages[index], action.index
        minibatch = stage.version if action.kind in "WU" else self._micros[m].minibatch
        with (
            naming(index, action, minibatch),
            self.working_times[index].working(),
            self._tracer.action(action, index),
        ):
            if action.kind == "F":
                self._forward(index, m)
            elif action.kind == "U":
                stage.update(self._norms)
            elif action.kind == "R":
                stage.recompute()
            elif action.kind == "W":
                stage.weight_backward(m)
            else:
                self._backward(index, m)

    def _forward(self, index: int, m: int) -> None:
        stage, micro, is_last = self.stages[index], self._micros[m], index == len(self.stages) - 1
        target = self._targets[m] if is_last or self._has_local_losses else None
        out = stage.forward(micro, self._inputs[index].pop(m), target)
        if is_last:
            del self._targets[m]
            self._losses.add(micro, out, self._added.pop(m, None))
            return
        self._inputs[index + 1][m] = out
        if not self._has_local_losses and (added := stage.added_loss(self._added.get(m))) is not None:
            self._added[m] = added
        if self._has_local_losses and (loss := stage.newest_loss()) is not None:
            self._losses.watch(index, micro, loss)

    def _backward(self, index: int, m: int) -> None:
        last = len(self.stages) - 1
        if self._has_local_losses:
            self.stages[index].backward(None)
        else:
            gradient = self._gradients[index].pop(m) if index < last else None
            self.stages[index].weigh(self._micros[m].weight)
            gradient = self.stages[index].backward(gradient)
            if index > 0:
                self._gradients[index - 1][m] = gradient
        if index == (last if self._has_local_losses else 0):  # the last stage to need it
            del self._micros[m]


def _note_of(micro: MicroBatch) -> Note:
    """What a checkpoint has of a micro-batch; numbers of samples matter between ranks alone."""
    note = Note(micro.index, micro.minibatch, 0, 1, 1)
    if micro.weight is None:
        return note
    return (
        note._replace(weight=0.0, total_weight=0.0)
        if math.isnan(micro.weight)
        else note._replace(weight=micro.weight, total_weight=1.0)
    )
