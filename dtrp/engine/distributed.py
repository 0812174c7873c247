"""The engine that runs one stage a process, over `torch.distributed`.

The slots are those of the local engine; what differs is that an input may have to be waited for. What a rank does in
slot m of a method that recomputes, backward first::

      1. recompute m - lead                   the forward that is repeated hides the message of 2
      2. wait for the gradient of m - lead    sent by the stage after, in its last slot
      3. differentiate; send the input's gradient; U if it was the mini-batch's last
      4. predict the weights that the forward of m will read
      5. wait for the input of m              sent by the stage before, in its last slot
      6. forward; send the output

Where backwards are in two parts, 3 differentiates down to the input alone, and the weights' gradients come later.
Where every stage has a loss there is no 2, and in 6 the micro-batch's targets go along with the output. No gradient
then holds up a stage that is faster than the next, so it waits before it sends until there is room.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from ..comm.link import Receiver, Sender
from ..comm.message import Kind, Message, Note
from ..comm.transport import Transport
from ..errors import message_of, naming
from ..launch.heap import keep_heap
from ..measure.trace import Span, Tracer
from ..methods import Method
from ..schedule import Action
from ..stage.stage import Stage
from ..stage.stash import MicroBatch
from ..tensors.pytree import map_tensors, num_samples, on_cpu, split
from ..typing import Tree
from .base import NO_WEIGHT, Engine, Progress
from .consistency import check_targets, checksum_of
from .loss_weights import weight_of

T = TypeVar("T")


class DistributedEngine(Engine):
    """One stage of the pipeline, in this process; the others are in other ranks.

    Args:
        stage: the stage of this rank.
        method: the row of the method that trains.
        num_microbatches: A; it matters on the first rank alone, whose messages tell the others.
        transport: the connections to the other ranks.
        tracer: records every action.
        loss_on: ``"last"``, or ``"all"``: every rank waits for the last one's loss in every step.
        microbatch_samples: as in `Engine`.
    """

    alone = False

    def __init__(
        self,
        stage: Stage,
        method: Method,
        num_microbatches: int,
        transport: Transport,
        tracer: Tracer,
        loss_on: str,
        microbatch_samples: int = 1,
    ) -> None:
        super().__init__((stage,), method, num_microbatches, tracer, microbatch_samples)
        keep_heap()
        ranks = transport.ranks
        self.takes_x, self.takes_y = ranks.before is None, ranks.after is None
        self.ranks, self.is_first = ranks.all, ranks.rank == ranks.all[0]
        replica = f" of replica {ranks.replica}" if ranks.num_replicas > 1 else ""
        self.name = f"rank {ranks.rank}: stage {ranks.stage}{replica}"
        self._stage, self._transport, self._ranks, self._loss_on = stage, transport, ranks, loss_on
        self._has_replicas = ranks.num_replicas > 1
        self._time, self._order = self.working_times[0], self._orders[0]
        self._collectives = transport.collectives
        # Where each stage has a loss, the first one reads the targets, and hands them on.
        self._reads_y = self.takes_x if self._has_local_losses else self.takes_y
        if self._has_local_losses and transport.forward_out is not None:
            transport.forward_out.bounded = True
        # Parameters shared with other stages: those that this stage updates, and those that another one does.
        self._owned_ties = [tie for tie in stage.ties if tie.trained and tie.owner == stage.index]
        self._other_ties = [tie for tie in stage.ties if tie.trained and tie.owner != stage.index]
        self._inputs: deque[Tree] = deque()  # of the current mini-batch, on the first rank
        self._targets: deque[Tree] = deque()  # of the current mini-batch, on the rank that reads them
        self._weights: deque[float] = (
            deque()
        )  # of the micro-batches of the current mini-batch, on that rank, by loss_weight
        self._notes: deque[Note] = deque()  # of the micro-batches between F and B
        self._samples: deque[int] = deque()  # in each mini-batch that has not had its U
        self._minibatch_note: Note | None = None  # what the messages of the current mini-batch say
        self._message: Message | None = None  # received for that, and not yet used
        self._arrived: deque[Tree | None] = deque()  # gradients taken from their link before their B
        self._mean_loss: float | None = None  # over all replicas
        self._weight_at_update = -1.0  # of the mini-batch whose U is next, by loss_weight; -1: not by that
        self._agreed_at_update = 0  # what the replicas have agreed on, for the next mini-batch
        self._checksums_left = 3  # the number of mini-batches whose targets are compared even on an accelerator

    def step(self, x: Tree, y: Tree, weights: Sequence[float] | None = None) -> Tensor | None:
        self._begin(f"in step() of mini-batch {self.num_updates}")
        self._losses.check()
        self._time.begin()
        self._take_proposals()
        self._run([self._order.begin()])
        note = self._first_note(x, y) if self.takes_x else self._received_note()
        if self._reads_y:
            self._targets.extend(self._cut_targets(note, y))
            if weights is not None:
                self._weights.extend(weights)
                note = note._replace(total_weight=sum(weights))
        elif self.takes_y and y is not None:
            check_targets(note, y, self._num_microbatches, waits=self._checksums_left > 0)
        if self._has_replicas and self.num_parts(note.total) < note.parts:
            self._check_empty_microbatches(note)
        self._minibatch_note = note
        self.proposals.agreed = note.word
        self._checksums_left -= 1
        self._samples.append(note.total)
        self._run(self._order.minibatch(note.parts))
        self.num_updates += 1
        self._transport.num_updates = self.num_updates
        loss = self._losses.total() if self.takes_y else None
        if loss is not None and self._mean_loss is not None:
            loss = loss.new_tensor(self._mean_loss)
        if self._loss_on == "all":
            loss = self._collectives.broadcast_from_last_stage("step", loss)
            assert loss is not None
            loss = loss.to(self._stage.device)
        return loss

    def _first_note(self, x: Tree, y: Tree) -> Note:
        """Cut the input of a mini-batch, and make the note of its messages."""
        samples, inputs = num_samples(x), self.cut(x)
        self._inputs.extend(inputs)
        checksum = checksum_of(y, waits=self._checksums_left > 0) if y is not None and not self.takes_y else -1
        word = self._agreed_at_update if self._has_replicas else self.proposals.take()
        self._agreed_at_update = 0
        return Note(-1, self.num_updates, len(inputs), 0, samples, checksum, word)

    def cut(self, value: Tree) -> Sequence[Tree]:
        if not self._has_replicas:
            return super().cut(value)
        # Replicas work in step, so all cut into as many parts, whatever their shards; the last parts may be empty.
        filled = self.num_parts(num_samples(value))
        return split(value, filled, self._num_microbatches - filled)

    def _cut_targets(self, note: Note, y: Tree) -> Sequence[Tree]:
        if not self.takes_x:
            check_targets(note, y, self._num_microbatches, waits=self._checksums_left > 0)
        return self.cut(y) if self._has_replicas else split(y, note.parts)

    def _samples_in(self, part: Tree) -> int:
        """The weight of a micro-batch in its mini-batch."""
        return num_samples(part)

    def _received_note(self) -> Note:
        with self._time.working():
            self._stage.prepare(self._next_microbatch, self.num_updates)
        self._message = self._receive(self._transport.forward_in, "forward", self._next_microbatch)
        return self._message.note

    def _check_empty_microbatches(self, note: Note) -> None:
        """A micro-batch without samples has no forward; no other replica may wait for it."""
        modules = self._stage.module.modules()
        if any(isinstance(module, nn.SyncBatchNorm) and module.training for module in modules):
            raise ValueError(
                f"a replica has {note.total} samples of mini-batch {note.minibatch} for {note.parts} micro-batches, and in each of "
                f"them SyncBatchNorm in stage {self._stage.index} waits for all replicas; pass each replica at least "
                f"{note.parts * self._microbatch_samples} samples, or num_microbatches<={self.num_parts(note.total)}"
            )

    def flush(self) -> None:
        self._begin(f"in flush() after {self.num_updates} steps")
        self._transport.check_steps(self._collectives.all_gather("flush", self.num_updates))
        self._run(self._order.flush())
        self._check_finite()
        self._stage.rest()

    def progress(self, method: str) -> list[Progress]:
        self._begin(f"in {method}()")
        self._check_finite()
        self._take_gradients(method)
        position, flying = self._order.position(), (list(self._notes), list(self._samples), list(self._arrived))
        return [Progress(self.num_updates, self._next_microbatch, position, *flying)]

    def _take_gradients(self, method: str) -> None:
        """Take every gradient that is under way from its link; it stays here until its B.

        The forwards of all steps are done, so no forward message is under way. The stage after has sent a gradient for
        each of its backwards, and this stage has taken one for each of its own: the rest are under way.
        """
        backwards = self._collectives.all_gather(method, (self.num_updates, self._order.next_backward))
        self._transport.check_steps([steps for steps, _ in backwards])
        if self._ranks.after is not None:
            sent = backwards[self._ranks.all.index(self._ranks.after)][1]
            for m in range(self._order.next_backward + len(self._arrived), sent):
                message = self._receive(self._transport.backward_in, "backward", m)
                place = len(self._arrived)
                self._notes[place] = _with_weights(self._notes[place], message.note)
                self._arrived.append(message.tensor)

    def _restore(self, index: int, saved: Progress) -> None:
        self._transport.num_updates = saved.num_updates
        self._notes.extend(saved.notes)
        self._samples.extend(saved.samples)
        self._arrived.extend(saved.gradients)

    def infer(self, x: Tree) -> Tree:
        self._begin("in infer()")
        return self._collectives.through_stages("infer", x, self._stage.infer)

    def gather(self, method: str, value: T) -> list[T]:
        self._begin(f"in {method}()")
        return self._collectives.all_gather(method, value)

    def spans(self) -> list[Span]:
        self._begin("in save_trace()")
        self._take_proposals()
        self._take_gradients("save_trace")  # otherwise their senders would wait until they are wanted
        self._transport.wait_until_sent()
        return super().spans()

    def gather_stages(self, method: str, part: Callable[[Stage], T]) -> list[T]:
        return self.gather(method, self._part(part))[: self._ranks.num_stages]

    def gather_stages_to_first(self, method: str, part: Callable[[Stage], T]) -> list[T] | None:
        self._begin(f"in {method}()")
        values = self._collectives.gather(method, self._part(part))
        return None if values is None else values[: self._ranks.num_stages]

    def _part(self, part: Callable[[Stage], T]) -> Any:
        """The part of this rank's stage, on the CPU; None but in the first replica: replicas are the same."""
        return on_cpu(part(self._stage)) if self._ranks.replica == 0 else None

    def all_or_none(self, method: str, job: Callable[[], T], error: type[Exception] = RuntimeError) -> T:
        try:
            result, failed, reasons = self.try_on_all(method, job, lambda e: message_of(e) or type(e).__name__)
        except BaseException as interrupted:
            self.fail(interrupted)
            raise
        if failed is not None:
            raise failed
        for rank, text in reasons.items():
            raise error(f"{method}() failed on rank {rank}: {text}")
        return cast(T, result)

    def fail(self, error: BaseException) -> None:
        self._transport.fail(error)
        super().fail(error)

    def close(self) -> None:
        super().close()
        self._transport.close()

    def _forget(self) -> None:
        super()._forget()
        for held in (self._inputs, self._targets, self._weights, self._notes, self._samples, self._arrived):
            held.clear()
        self._message = self._minibatch_note = None

    def _begin(self, doing: str) -> None:
        if self._transport.closed:
            raise RuntimeError("this pipeline has left the other ranks; do what needs all ranks before close()")
        self._transport.monitor.doing = doing
        self._transport.monitor.check()

    # -- one action -----------------------------------------------------------------------------------------

    def _run(self, slots: Iterable[Iterable[Action]]) -> None:
        stage = self._stage
        for slot in slots:
            for action in slot:
                minibatch = self.num_updates if action.kind == "F" else stage.version
                if action.kind in "BIR":
                    minibatch = self._notes[0].minibatch
                with (
                    naming(stage.index, action, minibatch),
                    self._time.working(),
                    self._tracer.action(action, stage.index),
                ):
                    if action.kind == "F":
                        self._forward(action)
                    elif action.kind == "U":
                        self._update()
                    elif action.kind == "R":
                        self._recompute(action)
                    elif action.kind == "W":
                        stage.weight_backward(action.index)
                    else:
                        self._backward(action)

    def _forward(self, action: Action) -> None:
        assert self._minibatch_note is not None
        m = action.index
        x: Tree
        if self.takes_x:
            x = self._inputs.popleft()
            note = self._minibatch_note._replace(microbatch=m, samples=self._samples_in(x))
        else:
            if self._message is None:
                self._stage.prepare(m, self.num_updates)
            message = self._message or self._receive(self._transport.forward_in, "forward", m)
            self._message, note, x = None, message.note, message.tensor
        carried: Tensor | None = None
        if note.added and note.samples:
            x, carried = x
        target = self._targets.popleft() if self._reads_y else None
        if self._weights:
            note = note._replace(weight=self._weights.popleft(), total_weight=self._minibatch_note.total_weight)
        if self._has_local_losses and not self.takes_x and note.samples:
            x, target = x
        weight = weight_of(note, has_replicas=self._has_replicas)
        micro = MicroBatch(m, self.num_updates, note.samples / note.total, weight)
        self._notes.append(note._replace(minibatch=self.num_updates, word=0, added=0))
        self._next_microbatch = m + 1
        out = self._stage.forward(micro, x, target) if note.samples else None
        if not self.takes_y:
            if self._has_local_losses and out is not None and (loss := self._stage.newest_loss()) is not None:
                self._losses.watch(self._stage.index, micro, loss)
            added = None if self._has_local_losses or out is None else self._stage.added_loss(carried)
            self._pass_on(note, out, target, added)
        elif out is not None:
            self._take_loss(micro, out, carried)

    def _take_loss(self, micro: MicroBatch, loss: Tensor, added: Tensor | None) -> None:
        """Note the last stage's part of the loss, and the terms that the stages before it have ``added``."""
        self._losses.add(micro, loss, added)

    def _pass_on(self, note: Note, out: Tree | None, target: Tree | None, added: Tensor | None) -> None:
        """Send a stage's output to the next one, and the terms that stages have ``added`` to the loss."""
        link = self._transport.forward_out
        assert link is not None
        if self._has_local_losses:
            with self._time.waiting("send"):
                self._transport.wait_for_room(link)
            if out is not None:
                out = out, map_tensors(lambda t: t.to(self._stage.device), target)
        if added is not None:
            out = out, added
        self._send(link, note._replace(added=int(added is not None)), out)

    def _recompute(self, action: Action) -> None:
        if self._notes[0].samples:
            self._stage.recompute()

    def _backward(self, action: Action) -> None:
        note, gradient = self._notes.popleft(), None
        if note.samples:
            self._stage.recompute()
        if not (self.takes_y or self._has_local_losses):
            if self._arrived:
                gradient = self._arrived.popleft()
            else:
                message = self._receive(self._transport.backward_in, "backward", action.index)
                note, gradient = _with_weights(note, message.note), message.tensor
        self._weight_at_update = note.total_weight
        if note.samples:
            self._stage.weigh(weight_of(note, has_replicas=self._has_replicas))
            gradient = self._stage.backward(gradient)
        if not self.takes_x:
            word = self.proposals.take()
            if word or not self._has_local_losses:
                assert self._transport.backward_out is not None
                self._send(self._transport.backward_out, note._replace(word=word), gradient)

    def _update(self) -> None:
        stage, samples = self._stage, self._samples.popleft()
        stage.settle()
        self._add_tied_gradients()
        if self._has_replicas:
            loss = self._losses.sum() if self.takes_y else 0.0
            weight = samples if self._weight_at_update < 0 else self._weight_at_update
            word = self.proposals.take() if self.takes_x else 0
            with self._time.waiting("replicas"):
                self._mean_loss, agreed = self._transport.averaging.average(
                    stage.gradients, stage.parameters, weight, loss, word
                )
            self._agreed_at_update |= agreed
            if math.isnan(self._mean_loss) and self._weight_at_update == 0:  # of all replicas: there is no mean
                if stage.rule.on_nonfinite == "stop":
                    raise FloatingPointError(f"the loss of mini-batch {stage.version} {NO_WEIGHT}")
                stage.spoil()
        norms: list[float] | None = None
        if stage.rule.together:
            norm = stage.gradient_norm()
            with self._time.waiting("gradient"):  # replicas have the same gradient by now
                norms = self._collectives.all_gather("step", norm)[: self._ranks.num_stages]
        stage.update(norms)
        self.copy_tied_values()

    def _add_tied_gradients(self) -> None:
        """The gradients of parameters that other stages hold too go to the stages that own them."""
        stage = self._stage
        for tie in self._other_ties:
            self._transport.send_tied(tie.owner, stage.take_gradient(tie))
        for tie in self._owned_ties:
            with self._time.waiting("gradient"):
                what = f"the gradient of {tie.name}, which both hold"
                parts = [self._transport.receive_tied(k, what) for k in tie.partners(stage.index)]
            stage.add_gradients(tie, parts)

    @torch.no_grad()
    def copy_tied_values(self) -> None:
        """The values of such parameters go from their owners to the other stages."""
        stage = self._stage
        for tie in self._owned_ties:
            for k in tie.partners(stage.index):
                self._transport.send_tied(k, stage.parameters[stage.index_of(tie)].detach())
        for tie in self._other_ties:
            with self._time.waiting("forward"):
                values = self._transport.receive_tied(tie.owner, f"the values of {tie.name}, which both hold")
            assert values is not None
            stage.parameters[stage.index_of(tie)].copy_(values)

    def _take_proposals(self) -> None:
        """Take proposals that came with no gradient."""
        link = self._transport.backward_in
        while self._has_local_losses and link is not None and (message := link.take()) is not None:
            self.proposals.add(message.note.word)

    def _send(self, link: Sender, note: Note, value: Tree | None) -> None:
        with self._time.waiting("send"):
            link.send(Kind.for_value(value), note, value)

    def _receive(self, link: Receiver | None, direction: str, m: int) -> Message:
        assert link is not None
        waits = self._time.waiting("forward" if direction == "forward" else "gradient")
        with waits, self._tracer.wait(direction, m, self._stage.index):
            message = self._transport.receive(link, lambda: f"the {direction} message of micro-batch {m}")
        assert message.note.microbatch == m, f"expected micro-batch {m}, received {message.note}"
        if direction == "backward" and message.note.word:
            self.proposals.add(message.note.word)
        return message


def _with_weights(note: Note, source: Note) -> Note:
    """A note with the weights that the message of the gradient tells."""
    return note._replace(weight=source.weight, total_weight=source.total_weight)
