"""torch.compile for each stage: the same numbers, at the weights that the engine puts in their places."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
from helpers import clone, minibatches, network, pipeline

import dtrp

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


@pytest.mark.parametrize("method", ["bp", "dtrp", "spectrain", "fdg", "dgl"])
def test_compiled_stages_train_as_others_do(method: str) -> None:
    check(method, {"backend": "aot_eager"})


@pytest.mark.skipif(shutil.which("c++") is None and shutil.which("g++") is None, reason="inductor needs a C++ compiler")
@pytest.mark.parametrize("method", ["dtrp", "spectrain"])
def test_with_the_default_compiler(method: str) -> None:
    """Masks, predicted weights and buffers included."""
    check(method, True)


def test_what_compile_takes() -> None:
    with pytest.raises(TypeError, match="compile='yes': pass True, False, or a dict"):
        dtrp.Pipeline(network(), lambda p: torch.optim.SGD(p, lr=0.1), torch.nn.functional.cross_entropy, compile="yes")  # type: ignore[arg-type]
