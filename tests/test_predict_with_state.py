"""Predictors that learn while they run, or need no rule: `last`, `Scaled` and `auto`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import adamw, assert_same, clone, minibatches, network, pipeline, sgd
from torch import Tensor, nn

import dtrp
from dtrp import get_method
from dtrp.measure.memory import StageSizes, footprint
from dtrp.predict import Scaled, linear, register

pytestmark = pytest.mark.usefixtures("float64")

# Everyone of torch's but LBFGS, which calls the loss many times, SparseAdam, which wants sparse gradients, and Muon,
# which takes matrices alone.
ALL = sorted(
    name
    for name, cls in vars(torch.optim).items()
    if isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer)
    and name not in ("Optimizer", "LBFGS", "SparseAdam", "Muon")
)  # fmt: skip


class Slow(torch.optim.Optimizer):
    """An optimizer that nobody knows: the mean of the gradient and its sign."""

    def __init__(self, params: Any, lr: float = 0.01) -> None:
        super().__init__(params, {"lr": lr})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        with torch.no_grad():
            for group in self.param_groups:
                for p in group["params"]:
                    if p.grad is not None:
                        move = self.state[p].setdefault("move", torch.zeros_like(p))
                        move.mul_(0.5).add_(p.grad + p.grad.sign(), alpha=0.5)
                        p.sub_(group["lr"] * move)


def make_of(name: str) -> Callable[[list[Tensor]], torch.optim.Optimizer]:
    return lambda params: Slow(params) if name == "Slow" else getattr(torch.optim, name)(params, lr=0.01)


class Spy:
    """Writes the weights predicted by another, and remembers what it was asked and answered, with the weights of then."""

    def __init__(self, inner: Any) -> None:
        self.inner, self.seen = inner, []  # type: ignore[var-annotated]

    def __call__(self, parameters: Any, optimizer: Any, horizon: int, out: Any, **at: Any) -> None:
        self.inner(parameters, optimizer, horizon, out, **at)
        now = [p.detach().clone() for p in parameters]
        self.seen.append((at["version"], horizon, now, [o.clone() for o in out]))


def spied(pipe: dtrp.Pipeline) -> dict[int, Spy]:
    """A spy in each stage that predicts."""
    spies = {}
    for stage in pipe._engine.stages:
        if stage.versions.predictor is not None:
            inner = stage.versions.predictor
            spies[stage.index] = spy = Spy(inner)
            spy.__dict__.update({name: getattr(inner, name) for name in ("before_update", "after_update", "forget")})
            stage.versions.predictor = spy
            spy.nbytes = 0  # type: ignore[attr-defined]
    return spies


@pytest.mark.parametrize("method", ["dtrp", "spectrain", "dtrp-1f1b"])
def test_last_is_linear_for_momentum_at_a_constant_rate(method: str) -> None:
    start, weights = network(), []
    for predict in ("linear", "last"):
        model = clone(start)
        pipe = dtrp.Pipeline(
            model, sgd, nn.functional.cross_entropy, num_stages=4, num_microbatches=1, seed=0,
            method=get_method(method, predict=predict),
        )  # fmt: skip
        for x, y in minibatches(20):
            pipe.step(x, y)
        pipe.flush()
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert (weights[0] - weights[1]).norm() <= 1e-10 * weights[0].norm()


@pytest.mark.parametrize("name", ["SGD", "AdamW", "RMSprop", "Slow"])
def test_last_is_the_last_update_by_the_rates_of_the_next(name: str) -> None:
    """Against the weights themselves, with two groups whose rates change, one of them from 0 on."""

    def make(params: list[Tensor]) -> torch.optim.Optimizer:
        groups = [{"params": params[::2], "lr": 0.01}, {"params": params[1::2], "lr": 0.04}]
        return Slow(groups) if name == "Slow" else getattr(torch.optim, name)(groups)  # type: ignore[no-any-return]

    def rate(update: int) -> float:
        return 0.0 if update == 4 else 1 / (1 + update)

    pipe = dtrp.Pipeline(
        network(), make, nn.functional.cross_entropy, num_stages=3, seed=0, num_microbatches=1,
        method=get_method("dtrp", predict="last", lr_shrink=0.5),
        lr_scheduler=lambda o: torch.optim.lr_scheduler.LambdaLR(o, [rate, lambda n: rate(n) + 0.5]),
    )  # fmt: skip
    spies = spied(pipe)
    for x, y in minibatches(12):
        pipe.step(x, y)
    pipe.flush()
    assert sorted(spies) == [0, 1]
    for spy in spies.values():
        weights = {version: now for version, _, now, _ in spy.seen}
        for version, horizon, now, out in spy.seen:
            for i, (p, o) in enumerate(zip(now, out, strict=True)):
                if version == 0:
                    assert torch.equal(o, p)
                elif version - 1 in weights:
                    more = 0.5 * (i % 2)
                    then = rate(version - 1) + more
                    ratio = (rate(version) + more) / then if then else 0.0
                    want = p + horizon * ratio * (p - weights[version - 1][i])
                    assert (o - want).norm() <= 1e-12 * p.norm()


@pytest.mark.parametrize("base", ["linear", "rollout", "last"])
@pytest.mark.parametrize("num_microbatches", [1, 3])
def test_scaled_is_the_fit_of_its_equation(base: str, num_microbatches: int) -> None:
    """Replayed from the weights of every version: one prediction at a time, compared when its horizon has passed."""
    decay = 0.8
    pipe = pipeline(
        network(), adamw if base != "last" else make_of("RMSprop"), num_stages=4, num_microbatches=num_microbatches,
        method=get_method("dtrp", predict=Scaled(base, decay=decay)),
    )  # fmt: skip
    plain = {k: Spy(stage.versions.predictor._base) for k, stage in enumerate(pipe._engine.stages[:3])}
    for k, spy in plain.items():
        inner = pipe._engine.stages[k].versions.predictor
        if base == "last":
            spy.__dict__.update({n: getattr(spy.inner, n) for n in ("before_update", "after_update")})
        inner._base = spy
    spies, history = spied(pipe), {k: [] for k in plain}  # type: ignore[var-annotated]
    for x, y in minibatches(25):
        pipe.step(x, y)
        for k in plain:  # a stage makes at most one update in a step
            stage = pipe._engine.stages[k]
            history[k] += [[p.detach().clone() for p in stage.parameters]] * (stage.version + 1 - len(history[k]))
    pipe.flush()
    for k, spy in spies.items():
        known = dict(enumerate(history[k]))
        known |= {version: now for version, _, now, _ in spy.seen}
        fitted, length, due, probe = 0.0, 0.0, None, None
        for (version, horizon, now, out), (_, _, _, unscaled) in zip(spy.seen, plain[k].seen, strict=True):
            if due is not None and version >= due:
                assert probe is not None
                moved = [b - a for a, b in zip(probe[0], known[due], strict=True)]
                fitted = decay * fitted + sum(float((u * d).sum()) for u, d in zip(probe[1], moved, strict=True))
                length = decay * length + sum(float((u * u).sum()) for u in probe[1])
                due = None
            displacement = [u - p for u, p in zip(unscaled, now, strict=True)]
            if due is None:
                due, probe = version + horizon, (now, displacement)
            factor = min(2.0, max(0.0, fitted / length)) if length else 1.0
            for p, u, o in zip(now, displacement, out, strict=True):
                assert (o - (p + factor * u)).norm() <= 1e-11 * (1 + p.norm())
        assert length > 0


class Shift(nn.Module):
    """Adds its weight: a loss that is linear in the output is linear in all weights."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.weight


def test_scaled_finds_the_factor_of_a_loss_that_is_linear() -> None:
    momentum = 0.9
    for base, factors in (
        ("linear", [1.0, 1.0]),
        ("rollout", [h / sum(momentum**i for i in range(1, h + 1)) for h in (3, 1)]),
    ):
        pipe = dtrp.Pipeline(
            [Shift(), Shift(), Shift()], lambda p: torch.optim.SGD(p, lr=0.01, momentum=momentum),
            lambda out, y: (out * y).sum(1).mean(), method=get_method("dtrp", predict=Scaled(base)), num_microbatches=1,
        )  # fmt: skip
        for _ in range(1000):
            pipe.step(torch.zeros(4, 5), torch.ones(4, 5))
        found = [stage.versions.predictor.factor for stage in pipe._engine.stages[:2]]
        assert found == [pytest.approx(factor, abs=1e-6) for factor in factors]


def interrupted(fresh: Callable[[], dtrp.Pipeline], folder: Path, batches: list[Any]) -> Iterator[dtrp.Pipeline]:
    """The pipeline that was never stopped, and the one that was, after each of its steps."""
    whole, stopped = fresh(), fresh()
    for count, (x, y) in enumerate(batches):
        whole.step(x, y)
        stopped.step(x, y)
        stopped.save(folder / str(count))
        resumed = fresh()
        resumed.load(folder / str(count))
        stopped = resumed
    for pipe in (whole, stopped):
        pipe.flush()
        yield pipe


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", [*ALL, "Slow"])
def test_every_optimizer_is_predicted_and_goes_on_from_any_step(name: str, tmp_path: Path) -> None:
    start = network()

    def fresh() -> dtrp.Pipeline:
        return pipeline(
            clone(start), make_of(name), num_stages=4, method=get_method("dtrp", predict="auto"), num_microbatches=2
        )

    whole, stopped = interrupted(fresh, tmp_path, minibatches(8))
    assert_same(stopped.model_state_dict(), whole.model_state_dict())
    base = linear if name in ("SGD", "Adam", "AdamW", "NAdam") else "_LastOfStage"
    for stage in whole._engine.stages[:3]:
        predictor = stage.versions.predictor
        assert type(predictor).__name__ == "_ScaledOfStage"
        assert predictor._base is base or type(predictor._base).__name__ == base


@pytest.mark.sampled(2)
@pytest.mark.parametrize("predict", ["scaled", "last", Scaled("last", decay=0.5), Scaled("informed")])
def test_what_is_learned_goes_on_from_any_step(predict: Any, tmp_path: Path) -> None:
    start = network()

    def fresh() -> dtrp.Pipeline:
        method = get_method("spectrain", predict=predict)
        return pipeline(clone(start), adamw, num_stages=3, method=method, num_microbatches=2)

    whole, stopped = interrupted(fresh, tmp_path, minibatches(10))
    assert_same(stopped.model_state_dict(), whole.model_state_dict())


def test_lbfgs_is_refused_and_linear_names_the_ways_out() -> None:
    with pytest.raises(TypeError, match="LBFGS calls the loss many times"):
        pipeline(network(), torch.optim.LBFGS, num_stages=2, method=get_method("dtrp", predict="auto"))
    with pytest.raises(TypeError, match="does not know the update rule of RMSprop .* predict='last' or 'auto'"):
        pipeline(network(), make_of("RMSprop"), num_stages=2, method=get_method("dtrp", predict="linear"))


def test_a_registered_optimizer_is_known() -> None:
    def rule(p: Tensor, state: dict[str, Any], group: dict[str, Any], horizon: int, out: Tensor) -> None:
        torch.add(p, state["move"], alpha=-horizon * group["lr"], out=out)

    start, weights = network(), []
    try:
        register(Slow, rule)
        for predict in ("linear", "last"):
            pipe = pipeline(clone(start), Slow, num_stages=4, method=get_method("dtrp", predict=predict))
            for x, y in minibatches(8):
                pipe.step(x, y)
            pipe.flush()
            weights.append(torch.cat([t.flatten() for t in pipe.model_state_dict().values()]))
        assert (weights[0] - weights[1]).norm() <= 1e-10 * weights[0].norm()
        auto = pipeline(network(), Slow, num_stages=2, method=get_method("dtrp", predict="auto"))
        assert auto._engine.stages[0].versions.predictor._base is linear
    finally:
        del linear.rules[Slow]
    with pytest.raises(TypeError, match="pass a class of optimizers"):
        register(network(), rule)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="the rule of Slow is a int"):
        register(Slow, 3)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("predict", "copies"), [("linear", 1), ("last", 2), ("scaled", 3), ("auto", 3), (Scaled("last"), 4)]
)
def test_the_copies_are_counted(predict: Any, copies: int) -> None:
    row = get_method("dtrp", predict=predict)
    pipe = pipeline(network(), num_stages=3, method=row, num_microbatches=1)
    for x, y in minibatches(9):
        pipe.step(x, y)
    for k in (0, 1):
        trained = sum(p.nbytes for p in pipe._engine.stages[k].parameters)
        assert pipe.memory()[k]["predicted"] == copies * trained
        sizes = StageSizes(trained, trained, 0.0, 1.0, 1.0)
        assert footprint(row, 3, k, 1, sizes).predicted == copies * trained
    if predict == "auto":
        pipe = pipeline(network(), Slow, num_stages=3, method=row, num_microbatches=1)
        for x, y in minibatches(9):
            pipe.step(x, y)
        trained = sum(p.nbytes for p in pipe._engine.stages[0].parameters)
        unknown = StageSizes(trained, trained, 0.0, 1.0, 1.0, rule_known=False)
        assert pipe.memory()[0]["predicted"] == 4 * trained == footprint(row, 3, 0, 1, unknown).predicted
    assert pipe.memory()[2]["predicted"] == 0
    assert dataclasses.replace(row, predict=None).predictor_copies == 0


def test_what_a_predictor_of_the_users_leaves_out_stays_when_it_is_scaled() -> None:
    def silent(parameters: Any, optimizer: Any, horizon: int, out: Any, **at: Any) -> None:
        pass

    start, losses = network(), []
    for predict in (None, silent, Scaled(silent)):
        pipe = pipeline(clone(start), num_stages=3, method=get_method("dtrp", predict=predict), num_microbatches=1)
        losses.append([float(pipe.step(x, y)) for x, y in minibatches(6)])
    assert losses[0] == losses[1] == losses[2]


def test_small_displacements_of_half_precision_are_fitted() -> None:
    p = [torch.zeros(1000, dtype=torch.float16)]
    predictor = Scaled(lambda p, o, h, out, **at: [t.fill_(1e-4) for t in out]).for_stage(None)
    out = [torch.empty_like(p[0])]
    predictor(p, None, 1, out, version=0)  # type: ignore[arg-type]
    p[0].fill_(5e-5)
    predictor.after_update(p, 1)
    assert predictor.factor == pytest.approx(0.5, abs=0.01)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("base", "options", "rule"),
    [
        ("scaled", {}, "base='scaled': scale 'linear'"),
        ("cubic", {}, "base='cubic': choose 'linear'"),
        ("linear", {"decay": 0}, "decay=0: .* above 0"),
        ("linear", {"decay": 1.5}, "decay=1.5"),
    ],
)
def test_what_cannot_be_scaled_is_refused(base: Any, options: dict[str, Any], rule: str) -> None:
    with pytest.raises(ValueError, match=rule):
        Scaled(base, **options)


def test_other_weights_make_it_begin_anew() -> None:
    pipe = pipeline(network(), num_stages=3, method=get_method("dtrp", predict=Scaled("last")), num_microbatches=1)
    for x, y in minibatches(12):
        pipe.step(x, y)
    pipe.flush()
    predictor = pipe._engine.stages[0].versions.predictor
    assert predictor.factor != 1.0
    pipe.load_state_dict(pipe.state_dict())
    assert predictor.factor == 1.0


def test_a_fit_that_is_not_finite_is_left_out() -> None:
    """One prediction of inf spoils the updates until its mini-batches are through, and no more."""

    def inf_once(
        parameters: Any, optimizer: Any, horizon: int, out: Any, *, version: int, stage: int, **at: Any
    ) -> None:
        linear(parameters, optimizer, horizon, out)
        if (stage, version) == (0, 5):
            out[0].fill_(float("inf"))

    pipe = pipeline(
        network(),
        num_stages=4,
        num_microbatches=1,
        on_nonfinite="skip",
        method=get_method("dtrp", predict=Scaled(inf_once)),
    )
    for x, y in minibatches(24):
        pipe.step(x, y)
    pipe.flush()
    assert 0 < max(map(len, pipe.skipped_updates().values())) < 4
    assert math.isfinite(pipe._engine.stages[0].versions.predictor.factor)


def test_auto_repeats_the_last_update_where_there_is_no_momentum() -> None:
    def plain(params: list[Tensor]) -> torch.optim.Optimizer:
        return torch.optim.SGD(params, lr=0.05)

    start, weights = network(), []
    for predict in ("auto", Scaled("last"), Scaled("linear")):
        pipe = pipeline(
            clone(start), plain, num_stages=3, num_microbatches=1, method=get_method("dtrp", predict=predict)
        )
        for x, y in minibatches(8):
            pipe.step(x, y)
        pipe.flush()
        weights.append(torch.cat([t.flatten() for t in pipe.model_state_dict().values()]))
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
