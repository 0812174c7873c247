"""Kinds of models that strain an engine: each must train as it would unsplit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import batches_of, check_perfect_prediction, check_trains_as_unsplit, pipeline, sgd
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from unsplit import check_recomputed_under_autocast

import dtrp
from dtrp.models import cifar_resnet


class Mixer(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(size, size)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(x.transpose(1, 2)).transpose(1, 2)


class Renorm(nn.Module):
    """Reads a buffer that its training forward moves, in place or by a new tensor."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.in_place = in_place
        self.linear = nn.Linear(6, 6)
        self.register_buffer("size", torch.ones(6))

    def forward(self, x: Tensor) -> Tensor:
        moved = x.detach().abs().mean(0)
        if self.in_place:
            self.size.mul_(0.9).add_(0.1 * moved)
        else:
            self.size = 0.9 * self.size + 0.1 * moved
        return torch.tanh(self.linear(x) / self.size)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, dropout=0.1, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attention(x, x, x, need_weights=False)[0]


class Lstm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(6, 6, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(x)[0]


class Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


class Checkpointed(nn.Module):
    def __init__(self, on: bool) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh())
        self.on = on

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.body, x, use_reentrant=False) if self.on else self.body(x)


def residual() -> list[nn.Module]:
    model = cifar_resnet(8, width=4, num_classes=3).to(memory_format=torch.channels_last)
    return [model[:2], *model[2:]]


def images() -> Tensor:
    return torch.randn(12, 3, 6, 6).to(memory_format=torch.channels_last)


def sequences() -> Tensor:
    return torch.randn(12, 6, 6)


def rows() -> Tensor:
    return torch.randn(12, 6)


MODELS: dict[str, tuple[Callable[[], list[nn.Module]], Callable[[], Tensor]]] = {
    "channels last": (
        lambda: [nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last), nn.Sequential(nn.ReLU(), nn.BatchNorm2d(4)),
                 nn.Sequential(nn.Flatten(), nn.Linear(64, 6)), nn.Linear(6, 3)], images),
    "mixer": (lambda: [Mixer(6), Mixer(6), Mixer(6), nn.Sequential(Mean(), nn.Linear(6, 3))], sequences),
    "resnet, channels last": (residual, lambda: torch.randn(12, 3, 6, 6)),
    "attention": (lambda: [Attention(), Attention(), nn.LayerNorm(6), nn.Sequential(Mean(), nn.Linear(6, 3))], sequences),
    "lstm": (lambda: [Lstm(), nn.Tanh(), Lstm(), nn.Sequential(Mean(), nn.Linear(6, 3))], sequences),
    "embedding": (lambda: [nn.Embedding(9, 6), Lstm(), nn.Identity(), nn.Sequential(Mean(), nn.Linear(6, 3))],
                  lambda: torch.randint(9, (12, 5))),
    "group norm": (
        lambda: [nn.Conv2d(3, 4, 3), nn.Sequential(nn.GroupNorm(2, 4), nn.ReLU(inplace=True)), nn.Flatten(),
                 nn.Linear(64, 3)], lambda: torch.randn(12, 3, 6, 6)),
    "weight norm": (
        lambda: [nn.utils.parametrizations.weight_norm(nn.Linear(6, 6)), nn.Tanh(), nn.Linear(6, 6), nn.Linear(6, 3)],
        rows),
    "a slice of columns": (lambda: [nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Linear(6, 3)],
                           lambda: torch.randn(12, 11)[:, 3:9]),
    "a buffer that is read": (lambda: [Renorm(True), Renorm(False), Renorm(True), nn.Linear(6, 3)], rows),
    "activation checkpoints": (
        lambda: [Checkpointed(True), Checkpointed(True), Checkpointed(True), nn.Linear(6, 3)], rows),
}  # fmt: skip


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


class Tokens(nn.Module):
    """Learned tokens: the output is a view of the stage's own parameter."""

    def __init__(self, view: bool) -> None:
        super().__init__()
        self.tokens = nn.Parameter(torch.randn(6))
        self.view = view

    def forward(self, x: Tensor) -> Tensor:
        out = self.tokens.expand(len(x), 6)
        return out if self.view else out * 1.0


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
    pipe = dtrp.Pipeline([nn.Linear(16, 16), nn.Linear(16, 16)], sgd, nn.functional.mse_loss, method="bp")
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
    pipe = dtrp.Pipeline([nn.Linear(6, 6, dtype=dtype), nn.Linear(6, 6, dtype=dtype)], sgd, nn.functional.mse_loss)
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
