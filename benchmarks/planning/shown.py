"""What the documents say of the raw files in results/."""

import math
from statistics import fmean, median, stdev
from typing import Any

from shown import last_run, rows, table

SIMULATOR, KEEP = (last_run(rows(f"planning/results/{part}.jsonl")) for part in ("simulator", "keep"))
BATCH, CUTS, ACCURACY = (rows(f"planning/results/{part}.jsonl") for part in ("batch", "cuts", "accuracy"))


def simulator() -> list[str]:
    off = sorted(abs(row["off"]) for row in SIMULATOR)
    assert len(off) == 48
    assert all(row["off"] >= 0 for row in SIMULATOR)  # "the run is always the slower one"
    return [f"{100 * off[0]:.1f}", f"{100 * off[-1]:.1f}", f"{100 * median(off):.1f}"]


def _kept(label: str) -> tuple[float, list[float]]:
    (row,) = [row for row in KEEP if row["label"] == label]
    return median(row["rounds_ms"]), [size / 1e6 for size in row["memory"]]


def keep() -> list[str]:
    fdg, spectrain, recomputing, generous = (
        _kept(label)[0] for label in ("fdg", "spectrain", "dtrp, recomputing", "dtrp, generous limit")
    )
    sizes = _kept("dtrp, 100 MB")[1]
    return [f"{fdg:.0f}", f"{spectrain:.0f}", f"{recomputing:.0f}", f"{generous:.0f}", f"{generous / spectrain:.2f}",
            "100", *(f"{size:.1f}" for size in sizes)]  # fmt: skip


def memory() -> str:
    names = {
        "fdg": "`fdg`",
        "spectrain": "`spectrain`",
        "dtrp, recomputing": "`dtrp`",
        "dtrp, generous limit": '`dtrp`, `keep="auto"`, no tight limit',
        "dtrp, 100 MB": '`dtrp`, `keep="auto"`, 100 MB',
    }
    lines = []
    for label, name in names.items():
        time, sizes = _kept(label)
        lines.append([name, *(f"{size:.1f}" for size in sizes), f"{time:.0f}"])
    return table(["", "stage 0, MB", "stage 1, MB", "ms a mini-batch"], lines)


def batch() -> str:
    lines = []
    (base,) = [row["samples_per_s"] for row in BATCH if row["label"] == "dtrp 16"]
    for row in BATCH:
        kept = row["keeps"].count("graph")
        lines.append(
            [row["label"], str(row["num_microbatches"]), str(kept), f"{row['samples_per_s']:.0f}",
             f"{row['samples_per_s'] / base:.2f}", f"{max(row['memory']) / 1e6:.1f}",
             ", ".join(f"{share:.0%}" for share in row["busy"])]
        )  # fmt: skip
    head = [
        "mini-batch",
        "A",
        "stages with graphs",
        "samples/s",
        "times the base's",
        "largest stage, MB",
        "busy, by worker",
    ]
    return table(head, lines)


def _faster(row: dict[str, Any]) -> float:
    """Planned cuts against equal ones, measured."""
    return float(median(row["equal_rounds_ms"]) / median(row["rounds_ms"]))


def _off(row: dict[str, Any]) -> float:
    """Predicted time against measured, per cent."""
    return float(100 * (row["predicted_ms"] / median(row["rounds_ms"]) - 1))


def _last_cuts() -> list[dict[str, Any]]:
    return [[row for row in CUTS if row["model"] == model][-1] for model in ("resnet56", "vgg16", "resnet18")]


def cuts() -> str:
    lines = []
    for row in _last_cuts():
        rounds = f"{median(row['rounds_ms']):.0f} [{min(row['rounds_ms']):.0f}, {max(row['rounds_ms']):.0f}]"
        cuts = (", ".join(map(str, row[key])) for key in ("cuts", "equal_cuts"))
        gains = row["predicted_equal_ms"] / row["predicted_ms"], _faster(row)
        lines.append([row["model"], str(row["batch"]), *cuts, f"{row['predicted_ms']:.0f}", rounds, f"{_off(row):+.1f}",
                      *(f"{gain:.2f}" for gain in gains)])  # fmt: skip
    head = ["", "batch", "planned cuts", "equal", "predicted, ms", "measured, ms", "off, %", "predicted gain", "gain"]
    return table(head, lines)


def former_cuts() -> list[str]:
    """How far off the plans before those were, at most."""
    off = [_off(row) for row in CUTS if row not in _last_cuts()]
    return [f"{-min(off):.0f}", f"{max(off):.0f}"]


def accuracy() -> list[str]:
    last = {(row["label"], row["seed"]): 100 * row["test_accuracy"][-1] for row in ACCURACY}
    seeds = sorted({seed for _, seed in last})
    shown = [last[label, seed] for label in ("base", "compensated") for seed in seeds]
    less = [last["base", seed] - last["compensated", seed] for seed in seeds]
    error = stdev(less) / math.sqrt(len(less))
    return [
        f"{ACCURACY[0]['lr']:g}",
        *(f"{value:.2f}" for value in shown),
        *(f"{value:.2f}" for value in (fmean(less), error)),
    ]
