"""Models in four stages that share parameters: (layers, one a stage; what makes a mini-batch's x)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


def block() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Dropout(0.1))


def _embedding_and_head() -> list[nn.Module]:
    embedding, head = nn.Embedding(9, 6), nn.Linear(6, 9)
    head.weight = embedding.weight
    return [embedding, block(), block(), nn.Sequential(Mean(), head)]


def _three_holders_and_two_ties() -> list[nn.Module]:
    layers = [block(), block(), block(), nn.Sequential(*block(), nn.Linear(6, 3))]
    for layer in (layers[1], layers[3]):
        layer[0].weight = layers[0][0].weight
    layers[2][0].bias = layers[1][0].bias
    return list(layers)


def _one_module_in_two_stages() -> list[nn.Module]:
    """All that stage 2 trains belongs to stage 0."""
    shared = block()
    return [shared, block(), shared, nn.Linear(6, 3)]


def _a_part_that_is_not_used() -> list[nn.Module]:
    """The first holder never reads it, so it has no gradient there."""
    layers = _embedding_and_head()
    first = nn.Sequential(nn.Embedding(9, 6))
    first.register_module("unused", layers[0])

    class First(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = first

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.inner[0](x)
            return out

    return [First(), *layers[1:]]


def _rows() -> Tensor:
    return torch.randn(12, 6)


def _tokens() -> Tensor:
    return torch.randint(9, (12, 5))


TIED: dict[str, tuple[Callable[[], list[nn.Module]], Callable[[], Tensor]]] = {
    "embedding and head": (_embedding_and_head, _tokens),
    "three holders and two ties": (_three_holders_and_two_ties, _rows),
    "one module in two stages": (_one_module_in_two_stages, _rows),
    "a part that is not used": (_a_part_that_is_not_used, _tokens),
}
