"""`dtrp.split`: models of any forward, by hand and traced, against the models themselves."""

from __future__ import annotations

import copy
from collections import OrderedDict, UserDict
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_same, with_aux
from split_models import MODELS, Residual, Siamese, UNet, images, rows
from torch import Tensor, nn
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
from dtrp.exchange import Places

CASES = [(kind, how) for kind in MODELS for how in (2, 4, "points")]


@copied_from_the_first
def make(kind: str, how: int | str) -> tuple[nn.Module, Any, dtrp.Stages]:
    """The model, what it is called with, and its stages."""
    build, data, points = MODELS[kind]
    model, x = build(), data()
    stages = dtrp.split(model, example=x, **({"points": points} if how == "points" else {"num_stages": how}))
    assert len(stages) == (4 if how == "points" else how)
    return model, x, stages


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
            from dtrp.tracing.stage import trace_into_stages

            parts = dtrp.Stages(*trace_into_stages(model, rows(), points=["1", "2", "3"]))
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
    pipe = dtrp.Pipeline(stages, sgd, F.cross_entropy, method="bp")
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
    assert torch.autograd.Function.__dict__["apply"].__func__.__name__ == "apply"


def test_autocast_reaches_its_operations() -> None:
    model, x, stages = make("dropout", 2)
    with torch.autocast("cpu", torch.bfloat16):
        for stage in stages:
            stage.eval()
        out = chain(stages, x)
        assert out.dtype == torch.bfloat16
        assert torch.equal(out, model.eval()(x))


# -- by hand ------------------------------------------------------------------------------------------------


def test_a_sequential_is_cut_between_its_layers() -> None:
    model = nn.Sequential(*(nn.Linear(6, 6) for _ in range(5)))
    for options in ({"num_stages": 2}, {"cuts": [3]}, {"points": ["3"]}):
        stages = dtrp.split(model, **options)
        assert [list(stage._modules) for stage in stages] == [["0", "1", "2"], ["3", "4"]]
        assert stages[1][0] is model[3]
        assert stages.points == ("3",)
        assert all(type(stage) is nn.Sequential for stage in stages)
    pipe = dtrp.Pipeline(dtrp.split(model, cuts=[1, 2]), sgd, F.mse_loss)
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
    pipe = dtrp.Pipeline([nn.Linear(6, 6), Joins(), nn.Linear(6, 3)], sgd, loss_fn)
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


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class OwnBackward(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Square.apply(x)


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
        (Wrapped(OwnBackward()), r"in inner.0 .*Square is a torch.autograd.Function with a backward of its own"),
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
        dtrp.Pipeline(stages, sgd, F.cross_entropy, num_stages=3)


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
