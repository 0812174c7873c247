"""Models with forwards of their own that add terms to the loss, and where three stages of them begin.

All are called with vectors of 5, and return 6 logits.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from weighted_losses import Adds


class Routed(Adds):
    """Three experts, of which each token takes the likeliest, and the balance of their loads."""

    def __init__(self, width: int = 6) -> None:
        super().__init__(width)
        self.router = nn.Linear(width, 3)
        self.experts = nn.ModuleList(nn.Linear(width, width) for _ in range(3))

    def forward(self, h: Tensor) -> Tensor:
        shares = self.router(h).softmax(-1)
        taken = F.one_hot(shares.argmax(-1), 3).to(h.dtype)
        self.add(0.1 * 3 * (taken.flatten(0, -2).mean(0) * shares.flatten(0, -2).mean(0)).sum())
        outputs = torch.stack([expert(h) for expert in self.experts], -1)
        return h + self.linear((outputs * (taken * shares).unsqueeze(-2)).sum(-1).tanh())


class Mixture(nn.Module):
    """A mixture of experts in each block, over tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.randn(5, 6))
        self.blocks = nn.ModuleList(Routed() for _ in range(4))
        self.head = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        h = x.unsqueeze(-1) * self.embedding
        for block in self.blocks:
            h = block(h)
        return self.head(h.mean(1))


class Variational(Adds):
    """An autoencoder's draw around a mean, with two terms, and a decoder that sees the input again."""

    def __init__(self) -> None:
        super().__init__(6)
        self.encoder, self.variance = nn.Linear(5, 6), nn.Linear(6, 6)
        self.decoder = nn.Sequential(nn.Linear(11, 8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 6))

    def forward(self, x: Tensor) -> Tensor:
        h = self.encoder(x).tanh()
        mean, log_variance = self.linear(h), self.variance(h)
        self.add(0.05 * (mean.square() + log_variance.exp() - log_variance - 1).mean())
        z = mean + torch.randn_like(mean) * (0.5 * log_variance).exp()
        out = self.decoder(torch.cat([z, x], 1))
        self.add(1e-3 * out.abs().mean())
        return out


class Attends(Adds):
    """A block of a transformer with a penalty on what its attention gives."""

    def __init__(self) -> None:
        super().__init__(6)
        self.attention, self.norm = nn.MultiheadAttention(6, 2, batch_first=True), nn.LayerNorm(6)

    def forward(self, h: Tensor) -> Tensor:
        a, _ = self.attention(h, h, h, need_weights=False)
        self.add(0.1 * a.square().mean())
        return self.norm(h + self.linear(a).tanh())


class Recurrent(nn.Module):
    """A transformer of which one block is called three times, between blocks that are called once."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.randn(5, 6))
        self.first, self.shared, self.last = Attends(), Attends(), Attends()
        self.head = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x.unsqueeze(-1) * self.embedding)
        for _ in range(3):
            h = self.shared(h)
        return self.head(self.last(h).mean(1))


class Penalized(Adds):
    def forward(self, h: Tensor) -> Tensor:
        out = self.linear(h).tanh()
        self.add(0.1 * out.square().mean())
        return out


class Twins(nn.Module):
    """Layers that are called with the input and with its opposite."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = nn.Sequential(nn.Linear(5, 6), Penalized(), Penalized())
        self.head = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        other = 1 - x  # made in the first stage, where both ways begin
        return self.head(self.tower(x) - self.tower(other))


class Tied(nn.Module):
    """Two layers with one weight, and a penalty on it beside those on activations."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.middle, self.late, self.head = nn.Linear(5, 6), Penalized(), Penalized(), OnWeights()
        self.head.linear.weight = self.middle.linear.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.late(self.middle(self.embed(x))))


class OnWeights(Adds):
    def forward(self, h: Tensor) -> Tensor:
        self.add(0.01 * self.linear.weight.square().sum())
        return self.linear(h)


MODELS: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "mixture of experts": (Mixture, ["blocks.1", "blocks.3"]),
    "variational": (Variational, ["variance", "decoder"]),
    "block called thrice": (Recurrent, ["shared", "last"]),
    "twins": (Twins, ["tower.1", "tower.2"]),
    "tied": (Tied, ["late", "head"]),
}


def inputs(num: int = 7) -> Tensor:
    return torch.randn(num, 5, generator=torch.Generator().manual_seed(1))


def build(kind: str) -> nn.Module:
    torch.manual_seed(3)
    return MODELS[kind][0]()
