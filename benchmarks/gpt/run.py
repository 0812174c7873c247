"""A GPT trained without waiting: its validation loss against backpropagation's.

    python benchmarks/gpt/run.py --data-dir FILE --seeds 0 1 2        # FILE: a text, here tiny Shakespeare

The `gpt` of `dtrp.models`, character level: 6 layers, width 128, 4 heads, windows of 64 characters. 500 updates of 32 windows,
AdamW (learning rate 1e-3, weight decay 0.1, betas 0.9 and 0.99), a warm-up of 50 updates and a cosine to 0; K=4, 4 micro-batches,
one thread. dtr is dtrp without prediction. Every finished run is a line of results/gpt.jsonl, with the validation loss
(nats a character, over the text's last tenth) every 100 updates; a run that is there is not repeated.
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

import dtrp
from dtrp.data import TextDataset, batches, load_text
from dtrp.models import gpt
from dtrp.train import class_loss, lr_factor

UPDATES, BATCH, STAGES, PARTS, WARMUP, EVERY = 500, 32, 4, 4, 50, 100
SIZES = {"layers": 6, "width": 128, "heads": 4, "context": 64}
LR, DECAY, BETAS = 1e-3, 0.1, (0.9, 0.99)
METHODS = ("bp", "dtrp", "dtr", "dtrp-1f1b", "fr")


def validation_loss(pipe: dtrp.Pipeline, data: TextDataset) -> float:
    total = 0.0
    for x, y in batches(data.test_x, data.test_y, 250, dataset=data, seed=0, epoch=0, augment=False, shuffle=False):
        total += float(class_loss(pipe.infer(x), y, reduction="sum"))
    return total / data.test_y.numel()


def train(data: TextDataset, method: str, seed: int) -> dict[str, Any]:
    """One run; its line."""
    torch.manual_seed(seed)
    factor = lr_factor("cosine", WARMUP, UPDATES)
    pipe = dtrp.Pipeline(
        gpt(data.num_classes, **SIZES),
        lambda params: torch.optim.AdamW(params, lr=LR, weight_decay=DECAY, betas=BETAS),
        class_loss,
        num_stages=STAGES,
        method=method,
        num_microbatches=PARTS,
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, factor),
        seed=seed,
    )
    losses: list[float] = []
    curve: dict[int, float] = {}
    seconds, epoch = 0.0, 0
    while pipe.num_updates < UPDATES:
        for x, y in batches(data.train_x, data.train_y, BATCH, dataset=data, seed=seed, epoch=epoch, augment=False):
            began = time.perf_counter()
            losses.append(float(pipe.step(x, y)))
            if pipe.num_updates == UPDATES:
                pipe.flush()
            seconds += time.perf_counter() - began
            if pipe.num_updates % EVERY == 0:
                curve[pipe.num_updates] = validation_loss(pipe, data)
            if pipe.num_updates == UPDATES:
                break
        epoch += 1
    return {
        "method": method,
        "seed": seed,
        "validation_loss": curve[UPDATES],
        "curve": curve,
        "train_loss": statistics.mean(losses[-50:]),
        "delays": {k: dict(counter) for k, counter in pipe.delays().items()},
        "seconds": seconds,
        "config": {
            **SIZES, "num_stages": STAGES, "num_microbatches": PARTS, "updates": UPDATES, "batch": BATCH, "lr": LR,
            "weight_decay": DECAY, "betas": BETAS, "warmup": WARMUP, "lr_schedule": "cosine",
        },
        "train_windows": len(data.train_x),
        "test_windows": len(data.test_x),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "dtrp": dtrp.__version__,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", required=True, help="the text file")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--out", default=str(Path(__file__).parent / "results" / "gpt.jsonl"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    data = load_text(Path(args.data_dir), SIZES["context"])
    out = Path(args.out)
    rows = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    for seed in args.seeds:
        for method in args.methods:
            if any(row["method"] == method and row["seed"] == seed for row in rows):
                continue
            row = train(data, method, seed)
            rows.append(row)
            with out.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(
                f"{method:10} seed {seed}: validation loss {row['validation_loss']:.4f} in {row['seconds']:.0f} s",
                flush=True,
            )
    show(rows)


def show(rows: list[dict[str, Any]]) -> None:
    """Means over the seeds, and each method's excess over backpropagation's, seed by seed."""
    bp = {row["seed"]: row["validation_loss"] for row in rows if row["method"] == "bp"}
    print("method      seeds  validation loss    over bp's, %")
    for method in dict.fromkeys(row["method"] for row in rows):
        own = {row["seed"]: row["validation_loss"] for row in rows if row["method"] == method}
        excess = [100 * (own[seed] / bp[seed] - 1) for seed in own if seed in bp]
        spread = statistics.stdev(own.values()) if len(own) > 1 else float("nan")
        shown = " ".join(f"{value:+.2f}" for value in excess)
        print(f"{method:10} {len(own):6}  {statistics.mean(own.values()):.4f} ± {spread:.4f}  {shown}")


if __name__ == "__main__":
    main()
