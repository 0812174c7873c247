"""Defects of one line, each with the test that must fail on it: they show that the numeric tests look.

`tests/test_mutants.py` runs them (`make mutants`). A line that has been rewritten is no longer found, and that is a failure too:
then the mutant is written anew.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """A defect.

    Args:
        name: what is wrong with the library then.
        path: the file, from ``dtrp/`` on.
        line: text that stands once in the file.
        mutated: the text in its place.
        test: the test, or a part of its parametrization, as pytest is told it.
    """

    name: str
    path: str
    line: str
    mutated: str
    test: str


EVERY_METHOD = "tests/test_pipeline.py::test_every_method_equals_its_equations"
PERFECT = "tests/test_pipeline.py::test_with_perfect_prediction_it_is_backpropagation_to_the_bit"
MUTANTS = [
    Mutant(
        "the lead is one short",
        "schedule.py",
        "return math.ceil(order.ahead * (num_stages - 1 - stage) - 1e-9)",
        "return math.ceil(order.ahead * (num_stages - 1 - stage) - 1e-9) - 1",
        "tests/test_schedule.py::test_golden_dtrp",
    ),
    Mutant(
        "a gradient is one slot late",
        "schedule.py",
        "self.next_forward - self.lead >= self.next_backward",
        "self.next_forward - self.lead > self.next_backward",
        "tests/test_schedule.py::test_golden_dtrp",
    ),
    Mutant(
        "U comes one backward too early",
        "schedule.py",
        "        if self._left[0]:\n            return (backward,)",
        "        if self._left[0] > 1:\n            return (backward,)",
        "tests/test_schedule.py::test_golden_bp",
    ),
    Mutant(
        "the formula of the delay forgets the place in the mini-batch",
        "schedule.py",
        "math.ceil((ahead - position) / num_microbatches)",
        "math.ceil(ahead / num_microbatches)",
        "tests/test_pipeline.py::test_counted_delays_are_those_of_the_formula",
    ),
    Mutant(
        "a deadlock is not seen",
        "schedule_grid.py",
        "self._when.get((source, action), latest + 1) <= latest",
        "self._when.get((source, action), latest) <= latest",
        "tests/test_schedule.py::test_a_broken_schedule_is_refused_with_the_cell_marked",
    ),
    Mutant(
        "linear looks one update too far",
        "predict.py",
        'torch.add(p, state["momentum_buffer"], alpha=-horizon * float(group["lr"]), out=out)',
        'torch.add(p, state["momentum_buffer"], alpha=-(horizon + 1) * float(group["lr"]), out=out)',
        "tests/test_predict.py::test_linear_is_the_last_step_over_and_over",
    ),
    Mutant(
        "the roll-out of SGD leaves its weight decay out",
        "predict.py",
        "gp, gv = decay * pp, decay * pv",
        "gp, gv = 0.0, 0.0",
        "tests/test_predict.py::test_rollout_is_the_optimizer_with_zero_gradients",
    ),
    Mutant(
        "the roll-out of Adam corrects its moments for one step too few",
        "predict.py",
        "torch.mul(v, left[1] / (1 - beta2 ** (t + i)), out=denominator)",
        "torch.mul(v, left[1] / (1 - beta2 ** (t + i - 1)), out=denominator)",
        "tests/test_predict.py::test_rollout_is_the_optimizer_with_zero_gradients",
    ),
    Mutant(
        "informed takes the known gradient for the whole one",
        "predict.py",
        'v = torch.mul(state["momentum_buffer"], 1 - share * (1 - mu))',
        'v = torch.mul(state["momentum_buffer"], mu)',
        "tests/test_predict.py::test_informed_is_linear_after_the_gradient_that_is_known",
    ),
    Mutant(
        "spectrain does not predict",
        "methods.py",
        'Method("spectrain", 1, False, "graph", "stashed", "linear")',
        'Method("spectrain", 1, False, "graph", "stashed")',
        "tests/test_methods.py::test_the_rows_are_those_of_the_equations",
    ),
]
