"""The picture of results shows the rows that are stored."""

from __future__ import annotations

import pytest
from benchmark_programs import benchmark

pytest.importorskip("matplotlib", reason="the extra 'cli' is not installed")


def test_the_picture_is_drawn_from_the_rows_that_are_there() -> None:
    picture = benchmark("picture")
    for path in picture.FILES.values():
        assert picture.digest() in path.read_text(), "rows have come since: python benchmarks/picture/run.py"


def test_what_costs_more_time_in_the_picture() -> None:
    """The fractions of a mini-batch of pipelined backpropagation, from the schedules: 8 stages, 8 micro-batches."""
    picture = benchmark("picture")
    slots = {name: picture.minibatch_time(name, 8, 8) for name in picture.METHODS}
    assert slots == {
        "bp": 15 * 3, "bp, checkpointed": 15 * 4, "bp-zb": 31, "fdg": 8 * 3, "dtrp": 8 * 4, "dtrp-1f1b": 8 * 4, "spectrain": 8 * 3,
    }  # fmt: skip
