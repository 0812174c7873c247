"""Small networks and data for the tests."""

from __future__ import annotations

import copy
import functools
import itertools
import os
from collections import OrderedDict
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import dtrp
from dtrp.splitting.stages import equal_cuts, into_stages
from dtrp.tensors.pytree import tensors_of

WIDTH = 5
DEVICE_VARIABLE = "DTRP_TEST_DEVICE"


def examples(number: int) -> int:
    """How many examples hypothesis draws: ``number`` in ``make test-full``, a sixth of them every time."""
    return number if os.environ.get("DTRP_TEST_FULL") else -(-number // 6)


def device_under_test() -> torch.device:
    """Where `pipeline` puts its stages: the CPU, but for the tests of a GPU."""
    return torch.device(os.environ.get(DEVICE_VARIABLE, "cpu"))


class Scale(nn.Module):
    """Keeps a buffer that is not BatchNorm's: the running mean of its input's size, which it does not read."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))
        self.weight = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.seen.mul_(0.9).add_(x.detach().abs().mean())
        return x * self.weight


def block(inputs: int, outputs: int) -> nn.Sequential:
    # No bias: BatchNorm takes it out again, and a gradient that is zero but for rounding compares with nothing.
    return nn.Sequential(nn.Linear(inputs, outputs, bias=False), nn.BatchNorm1d(outputs), nn.Tanh(), nn.Dropout(0.2))


def network(layers: int = 8) -> nn.Sequential:
    """Linear, BatchNorm, dropout and a buffer of its own; ``layers`` top-level layers."""
    named = OrderedDict((f"block{i}", block(WIDTH, WIDTH)) for i in range(layers - 1))
    if layers > 2:
        named["block1"] = nn.Sequential(Scale(), nn.Tanh())
    named["head"] = nn.Linear(WIDTH, 3)
    return nn.Sequential(named)


def minibatches(count: int, size: int = 32, last: int = 25, seed: int = 1) -> list[tuple[Tensor, Tensor]]:
    """Random mini-batches, the last one partial."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [size] * (count - 1) + [last]
    return [
        (
            torch.randn(n, WIDTH, generator=generator, dtype=torch.get_default_dtype()),
            torch.randint(3, (n,), generator=generator),
        )
        for n in sizes
    ]


def rate(n: int) -> float:
    """The learning rate of update n."""
    return 0.05 / (1 + n / 10)


def scheduler(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 1 / (1 + n / 10))


def sgd(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.05, momentum=0.9, weight_decay=0.01)


def adamw(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=0.05, weight_decay=0.01)


def plain_loop(
    model: nn.Sequential,
    batches: list[tuple[Tensor, Tensor]],
    make_optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
    rng: Callable[[int, int], AbstractContextManager[None]],
    *,
    cuts: list[int],
    num_microbatches: int = 1,
    after_update: Callable[[], None] | None = None,
) -> list[Tensor]:
    """The loop that a user would write without the library; dropout is drawn under ``rng``."""
    optimizer = make_optimizer(list(model.parameters()))
    schedule = scheduler(optimizer)
    bounds = [0, *cuts, len(model)]
    losses = []
    m = 0
    for x, y in batches:
        parts = min(num_microbatches, len(y))
        total = None
        for part, target in zip(cut(x, parts), torch.tensor_split(y, parts), strict=True):
            h = part
            for k, (start, end) in enumerate(itertools.pairwise(bounds)):
                with rng(k, m):
                    h = model[start:end](h)
            loss = nn.functional.cross_entropy(h, target) * (len(target) / len(y))
            loss.backward()
            total = loss.detach() if total is None else total + loss.detach()
            m += 1
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(total)
        if after_update is not None:
            after_update()
    return losses


def cut(x: Any, parts: int) -> list[Any]:
    """The parts of a mini-batch, which may be a tree."""
    if isinstance(x, Tensor) and x.layout is torch.sparse_coo:
        if len(x) == 1:
            return [x] * parts
        return [x.index_select(0, rows) for rows in torch.arange(len(x)).tensor_split(parts)]
    if isinstance(x, Tensor):
        return list(x.tensor_split(parts)) if x.dim() else [x] * parts
    if isinstance(x, dict):
        each = {key: cut(value, parts) for key, value in x.items()}
        return [{key: values[i] for key, values in each.items()} for i in range(parts)]
    if isinstance(x, tuple):
        return list(zip(*[cut(value, parts) for value in x], strict=True))
    return [x] * parts


def classifiers(stages: Any) -> list[nn.Module]:
    """Auxiliary networks of `network`'s stages, with BatchNorm and dropout."""
    return [nn.Sequential(block(WIDTH, WIDTH), nn.Linear(WIDTH, 3)) for _ in stages[:-1]]


class Mean(nn.Module):
    """An auxiliary network for outputs of any shape, trees too: each class has its share of a sample's mean."""

    def __init__(self, num_classes: int = 5) -> None:
        super().__init__()
        self.weight, self.bias = (
            nn.Parameter(torch.linspace(-1, 1, num_classes)),
            nn.Parameter(torch.zeros(num_classes)),
        )

    def forward(self, out: Any) -> Tensor:
        first = next(t for t in tensors_of(out) if t.is_floating_point())
        return first.flatten(1).mean(1, keepdim=True) * self.weight + self.bias


def means(stages: Any, num_classes: int = 5) -> list[nn.Module | None]:
    """A `Mean` for each stage but the last that has something to train."""
    trains = [any(p.requires_grad for p in stage.parameters()) for stage in stages]
    return [Mean(num_classes) if each else None for each in trains[:-1]]


def with_aux(method: Any, num_classes: int = 5) -> dict[str, Any]:
    """The ``aux`` option of a pipeline, if its method needs one."""
    row = dtrp.get_method(method) if isinstance(method, str) else method
    return {"aux": functools.partial(means, num_classes=num_classes)} if row.local else {}


def pipeline(model: Any, make_optimizer: Any = sgd, **options: Any) -> dtrp.Pipeline:
    if "aux" not in options:
        options.update(with_aux(options.get("method", "dtrp")))
    if "plan" not in options:
        options.setdefault("num_microbatches", 1)
    if DEVICE_VARIABLE in os.environ:
        options.setdefault("devices", device_under_test())
        options["timeout_s"] = max(60.0, options.get("timeout_s", 0.0))  # a device takes its time to wake up
    return dtrp.Pipeline(model, make_optimizer, nn.functional.cross_entropy, lr_scheduler=scheduler, seed=7, **options)


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    """The same tensors to the bit."""
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), f"{name}: {(a[name] - b[name]).abs().max()}"


def assert_close(a: dict[str, Tensor], b: dict[str, Tensor], bound: float = 1e-12) -> None:
    """max|a - b| <= bound max|b|, tensor by tensor."""
    assert a.keys() == b.keys()
    for name in a:
        difference, size = (a[name] - b[name]).abs().max(), b[name].abs().max()
        assert difference <= bound * size, f"{name}: {difference} against {size}"


def batches_of(make: Callable[[], Any]) -> list[tuple[Any, Tensor]]:
    """Eight mini-batches of twelve samples, and their classes."""
    return [(make(), torch.randint(3, (12,))) for _ in range(8)]


def check_trains_as_unsplit(
    model: nn.Sequential, batches: list[tuple[Any, Tensor]], *, method: str, num_microbatches: int
) -> tuple[dtrp.Pipeline, nn.Sequential]:
    """Four stages without delay are a plain loop, to the bit; the pipeline, and the model that the loop has trained."""
    plain = clone(model)
    pipe = pipeline(model, num_stages=4, method=method, num_microbatches=num_microbatches)
    losses = [pipe.step(x, y) for x, y in batches]
    want = plain_loop(plain, batches, sgd, pipe.rng, cuts=[1, 2, 3], num_microbatches=num_microbatches)
    assert all(torch.equal(a, b) for a, b in zip(losses, want, strict=True))
    assert_same(model.state_dict(), plain.state_dict())
    return pipe, plain


def clone(model: nn.Module) -> Any:
    return copy.deepcopy(model)


class Prophet:
    """Knows the weights of every version, from a run of backpropagation."""

    def __init__(self, history: list[list[list[Tensor]]]) -> None:
        self.history = history
        self.asked: list[tuple[int, int]] = []

    def __call__(self, parameters: Any, optimizer: Any, horizon: int, out: Any, **where: int) -> None:
        self.asked.append((where["stage"], where["microbatch"]))
        for o, w in zip(out, self.history[where["stage"]][where["version"] + horizon], strict=True):
            o.copy_(w)


def check_perfect_prediction(
    model: nn.Sequential,
    batches: list[tuple[Tensor, Tensor]],
    num_stages: int,
    *,
    num_microbatches: int,
    name: str = "dtrp",
) -> tuple[dtrp.Pipeline, Prophet]:
    """With the weights of a run of backpropagation for predictions, a method is that run, to the bit."""
    plain = clone(model)
    stages = into_stages(plain, num_stages)
    history: list[list[list[Tensor]]] = [[] for _ in stages]

    def record() -> None:
        for versions, stage in zip(history, stages, strict=True):
            versions.append([p.detach().clone() for p in stage.parameters() if p.requires_grad])

    record()
    prophet = Prophet(history)
    method = dtrp.get_method(name, predict=prophet)
    pipe = pipeline(model, num_stages=num_stages, method=method, num_microbatches=num_microbatches)
    cuts = equal_cuts(len(plain), num_stages)
    want = plain_loop(plain, batches, sgd, pipe.rng, cuts=cuts, num_microbatches=num_microbatches, after_update=record)
    losses = [pipe.step(x, y) for x, y in batches]
    pipe.flush()
    assert all(torch.equal(a, b) for a, b in zip(losses, want, strict=True))
    assert_same(pipe.model_state_dict(), plain.state_dict())
    return pipe, prophet


def saved_both_ways(pipe: dtrp.Pipeline, folder: Path) -> Path:
    """``folder``, with an exact and a portable checkpoint of a pipe that has made four steps, called by their kinds."""
    for x, y in minibatches(4):
        pipe.step(x, y)
    pipe.save(folder / "exact", extra={"epoch": 1})
    pipe.save(folder / "portable", portable=True, extra={"epoch": 1})
    return folder
