"""Kinds of models that strain an engine: each must train as it would unsplit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import batches_of, check_perfect_prediction, check_trains_as_unsplit, pipeline, sgd
from strained_models import (
    MODELS,
    Checkpointed,
    Mean,
    Tokens,
    rows,
)
from torch import Tensor, nn
from unsplit import check_recomputed_under_autocast

import dtrp


@pytest.mark.sampled(3)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("method", "num_microbatches"), [("bp", 1), ("bp", 3), ("gpipe", 3)])
@pytest.mark.parametrize("kind", MODELS)
def test_without_delay_they_train_as_unsplit_to_the_bit(
    kind: str, method: str, num_microbatches: int, dtype: torch.dtype
) -> None:
    torch.set_default_dtype(dtype)
    make, data = MODELS[kind]
    model = nn.Sequential(*make())
    check_trains_as_unsplit(model, batches_of(data), method=method, num_microbatches=num_microbatches)


@pytest.mark.sampled(2)
@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("num_microbatches", [1, 3])
@pytest.mark.parametrize("kind", [kind for kind in MODELS if kind != "a buffer that is read"])
def test_with_perfect_prediction_they_train_as_unsplit_to_the_bit(kind: str, num_microbatches: int) -> None:
    make, data = MODELS[kind]
    check_perfect_prediction(nn.Sequential(*make()), batches_of(data), 4, num_microbatches=num_microbatches)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("method", dtrp.list_methods())
def test_an_activation_checkpoint_runs_again_at_the_weights_of_its_forward(method: str) -> None:
    results = []
    for on in (True, False):
        torch.manual_seed(1)
        pipe = pipeline([*(Checkpointed(on) for _ in range(3)), nn.Linear(6, 3)], method=method)
        for x, y in batches_of(rows):
            pipe.step(x, y)
        pipe.flush()
        results.append(pipe.model_state_dict())
    for name in results[1]:
        assert torch.equal(results[0][name], results[1][name]), name


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("method", dtrp.list_methods())
def test_an_output_that_is_a_view_of_a_weight_does_not_change_in_the_next_stages_stash(method: str) -> None:
    results = []
    for view in (True, False):
        torch.manual_seed(1)
        pipe = pipeline([Tokens(view), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3)], method=method)
        for x, y in batches_of(rows):
            pipe.step(x, y)
        pipe.flush()
        results.append(pipe.model_state_dict())
    for name, value in results[0].items():
        torch.testing.assert_close(value, results[1][name], rtol=1e-12, atol=0)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("method", ["fdg", "pipedream", "spectrain", "dtrp"])
def test_a_buffer_that_is_read_and_moved_is_no_error(method: str) -> None:
    pipe = pipeline(MODELS["a buffer that is read"][0](), method=method, num_microbatches=2)
    for x, y in batches_of(rows):
        pipe.step(x, y)
    pipe.flush()
    assert not torch.equal(pipe.model_state_dict()["0.size"], torch.ones(6))


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("method", ["dtrp", "fr", "fdg", "bp"])
@pytest.mark.parametrize("saved", [False, True])
def test_eval_mode_while_batches_are_in_flight(method: str, saved: bool, tmp_path: Path) -> None:
    """A backward repeats its forward in the mode of then: dropout draws, and statistics move."""
    results = []
    for evaluates in (False, True):
        torch.manual_seed(1)
        layers = [nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Tanh()) for _ in range(3)]
        model = nn.Sequential(*layers, nn.Linear(6, 3))
        pipe = pipeline(model, num_stages=4, method=method)
        for x, y in batches_of(rows):
            pipe.step(x, y)
        if saved:
            pipe.save(tmp_path / str(evaluates))
            pipe = pipeline(model, num_stages=4, method=method)
            pipe.load(tmp_path / str(evaluates))
        if evaluates:
            model.eval()
        pipe.flush()
        assert model.training is not evaluates
        results.append(pipe.model_state_dict())
    for name in results[0]:
        assert torch.equal(results[0][name], results[1][name]), name


class Late(nn.Module):
    """Makes a submodule in its first forward."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        if not hasattr(self, "activation"):
            self.activation = nn.Tanh()
        return self.activation(self.linear(x))  # type: ignore[no-any-return]


@pytest.mark.parametrize("method", ["dtrp", "fr", "fdg", "bp"])
def test_a_submodule_that_the_first_forward_makes(method: str) -> None:
    results = []
    for layers in ([Late() for _ in range(3)], [nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(3)]):
        for number, layer in enumerate(layers):
            torch.manual_seed(number)
            next(layer.children()).reset_parameters()  # type: ignore[operator]
        pipe = pipeline(nn.Sequential(*layers), num_stages=3, method=method)
        losses = [pipe.step(x, y) for x, y in batches_of(rows)]
        pipe.flush()
        results.append([*losses, *pipe.model_state_dict().values()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))  # type: ignore[arg-type]


def test_infer_inside_the_callers_autocast_sees_the_weights_of_now() -> None:
    pipe = dtrp.Pipeline(
        [nn.Linear(16, 16), nn.Linear(16, 16)], sgd, nn.functional.mse_loss, method="bp", num_microbatches=1
    )
    x = torch.randn(8, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        before = pipe.infer(x)
        pipe.step(x, x)
        after = pipe.infer(x)
    assert before.dtype == torch.bfloat16
    assert not torch.equal(before, after)


@pytest.mark.parametrize(
    "kind", [kind for kind in MODELS if kind not in ("lstm", "embedding", "a buffer that is read")]
)
def test_under_autocast_a_recomputed_forward_is_the_first_one_to_the_bit(kind: str) -> None:
    """At equal weights: bp that keeps inputs. (But for oneDNN's LSTM, which has another kernel there, and a buffer that moves.)"""
    make, data = MODELS[kind]
    dtypes = check_recomputed_under_autocast(make(), batches_of(data)[:4], nn.functional.cross_entropy, 3)
    assert torch.bfloat16 in dtypes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_of_half_precision(dtype: torch.dtype) -> None:
    pipe = dtrp.Pipeline(
        [nn.Linear(6, 6, dtype=dtype), nn.Linear(6, 6, dtype=dtype)], sgd, nn.functional.mse_loss, num_microbatches=1
    )
    x = torch.randn(4, 6, dtype=dtype)
    loss: Any = None
    for _ in range(4):
        loss = pipe.step(x, x)
    pipe.flush()
    assert loss.dtype == dtype


def test_a_sparse_gradient() -> None:
    pipe = dtrp.Pipeline(
        [nn.Embedding(9, 6, sparse=True), nn.Sequential(Mean(), nn.Linear(6, 3))],
        lambda p: torch.optim.SGD(p, lr=0.1),
        nn.functional.cross_entropy,
        num_microbatches=2,
    )
    for _ in range(4):
        pipe.step(torch.randint(9, (4, 5)), torch.randint(3, (4,)))
        assert pipe.memory()[0]["gradients"] >= 0


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("rule", ["linear", "rollout"])
@pytest.mark.parametrize("cls", [torch.optim.Adam, torch.optim.AdamW, torch.optim.NAdam])
def test_complex_weights_are_pairs_of_reals_to_the_adam_family(cls: Any, rule: str) -> None:
    p = torch.randn(4, dtype=torch.complex128).requires_grad_()
    q = torch.view_as_real(p.detach()).clone().requires_grad_()
    options = {"lr": 0.1, "weight_decay": 0.1}
    optimizers = [cls([p], **options), cls([q], **options)]
    for _ in range(3):
        p.grad = torch.randn(4, dtype=torch.complex128)
        q.grad = torch.view_as_real(p.grad).clone()
        for optimizer in optimizers:
            optimizer.step()
    out, want = torch.empty_like(p, requires_grad=False), torch.empty_like(q, requires_grad=False)
    predictor: Any = getattr(dtrp, rule)
    predictor([p], optimizers[0], 3, [out])
    predictor([q], optimizers[1], 3, [want])
    torch.testing.assert_close(torch.view_as_real(out), want, rtol=1e-12, atol=0)
