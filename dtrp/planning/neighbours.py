"""Processes that work while another process is measured.

Workers that share a machine share its memory, its caches and its clock, so that a stage measured alone
looks faster than it is going to be. A neighbour trains the same layers on the same micro-batch, on one thread.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from subprocess import PIPE

import torch
from torch import Tensor, nn

from ..splitting.stages import stage_of
from ..tensors.pytree import map_tensors, tensors_of
from ..typing import Tree
from .helper_processes import helper_processes


@contextmanager
def busy_neighbours(count: int, layers: Sequence[nn.Module], x: Tree) -> Iterator[None]:
    """Within it ``count`` processes run the layers forward and backward, over and over, on the CPU.

    Where the layers cannot be sent to another process (a class of ``__main__``, a lambda), the neighbours run a
    small convolutional network on images instead.
    """
    if not count:
        yield
        return
    with tempfile.TemporaryDirectory(prefix="dtrp-") as folder:
        file = Path(folder) / "work.pt"
        try:
            torch.save((stage_of((str(i), layer) for i, layer in enumerate(layers)), map_tensors(Tensor.cpu, x)), file)
        except Exception:
            file.unlink(missing_ok=True)
        call = f"from {__name__} import work; work({str(file)!r})"
        with helper_processes([call] * count, stdout=PIPE) as processes:
            for process in processes:
                assert process.stdout is not None
                if not process.stdout.readline():  # a process says when it has begun
                    raise RuntimeError("a process to work beside the measured one has ended; pass neighbours=0")
            yield


def work(file: str) -> None:
    """The work of a neighbour, until it is killed."""
    torch.set_num_threads(1)
    try:
        model, x = torch.load(file, weights_only=False)  # written by this user's process a moment ago
        _train(model, x)
    except Exception:
        model = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1))
        x = torch.randn(32, 3, 32, 32)
    parent = os.getppid()
    print("begun", flush=True)
    while os.getppid() == parent:
        _train(model, x)


def _train(model: nn.Module, x: Tree) -> None:
    torch.autograd.backward([t.float().sum() for t in tensors_of(model(x)) if t.requires_grad])
    model.zero_grad()
