"""Terms that modules add to the loss from inside their forward, against a plain loop over the same micro-batches."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import with_aux
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint
from weighted_losses import KINDS, Adds, Penalized, adding

import dtrp

pytestmark = pytest.mark.usefixtures("float64")
CUTS = [2, 4, 6]
METHODS = [name for name in dtrp.list_methods() if name != "dgl"]


def batches(num: int = 6) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    sizes = [8, 7, 8, 5, 8, 3, 8, 8][:num]
    return [
        (torch.randn(n, 5, generator=generator, dtype=torch.float64), torch.randint(6, (n,), generator=generator))
        for n in sizes
    ]


def plain(
    model: nn.Sequential, data: list[tuple[Tensor, Tensor]], rng: Any, *, parts: int, lr: float, momentum: float = 0.9
) -> tuple[list[Tensor], torch.optim.Optimizer]:
    """The loop that a user would write, with the terms in a list."""
    terms: list[Tensor] = []
    for layer in model:
        if isinstance(layer, Adds):
            layer.add = terms.append  # type: ignore[method-assign]
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum)
    losses, m = [], 0
    for x, y in data:
        total = torch.zeros(())
        count = min(parts, len(y))
        for part, target in zip(x.tensor_split(count), y.tensor_split(count), strict=True):
            h = part
            for k, (start, end) in enumerate(zip([0, *CUTS], [*CUTS, len(model)], strict=True)):
                with rng(k, m):
                    h = model[start:end](h)
            loss = (cross_entropy(h, target) + sum(terms)) * (len(target) / len(y))
            terms.clear()
            loss.backward()
            total = total + loss.detach()
            m += 1
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses, optimizer


def pipeline(model: nn.Sequential, method: Any, *, lr: float, parts: int, **options: Any) -> dtrp.Pipeline:
    return dtrp.Pipeline(
        model,
        lambda params: torch.optim.SGD(params, lr=lr, momentum=0.9),
        cross_entropy,
        cuts=CUTS,
        method=method,
        num_microbatches=parts,
        seed=7,
        **with_aux(method, num_classes=6),
        **options,
    )


def assert_near(a: dict[str, Tensor], b: dict[str, Tensor], bound: float = 1e-10) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert (a[name] - b[name]).abs().max() <= bound * b[name].abs().max().clamp(min=1), name


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_bp_trains_as_the_plain_loop(kind: str, parts: int) -> None:
    model = adding(kind)
    twin = copy.deepcopy(model)
    pipe = pipeline(model, "bp", lr=0.1, parts=parts)
    losses = [pipe.step(x, y) for x, y in batches()]
    want, _ = plain(twin, batches(), pipe.rng, parts=parts, lr=0.1)
    assert all(abs(a - b) <= 1e-12 for a, b in zip(losses, want, strict=True))
    assert_near(model.state_dict(), twin.state_dict())


@pytest.mark.sampled(4)
@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_its_loss_and_gradient(method: str, kind: str, parts: int) -> None:
    """At a learning rate of 0 every version of the weights is the same, and the momentum is the sum of the gradients."""
    model = adding(kind)
    twin = copy.deepcopy(model)
    row = dtrp.get_method(method)
    pipe = pipeline(model, row, lr=0.0, parts=parts)
    losses = [pipe.step(x, y) for x, y in batches()]
    pipe.flush()
    want, optimizer = plain(twin, batches(), pipe.rng, parts=parts, lr=0.0)
    assert all(abs(a - b) <= 1e-12 for a, b in zip(losses, want, strict=True))
    state = pipe.state_dict()["optimizer"]["state"]
    assert_near(
        {name: state[name]["momentum_buffer"] for name, _ in twin.named_parameters()},
        {name: optimizer.state[p]["momentum_buffer"] for name, p in twin.named_parameters()},
    )


@pytest.mark.sampled(4)
@pytest.mark.parametrize("keep", ["input", "graph"])
def test_whatever_is_kept(keep: str) -> None:
    losses = {}
    for options in ({}, {"keep": keep}):
        model = adding("latent")
        pipe = pipeline(model, "bp", lr=0.1, parts=4, **options)
        losses[str(options)] = [pipe.step(x, y).item() for x, y in batches()]
    first, second = losses.values()
    assert first == pytest.approx(second, rel=1e-10)


@pytest.mark.sampled(4)
@pytest.mark.parametrize("method", ["dtrp", "spectrain", "fdg", "dgl"])
def test_saved_in_flight(method: str, tmp_path: Path) -> None:
    data = batches(8)
    whole = pipeline(adding("latent"), method, lr=0.1, parts=2)
    want = [whole.step(x, y) for x, y in data]
    whole.flush()
    begun = pipeline(adding("latent"), method, lr=0.1, parts=2)
    got = [begun.step(x, y) for x, y in data[:4]]
    begun.save(tmp_path / "saved")
    taken = pipeline(adding("latent"), method, lr=0.1, parts=2)
    taken.load(tmp_path / "saved")
    got += [taken.step(x, y) for x, y in data[4:]]
    taken.flush()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    for name, value in whole.model_state_dict().items():
        assert torch.equal(taken.model_state_dict()[name], value), name


def test_a_stage_with_a_loss_to_itself_learns_from_its_terms() -> None:
    """By dgl the terms of a stage are in the loss of its auxiliary network, and of no other stage."""
    models = [adding("penalty") for _ in range(2)]
    for layer in models[1]:
        if isinstance(layer, Adds):
            layer.add = lambda value: None  # type: ignore[method-assign]
    before = copy.deepcopy(models[0].state_dict())
    for model in models:
        pipe = pipeline(model, "dgl", lr=0.1, parts=1)
        pipe.step(*batches(1)[0])
        pipe.flush()
    moved = {name for name in before if not torch.equal(*(model.state_dict()[name] for model in models))}
    assert moved == {name for name in before if name.split(".")[0] in ("0", "1", "3", "6", "7")} - {"2.weight"}


def test_outside_of_a_pipeline_it_does_nothing() -> None:
    model = adding("penalty").eval()
    x, _ = batches(1)[0]
    assert dtrp.add_loss(torch.zeros(())) is None
    pipe = pipeline(copy.deepcopy(model), "bp", lr=0.1, parts=1)
    assert torch.equal(pipe.infer(x), model(x))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.zeros(3), r"tensor of shape \(3,\), torch.float32; pass a scalar"),
        (torch.zeros((), dtype=torch.int64), "torch.int64; pass a scalar floating-point"),
        (0.5, "was given a float"),
    ],
)
def test_what_is_no_term(value: Any, message: str) -> None:
    class Wrong(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            dtrp.add_loss(value)
            return x

    pipe = dtrp.Pipeline(
        [nn.Linear(5, 5), Wrong()],
        lambda params: torch.optim.SGD(params, lr=0.1),
        cross_entropy,
        method="bp",
        num_microbatches=1,
    )
    with pytest.raises(dtrp.StageError, match=message):
        pipe.step(torch.randn(4, 5), torch.randint(5, (4,)))


def test_a_term_of_another_stage_is_refused() -> None:
    first = nn.Linear(5, 5)

    class Reaches(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            dtrp.add_loss(first.weight.norm())
            return x

    pipe = dtrp.Pipeline(
        [first, nn.Sequential(nn.Linear(5, 5), Reaches()), nn.Linear(5, 5)],
        lambda params: torch.optim.SGD(params, lr=0.1),
        cross_entropy,
        method="dtrp",
        num_microbatches=1,
    )
    with pytest.raises(dtrp.StageError, match=r"stage 1 reads 0.weight of stage 0"):
        pipe.step(torch.randn(4, 5), torch.randint(5, (4,)))


@pytest.mark.parametrize("method", ["bp", "dtrp"])
def test_a_term_that_is_not_finite_counts_as_such_a_loss(method: str) -> None:
    class Spoiled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            out = super().forward(x)
            dtrp.add_loss(out.mean() * torch.inf)
            return out

    pipe = dtrp.Pipeline(
        [Spoiled(5, 5), nn.Linear(5, 5)],
        lambda params: torch.optim.SGD(params, lr=0.1),
        cross_entropy,
        method=method,
        num_microbatches=1,
    )
    with pytest.raises(dtrp.StageError, match=r"loss of mini-batch 0 is (inf|-inf|nan)"):
        pipe.step(torch.randn(4, 5), torch.randint(5, (4,)))


class Checkpointed(Penalized):
    reentrant = False

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(super().forward, x, use_reentrant=self.reentrant)  # type: ignore[no-any-return]


class Reentrant(Checkpointed):
    reentrant = True


class Ends(Penalized):
    """Its term is all that it is trained by."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).detach()


class WithGradients(Penalized):
    """Adds its term only where gradients are on."""

    def forward(self, x: Tensor) -> Tensor:
        out = self.linear(x).tanh()
        if torch.is_grad_enabled():
            self.add(0.1 * out.square().mean())
        return out


def with_layer(layer: type[Adds]) -> nn.Sequential:
    """The layers at 1 and 3 are of another class."""
    model = adding("penalty")
    model[1].__class__ = model[3].__class__ = layer
    return model


@pytest.mark.sampled(6)
@pytest.mark.parametrize("options", [{}, {"keep": "graph"}, {"compile": {"backend": "aot_eager"}}])
@pytest.mark.parametrize("method", ["bp", "dtrp", "fdg"])
@pytest.mark.parametrize("layer", [Checkpointed, Ends])
def test_under_a_checkpoint_and_without_another_gradient(layer: type[Adds], method: str, options: Any) -> None:
    model = with_layer(layer)
    twin = with_layer(Penalized if layer is Checkpointed else layer)
    pipe = pipeline(model, method, lr=0.0, parts=2, **options)
    losses = [pipe.step(x, y) for x, y in batches()]
    pipe.flush()
    want, optimizer = plain(twin, batches(), pipe.rng, parts=2, lr=0.0)
    assert all(abs(a - b) <= 1e-12 for a, b in zip(losses, want, strict=True))
    got = pipe.state_dict()["optimizer"]["state"]
    for name, p in twin.named_parameters():
        momentum = optimizer.state[p].get("momentum_buffer") if p in optimizer.state else None
        assert (name in got) == (momentum is not None), name
        if momentum is not None:
            assert_near({name: got[name]["momentum_buffer"]}, {name: momentum})


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("options", [{}, {"compile": {"backend": "eager"}}])
@pytest.mark.parametrize("method", ["bp", "dtrp"])
def test_a_term_without_a_graph_is_refused(method: str, options: Any) -> None:
    pipe = pipeline(with_layer(Reentrant), method, lr=0.1, parts=2, **options)
    with pytest.raises(dtrp.StageError, match="the term would have no gradient: pass use_reentrant=False"):
        pipe.step(*batches(1)[0])


def test_a_repetition_must_add_the_same_terms() -> None:
    pipe = pipeline(with_layer(WithGradients), "dtrp", lr=0.1, parts=2)
    with pytest.raises(dtrp.StageError, match=r"gives another output, or other terms of add_loss"):
        for x, y in batches():
            pipe.step(x, y)


@pytest.mark.parametrize("frozen", [[0, 1], [3, 4], [6, 7], [0, 1, 2, 3, 4]])
@pytest.mark.parametrize("method", ["bp", "dtrp", "fdg"])
def test_terms_of_frozen_layers(method: str, frozen: list[int]) -> None:
    model = adding("penalty")
    for layer in frozen:
        model[layer].requires_grad_(False)
    twin = copy.deepcopy(model)
    pipe = pipeline(model, method, lr=0.0, parts=2)
    losses = [pipe.step(x, y) for x, y in batches()]
    pipe.flush()
    want, optimizer = plain(twin, batches(), pipe.rng, parts=2, lr=0.0)
    assert all(abs(a - b) <= 1e-12 for a, b in zip(losses, want, strict=True))
    got = pipe.state_dict()["optimizer"]["state"]
    trained = {name: p for name, p in twin.named_parameters() if p.requires_grad}
    assert_near(
        {name: got[name]["momentum_buffer"] for name in trained},
        {name: optimizer.state[p]["momentum_buffer"] for name, p in trained.items()},
    )


@pytest.mark.parametrize("method", ["bp", "dtrp", "fdg"])
def test_terms_in_half_precision_are_not_rounded_again(method: str) -> None:
    """The loss is the sum of the rounded terms, and no rounded sum."""
    model = adding("penalty").float()
    terms: list[Tensor] = []

    def add(value: Tensor) -> None:
        terms.append(value.detach())
        dtrp.add_loss(value)

    for layer in model:
        if isinstance(layer, Adds):
            layer.add = add  # type: ignore[method-assign]
    pipe = dtrp.Pipeline(
        model, lambda params: torch.optim.SGD(params, lr=0.1), lambda out, y: out.float().sum() * 0, cuts=CUTS,
        method=method, keep="graph", num_microbatches=1,
    )  # fmt: skip
    for x, y in batches(2):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = pipe.step(x.float(), y)
        assert all(term.dtype == torch.bfloat16 for term in terms)
        assert loss.item() == pytest.approx(sum(term.double().item() for term in terms), rel=1e-6)
        terms.clear()


def test_a_term_that_comes_to_depend_on_another_stage_is_refused() -> None:
    model = adding("penalty")

    class Reaches(Adds):
        reaches = False

        def forward(self, x: Tensor) -> Tensor:
            if Reaches.reaches:
                self.add(model[0].weight.square().sum())
            return self.linear(x)

    model[3].__class__ = Reaches
    pipe = pipeline(model, "bp", lr=0.1, parts=2)
    pipe.step(*batches(1)[0])
    Reaches.reaches = True
    with pytest.raises(dtrp.StageError, match=r"stage 1 reads 0\.weight of stage 0, and no gradient goes there"):
        pipe.step(*batches(1)[0])
