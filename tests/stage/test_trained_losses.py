"""Losses with parameters: trained with the last stage, saved beside the model, and never in it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_same
from launching import Server, run_ranks
from rank_programs import trained_loss_run
from torch import Tensor, nn
from trained_losses import Centers, batches, network, sgd

import dtrp

pytestmark = pytest.mark.usefixtures("float64")
METHODS = [name for name in dtrp.list_methods() if name != "dgl"]


def pipeline(method: str, *, lr: float = 0.1, parts: int = 2, **options: Any) -> tuple[dtrp.Pipeline, Centers]:
    loss = Centers()
    made: dict[str, Any] = {"num_stages": 3, "seed": 7, **options}
    return dtrp.Pipeline(network(), lambda p: sgd(p, lr), loss, method=method, num_microbatches=parts, **made), loss


def plain(
    data: list[tuple[Tensor, Tensor]], *, lr: float, parts: int
) -> tuple[nn.Sequential, Centers, Any, list[Tensor]]:
    model, loss_fn = network(), Centers()
    optimizer = sgd([*model.parameters(), *loss_fn.parameters()], lr)
    losses = []
    for x, y in data:
        total = torch.zeros(())
        for part, target in zip(x.tensor_split(parts), y.tensor_split(parts), strict=True):
            loss = loss_fn(model(part), target) * (len(target) / len(y))
            loss.backward()
            total = total + loss.detach()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return model, loss_fn, optimizer, losses


@pytest.mark.parametrize("parts", [1, 3])
def test_bp_is_the_plain_loop(parts: int) -> None:
    pipe, loss_fn = pipeline("bp", parts=parts)
    losses = [pipe.step(x, y) for x, y in batches()]
    model, want_fn, _, want = plain(batches(), lr=0.1, parts=parts)
    assert all(torch.equal(a, b) for a, b in zip(losses, want, strict=True))
    assert_same(pipe.model_state_dict(), model.state_dict())
    assert_same(loss_fn.state_dict(), want_fn.state_dict())


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_its_gradient(method: str) -> None:
    """At a learning rate of 0; the loss is at the last stage, which has no delay."""
    pipe, loss_fn = pipeline(method, lr=0.0)
    for x, y in batches():
        pipe.step(x, y)
    pipe.flush()
    _, want_fn, optimizer, _ = plain(batches(), lr=0.0, parts=2)
    got = pipe.optimizers[-1].state  # type: ignore[union-attr]
    for p, q in zip(loss_fn.parameters(), want_fn.parameters(), strict=True):
        a, b = got[p]["momentum_buffer"], optimizer.state[q]["momentum_buffer"]
        assert (a - b).abs().max() <= 1e-12 * b.abs().max()


def test_where_it_is_saved_and_where_not(tmp_path: Path) -> None:
    pipe, loss_fn = pipeline("dtrp")
    for x, y in batches():
        pipe.step(x, y)
    pipe.flush()
    names = network().state_dict().keys()
    assert pipe.model_state_dict().keys() == names
    state = pipe.state_dict()
    assert state["model"].keys() == names
    assert_same(state["loss"]["model"], {f"loss.{name}": value for name, value in loss_fn.state_dict().items()})
    assert state["loss"]["optimizer"]["state"].keys() == {"loss.centers", "loss.scale"}
    assert state["optimizer"]["state"].keys() == dict(network().named_parameters()).keys()
    pipe.save_model(tmp_path / "model.pt")
    assert torch.load(tmp_path / "model.pt").keys() == names


@pytest.mark.parametrize("way", ["state_dict", "portable"])
@pytest.mark.parametrize("stages", [1, 2, 4])
def test_at_another_number_of_stages(stages: int, way: str, tmp_path: Path) -> None:
    pipe, loss_fn = pipeline("bp")
    for x, y in batches()[:4]:
        pipe.step(x, y)
    other, other_fn = pipeline("bp", num_stages=stages)
    if way == "state_dict":
        other.load_state_dict(pipe.state_dict())
    else:
        pipe.save(tmp_path / "saved", portable=True)
        other.load(tmp_path / "saved")
        assert "loss" in dtrp.saving.read_state(tmp_path / "saved")
    for x, y in batches()[4:]:
        assert torch.equal(pipe.step(x, y), other.step(x, y))
    assert_same(loss_fn.state_dict(), other_fn.state_dict())
    assert_same(pipe.model_state_dict(), other.model_state_dict())


def test_a_state_without_it_leaves_it(tmp_path: Path) -> None:
    pipe, _ = pipeline("bp")
    x, y = batches()[0]
    pipe.step(x, y)
    state = {name: value for name, value in pipe.state_dict().items() if name != "loss"}
    other, loss_fn = pipeline("bp")
    before = copy.deepcopy(loss_fn.state_dict())
    with pytest.warns(UserWarning, match="the state has no loss like that of stage 2, which stays as it is"):
        other.load_state_dict(state)
    assert_same(loss_fn.state_dict(), before)


@pytest.mark.parametrize("method", ["dtrp", "spectrain", "bp"])
def test_an_exact_checkpoint_goes_on_to_the_bit(method: str, tmp_path: Path) -> None:
    whole, whole_fn = pipeline(method)
    for x, y in batches():
        whole.step(x, y)
    begun, _ = pipeline(method)
    for x, y in batches()[:4]:
        begun.step(x, y)
    begun.save(tmp_path / "saved")
    taken, taken_fn = pipeline(method)
    taken.load(tmp_path / "saved")
    for x, y in batches()[4:]:
        taken.step(x, y)
    whole.flush()
    taken.flush()
    assert_same(taken.model_state_dict(), whole.model_state_dict())
    assert_same(taken_fn.state_dict(), whole_fn.state_dict())


@pytest.mark.full
def test_ranks_are_one_process(tmp_path: Path) -> None:
    server = Server()
    try:
        run_ranks(server, tmp_path, 3, "trained_loss_run")
    finally:
        server.close()
    trained_loss_run(str(tmp_path), on_ranks=False)
    want = torch.load(tmp_path / "local.pt")
    for rank in range(3):
        got = torch.load(tmp_path / f"run{rank}.pt")
        assert_same(got["model"], want["model"])
        assert_same(got["loss"]["model"], want["loss"]["model"])


class Holds(nn.Module):
    def __init__(self, held: nn.Module) -> None:
        super().__init__()
        self.held = held

    def forward(self, out: Tensor, y: Tensor) -> Tensor:
        return nn.functional.cross_entropy(out, y)


def test_what_a_loss_cannot_hold() -> None:
    model = network()
    with pytest.raises(
        ValueError, match=r"held\.weight of loss_fn is 2\.weight of stage 1; a loss has parameters of its own"
    ):
        dtrp.Pipeline(model, sgd, Holds(model[2]), num_stages=3, num_microbatches=1)
    named = nn.Sequential()
    named.add_module("first", nn.Linear(5, 4))
    named.add_module("loss", nn.Linear(4, 4))
    with pytest.raises(ValueError, match="a layer named 'loss'"):
        dtrp.Pipeline(named, sgd, Centers(), num_stages=2, num_microbatches=1)
    with pytest.raises(ValueError, match="by method 'dgl' every stage calls it"):
        dtrp.Pipeline(
            network(),
            sgd,
            Centers(),
            num_stages=3,
            method="dgl",
            aux=[nn.Linear(6, 4) for _ in range(2)],
            num_microbatches=1,
        )


def test_frozen_it_is_a_constant() -> None:
    loss = Centers().requires_grad_(False).eval()
    pipe = dtrp.Pipeline(network(), sgd, loss, num_stages=3, num_microbatches=1)
    for x, y in batches():
        pipe.step(x, y)
    pipe.flush()
    assert "loss" not in pipe.state_dict()
    assert torch.equal(loss.centers, Centers().centers)


class Normalized(nn.Module):
    """A loss whose batch norm moves with every micro-batch."""

    def __init__(self, *, affine: bool) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4, affine=affine)

    def forward(self, out: Tensor, y: Tensor) -> Tensor:
        return nn.functional.cross_entropy(self.norm(out), y)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize(
    ("method", "keep"), [("bp", None), ("gpipe", None), ("gpipe", "input"), ("dtrp", "auto"), ("spectrain", None)]
)
def test_its_buffers_move_once_and_are_saved(method: str, keep: Any, affine: bool, tmp_path: Path) -> None:
    def make() -> tuple[dtrp.Pipeline, Normalized]:
        loss_fn = Normalized(affine=affine)
        options = {"keep": keep, "memory_limit_bytes": 10**8 if keep == "auto" else None}
        made = dtrp.Pipeline(
            network(), sgd, loss_fn, num_stages=3, method=method, num_microbatches=2, seed=7, **options
        )
        return made, loss_fn

    whole, loss_fn = make()
    begun, _ = make()
    for x, y in batches()[:4]:
        whole.step(x, y)
        begun.step(x, y)
    assert loss_fn.norm.num_batches_tracked == 8
    begun.save(tmp_path / "saved")
    taken, taken_fn = make()
    taken.load(tmp_path / "saved")
    for x, y in batches()[4:]:
        assert torch.equal(whole.step(x, y), taken.step(x, y))
    whole.flush()
    taken.flush()
    assert_same(loss_fn.state_dict(), taken_fn.state_dict())


def test_constant_buffers_are_no_part_of_a_state() -> None:
    """Class weights, and a teacher in eval mode."""
    teacher = Holds(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).requires_grad_(False).eval())
    for loss_fn in (nn.CrossEntropyLoss(weight=torch.ones(4)), teacher):
        assert "loss" not in dtrp.Pipeline(network(), sgd, loss_fn, num_stages=3, num_microbatches=1).state_dict()
