"""A GPT trained without waiting: its validation loss against backpropagation's.

    python benchmarks/gpt/run.py --data-dir FILE --seeds 0 1 2        # FILE: a text, here tiny Shakespeare
    python benchmarks/gpt/run.py --data-dir FILE --cuts 2 3 5         # a block more in the first stage
    python benchmarks/gpt/run.py --data-dir FILE --tune               # other learning rates, beta1 and gamma

The `gpt` of `dtrp.models`, character level: 6 layers, width 128, 4 heads, windows of 64 characters. 500 updates of 16 windows,
AdamW (weight decay 0.1, betas 0.9 and 0.99), a warm-up of 50 updates and a cosine to 0; K=4, 4 micro-batches, one thread. The
learning rate is the best that explore.py tried for backpropagation; ``TUNING`` has what else was tried, at the cuts of
then. The embedding is a stage by itself and the others hold 2 blocks each (`cuts`): six blocks on four stages leave two in the
slowest one anyhow, and what the first stage holds is delayed most. A row is a method, and its prediction
where that is not its own. Every finished run is a line of results/gpt.jsonl, with the validation loss (nats a character, over
the text's last tenth; on the way, over 256 windows of it); a run that is there is not repeated.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import dtrp
from dtrp import Method
from dtrp.data import TextDataset, batches, load_text
from dtrp.models import gpt
from dtrp.train import class_loss, lr_factor

Recipe = dict[str, Any]
RECIPE: Recipe = {
    "layers": 6, "width": 128, "heads": 4, "context": 64, "cuts": (1, 3, 5), "num_microbatches": 4, "updates": 500, "batch": 16,
    "lr": 8e-3, "weight_decay": 0.1, "betas": (0.9, 0.99), "warmup": 50, "lr_schedule": "cosine",
}  # fmt: skip
FORMER_CUTS = (2, 3, 5)  # the first block beside the embedding, one in the second stage
TUNING: list[tuple[str, int, Recipe]] = [  # method, seed, what is other
    *(("bp", seed, {"lr": 1.6e-2}) for seed in (0, 1, 2)),
    ("bp", 0, {"lr": 3.2e-2}),
    ("dtrp-1f1b, informed", 0, {"lr": 1.6e-2}),
    *((method, 0, {"betas": (0.95, 0.99)}) for method in ("bp", "dtrp, informed")),
    ("dtrp, informed, gamma 0.8", 1, {}),
]
EVERY, ON_THE_WAY = 50, 256  # updates, windows
METHODS: dict[str, Method] = {
    "bp": dtrp.get_method("bp"),
    "dtrp, informed": dtrp.get_method("dtrp", predict="informed"),
    "dtrp": dtrp.get_method("dtrp"),
    "dtrp, linear": dtrp.get_method("dtrp", predict="linear"),
    "dtr": dtrp.get_method("dtr"),
    "dtrp-1f1b, informed": dtrp.get_method("dtrp-1f1b", predict="informed"),
    "dtrp-1f1b": dtrp.get_method("dtrp-1f1b"),
    "dtrp, informed, gamma 0.8": dtrp.get_method("dtrp", predict="informed", lr_shrink=0.8),
    "fr": dtrp.get_method("fr"),
    "spectrain": dtrp.get_method("spectrain"),
}


def validation_loss(pipe: dtrp.Pipeline, data: TextDataset, windows: int) -> float:
    test_x, test_y = data.test_x[:windows], data.test_y[:windows]
    total = 0.0
    for x, y in batches(test_x, test_y, 250, dataset=data, seed=0, epoch=0, augment=False, shuffle=False):
        total += float(class_loss(pipe.infer(x), y, reduction="sum"))
    return total / test_y.numel()


def train(
    data: TextDataset,
    method: str | Method,
    seed: int,
    recipe: Recipe,
    change: Callable[[nn.Module], None] | None = None,
    *,
    optimizer: Callable[..., torch.optim.Optimizer] | None = None,
    every: int = EVERY,
) -> dict[str, Any]:
    """One run; its line. ``change`` draws the model's weights in another way; ``optimizer``: in place of AdamW."""
    torch.manual_seed(seed)
    sizes = {name: recipe[name] for name in ("layers", "width", "heads", "context")}
    model = gpt(data.num_classes, **sizes)
    if change is not None:
        change(model)
    updates, decay, betas = recipe["updates"], recipe["weight_decay"], recipe["betas"]
    factor = lr_factor(recipe["lr_schedule"], recipe["warmup"], updates)
    pipe = dtrp.Pipeline(
        model,
        optimizer or (lambda params: torch.optim.AdamW(params, lr=recipe["lr"], weight_decay=decay, betas=betas)),
        class_loss,
        cuts=recipe["cuts"],
        method=METHODS[method] if isinstance(method, str) else method,
        num_microbatches=recipe["num_microbatches"],
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, factor),
        seed=seed,
    )
    pipe.watch_prediction(every=7)  # all places in a mini-batch come up
    losses: list[float] = []
    curve: dict[int, float] = {}
    seconds, epoch, stop = 0.0, 0, recipe.get("stop", updates)
    while pipe.num_updates < stop:
        for x, y in batches(
            data.train_x, data.train_y, recipe["batch"], dataset=data, seed=seed, epoch=epoch, augment=False
        ):
            began = time.perf_counter()
            losses.append(float(pipe.step(x, y)))
            if pipe.num_updates == stop:
                pipe.flush()
            seconds += time.perf_counter() - began
            if pipe.num_updates % every == 0 or pipe.num_updates == updates:
                curve[pipe.num_updates] = validation_loss(pipe, data, ON_THE_WAY)
            if pipe.num_updates == stop:
                break
        epoch += 1
    return {
        "method": method if isinstance(method, str) else method.name,
        "seed": seed,
        "validation_loss": validation_loss(pipe, data, len(data.test_x)),
        "curve": curve,
        "train_loss": statistics.mean(losses[-50:]),
        "delays": {k: dict(counter) for k, counter in pipe.delays().items()},
        "prediction_error": prediction_error(pipe),
        "seconds": seconds,
        "config": recipe,
        "train_windows": len(data.train_x),
        "test_windows": len(data.test_x),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "dtrp": dtrp.__version__,
    }  # fmt: skip


def prediction_error(pipe: dtrp.Pipeline) -> dict[int, tuple[float, float]]:
    """Means by stage: the distance of the weights that a forward read from the true ones, and of those as they were."""
    errors: dict[int, list[tuple[float, float]]] = {}
    for error in pipe.prediction_errors():
        errors.setdefault(error.stage, []).append((error.read, error.stale))
    return {k: (statistics.mean(r for r, _ in each), statistics.mean(s for _, s in each)) for k, each in errors.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", required=True, help="the text file")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    own = [method for method in METHODS if "gamma" not in method]
    parser.add_argument("--methods", nargs="+", default=own, choices=METHODS)
    parser.add_argument(
        "--cuts", type=int, nargs="+", default=RECIPE["cuts"], help="first layer of each stage but the first"
    )
    parser.add_argument("--tune", action="store_true", help="the runs of TUNING")
    parser.add_argument("--out", help="results/gpt.jsonl, or results/tuning.jsonl with --tune")
    args = parser.parse_args()
    torch.set_num_threads(1)
    data = load_text(Path(args.data_dir), RECIPE["context"])
    out = Path(args.out or Path(__file__).parent / "results" / ("tuning.jsonl" if args.tune else "gpt.jsonl"))
    runs = [(method, seed, {**RECIPE, "cuts": tuple(args.cuts)}) for seed in args.seeds for method in args.methods]
    if args.tune:
        runs = [(method, seed, {**RECIPE, "cuts": FORMER_CUTS, **other}) for method, seed, other in TUNING]
    rows = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    for method, seed, recipe in runs:
        run = method, seed, json.loads(json.dumps(recipe))
        if any((row["method"], row["seed"], row["config"]) == run for row in rows):
            continue
        row = train(data, method, seed, recipe)
        rows.append(row)
        with out.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(
            f"{method:20} seed {seed}, {recipe['updates']} updates at {recipe['lr']}: validation loss "
            f"{row['validation_loss']:.4f} in {row['seconds']:.0f} s",
            flush=True,
        )
    if not args.tune:
        show([row for row in rows if row["config"]["cuts"] == list(args.cuts)])


def show(rows: list[dict[str, Any]]) -> None:
    """Means over the seeds, and each method's excess over backpropagation's, seed by seed."""
    bp = {row["seed"]: row["validation_loss"] for row in rows if row["method"] == "bp"}
    print("method                seeds  validation loss    over bp's, %")
    for method in dict.fromkeys(row["method"] for row in rows):
        own = {row["seed"]: row["validation_loss"] for row in rows if row["method"] == method}
        excess = [100 * (own[seed] / bp[seed] - 1) for seed in own if seed in bp]
        spread = statistics.stdev(own.values()) if len(own) > 1 else float("nan")
        shown = " ".join(f"{value:+.2f}" for value in excess)
        print(f"{method:20} {len(own):6}  {statistics.mean(own.values()):.4f} ± {spread:.4f}  {shown}")


if __name__ == "__main__":
    main()
