"""What the documents say of the raw files in results/."""

from statistics import median
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


def _cuts(model: str, *, first: bool = False) -> dict[str, Any]:
    """The last row of a model, or what the plan came to at first."""
    found = [row for row in CUTS if row["model"] == model]
    return found[0 if first else -1]


def _faster(row: dict[str, Any]) -> float:
    """Planned cuts against equal ones, measured."""
    return float(median(row["equal_rounds_ms"]) / median(row["rounds_ms"]))


def _off(row: dict[str, Any]) -> float:
    """Predicted time against measured, per cent."""
    return float(100 * abs(row["predicted_ms"] / median(row["rounds_ms"]) - 1))


def cuts() -> list[str]:
    small, large = _cuts("resnet20"), _cuts("resnet56")
    promised = [row["predicted_equal_ms"] / row["predicted_ms"] for row in (small, large)]
    rounds = sorted(small["rounds_ms"])
    wide, deep = _cuts("resnet18", first=True), _cuts("vgg16")
    return [f"{_faster(small):.2f}", f"{promised[0]:.2f}", f"{_faster(large):.2f}", f"{promised[1]:.2f}",
            f"{_off(small):.0f}", f"{_off(large):.0f}", "10", f"{rounds[0]:.0f}", f"{rounds[-1]:.0f}",
            f"{_off(wide):.0f}", f"{_off(deep):.0f}", f"{_faster(deep):.2f}", f"{_faster(wide):.2f}",
            f"{_faster(_cuts('resnet18')):.2f}"]  # fmt: skip


def accuracy() -> list[str]:
    last = {(row["label"], row["seed"]): 100 * row["test_accuracy"][-1] for row in ACCURACY}
    seeds = sorted({seed for _, seed in last})
    shown = [last[label, seed] for label in ("base", "compensated") for seed in seeds]
    less = [last["base", seed] - last["compensated", seed] for seed in seeds]
    return [f"{ACCURACY[0]['lr']:g}", *(f"{value:.2f}" for value in shown), *(f"{value:.1f}" for value in less)]
