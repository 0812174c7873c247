"""How much more training a method needs: the samples until a test comes to what another method, the baseline, ended with.

Between the tests at the ends of epochs values are interpolated linearly. The level is the value with which the mean of the
baseline's curves over its seeds ends, and the samples of both are those of their mean curves, so that the baseline's own
ratio is 1. (Of single runs about every second one of the baseline would miss the mean of all, and a mean over those that
come to it would count the lucky ones alone.) The spread is that of pairs: a run against the baseline's with the same seed,
and the level with which that one ended.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class RelativeSamples:
    """The samples that runs need to come to a level, over those that runs of another method need.

    Attributes:
        level: the value to come to, with which the mean curve of the other method ends.
        base_samples: samples until the other method's mean curve first comes to it; nan: a level that is not finite.
        ratio: samples of the mean curve over ``base_samples``; inf: it does not come to the level; nan: there is none.
        by_seed: the ratio of each run and the baseline's run of the same seed, for the seeds that both have.
    """

    level: float
    base_samples: float
    ratio: float
    by_seed: tuple[float, ...]

    @property
    def is_known(self) -> bool:
        """Whether there is a level, which a diverged baseline does not have."""
        return not math.isnan(self.ratio)

    def __str__(self) -> str:
        """``1.08 (1.02 to 1.15)``: the ratio and its range over seeds, or the number of seeds that reach the level."""
        if not self.is_known:
            return "-"
        reached, pairs = sum(map(math.isfinite, self.by_seed)), len(self.by_seed)
        text = "not reached" if math.isinf(self.ratio) else f"{self.ratio:.2f}"
        if 0 < reached < pairs:
            return f"{text} ({reached} of {pairs} seeds)"
        if math.isinf(self.ratio) or reached == 0 or pairs < 2:
            return text
        low, high = (f"{extreme(self.by_seed):.2f}" for extreme in (min, max))
        return f"{text} ({low} to {high})"


def samples_to(level: float, samples: Sequence[float], values: Sequence[float], *, higher_is_better: bool) -> float:
    """The samples until a test first comes to a level: at or under it, or, where higher is better, at or over it.

    >>> samples_to(1.5, [100, 200, 300], [3.0, 2.0, 1.0], higher_is_better=False)
    250.0

    Args:
        level: the value to come to.
        samples: samples trained on until each test, increasing.
        values: what each test came to; one that is nan has not come to the level.
        higher_is_better: whether the level is reached from below.

    Returns:
        Samples, interpolated linearly from the test before. At the first test its own samples, which are at most too
        many; the same after a test whose value is not finite. inf: no test comes to the level, or the level is nan.

    Raises:
        ValueError: lists that differ in length, or samples that do not increase from above 0.
    """
    if len(samples) != len(values):
        raise ValueError(f"{len(samples)} numbers of samples, and {len(values)} tests; give a number for each test")
    _check(samples, [values])
    sign = -1.0 if higher_is_better else 1.0
    for i, value in enumerate(values):
        if not sign * value <= sign * level:
            continue
        before = values[i - 1] if i else math.nan
        if not (math.isfinite(before) and math.isfinite(value)):
            return float(samples[i])
        return samples[i - 1] + (samples[i] - samples[i - 1]) * (before - level) / (before - value)
    return math.inf


def relative_samples(
    samples: Sequence[float],
    curves: Sequence[Sequence[float]],
    base_samples: Sequence[float],
    base_curves: Sequence[Sequence[float]],
    *,
    higher_is_better: bool,
    seeds: Sequence[int] | None = None,
    base_seeds: Sequence[int] | None = None,
) -> RelativeSamples:
    """The samples that runs need to come to what the runs of a baseline ended with, over those of the baseline.

    >>> needed = relative_samples([100, 200], [[3.0, 2.0]], [100, 200], [[4.0, 2.5]], higher_is_better=False)
    >>> needed.ratio  # at 150 samples, and not at 200
    0.75

    Args:
        samples: samples trained on until each test of the runs, increasing.
        curves: what the tests of each run came to. Of the mean curve, as many tests count as every run has.
        base_samples: as ``samples``, of the baseline.
        base_curves: as ``curves``, of the baseline.
        higher_is_better: whether the level is reached from below.
        seeds: the seed of each run; None: 0, 1, ...
        base_seeds: the same of the baseline.

    Raises:
        ValueError: no run, a run without a test, more tests than samples, samples that do not increase from above 0, or
            not a seed for each run.
    """
    _check(samples, curves)
    _check(base_samples, base_curves)

    def ratio(values: Sequence[float], base: Sequence[float]) -> tuple[float, float]:
        """(samples of the baseline, ratio)"""
        if not math.isfinite(base[-1]):
            return math.nan, math.nan
        by_base, own = (
            samples_to(base[-1], x[: len(y)], y, higher_is_better=higher_is_better)
            for x, y in ((base_samples, base), (samples, values))
        )
        return by_base, own / by_base

    base = mean_curve(base_curves)
    twins = dict(zip(range(len(base_curves)) if base_seeds is None else base_seeds, base_curves, strict=True))
    runs = zip(range(len(curves)) if seeds is None else seeds, curves, strict=True)
    by_seed = tuple(ratio(values, twins[seed])[1] for seed, values in runs if seed in twins)
    return RelativeSamples(base[-1], *ratio(mean_curve(curves), base), by_seed)


def mean_curve(curves: Sequence[Sequence[float]]) -> list[float]:
    """The mean of some curves at each test that all of them have."""
    return [statistics.fmean(values) for values in zip(*curves, strict=False)]


def _check(samples: Sequence[float], curves: Sequence[Sequence[float]]) -> None:
    lengths = [len(curve) for curve in curves]
    if not lengths or min(lengths) == 0:
        raise ValueError(f"{len(lengths)} runs, of {lengths} tests; give at least one of each")
    if max(lengths) > len(samples):
        raise ValueError(f"{len(samples)} numbers of samples, and {max(lengths)} tests; give a number for each test")
    if samples[0] <= 0 or any(after <= before for before, after in itertools.pairwise(samples)):
        raise ValueError(f"samples {list(samples)} do not increase from above 0")
