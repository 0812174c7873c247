"""Watches the other ranks: which have failed, which are done, and which wait for which."""

from __future__ import annotations

import json
import queue
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

import torch
import torch.distributed as dist

from ..launch.ranks import Ranks
from ..typing import Json
from .failure import Failure, Monitor

_MESSAGE_BYTES = 16384
_ANSWER_S = 1.0  # a living process answers in milliseconds, whatever its main thread does
_EXPLAIN_S = 2.0  # for the answers of all ranks together


class PeerWatch:
    """Tells every other rank that this one is done or has failed, and hears the same of the others.

    Meanwhile a rank that waits for another in vain may ask what that rank is doing.

    Args:
        ranks: which rank hosts which stage.
        group: the process group of all ranks.
        monitor: learns of failures.
        on_end: called by a helper thread when this rank announces its end.

    Attributes:
        threads: one that sends, and one that receives for each other rank.
        done: the mini-batches that other ranks had stepped when they closed their pipeline, by rank.
    """

    def __init__(self, ranks: Ranks, group: dist.ProcessGroup, monitor: Monitor, on_end: Callable[[], None]) -> None:
        self.done: dict[int, int] = {}
        self._answers: dict[int, Json] = {}
        self._group, self._monitor, self._on_end = group, monitor, on_end
        self._others = {rank: i for i, rank in enumerate(ranks.all) if rank != ranks.rank}  # their ranks in the group
        # All threads begin now: at the end of the process, where there may be something to tell, none can begin.
        self._outbox: queue.SimpleQueue[tuple[int | None, Json]] = queue.SimpleQueue()  # None: to all others, the last
        self.threads = [threading.Thread(target=self._tell, name="dtrp tell", daemon=True)]
        self.threads += [threading.Thread(target=self._hear, args=(rank,), daemon=True) for rank in self._others]
        for thread in self.threads:
            thread.start()

    @property
    def not_done(self) -> list[int]:
        """The ranks that have not closed their pipeline."""
        return [rank for rank in self._others if rank not in self.done]

    def announce(self, message: Json) -> None:
        """Tell all others, without waiting: ``{"done": mini-batches}``, or the fields of a `Failure`; only once."""
        self._outbox.put((None, message))

    def explain(self, awaited: Sequence[int]) -> str:
        """What keeps the ``awaited`` ranks, and those that they wait for in turn; an addition to an error message."""
        until = time.monotonic() + _EXPLAIN_S
        texts: dict[int, str] = {}
        waiting = list(awaited)
        for rank in waiting:  # the list grows in the loop
            if rank not in texts and rank in self._others:
                answer = self._ask(rank, min(until, time.monotonic() + _ANSWER_S))
                if rank in self.done:
                    texts[rank] = f"rank {rank} has closed its pipeline"
                elif answer is None:
                    texts[rank] = f"rank {rank} does not answer"
                else:
                    others = ", ".join(map(str, answer["awaited"]))
                    texts[rank] = (
                        f"rank {rank}, {answer['doing']}, waits for {f'rank {others}' if others else 'nobody'}"
                    )
                    waiting += answer["awaited"]
        return f" ({'; '.join(texts.values())})" if texts else ""

    def _ask(self, rank: int, until: float) -> Json:
        """What a rank is doing and waits for; None: it does not answer."""
        self._answers.pop(rank, None)
        self._outbox.put((rank, {"asks": True}))
        while not (rank in self._answers or rank in self.done or self._monitor.failure) and time.monotonic() < until:
            time.sleep(0.002)
        return self._answers.get(rank)

    def _tell(self) -> None:
        """Send what is in the outbox, up to the announcement of this rank's end."""
        works: list[dist.Work] = []
        is_last = False
        while not is_last:
            rank, message = self._outbox.get()
            if is_last := rank is None:
                self._on_end()
            packed = torch.frombuffer(bytearray(_packed(message)), dtype=torch.uint8)
            for place in self._others.values() if rank is None else [self._others[rank]]:
                with suppress(RuntimeError):  # that rank is gone
                    works.append(self._group.send([packed], place, 0))
        for work in works:
            with suppress(RuntimeError):
                work.wait()

    def _hear(self, rank: int) -> None:
        """Receive what a rank sends, up to its end."""
        room = torch.empty(_MESSAGE_BYTES, dtype=torch.uint8, device="cpu")
        while True:
            try:
                self._group.recv([room], self._others[rank], 0).wait()
            except RuntimeError:
                text = (
                    f"rank {rank} is gone: its process ended without a word (killed, out of memory, or a crash in native "
                    "code; its own log may say more)"
                )
                return self._monitor.fail(Failure("gone", rank, text))
            message = json.loads(bytes(room.tolist()))
            if "asks" in message:
                self._outbox.put((rank, {"doing": self._monitor.doing, "awaited": list(self._monitor.awaited)}))
            elif "doing" in message:
                self._answers[rank] = message
            elif "done" in message:
                self.done[rank] = message["done"]
                return self._monitor.notify()
            else:
                place = message.pop("place")
                return self._monitor.fail(Failure(**message, place=tuple(place) if place else None))


def _packed(message: Json) -> bytes:
    """A message as JSON of `_MESSAGE_BYTES`. Text that is too long is cut at its end, a traceback at its beginning."""
    most, packed = _MESSAGE_BYTES, json.dumps(message).encode()
    while len(packed) > _MESSAGE_BYTES:
        most //= 2
        packed = json.dumps({name: _cut(name, value, most) for name, value in message.items()}).encode()
    return packed.ljust(_MESSAGE_BYTES)


def _cut(name: str, value: Json, most: int) -> Json:
    if isinstance(value, list):
        return value[:most]
    if not isinstance(value, str) or len(value) <= most:
        return value
    note = f"... ({len(value):,} characters, cut)"
    return f"{note}\n{value[len(value) - most :]}" if name == "trace" else f"{value[:most]} {note}"
