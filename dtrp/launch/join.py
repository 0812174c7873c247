"""How a process that torchrun has started joins the default process group, and hears Ctrl-C and SIGTERM meanwhile."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.util import Finalize
from typing import TypeVar

import torch
import torch.distributed as dist

from ..errors import WorkerError
from .process_end import end_at_once, launcher_pid
from .rendezvous import ABSENT, SILENT, Heartbeats, Rendezvous, first_rank_holds_store
from .signals import SigtermListener

T = TypeVar("T")


def under_launcher() -> bool:
    """Whether torchrun, or another launcher, has started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def launched() -> bool:
    """Whether torchrun, or another launcher, has started this process, be it the only one."""
    return "TORCHELASTIC_RUN_ID" in os.environ or under_launcher()


def launch_name() -> str | None:
    """A name of this launch, the same after a restart, and no other launch's on this machine; None: no torchrun."""
    name = os.environ.get("TORCHELASTIC_RUN_ID")
    return f"{name} {os.getppid()}" if name == "none" else name  # "none": torchrun was given no --rdzv-id


def join(timeout_s: float) -> None:
    """Initialize torch.distributed where torchrun has started this process and nobody has done so.

    Args:
        timeout_s: how long to wait for the other ranks.

    Raises:
        TimeoutError: the other ranks did not come.
        WorkerError: the launcher has ended this process since one of them failed.
    """
    if dist.is_available() and not dist.is_initialized() and under_launcher():
        _interruptibly(lambda progress: _join(timeout_s, progress), timeout_s)


def told_by_first_rank(value: T | None, error: Exception | None, timeout_s: float) -> T:
    """What the first rank has found out, on every rank; in one process that is this one.

    All ranks call it; those that have found nothing out pass None.

    Args:
        value: what this rank has found out; picklable.
        error: why it could not.
        timeout_s: how long to wait for the other ranks.

    Raises:
        Exception: the error of this rank; where it has none, that of the first rank.
    """
    told = [(value, error)]
    if under_launcher():
        join(timeout_s)
        dist.broadcast_object_list(told, src=0, device=torch.device("cpu"))
    if error is not None:
        raise error
    value, error = told[0]
    if error is not None:
        raise error
    assert value is not None
    return value


@dataclass
class _Progress:
    """How far this rank has come with joining the others.

    Attributes:
        rendezvous: once the store can be reached.
        heartbeats: once all ranks have met.
    """

    rendezvous: Rendezvous | None = None
    heartbeats: Heartbeats | None = None

    def missing(self) -> list[int]:
        """The ranks that this one waits for, as far as they are known."""
        if self.heartbeats is not None:
            return self.heartbeats.missing()
        if self.rendezvous is not None:
            return self.rendezvous.missing()
        return [0] if first_rank_holds_store() and os.environ.get("RANK") != "0" else []


class _ToldToEndError(BaseException):
    """SIGTERM came while this process waited for the others."""


def _join(timeout_s: float, progress: _Progress) -> None:
    """`init_process_group` under store keys of this attempt alone: see `dtrp.launch.rendezvous`."""
    from torch.distributed.rendezvous import rendezvous  # torch may have been built without

    timeout = timedelta(seconds=timeout_s)
    world_size = int(os.environ["WORLD_SIZE"])
    # For a world of one the first rank does not wait inside torch, where it could not say for whom.
    store, rank, _ = next(iter(rendezvous("env://?world_size=1", timeout=timeout)))
    progress.rendezvous = Rendezvous(store, rank, world_size)
    attempt = progress.rendezvous.meet(timeout_s)
    nccl = dist.is_nccl_available() and torch.cuda.is_available()
    device_per_rank = nccl and int(os.environ.get("LOCAL_WORLD_SIZE", world_size)) <= torch.cuda.device_count()
    store = dist.PrefixStore(f"dtrp/{attempt}", store)  # type: ignore[attr-defined]
    beats = dist.PrefixStore("presence", store)  # type: ignore[attr-defined]
    progress.heartbeats = Heartbeats(beats, range(world_size), rank)
    progress.heartbeats.connect()
    backend = "cpu:gloo,cuda:nccl" if device_per_rank else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    Finalize(None, _destroy_process_group, exitpriority=50)  # after every Transport
    store.set(f"joined/{rank}", "")
    while not store.check([f"joined/{other}" for other in range(world_size)]):
        time.sleep(0.01)


def _destroy_process_group() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def _interruptibly(job: Callable[[_Progress], object], timeout_s: float) -> None:
    """Run ``job``, which would not hear Ctrl-C, in a thread; it has a time-out, and notes its progress."""
    errors: list[BaseException] = []
    progress = _Progress()
    # Not `Thread.join`: if a signal handler raises in it, it takes a running thread for a finished one.
    finished = threading.Event()

    def run() -> None:
        try:
            job(progress)
        except BaseException as error:
            errors.append(error)
        finally:
            finished.set()

    threading.Thread(target=run, name="dtrp join", daemon=True).start()
    # If the process ends meanwhile, the thread may still be in the backend.
    guard = Finalize(None, lambda: None if finished.is_set() else end_at_once(), exitpriority=40)
    missing = _wait_for(finished, progress, time.monotonic() + timeout_s + 2)
    if finished.is_set():
        guard.cancel()
        if not errors:
            return
    if errors and not isinstance(errors[0], (TimeoutError, RuntimeError)):
        raise errors[0]
    raise _join_error(errors[0] if errors else None, progress, missing, timeout_s)


def _wait_for(finished: threading.Event, progress: _Progress, deadline: float) -> list[int]:
    """Wait until the job is finished, the deadline has passed, or other ranks say which ranks are missing: those."""

    def told_to_end(number: int) -> None:
        raise _ToldToEndError(number)

    launcher = launcher_pid()
    missing: list[int] = []
    sigterm = SigtermListener(told_to_end)
    try:
        while not (missing or finished.wait(0.1)) and time.monotonic() < deadline:
            missing = progress.heartbeats.beat() if progress.heartbeats is not None else []
            if os.getppid() != launcher and "TORCHELASTIC_RUN_ID" in os.environ:
                raise ConnectionError("the launcher of this process is gone, before all ranks had come")
    except _ToldToEndError:
        sigterm.restore()
        raise _sigterm_error(progress) from None
    finally:
        sigterm.restore()
    return missing


def _join_error(error: BaseException | None, progress: _Progress, missing: list[int], timeout_s: float) -> TimeoutError:
    """The error of a rank that could not join; its cause is what the backend or the store raised, if they did."""
    if progress.heartbeats is not None and (missing := missing or progress.heartbeats.missing()):
        reason = f" (rank {', '.join(map(str, missing))} {SILENT})"
    elif error is not None and str(error):
        lost = isinstance(error, dist.DistError) and first_rank_holds_store()
        reason = f" ({'rank 0 cannot be reached: ' if lost else ''}{str(error).splitlines()[0]})"
    else:
        reason = " (rank 0 cannot be reached)" if progress.heartbeats is None and first_rank_holds_store() else ""
    rank, world_size = os.environ.get("RANK", "?"), os.environ.get("WORLD_SIZE", "?")
    result = TimeoutError(
        f"rank {rank} could not join the {world_size} ranks of the run within {timeout_s:g} s{reason}; start all of them, "
        "and see that MASTER_ADDR and MASTER_PORT can be reached"
    )
    result.__cause__ = error
    return result


def _sigterm_error(progress: _Progress) -> BaseException:
    """What SIGTERM is raised as: a launcher ends the others so when a rank has died, which could not say so itself."""
    try:
        missing = progress.missing()
    except RuntimeError:  # of the store
        missing = []
    if not missing:
        return SystemExit(128 + signal.SIGTERM)
    how = SILENT if progress.heartbeats is not None else ABSENT
    return WorkerError(
        f"rank {os.environ.get('RANK', '?')} was told to end (SIGTERM) while it waited for rank "
        f"{', '.join(map(str, missing))}, which {how}"
    )
