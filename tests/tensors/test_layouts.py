"""Sparse tensors, and others without strides, wherever a user can put one: right, or refused by name before the first update."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_close, assert_same, with_aux
from torch import Tensor, nn

import dtrp
from dtrp.comm.message import Kind, Note, Packer, decode, read_header
from dtrp.engine.consistency import checksum_of
from dtrp.tensors.pytree import num_samples, split

METHODS = dtrp.list_methods()
pytestmark = pytest.mark.filterwarnings(
    "ignore:Sparse .* tensor support is in beta", "ignore:The PyTorch API of nested", "ignore:torch.quantize_per_tensor"
)


def quantized(t: Tensor) -> Tensor:
    scale, zero = torch.tensor(0.1), torch.tensor(0)
    return torch.quantize_per_tensor(t.float(), scale, zero, torch.quint8)


OTHERS: dict[str, Callable[[Tensor], Tensor]] = {
    "sparse_csr": Tensor.to_sparse_csr,
    "sparse_csc": Tensor.to_sparse_csc,
    "sparse_bsr": lambda t: t.to_sparse_bsr((1, 2)),
    "sparse_bsc": lambda t: t.to_sparse_bsc((1, 2)),
    "nested": lambda t: torch.nested.as_nested_tensor(list(t)),
    "mkldnn": lambda t: t.float().to_mkldnn(),
    "quantized": quantized,
}


class Layer(nn.Module):
    """``how`` says what to do with a linear layer and a buffer."""

    def __init__(self, how: Callable[..., Any], buffer: Tensor | None = None, outputs: int = 6) -> None:
        super().__init__()
        self.how, self.linear = how, nn.Linear(6, outputs)
        self.register_buffer("mix", buffer)

    def forward(self, x: Any) -> Any:
        return self.how(x, self.linear, self.mix)


def model(*first: nn.Module) -> nn.Sequential:
    rest = [Layer(lambda v, f, _: f(v)) for _ in range(2 - len(first))]
    return nn.Sequential(*first, *rest, Layer(lambda v, f, _: f(torch.tanh(v)), outputs=3))


def sgd(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def make(
    layers: nn.Sequential, method: str = "dtrp", loss_fn: Any = nn.functional.cross_entropy, **options: Any
) -> dtrp.Pipeline:
    options = {"num_microbatches": 2, "seed": 3, **with_aux(method, 3), **options}
    return dtrp.Pipeline(layers, options.pop("optimizer", sgd), loss_fn, num_stages=3, method=method, **options)


def trained(make_pipe: Callable[[], dtrp.Pipeline], batches: list[tuple[Any, Any]], folder: Path) -> dict[str, Tensor]:
    """The parameters after a run that was saved on its way and went on in another pipeline."""
    torch.manual_seed(0)
    pipe = make_pipe()
    for x, y in batches[:4]:
        pipe.step(x, y)
    pipe.save(folder)
    pipe = make_pipe()
    pipe.load(folder)
    for x, y in batches[4:]:
        pipe.step(x, y)
    pipe.flush()
    return {name: p.detach() for stage in pipe.stages for name, p in stage.named_parameters()}


def batches(count: int = 7) -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(1)
    return [(torch.randn(7, 6).relu(), torch.randint(3, (7,))) for _ in range(count)]


# -- right ----------------------------------------------------------------------------------------------------


@pytest.mark.sampled(3)
@pytest.mark.parametrize("method", METHODS)
def test_a_sparse_input_is_its_dense_one(method: str, tmp_path: Path) -> None:
    def run(change: Callable[[Tensor], Tensor], name: str) -> dict[str, Tensor]:
        data = [(change(x), y) for x, y in batches()]
        return trained(lambda: make(model(Layer(lambda v, f, _: f(v.to_dense()))), method), data, tmp_path / name)

    assert_same(run(Tensor.to_sparse, "a"), run(lambda t: t, "b"))
    assert_same(run(lambda t: t.to_sparse(1), "c"), run(lambda t: t, "d"))


@pytest.mark.parametrize("method", [method for method in METHODS if method != "dgl"])  # whose networks take dense ones
def test_a_sparse_output_with_a_gradient(method: str, tmp_path: Path) -> None:
    """Where nothing is zero it is its dense one: saved in flight, cut, and differentiated."""

    def run(sparse: bool, name: str) -> dict[str, Tensor]:
        def first(v: Tensor, f: nn.Module, _: Any) -> Tensor:
            h = torch.sigmoid(f(v))
            return h.to_sparse() if sparse else h

        def make_pipe() -> dtrp.Pipeline:
            return make(model(Layer(first), Layer(lambda v, f, _: f(v.to_dense()))), method)

        return trained(make_pipe, batches(), tmp_path / name)

    assert_same(run(True, "a"), run(False, "b"))


def test_sparse_targets_and_what_is_one_for_all(tmp_path: Path) -> None:
    def loss_fn(out: Tensor, target: Tensor) -> Tensor:
        return nn.functional.mse_loss(out, target.to_dense())

    def run(change: Callable[[Tensor], Tensor], name: str) -> dict[str, Tensor]:
        def first(v: Any, f: nn.Module, _: Any) -> Tensor:
            out: Tensor = f(v["x"]) @ v["mix"].to_dense()[0] * v["scale"].to_dense()
            return out

        mix, scale = torch.eye(6).roll(1, 0)[None], torch.tensor(0.5)
        data = [({"x": x, "mix": change(mix), "scale": change(scale)}, change(x[:, :3])) for x, _ in batches()]
        return trained(lambda: make(model(Layer(first)), loss_fn=loss_fn), data, tmp_path / name)

    assert_same(run(Tensor.to_sparse, "a"), run(lambda t: t, "b"))


@pytest.mark.parametrize("method", ["bp", "fdg", "dtrp", "spectrain"])
@pytest.mark.parametrize("layout", ["sparse_coo", *[name for name in OTHERS if name not in ("nested", "mkldnn")]])
def test_buffers_without_strides(layout: str, method: str, tmp_path: Path) -> None:
    change = {**OTHERS, "sparse_coo": Tensor.to_sparse}[layout]

    def mixed(v: Tensor, f: nn.Module, mix: Tensor) -> Tensor:
        dense = mix.dequantize() if mix.is_quantized else mix.to_dense() if mix.layout is not torch.strided else mix
        out: Tensor = f(v) @ dense
        return out

    def run(buffer: Tensor) -> dict[str, Tensor]:
        torch.manual_seed(0)
        pipe = make(model(Layer(mixed, buffer)), method)
        for x, y in batches():
            pipe.step(x, y)
        if layout != "sparse_coo" and buffer is not dense:
            with pytest.raises(dtrp.CheckpointError, match="mix is a torch.* tensor"):
                pipe.save(tmp_path / "saved")
        pipe.flush()
        pipe.model_state_dict()
        return {name: p.detach() for stage in pipe.stages for name, p in stage.named_parameters()}

    dense = torch.eye(6).roll(1, 0) + torch.eye(6)
    assert_same(run(change(dense)), run(dense))


@pytest.mark.parametrize("method", METHODS)
def test_a_sparse_buffer_that_moves(method: str) -> None:
    def moved(v: Tensor, f: nn.Module, mix: Tensor) -> Tensor:
        mix.mul_(0.9)
        out: Tensor = f(v)
        return out

    torch.manual_seed(0)
    pipe = make(model(Layer(moved, torch.eye(6).to_sparse())), method)
    for x, y in batches():
        pipe.step(x, y)
    pipe.flush()
    values = pipe.model_state_dict()["0.mix"].to_dense().diagonal()
    torch.testing.assert_close(values, torch.full((6,), 0.9**14))


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("method", METHODS)
def test_sparse_gradients_of_embeddings(method: str) -> None:
    """Predicted from their momentum too; the last rows are used by no sample."""

    def run(sparse: bool) -> dict[str, Tensor]:
        torch.manual_seed(0)
        layers = [
            nn.Sequential(nn.EmbeddingBag(9, 6, mode="sum", sparse=sparse), nn.Tanh()),
            nn.Linear(6, 6),
            nn.Linear(6, 3),
        ]
        pipe = make(nn.Sequential(*layers), method)
        for i in range(7):
            torch.manual_seed(i)
            pipe.step(torch.randint(7, (8, 2)), torch.randint(3, (8,)))
        pipe.flush()
        return dict(nn.Sequential(*layers).state_dict())

    assert_close(run(True), run(False))


# -- refused --------------------------------------------------------------------------------------------------


def refuses(pipe: dtrp.Pipeline, x: Any, y: Any, kind: type[Exception], message: str) -> None:
    before = pipe.model_state_dict()
    with pytest.raises(kind, match=message):
        pipe.step(x, y)
    for stage in pipe.stages:
        for name, p in stage.named_parameters():
            assert torch.equal(p, before[name])


@pytest.mark.parametrize("layout", OTHERS)
def test_inputs_and_targets_that_are_refused(layout: str) -> None:
    (x, y), *_ = batches()
    other = OTHERS[layout](x)
    pipe = make(model())
    refuses(pipe, other, y, TypeError, rf"^x is a {layout} tensor; pass what .*\(\) makes of it")
    refuses(pipe, {"h": (x, other)}, y, TypeError, rf"^x\['h'\]\[1\] is a {layout} tensor; pass what .*\(\) makes")
    refuses(pipe, x, other, TypeError, rf"^y is a {layout} tensor; pass what .*\(\) makes of it")
    with pytest.raises(TypeError, match=f"^x is a {layout} tensor"):
        pipe.infer(other)
    for x, y in batches():  # nothing has happened
        pipe.step(x, y)


@pytest.mark.parametrize("method", ["bp", "fdg", "dtrp"])
@pytest.mark.parametrize("in_tree", [False, True])
@pytest.mark.parametrize("layout", OTHERS)
def test_outputs_that_are_refused(layout: str, in_tree: bool, method: str) -> None:
    def first(v: Tensor, f: nn.Module, _: Any) -> Any:
        h = OTHERS[layout](torch.sigmoid(f(v)))
        return {"h": h} if in_tree else h

    (x, y), *_ = batches()
    place = r"\['h'\]" if in_tree else ""
    message = (
        rf"stage 0, forward of micro-batch 0 .*its output{place} is a {layout} tensor; pass what .*\(\) makes of it"
    )
    refuses(make(model(Layer(first)), method), x, y, dtrp.StageError, message)


@pytest.mark.parametrize("layout", ["nested", "mkldnn"])
def test_buffers_that_are_refused(layout: str) -> None:
    with pytest.raises(TypeError, match=f"0.mix of stage 0 is a _?{layout} tensor; "):
        make(model(Layer(lambda v, f, _: f(v), OTHERS[layout](torch.eye(6)))))


def test_a_sparse_parameter_is_refused() -> None:
    layer = Layer(lambda v, f, _: f(v))
    layer.register_parameter("sparse", nn.Parameter(torch.eye(6).to_sparse()))
    with pytest.raises(
        TypeError, match=r"1.sparse of stage 1 is a sparse_coo tensor; parameters that are trained have strides"
    ):
        make(nn.Sequential(nn.Linear(6, 6), layer, nn.Linear(6, 3)))


# -- cut, sent, compared --------------------------------------------------------------------------------------

UNSORTED = torch.sparse_coo_tensor([[3, 0, 3, 6], [1, 2, 1, 0]], [1.0, 2.0, 3.0, 4.0], (7, 3), check_invariants=True)
SPARSE = [
    UNSORTED,
    UNSORTED.coalesce(),
    torch.randn(7, 3, 2).to_sparse(1),
    torch.zeros(7, 3).to_sparse(),
    torch.eye(7) > 0,
]


@pytest.mark.parametrize("t", [t.to_sparse() if t.layout is torch.strided else t for t in SPARSE])
@pytest.mark.parametrize("parts", [1, 2, 3, 7, 9])
def test_parts_are_those_of_the_dense_tensor(t: Tensor, parts: int) -> None:
    assert num_samples(t) == 7
    for part, want in zip(split(t, parts), t.to_dense().tensor_split(parts), strict=True):
        assert torch.equal(part.to_dense(), want)
        assert part.is_coalesced() == t.is_coalesced()


@pytest.mark.parametrize("wants", [False, True])
@pytest.mark.parametrize("t", [t for t in SPARSE if t.layout is torch.sparse_coo])
def test_a_sparse_tensor_arrives_as_it_was(t: Tensor, wants: bool) -> None:
    t = t.detach().requires_grad_(wants)
    value = {"a": torch.randn(2, 3), "s": (t, 5), "b": torch.arange(3)}
    for sent, kind in ((value, Kind.TREE), (t, Kind.for_value(t))):
        packed = Packer(reuses=True).pack(kind, Note(), sent)
        packed.write_header()
        got: Any = decode(read_header(packed.buffer), packed.buffer).tensor
        came = got if isinstance(got, Tensor) else got["s"][0]
        assert (came.shape, came.dtype, came.is_coalesced(), came.requires_grad) == (
            t.shape,
            t.dtype,
            t.is_coalesced(),
            wants,
        )
        assert torch.equal(came._indices(), t._indices())
        assert torch.equal(came._values(), t._values())
        if not isinstance(got, Tensor):
            assert torch.equal(got["b"], value["b"])


def test_a_checksum_of_sparse_targets() -> None:
    other = UNSORTED.clone()
    assert checksum_of(UNSORTED, waits=True) == checksum_of(other, waits=True) != -1
    other._values()[1] += 1
    assert checksum_of(UNSORTED, waits=True) != checksum_of(other, waits=True)
