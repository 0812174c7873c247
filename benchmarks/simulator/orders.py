"""What a delay costs in time: orders of work for backwards in two parts, on eight stages. No network is run.

    python benchmarks/simulator/orders.py    # a minute; results/orders.jsonl

For each set of parts F, R, I and W of a slot, and each link, the planner searches orders of work
(`dtrp.planning.find_orders`). An entry has its frontier: by largest delay in updates, with one micro-batch, the shortest
slot found, and the per cent by which it is longer than F+R+I+W.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import dtrp
from dtrp.planning import FoundOrder, Parts, find_orders

RESULTS = Path(__file__).parent / "results"
NUM_STAGES = 8
PARTS = {
    "equal": (1.0, 1.0, 1.0, 1.0),
    "a longer I": (1.0, 1.0, 1.15, 0.85),
    "ResNet-20": (28.0, 31.0, 26.0, 18.0),  # ms, of blocks 2 to 6
    "I twice W": (32.0, 36.0, 47.0, 21.0),
}
LINKS = (0.0, 0.05, 0.2)  # of a forward


def simulated(found: FoundOrder, parts: Parts, link_s: float) -> float:
    """Seconds of a slot of the order, by the simulator of schedules."""
    return dtrp.simulate(
        dtrp.get_method("dtrp-split", leads=found.leads, orders=found.orders), num_stages=NUM_STAGES, num_minibatches=400,
        forward_s=[parts.repeat_s] * (NUM_STAGES - 1) + [parts.forward_s], nograd_forward_s=parts.forward_s,
        backward_s=parts.input_s + parts.weight_s, weight_s=parts.weight_s, latency_s=link_s,
    ).minibatch_s  # fmt: skip


def entry(name: str, seconds: tuple[float, float, float, float], link: float) -> dict[str, Any]:
    parts, link_s = Parts(*seconds), link * seconds[0]
    fastest = sum(seconds)
    frontier = [
        {
            "delay": found.delay,
            "slower": 100 * (simulated(found, parts, link_s) / fastest - 1),
            "said": 100 * (found.slot_s / fastest - 1),
            "leads": found.leads,
            "orders": found.orders,
        }
        for found in find_orders([parts] * NUM_STAGES, [link_s] * (NUM_STAGES - 1), repeats=True)
    ]
    return {"name": name, "stages": NUM_STAGES, "parts": seconds, "link": link, "frontier": frontier}


def main() -> None:
    rows = [entry(name, seconds, link) for name, seconds in PARTS.items() for link in LINKS]
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "orders.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for row in rows:
        print(row["name"], row["link"], *(f"{point['delay']}: {point['slower']:.1f} %" for point in row["frontier"]))


if __name__ == "__main__":
    main()
