"""How long the schedules of torch.distributed.pipelining take if messages and the machine take no time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_MINIBATCHES = 8


def minibatch_s(orders: Mapping[int, Sequence[Any]], seconds: Mapping[str, float]) -> float:
    """Seconds of a mini-batch in steady state: ranks go on to the next one as soon as they are through.

    Args:
        orders: by rank, its actions of a mini-batch, as the ``pipeline_order`` of a schedule with several stages a rank.
        seconds: of an action, by the name of its kind.
    """
    first = {rank: [action for action in order if action is not None] for rank, order in orders.items()}
    num_stages = 1 + max(action.stage_index for order in first.values() for action in order)
    ends: dict[tuple[str, int, int, int], float] = {}  # by direction, stage, micro-batch and mini-batch
    waiting = {rank: [(n, action) for n in range(_MINIBATCHES) for action in order] for rank, order in first.items()}
    clocks = dict.fromkeys(waiting, 0.0)
    through: dict[int, list[float]] = {rank: [] for rank in waiting}
    while any(waiting.values()):
        moved = False
        for rank, left in waiting.items():
            while left:
                n, action = left[0]
                begin = _begin(action, n, num_stages, ends)
                if begin is None:
                    break
                left.pop(0)
                moved = True
                kind = action.computation_type.name
                clocks[rank] = max(clocks[rank], begin) + seconds[kind]
                if kind != "BACKWARD_WEIGHT":
                    direction = "F" if kind == "FORWARD" else "B"
                    ends[direction, action.stage_index, action.microbatch_index, n] = clocks[rank]
                if not left or left[0][0] != n:
                    through[rank].append(clocks[rank])
        if not moved:
            raise ValueError("the schedule deadlocks")
    half = _MINIBATCHES // 2
    return max((times[-1] - times[half - 1]) / (_MINIBATCHES - half) for times in through.values())


def _begin(action: Any, minibatch: int, num_stages: int, ends: dict[tuple[str, int, int, int], float]) -> float | None:
    """When what an action needs is there; None: it is not known yet."""
    stage, kind, rest = action.stage_index, action.computation_type.name, (action.microbatch_index, minibatch)
    if kind == "BACKWARD_WEIGHT":
        return ends.get(("B", stage, *rest))
    if kind == "FORWARD":
        return ends.get(("F", stage - 1, *rest)) if stage else 0.0
    return ends.get(("B", stage + 1, *rest) if stage + 1 < num_stages else ("F", stage, *rest))
