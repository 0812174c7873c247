"""What the documents say of results/local.jsonl and results/ranks.jsonl."""

from __future__ import annotations

from typing import Any

from shown import rows, table

LOCAL = rows("memory/results/local.jsonl")
STAGES = (2, 4, 8)


def _table(model: str, cut: bool) -> str:
    """All stages, and the largest, in MB; ``cut``: as many micro-batches as stages, else one."""
    own = {(row["method"], row["stages"], row["num_microbatches"]): row for row in LOCAL if row["model"] == model}
    alone = f"{sum(own['bp', 1, 1]['peak_bytes']) / 1e6:.1f}"
    lines = []
    for method in dict.fromkeys(method for method, _, _ in own):
        cells = [own.get((method, stages, stages if cut else 1)) for stages in STAGES]
        if any(cells):
            lines.append([f"`{method}`", *(_cell(row) for row in cells)])
    return table([f"one worker: {alone}", *(f"K={stages}" for stages in STAGES)], lines)


def _cell(row: dict[str, Any] | None) -> str:
    return "" if row is None else f"{sum(row['peak_bytes']) / 1e6:.1f} ({max(row['peak_bytes']) / 1e6:.1f})"


def resnet56() -> str:
    return _table("resnet56", cut=False)


def resnet56_cut() -> str:
    return _table("resnet56", cut=True)


def resnet110() -> str:
    return _table("resnet110", cut=False)


def resnet110_cut() -> str:
    return _table("resnet110", cut=True)


def resnet1202() -> str:
    return _table("resnet1202", cut=False)


def _gpu_rows(model: str) -> dict[tuple[str, int], dict[str, Any]]:
    """Those with one micro-batch, by method and K."""
    own = [row for row in rows("memory/results/gpu.jsonl") if (row["model"], row["num_microbatches"]) == (model, 1)]
    return {(row["method"], row["stages"]): row for row in own}


def _gpu(model: str) -> str:
    """The most that the allocator had given out, in MB: one micro-batch, all stages in one process."""
    own = {key: row["processes"][0]["device_peak"] for key, row in _gpu_rows(model).items()}
    lines = [
        [f"`{method}`", *(f"{own[method, stages] / 1e6:.1f}" for stages in STAGES)]
        for method in dict.fromkeys(method for method, _ in own)
    ]
    return table([f"one worker: {own['bp', 1] / 1e6:.1f}", *(f"K={stages}" for stages in STAGES)], lines)


def gpu_resnet56() -> str:
    return _gpu("resnet56")


def gpu_resnet110() -> str:
    return _gpu("resnet110")


def gpu_resnet1202() -> str:
    return _gpu("resnet1202")


def gpu_said() -> list[str]:
    """ResNet-1202 in MB: one worker, fdg and dtrp at K=8; the latter two over one worker; and what dtrp's tensors add up to."""
    own = _gpu_rows("resnet1202")
    alone, fdg, dtrp = (own[key]["processes"][0]["device_peak"] for key in (("bp", 1), ("fdg", 8), ("dtrp", 8)))
    every = sum(own["dtrp", 8]["peak_bytes"])
    return [
        *(f"{each / 1e6:.1f}" for each in (alone, fdg, dtrp)),
        f"{fdg / alone:.1f}",
        f"{dtrp / alone:.2f}",
        f"{every / 1e6:.1f}",
    ]


def gpu_readme() -> list[str]:
    alone, fdg, dtrp, *_ = gpu_said()
    return [alone, dtrp, fdg]


def ranks() -> str:
    """What the system says that each process took, beyond what it had before the first step, and what its tensors say."""
    lines = []
    for row in rows("memory/results/ranks.jsonl"):
        grown = [(each["rss_peak"] - each["rss_before"]) / 1e6 for each in row["processes"]]
        told = [size / 1e6 for size in row["peak_bytes"]]
        lines.append([f"`{row['method']}`", str(row["stages"]), _each(grown), _each(told)])
    return table(["", "K", "grown, each process", "from the tensors, each stage"], lines)


def _each(values: list[float]) -> str:
    return ", ".join(f"{value:.1f}" for value in values)


def said() -> list[str]:
    return _said("resnet56")


def said_1202() -> list[str]:
    return _said("resnet1202")


def _said(model: str) -> list[str]:
    """One micro-batch: fdg and dtrp at K=8 beside one worker."""
    own = {(row["method"], row["stages"], row["num_microbatches"]): row["peak_bytes"] for row in LOCAL
           if row["model"] == model}  # fmt: skip
    alone, fdg, dtrp = (own[key] for key in (("bp", 1, 1), ("fdg", 8, 1), ("dtrp", 8, 1)))
    return [*(f"{sum(each) / 1e6:.1f}" for each in (alone, fdg, dtrp)), f"{sum(fdg) / sum(alone):.1f}",
            f"{sum(dtrp) / sum(alone):.1f}", *(f"{max(each) / 1e6:.1f}" for each in (fdg, dtrp))]  # fmt: skip
