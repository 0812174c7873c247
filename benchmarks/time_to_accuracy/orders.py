"""Schedules with several stages a rank, simulated with messages: the orders of torch's zero bubbles, as torch has them.

An action runs when its rank is through with the one before and what it needs has arrived. A message leaves when its action
ends, waits until the link between the two ranks has sent those before it (bytes / bandwidth each), and takes the latency. Between
stages of one rank there is no message. It is `dtrp.simulate` for orders that are not those of a stage a rank.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

from torch import nn
from torch.distributed.pipelining import ScheduleInterleavedZeroBubble, ScheduleZBVZeroBubble

_MINIBATCHES = 8


class Stage(NamedTuple):
    """Seconds of a stage's actions on a micro-batch: forward, the backward's two parts; of its update; bytes of its output."""

    forward_s: float
    input_s: float
    weight_s: float
    update_s: float
    output_bytes: float


class Link(NamedTuple):
    latency_s: float
    bandwidth_bytes_s: float


def torch_orders(name: str, num_ranks: int, num_microbatches: int) -> tuple[dict[int, list[Any]], Callable[[int], int]]:
    """By rank its actions of a mini-batch, of `InterleavedZeroBubble` or `ZBVZeroBubble`; and the rank of a stage."""
    count = 2 * num_ranks
    made, host = {
        "InterleavedZeroBubble": (ScheduleInterleavedZeroBubble, lambda index: index % num_ranks),
        "ZBVZeroBubble": (ScheduleZBVZeroBubble, lambda index: min(index, count - 1 - index)),
    }[name]
    stages = [
        SimpleNamespace(
            group_size=num_ranks, group_rank=0, num_stages=count, stage_index=index, is_first=index == 0,
            is_last=index == count - 1, has_backward=True, submod=nn.Identity(),
        )
        for index in range(count)
        if host(index) == 0
    ]  # fmt: skip
    return made(stages, num_microbatches).pipeline_order, host


def minibatch_s(
    orders: Mapping[int, Sequence[Any]], host: Callable[[int], int], stages: Sequence[Stage], link: Link
) -> float:
    """Seconds of a mini-batch in steady state: a rank goes on to the next one when its stages have had their update."""
    actions = {rank: [action for action in order if action is not None] for rank, order in orders.items()}
    waiting = {rank: [(n, action) for n in range(_MINIBATCHES) for action in order] for rank, order in actions.items()}
    updates = {rank: sum(s.update_s for i, s in enumerate(stages) if host(i) == rank) for rank in actions}
    clocks = dict.fromkeys(waiting, 0.0)
    free: dict[tuple[int, int], float] = {}  # when the link from one rank to another is
    arrivals: dict[tuple[str, int, int, int], float] = {}  # by direction, stage that needs it, micro-batch, mini-batch
    through: dict[int, list[float]] = {rank: [] for rank in waiting}

    def send(kind: str, source: int, target: int, rest: tuple[int, int], size: float, now: float) -> None:
        pair = host(source), host(target)
        if pair[0] != pair[1]:
            free[pair] = max(now, free.get(pair, 0.0)) + size / link.bandwidth_bytes_s
            now = free[pair] + link.latency_s
        arrivals[kind, target, *rest] = now

    while any(waiting.values()):
        moved = False
        for rank, left in waiting.items():
            while left:
                n, action = left[0]
                index, kind, rest = action.stage_index, action.computation_type.name, (action.microbatch_index, n)
                stage = stages[index]
                if kind == "BACKWARD_WEIGHT" or (kind == "FORWARD" and index == 0):
                    begin: float | None = 0.0  # behind what the rank itself has done
                else:
                    begin = arrivals.get(("F" if kind == "FORWARD" else "B", index, *rest))
                if begin is None:
                    break
                left.pop(0)
                moved = True
                seconds = {
                    "FORWARD": stage.forward_s,
                    "BACKWARD_INPUT": stage.input_s,
                    "BACKWARD_WEIGHT": stage.weight_s,
                    "FULL_BACKWARD": stage.input_s + stage.weight_s,
                }
                now = clocks[rank] = max(clocks[rank], begin) + seconds[kind]
                if kind == "FORWARD" and index + 1 < len(stages):
                    send("F", index, index + 1, rest, stage.output_bytes, now)
                elif kind == "FORWARD":
                    arrivals["B", index, *rest] = now
                elif kind != "BACKWARD_WEIGHT" and index:
                    send("B", index, index - 1, rest, stages[index - 1].output_bytes, now)
                if not left or left[0][0] != n:
                    clocks[rank] += updates[rank]
                    through[rank].append(clocks[rank])
        if not moved:
            raise ValueError("the schedule deadlocks")
    half = _MINIBATCHES // 2
    return max((times[-1] - times[half - 1]) / (_MINIBATCHES - half) for times in through.values())
