"""Plans past one machine: synchronous schedules and dtrp as K, A and the links' latency grow. No network is run.

    python benchmarks/simulator/run.py            # both tables, in a minute or two; results/*.jsonl

Every entry is the time of a mini-batch over what K workers would take if none ever waited and nothing were repeated,
A(F+B): 1.00 is perfect. A stage's F of a micro-batch takes 1, its backward 2 (input half and weight half 1 each), its
update nothing. dtrp and fdg take the smallest `ahead` (1, 1.25, 1.5, 2, 3, ...) that is within 2 % of the fastest.
"""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

from zero_bubble import zero_bubble

import dtrp
from dtrp.schedule import lead, steady_delay

RESULTS = Path(__file__).parent / "results"
F, B = 1.0, 2.0
LEADS = (1, 1.25, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32)


def synchronous(method: str, num_stages: int, num_microbatches: int, latency: float, wire: float = 0.0) -> float:
    if method == "zero-bubble":
        took = zero_bubble(
            num_stages, 4, num_microbatches, forward_s=F, input_backward_s=B / 2, weight_backward_s=B / 2,
            latency_s=latency, wire_s=wire,
        )  # fmt: skip
    else:
        took = dtrp.simulate(
            method, num_stages=num_stages, num_minibatches=4, num_microbatches=num_microbatches, forward_s=F, backward_s=B,
            latency_s=latency, message_bytes=wire, bandwidth_bytes_s=1.0,
        ).minibatch_s  # fmt: skip
    return took / (num_microbatches * (F + B))


def decoupled(name: str, num_stages: int, num_microbatches: int, latency: float, wire: float = 0.0) -> dict[str, Any]:
    """At the smallest lead that hides the links: its time over the ideal, and the largest delay."""
    tried = []
    for ahead, backward_first in itertools.product(LEADS, (True, False)):
        method = dtrp.get_method(name, ahead=ahead, backward_first=backward_first)
        longest = lead(method, num_stages, 0)
        if longest > 40 * num_stages or (tried and min(t["ratio"] for t in tried) < 1.001 * BEST[name]):
            continue
        took = dtrp.simulate(
            method, num_stages=num_stages, num_minibatches=3 * math.ceil(longest / num_microbatches) + 40,
            num_microbatches=num_microbatches, forward_s=F, backward_s=B, latency_s=latency, message_bytes=wire,
            bandwidth_bytes_s=1.0,
        ).minibatch_s  # fmt: skip
        delay = steady_delay(method, num_stages, 0, num_microbatches, 0)
        tried.append(
            {
                "ratio": took / (num_microbatches * (F + B)),
                "ahead": ahead,
                "backward_first": backward_first,
                "delay": delay,
            }
        )
    fastest = min(t["ratio"] for t in tried)
    return min((t for t in tried if t["ratio"] <= 1.02 * fastest), key=lambda t: (t["delay"], t["ahead"]))


BEST = {"dtrp": (2 * F + B) / (F + B), "fdg": 1.0}


def entries(num_stages: int, factor: int, latency: float, wire: float = 0.0) -> dict[str, Any]:
    a = factor * num_stages
    # The decoupled methods need no micro-batches to keep busy; A = K/2 and so on only bound their delay.
    few = max(1, num_stages // 2)
    return {
        "stages": num_stages, "num_microbatches": a, "latency": latency, "wire": wire,
        "bp": synchronous("bp", num_stages, a, latency, wire),
        "zero-bubble": synchronous("zero-bubble", num_stages, a, latency, wire),
        "dtrp": decoupled("dtrp", num_stages, few, latency, wire),
        "fdg": decoupled("fdg", num_stages, few, latency, wire),
    }  # fmt: skip


def show(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| K | A | hop / F | wire / F | 1F1B-flush | zero-bubble | dtrp (ahead, delay) | fdg (ahead, delay) |",
        "|" + "---|" * 8,
    ]
    for row in rows:
        async_cells = [f"{row[m]['ratio']:.2f} ({row[m]['ahead']:g}, {row[m]['delay']})" for m in ("dtrp", "fdg")]
        lines.append(
            f"| {row['stages']} | {row['num_microbatches']} | {row['latency']:g} | {row['wire']:g} | {row['bp']:.2f} | "
            f"{row['zero-bubble']:.2f} | {' | '.join(async_cells)} |"
        )
    return "\n".join(lines)


def main() -> None:
    RESULTS.mkdir(exist_ok=True)
    grid = [(k, factor, hop) for k in (4, 16, 64) for factor in (1, 4) for hop in (0.0, 0.1, 1.0, 4.0)]
    tables = {
        "crossing": [entries(k, factor, hop) for k, factor, hop in grid],
        # F = 20 ms on an accelerator: 0.05 ms in a data centre; 200 ms at home: 40 ms, and 1 MB at 5 MB/s.
        "places": [entries(k, 4, hop, wire) for k in (4, 16) for hop, wire in ((0.0025, 0.0), (0.2, 1.0))],
    }
    for name, rows in tables.items():
        (RESULTS / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        print(f"{name}\n\n{show(rows)}\n")


if __name__ == "__main__":
    main()
