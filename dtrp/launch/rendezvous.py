"""How the ranks of one attempt find each other in a store that earlier attempts have used, and which ranks are missing.

After a failure torchrun starts all workers again, and the store may be the same: what a killed attempt has left in it
would be read by the next one under the same keys. Neither the number of restarts nor the port tells attempts apart if
several launchers have a worker each. So rank 0 draws a name for the attempt, and all further keys begin with it.
Another rank takes a name only from a list that rank 0 has written after it read the token that this very process has
drawn.

::

    rank r    writes here/r = token      reads roll until its token is there       writes heard/NAME/r, waits for all
    rank 0    reads here/1 .. here/n     writes roll = [NAME, tokens]              waits for heard/NAME/1 .. n
              (a token of a dead process may be among them: it reads again until all have heard)
"""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Sequence
from typing import Any

ABSENT = "has not come"  # of a missing rank, for messages
SILENT = "came and is not heard of any more"
_POLL_S = 0.02
_TOLD_S = 0.7  # until all have read which ranks are missing: longer than from one `Heartbeats.beat` to the next
_SILENCE_S = 1.5  # without a heartbeat, after which a rank is missing


class Rendezvous:
    """Meets the other ranks of one attempt.

    Args:
        store: the store that all of them see.
        rank: of this process, from the launcher.
        world_size: the number of ranks, from the launcher.

    Attributes:
        name: of the attempt, new, and the same on all of its ranks; empty until this rank has read it.
    """

    def __init__(self, store: Any, rank: int, world_size: int) -> None:
        self._store, self._rank, self._others = store, rank, range(1, world_size)
        self._token = uuid.uuid4().hex
        self.name = "" if rank else self._token

    def meet(self, timeout_s: float) -> str:
        """Wait until all ranks have read the attempt's name, and return it.

        Args:
            timeout_s: the longest wait.

        Raises:
            TimeoutError: some ranks did not come; the message names them.
        """
        store = self._store
        until = time.monotonic() + timeout_s
        if self._rank:
            store.set(f"dtrp/here/{self._rank}", self._token)
        while True:
            if self._rank == 0:
                self._write_roll()
            else:
                self._read_name()
            missing = self._not_heard() if self.name else [0]
            if not missing:
                return self.name
            absent = f"dtrp/absent/{self.name}"
            if self._rank and store.check([absent]):
                missing = json.loads(store.get(absent))
            elif time.monotonic() < until:
                time.sleep(_POLL_S)
                continue
            elif self._rank == 0:  # the store may be in this process, and end with it
                store.set(absent, json.dumps(missing))
                time.sleep(_TOLD_S)
            raise TimeoutError(f"rank {', '.join(map(str, missing))} {ABSENT}")

    def missing(self) -> list[int]:
        """The ranks that have not come until now."""
        if self.name:
            return self._not_heard()
        first = [] if self._name_for_this_process() else [0]
        return first + [other for other in self._others if not self._store.check([f"dtrp/here/{other}"])]

    def _write_roll(self) -> None:
        """On rank 0: the name, and the tokens that it has been written for."""
        keys = [f"dtrp/here/{other}" for other in self._others]
        tokens = [self._store.get(key).decode() if self._store.check([key]) else None for key in keys]
        self._store.set("dtrp/roll", json.dumps([self.name, *tokens]))

    def _read_name(self) -> None:
        """On another rank: the name, and the note that it has been read."""
        name = self._name_for_this_process()
        if name not in ("", self.name):
            self.name = name
            self._store.set(f"dtrp/heard/{name}/{self._rank}", "")

    def _name_for_this_process(self) -> str:
        """The name that rank 0 has written for the token of this process; empty if it has not."""
        roll = json.loads(self._store.get("dtrp/roll")) if self._store.check(["dtrp/roll"]) else []
        return str(roll[0]) if roll[self._rank : self._rank + 1] == [self._token] else ""

    def _not_heard(self) -> list[int]:
        """The ranks that have not read the name."""
        return [other for other in self._others if not self._store.check([f"dtrp/heard/{self.name}/{other}"])]


def first_rank_holds_store() -> bool:
    """Whether the store is in rank 0's process, and ends with it; otherwise it is the launcher's."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"


class Heartbeats:
    """Tells which ranks are alive while the backend makes connections, where a rank may wait for a dead one.

    Each rank raises a counter in the store again and again, over a connection that nothing else uses: the other one is
    held meanwhile. A rank that has waited in vain looks which counters have stopped, and writes those ranks for all to
    read.

    Args:
        store: a store that all ranks see and use for nothing else.
        ranks: all ranks.
        rank: of this process.
    """

    def __init__(self, store: Any, ranks: Sequence[int], rank: int) -> None:
        self._ranks, self._rank = list(ranks), rank
        self._shared, self._lost = store, False
        self._store: Any = None  # the connection of its own

    def connect(self) -> None:
        """Connect to the store; takes up to the store's time-out, and cannot be interrupted.

        Raises:
            RuntimeError: the store is gone.
        """
        # Not every version of torch has `clone`, nor every store: no rank is found missing then.
        if self._store is None and hasattr(self._shared, "clone"):
            self._lost = True
            self._store = self._shared.clone()
            self._lost = False

    def beat(self) -> list[int]:
        """Say that this rank is alive; returns the ranks that are known to be missing."""
        if self._store is None:
            return []
        try:
            self._store.add(f"beats/{self._rank}", 1)
            return list(json.loads(self._store.get("missing"))) if self._store.check(["missing"]) else []
        except RuntimeError:
            return self._missing_with_store()

    def missing(self, known: Sequence[int] = ()) -> list[int]:
        """The missing ranks: those ``known`` to be, else those without a heartbeat for a while; all ranks are told."""
        if self._store is None:
            return self._missing_with_store() if self._lost else list(known)
        try:
            before = self._counts()
            until = time.monotonic() + (0 if known else _SILENCE_S)
            while not (told := self.beat()) and time.monotonic() < until:
                time.sleep(0.1)
            if told:
                return told
            silent = [rank for rank, beats in self._counts().items() if rank != self._rank and beats == before[rank]]
            if missing := list(known) or silent:
                self._store.set("missing", json.dumps(missing))
                time.sleep(_TOLD_S if self._rank == 0 else 0)  # the store may be in this process, and end with it
        except RuntimeError:
            return self._missing_with_store()
        return missing

    def _counts(self) -> dict[int, int]:
        return {rank: self._store.add(f"beats/{rank}", 0) for rank in self._ranks}

    def _missing_with_store(self) -> list[int]:
        return [0] if first_rank_holds_store() else []
