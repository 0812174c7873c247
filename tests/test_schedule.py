"""The schedule as data: its rules for all small K and A, golden grids, and what breaks it."""

from __future__ import annotations

import ast
import itertools
import subprocess
import sys
from pathlib import Path

import pytest

import dtrp
from dtrp import Schedule, ScheduleError, get_method, list_methods
from dtrp.schedule import StageOrder, lead, steady_delay

SMALL = list(itertools.product(list_methods(), range(1, 6), (1, 2, 3, 4)))


@pytest.mark.parametrize(("name", "num_stages", "num_microbatches"), SMALL)
def test_every_built_schedule_is_valid_and_reads_back(name: str, num_stages: int, num_microbatches: int) -> None:
    schedule = Schedule.build(name, num_stages, 6, num_microbatches)
    schedule.validate()
    assert Schedule.parse(str(schedule)) == schedule
    assert Schedule.parse(schedule.grid(hop=0)) == schedule
    uneven = Schedule.build(name, num_stages, 3, [num_microbatches, 3, 1])
    uneven.validate()
    assert Schedule.parse(str(uneven)) == uneven


@pytest.mark.parametrize("ahead", [1, 1.1, 1.5, 2, 2.75, 3, 7])
@pytest.mark.parametrize("backward_first", [True, False])
def test_any_lead_of_at_least_one_slot_a_stage_runs(ahead: float, backward_first: bool) -> None:
    method = get_method("dtrp", ahead=ahead, backward_first=backward_first)
    for num_stages, num_microbatches in itertools.product((1, 2, 5, 8), (1, 3)):
        Schedule.build(method, num_stages, 8, num_microbatches).validate()


def test_golden_dtrp() -> None:
    assert str(Schedule.build("dtrp", 3, 6)) == (
        "dtrp: stages 3, mini-batches 6, micro-batches in each 1\n"
        "stage 0 | F0 | F1 | F2      | F3      | B0 U F4 | B1 U F5 | B2 U    | B3 U    | B4 U | B5 U\n"
        "stage 1 |    | F0 | F1      | B0 U F2 | B1 U F3 | B2 U F4 | B3 U F5 | B4 U    | B5 U |\n"
        "stage 2 |    |    | F0 B0 U | F1 B1 U | F2 B2 U | F3 B3 U | F4 B4 U | F5 B5 U |      |\n"
        "delay 0 | 0 1 2 3 3 3\n"
        "delay 1 | 0 1 1 1 1 1\n"
        "delay 2 | 0 0 0 0 0 0"
    )


def test_golden_bp() -> None:
    assert str(Schedule.build("bp", 3, 2, 3)) == (
        "bp: stages 3, mini-batches 2, micro-batches in each 3\n"
        "stage 0 | F0 | F1 | F2    |       | B0      | B1   | B2 U F3 | F4 | F5    |       | B3      | B4   | B5 U\n"
        "stage 1 |    | F0 | F1    | B0 F2 | B1      | B2 U |         | F3 | F4    | B3 F5 | B4      | B5 U |\n"
        "stage 2 |    |    | F0 B0 | F1 B1 | F2 B2 U |      |         |    | F3 B3 | F4 B4 | F5 B5 U |      |\n"
        "delay 0 | 0 0 0 0 0 0\n"
        "delay 1 | 0 0 0 0 0 0\n"
        "delay 2 | 0 0 0 0 0 0"
    )


@pytest.mark.parametrize(
    ("name", "stage", "words"),
    [
        ("dtrp", 1, "F0 F1 B0 U F2 B1 U F3 B2 U B3 U"),  # backward first, lead 2
        ("fdg", 1, "F0 F1 F2 B0 U F3 B1 U B2 U B3 U"),  # forward first, lead 2
        ("fr", 0, "F0 F1 F2 B0 U F3 B1 U B2 U B3 U"),  # lead d = 2
        ("gpipe", 2, "F0 B0 U F1 B1 U F2 B2 U F3 B3 U"),
        ("dtrp", 2, "F0 B0 U F1 B1 U F2 B2 U F3 B3 U"),  # the last stage always F, B
    ],
)
def test_the_order_within_a_slot(name: str, stage: int, words: str) -> None:
    assert " ".join(map(str, Schedule.build(name, 3, 4).stages[stage])) == words


def test_gpipe_runs_all_forwards_first_at_every_stage() -> None:
    for actions in Schedule.build("gpipe", 3, 1, 3).stages:
        assert " ".join(map(str, actions)) == "F0 F1 F2 B0 B1 B2 U"


@pytest.mark.parametrize(("name", "num_stages", "num_microbatches"), SMALL)
def test_stash_and_delay_are_those_of_the_lead(name: str, num_stages: int, num_microbatches: int) -> None:
    method, count = get_method(name), 12
    schedule = Schedule.build(method, num_stages, count, num_microbatches)
    for stage, peak in schedule.peak_stash().items():
        ahead = lead(method, num_stages, stage)
        if method.forward_all:
            assert peak == num_microbatches
        elif method.flush:
            graphs = num_stages if method.split_backward else num_stages - stage
            assert peak == min(num_microbatches, graphs)
        else:
            assert peak == ahead + 1 - (method.backward_first and ahead > 0)
        steady = [steady_delay(method, num_stages, stage, num_microbatches, j) for j in range(num_microbatches)]
        assert schedule.delays()[stage][-num_microbatches:] == steady


def test_stages_with_losses_of_their_own_wait_for_no_gradient() -> None:
    grid = (
        "dgl: stages 3, mini-batches 3, micro-batches in each 1, local losses\n"
        "stage 0 | F0 B0 U | F1 B1 U | F2 B2 U |         |\n"
        "stage 1 |         | F0 B0 U | F1 B1 U | F2 B2 U |\n"
        "stage 2 |         |         | F0 B0 U | F1 B1 U | F2 B2 U\n"
        "delay 0 | 0 0 0\ndelay 1 | 0 0 0\ndelay 2 | 0 0 0"
    )
    assert str(Schedule.build("dgl", 3, 3)) == grid
    Schedule.parse(grid).validate()
    waiting = str(Schedule.parse(grid.replace(", local losses", "")))  # the same order, where gradients come back
    assert waiting.splitlines()[1].count("|") > grid.splitlines()[1].count("|")


def test_delays_by_hand() -> None:
    """DTRP 2d-1, FDG 2d, DDG and FR d (the level of staleness of the ADL paper)."""
    for name, at_distance in [
        ("dtrp", lambda d: max(0, 2 * d - 1)), ("dtr", lambda d: max(0, 2 * d - 1)), ("fdg", lambda d: 2 * d),
        ("ddg", lambda d: d), ("fr", lambda d: d), ("pipedream", lambda d: d), ("dtrp-1f1b", lambda d: d),
    ]:  # fmt: skip
        delays = Schedule.build(name, 4, 12).delays()
        assert [delays[k][-1] for k in range(4)] == [at_distance(3 - k) for k in range(4)], name
    # ADL's figure, K=3, M=4, mode A: module 1 -> 1,1,1,1; module 2 -> 1,1,0,0; module 3 -> 0
    adl = Schedule.build("adl", 3, 6, 4).delays()
    assert [adl[k][-4:] for k in range(3)] == [[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]]


def broken(words: str, stage: int, **changes: object) -> Schedule:
    """dtrp at K=2 with four mini-batches, and one stage's row replaced."""
    lines = str(Schedule.build("dtrp", 2, 4)).splitlines()
    lines[1 + stage] = f"stage {stage} | {words}"
    return Schedule.parse("\n".join(lines))


@pytest.mark.parametrize(
    ("stage", "words", "rule"),
    [
        (0, "F0 | F1 | B0 U F2 | B1 U F3 | B2 U", r"stage 0 ends after 4 F, 3 B and 3 U; the run has 4, 4 and 4[\s\S]*>end<"),
        (0, "F0 | B0 U F1 | B1 U F2 | B2 U F3 | B3 U", r"stage 0 declares delay 1 for micro-batch 1; counted: 0[\s\S]*>F1<"),
        (0, "F0 | F1 | B1 U F2 | B0 U F3 | B2 U | B3 U", r"stage 0 runs B1 where B0 is next[\s\S]*>B1<"),
        (0, "B0 U F0 | F1 | B1 U F2 | F3 | B2 U | B3 U", r"stage 0 runs B0 before F0[\s\S]*>B0<"),
        (0, "F0 | F2 | B0 U F1 | B1 U F3 | B2 U | B3 U", r"stage 0 runs F2 where F1 is next[\s\S]*>F2<"),
        (0, "F0 | F0 | B0 U F2 | B1 U F3 | B2 U | B3 U", r"stage 0 runs F0 where F1 is next[\s\S]*>F0<"),
        (0, "F0 | F1 | B0 F2 | B1 U F3 | B2 U | B3 U", r"stage 0 runs F2 where U of mini-batch 0 is due[\s\S]*>F2<"),
        (0, "F0 U | F1 | B0 U F2 | B1 U F3 | B2 U | B3 U", r"stage 0 updates before a mini-batch's last backward[\s\S]*>U<"),
        (0, "F0 | F1 | B0 U F2 | B1 U F3 | B2 U | B3 U F4", r"F4 is beyond the last of 4 micro-batches[\s\S]*>F4<"),
        (1, "F0 F1 B0 U | B1 U F2 B2 U | F3 | B3 U", r"stage 1 declares delay 0 for micro-batch 1; counted: 1[\s\S]*>F1<"),
        (1, "F0 F1 F2 F3 | B0 U | B1 U | B2 U | B3 U", r"deadlock: stage 0 waits forever for the input of B0[\s\S]*>B0<"),
    ],
)  # fmt: skip
def test_a_broken_schedule_is_refused_with_the_cell_marked(stage: int, words: str, rule: str) -> None:
    with pytest.raises(ScheduleError, match=rule):
        broken(words, stage).validate()


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("", "a grid begins with a line like"),
        ("hello", "a grid begins with a line like"),
        ("x: stages 1, mini-batches 1, micro-batches in each 1\nstage 0 | F0 G0 U", "got 'G0'[\\s\\S]*>G0<"),
        ("x: stages 1, mini-batches 1, micro-batches in each 1\nstage 1 | F0 B0 U", "expected a line 'stage 0"),
        ("x: stages 2, mini-batches 1, micro-batches in each 1\nstage 0 | F0 B0 U", "says 2 stages; the grid has 1"),
        ("x: stages 1, mini-batches 3, micro-batches in each 1 2\nstage 0 | F0", "one number of micro-batches"),
        ("x: stages 0, mini-batches 1, micro-batches in each 1", "at least one stage"),
        ("x: stages 1, mini-batches 1, micro-batches in each 0\nstage 0 |", "at least 1, for each mini-batch"),
        ("x: stages 1, mini-batches 1, micro-batches in each 1\nstage 0 | F0 B0 U\ndelay 0 | a", "whole numbers"),
    ],
)
def test_a_text_that_is_no_grid(text: str, rule: str) -> None:
    with pytest.raises(ScheduleError, match=rule):
        Schedule.parse(text)


@pytest.mark.parametrize(
    ("arguments", "rule"),
    [
        (("dtrp", 0, 1), "num_stages=0"),
        (("dtrp", 1, 0), "num_minibatches=0"),
        (("dtrp", 1.5, 1), "num_stages=1.5"),
        (("dtrp", 1, 1, 0), "num_microbatches=0"),
        (("dtrp", 1, 3, [1, 2]), "one for each of the num_minibatches=3"),
        (("dtrpp", 1, 1), "did you mean 'dtrp'"),
    ],
)
def test_build_refuses(arguments: tuple[object, ...], rule: str) -> None:
    with pytest.raises(ValueError, match=rule):
        Schedule.build(*arguments)  # type: ignore[arg-type]


def test_an_order_is_the_same_asked_step_by_step() -> None:
    """With a flush in the middle the lead builds up again."""
    order = StageOrder(get_method("dtrp"), 2, 0)
    slots = [slot for _ in range(3) for slot in order.minibatch(1)] + order.flush() + order.minibatch(2)
    assert [" ".join(map(str, slot)) for slot in slots] == ["F0", "F1", "B0 U F2", "B1 U", "B2 U", "F3", "F4"]
    assert [" ".join(map(str, slot)) for slot in order.flush()] == ["B3", "B4 U"]


def test_the_schedule_needs_neither_torch_nor_the_rest() -> None:
    path = Path(dtrp.__file__).with_name("schedule.py")
    names = {
        name.split(".")[0]
        for node in ast.walk(ast.parse(path.read_text()))
        for name in (
            [alias.name for alias in node.names] if isinstance(node, ast.Import)
            else [("." * node.level) + (node.module or "")] if isinstance(node, ast.ImportFrom) else []
        )
    }  # fmt: skip
    assert names <= set(sys.stdlib_module_names)
    script = f"import sys, runpy; sys.modules['torch'] = None; runpy.run_path({str(path)!r}); print('ran')"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout == "ran\n"
