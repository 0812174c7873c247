"""Stages against the model they were split from: outputs, and training with dropout."""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import pytest
import torch
from helpers import Prophet, assert_same
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import dtrp
from dtrp.splitting.stages import Stages
from dtrp.tensors.rng import microbatch_seed, seeded

SEED = 11


def copied_from_the_first(make: Callable[..., Any]) -> Callable[..., Any]:
    """``make``, which traces a model and so takes its time, done once for its arguments; each call gets a copy of its own."""

    @functools.cache
    def first(dtype: torch.dtype, *arguments: Any) -> Any:
        torch.manual_seed(0)
        return make(*arguments)

    @functools.wraps(make)
    def copied(*arguments: Any) -> Any:
        with torch.random.fork_rng():
            return copy.deepcopy(first(torch.get_default_dtype(), *arguments))

    return copied


def call(model: nn.Module, x: Any) -> Any:
    """As an example says: a dict is keyword arguments, a tuple positional ones."""
    if isinstance(x, dict):
        return model(**x)
    return model(*x) if isinstance(x, tuple) else model(x)


def samples(x: Any, chosen: slice) -> Any:
    return pytree.tree_map_only(Tensor, lambda t: t[chosen], x)


def leaves(out: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(out) if isinstance(leaf, Tensor)]


def logits(out: Any) -> Tensor:
    """What the loss reads: the field of that name, or the first tensor."""
    found: Tensor = out["logits"] if isinstance(out, dict) and "logits" in out else leaves(out)[0]
    return found.flatten(1)


def chain(stages: Stages, x: Any, rng: Callable[[int], AbstractContextManager[None]] | None = None) -> Any:
    for k, stage in enumerate(stages):
        with rng(k) if rng else ExitStack():
            x = stage(x)
    return x


def rng(stage: int, microbatch: int) -> AbstractContextManager[None]:
    """`Pipeline.rng` of a pipeline whose seed is SEED."""
    return seeded(microbatch_seed(SEED, 0, stage, microbatch), torch.device("cpu"))


@contextmanager
def drawing_by_stage(model: nn.Module, points: tuple[str, ...], microbatch: int) -> Iterator[None]:
    """The unsplit model draws, from the submodule on where stage k begins, what stage k would draw."""
    with ExitStack() as hooks, ExitStack() as current:
        current.enter_context(rng(0, microbatch))

        def begin(stage: int) -> Callable[..., None]:
            def hook(*_: Any) -> None:
                current.close()
                current.enter_context(rng(stage, microbatch))

            return hook

        for k, point in enumerate(points, 1):
            handle = model.get_submodule(point).register_forward_pre_hook(begin(k))
            hooks.callback(handle.remove)
        yield


def check_outputs(model: nn.Module, stages: Stages, x: Any) -> None:
    """In both modes and with other numbers of samples: the same outputs and gradients to the bit, and buffers move alike."""
    plain = copy.deepcopy(model)
    for stage, other in ((model, plain),):
        assert [name for name, _ in stage.named_parameters()] == [name for name, _ in other.named_parameters()]
    own = dict(model.named_parameters(remove_duplicate=False))
    parts = [dict(stage.named_parameters(remove_duplicate=False)) for stage in stages]
    assert sorted(name for part in parts for name in part) == sorted(own), "each exactly once, under its own name"
    assert all(p is own[name] for part in parts for name, p in part.items()), "the model's own objects"
    state = {name: t for stage in stages for name, t in stage.state_dict().items()}
    assert state.keys() == model.state_dict().keys()
    for training in (True, False):
        plain.train(training)
        for stage in stages:
            stage.train(training)
        for num in (len(leaves(x)[0]), 1, 3):
            part = samples(x, slice(num))
            torch.manual_seed(5)
            want = call(plain, part)
            torch.manual_seed(5)
            got = chain(stages, part)
            assert type(got) is type(want)
            assert pytree.tree_structure(got) == pytree.tree_structure(want)
            for a, b in zip(leaves(got), leaves(want), strict=True):
                assert torch.equal(a, b), f"training={training}, {num} samples"
            if training:
                gradients = [
                    torch.autograd.grad(
                        logits(out).square().sum(), [p for p in m.parameters() if p.requires_grad], allow_unused=True
                    )
                    for m, out in ((model, got), (plain, want))
                ]
                for a, b in zip(*gradients, strict=True):
                    assert (a is None and b is None) or torch.equal(a, b)
    for (name, a), (_, b) in zip(model.named_buffers(), plain.named_buffers(), strict=True):
        assert torch.equal(a, b), name


def minibatches(x: Any, num_classes: int, count: int = 4) -> list[tuple[Any, Tensor]]:
    """The example's samples in other orders, the last mini-batch smaller, and classes."""
    size = len(leaves(x)[0])
    result = []
    for i in range(count):
        order = torch.randperm(size)[: size - (i == count - 1)]
        result.append(
            (
                pytree.tree_map_only(Tensor, lambda t, order=order: t[order], x),
                torch.randint(num_classes, (len(order),)),
            )
        )
    return result


def train_plain(
    model: nn.Module, points: tuple[str, ...], batches: list[tuple[Any, Tensor]], num_microbatches: int
) -> list[Tensor]:
    """The unsplit model's training, with the draws of a pipeline of these stages; its losses."""

    def forward(x: Any, m: int) -> Any:
        with drawing_by_stage(model, points, m):
            return call(model, x)

    return _train(forward, model.parameters(), batches, num_microbatches)


def train_chain(stages: Stages, batches: list[tuple[Any, Tensor]], num_microbatches: int) -> list[Tensor]:
    """The stages' training one after the other, without an engine; the losses."""
    parameters = dict.fromkeys(p for stage in stages for p in stage.parameters())
    return _train(lambda x, m: chain(stages, x, lambda k: rng(k, m)), parameters, batches, num_microbatches)


def _train(
    forward: Callable[[Any, int], Any],
    parameters: Iterable[nn.Parameter],
    batches: list[tuple[Any, Tensor]],
    num_microbatches: int,
) -> list[Tensor]:
    optimizer = torch.optim.SGD([p for p in parameters if p.requires_grad], lr=0.05, momentum=0.9)
    losses, m = [], 0
    for x, y in batches:
        total = torch.zeros(())
        for chosen in torch.tensor_split(torch.arange(len(y)), num_microbatches):
            part = slice(int(chosen[0]), int(chosen[-1]) + 1)
            out = forward(samples(x, part), m)
            loss = nn.functional.cross_entropy(logits(out), y[part]) * (len(chosen) / len(y))
            loss.backward()
            total = total + loss.detach()
            m += 1
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses


def assert_trained_alike(model: nn.Module, plain: nn.Module, losses: list[Tensor], want: list[Tensor]) -> None:
    """Losses and every tensor of the state to 1e-10."""
    for a, b in zip(losses, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    state, other = model.state_dict(), plain.state_dict()
    assert state.keys() == other.keys()
    for name in state:
        torch.testing.assert_close(
            state[name], other[name], rtol=1e-10, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}"
        )


def sgd(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.05, momentum=0.9)


def loss_fn(out: Any, y: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits(out), y)


def check_pipeline(model: nn.Module, x: Any, stages: Stages, num_microbatches: int, *, tied: bool = False) -> None:
    """bp trains as the unsplit model to 1e-10; dtrp, with the weights of that run for predictions, as bp to the bit.

    Where parameters are ``tied`` across stages, dtrp refuses them.
    """
    plain, late = copy.deepcopy(model), copy.deepcopy(model)
    batches = minibatches(x, logits(call(copy.deepcopy(model).eval(), x)).shape[1], 6)
    pipe = dtrp.Pipeline(stages, sgd, loss_fn, method="bp", num_microbatches=num_microbatches, seed=SEED)
    history: list[list[list[Tensor]]] = [[] for _ in stages]

    def record() -> None:
        for versions, stage in zip(history, stages, strict=True):
            versions.append([p.detach().clone() for p in stage.parameters() if p.requires_grad])

    record()
    losses = []
    for batch in batches:
        losses.append(pipe.step(*batch))
        record()
    want = train_plain(plain, stages.points, batches, num_microbatches)
    assert_trained_alike(model, plain, losses, want)

    again = dtrp.split(late, points=stages.points, example=x)
    if tied:
        with pytest.raises(ValueError, match="are one tensor, and stages of method='dtrp' update without waiting"):
            dtrp.Pipeline(again, sgd, loss_fn, method="dtrp", num_microbatches=1)
        return
    method = dtrp.get_method("dtrp", predict=Prophet(history))
    pipe = dtrp.Pipeline(again, sgd, loss_fn, method=method, num_microbatches=num_microbatches, seed=SEED)
    assert all(torch.equal(pipe.step(*batch), loss) for batch, loss in zip(batches, losses, strict=True))
    pipe.flush()
    assert_same(late.state_dict(), model.state_dict())
    assert_same(pipe.model_state_dict(), model.state_dict())
    with torch.no_grad():  # attention has another kernel where gradients are asked for
        want = call(model.eval(), x)
    for a, b in zip(leaves(pipe.infer(x)), leaves(want), strict=True):
        assert torch.equal(a, b)


def check_recomputed_under_autocast(
    stages: Sequence[nn.Module],
    batches: Sequence[tuple[Any, Tensor]],
    loss_fn: Callable[..., Tensor],
    num_microbatches: int = 2,
) -> set[torch.dtype]:
    """In bfloat16, at equal weights, what a stage recomputes is what it computed first, to the bit: bp that keeps inputs.

    Returns:
        The dtypes of what the stages gave.
    """
    outputs: list[tuple[list[list[Tensor]], list[list[Tensor]]]] = [([], []) for _ in stages]
    for stage, own in zip(stages, outputs, strict=True):
        stage.register_forward_hook(
            lambda _, args, out, own=own: own[torch.is_grad_enabled()].append([t.detach().clone() for t in leaves(out)])
        )
    method = dtrp.get_method("bp", keep="input")
    pipe = dtrp.Pipeline(stages, sgd, loss_fn, method=method, num_microbatches=num_microbatches, seed=SEED)
    for x, y in batches:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            pipe.step(x, y)
    count = len(batches) * num_microbatches
    for first, again in outputs[:-1]:
        assert len(first) == count
        assert len(again) in (count, count + 1), "a trial before them shows which of several outputs have a gradient"
        for a, b in zip(itertools.chain(*first), itertools.chain(*again[-count:]), strict=True):
            assert a.dtype == b.dtype
            assert torch.equal(a, b)
    return {t.dtype for _, again in outputs for out in again for t in out}
