"""`dtrp.split`: models of any forward, by hand and traced, against the models themselves."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import Prophet, assert_same
from torch import Tensor, nn
from unsplit import (
    SEED,
    assert_trained_alike,
    call,
    chain,
    check_outputs,
    logits,
    minibatches,
    train_chain,
    train_plain,
)

import dtrp
from dtrp.exchange import Places


class UNet(nn.Module):
    """Skips over the middle, and ReLUs that write their input."""

    def __init__(self) -> None:
        super().__init__()
        self.enc1, self.enc2, self.mid = self.block(3, 4), self.block(4, 8), self.block(8, 8)
        self.up2, self.dec2 = nn.ConvTranspose2d(8, 8, 2, 2), self.block(16, 4)
        self.up1, self.dec1 = nn.ConvTranspose2d(4, 4, 2, 2), self.block(8, 4)
        self.drop, self.out = nn.Dropout(0.1), nn.Conv2d(4, 1, 1)

    @staticmethod
    def block(inputs: int, outputs: int) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)
        )

    def forward(self, x: Tensor) -> Tensor:
        a = self.enc1(x)
        b = self.enc2(F.max_pool2d(a, 2))
        u = self.dec2(torch.cat([self.up2(self.mid(F.max_pool2d(b, 2))), b], 1))
        u = self.dec1(torch.cat([self.up1(self.drop(u)), a], 1))
        return self.out(u)


class Dense(nn.Module):
    """DenseNet-style: a layer reads all that came before it."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6 + 4 * i, 4) for i in range(5))
        self.drop = nn.Dropout(0.2)
        self.head = nn.Linear(26, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.cat([x, self.drop(torch.tanh(layer(x)))], 1)
        return self.head(x)


class Mix(nn.Module):
    """Inception-style: branches side by side."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.one, self.three = nn.Conv2d(inputs, 3, 1), nn.Conv2d(inputs, 3, 3, padding=1)
        self.five, self.pool = nn.Conv2d(inputs, 2, 5, padding=2), nn.MaxPool2d(3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(torch.cat([self.one(x), self.three(x), self.five(x), self.pool(x)[:, :1]], 1))


class Inception(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mixes = nn.Sequential(Mix(3), Mix(9), Mix(9), Mix(9))
        self.head = nn.Linear(9, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.dropout(self.mixes(x).mean((2, 3)), 0.2, self.training))


class Siamese(nn.Module):
    """Two inputs through the same layers."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh())
        self.head = nn.Sequential(nn.Linear(16, 8), nn.Dropout(0.2), nn.Tanh(), nn.Linear(8, 3))

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return self.head(torch.cat([self.encoder(left), self.encoder(right)], 1))


class Lstm(nn.Module):
    """A classifier of sequences that returns None beside its logits."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.lstm = nn.LSTM(8, 8, num_layers=2, batch_first=True, dropout=0.2)
        self.drop, self.head = nn.Dropout(0.1), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        _, (h, _) = self.lstm(self.embedding(x))
        return self.head(self.drop(h[-1])), None


class Residual(nn.Module):
    """Blocks in a list, dropout between them, and a buffer that the forward assigns."""

    def __init__(self, blocks: int = 6) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(blocks))
        self.norm, self.drop, self.head = nn.LayerNorm(8), nn.Dropout(0.2), nn.Linear(8, 3)
        self.register_buffer("size", torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if self.training:
            self.size = 0.9 * self.size + 0.1 * x.detach().abs().mean(0)
        for block in self.blocks:
            x = x + self.drop(torch.tanh(block(x)))
        return self.head(self.norm(x))


class Adapter(nn.Module):
    """LoRA-style: a frozen layer and a product of two small matrices."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.down, self.up = nn.Linear(layer.in_features, 2, bias=False), nn.Linear(2, layer.out_features, bias=False)
        self.drop = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.up(self.down(self.drop(x)))


def frozen_first_half() -> nn.Module:
    model = Residual()
    for module in (model.first, *model.blocks[:3]):
        module.requires_grad_(False)
    return model


def with_adapters() -> nn.Module:
    model = Residual().requires_grad_(False)
    model.blocks = nn.ModuleList(Adapter(block) for block in model.blocks)
    return model


def rows(num: int = 5) -> Tensor:
    return torch.randn(num, 6)


def images() -> Tensor:
    return torch.randn(5, 3, 8, 8)


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any], list[str]]] = {
    "u-net": (UNet, images, ["enc2", "dec2", "up1"]),
    "densenet": (Dense, rows, ["layers.1", "layers.3", "head"]),
    "inception": (Inception, images, ["mixes.1", "mixes.2.three", "mixes.3"]),
    "siamese": (Siamese, lambda: (rows(), rows()), ["encoder.2", "head", "head.3"]),
    "lstm, None": (Lstm, lambda: torch.randint(20, (5, 4)), ["lstm", "drop", "head"]),
    "dropout": (Residual, rows, ["blocks.1", "blocks.3", "norm"]),
    "frozen first half": (frozen_first_half, rows, ["blocks.1", "blocks.3", "norm"]),
    "adapters": (with_adapters, rows, ["blocks.1", "blocks.3.layer", "norm"]),
}
CASES = [(kind, how) for kind in MODELS for how in (2, 4, "points")]


def make(kind: str, how: int | str) -> tuple[nn.Module, Any, dtrp.Stages]:
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
@pytest.mark.parametrize("num_microbatches", [1, 3])
@pytest.mark.parametrize(("kind", "how"), [case for case in CASES if case[0] != "siamese" or case[1] != "points"])
def test_they_train_as_the_model(kind: str, how: int | str, num_microbatches: int) -> None:
    model, x, stages = make(kind, how)
    plain = copy.deepcopy(model)
    batches = minibatches(x, logits(call(plain.eval(), x)).shape[1])
    want = train_plain(plain.train(), stages.points, batches, num_microbatches)
    assert_trained_alike(model, plain, train_chain(stages, batches, num_microbatches), want)


ENGINE = ["dropout", "frozen first half", "adapters", "inception"]


def sgd(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.05, momentum=0.9)


def loss_fn(out: Any, y: Tensor) -> Tensor:
    return F.cross_entropy(logits(out), y)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("num_microbatches", [1, 3])
@pytest.mark.parametrize("how", [2, 4])
@pytest.mark.parametrize("kind", ENGINE)
def test_a_pipeline_of_them_trains_as_the_model(kind: str, how: int, num_microbatches: int) -> None:
    """bp to 1e-10; dtrp with the weights of that run for predictions, to the bit as bp."""
    model, x, stages = make(kind, how)
    plain, late = copy.deepcopy(model), copy.deepcopy(model)
    batches = minibatches(x, 3, 7)
    pipe = dtrp.Pipeline(stages, sgd, loss_fn, method="bp", num_microbatches=num_microbatches, seed=SEED)
    history: list[list[list[Tensor]]] = [[] for _ in stages]

    def record() -> None:
        for versions, stage in zip(history, stages, strict=True):
            versions.append([p.detach().clone() for p in stage.parameters() if p.requires_grad])

    record()
    losses = []
    for batch in batches:
        losses.append(pipe.step(*batch))
        record()
    want = train_plain(plain, stages.points, batches, num_microbatches)
    assert_trained_alike(model, plain, losses, want)

    again = dtrp.split(late, points=stages.points, example=x)
    method = dtrp.get_method("dtrp", predict=Prophet(history))
    pipe = dtrp.Pipeline(again, sgd, loss_fn, method=method, num_microbatches=num_microbatches, seed=SEED)
    assert all(torch.equal(pipe.step(*batch), loss) for batch, loss in zip(batches, losses, strict=True))
    pipe.flush()
    assert_same(late.state_dict(), model.state_dict())
    assert_same(pipe.model_state_dict(), model.state_dict())
    assert torch.equal(pipe.infer(x), model.eval()(x))


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
        pipe = dtrp.Pipeline(parts, sgd, loss_fn, method=method, num_microbatches=2, seed=SEED)
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
    assert set(pipe.model_state_dict()) == set(model.state_dict())


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
        match=r"stage 2 \(Joins\) takes 2 values \(x, skip\) but stage 1 returns 1. A value cannot skip a stage: .* passes "
        "through stage 1, which takes it and returns it along",
    ):
        dtrp.split([nn.Linear(6, 6), nn.Linear(6, 6), Joins()], example=rows())
    with pytest.raises(
        ValueError, match=r"stage 1 \(Linear\) does not take what stage 0 returns, a tensor of shape \(5, 7\)"
    ):
        dtrp.split([nn.Linear(6, 7), nn.Linear(6, 6)], example=rows())


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
        ({"points": "blocks.1"}, r"points='blocks.1' is one name; pass a list of names, \['blocks.1'\]"),
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
