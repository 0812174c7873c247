"""How the ranks of one start find each other in a store that earlier starts have used, and who is missed meanwhile.

After a failure torchrun starts all workers again, and the store may be the one of before: what a killed start has left in
it would be read by the next one under the same keys. Neither the number of restarts nor the port tells starts apart,
where several launchers have a worker each. So the first rank draws a name, under which this start has keys of its own; and a
rank takes the name from a roll alone that the first one wrote after it has read this very process's mark.

::

    rank r    here/r = mark              reads roll until it has its own mark      heard/NAME/r, waits for the others' too
    rank 0    reads here/1 .. here/n     roll = [NAME, marks]                      waits for heard/NAME/1 .. n
              (a mark of a dead process may be among them: it reads again until all have heard)
"""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Sequence
from typing import Any

ABSENT = "has not come"  # of a rank that is missed
SILENT = "came and is not heard of any more"
_POLL_S = 0.02
_TOLD_S = 0.7  # until all have heard who is missed: longer than they take from one `Presence.beat` to the next
_SILENCE_S = 1.5  # of a rank that is missed


class Start:
    """The ranks of one start, on their way to each other.

    Args:
        store: that all of them see.
        rank: of this process, as the launcher says.
        world_size: of the start, as the launcher says.

    Attributes:
        name: of this start, new, and the same on all of its ranks; empty until this one has heard it.
    """

    def __init__(self, store: Any, rank: int, world_size: int) -> None:
        self._store, self._rank, self._others = store, rank, range(1, world_size)
        self._own = uuid.uuid4().hex
        self.name = "" if rank else self._own

    def meet(self, timeout_s: float) -> str:
        """The name, once all have heard it.

        Args:
            timeout_s: the longest wait.

        Raises:
            TimeoutError: some did not come.
        """
        store, rank = self._store, self._rank
        until = time.monotonic() + timeout_s
        roll: list[str | None] = []
        if rank:
            store.set(f"dtrp/here/{rank}", self._own)
        while True:
            if rank == 0:
                marks = [
                    store.get(key).decode() if store.check([key := f"dtrp/here/{other}"]) else None
                    for other in self._others
                ]
                if [self.name, *marks] != roll:
                    roll = [self.name, *marks]
                    store.set("dtrp/roll", json.dumps(roll))
            elif (called := self._called()) not in ("", self.name):
                self.name = called
                store.set(f"dtrp/heard/{self.name}/{rank}", "")
            missing = self._deaf() if self.name else [0]
            if not missing:
                return self.name
            absent = f"dtrp/absent/{self.name}"
            if rank and store.check([absent]):
                missing = json.loads(store.get(absent))
            elif time.monotonic() < until:
                time.sleep(_POLL_S)
                continue
            elif rank == 0:  # whose store it may be
                store.set(absent, json.dumps(missing))
                time.sleep(_TOLD_S)
            raise TimeoutError(f"rank {', '.join(map(str, missing))} {ABSENT}")

    def missing(self) -> list[int]:
        """Who has not come until now."""
        if self.name:
            return self._deaf()
        first = [] if self._called() else [0]
        return first + [other for other in self._others if not self._store.check([f"dtrp/here/{other}"])]

    def _called(self) -> str:
        """The name that the first rank has called this very process to."""
        roll = json.loads(self._store.get("dtrp/roll")) if self._store.check(["dtrp/roll"]) else []
        return str(roll[0]) if roll[self._rank : self._rank + 1] == [self._own] else ""

    def _deaf(self) -> list[int]:
        """Who has not heard the name."""
        return [other for other in self._others if not self._store.check([f"dtrp/heard/{self.name}/{other}"])]


def first_holds_store() -> bool:
    """Whether the store is in the first rank's process, and goes with it; else it is the launcher's."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"


class Presence:
    """Who is there while the backend makes connections, where a rank waits for a dead one, and nobody can ask it.

    So each says so again and again, over a connection to the store of its own: the other is held meanwhile. Whoever has waited in
    vain looks who says nothing any more, and tells the rest.

    Args:
        store: that the ranks see, and use for nothing else.
        ranks: all of them.
        rank: this one.
    """

    def __init__(self, store: Any, ranks: Sequence[int], rank: int) -> None:
        self._ranks, self._rank = list(ranks), rank
        self._shared, self._lost = store, False
        self._store: Any = None  # its own

    def connect(self) -> None:
        """Begin; may take as long as the store's time-out, not to be interrupted.

        Raises:
            RuntimeError: the store is gone.
        """
        # Not every torch has it, nor every store: nobody is named then.
        if self._store is None and hasattr(self._shared, "clone"):
            self._lost = True
            self._store = self._shared.clone()
            self._lost = False

    def beat(self) -> list[int]:
        """Say that this rank is there; the ranks that are missed, as far as it is known."""
        if self._store is None:
            return []
        try:
            self._store.add(f"beats/{self._rank}", 1)
            return list(json.loads(self._store.get("missing"))) if self._store.check(["missing"]) else []
        except RuntimeError:
            return self._without_store()

    def missing(self, known: Sequence[int] = ()) -> list[int]:
        """The ranks that are missed, ``known`` already or silent for a while; all hear of it."""
        if self._store is None:
            return self._without_store() if self._lost else list(known)
        try:
            before = self._beats()
            until = time.monotonic() + (0 if known else _SILENCE_S)
            while not (told := self.beat()) and time.monotonic() < until:
                time.sleep(0.1)
            if told:
                return told
            silent = [rank for rank, beats in self._beats().items() if rank != self._rank and beats == before[rank]]
            if missing := list(known) or silent:
                self._store.set("missing", json.dumps(missing))
                time.sleep(_TOLD_S if self._rank == 0 else 0)  # whose store it may be
        except RuntimeError:
            return self._without_store()
        return missing

    def _beats(self) -> dict[int, int]:
        return {rank: self._store.add(f"beats/{rank}", 0) for rank in self._ranks}

    def _without_store(self) -> list[int]:
        return [0] if first_holds_store() else []
