"""A zero-bubble schedule, simulated: backward in two halves, of which the second fills the waits.

After ZB-H1 (Qi et al., Zero bubble pipeline parallelism, arXiv:2401.10241): B makes the input's gradient, which the stage
before waits for; W makes the weights', which nobody waits for. A stage that is free runs the first that it can of

    B    if its gradient has arrived
    F    if its input has, and fewer than K micro-batches of this stage are between their F and their W (1F1B's memory)
    W    of the oldest

and begins the next mini-batch when it has run all W of this one and its update. It is synchronous: no delay. Their
hand-made and solver-made orders are a little better than this greedy one, and worse at none of the numbers here.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Sequence


def zero_bubble(
    num_stages: int,
    num_minibatches: int,
    num_microbatches: int,
    *,
    forward_s: float,
    input_backward_s: float,
    weight_backward_s: float,
    latency_s: float | Sequence[float] = 0.0,
    wire_s: float = 0.0,
) -> float:
    """Seconds a mini-batch in steady state (over the second half of the run).

    Args:
        num_stages: K.
        num_minibatches: the length of the run.
        num_microbatches: A.
        forward_s: F of one micro-batch on one stage.
        input_backward_s: B, the half of the backward that makes the input's gradient.
        weight_backward_s: W, the half that makes the weights'.
        latency_s: of a message; one, or one a hop.
        wire_s: how long a message occupies its link.
    """
    hops = [latency_s] * (num_stages - 1) if isinstance(latency_s, (int, float)) else list(latency_s)
    total = num_minibatches * num_microbatches
    inputs: list[deque[float]] = [deque() for _ in range(num_stages)]  # when they arrive
    gradients: list[deque[float]] = [deque() for _ in range(num_stages)]
    inputs[0].extend([0.0] * total)
    down, up = [0.0] * num_stages, [0.0] * num_stages  # when the link of a stage is free
    forwards, backwards, weights = ([0] * num_stages for _ in range(3))
    free = [0.0] * num_stages
    ends: list[float] = []
    queue = [(0.0, k) for k in range(num_stages)]
    heapq.heapify(queue)
    while queue:
        now, k = heapq.heappop(queue)
        if now < free[k]:
            continue
        minibatch_end = (weights[k] // num_microbatches + 1) * num_microbatches  # micro-batches up to its update
        has_gradient = bool(gradients[k]) and gradients[k][0] <= now
        may_forward = forwards[k] < min(minibatch_end, total) and forwards[k] - weights[k] < num_stages
        if has_gradient:
            gradients[k].popleft()
            backwards[k] += 1
            end = now + input_backward_s
            if k:
                up[k] = max(end, up[k]) + wire_s
                gradients[k - 1].append(up[k] + hops[k - 1])
                heapq.heappush(queue, (gradients[k - 1][-1], k - 1))
        elif may_forward and inputs[k] and inputs[k][0] <= now:
            inputs[k].popleft()
            forwards[k] += 1
            end = now + forward_s
            if k < num_stages - 1:
                down[k] = max(end, down[k]) + wire_s
                inputs[k + 1].append(down[k] + hops[k])
                heapq.heappush(queue, (inputs[k + 1][-1], k + 1))
            else:
                gradients[k].append(end)
        elif weights[k] < backwards[k]:
            weights[k] += 1
            end = now + weight_backward_s
            if k == 0 and weights[k] % num_microbatches == 0:
                ends.append(end)
        else:
            continue  # woken when something arrives
        free[k] = end
        heapq.heappush(queue, (end, k))
    half = len(ends) // 2
    return (ends[-1] - ends[half - 1]) / (len(ends) - half)
