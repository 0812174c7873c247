"""The engine that runs one stage a process, over `torch.distributed`.

The slots are those of the local engine; what differs is that an input may have to be waited for. What
a rank does in slot m of a method that recomputes, backward first::

      1. recompute m - lead                   the forward that is repeated hides the message of 2
      2. wait for the gradient of m - lead    sent by the stage after, in its last slot
      3. differentiate; send the input's gradient; U if it was the mini-batch's last
      4. predict the weights that the forward of m will read
      5. wait for the input of m              sent by the stage before, in its last slot
      6. forward; send the output

Where every stage has a loss of its own there is no 2, and in 6 the micro-batch's targets go along with the output. No gradient
then holds up a stage that is faster than the next, so it waits before it sends until there is room.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..comm.link import Receiver, Sender
from ..comm.message import Kind, Message, Note
from ..comm.proposals import Proposals
from ..comm.transport import Transport
from ..errors import StageError, WorkerError, message_of, naming
from ..measure.trace import Span, Tracer
from ..measure.wait_time import WorkingTime
from ..methods import Method
from ..schedule import Action, StageOrder
from ..stage.stage import Stage
from ..stage.stash import MicroBatch
from ..stage.tied import Tie
from ..tensors.pytree import map_tensors, num_samples, on_cpu, split
from .base import Losses, Progress
from .consistency import check_targets, checksum_of

T = TypeVar("T")


class DistributedEngine:
    """One stage of the pipeline, in this process; the others are other ranks'.

    Args:
        stage: this rank's.
        method: the row to work by.
        num_microbatches: A; it matters on the first rank alone, whose messages tell the others.
        transport: the connections to the other ranks.
        tracer: hears of every action.
        loss_on: ``"last"``, or ``"all"``: every rank waits for the last one's loss in every step.
    """

    alone = False

    def __init__(
        self, stage: Stage, method: Method, num_microbatches: int, transport: Transport, tracer: Tracer, loss_on: str
    ) -> None:
        ranks = transport.ranks
        self.stages = (stage,)
        self.takes_x, self.takes_y = ranks.before is None, ranks.after is None
        self.is_first = ranks.rank == ranks.all[0]
        replica = f" of replica {ranks.replica}" if ranks.num_replicas > 1 else ""
        self.name = f"rank {ranks.rank}: stage {ranks.stage}{replica}"
        self._stage, self._transport, self._tracer, self._loss_on = stage, transport, tracer, loss_on
        self._num_microbatches = num_microbatches
        self._local = method.local
        # Which of the caller's values are read here: where each stage has a loss, the first hands the targets on.
        self._reads_y = self.takes_x if self._local else self.takes_y
        if self._local and transport.forward_out is not None:
            transport.forward_out.bounded = True
        self._order = StageOrder(method, ranks.num_stages, ranks.stage)
        self._losses = Losses(
            ranks.num_stages - 1, at_once=stage.device.type == "cpu", stops=stage.rule.on_nonfinite == "stop"
        )
        self._inputs: deque[Any] = deque()  # of the current mini-batch, on the first rank
        self._targets: deque[Any] = deque()  # of the current mini-batch, on the last rank
        self._notes: deque[Note] = deque()  # of the micro-batches between F and B
        self._samples: deque[int] = deque()  # in each mini-batch that has not had its U
        self._given: Note | None = None  # what the first rank's messages of the current mini-batch say
        self._message: Message | None = None  # received to learn `_given` from, and not yet used
        self._arrived: deque[Any] = deque()  # gradients taken from their link before their B
        self._mean_loss: float | None = None  # over all replicas
        self._next_microbatch = 0
        self.working_times = (WorkingTime(),)
        self.proposals = Proposals()
        self._due = 0  # what the replicas have agreed on, for the next mini-batch
        self._looks = 3  # mini-batches more whose targets are compared on an accelerator too

    @property
    def num_updates(self) -> int:
        return self._transport.num_updates  # which tells the others in its last word

    @num_updates.setter
    def num_updates(self, value: int) -> None:
        self._transport.num_updates = value

    def step(self, x: Any, y: Any) -> Tensor | None:
        self._begin(f"in step() of mini-batch {self.num_updates}")
        self._losses.check()
        self.working_times[0].begin()
        self._hear()
        for action in self._order.begin():
            self._do(action)
        note = self._first_note(x, y) if self.takes_x else self._received_note()
        if self._reads_y:
            self._targets.extend(self._cut_targets(note, y))
        elif self.takes_y and y is not None:
            check_targets(note, y, waits=self._looks > 0)
        self._given = note
        self.proposals.agreed = note.word
        self._looks -= 1
        self._samples.append(note.total)
        for slot in self._order.minibatch(note.parts):
            for action in slot:
                self._do(action)
        self.num_updates += 1
        loss = self._losses.total() if self.takes_y else None
        if loss is not None and self._mean_loss is not None:
            loss = loss.new_tensor(self._mean_loss)
        if self._loss_on == "all":
            loss = self._transport.collectives.broadcast_from_last_stage("step", loss)
            assert loss is not None
            loss = loss.to(self._stage.device)
        return loss

    def _first_note(self, x: Any, y: Any) -> Note:
        samples = num_samples(x)
        # Replicas work in step, so all cut into as many parts, whatever their shards; a part may be empty.
        alone = self._transport.ranks.num_replicas == 1
        parts = min(self._num_microbatches, samples) if alone else self._num_microbatches
        self._inputs.extend(split(x, parts))
        checksum = checksum_of(y, waits=self._looks > 0) if y is not None and not self.takes_y else -1
        if alone:
            word = self.proposals.take()
        else:
            word, self._due = self._due, 0
        return Note(-1, self.num_updates, parts, 0, samples, checksum, word)

    def _cut_targets(self, note: Note, y: Any) -> Sequence[Any]:
        if not self.takes_x:
            check_targets(note, y, waits=self._looks > 0)
        return split(y, note.parts)

    def _samples_in(self, part: Any) -> int:
        """What a micro-batch weighs in its mini-batch."""
        return num_samples(part)

    def _received_note(self) -> Note:
        with self.working_times[0].working():
            self._stage.prepare(self._next_microbatch, self.num_updates)
        self._message = self._receive(self._transport.forward_in, "forward", self._next_microbatch)
        return self._message.note

    def flush(self) -> None:
        self._begin(f"in flush() after {self.num_updates} steps")
        self._transport.check_steps(self._transport.collectives.all_gather("flush", self.num_updates))
        for slot in self._order.flush():
            for action in slot:
                self._do(action)
        self._losses.check()
        self._stage.check_gradients()
        self._stage.rest()

    def progress(self, method: str) -> list[Progress]:
        self._begin(f"in {method}()")
        self._losses.check()
        self._stage.check_gradients()
        self._take_gradients(method)
        return [
            Progress(
                self.num_updates,
                self._next_microbatch,
                self._order.position(),
                list(self._notes),
                list(self._samples),
                list(self._arrived),
            )
        ]

    def _take_gradients(self, method: str) -> None:
        """Take every gradient that is under way from its link, to lie here until its B.

        The forwards of all steps are through, so no forward message is under way. The stage after has sent a gradient
        for each of its backwards, and this stage has taken as many as it has had of its own: the rest are on their way.
        """
        ranks = self._transport.ranks
        backwards = self._transport.collectives.all_gather(method, (self.num_updates, self._order.next_backward))
        self._transport.check_steps([steps for steps, _ in backwards])
        if ranks.after is not None:
            sent = backwards[ranks.all.index(ranks.after)][1]
            for m in range(self._order.next_backward + len(self._arrived), sent):
                self._arrived.append(self._receive(self._transport.backward_in, "backward", m).tensor)

    def resume(self, progress: Sequence[Progress]) -> None:
        (own,) = progress
        self._forget()
        self.num_updates, self._next_microbatch = own.num_updates, own.next_microbatch
        self._order.resume(own.position)
        self._stage.version = own.position.next_update
        self._notes.extend(own.notes)
        self._samples.extend(own.samples)
        self._arrived.extend(own.gradients)

    def infer(self, x: Any) -> Any:
        self._begin("in infer()")
        return self._transport.collectives.through_stages("infer", x, self._stage.infer)

    def gather(self, method: str, value: T) -> list[T]:
        self._begin(f"in {method}()")
        return self._transport.collectives.all_gather(method, value)

    def spans(self) -> list[Span]:
        self._begin("in save_trace()")
        self._hear()
        self._take_gradients("save_trace")  # else their senders would wait until they are wanted here
        self._transport.wait_until_sent()
        return list(self._tracer.spans)

    def of_stages(self, method: str, part: Callable[[Stage], T]) -> list[T]:
        return self.gather(method, self._own(part))[: self._transport.ranks.num_stages]

    def of_stages_to_first(self, method: str, part: Callable[[Stage], T]) -> list[T] | None:
        self._begin(f"in {method}()")
        values = self._transport.collectives.gather(method, self._own(part))
        return None if values is None else values[: self._transport.ranks.num_stages]

    def all_or_none(self, method: str, job: Callable[[], T], error: type[Exception] = RuntimeError) -> T:
        failed: Exception | None = None
        try:
            try:
                result = job()
            except Exception as reason:
                failed = reason
            reasons = self.gather(method, None if failed is None else message_of(failed) or type(failed).__name__)
        except BaseException as reason:
            self.fail(reason)
            raise
        if failed is not None:
            raise failed
        for rank, text in zip(self._transport.ranks.all, reasons, strict=True):
            if text is not None:
                raise error(f"{method}() failed on rank {rank}: {text}")
        return result

    def _own(self, part: Callable[[Stage], T]) -> Any:
        """Replicas agree, so the first speaks for all."""
        return on_cpu(part(self._stage)) if self._transport.ranks.replica == 0 else None

    def fail(self, error: BaseException) -> None:
        self._transport.fail(error)
        self._drop()

    def close(self) -> None:
        self._drop()
        self._transport.close()

    def _drop(self) -> None:
        self._stage.drop()
        self._forget()

    def _forget(self) -> None:
        for held in (self._inputs, self._targets, self._notes, self._samples, self._arrived):
            held.clear()
        self._message = self._given = None
        self._losses.drop()

    def _begin(self, doing: str) -> None:
        if self._transport.closed:
            raise RuntimeError("this pipeline has left the other ranks; do what needs all ranks before close()")
        self._transport.monitor.doing = doing
        self._transport.monitor.check()

    # -- one action -----------------------------------------------------------------------------------------

    def _do(self, action: Action) -> None:
        with self.working_times[0].working(), self._tracer.action(action, self._stage.index):
            if action.kind == "F":
                self._forward(action)
            elif action.kind == "B":
                self._backward(action)
            else:
                self._update(action)

    def _forward(self, action: Action) -> None:
        assert self._given is not None
        m = action.index
        x: Any
        if self.takes_x:
            x = self._inputs.popleft()
            note = self._given._replace(microbatch=m, samples=self._samples_in(x))
        else:
            if self._message is None:
                self._stage.prepare(m, self.num_updates)
            message = self._message or self._receive(self._transport.forward_in, "forward", m)
            self._message, note, x = None, message.note, message.tensor
        target = self._targets.popleft() if self._reads_y else None
        if self._local and not self.takes_x and note.samples:
            x, target = x
        if not note.samples:
            self._check_alone(note)
        micro = MicroBatch(m, self.num_updates, note.samples / note.total)
        self._notes.append(note._replace(minibatch=self.num_updates, word=0))
        self._next_microbatch = m + 1
        with naming(self._stage.index, action, micro.minibatch):
            out = self._stage.forward(micro, x, target) if note.samples else None
            if self._local and out is not None and not self.takes_y and (loss := self._stage.newest_loss()) is not None:
                self._losses.watch(self._stage.index, micro, loss)
            if not self.takes_y:
                self._pass_on(note, out, target)
            elif out is not None:
                self._losses.add(micro, out)

    def _check_alone(self, note: Note) -> None:
        """A micro-batch without samples has no forward: another replica's must not wait for it."""
        modules = self._stage.module.modules()
        if any(isinstance(module, nn.SyncBatchNorm) and module.training for module in modules):
            raise ValueError(
                f"a replica has {note.total} samples of mini-batch {note.minibatch} for {note.parts} micro-batches, and in each of "
                f"them SyncBatchNorm in stage {self._stage.index} waits for all replicas; pass each replica at least "
                f"{note.parts} samples, or num_microbatches<={note.total}"
            )

    def _backward(self, action: Action) -> None:
        note = self._notes.popleft()
        gradient = None
        if note.samples:
            with naming(self._stage.index, action, note.minibatch):
                self._stage.recompute()
        if not (self.takes_y or self._local):
            gradient = (
                self._arrived.popleft()
                if self._arrived
                else self._receive(self._transport.backward_in, "backward", action.index).tensor
            )
        with naming(self._stage.index, action, note.minibatch):
            if note.samples:
                gradient = self._stage.backward(gradient)
            word = self.proposals.take() if not self.takes_x else 0
            if not self.takes_x and (word or not self._local):
                self._send(self._transport.backward_out, note._replace(word=word), gradient)

    def _update(self, action: Action) -> None:
        samples = self._samples.popleft()
        self._stage.settle()
        ties = [tie for tie in self._stage.ties if tie.trained]
        if ties:
            self._add_up_tied(action, ties)
        if self._transport.ranks.num_replicas > 1:
            loss = self._losses.sum() if self.takes_y else 0.0
            try:
                with self.working_times[0].waiting("replicas"):
                    self._mean_loss, word = self._transport.averaging.average(
                        self._stage.gradients,
                        self._stage.parameters,
                        samples,
                        loss,
                        self.proposals.take() if self.takes_x else 0,
                    )
                    self._due |= word
            except WorkerError:
                raise
            except Exception as error:
                raise StageError(self._stage.index, action, self._stage.version, error) from error
        norms: list[float] | None = None
        if self._stage.rule.together:
            norm = self._stage.gradient_norm()
            with self.working_times[0].waiting("gradient"):  # replicas have the same gradient by now
                norms = self._transport.collectives.all_gather("step", norm)[: self._transport.ranks.num_stages]
        with naming(self._stage.index, action, self._stage.version):
            self._stage.update(norms)
        if ties:
            self._spread_tied(ties)

    def _add_up_tied(self, action: Action, ties: Sequence[Tie]) -> None:
        """The gradients of parameters that other stages hold too go to their owners."""
        stage, transport = self._stage, self._transport
        for tie in ties:
            if tie.owner != stage.index:
                with naming(stage.index, action, stage.version):
                    transport.send_tied(tie.owner, stage.take_gradient(tie))
        for tie in ties:
            if tie.owner == stage.index:
                with self.working_times[0].waiting("gradient"):
                    what = f"the gradient of {tie.name}, which both hold"
                    parts = [transport.receive_tied(k, what) for k in tie.partners(stage.index)]
                with naming(stage.index, action, stage.version):
                    stage.add_gradients(tie, parts)

    @torch.no_grad()
    def _spread_tied(self, ties: Sequence[Tie]) -> None:
        """Their owners' values go to the others."""
        stage, transport = self._stage, self._transport
        for tie in ties:
            if tie.owner == stage.index:
                for k in tie.partners(stage.index):
                    transport.send_tied(k, stage.parameters[stage.index_of(tie)].detach())
        for tie in ties:
            if tie.owner != stage.index:
                with self.working_times[0].waiting("forward"):
                    new = transport.receive_tied(tie.owner, f"the values of {tie.name}, which both hold")
                assert new is not None
                stage.parameters[stage.index_of(tie)].copy_(new)

    def _pass_on(self, note: Note, out: Any, target: Any) -> None:
        link = self._transport.forward_out
        if self._local:
            assert link is not None
            with self.working_times[0].waiting("send"):
                self._transport.wait_for_room(link)
            if out is not None:
                out = out, map_tensors(lambda t: t.to(self._stage.device), target)
        self._send(link, note, out)

    def _hear(self) -> None:
        """Of proposals that came with no gradient."""
        link = self._transport.backward_in
        while self._local and link is not None and (message := link.take()) is not None:
            self.proposals.add(message.note.word)

    def _send(self, link: Sender | None, note: Note, value: Any) -> None:
        assert link is not None
        with self.working_times[0].waiting("send"):
            link.send(Kind.for_value(value), note, value)

    def _receive(self, link: Receiver | None, direction: str, m: int) -> Message:
        assert link is not None
        waits = self.working_times[0].waiting("forward" if direction == "forward" else "gradient")
        with waits, self._tracer.wait(direction, m, self._stage.index):
            message = self._transport.receive(link, lambda: f"the {direction} message of micro-batch {m}")
        assert message.note.microbatch == m, f"expected micro-batch {m}, received {message.note}"
        if direction == "backward" and message.note.word:
            self.proposals.add(message.note.word)
        return message
