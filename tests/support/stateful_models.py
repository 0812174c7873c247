"""Modules that a repeated forward does not give again what it gave, and the oracle that tells when a gradient is wrong.

With a learning rate of 0 the weights never move, so that by every method each mini-batch's gradient is a plain loop's.
"""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import dtrp

Gradients = list[dict[str, Tensor | None]]
RECOMPUTING = ["fr", "dtr", "dtrp", "dtrp-1f1b"]
KEEPING = ["ddg", "pipedream", "fdg", "adl", "spectrain"]
FLUSHING = ["bp", "gpipe"]


class Stateful(nn.Module):
    """A layer with something to remember."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 5)
        self.state: Any = self.begin()

    def begin(self) -> Any:
        return 0


class Counter(Stateful):
    def forward(self, x: Tensor) -> Tensor:
        self.state += 1
        return self.linear(x) / (1 + 0.1 * self.state)


class Toggle(Stateful):
    """After an even number of forwards it is as it was."""

    def forward(self, x: Tensor) -> Tensor:
        self.state = 1 - self.state
        return self.linear(x) * (1 + self.state)


class ToggleInList(Toggle):
    def begin(self) -> Any:
        return [0]

    def forward(self, x: Tensor) -> Tensor:
        self.state[0] = 1 - self.state[0]
        return self.linear(x) * (1 + self.state[0])


class Annealed(Stateful):
    """Slowly: two forwards differ by a part of 3e-5."""

    def forward(self, x: Tensor) -> Tensor:
        self.state += 1
        return self.linear(x) * math.exp(3e-5 * self.state)


class ToggleInObject(Toggle):
    """A setting deep in plain objects."""

    def begin(self) -> Any:
        return [SimpleNamespace(inner={"flags": [SimpleNamespace(on=0)]})]

    def forward(self, x: Tensor) -> Tensor:
        flag = self.state[0].inner["flags"][0]
        flag.on = 1 - flag.on
        return self.linear(x) * (1 + flag.on)


class Recurrent(nn.Module):
    """Backpropagation through time, truncated between mini-batches."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.hidden = nn.RNNCell(4, 5), None

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.cell(x, self.hidden)
        self.hidden = hidden.detach()
        return hidden


class Bank(Stateful):
    """What it has seen so far, which no attribute shows."""

    def begin(self) -> Any:
        seen: list[Tensor] = []
        return lambda h: seen.append(h) or torch.stack(seen).mean(0)

    def forward(self, x: Tensor) -> Tensor:
        h = self.linear(x)
        return h + self.state(h.detach().mean(0))


class InPlace(Stateful):
    def begin(self) -> Any:
        return torch.zeros(5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.linear(x)
        return h + self.state.add_(h.detach().mean(0)).clone()


class SameRoom(Counter):
    """Gives the same memory every time."""

    def begin(self) -> Any:
        self.room = torch.zeros(4, 5, dtype=torch.float64)
        return 0

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        return out if torch.is_grad_enabled() else self.room.copy_(out)


class OwnGenerator(Stateful):
    """Seldom drawn from: two forwards mostly agree."""

    def begin(self) -> Any:
        return torch.Generator().manual_seed(3)

    def draw(self) -> float:
        return float(torch.rand((), generator=self.state))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * (1 if self.draw() < 0.9 else 0.5)


class GeneratorInList(OwnGenerator):
    def begin(self) -> Any:
        return [torch.Generator().manual_seed(3)]

    def draw(self) -> float:
        return float(torch.rand((), generator=self.state[0]))


class NumPyInDict(OwnGenerator):
    def begin(self) -> Any:
        return {"drop": np.random.default_rng(3)}

    def draw(self) -> float:
        return float(self.state["drop"].random())


class OfPython(OwnGenerator):
    def draw(self) -> float:
        return random.random()


class OfNumPy(OwnGenerator):
    def draw(self) -> float:
        return np.random.rand()


class OwnPython(OwnGenerator):
    def begin(self) -> Any:
        return random.Random(3)

    def draw(self) -> float:
        return float(self.state.random())


class OwnNumPy(OwnPython):
    def begin(self) -> Any:
        return np.random.default_rng(3)


class OldNumPy(OwnNumPy):
    def begin(self) -> Any:
        return np.random.RandomState(3)

    def draw(self) -> float:
        return float(self.state.rand())


class WithoutGradients(Stateful):
    """Another output where gradients are off."""

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * (1.0 if torch.is_grad_enabled() else 0.5)


class RequiresGradient(Counter):
    """Another output where its own has none; and a counter that it does not read."""

    def forward(self, x: Tensor) -> Tensor:
        self.state += 1
        h: Tensor = self.linear(x)
        return h if h.requires_grad else 0.5 * h


class Forces(nn.Module):
    """The gradient of an energy by the input."""

    def __init__(self) -> None:
        super().__init__()
        self.energy = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = x if x.requires_grad else x.detach().requires_grad_()
        (force,) = torch.autograd.grad(self.energy(x).sum(), x, create_graph=True)
        out: Tensor = self.head(force)
        return out


class ReadsNode(Stateful):
    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.linear(x)
        h.grad_fn.metadata["layer"] = 0  # type: ignore[union-attr]
        return h


class Raises(Stateful):
    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.linear(x)
        if not h.requires_grad:
            raise ValueError("train me")
        return h


class Asserts(Stateful):
    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.linear(x)
        assert h.requires_grad
        return h


def model_of(front: Callable[[], nn.Module]) -> nn.Sequential:
    """Four stages of a layer each, or fewer of more, in float64."""
    torch.manual_seed(0)
    return nn.Sequential(
        front(), nn.Sequential(nn.Tanh(), nn.Linear(5, 5)), nn.Sequential(nn.Tanh(), nn.Linear(5, 5)), nn.Linear(5, 3)
    ).double()


def batches(count: int = 7, size: int = 8) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    draw = [torch.randn(size, 4, generator=generator, dtype=torch.float64) for _ in range(count)]
    return [(x, torch.randint(3, (size,), generator=generator)) for x in draw]


def nothing() -> None: ...


def plain_gradients(
    model: nn.Module,
    data: Sequence[Any],
    loss_fn: Any = cross_entropy,
    parts: int = 1,
    after: Callable[[], None] = nothing,
) -> Gradients:
    """Of each mini-batch, by a plain loop over its parts."""
    result: Gradients = []
    for x, y in data:
        model.zero_grad()
        xs = [x] if parts == 1 else x.tensor_split(parts)
        for part, target in zip(xs, y.tensor_split(parts), strict=True):
            (loss_fn(model(part), target) * (len(target) / len(y))).backward()
        result.append({name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()})
        after()
    model.zero_grad()
    return result


def pipeline_gradients(
    model: Any, data: Sequence[Any], loss_fn: Any = cross_entropy, after: Callable[[], None] = nothing, **options: Any
) -> Gradients:
    """Of each mini-batch, as the optimizers of a pipeline see them."""
    seen: dict[int, dict[int, Tensor | None]] = {}

    def make_optimizer(params: list[nn.Parameter]) -> torch.optim.Optimizer:
        optimizer, updates = torch.optim.SGD(params, lr=0.0), iter(range(1000))

        def look(*_: Any) -> None:
            here = seen.setdefault(next(updates), {})
            here.update({id(p): None if p.grad is None else p.grad.clone() for p in params})

        optimizer.register_step_pre_hook(look)
        return optimizer

    pipe = dtrp.Pipeline(model, make_optimizer, loss_fn, seed=0, **{"num_microbatches": 1, **options})
    names = {id(p): name for stage in pipe.stages for name, p in stage.named_parameters()}
    for x, y in data:
        pipe.step(x, y)
        after()
    pipe.flush()
    assert all(p.grad is None for stage in pipe.stages for p in stage.parameters())
    return [{names[key]: gradient for key, gradient in seen[b].items()} for b in sorted(seen)]


def check_gradients(got: Gradients, want: Gradients, bound: float = 1e-13) -> None:
    assert len(got) == len(want)
    for b, (a, w) in enumerate(zip(got, want, strict=True)):
        assert a.keys() == w.keys()
        for name in w:
            mine, theirs = a[name], w[name]
            assert (mine is None) == (theirs is None), (b, name)
            if mine is not None and theirs is not None:
                assert (mine - theirs).abs().max() <= bound, (b, name)


def reseed() -> None:
    random.seed(5)
    np.random.seed(5)


def unchanged(model: nn.Module) -> Callable[[], bool]:
    """Whether the model's weights are those of now."""
    before = copy.deepcopy(model.state_dict())
    return lambda: all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
