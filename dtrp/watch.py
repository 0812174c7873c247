"""Who has failed, and who is done."""

from __future__ import annotations

import json
import queue
import threading
from collections.abc import Callable
from typing import Any

import torch

from .failure import Board, Failure
from .ranks import Ranks

_WORD_BYTES = 16384


class Watch:
    """One last word from every rank to every other: that it is done, or why it fails.

    Args:
        ranks: who is who.
        group: of all ranks.
        board: hears of failures.
        ending: called by a thread of its own when this rank has its last word to say.
    """

    def __init__(self, ranks: Ranks, group: Any, board: Board, ending: Callable[[], None]) -> None:
        self.done: dict[int, int] = {}  # ranks that are through, and the mini-batches they stepped
        self._group, self._board, self._ending = group, board, ending
        self._others = {rank: place for place, rank in enumerate(ranks.all) if rank != ranks.rank}
        # All threads begin here: at the end of the process, where the word may be due, none can begin any more.
        self._word: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._threads = [threading.Thread(target=self._tell, name="dtrp tell", daemon=True)]
        self._threads += [threading.Thread(target=self._hear, args=(rank,), daemon=True) for rank in self._others]
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
        """Tell all others, without waiting: ``{"done": mini-batches}``, or a failure's fields. The first word counts."""
        self._word.put(word)

    def _tell(self) -> None:
        packed = _packed(self._word.get())
        self._ending()
        works = []
        for place in self._others.values():
            try:
                works.append(self._group.send([torch.frombuffer(bytearray(packed), dtype=torch.uint8)], place, 0))
            except RuntimeError:  # it is gone
                continue
        for work in works:
            try:
                work.wait()
            except RuntimeError:
                continue

    def _hear(self, rank: int) -> None:
        room = torch.empty(_WORD_BYTES, dtype=torch.uint8, device="cpu")
        try:
            self._group.recv([room], self._others[rank], 0).wait()
        except RuntimeError:
            text = (
                f"rank {rank} is gone: its process ended without a word (killed, out of memory, or a crash in native code; "
                "its own log may say more)"
            )
            self._board.fail(Failure("gone", rank, text))
            return
        word = json.loads(bytes(room.tolist()))
        if "done" in word:
            self.done[rank] = word["done"]
            self._board.notify()
        else:
            place = word.pop("place")
            self._board.fail(Failure(**word, place=tuple(place) if place else None))


def _packed(word: dict[str, Any]) -> bytes:
    """The word as JSON of `_WORD_BYTES`; the traceback's beginning and the text's end give way."""
    most = _WORD_BYTES // 2
    while len(packed := json.dumps(word).encode()) > _WORD_BYTES:
        word = {**word, "trace": "...\n" + word["trace"][-most:], "text": word["text"][:most] + " ..."}
        most //= 2
    return packed.ljust(_WORD_BYTES)
