"""The engine against the theory page: rate and floor of SGD with a delay, in closed form, and the theorem's bounds."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import dtrp

THEORY = Path(__file__).parent.parent / "benchmarks" / "theory"


def load(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


run = load("theory_run", THEORY / "run.py")
exact = sys.modules["exact"]
PLAIN = ["ddg", "fr", "fdg", "dtr", "dtrp"]
PREDICTING = ["dtrp", "dtrp-1f1b", "spectrain"]
CASES = [(name, 0.0) for name in PLAIN] + [(name, 0.9) for name in PREDICTING]
pytestmark = pytest.mark.usefixtures("float64")


def step_of(momentum: float) -> float:
    return 0.02 if momentum else 0.05


def problem(name: str, stages: int, momentum: float) -> Any:
    return run.expected(name, stages, step_of(momentum), trained="first", momentum=momentum)


def path_error(method: str | dtrp.Method, stages: int, momentum: float, theory: Any) -> float:
    path = run.trajectory(method, stages, step_of(momentum), 80, momentum=momentum)
    return max(abs(a - b) for a, b in zip(path, theory.residuals([0.0] * len(path), 1.0)[1:], strict=True))


def floor_error(method: str | dtrp.Method, stages: int, momentum: float, theory: Any) -> float:
    found = run.floor(method, stages, step_of(momentum), momentum=momentum, coordinates=4096, updates=400)
    return abs(found["floor"] / theory.variance() - 1)


def later(name: str, stages: int) -> dtrp.Method:
    """The row with a lead, and so a delay, of one more at stage 0."""
    row = dtrp.get_method(name)
    return dtrp.get_method(name, ahead=row.ahead + 1 / (stages - 1))


@pytest.mark.sampled(3)
@pytest.mark.parametrize("stages", [2, pytest.param(3, marks=pytest.mark.full), 4])
@pytest.mark.parametrize(("name", "momentum"), CASES)
def test_rate(name: str, momentum: float, stages: int) -> None:
    """Every weight on the way is that of the recursion, and the factor it shrinks by is the recursion's largest root."""
    theory = problem(name, stages, momentum)
    assert path_error(name, stages, momentum, theory) < 1e-13
    path = [w for w in run.trajectory(name, stages, step_of(momentum), 300, momentum=momentum) if abs(w) > 1e-9]
    assert run.rate(path) == pytest.approx(theory.rate(), rel=1e-6)


@pytest.mark.sampled(4)
@pytest.mark.parametrize("stages", [pytest.param(2, marks=pytest.mark.full), 4])
@pytest.mark.parametrize(("name", "momentum"), CASES)
def test_floor(name: str, momentum: float, stages: int) -> None:
    assert floor_error(name, stages, momentum, problem(name, stages, momentum)) < 0.01


@pytest.mark.sampled(4)
@pytest.mark.parametrize("stages", [pytest.param(2, marks=pytest.mark.full), 4])
@pytest.mark.parametrize(
    ("name", "momentum"),
    [
        case if case[0] in ("fdg", "dtrp", "spectrain") else pytest.param(*case, marks=pytest.mark.full)
        for case in CASES
    ],
)
def test_a_delay_of_one_more_or_less_is_seen(name: str, momentum: float, stages: int) -> None:
    """What the tests above allow is far less than what one update of delay does."""
    theory = problem(name, stages, momentum)
    wrong = [later(name, stages)]
    if not wrong[0].backward_first:
        wrong.append(dtrp.get_method(name, backward_first=True))  # one less
    for row in wrong:
        assert dtrp.Schedule.build(row, stages, 40).delays()[0][25] == theory.delays[0] + (1 if row is wrong[0] else -1)
        assert path_error(row, stages, momentum, theory) > 1e-4
        if not momentum or stages == 4:  # a prediction over one update leaves little of it in the floor
            assert floor_error(row, stages, momentum, theory) > 0.03


@pytest.mark.full
@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", ["fdg", "dtr"])
def test_all_stages_trained(name: str) -> None:
    """Delays of 4 or 3, 2 or 1, and 0 at once; the theorem's L and C are then three times lam."""
    theory = run.expected(name, 3, 0.02, trained="all", momentum=0.0)
    found = run.floor(name, 3, 0.02, trained="all", coordinates=4096, updates=500)["floor"]
    assert found == pytest.approx(theory.variance(), rel=0.01)
    assert 3 * found <= exact.bound(0.02, max(theory.delays), 3)


@pytest.mark.parametrize("delay", [0, 1, 2, 3, 6, 11])
def test_the_closed_form(delay: int) -> None:
    """It is the sum over the response to noise, ends where the recursion stops settling, and lies under the theorem."""
    limit = exact.sgd_limit(delay)
    for share in (0.02, 0.3, 0.9):
        assert exact.sgd_variance(share * limit, delay) == pytest.approx(
            exact.Problem((delay,), share * limit).variance(), rel=1e-10
        )
    assert exact.Problem((delay,), 0.999 * limit).rate() < 1 < exact.Problem((delay,), 1.001 * limit).rate()
    assert exact.sgd_variance(1.001 * limit, delay) == math.inf
    longest = 1 / (1 + 2 * delay)
    for step in (longest, 0.1 * longest):
        assert exact.sgd_variance(step, delay) <= exact.bound(step, delay) * (1 + 1e-12)
    assert exact.bound(1.01 * longest, delay) == math.inf
    small = 1e-5  # the floor is a/2 (1 + (D + 1/2) a) to first order in a
    assert (exact.sgd_variance(small, delay) * 2 / small - 1) / small == pytest.approx(delay + 0.5, rel=1e-3)


def test_the_stored_lines_keep_their_bounds() -> None:
    lines = [json.loads(text) for text in run.RESULTS.read_text().splitlines()]
    keys = ("method", "stages", "step", "trained", "momentum")
    assert [{key: line[key] for key in keys} for line in lines] == list(run.cells())
    for line in lines:
        where = {key: line[key] for key in keys}
        theory = run.expected(**where)
        assert line["floor"] == pytest.approx(theory.variance(), rel=0.01), where
        assert line["expected_delays"] == list(theory.delays) == list(line["delays"].values())[: len(theory.delays)]
        if line["trained"] == "first":
            assert line["path_error"] < 1e-13, where
            assert line["rate"] == pytest.approx(theory.rate(), rel=1e-6), where
        if not line["momentum"]:
            limit = exact.bound(line["step"], max(theory.delays), len(theory.delays))
            assert line["gradient_floor"] <= limit, where
            if limit < math.inf and line["trained"] == "first":
                assert line["mean_square"] <= line["mean_square_bound"], where
