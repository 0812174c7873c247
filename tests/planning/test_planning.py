"""Cuts, the simulator, plans and their files."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import random
import re
import statistics
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import clone, network, pipeline, sgd
from split_models import Residual, rows
from torch import Tensor, nn
from tree_models import TREES

import dtrp
from dtrp.cli import run
from dtrp.cli.planning import what_next
from dtrp.planning import Plan, PlanError, Profiler, balance, simulate
from dtrp.planning.choose import plan
from dtrp.planning.link_probe import link_speed
from dtrp.planning.plan_file import Choice
from dtrp.planning.search import frontier, larger_batches, lognormal
from dtrp.planning.trial import TrialSettings, try_in_turns
from dtrp.planning.verdict import Comparison
from dtrp.tensors.nbytes import value_bytes
from dtrp.train import TrainConfig, Trainer

# -- cuts -----------------------------------------------------------------------------------------------------


def slowest(costs: list[float], last: list[float], cuts: tuple[int, ...]) -> float:
    bounds = [0, *cuts, len(costs)]
    stages = list(itertools.pairwise(bounds))
    return max(math.fsum((last if end == len(costs) else costs)[first:end]) for first, end in stages)


def fits(memory: list[float], limit: float, cuts: tuple[int, ...]) -> bool:
    return all(math.fsum(memory[first:end]) <= limit for first, end in itertools.pairwise([0, *cuts, len(memory)]))


@pytest.mark.parametrize("seed", range(200))
def test_cuts_are_as_good_as_the_best_of_all(seed: int) -> None:
    draw = random.Random(seed)
    num = draw.randint(1, 11)
    workers = draw.randint(1, min(6, num))
    costs = [float(draw.choice([0, draw.randint(0, 9), draw.randint(0, 1000)])) for _ in range(num)]
    last = [cost * draw.choice([0.5, 0.75, 1.0]) for cost in costs] if seed % 2 else costs
    memory = [float(draw.randint(0, 50)) for _ in range(num)]
    every = list(itertools.combinations(range(1, num), workers - 1))
    cuts = balance(costs, workers, last_costs=last if seed % 2 else None)
    assert cuts == sorted(set(cuts))
    assert slowest(costs, last, tuple(cuts)) == min(slowest(costs, last, other) for other in every)
    limit = sum(memory) / workers * draw.uniform(0.8, 2.0)
    fitting = [other for other in every if fits(memory, limit, other)]
    if fitting:
        cuts = balance(costs, workers, last_costs=last, memory=memory, memory_limit_bytes=limit)
        assert fits(memory, limit, tuple(cuts))
        assert slowest(costs, last, tuple(cuts)) == min(slowest(costs, last, other) for other in fitting)
    else:
        with pytest.raises(PlanError, match="too many") as caught:
            balance(costs, workers, last_costs=last, memory=memory, memory_limit_bytes=limit)
        least = min(max(math.fsum(memory[a:b]) for a, b in itertools.pairwise([0, *o, num])) for o in every)
        assert f"memory_limit_bytes>={math.ceil(least)}," in str(caught.value)
        balance(costs, workers, memory=memory, memory_limit_bytes=math.ceil(least))


def test_layers_of_no_cost_and_one_heavier_than_all_others() -> None:
    assert len(balance([0, 0, 0, 0], 3)) == 2
    assert balance([1, 1, 100, 1, 1], 3) == [2, 3]
    assert balance([0.1] * 9, 3) == [3, 6], "of equally slow ones, the even cuts"
    assert balance([5], 1) == []


def test_memory_may_depend_on_the_stage() -> None:
    cuts = balance(
        [1, 1, 1, 1], 2, memory=lambda first, end, stage: (end - first) * (3 - 2 * stage), memory_limit_bytes=3
    )
    assert cuts == [1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1, -1], 2), r"costs\[1\]=-1: pass numbers that are finite and at least 0"),
        (([1, math.nan], 2), r"costs\[1\]=nan"),
        (([1, math.inf], 2), r"costs\[1\]=inf"),
        (([1e300] * 3, 2), "pass smaller numbers"),
        (([1, "2"], 2), r"costs\[1\]='2'"),
        (([1, 2], 3), "pass num_workers<=2"),
        (([1, 2], 0), "whole number of at least 1"),
        (([1, 2], 1.5), "whole number of at least 1"),
    ],
)
def test_wrong_costs(arguments: Any, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        balance(*arguments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"last_costs": [1]}, "last_costs has 1 values and costs has 2"),
        ({"memory": [1, 2]}, "memory without memory_limit_bytes"),
        ({"memory_limit_bytes": 1}, "memory_limit_bytes without memory"),
        ({"memory": [1, 2], "memory_limit_bytes": math.nan}, "number of bytes"),
        ({"memory": [1, -2], "memory_limit_bytes": 1}, r"memory\[1\]=-2"),
    ],
)
def test_wrong_memory(options: Any, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        balance([1, 2], 2, **options)


# -- the simulator --------------------------------------------------------------------------------------------

F, B = 1.0, 2.0


def slot(method: Any, num_stages: int, latency: float = 0.0, **options: Any) -> float:
    options = {"num_minibatches": 25 * num_stages, "forward_s": F, "backward_s": B, "latency_s": latency, **options}
    return simulate(method, num_stages=num_stages, **options).minibatch_s


@pytest.mark.parametrize("num_stages", [2, 3, 4, 8])
def test_the_closed_forms_of_an_even_split(num_stages: int) -> None:
    assert slot("bp", 1) == F + B
    for a in (1, 2, 4, 8):
        want = (F + B) * (a + num_stages - 1)
        assert slot("bp", num_stages, num_microbatches=a) == want
        assert slot("gpipe", num_stages, num_microbatches=a) == want
    for method in ("fdg", "adl", "ddg", "pipedream", "spectrain"):
        assert slot(method, num_stages) == F + B
    for method in ("dtrp", "dtr", "fr", "dtrp-1f1b"):
        assert slot(method, num_stages) == 2 * F + B
    a = 4
    assert slot("dtrp", num_stages, num_microbatches=a) == a * (2 * F + B)


@pytest.mark.parametrize(
    ("ahead", "backward_first", "want"),
    [
        (1, True, {4: (6, 7, 8, 10), 8: (6, 7, 8, 10)}),
        (1, False, {4: (4, 4, 14 / 3, 6), 8: (4, 4, 34 / 7, 46 / 7)}),
        (2, True, {4: (4, 4, 4, 5), 8: (4, 4, 4, 5)}),
        (2, False, {4: (4, 4, 4, 4), 8: (4, 4, 4, 4)}),
    ],
)
def test_what_a_lead_buys(ahead: float, backward_first: bool, want: dict[int, tuple[float, ...]]) -> None:
    method = dtrp.get_method("dtrp", ahead=ahead, backward_first=backward_first)
    for num_stages, times in want.items():
        for latency, expected in zip((0, 0.5, 1, 2), times, strict=True):
            assert slot(method, num_stages, latency) == pytest.approx(expected, rel=1e-12)


def test_what_a_lead_buys_where_graphs_are_kept() -> None:
    """The dependency around the pipeline is 1F1B's: K slots take K(F+B) and 2(K-1) hops."""
    for num_stages in (4, 8):
        for latency in (0.5, 1, 2):
            want = F + B + 2 * (num_stages - 1) / num_stages * latency
            assert slot(dtrp.get_method("fdg", ahead=1), num_stages, latency) == pytest.approx(want, rel=1e-12)
        assert slot("fdg", num_stages, 1.0) == F + B


@pytest.mark.parametrize("num_microbatches", [1, 3, [2, 1, 3, 3, 1, 2, 2, 3, 1, 2]])
@pytest.mark.parametrize("method", dtrp.list_methods())
def test_it_is_the_schedule(method: str, num_microbatches: Any) -> None:
    schedule = dtrp.Schedule.build(method, 4, 10, num_microbatches)
    simulation = simulate(
        method, num_stages=4, num_minibatches=10, num_microbatches=num_microbatches, forward_s=[1, 2, 1, 3],
        backward_s=2, update_s=0.5, latency_s=[0.25, 0.5, 0.1], nograd_forward_s=0.75,
    )  # fmt: skip
    assert simulation.peak_stash == schedule.peak_stash()
    assert simulation.delays == {k: Counter(delays) for k, delays in schedule.delays().items()}
    for k, actions in enumerate(schedule.stages):
        spans = [span for span in simulation.timeline if span.stage == k]
        assert [(span.kind, span.number) for span in spans] == [(action.kind, action.index) for action in actions]
        assert all(a.end_s <= b.start_s + 1e-12 for a, b in itertools.pairwise(spans)), "one thing at a time"
    ends = {(span.stage, span.kind, span.number): span.end_s for span in simulation.timeline}
    starts = {(span.stage, span.kind, span.number): span.start_s for span in simulation.timeline}
    hops = [0.25, 0.5, 0.1]
    for (k, kind, number), start in starts.items():
        if kind == "F" and k:
            assert start >= ends[k - 1, "F", number] + hops[k - 1] - 1e-12
        if kind == "B" and k < 3 and not schedule.local:
            assert ends[k, "B", number] >= ends[k + 1, "B", number] + hops[k] + 2 - 1e-12
    assert simulation.total_s == max(ends.values())


@pytest.mark.parametrize("latency", [0.0, 0.5, 5.0])
def test_stages_with_losses_of_their_own_hide_any_message(latency: float) -> None:
    assert slot("dgl", 4, latency) == F + B
    assert slot("dgl", 4, latency, backward_s=[2.0, 4.0, 2.0, 2.0]) == 5.0, "the slowest stage's"


def test_links_send_one_message_after_another() -> None:
    assert slot("fdg", 2, message_bytes=10.0, bandwidth_bytes_s=2.0) == pytest.approx((2 * (F + B) + 2 * 5.0) / 3)
    longer = dtrp.get_method("fdg", ahead=3)
    assert slot(longer, 2, message_bytes=10.0, bandwidth_bytes_s=2.0) == 5.0, "a message a slot, of 5 s"
    assert slot(longer, 2, message_bytes=10.0, bandwidth_bytes_s=5.0) == 3.0, "hidden"
    assert slot(longer, 3, message_bytes=[10.0, 10.0], bandwidth_bytes_s=[math.inf, 2.0]) == 5.0


def test_speeds_and_kept_graphs() -> None:
    assert slot("fdg", 3, speed=[1, 2, 1]) == 3.0
    assert slot("fdg", 3, speed=[1, 0.5, 1]) == 6.0
    assert slot("dtrp", 3, keep="graph") == 3.0
    assert slot("dtrp", 3, keep=["input", "graph", "graph"]) == 4.0
    assert slot("fdg", 3, keep="input") == 4.0
    assert slot("dtrp", 2, nograd_forward_s=0.5) == 3.5
    assert slot("dtrp", 2, predict_s=0.25) == 4.25
    assert slot("dtrp", 2, update_s=0.25) == 4.25


def test_times_may_be_drawn() -> None:
    def draw(random: random.Random) -> float:
        return random.uniform(0.5, 1.5)

    def again(seed: int) -> float:
        return simulate("fdg", num_stages=4, num_minibatches=200, forward_s=draw, backward_s=2, seed=seed).minibatch_s

    assert again(0) == again(0) != again(1)
    assert 3.0 < again(0) < 3.5
    constant = simulate("dtrp", num_stages=2, num_minibatches=50, forward_s=lambda _: 1.0, backward_s=2)
    assert constant.minibatch_s == pytest.approx(4.0)
    latency = simulate("fdg", num_stages=3, num_minibatches=60, forward_s=1, backward_s=2, latency_s=draw, seed=3)
    assert latency.minibatch_s == pytest.approx(3.0, rel=0.05)


def test_utilization_is_the_share_of_work() -> None:
    simulation = simulate("bp", num_stages=4, num_minibatches=10, num_microbatches=4, forward_s=1, backward_s=2)
    assert simulation.utilization == {k: pytest.approx(4 / 7) for k in range(4)}
    assert simulation.bubble == {k: pytest.approx(3 / 7) for k in range(4)}
    assert simulation.total_s == 10 * 21
    uneven = simulate("dtrp", num_stages=2, num_minibatches=40, forward_s=1, backward_s=[2, 1])
    assert uneven.utilization == {0: pytest.approx(1.0), 1: pytest.approx(0.5)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"forward_s": -1}, "forward_s=-1"),
        ({"forward_s": math.nan}, "forward_s=nan"),
        ({"forward_s": [1, 2]}, "forward_s has 2 values; pass one, or 3, one a stage"),
        ({"latency_s": [1]}, "latency_s has 1 values; pass one, or 2, one a hop"),
        ({"speed": 0}, "speed=0: pass a number above 0"),
        ({"num_stages": 0}, "num_stages=0"),
        ({"num_minibatches": 0}, "num_minibatches=0"),
        ({"num_microbatches": 0}, "num_microbatches=0"),
        ({"num_microbatches": 2.5}, "num_microbatches=2.5"),
        ({"num_microbatches": [1]}, "one for each of the num_minibatches=9"),
        ({"keep": "all"}, "keep='all'"),
        ({"bandwidth_bytes_s": 0}, "bandwidth_bytes_s=0"),
    ],
)
def test_wrong_times(options: dict[str, Any], message: str) -> None:
    options = {"num_stages": 3, "num_minibatches": 9, "forward_s": 1.0, "backward_s": 2.0, **options}
    with pytest.raises(PlanError, match=message):
        simulate("dtrp", **options)


@pytest.mark.full
def test_a_thousand_stages_in_twenty_seconds() -> None:
    begin = time.perf_counter()
    simulation = simulate("dtrp", num_stages=1024, num_minibatches=4096, forward_s=1, backward_s=2, latency_s=0.1)
    took = time.perf_counter() - begin
    assert simulation.minibatch_s == 4.0
    assert took < 20


# -- profiles -------------------------------------------------------------------------------------------------


def batch(size: int = 16) -> tuple[Tensor, Tensor]:
    return torch.randn(size, 5), torch.randint(3, (size,))


def quick(model: Any, **options: Any) -> Plan:
    options = {"num_workers": 2, "latency_s": 0.0, "neighbours": 0, "repeats": 2, "optimizer": sgd, **options}
    return plan(model, batch(), nn.functional.cross_entropy, **options)


def test_a_profile_is_what_the_engine_holds_and_leaves_the_model_alone() -> None:
    model = network()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    example = batch()
    state = torch.get_rng_state()
    profiler = Profiler(model, example, nn.functional.cross_entropy, optimizer=sgd, predict="rollout", repeats=2)
    profile = profiler.at(16)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    pipe = pipeline(model, sgd, num_stages=4, method="dtrp")
    for _ in range(12):
        pipe.step(*batch())
    pipe.flush()
    for k, stage in enumerate(pipe._engine.stages):
        sizes = profile.stage(2 * k, 2 * k + 2).sizes
        memory = pipe.memory()[k]
        assert sizes.weights == memory["weights"]
        assert sizes.optimizer == memory["optimizer"]
        assert sizes.trained == sum(p.nbytes for p in stage.parameters)
        assert sizes.input == 16 * 5 * 4
        graph = max(stage._graph_bytes.values())
        assert abs(sizes.graph - graph) <= 0.05 * graph, "but for a clone of the input or the loss's few bytes"
    assert all(layer.forward_s > 0 and layer.backward_s > 0 and layer.nograd_forward_s > 0 for layer in profile.layers)
    whole = profile.whole
    assert whole.forward_s == pytest.approx(sum(profile.stage(k, k + 1).forward_s for k in range(8)))
    assert profiler.at(16) is profile
    assert profiler.at(40).samples == 40, "more samples than the example has"


@pytest.mark.parametrize("kind", ["siamese", "masks", "float masks", "dead ends", "in place", "frozen half"])
def test_layers_that_pass_on_trees_are_planned(kind: str) -> None:
    make, data = TREES[kind]
    layers, example = make(), (data(), torch.randint(3, (12,)))
    profile = Profiler(layers, example, nn.functional.cross_entropy, optimizer=sgd, repeats=1).at(12)
    value, sizes = example[0], []
    with torch.no_grad():
        for layer in layers:
            sizes.append(value_bytes(value))
            value = layer(clone(value))
    assert [layer.input_bytes for layer in profile.layers] == sizes
    assert [layer.output_bytes for layer in profile.layers[:-1]] == sizes[1:]
    assert Profiler(layers, example, nn.functional.cross_entropy, repeats=1).at(30).samples == 30
    made = plan(layers, example, nn.functional.cross_entropy, num_workers=2, optimizer=sgd, latency_s=0.0, neighbours=0,
                repeats=1, alternatives=False)  # fmt: skip
    pipe = pipeline(layers, plan=made)
    for _ in range(4):
        pipe.step(data(), torch.randint(3, (12,)))
    pipe.flush()
    assert [len(stage) for stage in pipe.stages] == [made.cuts[0], 4 - made.cuts[0]]


def test_the_stages_of_a_split_model_are_put_together_by_the_plan(tmp_path: Path) -> None:
    model, x, y = Residual(), rows(), torch.randint(3, (5,))
    names = [name for name, _ in model.named_parameters()]
    stages = dtrp.split(model, num_stages=5, example=x)
    made = plan(stages, (x, y), nn.functional.cross_entropy, num_workers=2, optimizer=sgd, latency_s=0.0, neighbours=0,
                repeats=1, alternatives=False)  # fmt: skip
    assert [*made.stages[0].layers, *made.stages[1].layers] == ["the beginning", *stages.points]
    made.save(tmp_path / "plan.json")
    pipe = dtrp.Pipeline(stages, sgd, nn.functional.cross_entropy, plan=tmp_path / "plan.json")
    assert pipe.num_stages == 2
    assert stages.cut(made.cuts).points == (stages.points[made.cuts[0] - 1],)
    for _ in range(4):
        pipe.step(x, y)
    pipe.flush()
    assert [name for stage in pipe.stages for name, _ in stage.named_parameters()] == names
    assert pipe.model_state_dict().keys() == model.state_dict().keys()
    model.load_state_dict(pipe.model_state_dict())


def test_stages_by_hand_are_put_together_too() -> None:
    model = nn.Sequential(*(nn.Linear(6, 6) for _ in range(5)))
    stages = dtrp.split(model, num_stages=4)
    assert stages.points == ("2", "3", "4")
    assert [list(stage._modules) for stage in stages.cut([2])] == [["0", "1", "2"], ["3", "4"]]
    assert stages.cut([1, 2, 3]) is stages
    assert dtrp.split(list(model)).cut([4]).points == ("4",)
    with pytest.raises(ValueError, match=r"cuts=\[4\]: 4 is out of range"):
        stages.cut([4])


def test_neighbours_that_cannot_be_sent_work_otherwise() -> None:
    class Local(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 2

    model = nn.Sequential(nn.Linear(5, 3), Local())
    profile = Profiler(model, batch(), nn.functional.cross_entropy, neighbours=1, repeats=1, warmup=0).at(16)
    assert profile.layers[1].trained_bytes == 0


@pytest.mark.parametrize(
    "example", [torch.ones(3), (torch.ones(3), torch.ones(2)), (torch.ones(0), torch.ones(0)), (1, 2)]
)
def test_an_example_is_a_batch(example: Any) -> None:
    with pytest.raises((PlanError, TypeError), match="example"):
        Profiler(network(), example, nn.functional.cross_entropy)


# -- plans ----------------------------------------------------------------------------------------------------


class Nap(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, seconds: float) -> Tensor:
        ctx.seconds = seconds
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        time.sleep(ctx.seconds)
        return grad, None


class Slow(nn.Linear):
    """As a Linear, which takes its time; its backward, as long."""

    def __init__(self, seconds: float) -> None:
        super().__init__(5, 5)
        self.seconds = seconds

    def forward(self, x: Tensor) -> Tensor:
        time.sleep(self.seconds)
        return Nap.apply(super().forward(x), self.seconds)


def test_cuts_follow_the_methods_true_costs() -> None:
    """Five layers of F = B = 4 ms: dtrp's first stage pays 2F+B each, so it gets two; then they are even."""
    model = nn.Sequential(*(Slow(0.004) for _ in range(5)))
    recomputing = plan(
        model, (torch.randn(8, 5), torch.randn(8, 5)), nn.functional.mse_loss, num_workers=2, method="dtrp", latency_s=0.0,
        neighbours=0, repeats=3, alternatives=False,
    )  # fmt: skip
    keeping = plan(
        model, (torch.randn(8, 5), torch.randn(8, 5)), nn.functional.mse_loss, num_workers=2, method="fdg", latency_s=0.0,
        neighbours=0, repeats=3, alternatives=False,
    )  # fmt: skip
    assert recomputing.cuts == (2,)
    assert keeping.cuts in ((2,), (3,))
    assert keeping.minibatch_s >= 0.9 * 0.024  # a busy machine sleeps longer
    assert keeping.speedup is not None
    assert keeping.speedup == pytest.approx(5 / 3, rel=0.4)


def test_a_plan_is_a_file_that_a_pipeline_takes(tmp_path: Path) -> None:
    model = network()
    made = quick(model, num_workers=3, method=dtrp.get_method("dtrp", lr_shrink=0.5), num_microbatches=2)
    path = tmp_path / "plan.json"
    made.save(path)
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]
    read = Plan.load(path)
    assert (read.cuts, read.keep, read.options, read.row) == (made.cuts, made.keep, {"lr_shrink": 0.5}, made.row)
    assert max(map(len, path.read_text().splitlines())) < 1000
    for given in (made, read, path, str(path), json.loads(path.read_text())):
        pipe = dtrp.Pipeline(model, sgd, nn.functional.cross_entropy, plan=given)
        assert pipe.num_stages == 3
        assert pipe.method == made.row
        assert pipe.num_microbatches == 2
        assert tuple(pipe.keeps().values()) == made.keep
        assert [len(stage) for stage in pipe.stages] == [
            b - a for a, b in itertools.pairwise([0, *made.cuts, len(model)])
        ]
    edited = dataclasses.replace(read, cuts=(2, 4))
    assert len(dtrp.Pipeline(model, sgd, nn.functional.cross_entropy, plan=edited).stages[0]) == 2
    as_list = dtrp.Pipeline(list(network()), sgd, nn.functional.cross_entropy, plan=dataclasses.replace(
        read, model=dtrp.planning.plan_file.describe_model(list(network()))))  # fmt: skip
    assert as_list.num_stages == 3


@pytest.mark.full
def test_the_lead_is_the_shortest_that_hides_the_links() -> None:
    model = nn.Sequential(*(Slow(0.004) for _ in range(4)))
    example = torch.randn(8, 5), torch.randn(8, 5)

    def lead_at(latency_s: float, method: Any = "dtrp") -> tuple[float, bool]:
        made = plan(model, example, nn.functional.mse_loss, num_workers=4, method=method, latency_s=latency_s,
                    neighbours=0, repeats=3, alternatives=False)  # fmt: skip
        order = "backward-first" if made.row.backward_first else "forward-first"
        own = [choice for choice in made.leads if (choice.ahead, choice.order) == (made.row.ahead, order)]
        assert bool(own) == isinstance(method, str), "the chosen one is in the table"
        delays = [choice.delay for choice in made.leads if choice not in own]
        assert delays == sorted(set(delays)), "a frontier: more delay only where it is faster"
        return made.row.ahead, made.row.backward_first

    assert lead_at(0.0)[0] < 2, "no latency: shorter than the method's own"
    assert lead_at(0.011)[0] > 1.0, "a hop of almost a slot"
    assert lead_at(0.0, dtrp.get_method("dtrp")) == (2, True), "a row that is given stays as it is"


def test_the_chosen_lead_is_in_the_table_that_it_was_chosen_from() -> None:
    @dataclasses.dataclass(eq=False)
    class Lead:
        delay: int
        minibatch_s: float

    chosen, faster, slower, longer = Lead(1, 1.01), Lead(1, 1.0), Lead(2, 1.5), Lead(3, 0.9)
    leads: Any = [chosen, faster, slower, longer]
    assert frontier(leads, leads[0]) == [faster, chosen, longer]
    assert frontier(leads, leads[1]) == [faster, longer]
    assert frontier([], leads[0]) == []


@pytest.mark.full
def test_graphs_are_kept_where_they_fit() -> None:
    model = network()
    free = quick(model, method="dtrp", keep="auto", choose_lead=False)
    assert free.keep == ("graph", "graph")
    assert quick(model, method="dtrp", choose_lead=False).keep == ("input", "graph")
    tight = quick(model, num_workers=4, method="dtrp", keep="auto", choose_lead=False, memory_limit_bytes=12_000)
    assert max(stage.memory_bytes for stage in tight.stages) <= 12_000
    with pytest.raises(
        PlanError, match=r"no cuts into 4 stages fit memory_limit_bytes=100: .* too many. Pass memory_limit"
    ):
        quick(model, num_workers=4, memory_limit_bytes=100)


@pytest.mark.full
def test_batch_compensation_takes_the_smallest_mini_batch_that_saturates() -> None:
    """Layers that take as long for 8 samples as for 64: throughput grows with the mini-batch up to the largest tried."""
    model = nn.Sequential(*(Slow(0.003) for _ in range(4)))
    example = torch.randn(8, 5), torch.randn(8, 5)
    made = plan(model, example, nn.functional.mse_loss, num_workers=2, method="dtrp", latency_s=0.0, neighbours=0,
                repeats=2, alternatives=False, compensate=True, max_batch_size=64, memory_limit_bytes=10**8)  # fmt: skip
    assert [choice.batch_size for choice in made.batches] == [8, 16, 32, 64]
    assert made.batch_size == 64
    assert made.lr_scale == 8.0
    assert made.warmup_updates > 0
    rates = [choice.samples_per_s for choice in made.batches]
    assert rates == sorted(rates)
    assert all(len(choice.utilization) == 2 for choice in made.batches)
    root = plan(model, example, nn.functional.mse_loss, num_workers=2, method="dtrp", latency_s=0.0, neighbours=0,
                repeats=1, alternatives=False, compensate=True, max_batch_size=32, lr_scaling="sqrt")  # fmt: skip
    assert root.batch_size == 8 or root.lr_scale == pytest.approx(math.sqrt(root.batch_size / 8))
    most = max(choice.memory_bytes for choice in root.batches)
    fdg = plan(model, example, nn.functional.mse_loss, num_workers=2, method="fdg", latency_s=0.0, neighbours=0, repeats=1,
               alternatives=False, choose_lead=False)  # fmt: skip
    assert most <= max(stage.memory_bytes for stage in fdg.stages), "within the memory of fdg at the base mini-batch"


@dataclasses.dataclass(frozen=True)
class KnownTimes:
    """A search whose times are known: an update of ``update`` ms, and a part of n samples in max(n, ``least``) ms."""

    least: float
    num_microbatches: int | None = None
    max_delay: int | None = None
    update: float = 4.0
    most: int = 64  # samples that fit

    def evaluate(self, row: dtrp.Method, size: int) -> SimpleNamespace:
        if size > self.most:
            raise PlanError("does not fit")
        parts = self.num_microbatches or 1
        seconds = self.update + parts * max(size / parts, self.least)
        return SimpleNamespace(size=size, num_microbatches=parts, minibatch_s=seconds, samples_per_s=size / seconds)

    def tried(self, each: SimpleNamespace) -> SimpleNamespace:
        return each

    def say(self, text: str) -> None: ...


@pytest.mark.parametrize(
    ("search", "want"),
    [
        (KnownTimes(8), [(8, 1), (16, 2), (32, 4), (64, 8)]),  # parts of the base cost nothing
        (KnownTimes(16), [(8, 1), (16, 1), (32, 2), (64, 4)]),  # parts of twice the base
        (KnownTimes(10**6), [(8, 1), (16, 1), (32, 1), (64, 1)]),
        (KnownTimes(8, num_microbatches=2), [(8, 2), (16, 2), (32, 2), (64, 2)]),
        (KnownTimes(8, max_delay=3), [(8, 1), (16, 1), (32, 1), (64, 1)]),  # which asks the search
        (KnownTimes(8, update=0.0), [(8, 1), (16, 2), (32, 4)]),  # twice twice as large brings nothing
        (KnownTimes(8, most=20), [(8, 1), (16, 2)]),
    ],
)
def test_a_larger_mini_batch_has_as_many_parts_as_cost_nothing(search: Any, want: list[tuple[int, int]]) -> None:
    found: Any = larger_batches(search, dtrp.get_method("dtrp"), 8, 64)
    assert [(each.size, each.num_microbatches) for each in found] == want
    with pytest.raises(PlanError, match="does not fit"):
        larger_batches(dataclasses.replace(search, most=4), dtrp.get_method("dtrp"), 8, 64)


def test_micro_batches_bound_the_delay() -> None:
    made = quick(network(), num_workers=4, method="fdg", max_delay=2, choose_lead=False)
    assert made.num_microbatches == 3, "6 / 3"
    with pytest.raises(PlanError, match="max_delay=0"):
        quick(network(), num_workers=4, method="fdg", max_delay=0, choose_lead=False)


def test_other_methods_and_whether_to() -> None:
    made = quick(network(), num_workers=2)
    assert [choice.method for choice in made.alternatives] == [
        "one worker", "gpipe", "bp", "pipedream", "fdg", "dtrp", "dtrp, equal cuts",
    ]  # fmt: skip
    assert all(choice.minibatch_s > 0 and choice.memory_bytes > 0 for choice in made.alternatives)
    assert {
        choice.num_microbatches for choice in made.alternatives if choice.method in ("pipedream", "fdg", "dtrp")
    } == {1}
    alone = quick(network(), num_workers=1)
    assert alone.cuts == ()
    assert "One worker" in alone.advice
    assert alone.verdict == "one worker"


@pytest.mark.full
def test_other_methods_are_given_the_micro_batches_of_the_plan() -> None:
    made = quick(network(), num_workers=2, num_microbatches=4, choose_lead=False)
    parts = {choice.method: choice.num_microbatches for choice in made.alternatives}
    assert {parts[name] for name in ("pipedream", "fdg", "dtrp", "dtrp, equal cuts")} == {4}
    assert parts["gpipe"] in (2, 4, 8), "the fastest of K, 2K, 4K"
    bound = quick(network(), num_workers=4, max_delay=2, choose_lead=False)
    assert {c.method: c.num_microbatches for c in bound.alternatives if c.method in ("pipedream", "fdg", "dtrp")} == {
        "pipedream": 2, "fdg": 3, "dtrp": 3,
    }  # fmt: skip


@pytest.mark.full
def test_what_kept_graphs_buy_is_told_by_the_same_plan_without_them() -> None:
    model = nn.Sequential(*(Slow(0.003) for _ in range(4)))
    kept = plan(model, (torch.randn(8, 5), torch.randn(8, 5)), nn.functional.mse_loss, num_workers=2, optimizer=sgd,
                latency_s=0.0, neighbours=0, repeats=3, num_microbatches=2, keep="auto")  # fmt: skip
    assert kept.keep == ("graph", "graph")
    (row,) = [choice for choice in kept.alternatives if choice.method == "dtrp, recomputing"]
    order = "backward-first" if kept.row.backward_first else "forward-first"
    same = (kept.cuts, kept.row.ahead, order, kept.num_microbatches, kept.batch_size)
    assert (row.cuts, row.ahead, row.order, row.num_microbatches, row.batch_size) == same
    assert row.minibatch_s > 1.1 * kept.minibatch_s or kept.cuts == (1,), "3/2 where the stages are even"
    assert row.memory_bytes < max(stage.memory_bytes for stage in kept.stages)
    for options in ({"keep": "graph"}, {"keep": "auto", "method": "fdg"}):
        made = quick(network(), **options)
        assert not [choice for choice in made.alternatives if choice.method.endswith(", recomputing")]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_workers": 0}, "num_workers=0"),
        ({"num_workers": 9}, "a number from 1 to 8"),
        ({"method": "dtpr"}, "did you mean"),
        ({"keep": "weights"}, "keep='weights'"),
        ({"latency_s": -1}, "latency_s=-1"),
        ({"latency_s": math.nan}, "latency_s=nan"),
        ({"bandwidth_bytes_s": 0}, "above 0"),
        ({"memory_limit_bytes": 0}, "at least 1"),
        ({"num_microbatches": 17}, "each needs one"),
        ({"num_microbatches": 0}, "at least 1"),
        ({"lr_scaling": "cubic"}, "choose one of"),
        ({"method": dtrp.get_method("dtrp", predict=lambda *a, **k: None)}, "holds predictors by name"),
        ({"method": dataclasses.replace(dtrp.get_method("dtrp"), name="mine")}, "no row of dtrp's"),
        ({"compensate": True, "max_batch_size": 8}, "max_batch_size=8 with an example of 16"),
        ({"num_workers": 4, "num_microbatches": 1, "max_delay": 1}, "leaves a delay of 5"),
        ({"neighbours": -1}, "neighbours=-1: pass a whole number of at least 0"),
    ],
)
def test_what_cannot_be_planned(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quick(network(), **options)


# -- verdicts -------------------------------------------------------------------------------------------------


class Clock:
    """In place of `time.perf_counter`: a millisecond passes from one look at it to the next, more or less.

    Args:
        scatter: of the logarithm of that millisecond.
        drift: part of itself by which it grows from each look to the next.
        seed: seed of the scatter.
    """

    def __init__(self, scatter: float, drift: float = 0.0, seed: int = 0) -> None:
        self.random, self.scatter = random.Random(seed), scatter
        self.tick, self.growth, self.now = 1e-3, 1 + drift, 0.0

    def __call__(self) -> float:
        self.tick *= self.growth
        self.now += self.tick * self.random.lognormvariate(0, self.scatter)
        return self.now


def choice(method: str, minibatch_s: float, spread: float | None = 0.02, **changes: Any) -> Choice:
    return Choice(**{
        "method": method, "ahead": 1.0, "order": "forward-first", "num_workers": 2, "num_microbatches": 1, "batch_size": 8,
        "cuts": (1,), "minibatch_s": minibatch_s, "samples_per_s": 8 / minibatch_s, "memory_bytes": 100, "delay": 1,
        "utilization": (1.0, 1.0), "spread": spread, **changes,
    })  # fmt: skip


def comparison(plan_s: float, one_worker_s: float, *others: Choice, **changes: Any) -> Comparison:
    return Comparison(**{
        "plan": choice("dtrp", plan_s), "one_worker": choice("one worker", one_worker_s), "others": others,
        "bottleneck": "the work is evenly split", "latency_scatter_s": 0.0, "memory_limit_bytes": math.inf, "repeats": 7,
        **changes,
    })  # fmt: skip


def test_a_verdict_names_the_fastest_row() -> None:
    verdict, advice = comparison(0.06, 0.1, choice("fdg", 0.055)).judge()
    assert verdict == "pipeline"
    assert advice == (
        "1.67 times as fast as one worker: 60 ms a mini-batch with 2 workers, 100 ms with one. "
        "The fastest row of the table is fdg, with 55 ms."
    )
    verdict, advice = comparison(0.06, 0.1, choice("fdg", 0.061), choice("gpipe", 0.0605, num_microbatches=4)).judge()
    assert "This plan is the fastest row of the table." in advice
    assert "gpipe with 4 micro-batches is as fast, without any delay: prefer it." in advice
    verdict, advice = comparison(0.12, 0.1, choice("fdg", 0.11)).judge()
    assert verdict == "one worker"
    assert advice.startswith("Do not pipeline this: 120 ms a mini-batch with 2 workers, 100 ms with one; the work is")
    assert advice.endswith("The fastest row of the table is one worker, with 100 ms.")
    too_large = choice("one worker", 0.1, memory_bytes=1000)
    verdict, advice = comparison(0.12, 0.1, one_worker=too_large, memory_limit_bytes=500).judge()
    assert verdict == "pipeline"
    assert advice.startswith("Slower than one worker would be (120 ms")
    assert advice.endswith("but that needs 1,000 bytes.")
    assert comparison(0.1, 0.1, plan=choice("bp", 0.1, num_workers=1)).judge().verdict == "one worker"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"plan": choice("dtrp", 0.06, 0.11)}, r"scatter too much to be compared: this plan by 11% \(.* at most 10%"),
        ({"one_worker": choice("one worker", 0.1, 0.3)}, r"one worker by 30% .* idle machine, or with more repeats than 7"),
        ({"others": [choice("bp", 0.06, 0.2), choice("fdg", 0.06, 0.5)]}, "compared: fdg by 50%; bp by 20% "),
        ({"plan": choice("dtrp", 0.06, None), "repeats": 3}, "3 rounds do not tell how .* with repeats of at least 4"),
        ({"one_worker": choice("one worker", 0.1, None)}, "do not tell how the times scatter"),
        ({"latency_scatter_s": 0.01}, "time of a message scatters by 10 ms, .* or pass the latency of your links"),
        ({"plan": dataclasses.replace(choice("dtrp", 0.06), minibatch_s=0.0)}, "too short to measure. Plan with larger"),
    ],
)  # fmt: skip
def test_there_is_no_verdict_from_noise(changes: dict[str, Any], reason: str) -> None:
    verdict, advice = comparison(0.06, 0.1, **changes).judge()
    assert verdict is None
    assert re.match(f"No verdict: .*{reason}", advice)
    assert "ms a mini-batch with 2 workers, 100 ms with one" in advice


def test_a_verdict_does_not_turn_into_its_opposite_within_the_spread() -> None:
    """Whatever the measured times, as long as they are within their spread of the true ones."""
    for true_speedup in (0.7, 0.9, 0.97, 1.0, 1.02, 1.1, 1.5):
        for spread in (0.01, 0.05, 0.1):
            rows = {
                comparison(
                    0.1, 0.1 * true_speedup,
                    plan=choice("dtrp", 0.1 * (1 + side * spread / 2), spread),
                    one_worker=choice("one worker", 0.1 * true_speedup * (1 - side * spread / 2), spread),
                ).judge().verdict
                for side in (-1, -0.5, 0, 0.5, 1)
            }  # fmt: skip
            assert not rows >= {"pipeline", "one worker"}


@pytest.mark.parametrize("seed", range(3))
def test_a_clock_of_noise_gives_no_verdict_and_times_of_their_size(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    monkeypatch.setattr(time, "perf_counter", Clock(2.5, seed=seed))
    made = quick(network(4), repeats=5, choose_lead=False)
    assert made.verdict is None
    assert "the times scatter too much to be compared" in made.advice
    rows = [made.choice, *made.alternatives]
    assert all(row.spread is not None for row in rows)
    for row in rows:
        used = sum(row.utilization) * row.minibatch_s
        assert 0.001 < row.minibatch_s < 10
        assert used > 0.1 * row.minibatch_s, "a share of work that is plausible, not 1e-14"


@pytest.mark.parametrize("seed", range(3))
def test_a_steady_clock_gives_the_same_verdict_again(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """A message takes a second, and everything else milliseconds, to within a few percent."""
    monkeypatch.setattr(time, "perf_counter", Clock(0.01, seed=seed))
    made = quick(network(4), repeats=4, choose_lead=False, latency_s=1.0)
    assert made.verdict == "one worker"
    assert made.advice.startswith("Do not pipeline this: ")
    assert made.fastest.method == "one worker"
    assert all(row.spread is not None and row.spread < 0.1 for row in (made.choice, *made.alternatives))


def test_rows_with_the_same_work_take_the_same_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "perf_counter", Clock(0.5))
    made = quick(network(4), method=dtrp.get_method("dtrp"), repeats=4)
    rows = {row.method: row for row in made.alternatives}
    (same,) = [row for name, row in rows.items() if name == "dtrp, equal cuts"]
    assert made.cuts != same.cuts or made.minibatch_s == same.minibatch_s
    assert made.cuts != rows["dtrp"].cuts or made.minibatch_s == rows["dtrp"].minibatch_s
    assert same.cuts != rows["dtrp"].cuts or same.minibatch_s == rows["dtrp"].minibatch_s


def test_what_is_measured_in_turns_grows_slower_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock by which the last step takes twice as long as the first."""
    profiler = Profiler(network(4), batch(), nn.functional.cross_entropy, optimizer=sgd, repeats=8)
    settings = [TrialSettings(dtrp.get_method(name), (2,), ("graph", "graph"), 1) for name in ("fdg", "fdg", "fdg")]
    counted = Clock(0.0)
    monkeypatch.setattr(time, "perf_counter", counted)
    try_in_turns(profiler, settings, 16)
    looks = counted.now / 1e-3
    drifting = Clock(0.0, drift=2 ** (1 / looks) - 1)
    monkeypatch.setattr(time, "perf_counter", drifting)
    times = [sum(stage.minibatch_s for stage in trials or ()) for trials in try_in_turns(profiler, settings, 16)]
    assert drifting.tick == pytest.approx(2e-3, rel=0.01)
    assert max(times) < 1.08 * min(times)


def test_stages_that_cannot_train_are_left_out_where_that_is_allowed() -> None:
    profiler = Profiler(
        network(4), batch(), nn.functional.cross_entropy, optimizer=lambda p: torch.optim.Adagrad(p), repeats=1
    )
    can = TrialSettings(dtrp.get_method("fdg"), (2,), ("graph", "graph"), 1)
    cannot = TrialSettings(dtrp.get_method("dtrp"), (2,), ("input", "graph"), 1)
    found = try_in_turns(profiler, [can, dataclasses.replace(cannot, optional=True)], 16)
    assert found[1] is None
    assert found[0] is not None
    assert [stage.spread for stage in found[0]] == [None, None], "a round tells no spread"
    with pytest.raises(TypeError, match="does not know the update rule of Adagrad"):
        try_in_turns(profiler, [can, cannot], 16)


def test_times_are_drawn_around_their_median_whatever_was_measured() -> None:
    for scatter, widest in ((None, 0.05), (0.0, 0.05), (0.1, 0.12), (40.0, 0.3), (1e9, 0.3)):
        drawn = lognormal(0.02, scatter)
        assert callable(drawn)
        times = [drawn(random.Random(seed)) for seed in range(2000)]
        low, median, high = statistics.quantiles(times, n=4)
        assert median == pytest.approx(0.02, rel=0.05)
        assert high - low < widest * median
    assert lognormal(0.0, 0.1) == 0.0


def test_a_plan_for_another_model_is_refused() -> None:
    made = quick(network())
    for other in (network(6), network().double(), nn.Sequential(*network())):
        with pytest.raises(
            PlanError, match=r"the plan is for a model with 8 layers \(block0..head\) and .* Plan again"
        ):
            dtrp.Pipeline(other, sgd, nn.functional.cross_entropy, plan=made)


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cuts": [1]}, r"cuts=\[1\] with a plan"),
        ({"num_stages": 2}, "num_stages=2 with a plan"),
        ({"keep": "graph"}, "keep='graph' with a plan"),
        ({"method": "fdg"}, r"method='fdg' with a plan for Method\(name='dtrp'"),
        ({"method": dtrp.get_method("dtrp", lr_shrink=0.5)}, "with a plan for Method"),
        ({"num_microbatches": 3}, "num_microbatches=3 with a plan for 1"),
    ],
)
def test_what_the_plan_says_is_said_once(options: dict[str, Any], message: str) -> None:
    model = network()
    with pytest.raises(ValueError, match=message):
        dtrp.Pipeline(model, sgd, nn.functional.cross_entropy, plan=quick(model), **options)


def test_files_that_are_no_plans(tmp_path: Path) -> None:
    good = json.loads(json.dumps({"dtrp_plan": 2, **dataclasses.asdict(quick(network()))}))
    path = tmp_path / "plan.json"
    for change, message in (
        ({"dtrp_plan": 3}, "format 3; this version of dtrp reads formats 1 to 2"),
        ({"dtrp_plan": "1"}, "format '1'"),
        ({"spread": -0.1}, "spread=-0.1: a number of at least 0, or null"),
        ({"verdict": "yes"}, "verdict='yes': one of pipeline, one worker, or null"),
        ({"cuts": [3, 2]}, "rising order"),
        ({"cuts": ["a"]}, "rising order"),
        ({"cuts": 3}, "is no plan"),
        ({"keep": ["input"]}, "for each of the 2 stages"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"num_microbatches": "2"}, "num_microbatches='2'"),
        ({"lr_scale": -1}, "lr_scale=-1"),
        ({"method": "dtpr"}, "did you mean"),
        ({"options": {"ahead": 0}}, "ahead=0"),
        ({"options": [1]}, "options"),
        ({"model": {}}, "fingerprint"),
        ({"stages": [1]}, "is no plan"),
        ({"stages": [{"layers": []}]}, "is no plan"),
        ({"colour": "red"}, "unknown entry 'colour'"),
    ):
        path.write_text(json.dumps({**good, **change}))
        with pytest.raises(PlanError, match=message):
            Plan.load(path)
    for text, message in (("{", "is no plan"), ("[]", "no entry 'dtrp_plan'"), ("\x00", "is no plan")):
        path.write_text(text)
        with pytest.raises(PlanError, match=message):
            Plan.load(path)
    without = dict(good)
    del without["cuts"]
    path.write_text(json.dumps(without))
    with pytest.raises(PlanError, match="no entry 'cuts'"):
        Plan.load(path)
    with pytest.raises(TypeError, match="plan is a int"):
        dtrp.Pipeline(network(), sgd, nn.functional.cross_entropy, plan=3)  # type: ignore[arg-type]


def test_layers_that_write_their_input_and_tied_ones() -> None:
    """Found in review."""
    inplace = nn.Sequential(
        nn.Linear(5, 5), nn.ReLU(inplace=True), nn.Linear(5, 5), nn.ReLU(inplace=True), nn.Linear(5, 3)
    )
    example = batch()
    x = example[0].clone()
    made = plan(inplace, example, nn.functional.cross_entropy, num_workers=2, latency_s=0.0, neighbours=0, repeats=1)
    assert torch.equal(example[0], x)
    assert len(made.cuts) == 1
    shared = nn.Linear(5, 5)
    tied = nn.Sequential(shared, nn.Tanh(), shared, nn.Tanh(), nn.Linear(5, 3))
    for workers in (2, 3):
        cuts = quick(tied, num_workers=workers).cuts
        assert all(cut > 2 for cut in cuts)
        dtrp.Pipeline(tied, sgd, nn.functional.cross_entropy, cuts=cuts, num_microbatches=1)
    with pytest.raises(PlanError, match="layers share tensors"):
        quick(tied, num_workers=4)


def test_frozen_layers_cost_what_they_do() -> None:
    model = nn.Sequential(*(nn.Sequential(nn.Linear(5, 5), nn.Tanh()) for _ in range(6)), nn.Linear(5, 3))
    for layer in model[:3]:
        layer.requires_grad_(False)
    profile = Profiler(model, batch(), nn.functional.cross_entropy, repeats=3).at(16)
    assert [layer.trains for layer in profile.layers] == [False] * 3 + [True] * 4
    assert all(layer.graph_bytes == 0 and not layer.saves_input for layer in profile.layers[:3])
    pipe = pipeline(model, sgd, cuts=[3], method="dtrp")
    for _ in range(6):
        pipe.step(*batch())
    assert profile.stage(0, 3).sizes.trains is False
    from dtrp.measure.memory import footprint

    held = footprint(dtrp.get_method("dtrp"), 2, 0, 1, profile.stage(0, 3).sizes)
    assert held.stash + held.graph == pipe.activations_peak()[0] == 0


def test_any_optimizer_where_nothing_is_predicted() -> None:
    for method in ("bp", "fdg"):
        said: list[str] = []
        made = quick(network(), method=method, optimizer=lambda p: torch.optim.Adagrad(p), progress=said.append)
        assert made.method == method
        assert "dtrp" not in {row.method for row in made.alternatives}
        assert "dtrp cannot train this model with this optimizer, and is left out" in said
    with pytest.raises(TypeError, match="does not know the update rule of Adagrad"):
        quick(network(), method="dtrp", optimizer=lambda p: torch.optim.Adagrad(p))


def test_a_slow_link_is_a_slot_and_does_not_distort_the_work() -> None:
    made = quick(network(), method="fdg", bandwidth_bytes_s=20_000.0)
    wire = 16 * 5 * 4 / 20_000
    assert all(stage.slot_s == pytest.approx(wire) for stage in made.stages)
    assert made.minibatch_s >= 0.99 * wire
    work = Profiler(network(), batch(), nn.functional.cross_entropy, optimizer=sgd).at(16).whole
    used = sum(stage.utilization for stage in made.stages) * made.minibatch_s
    layers = work.forward_s + work.backward_s + work.update_s
    assert 0.3 * layers < used < 20 * layers, "of so small a network the engine's own part is the larger"


def test_more_micro_batches_are_tried_where_fewer_do_not_fit() -> None:

    def least(num_microbatches: int) -> int:
        with pytest.raises(PlanError, match="Pass memory_limit_bytes>=") as caught:
            quick(network(), method="bp", num_microbatches=num_microbatches, memory_limit_bytes=1)
        return int(str(caught.value).split("memory_limit_bytes>=")[1].split(",")[0])

    assert least(4) < least(2)
    assert quick(network(), method="bp", memory_limit_bytes=least(4)).num_microbatches >= 4


def test_a_long_lead_for_slow_links() -> None:
    model = nn.Sequential(*(Slow(0.002) for _ in range(2)))
    made = plan(model, (torch.randn(8, 5), torch.randn(8, 5)), nn.functional.mse_loss, num_workers=2, method="fdg",
                latency_s=0.03, neighbours=0, repeats=2, alternatives=False)  # fmt: skip
    assert made.row.ahead > 4
    assert made.minibatch_s < 1.25 * max(stage.slot_s for stage in made.stages)


def test_under_torchrun_the_trial_stays_in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert quick(network(), method="bp").num_workers == 2


@pytest.mark.full
def test_measuring_the_link_leaves_the_process_as_it_was() -> None:
    import logging
    import os
    import signal

    from dtrp.planning import measure_link

    before = dict(os.environ), [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    speed = measure_link()
    assert 0 < speed.latency_s < 1
    assert speed.bandwidth_bytes_s is None or 1e6 < speed.bandwidth_bytes_s < 1e12
    assert speed.spread is not None
    assert before == (dict(os.environ), [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)])
    assert logging.getLogger("torch.distributed.elastic.multiprocessing.api").level != logging.CRITICAL


def test_a_bandwidth_within_the_scatter_is_not_measurable() -> None:
    draw = random.Random(0)
    steady = [1e-4 * draw.uniform(0.9, 1.1) for _ in range(30)]
    speed = link_speed(steady, [seconds + 4e-3 for seconds in steady])
    assert speed.bandwidth_bytes_s == pytest.approx(2**22 / 4e-3, rel=1e-3)
    assert speed.spread is not None
    assert 0.03 < speed.spread < 0.2
    noisy = [1e-3 * draw.lognormvariate(0, 1) for _ in range(60)]
    assert link_speed(noisy[::2], [seconds + 1e-9 for seconds in noisy[::2]]).bandwidth_bytes_s is None
    assert link_speed(noisy[::2], noisy[1::2]).bandwidth_bytes_s is None
    assert link_speed(steady, steady[::-1]).bandwidth_bytes_s is None, "not the 4e15 bytes/s of a difference of 0"


def test_the_simulators_memory_is_the_footprint() -> None:
    found = simulate(
        "dtrp", num_stages=4, num_minibatches=20, forward_s=1, backward_s=2, weight_bytes=100.0, optimizer_bytes=200.0,
        input_bytes=10.0, graph_bytes=50.0,
    )  # fmt: skip
    assert found.peak_bytes is not None
    assert found.peak_bytes[1] == 100 + 200 + 100 + 100 + 40 + 50 + 2 * (10 + 10)
    assert found.peak_bytes[3] == 100 + 200 + 100 + 60 + 20
    assert simulate("dtrp", num_stages=2, num_minibatches=9, forward_s=1, backward_s=2).peak_bytes is None


# -- the command line -----------------------------------------------------------------------------------------

SMALL = ["--data", "digits", "--model", "mlp"]
SIZED = ["simulate", "--stages", "2", "--weights", "1MB", "--message", "1MB", "--bandwidth", "2MB"]
WRONG = (
    ["--bandwidth", "0", "--message", "1MB"], ["--forward", "a"], ["--forward", "1,2,3"], ["--backward", "-1"],
    ["--bandwidth", "fast"],
)  # fmt: skip


def test_the_command_that_a_plan_prints_has_the_memory_format(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["plan", "--data", "digits", "--model", "resnet14-8", "--channels-last", "--workers", "2", "--batch-size", "16",
                "--latency", "0", "--repeats", "1", "--neighbours", "0", "--out", str(tmp_path / "plan.json")]) == 0  # fmt: skip
    assert "--channels-last --workers 2 --plan" in " ".join(capsys.readouterr().out.split())


@pytest.mark.full
def test_the_command_line_plans_and_trains_by_the_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "plan.json"
    command = [
        "plan",
        *SMALL,
        "--workers",
        "2",
        "--latency",
        "0",
        "--repeats",
        "1",
        "--batch-size",
        "32",
        "--out",
        str(out),
    ]
    assert run([*command, "--num-microbatches", "2", "--keep", "auto", "--memory-limit", "1GB"]) == 0
    shown = capsys.readouterr()
    for word in ("one worker", "samples/s", "the lead", "memory, at most", "written to"):
        assert word in shown.out
    assert "profiling" in shown.err
    assert run(command) == 2, "it is there already"
    assert "--overwrite" in capsys.readouterr().err
    train = ["train", *SMALL, "--limit-train", "100", "--limit-test", "50", "--epochs", "1", "--threads", "1", "--plan"]
    assert run([*train, str(out), "--out", str(tmp_path / "run")]) == 0
    config = (tmp_path / "run" / "config").read_text()
    assert "plan" not in config
    for line in ("batch-size: 32", "num-microbatches: 2", "keep: graph,graph"):
        assert line in config
    capsys.readouterr()
    for options, message in (
        (["--method", "fdg"], "--method fdg with a plan that says dtrp"),
        (["--stages", "3"], "--stages 3 with a plan for 2"),
        (["--batch-size", "16"], "--batch-size 16 with a plan that says 32"),
        (["--model", "resnet20"], "the plan is for a model with"),
    ):
        assert run([*train, str(out), *options]) == 2
        assert message in capsys.readouterr().err
    assert run([*train, str(tmp_path / "none.json")]) == 2
    assert "none.json" in capsys.readouterr().err


def test_the_command_that_follows_is_that_of_the_verdict() -> None:
    made = quick(network(), repeats=1, alternatives=False)
    ends = {
        verdict: what_next(TrainConfig(data="digits"), dataclasses.replace(made, verdict=verdict), Path("plan.json"))
        for verdict in ("pipeline", "one worker", None)
    }
    by_plan, alone = "--workers 2 --plan plan.json", "--method bp --stages 1 --batch-size 16"
    assert ends["pipeline"].startswith("written to plan.json; train by it:")
    assert by_plan in ends["pipeline"]
    assert alone not in ends["pipeline"]
    for verdict in ("one worker", None):
        assert "train by it" not in ends[verdict]
        assert by_plan in ends[verdict]
        assert alone in ends[verdict]
    assert "train on one worker:" in ends["one worker"]
    assert "to compare a run of it with one worker:" in ends[None]


def test_the_command_line_plans_for_the_optimizer_that_trains(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """SGD without momentum has no state."""
    held = {}
    for momentum in ("0.9", "0"):
        out = tmp_path / f"plan{momentum}.json"
        command = ["plan", *SMALL, "--workers", "1", "--repeats", "1", "--batch-size", "8", "--method", "bp"]
        options = ["--momentum", momentum, "--weight-decay", "0.25", "--out", str(out)]
        assert run([*command, *options]) == 0
        held[momentum] = Plan.load(out).stages[0].memory_bytes
        shown = capsys.readouterr().out
        assert "--weight-decay 0.25" in shown
        assert ("--momentum 0.0" in shown) == (momentum == "0")
    weights = 4 * Plan.load(out).model["parameters"]
    assert held["0.9"] - held["0"] == weights
    assert run([*command, "--momentum", "-1", "--out", str(tmp_path / "no.json")]) == 2
    assert "--momentum -1.0: a finite number of at least 0" in capsys.readouterr().err


def test_a_plan_scales_the_learning_rate(tmp_path: Path) -> None:
    made = quick(network(), method="bp", num_microbatches=1)
    config = TrainConfig(data="digits", model="mlp", limit_train=64, limit_test=10, lr=0.01, threads=1)
    model = Trainer(config).pipe
    described = dtrp.planning.plan_file.describe_model(nn.Sequential(*itertools.chain(*model.stages)))
    assert described["layers"] != made.model["layers"]
    names = [name for stage in model.stages for name, _ in stage.named_children()]
    from collections import OrderedDict

    layers = OrderedDict(zip(names, itertools.chain(*model.stages), strict=True))
    path = tmp_path / "plan.json"
    dataclasses.replace(
        made, model=dtrp.planning.plan_file.describe_model(nn.Sequential(layers)), cuts=(1,), batch_size=16, lr_scale=4.0,
        warmup_updates=3,
    ).save(path)  # fmt: skip
    trainer = Trainer(dataclasses.replace(config, plan=str(path)))
    assert (trainer.config.lr, trainer.config.batch_size, trainer.config.warmup_updates) == (0.04, 16, 3)
    assert trainer.pipe.optimizers[1].param_groups[0]["lr"] == pytest.approx(0.04 / 4)


def test_the_command_line_simulates(capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        run(
            [
                "simulate",
                "--method",
                "bp",
                "--method",
                "dtrp",
                "--stages",
                "4",
                "--latency",
                "0.5",
                "--num-microbatches",
                "4",
            ]
        )
        == 0
    )
    shown = capsys.readouterr().out
    for method in ("bp", "dtrp"):
        row = next(line for line in shown.splitlines() if f" {method} " in line)
        want = simulate(
            method, num_stages=4, num_minibatches=40, num_microbatches=4, forward_s=1, backward_s=2, latency_s=0.5
        )
        assert f" {want.minibatch_s:g} " in row
    assert run(["simulate", "--stages", "2", "--minibatches", "3", "--timeline", "--forward", "1,2"]) == 0
    assert "stage 1  F0  1 to 3" in capsys.readouterr().out
    assert run(SIZED) == 0
    assert "memory, each" in capsys.readouterr().out
    for options in (
        ["--bandwidth", "0", "--message", "1MB"],
        ["--forward", "a"],
        ["--forward", "1,2,3"],
        ["--backward", "-1"],
        ["--bandwidth", "fast"],
    ):
        assert run(["simulate", "--stages", "2", *options]) == 2
        assert capsys.readouterr().err.startswith("dtrp: ")


# -- busy -----------------------------------------------------------------------------------------------------


def test_busy_time_adds_up() -> None:
    model = nn.Sequential(*(Slow(0.003) for _ in range(2)))
    pipe = dtrp.Pipeline(model, sgd, nn.functional.mse_loss, num_stages=2, method="dtrp", num_microbatches=1)
    assert pipe.busy()[0]["elapsed"] == 0.0
    for _ in range(10):
        pipe.step(torch.randn(8, 5), torch.randn(8, 5))
    pipe.flush()
    for k, seconds in pipe.busy().items():
        assert list(seconds) == [
            "elapsed", "busy", "wait_forward", "wait_gradient", "wait_send", "wait_replicas", "outside",
        ]  # fmt: skip
        assert sum(seconds.values()) == pytest.approx(2 * seconds["elapsed"])
        assert seconds["busy"] >= 10 * (2 if k == 0 else 1) * 0.003
        assert seconds["wait_forward"] == 0.0
