"""The local engine against the equations, and the promises that are about numbers."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import oracles
import pytest
import torch
from helpers import (
    Prophet,
    adamw,
    assert_same,
    check_perfect_prediction,
    clone,
    minibatches,
    network,
    pipeline,
    plain_loop,
    rate,
    sgd,
    with_aux,
)
from oracle_checks import OPTIMIZERS, check_against_oracle
from torch import Tensor, nn

import dtrp
from dtrp.comm.message import Note
from dtrp.engine.consistency import check_targets
from dtrp.schedule import steady_delay
from dtrp.splitting.stages import equal_cuts, into_stages

ENGINES = [
    *itertools.product(oracles.ROWS, (1, 2, 3, 4), (1, 2, 4), OPTIMIZERS),
    *((name, 8, 2, "sgd") for name in oracles.ROWS),
]
# Half of them: every method at every K and A, with one of the optimizers.
HALF = [
    (name, k, a, optimizer) for name, k, a, optimizer in ENGINES if k == 8 or (k + a // 2 + (optimizer == "sgd")) % 2
]


@pytest.mark.sampled(4)
@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(("name", "num_stages", "num_microbatches", "optimizer"), HALF)
def test_every_method_equals_its_equations(name: str, num_stages: int, num_microbatches: int, optimizer: str) -> None:
    """Twice the longest lead, 2(K-1) mini-batches, and some more."""
    batches = minibatches(6 + 4 * (num_stages - 1))
    check_against_oracle(oracles.ROWS[name], dtrp.get_method(name), num_stages, num_microbatches, optimizer, [batches])


@pytest.mark.full
@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(("name", "num_stages", "num_microbatches", "optimizer"), ENGINES)
def test_every_method_equals_its_equations_for_long(
    name: str, num_stages: int, num_microbatches: int, optimizer: str
) -> None:
    check_against_oracle(
        oracles.ROWS[name], dtrp.get_method(name), num_stages, num_microbatches, optimizer, [minibatches(40)]
    )


@pytest.mark.sampled(3)
@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("fdg", {"grad_shrink": 0.5}),
        ("fdg", {"backward_first": True}),
        ("adl", {"backward_first": True, "grad_shrink": 0.8}),
        ("dtrp", {"lr_shrink": 0.7}),
        ("dtrp", {"predict": "linear", "lr_shrink": 0.7}),
        ("dtrp", {"backward_first": False}),
        ("dtrp", {"ahead": 1.5}),
        ("dtrp", {"ahead": 3}),
        ("pipedream", {"keep": "input"}),
        ("spectrain", {"keep": "input", "predict": "rollout"}),
        ("spectrain", {"lr_shrink": 0.7, "grad_shrink": 0.9}),
        ("bp", {"keep": "input"}),
        ("gpipe", {"keep": "input", "lr_shrink": 0.5}),
        ("fr", {"grad_shrink": 0.5}),
        ("dtr", {"backward_at": "stashed"}),
    ],
)
@pytest.mark.parametrize("num_microbatches", [1, 3])
def test_every_field_of_a_row_equals_its_equations(name: str, options: dict[str, Any], num_microbatches: int) -> None:
    row = oracles.Row(**{**oracles.ROWS[name].__dict__, **options})
    check_against_oracle(row, dtrp.get_method(name, **options), 4, num_microbatches, "sgd", [minibatches(20)])


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", oracles.ROWS)
def test_flush_in_the_middle(name: str) -> None:
    segments = [minibatches(5, seed=1), minibatches(9, seed=2), minibatches(1, seed=3)]
    pipe = check_against_oracle(oracles.ROWS[name], dtrp.get_method(name), 3, 2, "adamw", segments)
    assert [stage.version for stage in pipe._engine.stages] == [15, 15, 15] == [pipe.num_updates] * 3


@pytest.mark.sampled(4)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("num_microbatches", [1, 4])
@pytest.mark.parametrize(
    ("name", "num_stages"),
    [*((name, 1) for name in dtrp.list_methods()), ("bp", 4), ("gpipe", 3), ("bp", 8), ("bp-zb", 4)],
)
def test_without_delay_it_is_a_plain_loop_to_the_bit(
    name: str, num_stages: int, num_microbatches: int, dtype: torch.dtype
) -> None:
    torch.set_default_dtype(dtype)
    for make in (sgd, adamw):
        model = network()
        plain = clone(model)
        pipe = pipeline(model, make, num_stages=num_stages, method=name, num_microbatches=num_microbatches)
        batches = minibatches(8)
        losses = [pipe.step(x, y) for x, y in batches]
        pipe.flush()
        cuts = equal_cuts(8, num_stages)
        want = plain_loop(plain, batches, make, pipe.rng, cuts=cuts, num_microbatches=num_microbatches)
        assert all(torch.equal(a, b) for a, b in zip(losses, want, strict=True))
        assert_same(pipe.model_state_dict(), plain.state_dict())
        assert_same(model.state_dict(), plain.state_dict())
        assert all(p.grad is None for p in model.parameters())


@pytest.mark.sampled(2)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", ["dtrp", "dtrp-1f1b", "dtrp-split"])
@pytest.mark.parametrize(("num_stages", "num_microbatches"), [(2, 1), (4, 1), (4, 4), (3, 2)])
def test_with_perfect_prediction_it_is_backpropagation_to_the_bit(
    name: str, num_stages: int, num_microbatches: int, dtype: torch.dtype
) -> None:
    torch.set_default_dtype(dtype)
    pipe, prophet = check_perfect_prediction(
        network(), minibatches(40), num_stages, num_microbatches=num_microbatches, name=name
    )
    late = sum(n for delays in pipe.delays().values() for delay, n in delays.items() if delay)
    assert len(prophet.asked) == len(set(prophet.asked)) == late > 0, "asked once per F(m) with a delay"


@pytest.mark.parametrize("name", ["dtrp", "dtrp-split"])
def test_a_prophet_who_is_off_by_one_is_noticed(name: str) -> None:
    """The theorem's test can fail: one version too many breaks it."""
    model = network()
    plain, batches = clone(model), minibatches(10)
    stages = into_stages(plain, 2)
    history: list[list[list[Tensor]]] = [[] for _ in stages]
    pipe = pipeline(model, sgd, num_stages=2, method=dtrp.get_method(name, predict=Prophet(history)))

    def record() -> None:
        for versions, stage in zip(history, stages, strict=True):
            versions.append([p.detach().clone() for p in stage.parameters()])

    plain_loop(plain, batches, sgd, pipe.rng, cuts=[4], after_update=record)  # without the weights of version 0
    record()
    for x, y in batches:
        pipe.step(x, y)
    pipe.flush()
    assert not all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))


@pytest.mark.sampled(6)
@pytest.mark.parametrize("num_microbatches", [1, 2, 3, 4])
@pytest.mark.parametrize("name", dtrp.list_methods())
def test_counted_delays_are_those_of_the_formula(name: str, num_microbatches: int) -> None:
    method = dtrp.get_method(name)
    for num_stages in (1, 2, 3, 5, 8):
        start = 2 * num_stages  # from there on every delay is the steady one
        count = start + 4
        pipe = pipeline(nn.Sequential(*(nn.Linear(2, 2) for _ in range(8))), num_stages=num_stages, method=method,
                        num_microbatches=num_microbatches)  # fmt: skip
        x, y = torch.randn(4, 2), torch.randint(2, (4,))
        for _ in range(count):
            pipe.step(x, y)
        pipe.flush()
        schedule = dtrp.Schedule.build(method, num_stages, count, num_microbatches)
        for stage, counted in pipe.delays().items():
            steady = [steady_delay(method, num_stages, stage, num_microbatches, j) for j in range(num_microbatches)]
            listed = schedule.delays()[stage]
            assert counted == Counter(listed)
            assert listed[start * num_microbatches :] == steady * (count - start)


@pytest.mark.parametrize("name", dtrp.list_methods())
def test_no_sample_is_lost_and_the_last_partial_minibatch_counts(name: str) -> None:
    seen: list[float] = []

    def loss_fn(out: Tensor, target: Tensor) -> Tensor:
        seen.extend(target.tolist())
        return (out.squeeze(1) - target).square().mean()

    pipe = dtrp.Pipeline(
        nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1), nn.Linear(1, 1)),
        lambda p: torch.optim.SGD(p, lr=1e-3),
        loss_fn,
        num_stages=3,
        method=name,
        num_microbatches=4,
        **with_aux(name, 1),
    )
    y = torch.arange(11.0)
    for part in (y[:5], y[5:8], y[8:10], y[10:]):
        pipe.step(part[:, None], part)
    pipe.flush()
    assert sorted(seen) == sorted(y.tolist() * (3 if pipe.method.local else 1)), "once for each loss"
    assert [stage.version for stage in pipe._engine.stages] == [4, 4, 4]
    assert sum(pipe.delays()[0].values()) == 4 + 3 + 2 + 1


def test_a_step_returns_the_sample_weighted_mean_loss() -> None:
    pipe = dtrp.Pipeline(
        nn.Sequential(nn.Linear(2, 1)),
        lambda p: torch.optim.SGD(p, lr=0.0),
        nn.functional.mse_loss,
        num_microbatches=3,
        method="bp",
    )
    x, y = torch.randn(7, 2), torch.randn(7, 1)
    loss = pipe.step(x, y)
    assert loss.shape == ()
    assert not loss.requires_grad
    torch.testing.assert_close(loss, nn.functional.mse_loss(pipe.infer(x), y))


def test_changing_batch_and_image_sizes() -> None:
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(16, 3),
    )
    plain = clone(model)
    pipe = pipeline(model, num_stages=3, method="bp", num_microbatches=2)
    batches = [(torch.randn(n, 1, size, size), torch.randint(3, (n,))) for n, size in [(4, 8), (7, 8), (3, 6), (2, 12)]]
    losses = [pipe.step(x, y) for x, y in batches]
    want = plain_loop(plain, batches, sgd, pipe.rng, cuts=[2, 4], num_microbatches=2)
    assert all(torch.equal(a, b) for a, b in zip(losses, want, strict=True))


def test_a_learning_rate_is_the_same_at_every_stage_and_update() -> None:
    rates: dict[int, list[float]] = {0: [], 1: [], 2: []}

    class Noting(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            rates[stage_of[id(self)]].append(self.param_groups[0]["lr"])
            super().step()

    method = dtrp.get_method("dtr", lr_shrink=0.5)
    pipe = pipeline(network(), lambda p: Noting(p, lr=0.05), num_stages=3, method=method)
    stage_of = {id(optimizer): k for k, optimizer in enumerate(pipe.optimizers)}
    for x, y in minibatches(12):
        pipe.step(x, y)
    pipe.flush()
    for stage, noted in rates.items():
        assert noted == pytest.approx([rate(n) * 0.5 ** (2 - stage) for n in range(12)], rel=1e-15)
    for optimizer in pipe.optimizers:
        assert optimizer is not None
        assert optimizer.param_groups[0]["lr"] == pytest.approx(rate(12), rel=1e-15), "the scheduler never sees gamma"


def test_the_global_generator_is_left_alone_and_seeds_the_pipeline() -> None:
    results = []
    for _ in range(2):
        torch.manual_seed(3)
        model = network()
        before = torch.get_rng_state()
        pipe = dtrp.Pipeline(model, sgd, nn.functional.cross_entropy, num_stages=3, method="dtrp", num_microbatches=1)
        losses = [pipe.step(x, y) for x, y in minibatches(6)]
        pipe.flush()
        pipe.infer(minibatches(1)[0][0])
        assert torch.equal(torch.get_rng_state(), before)
        results.append(losses)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    other = dtrp.Pipeline(network(), sgd, nn.functional.cross_entropy, num_stages=3, method="dtrp", num_microbatches=1)
    assert other.seed != pipe.seed, "drawn anew from the global generator"


def test_a_whole_minibatch_may_have_several_targets_a_sample() -> None:
    """The tokens of all samples one behind another, as language models flatten them; they cannot be cut."""
    x, y = torch.randint(9, (6, 5)), torch.randint(9, (30,))

    def loss_fn(out: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(out.flatten(0, 1), y)

    def tokens() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Embedding(9, 8), nn.Tanh(), nn.Linear(8, 9))

    model = tokens()
    loss = loss_fn(model(x), y)
    loss.backward()
    sgd(list(model.parameters())).step()
    pipe = dtrp.Pipeline(tokens(), sgd, loss_fn, num_stages=2, method="bp", num_microbatches=1)
    assert torch.equal(pipe.step(x, y), loss.detach())
    assert all(torch.equal(model.state_dict()[name], t) for name, t in pipe.model_state_dict().items())
    with pytest.raises(
        ValueError, match=r"x has 6 samples and y has 29; a mini-batch needs as many targets as inputs$"
    ):
        pipe.step(x, y[:29])
    pipe = dtrp.Pipeline(tokens(), sgd, loss_fn, num_stages=2, num_microbatches=2)
    with pytest.raises(
        ValueError, match=r"into 2 micro-batches; pass num_microbatches=1, or, .* as y.view\(6, -1\), and flatten"
    ):
        pipe.step(x, y)
    note = Note(total=6)
    check_targets(note, y, 1, waits=True)
    with pytest.raises(ValueError, match="the first rank was given 6 samples and the last rank 30 targets"):
        check_targets(note, y, 2, waits=True)


def test_dropout_draws_by_stage_and_microbatch() -> None:
    pipe = pipeline(network(), num_stages=2)
    draws = {}
    for stage, micro in itertools.product((0, 1), (0, 1)):
        for _ in range(2):
            with pipe.rng(stage, micro):
                draw = tuple(torch.rand(3).tolist())
            assert draws.setdefault((stage, micro), draw) == draw
    assert len(set(draws.values())) == 4


def test_infer_at_any_time_leaves_everything_as_it_is() -> None:
    def losses(ask: bool) -> list[Tensor]:
        torch.manual_seed(0)
        pipe = pipeline(network(), num_stages=4)
        result = []
        for x, y in minibatches(8):
            result.append(pipe.step(x, y))
            if ask:
                assert pipe.infer(torch.randn(1, 5)).shape == (1, 3)
                assert pipe.infer(torch.randn(30, 5)).shape == (30, 3)
        pipe.flush()
        assert all(module.training for stage in pipe.stages for module in stage.modules())
        return result

    assert all(torch.equal(a, b) for a, b in zip(losses(True), losses(False), strict=True))


def test_infer_is_the_model_in_eval_mode_and_keeps_each_modules_mode() -> None:
    model = network()
    model[2].eval()  # a frozen layer stays frozen
    pipe = pipeline(model, num_stages=3)
    for x, y in minibatches(5):
        pipe.step(x, y)
    pipe.flush()
    x = torch.randn(6, 5)
    got = pipe.infer(x)
    assert not model[2].training
    assert model[3].training
    with torch.no_grad():
        assert torch.equal(got, model.eval()(x))
    assert not got.requires_grad


@pytest.mark.parametrize("name", ["dtrp", "fdg", "bp"])
def test_a_list_of_modules_is_one_stage_each(name: str) -> None:
    parts = [nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)]
    pipe = pipeline(parts, method=name)
    assert pipe.num_stages == 3
    for x, y in minibatches(5):
        pipe.step(x, y)
    pipe.flush()
    assert_same(pipe.model_state_dict(), nn.Sequential(*parts).state_dict())
    assert pipe.delays().keys() == {0, 1, 2}


def test_cuts() -> None:
    pipe = pipeline(network(), cuts=[1, 7])
    assert [len(stage) for stage in pipe.stages] == [1, 6, 1]  # type: ignore[arg-type]
    pipe = pipeline(network(), num_stages=3)
    assert [len(stage) for stage in pipe.stages] == [3, 3, 2]  # type: ignore[arg-type]


@pytest.mark.parametrize("name", dtrp.list_methods())
def test_frozen_parts(name: str) -> None:
    """A frozen stage, a stage without parameters, a frozen layer among trained ones; buffers still move once."""
    model = network()
    for p in model[:3].parameters():
        p.requires_grad_(False)
    next(iter(model[4].parameters())).requires_grad_(False)
    before = clone(model).state_dict()
    pipe = pipeline(model, cuts=[2, 4, 6], method=name)
    for x, y in minibatches(6):
        pipe.step(x, y)
    pipe.flush()
    after = pipe.model_state_dict()
    for tensor_name, p in model.named_parameters():
        assert torch.equal(after[tensor_name], before[tensor_name]) != p.requires_grad, tensor_name
    assert after["block0.1.num_batches_tracked"] == 6
    assert after["block6.1.num_batches_tracked"] == 6
    assert pipe.optimizers[0] is None


@pytest.mark.parametrize("name", dtrp.list_methods())
@pytest.mark.parametrize("num_stages", [1, 3])
def test_a_stage_that_writes_its_input(name: str, num_stages: int) -> None:
    def make(inplace: bool) -> list[nn.Module]:
        torch.manual_seed(5)
        modules: list[nn.Module] = [
            nn.Sequential(nn.ReLU(inplace), nn.Linear(5, 5), nn.Sigmoid() if num_stages > 1 else nn.Identity()),
            nn.Sequential(nn.Hardtanh(-0.1, 0.1, inplace), nn.Linear(5, 5)),
            nn.Sequential(nn.ReLU(inplace), nn.Linear(5, 3)),
        ]
        return modules if num_stages == 3 else [nn.Sequential(*modules)]

    results = []
    for inplace in (True, False):
        pipe = pipeline(make(inplace), method=name)
        given = minibatches(8)
        losses = [pipe.step(x, y) for x, y in given]
        pipe.flush()
        assert all(torch.equal(x, same) for (x, _), (same, _) in zip(given, minibatches(8), strict=True))
        results.append((losses, pipe.model_state_dict()))
    assert all(torch.equal(a, b) for a, b in zip(results[0][0], results[1][0], strict=True))
    assert_same(results[0][1], results[1][1])


@pytest.mark.parametrize("front", [None, nn.Flatten(), nn.Identity()])
@pytest.mark.parametrize("name", dtrp.list_methods())
def test_the_callers_batch_may_change_while_it_is_in_flight(name: str, front: nn.Module | None) -> None:
    """Also where the first stage passes on a view of it."""
    results = []
    for reuse in (True, False):
        torch.manual_seed(0)
        model = network(4)
        pipe = pipeline(list(model) if front is None else [front, *model], method=name)
        x, y = minibatches(1, last=32)[0]
        losses = []
        for step in range(8):
            given = x if reuse else x.clone()
            given.copy_(torch.randn(32, 5, generator=torch.Generator().manual_seed(step)))
            losses.append(pipe.step(given, y))
        pipe.flush()
        results.append(losses)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("name", ["dtrp", "bp", "fdg", "spectrain", "fr"])
def test_autocast_is_the_callers_in_both_passes(name: str) -> None:
    """A micro-batch forwarded under autocast is recomputed under it, whatever holds when its B runs."""
    model = nn.Sequential(*(nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(4)))
    dtypes: list[torch.dtype] = []
    model[0].register_forward_hook(lambda module, args, out: dtypes.append(out.dtype))
    pipe = dtrp.Pipeline(model, sgd, nn.functional.mse_loss, num_stages=4, method=name, num_microbatches=1)
    x = torch.randn(8, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for _ in range(6):
            pipe.step(x, x)
    pipe.flush()  # outside
    assert set(dtypes) == {torch.bfloat16}
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_autocast_bp_equals_a_plain_loop() -> None:
    model = nn.Sequential(*(nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(4)))
    plain = clone(model)
    optimizer = sgd(list(plain.parameters()))
    pipe = dtrp.Pipeline(model, sgd, nn.functional.mse_loss, num_stages=2, method="bp", num_microbatches=1)
    for _ in range(10):
        x = torch.randn(8, 16)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = nn.functional.mse_loss(plain(x), x)
            got = pipe.step(x, x)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        assert torch.equal(got, loss.detach())
    assert_same(model.state_dict(), plain.state_dict())


def test_spectral_norm_moves_its_vectors_once_per_microbatch() -> None:
    def make() -> list[nn.Module]:
        torch.manual_seed(4)
        return [
            nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(5, 5)), nn.Tanh()),
            nn.Linear(5, 3),
        ]

    recomputed = pipeline(make(), sgd, method=dtrp.get_method("bp", keep="input"))
    kept = pipeline(make(), sgd, method="bp")
    for x, y in minibatches(5):
        assert torch.equal(recomputed.step(x, y), kept.step(x, y))
    assert_same(recomputed.model_state_dict(), kept.model_state_dict())


def test_the_returned_model_is_the_callers() -> None:
    model = network()
    names = [name for name, _ in model.named_parameters()]
    objects = {id(p) for p in model.parameters()}
    pipe = pipeline(model, num_stages=4)
    assert {id(p) for stage in pipe.stages for p in stage.parameters()} == objects
    assert [name for stage in pipe.stages for name, _ in stage.named_parameters()] == names


@pytest.mark.parametrize("devices", ["cpu", torch.device("cpu"), ["cpu", "cpu", "cpu"]])
def test_devices(devices: Any) -> None:
    pipe = pipeline([nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 3)], devices=devices)
    for x, y in minibatches(4):
        assert pipe.step(x, y).device.type == "cpu"
    pipe.flush()


def test_repr_says_what_it_is() -> None:
    pipe = pipeline(network(), num_stages=3)
    assert repr(pipe).startswith("Pipeline(method='dtrp', num_stages=3, layers=[3, 3, 2], num_microbatches=1")


def test_a_parameter_that_gets_no_gradient_stays() -> None:
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(5, 5), nn.Linear(5, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)  # type: ignore[no-any-return]

    for name in ("dtrp", "fdg", "bp"):
        model = nn.Sequential(Unused(), nn.Tanh(), nn.Linear(5, 3))
        before = model[0].unused.weight.detach().clone()  # type: ignore[union-attr]
        pipe = pipeline(model, num_stages=3, method=name)
        for x, y in minibatches(5):
            pipe.step(x, y)
        pipe.flush()
        assert torch.equal(model[0].unused.weight, before)  # type: ignore[union-attr, arg-type]


def test_schedulers_step_once_an_update() -> None:
    pipe = pipeline(network(), num_stages=4)
    for x, y in minibatches(9):
        pipe.step(x, y)
    pipe.flush()
    assert [scheduler.last_epoch for scheduler in pipe.lr_schedulers] == [9] * 4
