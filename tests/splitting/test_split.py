"""`dtrp.split`: models of any forward, by hand and traced, against the models themselves."""

from __future__ import annotations

import copy
import random
import warnings
from collections import OrderedDict, UserDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_same, with_aux
from split_models import MODELS, Residual, Siamese, UNet, images, rows
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from unsplit import (
    SEED,
    assert_trained_alike,
    call,
    chain,
    check_outputs,
    check_pipeline,
    copied_from_the_first,
    logits,
    loss_fn,
    minibatches,
    sgd,
    train_chain,
    train_plain,
)

import dtrp
from dtrp.tensors.parameter_swap import Places

CASES = [(kind, how) for kind in MODELS for how in (2, 4, "points")]


@copied_from_the_first
def make(kind: str, how: int | str) -> tuple[nn.Module, Any, dtrp.Stages]:
    """The model, what it is called with, and its stages."""
    build, data, points = MODELS[kind]
    model, x = build(), data()
    stages = dtrp.split(model, example=x, **({"points": points} if how == "points" else {"num_stages": how}))
    assert len(stages) == (4 if how == "points" else how)
    return model, x, stages


@pytest.mark.sampled(6)
@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(("kind", "how"), CASES)
def test_stages_are_the_model(kind: str, how: int | str) -> None:
    model, x, stages = make(kind, how)
    if how == "points":
        assert stages.points == tuple(MODELS[kind][2])
    check_outputs(model, stages, x)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("kind", [kind for kind in MODELS if kind != "siamese"])
def test_they_train_as_the_model(kind: str) -> None:
    """Without an engine; the Siamese network's points are not where its draws change."""
    how, num_microbatches = "points", 3
    model, x, stages = make(kind, how)
    plain = copy.deepcopy(model)
    batches = minibatches(x, logits(call(plain.eval(), x)).shape[1])
    want = train_plain(plain.train(), stages.points, batches, num_microbatches)
    assert_trained_alike(model, plain, train_chain(stages, batches, num_microbatches), want)


@pytest.mark.sampled(5)
@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(("how", "num_microbatches"), [(2, 3), (4, 1), pytest.param(4, 3, marks=pytest.mark.full)])
@pytest.mark.parametrize("kind", MODELS)
def test_a_pipeline_of_them_trains_as_the_model(kind: str, how: int, num_microbatches: int) -> None:
    check_pipeline(*make(kind, how), num_microbatches)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("method", dtrp.list_methods())
def test_every_method_reaches_the_weights_inside(method: str) -> None:
    """As the same blocks in a Sequential: traced stages read predicted and stashed weights where modules would."""
    results = []
    for traced in (True, False):
        torch.manual_seed(3)
        model = nn.Sequential(*(nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(3)), nn.Linear(6, 3))
        parts = dtrp.split(model, points=["1", "2", "3"], example=rows())
        if traced:
            from dtrp.splitting.traced_stage import trace_into_stages

            parts = dtrp.Stages(*trace_into_stages(model, rows(), points=["1", "2", "3"])[:2])
        pipe = dtrp.Pipeline(parts, sgd, loss_fn, method=method, num_microbatches=2, seed=SEED, **with_aux(method))
        torch.manual_seed(4)
        losses = [pipe.step(rows(), torch.randint(3, (5,))) for _ in range(8)]
        pipe.flush()
        results.append((torch.stack(losses), pipe.model_state_dict()))
    assert torch.equal(results[0][0], results[1][0])
    assert_same(results[0][1], results[1][1])


# -- what a stage is --------------------------------------------------------------------------------------


@pytest.mark.usefixtures("float64")
def test_skips_travel_and_sizes_do_not() -> None:
    stages = dtrp.split(UNet(), points=["enc2", "mid", "dec2"], example=images())
    first = stages[0](images())
    assert isinstance(first, tuple)
    assert [t.shape[2] for t in sorted(first, key=lambda t: t.shape[2])] == [4, 8], "pooled, and the skip"
    assert isinstance(dtrp.split(Residual(), num_stages=2, example=rows())[0](rows()), Tensor)


def test_the_slowest_stage_is_as_fast_as_it_can_be() -> None:
    class Uneven(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(
                nn.Linear(n, m) for n, m in ((8, 256), (256, 256), (256, 256), (256, 8), (8, 8), (8, 8))
            )

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x)
            return x

    assert dtrp.split(Uneven(), num_stages=2, example=torch.randn(2, 8)).points == ("blocks.2",)

    class Even(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.Linear(64, 64) for _ in range(8))

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = x + torch.tanh(block(x))
            return x

    assert dtrp.split(Even(), num_stages=4, example=torch.randn(2, 64)).points == ("blocks.2", "blocks.4", "blocks.6")


@pytest.mark.usefixtures("float64")
def test_a_copy_is_a_stage_of_its_own() -> None:
    model, x, stages = make("dropout", 2)
    copied = copy.deepcopy(stages)
    with torch.no_grad():
        for stage in copied:
            for p in stage.parameters():
                p.zero_()
    for stage in (*stages, *copied):
        stage.eval()
    assert torch.equal(chain(stages, x), model.eval()(x))
    assert not chain(copied, x).any()


@pytest.mark.usefixtures("float64")
def test_weights_in_its_places_are_read() -> None:
    _, x, stages = make("dropout", 2)
    zeros = {name: torch.zeros_like(p) for name, p in stages[1].named_parameters()}
    hidden = stages[0](x)
    assert not torch.func.functional_call(stages[1], zeros, (hidden,)).any()
    with Places(stages[1]).hold(zeros):
        assert not stages[1](hidden).any()
    assert stages[1](hidden).any()


def test_it_moves_to_another_device_with_what_it_makes_there() -> None:
    class Places(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 3)
            self.register_buffer("scale", torch.ones(6))

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x) * self.scale + torch.arange(6, device=x.device))

    model = Places()
    stages = dtrp.split(model, points=["b"], example=rows())
    stages[0].to("meta")
    assert stages[0](rows().to("meta")).device.type == "meta"
    assert model.scale.device.type == "meta", "the model's buffer stays the stage's"
    stages[1](torch.randn(2, 6))


def test_a_model_in_eval_mode_and_frozen_parts_of_one_in_train_mode() -> None:
    model = UNet()
    model.enc1.eval()
    modes = {name: module.training for name, module in model.named_modules()}
    stages = dtrp.split(model, num_stages=2, example=images())
    assert {name: module.training for name, module in model.named_modules()} == modes
    before = model.enc1[1].running_mean.clone()
    chain(stages, images())
    assert torch.equal(model.enc1[1].running_mean, before), "a BatchNorm in eval mode stays in it"
    assert model.enc2[1].num_batches_tracked == 1
    assert not any(stage.training for stage in dtrp.split(model.eval(), num_stages=2, example=images()))


def test_the_models_mode_is_the_stages() -> None:
    """A model that comes in eval mode, as from a hub, and is put into train mode in the loop."""
    model = Residual().eval()
    stages = dtrp.split(model, num_stages=2, example=rows())
    pipe = dtrp.Pipeline(stages, sgd, F.cross_entropy, method="bp", num_microbatches=1)
    y = torch.zeros(5, dtype=torch.int64)
    seen = []
    for mode in (None, True, None, False, True):
        if mode is not None:
            model.train(mode)
        pipe.infer(rows())
        pipe.step(rows(), y)
        seen.append([stage.training for stage in pipe.stages])
    assert seen == [[False] * 2, [True] * 2, [True] * 2, [False] * 2, [True] * 2]
    for stage in stages:
        stage.eval()
    pipe.step(rows(), y)
    assert not any(stage.training for stage in stages), "by hand, the model's mode being as it was"
    assert list(stages[0].children()), "the model is no part of it"
    assert all(module is not model for stage in stages for module in stage.modules())


class Shifted(nn.Module):
    """Reads a tensor and a number that are one for all samples."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.g, self.h = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        out: Tensor = self.h(torch.tanh(self.g(torch.tanh(self.f(x)) * shift)) * scale + shift)
        return out


@pytest.mark.usefixtures("float64")
def test_a_tensor_of_one_sample_is_for_all() -> None:
    model, shared = Shifted(), (torch.randn(1, 6), torch.tensor(0.5))
    stages = dtrp.split(model, points=["g", "h"], example=(rows(), *shared))
    for num in (1, 2, 7):
        x = (rows(num), *shared)
        assert torch.equal(chain(stages, x), model(*x))
    pipe = dtrp.Pipeline(stages, sgd, loss_fn, method="dtrp", num_microbatches=2)
    for num in (4, 1, 5):
        pipe.step((rows(num), *shared), torch.randint(3, (num,)))
    pipe.flush()
    with pytest.raises(ValueError, match=r"x\[1\] has shape \(5, 6\), and the model was traced with \(1, 6\)"):
        stages[0]((rows(), rows(), shared[1]))
    with pytest.raises(
        ValueError, match=r"example\[0\] has 5 samples and example\[1\] has 2; .* or one for all of them"
    ):
        dtrp.split(model, num_stages=2, example=(rows(), rows(2), shared[1]))


def test_tracing_touches_nothing() -> None:
    model, x = UNet(), images()
    state, drawn = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    dtrp.split(model, num_stages=2, example=x)
    assert_same(model.state_dict(), state)
    assert torch.equal(torch.get_rng_state(), drawn)
    assert torch.autograd.Function.apply.__name__ == "apply"
    assert "__getattribute__" not in vars(type(torch.autograd.Function))


def test_autocast_reaches_its_operations() -> None:
    model, x, stages = make("dropout", 2)
    with torch.autocast("cpu", torch.bfloat16):
        for stage in stages:
            stage.eval()
        out = chain(stages, x)
        assert out.dtype == torch.bfloat16
        assert torch.equal(out, model.eval()(x))


# -- regions, casts and buffers ----------------------------------------------------------------------------


class Inner(nn.Module):
    """What is tried, with a layer and a buffer."""

    def __init__(self, forward: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.norm = nn.Linear(6, 6), nn.BatchNorm1d(6)
        self.register_buffer("seen", torch.zeros(6))
        self.count, self.state = 0, None
        self.what = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.what(self, x)


class Around(nn.Module):
    """It, between two layers."""

    def __init__(self, forward: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.inner, self.last = nn.Linear(6, 6), Inner(forward), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.inner(self.first(x))))


def nested(self: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        a = self.layer(x)
        with torch.autocast("cpu", enabled=False):
            b = self.layer(x) + a
            with torch.enable_grad():
                c = self.layer(x)
            d = self.layer(b)
        e = self.layer(d)
    return a + b + c + d + e


def several_outputs(self: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        a = self.layer(x)
        b, c = (a * 2).chunk(2, 1)
    return self.layer(x) * a + torch.cat([c, b], 1)


def inference(self: Any, x: Tensor) -> Tensor:
    with torch.inference_mode():
        a = self.layer(x)
        with torch.inference_mode(mode=False):
            b = self.layer(x)
    return a + b


def switched(self: Any, x: Tensor) -> Tensor:
    torch.set_grad_enabled(False)
    a = self.layer(x)
    torch.set_grad_enabled(True)
    return self.layer(x) + a


@torch.no_grad()
def decorated(self: Any, x: Tensor) -> Tensor:
    return self.norm(self.layer(x))


def lowered(self: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        a = self.layer(x)
        b = self.layer(x + 1).float()
    return self.layer(x) * a + b


def nothing_but_a_buffer(self: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        self.seen.mul_(0.9).add_(x.mean(0))
    return self.layer(x)


def assigned(self: Any, x: Tensor) -> Tensor:
    old = self.seen
    self.seen = 0.9 * self.seen + x.mean(0).detach()
    y = self.layer(x) * self.seen
    self.seen = self.seen * 2
    return y + old


def other_constants(self: Any, x: Tensor) -> Tensor:
    return self.layer(x) * (torch.tensor([1.0, 2.0] * 3) if self.training else torch.tensor([3.0, 4.0] * 3))


@pytest.mark.sampled(3)
@pytest.mark.parametrize("point", ["inner.layer", "last"])
@pytest.mark.parametrize(
    "forward",
    [nested, several_outputs, inference, switched, decorated, lowered, nothing_but_a_buffer, assigned, other_constants],
)
def test_regions_buffers_and_constants_are_the_models(forward: Callable[[Any, Tensor], Tensor], point: str) -> None:
    """Outputs, gradients (None where there is none), and buffers, to the bit, cut inside and behind."""
    model = Around(forward)
    plain = copy.deepcopy(model)
    stages = dtrp.split(model, points=[point], example=rows())
    for training in (True, False, True):
        model.train(training)
        plain.train(training)
        for stage in stages:
            stage.train(training)
        x = rows()
        got, want = chain(stages, x), plain(x)
        assert torch.equal(got, want)
        for a, b in zip(
            torch.autograd.grad(got.square().sum(), list(model.parameters()), allow_unused=True),
            torch.autograd.grad(want.square().sum(), list(plain.parameters()), allow_unused=True),
            strict=True,
        ):
            assert (a is None and b is None) or torch.equal(a, b)
        assert_same(model.state_dict(), plain.state_dict())


def in_float(self: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        c = torch.cos(x.float())
        d = x.to(torch.float32).mul_(0.5)
        e = x * 3
    return self.layer(c + d) + e


def like_others(self: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        wide = x.double().exp().to(self.layer.weight)
        narrow = wide.type_as(x)
        half = x.half().type(torch.float32) + x.bfloat16()
    return self.layer(narrow) * wide + half


def without_a_region(self: Any, x: Tensor) -> Tensor:
    c = x.float()
    return self.layer(c * 3 + 1) * c + x * x


@pytest.mark.parametrize("method", ["bp", "dtrp"])
@pytest.mark.parametrize("forward", [in_float, like_others, without_a_region])
def test_casts_are_the_models_under_autocast(forward: Callable[[Any, Tensor], Tensor], method: str) -> None:
    """To the bit, though the trace has none of it; each stage's gradients at weights that do not move."""
    model = Around(forward)
    plain = copy.deepcopy(model)
    stages = dtrp.split(model, points=["inner.layer" if forward is in_float else "last"], example=rows())
    seen: list[dict[str, Tensor]] = []

    def still(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        optimizer = torch.optim.SGD(parameters, lr=0.0)
        optimizer.register_step_pre_hook(
            lambda *_: seen.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        )
        return optimizer

    x, y = rows(), torch.randint(3, (5,))
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        F.cross_entropy(plain(x), y).backward()
        pipe = dtrp.Pipeline(stages, still, F.cross_entropy, method=method, num_microbatches=1)
        for _ in range(3):
            pipe.step(x, y)
        pipe.flush()
        assert torch.equal(pipe.infer(x), plain.eval()(x))
    got = {name: gradient for gradients in seen for name, gradient in gradients.items()}
    want = {name: p.grad for name, p in plain.named_parameters() if p.grad is not None}
    assert_same(got, want)


def norm_in_single_precision(self: Any, x: Tensor) -> Tensor:
    h = x.float()
    h = (h * torch.rsqrt(h.square().mean(1, keepdim=True) + 1e-6)).to(x.dtype)
    return self.layer(h * self.norm.weight)


def branch(self: Any, x: Tensor) -> Tensor:
    return self.layer(x * 2 if x.dtype == torch.bfloat16 else x)


def asks_for_autocast(self: Any, x: Tensor) -> Tensor:
    return self.layer(x) * (2 if torch.is_autocast_enabled("cpu") else 1)


def unmoved(self: Any, x: Tensor) -> Tensor:
    return self.layer(x + torch.zeros(6, dtype=self.seen.dtype))


@pytest.mark.sampled(2)
@pytest.mark.parametrize("forward", [norm_in_single_precision, branch, asks_for_autocast, unmoved])
def test_dtypes_that_the_forward_asks_for(forward: Callable[[Any, Tensor], Tensor]) -> None:
    """They are those of the autocast settings of the split; where others make a difference, steps in them are refused."""
    x, y = rows(), torch.randint(3, (5,))
    for split_in in (False, True):
        for step_in in (False, True):
            model = Around(forward)
            plain = copy.deepcopy(model)
            with torch.autocast("cpu", torch.bfloat16, enabled=split_in):
                stages = dtrp.split(model, num_stages=2, example=x)
            pipe = dtrp.Pipeline(stages, sgd, F.cross_entropy, method="bp", num_microbatches=1)
            with torch.autocast("cpu", torch.bfloat16, enabled=step_in, cache_enabled=False):
                if split_in == step_in or forward is unmoved:
                    assert torch.equal(pipe.step(x, y), F.cross_entropy(plain(x), y).detach())
                    continue
                words = ("in autocast to torch.bfloat16", "without autocast")
                with pytest.raises(
                    dtrp.StageError,
                    match=f"stage 0 .* runs {words[split_in]}, and the model was traced {words[step_in]}: its forward asks for "
                    "dtypes, .* call dtrp.split, step and infer in the same torch.autocast",
                ):
                    pipe.step(x, y)


def test_stages_of_stages_are_traced_in_the_same_autocast() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        stages = dtrp.split(Around(branch), points=["inner", "last"], example=rows())
    with torch.autocast("cpu", torch.bfloat16):
        assert chain(stages.cut([1]), rows()).dtype == torch.bfloat16


def test_autocast_regions_move_with_their_stage() -> None:
    stages = dtrp.split(Around(in_float), points=["last"], example=rows())
    stages[0].to("meta")
    regions = [
        node.args[1]
        for part in stages[0]._parts
        for node in part.graph.graph.nodes
        if node.op == "call_function" and node.target.__name__ == "run_within"
    ]
    assert regions == [(("meta", torch.bfloat16, False),)] * 2


def test_a_buffer_that_takes_another_shape() -> None:
    def grow(self: Any, x: Tensor) -> Tensor:
        self.seen = torch.cat([self.seen, self.seen])
        return self.layer(x)

    with pytest.raises(ValueError, match=r"in inner .* buffer 'seen' of a Inner takes another shape in the forward"):
        dtrp.split(Around(grow), num_stages=2, example=rows())


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpoints_are_run_through(use_reentrant: bool) -> None:
    def saving(self: Any, x: Tensor) -> Tensor:
        return checkpoint(lambda t: torch.tanh(self.layer(t)), x, use_reentrant=use_reentrant)

    model, x = Around(saving), rows()
    stages = dtrp.split(model, points=["inner"], example=x)
    gradients = []
    for out in (chain(stages, x), model(x)):
        model.zero_grad()
        out.square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)
    assert sum(gradient is not None for gradient in gradients[0]) == 6


def test_hooks_on_tensors_are_refused() -> None:
    def reverses(self: Any, x: Tensor) -> Tensor:
        h: Tensor = self.layer(x)
        h.register_hook(lambda gradient: -gradient)
        return h

    with pytest.raises(
        ValueError, match=r"cannot be traced in inner .*a hook on a tensor \(register_hook\), which a trace does"
    ):
        dtrp.split(Around(reverses), points=["last"], example=rows())


# -- against the model --------------------------------------------------------------------------------------


def counts(self: Any, x: Tensor) -> Tensor:
    self.count += 1
    return self.layer(x) * self.count


def keeps_state(self: Any, x: Tensor) -> Tensor:
    y = self.layer(x) if self.state is None else self.layer(x) + self.state
    self.state = y.detach()
    return y


def counts_in_train_mode(self: Any, x: Tensor) -> Tensor:
    return counts(self, x) if self.training else self.layer(x)


def draws_in_python(self: Any, x: Tensor) -> Tensor:
    return self.layer(x) * random.random()


@pytest.mark.parametrize(
    ("forward", "mode"),
    [(counts, "eval"), (keeps_state, "eval"), (counts_in_train_mode, "train"), (draws_in_python, "eval")],
)
def test_what_a_trace_would_fix_is_refused(forward: Callable[[Any, Tensor], Tensor], mode: str) -> None:
    with pytest.raises(
        ValueError,
        match=f"the stages do not do what the model does: on the example, in {mode} mode, output differs by .* of its norm",
    ):
        dtrp.split(Around(forward), num_stages=2, example=rows())


def fills_a_cache(self: Any, x: Tensor) -> Tensor:
    self.count += 1
    if self.state is None:
        self.state = torch.ones(6)
    return self.norm(self.layer(x) * self.state)


def writes_all(self: Any, x: Tensor) -> Tensor:
    x.relu_()
    self.seen.add_(1)
    return self.norm(self.layer(x)) + torch.rand(()) * 0


@pytest.mark.parametrize("forward", [fills_a_cache, writes_all])
def test_the_comparison_leaves_everything_as_it_was(forward: Callable[[Any, Tensor], Tensor]) -> None:
    model, x = Around(forward), rows()
    model.first = nn.Embedding(9, 6, max_norm=0.1)
    ids = torch.randint(9, (5,))
    model.inner.norm.eval()
    before = copy.deepcopy(model.state_dict())
    tensors = {name: (t, t._version) for name, t in model.state_dict(keep_vars=True).items()}
    attributes = [dict(module.__dict__) for module in model.modules()]
    drawn = torch.get_rng_state()
    warnings.filterwarnings("ignore", message="the forward stores inner.count, and")  # for the time of a test
    dtrp.split(model, points=["last"], example=ids)
    assert_same(model.state_dict(), before)
    for name, tensor in model.state_dict(keep_vars=True).items():
        assert tensor is tensors[name][0]
        assert tensor._version == tensors[name][1]
    assert [dict(module.__dict__) for module in model.modules()] == attributes
    assert torch.equal(torch.get_rng_state(), drawn)
    dtrp.split(Around(forward), points=["last"], example=(given := x.clone()))
    assert torch.equal(given, x)


def many(self: Any, x: Tensor) -> Any:
    h = self.layer(x)
    return {
        "whole": (h.argmax(1), h > 0, None, "text", 3),
        "nan": torch.where(h > 0, float("nan"), h / 0),
        "small": [h.half(), h.clamp(-1, 1).to(torch.float8_e4m3fn), h[:, :0]],
        "complex": torch.complex(h.float(), h.float()),
    }


class Only(nn.Module):
    def __init__(self, forward: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.first, self.inner = nn.Linear(6, 6), Inner(forward)

    def forward(self, x: Tensor) -> Any:
        return self.inner(self.first(x))


@pytest.mark.sampled(3)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_outputs_of_all_kinds_are_compared(dtype: torch.dtype) -> None:
    stages = dtrp.split(Only(many).to(dtype), points=["inner"], example=rows().to(dtype))
    assert chain(stages, rows().to(dtype))["whole"][4] == 3
    for lost in ("whole", "nan", "small", "complex"):  # one kind depends on what the trace fixes
        with pytest.raises(ValueError, match=rf"output\['{lost}'\].* (differs|is)"):
            dtrp.split(
                Only(
                    lambda self, x, lost=lost: {**many(self, x), lost: many(self, x.flip(1) * counts(self, x))[lost]}
                ).to(dtype),
                points=["inner"],
                example=rows().to(dtype),
            )


def test_what_cannot_be_run_is_not_compared() -> None:
    class Ids(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Embedding(4, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.first(x))

    dtrp.split(Ids(), points=["last"], example=torch.full((5,), 99))
    dtrp.split(Ids(), points=["last"], example=torch.zeros(5, 0, dtype=torch.int64))
    dtrp.split(Around(branch).to("meta"), points=["last"], example=rows().to("meta"))


# -- hooks --------------------------------------------------------------------------------------------------


def test_hooks_registered_after_the_split_are_warned_of() -> None:
    model = Around(several_outputs)
    stages = dtrp.split(model, points=["last"], example=rows())
    pipe = dtrp.Pipeline(stages, sgd, F.cross_entropy, num_microbatches=1)
    x, y = rows(), torch.randint(3, (5,))
    stages[0].register_forward_hook(lambda *_: None)
    model.last.weight.register_hook(lambda g: g)
    pipe.step(x, y)
    for where, register in (
        ("'inner.norm'", model.inner.norm.register_forward_hook),
        ("'first'", model.first.register_forward_pre_hook),
        ("the model itself", model.register_full_backward_hook),
        ("'last'", stages[1].last.register_full_backward_pre_hook),
    ):
        register(lambda *_: None)
        with pytest.warns(
            UserWarning, match=f"hooks were registered after dtrp.split, on {where}: they are not run"
        ) as caught:
            pipe.step(x, y)
        assert len(caught) == 1, "not by each stage"
        pipe.step(x, y)


def test_backward_hooks_are_refused_and_those_of_norms_are_run() -> None:
    for register in ("register_full_backward_hook", "register_full_backward_pre_hook"):
        model = Around(several_outputs)
        getattr(model.inner, register)(lambda *_: None)
        with pytest.raises(
            ValueError, match="module 'inner' has a backward hook, which a trace does not keep; remove it"
        ):
            dtrp.split(model, points=["last"], example=rows())
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        model = Around(several_outputs)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            model.first = nn.utils.weight_norm(model.first)
        model.inner.layer = nn.utils.spectral_norm(model.inner.layer)
        model.last = nn.utils.parametrizations.spectral_norm(model.last)
        models.append(model)
    model, plain = models
    stages = dtrp.split(model, points=["last"], example=rows())
    for _ in range(2):
        x = rows()
        assert torch.equal(chain(stages, x), plain(x))


# -- by hand ------------------------------------------------------------------------------------------------


def test_a_sequential_is_cut_between_its_layers() -> None:
    model = nn.Sequential(*(nn.Linear(6, 6) for _ in range(5)))
    for options in ({"num_stages": 2}, {"cuts": [3]}, {"points": ["3"]}):
        stages = dtrp.split(model, **options)
        assert [list(stage._modules) for stage in stages] == [["0", "1", "2"], ["3", "4"]]
        assert stages[1][0] is model[3]
        assert stages.points == ("3",)
        assert all(type(stage) is nn.Sequential for stage in stages)
    pipe = dtrp.Pipeline(dtrp.split(model, cuts=[1, 2]), sgd, F.mse_loss, num_microbatches=1)
    assert pipe.num_stages == 3
    pipe.step(rows(), rows())
    pipe.flush()
    assert set(pipe.model_state_dict()) == set(model.state_dict())


def test_points_of_a_sequential() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3))
    for points, message in (
        (["0"], "points=.*'0' is where the model itself begins, and stage 0 would be empty"),
        (["2", "1"], "points=.*'1' begins before '2'; put them in the order of the forward"),
        (["1", "1"], "points=.*'1' begins with '1'; name one of the two"),
        (["3"], "unknown submodule in points: '3'; known: 0, 1, 2"),
    ):
        with pytest.raises(ValueError, match=message):
            dtrp.split(model, points=points)


def test_a_list_is_one_module_a_stage() -> None:
    modules = [nn.Linear(6, 6), nn.Sequential(nn.Tanh(), nn.Linear(6, 3))]
    stages = dtrp.split(modules, example=rows())
    assert len(stages) == 2
    assert [name for stage in stages for name, _ in stage.named_parameters()] == [
        name for name, _ in nn.Sequential(*modules).named_parameters()
    ]


class Joins(nn.Module):
    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        return x + skip


def test_a_skip_over_a_stage_is_named() -> None:
    with pytest.raises(
        ValueError,
        match=r"stage 2 \(Joins\) takes 2 values \(x, skip\) but stage 1 gives 1, without skip. A value cannot skip a stage: .* "
        "passes through those in between, which take it and return it along",
    ):
        dtrp.split([nn.Linear(6, 6), nn.Linear(6, 6), Joins()], example=rows())
    with pytest.raises(
        ValueError, match=r"stage 1 \(Linear\) does not take what stage 0 returns, a tensor of shape \(5, 7\)"
    ):
        dtrp.split([nn.Linear(6, 7), nn.Linear(6, 6)], example=rows())


class Start(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Linear(6, 6)

    def forward(self, x: Tensor, mask: Tensor) -> dict[str, Tensor]:
        return {"skip": x, "x": torch.tanh(self.f(x)) * mask}


class Middle(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Linear(6, 6)

    def forward(self, x: Tensor, skip: Tensor, scale: float = 0.5) -> tuple[Tensor, Tensor]:
        return torch.tanh(self.f(x)) * scale, skip


class Whole(nn.Module):
    """What the list of the three is."""

    def __init__(self, start: nn.Module, middle: nn.Module, joins: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.start, self.middle, self.joins, self.head = start, middle, joins, head

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.head(self.joins(*self.middle(**self.start(x, mask))))


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("method", ["bp", "dtrp"])
@pytest.mark.parametrize("given", ["list", "sequential", "split"])
def test_modules_of_several_arguments_are_given_the_entries(given: str, method: str) -> None:
    """A tuple one by one, a dict by keyword, in `step` and between stages; one argument is one value, a tuple too."""
    modules = [Start(), Middle(), Joins(), nn.Linear(6, 3)]
    whole = Whole(*copy.deepcopy(modules))
    traced = dtrp.split(copy.deepcopy(whole), points=["middle", "head"], example=(rows(), rows()))
    stages: Any = {
        "list": modules,
        "sequential": nn.Sequential(*modules),
        "split": dtrp.split(modules, example=(rows(), rows())),
    }[given]
    options: dict[str, Any] = {"method": method, "num_microbatches": 2, "seed": SEED}
    pipe = dtrp.Pipeline(stages, sgd, loss_fn, num_stages=4 if given == "sequential" else None, **options)
    other = dtrp.Pipeline(traced if method == "bp" else copy.deepcopy(modules), sgd, loss_fn, **options)
    for i in range(6):
        x, mask, y = rows(), (rows() > 0).double(), torch.randint(3, (5,))
        loss = pipe.step({"mask": mask, "x": x} if i % 2 else (x, mask), y)
        torch.testing.assert_close(loss, other.step((x, mask), y), rtol=1e-12, atol=0)
    pipe.flush()
    x = (rows(), rows())
    torch.testing.assert_close(pipe.infer(x), modules[3](modules[2](*modules[1](**modules[0](*x)))), rtol=1e-12, atol=0)


def test_too_few_values_are_named_by_the_engine_too() -> None:
    pipe = dtrp.Pipeline([nn.Linear(6, 6), Joins(), nn.Linear(6, 3)], sgd, loss_fn, num_microbatches=1)
    with pytest.raises(
        dtrp.StageError,
        match=r"stage 1, forward .*layer 1 \(Joins\) takes 2 values \(x, skip\) but what comes before it gives 1",
    ):
        pipe.step(rows(), torch.randint(3, (5,)))
    with pytest.raises(
        ValueError, match=r"stage 0 \(Start\) takes 2 values \(x, mask\) but the example gives 1, without mask"
    ):
        dtrp.split([Start(), Middle()], example={"x": rows()})


# -- errors ---------------------------------------------------------------------------------------------------


class DependsOnData(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return x * 2
        return x


class FixedSize(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x).view(5, 2, 3)


class Wrapped(nn.Module):
    def __init__(self, *inner: nn.Module) -> None:
        super().__init__()
        self.first, self.inner = nn.Linear(6, 6), nn.Sequential(*inner)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.first(x))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Wrapped(nn.Tanh(), DependsOnData()),
         r"cannot be traced in inner.1 \(test_split.py, line \d+: if x.sum\(\) > 0:\): Could not guard on data-dependent.*"
         "divide it by hand: pass a list of modules, one a stage"),
        (Wrapped(FixedSize()), r"any number of samples: its forward works with that of the example alone .*batch"),
    ],
)  # fmt: skip
def test_a_model_that_cannot_be_traced_is_told_where(
    model: nn.Module, message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ValueError, match=message):
        dtrp.split(model, num_stages=2, example=rows())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"points": ["blocks.9"]}, "unknown submodule in points: 'blocks.9'; did you mean 'blocks."),
        ({"points": ["blcks.1"]}, "unknown submodule in points: 'blcks.1'; did you mean 'blocks.1'"),
        (
            {"points": ["blocks.3", "blocks.1"]},
            "'blocks.1' begins before 'blocks.3'; put them in the order of the forward",
        ),
        ({"points": ["first"]}, "'first' is where the model itself begins, and stage 0 would be empty"),
        ({"points": ["blocks.1", "blocks.1"]}, "'blocks.1' begins with 'blocks.1'; name one of the two"),
        ({"points": "blocks.1"}, r"points='blocks.1' is one name; pass a list of names, \['blocks.1'\]"),
        ({"points": [nn.Linear(6, 6)]}, "points holds a Linear; pass the names of submodules"),
        ({"points": 1}, "points holds a int; pass the names of submodules"),
        ({"num_stages": 2, "example": (rows(), {1, 2})}, r"example\[1\] is a set; between stages go tensors"),
        ({"num_stages": 40}, r"num_stages=40 but this model can begin a stage at \d+ places only"),
        ({"num_stages": 0}, "num_stages=0: pass a whole number of at least 1"),
        ({"cuts": [1]}, r"cuts=\[1\] number the layers of an nn.Sequential, and the model is a Residual; pass points="),
        ({"num_stages": 2, "points": ["blocks.1"]}, "num_stages and points given; say in one way where stages begin"),
        ({}, "neither num_stages, cuts nor points given"),
        ({"num_stages": 2, "example": None}, "the model is a Residual, which is traced to be cut; pass example="),
        ({"num_stages": 2, "example": torch.randn(1, 6)}, "example has 1 sample; .* pass at least 2 samples"),
    ],
)
def test_what_does_not_fit_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        dtrp.split(Residual(), **{"example": rows(), **options})


def test_inputs_that_are_not_like_the_example() -> None:
    stages = dtrp.split(Siamese(), num_stages=2, example=(rows(), rows()))
    with pytest.raises(
        ValueError, match=r"stage 0 .* takes a tuple of 2, as the example of dtrp.split, and got a Tensor"
    ):
        stages[0](rows())
    with pytest.raises(ValueError, match=r"x\[1\] has shape \(5, 7\), and the model was traced with \(5, 6\)"):
        stages[0]((rows(), torch.randn(5, 7)))
    with pytest.raises(TypeError, match=r"x\[0\] is torch.float64, and the model was traced with torch.float32"):
        stages[0]((rows().double(), rows().double()))
    model = Residual()
    stages = dtrp.split(model, num_stages=2, example=rows())
    model.double()
    with pytest.raises(
        TypeError, match="was traced in torch.float32, and its .* is torch.float64 now; convert the model first"
    ):
        stages[1](torch.randn(5, 8))
    with pytest.raises(ValueError, match=r"example\[0\] has 5 samples and example\[1\] has 4"):
        dtrp.split(Siamese(), num_stages=2, example=(rows(), rows(4)))
    with pytest.raises(
        ValueError, match="num_stages=3 with 2 stages that dtrp.split has made; leave it out, or split again"
    ):
        dtrp.Pipeline(stages, sgd, F.cross_entropy, num_stages=3, num_microbatches=1)


def test_a_torch_that_cannot_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.6.0+cu124")
    with pytest.raises(ValueError, match=r"does not trace models on torch 2\.6\.0.*install a newer torch"):
        dtrp.split(Residual(), num_stages=2, example=rows())
    assert len(dtrp.split(nn.Sequential(nn.Linear(6, 6), nn.Tanh()), num_stages=2)) == 2


def test_an_example_of_mappings_is_a_dict() -> None:
    """As a tokenizer's output, or a dict in a dict of another kind: what the engine makes of such an x."""

    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor, more: dict[str, Tensor]) -> Tensor:
            return self.second(self.first(x) + more["bias"])

    def example() -> Any:
        return UserDict(x=rows(), more=OrderedDict(bias=rows()))

    pipe = dtrp.Pipeline(dtrp.split(Named(), num_stages=2, example=example()), sgd, F.cross_entropy, num_microbatches=2)
    for _ in range(3):
        pipe.step(example(), torch.zeros(5, dtype=torch.int64))
    pipe.flush()
    assert pipe.infer(example()).shape == (5, 3)


def test_a_parameter_on_both_sides_of_a_cut() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.a(self.b(self.a(x))))

    assert dtrp.split(Twice(), num_stages=2, example=rows()).points == ("c",)
    with pytest.raises(
        ValueError, match=r"can begin a stage at 1 places only, without a parameter on both sides .*\(c\)"
    ):
        dtrp.split(Twice(), num_stages=3, example=rows())


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.randn(6, 7), ValueError, r"x has shape \(6, 7\), and the model was traced with"),
        (torch.randn(6, 5).double(), TypeError, "x is torch.float64, and the model was traced with torch.float32"),
        ({"x": torch.randn(6, 5)}, ValueError, r"takes .* as the example of dtrp.split, and got"),
    ],
)
@pytest.mark.parametrize("method", ["dtrp", "bp"])
def test_a_wrong_batch_is_refused_at_the_door(method: str, x: Any, error: type[Exception], message: str) -> None:
    """Nothing has happened then, and the pipeline goes on."""

    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(5, 5), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x).tanh() + x)

    torch.manual_seed(0)
    good, y = torch.randn(6, 5), torch.randint(3, (6,))
    stages = dtrp.split(Branching(), num_stages=2, example=good)
    pipe = dtrp.Pipeline(
        stages, lambda p: torch.optim.SGD(p, lr=0.1), nn.functional.cross_entropy, method=method, num_microbatches=2
    )
    pipe.step(good, y)
    before = {name: value.clone() for name, value in pipe.stages[0].state_dict().items()}
    with pytest.raises(error, match=message):
        pipe.step(x, y)
    assert pipe.num_updates == 1
    assert_same(pipe.stages[0].state_dict(), before)
    assert pipe.step(good, y).isfinite()
