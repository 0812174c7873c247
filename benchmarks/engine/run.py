"""What the engine itself costs, in one process: against a plain PyTorch loop, side by side in one run.

    python benchmarks/engine/run.py            # about 10 minutes on one core
    python benchmarks/engine/run.py --device cuda --model resnet18

Two ratios of medians, ResNet-20 (CIFAR form), batch 128, SGD with momentum, one thread:

    bp     Pipeline(method="bp", num_stages=1)  /  the plain loop
    dtrp   Pipeline(method="dtrp", num_stages=4)  /  (the plain loop + one no-grad forward of stages 0..2)

The contestants take turns, a step each, so that a slow moment of the machine hits all of them. A GPU is through with a
step before its time is taken.
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
from torch import nn
from torch.nn.functional import cross_entropy

import dtrp
from dtrp.models import get_model


def sgd(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.01, momentum=0.9, weight_decay=5e-4)


def contestants(batch: int, model_name: str, device: str) -> dict[str, Callable[[], None]]:
    """A step of each, on its own copy of the model."""
    model = get_model(model_name).to(device)
    x, y = torch.randn(batch, 3, 32, 32, device=device), torch.randint(10, (batch,), device=device)
    plain = copy.deepcopy(model)
    optimizer = sgd(list(plain.parameters()))

    def plain_step() -> None:
        optimizer.zero_grad()
        cross_entropy(plain(x), y).backward()
        optimizer.step()

    front = dtrp.Pipeline(copy.deepcopy(model), sgd, cross_entropy, num_stages=4, num_microbatches=1).stages[:3]

    def nograd_forward() -> None:
        h = x
        with torch.no_grad():
            for stage in front:
                h = stage(h)

    bp = dtrp.Pipeline(copy.deepcopy(model), sgd, cross_entropy, method="bp", num_stages=1, num_microbatches=1)
    decoupled = dtrp.Pipeline(copy.deepcopy(model), sgd, cross_entropy, method="dtrp", num_stages=4, num_microbatches=1)
    return {
        "plain": plain_step,
        "nograd": nograd_forward,
        "bp": lambda: bp.step(x, y) and None,
        "dtrp": lambda: decoupled.step(x, y) and None,
    }


def measure(rounds: int, batch: int, model: str = "resnet20", device: str = "cpu") -> dict[str, list[float]]:
    """Seconds a step, after a warm-up past dtrp's start-up."""
    steps = contestants(batch, model, device)
    finish = torch.cuda.synchronize if device != "cpu" else lambda: None
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds + 10):
        for name, step in steps.items():
            finish()
            start = time.perf_counter()
            step()
            finish()
            if number >= 10:
                times[name].append(time.perf_counter() - start)
    return times


def ratios(times: dict[str, list[float]]) -> dict[str, float]:
    median = {name: statistics.median(values) for name, values in times.items()}
    return {"bp": median["bp"] / median["plain"], "dtrp": median["dtrp"] / (median["plain"] + median["nograd"])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet20")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "engine.jsonl")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    times = measure(options.rounds, options.batch, options.model, options.device)
    record = {
        "ratios": ratios(times),
        "median_s": {name: statistics.median(values) for name, values in times.items()},
        "quartiles_s": {name: statistics.quantiles(values, n=4) for name, values in times.items()},
        "rounds": options.rounds,
        "batch": options.batch,
        "threads": 1,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "dtrp": dtrp.__version__,
        **({} if options.model == "resnet20" else {"model": options.model}),
        **({} if options.device == "cpu" else {"gpu": torch.cuda.get_device_name()}),
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with open(options.out, "a") as file:
        file.write(json.dumps(record) + "\n")
    print(json.dumps(record["ratios"]))


if __name__ == "__main__":
    main()
