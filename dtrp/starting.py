"""How the ranks of one start find each other in a store that earlier starts have used.

After a failure torchrun starts all workers again, and the store may be the one of before: what a killed start has left in
it would be read by the next one under the same keys. Neither the number of restarts nor the port tells starts apart,
where several launchers have a worker each. So the first rank draws a name, under which this start has keys of its own; and a
rank takes the name from a roll alone that the first one wrote after it has read this very process's mark.

::

    rank r    here/r = mark              reads roll until it has its own mark      heard/NAME/r
    rank 0    reads here/1 .. here/n     roll = [NAME, marks]                      waits for heard/NAME/1 .. n
              (a mark of a dead process may be among them: it reads again until all have heard)
"""

from __future__ import annotations

import json
import time
import uuid
from typing import Any

_POLL_S = 0.02


def meet(store: Any, rank: int, world_size: int, timeout_s: float) -> str:
    """The name of this start, new, and the same on all of its ranks.

    Args:
        store: that all of them see.
        rank: of this process, as the launcher says.
        world_size: of the start, as the launcher says.
        timeout_s: the longest wait.

    Raises:
        TimeoutError: some did not come.
    """
    own = uuid.uuid4().hex
    until = time.monotonic() + timeout_s
    if rank == 0:
        return _call(store, own, world_size, until)
    store.set(f"dtrp/here/{rank}", own)
    while True:
        if store.check(["dtrp/roll"]):
            roll = json.loads(store.get("dtrp/roll"))
            if roll[rank : rank + 1] == [own]:
                store.set(f"dtrp/heard/{roll[0]}/{rank}", "")
                return str(roll[0])
        if time.monotonic() > until:
            raise TimeoutError("rank 0 has not come")
        time.sleep(_POLL_S)


def _call(store: Any, name: str, world_size: int, until: float) -> str:
    others = range(1, world_size)
    roll: list[str | None] = []
    while not all(store.check([f"dtrp/heard/{name}/{rank}"]) for rank in others):
        marks = [store.get(key).decode() if store.check([key := f"dtrp/here/{rank}"]) else None for rank in others]
        if [name, *marks] != roll:
            roll = [name, *marks]
            store.set("dtrp/roll", json.dumps(roll))
        if time.monotonic() > until:
            missing = [rank for rank in others if not store.check([f"dtrp/heard/{name}/{rank}"])]
            raise TimeoutError(f"rank {', '.join(map(str, missing))} has not come")
        time.sleep(_POLL_S)
    return name
