"""Models with forwards of their own, what they are called with, and where four stages of them may begin."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class UNet(nn.Module):
    """Skips over the middle, and ReLUs that write their input."""

    def __init__(self) -> None:
        super().__init__()
        self.enc1, self.enc2, self.mid = self.block(3, 4), self.block(4, 8), self.block(8, 8)
        self.up2, self.dec2 = nn.ConvTranspose2d(8, 8, 2, 2), self.block(16, 4)
        self.up1, self.dec1 = nn.ConvTranspose2d(4, 4, 2, 2), self.block(8, 4)
        self.drop, self.out = nn.Dropout(0.1), nn.Conv2d(4, 1, 1)

    @staticmethod
    def block(inputs: int, outputs: int) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)
        )

    def forward(self, x: Tensor) -> Tensor:
        a = self.enc1(x)
        b = self.enc2(F.max_pool2d(a, 2))
        u = self.dec2(torch.cat([self.up2(self.mid(F.max_pool2d(b, 2))), b], 1))
        u = self.dec1(torch.cat([self.up1(self.drop(u)), a], 1))
        return self.out(u)


class Dense(nn.Module):
    """DenseNet-style: a layer reads all that came before it."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6 + 4 * i, 4) for i in range(5))
        self.drop = nn.Dropout(0.2)
        self.head = nn.Linear(26, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.cat([x, self.drop(torch.tanh(layer(x)))], 1)
        return self.head(x)


class Mix(nn.Module):
    """Inception-style: branches side by side."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.one, self.three = nn.Conv2d(inputs, 3, 1), nn.Conv2d(inputs, 3, 3, padding=1)
        self.five, self.pool = nn.Conv2d(inputs, 2, 5, padding=2), nn.MaxPool2d(3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(torch.cat([self.one(x), self.three(x), self.five(x), self.pool(x)[:, :1]], 1))


class Inception(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mixes = nn.Sequential(Mix(3), Mix(9), Mix(9), Mix(9))
        self.head = nn.Linear(9, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.dropout(self.mixes(x).mean((2, 3)), 0.2, self.training))


class Siamese(nn.Module):
    """Two inputs through the same layers."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh())
        self.head = nn.Sequential(nn.Linear(16, 8), nn.Dropout(0.2), nn.Tanh(), nn.Linear(8, 3))

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return self.head(torch.cat([self.encoder(left), self.encoder(right)], 1))


class Lstm(nn.Module):
    """A classifier of sequences that returns None beside its logits."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.lstm = nn.LSTM(8, 8, num_layers=2, batch_first=True, dropout=0.2)
        self.drop, self.head = nn.Dropout(0.1), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        _, (h, _) = self.lstm(self.embedding(x))
        return self.head(self.drop(h[-1])), None


class Residual(nn.Module):
    """Blocks in a list, dropout between them, and a buffer that the forward assigns."""

    def __init__(self, blocks: int = 6) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(blocks))
        self.norm, self.drop, self.head = nn.LayerNorm(8), nn.Dropout(0.2), nn.Linear(8, 3)
        self.register_buffer("size", torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if self.training:
            self.size = 0.9 * self.size + 0.1 * x.detach().abs().mean(0)
        for block in self.blocks:
            x = x + self.drop(torch.tanh(block(x)))
        return self.head(self.norm(x))


class Adapter(nn.Module):
    """LoRA-style: a frozen layer and a product of two small matrices."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.down, self.up = nn.Linear(layer.in_features, 2, bias=False), nn.Linear(2, layer.out_features, bias=False)
        self.drop = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.up(self.down(self.drop(x)))


class Block(nn.Module):
    """A norm that is computed in single precision, and a running mean that is assigned."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.register_buffer("mean", torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            h = x.type_as(self.mean)
            h = h * torch.rsqrt(h.square().mean(1, keepdim=True) + 1e-3)
        if self.training:
            with torch.no_grad():
                self.mean = 0.9 * self.mean + 0.1 * x.mean(0)
        return x + torch.tanh(self.layer(h * 1.5))


class Regions(nn.Module):
    """A frozen stem under no_grad, and blocks with regions in them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8))
        self.blocks = nn.ModuleList(Block() for _ in range(4))
        self.drop, self.head = nn.Dropout(0.1), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.drop(x))


class Turned(nn.Module):
    """A block that reads a slice of a table which is the model's, and may drop parts of a scale which is too."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.drop = nn.Linear(6, 6), nn.Dropout(0.2)

    def forward(self, x: Tensor, table: Tensor, scale: Tensor | None) -> Tensor:
        angles = table[: x.shape[1]]
        h = self.layer(x * angles.cos() + x.roll(1, 1) * angles.sin())
        return x + torch.tanh(h if scale is None else h * self.drop(scale))


class Tables(nn.Module):
    """One buffer that all blocks read, and one parameter that two of them do."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.register_buffer("table", torch.randn(8))
        self.scale = nn.Parameter(torch.rand(6) + 1)
        self.blocks = nn.ModuleList(Turned() for _ in range(6))
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for number, block in enumerate(self.blocks):
            x = block(x, self.table, self.scale if number in (1, 4) else None)
        return self.head(x)


def frozen_first_half() -> nn.Module:
    model = Residual()
    for module in (model.first, *model.blocks[:3]):
        module.requires_grad_(False)
    return model


def with_adapters() -> nn.Module:
    model = Residual().requires_grad_(False)
    model.blocks = nn.ModuleList(Adapter(block) for block in model.blocks)
    return model


def rows(num: int = 5) -> Tensor:
    return torch.randn(num, 6)


def images() -> Tensor:
    return torch.randn(5, 3, 8, 8)


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any], list[str]]] = {
    "u-net": (UNet, images, ["enc2", "dec2", "up1"]),
    "densenet": (Dense, rows, ["layers.1", "layers.3", "head"]),
    "inception": (Inception, images, ["mixes.1", "mixes.2.three", "mixes.3"]),
    "siamese": (Siamese, lambda: (rows(), rows()), ["encoder.2", "head", "head.3"]),
    "lstm, None": (Lstm, lambda: torch.randint(20, (5, 4)), ["lstm", "drop", "head"]),
    "dropout": (Residual, rows, ["blocks.1", "blocks.3", "norm"]),
    "regions": (Regions, rows, ["stem.2", "blocks.1", "blocks.3"]),
    "tables": (Tables, rows, ["blocks.2", "blocks.3", "head"]),
    "frozen first half": (frozen_first_half, rows, ["blocks.1", "blocks.3", "norm"]),
    "adapters": (with_adapters, rows, ["blocks.1", "blocks.3.layer", "norm"]),
}
