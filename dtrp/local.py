"""The engine that runs all stages in one process."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

from .methods import Method
from .schedule import Action, StageOrder
from .stage import Stage, StageError
from .stash import MicroBatch


class LocalEngine:
    """All stages in one process: each slot runs as soon as its inputs are there.

    The result does not depend on how the stages' slots interleave, since a stage shares nothing with
    another but messages. The order chosen, a slot of each stage in turn, keeps at most one message
    waiting, and on several devices launches the work of all before it waits for any.
    """

    def __init__(self, stages: Sequence[Stage], method: Method) -> None:
        num = len(stages)
        self._stages = stages
        self._orders = [StageOrder(method, num, stage) for stage in range(num)]
        self._queues: list[deque[deque[Action]]] = [deque() for _ in stages]
        self._inputs: list[dict[int, Tensor]] = [{} for _ in stages]
        self._gradients: list[dict[int, Tensor | None]] = [{} for _ in stages]
        self._micros: dict[int, MicroBatch] = {}
        self._targets: dict[int, Tensor] = {}
        self._losses: list[Tensor] = []  # of the current mini-batch
        # With one device the loss is looked at before anything is learned from it. With several, looking would
        # make the launches wait for the last device in every slot: it is looked at when the next one is asked for.
        self._look_at_once = len({stage.device for stage in stages}) == 1
        self._unseen: list[tuple[MicroBatch, Tensor]] = []

    def step(self, micros: Sequence[tuple[MicroBatch, Tensor, Tensor]]) -> Tensor:
        self._look()
        for micro, x, target in micros:
            self._micros[micro.index] = micro
            self._inputs[0][micro.index] = x
            self._targets[micro.index] = target
        for queue, order in zip(self._queues, self._orders, strict=True):
            queue.extend(deque(slot) for slot in order.minibatch(len(micros)))
        self._run()
        total = self._losses[0]
        for term in self._losses[1:]:
            total = total + term
        self._losses.clear()
        return total

    def flush(self) -> None:
        for queue, order in zip(self._queues, self._orders, strict=True):
            queue.extend(deque(slot) for slot in order.flush())
        self._run()
        self._look()
        for stage in self._stages:
            stage.rest()

    def drop(self) -> None:
        """Forget what is in flight."""
        for stage in self._stages:
            stage.drop()
        for queue in self._queues:
            queue.clear()
        for inputs, gradients in zip(self._inputs, self._gradients, strict=True):
            inputs.clear()
            gradients.clear()
        self._micros.clear()
        self._targets.clear()
        self._losses.clear()
        self._unseen.clear()

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
        if action.kind == "B" and stage < len(self._stages) - 1:
            return action.index in self._gradients[stage]
        return True

    def _do(self, index: int, action: Action) -> None:
        stage, last = self._stages[index], len(self._stages) - 1
        minibatch = stage.version if action.kind == "U" else self._micros[action.index].minibatch
        try:
            if action.kind == "F":
                micro = self._micros[action.index]
                target = self._targets.pop(action.index) if index == last else None
                out = stage.forward(micro, self._inputs[index].pop(action.index), target)
                if index < last:
                    self._inputs[index + 1][action.index] = out
                else:
                    self._losses.append(out)
                    self._unseen.append((micro, out))
                    if self._look_at_once:
                        self._look()
            elif action.kind == "B":
                gradient = stage.backward(self._gradients[index].pop(action.index) if index < last else None)
                if index:
                    self._gradients[index - 1][action.index] = gradient
                else:
                    del self._micros[action.index]
            else:
                stage.update()
        except StageError:
            raise
        except Exception as error:
            raise StageError(index, action, minibatch, error) from error

    def _look(self) -> None:
        """Refuse a loss that is not finite."""
        for micro, loss in self._unseen:
            if not torch.isfinite(loss):
                cause = FloatingPointError(
                    f"the loss of mini-batch {micro.minibatch} is {loss.item()}; lower the learning rate, or look at "
                    "the data of this mini-batch"
                )
                raise StageError(len(self._stages) - 1, Action("F", micro.index), micro.minibatch, cause) from cause
        self._unseen.clear()
