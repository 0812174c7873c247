"""The process groups that messages go over, and what carries them.

Each is a set of connections of its own: a message meets only receives of its group. They are made beside
`torch.distributed.new_group`, which numbers groups by how many a rank has seen, and so finds no common name where
some ranks have made groups without the others; here the name says whose the group is and how many of the same
ranks came before.
"""

from __future__ import annotations

import os
import socket
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from ..launch.rendezvous import Heartbeats

NCCL_VARIABLE = "DTRP_NCCL"
_FOREVER = timedelta(days=365)  # a receive that is posted ahead waits as long as the user pleases
_made: Counter[tuple[int, ...]] = Counter()  # Pipelines so far, by their ranks: the same on each of these


class Meeting:
    """Where the ranks of one Pipeline find each other: a part of the default group's store that nobody else uses.

    Args:
        ranks: all of them.
        rank: this one's.
    """

    def __init__(self, ranks: Sequence[int], rank: int) -> None:
        self.ranks, self.rank = list(ranks), rank
        _made[tuple(ranks)] += 1
        name = f"dtrp/{'-'.join(map(str, ranks))}/{_made[tuple(ranks)]}"
        store = dist.distributed_c10d._get_default_store()
        self._store = dist.PrefixStore(name, store)  # type: ignore[attr-defined]
        self.heartbeats = Heartbeats(dist.PrefixStore("presence", self._store), ranks, rank)  # type: ignore[attr-defined]
        self._gloo: Any = None
        self.missing = list(ranks)  # the ranks that are not known to have come
        self.over = False  # whether nobody waits any more

    def gather(self, word: str = "here") -> None:
        """Wait until all have come, or said another ``word``, or it is ``over``.

        By asking again and again: a wait inside the store would keep everybody else from asking who is missing.
        """
        self.heartbeats.connect()
        self._store.set(f"{word}/{self.rank}", "")
        missing = list(self.ranks)
        while not self.over:
            missing = [rank for rank in missing if not self._store.check([f"{word}/{rank}"])]
            if word == "here":
                self.missing = missing
            if not missing:
                return
            time.sleep(0.01)
        raise RuntimeError(f"rank {self.rank} waits no longer for the others")

    def group(self, purpose: str, ranks: Sequence[int], backend: str) -> Any:
        """A new group of some of the ranks, this one among them; waits for the others."""
        store = dist.PrefixStore(f"{purpose}/{ranks[0]}", self._store)  # type: ignore[attr-defined]
        place = list(ranks).index(self.rank)
        if backend == "gloo":
            return dist.ProcessGroupGloo(store, place, len(ranks), self._gloo_options())
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = _FOREVER
        return dist.ProcessGroupNCCL(store, place, len(ranks), options)

    def _gloo_options(self) -> Any:
        """The same for all groups, and for the default group where that is gloo's too.

        A device has a thread that wakes a hundred times a second, also when nothing happens.
        """
        if self._gloo is None:
            make = dist.ProcessGroupGloo.create_device
            interfaces = os.environ.get("GLOO_SOCKET_IFNAME", "").split(",")
            self._gloo = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
            self._gloo._timeout = _FOREVER
            self._gloo._devices = _devices_of_the_default_group() or (
                [make(interface=name) for name in interfaces]
                if interfaces != [""]
                else [dist.ProcessGroupGloo.create_default_device()]
            )
        return self._gloo


def _devices_of_the_default_group() -> list[Any]:
    """Empty where it is not gloo's, or does not show them."""
    with suppress(RuntimeError):
        backend = dist.distributed_c10d._get_default_group()._get_backend(torch.device("cpu"))
        return list(getattr(getattr(backend, "options", None), "_devices", ()))
    return []


def backend_for(places: Sequence[str]) -> str:
    """What carries tensors between the ranks' devices; NCCL where each has a GPU to itself, and it is asked for."""
    apart = len(set(places)) == len(places) and all(place.startswith("cuda") for place in places)
    return "nccl" if apart and os.environ.get(NCCL_VARIABLE) == "1" else "gloo"


def place_of(device: torch.device) -> str:
    """One device of one machine, whatever number it goes by in this process."""
    if device.type == "cuda":
        device_id = getattr(torch.cuda.get_device_properties(device), "uuid", device)
        return f"cuda {socket.gethostname()} {device_id}"
    return str(device)
