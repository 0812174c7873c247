"""Backwards in two parts: the orders of R, F, I and W, and runs by them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import adamw, assert_same, clone, minibatches, network, pipeline, sgd
from torch import Tensor, nn

import dtrp
from dtrp import Schedule, ScheduleError, get_method
from dtrp.schedule import StageOrder


def half_leads(num_stages: int) -> tuple[int, ...]:
    return tuple(-(-(num_stages - 1 - k) // 2) for k in range(num_stages))


def test_the_slot_of_four_equal_parts_has_no_gap() -> None:
    lines = str(Schedule.build("dtrp-split", num_stages=4, num_minibatches=4)).splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:]] for line in lines[1:5]]
    assert cells[0][:12] == ["F0", "F1", "R0", "", "", "", "", "I0", "F2", "W0 U", "R1", "I1"]
    assert cells[1][:12] == ["", "F0", "R0", "F1", "", "", "I0", "W0 U", "R1", "F2", "I1", "W1 U"]
    assert cells[3][:12] == ["", "", "", "F0", "I0", "W0 U", "", "F1", "I1", "W1 U", "", "F2"]
    assert lines[-4:] == [
        f"order {k} | lead {n} {cycle}"
        for k, (n, cycle) in enumerate([(2, "RIFW"), (1, "RFIW"), (1, "RIFW"), (0, "FIW")])
    ]
    for num_stages in (2, 4, 8, 16):
        found = dtrp.simulate("dtrp-split", num_stages=num_stages, num_minibatches=80, forward_s=1, backward_s=2)
        assert found.minibatch_s == 4.0
        assert tuple(max(found.delays[k]) for k in range(num_stages)) == half_leads(num_stages)


@pytest.mark.parametrize("num_stages", [2, 3, 4, 8, 16])
@pytest.mark.parametrize("num_microbatches", [1, 2, 3, 4])
def test_the_delay_is_half(num_stages: int, num_microbatches: int) -> None:
    schedule = Schedule.build("dtrp-split", num_stages, 2 * num_stages + 4, num_microbatches)
    schedule.validate()
    for stage, delays in schedule.delays().items():
        half = -(-(num_stages - 1 - stage) // 2)
        want = [max(0, -(-(half - j) // num_microbatches)) for j in range(num_microbatches)]
        assert delays[-num_microbatches:] == want


@pytest.mark.parametrize("num_stages", [2, 3, 4, 8, 16])
def test_the_bubble_of_zero_bubble(num_stages: int) -> None:
    for parts in (num_stages, num_stages + 1, 3 * num_stages):
        times = {"num_stages": num_stages, "num_minibatches": 6, "num_microbatches": parts}
        one = dtrp.simulate("bp", **times, forward_s=1, backward_s=2).minibatch_s
        filled = dtrp.simulate("bp-zb", **times, forward_s=1, backward_s=2).minibatch_s
        tight = dtrp.simulate(get_method("bp-zb", orders="FIW"), **times, forward_s=1, backward_s=2).minibatch_s
        assert (one, filled, tight) == tuple(3 * parts + n * (num_stages - 1) for n in (3, 1, 2))
        unequal = dtrp.simulate("bp-zb", **times, forward_s=1, backward_s=2, weight_s=0.8).minibatch_s
        assert unequal == pytest.approx(3 * parts + (num_stages - 1) * (1 + 1.2 - 0.8))
        held = Schedule.build("bp-zb", num_stages, 3, parts)
        held.validate()
        assert set(held.peak_stash().values()) == {min(parts, num_stages)}
        for stage, actions in enumerate(held.stages):
            waiting = peak = 0
            for action in actions:
                waiting += (action.kind == "I") - (action.kind == "W")
                peak = max(peak, waiting)
            assert peak <= min(parts, stage + 1)
        assert Schedule.build(get_method("bp-zb", orders="FIW"), num_stages, 3, parts).peak_stash() == {
            k: min(parts, num_stages - k) for k in range(num_stages)
        }


@pytest.mark.parametrize(
    "method",
    [
        "dtrp-split",
        "spectrain-split",
        "bp-zb",
        get_method("dtrp-split", ahead=1),
        get_method("dtrp-split", ahead=2, backward_first=True),
        get_method("dtrp-split", leads=(2, 1, 1, 0), orders=("RIFWRFIW", "RFIW", "RIFW", "FIW")),
        get_method("dtrp-1f1b", leads=(2, 1, 1, 0)),
        get_method("dtrp-split", leads=(2, 1, 1, 0), orders="RFIW"),
    ],
)
def test_a_schedule_reads_back_and_resumes_at_any_step(method: dtrp.Method | str) -> None:
    sizes = [2, 1, 3, 1, 1, 2, 4, 1, 2]
    schedule = Schedule.build(method, 4, len(sizes), sizes)
    schedule.validate()
    assert Schedule.parse(str(schedule)) == schedule
    row = get_method(method) if isinstance(method, str) else method
    for stage in range(4):
        order, again = StageOrder(row, 4, stage), StageOrder(row, 4, stage)
        actions = []
        for size in sizes:
            again.resume(order.position())
            actions.append([a for slot in order.minibatch(size) for a in slot])
            first = list(again.begin())
            assert not any(a.kind == "F" for a in first)
            assert first + [a for slot in again.minibatch(size) for a in slot] == actions[-1]
            assert order.position() == again.position()
        actions.append([a for slot in order.flush() for a in slot])
        assert tuple(a for part in actions for a in part) == schedule.stages[stage]


@pytest.mark.parametrize(
    ("row", "rule"),
    [
        ("F0 I0 U", "stage 0 updates before a mini-batch's last backward"),
        ("F0 W0 I0 U", "stage 0 runs W0 before I0"),
        ("F0 I0 B0 W0 U", "stage 0 runs B0 where its backwards are in two parts"),
        ("F0 I0 W0", "stage 0 ends after 1 F, 1 I, 1 W and 0 U; the run has 1, 1, 1 and 1"),
        ("F0 I0 I1 W0 U", "I1 is beyond the last of 1 micro-batches"),
        ("R0 F0 I0 W0 U", "stage 0 runs R0 before F0"),
    ],
)
def test_a_schedule_with_a_part_out_of_place_is_refused(row: str, rule: str) -> None:
    grid = f"mine: stages 1, mini-batches 1, micro-batches in each 1\nstage 0 | {row}"
    with pytest.raises(ScheduleError, match=rule):
        Schedule.parse(grid).validate()


@pytest.mark.parametrize(
    ("name", "options", "rule"),
    [
        ("dtrp-split", {"ahead": 0.4}, "ahead=0.4: .* >= 0.5"),
        ("dtrp", {"ahead": 0.5}, "ahead=0.5: .* split_backward=True"),
        ("gpipe", {"split_backward": True}, "forward_all=True runs every forward before any backward"),
        ("dgl", {"split_backward": True}, "split_backward=True with local=True"),
        ("dtrp-split", {"leads": (1, 1)}, r"leads=\(1, 1\): pass a whole number for each stage"),
        ("dtrp-split", {"leads": 3}, "leads=3"),
        ("dtrp-split", {"orders": ("FB",)}, "'FB' is no cycle of slots, which have one each of F, I and W"),
        ("dtrp", {"orders": ("RFIW",)}, "'RFIW' is no cycle of slots, which have one each of F and B"),
        ("dtrp-split", {"orders": ("RFIWR",)}, "'RFIWR' is no cycle"),
        ("dtrp-split", {"orders": ("RFWI",)}, "its W comes too early"),
        ("dtrp-split", {"orders": ("IRFW",)}, "its I comes too early"),
        ("dtrp-split", {"orders": ("RFIRFIWW",)}, "comes after the next backward has begun"),
        ("dtrp-split", {"orders": ("RIWRIWFF",)}, "more than one slot ahead of its forward"),
        ("dtrp-split", {"orders": 5}, "orders=.* 5 is no cycle"),
    ],
)
def test_orders_that_mean_nothing_are_refused(name: str, options: dict[str, object], rule: str) -> None:
    with pytest.raises(ValueError, match=rule):
        get_method(name, **options)


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        ({"leads": (1, 0)}, "are for 2 stages, and there are 4"),
        ({"orders": ("RFIW", "FIW")}, "are for 2 stages, and there are 4"),
        ({"leads": (1, 2, 1, 0)}, "deadlock: stage 0 with .* wait for each other"),
        ({"orders": "RIFW"}, "deadlock: .*stage 3 with I0"),
        (
            {"leads": (1, 1, 0, 0), "orders": ("RFIW", "RFIW", "FFIWIW", "FIW")},
            "stage 2 has no lead, .*'FFIWIW' puts an update",
        ),
    ],
)
def test_orders_that_do_not_fit_together_are_refused_before_anything_runs(
    options: dict[str, object], rule: str
) -> None:
    with pytest.raises(ValueError, match=rule):
        pipeline(network(), num_stages=4, method=get_method("dtrp-split", **options))


@pytest.mark.parametrize("make", [sgd, adamw])
@pytest.mark.parametrize("num_microbatches", [1, 3])
def test_a_divided_backward_is_the_whole_one_to_the_bit(make: object, num_microbatches: int) -> None:
    """The same leads with whole backwards, and with another order within the slots: F is before U in all."""
    start, leads = network(), half_leads(4)
    results = []
    for method in (
        get_method("dtrp-1f1b", leads=leads),
        get_method("dtrp-split"),
        get_method("dtrp-split", leads=leads, orders=("RIFWRFIW", "RFIW", "RIFW", "FIW")),
    ):
        model = clone(start)
        pipe = pipeline(model, make, num_stages=4, method=method, num_microbatches=num_microbatches)
        losses = [pipe.step(x, y) for x, y in minibatches(9)]
        pipe.flush()
        results.append((losses, pipe.model_state_dict(), pipe.delays()))
    for losses, state, delays in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(losses, results[0][0], strict=True))
        assert_same(state, results[0][1])
        assert delays == results[0][2]


def test_zero_bubble_is_backpropagation_to_the_bit() -> None:
    for orders in (None, "FIW"):
        model = network()
        plain = clone(model)
        ours = pipeline(model, num_stages=4, method=get_method("bp-zb", orders=orders), num_microbatches=6)
        theirs = pipeline(plain, num_stages=4, method="bp", num_microbatches=6)
        for x, y in minibatches(6):
            assert torch.equal(ours.step(x, y), theirs.step(x, y))
        assert_same(ours.model_state_dict(), theirs.model_state_dict())
        assert set().union(*ours.delays().values()) == {0}


def test_what_is_deferred_is_told() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 3))
    pipe = dtrp.Pipeline(model, sgd, nn.functional.cross_entropy, num_stages=3, method="dtrp-split", num_microbatches=1)
    pipe.step(torch.randn(4, 6), torch.randint(3, (4,)))
    pipe.flush()
    told = pipe.deferred()
    assert told[0].deferred == ("0.weight", "0.bias")
    assert told[0].elements == 1.0
    assert (told[1].deferred, told[1].elements, told[1].flops) == ((), 0.0, 0)
    assert set(told[1].whole) == {"1.weight", "1.bias"}
    assert told[2].flops > 0
    assert pipeline(network(), num_stages=2, method="dtrp").deferred() == {}


class Beside(nn.Module):
    """Adds its input to what a linear map made of it: the gradient of both is one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        a, b = pair
        return a + self.linear(b), b


class Twice(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x * 2, x + 1


class First(nn.Module):
    def forward(self, pair: tuple[Tensor, Tensor]) -> Tensor:
        return pair[0]


@pytest.mark.parametrize("name", ["dtrp-split", "spectrain-split", "bp-zb"])
def test_what_waits_is_not_written_where_updates_may_be_left_out(name: str) -> None:
    start = [nn.Sequential(nn.Linear(6, 6), Twice()), Beside(), First(), nn.Linear(6, 3)]
    weights = []
    for on_nonfinite in ("stop", "skip"):
        stages = [clone(stage) for stage in start]
        pipe = dtrp.Pipeline(stages, sgd, nn.functional.cross_entropy, method=name, on_nonfinite=on_nonfinite, seed=0)
        for i in range(6):
            x = torch.randn(8, 6, generator=torch.Generator().manual_seed(i))
            pipe.step(x, torch.arange(8) % 3)
        pipe.flush()
        weights.append(pipe.model_state_dict())
    assert_same(*weights)


def test_leads_of_nothing_ahead_are_an_order_too() -> None:
    pipe = pipeline(network(), num_stages=3, method=get_method("dtrp-split", leads=(0, 0, 0)), num_microbatches=1)
    for x, y in minibatches(3):
        pipe.step(x, y)
    pipe.flush()
    assert set().union(*pipe.delays().values()) == {0}


@pytest.mark.parametrize(
    ("first", "num_microbatches"),
    [("RIFWRFIW", 3), ("RIFFWRIW", 3), ("RIFFWRIW", 1)],
    ids=["", "before a W", "one part"],
)
def test_a_run_in_an_order_of_several_slots_goes_on_from_a_checkpoint(
    first: str, num_microbatches: int, tmp_path: Path
) -> None:
    """Also between the I and the W of a micro-batch, where a step ends there."""
    method = get_method("dtrp-split", leads=(2, 1, 1, 0), orders=(first, "RFIW", "RFIW", "FIW"))
    batches = minibatches(12)

    start = network()

    def fresh() -> dtrp.Pipeline:
        return pipeline(clone(start), num_stages=4, method=method, num_microbatches=num_microbatches)

    whole, stopped = fresh(), fresh()
    waited = 0
    for x, y in batches:
        whole.step(x, y)
        waited += len(whole._engine.stages[0]._waiting)
    assert (waited > 0) == (first == "RIFFWRIW")
    for count, (x, y) in enumerate(batches):
        stopped.step(x, y)
        stopped.save(tmp_path / str(count))
        resumed = fresh()
        resumed.load(tmp_path / str(count))
        stopped = resumed
    whole.flush()
    stopped.flush()
    assert_same(stopped.model_state_dict(), whole.model_state_dict())
    assert stopped.delays() == whole.delays()
