"""The best division of a chain of items into contiguous parts: the slowest part as fast as it can be.

Exact, by dynamic programming over (parts made, items placed): O(K L**2) costs for K parts of L items.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence

PartCost = Callable[[int, int, int], float]  # (first item, one past the last, part) -> cost


def partition_chain(
    num_items: int,
    num_parts: int,
    cost: PartCost,
    *,
    allowed: Callable[[int, int, int], bool] = lambda first, end, part: True,
    forbidden: Collection[int] = (),
    crossing: Sequence[float] | None = None,
) -> tuple[float, list[int]]:
    """The division whose slowest part is fastest; of equally fast ones the most even.

    Args:
        num_items: L.
        num_parts: K.
        cost: (first item, one past the last, part) -> the part's cost, at least 0.
        allowed: (first item, one past the last, part) -> whether that part may be made.
        forbidden: items at which no part may begin.
        crossing: by item, what passes where a part begins with it. Given, the division at which the least passes is
            looked for instead of the fastest.

    Returns:
        The cost of the slowest part, and the first items of parts 1..K-1; (infinity, []) where no division is allowed.
    """
    # best[end]: (slowest or crossing, sum of squares, first items of the parts) over the divisions of items 0..end-1
    best: dict[int, tuple[float, float, tuple[int, ...]]] = {0: (0.0, 0.0, ())}
    for part in range(num_parts):
        parts_left = num_parts - 1 - part
        extended: dict[int, tuple[float, float, tuple[int, ...]]] = {}
        for end in range(part + 1, num_items - parts_left + 1) if parts_left else [num_items]:
            for first, (value, squares, firsts) in best.items():
                found = extended.get(end, (math.inf,))
                if first >= end or end in forbidden or value > found[0]:
                    continue
                part_cost = cost(first, end, part)
                total = max(value, part_cost) if crossing is None else value + crossing[first]
                candidate = total, squares + part_cost * part_cost
                if candidate < found[:2] and allowed(first, end, part):
                    extended[end] = (*candidate, (*firsts, first))
        best = extended
    if num_items not in best:
        return math.inf, []
    firsts = best[num_items][2]
    return max(map(cost, firsts, [*firsts[1:], num_items], range(num_parts))), list(firsts[1:])
