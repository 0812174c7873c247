"""What the documents show of results/ablation.jsonl."""

from statistics import fmean, median
from typing import Any

from ablation.variants import VARIANTS, slots
from shown import accuracy, less, rows, spread, table

ROWS = rows("ablation/results/ablation.jsonl")


def line(question: str, change: str, settings: dict[str, Any]) -> str:
    runs = ROWS.where(question=question, change=change)
    over = spread([-points for points in less(runs, ROWS.where(change="dtrp"))], ".1f")
    delays, errors = ([run[key] for run in runs] for key in ("largest_delay", "prediction_error"))
    error = f"{fmean(errors):.2f}" if None not in errors else ""
    memory = fmean(sum(run["peak_bytes"]) for run in runs) / 1e6
    cpu = 1e3 * median(run["cpu_s_a_sample"] for run in runs)
    results = f"{spread([*map(accuracy, runs)], '.1f')} | {over} | {max(delays)} | {error} | {memory:.0f} | {cpu:.2f}"
    return f"{question} | {change} | {len(runs)} | {results} | {slots(settings, 0):.1f} | {slots(settings, 0.5):.1f}"


HEAD = (
    " | change | seeds | accuracy, % | over dtrp, points (paired) | largest delay | prediction error | "
    "memory of all stages, MB | CPU ms a sample | slot, c = 0 | slot, c = F/2"
)
TABLES = [table(HEAD, [line(*variant) for variant in sorted(VARIANTS, key=lambda variant: variant[0])])]
