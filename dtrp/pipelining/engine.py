"""The distributed engine, given micro-batches that are cut already, and keyword arguments of each stage's own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from ..comm.message import Note
from ..comm.transport import Transport
from ..engine.base import Progress
from ..engine.distributed import DistributedEngine
from ..measure.trace import Tracer
from ..methods import Method
from ..schedule import Action
from ..stage.stage import Stage
from .routes import Call


class RecordedLoss:
    """The caller's loss function, which remembers the last stage's output and the loss of the micro-batch at hand.

    Args:
        loss_fn: (output, target, **loss_kwargs) -> scalar.
    """

    def __init__(self, loss_fn: Callable[..., Tensor]) -> None:
        self._loss_fn = loss_fn
        self._last: tuple[Any, Any] = (None, None)

    def __call__(self, output: Any, given: tuple[Any, dict[str, Any]]) -> Tensor:
        target, keywords = given
        loss = self._loss_fn(output, target, **keywords)
        self._last = (output, loss)
        return loss

    def take(self) -> tuple[Any, Any]:
        """(output, loss), detached; forgotten here, so that no graph outlives its backward."""
        last, self._last = self._last, (None, None)
        return pytree.tree_map_only(Tensor, Tensor.detach, last)  # type: ignore[no-any-return]


class StageEngine(DistributedEngine):
    """One stage of torch's, in this process; the others are other ranks'.

    Args:
        stage: this rank's; it was made with ``call`` and, the last one, with ``loss``.
        method: the row to work by.
        num_microbatches: A, of every mini-batch.
        total: what the losses of the micro-batches are divided by.
        transport: the connections to the other ranks.
        tracer: hears of every action.
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
        """A step.

        Args:
            arguments: of each micro-batch; they matter on the first rank.
            keywords: of each micro-batch, for this rank's stage.
            targets: of each micro-batch, with the keyword arguments of the loss; on the last rank.
            keeps_outputs: whether the caller wants what the last stage has returned.

        Returns:
            (output, loss) of each micro-batch on the last rank; nothing on others.
        """
        self._keywords.update(enumerate(keywords, self._next_microbatch))
        self._outcomes, self._keeps_outputs = [], keeps_outputs
        self.step(arguments, targets)
        outcomes, self._outcomes = self._outcomes, []
        return outcomes

    def evaluate(self, arguments: Sequence[tuple[Any, ...]], keywords: Sequence[dict[str, Any]]) -> list[Any]:
        """The last stage's output for each micro-batch, in eval mode; None elsewhere."""
        self._begin("in eval()")
        outputs = []
        for each, self._call.keywords in zip(arguments, keywords, strict=True):
            outputs.append(self._transport.collectives.through_stages("eval", each, self._stage.infer))
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
        if self.takes_y:
            output, loss = self._loss.take()
            self._outcomes.append((output if self._keeps_outputs else None, loss))

    def _backward(self, action: Action) -> None:
        self._call.keywords = self._keywords.pop(action.index)
        super()._backward(action)
        self._call.keywords = {}

    def progress(self, method: str) -> list[Progress]:
        (own,) = super().progress(method)
        own.keywords = [self._keywords[note.microbatch] for note in own.notes]
        return [own]

    def resume(self, progress: Sequence[Progress]) -> None:
        super().resume(progress)
        (own,) = progress
        microbatches = [note.microbatch for note in own.notes]
        self._keywords.update(zip(microbatches, own.keywords or [{}] * len(microbatches), strict=True))

    def _forget(self) -> None:
        super()._forget()
        self._keywords.clear()
        self._outcomes.clear()
        self._loss.take()
