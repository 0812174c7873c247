"""Boundaries that carry trees of tensors: each model must train as it would unsplit."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from helpers import batches_of, check_perfect_prediction, check_trains_as_unsplit, clone, pipeline, sgd
from torch import Tensor, nn
from tree_models import TREES

import dtrp
from dtrp.comm.message import Kind, Note, Packer, decode, read_header
from dtrp.tensors.pytree import check_samples, flatten, split, unflatten


@pytest.mark.sampled(4)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("method", "num_microbatches"), [("bp", 1), ("bp", 3), ("gpipe", 3)])
@pytest.mark.parametrize("kind", TREES)
def test_without_delay_they_train_as_unsplit_to_the_bit(
    kind: str, method: str, num_microbatches: int, dtype: torch.dtype
) -> None:
    torch.set_default_dtype(dtype)
    make, data = TREES[kind]
    model = nn.Sequential(*make())
    pipe, plain = check_trains_as_unsplit(model, batches_of(data), method=method, num_microbatches=num_microbatches)
    plain.eval()
    x = data()
    assert torch.equal(pipe.infer(x), plain(clone(x)))


@pytest.mark.sampled(3)
@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("num_microbatches", [1, 3])
@pytest.mark.parametrize("kind", TREES)
def test_with_perfect_prediction_they_train_as_unsplit_to_the_bit(kind: str, num_microbatches: int) -> None:
    make, data = TREES[kind]
    check_perfect_prediction(nn.Sequential(*make()), batches_of(data), 4, num_microbatches=num_microbatches)


@pytest.mark.sampled(2)
@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("method", dtrp.list_methods())
def test_a_tree_of_one_trains_as_the_tensor_does(method: str) -> None:
    """Every method, start-up and flush too."""

    class Wrapped(nn.Module):
        def __init__(self, layer: nn.Module, first: bool, last: bool) -> None:
            super().__init__()
            self.layer, self.first, self.last = layer, first, last

        def forward(self, value: Any) -> Any:
            out = self.layer(value if self.first else value["h"])
            return out if self.last else {"h": out, "mask": out > 0, "n": 3}

    results = []
    for wrapped in (False, True):
        torch.manual_seed(3)
        layers: list[nn.Module] = [
            nn.Linear(6, 6),
            nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6)),
            nn.Tanh(),
            nn.Linear(6, 3),
        ]
        if wrapped:
            layers = [Wrapped(layer, i == 0, i == 3) for i, layer in enumerate(layers)]
        pipe = pipeline(layers, method=method, num_microbatches=2)
        losses = [pipe.step(x, y) for x, y in batches_of(lambda: torch.randn(12, 6))]
        pipe.flush()
        results.append((losses, list(pipe.model_state_dict().values()), pipe.delays()))
    for a, b in zip(*[[*losses, *weights] for losses, weights, _ in results], strict=True):
        assert torch.equal(a, b)
    assert results[0][2] == results[1][2]


def test_targets_may_be_trees_and_the_last_output_anything() -> None:
    class Output:
        def __init__(self, logits: Tensor) -> None:
            self.logits = logits

    class Head(nn.Linear):
        def forward(self, x: Tensor) -> Any:
            return Output(super().forward(x))

    def loss_fn(out: Output, target: dict[str, Tensor]) -> Tensor:
        return (nn.functional.cross_entropy(out.logits, target["y"], reduction="none") * target["weight"]).mean()

    pipe = dtrp.Pipeline([nn.Linear(6, 6), Head(6, 3)], sgd, loss_fn, method="dtrp", num_microbatches=2)
    x, y = torch.randn(7, 6), {"y": torch.randint(3, (7,)), "weight": torch.rand(7)}
    with torch.no_grad():
        want = loss_fn(Output(pipe.infer(x).logits), y)
    assert torch.allclose(pipe.step(x, y), want)  # type: ignore[arg-type]
    pipe.flush()


@pytest.mark.parametrize("method", ["dtrp", "bp"])
def test_a_frozen_front_half_keeps_nothing_and_gets_no_gradient(method: str) -> None:
    make, data = TREES["frozen half"]
    pipe = pipeline(make(), method=method)
    for x, y in batches_of(data):
        pipe.step(x, y)
        assert all(pipe.memory()[stage]["stash"] == 0 for stage in (0, 1))
    assert pipe.optimizers[0] is None
    assert pipe.optimizers[1] is None


@pytest.mark.parametrize("method", [name for name in dtrp.list_methods() if not dtrp.get_method(name).local])
def test_no_gradient_goes_back_for_what_has_none(method: str) -> None:
    make, data = TREES["float masks"]
    pipe = pipeline(make(), method=method, num_microbatches=2)
    returned: list[Any] = []
    for stage in pipe._engine.stages[1:]:
        backward = stage.backward
        stage.backward = lambda grad, backward=backward: returned.append(backward(grad)) or returned[-1]  # type: ignore[method-assign]
    for x, y in batches_of(data):
        pipe.step(x, y)
    pipe.flush()
    assert len(returned) == 3 * 16
    assert all([g is not None for g in gradients] == [False, True, False] for gradients in returned)


class Pair(NamedTuple):
    a: Tensor
    b: Tensor


@dataclass
class Record:
    h: Tensor


def test_a_mapping_arrives_as_a_dict() -> None:
    class Output(OrderedDict[str, Any]):
        """As transformers' ModelOutput: a mapping with attributes."""

        def __getattr__(self, name: str) -> Any:
            return self[name]

    class First(nn.Linear):
        def forward(self, x: Tensor) -> Any:
            return Output(hidden=super().forward(x), mask=x > 0)

    class Last(nn.Linear):
        def forward(self, value: Any) -> Tensor:
            assert type(value) is dict
            return super().forward(value["hidden"] * value["mask"])

    pipe = pipeline([First(6, 6), Last(6, 3)])
    for x, y in batches_of(lambda: torch.randn(12, 6)):
        pipe.step(x, y)
    pipe.flush()


def test_an_output_that_has_a_gradient_now_and_then_is_refused() -> None:
    class Fickle(nn.Linear):
        calls = 0

        def forward(self, x: Tensor) -> Any:
            h = super().forward(x)
            self.calls += 1
            return h, (h if self.calls > 6 else h.detach())

    class Sum(nn.Linear):
        def forward(self, v: Any) -> Tensor:
            return super().forward(v[0] + v[1])

    pipe = pipeline([Fickle(6, 6), Sum(6, 3)])
    with pytest.raises(
        dtrp.StageError, match="stage 0, backward .*an output of the stage has a gradient now and had none"
    ):
        for x, y in batches_of(lambda: torch.randn(12, 6)):
            pipe.step(x, y)


@pytest.mark.parametrize(
    ("gives", "rule"),
    [
        (lambda h: {"h": h, "state": [object()]}, r"stage 0, forward of .*its output\['state'\]\[0\] is a object; between"),
        (lambda h: (h, {1, 2}), r"its output\[1\] is a set"),
        (lambda h: torch.max(h, 1), r"its output is a max; pass a plain tuple"),
        (lambda h: {(1, 2): h}, "its output is a dict whose keys"),
        (lambda h: {"pair": Pair(h, h)}, r"its output\['pair'\] is a Pair; pass a plain tuple, tuple\(value\), or a dict"),
        (lambda h: Record(h), "its output is a Record; between stages go tensors"),
    ],
)  # fmt: skip
def test_what_no_boundary_carries(gives: Any, rule: str) -> None:
    class Gives(nn.Linear):
        def forward(self, x: Tensor) -> Any:
            return gives(super().forward(x))

    pipe = pipeline([Gives(6, 6), nn.Linear(6, 3)])
    with pytest.raises(dtrp.StageError, match=rule):
        pipe.step(torch.randn(4, 6), torch.randint(3, (4,)))


@pytest.mark.parametrize(
    ("x", "error", "rule"),
    [
        ({"a": torch.zeros(4, 2), "b": torch.zeros(3)}, ValueError, "the tensors of x have 4, 3 samples"),
        ((torch.zeros(0, 2),), ValueError, "an empty mini-batch"),
        ((torch.zeros(()),), ValueError, "x has no dimension"),
        ({"a": None}, TypeError, "x is a dict; step takes tensors"),
        ({"a": torch.zeros(4), "b": object()}, TypeError, r"x\['b'\] is a object"),
        ((torch.zeros(9), torch.tensor([0, 4, 7])), ValueError, "with their offsets, cannot be cut: pad them"),
        ({"a": torch.zeros(3), "names": ["x", "y", "z"]}, TypeError, r"x\['names'\] has 3 entries that are no tensors"),
        (
            (torch.zeros(3), [{"names": ("x", "y", "z")}]),
            TypeError,
            r"x\[1\]\[0\]\['names'\] has 3 .* to each of 2 micro",
        ),
        ({"a": torch.zeros(3, 1), "lengths": [4, 2, 2.5]}, TypeError, r"x\['lengths'\] has 3 .* make a tensor of it"),
    ],
)
def test_mini_batches_that_do_not_fit(x: Any, error: type[Exception], rule: str) -> None:
    with pytest.raises(error, match=rule):
        check_samples("x", x, 2)


@pytest.mark.parametrize(
    "constants", [(2, 2, 2), ["x", "y"], [None] * 3, [1, None, 2], [torch.zeros(3), "x", "y"], 3, "abc"]
)
def test_constants_that_are_for_all_samples(constants: Any) -> None:
    x = {"a": torch.zeros(3), "b": constants}
    check_samples("x", x, 2)
    check_samples("x", {"a": torch.zeros(3), "names": ["x", "y", "z"]}, 1)


def test_a_list_of_text_in_a_mini_batch_that_is_cut_is_refused() -> None:
    pipe = pipeline([nn.Linear(6, 6), nn.Linear(6, 3)], num_microbatches=2)
    y = {"class": torch.zeros(4, dtype=torch.int64), "names": list("abcd")}
    with pytest.raises(TypeError, match=r"y\['names'\] has 4 entries"):
        pipe.step(torch.randn(4, 6), y)


def test_a_tree_is_cut_into_parts() -> None:
    tree = {
        "one": torch.ones(1, 4),
        "a": torch.arange(5),
        "b": (torch.arange(10).view(5, 2), torch.tensor(3), None, "word"),
    }
    parts = split(tree, 2)
    assert parts[0]["a"].tolist() == [0, 1, 2]
    assert parts[1]["b"][0].tolist() == [[6, 7], [8, 9]]
    assert all(part["one"].shape == (1, 4) for part in parts)
    assert all(part["b"][1].item() == 3 and part["b"][2:] == (None, "word") for part in parts)


@pytest.mark.parametrize(
    "value",
    [
        (),
        [None, 3, 2.5, "text", True, float("inf")],
        {"a": [torch.randn(3, 4), (torch.zeros(2, dtype=torch.bool),)], 7: {"b": torch.randn(2, 3, 4, 5)}},
        (torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last), torch.randn(9, 4)[:, 1], torch.empty(0, 3)),
        (torch.randn(1, 5).expand(4, 5), torch.tensor(3), torch.randn(7, 3)[2:]),
        (torch.randn(3).requires_grad_(), torch.randn(3), torch.randn(30, 4)[:, 0].detach().requires_grad_()),
    ],
)
def test_a_tree_arrives_as_it_lay(value: Any) -> None:
    packed = Packer(reuses=True).pack(Kind.TREE, Note(3, 1, 2, 4, 9), value)
    packed.write_header()
    room = packed.buffer.clone() if packed.buffer.data_ptr() % 512 else packed.buffer
    message = decode(read_header(room), room)
    assert message.note == Note(3, 1, 2, 4, 9)
    sent, form = flatten(value)
    came, form_there = flatten(message.tensor)
    assert form == form_there
    for a, b in zip(sent, came, strict=True):
        assert torch.equal(a, b)
        assert a.dtype == b.dtype
        assert a.requires_grad == b.requires_grad
        if a.numel():
            assert a.stride() == b.stride()
            assert a.data_ptr() % 128 == b.data_ptr() % 128
    assert flatten(unflatten(form, iter(sent)))[1] == form
