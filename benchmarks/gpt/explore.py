"""What the recipe was looked for among: ways to draw the weights, learning rates, batches, cuts and predictions.

    python benchmarks/gpt/explore.py --data-dir FILE        # FILE: tiny Shakespeare

Each run of ``RUNS`` is a line of results/exploration.jsonl: what it does other than run.py, and its curve (seed 0). `draw` is the
deviation of the linear layers' weights (over sqrt(2 layers) where a block adds to its input) and that of the embeddings; without it
the weights are those of `dtrp.models.gpt`. A run that is there is not repeated.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
from pathlib import Path
from typing import Any

import torch
from run import FORMER_CUTS, RECIPE, train
from torch import nn

from dtrp.data import load_text

EQUAL = (2, 4, 6)  # the cuts that num_stages=4 gives
WIDE = {"batch": 32, "updates": 250, "cuts": EQUAL}
NARROW = {"width": 64, "batch": 32, "updates": 200, "cuts": EQUAL}
HALF = {"batch": 16, "updates": 250, "lr": 4e-3}
RUNS: list[tuple[str, dict[str, Any]]] = [
    *(("bp", {**WIDE, "lr": lr, "draw": draw}) for draw in ((0.02, 0.02), (0.05, 0.05)) for lr in (1e-3, 3e-3)),
    *(
        (method, {**NARROW, "lr": 3e-3, "draw": draw})
        for draw in ((0.02, 0.02), (0.02, 0.3), (0.07, 0.07), (0.07, 0.3))
        for method in ("bp", "dtrp")
    ),
    ("bp", {**NARROW, "lr": 3e-3, "draw": (0.125, 0.125)}),
    *((method, {**NARROW, "lr": 6e-3, "draw": (0.088, 1.0)}) for method in ("bp", "dtrp")),
    *((method, {**HALF, "cuts": EQUAL, "draw": (0.07, 0.5)}) for method in ("bp", "dtrp", "dtrp, linear")),
    ("bp", {**HALF, "cuts": EQUAL, "draw": (0.05, 0.05)}),
    ("bp", {**HALF, "cuts": EQUAL, "lr": 8e-3}),
    *(("dtrp, informed", {**HALF, "stop": 150, "draw": draw}) for draw in ((0.05, 0.05), (0.07, 0.5))),
]


def redraw(model: nn.Module, linear: float, embedding: float, layers: int) -> None:
    for name, p in model.named_parameters():
        if p.dim() > 1:
            adds = name.endswith(("attention.out.weight", "mlp.down.weight"))
            deviation = linear / math.sqrt(2 * layers) if adds else linear
            nn.init.normal_(p, std=embedding if name.startswith("embedding") else deviation)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", required=True, help="the text file")
    parser.add_argument("--out", default=str(Path(__file__).parent / "results" / "exploration.jsonl"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    data, out = load_text(Path(args.data_dir), RECIPE["context"]), Path(args.out)
    done = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    for method, other in RUNS:
        run = {"method": method, "other": json.loads(json.dumps(other))}
        if any(run.items() <= row.items() for row in done):
            continue
        change = None
        if "draw" in other:
            linear, embedding = other["draw"]
            change = functools.partial(redraw, linear=linear, embedding=embedding, layers=RECIPE["layers"])
        row = train(data, method, 0, {**RECIPE, "cuts": FORMER_CUTS, **other}, change)
        with out.open("a") as file:
            file.write(json.dumps({**run, "curve": row["curve"], "prediction_error": row["prediction_error"]}) + "\n")
        print(method, other, row["curve"], flush=True)


if __name__ == "__main__":
    main()
