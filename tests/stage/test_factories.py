"""What the factories of optimizers and schedulers are told: the keywords that they name."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from helpers import assert_same, clone, minibatches, network
from torch import Tensor, nn

import dtrp
from dtrp.planning.profile import Profiler
from dtrp.schedule import steady_delay


def made(optimizer: Any, scheduler: Any = None, **options: Any) -> dtrp.Pipeline:
    options = {"num_stages": 4, "num_microbatches": 2, "seed": 0, **options}
    return dtrp.Pipeline(network(), optimizer, nn.functional.cross_entropy, lr_scheduler=scheduler, **options)


@pytest.mark.parametrize("method", ["dtrp", "bp", "dtrp-split"])
def test_a_factory_is_given_the_keywords_that_it_names(method: str) -> None:
    told: list[dict[str, Any]] = []

    def optimizer(
        params: list[Tensor], *, stage: int, num_stages: int, delay: int, named: Any
    ) -> torch.optim.Optimizer:
        told.append({"stage": stage, "num_stages": num_stages, "delay": delay, "named": named, "params": params})
        return torch.optim.SGD(params, lr=0.1 / (1 + delay))

    schedulers: list[tuple[int, int, int]] = []

    def scheduler(o: torch.optim.Optimizer, stage: int, num_stages: int, delay: int = -1) -> Any:
        schedulers.append((stage, num_stages, delay))
        return torch.optim.lr_scheduler.LambdaLR(o, lambda n: 1.0)

    pipe = made(optimizer, scheduler, method=method)
    names = [name for entry in told for name, _ in entry["named"]]
    assert names == [name for name, _ in network().named_parameters()], "by the model's names"
    for k, entry in enumerate(told):
        delay = steady_delay(pipe.method, 4, k, 2, 0)
        assert (entry["stage"], entry["num_stages"], entry["delay"]) == (k, 4, delay)
        assert [id(p) for _, p in entry["named"]] == [id(p) for p in entry["params"]]
        assert schedulers[k] == (k, 4, delay)
        assert pipe.optimizers[k].param_groups[0]["lr"] == 0.1 / (1 + delay)  # type: ignore[union-attr]


def test_no_decay_on_norms_and_biases_as_scripts_write_it() -> None:
    """``configure_optimizers`` of the usual scripts: groups by name and dimension, against a plain loop with them."""

    def configure(named: Any) -> torch.optim.Optimizer:
        decayed = [p for name, p in named if p.dim() >= 2]
        others = [p for name, p in named if p.dim() < 2]
        assert any("bias" in name for name, p in named if p.dim() < 2)
        groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
        return torch.optim.AdamW([group for group in groups if group["params"]], lr=0.01)

    model = network()
    plain, batches = clone(model), minibatches(6)
    pipe = dtrp.Pipeline(
        model, lambda params, *, named: configure(named), nn.functional.cross_entropy, num_stages=4, method="bp",
        num_microbatches=1, seed=0,
    )  # fmt: skip
    optimizer = configure(list(plain.named_parameters()))
    for x, y in batches:
        pipe.step(x, y)
    cuts = [2, 4, 6]
    for m, (x, y) in enumerate(batches):
        optimizer.zero_grad()
        for k, (begin, end) in enumerate(zip([0, *cuts], [*cuts, len(plain)], strict=True)):
            with pipe.rng(k, m):
                x = plain[begin:end](x)
        nn.functional.cross_entropy(x, y).backward()
        optimizer.step()
    assert_same(pipe.model_state_dict(), plain.state_dict())


def test_factories_that_name_nothing_are_called_as_ever() -> None:
    def with_everything(params: list[Tensor], **more: Any) -> torch.optim.Optimizer:
        assert more == {}
        return torch.optim.SGD(params, lr=0.1)

    class Holder:
        def __call__(self, params: list[Tensor], /) -> torch.optim.Optimizer:
            return torch.optim.SGD(params, lr=0.1)

    def first_is_called_stage(stage: list[Tensor]) -> torch.optim.Optimizer:
        return torch.optim.SGD(stage, lr=0.1)

    for factory in (
        with_everything,
        Holder(),
        first_is_called_stage,
        torch.optim.Adam,
        functools.partial(torch.optim.SGD, lr=0.1),
    ):
        pipe = made(factory)
        pipe.step(*minibatches(1)[0])
        pipe.flush()


def test_what_a_partial_has_bound_stays() -> None:
    def optimizer(params: list[Tensor], *, delay: int) -> torch.optim.Optimizer:
        return torch.optim.SGD(params, lr=0.1 + delay)

    pipe = made(functools.partial(optimizer, delay=7))
    assert all(own.param_groups[0]["lr"] == 7.1 for own in pipe.optimizers)  # type: ignore[union-attr]


def test_a_plan_is_measured_with_such_a_factory() -> None:
    seen: list[int] = []

    def optimizer(params: list[Tensor], *, named: Any, num_stages: int) -> torch.optim.Optimizer:
        seen.append(num_stages)
        assert len(named) == len(params)
        return torch.optim.SGD(params, lr=0.1, momentum=0.9)

    x, y = minibatches(1)[0]
    Profiler(network(), (x, y), nn.functional.cross_entropy, optimizer=optimizer, repeats=1)
    assert seen == [1]
