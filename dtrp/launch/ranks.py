"""Which rank hosts what, and how a process that torchrun has started joins the others."""

from __future__ import annotations

import itertools
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import parent_process
from multiprocessing.util import Finalize
from typing import Any

import torch
import torch.distributed as dist

from ..errors import WorkerError
from .rendezvous import ABSENT, SILENT, Presence, Start, first_holds_store
from .signals import SigtermListener

LAUNCHER_VARIABLE = "DTRP_LAUNCHER"  # the process that has started the launcher, or is it
_MOST_WAIT_S = 5.0  # for a process whose launcher is gone to end by itself


@dataclass(frozen=True)
class Ranks:
    """The ranks of a run: ``rows[replica][stage]``, and which of them this process is."""

    rows: tuple[tuple[int, ...], ...]
    rank: int

    @property
    def all(self) -> list[int]:
        """Every rank, row by row: the chain."""
        return list(itertools.chain(*self.rows))

    @property
    def replica(self) -> int:
        return next(i for i, row in enumerate(self.rows) if self.rank in row)

    @property
    def stage(self) -> int:
        return self.rows[self.replica].index(self.rank)

    @property
    def num_stages(self) -> int:
        return len(self.rows[0])

    @property
    def num_replicas(self) -> int:
        return len(self.rows)

    @property
    def replicas(self) -> list[int]:
        """The ranks that host this rank's stage."""
        return [row[self.stage] for row in self.rows]

    @property
    def before(self) -> int | None:
        """The rank of the stage before."""
        return self.rows[self.replica][self.stage - 1] if self.stage else None

    @property
    def after(self) -> int | None:
        """The rank of the stage after."""
        return self.rows[self.replica][self.stage + 1] if self.stage + 1 < self.num_stages else None


def under_launcher() -> bool:
    """Whether torchrun, or another launcher, has started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def launched() -> bool:
    """Whether torchrun, or another launcher, has started this process, be it the only one."""
    return "TORCHELASTIC_RUN_ID" in os.environ or under_launcher()


def launch_name() -> str | None:
    """What the first ranks of all starts of one launch have in common, restarts included, and no other; None: no torchrun."""
    name = os.environ.get("TORCHELASTIC_RUN_ID")
    return f"{name} {os.getppid()}" if name == "none" else name  # "none": torchrun was not told, and is alone


def find_ranks(group: Any, mesh: Any, timeout_s: float) -> Ranks | None:
    """The ranks that ``group`` or ``mesh`` say, else all there are; None: this process works alone.

    A process that torchrun has started joins its group first.

    Raises:
        TypeError, ValueError: a group or mesh of which no pipeline can be made.
    """
    if group is not None and mesh is not None:
        raise ValueError("group= and mesh= both say which ranks take part; pass one of the two")
    if mesh is not None:
        return _of_mesh(mesh)
    if group is not None:
        if group == dist.GroupMember.NON_GROUP_MEMBER:
            raise ValueError("this process is not in the group; only ranks of the group make a Pipeline on it")
        if not isinstance(group, dist.ProcessGroup):
            raise TypeError(
                f"group is a {type(group).__name__}; pass a process group, as from torch.distributed.new_group"
            )
        return Ranks((tuple(dist.get_process_group_ranks(group)),), dist.get_rank())
    if not dist.is_available():
        return None
    join(timeout_s)
    if dist.is_initialized() and dist.get_world_size() > 1:
        return Ranks((tuple(range(dist.get_world_size())),), dist.get_rank())
    return None


def join(timeout_s: float) -> None:
    """Initialize torch.distributed where torchrun has started this process and nobody has done so.

    Raises:
        TimeoutError: the other ranks did not come.
        WorkerError: the launcher has ended this process since one of them failed.
    """
    if dist.is_available() and not dist.is_initialized() and under_launcher():
        _interruptibly(lambda at: _join(timeout_s, at), timeout_s)


@dataclass
class _Progress:
    """How far this rank has come to join the others."""

    start: Start | None = None
    presence: Presence | None = None  # once all have come

    def missing(self) -> list[int]:
        """Whom it waits for, as far as that is known."""
        if self.presence is not None:
            return self.presence.missing()
        if self.start is not None:
            return self.start.missing()
        return [0] if first_holds_store() and os.environ.get("RANK") != "0" else []


class _ToldToEndError(BaseException):
    """SIGTERM, while this process waited for the others."""


def _of_mesh(mesh: Any) -> Ranks:
    from torch.distributed.device_mesh import DeviceMesh

    if not isinstance(mesh, DeviceMesh):
        raise TypeError(
            f"mesh is a {type(mesh).__name__}; pass init_device_mesh(device_type, (replicas, stages), "
            "mesh_dim_names=('replica', 'stage'))"
        )
    names = mesh.mesh_dim_names
    if mesh.ndim != 2 or names not in (None, ("replica", "stage")):
        raise ValueError(
            f"mesh has the dimensions {names or mesh.ndim}; it needs two, ('replica', 'stage'): "
            "init_device_mesh(device_type, (replicas, stages), mesh_dim_names=('replica', 'stage'))"
        )
    rows = tuple(tuple(int(rank) for rank in row) for row in mesh.mesh.tolist())
    if not any(dist.get_rank() in row for row in rows):
        raise ValueError(f"rank {dist.get_rank()} is not in the mesh; only ranks of the mesh make a Pipeline on it")
    return Ranks(rows, dist.get_rank())


def _join(timeout_s: float, at: _Progress) -> None:
    """`init_process_group` under keys of this start's own: see `dtrp.launch.rendezvous`; ``at`` is told how far it has come."""
    from torch.distributed.rendezvous import rendezvous  # torch may have been built without

    timeout = timedelta(seconds=timeout_s)
    world_size = int(os.environ["WORLD_SIZE"])
    # For a world of one the first rank does not wait here, where it could not say for whom.
    store, rank, _ = next(iter(rendezvous("env://?world_size=1", timeout=timeout)))
    at.start = Start(store, rank, world_size)
    start = at.start.meet(timeout_s)
    nccl = dist.is_nccl_available() and torch.cuda.is_available()
    own_device = nccl and int(os.environ.get("LOCAL_WORLD_SIZE", world_size)) <= torch.cuda.device_count()
    prefixed = dist.PrefixStore(f"dtrp/{start}", store)  # type: ignore[attr-defined]
    at.presence = Presence(dist.PrefixStore("presence", prefixed), range(world_size), rank)  # type: ignore[attr-defined]
    at.presence.connect()
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if own_device else "gloo",
        store=prefixed,
        rank=rank,
        world_size=world_size,
        timeout=timeout,
    )
    Finalize(None, _leave, exitpriority=50)  # after every Transport
    prefixed.set(f"joined/{rank}", "")
    while not prefixed.check([f"joined/{other}" for other in range(world_size)]):
        time.sleep(0.01)


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def _interruptibly(job: Callable[[_Progress], None], timeout_s: float) -> None:
    """Run in a thread what would not hear Ctrl-C; ``job`` has a time-out of its own, and says how far it has come."""
    errors: list[BaseException] = []
    at = _Progress()
    # Not the thread's own join: one that a signal handler's exception ends takes a thread that runs for one that is through.
    over = threading.Event()

    def run() -> None:
        try:
            job(at)
        except BaseException as error:
            errors.append(error)
        finally:
            over.set()

    threading.Thread(target=run, name="dtrp join", daemon=True).start()
    guard = Finalize(None, lambda: _end_unless(over), exitpriority=40)
    deadline, launcher = time.monotonic() + timeout_s + 2, _launcher()
    missing: list[int] = []
    sigterm = SigtermListener(_told_to_end)
    try:
        while not (missing or over.wait(0.1)) and time.monotonic() < deadline:
            missing = at.presence.beat() if at.presence is not None else []
            if os.getppid() != launcher and "TORCHELASTIC_RUN_ID" in os.environ:
                raise ConnectionError("the launcher of this process is gone, before all ranks had come")
    except _ToldToEndError:
        sigterm.restore()
        raise _missed(at) from None
    finally:
        sigterm.restore()
    if over.is_set():
        guard.cancel()
        if not errors:
            return
    if errors and not isinstance(errors[0], (TimeoutError, RuntimeError)):
        raise errors[0]
    if at.presence is not None and (missing := missing or at.presence.missing()):
        reason = f" (rank {', '.join(map(str, missing))} {SILENT})"
    elif errors and str(errors[0]):
        lost = isinstance(errors[0], dist.DistError) and first_holds_store()
        reason = f" ({'rank 0 cannot be reached: ' if lost else ''}{str(errors[0]).splitlines()[0]})"
    else:
        reason = " (rank 0 cannot be reached)" if at.presence is None and first_holds_store() else ""
    rank, world_size = os.environ.get("RANK", "?"), os.environ.get("WORLD_SIZE", "?")
    raise TimeoutError(
        f"rank {rank} could not join the {world_size} ranks of the run within {timeout_s:g} s{reason}; start all of them, "
        "and see that MASTER_ADDR and MASTER_PORT can be reached"
    ) from (errors[0] if errors else None)


def _told_to_end(number: int) -> None:
    raise _ToldToEndError(number)


def _missed(at: _Progress) -> BaseException:
    """What SIGTERM comes to: a launcher ends the others so when one has died, which could not say so itself."""
    try:
        missing = at.missing()
    except RuntimeError:  # of the store
        missing = []
    if not missing:
        return SystemExit(128 + signal.SIGTERM)
    how = SILENT if at.presence is not None else ABSENT
    return WorkerError(
        f"rank {os.environ.get('RANK', '?')} was told to end (SIGTERM) while it waited for rank "
        f"{', '.join(map(str, missing))}, which {how}"
    )


def _end_unless(over: threading.Event) -> None:
    """At the end of a process that waits no longer: its thread may still try to join."""
    if not over.is_set():
        end_at_once()


def end_at_once() -> None:
    """End a process that nothing else ends well, with exit code 1 and without the exit handlers that are left.

    For one with a thread in the backend, which nothing can stop: where it comes back while the interpreter is taken down,
    it aborts the process. And for one whose main thread does not hear that it is to end.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


def end_with_failure() -> None:
    """Have a process that is ending as if all were well end with exit code 1, after its exit handlers."""
    if (
        parent_process() is not None
    ):  # a child of multiprocessing: its exit code is decided, and it has no exit handlers
        end_at_once()
    sys.__dict__["_dtrp_failed"] = _Failed()  # the interpreter forgets this last


class _Failed:
    def __del__(self, end: Callable[[int], None] = os._exit) -> None:
        end(1)


def _launcher() -> int:
    """The parent of this process, which must stay it; one that died while torch was imported has left it to process 1."""
    parent = os.getppid()
    return int(os.environ.get(LAUNCHER_VARIABLE, parent)) if parent == 1 else parent


def watch_launcher(on_gone: Callable[[], None], is_over: Callable[[], bool]) -> None:
    """Call ``on_gone`` when the torchrun agent that started this process is gone, and end the process soon after: by a signal
    that its main thread hears, or else at once.

    Args:
        on_gone: must not block.
        is_over: whether there is nothing to watch for any more.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    launcher = _launcher()

    def watch() -> None:
        while os.getppid() == launcher:
            if is_over():
                return
            time.sleep(0.5)
        on_gone()
        for _ in range(2):  # whoever is about to end by itself does not hear the first
            time.sleep(_MOST_WAIT_S)
            heard = callable(signal.getsignal(signal.SIGTERM))
            os.kill(
                os.getpid(), signal.SIGTERM if heard else signal.SIGINT
            )  # its main thread ends it as it ends others
        time.sleep(_MOST_WAIT_S)
        end_at_once()

    threading.Thread(target=watch, name="dtrp launcher", daemon=True).start()
