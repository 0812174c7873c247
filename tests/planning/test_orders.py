"""Orders of work that are found for measured parts of a slot, and the plans that are made with them."""

from __future__ import annotations

import dataclasses
import json
import random
import statistics
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import sgd
from launching import Outcome, Server, run_ranks
from torch import Tensor, nn

import dtrp
from dtrp.cli import run
from dtrp.planning import Plan, PlanError, simulate
from dtrp.planning.choose import plan
from dtrp.planning.orders import FoundOrder, Parts, find_orders
from dtrp.planning.orders.cycles import Cycles, read_cycles, slot_s
from dtrp.planning.orders.greedy import Preferences, decide
from dtrp.planning.search import Search
from dtrp.schedule import check_orders, lag
from dtrp.train import TrainConfig
from dtrp.train.from_plan import resolved

RESNET_20 = (28, 31, 26, 18)  # milliseconds of F, R, I and W


def simulated(found: FoundOrder, parts: list[Parts], links_s: list[float], *, repeats: bool) -> Any:
    """The same order in the simulator of schedules."""
    name = "dtrp-split" if repeats else "spectrain-split"
    return simulate(
        dtrp.get_method(name, leads=found.leads, orders=found.orders),
        num_stages=len(parts),
        num_minibatches=240,
        forward_s=[p.repeat_s or p.forward_s for p in parts],
        nograd_forward_s=[p.forward_s for p in parts],
        backward_s=[p.input_s + p.weight_s for p in parts],
        weight_s=[p.weight_s for p in parts],
        latency_s=links_s,
    )


def drawn(seed: int) -> tuple[list[Parts], list[float], bool]:
    """Stages of any parts, all alike or each its own, on links of up to a tenth of a forward."""
    draw = random.Random(seed)
    num_stages, repeats = draw.randint(2, 8), draw.random() < 0.7

    def stage() -> Parts:
        forward_s, repeat_s, input_s, weight_s = (draw.uniform(0.5, 2) for _ in range(4))
        return Parts(forward_s, repeat_s if repeats else 0.0, input_s, weight_s)

    first = stage()
    parts = [first] * num_stages if draw.random() < 0.5 else [first, *(stage() for _ in range(num_stages - 1))]
    parts[-1] = parts[-1]._replace(repeat_s=0.0)
    return parts, [draw.uniform(0, 0.1) * first.forward_s for _ in range(num_stages - 1)], repeats


# -- the search ---------------------------------------------------------------------------------------------------


@pytest.mark.sampled(5)
@pytest.mark.parametrize(
    ("letters", "link", "want"),
    [
        ((1, 1, 1.15, 0.85), 0.0, (7, 5, 4)),
        ((1, 1, 1.15, 0.85), 0.05, (7, 5, 5)),
        ((32, 36, 47, 21), 0.0, (7, 6, 5)),
        (RESNET_20, 0.0, (7, 4, 4)),
        (RESNET_20, 0.05, (7, 5, 4)),
    ],
)
def test_the_largest_delay_at_a_slowdown_of_0_5_and_10_percent(
    letters: tuple[float, ...], link: float, want: tuple[int, int, int]
) -> None:
    """Eight stages: at most the delays of a table that another search has made."""
    parts = [Parts(*map(float, letters))] * 8
    found = find_orders(parts, [link * letters[0]] * 7, repeats=True)
    fastest = sum(letters)
    for slowdown, delay in zip((0.005, 0.05, 0.10), want, strict=True):
        assert min(o.delay for o in found if o.slot_s <= (1 + slowdown) * fastest) <= delay, (slowdown, found)


@pytest.mark.parametrize("num_stages", [2, 3, 4])
def test_equal_parts_and_free_links_take_half_the_delay_at_no_cost(num_stages: int) -> None:
    found = find_orders([Parts(1, 1, 1, 1)] * num_stages, [0.0] * (num_stages - 1), repeats=True)
    assert (found[-1].delay, found[-1].slot_s) == (num_stages // 2, pytest.approx(4))
    assert found[-1].leads[-1] == 0
    assert found[-1].orders[-1] == "FIW"


@pytest.mark.sampled(20)
@pytest.mark.parametrize("seed", range(100))
def test_orders_run_and_take_what_was_said(seed: int) -> None:
    """Each of the frontier's orders is one that a method takes, does not deadlock, and has the slot and the delay found."""
    parts, links_s, repeats = drawn(seed)
    found = find_orders(parts, links_s, repeats=repeats)
    assert found
    assert [o.delay for o in found] == sorted({o.delay for o in found})
    assert [o.slot_s for o in found] == sorted((o.slot_s for o in found), reverse=True)
    for order in found:
        row = dtrp.get_method("dtrp-split", leads=order.leads, orders=order.orders)
        check_orders(row, len(parts))
        assert max(lag(row, len(parts), k) for k in range(len(parts))) == order.delay
        run = simulated(order, parts, links_s, repeats=repeats)
        assert run.minibatch_s == pytest.approx(order.slot_s, rel=0.03)
        assert max(max(counts) for counts in run.delays.values()) == order.delay


def test_a_cycle_that_is_read_is_the_order_of_the_run() -> None:
    """Three stages, in the order of ``dtrp-split``: read from a run, and its slot as in the simulator."""
    parts = [Parts(1.0, 1.25, 0.75, 0.5)] * 2 + [Parts(1.0, 0.0, 0.75, 0.5)]
    links_s = [0.25, 0.5]
    rows = decide(parts, links_s, Preferences([2, 1, 0], ["IFRW"] * 3, dict.fromkeys("FRIW", 0.0)), 60)
    (_, cycles), *_ = read_cycles(rows, 50)
    assert cycles.lags() == [2, 1, 0]
    again = slot_s(parts, links_s, cycles)
    order = FoundOrder(cycles.leads, cycles.orders, again, 2)
    assert simulated(order, parts, links_s, repeats=True).minibatch_s == pytest.approx(again, rel=1e-9)
    played = "".join(began.letter for began in rows[0])
    assert cycles.orders[0] in played


@pytest.mark.parametrize(
    ("letters", "want"), [("RFIW", 2), ("RIFW", 2), ("RIWF", 1), ("FRFIWRIW", 3), ("FRIWRFIW", 2), ("RIWRIFWF", 1)]
)
def test_what_counts_for_the_delay_is_whether_the_update_comes_before_the_forward(letters: str, want: int) -> None:
    assert Cycles((2, 0), (letters, "FIW" * letters.count("F"))).lags() == [want, 0]


def test_a_stage_without_a_lead_has_its_graph_and_repeats_nothing() -> None:
    """Two stages, the first without a lead: F, wait, I, W; a forward with a graph takes as long as R."""
    parts = [Parts(1.0, 1.5, 1.0, 1.0), Parts(1.0, 0.0, 1.0, 1.0)]
    assert slot_s(parts, [0.0], Cycles((0, 0), ("FRIW", "FIW"))) == pytest.approx(1.5 + 1 + 1 + 1 + 1)
    order = FoundOrder((0, 0), ("FIW", "FIW"), 5.5, 0)
    assert simulated(order, parts, [0.0], repeats=True).minibatch_s == pytest.approx(5.5)


def test_stages_that_wait_for_each_other_never_end() -> None:
    parts = [Parts(1.0, 1.0, 1.0, 1.0)] * 3
    assert slot_s(parts, [0.0, 0.0], Cycles((0, 1, 0), ("FIW", "FRIW", "FIW"))) == float("inf")


@pytest.mark.parametrize(
    ("parts", "links_s", "message"),
    [
        ([(1, 1, 1, 1)] * 2, [0.0, 0.0], "links_s has 2 values for 2 stages; pass 1"),
        ([(1, 1, -1, 1)] * 2, [0.0], "a time of -1"),
        ([(1, 1, 1, 1)] * 2, [float("nan")], "a time of nan"),
        ([(0, 0, 0, 0)] * 2, [0.0], "take no time"),
    ],
)
def test_wrong_parts(parts: list[Any], links_s: list[float], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        find_orders([Parts(*p) for p in parts], links_s, repeats=True)


# -- the simulator ------------------------------------------------------------------------------------------------


def test_the_second_part_is_a_share_of_the_backward() -> None:
    """Also of times that are drawn; half of it, where nothing is said."""

    def run(**times: Any) -> Any:
        return simulate("dtrp-split", num_stages=3, num_minibatches=40, forward_s=1, **times)

    by_seconds = run(backward_s=[2, 3, 4], weight_s=[0.5, 1.5, 3.0])
    by_share = run(backward_s=[2, 3, 4], weight_share=[0.25, 0.5, 0.75])
    by_draws = run(backward_s=[lambda _: 2.0, lambda _: 3.0, lambda _: 4.0], weight_share=[0.25, 0.5, 0.75])
    assert by_seconds.update_ends == by_share.update_ends == by_draws.update_ends
    assert run(backward_s=3).update_ends == run(backward_s=3, weight_share=0.5).update_ends
    assert run(backward_s=3).update_ends != run(backward_s=3, weight_share=0.4).update_ends
    with pytest.raises(PlanError, match=r"weight_share=1\.5: pass a number from 0 to 1"):
        run(backward_s=3, weight_share=1.5)
    with pytest.raises(PlanError, match="pass weight_share"):
        run(backward_s=lambda _: 2.0, weight_s=1)


@pytest.mark.full
@pytest.mark.parametrize("num_stages", [2, 4])
@pytest.mark.parametrize(
    ("method", "num_microbatches"),
    [("dtrp-split", 1), ("dtrp-split, planned", 1), ("spectrain-split", 2), ("bp-zb", 4)],
)
def test_ranks_that_sleep_take_what_the_simulator_says(
    server: Server, tmp_path: Path, method: str, num_microbatches: int, num_stages: int
) -> None:
    """F, I and W of 40, 50 and 30 ms, on links of 8 ms, within five per cent."""
    forward_s, input_s, weight_s, link_s = 0.040, 0.050, 0.030, 0.008
    name, _, planned = method.partition(", ")
    options: dict[str, Any] = {}
    if planned:
        found = find_orders(
            [Parts(forward_s, forward_s, input_s, weight_s)] * num_stages, [link_s] * (num_stages - 1), repeats=True
        )
        order = next(o for o in found if o.slot_s <= 1.05 * found[-1].slot_s)
        options = {"leads": order.leads, "orders": order.orders}
    steps, warm_up = 40 // num_microbatches, 4 * num_stages
    arguments = (name, options, [forward_s, input_s, weight_s], steps, warm_up, num_microbatches)
    environment = {"DTRP_MESSAGE_LATENCY_S": str(link_s)}
    outcomes = run_ranks(server, tmp_path, num_stages, "sleeping_in_parts", *arguments, timeout_s=100, **environment)
    assert all(outcome == Outcome(0, "", "") for outcome in outcomes), outcomes
    row = dtrp.get_method(name, **options)
    run = simulate(
        row, num_stages=num_stages, num_minibatches=warm_up + steps, num_microbatches=num_microbatches, forward_s=forward_s,
        backward_s=input_s + weight_s, weight_s=weight_s, latency_s=link_s,
    )  # fmt: skip
    written = [json.loads((tmp_path / f"seconds{rank}.json").read_text()) for rank in range(num_stages)]
    measured_s = statistics.mean(written[-1]["seconds"])
    print(method, num_stages, measured_s, run.minibatch_s)
    assert measured_s == pytest.approx(run.minibatch_s, rel=0.05)
    for rank, values in enumerate(written):
        assert values["delays"] == {str(rank): max(run.delays[rank])}


# -- plans --------------------------------------------------------------------------------------------------------


class _Divided(torch.autograd.Function):
    """x + w, whose backward takes ``input_s`` for the gradient of x, and later ``weight_s`` for that of w."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: nn.Parameter, times: tuple[float, float]) -> Tensor:
        ctx.w, ctx.times = w, times
        return x + w

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        input_s, weight_s = ctx.times
        time.sleep(input_s)

        def compute() -> Tensor:
            time.sleep(weight_s)
            return grad.sum(0)

        dtrp.defer(ctx.w, compute)
        return grad, None, None


class Sleepy(nn.Module):
    """A layer that takes its time, in four parts."""

    def __init__(self, forward_s: float, input_s: float, weight_s: float) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(5))
        self.forward_s, self.times = forward_s, (input_s, weight_s)

    def forward(self, x: Tensor) -> Tensor:
        time.sleep(self.forward_s)
        return _Divided.apply(x, self.w, self.times)


def sleepy_plan(num_workers: int = 3, **options: Any) -> Plan:
    model = nn.Sequential(*(Sleepy(0.002, 0.003, 0.001) for _ in range(num_workers)))
    example = torch.randn(8, 5), torch.randn(8, 5)
    defaults = {"method": "dtrp-split", "latency_s": 0.0, "neighbours": 0, "repeats": 1, "alternatives": False}
    return plan(model, example, nn.functional.mse_loss, num_workers=num_workers, **{**defaults, **options})


def test_a_plan_measures_the_parts_and_writes_the_order(tmp_path: Path) -> None:
    """W is a quarter of the backward, so the least delay is that of an order which takes longer than the fastest."""
    made = sleepy_plan(4, max_slowdown=0.6)
    shares = [stage.weight_share or 0.0 for stage in made.stages]
    assert 0.1 < statistics.median(shares) < 0.45, "1 of 4 ms, as far as the machine's load lets it be measured"
    assert [(row.delay, row.minibatch_s) for row in made.leads] == sorted(
        (row.delay, row.minibatch_s) for row in made.leads
    )
    assert made.choice.delay == min(row.delay for row in made.leads) < 3
    assert made.row.leads is not None
    assert made.choice.leads == made.row.leads
    made.save(tmp_path / "plan.json")
    read = Plan.load(tmp_path / "plan.json")
    assert read.row == made.row
    assert read.leads[0].orders == made.leads[0].orders
    model = nn.Sequential(*(Sleepy(0, 0, 0) for _ in range(4)))
    pipe = dtrp.Pipeline(model, sgd, nn.functional.mse_loss, plan=tmp_path / "plan.json")
    for _ in range(20):
        pipe.step(torch.randn(8, 5), torch.randn(8, 5))
    assert max(max(counts) for counts in pipe.delays().values()) == made.choice.delay
    with pytest.raises(ValueError, match="leads"):
        dtrp.Pipeline(model, sgd, nn.functional.mse_loss, plan=dataclasses.replace(read, options={"leads": [1, 0]}))


def test_where_stages_are_not_tried_their_parts_are_measured_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on an accelerator, where the times of stages are sums of layers."""
    monkeypatch.setattr(Search, "_tries", False)
    made = sleepy_plan(2)
    shares = [stage.weight_share for stage in made.stages]
    assert 0.5 not in shares, "what counts where nothing has been measured"
    assert all(share is not None and 0 < share < 0.5 for share in shares), (
        "1 of 4 ms, on a machine with nothing else to do"
    )


def test_a_plan_of_an_older_version_has_no_leads_and_orders(tmp_path: Path) -> None:
    made = sleepy_plan(2, choose_lead=False)
    values = json.loads(json.dumps({"dtrp_plan": 2, **dataclasses.asdict(made)}))
    for row in values["stages"]:
        del row["weight_share"]
    for row in values["alternatives"]:
        del row["leads"], row["orders"]
    read = Plan.from_dict(values)
    assert read.row == dtrp.get_method("dtrp-split")
    assert read.stages[0].weight_share is None
    assert read.alternatives[0].orders is None


def test_a_bound_on_the_delay_is_met_by_an_order_too() -> None:
    """Four workers: with one micro-batch the plain order has a delay of 2."""
    either = sleepy_plan(4, max_delay=1)
    assert either.choice.delay == 1
    assert {row.num_microbatches for row in either.leads} <= {1, 2}


@pytest.mark.full
def test_a_bound_that_no_order_meets_is_refused() -> None:
    with pytest.raises(PlanError, match="max_delay=0 with num_microbatches=1: the least delay of the orders"):
        sleepy_plan(4, max_delay=0, num_microbatches=1)


@pytest.mark.full
def test_the_rows_of_a_plan_in_other_stages_have_orders_of_their_own() -> None:
    """One stage takes three times as long as the other, at the cuts into equal numbers of layers."""
    model = nn.Sequential(*(Sleepy(s, s, s / 2) for s in (0.001, 0.001, 0.001, 0.001, 0.004, 0.004)))
    made = plan(
        model, (torch.randn(8, 5), torch.randn(8, 5)), nn.functional.mse_loss, num_workers=2, method="dtrp-split",
        latency_s=0.0, neighbours=0, repeats=1,
    )  # fmt: skip
    (even,) = (row for row in made.alternatives if row.method == "dtrp-split, equal cuts")
    assert even.cuts == (3,)
    assert even.minibatch_s >= made.minibatch_s
    assert even.delay == 1


@pytest.mark.parametrize("options", [{"method": "bp"}, {"choose_lead": False}, {"num_workers": 1}])
def test_a_slowdown_is_for_a_choice_of_orders(options: dict[str, Any]) -> None:
    with pytest.raises(PlanError, match=r"max_slowdown=0\.1 is for the choice of an order"):
        sleepy_plan(**{"num_workers": 2, "max_slowdown": 0.1, **options})


# -- the command line ---------------------------------------------------------------------------------------------


def test_the_command_line_takes_leads_and_orders(capsys: pytest.CaptureFixture[str]) -> None:
    order = ["--leads", "2,1,0", "--orders", "RFIW,RIFW,FIW"]
    assert run(["schedule", "--method", "dtrp-split", "--stages", "3", *order]) == 0
    assert "order 1 | lead 1 RIFW" in capsys.readouterr().out
    times = ["--backward", "2", "--weight-share", "0.25", "--minibatches", "60"]
    assert run(["simulate", "--method", "dtrp-split", "--stages", "3", *order, *times]) == 0
    assert "dtrp-split" in capsys.readouterr().out
    assert run(["schedule", "--method", "dtrp-split", "--stages", "4", *order]) == 2
    assert "are for 3 stages, and there are 4" in capsys.readouterr().err


def test_settings_by_a_plan_have_its_order(tmp_path: Path) -> None:
    made = sleepy_plan(2, choose_lead=False)
    orders = {"leads": [1, 0], "orders": ["RIFW", "FIW"]}
    path = tmp_path / "plan.json"
    dataclasses.replace(made, options=orders).save(path)
    config, read = resolved(TrainConfig(plan=str(path), batch_size=8))
    assert read is not None
    assert (config.leads, config.orders) == ((1, 0), ("RIFW", "FIW"))
    with pytest.raises(ValueError, match="--leads 2,0 with a plan that says"):
        resolved(TrainConfig(plan=str(path), batch_size=8, leads=(2, 0)))
