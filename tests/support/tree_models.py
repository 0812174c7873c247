"""Models in four stages whose boundaries carry more than one tensor: (layers, one a stage; what makes a mini-batch's x)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class Stage(nn.Module):
    """One value in, one value out; ``how`` says what to do with the layers."""

    def __init__(self, how: Callable[..., Any], **layers: nn.Module) -> None:
        super().__init__()
        self.how = how
        self.layers = nn.ModuleDict(layers)

    def forward(self, value: Any) -> Any:
        return self.how(value, **dict(self.layers.items()))


def linear(inputs: int = 6, outputs: int = 6) -> nn.Module:
    return nn.Linear(inputs, outputs)


def conv(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU())


def _siamese() -> list[nn.Module]:
    return [
        Stage(lambda v, f: (f(v[0]), f(v[1])), f=linear()),
        Stage(lambda v, drop: [drop(torch.tanh(v[0])), torch.tanh(v[1])], drop=nn.Dropout(0.2)),
        Stage(lambda v, f: {"apart": (f(v[0]) - v[1]).abs(), "both": (v[0] * v[1], None)}, f=linear()),
        Stage(lambda v, f: f(v["apart"] + v["both"][0]), f=linear(6, 3)),
    ]


def _unet() -> list[nn.Module]:
    down, up = nn.functional.max_pool2d, nn.functional.interpolate
    return [
        Stage(lambda v, f: f(v), f=conv(3, 4)),
        Stage(lambda v, f: (v, f(down(v, 2))), f=conv(4, 6)),
        Stage(lambda v, f, g: (v[0], g(torch.cat([f(down(v[1], 2)).repeat_interleave(2, 2).repeat_interleave(2, 3), v[1]], 1))),
              f=conv(6, 6), g=conv(12, 4)),
        Stage(lambda v, f: f(torch.cat([up(v[1], scale_factor=2.0), v[0]], 1).mean((2, 3))), f=linear(8, 3)),
    ]  # fmt: skip


def _masks() -> list[nn.Module]:
    def first(v: Any, embed: nn.Module, drop: nn.Module) -> Any:
        return {"h": drop(embed(v["ids"])), "mask": v["mask"], "scale": v["scale"], "nothing": None, "name": "first"}

    def mixed(v: Any, f: nn.Module) -> Any:
        return {**v, "h": v["h"] + v["scale"] * torch.tanh(f(v["h"]))}

    def last(v: Any, f: nn.Module) -> Tensor:
        weight = v["mask"].to(v["h"].dtype).unsqueeze(-1)
        out: Tensor = f((v["h"] * weight).sum(1) / weight.sum(1))
        return out

    return [
        Stage(first, embed=nn.Embedding(9, 6), drop=nn.Dropout(0.1)),
        Stage(mixed, f=linear()),
        Stage(mixed, f=linear()),
        Stage(last, f=linear(6, 3)),
    ]


def _float_masks() -> list[nn.Module]:
    """A mask and a number that travel beside the hidden values want no gradient back, and no stage computes them one."""

    def first(v: Any, f: nn.Module) -> Any:
        return {"mask": (v > 0).to(v.dtype), "h": f(v), "scale": v.new_tensor(0.5)}

    def masked(v: Any, f: nn.Module) -> Any:
        if torch.is_grad_enabled():
            assert [v[name].requires_grad for name in ("mask", "h", "scale")] == [False, True, False]
        return {**v, "h": torch.tanh(f(v["h"])) * v["mask"] * v["scale"]}

    return [
        Stage(first, f=linear()),
        Stage(masked, f=linear()),
        Stage(masked, f=linear()),
        Stage(lambda v, f, g: g(masked(v, f)["h"]), f=linear(), g=linear(6, 3)),
    ]


def _tokens() -> dict[str, Any]:
    mask = torch.rand(12, 5) < 0.7
    mask[:, 0] = True
    return {"ids": torch.randint(9, (12, 5)), "mask": mask, "scale": torch.tensor(0.5)}


def _frozen() -> list[nn.Module]:
    layers: list[nn.Module] = [
        Stage(lambda v, f: (f(v), v), f=linear()),
        Stage(lambda v, f: (torch.tanh(f(v[0])), v[1]), f=linear()),
        Stage(lambda v, f: (f(v[0]) + v[1], v[1].sum(1) > 0), f=linear()),
        Stage(lambda v, f: f(v[0] * v[1].unsqueeze(1)), f=linear(6, 3)),
    ]
    for layer in layers[:2]:
        layer.requires_grad_(False)
    return layers


def _adapters() -> list[nn.Module]:
    def adapted(v: Tensor, f: nn.Module, a: nn.Module, b: nn.Module) -> Tensor:
        out: Tensor = torch.tanh(f(v) + b(a(v)))
        return out

    layers: list[nn.Module] = [Stage(adapted, f=linear(), a=linear(6, 2), b=linear(2, 6)) for _ in range(2)]
    for layer in layers:
        layer.layers["f"].requires_grad_(False)  # type: ignore[union-attr,operator]
    middle = Stage(lambda v, f: torch.tanh(f(v)), f=linear())
    middle.requires_grad_(False)  # trains nothing, and hands gradients on
    return [*layers, middle, Stage(lambda v, f: f(v), f=linear(6, 3))]


def _dead_ends() -> list[nn.Module]:
    """Outputs without a gradient, one tensor twice, one that passes through, parameters that nothing uses."""
    return [
        Stage(lambda v, f, unused: (h := f(v), h, h.detach(), 7), f=linear(), unused=linear()),
        Stage(lambda v, f: (f(v[0]) + v[2], v[1], v[1].argmax(1), v[3]), f=linear()),
        Stage(lambda v, f: [torch.tanh(v[0]) * v[3] / 7, v[1].double(), f(v[1])], f=linear()),
        Stage(lambda v, f: f(v[0] + v[1].to(v[0].dtype)), f=linear(6, 3)),
    ]


def _in_place() -> list[nn.Module]:
    """Stages whose first operation writes one of their inputs."""
    return [
        Stage(lambda v, f: (f(v[0]), v[1]), f=linear()),
        Stage(lambda v, f: (v[0].relu_(), f(v[1])), f=linear()),
        Stage(lambda v, f: (f(v[0]), v[1].tanh_()), f=linear()),
        Stage(lambda v, f: f(v[0].mul_(0.5) + v[1]), f=linear(6, 3)),
    ]


def _sparse() -> list[nn.Module]:
    """Sparse: the samples, what is for all of them, and an output that has a gradient."""
    product = torch.sparse.mm
    return [
        Stage(lambda v, f: (product(v["x"], f.weight.t()), v["mix"]), f=linear()),
        Stage(lambda v, f: (torch.relu(f(v[0])).to_sparse(), v[1]), f=linear()),
        Stage(lambda v, f: (torch.tanh(product(v[0], f.weight.t())), v[1]), f=linear()),
        Stage(lambda v, f: f(product(v[1][0], v[0].t()).t()), f=linear(6, 3)),
    ]


def _sparse_alone() -> list[nn.Module]:
    return [
        Stage(lambda v, f: torch.relu(torch.sparse.mm(v, f.weight.t())).to_sparse(), f=linear()),
        Stage(lambda v: v * 0.5),
        Stage(lambda v, f: torch.tanh(torch.sparse.mm(v, f.weight.t())), f=linear()),
        Stage(lambda v, f: f(v), f=linear(6, 3)),
    ]


def _pair() -> tuple[Tensor, Tensor]:
    return torch.randn(12, 6), torch.randn(12, 6)


TREES: dict[str, tuple[Callable[[], list[nn.Module]], Callable[[], Any]]] = {
    "siamese": (_siamese, _pair),
    "u-net": (_unet, lambda: torch.randn(12, 3, 8, 8)),
    "masks": (_masks, _tokens),
    "float masks": (_float_masks, lambda: torch.randn(12, 6)),
    "frozen half": (_frozen, lambda: torch.randn(12, 6)),
    "adapters": (_adapters, lambda: torch.randn(12, 6)),
    "dead ends": (_dead_ends, lambda: torch.randn(12, 6)),
    "in place": (_in_place, _pair),
    "sparse": (
        _sparse,
        lambda: {"x": torch.randn(12, 6).relu().to_sparse(), "mix": torch.randn(1, 6, 6).relu().to_sparse()},
    ),
    "sparse alone": (_sparse_alone, lambda: torch.randn(12, 6).relu().to_sparse()),
}
