"""What the documents say of results/ablation.jsonl."""

from __future__ import annotations

import statistics
from typing import Any

from ablation.variants import VARIANTS, slots
from shown import rows, spread, table

ROWS = rows("ablation/results/ablation.jsonl")
HEAD = ("", "change", "seeds", "accuracy, %", "over dtrp, points (paired)", "largest delay", "prediction error",
        "memory of all stages, MB", "CPU ms a sample", "slot, c = 0", "slot, c = F/2")  # fmt: skip


def measured() -> str:
    base = {row["seed"]: row for row in ROWS if row["change"] == "dtrp"}
    questions = list(dict.fromkeys(question for question, _, _ in VARIANTS))
    lines = []
    for question, change, settings in sorted(VARIANTS, key=lambda variant: questions.index(variant[0])):
        runs = [row for row in ROWS if (row["question"], row["change"]) == (question, change)]
        if not runs:
            continue
        gained = [_accuracy(row) - _accuracy(base[row["seed"]]) for row in runs if row["seed"] in base]
        errors = [row["prediction_error"] for row in runs if row["prediction_error"] is not None]
        lines.append(
            [
                question, change, str(len(runs)), _mean([_accuracy(row) for row in runs]),
                "" if change == "dtrp" else _mean(gained), str(max(row["largest_delay"] for row in runs)),
                f"{statistics.fmean(errors):.2f}" if errors else "",
                f"{statistics.fmean(sum(row['peak_bytes']) for row in runs) / 1e6:.0f}",
                f"{1e3 * statistics.median(row['cpu_s_a_sample'] for row in runs):.2f}",
                f"{slots(settings, 0):.1f}", f"{slots(settings, 0.5):.1f}",
            ]
        )  # fmt: skip
    return table(HEAD, lines)


def _accuracy(row: dict[str, Any]) -> float:
    return 100 * float(row["test_accuracy"][-1])


def _mean(values: list[float]) -> str:
    return spread(values, 1) if len(values) > 1 else f"{values[0]:.1f}"
