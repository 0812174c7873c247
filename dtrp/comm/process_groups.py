"""The process groups of one pipeline, and the choice of their backend.

Each group is a set of connections that nothing else uses: a message meets only receives of its group. The groups are
made beside `torch.distributed.new_group`, which numbers groups by how many a rank has seen, and so finds no common name
where some ranks have made groups without the others. Here the name says whose the group is and how many pipelines the
same ranks made before.
"""

from __future__ import annotations

import os
import socket
import time
from collections import Counter
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from ..errors import StageError, WorkerError
from ..launch.ranks import Ranks
from ..launch.rendezvous import ABSENT, SILENT, Heartbeats
from ..tensors.torch_private import default_gloo_devices, default_store, gloo_options, nccl_options
from .failure import HelperThread

NCCL_VARIABLE = "DTRP_NCCL"
_FOREVER = timedelta(days=365)  # a receive that is posted ahead waits as long as the user pleases
_pipelines: Counter[tuple[int, ...]] = Counter()  # how many pipelines these ranks have made; the same on all of them


class GroupFactory:
    """Makes the process groups of one pipeline, in a part of the default group's store that nothing else uses.

    Args:
        ranks: which rank hosts which stage.
        helper: waits for the other ranks meanwhile.

    Attributes:
        is_watched: whether a `PeerWatch` reports failures; else other ranks report which ranks are missing.
        cancelled: set it, and waiting in the helper ends.
    """

    def __init__(self, ranks: Ranks, helper: HelperThread) -> None:
        self._ranks, self._rank, self._helper = ranks.all, ranks.rank, helper
        key = tuple(self._ranks)
        _pipelines[key] += 1
        name = f"dtrp/{'-'.join(map(str, key))}/{_pipelines[key]}"
        self._store = dist.PrefixStore(name, default_store())  # type: ignore[attr-defined]
        heartbeats = dist.PrefixStore("presence", self._store)  # type: ignore[attr-defined]
        self._heartbeats = Heartbeats(heartbeats, key, self._rank)
        self._gloo_options: Any = None
        self._not_come = self._ranks  # the ranks that are not known to have come
        self.is_watched = self.cancelled = False

    def make(self, *wanted: tuple[str, list[int], str]) -> list[Any]:
        """Make groups, (purpose, ranks, backend) each, together with all ranks.

        Raises:
            WaitTimeoutError: after the monitor's time-out.
            StageError, WorkerError: the run has failed, or a rank is missing.
        """

        def make() -> list[Any]:
            self._meet()
            groups = [self.group(*spec) for spec in wanted]
            self._meet(wanted[-1][0])  # a rank that goes on sends no more heartbeats, and must not be missed for that
            return groups

        try:
            return self._helper.call(make, lambda: self._waited_for(self._missing()), self._beat)
        except (StageError, WorkerError):
            raise
        except RuntimeError as error:  # of the store or the backend, which names no rank
            if not (missing := self._missing()):
                raise
            text = f"{self._waited_for(missing).format('in vain')} ({type(error).__name__}: {error})"
            raise WorkerError(text) from error

    def missing_at_sigterm(self) -> str:
        """What this rank has to say when it is told to end while only heartbeats tell which ranks are missing."""
        missing = [] if self.is_watched else self._missing()
        return f"{self._waited_for(missing).format('in vain')} (it was told to end, by SIGTERM)" if missing else ""

    def _missing(self) -> list[int]:
        return self._heartbeats.missing(self._not_come)

    def _beat(self) -> None:
        missing = self._heartbeats.beat()
        if missing and not self.is_watched:  # the watch would say more
            raise WorkerError(self._waited_for(missing).format("in vain"))

    def _waited_for(self, missing: list[int]) -> str:
        """A message with ``{}`` where the seconds belong."""
        how = ABSENT if set(missing) <= set(self._not_come) else SILENT
        named = f"rank {', '.join(map(str, missing))}, which {how}"
        return (
            f"rank {self._rank} has waited {{}} for {named if missing else 'the other ranks, none of which is missed'}, to "
            f"make a Pipeline together; start all {len(self._ranks)} of them, and see that none has failed"
        )

    def _meet(self, point: str = "here") -> None:
        """Wait, in the helper, until all ranks have come to this point.

        By polling: a wait inside the store would keep other threads from asking which ranks are missing.
        """
        self._heartbeats.connect()
        self._store.set(f"{point}/{self._rank}", "")
        missing = self._ranks
        while not self.cancelled:
            missing = [rank for rank in missing if not self._store.check([f"{point}/{rank}"])]
            if point == "here":
                self._not_come = missing
            if not missing:
                return
            time.sleep(0.01)
        raise RuntimeError(f"rank {self._rank} waits no longer for the others")

    def group(self, purpose: str, ranks: Sequence[int], backend: str) -> Any:
        """A new group of some of the ranks, this one among them; waits for the others."""
        store = dist.PrefixStore(f"{purpose}/{ranks[0]}", self._store)  # type: ignore[attr-defined]
        place = list(ranks).index(self._rank)
        if backend == "nccl":
            return dist.ProcessGroupNCCL(store, place, len(ranks), nccl_options(_FOREVER))
        if self._gloo_options is None:
            # One device for all groups, that of the default group if it is gloo's: a device has a thread that wakes a
            # hundred times a second, even when nothing happens.
            self._gloo_options = gloo_options(_FOREVER, default_gloo_devices() or _new_gloo_devices())
        return dist.ProcessGroupGloo(store, place, len(ranks), self._gloo_options)


def _new_gloo_devices() -> list[Any]:
    names = os.environ.get("GLOO_SOCKET_IFNAME")
    if not names:
        return [dist.ProcessGroupGloo.create_default_device()]
    return [dist.ProcessGroupGloo.create_device(interface=name) for name in names.split(",")]


def backend_for(places: Sequence[str]) -> str:
    """The backend for tensors between the ranks' devices: NCCL where it is asked for and each rank has a GPU to itself.

    Args:
        places: the `place_of` each rank's device.
    """
    apart = len(set(places)) == len(places) and all(place.startswith("cuda") for place in places)
    return "nccl" if apart and os.environ.get(NCCL_VARIABLE) == "1" else "gloo"


def place_of(device: torch.device) -> str:
    """A name of the device that is the same in every process of a machine, whatever number the device has there."""
    if device.type == "cuda":
        device_id = getattr(torch.cuda.get_device_properties(device), "uuid", device)
        return f"cuda {socket.gethostname()} {device_id}"
    return str(device)
