"""Kept graphs whose forward reads a buffer that moves: a checkpoint brings them back to the bit, or is not written."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from checkpoints import check_equal, data, run
from helpers import adamw, assert_same, clone, minibatches, network, pipeline
from moving_models import KINDS, Carried, Grown, Observed, Passed, Replaced, model_of, sequences
from strained_models import Renorm
from torch import Tensor, nn

import dtrp
from dtrp.saving import manifest
from dtrp.stage.buffers import ABSENT, BuffersRead, Overwritten, marks, values_met
from dtrp.tensors.module_buffers import Slot, buffers_of, names_of
from dtrp.tensors.module_mode import members


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


@pytest.mark.sampled(16)
@pytest.mark.parametrize(
    ("method", "parts"),
    [("fdg", 1), ("adl", 4), ("ddg", 1), ("pipedream", 4), ("spectrain", 1), ("bp", 4), ("dtrp", 1)],
)
@pytest.mark.parametrize("model", [spectral, renorm], ids=lambda make: make.__name__)
def test_it_goes_on_to_the_bit(tmp_path: Path, model: Any, method: str, parts: int) -> None:
    cell = (method, 3, parts, "sgd")
    check_equal(run(*cell, tmp_path / "saved", (1, 2, 3, 4, 5, 8, 9), model), run(*cell, tmp_path, model=model))


@pytest.mark.sampled(2)
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
    """Keeps a number that is no buffer, and reads it where no forward is repeated."""

    def __init__(self, reads: bool) -> None:
        super().__init__()
        self.count, self.reads = 0, reads
        self.weight = nn.Parameter(torch.ones(5))

    def forward(self, x: Tensor) -> Tensor:
        self.count += self.training and torch.is_grad_enabled()
        return x * self.weight / (1 + self.count * self.reads)

    def get_extra_state(self) -> Any:
        return {"count": self.count, "as a tensor": torch.tensor(self.count)}

    def set_extra_state(self, state: Any) -> None:
        assert state["as a tensor"] == state["count"]
        self.count = state["count"]


def counted(reads: bool) -> nn.Sequential:
    return nn.Sequential(
        Counted(reads), nn.Linear(5, 5), Counted(reads), nn.Linear(5, 5), Counted(reads), nn.Linear(5, 3)
    )


@pytest.mark.parametrize("method", ["dtrp", "bp"])
def test_extra_state_comes_back(tmp_path: Path, method: str) -> None:
    cell = (method, 3, 2, "sgd")
    model = functools.partial(counted, method == "bp")
    check_equal_but_extra(run(*cell, tmp_path / "saved", (2, 4, 9), model), run(*cell, tmp_path, model=model))


def check_equal_but_extra(a: Any, b: Any) -> None:
    for result in (a, b):
        extra = {name: result[1]["model"].pop(name) for name in list(result[1]["model"]) if "extra" in name}
        assert [state["count"] for state in extra.values()] == [20] * 3
    check_equal(a, b)


def test_extra_state_with_graphs_in_flight_is_refused(tmp_path: Path) -> None:
    pipe = pipeline(counted(True), num_stages=3, method="fdg")
    pipe.save(tmp_path / "saved")
    pipe.step(*data()[0])
    with pytest.raises(dtrp.CheckpointError, match=r"stage 0 has graphs in flight and a module with get_extra_state"):
        pipe.save(tmp_path / "saved")
    pipe.flush()
    pipe.save(tmp_path / "saved")


def names(stage: Any, slots: Any) -> list[str]:
    return list(names_of(stage.whole, slots).values())


def test_what_a_graph_keeps_is_counted() -> None:
    """Buffers that its forward has moved, and not the mask."""
    model = nn.Sequential(Mean(True), nn.Linear(5, 3))
    pipe = pipeline(model, num_stages=2, method="fdg")
    (x, y), *_ = minibatches(2)
    for _ in range(3):
        pipe.step(x, y)
    (stage, _) = pipe._engine.stages
    kept = [sorted(names(stage, held.met.moved)) for held in stage.stash if held.met is not None]
    assert kept == [["0.count", "0.size"], ["0.count"]]
    graphs = [held.nbytes - x.nbytes for held in stage.stash]
    assert graphs[0] >= 8 + 5 * 4
    assert graphs[1] >= 8


@pytest.mark.parametrize("options", [{}, {"keep": "auto", "memory_limit_bytes": 10**9}], ids=str)
def test_what_batch_norm_moves_is_seen(options: dict[str, Any]) -> None:
    """Though it does not count as written, and though trial forwards came first."""
    pipe = pipeline(nn.Sequential(nn.BatchNorm1d(5), nn.Linear(5, 3)), num_stages=2, method="fdg", **options)
    pipe.step(*data()[0])
    (held,) = pipe._engine.stages[0].stash
    assert sorted(names(pipe._engine.stages[0], held.met.moved)) == [
        "0.num_batches_tracked",
        "0.running_mean",
        "0.running_var",
    ]


def test_a_plain_network_keeps_no_buffer() -> None:
    pipe = pipeline(nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 3)), adamw, num_stages=2, method="fdg")
    pipe.step(*data()[0])
    assert all(held.met is None for stage in pipe._engine.stages for held in stage.stash)


def test_values_met() -> None:
    module = nn.Module()
    a, b, c = [(module, name) for name in "abc"]
    buffers: dict[Slot, Any] = {a: torch.zeros(1), b: torch.zeros(1)}

    def forward(*moves: Slot) -> BuffersRead:
        met = BuffersRead({slot: buffers[slot].clone() for slot in moves}, before=marks(buffers))
        for slot in moves:
            buffers[slot].add_(1)
        met.after = marks(buffers)
        return met

    entries = [forward(b), forward(a), forward(), forward(a, b), forward()]
    got = [{name: value.item() for (_, name), value in each.items()} for each in values_met(entries, buffers)]
    assert got == [{"a": 0, "b": 0}, {"a": 0, "b": 1}, {"a": 1, "b": 1}, {"a": 1, "b": 1}, {}]
    buffers[a].add_(1)
    with pytest.raises(Overwritten, match=r"^a$"):
        values_met(entries, buffers)
    assert values_met(entries[:0], buffers) == []
    entries = [forward(a)]
    buffers[a].add_(1)  # known: what it was before is kept
    assert values_met(entries, buffers)[0][a] == 3
    buffers[b].add_(1)
    entries.append(forward(b))
    with pytest.raises(Overwritten, match=r"^b$"):
        values_met(entries, buffers)
    with pytest.raises(Overwritten, match=r"^c$"):
        values_met([forward()], {**buffers, c: torch.zeros(1)})
    entries = [forward()]
    with pytest.raises(Overwritten, match=r"^b$"):
        values_met(entries, {a: buffers[a], b: clone(buffers[b])})


def test_values_met_that_came_and_went() -> None:
    module = nn.Module()
    a, b = (module, "a"), (module, "b")
    kept = torch.zeros(1)
    states: list[dict[Slot, Any]] = [
        {b: kept},
        {b: kept, a: None},
        {b: kept, a: torch.ones(1)},
        {b: kept},
        {b: kept, a: kept},
    ]
    moved = [{a: ABSENT}, {a: None}, {a: states[2][a]}, {a: ABSENT}]
    entries = [
        BuffersRead(each, marks(before), marks(after))
        for each, before, after in zip(moved, states, states[1:], strict=False)
    ]
    assert values_met(entries, states[-1]) == moved
    assert values_met(entries[:3], states[-2]) == [{a: ABSENT}, {a: None}, moved[2]]


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
    buffers = buffers_of(model)
    called = zip(names_of(model, buffers).values(), buffers.values(), strict=True)
    assert [(name, id(t)) for name, t in called] == [(name, id(t)) for name, t in model.named_buffers()]


def test_a_buffer_that_is_registered_later_is_found() -> None:
    model = nn.Sequential(nn.Tanh(), nn.Sequential(nn.Tanh()))
    assert buffers_of(model) == {}
    model[1][0].register_buffer("late", torch.ones(2))
    assert list(buffers_of(model)) == [(model[1][0], "late")]


# -- forwards that read what they move --------------------------------------------------------------------------


METHODS = [name for name in dtrp.list_methods() if name != "dgl"]


def recording(lr: float, seen: dict[int, list[Tensor | None]]) -> Any:
    """SGD that notes the gradient of every parameter at every update."""

    def make(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        def note(*_: Any) -> None:
            for p in parameters:
                seen.setdefault(id(p), []).append(None if p.grad is None else p.grad.clone())

        optimizer = torch.optim.SGD(parameters, lr=lr, momentum=0.9 if lr else 0.0)
        optimizer.register_step_pre_hook(note)
        return optimizer

    return make


def gradients(pipe: dtrp.Pipeline, seen: dict[int, list[Tensor | None]]) -> dict[str, list[Tensor | None]]:
    return {name: seen[id(p)] for stage in pipe.stages for name, p in stage.named_parameters() if id(p) in seen}


def plain(model: nn.Sequential, parts: int) -> dict[str, list[Tensor | None]]:
    """Every mini-batch's gradient, at weights that never move."""
    result: dict[str, list[Tensor | None]] = {name: [] for name, _ in model.named_parameters()}
    for x, y in sequences():
        model.zero_grad()
        for x_part, y_part in zip(x.chunk(parts), y.chunk(parts), strict=True):
            (nn.functional.cross_entropy(model(x_part), y_part) / parts).backward()
        for name, p in model.named_parameters():
            result[name].append(None if p.grad is None else p.grad.clone())
    return result


def check_gradients(got: dict[str, list[Tensor | None]], want: dict[str, list[Tensor | None]]) -> None:
    assert got.keys() == want.keys()
    for name in want:
        for n, (a, b) in enumerate(zip(got[name], want[name], strict=True)):
            assert a is not None and b is not None, f"{name} of mini-batch {n}"  # noqa: PT018
            assert torch.allclose(a, b, rtol=1e-10, atol=1e-13), f"{name} of mini-batch {n}: {(a - b).abs().max()}"


@pytest.mark.sampled(8)
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_forward_meets_what_a_plain_loops_meets(kind: type[nn.Module], parts: int) -> None:
    """At weights that never move: the gradient of every mini-batch, and every buffer after the last."""
    model = model_of(kind)
    want = plain(model, parts)
    for method in METHODS:
        seen: dict[int, list[Tensor | None]] = {}
        ours = model_of(kind)
        pipe = pipeline(ours, recording(0.0, seen), num_stages=4, method=method, num_microbatches=parts)
        for x, y in sequences():
            pipe.step(x, y)
        pipe.flush()
        check_gradients(gradients(pipe, seen), want)
        assert_same(dict(ours.named_buffers()), dict(model.named_buffers()))


@pytest.mark.sampled(4)
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize(("method", "parts"), [("dtrp", 2), ("dtr", 1), ("dtrp-1f1b", 1)])
def test_the_right_prediction_is_backpropagation(kind: type[nn.Module], method: str, parts: int) -> None:
    """To the bit, buffers included: the theorem, for a forward that reads what it moves."""
    weights: dict[int, dict[int, list[Tensor]]] = {}

    def train(method: Any) -> Any:
        seen: dict[int, list[Tensor | None]] = {}
        pipe = pipeline(model_of(kind), recording(0.05, seen), num_stages=4, method=method, num_microbatches=parts)
        losses = []
        for i, (x, y) in enumerate([*sequences(), *sequences()]):
            if method == "bp":
                for k, stage in enumerate(pipe.stages):
                    weights.setdefault(k, {})[i] = [p.detach().clone() for p in stage.parameters()]
            losses.append(pipe.step(x, y))
        pipe.flush()
        return losses, pipe.model_state_dict(), dict(model_buffers(pipe))

    def oracle(parameters: Any, optimizer: Any, horizon: int, out: Any, *, stage: int, version: int, **_: Any) -> None:
        for tensor, weight in zip(out, weights[stage][version + horizon], strict=True):
            tensor.copy_(weight)

    want = train("bp")
    got = train(dtrp.get_method(method, predict=oracle))
    assert all(map(torch.equal, got[0], want[0]))
    assert_same(got[1], want[1])
    assert_same(got[2], want[2])


def model_buffers(pipe: dtrp.Pipeline) -> list[tuple[str, Tensor]]:
    return [entry for stage in pipe.stages for entry in stage.named_buffers()]


def steps(pipe: dtrp.Pipeline, batches: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    return [cast(Tensor, pipe.step(x, y)) for x, y in batches]


def made(kind: type[nn.Module], method: str, **options: Any) -> dtrp.Pipeline:
    return pipeline(model_of(kind), adamw, **{"num_stages": 4, "method": method, "num_microbatches": 2, **options})


@pytest.mark.sampled(4)
@pytest.mark.parametrize(
    "kind",
    [kind for kind in KINDS if kind is not Replaced],  # it counts in an attribute, which is no part of a checkpoint
    ids=lambda kind: kind.__name__,
)
@pytest.mark.parametrize("method", ["dtrp", "fdg", "bp"])
def test_they_are_in_an_exact_checkpoint(tmp_path: Path, kind: type[nn.Module], method: str) -> None:
    """Saved after every mini-batch with what is in flight, into a model whose buffers are as they were made."""
    whole = made(kind, method)
    want = steps(whole, sequences())
    whole.flush()
    pipe = made(kind, method)
    got = []
    for i, batch in enumerate(sequences()):
        got += steps(pipe, [batch])
        pipe.save(tmp_path / "saved")
        if i == 2:  # its buffers have another shape than those that were saved
            steps(pipe, sequences()[3:])
        else:
            pipe = made(kind, method)
        if kind is Grown:
            cast(Any, pipe.stages[0])[0].length = 1  # an attribute is as it was made
        pipe.load(tmp_path / "saved")
    pipe.flush()
    assert all(map(torch.equal, got, want))
    assert_same(dict(pipe.stages[0].named_parameters()), dict(whole.stages[0].named_parameters()))
    if kind is not Grown:
        assert_same(dict(model_buffers(pipe)), dict(model_buffers(whole)))


@pytest.mark.sampled(4)
@pytest.mark.parametrize("way", ["portable", "state_dict"])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_they_are_in_what_knows_no_stages(tmp_path: Path, kind: type[nn.Module], way: str) -> None:
    """Into a fresh model, at another number of stages, and back into one whose buffers have changed since."""
    pipe = made(kind, "dtrp")
    states = []
    for i in range(2):
        pipe.flush()
        states.append(pipe.state_dict())
        if way == "portable":
            pipe.save(tmp_path / str(i), portable=True)
        steps(pipe, sequences()[4 * i : 4 * i + 4])
    pipe.flush()
    for other in (pipe, made(kind, "bp", num_stages=2)):
        for i in (1, 0):
            if way == "portable":
                other.load(tmp_path / str(i))
            else:
                other.load_state_dict(states[i])
            assert_same(other.model_state_dict(), states[i]["model"])
            if i and other is not pipe:
                other.save(tmp_path / "again", portable=True)
                third = made(kind, "fdg")
                third.load(tmp_path / "again")
                assert_same(third.model_state_dict(), states[i]["model"])
    if kind is Grown:
        cast(Any, pipe.stages[0])[0].length = 1
    assert torch.isfinite(torch.stack(steps(pipe, sequences()[:2]))).all()
    plain_model = model_of(kind)
    if "buffers" not in states[0]:
        plain_model.load_state_dict(states[0]["model"])


def test_a_buffer_of_another_models_shape_is_refused(tmp_path: Path) -> None:
    def make(size: int) -> dtrp.Pipeline:
        model = nn.Sequential(nn.BatchNorm1d(size, affine=False), nn.Flatten(), nn.Linear(5, 3))
        return pipeline(model, num_stages=2, method="bp")

    with pytest.raises(ValueError, match=r"another model's: 0\.running_mean has shape \(4,\) there, \(5,\) here"):
        make(5).load_state_dict(make(4).state_dict())
    make(4).save(tmp_path / "saved", portable=True)
    with pytest.raises(dtrp.CheckpointError, match=r"0\.running_mean has shape"):
        make(5).load(tmp_path / "saved")


def test_a_checkpoint_from_before_they_were_in_it(tmp_path: Path) -> None:
    """It loads; the next forward begins with the module's own."""
    pipe = made(Carried, "dtrp")
    steps(pipe, sequences()[:3])
    pipe.save(tmp_path / "saved")
    path = tmp_path / "saved" / manifest.NAME
    said = json.loads(path.read_bytes())
    for part in said["state"].values():
        del part["ahead"], part["changed"]
    path.write_bytes(manifest.written({name: value for name, value in said.items() if name != "checksum"}))
    other = made(Carried, "dtrp")
    other.load(tmp_path / "saved")
    assert other._engine.stages[0].repeatable.ahead is None
    assert_same(dict(model_buffers(other)), dict(model_buffers(pipe)))
    assert torch.isfinite(torch.stack(steps(other, sequences()[3:]))).all()


@pytest.mark.parametrize("kind", [Carried, Grown, Observed, Passed], ids=lambda kind: kind.__name__)
def test_trials_and_inference_move_nothing_ahead(kind: type[nn.Module]) -> None:
    """``keep="auto"`` looks at a trial forward, as an output of several tensors does; `infer` has the module's own."""

    def go(**options: Any) -> Any:
        seen: dict[int, list[Tensor | None]] = {}
        pipe = pipeline(model_of(kind), recording(0.0, seen), num_stages=4, method="dtrp", **options)
        for i, (x, y) in enumerate(sequences()):
            pipe.step(x, y)
            if i == 4 and kind is Grown:
                pipe.infer(x)
        pipe.flush()
        return gradients(pipe, seen)

    want = go()
    check_gradients(go(keep="auto", memory_limit_bytes=10**9), want)
    check_gradients(go(keep=["input", "graph", "input", "graph"]), want)
    check_gradients(want, plain(model_of(kind), 1))


@pytest.mark.parametrize("method", ["dtr", "fdg", "bp"])
def test_frozen_stages_move_them_too(method: str) -> None:
    def frozen() -> nn.Sequential:
        model = model_of(Passed)
        model[0].requires_grad_(False)
        return model

    model = frozen()
    for x, _ in sequences():
        model(x)
    pipe = pipeline(ours := frozen(), num_stages=4, method=method, num_microbatches=1)
    steps(pipe, sequences())
    pipe.flush()
    assert_same(dict(ours.named_buffers()), dict(model.named_buffers()))


@pytest.mark.parametrize("replaced", [False, True])
def test_forwards_follow_a_caller_who_writes_one(replaced: bool) -> None:
    """At once: in the next forward as in the next backward."""

    class Scaled(Carried):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("scale", torch.ones(()))

        def forward(self, x: Tensor) -> Tensor:
            seen.append((torch.is_grad_enabled(), self.scale.item()))
            return super().forward(x) * self.scale

    seen: list[tuple[bool, float]] = []
    pipe = pipeline(model := model_of(Scaled), num_stages=4, method="dtr", num_microbatches=1)
    for i, (x, y) in enumerate(sequences()):
        scale: Any = model[0]
        if replaced:
            scale.scale = torch.full_like(scale.scale, i)
        else:
            scale.scale.fill_(i)
        seen.clear()
        pipe.step(x, y)
        assert set(seen) == ({(False, i), (True, i)} if i >= 6 else {(False, i)}), "a lead of six"


def test_what_is_ahead_is_counted_and_let_go() -> None:
    pipe = pipeline(model_of(Carried), num_stages=2, method="dtrp", num_microbatches=1)
    steps(pipe, sequences()[:3])
    assert [pipe.memory()[k]["buffers"] for k in range(2)] == [5 * 8, 0]
    pipe.flush()
    assert pipe.memory()[0]["buffers"] == 0


def test_batch_norm_under_an_activation_checkpoint() -> None:
    """Its statistics, which nobody reads, move as in a plain loop: once more in every backward."""

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(5, 5), nn.BatchNorm1d(5), nn.Tanh())

        def forward(self, x: Tensor) -> Tensor:
            return cast(Tensor, torch.utils.checkpoint.checkpoint(self.inner, x, use_reentrant=False))

    def make() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(5, 5), Checkpointed(), nn.Linear(5, 3))

    model = make()
    for x, y in data():
        nn.functional.cross_entropy(model(x), y).backward()
    pipe = pipeline(ours := make(), recording(0.0, {}), num_stages=2, method="dtrp", num_microbatches=1, cuts=[2])
    steps(pipe, data())
    pipe.flush()
    assert_same(dict(ours.named_buffers()), dict(model.named_buffers()))


# -- buffers that share their memory -----------------------------------------------------------------------------


class Doubled(nn.Module):
    """A buffer that goes by another name too."""

    def __init__(self, kind: str, writes: bool) -> None:
        super().__init__()
        self.linear, self.writes = nn.Linear(4, 5), writes
        self.register_buffer("state", torch.zeros(2, 5, dtype=torch.float64))
        if kind == "attribute":
            self.other = self.state
        elif kind == "list":
            self.others = [self.state]
        else:
            self.register_buffer("row", self.state[0])

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x).mean(1)
        out = y + self.state.sum(0)
        if self.writes:
            (self.row if hasattr(self, "row") else getattr(self, "other", self.state)).add_(y.detach().mean(0))
        return out


@pytest.mark.parametrize("method", ["bp", "fdg", "dtrp"])
@pytest.mark.parametrize("kind", ["attribute", "list", "view"])
def test_a_buffer_that_something_else_shares_may_not_be_moved(kind: str, method: str) -> None:
    def run(writes: bool) -> None:
        model = nn.Sequential(Doubled(kind, writes).double(), nn.Tanh(), nn.Linear(5, 3).double())
        pipe = pipeline(model, recording(0.0, {}), num_stages=3, method=method)
        for x, y in sequences():
            pipe.step(x, y)
        pipe.flush()

    run(writes=False)
    name, other = {"attribute": ("state", "other"), "list": ("state", "others"), "view": ("row", "state")}[kind]
    match = rf"stage 0, forward of micro-batch 0 .*moves the buffer 0\.{name}, .* which 0\.{other}, in the same memory"
    with pytest.raises(dtrp.StageError, match=match):
        run(writes=True)
