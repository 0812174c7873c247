"""Models with `torch.autograd.Function`s: the stages apply them, backward and all."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import with_aux
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from unsplit import (
    SEED,
    assert_trained_alike,
    chain,
    check_recomputed_under_autocast,
    loss_fn,
    minibatches,
    sgd,
    train_plain,
)

import dtrp


class Gelu(torch.autograd.Function):
    """As BLOOM's: a backward by hand, of saved tensors. It is twice what autograd would compute, to be seen."""

    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu")
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * 0.5 * (1.0 + torch.tanh(0.79788456 * x * (1 + 0.044715 * x * x)))

    @staticmethod
    @torch.amp.custom_bwd(device_type="cpu")
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        t = torch.tanh(0.79788456 * x * (1 + 0.044715 * x * x))
        return 2 * grad * (0.5 * x * ((1 - t * t) * (0.79788456 + 0.1070322243 * x * x)) + 0.5 * (1 + t))


class Scaled(torch.autograd.Function):
    """Arguments that are no tensors, a shape among them, and no gradient for some; set up apart."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, factor: float, how: dict[str, Any], shape: Any) -> Tensor:
        return (x @ weight * factor).reshape(shape) + how["shift"]

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs[:2])
        ctx.factor = inputs[2]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad = grad.to(weight.dtype)
        return (3 * grad @ weight.T).to(x.dtype), x.to(weight.dtype).T @ grad * ctx.factor, None, None, None


class Halves(torch.autograd.Function):
    """Two outputs of a tensor, a number between them, and a mask that no gradient flows to."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mask: Tensor) -> tuple[Tensor, int, Tensor]:
        ctx.save_for_backward(mask)
        a, b = (x * mask).chunk(2, -1)
        return a.clone(), 2, b.clone()

    @staticmethod
    def backward(ctx: Any, a: Tensor, _: Any, b: Tensor) -> tuple[Tensor, None]:
        (mask,) = ctx.saved_tensors
        return torch.cat([a, -b], -1) * mask, None


gelu = Gelu.apply  # as many have it


class Net(nn.Module):
    """A Function of each kind; a stage may begin between the two outputs of one and their use."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.weight, self.head = nn.Parameter(torch.randn(8, 8) / 3), nn.Linear(4, 3)
        self.drop = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        h = Gelu.apply(self.first(x))
        h = gelu(self.second(h)) + h
        a, two, b = Halves.apply(self.drop(h), (h.detach() > 0) * 1.0)
        h = self.third(torch.cat([b, a], -1))
        h = Scaled.apply(h, self.weight, 0.5, {"shift": 0.1, "name": "x"}, h.shape)
        a, b = checkpoint(lambda h: h.chunk(2, -1), h, use_reentrant=False)
        return self.head(a * two + b)


def rows(num: int = 5) -> Tensor:
    return torch.randn(num, 6)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(("num_stages", "num_microbatches"), [(2, 2), (4, 1)])
def test_they_train_as_the_model(num_stages: int, num_microbatches: int) -> None:
    model, x = Net(), rows()
    plain = copy.deepcopy(model)
    stages = dtrp.split(model, num_stages=num_stages, example=x)
    for training in (True, False):
        for module in (*stages, plain):
            module.train(training)
        torch.manual_seed(3)
        got = chain(stages, x)
        torch.manual_seed(3)
        want = plain(x)
        assert torch.equal(got, want)
        ours, theirs = (
            torch.autograd.grad(out.square().sum(), list(m.parameters())) for out, m in ((got, model), (want, plain))
        )
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    plain.train(), model.train()
    data = minibatches(x, 3)
    for stage in stages:
        stage.train()
    pipe = dtrp.Pipeline(stages, sgd, loss_fn, method="bp", num_microbatches=num_microbatches, seed=SEED)
    losses = [pipe.step(*batch) for batch in data]
    assert_trained_alike(model, plain, losses, train_plain(plain, stages.points, data, num_microbatches))


@pytest.mark.sampled(4)
@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("method", dtrp.list_methods())
def test_every_method_computes_their_backward(method: str) -> None:
    """Every stage but the last is frozen but for one tensor; with one mini-batch in flight the update is the plain one."""
    model = Net().eval()
    plain = copy.deepcopy(model)
    stages = dtrp.split(model, num_stages=2, example=rows())
    aux = with_aux(method, num_classes=3)
    pipe = dtrp.Pipeline(stages, sgd, loss_fn, method=method, num_microbatches=1, seed=SEED, **aux)
    x, y = rows(), torch.randint(3, (5,))
    loss = pipe.step(x, y)
    pipe.flush()
    want = loss_fn(plain(x), y)
    torch.testing.assert_close(loss, want.detach(), rtol=1e-10, atol=1e-10)
    want.backward()
    for (name, a), b in zip(model.named_parameters(), plain.parameters(), strict=True):
        if not pipe.method.local or name.startswith(stages.points[0]):
            torch.testing.assert_close(a, b - 0.05 * b.grad, rtol=1e-10, atol=1e-10, msg=name)


def test_what_is_recomputed_under_autocast_is_what_was_computed() -> None:
    stages = dtrp.split(Net(), num_stages=2, example=rows())
    batches = minibatches(rows(), 3)
    assert torch.bfloat16 in check_recomputed_under_autocast(stages, batches, loss_fn)


@pytest.mark.usefixtures("float64")
def test_sizes_that_vary_are_arguments() -> None:
    class Pooled(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, length: int) -> Tensor:
            ctx.length = length
            return x.sum(1) / length

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
            return 5 * grad[:, None].expand(-1, ctx.length, -1), None

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(Pooled.apply(self.first(x), x.shape[1]))

    model = Model()
    stages = dtrp.split(model, points=["last"], example=torch.randn(3, 5, 4), dynamic_shapes={1: "n"})
    copied = copy.deepcopy(stages)
    for x in (torch.randn(3, 5, 4), torch.randn(2, 9, 4)):
        got, want = chain(stages, x), model(x)
        assert torch.equal(got, want)
        assert torch.equal(chain(copied, x), want)
        assert all(
            torch.equal(*pair)
            for pair in zip(
                torch.autograd.grad(got.sum(), list(model.parameters())),
                torch.autograd.grad(want.sum(), list(model.parameters())),
                strict=True,
            )
        )


@pytest.mark.usefixtures("float64")
def test_compiled_stages_apply_them() -> None:
    model = Net().eval()
    plain = copy.deepcopy(model)
    stages = dtrp.split(model, num_stages=2, example=rows())
    pipe = dtrp.Pipeline(stages, sgd, loss_fn, method="bp", compile={"backend": "eager"}, num_microbatches=1)
    x, y = rows(), torch.randint(3, (5,))
    pipe.step(x, y)
    loss_fn(plain(x), y).backward()
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b - 0.05 * b.grad, rtol=1e-10, atol=1e-10)


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *more: Any) -> Tensor:
        return x.mul_(2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * 2, None


class ByNumpy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.from_numpy(x.numpy() * 2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 2


class Applies(nn.Module):
    def __init__(self, apply: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last, self.act = nn.Linear(6, 6), nn.Linear(6, 3), apply

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.act(self.first(x)))


@pytest.mark.parametrize(
    ("apply", "message"),
    [
        (lambda x: Doubled.apply(x, 1), "Doubled, a torch.autograd.Function, writes its input in place"),
        (
            ByNumpy.apply,
            "the forward of ByNumpy, a torch.autograd.Function, .* torch.library.custom_op, with register_fake",
        ),
        (lambda x: Doubled.apply(x, torch.relu), "Doubled, a torch.autograd.Function, is given a builtin_function"),
    ],
)
def test_functions_that_a_trace_cannot_keep_are_refused(apply: Callable[[Tensor], Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=f"in Applies .*{message}.*pass a list of modules, one a stage"):
        dtrp.split(Applies(apply), points=["last"], example=rows())
