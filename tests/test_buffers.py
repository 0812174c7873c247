"""Kept graphs whose forward reads a buffer that moves: a checkpoint brings them back to the bit, or is not written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import adamw, clone, minibatches, network, pipeline
from test_models_in_stages import Renorm
from test_saving import check_equal, data, run
from torch import Tensor, nn

import dtrp
from dtrp.buffers import Met, Overwritten, buffers_of, marks, values_met
from dtrp.modes import members


def spectral() -> nn.Sequential:
    norm = nn.utils.parametrizations.spectral_norm
    return nn.Sequential(*[nn.Sequential(norm(nn.Linear(5, 5)), nn.Tanh()) for _ in range(5)], nn.Linear(5, 3))


class Mean(Renorm):
    """A Renorm for this module's data, every third of whose forwards moves nothing."""

    def __init__(self, in_place: bool) -> None:
        super().__init__(in_place)
        self.linear = nn.Linear(5, 5)
        self.size = torch.ones(5)
        self.register_buffer("count", torch.zeros((), dtype=torch.long))
        self.register_buffer("mask", torch.ones(5, 5))

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        if self.count % 3 == 0:
            return x + self.size
        return super().forward(x @ self.mask)


def renorm() -> nn.Sequential:
    return nn.Sequential(Mean(True), nn.BatchNorm1d(5), Mean(False), Mean(True), nn.Dropout(0.2), nn.Linear(5, 3))


@pytest.mark.parametrize(
    ("method", "parts"),
    [("fdg", 1), ("adl", 4), ("ddg", 1), ("pipedream", 4), ("spectrain", 1), ("bp", 4), ("dtrp", 1)],
)
@pytest.mark.parametrize("model", [spectral, renorm], ids=lambda make: make.__name__)
def test_it_goes_on_to_the_bit(tmp_path: Path, model: Any, method: str, parts: int) -> None:
    cell = (method, 3, parts, "sgd")
    check_equal(run(*cell, tmp_path / "saved", (1, 2, 3, 4, 5, 8, 9), model), run(*cell, tmp_path, model=model))


@pytest.mark.parametrize("options", [{"keep": "graph"}, {"keep": "auto", "memory_limit_bytes": 10**9}], ids=str)
def test_graphs_kept_by_choice(tmp_path: Path, options: dict[str, Any]) -> None:
    cell = ("dtrp", 3, 2, "adamw")
    check_equal(
        run(*cell, tmp_path / "saved", (1, 4, 5), renorm, **options), run(*cell, tmp_path, model=renorm, **options)
    )


def test_batch_norm_that_is_frozen_and_freed(tmp_path: Path) -> None:
    """What it reads in eval mode moves in train mode, while graphs are in flight that have read it."""

    def go(stops: tuple[int, ...]) -> Any:
        torch.manual_seed(0)
        pipe, losses = pipeline(network(), num_stages=3, method="fdg", num_microbatches=2), []
        for i, (x, y) in enumerate(data()):
            if i in stops:
                pipe.save(tmp_path / "saved")
                pipe = pipeline(network(), num_stages=3, method="fdg", num_microbatches=2)
                pipe.load(tmp_path / "saved")
            for stage in pipe.stages:
                for module in stage.modules():
                    module.train(not isinstance(module, nn.BatchNorm1d) or i % 4 != 1)
            losses.append(pipe.step(x, y))
        pipe.flush()
        return losses, pipe.state_dict(), pipe.delays()

    want = go(())
    for stop in (1, 2, 6):
        check_equal(go((stop,)), want)


@pytest.mark.parametrize("method", ["fdg", "dtrp", "bp"])
def test_a_buffer_that_the_caller_writes(tmp_path: Path, method: str) -> None:
    """A temperature that is annealed between steps: refused where a graph has met another, right elsewhere."""
    pipe = pipeline(renorm(), num_stages=3, method=method)
    for x, y in data()[:3]:
        pipe.step(x, y)
        pipe.save(tmp_path / "saved")
    pipe.stages[0][0].mask.mul_(0.5)
    if method == "fdg":
        message = (
            r"the buffer 0\.mask of stage 0 has been written between steps.*call pipe\.flush\(\) before pipe\.save"
        )
        with pytest.raises(dtrp.CheckpointError, match=message):
            pipe.save(tmp_path / "saved")
        pipe.step(*data()[3])
        with pytest.raises(dtrp.CheckpointError, match=message):
            pipe.save(tmp_path / "saved")
        pipe.save(tmp_path / "portable", portable=True)
    pipe.save(tmp_path / "saved")
    want = [pipe.step(x, y) for x, y in data()[4:]]
    other = pipeline(renorm(), num_stages=3, method=method)
    other.load(tmp_path / "saved")
    assert all(torch.equal(other.step(x, y), loss) for (x, y), loss in zip(data()[4:], want, strict=True))


class Counted(nn.Module):
    """Keeps, and reads, a number that is no buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self.weight = nn.Parameter(torch.ones(5))

    def forward(self, x: Tensor) -> Tensor:
        self.count += self.training and torch.is_grad_enabled()
        return x * self.weight / (1 + self.count)

    def get_extra_state(self) -> Any:
        return {"count": self.count, "as a tensor": torch.tensor(self.count)}

    def set_extra_state(self, state: Any) -> None:
        assert state["as a tensor"] == state["count"]
        self.count = state["count"]


def counted() -> nn.Sequential:
    return nn.Sequential(Counted(), nn.Linear(5, 5), Counted(), nn.Linear(5, 5), Counted(), nn.Linear(5, 3))


@pytest.mark.parametrize("method", ["dtrp", "bp"])
def test_extra_state_comes_back(tmp_path: Path, method: str) -> None:
    cell = (method, 3, 2, "sgd")
    check_equal_but_extra(run(*cell, tmp_path / "saved", (2, 4, 9), counted), run(*cell, tmp_path, model=counted))


def check_equal_but_extra(a: Any, b: Any) -> None:
    for result in (a, b):
        extra = {name: result[1]["model"].pop(name) for name in list(result[1]["model"]) if "extra" in name}
        assert [state["count"] for state in extra.values()] == [20] * 3
    check_equal(a, b)


def test_extra_state_with_graphs_in_flight_is_refused(tmp_path: Path) -> None:
    pipe = pipeline(counted(), num_stages=3, method="fdg")
    pipe.save(tmp_path / "saved")
    pipe.step(*data()[0])
    with pytest.raises(dtrp.CheckpointError, match=r"stage 0 has graphs in flight and a module with get_extra_state"):
        pipe.save(tmp_path / "saved")
    pipe.flush()
    pipe.save(tmp_path / "saved")


def test_what_a_graph_keeps_is_counted() -> None:
    """Buffers that have been seen to move, and not the mask, which never does."""
    model = nn.Sequential(Mean(True), nn.Linear(5, 3))
    pipe = pipeline(model, num_stages=2, method="fdg")
    (x, y), *_ = minibatches(2)
    for _ in range(3):
        pipe.step(x, y)
    (stage, _) = pipe._engine.stages
    kept = [sorted(held.met.moved) for held in stage._stash if held.met is not None]
    assert kept == [["0.count", "0.size"]] * 2
    graphs = [held.nbytes - x.nbytes for held in stage._stash]
    assert all(size >= 8 + 5 * 4 for size in graphs)


@pytest.mark.parametrize("options", [{}, {"keep": "auto", "memory_limit_bytes": 10**9}], ids=str)
def test_what_batch_norm_moves_is_seen(options: dict[str, Any]) -> None:
    """Though it does not count as written, and though trial forwards came first."""
    pipe = pipeline(nn.Sequential(nn.BatchNorm1d(5), nn.Linear(5, 3)), num_stages=2, method="fdg", **options)
    pipe.step(*data()[0])
    (held,) = pipe._engine.stages[0]._stash
    assert sorted(held.met.moved) == ["0.num_batches_tracked", "0.running_mean", "0.running_var"]


def test_a_plain_network_keeps_no_buffer() -> None:
    pipe = pipeline(nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 3)), adamw, num_stages=2, method="fdg")
    pipe.step(*data()[0])
    assert all(held.met is None for stage in pipe._engine.stages for held in stage._stash)


def test_values_met() -> None:
    a, b = torch.zeros(1), torch.zeros(1)
    buffers = {"a": a, "b": b}

    def forward(*moves: str) -> Met:
        met = Met({name: buffers[name].clone() for name in moves}, before=marks(buffers))
        for name in moves:
            buffers[name].add_(1)
        met.after = marks(buffers)
        return met

    entries = [forward("b"), forward("a"), forward(), forward("a", "b"), forward()]
    got = [{name: value.item() for name, value in each.items()} for each in values_met(entries, buffers)]
    assert got == [{"a": 0, "b": 0}, {"a": 0, "b": 1}, {"a": 1, "b": 1}, {"a": 1, "b": 1}, {}]
    a.add_(1)
    with pytest.raises(Overwritten, match="^a$"):
        values_met(entries, buffers)
    assert values_met(entries[:0], buffers) == []
    entries = [forward("a")]
    a.add_(1)  # known: what it was before is kept
    assert values_met(entries, buffers)[0]["a"] == 3
    b.add_(1)
    entries.append(forward("b"))
    with pytest.raises(Overwritten, match="^b$"):
        values_met(entries, buffers)
    with pytest.raises(Overwritten, match="^c$"):
        values_met([forward()], {**buffers, "c": torch.zeros(1)})
    entries = [forward()]
    with pytest.raises(Overwritten, match="^b$"):
        values_met(entries, {"a": a, "b": clone(b)})


def with_shared_parts() -> nn.Module:
    shared = nn.Sequential(nn.BatchNorm1d(5), nn.Tanh())
    model = nn.Sequential(shared, nn.Sequential(nn.Linear(5, 5), shared[0]), shared)
    model.register_module("nothing", None)
    model.register_module("last", nn.Sequential(nn.Sequential(nn.Dropout())))
    return model


def scripted() -> nn.Module:
    module: nn.Module = torch.jit.script(nn.Sequential(nn.BatchNorm1d(5), nn.Sequential(nn.Linear(5, 5), nn.Tanh())))
    return module


@pytest.mark.parametrize("make", [with_shared_parts, spectral, network, scripted, nn.Tanh])
@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_members_and_buffers_are_those_that_torch_finds(make: Any) -> None:
    model = make()
    assert [id(member) for member in members(model)] == [id(member) for member in model.modules()]
    assert buffers_of(model).keys() == dict(model.named_buffers()).keys()


def test_a_buffer_that_is_registered_later_is_found() -> None:
    model = nn.Sequential(nn.Tanh(), nn.Sequential(nn.Tanh()))
    assert buffers_of(model) == {}
    model[1][0].register_buffer("late", torch.ones(2))
    assert list(buffers_of(model)) == ["1.0.late"]
