"""Losses that read what other stages hold."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

Batch = tuple[Any, Any]


class Router(nn.Module):
    """A layer that leaves a loss of its own in an attribute, and another in a buffer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, width)
        self.aux: Any = None
        self.register_buffer("load", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        gates = self.gate(x).softmax(-1)
        self.aux = (gates.mean(0) ** 2).sum()
        if self.training:
            self.load.copy_(self.aux.detach())
        return x * gates


def model_of(*, routed: int = 1) -> nn.Sequential:
    """Three stages of two layers; ``routed`` is the layer that routes."""
    torch.manual_seed(0)
    layers = [nn.Linear(6, 8), nn.Tanh(), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)]
    layers[routed] = Router(8)
    return nn.Sequential(*layers).double()


def batches_of(num: int = 4) -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(8, 6, generator=generator, dtype=torch.float64),
            torch.randint(3, (8,), generator=generator),
        )
        for _ in range(num)
    ]


def sgd(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def hooked(model: nn.Sequential) -> Any:
    features = {}
    model[2].register_forward_hook(lambda module, args, out: features.__setitem__("h", out))
    return lambda out, y: cross_entropy(out, y) + (features["h"] ** 2).mean()


REACHING: dict[str, tuple[Callable[[nn.Sequential], Any], str]] = {
    "penalty": (
        lambda model: lambda out, y: cross_entropy(out, y) + 1e-4 * sum((p**2).sum() for p in model.parameters()),
        "loss_fn reads 0.weight of stage 0 and is called at stage 2",
    ),
    "norm without a graph": (
        lambda model: lambda out, y: cross_entropy(out, y) + model[3].bias.detach().abs().sum(),
        "loss_fn reads 3.bias of stage 1",
    ),
    "penalty in place": (
        lambda model: lambda out, y: cross_entropy(out, y).add_(torch.stack([model[3].weight.norm()]).sum()),
        "loss_fn reads 3.weight of stage 1",
    ),
    "layer": (
        lambda model: lambda out, y: cross_entropy(out, y) + model[3](torch.ones(1, 8).double()).sum(),
        "loss_fn reads 3.weight of stage 1",
    ),
    "attribute": (
        lambda model: lambda out, y: cross_entropy(out, y) + model[1].aux,
        "loss_fn reads 1.aux of stage 0",
    ),
    "detached attribute": (
        lambda model: lambda out, y: cross_entropy(out, y) * (1 + model[1].aux.detach()),
        "loss_fn reads 1.aux of stage 0",
    ),
    "buffer": (
        lambda model: lambda out, y: cross_entropy(out, y) + model[1].load,
        "loss_fn reads 1.load of stage 0",
    ),
    "hooked feature": (hooked, r"loss_fn reads a tensor of shape \(\d, 8\) that stage 1 has computed"),
}
