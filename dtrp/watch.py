"""Who has failed, and who is done."""

from __future__ import annotations

import json
import threading
from typing import Any

import torch
import torch.distributed as dist

from .failure import Board, Failure
from .links import started
from .ranks import Ranks

_WATCH_BYTES = 16384


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
                works.append(started(dist.isend(message, dst=rank, group=self._group)))
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
            started(dist.irecv(room, src=rank, group=self._group)).wait()
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
