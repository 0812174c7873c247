"""What the documents show of the raw files in results/, as far as they are there."""

import math
from collections.abc import Sequence
from statistics import fmean, median
from typing import Any

from shown import HERE, Rows, rows, spread, table

REAL_LEVELS, CURVE_LEVELS = (0.50, 0.55), ("0.7", "0.75")  # README.md says how they were chosen
TORCH = ("torch GPipe", "torch 1F1B", "torch InterleavedZeroBubble")
DDP, ALONE = "DistributedDataParallel", "one worker"


def there(name: str) -> Rows:
    path = f"time_to_accuracy/results/{name}.jsonl"
    return rows(path) if (HERE / path).exists() else Rows()


REAL, SIMULATED, ERRORS = there("real"), there("simulated"), there("against_ranks")


def seconds(row: dict[str, Any], level: float) -> float:
    """When a level was first reached; infinity where it was not."""
    times = (time for time, accuracy in zip(row["times_s"], row["test_accuracy"], strict=True) if accuracy >= level)
    return next(times, math.inf)


def mean(values: Sequence[float]) -> float:
    return fmean(values) if values else math.inf


def shown(values: Sequence[float]) -> str:
    reached = [value for value in values if value < math.inf]
    missing = f" ({len(values) - len(reached)} of {len(values)} never)" if len(reached) < len(values) else ""
    return (spread(reached, ".1f") if reached else "") + missing


def ratio(base: float, other: float) -> str:
    return f"{base / other:.2f}" if max(base, other) < math.inf else ""


def on(link: str) -> dict[str, Rows]:
    """The runs over a link by contender; one worker's, which has none, among them."""
    return Rows(row for row in REAL if row["link"] == link or row["contender"] == ALONE).by("{contender}")


def real(link: str) -> list[str]:
    """Times as fast to the second level as DDP and as the best of torch's synchronous schedules; mean over seeds."""
    lines = []
    groups = on(link)
    to = {name: [[seconds(row, level) for row in found] for level in REAL_LEVELS] for name, found in groups.items()}
    best = min((mean(to[name][1]) for name in TORCH if name in to), default=math.inf)
    for name, found in groups.items():
        steps = [
            1e3 * (row["times_s"][-1] - row["times_s"][0]) / (row["updates"][-1] - row["updates"][0]) for row in found
        ]
        last = spread([100 * row["test_accuracy"][-1] for row in found], ".1f")
        own = mean(to[name][1])
        cells = [name, str(found[0]["num_microbatches"]), str(found[0]["delay"]), f"{median(steps):.0f}"]
        cells += [
            *map(shown, to[name]),
            last,
            ratio(best, own),
            ratio(mean(to[DDP][1]) if DDP in to else math.inf, own),
        ]
        lines.append(" | ".join(cells))
    return lines


def simulated() -> list[str]:
    """Times as fast to the second level as the fastest synchronous schedule, and as the fastest synchronous pipeline."""
    lines = []
    for place, found in SIMULATED.by("{stages} | {curves_num_microbatches} | {link}").items():
        to = {
            row["contender"]: [
                [math.inf if s is None else s for s in row["seconds_to"][level]] for level in CURVE_LEVELS
            ]
            for row in found
        }
        bases = [mean(to[found.only(**{which: True})["contender"]][1]) for which in ("fastest", "fastest_pipeline")]
        for row in found:
            name = row["contender"]
            cells = [place, name, str(row["num_microbatches"]), f"{row['minibatch_ms']:.1f}", *map(shown, to[name])]
            lines.append(" | ".join([*cells, *(ratio(base, mean(to[name][1])) for base in bases)]))
    return lines


def errors() -> list[str]:
    return [
        f"{label} | {found[0]['simulated_ms']:.0f} | {median(row['real_ms'] for row in found):.0f} | "
        f"{100 * (found[0]['simulated_ms'] / median(row['real_ms'] for row in found) - 1):+.1f}"
        for label, found in ERRORS.by("{contender} | {num_microbatches}").items()
    ]


COLUMNS = "A | delay | ms a mini-batch | to 50 %, s | to 55 %, s | last accuracy, % | times torch's best | times DDP"
CURVES = (
    "K | A of the curves | link | simulated | A | ms a mini-batch | to 70 %, s | to 75 %, s | times synchronous | "
    "times pipelines"
)
PLACES = (("plain", "loopback"), ("slow", "slow"))
TABLES = []
if REAL:
    TABLES += [table(f"{words} link: | {COLUMNS}", real(link)) for words, link in PLACES if REAL.where(link=link)]
if SIMULATED:
    TABLES.append(table(CURVES, simulated()))
if ERRORS:
    TABLES.append(table("K = 2: | A | simulated, ms | real, ms | off, %", errors()))
TEXTS: dict[str, str] = {}
