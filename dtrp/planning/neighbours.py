"""Processes that work while another one is measured.

Workers that share a machine share its memory, its caches and its clock, so that a stage measured alone
looks faster than it is going to be. A neighbour trains the same layers on the same micro-batch, on one thread.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..splitting.stages import stage_of
from ..tensors.pytree import map_tensors


@contextmanager
def busy_neighbours(count: int, layers: Sequence[nn.Module], x: Any) -> Iterator[None]:
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
        command = [sys.executable, "-c", f"from {__name__} import work; work({str(file)!r})"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        processes = [
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
            for _ in range(count)
        ]
        try:
            for process in processes:
                assert process.stdout is not None
                if not process.stdout.readline():  # it says when it has begun
                    raise RuntimeError(
                        "a process that was to work beside the measured one has ended; pass neighbours=0"
                    )
            yield
        finally:
            for process in processes:
                process.kill()
                process.wait()
                for pipe in (process.stdin, process.stdout):
                    assert pipe is not None
                    with suppress(OSError):
                        pipe.close()


def work(file: str) -> None:
    """What a neighbour does, until it is killed."""
    torch.set_num_threads(1)
    try:
        model, x = torch.load(file, weights_only=False)  # written by this user's own process a moment ago
        _train(model, x)
    except Exception:
        model = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1))
        x = torch.randn(32, 3, 32, 32)
    parent = os.getppid()
    print("begun", flush=True)
    while os.getppid() == parent:
        _train(model, x)


def _train(model: nn.Module, x: Any) -> None:
    made = [t for t in pytree.tree_leaves(model(x)) if isinstance(t, Tensor) and t.requires_grad]
    torch.autograd.backward([t.float().sum() for t in made])
    model.zero_grad()
