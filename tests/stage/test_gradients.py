"""Gradients that are too long or not finite: clipped, refused before the update, or left out."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import oracles
import pytest
import torch
from helpers import WIDTH, adamw, minibatches, network, pipeline, rate, scheduler, sgd
from launching import Server, run_ranks
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from dtrp import Pipeline, StageError
from dtrp.cli import run
from dtrp.splitting.stages import equal_cuts
from dtrp.stage.gradients import PendingNorms, gradient_norm

SMALL = ["train", "--data", "digits", "--model", "mlp", "--limit-train", "100", "--limit-test", "50", "--batch-size", "32",
         "--epochs", "1", "--threads", "1", "--lr", "0.01", "--stages", "2", "--num-microbatches", "1"]  # fmt: skip

no_events = pytest.mark.skipif(
    not hasattr(torch.cpu.current_stream(), "record_event"), reason="streams of the CPU have no events on this torch"
)


def tanh_network(layers: int = 4) -> nn.Sequential:
    """No dropout and no buffer: what a plain loop computes is plain to see."""
    parts = [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(layers - 1)]
    return nn.Sequential(*parts, nn.Linear(WIDTH, 3))


def plain(
    model: nn.Sequential, batches: list[tuple[Tensor, Tensor]], parts: int, max_norm: float, make: Any = sgd
) -> list[float]:
    """A plain loop with `torch.nn.utils.clip_grad_norm_`; the norms it found."""
    optimizer = make(list(model.parameters()))
    schedule = scheduler(optimizer)
    norms = []
    for x, y in batches:
        for part, target in zip(torch.tensor_split(x, parts), torch.tensor_split(y, parts), strict=True):
            (cross_entropy(model(part), target) * (len(part) / len(x))).backward()
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), max_norm)))
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return norms


# -- clipping -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [sgd, adamw])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("options", [{"method": "dtrp"}, {"method": "bp", "clip": "global"}])
def test_one_stage_clips_as_a_plain_loop(make: Any, dtype: torch.dtype, options: dict[str, Any]) -> None:
    torch.set_default_dtype(dtype)
    model, batches = tanh_network(), minibatches(12)
    want = copy.deepcopy(model)
    norms = plain(want, batches, 2, 0.3, make)
    assert min(norms) < 0.3 < max(norms), "some are clipped and some are not"
    pipe = pipeline(model, make, num_stages=1, num_microbatches=2, max_grad_norm=0.3, **options)
    assert pipe.grad_norm() is None
    for (x, y), norm in zip(batches, norms, strict=True):
        pipe.step(x, y)
        assert pipe.grad_norm() == pytest.approx(norm)
        assert pipe.grad_norms() == {0: pipe.grad_norm()}
    for p, q in zip(model.parameters(), want.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("method", ["bp", "gpipe"])
@pytest.mark.parametrize("num_stages", [2, 4])
@pytest.mark.usefixtures("float64")
def test_global_clips_as_the_unsplit_model(method: str, num_stages: int) -> None:
    model, batches = tanh_network(), minibatches(12)
    want = copy.deepcopy(model)
    norms = plain(want, batches, 3, 0.3)
    assert min(norms) < 0.3 < max(norms)
    pipe = pipeline(model, num_stages=num_stages, method=method, num_microbatches=3, max_grad_norm=0.3, clip="global")
    for x, y in batches:
        pipe.step(x, y)
    for p, q in zip(model.parameters(), want.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("method", ["bp", "dtrp", "fdg", "adl", "spectrain", "dtr"])
@pytest.mark.usefixtures("float64")
def test_each_stage_clips_its_own_gradient(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batches, largest = network(), minibatches(8), 0.4
    cuts = equal_cuts(len(model), 3)
    stages = [model[a:b] for a, b in zip([0, *cuts], [*cuts, len(model)], strict=True)]
    pipe = pipeline(copy.deepcopy(model), num_stages=3, method=method, num_microbatches=2, max_grad_norm=largest)
    scales: list[float] = []
    want = oracles.train(
        stages, [batches], cross_entropy, oracles.ROWS[method], oracles.Sgd(decay=0.01), rate, pipe.rng, 2,
        clip=lambda grads: _scale(grads, largest, scales),
    )  # fmt: skip
    assert min(scales) < 1 == max(scales), "some are clipped and some are not"
    for x, y in batches:
        pipe.step(x, y)
    pipe.flush()
    for module, weights in zip(pipe.stages, want.weights, strict=True):
        for (_, p), w in zip(module.named_parameters(), weights.values(), strict=True):
            torch.testing.assert_close(p.detach(), w, rtol=1e-10, atol=1e-12)


def _scale(grads: dict[str, Tensor], largest: float, scales: list[float]) -> dict[str, Tensor]:
    norm = math.sqrt(sum(float((g * g).sum()) for g in grads.values()))
    scales.append(min(1.0, largest / (norm + 1e-6)))
    return {name: g * scales[-1] for name, g in grads.items()}


def test_sparse_gradients_are_clipped_too() -> None:
    def model() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Embedding(7, WIDTH, sparse=True), nn.Linear(WIDTH, 3))

    def plain_sgd(params: list[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.SGD(params, lr=0.5)

    x, y = torch.tensor([1, 1, 3, 6]), torch.tensor([0, 1, 2, 0])
    one, two = model(), model()
    pipe = Pipeline(one, plain_sgd, cross_entropy, num_stages=1, method="bp", max_grad_norm=0.1, num_microbatches=1)
    pipe.step(x, y)
    two[0].sparse = False
    optimizer = plain_sgd(list(two.parameters()))
    cross_entropy(two(x), y).backward()
    assert nn.utils.clip_grad_norm_(two.parameters(), 0.1) > 0.1
    optimizer.step()
    for p, q in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(p, q)


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        ({"max_grad_norm": 0}, r"max_grad_norm=0: pass a finite number above 0"),
        ({"max_grad_norm": -1.0}, r"max_grad_norm=-1.0: pass"),
        ({"max_grad_norm": math.inf}, r"max_grad_norm=inf: pass"),
        ({"max_grad_norm": math.nan}, r"max_grad_norm=nan: pass"),
        ({"max_grad_norm": True}, r"max_grad_norm=True: pass"),
        ({"max_grad_norm": "1"}, r"max_grad_norm='1': pass"),
        ({"clip": "all"}, r"clip='all': choose 'stage' or 'global'"),
        ({"clip": "global", "method": "bp"}, r"clip='global' without max_grad_norm"),
        ({"clip": "global", "max_grad_norm": 1.0}, r"clip='global' with method='dtrp'.*pass clip='stage', or a method"),
        (
            {"clip": "global", "max_grad_norm": 1.0, "method": "dgl"},
            r"clip='global' with method='dgl': its stages update",
        ),
        ({"on_nonfinite": "ignore"}, r"on_nonfinite='ignore': choose 'stop' or 'skip'"),
    ],
)
def test_rules_that_mean_nothing(options: dict[str, Any], rule: str) -> None:
    with pytest.raises(ValueError, match=rule):
        Pipeline(tanh_network(), sgd, cross_entropy, **options)


# -- what is not finite -----------------------------------------------------------------------------------------


class Spoils(nn.Module):
    """Passes its input on; the gradient of its weight is what ``at`` says at some backwards, and its input's is untouched."""

    def __init__(self, at: dict[int, float]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.at, self.calls = at, 0

        def spoil(grad: Tensor) -> Tensor:
            self.calls += 1
            return torch.full_like(grad, self.at.get(self.calls - 1, 0.0))

        self._spoil = spoil

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight * 1
        if w.requires_grad:
            w.register_hook(self._spoil)
        return x + w


def spoiled(at: dict[int, float]) -> nn.Sequential:
    torch.manual_seed(0)
    model = tanh_network(3)
    return nn.Sequential(model[0], nn.Sequential(Spoils(at), model[1]), model[2])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("method", ["bp", "dtrp", "fdg"])
def test_a_gradient_that_is_not_finite_stops_before_the_update(method: str, value: float) -> None:
    model = spoiled({3: value})
    pipe = pipeline(model, num_stages=3, method=method)
    history = []
    with pytest.raises(
        StageError, match=r"stage 1, update \(mini-batch 3\): FloatingPointError: the gradient of"
    ) as caught:
        for x, y in minibatches(8):
            history.append([p.clone() for p in model[1].parameters()])
            pipe.step(x, y)
        pipe.flush()
    assert (caught.value.stage, caught.value.minibatch) == (1, 3)
    assert isinstance(caught.value.__cause__, FloatingPointError)
    assert f"(1.0.weight: {value})" in str(caught.value)
    for p, q in zip(model[1].parameters(), history[-1], strict=True):
        assert torch.equal(p, q)


def not_waited_for(pipe: Any) -> Any:
    """Treat the CPU as an accelerator, whose answers are heard later."""
    for stage in pipe._engine.stages:
        stage.updates._at_once = False
    pipe._engine._losses._at_once = False
    return pipe


@no_events
@pytest.mark.parametrize("steps", [4, 5, 9])
@pytest.mark.parametrize("method", ["bp", "gpipe", "dtrp", "dtrp-1f1b", "spectrain", "fdg"])
def test_where_nothing_waits_for_it_the_same_is_said_later(method: str, steps: int) -> None:
    """At the next step, or where there is none, by what would keep the spoiled weights."""
    model = spoiled({3: math.nan})
    pipe = not_waited_for(pipeline(model, num_stages=3, method=method))
    with pytest.raises(StageError, match=r"the gradient of mini-batch 3 at stage 1 is not finite") as caught:
        for x, y in minibatches(steps):
            pipe.step(x, y)
        pipe.flush()
    assert (caught.value.stage, caught.value.minibatch) == (1, 3)


@no_events
def test_where_nothing_waits_for_it_nothing_is_saved_of_it(tmp_path: Path) -> None:
    pipe = not_waited_for(pipeline(spoiled({3: math.nan}), num_stages=3, method="bp"))
    for x, y in minibatches(4):
        pipe.step(x, y)
    with pytest.raises(StageError, match=r"the gradient of mini-batch 3 at stage 1 is not finite"):
        pipe.save(tmp_path / "save")
    assert not (tmp_path / "save").exists()


@no_events
def test_where_nothing_waits_a_loss_is_named_before_the_gradients_that_it_spoils() -> None:
    pipe = not_waited_for(pipeline(tanh_network(3), num_stages=3, method="dtrp"))
    with pytest.raises(StageError, match=r"the loss of mini-batch 3 is nan"):
        for i, (x, y) in enumerate(minibatches(9)):
            pipe.step(x * math.nan if i == 3 else x, y)


@no_events
@pytest.mark.parametrize("sparse", [False, True])
def test_where_nothing_waits_a_gradient_without_entries_is_finite(sparse: bool) -> None:
    gradient = torch.empty(0)
    if sparse:  # of an embedding that no sample has used
        gradient = torch.sparse_coo_tensor(torch.empty(1, 0), torch.empty(0), (3,), check_invariants=True)
    unseen = PendingNorms()
    unseen.add(0, [gradient, None, torch.ones(2)], torch.device("cpu"))
    unseen.add(1, [gradient], torch.device("cpu"))
    unseen.add(2, [gradient, torch.tensor([1.0, -math.inf])], torch.device("cpu"))
    assert unseen.first_bad() == 2


def test_a_norm_that_leaves_its_dtype_is_no_gradient_that_does() -> None:
    huge = torch.full((4,), 1e30)
    assert float(gradient_norm([huge, None])) == pytest.approx(2e30)
    assert math.isinf(float(gradient_norm([huge, torch.tensor([math.inf])])))
    assert float(gradient_norm([])) == 0.0


@pytest.mark.parametrize("num_stages", [1, 3])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_bp_leaves_the_whole_update_out(num_stages: int, value: float) -> None:
    """As if the mini-batch had not been, but for the scheduler's step."""
    batches = minibatches(8)
    model, want = spoiled({0: value, 4: value}), spoiled({})
    pipe = pipeline(model, adamw, num_stages=num_stages, method="bp", on_nonfinite="skip")
    for x, y in batches:
        pipe.step(x, y)
    optimizer = adamw(list(want.parameters()))
    for n, (x, y) in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = rate(n)
        cross_entropy(want(x), y).backward()
        if n not in (0, 4):
            optimizer.step()
        optimizer.zero_grad()
    assert pipe.skipped_updates() == {k: [0, 4] for k in range(num_stages)}
    for p, q in zip(model.parameters(), want.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", ["dtrp", "dtr", "fdg", "pipedream", "spectrain"])
def test_a_stage_leaves_out_its_own_update(method: str) -> None:
    """The weights' gradient of stage 1 alone is spoiled: it alone leaves two updates out, and the delays are as ever."""
    batches = minibatches(9)
    pipes = [
        pipeline(spoiled(at), num_stages=3, method=method, on_nonfinite="skip")
        for at in ({2: math.inf, 5: math.nan}, {})
    ]
    seen: list[list[Tensor]] = []
    for pipe in pipes:
        for x, y in batches:
            before = [p.clone() for p in pipe.stages[1].parameters()]
            state = copy.deepcopy(pipe.optimizers[1].state_dict()["state"])  # type: ignore[union-attr]
            skipped = len(pipe.skipped_updates()[1])
            pipe.step(x, y)
            if len(pipe.skipped_updates()[1]) > skipped:
                seen.append(before)
                assert all(torch.equal(p, q) for p, q in zip(pipe.stages[1].parameters(), before, strict=True))
                after = pipe.optimizers[1].state_dict()["state"]  # type: ignore[union-attr]
                for number, entry in state.items():
                    assert torch.equal(entry["momentum_buffer"], after[number]["momentum_buffer"])
        pipe.flush()
    assert len(seen) == 2
    assert pipes[0].skipped_updates() == {0: [], 1: [2, 5], 2: []}
    assert pipes[0].delays() == pipes[1].delays()
    rates = [[optimizer.param_groups[0]["lr"] for optimizer in pipe.optimizers if optimizer] for pipe in pipes]
    assert rates[0] == rates[1], "the scheduler goes on"
    assert all(torch.isfinite(p).all() for p in pipes[0].stages[1].parameters())


@pytest.mark.parametrize("method", ["bp", "gpipe", "dtrp", "fdg", "spectrain"])
def test_a_loss_that_is_not_finite_is_left_out_everywhere(method: str) -> None:
    factors = iter([1.0] * 6 + [math.nan, 1.0] + [1.0] * 8)  # a micro-batch of mini-batch 3
    model = network()
    pipe = Pipeline(
        model, sgd, lambda out, y: cross_entropy(out, y) + next(factors) - 1, num_stages=3, method=method,
        num_microbatches=2, on_nonfinite="skip",
    )  # fmt: skip
    losses = [pipe.step(x, y) for x, y in minibatches(8)]
    pipe.flush()
    assert [n for n, loss in enumerate(losses) if not torch.isfinite(loss)] == [3]
    assert pipe.skipped_updates() == {0: [3], 1: [3], 2: [3]}
    assert all(torch.isfinite(t).all() for t in model.state_dict().values())


# -- both engines -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


@pytest.mark.full
@pytest.mark.sampled(2)
@pytest.mark.parametrize("options", [{"method": "dtrp"}, {"method": "bp", "clip": "global", "max_grad_norm": 1.0}])
def test_every_rank_hears_whose_gradient_it_was(options: dict[str, Any], server: Server, tmp_path: Path) -> None:
    for outcome in run_ranks(server, tmp_path, 3, "nonfinite_gradient", 1, options):
        assert outcome.returncode == 0, outcome.err
    for rank in range(3):
        stage, minibatch, cause, text = json.loads((tmp_path / f"heard{rank}.json").read_text())
        assert (stage, minibatch, cause) == (1, 4, "FloatingPointError")
        assert text.startswith("the gradient of mini-batch 4 at stage 1 is not finite")


# -- the command line -----------------------------------------------------------------------------------------------


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def trained(name: str, *options: str) -> float:
        assert run([*SMALL, *options, "--out", str(tmp_path / name)]) == 0, capsys.readouterr().err
        loss: float = metrics(tmp_path / name)[0]["test_loss"]
        return loss

    free = trained("free")
    assert trained("tight", "--max-grad-norm", "0.001") > free, "hardly moves"
    assert trained("loose", "--max-grad-norm", "1e9") == free
    assert trained("global", "--method", "bp", "--max-grad-norm", "0.5", "--clip", "global") != free


def test_a_run_goes_wrong_or_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoil(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
        calls = iter(range(1000))
        return lambda out, y, **how: loss(out, y, **how) * (math.inf if next(calls) == 2 else 1)

    monkeypatch.setattr("dtrp.train.build.cross_entropy", spoil(cross_entropy))
    assert run([*SMALL, "--out", str(tmp_path / "stop")]) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert error.startswith("dtrp: the loss of mini-batch 2 is inf;")
    assert "stage 1" in error
    assert not (tmp_path / "stop").exists()
    monkeypatch.setattr("dtrp.train.build.cross_entropy", spoil(cross_entropy))
    assert run([*SMALL, "--on-nonfinite", "skip", "--out", str(tmp_path / "skip")]) == 0
    assert "updates left out, their gradient not being finite: 1 at stage 0, 1 at stage 1" in capsys.readouterr().out
    summary = json.loads((tmp_path / "skip" / "summary.json").read_text())
    assert [stage["skipped_updates"] for stage in summary["stages"]] == [[2], [2]]
    assert math.isfinite(metrics(tmp_path / "skip")[0]["train_loss"])


@pytest.mark.parametrize(
    ("options", "answer"),
    [
        (["--max-grad-norm", "0"], "--max-grad-norm 0.0: a finite number above 0"),
        (["--max-grad-norm", "nan"], "--max-grad-norm nan: a finite number above 0"),
        (["--clip", "global"], "--clip global without --max-grad-norm"),
        (["--clip", "global", "--max-grad-norm", "1"], "clip='global' with method='dtrp'"),
        (["--clip", "each"], "unknown clip 'each'"),
        (["--on-nonfinite", "skipp"], "did you mean 'skip'"),
    ],
)
def test_mistakes(options: list[str], answer: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*SMALL, *options]) == 2
    error = capsys.readouterr().err
    assert answer in error
    assert len(error.splitlines()) == 1
