"""Which prediction, which optimizer? Accuracy and loss against the delay, each optimizer beside backpropagation with the same one.

    python benchmarks/frontier/run.py wide --data-dir DIR     # ResNet-14 of width 8, K = 8, on 5,000 CIFAR-10 images, 6 epochs
    python benchmarks/frontier/run.py gpt --data-dir FILE     # a GPT of 8 blocks, one a stage, on a text: tiny Shakespeare

``wide`` is the part of that name of benchmarks/accuracy, and ``gpt`` the recipe of benchmarks/gpt with eight blocks. Runs are
done seed after seed, what is checked first; a finished one is a line of results/<part>.jsonl with all its settings and is
not repeated, so several may work on different --seeds, --optimizers, --methods, --predictions or --microbatches.
"""

from __future__ import annotations

import argparse
import os
import runpy
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import dtrp
from dtrp.data import load_text

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from training import add_row, read_rows, train  # noqa: E402

ACCURACY, GPT = (runpy.run_path(str(HERE.parent / name / "run.py")) for name in ("accuracy", "gpt"))
STAGES = 8
METHODS = ("dtrp-split", "dtrp-1f1b", "dtrp")
PREDICTIONS = ("none", "linear", "rollout", "informed", "last", "scaled", "auto")
RATES = {  # what was tried for bp, until the best had a worse one on either side; the chosen one first
    "wide": {"sgd": (0.1,), "adamw": (1e-2, 3e-3, 1e-3, 3e-2), "muon": (3e-2, 1e-2, 3e-3, 1e-3, 1e-1)},
    "gpt": {"adamw": (8e-3,), "muon": (8e-3,)},  # that of AdamW is of benchmarks/gpt
}  # fmt: skip
DECAY = {"sgd": 5e-4, "adamw": 0.05, "muon": 0.05}  # of wide; gpt has its recipe's
STRETCHED = (("informed", 8, 1.02), ("linear", 1, 1.1))
BLOCKS = {"layers": 8, "cuts": tuple(range(2, 9))}  # the embedding with the first block, the head with the last


@dataclass(frozen=True)
class Run:
    """``prediction`` none: without; None: of a method that flushes. ``stretch``: updates, over those of bp."""

    optimizer: str
    method: str
    prediction: str | None
    num_microbatches: int
    seed: int
    lr: float
    stretch: float = 1.0

    @classmethod
    def of(cls, row: dict[str, Any]) -> Run:
        return cls(**{name: row[name] for name in cls.__dataclass_fields__ if name in row})


def runs(part: str, seeds: Sequence[int]) -> Iterator[Run]:
    """In the order of running: the first seed has all of them, the others what is compared over seeds."""
    counts = (4, 1) if part == "wide" else (8, 1)
    for optimizer, rates in RATES[part].items():
        yield from (Run(optimizer, "bp", None, counts[0], 0, lr) for lr in rates if 0 in seeds)
    for seed in seeds:
        for optimizer, rates in RATES[part].items():
            main = optimizer == next(iter(RATES[part]))
            for count in counts:
                if part == "wide" or count == counts[0]:  # without BatchNorm bp is the same at every A
                    yield Run(optimizer, "bp", None, count, seed, rates[0])
                for method in METHODS if main else METHODS[:1]:
                    for prediction in predictions(part, optimizer, method, count, seed, main=main):
                        yield Run(optimizer, method, prediction, count, seed, rates[0])
        if part == "gpt":  # does it come to bp's loss in so many more updates, with a schedule of that length?
            for prediction, count, stretch in STRETCHED:
                yield Run("adamw", METHODS[0], prediction, count, seed, RATES[part]["adamw"][0], stretch)


def predictions(part: str, optimizer: str, method: str, count: int, seed: int, *, main: bool) -> tuple[str, ...]:
    """Of one method; of the GPT as many as sixty runs in all allow."""
    of_updates = ("none", "last" if optimizer == "muon" else "linear", "auto")
    if not main and part == "gpt":
        return of_updates if seed == 0 and count > 1 else of_updates[2:] if seed == 0 or count > 1 else ()
    if not main:
        return of_updates
    if part == "gpt" and seed > 0:
        return ("informed" if count > 1 else "linear", "auto") if method == METHODS[0] else ()
    if part == "gpt" and count == 1 and method == "dtrp":
        return ()
    # With one micro-batch nothing of the next gradient is there before it is whole: informed is linear.
    return tuple(name for name in PREDICTIONS if count > 1 or name != "informed")


def train_wide(run: Run, data_dir: str, path: Path) -> None:
    settings: dict[str, str | None] = ACCURACY["COMMON"] | ACCURACY["OWN"]["wide"] | {
        "data-dir": data_dir, "model": ACCURACY["MODELS"]["wide"], "method": run.method, "seed": str(run.seed),
        "stages": str(STAGES), "num-microbatches": str(run.num_microbatches), "prediction": run.prediction,
        "optimizer": run.optimizer, "lr": str(run.lr), "weight-decay": str(DECAY[run.optimizer]),
    }  # fmt: skip
    train(settings, str(run), path, None, lambda summary: {"weight_decay": DECAY[run.optimizer], **vars(run)})


def train_gpt(run: Run, data: Any, path: Path) -> None:
    torch.set_num_threads(1)
    recipe = {**GPT["RECIPE"], **BLOCKS, "num_microbatches": run.num_microbatches, "lr": run.lr}
    recipe["updates"] = round(recipe["updates"] * run.stretch)
    predict = {} if run.prediction is None else {"predict": None if run.prediction == "none" else run.prediction}
    decay, betas = recipe["weight_decay"], recipe["betas"]

    def optimizer(params: Any, *, named: Any) -> torch.optim.Optimizer:
        if run.optimizer == "muon":
            options = {"lr": run.lr, "weight_decay": decay, "betas": betas, "skip": ("embedding", "head")}
            return dtrp.optim.MuonAdamW(named, **options)
        return torch.optim.AdamW(params, lr=run.lr, weight_decay=decay, betas=betas)

    row: dict[str, Any] = GPT["train"](
        data, dtrp.get_method(run.method, **predict), run.seed, recipe, optimizer=optimizer, every=25
    )
    add_row(path, {**row, **vars(run)})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["wide", "gpt"])
    parser.add_argument("--data-dir", required=True, help="where cifar-10-batches-py lies; the text file")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    for name in ("optimizers", "methods", "predictions", "microbatches"):
        parser.add_argument(f"--{name}", help="some of them, as a,b")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    path = HERE / "results" / f"{options.part}.jsonl"
    data: Any = (
        options.data_dir if options.part == "wide" else load_text(Path(options.data_dir), GPT["RECIPE"]["context"])
    )
    for run in runs(options.part, options.seeds):
        named = {"optimizers": run.optimizer, "methods": run.method, "predictions": str(run.prediction),
                 "microbatches": str(run.num_microbatches)}  # fmt: skip
        wanted = all(getattr(options, name) is None or word in getattr(options, name).split(",")
                     for name, word in named.items())  # fmt: skip
        if not wanted or run in map(Run.of, read_rows(path)):
            continue
        print(run, flush=True)
        (train_wide if options.part == "wide" else train_gpt)(run, data, path)


if __name__ == "__main__":
    main()
