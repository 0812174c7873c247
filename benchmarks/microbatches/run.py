"""What micro-batches do to the accuracy of methods with a delay.

    python benchmarks/microbatches/run.py --data-dir FOLDER --seeds 0 1        # FOLDER holds cifar-10-batches-py

A 14-layer ResNet of width 8 on the first 10,000 CIFAR-10 images, 8 epochs, batch 128, K=4 stages, SGD
(lr 0.05, momentum 0.9, weight decay 5e-4, cosine to 0), crop and flip, one thread: about 1.5 minutes
a run on one core. Every finished run is a line of results/microbatches.jsonl; a run that is there is not repeated.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy

import dtrp
from dtrp.data import Dataset, batches, load_data
from dtrp.models import cifar_resnet
from dtrp.train import lr_factor

EPOCHS, BATCH, STAGES, TRAIN = 8, 128, 4, 10_000
CELLS = [(method, parts) for method in ("bp", "fdg", "dtr", "dtrp") for parts in (1, 4)]


def train(data: Dataset, method: str, num_microbatches: int, seed: int) -> dict[str, Any]:
    """One run; its line."""
    torch.manual_seed(seed)
    model = cifar_resnet(14, width=8, num_classes=10)
    updates = EPOCHS * -(-len(data.train_y) // BATCH)
    factor = lr_factor("cosine", 0, updates)
    pipe = dtrp.Pipeline(
        model,
        lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.9, weight_decay=5e-4),
        cross_entropy,
        num_stages=STAGES,
        method=method,
        num_microbatches=num_microbatches,
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, factor),
        seed=seed,
    )
    start = time.perf_counter()
    losses: list[torch.Tensor] = []
    for epoch in range(EPOCHS):
        losses = [
            pipe.step(x, y)
            for x, y in batches(data.train_x, data.train_y, BATCH, dataset=data, seed=seed, epoch=epoch, augment=True)
        ]
    pipe.flush()
    seconds = time.perf_counter() - start
    correct = 0
    for x, y in batches(data.test_x, data.test_y, 500, dataset=data, seed=0, epoch=0, augment=False, shuffle=False):
        correct += int((pipe.infer(x).argmax(1) == y).sum())
    return {
        "method": method,
        "num_microbatches": num_microbatches,
        "seed": seed,
        "test_accuracy": correct / len(data.test_y),
        "train_loss": float(torch.stack(losses).mean()),
        "delays": {k: dict(counter) for k, counter in pipe.delays().items()},
        "seconds": seconds,
        "model": "cifar_resnet(14, width=8)",
        "num_stages": STAGES,
        "epochs": EPOCHS,
        "batch": BATCH,
        "train_images": len(data.train_y),
        "threads": 1,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "dtrp": dtrp.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "microbatches.jsonl")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = [json.loads(line) for line in options.out.read_text().splitlines()] if options.out.exists() else []
    done = {(row["method"], row["num_microbatches"], row["seed"]) for row in rows}
    data = load_data("cifar10", options.data_dir).limit(TRAIN, None)
    for seed in options.seeds:
        for method, num_microbatches in CELLS:
            if (method, num_microbatches, seed) in done:
                continue
            rows.append(train(data, method, num_microbatches, seed))
            with open(options.out, "a") as file:
                file.write(json.dumps(rows[-1]) + "\n")
    for method, num_microbatches in CELLS:
        found = [r["test_accuracy"] for r in rows if (r["method"], r["num_microbatches"]) == (method, num_microbatches)]
        spread = statistics.stdev(found) if len(found) > 1 else float("nan")
        if found:
            print(f"{method:10} A={num_microbatches}  {statistics.mean(found):6.2%} +- {spread:.2%}  n={len(found)}")


if __name__ == "__main__":
    main()
