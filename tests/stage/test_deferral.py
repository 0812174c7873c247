"""A backward in two parts (`dtrp.stage.deferral`): the bits of I and W together are those of one backward."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import hugging_face_models as hf
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

import dtrp
from dtrp.models import get_model
from dtrp.stage.deferral import Division, Queue, Tried, receiving
from dtrp.tensors.layout import edge_of
from dtrp.tensors.parameter_swap import Places
from dtrp.tensors.pytree import tensors_of

Inputs = tuple[Any, ...]


class Plain:
    """A stage as it is differentiated here: in one backward, or in I and W."""

    def __init__(
        self,
        module: nn.Module,
        inputs: Inputs,
        *,
        autocast: bool = False,
        needs_grad: bool = True,
        call: Callable[..., Any] | None = None,
    ) -> None:
        self.module, self.inputs, self.autocast, self.needs_grad = module, inputs, autocast, needs_grad
        self.call = call or module
        named = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.names, self.parameters = list(named), list(named.values())
        self.division = Division(module, self.parameters)
        self.places, self.state = Places(module), copy.deepcopy(module.state_dict())
        self.queues: list[Queue] = []

    def run(self, seed: int, leaves: Sequence[Tensor], *, divided: bool, at_once: bool = True) -> list[Tensor | None]:
        """One micro-batch: the outputs and the gradients of the inputs."""
        torch.manual_seed(seed)
        entered = [
            x.detach().clone().requires_grad_(self.needs_grad and x.is_floating_point()) if torch.is_tensor(x) else x
            for x in self.inputs
        ]
        given = [x.view_as(x) if torch.is_tensor(x) and x.requires_grad else x for x in entered]
        on_copies = leaves is not self.parameters
        regions = [
            torch.autocast("cpu", torch.bfloat16, enabled, cache_enabled=False) if self.autocast else nullcontext()
            for enabled in (True, False)
        ]
        with self.places.hold(dict(zip(self.names, leaves, strict=True))) if on_copies else nullcontext():
            with self.division.recording(leaves) if divided else nullcontext(), regions[0]:
                out = tensors_of(_plain_tree(self.call(*given)))
            values = [t.detach() for t in out]
            roots = [edge_of(t) if t.dim() else t for t in out if t.requires_grad]
            starts = [torch.randn_like(t) if t.dim() else None for t in out if t.requires_grad]
            del out
            with regions[1]:
                if divided:
                    self.queues.append(self.division.input_backward(roots, starts, leaves))
                else:
                    with receiving(self.parameters, leaves):
                        torch.autograd.backward(roots, starts)
        if divided and at_once:
            self.queues.pop().run()
        return [*values, *(x.grad for x in entered if torch.is_tensor(x))]

    def reset(self) -> None:
        self.module.load_state_dict(self.state)

    def try_it(self) -> None:
        def run(divided: bool) -> Tried:
            self.reset()
            leaves = [p.detach().requires_grad_() for p in self.parameters]
            others = self.run(3, leaves, divided=divided)
            return Tried(others, [leaf.grad for leaf in leaves])

        self.division.trial(run)
        assert all(p.grad is None for p in self.parameters)

    def results(self, *, divided: bool, on_copies: bool = False) -> list[Tensor | None]:
        """Of two micro-batches, whose gradients are added; W of the first after its I, of the second later."""
        self.reset()
        leaves = [p.detach().requires_grad_() for p in self.parameters] if on_copies else self.parameters
        for leaf in leaves:
            leaf.grad = None
        found = self.run(5, leaves, divided=divided) + self.run(6, leaves, divided=divided, at_once=False)
        for queue in self.queues:
            queue.run()
        self.queues = []
        return found + [leaf.grad for leaf in leaves]


def _plain_tree(out: Any) -> Any:
    if hasattr(out, "keys"):
        return [out["logits"]]
    return out if isinstance(out, Tensor) else list(out)


def _check(
    module: nn.Module, *inputs: Any, share: float | None = None, on_copies: bool | None = None, **more: Any
) -> Plain:
    stage = Plain(module, inputs, **more)
    stage.try_it()
    for copies in (False, True) if on_copies is None else (on_copies,):
        plain, divided = (stage.results(divided=d, on_copies=copies) for d in (False, True))
        assert len(plain) == len(divided)
        for a, b in zip(plain, divided, strict=True):
            assert (a is None) == (b is None)
            if a is not None and b is not None:
                assert a.layout == b.layout
                assert torch.equal(a.to_dense(), b.to_dense())
    if share is not None:
        assert stage.division.share().elements == pytest.approx(share, abs=1e-3), stage.division.share().whole
    return stage


DTYPES = {"float32": torch.float32, "float64": torch.float64}


@pytest.fixture(params=DTYPES)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    torch.set_default_dtype(DTYPES[request.param])
    return DTYPES[request.param]


class Checkpointed(nn.Module):
    def __init__(self, inner: nn.Module, use_reentrant: bool) -> None:
        super().__init__()
        self.inner, self.use_reentrant = inner, use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = checkpoint(self.inner, x, use_reentrant=self.use_reentrant)
        return out


class Tied(nn.Module):
    """An embedding that is the last layer too, and a layer that comes twice."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.twice, self.head = (
            nn.Embedding(9, 6, padding_idx=2),
            nn.Linear(6, 6),
            nn.Linear(6, 9, bias=False),
        )
        self.head.weight = self.tokens.weight

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.twice(torch.tanh(self.twice(self.tokens(x)))))
        return out


class Views(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.other = nn.Parameter(torch.randn(12, 4)), nn.Parameter(torch.randn(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        a, b, c = self.weight.chunk(3)
        return F.linear(x, a) * F.linear(x, b) + x @ c + torch.addmm(self.other[0], x, self.other.t())


def _mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.LayerNorm(6), nn.Dropout(0.3), nn.Linear(6, 4))


def _convolutions(**more: Any) -> nn.Sequential:
    first, second = nn.Conv2d(3, 8, 3, padding="same"), nn.Conv2d(8, 8, 3, stride=2, groups=4, bias=False)
    return nn.Sequential(first, nn.BatchNorm2d(8), nn.ReLU(inplace=True), second, nn.ReLU(inplace=True)).to(**more)


CASES: dict[str, Callable[[], tuple[nn.Module, Inputs]]] = {
    "linear": lambda: (_mlp(), (torch.randn(5, 4),)),
    "linear, 3 dimensions, strided": lambda: (_mlp(), (torch.randn(4, 3, 5).transpose(0, 2),)),
    "linear, written in place": lambda: (nn.Sequential(_mlp(), nn.ReLU(inplace=True)), (torch.randn(3, 5, 4),)),
    "linear, by columns": lambda: (_mlp(), (torch.randn(4, 5).t(),)),
    "convolutions": lambda: (_convolutions(), (torch.randn(4, 3, 7, 7),)),
    "convolutions, a single sample": lambda: (nn.Conv2d(3, 4, 3), (torch.randn(3, 7, 7),)),
    "convolutions, channels_last": lambda: (
        _convolutions(memory_format=torch.channels_last),
        (torch.randn(4, 3, 7, 7).to(memory_format=torch.channels_last),),
    ),
    "convolutions in 1 and 3 dimensions": lambda: (
        nn.Sequential(nn.Conv1d(3, 4, 3, dilation=2), nn.Unflatten(2, (2, 2, 2)), nn.Conv3d(4, 2, 2)),
        (torch.randn(2, 3, 12),),
    ),
    "transposed convolutions": lambda: (
        nn.Sequential(
            nn.ConvTranspose1d(3, 4, 3, 2, output_padding=1), nn.Unflatten(2, (2, 5)), nn.ConvTranspose2d(4, 4, 2, groups=2)
        ),
        (torch.randn(2, 3, 4),),
    ),
    "tied and repeated": lambda: (Tied(), (torch.randint(9, (3, 5)),)),
    "views": lambda: (Views(), (torch.randn(5, 4),)),
    "frozen": lambda: (nn.Sequential(nn.Linear(4, 4).requires_grad_(False), nn.Linear(4, 4)), (torch.randn(5, 4),)),
    "encoder": lambda: (nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), (torch.randn(3, 5, 8),)),
    "decoder": lambda: (nn.TransformerDecoderLayer(8, 2, 16), (torch.randn(5, 3, 8), torch.randn(4, 3, 8))),
    "attention of other widths": lambda: (
        nn.MultiheadAttention(8, 2, kdim=4, vdim=6, add_bias_kv=True),
        (torch.randn(3, 2, 8), torch.randn(5, 2, 4), torch.randn(5, 2, 6)),
    ),
    "weight norm": lambda: (
        nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 4)), nn.Tanh(), nn.Linear(4, 4)),
        (torch.randn(5, 4),),
    ),
    "spectral norm": lambda: (parametrizations.spectral_norm(nn.Linear(4, 4)), (torch.randn(5, 4),)),
    **{
        f"checkpoint, use_reentrant={outer}, {inner}": lambda outer=outer, inner=inner: (
            nn.Sequential(
                Checkpointed(nn.Sequential(nn.Linear(4, 4), Checkpointed(_mlp(), inner)), outer),
                nn.Tanh(),
                Checkpointed(nn.TransformerEncoderLayer(4, 2, 6), outer),
            ),
            (torch.randn(5, 3, 4),),
        )
        for outer in (False, True)
        for inner in (False, True)
    },
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # a checkpoint within a reentrant one
@pytest.mark.parametrize("name", CASES)
def test_both_parts_are_one_backward_to_the_bit(name: str, dtype: torch.dtype) -> None:
    module, inputs = CASES[name]()
    stage = _check(module, *inputs)
    assert stage.division.share().elements > 0.7


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("name", [name for name in CASES if "strided" not in name])
def test_it_is_so_under_autocast(name: str) -> None:
    module, inputs = CASES[name]()
    stage = _check(module, *inputs, autocast=True)
    assert stage.division.share().elements > 0.7


def test_a_first_stage_has_an_input_without_a_gradient(dtype: torch.dtype) -> None:
    _check(_convolutions(), torch.randn(4, 3, 7, 7), needs_grad=False, share=0.958)
    stage = _check(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)), torch.randn(3, 4), needs_grad=False)
    assert stage.division.share().whole == {}


MODELS = ("resnet14-8", "resnet18", "wrn28-10", "vgg11", "mlp", "gpt")


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", MODELS)
def test_the_networks_of_the_library(name: str, dtype: torch.dtype, capsys: pytest.CaptureFixture[str]) -> None:
    if name == "wrn28-10":
        from dtrp.models.wide_resnet import wide_resnet

        model = wide_resnet(10, 1)
    elif name == "gpt":
        model = get_model("gpt", num_classes=11, layers=2, width=16, heads=2, context=8)
    else:
        model = get_model(name)
    x = torch.randint(11, (2, 8)) if name == "gpt" else torch.randn(2, 3, 32, 32)
    share = _check(model, x, needs_grad=False, on_copies=False).division.share()
    with capsys.disabled():
        print(f"\n{name}, {dtype}: W has {share.elements:.1%} of the weights, {share.flops / 1e6:.1f} Mflop")
    assert share.elements > 0.9
    assert all(why.startswith("used in") for why in share.whole.values())


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", ["gpt2, tied", "bert", "llama", "vit", "t5"])
@pytest.mark.parametrize("autocast", [False, True])
def test_networks_of_hugging_face(name: str, autocast: bool) -> None:
    make, example, _ = hf.MODELS[name]
    value, model = example(), make()
    keywords = value if isinstance(value, dict) else {}
    stage = _check(
        model,
        *(keywords.values() or [value]),
        autocast=autocast,
        call=lambda *given: model(**dict(zip(keywords, given, strict=True))) if keywords else model(*given),
    )
    assert stage.division.share().elements > 0.95


@pytest.mark.skipif(torch.__version__.startswith("2.6."), reason="dtrp.split does not trace there")
def test_traced_stages(float64: None) -> None:
    model = get_model("gpt", num_classes=11, layers=2, width=16, heads=2, context=8)
    tokens = torch.randint(11, (2, 8))
    first, second = dtrp.split(model, num_stages=2, example=tokens)
    h = first(tokens)
    for stage, x, needs in ((first, tokens, False), (second, h, True)):
        share = _check(stage, x, needs_grad=needs).division.share()
        assert share.elements > 0.9
    convolutions = nn.Sequential(_convolutions(), nn.Flatten(), nn.Linear(72, 4))
    stages = dtrp.split(convolutions, num_stages=1, example=torch.randn(4, 3, 7, 7))
    assert _check(stages[0], torch.randn(4, 3, 7, 7)).division.share().elements > 0.9


def test_gradients_are_laid_out_as_autograd_lays_them() -> None:
    layer = nn.Embedding(9, 4)
    layer.weight = nn.Parameter(torch.randn(4, 9).t())  # by columns, and a gradient by rows comes
    stage = _check(layer, torch.randint(9, (3, 5)), share=1.0)
    stage.results(divided=True)
    assert layer.weight.grad is not None
    assert layer.weight.grad.stride() == layer.weight.stride() == (1, 9)


# -- what stays whole -----------------------------------------------------------------------------


class Einsum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.weight = nn.Linear(4, 4), nn.Parameter(torch.randn(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bi,ij->bj", self.first(x), self.weight) + (self.weight @ x.t()).t()


class Forces(nn.Module):
    """Differentiates within its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.energy, self.last = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        (force,) = torch.autograd.grad(torch.tanh(self.energy(x)).sum(), x, create_graph=True)
        return self.last(force)  # type: ignore[no-any-return]


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.last = nn.Parameter(torch.randn(2, 4, 4)), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.bmm(x.expand(2, *x.shape), self.weight))  # type: ignore[no-any-return]


class Mapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.vmap(self.inner)(x)  # type: ignore[no-any-return]


WHOLE: dict[str, tuple[Callable[[], tuple[nn.Module, Inputs]], float, str]] = {
    "lstm": (lambda: (nn.LSTM(4, 4), (torch.randn(3, 2, 4),)), 0, ""),
    "gru": (lambda: (nn.GRU(4, 4), (torch.randn(3, 2, 4),)), 0, ""),
    "bilinear": (lambda: (nn.Bilinear(4, 4, 3), (torch.randn(3, 4), torch.randn(3, 4))), 0, "used in bilinear"),
    "einsum": (lambda: (Einsum(), (torch.randn(3, 4),)), 20 / 36, ""),
    "a derivative within the forward": (lambda: (Forces(), (torch.randn(3, 4),)), 0.5, "differentiates within"),
    "experts": (lambda: (Experts(), (torch.randn(3, 4),)), 20 / 52, "used in bmm"),
    "vmap": (lambda: (Mapped(), (torch.randn(3, 4),)), 0, ""),
    "embedding bag": (lambda: (nn.EmbeddingBag(9, 4), (torch.randint(9, (3, 5)),)), 0, ""),
    "sparse embedding": (lambda: (nn.Embedding(9, 4, sparse=True), (torch.randint(9, (3, 5)),)), 0, ""),
    "torchscript": (lambda: (torch.jit.trace(nn.Linear(4, 4), torch.randn(2, 4)), (torch.randn(3, 4),)), 0, ""),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize("name", WHOLE)
def test_what_cannot_be_divided_stays_whole_and_right(name: str, dtype: torch.dtype) -> None:
    make, share, reason = WHOLE[name]
    module, inputs = make()
    stage = _check(module, *inputs, share=share, on_copies=False if name == "torchscript" else None)
    assert all(reason in why for why in stage.division.share().whole.values())


class Nosy(nn.Module):
    """Its gradient depends on the names of autograd's nodes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.nosy, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        made = self.nosy(h)
        factor = 1.0 + ("Divided" in str(made.grad_fn))
        return self.last(made * factor)  # type: ignore[no-any-return]


def test_a_part_that_differs_is_found_and_left_whole() -> None:
    stage = _check(Nosy(), torch.randn(3, 4))
    share = stage.division.share()
    assert set(share.whole) == {"nosy.weight", "nosy.bias"}
    assert "would differ" in share.whole["nosy.weight"]


# -- hooks, losses, dtrp.defer ----------------------------------------------------------------------


def test_hooks_see_the_gradient_of_a_micro_batch_and_then_the_sum() -> None:
    module = nn.Sequential(Tied(), nn.LayerNorm(9))
    stage = Plain(module, (torch.randint(9, (3, 5)),))
    stage.try_it()
    seen: dict[str, list[Tensor]] = {}

    def replaced(name: str, g: Tensor) -> Tensor:
        seen.setdefault(name, []).append(g.clone())
        return g * 2

    def added(name: str, p: Tensor) -> None:
        assert p.grad is not None
        seen.setdefault(name, []).append(p.grad.clone())

    for name, p in module.named_parameters():
        p.register_hook(partial(replaced, name))
        p.register_post_accumulate_grad_hook(partial(added, name))
    stage.results(divided=False)
    plain = dict(seen)
    seen.clear()
    stage.results(divided=True)
    assert {name: len(calls) for name, calls in seen.items()} == dict.fromkeys(stage.names, 4)
    for name, calls in seen.items():
        assert all(map(torch.equal, calls, plain[name])), name


class Doubling(torch.autograd.Function):
    """``x @ w`` of somebody who does not know the library, but for one call."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x @ w

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        x, w = ctx.saved_tensors
        dtrp.defer(w, lambda: x.t() @ g)
        return g @ w.t(), None


class UsesDefer(nn.Module):
    def __init__(self, num_uses: int = 2) -> None:
        super().__init__()
        self.weight, self.norm, self.num_uses = nn.Parameter(torch.randn(4, 4)), nn.LayerNorm(4), num_uses

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.num_uses):
            x = self.norm(Doubling.apply(x, self.weight))  # type: ignore[no-untyped-call]
        return x


def test_defer_queues_the_gradient_of_a_users_function(float64: None) -> None:
    stage = _check(UsesDefer(), torch.randn(3, 4), share=16 / 24)
    stage.reset()
    stage.run(5, stage.parameters, divided=True, at_once=False)
    assert len(stage.queues[0]) == 2


def test_defer_runs_at_once_in_every_other_backward(float64: None) -> None:
    module, x = UsesDefer(1), torch.randn(3, 4)
    seen: list[Tensor | None] = []
    module.weight.register_hook(seen.append)
    module(x).square().sum().backward()
    (plain,) = torch.autograd.grad(module.norm(x @ module.weight).square().sum(), module.weight)
    assert module.weight.grad is not None
    torch.testing.assert_close(module.weight.grad, plain)
    assert [g is not None for g in seen] == [
        True,
        False,
        True,
    ]  # torch calls it for the None that backward returned too


def test_defer_refuses_what_it_cannot_do() -> None:
    weight = nn.Parameter(torch.randn(4, 4))
    with pytest.raises(RuntimeError, match="outside of a backward"):
        dtrp.defer(weight, lambda: weight)
    with pytest.raises(TypeError, match="given a int"):
        dtrp.defer(3, lambda: weight)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="computed of others"):
        dtrp.defer(weight * 2, lambda: weight)
    dtrp.defer(torch.zeros(2), lambda: pytest.fail("has no gradient"))

    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
            dtrp.defer(weight, lambda: torch.zeros(3))
            return g, None

    with pytest.raises(ValueError, match=r"shape \(3,\) for a parameter of shape \(4, 4\)"):
        Wrong.apply(torch.ones(2, requires_grad=True), weight).sum().backward()  # type: ignore[no-untyped-call]


def test_a_loss_in_the_stage(dtype: torch.dtype) -> None:
    module, target = nn.Sequential(_mlp(), nn.Linear(4, 3)), torch.randint(3, (5,))
    stage = _check(module, torch.randn(5, 4), call=lambda x: F.cross_entropy(module(x), target))
    assert stage.division.share().elements > 0.7


def test_what_a_queue_holds_must_not_be_written() -> None:
    stage = Plain(nn.Sequential(nn.Linear(4, 4), nn.Tanh()), (torch.randn(3, 4),))
    stage.try_it()
    stage.run(5, stage.parameters, divided=True, at_once=False)
    queue = stage.queues[0]
    assert queue.nbytes == 2 * 12 * 4
    queue.tensors()[1].add_(1)
    with pytest.raises(RuntimeError, match="written in place"):
        queue.run()
    halves = Plain(nn.Sequential(nn.Linear(4, 4), nn.Tanh()), (torch.randn(3, 4),), autocast=True)
    halves.try_it()
    halves.run(5, halves.parameters, divided=True, at_once=False)
    assert halves.queues[0].nbytes == 2 * 12 * 2 + 16 * 2, "the weight in bfloat16, which nothing else holds, too"


def test_a_later_use_in_another_way_is_right_or_refused() -> None:
    module = nn.Linear(4, 4)
    also: list[bool] = []
    stage = Plain(module, (torch.randn(3, 4),), call=lambda x: module(x) + (module.weight.sum() if also else 0))
    stage.try_it()
    also.append(True)
    plain, divided = (stage.results(divided=d) for d in (False, True))
    for a, b in zip(plain, divided, strict=True):
        torch.testing.assert_close(a, b)
    module.weight.register_hook(lambda g: None)
    with pytest.raises(RuntimeError, match="weight has a hook, and its uses were divided"):
        stage.results(divided=True)
