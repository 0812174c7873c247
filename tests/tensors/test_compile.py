"""torch.compile for each stage: the same numbers, at the weights that the engine puts in their places."""

from __future__ import annotations

import inspect
import itertools
import shutil
from typing import Any

import pytest
import torch
from helpers import clone, minibatches, network, pipeline, sgd

import dtrp
from dtrp.models import gpt
from dtrp.train import class_loss

# torch's compiler imports deprecated parts of torch.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


def train(model: Any, method: Any, **options: Any) -> list[torch.Tensor]:
    pipe = pipeline(model, num_stages=3, method=method, num_microbatches=2, **options)
    losses = [pipe.step(x, y) for x, y in minibatches(8)]
    pipe.flush()
    return [*losses, *pipe.model_state_dict().values(), pipe.infer(minibatches(1)[0][0])]  # type: ignore[list-item]


def check(method: Any, compile: Any) -> None:
    torch._dynamo.reset()
    model = network(6)
    want = train(clone(model), method)
    for a, b in zip(train(model, method, compile=compile), want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    "method", ["dtrp", "spectrain", *(pytest.param(method, marks=pytest.mark.full) for method in ("bp", "fdg", "dgl"))]
)
def test_compiled_stages_train_as_others_do(method: str) -> None:
    check(method, {"backend": "aot_eager"})


@pytest.mark.sampled(2)
@pytest.mark.skipif(shutil.which("c++") is None and shutil.which("g++") is None, reason="inductor needs a C++ compiler")
@pytest.mark.parametrize("method", ["dtrp", "spectrain"])
def test_with_the_default_compiler(method: str) -> None:
    """Masks, predicted weights and buffers included."""
    check(method, True)


@pytest.mark.full
@pytest.mark.parametrize("method", [pytest.param("spectrain", marks=pytest.mark.full), "dtrp"])
def test_a_traced_gpt(method: str) -> None:
    """Stages of `dtrp.split`, attention and trees between them, at predicted weights."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = gpt(9, layers=3, width=16, heads=2, context=8)
    tokens = torch.randint(9, (4, 8))
    results = []
    for options in ({}, {"compile": {"backend": "aot_eager"}}):
        stages = dtrp.split(clone(model), num_stages=3, example=tokens)
        pipe = dtrp.Pipeline(stages, sgd, class_loss, method=method, num_microbatches=2, seed=0, **options)
        losses = [pipe.step(tokens, tokens.roll(-1, 1)) for _ in range(6)]
        pipe.flush()
        results.append([*losses, *pipe.model_state_dict().values()])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


class Watched(torch.nn.Linear):
    """Counts the runs that the compiler left as they were."""

    eager = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not torch.compiler.is_compiling():
            self.eager += 1
        return super().forward(x)


def test_each_of_many_stages_is_compiled() -> None:
    """The compiler keeps 8 variants of a function and runs others as they are; a stage has one with gradients and one without."""
    torch._dynamo.reset()
    model = torch.nn.Sequential(*(Watched(4, 4) for _ in range(10)))
    pipe = dtrp.Pipeline(
        model, sgd, torch.nn.functional.cross_entropy, num_stages=10, compile={"backend": "eager"}, num_microbatches=1
    )
    for _ in range(30):
        pipe.step(torch.randn(8, 4), torch.randint(4, (8,)))
    pipe.flush()
    assert [layer.eager for layer in model] == [0] * 10


@pytest.mark.skipif(
    "recompile_limit" not in inspect.signature(torch.compile).parameters,
    reason="this torch keeps 8 variants of a function",
)
def test_a_stage_is_compiled_in_every_mode_and_for_every_size() -> None:
    torch._dynamo.reset()
    model = torch.nn.Sequential(Watched(4, 4), torch.nn.Dropout(0.5), Watched(4, 4))
    pipe = dtrp.Pipeline(
        model,
        sgd,
        torch.nn.functional.cross_entropy,
        cuts=[2],
        method="fr",
        compile={"backend": "eager"},
        num_microbatches=1,
    )
    for dtype, size in itertools.product((torch.float32, torch.bfloat16, torch.float16), (8, 5, 3)):
        with torch.autocast("cpu", dtype=dtype, enabled=dtype is not torch.float32):
            pipe.infer(torch.randn(size, 4))
            for _ in range(2):
                pipe.step(torch.randn(size, 4), torch.randint(4, (size,)))
    pipe.flush()
    assert [model[0].eager, model[2].eager] == [0, 0]


def test_what_compile_takes() -> None:
    with pytest.raises(TypeError, match="compile='yes': pass True, False, or a dict"):
        dtrp.Pipeline(
            network(),
            lambda p: torch.optim.SGD(p, lr=0.1),
            torch.nn.functional.cross_entropy,
            compile="yes",
            num_microbatches=1,
        )  # type: ignore[arg-type]
