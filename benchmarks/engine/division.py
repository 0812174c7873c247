"""What dividing backwards costs, in one process: dtrp-split beside dtrp, in turns in one run.

    python benchmarks/engine/division.py       # about eight minutes on one core

Both do the same work in the same stages but for the division: a forward without a graph, its repetition, a backward in
one part or in two, an update. ResNet-20 at batch 128 and a GPT of width 256, K = 4 with as many micro-batches, one
thread, the heap kept. A ratio is one of medians; the lines go to results/division.jsonl.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import dtrp
from dtrp.launch.heap import keep_heap
from dtrp.models import get_model

METHODS = ("dtrp", "dtrp-split")


def sgd(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.01, momentum=0.9)


def tokens_loss(out: Tensor, y: Tensor) -> Tensor:
    return cross_entropy(out.flatten(0, 1), y.flatten())


def network(name: str) -> tuple[nn.Sequential, Tensor, Tensor, Callable[[Tensor, Tensor], Tensor]]:
    if name == "gpt":
        tokens = torch.randint(65, (2, 32, 64))
        return get_model("gpt", num_classes=65, width=256, layers=6), tokens[0], tokens[1], tokens_loss
    return get_model(name), torch.randn(128, 3, 32, 32), torch.randint(10, (128,)), cross_entropy


def measure(name: str, rounds: int, warmup: int = 5) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Seconds of each step by method; and the share of the weights whose gradients wait, at each stage of dtrp-split."""
    model, x, y, loss_fn = network(name)
    pipes = {m: dtrp.Pipeline(copy.deepcopy(model), sgd, loss_fn, num_stages=4, method=m, seed=0) for m in METHODS}
    times: dict[str, list[float]] = {method: [] for method in METHODS}
    for number in range(warmup + rounds):
        for method, pipe in pipes.items():
            begin = time.perf_counter()
            pipe.step(x, y)
            if number >= warmup:
                times[method].append(time.perf_counter() - begin)
    return times, {str(k): share.elements for k, share in pipes["dtrp-split"].deferred().items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["resnet20", "gpt"])
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "division.jsonl")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    kept = keep_heap()
    for name in options.models:
        times, shares = measure(name, options.rounds)
        medians = {method: statistics.median(values) for method, values in times.items()}
        record = {
            "model": name, "ratio": medians["dtrp-split"] / medians["dtrp"], "median_s": medians,
            "quartiles_s": {method: statistics.quantiles(values, n=4) for method, values in times.items()},
            "deferred": shares, "heap_kept": kept, "rounds": options.rounds, "threads": 1, "torch": torch.__version__,
            "python": platform.python_version(), "machine": platform.machine(), "dtrp": dtrp.__version__,
        }  # fmt: skip
        with open(options.out, "a") as file:
            file.write(json.dumps(record) + "\n")
        print(name, f"{record['ratio']:.3f}", flush=True)


if __name__ == "__main__":
    main()
