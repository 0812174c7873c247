"""What users write by habit beside a pipeline: warned of once where it does nothing, and never where it does what it says."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch
from helpers import adamw, network, pipeline, sgd
from launching import Server, run_ranks
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.optimizer import _global_optimizer_pre_hooks
from ways import bare, batch

NOTHING = r"SGD\.step\(\) does nothing: a pipeline trains its parameters, .* optimizer="


@pytest.fixture(autouse=True)
def _alone() -> Iterator[None]:
    """No pipelines of other tests, nor any hook after this one."""
    gc.collect()
    assert not _global_optimizer_pre_hooks
    yield
    gc.collect()
    assert not _global_optimizer_pre_hooks


# -- the step of another optimizer --------------------------------------------------------------------------------


@pytest.mark.sampled(3)
@pytest.mark.parametrize("method", ["dtrp", "bp"])
@pytest.mark.parametrize("before", [True, False])
def test_another_optimizer_is_told_once_that_its_step_does_nothing(method: str, before: bool) -> None:
    model = bare()
    other = sgd(list(model.parameters()))
    pipe = pipeline(model, num_stages=3, method=method)
    if not before:
        other = sgd(list(model.parameters()))
    pipe.step(*batch(0))
    weights = [p.detach().clone() for p in model.parameters()]
    with pytest.warns(UserWarning, match=NOTHING) as told:
        other.step()
    assert [warning.filename for warning in told] == [__file__]
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), weights, strict=True))
    other.zero_grad()
    other.step()
    sgd([*model.parameters()][:1]).step()
    pipe.step(*batch(1))


@pytest.mark.sampled(3)
@pytest.mark.parametrize("by_keyword", [False, True])
@pytest.mark.parametrize("make", [sgd, torch.optim.LBFGS])
def test_a_step_that_makes_its_gradients_is_told_nothing(make: Any, by_keyword: bool) -> None:
    """What a pipeline has trained is polished by another optimizer, with a closure."""
    model = bare()
    pipe = pipeline(model, num_stages=3)
    pipe.step(*batch(0))
    pipe.flush()
    other = make(list(model.parameters()))

    def closure() -> Tensor:
        other.zero_grad()
        loss = cross_entropy(model(batch(1)[0]), batch(1)[1])
        loss.backward()
        return loss

    other.step(closure=closure) if by_keyword else other.step(closure)


class Outer(torch.optim.Optimizer):
    """An optimizer that steps another, as lookahead does."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        super().__init__(inner.param_groups, {})
        self.inner = inner

    def step(self, closure: Any = None) -> None:
        self.inner.step()


def wrapped(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    return Outer(torch.optim.SGD(params, lr=0.1))


def patched(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    """As wrappers of learning-rate schedulers do."""
    optimizer = sgd(params)
    step = optimizer.step
    optimizer.step = MethodType(lambda self, closure=None: step(closure), optimizer)  # type: ignore[method-assign]
    return optimizer


@pytest.mark.sampled(3)
@pytest.mark.parametrize("make", [sgd, adamw, wrapped, patched])
@pytest.mark.parametrize("method", ["fdg", "bp"])
def test_the_pipelines_optimizers_are_told_nothing(make: Any, method: str) -> None:
    pipe = pipeline(bare(), make, num_stages=3, method=method, num_microbatches=2, on_nonfinite="skip")
    for n in range(5):
        pipe.step(*batch(n, spoiled=n == 2))
    pipe.flush()
    for optimizer in pipe.optimizers:
        assert optimizer is not None
        optimizer.step()  # has no gradient, and is a pipeline's


def test_what_trains_other_parameters_is_told_nothing() -> None:
    """A second network, a second pipeline, a parameter put in place of one, and a plain loop over what a pipeline has had."""
    model, plain = bare(), bare()
    pipe = pipeline(model, num_stages=2)
    other = sgd(list(plain.parameters()))
    second = pipeline(bare(), num_stages=3, method="bp")
    for n in range(3):
        pipe.step(*batch(n))
        second.step(*batch(n))
        other.step()
        cross_entropy(plain(batch(n)[0]), batch(n)[1]).backward()
        other.step()
        other.zero_grad()
    pipe.flush()
    mine = sgd(list(model.parameters()))
    cross_entropy(model(batch(0)[0]), batch(0)[1]).backward()
    mine.step()  # with gradients of the caller's: it does something
    mine.zero_grad()
    mine.step()
    model[0].weight = nn.Parameter(torch.zeros(6, 6))
    sgd([model[0].weight]).step()


def test_a_pipeline_that_is_closed_is_watched_no_more() -> None:
    model = bare()
    with pipeline(model, num_stages=3) as pipe:
        pipe.step(*batch(0))
    assert not _global_optimizer_pre_hooks
    sgd(list(model.parameters())).step()


def test_one_hook_for_all_pipelines_which_holds_none_of_them() -> None:
    first, second = pipeline(bare(), num_stages=3), pipeline(bare(), num_stages=2)
    assert len(_global_optimizer_pre_hooks) == 1
    other = sgd([nn.Parameter(torch.zeros(2))])
    other.step()
    gone = [weakref.ref(each) for each in (other, first._engine, *first.optimizers, *first.stages[0].parameters())]
    first.step(*batch(0))
    del first, other
    gc.collect()
    assert [reference() for reference in gone] == [None] * len(gone)
    assert len(_global_optimizer_pre_hooks) == 1
    with pytest.warns(UserWarning, match=NOTHING):
        sgd(list(second.stages[0].parameters())).step()
    assert not _global_optimizer_pre_hooks, "nothing is left to say"


def test_the_loss_that_a_step_returns_has_no_gradient() -> None:
    pipe = pipeline(bare(), num_stages=2)
    loss = pipe.step(*batch(0))
    assert loss is not None
    with pytest.raises(RuntimeError, match="does not require grad"):
        loss.backward()


# -- what a rank holds of other ranks' stages -----------------------------------------------------------------------


@pytest.mark.full
@pytest.mark.sampled(4)
@pytest.mark.parametrize("kind", ["sequential", "list", "split", "tied"])
def test_a_model_saved_run_or_copied_on_one_rank(server: Server, tmp_path: Path, kind: str) -> None:
    outcomes = run_ranks(server, tmp_path, 3, "use_by_habit", kind, timeout_s=120)
    assert [(outcome.returncode, outcome.out) for outcome in outcomes] == [(0, "told\n")] * 3, outcomes


def test_in_one_process_a_model_is_whole() -> None:
    model = network()
    pipe = pipeline(model, num_stages=3)
    pipe.step(*batch_of_network())
    pipe.flush()
    model.state_dict()
    hooks = [h for m in model.modules() for h in (m._state_dict_pre_hooks, m._forward_pre_hooks)]
    assert not any(hooks)


def batch_of_network() -> tuple[Tensor, Tensor]:
    return torch.randn(8, 5), torch.randint(3, (8,))


# -- samplers -------------------------------------------------------------------------------------------------------


def test_a_distributed_sampler_inside_a_pipeline(server: Server, tmp_path: Path) -> None:
    for outcome in run_ranks(server, tmp_path, 2, "wrong", "a DistributedSampler", timeout_s=30):
        assert outcome.returncode == 1
        for part in ("different targets for mini-batch 0", "seed the sampler", "DistributedSampler", "num_replicas="):
            assert part in outcome.last_line, outcome.err


def test_targets_on_an_accelerator_are_compared_in_the_first_steps(server: Server, tmp_path: Path) -> None:
    for outcome in run_ranks(server, tmp_path / "first", 2, "wrong", "far targets", timeout_s=60):
        assert "different targets for mini-batch 2" in outcome.last_line, outcome.err
    later = run_ranks(server, tmp_path / "later", 2, "wrong", "far targets later", timeout_s=60)
    assert [outcome.returncode for outcome in later] == [0, 0], later
