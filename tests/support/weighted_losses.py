"""Models that add terms to their loss, and losses whose micro-batches count for more than their samples."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import dtrp


class Adds(nn.Module):
    """A layer that adds a term, to whatever ``add`` is."""

    add: Callable[[Tensor], None] = staticmethod(dtrp.add_loss)

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)


class Experts(Adds):
    """Two experts and the balance of their gates."""

    def forward(self, x: Tensor) -> Tensor:
        gates = torch.stack([x.mean(-1), x.square().mean(-1)], -1).softmax(-1)
        self.add(0.3 * (gates.mean(0) ** 2).sum())
        return gates[:, :1] * self.linear(x) + gates[:, 1:] * x


class Latent(Adds):
    """A draw around a mean, and its KL divergence from the unit Gaussian; twice in a forward it adds twice."""

    def forward(self, x: Tensor) -> Tensor:
        mean, log_variance = self.linear(x), 0.1 * x
        self.add(0.05 * (mean.square() + log_variance.exp() - log_variance - 1).mean())
        self.add(1e-3 * mean.abs().mean())
        return mean + torch.randn_like(mean) * (0.5 * log_variance).exp()


class Penalized(Adds):
    """An activation penalty."""

    def forward(self, x: Tensor) -> Tensor:
        out = self.linear(x).tanh()
        self.add(0.1 * out.square().mean())
        return out


KINDS = {"experts": Experts, "latent": Latent, "penalty": Penalized}


def adding(kind: str) -> nn.Sequential:
    """Eight layers, of which those at 1, 3 and 7 add terms: two stages of the middle, and the last."""
    torch.manual_seed(3)
    make = KINDS[kind]
    return nn.Sequential(
        nn.Linear(5, 6), make(), nn.Tanh(), make(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), make()
    )


def counted(y: Tensor) -> Tensor:
    return (y != -100).sum()


def by_class(y: Tensor) -> float:
    """As a loss with class weights has it: `F.cross_entropy(weight=)` divides by the weights of its samples."""
    return float(CLASS_WEIGHTS[y].sum())


CLASS_WEIGHTS = torch.tensor([0.2, 1.0, 3.0], dtype=torch.float64)
LOSSES: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], Callable[[Tensor], Any]]] = {
    "ignored": (cross_entropy, counted),
    "class weights": (functools.partial(cross_entropy, weight=CLASS_WEIGHTS), by_class),
}


def labelled(kind: str, num: int = 6) -> list[tuple[Tensor, Tensor]]:
    """Mini-batches in which some micro-batches have many labels of -100, and one has nothing else."""
    generator = torch.Generator().manual_seed(1)
    data = []
    for b in range(num):
        n = 9 if b % 3 else 7
        x = torch.randn(n, 5, generator=generator, dtype=torch.float64)
        y = torch.randint(3, (n,), generator=generator)
        if kind == "ignored":
            y[torch.rand(n, generator=generator) < 0.4] = -100
            y[:3] = -100  # with three parts the first has no label
            y[-1] = 1
        data.append((x, y))
    return data
