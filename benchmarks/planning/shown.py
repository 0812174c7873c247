"""What the documents show of the raw files in results/."""

from statistics import median
from typing import Any

from shown import accuracy, join, less, pivot, rows, runs, spread, table

SIMULATOR, KEEP = (runs(f"planning/results/{part}.jsonl")[-1] for part in ("simulator", "keep"))
BATCH, CUTS, ACCURACY = (rows(f"planning/results/{part}.jsonl") for part in ("batch", "cuts", "accuracy"))
OFF = [100 * row["off"] for row in SIMULATOR]
assert [off >= 0 for off in OFF] == 48 * [True], "the text says that the run is always the slower one"
ACCURACY.sort(key=lambda row: row["seed"])


def keep(row: dict[str, Any]) -> str:
    time, spectrain = (median(run["rounds_ms"]) for run in (row, KEEP.only(label="spectrain")))
    sizes = join([size / 1e6 for size in row["memory"]], ".1f", " | ")
    return f"{row['label']} | {sizes} | {time:.0f} | {time / spectrain:.2f}"


def batch(row: dict[str, Any]) -> str:
    rate, base = row["samples_per_s"], BATCH.only(label="dtrp 16")["samples_per_s"]
    start = f"{row['label']} | {row['num_microbatches']} | {row['keeps'].count('graph')} | {rate:.0f}"
    return f"{start} | {rate / base:.2f} | {max(row['memory']) / 1e6:.1f} | {join(row['busy'], '.0%', ', ')}"


def cuts(row: dict[str, Any]) -> str:
    """Times predicted and measured, and the gain over equal cuts by both."""
    time, equal, predicted = median(row["rounds_ms"]), median(row["equal_rounds_ms"]), row["predicted_ms"]
    start = " | ".join(str(row[key]).strip("[]") for key in ("model", "batch", "cuts", "equal_cuts"))
    measured = f"{time:.0f} [{min(row['rounds_ms']):.0f}, {max(row['rounds_ms']):.0f}]"
    gains = f"{row['predicted_equal_ms'] / predicted:.2f} | {equal / time:.2f}"
    return f"{row['run'][:10]} | {start} | {predicted:.0f} | {measured} | {100 * (predicted / time - 1):+.1f} | {gains}"


TABLES = [
    table(" | stage 0, MB | stage 1, MB | ms a mini-batch | times spectrain's", map(keep, KEEP)),
    table("plan of | network | batch | planned cuts | equal | predicted, ms | measured, ms | off, % | predicted gain | gain",
          map(cuts, CUTS)),
    table("mini-batch | A | stages with graphs | samples/s | times the base's | largest stage, MB | busy, by worker",
          map(batch, BATCH)),
    pivot("seed | base, % | compensated, %", ACCURACY, "{seed}", "label", ("base", "compensated"),
          lambda found: f"{accuracy(found[0]):.2f}"),
]  # fmt: skip
LESS = less(ACCURACY.where(label="compensated"), ACCURACY.where(label="base"))
TEXTS = {"simulator": join([min(OFF), max(OFF), median(OFF)], ".1f"), "accuracy": spread(LESS, ".2f", error=True)}
