"""Messages between ranks: the only file that sends or receives tensors.

::

    replica 0    rank 0  --forward-->   rank 1  --forward-->   rank 2        a message a micro-batch each way,
                         <--backward--          <--backward--                in groups of their own
                 rank 0  <--control-->  rank 1  <--control-->  rank 2  <-+   a chain through all ranks: `infer`,
    replica 1    rank 3  <--control-->  rank 4  <--control-->  rank 5  <-+   state dicts, what must agree
                 every rank  <--watch-->  every rank                         who has failed, or is done
                 rank 0  <--replicas-->  rank 3                              gradients, at U

Nothing blocks the main thread but `Board.wait`: a link has a thread at each end. The receiver's posts its
next receive as soon as the last message has been taken, a slot before the next one comes, since gloo moves
data only into a receive that is posted. Buffers have an agreed capacity; a message that exceeds it is
announced by one that says so, and the receive after that has the room.

The end is a message too: every rank tells all others that it is done, or why it fails (`Watch`), and closes
its links, so that no thread stays in a wait. Of a process that ends without a word the watch hears first,
and directly, since each rank waits for a word from every other.
"""

from __future__ import annotations

import dataclasses
import json
import os
import queue
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.util import Finalize
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .aligned import aligned_room
from .failure import Board, Failure, SigtermHandler, WorkerError
from .messages import HEADER_BYTES, Kind, Message, Note, decode, encode, object_tensor
from .ranks import Ranks, watch_launcher
from .trace import Tracer

_FOREVER = timedelta(days=365)  # a receive that is posted ahead waits as long as the user pleases
_WATCH_BYTES = 16384
_SMALL_BYTES = 64 * 2**10
_BUCKET_BYTES = 25 * 2**20
_GRACE_S = 2.0  # for the watch to say whose end broke a connection, and for threads to finish after a failure
LATENCY_VARIABLE = "DTRP_MESSAGE_LATENCY_S"


class Wire:
    """How bytes get from a stage's device into a message and back.

    With gloo, or two ranks on one GPU, the tensors of an accelerator go through pinned host memory, on a stream of
    their own; NCCL takes them where they are, in messages that always have the full capacity.
    """

    def __init__(self, device: torch.device, backend: str) -> None:
        self.device = device
        self.direct = device.type == "cpu" or backend == "nccl"
        self.full = backend == "nccl"
        self._stream = torch.Stream(device) if device.type != "cpu" else None

    def out(self, kind: Kind, note: Note, tensor: Tensor | None) -> tuple[Tensor, Tensor, Any]:
        """(header, buffer, event after which the buffer is there); called by the main thread."""
        if tensor is not None and tensor.device != self.device and kind is not Kind.OBJECT:
            tensor = tensor.to(self.device)
        header, buffer = encode(kind, note, tensor)
        if self._stream is None or buffer.device.type == "cpu":
            return header, buffer, None
        computed = torch.accelerator.current_stream(self.device).record_event()
        if self.direct:
            return header, buffer, computed
        with self._stream:
            self._stream.wait_event(computed)
            host = aligned_room(buffer.numel(), pinned=True)
            host.copy_(buffer, non_blocking=True)
            buffer.record_stream(self._stream)
            return header, host, self._stream.record_event()

    def room(self, nbytes: int) -> Tensor:
        """Memory for a message to be received into."""
        if self.full:
            return aligned_room(nbytes, self.device)
        return aligned_room(nbytes, pinned=self.device.type != "cpu" and nbytes > HEADER_BYTES)

    def arrived(self, room: Tensor) -> Message:
        """The message in a buffer that has been filled, its tensor on the stage's device; called by a helper thread."""
        header = room[:HEADER_BYTES].cpu()
        if room.device != self.device and Kind(int(header.view(torch.int64)[1])) is Kind.TENSOR:
            assert self._stream is not None
            with self._stream:
                here = aligned_room(room.numel(), self.device)
                here.copy_(room, non_blocking=True)
            self._stream.synchronize()
            room = here
        return decode(header, room)


class _Link:
    """One end of a connection to another rank, with a thread of its own."""

    def __init__(self, name: str, group: Any, peer: int, wire: Wire, board: Board, tracer: Tracer) -> None:
        self.name, self.peer = name, peer
        self._group, self._wire, self._board, self._tracer = group, wire, board, tracer
        self._thread = threading.Thread(target=self._run, name=f"dtrp {name} {peer}", daemon=True)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def _run(self) -> None:
        try:
            if self._wire.device.type != "cpu":
                torch.accelerator.set_device_index(self._wire.device.index or 0)
            self._work()
        except Exception as error:
            _broken(self._board, self.peer, error)

    def _work(self) -> None:
        raise NotImplementedError


@dataclass
class _Job:
    """A message on its way out."""

    kind: Kind
    note: Note
    header: Tensor
    buffer: Tensor
    ready: Any  # an event after which the buffer is there, or None
    due: float  # not to be sent before this time
    works: list[dist.Work] | None = None  # what is left to wait for, once it has been handed to the backend


class Sender(_Link):
    """The sending end of a connection; `send` never waits."""

    def __init__(self, *link: Any, latency_s: float = 0.0) -> None:
        super().__init__(*link)
        self._latency_s = latency_s
        self._jobs: queue.SimpleQueue[_Job] = queue.SimpleQueue()
        self._capacity = HEADER_BYTES
        self._unsent = 0  # jobs that the thread has yet to hand to the backend
        self._counting = threading.Lock()
        self._finished = threading.Lock()
        self._thread.start()

    def send(self, kind: Kind, note: Note, tensor: Tensor | None = None) -> None:
        """Send a message; the tensor may be written when this returns."""
        header, buffer, ready = self._wire.out(kind, note, tensor)
        job = _Job(kind, note, header, buffer, ready, time.monotonic() + self._latency_s if self._latency_s else 0.0)
        with self._counting:
            # A small message is handed over here: waking the thread would cost more than the message.
            at_once = buffer.numel() <= _SMALL_BYTES and not (self._unsent or job.due or ready or self._wire.full)
            self._unsent += 1
        if at_once:
            with suppress(RuntimeError):  # the connection is broken: the thread will say so
                job.works = self._issue(job)
                self._sent()
        self._jobs.put(job)

    def _sent(self) -> None:
        with self._counting:
            self._unsent -= 1

    def finish(self) -> None:
        """Nothing more comes; once is enough."""
        if self._finished.acquire(blocking=False):
            header, buffer = encode(Kind.END, Note(), None)
            with self._counting:
                self._unsent += 1
            self._jobs.put(_Job(Kind.END, Note(), header, buffer, None, 0.0))

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
                self._sent()
            for work in job.works:
                _finish(work, self._wire)
            self._tracer.add(f"send {self.name} {job.note.microbatch}", "send", self.name, began)

    def _issue(self, job: _Job) -> list[dist.Work]:
        """Hand a message to the backend, after the announcement that it may need."""
        works = []
        nbytes = job.buffer.numel()
        if nbytes > self._capacity:
            works.append(self._post(*encode(Kind.GROW, Note(total=nbytes), None)))
            self._capacity = nbytes
        works.append(self._post(job.header, job.buffer))
        if job.kind is Kind.OBJECT:  # rare and large: not a size to keep room for
            self._capacity = HEADER_BYTES
        return works

    def _post(self, header: Tensor, buffer: Tensor) -> dist.Work:
        if self._wire.full:
            room = self._wire.room(self._capacity)
            room[: buffer.numel()].copy_(buffer)
            buffer = room
        buffer[:HEADER_BYTES].copy_(header)
        return _started(dist.isend(buffer, dst=self.peer, group=self._group))


class Receiver(_Link):
    """The receiving end of a connection: at most one message, or one posted receive, ahead of `take`."""

    def __init__(self, *link: Any) -> None:
        super().__init__(*link)
        self._inbox: deque[Message] = deque()
        self._permits = threading.Semaphore(1)
        self._draining = False
        self.ended = False  # the other end has finished
        self._thread.start()

    def peek(self) -> Message | None:
        """The message that `take` would return."""
        return self._inbox[0] if self._inbox else None

    def take(self) -> Message | None:
        """The next message, if it is there; lets the one after it come."""
        if not self._inbox:
            return None
        message = self._inbox.popleft()
        self._permits.release()
        return message

    def drain(self) -> None:
        """Receive and forget what still comes."""
        self._draining = True
        self._permits.release()

    def _work(self) -> None:
        capacity = HEADER_BYTES
        while True:
            self._permits.acquire()
            if self._draining:
                self._permits.release()
                self._inbox.clear()
            began = time.time_ns()
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
        _finish(_started(dist.irecv(room, src=self.peer, group=self._group)), self._wire)
        return self._wire.arrived(room)


class Watch:
    """Who has failed, and who is done: one last word from every rank to every other."""

    def __init__(self, ranks: Ranks, group: Any, board: Board) -> None:
        self.done: dict[int, int] = {}  # ranks that are through, and the mini-batches they stepped
        self._ranks, self._group, self._board = ranks, group, board
        self._others = [rank for rank in ranks.all if rank != ranks.rank]
        self._spoken = threading.Lock()
        self._threads = [threading.Thread(target=self._hear, args=(rank,), daemon=True) for rank in self._others]
        for thread in self._threads:
            thread.start()

    @property
    def alive(self) -> bool:
        return any(thread.is_alive() for thread in self._threads)

    @property
    def missing(self) -> list[int]:
        """The ranks that have not said that they are through."""
        return [rank for rank in self._others if rank not in self.done]

    def say(self, word: dict[str, Any]) -> None:
        """Tell all others, once, without waiting: ``{"done": mini-batches}``, or a failure's fields."""
        if self._spoken.acquire(blocking=False):
            thread = threading.Thread(target=self._tell, args=(word,), daemon=True)
            self._threads.append(thread)
            thread.start()

    def _tell(self, word: dict[str, Any]) -> None:
        if len(word.get("trace", "")) > _WATCH_BYTES // 4:
            word = {**word, "trace": "...\n" + word["trace"][-_WATCH_BYTES // 4 :]}
        if len(word.get("text", "")) > _WATCH_BYTES // 4:
            word = {**word, "text": word["text"][: _WATCH_BYTES // 4] + " ..."}
        packed = json.dumps(word).encode()[:_WATCH_BYTES].ljust(_WATCH_BYTES)
        works = []
        for rank in self._others:
            try:
                message = torch.frombuffer(bytearray(packed), dtype=torch.uint8)
                works.append(_started(dist.isend(message, dst=rank, group=self._group)))
            except RuntimeError:  # it is gone
                continue
        for work in works:
            try:
                work.wait()
            except RuntimeError:
                continue

    def _hear(self, rank: int) -> None:
        room = torch.empty(_WATCH_BYTES, dtype=torch.uint8)
        try:
            _started(dist.irecv(room, src=rank, group=self._group)).wait()
        except RuntimeError:
            self._board.fail(
                Failure(
                    "gone",
                    rank,
                    f"rank {rank} is gone: its process ended without a word (killed, out of memory, or a crash in native "
                    "code; its own log may say more)",
                )
            )
            return
        word = json.loads(bytes(room.tolist()))
        if "done" in word:
            self.done[rank] = word["done"]
            self._board.notify()
        else:
            place = word.pop("place")
            self._board.fail(Failure(**word, place=tuple(place) if place else None))


class Helper:
    """Runs one thing at a time beside the main thread, which waits for it on the board."""

    def __init__(self, board: Board) -> None:
        self._board = board
        self._jobs: queue.SimpleQueue[Callable[[], Any] | None] = queue.SimpleQueue()
        self._results: deque[tuple[Any, BaseException | None]] = deque()
        self._thread = threading.Thread(target=self._work, name="dtrp helper", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def run(self, job: Callable[[], Any], describe: Callable[[], str]) -> Any:
        """What ``job`` returns or raises."""
        self._jobs.put(job)
        result, error = self._board.wait(lambda: self._results.popleft() if self._results else None, describe)
        if error is not None:
            # A peer's end looks like an error of the backend: what the watch says of it comes first.
            until = time.monotonic() + _GRACE_S
            while isinstance(error, RuntimeError) and time.monotonic() < until:
                self._board.check()
                time.sleep(0.02)
            raise error
        return result

    def finish(self) -> None:
        self._jobs.put(None)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                self._results.append((job(), None))
            except Exception as error:
                self._results.append((None, error))
            self._board.notify()


class _GroupPool:
    """Process groups that wait for the next Pipeline of this process.

    torch names a group after its ranks, and would give the next one the name, and the addresses in the store, of
    one that was destroyed. A transport that has ended leaves its groups empty, so they can serve again.
    """

    def __init__(self) -> None:
        self._world: Any = None
        self._free: dict[tuple[tuple[int, ...], str], list[Any]] = {}

    def take(self, wanted: list[tuple[list[int], str]]) -> list[Any]:
        """A group for each (ranks, backend), the same one on all of its ranks."""
        if self._world is not dist.group.WORLD:  # what was made in another life of torch.distributed is void
            self._world = dist.group.WORLD
            self._free.clear()
        return [self._take(ranks, backend) for ranks, backend in wanted]

    def _take(self, ranks: list[int], backend: str) -> Any:
        free = self._free.get((tuple(ranks), backend))
        if free:
            return free.pop(0)
        return dist.new_group(ranks, timeout=_FOREVER, backend=backend, use_local_synchronization=True)

    def put_back(self, groups: list[tuple[list[int], str, Any]]) -> None:
        if self._world is dist.group.WORLD:
            for ranks, backend, group in groups:
                self._free.setdefault((tuple(ranks), backend), []).append(group)


_POOL = _GroupPool()


class Transport:
    """All of a rank's connections.

    Made in two steps, since which backend can carry the tensors is known when the ranks have spoken: the constructor
    connects control and watch, `connect` the rest.

    Args:
        ranks: who hosts what.
        timeout_s: the longest wait.

    Attributes:
        board: where the main thread waits.
        forward_in, forward_out, backward_in, backward_out: links to the neighbours; None at the ends.
        num_updates: mini-batches stepped, for the last word.
    """

    forward_in: Receiver | None
    forward_out: Sender | None
    backward_in: Receiver | None
    backward_out: Sender | None

    def __init__(self, ranks: Ranks, timeout_s: float, tracer: Tracer) -> None:
        self.ranks = ranks
        self.num_updates = 0
        self.board = Board(timeout_s, self._on_failure)
        self._tracer = tracer
        self._links: list[_Link] = []
        self._groups: list[tuple[list[int], str, Any]] = []
        self._replicas: Any = None
        self._watch: Watch | None = None
        self._closed = False
        self._helper = Helper(self.board)
        # Runs at the end of a process that multiprocessing started, too.
        self._at_exit = Finalize(None, self._leave, exitpriority=100)
        self._sigterm = SigtermHandler(self.board, ranks.rank)
        gone = Failure("ended", ranks.rank, f"the launcher of rank {ranks.rank} is gone")
        watch_launcher(lambda: None if self._closed else self.board.fail(gone))

        control, watch = self._take_groups([(ranks.all, "gloo"), (ranks.all, "gloo")])
        self._watch = Watch(ranks, watch, self.board)
        place = ranks.all.index(ranks.rank)
        left = ranks.all[place - 1] if place else None
        right = ranks.all[place + 1] if place + 1 < len(ranks.all) else None
        wire = Wire(torch.device("cpu"), "gloo")
        self._from_left = self._receiver("control", control, left, wire)
        self._to_left = self._sender("control", control, left, wire)
        self._from_right = self._receiver("control", control, right, wire)
        self._to_right = self._sender("control", control, right, wire)

    def connect(self, device: torch.device, backend: str) -> None:
        """Make the connections for training.

        Args:
            device: of this rank's stage.
            backend: that carries its tensors, the same on all ranks: ``gloo`` or ``nccl``.
        """
        ranks = self.ranks
        wanted = [(ranks.all, backend), (ranks.all, backend)]
        if ranks.num_replicas > 1:
            wanted.append((ranks.replicas, backend))
        forward, backward, *replicas = self._take_groups(wanted)
        self._replicas = replicas[0] if replicas else None
        wire = Wire(device, backend)
        latency_s = float(os.environ.get(LATENCY_VARIABLE, "0"))
        self.forward_in = self._receiver("forward", forward, ranks.before, wire)
        self.forward_out = self._sender("forward", forward, ranks.after, wire, latency_s)
        self.backward_in = self._receiver("backward", backward, ranks.after, wire)
        self.backward_out = self._sender("backward", backward, ranks.before, wire, latency_s)

    def _take_groups(self, wanted: list[tuple[list[int], str]]) -> list[Any]:
        """Process groups; each is a set of connections of its own: a message meets only receives of its group."""
        groups: list[Any] = self._helper.run(
            lambda: _POOL.take(wanted),
            lambda: (
                f"rank {self.ranks.rank} has waited {{}} for the other ranks to make their Pipeline; start all "
                f"{len(self.ranks.all)} of them"
            ),
        )
        self._groups += [(*key, group) for key, group in zip(wanted, groups, strict=True)]
        return groups

    def _sender(self, name: str, group: Any, peer: int | None, wire: Wire, latency_s: float = 0.0) -> Sender | None:
        if peer is None:
            return None
        link = Sender(name, group, peer, wire, self.board, self._tracer, latency_s=latency_s)
        self._links.append(link)
        return link

    def _receiver(self, name: str, group: Any, peer: int | None, wire: Wire) -> Receiver | None:
        if peer is None:
            return None
        link = Receiver(name, group, peer, wire, self.board, self._tracer)
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

        return self.board.wait(take, lambda: self._describe(link, what()))

    def average(self, gradients: list[Tensor | None], like: Sequence[Tensor], samples: int, loss: float) -> float:
        """Average gradients over the replicas of this stage, weighted by samples, in buckets, in place.

        Args:
            gradients: of this replica's shard of the mini-batch; None where there is none.
            like: the parameters they belong to.
            samples: in the shard.
            loss: the shard's mean loss.

        Returns:
            The mean loss of the whole mini-batch.
        """
        group = self._replicas
        totals = torch.tensor([samples, samples * loss, *(g is not None for g in gradients)], dtype=torch.float64)

        def all_reduce() -> float:
            dist.all_reduce(totals, group=group)
            share = samples / float(totals[0])
            present = [i for i, count in enumerate(totals[2:].tolist()) if count]
            for i in present:
                gradient = gradients[i]
                gradients[i] = gradient * share if gradient is not None else torch.zeros_like(like[i])
            for bucket in _buckets([g for g in (gradients[i] for i in present) if g is not None]):
                flat = torch.cat([g.reshape(-1) for g in bucket])
                dist.all_reduce(flat, group=group)
                for gradient, part in zip(bucket, torch.split(flat, [g.numel() for g in bucket]), strict=True):
                    gradient.copy_(part.view(gradient.shape))
            return float(totals[1] / totals[0])

        others = ", ".join(str(rank) for rank in self.ranks.replicas if rank != self.ranks.rank)
        mean: float = self._helper.run(
            all_reduce,
            lambda: (
                f"rank {self.ranks.rank} has waited {{}} for the gradients of stage {self.ranks.stage} of its replicas "
                f"(rank {others}); every rank must call step() the same number of times"
            ),
        )
        return mean

    # -- what all ranks do together -----------------------------------------------------------------------

    def exchange(self, method: str, value: Any) -> list[Any]:
        """Every rank's value, by place in the chain, on every rank."""
        values = self._pass_on(self._from_left, self._to_right, method, lambda sofar: [*(sofar or []), value])
        everything: list[Any] = self._pass_on(
            self._from_right, self._to_left, method, lambda whole: values if whole is None else whole
        )
        return everything

    def collect(self, method: str, value: Any) -> list[Any] | None:
        """Every rank's value, on the first rank of the chain; None elsewhere."""
        values = self._pass_on(self._from_right, self._to_left, method, lambda sofar: [value, *(sofar or [])])
        return values if self._to_left is None else None

    def spread(self, method: str, value: Any) -> Any:
        """The first rank's value, on every rank."""
        return self._pass_on(
            self._from_left, self._to_right, method, lambda given: (value,) if given is None else given
        )[0]

    def scatter(self, method: str, values: Sequence[Any] | None) -> Any:
        """The place's own of the first rank's ``values``."""
        mine: list[Any] = []

        def split(rest: list[Any] | None) -> list[Any]:
            rest = list(values or ()) if rest is None else rest
            mine.append(rest[0])
            return rest[1:]

        self._pass_on(self._from_left, self._to_right, method, split)
        return mine[0]

    def spread_back(self, method: str, value: Any) -> Any:
        """The last stage's value, on every rank of its replica."""
        last, first = self.ranks.after is None, self.ranks.before is None
        into = None if last else self._from_right
        return self._pass_on(into, None if first else self._to_left, method, lambda v: (value,) if v is None else v)[0]

    def hand_over(self, method: str, x: Tensor | None, work: Callable[[Tensor], Tensor]) -> Tensor | None:
        """``work`` of each stage in turn on what the one before made of ``x``; the result on the last, None elsewhere."""
        if self.ranks.before is not None:
            assert self._from_left is not None
            message = self._next_control(self._from_left, method)
            x = message.tensor
        assert x is not None
        out = work(x)
        if self.ranks.after is None:
            return out
        assert self._to_right is not None
        self._to_right.send(Kind.TENSOR, Note(), out.cpu())
        return None

    def _pass_on(self, into: Receiver | None, out: Sender | None, method: str, work: Callable[[Any], Any]) -> Any:
        """Take the neighbour's value (None at the chain's end), and send on what ``work`` makes of it."""
        given = None
        if into is not None:
            name, given = self._next_control(into, method).object()
            if name != method:
                raise self._out_of_step(into.peer, name, method)
        result = work(given)
        if out is not None:
            out.send(Kind.OBJECT, Note(), object_tensor((method, result)))
        return result

    def _next_control(self, link: Receiver, method: str) -> Message:
        message = self.receive(link, lambda: f"its part in {method}()")
        if (message.kind is Kind.TENSOR) != (method == "infer"):
            other = "infer" if message.kind is Kind.TENSOR else message.object()[0]
            raise self._out_of_step(link.peer, other, method)
        return message

    def _out_of_step(self, peer: int, theirs: str, ours: str) -> WorkerError:
        return WorkerError(
            f"rank {peer} has called {theirs}() where this rank has called {ours}(); every rank must call the same methods "
            "in the same order"
        )

    def _describe(self, link: Receiver, what: str) -> str:
        text = f"rank {self.ranks.rank}, {self.board.doing}, has waited {{}} for rank {link.peer}: {what}"
        for control in (self._from_left, self._from_right):
            message = control.peek() if control is not None else None
            if message is not None:
                assert control is not None
                name = "infer" if message.kind is Kind.TENSOR else message.object()[0]
                text += f"; rank {control.peer} is in {name}() meanwhile"
        return text + ". Every rank must call step() the same number of times, and all else in the same order"

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
        self.board.raised = True
        self.board.fail(Failure.of(self.ranks.rank, error))

    def close(self) -> None:
        """Tell all ranks that this one is through, and wait until they are; after a failure, only let threads end.

        Raises:
            StageError, WorkerError: another rank has failed meanwhile.
        """
        if self._closed:
            return
        self._closed = True
        board, watch = self.board, self._watch
        failed = board.failure is not None
        if not failed and watch is not None:
            watch.say({"done": self.num_updates})
            self._end_links()
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
                self._join()
                raise
        self._join()
        if not self._threads_left:
            _POOL.put_back(self._groups)
            self._groups.clear()
            self._at_exit.cancel()
        if not failed:
            self._sigterm.restore()
        elif not board.raised:
            board.check()

    def _join(self) -> None:
        until = time.monotonic() + _GRACE_S
        while self._threads_left and time.monotonic() < until:
            time.sleep(0.002)

    @property
    def _threads_left(self) -> bool:
        watching = self._watch is not None and self._watch.alive
        return watching or self._helper.alive or any(link.alive for link in self._links)

    def _leave(self) -> None:
        """At the end of the process: what a script has not closed, and threads that nothing can stop."""
        error = sys.exc_info()[1] or getattr(sys, "last_exc", None) or getattr(sys, "last_value", None)
        if error is not None and not self._closed:
            self.fail(error)
        unheard = False
        try:
            self.close()
        except BaseException:
            unheard = True
            traceback.print_exc()
        if unheard or self._threads_left:
            # A thread that comes back from the backend while the interpreter is taken down would abort it, and a run
            # that lost a rank must not look like one that did not.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(1)

    def _on_failure(self, failure: Failure) -> None:
        if self._watch is not None:
            self._watch.say(dataclasses.asdict(failure))
        self._end_links()

    def _end_links(self) -> None:
        self._helper.finish()
        for link in self._links:
            if isinstance(link, Sender):
                link.finish()
            elif isinstance(link, Receiver):
                link.drain()


def _started(work: dist.Work | None) -> dist.Work:
    assert work is not None, "this rank is not in the group"
    return work


def _finish(work: dist.Work, wire: Wire) -> None:
    """Wait for a send or receive; NCCL's wait only holds up the stream."""
    work.wait()
    if wire.full:
        torch.accelerator.current_stream(wire.device).synchronize()


def _broken(board: Board, peer: int, error: Exception) -> None:
    """A connection broke: the watch knows whose end broke it, or nobody does."""
    until = time.monotonic() + _GRACE_S
    while board.failure is None and time.monotonic() < until:
        time.sleep(0.02)
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    board.fail(Failure("gone", peer, f"rank {peer} cannot be reached any more: {reason}"))


def _buckets(gradients: Sequence[Tensor]) -> list[list[Tensor]]:
    """Groups of one dtype and of about `_BUCKET_BYTES`, in order."""
    buckets: list[list[Tensor]] = []
    size = 0
    for gradient in gradients:
        if not buckets or gradient.dtype != buckets[-1][0].dtype or size + gradient.nbytes > _BUCKET_BYTES:
            buckets.append([])
            size = 0
        buckets[-1].append(gradient)
        size += gradient.nbytes
    return buckets
