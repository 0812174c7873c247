"""Terms that a traced forward adds to the loss, against the unsplit model's plain loop over the same micro-batches."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adding_models import MODELS, build, inputs
from helpers import with_aux
from launching import Server, run_ranks
from rank_programs import weighted_run
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint
from unsplit import SEED, assert_trained_alike, copied_from_the_first, drawing_by_stage, minibatches
from weighted_losses import Adds

import dtrp
from dtrp.stage.losses import collecting

pytestmark = pytest.mark.usefixtures("float64")
METHODS = [name for name in dtrp.list_methods() if name != "dgl"]


@copied_from_the_first
def make(kind: str, num_stages: int | None = None) -> tuple[nn.Module, dtrp.Stages]:
    model = build(kind)
    where: dict[str, Any] = {"points": MODELS[kind][1]} if num_stages is None else {"num_stages": num_stages}
    return model, dtrp.split(model, example=inputs(), **where)


def plain(
    model: nn.Module, points: tuple[str, ...], batches: list[Any], *, parts: int, lr: float
) -> tuple[list[Tensor], torch.optim.Optimizer]:
    """The loop that a user would write, with the terms in a list."""
    terms: list[Tensor] = []
    for layer in model.modules():
        if isinstance(layer, Adds):
            layer.add = terms.append  # type: ignore[method-assign]
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    losses, m = [], 0
    for x, y in batches:
        total = torch.zeros(())
        for part, target in zip(x.tensor_split(parts), y.tensor_split(parts), strict=True):
            terms.clear()
            with drawing_by_stage(model, points, m):
                out = model(part)
            loss = (cross_entropy(out, target) + sum(terms)) * (len(target) / len(y))
            loss.backward()
            total = total + loss.detach()
            m += 1
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses, optimizer


def pipeline(stages: dtrp.Stages, method: Any, *, lr: float = 0.05, parts: int = 3) -> dtrp.Pipeline:
    return dtrp.Pipeline(
        stages,
        lambda params: torch.optim.SGD(params, lr=lr, momentum=0.9),
        cross_entropy,
        method=method,
        num_microbatches=parts,
        seed=SEED,
        **with_aux(method, num_classes=6),
    )


def check(model: nn.Module, stages: dtrp.Stages, method: Any = "bp") -> None:
    twin = copy.deepcopy(model)
    batches = minibatches(inputs(), 6)
    pipe = pipeline(stages, method)
    losses = [pipe.step(*batch) for batch in batches]
    want, _ = plain(twin, stages.points, batches, parts=3, lr=0.05)
    assert_trained_alike(model, twin, losses, want)


@pytest.mark.sampled(4)
@pytest.mark.parametrize(
    ("kind", "num_stages"), [("mixture of experts", 4), *((kind, num) for kind in MODELS for num in (1, 2, None))]
)
def test_bp_trains_as_the_plain_loop(kind: str, num_stages: int | None) -> None:
    """In as many stages, or in three at the points that belong to the model."""
    check(*make(kind, num_stages))


@pytest.mark.sampled(4)
@pytest.mark.parametrize("kind", MODELS)
def test_recomputed(kind: str) -> None:
    check(*make(kind), dtrp.get_method("bp", keep="input"))


@pytest.mark.sampled(4)
@pytest.mark.parametrize("kind", [kind for kind in MODELS if kind != "tied"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_its_loss_and_gradient(method: str, kind: str) -> None:
    """At a learning rate of 0 every version of the weights is the same, and the momentum is the sum of the gradients."""
    model, stages = make(kind)
    twin = copy.deepcopy(model)
    pipe = pipeline(stages, method, lr=0.0)
    batches = minibatches(inputs(), 6)
    losses = [pipe.step(*batch) for batch in batches]
    pipe.flush()
    want, optimizer = plain(twin, stages.points, batches, parts=3, lr=0.0)
    torch.testing.assert_close(torch.stack(losses), torch.stack(want), rtol=1e-10, atol=1e-10)
    state = pipe.state_dict()["optimizer"]["state"]
    for name, p in twin.named_parameters():
        got, buffer = state[name]["momentum_buffer"], optimizer.state[p]["momentum_buffer"]
        torch.testing.assert_close(got, buffer, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("method", ["dtrp", "spectrain", "dgl"])
def test_saved_in_flight(method: str, tmp_path: Path) -> None:
    batches = minibatches(inputs(), 6, 8)
    runs = [pipeline(make("variational")[1], method) for _ in range(3)]
    want = [runs[0].step(*batch) for batch in batches]
    runs[0].flush()
    got = [runs[1].step(*batch) for batch in batches[:4]]
    runs[1].save(tmp_path / "saved")
    runs[2].load(tmp_path / "saved")
    got += [runs[2].step(*batch) for batch in batches[4:]]
    runs[2].flush()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    for name, value in runs[0].model_state_dict().items():
        assert torch.equal(runs[2].model_state_dict()[name], value), name


@pytest.mark.full
@pytest.mark.sampled(4)
@pytest.mark.parametrize(("kind", "method"), [("variational", "dtrp"), ("twins", "bp")])
def test_ranks_are_one_process(kind: str, method: str, server: Server, tmp_path: Path) -> None:
    """To the bit, and the ranks take up what one process has saved in flight."""
    folders = [tmp_path / name for name in ("local", "ranks", "taken up")]
    for folder in folders:
        folder.mkdir()
    weighted_run(str(folders[0]), kind, method, on_ranks=False)
    run_ranks(server, folders[1], 3, "weighted_run", kind, method)
    run_ranks(server, folders[2], 3, "weighted_run", kind, method, 1, str(folders[0] / "saved"))
    want, model = torch.load(folders[0] / "run0.pt")
    for folder, num in ((folders[1], 8), (folders[2], 4)):
        losses, values = torch.load(folder / "run2.pt")
        assert len(losses) == num
        assert all(torch.equal(a, b) for a, b in zip(losses, want[-num:], strict=True))
        assert all(torch.equal(values[name], value) for name, value in model.items())


# -- where a term stands in the forward -----------------------------------------------------------------------


class Placed(Adds):
    def __init__(self, forward: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__(6)
        self.scale = nn.Parameter(torch.ones(()))
        self.count = 0
        self._forward = forward

    def forward(self, h: Tensor) -> Tensor:
        return self._forward(self, h)


class Row(nn.Module):
    """Four layers with one forward."""

    def __init__(self, forward: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.layers = nn.Linear(5, 6), nn.ModuleList(Placed(forward) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        for layer in self.layers:
            h = layer(h)
        return h


def penalized(self: Any, h: Tensor) -> Tensor:
    out: Tensor = self.linear(h).tanh()
    self.add(0.1 * out.square().mean())
    return out


def in_a_checkpoint(self: Any, h: Tensor) -> Tensor:
    out: Tensor = checkpoint(lambda t: penalized(self, t), h, use_reentrant=False)
    return out


def without_gradient(self: Any, h: Tensor) -> Tensor:
    with torch.no_grad():
        self.add(h.square().mean())
        inner = h.abs().mean()
    out = penalized(self, h)
    self.add(inner * out.mean())
    return out


def added_without_gradient(self: Any, h: Tensor) -> Tensor:
    value = 0.1 * h.square().mean()
    with torch.no_grad():
        self.add(value)  # whose gradient is that of where it was made
    return h + self.linear(h).tanh()


def in_autocast(self: Any, h: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        scores = self.linear(h)
        self.add(0.1 * (scores @ scores.T).mean().double())
    return h + scores.double()


def of_a_weight(self: Any, h: Tensor) -> Tensor:
    for _ in range(2):
        self.add(self.scale)
    self.add(torch.ones(()))
    return self.linear(h) * self.scale


def written_afterwards(self: Any, h: Tensor) -> Tensor:
    value = h.square().mean()
    self.add(value)
    value.mul_(0.1)
    return h + self.linear(h).tanh()


@pytest.mark.sampled(4)
@pytest.mark.parametrize(
    "forward",
    [in_a_checkpoint, without_gradient, added_without_gradient, in_autocast, of_a_weight, written_afterwards],
)
@pytest.mark.parametrize("points", [["layers.2"], ["layers.1", "layers.2", "layers.3"]])
def test_a_term_stands_anywhere(forward: Callable[[Any, Tensor], Tensor], points: list[str]) -> None:
    model = Row(forward)
    check(model, dtrp.split(model, points=points, example=inputs()))


def test_a_term_belongs_to_the_stage_of_its_module() -> None:
    """By dgl each stage learns from its terms alone: those of the others reach none of its weights."""
    moved = []
    for silent in (None, 1, 3):
        model = Row(penalized)
        if silent is not None:
            model.layers[silent].add = lambda value: None  # type: ignore[union-attr]
        before = copy.deepcopy(model.state_dict())
        pipe = pipeline(dtrp.split(model, points=["layers.0", "layers.2"], example=inputs()), "dgl", parts=1)
        pipe.step(*minibatches(inputs(), 6, 1)[0])
        pipe.flush()
        moved.append({name: value - before[name] for name, value in model.state_dict().items()})
    for n, stage in ((1, {"layers.0", "layers.1"}), (2, {"layers.2", "layers.3"})):
        differs = {name for name in moved[0] if not torch.equal(moved[0][name], moved[n][name])}
        assert {name.rsplit(".", 2)[0] for name in differs} == stage


def test_a_model_in_eval_mode_adds_its_terms_too() -> None:
    model = build("block called thrice").eval()
    check(model, dtrp.split(model, points=MODELS["block called thrice"][1], example=inputs()))


@pytest.mark.full
def test_compiled_stages_add_their_terms() -> None:
    losses, batches = [], minibatches(inputs(), 6)[:1] * 4
    for options in ({}, {"compile": {"backend": "eager"}}):
        pipe = dtrp.Pipeline(
            make("twins")[1],
            lambda params: torch.optim.SGD(params, lr=0.05),
            cross_entropy,
            num_microbatches=1,
            **options,
        )
        losses.append(torch.stack([pipe.step(*batch) for batch in batches]))
    torch.testing.assert_close(*losses, rtol=1e-10, atol=1e-10)


# -- refused -----------------------------------------------------------------------------------------------------


def counted(self: Any, h: Tensor) -> Tensor:
    self.count += 1
    self.add(self.count * h.mean())
    return h


def test_terms_are_compared_with_the_models() -> None:
    with pytest.raises(ValueError, match=r"in eval mode, terms of add_loss\[\d\] differs by .* of its norm"):
        dtrp.split(Row(counted), num_stages=2, example=inputs())


def test_what_is_no_term_is_refused_with_its_place() -> None:
    def several(self: Any, h: Tensor) -> Tensor:
        self.add(h.square())
        return h

    with pytest.raises(ValueError, match=r"cannot be traced in layers.0 .*add_loss was given a tensor of shape"):
        dtrp.split(Row(several), num_stages=2, example=inputs())


def test_a_split_that_fails_leaves_nothing_behind() -> None:
    class Branch(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    before = nn.Module.__setattr__, torch.is_autocast_enabled, torch.get_autocast_dtype
    with collecting() as terms:
        with pytest.raises(ValueError, match="cannot be traced"):
            dtrp.split(Branch(), num_stages=2, example=torch.randn(4, 5))
        assert (nn.Module.__setattr__, torch.is_autocast_enabled, torch.get_autocast_dtype) == before
        gc.collect()
        dtrp.add_loss(torch.ones(()))
    assert len(terms) == 1
