"""How far measured times lie apart."""

from __future__ import annotations

import statistics
from collections.abc import Sequence


def relative_spread(values: Sequence[float]) -> float | None:
    """The interquartile range over the median; None where it cannot be told: of fewer than four values, or of zeros."""
    if len(values) < 4 or not (median := statistics.median(values)):
        return None
    low, _, high = statistics.quantiles(values, n=4)
    return (high - low) / median
