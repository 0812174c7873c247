"""What the documents say of results/."""

import math
import statistics
from typing import Any

from shown import rows, table

EXPLORED = rows("gpt/results/exploration.jsonl")
ROWS = rows("gpt/results/gpt.jsonl")
TUNED = rows("gpt/results/tuning.jsonl")
FIRST = rows("gpt/results/first_recipe.jsonl")
ORDER = ["bp", "dtrp, informed", "dtrp-1f1b, informed", "dtrp, linear", "dtrp", "dtr", "dtrp-1f1b", "spectrain", "fr"]


def first() -> str:
    lines = []
    (bp,) = [row["validation_loss"] for row in FIRST if (row["method"], row["seed"]) == ("bp", 0)]
    for row in FIRST:
        if row["seed"] == 0:
            loss = row["validation_loss"]
            lines.append([f"`{row['method']}`", f"{loss:.3f}", f"{100 * (loss / bp - 1):.1f}"])
    return table(["method", "validation loss", "over bp's, %"], lines)


def _found(method: str, **other: Any) -> dict[str, Any]:
    (row,) = [row for row in EXPLORED if row["method"] == method and other.items() <= row["other"].items()]
    return row


def narrow() -> str:
    """Ways to draw the weights, at width 64."""
    lines = []
    for draw in ([0.02, 0.02], [0.02, 0.3], [0.07, 0.07], [0.07, 0.3], [0.088, 1.0]):
        bp, dtrp = (_found(method, width=64, draw=draw) for method in ("bp", "dtrp"))
        losses = [row["curve"]["200"] for row in (bp, dtrp)]
        over = 100 * (losses[1] / losses[0] - 1)
        lines.append(
            [f"{draw[0]}, {draw[1]}", str(bp["other"]["lr"]), *(f"{loss:.3f}" for loss in losses), f"{over:.1f}"]
        )
    return table(["linear layers, embeddings", "learning rate", "`bp`", "`dtrp`", "over bp's, %"], lines)


def full() -> str:
    """Predictions, at full width after 150 updates of 250."""
    lines = []
    for draw in ([0.05, 0.05], [0.07, 0.5]):
        bp = _found("bp", batch=16, draw=draw)["curve"]["150"]
        for method in ("bp", "dtrp", "dtrp, linear", "dtrp, informed"):
            found = [row for row in EXPLORED if row["method"] == method and row["other"].get("draw") == draw]
            found = [row for row in found if row["other"]["batch"] == 16]
            for row in found:
                loss, cuts = row["curve"]["150"], row["other"].get("cuts", [2, 3, 5])
                over = f"{100 * (loss / bp - 1):.1f}"
                lines.append([f"{draw[0]}, {draw[1]}", method, ", ".join(map(str, cuts)), f"{loss:.3f}", over])
    return table(["linear layers, embeddings", "method", "cuts", "validation loss", "over bp's, %"], lines)


def wide() -> str:
    """Backpropagation at full width: GPT-2's deviation and a larger one."""
    lines = []
    for draw in ([0.02, 0.02], [0.05, 0.05]):
        losses = [_found("bp", batch=32, lr=lr, draw=draw, updates=250)["curve"]["250"] for lr in (1e-3, 3e-3)]
        lines.append([str(draw[0]), *(f"{loss:.3f}" for loss in losses)])
    return table(["deviation", "`bp`, learning rate 0.001", "0.003"], lines)


def rate() -> str:
    """Backpropagation at full width, 16 windows, 250 updates."""
    tried = [_found("bp", batch=16, lr=4e-3, draw=draw) for draw in ([0.05, 0.05], [0.07, 0.5])]
    lines = []
    for row in [*tried, _found("bp", batch=16, lr=8e-3)]:
        draw = row["other"].get("draw")
        lines.append(
            [f"{draw[0]}, {draw[1]}" if draw else "`gpt`'s own", str(row["other"]["lr"]), f"{row['curve']['250']:.3f}"]
        )
    return table(["linear layers, embeddings", "learning rate", "`bp`"], lines)


def _mean(values: list[float]) -> str:
    """With its standard error, from three values on."""
    mean = f"{statistics.fmean(values):+.2f}"
    return f"{mean} ± {statistics.stdev(values) / math.sqrt(len(values)):.2f}" if len(values) > 2 else ""


def _measured(cuts: list[int]) -> str:
    """The recipe as it is: every method's losses, and its excess over backpropagation's, seed by seed and in the mean."""
    losses = {(row["method"], row["seed"]): row["validation_loss"] for row in ROWS if row["config"]["cuts"] == cuts}
    lines = []
    for method in sorted({method for method, _ in losses}, key=ORDER.index):
        own = {seed: loss for (name, seed), loss in sorted(losses.items()) if name == method}
        over = [100 * (loss / losses["bp", seed] - 1) for seed, loss in own.items()]
        lines.append(
            [method, ", ".join(map(str, own)), ", ".join(f"{loss:.3f}" for loss in own.values()),
             "" if method == "bp" else ", ".join(f"{each:+.2f}" for each in over), "" if method == "bp" else _mean(over)]
        )  # fmt: skip
    return table(["method", "seeds", "validation loss", "over bp's, %", "mean"], lines)


def measured() -> str:
    return _measured([1, 3, 5])


def former_cuts() -> str:
    return _measured([2, 3, 5])


def tuned() -> str:
    """What else was tried, beside the recipe with that method and seed."""
    recipe = {(row["method"], row["seed"]): row for row in ROWS if row["config"]["cuts"] == [2, 3, 5]}
    lines = []
    for row in TUNED:
        method, seed, config = row["method"], row["seed"], row["config"]
        beside = recipe[method.removesuffix(", gamma 0.8"), seed]
        other = [f"{name} {value}" for name, value in config.items() if value != beside["config"][name]]
        lines.append(
            [method, str(seed), "; ".join(other), f"{row['validation_loss']:.3f}", f"{beside['validation_loss']:.3f}"]
        )
    return table(["method", "seed", "other than the recipe", "validation loss", "the recipe's"], lines)
