"""Models that strain an engine: views, buffers that are read, recurrent and sparse layers, activation checkpoints."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dtrp.models import cifar_resnet


class Mixer(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(size, size)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(x.transpose(1, 2)).transpose(1, 2)


class Renorm(nn.Module):
    """Reads a buffer that its training forward moves, in place or by a new tensor."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.in_place = in_place
        self.linear = nn.Linear(6, 6)
        self.register_buffer("size", torch.ones(6))

    def forward(self, x: Tensor) -> Tensor:
        moved = x.detach().abs().mean(0)
        if self.in_place:
            self.size.mul_(0.9).add_(0.1 * moved)
        else:
            self.size = 0.9 * self.size + 0.1 * moved
        return torch.tanh(self.linear(x) / self.size)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, dropout=0.1, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attention(x, x, x, need_weights=False)[0]


class Lstm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(6, 6, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(x)[0]


class Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


class Checkpointed(nn.Module):
    def __init__(self, on: bool) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh())
        self.on = on

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.body, x, use_reentrant=False) if self.on else self.body(x)


def residual() -> list[nn.Module]:
    model = cifar_resnet(8, width=4, num_classes=3).to(memory_format=torch.channels_last)
    return [model[:2], *model[2:]]


def images() -> Tensor:
    return torch.randn(12, 3, 6, 6).to(memory_format=torch.channels_last)


def sequences() -> Tensor:
    return torch.randn(12, 6, 6)


def rows() -> Tensor:
    return torch.randn(12, 6)


MODELS: dict[str, tuple[Callable[[], list[nn.Module]], Callable[[], Tensor]]] = {
    "channels last": (
        lambda: [nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last), nn.Sequential(nn.ReLU(), nn.BatchNorm2d(4)),
                 nn.Sequential(nn.Flatten(), nn.Linear(64, 6)), nn.Linear(6, 3)], images),
    "mixer": (lambda: [Mixer(6), Mixer(6), Mixer(6), nn.Sequential(Mean(), nn.Linear(6, 3))], sequences),
    "resnet, channels last": (residual, lambda: torch.randn(12, 3, 6, 6)),
    "attention": (lambda: [Attention(), Attention(), nn.LayerNorm(6), nn.Sequential(Mean(), nn.Linear(6, 3))], sequences),
    "lstm": (lambda: [Lstm(), nn.Tanh(), Lstm(), nn.Sequential(Mean(), nn.Linear(6, 3))], sequences),
    "embedding": (lambda: [nn.Embedding(9, 6), Lstm(), nn.Identity(), nn.Sequential(Mean(), nn.Linear(6, 3))],
                  lambda: torch.randint(9, (12, 5))),
    "group norm": (
        lambda: [nn.Conv2d(3, 4, 3), nn.Sequential(nn.GroupNorm(2, 4), nn.ReLU(inplace=True)), nn.Flatten(),
                 nn.Linear(64, 3)], lambda: torch.randn(12, 3, 6, 6)),
    "weight norm": (
        lambda: [nn.utils.parametrizations.weight_norm(nn.Linear(6, 6)), nn.Tanh(), nn.Linear(6, 6), nn.Linear(6, 3)],
        rows),
    "a slice of columns": (lambda: [nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Linear(6, 3)],
                           lambda: torch.randn(12, 11)[:, 3:9]),
    "a buffer that is read": (lambda: [Renorm(True), Renorm(False), Renorm(True), nn.Linear(6, 3)], rows),
    "activation checkpoints": (
        lambda: [Checkpointed(True), Checkpointed(True), Checkpointed(True), nn.Linear(6, 3)], rows),
}  # fmt: skip


class Tokens(nn.Module):
    """Learned tokens: the output is a view of the stage's own parameter."""

    def __init__(self, view: bool) -> None:
        super().__init__()
        self.tokens = nn.Parameter(torch.randn(6))
        self.view = view

    def forward(self, x: Tensor) -> Tensor:
        out = self.tokens.expand(len(x), 6)
        return out if self.view else out * 1.0
