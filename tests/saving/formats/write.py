"""Checkpoints of the version that runs it, and the weights that training goes on to from them: ``python write.py FOLDER``."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor, nn

import dtrp


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for _ in range(3):
        layers += [nn.Linear(5, 5, bias=False), nn.BatchNorm1d(5), nn.Tanh(), nn.Dropout(0.2)]
    return nn.Sequential(*layers, nn.Linear(5, 3))


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(12, 5, generator=generator), torch.randint(3, (12,), generator=generator)) for _ in range(8)]


def pipe(method: str) -> dtrp.Pipeline:
    return dtrp.Pipeline(
        network(),
        lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.9),
        nn.functional.cross_entropy,
        num_stages=3,
        method=method,
        num_microbatches=2,
        seed=0,
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.95),
    )


def finish(trained: dtrp.Pipeline, path: Path) -> None:
    """The last three mini-batches, and what they come to."""
    for x, y in batches()[5:]:
        trained.step(x, y)
    trained.flush()
    torch.save(trained.model_state_dict(), path)


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    for method in ("dtrp", "spectrain"):
        trained = pipe(method)
        for x, y in batches()[:5]:
            trained.step(x, y)
        trained.save(folder / f"exact-{method}", extra={"at": 5})
        finish(trained, folder / f"expected-{method}.pt")
    restored = pipe("dtrp")
    restored.load(folder / "exact-dtrp")
    restored.save(folder / "portable", portable=True, extra={"at": 5})
    finish(restored, folder / "expected-portable.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
