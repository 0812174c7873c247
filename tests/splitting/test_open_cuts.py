"""Cuts between blocks that all read one tensor of the model; names of modules; random draws."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from split_models import Tables, rows
from torch import Tensor, nn
from unsplit import SEED, check_outputs, check_pipeline, copied_from_the_first, rng, sgd

import dtrp
from dtrp.tensors.module_mode import slow_attention

pytestmark = pytest.mark.usefixtures("float64")


class Masked(nn.Module):
    """A transformer whose causal mask is a buffer, and whose head is the embedding by a function."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(5, dtype=torch.float64))
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 6, enable_nested_tensor=False)

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.encoder(self.embedding(tokens), self.mask, is_causal=True)
        return F.linear(h.mean(1), self.embedding.weight)


class Positions(nn.Module):
    """Attention with a table of relative positions that every block reads through its own dropout, as DeBERTa's."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.positions = nn.Embedding(11, 8), nn.Embedding(4, 8)
        self.blocks = nn.ModuleList(nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8)}) for _ in range(6))
        self.drop = nn.Dropout(0.3)
        self.head = nn.Linear(8, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.embedding(tokens)
        for block in self.blocks:
            keys = block["b"](self.drop(self.positions.weight))
            h = h + (block["a"](h) @ keys.T).softmax(-1) @ keys
        return self.head(h.mean(1))


def tokens() -> Tensor:
    return torch.randint(11, (6, 5))


OPEN: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any]]] = {
    "mask": (Masked, tokens),
    "positions": (Positions, tokens),
    "tables": (Tables, rows),
}


@copied_from_the_first
def make(kind: str, num_stages: int) -> tuple[nn.Module, Any, dtrp.Stages]:
    build, data = OPEN[kind]
    model, x = build(), data()
    return model, x, dtrp.split(model, num_stages=num_stages, example=x)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("num_stages", [2, 4])
@pytest.mark.parametrize("kind", OPEN)
def test_cuts_stay_open(kind: str, num_stages: int) -> None:
    """No stage holds more than 1.3 times an even share of the blocks' parameters."""
    _, _, stages = make(kind, num_stages)
    held = [
        sum(p.numel() for name, p in stage.named_parameters() if "blocks" in name or "layers" in name)
        for stage in stages
    ]
    assert max(held) <= max(1.3 / num_stages, 2 / 6) * sum(held)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("num_stages", [2, 4])
@pytest.mark.parametrize("kind", OPEN)
def test_they_train_as_the_model(kind: str, num_stages: int) -> None:
    with slow_attention():  # an unsplit encoder in eval mode has another kernel
        check_pipeline(*make(kind, num_stages), 3)


def test_what_stages_hold() -> None:
    """A buffer that nothing writes is in every stage that reads it, under its name; a parameter in the first alone."""
    model, x = Tables(), rows()
    stages = dtrp.split(model, points=["blocks.2", "blocks.3", "head"], example=x)
    assert ["table" in stage.state_dict() for stage in stages] == [True, True, True, False]
    assert ["scale" in stage.state_dict() for stage in stages] == [True, False, False, False]
    check_outputs(model, stages, x)
    model.scale.requires_grad_(False)
    stages = dtrp.split(model, points=["blocks.2", "blocks.3", "head"], example=x)
    assert ["scale" in stage.state_dict() for stage in stages] == [True, False, True, False], "it is frozen"


def test_a_shared_buffer_is_loaded_into_every_stage(tmp_path: Any) -> None:
    x, y = rows(6), torch.randint(3, (6,))
    model = Tables()
    pipes = []
    for _ in range(2):
        stages = dtrp.split(copy.deepcopy(model), num_stages=4, example=x)
        pipes.append(dtrp.Pipeline(stages, sgd, F.cross_entropy, method="dtrp", num_microbatches=2, seed=SEED))
    other = {name: t + 0.1 for name, t in model.state_dict().items()}
    pipes[0].load_state_dict({**pipes[0].state_dict(), "model": other})
    for pipe in pipes[:1]:
        for _ in range(3):
            pipe.step(x, y)
        pipe.save(tmp_path / "saved")
    pipes[1].load(tmp_path / "saved")
    assert all(torch.equal(pipes[0].step(x, y), pipes[1].step(x, y)) for _ in range(3))
    for pipe in pipes:
        pipe.flush()
        assert torch.equal(pipe.model_state_dict()["table"], other["table"])
    assert torch.equal(pipes[0].infer(x), pipes[1].infer(x))


class Reader(nn.Module):
    def __init__(self, table: Tensor, write: Callable[[Any], None] | None = None) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)
        self.register_buffer("table", table)
        self._write = write

    def forward(self, x: Tensor) -> Tensor:
        if self._write is not None:
            self._write(self)
        return torch.tanh(self.layer(x) + self.table)


def add(module: Any) -> None:
    module.table.add_(1)


def assign(module: Any) -> None:
    module.table = module.table + 1


def uncounted(module: Any) -> None:
    F.batch_norm(torch.randn(4, 6), module.table, torch.ones(6), training=True)


@pytest.mark.parametrize("method", ["dtrp", "bp", "spectrain", "fdg"])
def test_modules_of_a_list_may_share_a_buffer(method: str) -> None:
    x, y, table = rows(6), torch.randint(6, (6,)), torch.randn(6)
    layers = [Reader(table) for _ in range(3)]
    apart = copy.deepcopy(layers)
    for layer in apart:
        layer.table = table.clone()
    pipes = [
        dtrp.Pipeline(stages, sgd, F.cross_entropy, method=method, num_microbatches=2) for stages in (layers, apart)
    ]
    for _ in range(4):
        a, b = [pipe.step(x, y) for pipe in pipes]
        assert torch.equal(a, b)
    for pipe in pipes:
        pipe.flush()
    assert torch.equal(*[pipe.infer(x) for pipe in pipes])


@pytest.mark.sampled(3)
@pytest.mark.parametrize("write", [add, assign, uncounted])
@pytest.mark.parametrize("method", ["dtrp", "bp", "spectrain"])
def test_a_shared_buffer_that_a_stage_writes(method: str, write: Callable[[Any], None]) -> None:
    """Refused before anything is learned."""
    table = torch.randn(6)
    layers = [Reader(table), Reader(table, write), nn.Linear(6, 6)]
    before = copy.deepcopy([layer.layer.state_dict() for layer in layers[:2]])  # type: ignore[union-attr]
    pipe = dtrp.Pipeline(layers, sgd, F.cross_entropy, method=method, num_microbatches=1)
    with pytest.raises(
        dtrp.StageError, match="stage 1, .*0.table of stage 0 and 1.table of stage 1 are one tensor, and a buffer"
    ):
        for _ in range(3):
            pipe.step(rows(6), torch.randint(6, (6,)))
    for layer, state in zip(layers, before, strict=False):
        assert all(torch.equal(t, state[name]) for name, t in layer.layer.state_dict().items())  # type: ignore[union-attr]


def test_the_value_of_a_buffer_that_one_stage_writes_travels() -> None:
    class Counting(Tables):
        def forward(self, x: Tensor) -> Tensor:
            self.table.mul_(0.9)
            return super().forward(x)

    model, x = Counting(), rows()
    stages = dtrp.split(model, num_stages=2, example=x)
    assert "table" not in stages[1].state_dict()
    check_pipeline(model, x, stages, 2)


@pytest.mark.parametrize(
    ("read", "message"),
    [
        (lambda x, table: x + table[:6], "the stages do not do what the model does"),
        (lambda x, table: x + table, "the forward writes the buffer table, and stages 0 and 1 read it, .* pass points"),
    ],
)
def test_a_buffer_that_is_written_after_several_stages_have_read_it(
    read: Callable[[Tensor, Tensor], Tensor], message: str
) -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("table", torch.randn(6))
            self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = torch.tanh(read(layer(x), self.table))
            self.table.mul_(0.9)
            return x

    with pytest.raises(ValueError, match=message):
        dtrp.split(Counting(), points=["layers.1"], example=rows())


class Again(nn.Module):
    """Calls one block six times."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(6, 40), nn.Tanh(), nn.Linear(40, 6))
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(6):
            x = x + self.block(x)
        return self.head(x)


def test_work_that_cannot_be_divided_is_warned_of() -> None:
    with pytest.warns(
        UserWarning, match=r"stage 0 does 99 % of the work; an even share is 50 % \(99 %, 1 %, by a count"
    ):
        dtrp.split(Again(), num_stages=2, example=rows())
    dtrp.split(Again(), points=["head"], example=rows())  # by the caller's choice


# -- names ------------------------------------------------------------------------------------------------


class Named(nn.Module):
    def __init__(self, turned: bool) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        if turned:
            self.shared = self.second = nn.Sequential(nn.Linear(6, 6), nn.Tanh())
        else:
            self.second = self.shared = nn.Sequential(nn.Linear(6, 6), nn.Tanh())
        self.listed = nn.ModuleList([self.second[0], nn.Linear(6, 3)])

    def forward(self, x: Tensor) -> Tensor:
        return self.listed[1](self.shared(self.first(x).relu()))


@pytest.mark.sampled(3)
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("point", ["second", "shared", "second.0", "shared.0", "listed.0"])
def test_a_module_of_several_names_begins_a_stage_under_each(point: str, turned: bool) -> None:
    model = Named(turned)
    stages = dtrp.split(model, points=[point, "listed.1"], example=rows())
    assert stages.points == (point, "listed.1")
    assert [len({id(p) for p in stage.parameters()}) for stage in stages] == [2, 2, 2]
    assert len(dtrp.split(copy.deepcopy(model), num_stages=3, example=rows())) == 3
    x = rows()
    assert torch.equal(stages[2](stages[1](stages[0](x))), model(x))


def test_two_names_of_one_module_are_one_point() -> None:
    with pytest.raises(ValueError, match="'shared' begins with 'second'; name one of the two"):
        dtrp.split(Named(False), points=["second", "shared"], example=rows())


class TiedHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.middle = nn.Embedding(11, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.middle(self.embedding(x)).relu().mean(1))


@pytest.mark.parametrize("options", [{"points": ["head"]}, {"num_stages": 2}, {"points": ["middle", "head"]}])
def test_a_tied_head_alone_in_the_last_stage(options: Any) -> None:
    torch.manual_seed(0)
    model, x = TiedHead(), tokens()
    stages = dtrp.split(model, example=x, **options)
    assert len(stages) == len(stages.points) + 1
    check_pipeline(model, x, stages, 2, tied=True)


# -- random draws -----------------------------------------------------------------------------------------


class Depth(nn.Module):
    """Leaves whole samples out, by draws that depend on sizes alone."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.layer = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        keep = (torch.rand(x.shape[0], 1, dtype=x.dtype) + 0.5).floor_() if self.training else 1
        return x + torch.tanh(self.layer(x)) * keep


class Twice(nn.Module):
    """A module with such draws that is called in the first stage, and again in the last; and one without weights."""

    def __init__(self) -> None:
        super().__init__()
        self.depth, self.drop = Depth(), nn.Dropout(0.3)
        self.middle, self.last = nn.Sequential(nn.Linear(6, 6), nn.Tanh()), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(self.depth(x))
        return self.last(self.drop(self.depth(self.middle(x))))


def test_draws_are_those_of_the_stage_that_uses_them() -> None:
    """As the unsplit model's, whose modules draw from the stream of their stage, one after the other."""
    model, x, y = Twice(), rows(6), torch.randint(3, (6,))
    plain = copy.deepcopy(model)
    stages = dtrp.split(model, points=["middle", "last"], example=x)
    pipe = dtrp.Pipeline(stages, sgd, F.cross_entropy, method="bp", seed=SEED, num_microbatches=1)
    optimizer = sgd(list(plain.parameters()))
    for m in range(3):
        with ExitStack() as stack:
            stack.enter_context(rng(0, m))
            h = plain.drop(plain.depth(x))
        with ExitStack() as stack:
            stack.enter_context(rng(1, m))
            h = plain.drop(plain.depth(plain.middle(h)))
        loss = F.cross_entropy(plain.last(h), y)
        torch.testing.assert_close(pipe.step(x, y), loss.detach(), rtol=1e-10, atol=1e-10)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
