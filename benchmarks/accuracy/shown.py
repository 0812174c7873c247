"""What the documents show of the raw files in results/."""

from statistics import fmean
from typing import Any

from shown import Rows, accuracy, join, less, pivot, rows, spread, table

PARTS = ("small", "wide", "resnet20", "length")
SMALL, WIDE, RESNET20, LENGTH = (rows(f"accuracy/results/{part}.jsonl") for part in PARTS)
LONG = [*rows("accuracy/results/long.jsonl"), *rows("accuracy/results/long_stopped.jsonl")]
HEAD = "K | A | method | seeds | accuracy, % | less than bp's, points (paired) | largest delay | prediction error"


def points(runs: Rows, found: Rows) -> str:
    """Less than bp's with the same seed and as many micro-batches, with the standard error."""
    base = {row["seed"]: row for row in found.where(method="bp", num_microbatches=runs[0]["num_microbatches"])}
    return spread(less(runs, Rows(base.values())), ".2f", error=True)


def grid(name: str, found: Rows) -> str:
    lines = []
    for label, runs in sorted(found.by("{stages} | {num_microbatches} | {method} ({prediction})").items()):
        errors = [run["prediction_error"] for run in runs]
        error = f"{fmean(errors):.2f}" if None not in errors else ""
        start = f"{label.replace(' (None)', '')} | {len(runs)} | {spread([*map(accuracy, runs)], '.2f')}"
        lines.append(f"{start} | {points(runs, found)} | {max(run['largest_delay'] for run in runs)} | {error}")
    return table(f"{name}: {HEAD}", lines)


def last_five(row: dict[str, Any], epochs: int) -> float:
    """The mean accuracy of the five epochs up to this one."""
    return 100 * fmean(row["test_accuracy"][epochs - 5 : epochs])


def long(row: dict[str, Any]) -> str:
    epochs = len(row["test_accuracy"])
    bp, mean = last_five(LONG[0], epochs), last_five(row, epochs)
    label = f"`{row['method']}` ({row['prediction']})".replace(" (None)", "")
    return f"{label} | {epochs - 4} to {epochs} | {mean:.2f} | {bp:.2f} | {bp - mean:.2f}"


README = Rows(row for row in SMALL if row["stages"] == row["num_microbatches"] and row["prediction"] != "rollout")
METHODS = ("bp", "spectrain", "dtrp", "fdg", "fr")
TABLES = [
    *map(grid, ("small", "wide", "ResNet-20", "length"), (SMALL, WIDE, RESNET20, LENGTH)),
    table(" | epochs of 30 | accuracy, %, their mean | `bp`'s | points less", map(long, LONG)),
    pivot("K, A | bp | spectrain | dtrp | fdg | fr", README, "{stages}", "method", METHODS,
          lambda found: spread([*map(accuracy, found)], ".2f")),
]  # fmt: skip
TEXTS = {
    "resnet20": " ".join(points(RESNET20.where(method=m), RESNET20) for m in ("spectrain", "dtrp", "fdg")),
    "long": join([last_five(row, len(LONG[1]["test_accuracy"])) for row in LONG[:2]], ".2f"),
}
assert LONG[1]["method"] == "dtrp"
