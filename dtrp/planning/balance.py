"""Cuts that make the slowest stage as fast as it can be.

A chain of layers is cut into as many contiguous stages as there are workers. What a stage costs depends on where
it stands: before the last stage of a method that recomputes, a layer costs 2F+B; at the last, F+B. The search is exact:
dynamic programming over (stages used, layers placed), O(K L**2) for L layers.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Sequence

from .plan_file import PlanError

Span = Callable[[int, int, int], float]  # (first layer, one past the last, stage) -> cost or bytes


def balance(
    costs: Sequence[float],
    num_workers: int,
    *,
    last_costs: Sequence[float] | None = None,
    memory: Sequence[float] | Span | None = None,
    memory_limit_bytes: float | None = None,
) -> list[int]:
    """The cuts into ``num_workers`` contiguous stages whose slowest stage is fastest.

    >>> balance([1, 1, 1, 3], 2)
    [3]
    >>> balance([2, 2, 2, 6], 2, last_costs=[1, 1, 1, 3])
    [2]

    Args:
        costs: of each layer, in any unit; a stage's cost is the sum of its layers'.
        num_workers: K.
        last_costs: of each layer in the last stage, where it need not recompute; None: the same.
        memory: bytes of each layer, a stage's being the sum; or a function (first layer, one past the last, stage) ->
            bytes of that stage.
        memory_limit_bytes: of a worker.

    Returns:
        The index of the first layer of stages 1..K-1.

    Raises:
        PlanError: (a ValueError) nothing fits the limit, with by how much, and what would; costs that are negative or not
            finite; fewer layers than workers.
    """
    costs = _checked("costs", costs)
    last = costs if last_costs is None else _checked("last_costs", last_costs, len(costs))
    _check_workers(num_workers, len(costs))
    if (memory is None) != (memory_limit_bytes is None):
        given, absent = ("memory", "memory_limit_bytes")[:: 1 if memory_limit_bytes is None else -1]
        raise PlanError(f"{given} without {absent}: pass both, or neither")
    size: Span | None = None
    if memory is not None:
        if callable(memory):
            size = memory
        else:
            each = _checked("memory", memory, len(costs))
            size = lambda first, end, stage: sum(each[first:end])  # noqa: E731
        assert memory_limit_bytes is not None
        if not math.isfinite(memory_limit_bytes) or memory_limit_bytes < 0:
            raise PlanError(f"memory_limit_bytes={memory_limit_bytes!r}: pass a number of bytes of at least 0")

    def cost(first: int, end: int, stage: int) -> float:
        return sum((last if stage == num_workers - 1 else costs)[first:end])

    return partition(len(costs), num_workers, cost, size, memory_limit_bytes)


def partition(
    num_layers: int,
    num_workers: int,
    cost: Span,
    size: Span | None = None,
    limit: float | None = None,
    forbidden: frozenset[int] = frozenset(),
) -> list[int]:
    """As `balance`, for any cost of a stage, and with places that must not be cut.

    Where the slowest stage does not decide, the cuts tend to an even split.
    """
    _check_workers(num_workers, num_layers)
    cuts, slowest = _search(num_layers, num_workers, cost, size, limit, forbidden)
    if math.isfinite(slowest):
        return cuts
    if not math.isfinite(_search(num_layers, num_workers, lambda first, end, stage: 0.0, None, None, forbidden)[1]):
        raise PlanError(
            f"no {num_workers - 1} of the places between {num_layers} layers can be cut: layers share tensors across the "
            "others; pass fewer workers, or give each layer its own"
        )
    assert size is not None
    assert limit is not None
    # The smallest limit that some cuts meet: the same search with bytes for costs.
    _, needed = _search(num_layers, num_workers, size, None, None, forbidden)
    raise PlanError(
        f"no cuts into {num_workers} stages fit memory_limit_bytes={limit:,.0f}: the best need {needed:,.0f} bytes in "
        f"their largest stage, {needed - limit:,.0f} too many. Pass memory_limit_bytes>={math.ceil(needed)}, more workers, smaller "
        "mini-batches, or more micro-batches"
    )


def _search(
    num_layers: int, num_workers: int, cost: Span, size: Span | None, limit: float | None, forbidden: frozenset[int]
) -> tuple[list[int], float]:
    """(cuts, the slowest stage's cost); infinite where nothing fits."""
    # best[end]: (slowest, sum of squares) of the stages so far on layers 0..end-1
    best: list[tuple[float, float]] = [(0.0, 0.0)] + [(math.inf, math.inf)] * num_layers
    firsts: list[list[int]] = []
    for stage in range(num_workers):
        left = num_workers - 1 - stage
        new = [(math.inf, math.inf)] * (num_layers + 1)
        chosen = [-1] * (num_layers + 1)
        ends = range(stage + 1, num_layers - left + 1) if left else (num_layers,)
        for end in ends:
            for first in range(stage, end):
                slowest, squares = best[first]
                if first in forbidden or slowest > new[end][0] or not math.isfinite(slowest):
                    continue
                own = cost(first, end, stage)
                candidate = (max(slowest, own), squares + own * own)
                if candidate < new[end] and (size is None or limit is None or size(first, end, stage) <= limit):
                    new[end], chosen[end] = candidate, first
        best = new
        firsts.append(chosen)
    cuts: list[int] = []
    end = num_layers
    for chosen in reversed(firsts):
        end = chosen[end]
        cuts.append(end)
    return cuts[-2::-1], best[num_layers][0]


def _checked(name: str, values: Sequence[float], length: int | None = None) -> list[float]:
    values = list(values)
    for place, value in enumerate(values):
        number = isinstance(value, numbers.Real) and not isinstance(value, bool)
        if not number or not math.isfinite(value) or value < 0:
            raise PlanError(f"{name}[{place}]={value!r}: pass numbers that are finite and at least 0")
    if sum(map(float, values)) > 1e150:  # the search squares them
        raise PlanError(f"{name} sum to {sum(values):g}: pass smaller numbers, in a larger unit")
    if length is not None and len(values) != length:
        raise PlanError(f"{name} has {len(values)} values and costs has {length}; pass one of each for every layer")
    return [float(value) for value in values]


def _check_workers(num_workers: int, num_layers: int) -> None:
    if isinstance(num_workers, bool) or not isinstance(num_workers, int) or num_workers < 1:
        raise PlanError(f"num_workers={num_workers!r}: pass a whole number of at least 1")
    if num_workers > num_layers:
        raise PlanError(
            f"num_workers={num_workers} but there are {num_layers} layers to cut between; pass num_workers<={num_layers}"
        )
