"""What a loss may depend on, and what an update that its loss does not allow comes to."""

from __future__ import annotations

import copy
import functools
import itertools
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import means
from launching import Server, run_ranks
from reaching_losses import REACHING, Batch, batches_of, model_of, sgd
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear, mse_loss

import dtrp
from dtrp.engine.base import Losses
from dtrp.stage.stash import MicroBatch

METHODS = ["bp", "gpipe", "ddg", "fr", "fdg", "dtrp", "spectrain"]


def refused(model: nn.Sequential, loss_fn: Any, why: str, **options: Any) -> None:
    """At the first mini-batch, and nothing has been trained then."""
    before = copy.deepcopy(model.state_dict())
    pipe = dtrp.Pipeline(model, sgd, loss_fn, num_stages=3, seed=0, **{"num_microbatches": 1, **options})
    with pytest.raises(dtrp.StageError, match=why):
        pipe.step(*batches_of(1)[0])
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items() if not name.endswith("load"))


# -- losses that reach other stages -----------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("case", REACHING)
def test_a_loss_that_reaches_another_stage(case: str, method: str) -> None:
    make, why = REACHING[case]
    model = model_of()
    refused(model, make(model), why, method=method, num_microbatches=1 + METHODS.index(method) % 2)


@pytest.mark.parametrize("options", [{"keep": "input"}, {"keep": "auto", "memory_limit_bytes": 10**9}])
def test_whatever_is_kept(options: dict[str, Any]) -> None:
    model = model_of()
    refused(
        model, REACHING["attribute"][0](model), REACHING["attribute"][1], method="gpipe", num_microbatches=3, **options
    )


def test_a_local_loss() -> None:
    """Of a stage with a loss of its own, which reads the weights of all."""
    model = model_of()
    why = "loss_fn reads 3.weight of stage 1 and is called at stage 0"
    loss_fn = REACHING["penalty in place"][0](model)
    refused(model, loss_fn, why, method="dgl", aux=functools.partial(means, num_classes=3))


class Reads(nn.Module):
    """A layer that reads something that it does not have for a submodule."""

    def __init__(self, read: Callable[[], Tensor]) -> None:
        super().__init__()
        self.read = read
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x + self.read()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("place", [2, 4])
@pytest.mark.parametrize(
    ("read", "why"),
    [
        (lambda model: model[1].aux, "reads 1.aux of stage 0"),
        (lambda model: linear(model[0].bias, model[0].weight.T).sum(), "reads 0.bias of stage 0"),
    ],
)
def test_a_module_that_reaches_another_stage(
    read: Callable[[nn.Sequential], Tensor], why: str, place: int, method: str
) -> None:
    model = model_of()
    model[place] = Reads(functools.partial(read, model)).double()
    refused(model, cross_entropy, f"stage {place // 2} {why}", method=method)


# -- what learns outside ----------------------------------------------------------------------------------------


class Learned(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.log_var = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, out: Tensor, y: Tensor) -> Tensor:
        return cross_entropy(out, y) * torch.exp(-self.log_var) + self.log_var

    def weighted(self, out: Tensor, y: Tensor, *, weight: float) -> Tensor:
        return weight * self(out, y)


def closure() -> Any:
    criterion = Learned()
    return lambda out, y: 2 * criterion(out, y)


def temperature() -> Any:
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    return lambda out, y: cross_entropy(out * scale, y)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: functools.partial(Learned().weighted, weight=2.0), "log_var of Learned"),
        (lambda: Learned().forward, "log_var of Learned"),
        (closure, "log_var of Learned"),
        (temperature, "scale"),
    ],
)
@pytest.mark.parametrize("num_stages", [1, 3])
def test_a_loss_that_would_learn(make: Any, name: str, num_stages: int) -> None:
    for method in ("bp", "dtrp"):
        model = model_of()
        pipe = dtrp.Pipeline(model, sgd, make(), num_stages=num_stages, method=method, num_microbatches=1)
        why = rf"loss_fn would train {name}, which no stage has .* freeze it \(requires_grad_\(False\)\)"
        with pytest.raises(dtrp.StageError, match=why):
            pipe.step(*batches_of(1)[0])


def test_a_mini_batch_that_requires_a_gradient() -> None:
    x, y = batches_of(1)[0]
    made = nn.Linear(6, 6).double()(x)
    for value in (x.clone().requires_grad_(), made, {"input": made}):
        pipe = dtrp.Pipeline(model_of(), sgd, cross_entropy, num_stages=3, num_microbatches=1)
        with pytest.raises(ValueError, match=r"x requires a gradient, .* pass x.detach\(\), or put what has made it"):
            pipe.step(value, y)
        pipe.step(x, y)
    target = torch.randn(8, 3).double().requires_grad_()
    with pytest.raises(ValueError, match=r"y requires a gradient, .* pass y.detach\(\), or put what has made it"):
        dtrp.Pipeline(model_of(), sgd, mse_loss, num_stages=3, num_microbatches=1).step(x, {"target": target})


def test_an_optimizer_of_the_loss_too() -> None:
    loss_fn = Learned()
    with pytest.raises(ValueError, match="holds others; use only those it is called with"):
        dtrp.Pipeline(
            model_of(), lambda params: sgd([*params, *loss_fn.parameters()]), loss_fn, num_stages=3, num_microbatches=1
        )


def penalty(model: nn.Sequential, criterion: Any) -> Any:
    return 1e-4 * model[0].weight.square().sum()


def learned(model: nn.Sequential, criterion: Any) -> Any:
    return 0.1 * criterion.log_var.sum()


@pytest.mark.parametrize(
    ("term", "name"), [(penalty, "loss_fn reads 0.weight of stage 0"), (learned, "would train log_var")]
)
@pytest.mark.parametrize("method", ["bp", "dtrp", "fdg"])
def test_a_loss_that_begins_to_reach_elsewhere(term: Any, name: str, method: str) -> None:
    """A term that is switched on after two mini-batches."""
    model, criterion = model_of(), Learned()
    on = [False]

    def loss_fn(out: Tensor, y: Tensor) -> Tensor:
        return cross_entropy(out, y) + (term(model, criterion) if on[0] else 0)

    pipe = dtrp.Pipeline(model, sgd, loss_fn, num_stages=3, method=method, num_microbatches=2)
    for x, y in batches_of(3):
        pipe.step(x, y)
    on[0] = True
    last = pipe.stages[-1].state_dict()
    before = {key: value.clone() for key, value in last.items()}
    with pytest.raises(dtrp.StageError, match=name):
        pipe.step(*batches_of(1)[0])
    assert all(torch.equal(before[key], value) for key, value in last.items())


class Prompted(nn.Module):
    """Reads what it has not registered: a parameter, or a network in a list, where a ``state_dict`` does not show it."""

    def __init__(self, kind: str, frozen: bool) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8).double()
        prompt = nn.Parameter(torch.ones(8).double())
        hidden = nn.Linear(8, 8).double()
        self.parts: Any = {"tuple": (prompt,), "list": [hidden], "closure": None}[kind]
        self.read = {
            "tuple": lambda x: x + self.parts[0],
            "list": lambda x: self.parts[0](x),
            "closure": lambda x: x * prompt,
        }[kind]
        if frozen:
            prompt.requires_grad_(False)
            hidden.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        place = x.detach().requires_grad_()  # nobody trains it
        return self.layer(self.read(x)) + place.square().mean()


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("tuple", "parts in 2.parts"),
        ("list", "weight of Linear in 2.parts"),
        ("closure", r"a parameter of shape \(8,\)"),
    ],
)
@pytest.mark.parametrize("method", ["bp", "dtrp", "dtr", "fdg"])
def test_a_module_that_would_learn_what_no_stage_has(kind: str, name: str, method: str) -> None:
    for frozen in (False, True):
        model = model_of()
        model.insert(2, Prompted(kind, frozen))
        pipe = dtrp.Pipeline(model, sgd, cross_entropy, cuts=[2, 4], method=method, num_microbatches=1)
        run = [*batches_of(4)]
        if frozen:
            for batch in run:
                pipe.step(*batch)
            pipe.flush()
            continue
        why = f"stage 1 reads {name}.*, which would be trained and no stage has: .* register it"
        with pytest.raises(dtrp.StageError, match=why):
            for batch in run:
                pipe.step(*batch)


def test_an_attribute_made_inside_vmap() -> None:
    class Mapped(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            out = super().forward(x)
            self.aux = torch.vmap(lambda row: row.square().sum())(out).mean()
            return out

    for method in ("bp", "dtrp"):
        model = model_of()
        model[0] = Mapped(6, 8).double()
        loss_fn = lambda out, y, model=model: cross_entropy(out, y) + model[0].aux  # noqa: E731
        refused(model, loss_fn, "loss_fn reads", method=method)


# -- what is right stays ------------------------------------------------------------------------------------------


class Distilled:
    """A frozen teacher in the loss, and one that is not frozen, without a graph."""

    def __init__(self, model: nn.Module) -> None:
        self.teacher, self.other = copy.deepcopy(model).requires_grad_(False), copy.deepcopy(model)
        self.x = torch.ones(1, 6).double()

    def __call__(self, out: Tensor, y: Tensor) -> Tensor:
        with torch.no_grad():
            other = self.other(self.x)
        return cross_entropy(out, y) + mse_loss(out, (self.teacher(self.x) + other).expand_as(out))


def logged(model: nn.Sequential) -> Any:
    """Looks at all weights and at an attribute, and does not let the loss depend on them."""
    seen: list[Any] = []

    def loss_fn(out: Tensor, y: Tensor) -> Tensor:
        seen.append(torch.stack([p.norm() for p in model.parameters()]).max().item())
        seen.append(torch.zeros_like(model[1].aux) if model[1].aux is not None else None)
        return cross_entropy(out, y) * torch.ones_like(model[0].bias).mean()

    return loss_fn


CLASS_WEIGHTS = torch.tensor([0.5, 1.0, 2.0]).double()
RIGHT: dict[str, Callable[[nn.Sequential], Any]] = {
    "class weights": lambda model: nn.CrossEntropyLoss(CLASS_WEIGHTS, label_smoothing=0.1).double(),
    "distilled": Distilled,
    "the last stage's weights": lambda model: (
        lambda out, y: cross_entropy(out, y) + 0.1 * sum((p**2).sum() for p in model[5].parameters())
    ),
    "logged": logged,
    "a frozen module that is the model's own": lambda model: (
        lambda out, y: cross_entropy(out, y) + model[3].requires_grad_(False).weight.sum()
    ),
}


def gradients(model: nn.Sequential, loss_fn: Any, batches: list[Batch], **options: Any) -> list[dict[str, Tensor]]:
    """Of each mini-batch, with weights that never move."""
    names = {id(p): name for name, p in model.named_parameters()}
    seen: list[dict[str, Tensor]] = [{} for _ in batches]

    def make(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        optimizer, count = torch.optim.SGD(parameters, lr=0.0), itertools.count()

        def look(*_: Any) -> None:
            seen[next(count)].update({names[id(p)]: p.grad.clone() for p in parameters if p.grad is not None})

        optimizer.register_step_pre_hook(look)
        return optimizer

    with dtrp.Pipeline(model, make, loss_fn, num_stages=3, seed=0, **{"num_microbatches": 1, **options}) as pipe:
        for x, y in batches:
            pipe.step(x, y)
    return seen


def plain(model: nn.Sequential, loss_fn: Any, batches: list[Batch]) -> list[dict[str, Tensor]]:
    result = []
    for x, y in batches:
        model.zero_grad()
        loss_fn(model(x), y).backward()
        result.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    return result


def assert_right(model: nn.Sequential, make: Any, batches: list[Batch], method: str, **options: Any) -> None:
    other = copy.deepcopy(model)
    wants = plain(other, make(other), batches)
    for got, want in zip(gradients(model, make(model), batches, method=method, **options), wants, strict=True):
        assert got.keys() == want.keys()
        for name, gradient in want.items():
            torch.testing.assert_close(got[name], gradient, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("case", RIGHT)
def test_losses_that_are_right(case: str, method: str) -> None:
    model = model_of()
    if "frozen" in case:
        model[3].requires_grad_(False)
    assert_right(model, RIGHT[case], batches_of(), method)


@pytest.mark.parametrize("method", METHODS)
def test_the_last_stages_attribute(method: str) -> None:
    assert_right(
        model_of(routed=4), lambda model: lambda o, y: cross_entropy(o, y) + model[4].aux, batches_of(), method
    )


@pytest.mark.parametrize("num_microbatches", [1, 3])
@pytest.mark.parametrize("method", ["bp", "gpipe", "dtrp"])
def test_the_input_is_the_target(method: str, num_microbatches: int) -> None:
    """Of an autoencoder; and of a next-token task, where one storage has both."""
    rows = torch.randn(8, 7).double()
    x, y = rows[:, :-1], rows[:, 1:]
    model = model_of()
    model[5] = nn.Linear(8, 6).double()
    for batches in ([(x, x)] * 3, [(x, {"next": y, "teacher": torch.ones(8, 6).double()})] * 3):
        loss_fn = (
            mse_loss if batches[0][1] is x else lambda out, y: mse_loss(out, y["next"]) + mse_loss(out, y["teacher"])
        )
        assert_right(
            copy.deepcopy(model), lambda _, loss_fn=loss_fn: loss_fn, batches, method, num_microbatches=num_microbatches
        )


class Shifted(nn.Module):
    """Adds a table that the first of its kind makes, and all read."""

    tables: dict[int, Tensor] = {}  # noqa: RUF012

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] not in self.tables:
            self.tables[x.shape[1]] = torch.arange(x.shape[1], device=x.device).to(x).expand_as(x[:1]) / 10
        table, _ = torch.broadcast_tensors(self.tables[x.shape[1]], x)
        return x + table


@pytest.mark.parametrize("method", METHODS)
def test_a_constant_that_stages_share(method: str) -> None:
    model = model_of()
    model[2], model[4] = Shifted(), Shifted()
    Shifted.tables.clear()
    assert_right(model, lambda model: cross_entropy, batches_of(), method)


# -- losses that are not finite ---------------------------------------------------------------------------------


class Hides(nn.Module):
    """Its output depends on its input, and the gradient of that is zero, whatever comes back."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return torch.where(x > 1e9, x * self.weight, x.detach())


def ignoring(batch: Batch, rows: slice) -> Batch:
    x, y = batch
    y = y.clone()
    y[rows] = -100
    return x, y


def constant(value: float, at: int) -> Any:
    """Adds it to the loss in the call of that number."""
    calls = itertools.count()
    return lambda out, y: cross_entropy(out, y) + (value if next(calls) == at else 0.0)


SPOILED: dict[str, tuple[int, Any, slice]] = {
    "all labels ignored": (1, cross_entropy, slice(None)),
    "in one micro-batch": (2, cross_entropy, slice(4, None)),
    "in the first micro-batch": (2, cross_entropy, slice(4)),
    "nan": (1, functools.partial(constant, math.nan, 1), slice(0)),
    "inf": (2, functools.partial(constant, math.inf, 3), slice(0)),
}


@pytest.mark.parametrize("hides", [False, True])
@pytest.mark.parametrize("case", SPOILED)
@pytest.mark.parametrize("method", METHODS)
def test_a_loss_that_is_not_finite_leaves_the_update_out(method: str, case: str, hides: bool) -> None:
    num_microbatches, loss_fn, rows = SPOILED[case]
    batches = batches_of(5)
    batches[1] = ignoring(batches[1], rows)
    model = model_of()
    if hides:
        model[2] = Hides().double()
    loss_fn = loss_fn() if isinstance(loss_fn, functools.partial) else loss_fn
    pipe = dtrp.Pipeline(
        model, functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.1), loss_fn, num_stages=3,
        method=method, num_microbatches=num_microbatches, on_nonfinite="skip",
    )  # fmt: skip
    moved = []
    for batch in batches:
        pipe.step(*batch)
        pipe.flush()
        moved.append([p.clone() for p in model.parameters()])
    assert pipe.skipped_updates() == {0: [1], 1: [1], 2: [1]}
    for before, after, later in zip(*moved[:3], strict=True):
        assert torch.equal(before, after)
        assert not torch.equal(after, later)


@pytest.mark.parametrize("method", ["dtrp", "fdg"])
def test_while_batches_are_in_flight_and_through_a_save(method: str, tmp_path: Path) -> None:
    batches = batches_of(7)
    batches[2] = ignoring(batches[2], slice(4))
    pipes = [
        dtrp.Pipeline(
            model_of(), sgd, cross_entropy, num_stages=3, method=method, num_microbatches=3, on_nonfinite="skip"
        )
        for _ in range(2)
    ]
    for batch in batches[:3]:
        pipes[0].step(*batch)
    pipes[0].save(tmp_path / "saved")
    pipes[1].load(tmp_path / "saved")
    for pipe in pipes:
        for batch in batches[3:]:
            pipe.step(*batch)
        pipe.flush()
        assert pipe.skipped_updates() == {0: [2], 1: [2], 2: [2]}
    a, b = (pipe.model_state_dict() for pipe in pipes)
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_local_losses() -> None:
    """The third call is stage 0's, of mini-batch 1: it alone leaves it out, or stops there."""
    options: dict[str, Any] = {"num_stages": 3, "method": "dgl", "aux": functools.partial(means, num_classes=3)}
    options["num_microbatches"] = 1
    pipe = dtrp.Pipeline(model_of(), sgd, constant(math.nan, 3), on_nonfinite="skip", **options)
    for batch in batches_of(3):
        pipe.step(*batch)
    assert pipe.skipped_updates() == {0: [1], 1: [], 2: []}
    pipe = dtrp.Pipeline(model_of(), sgd, constant(math.nan, 3), **options)
    first, second = batches_of(2)
    pipe.step(*first)
    before = [p.clone() for p in pipe.stages[0].parameters()]
    with pytest.raises(dtrp.StageError, match=r"stage 0, .* the loss of mini-batch 1 is nan") as stopped:
        pipe.step(*second)
    assert (stopped.value.stage, stopped.value.minibatch) == (0, 1)
    assert all(torch.equal(p, q) for p, q in zip(before, pipe.stages[0].parameters(), strict=True))


def test_a_loss_that_is_not_waited_for() -> None:
    """As on an accelerator: it is looked at when the next mini-batch comes."""
    losses = Losses(2, at_once=False)
    for stage, value in ((0, 1.0), (1, math.inf), (2, math.nan)):
        losses.watch(stage, MicroBatch(3, 1, 1.0), torch.tensor(value))
    with pytest.raises(dtrp.StageError, match=r"stage 1, .* the loss of mini-batch 1 is inf; .* \(stage 1\)"):
        losses.check()


@pytest.mark.parametrize("method", METHODS)
def test_stop_names_the_same(method: str) -> None:
    pipe = dtrp.Pipeline(model_of(), sgd, cross_entropy, num_stages=3, method=method, num_microbatches=1)
    first, second = batches_of(2)
    pipe.step(*first)
    with pytest.raises(dtrp.StageError, match="the loss of mini-batch 1 is nan"):
        pipe.step(*ignoring(second, slice(None)))


# -- on ranks -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


@pytest.mark.sampled(3)
@pytest.mark.parametrize(("case", "method"), [("penalty", "bp"), ("norm without a graph", "dtrp"), ("buffer", "dtrp")])
def test_on_ranks(case: str, method: str, server: Server, tmp_path: Path) -> None:
    run_ranks(server, tmp_path, 3, "refused_loss", case, method)
    for rank in range(3):
        assert REACHING[case][1] in json.loads((tmp_path / f"heard{rank}.json").read_text())


@pytest.mark.sampled(3)
@pytest.mark.parametrize("method", ["bp", "dtrp", "dgl"])
def test_replicas_leave_it_out_together(method: str, server: Server, tmp_path: Path) -> None:
    """The labels of one replica's micro-batch are ignored."""
    run_ranks(server, tmp_path, 4, "skips_with_replicas", method)
    for rank in range(4):
        assert json.loads((tmp_path / f"skipped{rank}.json").read_text()) == [2]
