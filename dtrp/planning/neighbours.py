"""Processes that work while another process is measured.

Workers that share a machine share its memory, its caches and its clock, so that a stage measured alone
looks faster than it is going to be. A neighbour trains the same layers on the same micro-batch, on one thread.
"""

from __future__ import annotations

import os
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from subprocess import PIPE, Popen

import torch
from torch import Tensor, nn

from ..launch.heap import keep_heap
from ..splitting.stages import stage_of
from ..tensors.pytree import map_tensors, tensors_of
from ..typing import Tree
from .helper_processes import helper_processes

_WORK, _REST = "work\n", "rest\n"


class Neighbours:
    """Processes that work, and rest while something is measured alone.

    Args:
        processes: the processes, each of which has begun to rest.
    """

    def __init__(self, processes: Sequence[Popen[str]] = ()) -> None:
        self._processes = processes

    @contextmanager
    def resting(self) -> Iterator[None]:
        """Within it no neighbour works."""
        self._tell(_REST)
        self.wait_until_they_rest()
        try:
            yield
        finally:
            self.work()

    def work(self) -> None:
        self._tell(_WORK)

    def wait_until_they_rest(self) -> None:
        """Every process writes a line when it has begun to rest, as it does at first."""
        for process in self._processes:
            assert process.stdout is not None
            if not process.stdout.readline():
                raise _ended()

    def _tell(self, what: str) -> None:
        for process in self._processes:
            assert process.stdin is not None
            try:
                process.stdin.write(what)
                process.stdin.flush()
            except OSError:
                raise _ended() from None


def _ended() -> RuntimeError:
    return RuntimeError("a process to work beside the measured one has ended; pass neighbours=0")


@contextmanager
def busy_neighbours(count: int, layers: Sequence[nn.Module], x: Tree) -> Iterator[Neighbours]:
    """Within it ``count`` processes run the layers forward and backward, over and over, on the CPU.

    Where the layers cannot be sent to another process (a class of ``__main__``, a lambda), the neighbours run a
    small convolutional network on images instead.
    """
    if not count:
        yield Neighbours()
        return
    with tempfile.TemporaryDirectory(prefix="dtrp-") as folder:
        file = Path(folder) / "work.pt"
        try:
            torch.save((stage_of((str(i), layer) for i, layer in enumerate(layers)), map_tensors(Tensor.cpu, x)), file)
        except Exception:
            file.unlink(missing_ok=True)
        call = f"from {__name__} import work; work({str(file)!r})"
        with helper_processes([call] * count, stdin=PIPE, stdout=PIPE) as processes:
            neighbours = Neighbours(processes)
            neighbours.wait_until_they_rest()
            neighbours.work()
            yield neighbours


def work(file: str) -> None:
    """The work of a neighbour, until it is killed or the measured process has ended."""
    torch.set_num_threads(1)
    keep_heap()
    answers, sys.stdout = sys.stdout, open(os.devnull, "w")  # a model that prints does not answer  # noqa: SIM115
    try:
        model, x = torch.load(file, weights_only=False)  # written by this user's process a moment ago
        _train(model, x)
    except Exception:
        model = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1))
        x = torch.randn(32, 3, 32, 32)
    working = threading.Event()
    threading.Thread(target=_obey, args=(working,), daemon=True).start()
    while True:
        print("at rest", file=answers, flush=True)
        working.wait()
        while working.is_set():
            _train(model, x)


def _obey(working: threading.Event) -> None:
    """Work and rest as standard input says, and end with it."""
    for line in sys.stdin:
        if line == _WORK:
            working.set()
        else:
            working.clear()
    os._exit(0)


def _train(model: nn.Module, x: Tree) -> None:
    torch.autograd.backward([t.float().sum() for t in tensors_of(model(x)) if t.requires_grad])
    model.zero_grad()
