"""Parameters that several stages hold: trained as in the unsplit model, once an update, and refused where they cannot be."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import adamw, assert_close, assert_same, batches_of, clone, pipeline, plain_loop, scheduler, sgd
from tied_models import TIED
from torch import Tensor, nn

import dtrp
from dtrp.stage.tied import find_ties

METHODS = [name for name in dtrp.list_methods() if dtrp.get_method(name).flush]
OTHERS = [name for name in dtrp.list_methods() if not dtrp.get_method(name).flush]
CUTS = {2: [2], 3: [1, 3], 4: [1, 2, 3]}


def trained(
    kind: str, make_optimizer: Any, num_stages: int, num_microbatches: int, **options: Any
) -> tuple[dtrp.Pipeline, nn.Sequential, nn.Sequential, list[Tensor], list[Tensor]]:
    """A pipeline, its model, the model that a plain loop has trained, and the losses of both."""
    make, data = TIED[kind]
    model = nn.Sequential(*make())
    plain, batches = clone(model), batches_of(data)
    cuts = CUTS[num_stages]
    pipe = pipeline(model, make_optimizer, cuts=cuts, num_microbatches=num_microbatches, **options)
    losses = [pipe.step(x, y) for x, y in batches]
    want = plain_loop(plain, batches, make_optimizer, pipe.rng, cuts=cuts, num_microbatches=num_microbatches)
    return pipe, model, plain, losses, want  # type: ignore[return-value]


@pytest.mark.sampled(3)
@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(("num_stages", "make_optimizer"), [(2, sgd), (3, sgd), (4, sgd), (4, adamw)])
@pytest.mark.parametrize("num_microbatches", [1, 3])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", TIED)
def test_they_train_as_in_the_unsplit_model(
    kind: str, method: str, num_stages: int, num_microbatches: int, make_optimizer: Any
) -> None:
    pipe, model, plain, losses, want = trained(kind, make_optimizer, num_stages, num_microbatches, method=method)
    assert_close(dict(enumerate(losses)), dict(enumerate(want)))  # type: ignore[arg-type]
    assert_close(model.state_dict(), plain.state_dict(), 1e-11)
    assert pipe.model_state_dict().keys() == plain.state_dict().keys(), "both names, as of the plain model"
    assert not [name for name, p in model.named_parameters() if p.grad is not None]


@pytest.mark.parametrize("kind", [kind for kind in TIED if kind != "three holders and two ties"])
def test_two_holders_and_one_micro_batch_are_exact(kind: str) -> None:
    """The sum of two gradients does not depend on their order."""
    _, model, plain, losses, want = trained(kind, sgd, 4, 1, method="bp")
    assert all(torch.equal(a, b) for a, b in zip(losses, want, strict=True))
    assert_same(model.state_dict(), plain.state_dict())


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("method", ["bp", dtrp.get_method("bp", keep="input")])
def test_a_norm_over_all_stages_counts_the_gradient_once(method: Any) -> None:
    make, data = TIED["embedding and head"]
    model = nn.Sequential(*make()).requires_grad_(True)
    for part in model.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
    plain, batches = clone(model), batches_of(data)
    pipe = pipeline(model, num_stages=4, method=method, num_microbatches=2, max_grad_norm=0.2, clip="global")
    optimizer = sgd(list(plain.parameters()))
    schedule, norms = scheduler(optimizer), []
    for x, y in batches:
        pipe.step(x, y)
        nn.functional.cross_entropy(plain(x), y).backward()
        norms.append(float(nn.utils.clip_grad_norm_(plain.parameters(), 0.2)))
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    assert max(norms) > 0.2
    assert_close(model.state_dict(), plain.state_dict(), 1e-11)


def test_the_optimizers_state_is_there_once() -> None:
    pipe, *_ = trained("embedding and head", adamw, 4, 1, method="bp")
    state = pipe.state_dict()
    assert "0.weight" in state["optimizer"]["state"]
    assert "3.1.weight" not in state["optimizer"]["state"]
    assert [name for group in state["optimizer"]["param_groups"] for name in group["params"]].count("0.weight") == 1
    assert torch.equal(state["model"]["0.weight"], state["model"]["3.1.weight"])
    pipe, *_ = trained("one module in two stages", adamw, 4, 1, method="bp")
    assert pipe.optimizers[2] is None
    assert pipe.skipped_updates() == {0: [], 1: [], 2: [], 3: []}


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("num_stages", [1, 2])
@pytest.mark.parametrize("way", ["state_dict", "portable", "exact"])
def test_saved_and_loaded(way: str, num_stages: int, tmp_path: Path) -> None:
    make, data = TIED["three holders and two ties"]
    batches = batches_of(data)
    options: dict[str, Any] = {"method": "bp", "num_microbatches": 2}
    cuts = {1: [], **CUTS}

    def new(num_stages: int) -> tuple[dtrp.Pipeline, nn.Sequential]:
        model = nn.Sequential(*make())
        for part in model.modules():
            if isinstance(part, nn.Dropout):  # draws belong to a stage
                part.p = 0.0
        return pipeline(model, adamw, cuts=cuts[num_stages], **options), model

    if way == "exact" and num_stages == 1:
        num_stages = 4
    first, model = new(4)
    for x, y in batches[:4]:
        first.step(x, y)
    second, other = new(num_stages)
    if way == "state_dict":
        second.load_state_dict(first.state_dict())
    elif way == "portable" or num_stages == 4:
        first.save(tmp_path / "saved", portable=way == "portable")
        second.load(tmp_path / "saved")
    else:
        first.save(tmp_path / "saved")
        with pytest.raises(dtrp.CheckpointError, match="was saved with 4 stages"):
            second.load(tmp_path / "saved")
        return
    for pipe in (first, second):
        for x, y in batches[4:]:
            pipe.step(x, y)
    assert_close(other.state_dict(), model.state_dict(), 1e-11)
    plain = nn.Sequential(*make())
    plain.load_state_dict(second.model_state_dict())


def test_a_state_dict_in_which_they_are_two_is_refused() -> None:
    pipe, *_ = trained("embedding and head", sgd, 4, 1, method="bp")
    state = copy.deepcopy(pipe.state_dict())
    state["model"]["3.1.weight"] = state["model"]["3.1.weight"] + 1
    before = copy.deepcopy(pipe.model_state_dict())
    with pytest.raises(
        ValueError, match=r"3\.1\.weight and 0\.weight are one tensor of this model, and two in the state"
    ):
        pipe.load_state_dict(state)
    assert_same(pipe.model_state_dict(), before)


class HeadFirst(nn.Module):
    """Its shared parameter goes by the name of the head, which is read last."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(6, 9)
        self.embedding, self.f, self.g = nn.Embedding(9, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.embedding.weight = self.head.weight

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(torch.tanh(self.g(torch.tanh(self.f(self.embedding(x))))).mean(1))
        return out


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("way", ["state_dict", "portable"])
@pytest.mark.parametrize(("before", "after"), [(1, 3), (3, 1)])
def test_by_whichever_name_a_state_knows_it(before: int, after: int, way: str, tmp_path: Path) -> None:
    batches = batches_of(lambda: torch.randint(9, (12, 5)))

    def new(num_stages: int) -> tuple[dtrp.Pipeline, nn.Module]:
        model = HeadFirst()
        stages = dtrp.split(model, points=["f", "head"] if num_stages == 3 else [], example=batches[0][0])
        return pipeline(stages, adamw, method="bp"), model

    (first, model), (second, other) = new(before), new(after)
    assert next(name for name, _ in model.named_parameters()) == "head.weight"
    for x, y in batches[:4]:
        first.step(x, y)
    if way == "state_dict":
        second.load_state_dict(first.state_dict())
    else:
        first.save(tmp_path / "saved", portable=True)
        second.load(tmp_path / "saved")
    for pipe in (first, second):
        for x, y in batches[4:]:
            pipe.step(x, y)
    assert_close(other.state_dict(), model.state_dict(), 1e-11)
    names = [name for pipe in (first, second) for name in pipe.state_dict()["optimizer"]["state"] if "bias" not in name]
    one = {"f.weight", "g.weight"}
    assert set(names) == {*one, "head.weight", "embedding.weight"}, "one stage knows it as the plain model does"
    state = copy.deepcopy(first.state_dict())
    for group in state["optimizer"]["param_groups"]:
        group["params"] = [*group["params"], *({"head.weight", "embedding.weight"} - set(names[: len(one) + 1]))]
    with pytest.raises(ValueError, match="are one parameter of this model, and the state dict trained two; untie them"):
        second.load_state_dict(state)


@pytest.mark.parametrize("method", OTHERS)
def test_a_method_that_does_not_flush_refuses_them(method: str) -> None:
    make, _ = TIED["embedding and head"]
    with pytest.raises(
        ValueError,
        match=rf"0\.weight of stage 0 and 3\.1\.weight of stage 3 are one tensor, and stages of method='{method}' update "
        r"without waiting .* Pass method='bp' or 'gpipe', .*; cut the model so that both lie in one stage; freeze it; or give",
    ):
        pipeline(make(), method=method)
    with pytest.raises(ValueError, match=r"are one tensor \(and 1 more\), and stages"):
        pipeline(TIED["three holders and two ties"][0](), method=method)
    if not dtrp.get_method(method).local:
        pipeline(make(), method=dtrp.get_method(method, flush=True, predict=None))


@pytest.mark.parametrize("method", ["dtrp", "fdg", "bp"])
def test_the_ways_out(method: str) -> None:
    """Frozen, each its own, or in one stage: every method trains them."""
    make, data = TIED["embedding and head"]
    frozen, own, together = make(), make(), nn.Sequential(*make())
    frozen[0].requires_grad_(False)
    head = own[3][1]  # type: ignore[index]
    head.weight = nn.Parameter(head.weight.clone())
    inner = nn.Sequential(together[0], together[1], together[2], together[3])
    for model in (frozen, own, [inner, nn.Tanh()]):
        tensor = next(model[0].parameters())
        before = tensor.detach().clone()
        pipe = pipeline(model, method=method, num_microbatches=2)
        for x, y in batches_of(data):
            pipe.step(x, y)
        pipe.flush()
        assert torch.equal(tensor, before) == (model is frozen)


def test_what_cannot_be_shared() -> None:
    norm = nn.BatchNorm1d(6)
    with pytest.raises(
        ValueError, match=r"0\.running_mean of stage 0 and 2\.running_mean of stage 2 are one tensor, and a buffer"
    ):
        pipeline([norm, nn.Linear(6, 6), norm], method="bp")
    make, data = TIED["embedding and head"]
    layers = make()
    with pytest.raises(ValueError, match="are one tensor, which cannot be on cpu and meta; pass one device"):
        pipeline(layers, method="bp", devices=["cpu", "cpu", "cpu", "meta"])
    layers = make()
    sparse = nn.Embedding(9, 6, sparse=True)
    layers[0], layers[3][1].weight = sparse, sparse.weight  # type: ignore[index]
    pipe = dtrp.Pipeline(
        layers, lambda p: torch.optim.SGD(p, lr=0.1), nn.functional.cross_entropy, method="bp", num_microbatches=1
    )
    with pytest.raises(dtrp.StageError, match=r"stage 0, update .*the gradient of 0\.weight is sparse, .*sparse=False"):
        pipe.step(data(), torch.randint(3, (12,)))


def test_what_they_are_called() -> None:
    ties = find_ties([nn.Sequential(layer) for layer in TIED["three holders and two ties"][0]()])
    assert [str(tie) for tie in ties] == [
        "0.0.weight of stage 0 and 0.0.weight of stage 1 and 0.0.weight of stage 3",
        "0.0.bias of stage 1 and 0.0.bias of stage 2",
    ]
    assert [tie.owner for tie in ties] == [0, 1]
    assert [ties[0].partners(stage) for stage in range(4)] == [[1, 3], [0], [], [0]]
