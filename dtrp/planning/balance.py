"""Cuts that make the slowest stage as fast as it can be.

A chain of layers is cut into as many contiguous stages as there are workers. The cost of a stage depends on its place:
before the last stage of a method that recomputes, a layer costs 2F+B; in the last stage, F+B.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence

from ..errors import PlanError
from ..splitting.chain_partition import PartCost, partition_chain
from ..validation import whole


def balance(
    costs: Sequence[float],
    num_workers: int,
    *,
    last_costs: Sequence[float] | None = None,
    memory: Sequence[float] | PartCost | None = None,
    memory_limit_bytes: float | None = None,
) -> list[int]:
    """The cuts into ``num_workers`` contiguous stages whose slowest stage is fastest.

    >>> balance([1, 1, 1, 3], 2)
    [3]
    >>> balance([2, 2, 2, 6], 2, last_costs=[1, 1, 1, 3])
    [2]

    Args:
        costs: cost of every layer, in any unit; a stage costs the sum of its layers.
        num_workers: K, the number of stages.
        last_costs: cost of every layer in the last stage, where it need not recompute; None: as ``costs``.
        memory: bytes of every layer, whose sum a stage holds; or a function (first layer, one past the last, stage) ->
            bytes of that stage.
        memory_limit_bytes: bytes that a worker may hold.

    Returns:
        The index of the first layer of stages 1..K-1.

    Raises:
        PlanError: (a ValueError) no cuts fit the limit, with by how much, and what would; costs that are negative or
            not finite; fewer layers than workers.
    """
    costs = _checked("costs", costs)
    last = costs if last_costs is None else _checked("last_costs", last_costs, len(costs))
    whole("num_workers", num_workers, error=PlanError)
    if num_workers > (most := len(costs)):
        raise PlanError(
            f"num_workers={num_workers} but there are {most} layers to cut between; pass num_workers<={most}"
        )
    if (memory is None) != (memory_limit_bytes is None):
        present, absent = ("memory", "memory_limit_bytes")[:: 1 if memory_limit_bytes is None else -1]
        raise PlanError(f"{present} without {absent}: pass both, or neither")
    if memory_limit_bytes is not None and not 0 <= memory_limit_bytes < math.inf:
        raise PlanError(f"memory_limit_bytes={memory_limit_bytes!r}: pass a number of bytes of at least 0")

    def cost(first: int, end: int, stage: int) -> float:
        return sum((last if stage == num_workers - 1 else costs)[first:end])

    if memory is None or memory_limit_bytes is None:
        return cuts_within(len(costs), num_workers, cost, cost, math.inf)
    size = memory if callable(memory) else _sum_of(_checked("memory", memory, len(costs)))
    return cuts_within(len(costs), num_workers, cost, size, memory_limit_bytes)


def cuts_within(
    num_layers: int,
    num_workers: int,
    cost: PartCost,
    memory: PartCost,
    limit: float,
    forbidden: frozenset[int] = frozenset(),
) -> list[int]:
    """As `balance`, for any cost of a stage, and with places that must not be cut.

    Where the slowest stage does not decide, the cuts tend to an even split.
    """

    def fits(first: int, end: int, stage: int) -> bool:
        return limit == math.inf or memory(first, end, stage) <= limit

    slowest, cuts = partition_chain(num_layers, num_workers, cost, allowed=fits, forbidden=forbidden)
    if math.isfinite(slowest):
        return cuts
    # The smallest limit that some cuts meet: the same search with bytes for costs.
    needed, _ = partition_chain(num_layers, num_workers, memory, forbidden=forbidden)
    if math.isfinite(needed):
        raise PlanError(
            f"no cuts into {num_workers} stages fit memory_limit_bytes={limit:,.0f}: the best need {needed:,.0f} bytes "
            f"in their largest stage, {needed - limit:,.0f} too many. Pass memory_limit_bytes>={math.ceil(needed)}, "
            "more workers, smaller mini-batches, or more micro-batches"
        )
    raise PlanError(
        f"no {num_workers - 1} of the places between {num_layers} layers can be cut: layers share tensors across the "
        "others; pass fewer workers, or give each layer its own"
    )


def _sum_of(values: Sequence[float]) -> PartCost:
    return lambda first, end, stage: sum(values[first:end])


def _checked(name: str, values: Sequence[float], length: int | None = None) -> list[float]:
    values = list(values)
    for place, value in enumerate(values):
        if not isinstance(value, numbers.Real) or isinstance(value, bool) or not 0 <= value < math.inf:
            raise PlanError(f"{name}[{place}]={value!r}: pass numbers that are finite and at least 0")
    if sum(map(float, values)) > 1e150:  # the search squares them
        raise PlanError(f"{name} sum to {sum(values):g}: pass smaller numbers, in a larger unit")
    if length is not None and len(values) != length:
        raise PlanError(f"{name} has {len(values)} values and costs has {length}; pass one of each for every layer")
    return [float(value) for value in values]
