"""What a step launches and reads, counted on the CPU: no more where a stage has more parameters, but for the optimizer's own."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from helpers import minibatches
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import dtrp
from dtrp import get_method
from dtrp.tensors import module_mode

# What makes a tensor, or another view of one, and computes nothing.
SILENT = ("aten.detach.", "aten.empty", "aten.view.", "aten.split", "aten.unbind.", "aten.select.", "aten.as_strided.")
READ = "aten._local_scalar_dense.default"


class Counting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.launches: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not str(func).startswith(SILENT):
            self.launches[str(func)] += 1
        return func(*args, **(kwargs or {}))


class Many(nn.Module):
    """A layer of ``number`` matrices, which it reads by one operation."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.matrices = nn.ParameterList([nn.Parameter(0.1 * torch.randn(5, 5)) for _ in range(number)])

    def forward(self, x: Tensor) -> Tensor:
        return x + x @ torch.stack([*self.matrices]).mean(0)


OPTIMIZERS: dict[str, Any] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, weight_decay=1e-3),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1, amsgrad=True),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=0.01, weight_decay=0.1),
}


def launches_of_a_step(number: int, optimizer: str, **options: Any) -> Counter[str]:
    """Of a step of four stages, three of which have ``number`` parameters, less those of a plain loop."""
    torch.manual_seed(0)
    model = nn.Sequential(*(Many(number) for _ in range(3)), nn.Linear(5, 3))
    plain = nn.Sequential(*(Many(number) for _ in range(3)), nn.Linear(5, 3))
    pipe = dtrp.Pipeline(
        model, OPTIMIZERS[optimizer], nn.functional.cross_entropy, num_stages=4, num_microbatches=1, **options
    )
    alone = OPTIMIZERS[optimizer](plain.parameters())
    (x, y), *_ = minibatches(2)
    for _ in range(9):
        pipe.step(x, y)
    with Counting() as ours:
        pipe.step(x, y)
    for _ in range(2):
        with Counting() as theirs:
            alone.zero_grad()
            nn.functional.cross_entropy(plain(x), y).backward()
            alone.step()
    ours.launches.subtract(theirs.launches)
    return ours.launches


@pytest.mark.sampled(4)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(
    ("method", "options"),
    [
        *((get_method("dtrp", predict=name), {}) for name in ("linear", "rollout", "informed", "last", "scaled", "auto")),
        (get_method("dtrp"), {"max_grad_norm": 0.1}), (get_method("dtrp-split"), {}), (get_method("bp"), {}),
    ],
    ids=lambda value: getattr(value, "predict", None) if hasattr(value, "predict") else "",
)  # fmt: skip
def test_launches_do_not_grow_with_the_number_of_parameters(optimizer: str, method: dtrp.Method, options: Any) -> None:
    few, many = (launches_of_a_step(number, optimizer, method=method, **options) for number in (4, 24))
    assert {name: (few[name], many[name]) for name in few | many if few[name] != many[name]} == {}
    assert many[READ] <= 4 * 5, "what a stage reads of its optimizer, and of the norm of its gradient"


def test_steps_on_an_accelerator_are_not_read() -> None:
    """The state of a capturable optimizer, its tensors said to be elsewhere: the same weights to rounding, and nothing read."""
    torch.manual_seed(0)
    for cls in (torch.optim.Adam, torch.optim.AdamW, torch.optim.NAdam):
        parameters = [torch.randn(n, 3).requires_grad_() for n in (2, 5)]
        optimizer = cls(parameters, lr=0.01, weight_decay=0.1)
        for _ in range(3):
            for p in parameters:
                p.grad = torch.randn_like(p)
            optimizer.step()
        gradients = [torch.randn_like(p) for p in parameters]
        for rule in (dtrp.linear, dtrp.rollout, dtrp.informed):
            known = {"gradients": gradients, "share": 0.5} if rule is dtrp.informed else {}
            want, got = ([torch.empty_like(p) for p in parameters] for _ in range(2))
            rule(parameters, optimizer, 4, want, **known)
            with pytest.MonkeyPatch.context() as patch, Counting() as counting:
                patch.setattr(dtrp.predict.batches, "_numbers", list)
                rule(parameters, optimizer, 4, got, **known)
            assert counting.launches[READ] == 0
            for a, b in zip(want, got, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)  # 1 - beta2**t in float32


def test_a_step_walks_through_the_modules_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each stage, however many micro-batches there are; and sees what has come since."""
    stages = [nn.Sequential(nn.Linear(5, 5), nn.BatchNorm1d(5)) for _ in range(3)]
    pipe = dtrp.Pipeline([*stages, nn.Linear(5, 3)], OPTIMIZERS["SGD"], nn.functional.cross_entropy, num_microbatches=4)
    (x, y), *_ = minibatches(2)
    for _ in range(6):
        pipe.step(x, y)
    walked: Counter[nn.Module] = Counter()
    walk = module_mode.members

    def counted(module: Any) -> list[nn.Module]:
        if isinstance(module, nn.Module):
            walked[module] += 1
        return walk(module)

    monkeypatch.setattr(module_mode, "members", counted)
    pipe.step(x, y)
    assert set(walked.values()) <= {1, 2}, walked  # with and without an auxiliary network
    roster = module_mode.Roster(stages[0])
    assert roster.members() == list(stages[0].modules())
    stages[0].add_module("more", nn.ReLU())
    assert roster.members() == list(stages[0].modules())
    stages[0].more = nn.Tanh()
    assert roster.members() == list(stages[0].modules())
