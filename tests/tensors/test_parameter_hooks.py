"""What callers do to parameters: hooks on them, forwards that write them, and writing them between steps."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_same
from launching import Server, of_ranks, results_of_cases
from rank_programs import HOOKED, run_case
from stateful_models import (
    FLUSHING,
    KEEPING,
    RECOMPUTING,
    Stateful,
    batches,
    check_gradients,
    model_of,
    pipeline_gradients,
    plain_gradients,
    unchanged,
)
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import dtrp

ALL = [*FLUSHING, *KEEPING, *RECOMPUTING]
OTHER_KEEPS: list[Any] = [{"method": "dtrp", "keep": "graph"}, {"method": "pipedream", "keep": "input"}]
Calls = list[tuple[str, float]]


def plain() -> nn.Sequential:
    return model_of(lambda: nn.Linear(4, 5))


def hook(model: nn.Sequential, calls: Calls) -> None:
    """Hooks that mask, clamp, double and only look; two on one parameter."""
    first, second, third = model[0].weight, model[1][1].weight, model[2][1].weight

    def clamp(gradient: Tensor) -> Tensor:
        calls.append(("clamp", round(float(gradient.norm()), 9)))
        return gradient.clamp(-1e-2, 1e-2)

    def clamp_sum(p: Tensor) -> None:
        assert p is second
        assert p.grad is not None
        calls.append(("sum", round(float(p.grad.norm()), 9)))
        p.grad.clamp_(-5e-3, 5e-3)

    def halve(p: Tensor) -> None:
        assert p.grad is not None
        p.grad = p.grad / 2

    first.register_hook(clamp)
    first.register_hook(lambda gradient: gradient * torch.arange(5.0, dtype=torch.float64)[:, None])
    first.register_hook(lambda gradient: None)
    second.register_post_accumulate_grad_hook(clamp_sum)
    third.register_hook(lambda gradient: gradient * 3)
    third.register_post_accumulate_grad_hook(halve)
    model[3].bias.register_hook(lambda gradient: gradient * 2)


@pytest.mark.parametrize("num_microbatches", [1, 3])
@pytest.mark.parametrize("method", ALL)
def test_hooks_are_called_as_in_a_plain_loop(method: str, num_microbatches: int) -> None:
    model, want_calls = plain(), []
    hook(model, want_calls)
    want = plain_gradients(model, batches(), parts=num_microbatches)
    model, calls = plain(), []
    hook(model, calls)
    got = pipeline_gradients(model, batches(), num_stages=4, method=method, num_microbatches=num_microbatches)
    check_gradients(got, want)
    assert sorted(calls) == sorted(want_calls)
    assert all(len(p._post_accumulate_grad_hooks or {}) <= 1 for p in model.parameters()), "nothing is left on them"


@pytest.mark.parametrize("options", OTHER_KEEPS, ids=str)
def test_and_where_something_else_is_kept(options: Any) -> None:
    hook(model := plain(), [])
    want = plain_gradients(model, batches(), parts=2)
    hook(model := plain(), [])
    check_gradients(pipeline_gradients(model, batches(), num_stages=3, num_microbatches=2, **options), want)


@pytest.mark.parametrize("method", ["fdg", "dtrp", "bp"])
def test_hooks_come_and_go(method: str) -> None:
    model, handles, steps = plain(), [], iter(range(1, 100))

    def after() -> None:
        step = next(steps)
        if step == 3:
            handles.append(model[0].weight.register_hook(torch.zeros_like))
        elif step == 8:
            handles[0].remove()

    got = pipeline_gradients(model, batches(12), after=after, num_stages=2, method=method)
    zero = [not gradients["0.weight"].any() for gradients in got]  # type: ignore[union-attr]
    lead = {"fdg": 2, "dtrp": 2, "bp": 0}[method]
    assert zero == [3 <= b + lead < 8 for b in range(12)], "those of its time"


@pytest.mark.parametrize("method", ["fdg", "dtrp", "bp"])
def test_a_hook_that_makes_the_optimizers_step_is_refused(method: str) -> None:
    model = plain()
    optimizer = torch.optim.SGD([model[0].weight], lr=0.1)

    def step(p: Tensor) -> None:
        optimizer.step()
        p.grad = None

    model[0].weight.register_post_accumulate_grad_hook(step)
    match = r"stage 0, backward of micro-batch 0 .*a hook of 0.weight .* takes its gradient away.*pass that optimizer to Pipeline"
    with pytest.raises(dtrp.StageError, match=match):
        pipeline_gradients(model, batches(), num_stages=2, method=method)


@pytest.mark.parametrize("method", ["fdg", "bp"])
def test_a_hook_that_writes_the_parameter_is_refused(method: str) -> None:
    model = plain()

    @torch.no_grad()
    def decay(p: Tensor) -> None:
        p.mul_(0.9)

    model[1][1].weight.register_post_accumulate_grad_hook(decay)
    with pytest.raises(dtrp.StageError, match=r"backward .*a hook of 1\.1\.weight .*or writes the parameter"):
        pipeline_gradients(model, batches(), num_stages=2, method=method)


@pytest.mark.parametrize("method", ["fdg", "dtrp"])
def test_a_hook_that_fails(method: str) -> None:
    model = plain()
    model[0].weight.register_post_accumulate_grad_hook(lambda p: p.grad)
    with pytest.raises(dtrp.StageError, match=r"stage 0, backward of micro-batch 0 .*hooks should return None"):
        pipeline_gradients(model, batches(), num_stages=2, method=method)
    model = plain()
    model[0].weight.register_hook(lambda gradient: 1 // 0)
    with pytest.raises(dtrp.StageError, match=r"stage 0, backward of micro-batch 0 .*ZeroDivisionError"):
        pipeline_gradients(model, batches(), num_stages=2, method=method)


@pytest.mark.parametrize("method", ["bp", "fr", "fdg", "spectrain"])
def test_hooks_on_several_gradients(method: str) -> None:
    """torch asks the parameters themselves whether a backward will come to them."""
    model, calls = plain(), []
    register = torch.autograd.graph.register_multi_grad_hook
    register(list(model[0].parameters()), lambda _: calls.append("any"), mode="any")
    pipeline_gradients(model, batches(), num_stages=3, method=method)
    assert len(calls) == len(batches())
    register(list(model[0].parameters()), calls.append)
    if method in ("bp", "fr"):
        pipeline_gradients(model, batches(), num_stages=3, method=method)
        assert len(calls) == 3 * len(batches())
        return
    match = r"stage 0, backward of micro-batch 0 .*0\.weight has a hook on several gradients .*mode='any'"
    with pytest.raises(dtrp.StageError, match=match):
        pipeline_gradients(model, batches(), num_stages=3, method=method)


class Times(nn.Module):
    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.weight)


@pytest.mark.parametrize("method", FLUSHING)
@pytest.mark.parametrize("kind", ["register_hook", "register_post_accumulate_grad_hook"])
def test_a_hook_on_what_several_stages_hold_is_refused(kind: str, method: str) -> None:
    tied = nn.Parameter(torch.eye(4, dtype=torch.float64))
    getattr(tied, kind)(lambda _: None)
    stages = [Times(tied), nn.Sequential(nn.Linear(4, 4), nn.Tanh()).double(), Times(tied)]
    match = r"stage 2, backward .*2\.weight has a hook .*other stages hold it too"
    with pytest.raises(dtrp.StageError, match=match):
        pipeline_gradients(stages, batches(), method=method)
    twice = nn.Parameter(torch.eye(4, dtype=torch.float64))
    twice.register_hook(lambda gradient: gradient.clamp(-1e-3, 1e-3))
    model = nn.Sequential(nn.Sequential(Times(twice), Times(twice)), nn.Linear(4, 3).double())
    want = plain_gradients(model, batches())
    check_gradients(pipeline_gradients(model, batches(), num_stages=2, method=method), want)


@pytest.mark.full
@pytest.mark.sampled(2)
@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", HOOKED)
def test_hooks_on_ranks(server: Server, tmp_path: Path, name: str) -> None:
    ranks, want = of_ranks(results_of_cases(server, tmp_path, 3, "cases", [name])[name]), run_case(name)
    for result in ranks:
        assert_same(result["weights"], want["weights"])


# -- forwards that write weights ------------------------------------------------------------------------------------


class Looked(nn.Module):
    """An embedding whose norm is bounded."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 5, max_norm=0.8)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.embedding((x * 100).long().abs() % 10).mean(1)
        return out


class Bag(Looked):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.EmbeddingBag(10, 5, max_norm=0.8)  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.embedding((x * 100).long().abs() % 10)
        return out


class Functional(Looked):
    def forward(self, x: Tensor) -> Tensor:
        ids = (x * 100).long().abs() % 10
        return nn.functional.embedding(ids, self.embedding.weight, max_norm=0.5).sum(1)


class Clamped(Stateful):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.linear.weight.clamp_(-0.2, 0.2)
        out: Tensor = self.linear(x)
        return out


class ClampedData(Stateful):
    def forward(self, x: Tensor) -> Tensor:
        self.linear.weight.data.clamp_(-0.2, 0.2)
        out: Tensor = self.linear(x)
        return out


class AssignedData(Stateful):
    def forward(self, x: Tensor) -> Tensor:
        self.linear.weight.data = self.linear.weight.data.clamp(-0.2, 0.2)
        out: Tensor = self.linear(x)
        return out


class Decayed(Stateful):
    """What follows does not see it."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.linear.weight.mul_(0.9)
            self.linear.bias.mul_(0.9)
        return nn.functional.normalize(self.linear(x))


WRITING = [Looked, Bag, Functional, Clamped, ClampedData, AssignedData]


@pytest.mark.parametrize("method", [*FLUSHING, *RECOMPUTING])
@pytest.mark.parametrize("make", WRITING)
def test_a_forward_that_bounds_its_weights_is_right_at_the_weights_of_now(make: Any, method: str) -> None:
    plainly, model = model_of(make), model_of(make)
    check_gradients(
        pipeline_gradients(model, batches(), num_stages=3, method=method), plain_gradients(plainly, batches())
    )
    assert_same(model.state_dict(), plainly.state_dict())


@pytest.mark.parametrize("options", [*({"method": method} for method in KEEPING), *OTHER_KEEPS], ids=str)
@pytest.mark.parametrize("make", [*WRITING, Decayed])
def test_it_is_refused_where_it_would_write_a_copy(make: Any, options: Any) -> None:
    model = model_of(make)
    is_unchanged = unchanged(model)
    name = {"Looked": "0.embedding.weight", "Bag": "0.embedding.weight", "Functional": "0.embedding.weight",
            "ClampedData": "its parameters"}.get(make.__name__, r"0.linear.\w+")  # fmt: skip
    match = rf"stage 0, forward of micro-batch 0 .*writes {name} .*pass method='bp', or one that recomputes at the weights of now"
    with pytest.raises(dtrp.StageError, match=match):
        pipeline_gradients(model, batches(), num_stages=3, **options)
    assert is_unchanged()


class InList(Stateful):
    """What it reads is in no place where a copy could be."""

    def begin(self) -> Any:
        return [self.linear.weight]

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.state[0], self.linear.bias)


class InClosure(InList):
    def begin(self) -> Any:
        weight = self.linear.weight
        return [lambda: weight]

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.state[0](), self.linear.bias)


@pytest.mark.parametrize("options", [*({"method": method} for method in ALL), *OTHER_KEEPS], ids=str)
@pytest.mark.parametrize("make", [InList, InClosure])
def test_parameters_that_are_read_in_another_place(make: Any, options: Any) -> None:
    def model() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(make().double(), *plain()[1:])

    if options["method"] in [*FLUSHING, *RECOMPUTING] and "keep" not in options:
        check_gradients(
            pipeline_gradients(model(), batches(), num_stages=3, **options), plain_gradients(model(), batches())
        )
        return
    with pytest.raises(
        dtrp.StageError, match=r"stage 0, .* of micro-batch 0 .*reads 0\.linear\.weight not as an attribute"
    ):
        pipeline_gradients(model(), batches(), num_stages=3, **options)


@pytest.mark.parametrize("method", RECOMPUTING)
def test_a_repetition_must_not_write_weights_again(method: str) -> None:
    match = r"stage 0, forward of micro-batch 0 .*writes its parameters, and its repetition .*would write them again"
    with pytest.raises(dtrp.StageError, match=match):
        pipeline_gradients(model_of(Decayed), batches(), num_stages=3, method=method)


@pytest.mark.parametrize("method", ["fdg", "dtrp"])
def test_weights_that_the_first_input_makes(method: str) -> None:
    """As refused by a method that keeps graphs says: run the model once before."""

    class FromData(Stateful):
        def forward(self, x: Tensor) -> Tensor:
            if not self.state:
                self.state = 1
                with torch.no_grad():
                    self.linear.bias.copy_(x.mean() + torch.arange(5))
            out: Tensor = self.linear(x)
            return out

    if method == "fdg":
        with pytest.raises(dtrp.StageError, match="writes 0.linear.bias .*run the model once before"):
            pipeline_gradients(model_of(FromData), batches(), num_stages=3, method=method)
    model, plainly = model_of(FromData), model_of(FromData)
    if method == "fdg":
        model(batches()[0][0])
    want = plain_gradients(plainly, batches())
    check_gradients(pipeline_gradients(model, batches(), num_stages=3, method=method), want)


def test_a_copy_that_is_written_later_is_refused_then() -> None:
    class Later(Stateful):
        def forward(self, x: Tensor) -> Tensor:
            self.state += 1
            with torch.no_grad():
                self.linear.weight.mul_(0.9) if self.state == 5 else None
            out: Tensor = self.linear(x)
            return out

    with pytest.raises(dtrp.StageError, match="stage 0, forward of micro-batch 4 .*writes 0.linear.weight"):
        pipeline_gradients(model_of(Later), batches(), num_stages=3, method="fdg")


# -- weights that are written between steps -----------------------------------------------------------------------


@torch.no_grad()
def scale(model: nn.Module) -> None:
    for p in model.parameters():
        p.mul_(0.9)


def clip(model: nn.Module) -> None:
    for p in model.parameters():
        p.data.clamp_(-0.3, 0.3)
        p.data.mul_(0.9)


def replace(model: nn.Module) -> None:
    for p in model.parameters():
        p.data = p.data * 0.9


def load(model: nn.Module) -> None:
    model.load_state_dict({name: t * 0.9 for name, t in model.state_dict().items()})


@pytest.mark.sampled(4)
@pytest.mark.parametrize("num_microbatches", [1, 2, 4])
@pytest.mark.parametrize("write", [scale, clip, replace, load])
@pytest.mark.parametrize("method", [*FLUSHING, *KEEPING])
def test_weights_written_between_steps_are_read_by_the_next_forward(
    method: str, write: Callable[[nn.Module], None], num_microbatches: int
) -> None:
    """And what is in flight stays as it was read."""
    plainly, model = plain(), plain()
    want = plain_gradients(plainly, batches(), parts=num_microbatches, after=lambda: write(plainly))
    got = pipeline_gradients(
        model, batches(), after=lambda: write(model), num_stages=4, method=method, num_microbatches=num_microbatches
    )
    check_gradients(got, want)


@pytest.mark.parametrize("write", [scale, clip])
def test_and_where_inputs_are_kept_for_the_weights_of_then(write: Callable[[nn.Module], None]) -> None:
    plainly, model = plain(), plain()
    want = plain_gradients(plainly, batches(), after=lambda: write(plainly))
    options: dict[str, Any] = {"method": "pipedream", "keep": "input", "num_stages": 4}
    check_gradients(pipeline_gradients(model, batches(), after=lambda: write(model), **options), want)


def test_copies_are_shared_while_nobody_writes_the_weights() -> None:
    pipe = dtrp.Pipeline(
        plain(), lambda p: torch.optim.SGD(p, lr=0.1), cross_entropy, num_stages=4, method="fdg", num_microbatches=1
    )
    for x, y in batches()[:4]:
        pipe.step(x, y)
    first = pipe._engine.stages[0]
    assert len({id(held.weights) for held in first.stash}) == 1
    scale(first.module)
    pipe.step(*batches()[4])
    assert len({id(held.weights) for held in first.stash}) == 2


def test_parameters_that_are_replaced_are_refused() -> None:
    pipe = dtrp.Pipeline(
        model := plain(), lambda p: torch.optim.SGD(p, lr=0.1), cross_entropy, num_stages=2, num_microbatches=1
    )
    pipe.step(*batches()[0])
    model.load_state_dict(plain().state_dict(), assign=True)
    match = re.escape("0.weight is another tensor than when the pipeline was made")
    with pytest.raises(RuntimeError, match=match):
        pipe.step(*batches()[1])
