"""The connections of a rank. With its parts (the other modules of this package) all that sends or receives tensors.

::

    replica 0    rank 0  --forward-->   rank 1  --forward-->   rank 2        a message a micro-batch each way,
                         <--backward--          <--backward--                in groups of their own
                 rank 0  <--control-->  rank 1  <--control-->  rank 2  <-+   a chain through all ranks: `infer`,
    replica 1    rank 3  <--control-->  rank 4  <--control-->  rank 5  <-+   state dicts, what must agree
                 every rank  <--watch-->  every rank                         which rank has failed, or is done
                 rank 0  <--replicas-->  rank 3                              gradients, at U
                 rank 0  <----tied---->  rank 2                              gradients and values of shared parameters

While it trains, nothing blocks the main thread but `Monitor.wait`: a link has a thread at each end.

The end is a message too. Every rank tells all others that it is done, or why it fails (`PeerWatch`), and ends its
links, so that no thread stays in a wait. If a process ends without a word, the watch hears of it first, and directly:
each rank waits for a message from every other.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.util import Finalize
from typing import TypeVar

import torch
from torch import Tensor

from ..errors import WorkerError
from ..launch.process_end import end_at_once, end_with_failure, watch_launcher
from ..launch.ranks import Ranks
from ..measure.trace import Tracer
from .collectives import Collectives
from .failure import GRACE_S, Failure, HelperThread, Monitor, SigtermHandler
from .gradient_averaging import GradientAveraging
from .link import Connection, DeviceTransfer, Link, Peer, Receiver, Sender
from .message import Kind, Message, Note
from .peer_watch import PeerWatch
from .process_groups import GroupFactory

LATENCY_VARIABLE = "DTRP_MESSAGE_LATENCY_S"
_RULE = "Every rank must call the same methods in the same order, and step() the same number of times"
L = TypeVar("L", bound=Link)


class Transport:
    """All connections of a rank.

    Made in two steps, since the backend for tensors is chosen when the ranks have compared their devices: the
    constructor connects control and watch, `connect` the rest.

    Args:
        ranks: which rank hosts which stage.
        timeout_s: the longest wait.
        tracer: records sends and receives.

    Attributes:
        monitor: where the main thread waits.
        collectives: over all ranks.
        averaging: of gradients over the replicas of this stage; only where there are several, once connected.
        forward_in, forward_out, backward_in, backward_out: links to the neighbours; None at the ends.
        num_updates: the number of mini-batches stepped, which the others are told at the end.
        closed: whether this rank has left the others.
    """

    averaging: GradientAveraging
    forward_in: Receiver | None
    forward_out: Sender | None
    backward_in: Receiver | None
    backward_out: Sender | None

    def __init__(self, ranks: Ranks, timeout_s: float, tracer: Tracer) -> None:
        self.ranks = ranks
        self.num_updates = 0
        self.closed = False
        self.monitor = Monitor(timeout_s, self._on_failure)
        self._process = os.getpid()
        self._tracer = tracer
        self._links: list[Link] = []
        self._tied: dict[int, Connection] = {}  # by the stage that shares a parameter with this one
        self._watch: PeerWatch | None = None
        self._helper = HelperThread(self.monitor)
        self._groups = GroupFactory(ranks, self._helper)
        # Also run at the end of a process that multiprocessing started, unlike those of `atexit`.
        self._at_exit = Finalize(None, self._leave, exitpriority=100)
        self._sigterm = SigtermHandler(self.monitor, ranks.rank, self._groups.missing_at_sigterm)
        gone = Failure("ended", ranks.rank, f"the launcher of rank {ranks.rank} is gone")
        watch_launcher(lambda: self.monitor.fail(gone), lambda: self.closed)
        try:
            control, watch = self._groups.make(("control", ranks.all, "gloo"), ("watch", ranks.all, "gloo"))
        except BaseException as error:
            self.fail(error)
            self.close()
            raise
        self._watch = PeerWatch(ranks, watch, self.monitor, self._end_links)
        self._groups.is_watched = True
        self.monitor.explain = self._watch.explain

        def neighbour(place: int) -> Connection | None:
            if not 0 <= place < len(ranks.all):
                return None
            peer = Peer(ranks.all[place], control, place)
            return Connection(self._open(Receiver, "control", peer, cpu), self._open(Sender, "control", peer, cpu))

        place, cpu = ranks.all.index(ranks.rank), DeviceTransfer(torch.device("cpu"), "gloo")
        self.collectives = Collectives(ranks, self, neighbour(place - 1), neighbour(place + 1))

    def connect(self, device: torch.device, backend: str, tied_stages: Sequence[Sequence[int]] = ()) -> None:
        """Make the connections for training.

        Args:
            device: of this rank's stage.
            backend: for the stages' tensors, the same on all ranks: ``gloo`` or ``nccl``.
            tied_stages: by stage, the stages that it shares trained parameters with; the same on all ranks.
        """
        ranks = self.ranks
        wanted = {"forward": ranks.all, "backward": ranks.all}
        if ranks.num_replicas > 1:
            wanted["replicas"] = ranks.replicas
        if any(tied_stages):
            wanted |= {"tied gradients": ranks.all, "tied values": ranks.all}
        made = self._groups.make(*((name, members, backend) for name, members in wanted.items()))
        groups = dict(zip(wanted, made, strict=True))
        if ranks.num_replicas > 1:
            self.averaging = GradientAveraging(ranks, groups["replicas"], self.monitor, self._helper)
        latency_s = float(os.environ.get(LATENCY_VARIABLE, "0"))

        def link(kind: type[L], name: str, rank: int) -> L:
            peer = Peer(rank, groups[name], ranks.all.index(rank))
            return self._open(kind, name, peer, DeviceTransfer(device, backend, latency_s))

        before, after = ranks.before, ranks.after
        self.forward_in = link(Receiver, "forward", before) if before is not None else None
        self.forward_out = link(Sender, "forward", after) if after is not None else None
        self.backward_in = link(Receiver, "backward", after) if after is not None else None
        self.backward_out = link(Sender, "backward", before) if before is not None else None
        for stage in tied_stages[ranks.stage] if tied_stages else ():
            inward, outward = "tied gradients", "tied values"  # of the stage that updates what both share
            if ranks.stage > stage:
                inward, outward = outward, inward
            rank = ranks.rows[ranks.replica][stage]
            self._tied[stage] = Connection(link(Receiver, inward, rank), link(Sender, outward, rank))

    def _open(self, kind: type[L], name: str, peer: Peer, transfer: DeviceTransfer) -> L:
        opened = kind(name, peer, transfer, self.monitor, self._tracer)
        self._links.append(opened)
        return opened

    # -- training ---------------------------------------------------------------------------------------

    def receive(self, link: Receiver, describe: Callable[[], str]) -> Message:
        """The next message of a link; ``describe`` says what it should be."""

        def take() -> Message | None:
            message = link.take()
            if message is None and link.ended:
                self._check_not_closed(link.peer, describe)
            return message

        return self.monitor.wait(
            take,
            lambda: (
                f"{self._has_waited} for rank {link.peer}: {describe()}{self.collectives.neighbours_methods()}. {_RULE}"
            ),
            (link.peer,),
        )

    def send_tied(self, stage: int, tensor: Tensor | None) -> None:
        """Send ``stage`` of this replica a gradient, or the values, of a parameter that both hold; never waits."""
        self._tied[stage].sender.send(Kind.for_value(tensor), Note(), tensor)

    def receive_tied(self, stage: int, description: str) -> Tensor | None:
        """What `send_tied` of ``stage`` has sent; ``description`` says what that is."""
        tensor: Tensor | None = self.receive(self._tied[stage].receiver, lambda: description).tensor
        return tensor

    def wait_until_sent(self) -> None:
        """Wait until what has been sent has arrived: the spans of a trace are then complete."""
        senders = [link for link in (self.forward_out, self.backward_out) if link is not None]
        peers = [link.peer for link in senders]
        self.monitor.wait_until(
            lambda: all(link.begun == link.finished for link in senders),
            lambda: f"{self._has_waited} for rank {', '.join(map(str, peers))} to take its messages",
            peers,
        )

    def wait_for_room(self, link: Sender) -> None:
        """Wait while messages pile up before the other end."""
        self.monitor.wait_until(
            lambda: not link.crowded, lambda: f"{self._has_waited} for rank {link.peer} to take its input", (link.peer,)
        )

    @property
    def _has_waited(self) -> str:
        return f"rank {self.ranks.rank}, {self.monitor.doing}, has waited {{}}"

    def check_steps(self, steps: Sequence[int]) -> None:
        """Refuse numbers of mini-batches, by rank in the order of the chain, that are not the same."""
        if len(set(steps)) > 1:
            counts = ", ".join(f"{n} on rank {rank}" for rank, n in zip(self.ranks.all, steps, strict=True))
            raise RuntimeError(
                f"step() was called {counts} times; every rank must call step() the same number of times"
            )

    def _check_not_closed(self, peer: int, describe: Callable[[], str]) -> None:
        """A neighbour that has ended its links is done, or has failed and says so."""
        assert self._watch is not None
        if peer in self._watch.done:
            raise WorkerError(
                f"rank {peer} has closed its pipeline after {self._watch.done[peer]} steps, and rank {self.ranks.rank}, "
                f"{self.monitor.doing}, waits for it: {describe()}. {_RULE}"
            )

    # -- the end ------------------------------------------------------------------------------------------

    def fail(self, error: BaseException) -> None:
        """Tell all ranks of an error of this one."""
        if os.getpid() == self._process:
            self.monitor.raised = True
            self.monitor.fail(Failure.from_error(self.ranks.rank, error))

    def close(self) -> None:
        """Tell all ranks that this one is done, and wait until they are; after a failure, only let threads end.

        Raises:
            StageError, WorkerError: another rank has failed meanwhile.
            RuntimeError: the ranks have not stepped the same number of mini-batches.
        """
        if self.closed or os.getpid() != self._process:
            return
        self.closed = self._groups.cancelled = True
        monitor, watch = self.monitor, self._watch
        monitor.doing = "closing its pipeline"
        failed = monitor.failure is not None
        if watch is None:
            self._end_links()
        elif not failed:
            self._wait_for_others(watch)
        self._wait_for_threads(GRACE_S if failed else monitor.timeout_s)
        if not self._threads_left:
            self._at_exit.cancel()
        if failed:
            if not monitor.raised:
                monitor.check()
            return
        self._sigterm.restore()
        if watch is not None:  # a rank that is ahead of a gradient that it never needs has not waited for it
            done = {**watch.done, self.ranks.rank: self.num_updates}
            self.check_steps([done[rank] for rank in self.ranks.all])

    def _wait_for_others(self, watch: PeerWatch) -> None:
        watch.announce({"done": self.num_updates})
        try:
            self.monitor.wait_until(
                lambda: not watch.not_done,
                lambda: (
                    f"rank {self.ranks.rank} has closed its pipeline and waited {{}} for rank "
                    f"{', '.join(map(str, watch.not_done))} to do so"
                ),
            )
        except BaseException as error:
            self.fail(error)
            self._wait_for_threads(GRACE_S)
            raise

    def _wait_for_threads(self, timeout_s: float) -> None:
        until = time.monotonic() + timeout_s
        while self._threads_left and time.monotonic() < until:
            time.sleep(0.002)

    @property
    def _threads_left(self) -> bool:
        watching = self._watch.threads if self._watch is not None else []
        return any(thread.is_alive() for thread in (self._helper, *self._links, *watching))

    def _leave(self) -> None:
        """At the end of the process: close what a script has not closed, and end threads that nothing can stop."""
        if os.getpid() != self._process:
            return
        error = sys.exc_info()[1] or getattr(sys, "last_exc", None) or getattr(sys, "last_value", None)
        if isinstance(error, SystemExit) and not error.code:  # a success; a child of multiprocessing ends so too
            error = None
        failed_at_close = False
        try:
            if error is not None and not self.closed:
                self.fail(error)
            self.close()
        except BaseException:
            failed_at_close = True
            traceback.print_exc()
        if self._threads_left:
            if error is not None and error is sys.exc_info()[1]:  # of a child of multiprocessing, not printed yet
                traceback.print_exception(error)
            end_at_once()
        elif failed_at_close and error is None:  # a run that lost a rank must not look like one that did not
            end_with_failure()

    def _on_failure(self, failure: Failure) -> None:
        if self._watch is not None:
            self._watch.announce(dataclasses.asdict(failure))
        else:
            self._helper.finish()

    def _end_links(self) -> None:
        self._helper.finish()
        for link in self._links:
            link.end()
