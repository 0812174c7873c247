"""Models whose forward reads a buffer that it moves, or changes the shape of: each is four layers, for sequences."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Carried(nn.Module):
    """A hidden state in a buffer, which is written."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.RNN(4, 5, batch_first=True)
        self.register_buffer("h", torch.zeros(1, 1, 5))

    def forward(self, x: Tensor) -> Tensor:
        out, h = self.rnn(x, self.h.expand(1, len(x), 5).clone())
        self.h.copy_(h.detach().mean(1, keepdim=True))
        return out.mean(1)


class Replaced(Carried):
    """A state that each forward puts a new tensor in the place of, and every third time none; part of the output too."""

    def __init__(self) -> None:
        super().__init__()
        self.h = None
        self.count = 0

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        out, h = self.rnn(x, None if self.h is None else self.h[:, : len(x)].clone())
        self.h = h.detach() if self.count % 3 else None
        return out[:, -1]


class Registered(Carried):
    """A state that the first forward registers."""

    def __init__(self) -> None:
        super().__init__()
        del self.h

    def forward(self, x: Tensor) -> Tensor:
        if not hasattr(self, "h"):
            self.register_buffer("h", torch.zeros(1, 1, 5, dtype=x.dtype), persistent=False)
        return super().forward(x)


class Grown(nn.Module):
    """A cache that grows with the sequence, and knows by an attribute how far."""

    def __init__(self, persistent: bool = True) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 5)
        self.length = 1
        self.persistent = persistent
        self.register_buffer("cos", torch.ones(1, 5), persistent=persistent)

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[1]
        if length > self.length:
            angles = torch.arange(length).to(x).outer(torch.arange(5).to(x))
            self.register_buffer("cos", angles.cos(), persistent=self.persistent)
            self.length = length
        return (self.linear(x) * self.cos[:length]).mean(1)


class Observed(nn.Module):
    """Ranges that are resized when there is something to see, and another dtype than they were made of."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 5)
        self.register_buffer("top", torch.zeros(0))
        self.register_buffer("mean", torch.zeros(5, dtype=torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        top = y.detach().amax((0, 1))
        if not len(self.top):
            self.top.resize_(5).copy_(top)
        self.top.copy_(torch.maximum(self.top, top))
        self.mean = self.mean.to(y) / 2 + y.detach().mean((0, 1))
        return ((y - self.mean) / self.top.clone()).mean(1)


class Spectral(nn.Module):
    """And a buffer that nobody can write."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.utils.parametrizations.spectral_norm(nn.Linear(4, 5))
        self.register_buffer("ones", torch.ones(5).expand(2, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).mean(1) * self.ones[0]


class Passed(nn.Module):
    """What it passes on is a view of a buffer that it writes the next time."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 5)
        self.register_buffer("center", torch.zeros(5))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.linear(x).mean(1)
        self.center.add_(y.detach().mean(0))
        return y, self.center.expand(len(y), 5)


class Product(nn.Module):
    def forward(self, pair: tuple[Tensor, Tensor]) -> Tensor:
        return pair[0] * pair[1]


KINDS = [Carried, Replaced, Registered, Grown, Observed, Spectral, Passed]


def model_of(kind: type[nn.Module]) -> nn.Sequential:
    torch.manual_seed(1)
    second = Product() if kind is Passed else nn.Tanh()
    return nn.Sequential(kind(), second, nn.Linear(5, 5), nn.Linear(5, 3)).double()


def sequences() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [
        (torch.randn(4, length, 4, generator=generator).double(), torch.randint(3, (4,), generator=generator))
        for length in (3, 3, 2, 5, 4, 9, 3, 3)
    ]
