"""How many samples a method needs to come to what another ended with: hand-computed cases."""

from __future__ import annotations

import math
import random

import pytest

from dtrp.train.scores.samples_needed import RelativeSamples, relative_samples, samples_to

SAMPLES = [100, 200, 300, 400]


@pytest.mark.parametrize(
    ("level", "values", "expected"),
    [
        (1.5, [3.0, 2.0, 1.0, 0.5], 250.0),  # halfway between the second test and the third
        (2.0, [3.0, 2.0, 1.0, 0.5], 200.0),  # at a test exactly
        (3.5, [3.0, 2.0, 1.0, 0.5], 100.0),  # from the first test on
        (0.4, [3.0, 2.0, 1.0, 0.5], math.inf),  # never
        (1.0, [2.0, 1.0, 3.0, 0.5], 200.0),  # noise crosses back, and the first crossing counts
        (1.5, [3.0, 2.0, 2.0, 1.0], 350.0),
        (1.0, [math.nan, math.nan, 0.5, 0.4], 300.0),  # nothing to interpolate from
        (1.0, [math.inf, 0.5, 0.4, 0.3], 200.0),
        (1.0, [2.0, math.nan, math.nan, math.nan], math.inf),
        (math.nan, [2.0, 1.0, 1.0, 1.0], math.inf),
    ],
)
def test_the_first_crossing(level: float, values: list[float], expected: float) -> None:
    assert samples_to(level, SAMPLES, values, higher_is_better=False) == expected
    mirrored = [-value for value in values]
    assert samples_to(-level, SAMPLES, mirrored, higher_is_better=True) == expected


def test_a_baseline_is_its_own_measure() -> None:
    """Whatever the noise: a curve comes to its own end at the latest at its end."""
    draw = random.Random(0)
    for higher in (False, True):
        for tests, seeds in ((1, 1), (1, 3), (5, 1), (7, 4)):
            samples = list(range(10, 10 * tests + 1, 10))
            curves = [[draw.random() for _ in samples] for _ in range(seeds)]
            found = relative_samples(samples, curves, samples, curves, higher_is_better=higher)
            assert (found.ratio, found.by_seed) == (1.0, (1.0,) * seeds)
            assert found.level == pytest.approx(sum(curve[-1] for curve in curves) / seeds)
            assert found.base_samples <= samples[-1]


def test_over_several_seeds() -> None:
    base = [[0.50, 0.58], [0.54, 0.62]]  # 0.60 on average, at 200 samples
    curves = [[0.50, 0.62, 0.66], [0.50, 0.58, 0.66]]  # 0.60 at 200 samples
    found = relative_samples([100, 200, 300], curves, [100, 200], base, higher_is_better=True)
    assert (found.level, found.base_samples) == (pytest.approx(0.60), 200)
    assert found.ratio == pytest.approx(1.0)
    # 0.58 at 100 + 100 * 8 / 12 samples and not at 200; 0.62 at 250.
    assert found.by_seed == pytest.approx((1 / 1.2, 1.25))
    assert str(found) == "1.00 (0.83 to 1.25)"


def test_pairs_are_of_the_same_seed() -> None:
    base = {3: [2.0, 1.0], 5: [2.0, 0.5], 7: [2.0, 1.5]}
    curves = {7: [2.0, 1.5], 4: [9.0, 9.0], 3: [1.0, 1.0]}
    found = relative_samples(
        [100, 200], [*curves.values()], [100, 200], [*base.values()], higher_is_better=False,
        seeds=[*curves], base_seeds=[*base],
    )  # fmt: skip
    assert found.by_seed == (1.0, 0.5), "of 7 and 3, in the order of the runs"
    with pytest.raises(ValueError, match="shorter|longer"):
        relative_samples([1], [[1.0]], [1], [[1.0]], higher_is_better=False, seeds=[1, 2])


def test_some_seeds_do_not_come_to_it() -> None:
    samples, base = [100, 200], [[2.0, 1.0], [2.0, 1.0]]

    def found(*ends: float) -> RelativeSamples:
        return relative_samples(samples, [[2.0, end] for end in ends], samples, base, higher_is_better=False)

    assert found(0.5, 1.1).by_seed == (pytest.approx((100 + 100 / 1.5) / 200), math.inf)
    assert str(found(0.5, 1.1)) == f"{(100 + 100 / 1.2) / 200:.2f} (1 of 2 seeds)"  # the mean ends at 0.8
    assert found(0.9, 1.5).ratio == math.inf
    assert str(found(0.9, 1.5)) == "not reached (1 of 2 seeds)"
    assert str(found(1.4, 1.5)) == "not reached"


def test_one_seed_has_no_spread() -> None:
    base = [[2.0, 1.0], [2.0, 1.0]]
    found = relative_samples([100, 200], [[2.0, 0.0]], [100, 200], base, higher_is_better=False)
    assert str(found) == "0.75"


def test_as_many_tests_as_all_runs_have() -> None:
    """Runs that are not finished yet; the baseline's samples are counted to where all its runs have come."""
    base = [[4.0, 2.0, 1.0], [4.0, 2.0]]
    found = relative_samples([100, 200, 300], [[4.0, 3.0, 2.0], [3.0]], [100, 200, 300], base, higher_is_better=False)
    assert (found.level, found.base_samples) == (2.0, 200)
    assert found.ratio == math.inf
    assert found.by_seed == (math.inf, math.inf)


@pytest.mark.parametrize("last", [math.nan, math.inf])
def test_a_baseline_that_diverged_is_no_measure(last: float) -> None:
    curves, base = [[2.0, 1.0], [2.0, 1.0]], [[2.0, 1.0], [2.0, last]]
    found = relative_samples([1, 2], curves, [1, 2], base, higher_is_better=False)
    assert not found.is_known
    assert all(map(math.isnan, (found.base_samples, found.ratio, found.by_seed[1])))
    assert found.by_seed[0] == 1.0
    assert str(found) == "-"


def test_a_run_that_diverged_does_not_come_to_it() -> None:
    curves, base = [[math.nan, math.nan], [2.0, 1.0]], [[2.0, 1.0], [2.0, 1.0]]
    found = relative_samples([1, 2], curves, [1, 2], base, higher_is_better=False)
    assert found.ratio == math.inf, "the mean of a number and of none is none"
    assert found.by_seed == (math.inf, 1.0)
    assert str(found) == "not reached (1 of 2 seeds)"


def test_what_is_refused() -> None:
    for samples, values, message in (
        ([1, 2], [1.0], "2 numbers of samples, and 1 tests"),
        ([], [], "at least one of each"),
        ([2, 1], [1.0, 2.0], "do not increase"),
        ([0, 1], [1.0, 2.0], "do not increase from above 0"),
    ):
        with pytest.raises(ValueError, match=message):
            samples_to(1.0, samples, values, higher_is_better=False)
    for curves, message in (
        ([], "at least one of each"),
        ([[]], "at least one of each"),
        ([[1.0, 2.0]], "1 numbers of samples, and 2"),
    ):
        with pytest.raises(ValueError, match=message):
            relative_samples([1], curves, [1], [[1.0]], higher_is_better=False)
        with pytest.raises(ValueError, match=message):
            relative_samples([1], [[1.0]], [1], curves, higher_is_better=False)
