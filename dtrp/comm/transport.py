"""The connections of a rank; with its parts (`dtrp.comm.link`, `chain`, `averaging`, `watch`), all that sends or receives tensors.

::

    replica 0    rank 0  --forward-->   rank 1  --forward-->   rank 2        a message a micro-batch each way,
                         <--backward--          <--backward--                in groups of their own
                 rank 0  <--control-->  rank 1  <--control-->  rank 2  <-+   a chain through all ranks: `infer`,
    replica 1    rank 3  <--control-->  rank 4  <--control-->  rank 5  <-+   state dicts, what must agree
                 every rank  <--watch-->  every rank                         who has failed, or is done
                 rank 0  <--replicas-->  rank 3                              gradients, at U
                 rank 0  <----tied---->  rank 2                              of a parameter that both hold, and its values

While it trains, nothing blocks the main thread but `Board.wait`: a link has a thread at each end.

The end is a message too: every rank tells all others that it is done, or why it fails (`Watch`), and closes
its links, so that no thread stays in a wait. Of a process that ends without a word the watch hears first,
and directly, since each rank waits for a word from every other.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.util import Finalize
from typing import Any

import torch
from torch import Tensor

from ..errors import StageError, WorkerError
from ..launch.process_end import end_at_once, end_with_failure, watch_launcher
from ..launch.ranks import Ranks
from ..launch.rendezvous import ABSENT, SILENT
from ..measure.trace import Tracer
from ..stage.tied import Tie
from .collectives import Chain
from .failure import GRACE_S, Board, Failure, Helper, SigtermHandler
from .gradient_averaging import Averaging
from .link import Link, Receiver, Sender, Wire
from .message import Kind, Message, Note
from .peer_watch import Watch
from .process_groups import Meeting

LATENCY_VARIABLE = "DTRP_MESSAGE_LATENCY_S"


class Transport:
    """All of a rank's connections.

    Made in two steps, since which backend can carry the tensors is known when the ranks have spoken: the constructor
    connects control and watch, `connect` the rest.

    Args:
        ranks: who hosts what.
        timeout_s: the longest wait.

    Attributes:
        board: where the main thread waits.
        chain: through all ranks.
        averaging: of gradients over the replicas of this stage; only where there are several, once connected.
        forward_in, forward_out, backward_in, backward_out: links to the neighbours; None at the ends.
        num_updates: mini-batches stepped, for the last word.
    """

    averaging: Averaging
    forward_in: Receiver | None
    forward_out: Sender | None
    backward_in: Receiver | None
    backward_out: Sender | None

    def __init__(self, ranks: Ranks, timeout_s: float, tracer: Tracer) -> None:
        self.ranks = ranks
        self.num_updates = 0
        self.closed = False
        self.board = Board(timeout_s, self._on_failure)
        self._process = os.getpid()
        self._tracer = tracer
        self._links: list[Link] = []
        self._tied: dict[int, tuple[Sender, Receiver]] = {}  # by the stage that shares a parameter with this one
        self._watch: Watch | None = None
        self._meeting = Meeting(ranks.all, ranks.rank)
        self._helper = Helper(self.board)
        # Runs at the end of a process that multiprocessing started, too.
        self._at_exit = Finalize(None, self._leave, exitpriority=100)
        self._sigterm = SigtermHandler(self.board, ranks.rank, self._missed_at_the_start)
        gone = Failure("ended", ranks.rank, f"the launcher of rank {ranks.rank} is gone")
        watch_launcher(lambda: self.board.fail(gone), lambda: self.closed)
        try:
            control, watch = self._make_groups(("control", ranks.all, "gloo"), ("watch", ranks.all, "gloo"))
        except BaseException as error:
            self.fail(error)
            self.close()
            raise
        self._watch = Watch(ranks, watch, self.board, self._end_links)
        self.board.explain = self._watch.explain
        place = ranks.all.index(ranks.rank)
        left = ranks.all[place - 1] if place else None
        right = ranks.all[place + 1] if place + 1 < len(ranks.all) else None
        wire = (torch.device("cpu"), "gloo")
        self.chain = Chain(
            ranks,
            self,
            self._receiver("control", control, left, *wire),
            self._sender("control", control, left, *wire),
            self._receiver("control", control, right, *wire),
            self._sender("control", control, right, *wire),
        )

    def connect(self, device: torch.device, backend: str, ties: Sequence[Tie] = ()) -> None:
        """Make the connections for training.

        Args:
            device: of this rank's stage.
            backend: that carries its tensors, the same on all ranks: ``gloo`` or ``nccl``.
            ties: parameters that several stages train, the same on all ranks.
        """
        ranks = self.ranks
        wanted = [("forward", ranks.all, backend), ("backward", ranks.all, backend)]
        if ranks.num_replicas > 1:
            wanted.append(("replicas", ranks.replicas, backend))
        if ties:  # in both directions between two ranks, so two groups
            wanted += [("tied gradients", ranks.all, backend), ("tied values", ranks.all, backend)]
        forward, backward, *others = self._make_groups(*wanted)
        if ranks.num_replicas > 1:
            self.averaging = Averaging(ranks, others[0], self.board, self._helper)
        latency_s = float(os.environ.get(LATENCY_VARIABLE, "0"))
        self.forward_in = self._receiver("forward", forward, ranks.before, device, backend)
        self.forward_out = self._sender("forward", forward, ranks.after, device, backend, latency_s)
        self.backward_in = self._receiver("backward", backward, ranks.after, device, backend)
        self.backward_out = self._sender("backward", backward, ranks.before, device, backend, latency_s)
        for stage in sorted({stage for tie in ties for stage in tie.partners(ranks.stage)}):
            peer, owns = ranks.rows[ranks.replica][stage], ranks.stage < stage
            gradients, values = others[-2:]
            outward, inward = ("tied values", values), ("tied gradients", gradients)
            if not owns:
                outward, inward = inward, outward
            sender = self._sender(*outward, peer, device, backend, latency_s)
            receiver = self._receiver(*inward, peer, device, backend)
            assert sender is not None
            assert receiver is not None
            self._tied[stage] = sender, receiver

    def _make_groups(self, *wanted: tuple[str, list[int], str]) -> list[Any]:
        def make() -> list[Any]:
            self._meeting.gather()
            groups = [self._meeting.group(*each) for each in wanted]
            self._meeting.gather(wanted[-1][0])  # who is through says nothing more, and must not be missed for that
            return groups

        try:
            groups: list[Any] = self._helper.run(make, self._describe_missing, self._listen)
        except (StageError, WorkerError):
            raise
        except RuntimeError as error:  # of the store or the backend, which name nobody
            if not (missing := self._meeting.heartbeats.missing(self._meeting.missing)):
                raise
            text = f"{self._missed(missing).format('in vain')} ({type(error).__name__}: {error})"
            raise WorkerError(text) from error
        return groups

    def _listen(self) -> None:
        """While groups are made: this rank is there, and another may know who is not."""
        missing = self._meeting.heartbeats.beat()
        if missing and self._watch is None:  # it would say more
            raise WorkerError(self._missed(missing).format("in vain"))

    def _describe_missing(self) -> str:
        return self._missed(self._meeting.heartbeats.missing(self._meeting.missing))

    def _missed_at_the_start(self) -> str:
        """What this rank has to say when it is told to end before the watch can know of anybody."""
        if self._watch is not None:
            return ""
        missing = self._meeting.heartbeats.missing(self._meeting.missing)
        return f"{self._missed(missing).format('in vain')} (it was told to end, by SIGTERM)" if missing else ""

    def _missed(self, missing: list[int]) -> str:
        how = ABSENT if set(missing) <= set(self._meeting.missing) else SILENT
        named = f"rank {', '.join(map(str, missing))}, which {how}"
        return (
            f"rank {self.ranks.rank} has waited {{}} for {named if missing else 'the other ranks, none of which is missed'}, to "
            f"make a Pipeline together; start all {len(self.ranks.all)} of them, and see that none has failed"
        )

    def _sender(
        self, name: str, group: Any, peer: int | None, device: torch.device, backend: str, latency_s: float = 0.0
    ) -> Sender | None:
        if peer is None:
            return None
        wire, place = Wire(device, backend), self.ranks.all.index(peer)
        link = Sender(name, group, peer, place, wire, self.board, self._tracer, latency_s=latency_s)
        self._links.append(link)
        return link

    def _receiver(self, name: str, group: Any, peer: int | None, device: torch.device, backend: str) -> Receiver | None:
        if peer is None:
            return None
        wire, place = Wire(device, backend), self.ranks.all.index(peer)
        link = Receiver(name, group, peer, place, wire, self.board, self._tracer)
        self._links.append(link)
        return link

    # -- training ---------------------------------------------------------------------------------------

    def receive(self, link: Receiver, what: Callable[[], str]) -> Message:
        """The next message of a link; ``what`` says what it should be."""

        def take() -> Message | None:
            message = link.take()
            if message is None and link.ended:
                self._check_done(link.peer, what)
            return message

        return self.board.wait(take, lambda: self._describe(link, what()), (link.peer,))

    def give_tied(self, stage: int, tensor: Tensor | None) -> None:
        """Send ``stage`` of this replica a gradient, or the values, of a parameter that both hold; never waits."""
        self._tied[stage][0].send(Kind.of(tensor), Note(), tensor)

    def take_tied(self, stage: int, what: str) -> Tensor | None:
        """What `give_tied` of ``stage`` has sent; ``what`` says what that is."""
        tensor: Tensor | None = self.receive(self._tied[stage][1], lambda: what).tensor
        return tensor

    def settle(self) -> None:
        """Wait until what has been sent has arrived: the spans of a trace are then complete."""
        senders = [link for link in (self.forward_out, self.backward_out) if link is not None]
        self.board.wait(
            lambda: True if all(link.begun == link.finished for link in senders) else None,
            lambda: (
                f"rank {self.ranks.rank}, {self.board.doing}, has waited {{}} for rank "
                f"{', '.join(str(link.peer) for link in senders)} to take its messages"
            ),
            [link.peer for link in senders],
        )

    def wait_for_room(self, link: Sender) -> None:
        """Wait while messages pile up before the other end."""
        self.board.wait(
            lambda: None if link.crowded else True,
            lambda: (
                f"rank {self.ranks.rank}, {self.board.doing}, has waited {{}} for rank {link.peer} to take its input"
            ),
            (link.peer,),
        )

    def _describe(self, link: Receiver, what: str) -> str:
        text = f"rank {self.ranks.rank}, {self.board.doing}, has waited {{}} for rank {link.peer}: {what}"
        text += self.chain.meanwhile()
        return text + ". Every rank must call step() the same number of times, and all else in the same order"

    def check_steps(self, steps: Sequence[int]) -> None:
        """Refuse what cannot be: mini-batches that each rank of the chain has stepped, and not the same number."""
        if len(set(steps)) > 1:
            counts = ", ".join(f"{n} on rank {rank}" for rank, n in zip(self.ranks.all, steps, strict=True))
            raise RuntimeError(
                f"step() was called {counts} times; every rank must call step() the same number of times"
            )

    def _check_done(self, peer: int, what: Callable[[], str]) -> None:
        """A neighbour that has closed its links is done, or has failed and says so."""
        assert self._watch is not None
        if peer in self._watch.done:
            raise WorkerError(
                f"rank {peer} has closed its pipeline after {self._watch.done[peer]} steps, and rank {self.ranks.rank}, "
                f"{self.board.doing}, waits for it: {what()}. Every rank must call step() the same number of times"
            )

    # -- the end ------------------------------------------------------------------------------------------

    def fail(self, error: BaseException) -> None:
        """Tell all ranks of an error of this one."""
        if os.getpid() == self._process:
            self.board.raised = True
            self.board.fail(Failure.of(self.ranks.rank, error))

    def close(self) -> None:
        """Tell all ranks that this one is through, and wait until they are; after a failure, only let threads end.

        Raises:
            StageError, WorkerError: another rank has failed meanwhile.
            RuntimeError: the ranks have not stepped the same number of mini-batches.
        """
        if self.closed or os.getpid() != self._process:
            return
        self.closed = self._meeting.over = True
        self.board.doing = "closing its pipeline"
        board, watch = self.board, self._watch
        failed = board.failure is not None
        if watch is None:
            self._end_links()
        elif not failed:
            watch.say({"done": self.num_updates})
            try:
                board.wait(
                    lambda: None if watch.missing else True,
                    lambda: (
                        f"rank {self.ranks.rank} has closed its pipeline and waited {{}} for rank "
                        f"{', '.join(map(str, watch.missing))} to do so"
                    ),
                )
            except BaseException as error:
                self.fail(error)
                self._join(GRACE_S)
                raise
        self._join(GRACE_S if failed else board.timeout_s)
        if not self._threads_left:
            self._at_exit.cancel()
        if not failed:
            self._sigterm.restore()
            if watch is not None:  # who runs ahead of a gradient that it never needs has not waited for it
                done = {**watch.done, self.ranks.rank: self.num_updates}
                self.check_steps([done[rank] for rank in self.ranks.all])
        elif not board.raised:
            board.check()

    def _join(self, timeout_s: float) -> None:
        until = time.monotonic() + timeout_s
        while self._threads_left and time.monotonic() < until:
            time.sleep(0.002)

    @property
    def _threads_left(self) -> bool:
        watching = self._watch is not None and self._watch.alive
        return watching or self._helper.alive or any(link.alive for link in self._links)

    def _leave(self) -> None:
        """At the end of the process: what a script has not closed, and threads that nothing can stop."""
        if os.getpid() != self._process:
            return
        error = sys.exc_info()[1] or getattr(sys, "last_exc", None) or getattr(sys, "last_value", None)
        if isinstance(error, SystemExit) and not error.code:  # of a multiprocessing child, too, that is through
            error = None
        unheard = False
        try:
            if error is not None and not self.closed:
                self.fail(error)
            self.close()
        except BaseException:
            unheard = True
            traceback.print_exc()
        if self._threads_left:
            if error is not None and error is sys.exc_info()[1]:  # of a multiprocessing child, not printed yet
                traceback.print_exception(error)
            end_at_once()
        elif unheard and error is None:  # a run that lost a rank must not look like one that did not
            end_with_failure()

    def _on_failure(self, failure: Failure) -> None:
        if self._watch is not None:
            self._watch.say(dataclasses.asdict(failure))
        else:
            self._helper.finish()

    def _end_links(self) -> None:
        self._helper.finish()
        for link in self._links:
            link.end()
