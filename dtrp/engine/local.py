"""The engine that runs all stages in one process."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from torch import Tensor

from ..comm.message import Note
from ..comm.proposals import Proposals
from ..errors import StageError, naming
from ..measure.trace import Span, Tracer
from ..measure.wait_time import WorkingTime
from ..methods import Method
from ..schedule import Action, StageOrder
from ..stage.stage import Stage
from ..stage.stash import MicroBatch
from ..tensors.pytree import num_samples, split
from .base import Losses, Progress

T = TypeVar("T")


class LocalEngine:
    """All stages in one process: each slot runs as soon as its inputs are there.

    The result does not depend on how the stages' slots interleave, since a stage shares nothing with
    another but messages, and parameters that change only when all are through with a mini-batch. The
    order chosen, a slot of each stage in turn, keeps at most one message waiting, and on several
    devices launches the work of all before it waits for any.
    """

    alone = is_first = takes_x = takes_y = True
    name = "all stages, in one process"

    def __init__(self, stages: Sequence[Stage], method: Method, num_microbatches: int, tracer: Tracer) -> None:
        num = len(stages)
        self.stages = stages
        self.num_updates = 0
        self.proposals = Proposals()
        self._num_microbatches = num_microbatches
        self._next_microbatch = 0
        self._tracer = tracer
        self.working_times = [WorkingTime() for _ in stages]
        self._local = method.local
        self._orders = [StageOrder(method, num, stage) for stage in range(num)]
        self._queues: list[deque[deque[Action]]] = [deque() for _ in stages]
        self._inputs: list[dict[int, Any]] = [{} for _ in stages]
        self._gradients: list[dict[int, Any]] = [{} for _ in stages]
        self._micros: dict[int, MicroBatch] = {}
        self._targets: dict[int, Any] = {}
        rule = stages[0].rule
        at_once = stages[-1].device.type == "cpu"
        self._losses = Losses(num - 1, at_once=at_once, stops=rule.on_nonfinite == "stop")
        self._together = rule.together
        # A stage owns what it shares with later ones.
        self._ties = [tie for stage in stages for tie in stage.ties if tie.trained and tie.owner == stage.index]
        self._at_update: set[int] = set()  # stages through with the current mini-batch, where all wait for the last
        self._norms: list[float] | None = None  # of its gradient, by stage, where all count for all

    def step(self, x: Any, y: Any) -> Tensor:
        self._check_losses()
        self._at_update.clear()
        for working_time in self.working_times:
            working_time.begin()
        samples = num_samples(x)
        parts = min(self._num_microbatches, samples)
        for part, target in zip(split(x, parts), split(y, parts), strict=True):
            m = self._next_microbatch
            self._micros[m] = MicroBatch(m, self.num_updates, num_samples(part) / samples)
            self._inputs[0][m] = part
            self._targets[m] = target
            self._next_microbatch += 1
        self.num_updates += 1
        for queue, order in zip(self._queues, self._orders, strict=True):
            queue.extend(deque(slot) for slot in order.minibatch(parts))
        self._run()
        self.proposals.agreed = self.proposals.take()
        return self._losses.total()

    def flush(self) -> None:
        for queue, order in zip(self._queues, self._orders, strict=True):
            queue.extend(deque(slot) for slot in order.flush())
        self._run()
        self._check_losses()
        for stage in self.stages:
            stage.check_gradients()
            stage.rest()

    def infer(self, x: Any) -> Any:
        for stage in self.stages:
            x = stage.infer(x)
        return x

    def gather(self, method: str, value: T) -> list[T]:
        return [value]

    def spans(self) -> list[Span]:
        return list(self._tracer.spans)

    def of_stages(self, method: str, part: Callable[[Stage], T]) -> list[T]:
        return [part(stage) for stage in self.stages]

    of_stages_to_first = of_stages

    def all_or_none(self, method: str, job: Callable[[], T], error: type[Exception] = RuntimeError) -> T:
        return job()

    def progress(self, method: str) -> list[Progress]:
        self._check_losses()
        for stage in self.stages:
            stage.check_gradients()
        return [
            Progress(
                self.num_updates,
                self._next_microbatch,
                order.position(),
                # Samples matter between ranks alone, and a micro-batch here has some.
                [Note(m, self._micros[m].minibatch, 0, 1, 1) for m in range(order.next_backward, order.next_forward)],
                [1] * (self.num_updates - order.next_update),
                [gradients[m] for m in sorted(gradients)],
            )
            for order, gradients in zip(self._orders, self._gradients, strict=True)
        ]

    def resume(self, progress: Sequence[Progress]) -> None:
        self._clear()
        for stage, order, gradients, own in zip(self.stages, self._orders, self._gradients, progress, strict=True):
            order.resume(own.position)
            stage.version = own.position.next_update
            self.num_updates, self._next_microbatch = own.num_updates, own.next_microbatch
            for note, gradient in zip(own.notes, own.gradients, strict=False):
                gradients[note.microbatch] = gradient
            for note in own.notes:  # the first stage's are all there are
                micro = MicroBatch(note.microbatch, note.minibatch, note.samples / note.total)
                self._micros[micro.index] = micro

    def _check_losses(self) -> None:
        """Refuse a loss that is not finite, or the gradient of an earlier mini-batch that has made it so."""
        try:
            self._losses.check()
        except StageError as error:
            refused = [each for stage in self.stages if (each := _refused(stage)) and each.minibatch < error.minibatch]
            if refused:  # it goes from stage to stage from the last one on
                raise min(refused, key=lambda each: (each.minibatch, -each.stage)) from None
            raise

    def fail(self, error: BaseException) -> None:
        self.close()

    def close(self) -> None:
        for stage in self.stages:
            stage.drop()
        self._clear()

    def _clear(self) -> None:
        for queue in self._queues:
            queue.clear()
        for inputs, gradients in zip(self._inputs, self._gradients, strict=True):
            inputs.clear()
            gradients.clear()
        self._micros.clear()
        self._targets.clear()
        self._losses.drop()

    def _run(self) -> None:
        while any(self._queues):
            moved = False
            for stage, queue in enumerate(self._queues):
                while queue and queue[0] and self._ready(stage, queue[0][0]):
                    self._do(stage, queue[0].popleft())
                    moved = True
                if queue and not queue[0]:
                    queue.popleft()
            assert moved, "the schedule deadlocks"

    def _ready(self, stage: int, action: Action) -> bool:
        if action.kind == "F":
            return action.index in self._inputs[stage]
        if action.kind == "B" and stage < len(self.stages) - 1 and not self._local:
            return action.index in self._gradients[stage]
        return action.kind != "U" or self._may_update(stage, action)

    def _may_update(self, stage: int, action: Action) -> bool:
        """Where gradients of several stages count for one, an update waits until all are through with the mini-batch."""
        self.stages[stage].settle()
        if not (self._together or self._ties) or len(self._at_update) == len(self.stages):
            return True
        self._at_update.add(stage)
        if len(self._at_update) < len(self.stages):
            return False
        for tie in self._ties:
            owner = self.stages[tie.owner]
            with naming(tie.owner, action, owner.version):
                owner.add_gradients(tie, [self.stages[k].take_gradient(tie) for k in tie.partners(tie.owner)])
        self._norms = [each.gradient_norm() for each in self.stages] if self._together else None
        return True

    def _do(self, index: int, action: Action) -> None:
        stage, last = self.stages[index], len(self.stages) - 1
        minibatch = stage.version if action.kind == "U" else self._micros[action.index].minibatch
        with naming(index, action, minibatch), self.working_times[index].working(), self._tracer.action(action, index):
            if action.kind == "F":
                micro = self._micros[action.index]
                target = self._targets[action.index] if index == last or self._local else None
                out = stage.forward(micro, self._inputs[index].pop(action.index), target)
                if self._local and index < last and (loss := stage.newest_loss()) is not None:
                    self._losses.watch(index, micro, loss)
                if index < last:
                    self._inputs[index + 1][action.index] = out
                else:
                    del self._targets[action.index]
                    self._losses.add(micro, out)
            elif action.kind == "B":
                comes, goes = (index < last, index > 0) if not self._local else (False, False)
                gradient = stage.backward(self._gradients[index].pop(action.index) if comes else None)
                if goes:
                    self._gradients[index - 1][action.index] = gradient
                if index == (last if self._local else 0):  # the last to be through with it
                    del self._micros[action.index]
            else:
                stage.update(self._norms)


def _refused(stage: Stage) -> StageError | None:
    """What `Stage.check_gradients` raises."""
    try:
        stage.check_gradients()
    except StageError as error:
        return error
    return None
