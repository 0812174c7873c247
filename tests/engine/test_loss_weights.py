"""``loss_weight``: what a micro-batch counts for, against a plain loop over the same micro-batches."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import with_aux
from launching import Server, run_ranks
from rank_programs import weighted_run
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from weighted_losses import LOSSES, Adds, adding, labelled

import dtrp

pytestmark = pytest.mark.usefixtures("float64")
CUTS = [1, 3]
METHODS = [name for name in dtrp.list_methods() if name != "dgl"]


def network() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3))


def plain(
    model: nn.Sequential, data: list[tuple[Tensor, Tensor]], kind: str, *, parts: int, lr: float
) -> tuple[list[Tensor], torch.optim.Optimizer]:
    loss_fn, weigh = LOSSES[kind]
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    losses = []
    for x, y in data:
        targets = y.tensor_split(min(parts, len(y)))
        weights = [float(weigh(target)) for target in targets]
        total = torch.zeros(())
        for part, target, weight in zip(x.tensor_split(len(targets)), targets, weights, strict=True):
            if weight:
                loss = loss_fn(model(part), target) * (weight / sum(weights))
                loss.backward()
                total = total + loss.detach()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses, optimizer


def pipeline(kind: str, method: str, *, lr: float, parts: int, model: Any = None, **options: Any) -> dtrp.Pipeline:
    loss_fn, weigh = LOSSES[kind]
    return dtrp.Pipeline(
        model or network(),
        lambda params: torch.optim.SGD(params, lr=lr, momentum=0.9),
        loss_fn,
        cuts=CUTS,
        method=method,
        num_microbatches=parts,
        loss_weight=weigh,
        seed=7,
        **with_aux(method, num_classes=3),
        **options,
    )


def assert_near(a: dict[str, Tensor], b: dict[str, Tensor], bound: float = 1e-12) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert (a[name] - b[name]).abs().max() <= bound * b[name].abs().max().clamp(min=1), name


@pytest.mark.parametrize("parts", [1, 2, 3])
@pytest.mark.parametrize("kind", LOSSES)
def test_bp_is_the_plain_loop(kind: str, parts: int) -> None:
    model = network()
    pipe = pipeline(kind, "bp", lr=0.1, parts=parts)
    losses = [pipe.step(x, y) for x, y in labelled(kind)]
    want, _ = plain(model, labelled(kind), kind, parts=parts, lr=0.1)
    assert all(abs(a - b) <= 1e-12 for a, b in zip(losses, want, strict=True))
    assert_near(pipe.model_state_dict(), model.state_dict())


def test_whole_mini_batches_are_the_mean_over_what_counts() -> None:
    """However many parts: the loss of the mini-batch as a whole."""
    data = labelled("ignored")
    model = network()
    want, _ = plain(model, data, "ignored", parts=1, lr=0.1)
    pipe = pipeline("ignored", "bp", lr=0.1, parts=3)
    losses = [pipe.step(x, y) for x, y in data]
    assert all(abs(a - b) <= 1e-12 for a, b in zip(losses, want, strict=True))
    assert_near(pipe.model_state_dict(), model.state_dict())


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_the_gradient(method: str, kind: str) -> None:
    """At a learning rate of 0 every version of the weights is the same."""
    model = network()
    pipe = pipeline(kind, method, lr=0.0, parts=3)
    losses = [pipe.step(x, y) for x, y in labelled(kind)]
    pipe.flush()
    want, optimizer = plain(model, labelled(kind), kind, parts=3, lr=0.0)
    assert all(abs(a - b) <= 1e-12 for a, b in zip(losses, want, strict=True))
    state = pipe.state_dict()["optimizer"]["state"]
    assert_near(
        {name: state[name]["momentum_buffer"] for name, _ in model.named_parameters()},
        {name: optimizer.state[p]["momentum_buffer"] for name, p in model.named_parameters()},
    )


class Moves(nn.BatchNorm1d):
    """BatchNorm: its statistics move with every micro-batch, whatever that counts for."""


@pytest.mark.parametrize("method", ["bp", "dtrp", "fdg"])
def test_a_micro_batch_of_no_weight_moves_buffers_and_its_loss_is_not_used(method: str) -> None:
    def make() -> nn.Sequential:
        torch.manual_seed(3)
        return nn.Sequential(nn.Linear(5, 6), Moves(6), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3))

    x, y = torch.randn(6, 5), torch.tensor([-100, -100, 0, 1, 2, -100])
    pipe = pipeline("ignored", method, lr=0.1, parts=3, model=make(), on_nonfinite="skip")
    loss = pipe.step(x, y)  # cross_entropy of the first part is nan
    pipe.flush()
    assert loss.isfinite()
    assert not any(pipe.skipped_updates().values())
    assert pipe.model_state_dict()["1.num_batches_tracked"] == 3
    assert all(value.isfinite().all() for value in pipe.model_state_dict().values())


@pytest.mark.parametrize("method", ["bp", "dtrp", "spectrain", "dgl"])
def test_a_mini_batch_of_no_weight_is_one_without_a_loss(method: str) -> None:
    x, none = torch.randn(6, 5), torch.full((6,), -100)
    pipe = pipeline("ignored", method, lr=0.1, parts=2)
    with pytest.raises(dtrp.StageError, match="mini-batch 0 has no mean: loss_weight gave 0 for all of its targets"):
        pipe.step(x, none)
    pipe = pipeline("ignored", method, lr=0.1, parts=2, on_nonfinite="skip")
    before = copy.deepcopy(pipe.model_state_dict())
    assert pipe.step(x, none).isnan()
    pipe.flush()
    assert pipe.skipped_updates() == {0: [0], 1: [0], 2: [0]}
    assert_near(pipe.model_state_dict(), before, 0.0)
    pipe.step(x, torch.randint(3, (6,)))
    pipe.flush()
    assert all(value.isfinite().all() for value in pipe.model_state_dict().values())


@pytest.mark.parametrize("method", ["dtrp", "spectrain", "fdg", "dgl"])
@pytest.mark.parametrize("kind", LOSSES)
def test_saved_in_flight(kind: str, method: str, tmp_path: Path) -> None:
    data = labelled(kind, 8)
    whole = pipeline(kind, method, lr=0.1, parts=3)
    want = [whole.step(x, y) for x, y in data]
    whole.flush()
    begun = pipeline(kind, method, lr=0.1, parts=3)
    got = [begun.step(x, y) for x, y in data[:4]]
    begun.save(tmp_path / "saved")
    taken = pipeline(kind, method, lr=0.1, parts=3)
    taken.load(tmp_path / "saved")
    got += [taken.step(x, y) for x, y in data[4:]]
    taken.flush()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert_near(taken.model_state_dict(), whole.model_state_dict(), 0.0)
    other = dtrp.Pipeline(
        network(), lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9), LOSSES[kind][0], cuts=CUTS,
        method=method, num_microbatches=3, seed=7, **with_aux(method, num_classes=3),
    )  # fmt: skip
    with pytest.raises(dtrp.CheckpointError, match="was saved with loss_weight=a function"):
        other.load(tmp_path / "saved")


@pytest.mark.parametrize(
    ("weigh", "message"),
    [
        (lambda y: -1, "loss_weight returned -1.0; it returns a finite number of at least 0"),
        (lambda y: float("nan"), "loss_weight returned nan"),
        (lambda y: y, r"loss_weight returned a tensor of shape \(3,\); it returns one number"),
        (lambda y: None, "loss_weight returned a NoneType; it returns one number"),
    ],
)
def test_what_is_no_weight(weigh: Any, message: str) -> None:
    """Nothing has happened, and the pipeline goes on."""
    model = network()
    answers = iter([weigh])
    pipe = dtrp.Pipeline(
        model,
        lambda params: torch.optim.SGD(params, lr=0.1),
        cross_entropy,
        cuts=CUTS,
        num_microbatches=2,
        loss_weight=lambda y: next(answers, len)(y),
    )
    x, y = torch.randn(6, 5), torch.randint(3, (6,))
    with pytest.raises((TypeError, ValueError), match=message):
        pipe.step(x, y)
    assert pipe.num_updates == 0
    assert pipe.step(x, y).isfinite()


def test_a_number_of_numpy_is_a_weight() -> None:
    data = labelled("ignored", 3)
    losses = {}
    for weigh in (lambda y: (y != -100).sum(), lambda y: (y.numpy() != -100).sum()):
        pipe = dtrp.Pipeline(
            network(), lambda params: torch.optim.SGD(params, lr=0.1), cross_entropy,
            cuts=CUTS, num_microbatches=2, loss_weight=weigh, seed=7,
        )  # fmt: skip
        losses[weigh] = [pipe.step(x, y).item() for x, y in data]
    first, second = losses.values()
    assert first == second


@pytest.mark.parametrize(
    "loss_fn", [nn.CrossEntropyLoss(reduction="sum"), functools.partial(cross_entropy, reduction="sum")]
)
def test_a_sum_is_refused(loss_fn: Any) -> None:
    with pytest.raises(ValueError, match="reduction='sum'; a loss is the mean over the samples"):
        dtrp.Pipeline(network(), lambda params: torch.optim.SGD(params, lr=0.1), loss_fn, cuts=CUTS, num_microbatches=1)


def test_a_weight_is_a_function() -> None:
    with pytest.raises(TypeError, match="loss_weight is a int; pass a function of the targets"):
        dtrp.Pipeline(
            network(),
            lambda params: torch.optim.SGD(params, lr=0.1),
            cross_entropy,
            cuts=CUTS,
            loss_weight=3,
            num_microbatches=1,
        )


# -- ranks ------------------------------------------------------------------------------------------------------


Run = tuple[list[Tensor | None], dict[str, Tensor]]


def runs(folder: Path, num_ranks: int) -> list[Run]:
    return [torch.load(folder / f"run{rank}.pt") for rank in range(num_ranks)]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


@pytest.mark.full
@pytest.mark.sampled(8)
@pytest.mark.parametrize(
    ("kind", "method"), [("latent", "dtrp"), ("experts", "bp"), ("penalty", "fdg"), ("latent", "dgl")]
)
def test_ranks_are_one_process(kind: str, method: str, server: Server, tmp_path: Path) -> None:
    """To the bit; and each takes up what the other has saved in flight."""
    for name in ("ranks", "local", "taken up on ranks", "taken up locally"):
        (tmp_path / name).mkdir()
    run_ranks(server, tmp_path / "ranks", 3, "weighted_run", kind, method)
    weighted_run(str(tmp_path / "local"), kind, method, on_ranks=False)
    saved = str(tmp_path / "local" / "saved")
    folder = tmp_path / "taken up on ranks"
    run_ranks(server, folder, 3, "weighted_run", kind, method, 1, saved)
    weighted_run(
        str(tmp_path / "taken up locally"), kind, method, loads=str(tmp_path / "ranks" / "saved"), on_ranks=False
    )
    ((want, model),) = runs(tmp_path / "local", 1)
    for losses, values in (
        runs(tmp_path / "ranks", 3)[-1],
        runs(folder, 3)[-1],
        *runs(tmp_path / "taken up locally", 1),
    ):
        assert len(losses) in (4, 8)
        assert all(torch.equal(a, b) for a, b in zip(losses, want[-len(losses) :], strict=True))  # type: ignore[arg-type]
        assert_near(values, model, 0.0)


@pytest.mark.full
@pytest.mark.sampled(2)
@pytest.mark.parametrize("kind", ["experts", "penalty"])
def test_replicas_are_the_plain_loop(kind: str, server: Server, tmp_path: Path) -> None:
    """Each replica cuts its shard, and each part counts for its labels among those of all replicas."""
    run_ranks(server, tmp_path, 4, "weighted_run", kind, "bp", 2)
    model = adding(kind)
    terms: list[Tensor] = []
    for layer in model:
        if isinstance(layer, Adds):
            layer.add = terms.append  # type: ignore[method-assign]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for x, y in labelled("ignored", 8):
        parts = [
            (part, target)
            for r in range(2)
            for part, target in zip(x[r::2].tensor_split(3), y[r::2].tensor_split(3), strict=True)
        ]
        total = sum(float((target != -100).sum()) for _, target in parts)
        loss = torch.zeros(())
        for part, target in parts:
            if weight := float((target != -100).sum()):
                share = (cross_entropy(model(part), target) + sum(terms)) * (weight / total)
                share.backward()
                loss = loss + share.detach()
            terms.clear()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss)
    for rank, (got, values) in enumerate(runs(tmp_path, 4)):
        if rank % 2:
            assert all(abs(a - b) <= 1e-12 for a, b in zip(got, losses, strict=True))  # type: ignore[operator]
        assert_near(values, model.state_dict())


@pytest.mark.sampled(2)
@pytest.mark.parametrize("method", ["bp", "dtrp"])
def test_replicas_without_any_weight(method: str, server: Server, tmp_path: Path) -> None:
    run_ranks(server, tmp_path, 4, "weightless_replicas", method)
    for rank in range(4):
        heard = json.loads((tmp_path / f"heard{rank}.json").read_text())
        assert heard["skipped"] == [1]
        assert "the loss of mini-batch 1 has no mean: loss_weight gave 0 for all of its targets" in heard["stopped"]
