"""The process groups that messages go over."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch.distributed as dist

_FOREVER = timedelta(days=365)  # a receive that is posted ahead waits as long as the user pleases


class GroupPool:
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


POOL = GroupPool()
