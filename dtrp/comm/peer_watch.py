"""Who has failed, who is done, and who waits for whom."""

from __future__ import annotations

import json
import queue
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import torch

from ..launch.ranks import Ranks
from .failure import Board, Failure

_WORD_BYTES = 16384
_ANSWER_S = 1.0  # a process that lives answers in milliseconds, whatever its main thread does
_ASKING_S = 2.0  # for the answers of all together


class Watch:
    """A last word from every rank to every other: that it is done, or why it fails; before it, what it does, if it is asked.

    Args:
        ranks: who is who.
        group: of all ranks.
        board: hears of failures.
        ending: called by a thread of its own when this rank has its last word to say.
    """

    def __init__(self, ranks: Ranks, group: Any, board: Board, ending: Callable[[], None]) -> None:
        self.done: dict[int, int] = {}  # ranks that are through, and the mini-batches they stepped
        self._answers: dict[int, dict[str, Any]] = {}
        self._group, self._board, self._ending = group, board, ending
        self._others = {rank: place for place, rank in enumerate(ranks.all) if rank != ranks.rank}
        # All threads begin here: at the end of the process, where the word may be due, none can begin any more.
        self._words: queue.SimpleQueue[tuple[int | None, dict[str, Any]]] = queue.SimpleQueue()
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
        self._words.put((None, word))

    def explain(self, awaited: Sequence[int]) -> str:
        """What keeps the ``awaited`` ranks, and those that they wait for in turn: an addition to a message."""
        until = time.monotonic() + _ASKING_S
        texts: dict[int, str] = {}
        waiting = list(awaited)
        for rank in waiting:  # which grows meanwhile
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

    def _ask(self, rank: int, until: float) -> dict[str, Any] | None:
        """What a rank does; None: it does not answer."""
        self._answers.pop(rank, None)
        self._words.put((rank, {"asks": True}))
        while not (rank in self._answers or rank in self.done or self._board.failure) and time.monotonic() < until:
            time.sleep(0.002)
        return self._answers.get(rank)

    def _tell(self) -> None:
        works: list[Any] = []
        last = False
        while not last:
            to, word = self._words.get()
            if last := to is None:
                self._ending()
            packed = _packed(word)
            for place in self._others.values() if to is None else [self._others[to]]:
                with suppress(RuntimeError):  # it is gone
                    works.append(self._group.send([torch.frombuffer(bytearray(packed), dtype=torch.uint8)], place, 0))
        for work in works:
            try:
                work.wait()
            except RuntimeError:
                continue

    def _hear(self, rank: int) -> None:
        room = torch.empty(_WORD_BYTES, dtype=torch.uint8, device="cpu")
        word: dict[str, Any] = {}
        while not word:
            try:
                self._group.recv([room], self._others[rank], 0).wait()
            except RuntimeError:
                text = (
                    f"rank {rank} is gone: its process ended without a word (killed, out of memory, or a crash in native "
                    "code; its own log may say more)"
                )
                self._board.fail(Failure("gone", rank, text))
                return
            word = json.loads(bytes(room.tolist()))
            if "asks" in word:
                self._words.put((rank, {"doing": self._board.doing, "awaited": list(self._board.awaited)}))
                word = {}
            elif "doing" in word:
                self._answers[rank], word = word, {}
        if "done" in word:
            self.done[rank] = word["done"]
            self._board.notify()
        else:
            place = word.pop("place")
            self._board.fail(Failure(**word, place=tuple(place) if place else None))


def _packed(word: dict[str, Any]) -> bytes:
    """The word as JSON of `_WORD_BYTES`; what is too long for it is cut, and says so: a traceback at its beginning."""
    most, packed = _WORD_BYTES, json.dumps(word).encode()
    while len(packed) > _WORD_BYTES:
        most //= 2
        packed = json.dumps({name: _cut(name, value, most) for name, value in word.items()}).encode()
    return packed.ljust(_WORD_BYTES)


def _cut(name: str, value: Any, most: int) -> Any:
    if isinstance(value, list):
        return value[:most]
    if not isinstance(value, str) or len(value) <= most:
        return value
    note = f"... ({len(value):,} characters, cut)"
    return f"{note}\n{value[len(value) - most :]}" if name == "trace" else f"{value[:most]} {note}"
