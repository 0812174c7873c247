"""The two ends of a connection between ranks, each with a thread of its own.

The receiver's thread posts its next receive as soon as the last message has been taken, a slot before the next
one comes, since gloo moves data only into a receive that is posted. Buffers have an agreed capacity; a message that
exceeds it is announced by one that says so, and the receive after that has the room.
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
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..measure.trace import Tracer
from ..tensors.layout import aligned_room, parts_of
from ..tensors.pytree import tensors_of
from .failure import GRACE_S, Board, Failure
from .message import HEADER_BYTES, Kind, Landing, Message, Note, Packed, Packer, decode, read_header

_SMALL_BYTES = 64 * 2**10
_MOST_KEPT = 16
_MOST_WAITING = 2
_CPU = torch.device("cpu")
# Where ranks share cores, whoever waits for the message goes first.
_give_way = getattr(os, "sched_yield", lambda: None)


class Wire:
    """How one link's bytes get from a stage's device into a message, or back.

    With gloo the tensors of an accelerator go through pinned host memory, on a stream of the link's own; NCCL takes
    them where they are, in messages that always have the full capacity.
    """

    def __init__(self, device: torch.device, backend: str) -> None:
        self.device = device
        self.full = backend == "nccl"
        self._module: Any = torch.get_device_module(device) if device.type != "cpu" else None
        self._stream: Any = self._module.Stream(device) if self._module is not None else None

    def out(self, packed: Packed) -> tuple[Packed, Any]:
        """What to send, and the event after which it is there; called by the main thread."""
        if packed.buffer.device.type == "cpu":
            return packed, None
        computed = self._module.current_stream(self.device).record_event()
        if self.full:
            return packed, computed
        with self._module.stream(self._stream):
            self._stream.wait_event(computed)
            host = aligned_room(packed.buffer.numel(), pinned=True)
            host.copy_(packed.buffer, non_blocking=True)
            packed.buffer.record_stream(self._stream)
            return Packed(host, packed.header), self._stream.record_event()

    def room(self, nbytes: int) -> Tensor:
        """Memory for a message to be received into."""
        if self.full:
            return aligned_room(nbytes, self.device)
        return aligned_room(nbytes, _CPU, pinned=self.device.type != "cpu" and nbytes > HEADER_BYTES)

    def arrived(self, room: Tensor) -> Message:
        """The message in a buffer that has been filled, its tensor on the stage's device; called by a helper thread."""
        header = read_header(room)
        if room.device != self.device and header[0] in (Kind.TENSOR, Kind.TREE):
            here = aligned_room(room.numel(), self.device)
            here.copy_(room, non_blocking=True)
            self._stream.synchronize()
            room = here
        return decode(header, room)

    def taken(self, value: Any) -> None:
        """What was received is about to be used by the main thread, on its stream."""
        if self._module is None or value is None:
            return
        for part in (part for tensor in tensors_of(value) for part in parts_of(tensor)):
            if part.device == self.device:
                part.record_stream(self._module.current_stream(self.device))

    def own_thread(self) -> None:
        """Work on this device, and the link's stream, in the calling thread."""
        if self._module is not None:
            self._module.set_device(self.device)
            self._module.set_stream(self._stream)

    def finish(self, work: dist.Work) -> None:
        """Wait for a send or receive; NCCL's wait only holds up the thread's stream."""
        work.wait()
        if self.full:
            self._stream.synchronize()


class Link(ABC):
    """One end of a connection to another rank, with a thread of its own."""

    def __init__(self, name: str, group: Any, peer: int, place: int, wire: Wire, board: Board, tracer: Tracer) -> None:
        self.name, self.peer = name, peer
        self._place = place  # of the peer in the group
        self._group, self._wire, self._board, self._tracer = group, wire, board, tracer
        self._thread = threading.Thread(target=self._run, name=f"dtrp {name} {peer}", daemon=True)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def _run(self) -> None:
        try:
            self._wire.own_thread()
            self._work()
        except Exception as error:
            _broken(self._board, self.peer, error)

    @abstractmethod
    def _work(self) -> None:
        """What the thread does, to the end of the link."""

    @abstractmethod
    def end(self) -> None:
        """This rank is through with the link; never waits, and once is enough."""


@dataclass
class _Job:
    """A message on its way out."""

    kind: Kind
    note: Note
    packed: Packed
    ready: Any  # an event after which the buffer is there, or None
    due: float  # not to be sent before this time
    works: list[dist.Work] | None = None  # what is left to wait for, once it has been handed to the backend


class Sender(Link):
    """The sending end of a connection; `send` never waits."""

    def __init__(self, *link: Any, latency_s: float = 0.0) -> None:
        super().__init__(*link)
        self._latency_s = latency_s
        self._jobs: queue.SimpleQueue[_Job] = queue.SimpleQueue()
        self._packer = Packer(keeps=self.name != "control")
        self.begun = self.finished = 0  # messages
        self.bounded = False  # whether the main thread waits before it sends, when the link is crowded
        self._kept: list[_Job] = []  # under way, and not handed to the thread yet
        self._capacity = HEADER_BYTES
        self._unsent = 0  # jobs that the thread has yet to hand to the backend
        self._counting = threading.Lock()
        self._finished = threading.Lock()
        self._thread.start()

    def send(self, kind: Kind, note: Note, tensor: Any = None) -> None:
        """Send a message, a tensor or a tree of them; they may be written when this returns."""
        packed, ready = self._wire.out(self._packer.pack(kind, note, tensor))
        job = _Job(kind, note, packed, ready, time.monotonic() + self._latency_s if self._latency_s else 0.0)
        # A small message is handed over here: waking the thread would cost more than the message.
        # (Nobody but this thread and `end` raises the count of those before it.)
        small = packed.buffer.numel() <= _SMALL_BYTES
        at_once = small and not (self._unsent or job.due or ready or self._wire.full)
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
            self._hand_over()
        _give_way()

    def _hand_over(self) -> None:
        with self._counting:
            for job in self._kept:
                self._jobs.put(job)
            self._kept.clear()

    @property
    def crowded(self) -> bool:
        """Whether messages wait for the other end to take those before them."""
        return self._jobs.qsize() > _MOST_WAITING

    def end(self) -> None:
        if self._finished.acquire(blocking=False):
            self._hand_over()
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
            with self._tracer.range(f"send {self.name}"):
                for work in job.works:
                    self._wire.finish(work)
            job.packed.give_back()
            self._tracer.add(f"send {self.name} {job.note.microbatch}", "send", self.name, began)
            self.finished += 1
            if self.name == "control" or self.bounded or self._tracer.on:
                # The main thread waits for room, or for the span.
                self._board.notify()

    def _issue(self, job: _Job) -> list[dist.Work]:
        """Hand a message to the backend, after the announcement that it may need."""
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
        packed.seal()
        buffer = packed.buffer
        if self._wire.full:
            room = self._wire.room(self._capacity)
            room[: buffer.numel()].copy_(buffer)
            buffer = room
        work: dist.Work = self._group.send([buffer], self._place, 0)
        return work


class Receiver(Link):
    """The receiving end of a connection: at most one message, or one posted receive, ahead of `take`."""

    def __init__(self, *link: Any) -> None:
        super().__init__(*link)
        self._inbox: deque[Message] = deque()
        self._permits: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._permits.put(None)
        self._draining = False
        self._known: tuple[bytes, ...] = ()  # how tensors have lain
        self.ended = False  # the other end has finished
        self._thread.start()

    def peek(self) -> Message | None:
        """The message that `take` would return."""
        try:
            return self._inbox[0]
        except IndexError:
            return None

    def take(self) -> Message | None:
        """The next message, if it is there; lets the one after it come."""
        try:
            message = self._inbox.popleft()
        except IndexError:
            return None
        self._wire.taken(message.tensor)
        self._permits.put(None)
        return message

    def end(self) -> None:
        """Receive and forget what still comes."""
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
            with self._tracer.range(f"receive {self.name}"):
                message = self._receive(capacity)
                if message.kind is Kind.GROW:
                    capacity = message.nbytes
                    message = self._receive(capacity)
            if message.kind is Kind.OBJECT:
                capacity = HEADER_BYTES
            if message.kind is Kind.END:
                self.ended = True
                self._board.notify()
                return
            self._tracer.add(f"receive {self.name} {message.note.microbatch}", "receive", self.name, began)
            self._inbox.append(message)
            self._board.notify()

    def _receive(self, capacity: int) -> Message:
        room = self._wire.room(capacity)
        landing = Landing(room, self._known) if self._wire.device.type == "cpu" else None
        self._wire.finish(self._group.recv([room], self._place, 0))
        if landing is None:
            return self._wire.arrived(room)
        message, self._known = landing.message(), landing.known
        return message


def _broken(board: Board, peer: int, error: Exception) -> None:
    """A connection broke: the watch knows whose end broke it, or nobody does."""
    until = time.monotonic() + GRACE_S
    while board.failure is None and time.monotonic() < until:
        time.sleep(0.02)
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    board.fail(Failure("gone", peer, f"rank {peer} cannot be reached any more: {reason}"))
