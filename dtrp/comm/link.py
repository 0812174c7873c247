"""The two ends of a connection between ranks, each with a thread of its own.

The receiver's thread posts its next receive as soon as the last message has been taken, a slot before the next one
comes, since gloo moves data only into a receive that is posted. Both ends agree on the capacity of a buffer: a message
that exceeds it is announced by one of kind GROW, and the receive after that has the room.
"""

from __future__ import annotations

import os
import queue
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..measure.trace import Tracer
from ..tensors.layout import aligned_room, parts_of
from ..tensors.pytree import tensors_of
from ..typing import Tree
from .failure import GRACE_S, Failure, Monitor
from .message import HEADER_BYTES, Kind, Message, Note, Packed, Packer, ReceiveBuffer, decode, read_header

_SMALL_BYTES = 64 * 2**10
_MOST_KEPT = 16
_MOST_WAITING = 2
_CPU = torch.device("cpu")
# Where ranks share cores, whoever waits for the message goes first.
_yield_core = getattr(os, "sched_yield", lambda: None)


class DeviceTransfer:
    """Moves the messages of one link between a stage's device and what the backend takes.

    With gloo the tensors of an accelerator go through pinned host memory, on a stream of the link's own. NCCL takes
    them where they are, in messages that always have the full capacity.

    Args:
        device: of the stage.
        backend: ``gloo`` or ``nccl``.
        latency_s: how long every message is held back, to simulate a slow network.

    Attributes:
        full_capacity: whether every message has the full capacity.
    """

    def __init__(self, device: torch.device, backend: str, latency_s: float = 0.0) -> None:
        self.device, self.latency_s = device, latency_s
        self.full_capacity = backend == "nccl"
        self._module: Any = torch.get_device_module(device) if device.type != "cpu" else None
        self._stream: Any = self._module.Stream(device) if self._module is not None else None

    def to_backend(self, packed: Packed) -> tuple[Packed, Any]:
        """The message where the backend takes it, and the event after which it is there; called by the main thread."""
        if packed.buffer.device.type == "cpu":
            return packed, None
        computed = self._module.current_stream(self.device).record_event()
        if self.full_capacity:
            return packed, computed
        with self._module.stream(self._stream):
            self._stream.wait_event(computed)
            host = aligned_room(packed.buffer.numel(), pinned=True)
            host.copy_(packed.buffer, non_blocking=True)
            packed.buffer.record_stream(self._stream)
            return Packed(host, packed.header), self._stream.record_event()

    def room(self, nbytes: int) -> Tensor:
        """A buffer for a message to be received into."""
        if self.full_capacity:
            return aligned_room(nbytes, self.device)
        return aligned_room(nbytes, _CPU, pinned=self.device.type != "cpu" and nbytes > HEADER_BYTES)

    def from_backend(self, room: Tensor) -> Message:
        """The message in a buffer, with its tensor on the stage's device; called by a helper thread."""
        header = read_header(room)
        if room.device != self.device and header.kind in (Kind.TENSOR, Kind.TREE):
            on_device = aligned_room(room.numel(), self.device)
            on_device.copy_(room, non_blocking=True)
            self._stream.synchronize()
            room = on_device
        return decode(header, room)

    def record_use(self, value: Tree | None) -> None:
        """A received value is about to be used by the main thread, on its stream."""
        if self._module is not None and value is not None:
            for part in (part for tensor in tensors_of(value) for part in parts_of(tensor)):
                if part.device == self.device:
                    part.record_stream(self._module.current_stream(self.device))

    def use_in_thread(self) -> None:
        """Make the device and the link's stream current in the calling thread."""
        if self._module is not None:
            self._module.set_device(self.device)
            self._module.set_stream(self._stream)

    def finish(self, work: dist.Work) -> None:
        """Wait for a send or receive; NCCL's wait only holds up the thread's stream."""
        work.wait()
        if self.full_capacity:
            self._stream.synchronize()


@dataclass(frozen=True)
class Peer:
    """The other rank of a connection.

    Args:
        rank: in the default group.
        group: the process group of the connection.
        group_rank: the other rank in that group.
    """

    rank: int
    group: dist.ProcessGroup
    group_rank: int


class Link(threading.Thread, ABC):
    """One end of a connection to another rank, with a thread of its own.

    Args:
        purpose: the connection's name, for traces.
        peer: the other rank.
        transfer: moves messages between the stage's device and the backend.
        monitor: where the main thread waits.
        tracer: records sends and receives.
    """

    def __init__(self, purpose: str, peer: Peer, transfer: DeviceTransfer, monitor: Monitor, tracer: Tracer) -> None:
        super().__init__(name=f"dtrp {purpose} {peer.rank}", daemon=True)
        self.purpose, self.peer = purpose, peer.rank
        self._peer, self._transfer, self._monitor, self._tracer = peer, transfer, monitor, tracer

    def run(self) -> None:
        try:
            self._transfer.use_in_thread()
            self._work()
        except Exception as error:
            # The connection broke. The watch may know whose end broke it; if it does not, nobody does.
            self._monitor.failed_within(GRACE_S)
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            self._monitor.fail(Failure("gone", self.peer, f"rank {self.peer} cannot be reached any more: {reason}"))

    @abstractmethod
    def _work(self) -> None:
        """What the thread does, until the link has ended."""

    @abstractmethod
    def end(self) -> None:
        """This rank is done with the link; never waits, and may be called again."""


@dataclass
class _Job:
    """A message on its way out.

    Args:
        kind: of the message.
        note: what it says of its micro-batch.
        packed: the message.
        ready: an event after which the buffer is filled, or None.
        due: the earliest time to send it, by `time.monotonic`.
        works: what the backend has to finish, once the message has been handed to it.
    """

    kind: Kind
    note: Note
    packed: Packed
    ready: Any
    due: float
    works: list[dist.Work] | None = None


class Sender(Link):
    """The sending end of a connection; `send` never waits.

    Attributes:
        begun: the number of messages so far.
        finished: the number of messages that have been sent.
        bounded: whether the main thread waits while the link is `crowded`, before it sends.
    """

    def __init__(self, *link: Any) -> None:
        super().__init__(*link)
        self._jobs: queue.SimpleQueue[_Job] = queue.SimpleQueue()
        self._packer = Packer(reuses=self.purpose != "control")
        self.begun = self.finished = 0
        self.bounded = False
        self._kept: list[_Job] = []  # under way, and not handed to the thread yet
        self._capacity = HEADER_BYTES
        self._unsent = 0  # jobs that the thread has yet to hand to the backend
        self._counting = threading.Lock()
        self._ended = threading.Lock()
        self.start()

    def send(self, kind: Kind, note: Note, value: Tree | None = None) -> None:
        """Send a tensor or a tree, which may be written when this returns; None in messages that carry none."""
        packed, ready = self._transfer.to_backend(self._packer.pack(kind, note, value))
        latency_s = self._transfer.latency_s
        job = _Job(kind, note, packed, ready, time.monotonic() + latency_s if latency_s else 0.0)
        # The main thread hands a small message to the backend itself: waking the thread would cost more than the
        # message. (Nobody but this thread and `end` raises the count of the jobs before it.)
        small = packed.buffer.numel() <= _SMALL_BYTES
        at_once = small and not (self._unsent or job.due or ready or self._transfer.full_capacity)
        if at_once:
            with suppress(RuntimeError):  # the connection is broken: the thread will say so
                job.works = self._issue(job)
        # A message under way must be kept until it is there. Small ones are kept a little longer, since the thread,
        # once awake, would compete with the main one for the interpreter just when the next action begins.
        self.begun += 1
        with self._counting:
            self._unsent += job.works is None
            self._kept.append(job)
        if not at_once or len(self._kept) >= _MOST_KEPT or self.bounded or self._tracer.on:
            self._hand_to_thread()
        _yield_core()

    def _hand_to_thread(self) -> None:
        with self._counting:
            for job in self._kept:
                self._jobs.put(job)
            self._kept.clear()

    @property
    def crowded(self) -> bool:
        """Whether messages wait for the other end to take those before them."""
        return self._jobs.qsize() > _MOST_WAITING

    def end(self) -> None:
        if self._ended.acquire(blocking=False):
            self._hand_to_thread()
            with self._counting:
                self._unsent += 1
            self._jobs.put(_Job(Kind.END, Note(), self._packer.pack(Kind.END, Note()), None, 0.0))

    def _work(self) -> None:
        kind = None
        while kind is not Kind.END:
            job = self._jobs.get()
            kind, began = job.kind, time.time_ns()
            if job.works is None:
                if (early := job.due - time.monotonic()) > 0:
                    time.sleep(early)
                if job.ready is not None:
                    job.ready.synchronize()
                job.works = self._issue(job)
                with self._counting:
                    self._unsent -= 1
            with self._tracer.range(f"send {self.purpose}"):
                for work in job.works:
                    self._transfer.finish(work)
            job.packed.release()
            self._tracer.add(f"send {self.purpose} {job.note.microbatch}", "send", self.purpose, began)
            self.finished += 1
            if self.purpose == "control" or self.bounded or self._tracer.on:
                # The main thread may wait for room, or for the span.
                self._monitor.notify()

    def _issue(self, job: _Job) -> list[dist.Work]:
        """Hand a message to the backend, after its announcement where it needs one."""
        works = []
        nbytes = job.packed.buffer.numel()
        if nbytes > self._capacity:
            works.append(self._post(self._packer.pack(Kind.GROW, Note(total=nbytes))))
            self._capacity = nbytes
        works.append(self._post(job.packed))
        if job.kind is Kind.OBJECT:  # rare and large: not a size to keep room for
            self._capacity = HEADER_BYTES
        return works

    def _post(self, packed: Packed) -> dist.Work:
        packed.write_header()
        buffer = packed.buffer
        if self._transfer.full_capacity:
            room = self._transfer.room(self._capacity)
            room[: buffer.numel()].copy_(buffer)
            buffer = room
        return self._peer.group.send([buffer], self._peer.group_rank, 0)


class Receiver(Link):
    """The receiving end of a connection: at most one message, or one posted receive, ahead of `take`.

    Attributes:
        ended: whether the other end is done.
    """

    def __init__(self, *link: Any) -> None:
        super().__init__(*link)
        self._inbox: deque[Message] = deque()
        self._permits: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._permits.put(None)
        self._draining = False
        self._expected: tuple[bytes, ...] = ()  # see `ReceiveBuffer`
        self.ended = False
        self.start()

    def peek(self) -> Message | None:
        """The message that `take` would return."""
        try:
            return self._inbox[0]
        except IndexError:
            return None

    def take(self) -> Message | None:
        """The next message, if it is there; its place is free for the one after it."""
        try:
            message = self._inbox.popleft()
        except IndexError:
            return None
        self._transfer.record_use(message.tensor)
        self._permits.put(None)
        return message

    def end(self) -> None:
        """Receive and drop what still comes."""
        self._draining = True
        self._permits.put(None)

    def _work(self) -> None:
        capacity = HEADER_BYTES
        while True:
            self._permits.get()
            if self._draining:
                self._permits.put(None)
                self._inbox.clear()
            began = time.time_ns()
            with self._tracer.range(f"receive {self.purpose}"):
                message = self._receive(capacity)
                if message.kind is Kind.GROW:
                    capacity = message.note.total
                    message = self._receive(capacity)
            if message.kind is Kind.OBJECT:
                capacity = HEADER_BYTES
            if message.kind is Kind.END:
                self.ended = True
                return self._monitor.notify()
            self._tracer.add(f"receive {self.purpose} {message.note.microbatch}", "receive", self.purpose, began)
            self._inbox.append(message)
            self._monitor.notify()

    def _receive(self, capacity: int) -> Message:
        room = self._transfer.room(capacity)
        buffer = ReceiveBuffer(room, self._expected) if self._transfer.device.type == "cpu" else None
        self._transfer.finish(self._peer.group.recv([room], self._peer.group_rank, 0))
        if buffer is None:
            return self._transfer.from_backend(room)
        message, self._expected = buffer.message(), buffer.expected
        return message


class Connection(NamedTuple):
    """A connection in both directions, of two links.

    Args:
        receiver: from the other rank.
        sender: to the other rank.
    """

    receiver: Receiver
    sender: Sender
