"""What weighs a graph changes nothing else: graphs are freed, written tensors are noticed, and values stay to the bit."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import dtrp
from dtrp.measure.graph_size import weigh_graph
from dtrp.planning.profile import Profiler

WIDTH = 6


def sgd(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.05, momentum=0.9)


# -- graphs are freed -----------------------------------------------------------------------------------


class Fork(nn.Module):
    """Two outputs, both saved by the operations that make them."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Any) -> tuple[Tensor, Tensor]:
        h = self.layer(x[0] if isinstance(x, tuple) else x)
        return torch.relu(h), torch.relu(-h)


class Join(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 4)

    def forward(self, x: Any) -> Tensor:
        return self.layer(x[0] + x[1])


def wide() -> list[nn.Module]:
    return [*(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.ReLU()) for _ in range(2)), nn.Linear(8, 4)]


def forked() -> list[nn.Module]:
    return [Fork(), Fork(), Join()]


def resident_mb() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e6


KINDS = [
    *({"method": name} for name in dtrp.list_methods() if not dtrp.get_method(name).local),
    {"method": "dtrp", "keep": "auto", "memory_limit_bytes": 10**9},
]


@pytest.mark.full
@pytest.mark.sampled(4)
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("flushes", [True, False])
@pytest.mark.parametrize("modules", [wide, forked])
def test_graphs_that_are_weighed_are_freed(modules: Callable[[], list[nn.Module]], flushes: bool) -> None:
    x, y = torch.randn(80_000, 8), torch.randn(80_000, 4)

    def run(kind: dict[str, Any]) -> None:
        pipe = dtrp.Pipeline(modules(), sgd, nn.functional.mse_loss, num_microbatches=1, **kind)
        for _ in range(2):
            pipe.step(x, y)
        if flushes:
            pipe.flush()
        pipe.close()

    for kind in KINDS:
        run(kind)
        before = resident_mb()
        for _ in range(10):
            run(kind)
        assert resident_mb() - before < 100, kind  # ten runs that free nothing: 200 and more


def test_a_profile_frees_what_it_weighs() -> None:
    layer = nn.Sequential(nn.Linear(4, 4), nn.Sigmoid())
    out, sizes = weigh_graph(lambda: layer(torch.ones(3, 4)), layer)
    node = out.grad_fn
    del out
    assert node is not None
    freed: list[int] = []
    node.metadata["canary"] = type("Canary", (), {"__del__": lambda self: freed.append(1)})()
    del node
    assert freed == [1]
    assert sizes is not None
    assert sorted(sizes.values()) == [48, 48]  # the input, and what the sigmoid has made


# -- a tensor that is written after it was saved ----------------------------------------------------------


class Overwrites(nn.Module):
    """Writes what its operation has saved: its result, or what it was given; when the batch is at least so large."""

    def __init__(self, how: str, at_least: int = 0) -> None:
        super().__init__()
        self.layer, self.how, self.at_least = nn.Linear(WIDTH, WIDTH), how, at_least

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(x)
        out = torch.exp(h) if self.how == "result" else h * h
        if len(x) >= self.at_least:
            (out if self.how == "result" else h).mul_(0.5)
        return out


@pytest.mark.parametrize("how", ["result", "given"])
@pytest.mark.parametrize("name", [name for name in dtrp.list_methods() if not dtrp.get_method(name).local])
def test_a_saved_tensor_that_is_overwritten_is_refused_at_the_first_minibatch(name: str, how: str) -> None:
    for place in (0, 1, 2):
        modules: list[nn.Module] = [nn.Linear(WIDTH, WIDTH) for _ in range(3)]
        modules[place] = Overwrites(how)
        before = copy.deepcopy(modules[place].state_dict())
        pipe = dtrp.Pipeline(modules, sgd, nn.functional.cross_entropy, method=name, num_microbatches=1)
        x, y = torch.randn(4, WIDTH), torch.randint(WIDTH, (4,))
        with pytest.raises(
            dtrp.StageError, match=f"stage {place}, backward .* has been modified by an inplace operation"
        ):
            for _ in range(9):
                pipe.step(x, y)
        assert all(torch.equal(before[key], value) for key, value in modules[place].state_dict().items())


@pytest.mark.parametrize("name", ["bp", "fdg", "dtrp"])
def test_so_it_is_at_an_input_of_a_new_shape(name: str) -> None:
    modules = [Overwrites("result", at_least=6), nn.Linear(WIDTH, WIDTH)]
    pipe = dtrp.Pipeline(modules, sgd, nn.functional.cross_entropy, method=name, num_microbatches=1)
    for samples in (4, 5, 5):
        pipe.step(torch.randn(samples, WIDTH), torch.randint(WIDTH, (samples,)))
    with pytest.raises(dtrp.StageError, match=r"inplace operation: \[torch.FloatTensor \[6, 6\]\] is at version 1"):
        for _ in range(4):
            pipe.step(torch.randn(6, WIDTH), torch.randint(WIDTH, (6,)))


# -- what hooks must not change ----------------------------------------------------------------------------


class Forces(nn.Module):
    """The gradient of an energy, by torch.func, whose transforms refuse hooks; BatchNorm before it moves its buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.layer = nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return torch.func.grad(lambda h: torch.tanh(self.layer(h)).sum())(self.norm(x))


class Penalty(nn.Module):
    """Differentiates a graph inside its forward, and that again."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x if x.requires_grad else x.detach().requires_grad_()
            energy = torch.exp(torch.tanh(self.layer(x))).sum()
            (force,) = torch.autograd.grad(energy, x, create_graph=True)
        return force


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.layer, self.reentrant = nn.Linear(WIDTH, WIDTH), reentrant

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(checkpoint(lambda h: torch.exp(self.layer(h)), x, use_reentrant=self.reentrant))


class Sparse(nn.Module):
    """Saves a sparse tensor, of either layout."""

    def __init__(self, layout: torch.layout) -> None:
        super().__init__()
        self.layer, self.layout = nn.Linear(WIDTH, WIDTH), layout

    def forward(self, x: Tensor) -> Tensor:
        return torch.sparse.mm(torch.eye(len(x)).to_sparse(layout=self.layout), torch.exp(self.layer(x)))


class Ragged(nn.Module):
    """Saves a tensor of a subclass."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        ragged = torch.nested.as_nested_tensor(list(x.split([1, len(x) - 1])), layout=torch.jagged)
        return torch.sigmoid(self.layer(ragged)).values()


class Twisted(nn.Module):
    """An operation in place on a view, which autograd allows, that saves what it has written."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, 2 * WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(x)
        h[:, :WIDTH].exp_()
        return h[:, :WIDTH] + h[:, WIDTH:]


@pytest.mark.parametrize("method", ["bp", "dtrp"])
@pytest.mark.parametrize(
    "make",
    [
        Forces,
        Penalty,
        lambda: Checkpointed(True),
        lambda: Checkpointed(False),
        lambda: Sparse(torch.sparse_coo),
        lambda: Sparse(torch.sparse_csr),
        Ragged,
        Twisted,
    ],
    ids=["func", "autograd.grad", "reentrant", "checkpoint", "coo", "csr", "ragged", "views"],
)
@pytest.mark.filterwarnings("ignore:Sparse", "ignore:The PyTorch API of nested tensors")
def test_the_first_minibatch_equals_a_plain_loop(make: Callable[[], nn.Module], method: str) -> None:
    stages = [nn.Sequential(make(), nn.Linear(WIDTH, WIDTH)) for _ in range(2)]  # copies of buffers, and the buffers
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), *stages)
    plain = copy.deepcopy(model)
    optimizer = sgd(list(plain.parameters()))
    pipe = dtrp.Pipeline(
        model, sgd, nn.functional.cross_entropy, num_stages=3, method=method, keep="graph", num_microbatches=1
    )
    for samples in (4, 4, 5):  # a new shape too
        x, y = torch.randn(samples, WIDTH), torch.randint(WIDTH, (samples,))
        nn.functional.cross_entropy(plain(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        pipe.step(x, y)
        pipe.flush()
        for (name, value), (_, other) in zip(model.state_dict().items(), plain.state_dict().items(), strict=True):
            assert torch.equal(value, other), name


@pytest.mark.parametrize("around", ["hooks", "mutation"])
def test_the_callers_hooks_stay_in_charge(around: str) -> None:
    """Hooks around step() see what is saved, in the first mini-batch too."""
    packed: list[tuple[int, ...]] = []

    def pack(t: Tensor) -> Tensor:
        packed.append(tuple(t.shape))
        return t.detach().clone()

    model = [nn.Linear(WIDTH, WIDTH), nn.Sequential(Overwrites("given"), nn.Linear(WIDTH, 3))]
    pipe = dtrp.Pipeline(model, sgd, nn.functional.cross_entropy, method="bp", num_microbatches=1)
    x, y = torch.randn(4, WIDTH), torch.randint(3, (4,))
    before = model[0].weight.detach().clone()
    graph = torch.autograd.graph
    region = (
        graph.saved_tensors_hooks(pack, lambda t: t) if around == "hooks" else graph.allow_mutation_on_saved_tensors()
    )
    with region:
        pipe.step(x, y)
    assert not torch.equal(model[0].weight, before)
    assert packed.count((4, WIDTH)) >= 4 if around == "hooks" else not packed
    assert pipe.memory()[0]["stash_peak"] == x.nbytes  # nobody could look


@pytest.mark.parametrize("hooked", [True, False])
def test_what_cannot_be_weighed_is_no_ground_to_decide_by(hooked: bool) -> None:
    model = [nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)] if hooked else [Forces(), nn.Linear(WIDTH, WIDTH)]
    pipe = dtrp.Pipeline(model, sgd, nn.functional.mse_loss, keep="auto", memory_limit_bytes=10**9, num_microbatches=1)
    x = torch.randn(4, WIDTH)
    region = torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach(), lambda t: t) if hooked else nullcontext()
    with (
        region,
        pytest.raises(dtrp.StageError, match="keep='auto' at stage 0: its graph cannot be weighed: .*pass keep="),
    ):
        pipe.step(x, x)


def test_nor_to_plan_by() -> None:
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), Forces())
    x = torch.randn(4, WIDTH)
    with pytest.raises(
        dtrp.PlanError, match="layer 1: its graph cannot be weighed: .*make the Pipeline without a plan"
    ):
        Profiler(model, (x, x), nn.functional.mse_loss).at(4)
