"""Sizes that vary beside the number of samples: `dtrp.split(dynamic_shapes=)`, against the model itself."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import with_aux
from torch import Tensor, nn
from torch.export import Dim
from unsplit import SEED, assert_trained_alike, call, chain, loss_fn, sgd, train_plain
from varying_models import LONGEST, SHAPES, VARYING, Classifier, batches, texts

import dtrp

pytestmark = pytest.mark.usefixtures("float64")


@pytest.mark.parametrize(("num_stages", "num_microbatches"), [(2, 1), (4, 2)])
def test_batches_of_other_lengths_train_as_the_model(num_stages: int, num_microbatches: int) -> None:
    model = Classifier()
    plain = copy.deepcopy(model)
    stages = dtrp.split(model, num_stages=num_stages, example=texts(5, 7), dynamic_shapes=VARYING)
    pipe = dtrp.Pipeline(stages, sgd, loss_fn, method="bp", num_microbatches=num_microbatches, seed=SEED)
    data = batches(SHAPES)
    losses = [pipe.step(*batch) for batch in data]
    assert_trained_alike(model, plain, losses, train_plain(plain, stages.points, data, num_microbatches))
    for num, length in SHAPES:
        x = texts(num, length)
        torch.testing.assert_close(pipe.infer(x), call(plain.eval(), x), rtol=1e-10, atol=1e-10)
        plain.train()


@pytest.mark.sampled(4)
@pytest.mark.parametrize("method", dtrp.list_methods())
def test_every_method_runs_batches_of_other_lengths(method: str) -> None:
    """With a learning rate of 0, every loss is that of the model; the stages' sizes are right in flight."""
    model = Classifier().eval()
    stages = dtrp.split(model, num_stages=4, example=texts(5, 7), dynamic_shapes=VARYING)
    pipe = dtrp.Pipeline(
        stages,
        lambda params: torch.optim.SGD(params, lr=0.0),
        loss_fn,
        method=method,
        num_microbatches=2,
        seed=SEED,
        **with_aux(method, num_classes=3),
    )
    data = batches(SHAPES)
    losses = [pipe.step(*batch) for batch in data]
    pipe.flush()
    for loss, (x, y) in zip(losses, data, strict=True):
        torch.testing.assert_close(loss, loss_fn(model(**x), y).detach(), rtol=1e-10, atol=1e-10)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("kind", ["gpt2, labels", pytest.param("bert", marks=pytest.mark.full), "t5"])
def test_hugging_face_batches_padded_to_the_longest(kind: str) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed; pip install 'dtrp[transformers]'")
    import hugging_face_models

    def data(num: int, length: int) -> dict[str, Tensor]:
        x = {"input_ids": torch.randint(3, 30, (num, length))}
        x["attention_mask"] = (torch.arange(length) < torch.randint(1, length + 1, (num, 1))).long()
        if kind != "bert":
            x["labels"] = torch.where(x["attention_mask"] == 1, x["input_ids"], -100)
        return x

    model = hugging_face_models.MODELS[kind.partition(",")[0]][0]().eval()
    plain, x = copy.deepcopy(model), data(5, 7)
    length = Dim("length", min=3 if kind == "t5" else 2, max=16)
    varying = {name: {0: Dim("batch"), 1: length} for name in x}
    stages = dtrp.split(model, num_stages=4, example=x, dynamic_shapes=varying)

    def loss(out: Any, y: Tensor) -> Tensor:
        return out["loss"] if "loss" in out else out["logits"].square().mean()

    pipe = dtrp.Pipeline(stages, sgd, loss, method="bp", seed=SEED, num_microbatches=1)
    optimizer = sgd(list(plain.parameters()))
    for num, size in ((5, 7), (3, 4), (4, 16), (2, 3)):
        x = data(num, size)
        got = pipe.step(x, torch.zeros(num))
        want = loss(plain(**x, use_cache=False), torch.zeros(num))
        optimizer.zero_grad()
        want.backward()
        optimizer.step()
        torch.testing.assert_close(got, want.detach(), rtol=1e-10, atol=1e-10)
    for (name, a), b in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10, msg=name)
    with pytest.raises(ValueError, match=r"x\['input_ids'\] has size 17 .* for length of at least [23] and at most 16"):
        pipe.step(data(3, 17), torch.zeros(3))


class Sized(nn.Module):
    """Two inputs of (samples, length, 4), and a forward that may ask for lengths."""

    def __init__(self, forward: Callable[[Any, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 2)
        self.table = nn.Parameter(torch.randn(12, 4))
        self.way = forward

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        return self.last(self.way(self, torch.tanh(self.first(x)), other))


def pair(num: int = 5, length: int = 6, other: int | None = None) -> tuple[Tensor, Tensor]:
    return torch.randn(num, length, 4), torch.randn(num, other or length)


def same(model: Any, h: Tensor, other: Tensor) -> Tensor:
    return h * other[..., None]


def apart(model: Any, h: Tensor, other: Tensor) -> Tensor:
    return h + other.sum(1)[:, None, None]


def in_pairs(model: Any, h: Tensor, other: Tensor) -> Tensor:
    return h.view(h.shape[0], h.shape[1] // 2, 2, 4).flatten(1, 2) if h.shape[1] % 2 == 0 else -h


def by_both(model: Any, h: Tensor, other: Tensor) -> Tensor:
    return -h if h.shape[0] * h.shape[1] % 3 else h


def from_a_table(model: Any, h: Tensor, other: Tensor) -> Tensor:
    return h + model.table[: h.shape[1]]


def in_a_loop(model: Any, h: Tensor, other: Tensor) -> Tensor:
    return torch.stack([h[:, i] for i in range(len(h[0]))], 1)


def short(model: Any, h: Tensor, other: Tensor) -> Tensor:
    return h if h.shape[1] <= 8 else -h


@pytest.mark.parametrize(
    "varying",
    [
        ({1: "n"}, {1: "n"}),
        ({1: Dim.AUTO}, {1: Dim.AUTO}),
        [{-2: "n"}, (None, "n")],
        {"other": {1: Dim("n", max=9)}, "x": (Dim("b"), Dim("n", max=9), 4)},
        ({0: "n", 1: 2 * Dim("half")}, {1: 2 * Dim("half")}),
    ],
)
def test_every_way_to_name_what_varies(varying: Any) -> None:
    model = Sized(same)
    stages = dtrp.split(model, points=["last"], example=pair(), dynamic_shapes=varying)
    for num, length in ((5, 6), (1, 6), (3, 4), (2, 8), (4, 8)):
        x = pair(num, length)
        assert torch.equal(chain(stages, x), model(*x))
    with pytest.raises(
        ValueError, match=r"x\[1\] has size 4 along dimension 1(, which is|: both are)|, and x\[1\] has size 4"
    ):
        stages[0](pair(5, 6, 4))
    with pytest.raises(
        ValueError, match=r"x\[0\] has shape \(5, 6, 5\), .* only the number of samples and dimension 1 \("
    ):
        stages[0]((torch.randn(5, 6, 5), pair()[1]))


def test_a_single_tensor_and_collections_of_shapes() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    x = torch.randn(3, 3, 8, 9)
    height, width = Dim("height", min=4), Dim("width", min=4)
    collection = torch.export.ShapesCollection()
    collection[x] = {2: height, 3: width}
    for varying in ({2: height, 3: width}, ({2: height, 3: width},), (None, None, Dim.AUTO, Dim.AUTO), collection):
        stages = dtrp.split(model, num_stages=2, example=x, dynamic_shapes=varying)
        for shape in ((3, 3, 8, 9), (1, 3, 5, 5), (4, 3, 20, 6)):
            images = torch.randn(shape)
            assert torch.equal(chain(stages, images), model(images))


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("way", "allowed", "message"),
    [
        (same, [(5, 6), (2, 9)], ""),
        (in_pairs, [(5, 6), (1, 8)], "traced where Eq.*takes another way for these"),
        (by_both, [(5, 6), (2, 9), (3, 7)], "traced where Eq.*takes another way for these"),
        (from_a_table, [(5, 6), (1, 12)], "of at least 2 and at most 12; pad or cut it"),
        (
            in_a_loop,
            [(5, 6), (1, 6)],
            "works with 6 along dimension 1 alone, which dynamic_shapes lets vary where it can",
        ),
        (short, [(5, 6), (2, 8)], "of at least 2 and at most 8; pad or cut it"),
    ],
)
def test_what_the_trace_decided_by_sizes_is_right_or_refused(
    way: Callable[..., Tensor], allowed: list[tuple[int, int]], message: str
) -> None:
    """Dim.AUTO leaves it to torch.export what varies; sizes for which the model goes another way are refused."""
    model = Sized(way)
    stages = dtrp.split(model, points=["last"], example=pair(), dynamic_shapes=({1: Dim.AUTO}, {1: Dim.AUTO}))
    for num, length in ((5, 6), (1, 6), (1, 8), (2, 8), (2, 9), (3, 7), (4, 7), (1, 12), (2, 13)):
        x = pair(num, length)
        try:
            got = chain(stages, x)
        except ValueError as error:
            assert (num, length) not in allowed
            assert message
            with pytest.raises(ValueError, match=message):
                raise error
        else:
            assert torch.equal(got, model(*x))
    with pytest.raises(ValueError, match="has size 1 along dimension 1, and the model was traced for|alone"):
        stages[0](pair(5, 1))


def test_a_way_that_samples_and_length_decide_is_looked_at_by_micro_batch() -> None:
    """torch.export drops this condition without a word."""
    model = Sized(by_both)
    stages = dtrp.split(model, points=["last"], example=pair(), dynamic_shapes=({1: "n"}, {1: "n"}))
    x = pair(3, 7)
    assert torch.equal(chain(stages, x), model(*x))
    pipe = dtrp.Pipeline(stages, sgd, lambda out, y: out.square().mean(), method="bp", num_microbatches=2)
    pipe.step(pair(6, 7), torch.zeros(6))
    with pytest.raises(dtrp.StageError, match="takes another way for these"):
        pipe.step(pair(4, 7), torch.zeros(4))


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("way", "varying", "message"),
    [
        (
            in_a_loop,
            ({1: "n"}, {1: "m"}),
            r"any size of dimension 1 of example\[0\] \(n\): its forward works with 6 alone .* pad every batch to 6",
        ),
        (
            in_a_loop,
            ({1: Dim.DYNAMIC}, None),
            r"any size of dimension 1 of example\[0\]: its forward works with 6 alone",
        ),
        (from_a_table, ({1: "n"}, {1: "m"}), r"dynamic_shapes with n = Dim\('n', max=12\)"),
        (
            same,
            ({1: "n"}, {1: "m"}),
            r"any size of dimension 1 of example\[1\] \(m\): .* pass dynamic_shapes with m = n",
        ),
        (in_pairs, ({1: "n"}, {1: "n"}), r"pass dynamic_shapes with .*n = 2\*_n"),
        (same, ({1: "n"}, None), r"any size of dimension 1 of example\[0\] \(n\): its forward works with 6 alone"),
        (same, ({1: "n"},), "dynamic_shapes is a tuple of 1, and example a tuple of 2; pass as many entries"),
        (same, {"y": {1: "n"}}, "unknown argument in dynamic_shapes: 'y'; .*known: x, other"),
        (same, ({3: "n"}, None), r"dynamic_shapes\[0\] names dimension 3 of a tensor of 3"),
        (same, (("n", "m"), None), r"dynamic_shapes\[0\] has 2 entries, and the tensor 3 dimensions"),
        (same, ("n", None), r"dynamic_shapes\[0\] is 'n'; pass \{dimension: torch.export.Dim\(name\)\}"),
        (same, ({1: 7}, None), r"dynamic_shapes\[0\]\[1\] is 7, and the example has 6 there"),
        (same, ({1: 1.5}, None), r"dynamic_shapes\[0\]\[1\] is 1.5; pass a torch.export.Dim"),
        (
            same,
            ({0: "a"}, {0: "b"}),
            "names dimension 0, the samples, 'a' and 'b'; .* leave it out, or give it one name",
        ),
    ],
)
def test_what_cannot_vary_is_told(way: Callable[..., Tensor], varying: Any, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        dtrp.split(Sized(way), points=["last"], example=pair(), dynamic_shapes=varying)


def test_other_things_that_do_not_vary() -> None:
    with pytest.raises(
        ValueError, match="has size 1 along dimension 1, which dynamic_shapes lets vary; torch.export takes"
    ):
        dtrp.split(Sized(same), points=["last"], example=pair(5, 1), dynamic_shapes=({1: "n"}, {1: "n"}))
    with pytest.raises(ValueError, match="dynamic_shapes with modules that are not traced"):
        dtrp.split(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), num_stages=2, dynamic_shapes={1: "n"})
    with pytest.raises(ValueError, match="unknown name in dynamic_shapes: 'idz'; did you mean 'ids'"):
        dtrp.split(Classifier(), num_stages=2, example=texts(5, 7), dynamic_shapes={"idz": {1: "length"}})
    stages = dtrp.split(Classifier(), num_stages=2, example=texts(5, 7))
    with pytest.raises(ValueError, match="only the number of samples may differ: pad it, .* or with dynamic_shapes"):
        stages[0](texts(5, 8))


def test_fixed_values_are_looked_for_at_another_size() -> None:
    """A number of Python's that depends on the length through NumPy is a constant in the trace."""

    def way(model: Any, h: Tensor, other: Tensor) -> Tensor:
        return h * float(torch.tensor(list(h.shape)).sum()) if not torch.compiler.is_exporting() else h * 15.0

    model = Sized(way)
    with pytest.raises(
        ValueError, match=r"on the example in shapes \(5, 5, 4\), \(5, 5\), in eval mode, output differs"
    ):
        dtrp.split(model, points=["last"], example=pair(), dynamic_shapes=({1: "n"}, {1: "n"}))


def test_stages_of_stages_take_the_same_sizes() -> None:
    model, x = Classifier().eval(), texts(5, 7)
    fine = dtrp.split(model, points=["blocks.1", "blocks.2", "pooled"], example=x, dynamic_shapes=VARYING)
    for stages in (fine.cut([2]), fine.cut([1, 3])):
        for other in (texts(4, 10), texts(3, LONGEST)):
            assert torch.equal(chain(stages, other)["logits"], model(**other)["logits"])


def test_minima_that_torch_needs_are_raised_by_themselves() -> None:
    """With 2 tokens one is left to predict, and torch.export takes a size of 1 for a constant."""

    def way(model: Any, h: Tensor, other: Tensor) -> Tensor:
        return (h[:, 1:] * other[:, :-1, None]).flatten(1).sum(1)[:, None, None] + h

    model = Sized(way)
    varying = ({1: Dim("n", max=9)}, {1: Dim("n", max=9)})
    stages = dtrp.split(model, points=["last"], example=pair(), dynamic_shapes=varying)
    for num, length in ((5, 6), (1, 3), (2, 9)):
        x = pair(num, length)
        assert torch.equal(chain(stages, x), model(*x))
    with pytest.raises(ValueError, match=r"has size 2 .* traced for n of at least 3 and at most 9; pad or cut it"):
        stages[0](pair(5, 2))


class Rows(nn.Module):
    """Tokens along dimension 0, with a table of as many rows and a mask of a size that ``len`` tells."""

    def __init__(self, longest: int) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(9, 4), nn.Linear(4, 9)
        self.register_buffer("table", torch.randn(longest, 1, 4))
        self.mask: Tensor | None = None

    def forward(self, tokens: Tensor) -> Tensor:
        if self.mask is None or self.mask.shape[0] != len(tokens):
            self.mask = torch.ones(len(tokens), len(tokens)).tril()
        h = self.embedding(tokens) + self.table[: tokens.size(0)]
        return self.head(torch.einsum("st,tnd->snd", self.mask, h))


def test_len_varies_and_a_forward_has_room_for_so_many_samples() -> None:
    model = Rows(longest=12)
    stages = dtrp.split(model, num_stages=2, example=torch.randint(9, (6, 3)), dynamic_shapes=({1: "columns"},))
    for shape in ((6, 3), (12, 2), (2, 5), (9, 4)):
        x = torch.randint(9, shape)
        torch.testing.assert_close(chain(stages, x), model(x), rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match=r"has size 13 .* traced for at most 12 samples at once; pass fewer"):
        stages[0](torch.randint(9, (13, 3)))
    x, y = torch.randint(9, (13, 3)), torch.randint(9, (39,))
    pipe = dtrp.Pipeline(
        stages, sgd, lambda out, y: nn.functional.cross_entropy(out.flatten(0, 1), y), method="bp", num_microbatches=1
    )
    with pytest.raises(ValueError, match=r"has size 13 .* at most 12 samples"):
        pipe.step(x, y)
    pipe.step(x[:7], y[:21])


def test_a_copy_and_a_wrong_batch_at_the_door() -> None:
    model = Classifier()
    stages = dtrp.split(model, num_stages=2, example=texts(5, 7), dynamic_shapes=VARYING)
    copied = copy.deepcopy(stages)
    x = texts(3, 9)
    for stage in (*stages, *copied):
        stage.eval()
    assert torch.equal(chain(stages, x)["logits"], chain(copied, x)["logits"])
    pipe = dtrp.Pipeline(stages, sgd, loss_fn, method="dtrp", num_microbatches=1)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"has size 9 along .* and x\['mask'\] has size 8"):
        pipe.step({"ids": x["ids"], "mask": x["mask"][:, :8]}, torch.zeros(3, dtype=torch.int64))
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    pipe.step(x, torch.zeros(3, dtype=torch.int64))
    pipe.flush()


class Open(nn.Module):
    """Takes arguments that its forward does not name, and reads a value of the data."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor, **more: Tensor) -> Tensor:
        h = self.first(x) * more["weight"][..., None] * more["lengths"].double().mean().item()
        return self.last(h.masked_fill(more["weight"][..., None] < 0, 0.0))


@pytest.mark.parametrize("varying", [None, {"x": {1: "n"}, "weight": {1: "n"}}])
def test_arguments_that_the_forward_does_not_name_and_values_of_the_data(varying: Any) -> None:
    def data(num: int, length: int) -> dict[str, Tensor]:
        x, weight = pair(num, length)
        return {"x": x, "weight": weight, "lengths": torch.arange(num)}

    model = Open()
    stages = dtrp.split(model, points=["last"], example=data(5, 6), dynamic_shapes=varying)
    assert "forward" not in vars(model)
    for num, length in ((5, 6), (3, 6), (4, 9)) if varying else ((5, 6), (3, 6)):
        x = data(num, length)
        assert torch.equal(chain(stages, x), model(**x))


def test_a_tensor_for_all_samples_varies_and_a_length_may_be_the_number_of_samples() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor, places: Tensor) -> Tensor:
            return self.last(torch.tanh(self.first(x)) + places[..., None])

    model, varying = Model(), ({1: "n"}, {1: "n"})
    stages = dtrp.split(
        model, points=["last"], example=(torch.randn(5, 5, 4), torch.randn(1, 5)), dynamic_shapes=varying
    )
    pipe = dtrp.Pipeline(stages, sgd, lambda out, y: out.square().mean(), method="bp", num_microbatches=2)
    plain = copy.deepcopy(model)
    for num, length in ((5, 5), (4, 7), (7, 4), (3, 3)):
        x = (torch.randn(num, length, 4), torch.randn(1, length))
        assert torch.equal(chain(stages, x), plain(*x))
        torch.testing.assert_close(
            pipe.step(x, torch.zeros(num)), plain(*x).square().mean().detach(), rtol=1e-10, atol=1e-10
        )
        plain.load_state_dict(model.state_dict())
