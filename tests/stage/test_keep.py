"""What stages keep: as told, or as memory allows; and what they are going to hold, told beforehand."""

from __future__ import annotations

import itertools
from typing import Any

import oracles
import pytest
import torch
from helpers import adamw, minibatches, network, pipeline, sgd
from oracle_checks import check_against_oracle
from torch import Tensor, nn

import dtrp
from dtrp.measure.memory import Footprint, StageSizes, footprint, optimizer_bytes

ROOMY = 10**9


@pytest.mark.sampled(4)
@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("num_microbatches", [1, 3])
@pytest.mark.parametrize("name", oracles.ROWS)
def test_stages_that_keep_what_they_are_told_equal_the_equations(name: str, num_microbatches: int) -> None:
    keep = ["input", "graph", "input", "graph"]
    pipe = check_against_oracle(
        oracles.ROWS[name],
        dtrp.get_method(name),
        4,
        num_microbatches,
        "sgd",
        [minibatches(12), minibatches(5)],
        keep=keep,
    )
    assert list(pipe.keeps().values()) == (["graph"] * 4 if pipe.method.local else keep)


@pytest.mark.sampled(3)
@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", ["dtrp", "dtr", "fr", "pipedream", "spectrain", "bp"])
def test_auto_equals_the_equations_of_what_it_keeps(name: str) -> None:
    method = dtrp.get_method(name)
    roomy = check_against_oracle(
        oracles.ROWS[name], method, 4, 2, "adamw", [minibatches(10)], keep="auto", memory_limit_bytes=ROOMY
    )
    assert set(roomy.keeps().values()) == {"graph"}
    tight = max(
        footprint(method.keeping("input"), 4, k, 2, sizes_of(stage)).total for k, stage in enumerate(stages_of(roomy))
    )
    pipe = check_against_oracle(
        oracles.ROWS[name], method, 4, 2, "adamw", [minibatches(10)], keep="auto", memory_limit_bytes=int(tight)
    )
    if not method.flush:
        assert "input" in pipe.keeps().values()


def stages_of(pipe: dtrp.Pipeline) -> Any:
    return pipe._engine.stages


def sizes_of(stage: Any) -> StageSizes:
    memory = stage.memory()
    graph = max(stage._graph_bytes.values(), default=0)
    inputs = 16 * 5 * torch.empty(0).element_size()
    trained = sum(p.nbytes for p in stage.parameters)
    return StageSizes(memory["weights"], trained, optimizer_bytes(stage.optimizer), inputs, graph, inputs,
                      deferred=stage._deferred_bytes)  # fmt: skip


@pytest.mark.sampled(4)
@pytest.mark.parametrize(
    ("num_stages", "num_microbatches"),
    [
        sizes if sizes in ((1, 1), (1, 4), (2, 2), (4, 1), (4, 4)) else pytest.param(*sizes, marks=pytest.mark.full)
        for sizes in itertools.product((1, 2, 4), (1, 2, 4))
    ],
)
@pytest.mark.parametrize("name", dtrp.list_methods())
def test_the_footprint_is_what_a_run_holds(name: str, num_stages: int, num_microbatches: int) -> None:
    for keep in ("graph", "input"):
        pipe = pipeline(
            nn.Sequential(*(nn.Sequential(nn.Linear(5, 5), nn.Tanh()) for _ in range(8))),
            adamw,
            num_stages=num_stages,
            method=name,
            num_microbatches=num_microbatches,
            keep=keep,
        )
        batch = torch.randn(16 * num_microbatches, 5), torch.randint(5, (16 * num_microbatches,))
        pipe.step(*batch)
        pipe.flush()
        for stage in stages_of(pipe):  # the very first run is on a copy of the input, which its graph holds
            stage.stash_peak = stage.activations_peak = 0
        for _ in range(2 * 2 * num_stages + 4):
            pipe.step(*batch)
        pipe.flush()
        for k, (stage, memory) in enumerate(zip(stages_of(pipe), pipe.memory().values(), strict=True)):
            want = footprint(stage.method, num_stages, k, num_microbatches, sizes_of(stage))
            assert stage.activations_peak == want.stash + want.graph, (keep, k)
            assert memory["optimizer"] == want.optimizer
            assert memory["predicted"] == want.predicted
            assert memory["weights"] == want.weights


@pytest.mark.parametrize(
    "make",
    [
        sgd,
        adamw,
        lambda p: torch.optim.SGD(p, lr=0.1),
        lambda p: torch.optim.Adam(p, lr=torch.tensor(0.1), amsgrad=True),
        lambda p: torch.optim.NAdam(p),
        lambda p: torch.optim.Adagrad(p),
        lambda p: torch.optim.RMSprop(p, momentum=0.9, centered=True),
        lambda p: torch.optim.AdamW([{"params": p[:1], "lr": 0.1}, {"params": p[1:]}], foreach=True),
    ],
)
def test_the_optimizers_state_is_known_before_it_is_there(make: Any) -> None:
    model = nn.Linear(30, 40)
    optimizer = make(list(model.parameters()))
    known = optimizer_bytes(optimizer)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    held = sum(t.nbytes for s in optimizer.state.values() for t in s.values() if isinstance(t, torch.Tensor))
    assert known == held == optimizer_bytes(optimizer)


def run(limit: int, method: str = "dtrp", num_stages: int = 4, num_microbatches: int = 1) -> dtrp.Pipeline:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(64, 64), nn.Tanh()) for _ in range(8)))
    pipe = pipeline(
        model, sgd, num_stages=num_stages, method=method, keep="auto", memory_limit_bytes=limit,
        num_microbatches=num_microbatches,
    )  # fmt: skip
    for _ in range(20):
        pipe.step(torch.randn(32, 64), torch.randint(64, (32,)))
    pipe.flush()
    return pipe


@pytest.mark.parametrize("method", ["dtrp", "fdg", "pipedream", "dtrp-1f1b"])
def test_auto_stays_under_the_limit_and_keeps_graphs_where_they_fit(method: str) -> None:
    kept = []
    for limit in (1_000_000, 480_000, 425_000) if method == "fdg" else (1_000_000, 400_000, 330_000):
        pipe = run(limit, method)
        for k, memory in pipe.memory().items():
            weights = memory["weights"] + memory["optimizer"] + memory["predicted"]
            gradients = sum(p.nbytes for p in pipe.stages[k].parameters())
            assert weights + gradients + pipe.activations_peak()[k] <= limit
        kept.append(list(pipe.keeps().values()).count("graph"))
    assert kept == sorted(kept, reverse=True)
    assert kept[0] == 4
    assert kept[-1] < 4


def test_a_limit_that_nothing_fits_says_by_how_much() -> None:
    with pytest.raises(
        dtrp.StageError, match=r"stage 0 needs [\d,]+ bytes at least .*[\d,]+ more than memory_limit_bytes=100,000"
    ):
        run(100_000)


def test_auto_decides_before_the_first_forward_and_draws_nothing() -> None:
    pipe = pipeline(network(), sgd, num_stages=4, method="dtrp", keep="auto", memory_limit_bytes=ROOMY)
    assert set(pipe.keeps().values()) == {None}
    state = torch.get_rng_state()
    pipe.step(*minibatches(1)[0])
    assert torch.equal(torch.get_rng_state(), state)
    assert pipe.keeps()[0] == "graph"


class Saved:
    """What a graph has saved, counted while it is there."""

    alive = 0

    def __init__(self) -> None:
        Saved.alive += 1

    def __del__(self) -> None:
        Saved.alive -= 1


class Counted(torch.autograd.Function):
    """The identity; the graphs that are there are counted at each forward with one."""

    most = 0

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() or ctx.needs_input_grad[0]:
            ctx.saved = Saved()
            Counted.most = max(Counted.most, Saved.alive)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]


class Counting(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = Counted.apply(x)
        return out


def test_auto_has_one_graph_at_a_time_while_it_decides() -> None:
    """Or its trial would need more than the limit that it is there for."""
    model = nn.Sequential(nn.Linear(4, 8), Counting(), nn.Linear(8, 4), nn.Linear(4, 3))
    pipe = dtrp.Pipeline(
        model,
        sgd,
        nn.functional.cross_entropy,
        cuts=[3],
        method="dtrp",
        num_microbatches=1,
        keep="auto",
        memory_limit_bytes=ROOMY,
    )
    Counted.most = 0
    pipe.step(torch.randn(4, 4), torch.randint(3, (4,)))
    assert pipe.keeps()[0] == "graph"
    assert Counted.most == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": "weights"}, "pass 'graph', 'input' or 'auto'"),
        ({"keep": ["graph"]}, "for each of the 2 stages"),
        ({"keep": "auto"}, "needs memory_limit_bytes"),
        ({"memory_limit_bytes": 100}, "pass that"),
        ({"keep": "auto", "memory_limit_bytes": 0}, "at least 1"),
        ({"keep": "auto", "memory_limit_bytes": "2GB"}, "at least 1"),
    ],
)
def test_wrong_use(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pipeline(network(), sgd, num_stages=2, **options)


def test_a_predictor_of_ones_own_has_a_copy_for_each_micro_batch() -> None:
    def still(parameters: Any, optimizer: Any, horizon: int, out: Any, **where: Any) -> None:
        for p, o in zip(parameters, out, strict=True):
            o.copy_(p)

    method = dtrp.get_method("dtrp", predict=still)
    pipe = pipeline(
        nn.Sequential(*(nn.Linear(5, 5) for _ in range(4))),
        sgd,
        num_stages=4,
        method=method,
        num_microbatches=4,
        keep="graph",
    )
    pipe.step(torch.randn(64, 5), torch.randint(5, (64,)))
    pipe.flush()
    for stage in stages_of(pipe):
        stage.stash_peak = 0
    for _ in range(9):
        pipe.step(torch.randn(64, 5), torch.randint(5, (64,)))
    for k, stage in enumerate(stages_of(pipe)):
        assert stage.stash_peak == footprint(stage.method, 4, k, 4, sizes_of(stage)).stash, k


@pytest.mark.parametrize("method", ["dtrp", "spectrain"])
def test_a_graph_that_saves_nothing_is_weighed_once_too(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Shift(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.zeros(4))

        def forward(self, x: Tensor) -> Tensor:
            return x + self.w

    weighed = []
    hooks = torch.autograd.graph.saved_tensors_hooks
    monkeypatch.setattr(torch.autograd.graph, "saved_tensors_hooks", lambda *args: weighed.append(1) or hooks(*args))
    pipe = dtrp.Pipeline(
        [Shift(), Shift(), Shift()], sgd, nn.functional.mse_loss, num_stages=3, method=method, num_microbatches=1
    )
    x = torch.ones(2, 4)
    for step in range(8):
        pipe.step(x, x)
        if step == 5:
            before = len(weighed)
    assert 3 <= before == len(weighed)


def test_a_footprint_counts_everything_once() -> None:
    sizes = StageSizes(weights=100, trained=90, optimizer=180, input=10, graph=50, output=20)
    # K=4, stage 1: d=2, lead 4, backward first: 4 inputs wait, and one of them is in its B with a graph.
    assert footprint(dtrp.get_method("dtrp"), 4, 1, 1, sizes) == Footprint(
        weights=100, optimizer=180, gradients=90, predicted=90, stash=40, graph=50, messages=60
    )
    # fdg, forward first: 5 graphs, each but the newest at a version that is gone; all five have their own copy.
    assert footprint(dtrp.get_method("fdg"), 4, 1, 1, sizes).stash == 5 * 60 + 5 * 90
    assert footprint(dtrp.get_method("bp"), 4, 0, 4, sizes).stash == 4 * 60
    assert footprint(dtrp.get_method("gpipe"), 4, 3, 8, sizes).stash == 8 * 60
