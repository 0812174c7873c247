"""What a little work takes right after a sleep: the part of a sleeping stage's overhead that is the machine's.

    python benchmarks/throughput/cold.py

A forward, a backward and an update of a sleeping stage's size in plain PyTorch, in one process, at once after the last
one and after a sleep of F. Appends a line to results/cold.jsonl.
"""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path

import torch
from sleeping import BATCH, FORWARD_S, WIDTH, optimizer
from torch import nn
from torch.nn.functional import cross_entropy
from turns import environment

REPEATS = 200


def main() -> None:
    torch.set_num_threads(1)
    w = nn.Parameter(torch.zeros(WIDTH))
    x, y = torch.randn(BATCH, WIDTH), torch.randint(WIDTH, (BATCH,))
    sgd = optimizer([w])
    times: dict[float, list[float]] = {0.0: [], FORWARD_S: []}
    for _ in range(REPEATS):
        for pause, found in times.items():
            time.sleep(pause)
            began = time.perf_counter()
            cross_entropy(x + w, y).backward()  # type: ignore[no-untyped-call]
            sgd.step()
            sgd.zero_grad()
            found.append(time.perf_counter() - began)
    row = {"run": time.strftime("%Y-%m-%dT%H:%M:%S"), "repeats": REPEATS, "slept_ms": 1e3 * FORWARD_S, **environment()}
    row |= {
        "at_once_ms": 1e3 * statistics.median(times[0.0]),
        "after_sleep_ms": 1e3 * statistics.median(times[FORWARD_S]),
    }
    print(f"at once {row['at_once_ms']:.2f} ms, after a sleep of {row['slept_ms']:g} ms {row['after_sleep_ms']:.2f} ms")
    with open(Path(__file__).parent / "results" / "cold.jsonl", "a") as file:
        file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
