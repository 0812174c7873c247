"""The distributed engine for a stage of torch's: micro-batches come cut, and each stage has keyword arguments."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from ..comm.message import Note
from ..comm.transport import Transport
from ..engine.base import Progress
from ..engine.distributed import DistributedEngine
from ..measure.trace import Tracer
from ..methods import Method
from ..schedule import Action
from ..stage.stage import Stage
from ..stage.stash import MicroBatch
from ..tensors.torch_private import pytree
from .routes import Call


class RecordedLoss:
    """The caller's loss function; it records the output and the loss of the last micro-batch.

    Args:
        loss_fn: (output, target, **loss_kwargs) -> scalar; None: it is never called.
    """

    def __init__(self, loss_fn: Callable[..., Tensor] | None) -> None:
        self._loss_fn = loss_fn
        self._last: tuple[Any, Any] = (None, None)

    def __call__(self, output: Any, given: tuple[Any, dict[str, Any]]) -> Tensor:
        target, keywords = given
        assert self._loss_fn is not None, "a schedule without a loss trains nothing"
        loss = self._loss_fn(output, target, **keywords)
        self._last = (output, loss)
        return loss

    def take(self) -> tuple[Any, Any]:
        """(output, loss), detached, and forgotten, so that no graph outlives its backward."""
        last, self._last = self._last, (None, None)
        return pytree.tree_map_only(Tensor, Tensor.detach, last)  # type: ignore[no-any-return]


class StageEngine(DistributedEngine):
    """One stage of torch's in this process; every other rank has another.

    Args:
        stage: the stage of this rank, made with ``call``, and the last stage with ``loss``.
        method: the row of the method that trains.
        num_microbatches: A, of every mini-batch.
        total: the divisor of the micro-batches' losses.
        transport: the connections to the other ranks.
        tracer: records every action.
        call: runs the stage's module.
        loss: the loss function.
    """

    def __init__(
        self,
        stage: Stage,
        method: Method,
        num_microbatches: int,
        total: int,
        transport: Transport,
        tracer: Tracer,
        call: Call,
        loss: RecordedLoss,
    ) -> None:
        super().__init__(stage, method, num_microbatches, transport, tracer, "last")
        self._total = total
        self._call, self._loss = call, loss
        self._keywords: dict[int, dict[str, Any]] = {}  # of the micro-batches before their B
        self._outcomes: list[tuple[Any, Tensor]] = []  # of the current mini-batch, on the last rank
        self._keeps_outputs = True

    def train(
        self,
        arguments: Sequence[tuple[Any, ...]],
        keywords: Sequence[dict[str, Any]],
        targets: Sequence[Any],
        *,
        keeps_outputs: bool,
    ) -> list[tuple[Any, Tensor]]:
        """Train on a mini-batch.

        Args:
            arguments: the positional arguments for each micro-batch; they matter on the first rank.
            keywords: the keyword arguments of this rank's stage for each micro-batch.
            targets: (target, keyword arguments of the loss) for each micro-batch, on the last rank.
            keeps_outputs: whether the outputs of the last stage are wanted.

        Returns:
            (output, loss) of each micro-batch on the last rank; nothing on others.
        """
        self._keywords.update(enumerate(keywords, self._next_microbatch))
        self._outcomes, self._keeps_outputs = [], keeps_outputs
        self.step(arguments, targets)
        outcomes, self._outcomes = self._outcomes, []
        return outcomes

    def evaluate(
        self, arguments: Sequence[tuple[Any, ...]], keywords: Sequence[dict[str, Any]], *, in_eval_mode: bool
    ) -> list[Any]:
        """The last stage's output for each micro-batch, in eval mode or in the mode that the modules are in; None elsewhere."""
        method = self._transport.collectives.tensor_method
        self._begin(f"in {method}()")
        run = functools.partial(self._stage.infer, in_eval_mode=in_eval_mode)
        outputs = []
        for inputs, self._call.keywords in zip(arguments, keywords, strict=True):
            outputs.append(self._transport.collectives.through_stages(method, inputs, run))
        self._call.keywords = {}
        return outputs

    def _first_note(self, x: Sequence[tuple[Any, ...]], y: Any) -> Note:
        self._inputs.extend(x)
        return Note(-1, self.num_updates, len(x), 0, self._total, word=self.proposals.take())

    def _cut_targets(self, note: Note, y: Sequence[Any]) -> Sequence[Any]:
        return y

    def _samples_in(self, part: Any) -> int:
        return 1  # as in torch every micro-batch weighs the same, whatever its size

    def _forward(self, action: Action) -> None:
        self._call.keywords = self._keywords[action.index]
        super()._forward(action)
        self._call.keywords = {}

    def _take_loss(self, micro: MicroBatch, loss: Tensor, added: Tensor | None) -> None:
        super()._take_loss(micro, loss, added)
        output, loss = self._loss.take()
        terms = self._stage.added_loss(added)
        self._outcomes.append((output if self._keeps_outputs else None, loss if terms is None else loss + terms))

    def _recompute(self, action: Action) -> None:
        self._call.keywords = self._keywords[action.index]
        super()._recompute(action)
        self._call.keywords = {}

    def _backward(self, action: Action) -> None:
        self._call.keywords = self._keywords.pop(action.index)
        super()._backward(action)
        self._call.keywords = {}

    def progress(self, method: str) -> list[Progress]:
        (progress,) = super().progress(method)
        progress.keywords = [self._keywords[note.microbatch] for note in progress.notes]
        return [progress]

    def resume(self, progress: Sequence[Progress]) -> None:
        super().resume(progress)
        (resumed,) = progress
        microbatches = [note.microbatch for note in resumed.notes]
        self._keywords.update(zip(microbatches, resumed.keywords or [{}] * len(microbatches), strict=True))

    def _forget(self) -> None:
        super()._forget()
        self._keywords.clear()
        self._outcomes.clear()
        self._loss.take()
