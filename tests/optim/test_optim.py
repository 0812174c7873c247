"""Optimizers and schedules that know of the delay, against programs written from their equations."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_same, clone, minibatches, network, pipeline
from torch import Tensor, nn

import dtrp
from dtrp import get_method
from dtrp.optim import Braking, MuonAdamW, extrapolated, lr_by_delay, momentum_by_stage, warmup_by_delay
from dtrp.optim.extrapolation import STATE

pytestmark = pytest.mark.usefixtures("float64")
cross_entropy = nn.functional.cross_entropy
needs_muon = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has no Muon")


def sgd(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.1, momentum=0.9)


def convolutions() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.Tanh(), nn.Conv2d(4, 6, 3), nn.Flatten(), nn.Linear(96, 3))


def images(n: int, number: int = 8) -> list[tuple[Tensor, Tensor]]:
    draw = torch.Generator().manual_seed(n)
    return [
        (torch.randn(number, 1, 8, 8, generator=draw), torch.randint(3, (number,), generator=draw)) for _ in range(n)
    ]


# -- learning rates, warm-up, momentum -------------------------------------------------------------


def test_rates_follow_the_delay_of_each_stage() -> None:
    """T1 of PipeMare, and the longer warm-up, over a schedule of the user's."""
    decay = lambda n: 1 / (1 + n)  # noqa: E731
    for make, own in (
        (lr_by_delay(3, decay), lambda n, d: decay(n) / max(1, d) ** (1 - min(n / 3, 1))),
        (lr_by_delay(0, decay), lambda n, d: decay(n)),
        (warmup_by_delay(2, decay), lambda n, d: decay(n) * min(1, (n + 1) / (2 * (1 + d) + 1))),
        (warmup_by_delay(0), lambda n, d: 1.0),
    ):
        pipe = dtrp.Pipeline(
            network(), sgd, cross_entropy, num_stages=4, num_microbatches=1, method="dtrp-1f1b", lr_scheduler=make
        )
        batches = minibatches(5)
        for n, (x, y) in enumerate(batches):
            for k, scheduler in enumerate(pipe.lr_schedulers):
                done = pipe._engine.stages[k].version
                assert scheduler.get_last_lr()[0] == pytest.approx(0.1 * own(done, 3 - k), rel=1e-14), (n, k)
            pipe.step(x, y)


def test_a_rate_by_delay_leaves_a_method_without_delay_alone() -> None:
    pipe = dtrp.Pipeline(network(), sgd, cross_entropy, num_stages=4, method="bp", lr_scheduler=lr_by_delay(100))
    assert all(o.param_groups[0]["lr"] == 0.1 for o in pipe.optimizers if o is not None)


@pytest.mark.parametrize("name", ["SGD", "NAdam"])
def test_momentum_by_stage_is_that_of_its_equation(name: str) -> None:
    def make(params: Any, *, named: Any) -> torch.optim.Optimizer:
        assert [id(p) for _, p in named] == [id(p) for p in params]
        return getattr(torch.optim, name)(
            params, lr=0.1, **({"momentum": 0.8} if name == "SGD" else {"betas": (0.8, 0.999)})
        )  # type: ignore[no-any-return]

    pipe = dtrp.Pipeline(network(), momentum_by_stage(make), cross_entropy, num_stages=4, method="dtrp-1f1b")
    for k, optimizer in enumerate(pipe.optimizers):
        (group,) = optimizer.param_groups
        want = 0.8 + (3 - k) * (0.99 - 0.8) / 4
        assert (group["momentum"] if name == "SGD" else group["betas"][0]) == pytest.approx(want, rel=1e-15)
    with pytest.raises(TypeError, match="Adagrad, which has neither"):
        dtrp.Pipeline(network(), momentum_by_stage(torch.optim.Adagrad), cross_entropy, num_stages=2)


def made_by_stage(make: Any) -> torch.optim.Optimizer:
    return make([nn.Parameter(torch.zeros(2))], stage=0, num_stages=2)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: lr_by_delay(-1), "anneal=-1"), (lambda: warmup_by_delay(float("nan")), "updates=nan"),
        (lambda: momentum_by_stage(sgd, most=1.0), "most=1.0"), (lambda: extrapolated(sgd, -0.5), "extrapolate=-0.5"),
        (lambda: Braking([nn.Parameter(torch.zeros(2))], momentum=0), "pass one above 0"),
        (lambda: Braking([nn.Parameter(torch.zeros(2))], rho=-1), "rho=-1"),
        (lambda: Braking([nn.Parameter(torch.zeros(2))], fused=True), "fused=True"),
        (lambda: made_by_stage(momentum_by_stage(lambda p: torch.optim.SGD(p, lr=0.1))), "SGD without momentum"),
        (lambda: made_by_stage(momentum_by_stage(sgd, most=0.8)), "most=0.8 is below the momentum 0.9"),
        (lambda: MuonAdamW([nn.Parameter(torch.zeros(2))], skip=["head"]), "no names were given"),
        (lambda: MuonAdamW([nn.Parameter(torch.zeros(2))], skip="head"), "pass a list"),
    ],
)  # fmt: skip
def test_what_means_nothing_is_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


# -- Muon ------------------------------------------------------------------------------------------


@needs_muon
@pytest.mark.parametrize("channels_last", [False, True])
def test_muon_is_torchs_on_flattened_weights(channels_last: bool) -> None:
    """Bit for bit beside torch's Muon on (out, -1) and AdamW, over a changing rate; and its state in the shape of the weights."""
    mine, theirs = convolutions(), None
    if channels_last:
        mine = mine.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    theirs = copy.deepcopy(mine)
    optimizer = MuonAdamW(mine.parameters(), lr=0.02)
    matrices = [p for p in theirs.parameters() if p.dim() >= 2]
    flat = [nn.Parameter(p.detach().flatten(1).clone()) for p in matrices]
    others = [p for p in theirs.parameters() if p.dim() < 2]
    muon = torch.optim.Muon(flat, lr=0.02, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(others, lr=0.02, betas=(0.9, 0.95), weight_decay=0.1)
    for n, (x, y) in enumerate(images(6)):
        for each in (optimizer, muon, adamw):
            each.param_groups[0]["lr"] = 0.02 / (1 + n)
        for model in (mine, theirs):
            model.zero_grad()
            cross_entropy(model(x), y).backward()
        for matrix, p in zip(flat, matrices, strict=True):
            assert p.grad is not None
            matrix.grad = p.grad.flatten(1)
        optimizer.step()
        muon.step()  # type: ignore[no-untyped-call]
        adamw.step()
        with torch.no_grad():
            for matrix, p in zip(flat, matrices, strict=True):
                p.copy_(matrix.view(p.shape))
        assert all(map(torch.equal, mine.parameters(), theirs.parameters()))
    for p in mine.parameters():
        assert {t.shape for name, t in optimizer.state[p].items() if name != "step"} == {p.shape}


@needs_muon
def test_muon_leaves_what_it_is_told_to_adamw() -> None:
    model = convolutions()
    grouped = MuonAdamW([{"params": model[4].parameters(), "muon": False}, {"params": model[0].parameters()}])
    named = MuonAdamW(model.named_parameters(), skip=["4", "2.b*"])
    cross_entropy(model(images(1)[0][0]), images(1)[0][1]).backward()
    for optimizer in (grouped, named):
        optimizer.step()
        assert "exp_avg" in optimizer.state[model[4].weight]
        assert "momentum_buffer" in optimizer.state[model[0].weight]
    assert "momentum_buffer" in named.state[model[2].weight]


def test_muon_names_the_torch_that_lacks_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.optim, "Muon", raising=False)
    with pytest.raises(RuntimeError, match=r"torch .* has none; use torch 2\.9"):
        MuonAdamW([nn.Parameter(torch.zeros(2, 2))])


# -- braking and extrapolation ---------------------------------------------------------------------


def test_braking_is_sgd_with_the_scaled_gradient() -> None:
    model = convolutions()
    optimizer = Braking(model.parameters(), lr=0.05, momentum=0.8, rho=0.7, weight_decay=0.01, nesterov=True)
    weights = [p.detach().clone() for p in model.parameters()]
    velocity: list[Tensor | None] = [None] * len(weights)
    for x, y in images(6):
        model.zero_grad()
        cross_entropy(model(x), y).backward()
        for i, (w, p) in enumerate(zip(weights, model.parameters(), strict=True)):
            g = p.grad.clone()  # type: ignore[union-attr]
            v = velocity[i]
            if v is not None:
                for gs, vs in [(g, v)] if g.dim() == 1 else zip(g, v, strict=True):
                    gs *= 1 - 0.7 * (gs * vs).sum() / max(float(gs.norm() * vs.norm()), 1e-8)
            g += 0.01 * w
            v = g if v is None else 0.8 * v + g
            velocity[i] = v.clone()
            w -= 0.05 * (g + 0.8 * v)
        gradients = [p.grad for p in model.parameters()]
        optimizer.step()
        assert all(p.grad is g for p, g in zip(model.parameters(), gradients, strict=True)), (
            "the gradient is the caller's"
        )
        for w, p in zip(weights, model.parameters(), strict=True):
            assert (w - p).norm() <= 1e-12 * w.norm()


@pytest.mark.parametrize("make", [sgd, torch.optim.AdamW, Braking], ids=["SGD", "AdamW", "Braking"])
def test_an_extrapolated_update_goes_along_its_change(make: Any) -> None:
    """Stage by stage: at K = 1 beside a plain loop with its equation."""
    model = network()
    plain = clone(model)
    pipe = dtrp.Pipeline(model, make, cross_entropy, num_stages=1, method="bp", extrapolate=0.6, seed=0)
    for module in (model, plain):
        module.eval()  # no dropout, whose draws are the pipeline's
    optimizer, before = make(plain.parameters()), None
    for x, y in minibatches(8):
        pipe.step(x, y)
        optimizer.zero_grad()
        cross_entropy(plain(x), y).backward()
        old = [p.detach().clone() for p in plain.parameters()]
        optimizer.step()
        update = [o - p.detach() for o, p in zip(old, plain.parameters(), strict=True)]
        if before is not None:
            with torch.no_grad():
                for p, u, b in zip(plain.parameters(), update, before, strict=True):
                    p -= 0.6 * (u - b)
        before = update
    pipe.flush()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert (p - q).norm() <= 1e-12 * q.norm()
    assert all(STATE in pipe.optimizers[0].state[p] for p in model.parameters())


def make_of(name: str) -> Any:
    if name == "Muon":
        return lambda params: MuonAdamW(params, lr=0.01)
    return lambda params: Braking(params, lr=0.05)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", [pytest.param("Muon", marks=needs_muon), "Braking"])
@pytest.mark.parametrize("extrapolate", [0.0, 0.5])
def test_they_go_on_from_any_step(name: str, extrapolate: float, tmp_path: Path) -> None:
    start, method = network(), get_method("dtrp", predict="auto")
    make = extrapolated(make_of(name), extrapolate)

    def fresh() -> dtrp.Pipeline:
        return pipeline(clone(start), make, num_stages=4, method=method, num_microbatches=2)

    whole, stopped = fresh(), fresh()
    for n, (x, y) in enumerate(minibatches(7)):
        whole.step(x, y)
        stopped.step(x, y)
        if n in (0, 3):
            stopped.save(tmp_path / str(n))
            stopped = fresh()
            stopped.load(tmp_path / str(n))
    for pipe in (whole, stopped):
        pipe.flush()
    assert_same(stopped.model_state_dict(), whole.model_state_dict())
    whole.save(tmp_path / "portable", portable=True)
    other = pipeline(clone(start), make, num_stages=2, method=method, num_microbatches=2)
    other.load(tmp_path / "portable")
    states = [
        [o.state[p] for o in pipe.optimizers for g in o.param_groups for p in g["params"]] for pipe in (whole, other)
    ]
    for a, b in zip(*states, strict=True):
        assert_same(a, b)


def test_braking_takes_over_where_sgd_was_and_takes_groups_and_halves() -> None:
    weights = [nn.Parameter(torch.ones(3, 2)) for _ in range(2)]
    braking = Braking(weights[:1], lr=0.1, rho=0.5)
    braking.add_param_group({"params": weights[1:], "lr": 0.2})
    for p in weights:
        p.grad = torch.ones_like(p)
    old = torch.optim.SGD([{"params": [p]} for p in weights], lr=0.1, momentum=0.9)
    old.step()
    braking.load_state_dict(old.state_dict())
    braking.step()
    assert [(g["rho"], g["brake_eps"]) for g in braking.param_groups] == [(0.5, 1e-20)] * 2
    half = nn.Parameter(torch.ones(2, 3, dtype=torch.float16))
    braking = Braking([half], lr=0.1)
    for _ in range(3):
        half.grad = torch.tensor([[1e-4] * 3, [0.0] * 3], dtype=torch.float16)
        braking.step()
    assert half.isfinite().all()
    assert half[1].eq(1).all()


STAGES: dict[str, dict[str, Any]] = {
    "momentum by stage": {"optimizer": momentum_by_stage(sgd)},
    "rates by delay": {"optimizer": sgd, "lr_scheduler": lr_by_delay(50, lambda n: 1 / (1 + n))},
    "both, of the user": {
        "optimizer": lambda p, *, delay: torch.optim.SGD(p, lr=0.1 / (1 + delay), momentum=0.5),
        "lr_scheduler": lambda o, *, stage: torch.optim.lr_scheduler.LambdaLR(o, lambda n: 0.9**n * (1 + stage)),
    },
    "groups by name": {"optimizer": lambda p, *, named: torch.optim.AdamW(list(named), lr=0.01)},
}


@pytest.mark.sampled(3)
@pytest.mark.parametrize("case", STAGES)
@pytest.mark.parametrize("numbers", [(4, 2), (2, 4)])
@pytest.mark.parametrize("on_disk", [False, True])
def test_what_follows_the_place_is_that_of_the_new_place(
    case: str, numbers: tuple[int, int], on_disk: bool, tmp_path: Path
) -> None:
    """A checkpoint goes on at another K: options and rates are those that a pipeline of that K has after as many updates."""
    old, new = numbers

    def made(num_stages: int) -> dtrp.Pipeline:
        options: Any = {
            "method": "dtrp-1f1b",
            "num_microbatches": 1,
            "seed": 0,
            "loss_fn": cross_entropy,
            **STAGES[case],
        }
        return dtrp.Pipeline(network(), num_stages=num_stages, **options)

    pipe, twin, other = made(old), made(new), made(new)
    for x, y in minibatches(5):
        pipe.step(x, y)
        twin.step(x, y)
    for each in (pipe, twin):
        each.flush()
    if on_disk:
        pipe.save(tmp_path / "saved", portable=True)
        other.load(tmp_path / "saved")
    else:
        other.load_state_dict(pipe.state_dict())
    for a, b in zip(other.optimizers, twin.optimizers, strict=True):
        for mine, wanted in zip(a.param_groups, b.param_groups, strict=True):
            for option in wanted.keys() - {"params"}:
                assert mine[option] == wanted[option] or mine[option] == pytest.approx(wanted[option], rel=1e-12), (
                    option
                )
    for x, y in minibatches(2):
        other.step(x, y)
    other.flush()


@needs_muon
def test_the_command_line_takes_them(tmp_path: Path) -> None:
    from dtrp.cli import run

    words = [
        "train",
        *["--data", "digits", "--model", "mlp", "--stages", "3", "--num-microbatches", "1", "--epochs", "1"],
    ]
    words += ["--limit-train", "200", "--threads", "1"]
    own = "--optimizer muon --momentum-by-stage 0.98 --lr-by-delay 5 --warmup-by-delay --warmup-updates 2 --extrapolate 0.3"
    assert run([*words, *own.split(), "--prediction", "auto", "--out", str(tmp_path / "run")]) == 0
    for wrong in ("--momentum-by-stage 1", "--optimizer braking --momentum 0", "--extrapolate -1", "--lr-by-delay -1"):
        assert run([*words, *wrong.split(), "--out", str(tmp_path / "wrong")]) != 0
