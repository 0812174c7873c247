"""What the documents show of the raw files in results/."""

import math
from collections.abc import Callable
from typing import Any

from shown import Rows, join, pivot, rows, runs, table

PARTS = ("sleeping", "sleeping_fifo", "links", "tun", "compute", "channels_last")
SPLIT = rows("throughput/results/split.jsonl")
SLEEPING, FIFO, LINKS, TUN, COMPUTE, FORMATS = (runs(f"throughput/results/{part}.jsonl") for part in PARTS)
COMPLETE = [run for run in SLEEPING if run.where(contender="torch InterleavedZeroBubble")][-1]
COMPUTE_20, COMPUTE_56 = ([run for run in COMPUTE if run[0]["model"] == model] for model in ("resnet20", "resnet56"))
FORWARD, BACKWARD = COMPLETE[0]["forward_ms"], COMPLETE[0]["backward_ms"]
IDEALS = {"dtrp": 2 * FORWARD + BACKWARD, "fdg": FORWARD + BACKWARD, "spectrain": FORWARD + BACKWARD}
TARGET = 1.06  # the most that a mini-batch may take where stages sleep, over the ideal
# Times the better of torch's GPipe and 1F1B: at A = 2, at 4, and each at its own best.
AIMS = [("spectrain", (2,), 1.2), ("dtrp", (2,), 1.05), ("spectrain", (4,), 1.2), ("dtrp", (4,), 1.05),
        ("spectrain", (1, 2, 4, 8), 1.05), ("dtrp", (1, 2, 4, 8), 0.95)]  # fmt: skip


def rounds(row: dict[str, Any], form: str, unit: float = 1.0) -> str:
    return f"[{min(row['rounds_ms']) / unit:{form}}, {max(row['rounds_ms']) / unit:{form}}]"


def faster(run: Rows, contender: str, stages: int) -> str:
    """Times as fast as torch's 1F1B."""
    times = [row["median_ms"] for name in ("torch 1F1B", contender) for row in run.where(contender=name, stages=stages)]
    return f"{times[0] / times[1]:.2f}" if times[1:] else ""


def sleeping(run: Rows, stages: int) -> str:
    """Times over the ideal, bold over the target, and times as fast as torch's 1F1B."""
    cells = [str(stages)]
    for method, ideal in IDEALS.items():
        row = run.only(contender=method, stages=stages)
        over = row["median_ms"] / ideal
        cells.append((f"**{over:.3f}** " if over > TARGET else f"{over:.3f} ") + rounds(row, ".3f", ideal))
    return " | ".join(cells + [faster(run, name, stages) for name in ("dtrp", "fdg", "torch InterleavedZeroBubble")])


def in_parts(row: dict[str, Any]) -> str:
    """A contender whose backward is in two parts, or stands beside such: over its ideal, and times as fast as 1F1B."""
    ideal, delay = row["ideal_ms"], row["delay"]
    cells = [str(row["stages"]), row["contender"], str(row["num_microbatches"]), "" if delay is None else str(delay)]
    cells += [f"{row['median_ms']:.1f}", f"{row['median_ms'] / ideal:.3f} {rounds(row, '.3f', ideal)}"]
    flushes = row["num_microbatches"] > 1
    return " | ".join(
        [*cells, faster(SPLIT.where(stages=row["stages"]), row["contender"], row["stages"]) if flushes else ""]
    )


def lost(run: Rows) -> Callable[[Rows], str]:
    """Per cent of throughput that a latency costs."""
    base = {row["contender"]: row["median_ms"] for row in run.where(latency_ms=0.0)}
    return lambda cell: f"{100 * (1 - base[cell[0]['contender']] / cell[0]['median_ms']):.1f}"


def compute(name: str, run: Rows) -> str:
    """The median, the least and the largest round, and times as fast as one worker."""

    def cell(found: Rows) -> str:
        time = found[0]["median_ms"]
        return f"{time:.0f} {rounds(found[0], '.0f')} ({run.only(contender='one worker')['median_ms'] / time:.2f})"

    return pivot(f"{name} | A=1 | A=2 | A=4 | A=8", run, "{contender}", "num_microbatches", (1, 2, 4, 8), cell)


def aims(run: Rows) -> str:
    """Times the better of torch's GPipe and 1F1B, bold under the aim."""

    def best(sizes: tuple[int, ...], *contenders: str) -> float:
        found = [row for row in run if row["contender"] in contenders and row["num_microbatches"] in sizes]
        return min((row["median_ms"] for row in found), default=math.nan)

    cells = [run[0]["run"][:16], str(len(run[0]["rounds_ms"])), f"{best((1,), 'one worker'):.0f}"]
    for method, sizes, aim in AIMS:
        tried = run.where(contender=method, num_microbatches=sizes[-1])
        ratio = best(sizes, "torch GPipe", "torch 1F1B") / best(sizes, method) if tried else math.nan
        cells.append(f"**{ratio:.2f}**" if ratio < aim else f"{ratio:.2f}")
    return " | ".join(cells).replace("nan", "")


def longer(layers: list[list[float]], forwards: int) -> float:
    """By how many per cent the longer stage is over a half, at the best cut; the first may repeat its forwards."""
    front, back = [forwards * f + b for f, b in layers], [f + b for f, b in layers]
    best = min(((sum(front[:cut]), sum(back[cut:])) for cut in range(1, len(layers))), key=max)
    return 100 * (2 * max(best) / sum(best) - 1)


def division(run: Rows) -> str:
    """Of the layers' times. Divided evenly, dtrp's first stage has a share s of them: s (2F+B) = (1-s) (F+B)."""
    layers = run[0]["layer_ms"]
    forward, backward = map(sum, zip(*layers, strict=True))
    whole, again = forward + backward, 2 * forward + backward
    even = [(again + whole) / (2 * again) * (1 + 1 / parts) for parts in (4, 8)]
    start = f"{run[0]['run'][:16]} | {forward / whole:.2f} | {longer(layers, 2):.1f} | {longer(layers, 1):.1f}"
    return f"{start} | {join(even, '.2f', ' | ')}"


WAITING = "K | dtrp / (2F+B) | fdg / (F+B) | spectrain / (F+B) | times 1F1B: dtrp | fdg | zero bubble"
AIMED = " | ".join(f"{method}, A={sizes[0] if sizes[0] > 1 else 'best'} ({aim})" for method, sizes, aim in AIMS)
PARTED = "K | contender | A | delay | ms | over the ideal | times 1F1B"
LAYERS = "F/(F+B) | dtrp's longer stage, % | recomputing nothing, % | even, A=4 | even, A=8"
TABLES = [
    table(WAITING, [sleeping(COMPLETE, k) for k in (2, 4, 8)]),
    table(f"run, {WAITING}", [f"{run[0]['run'][:16]}, {sleeping(run, k)}" for run in SLEEPING for k in (2, 4, 8)]),
    table(f"real-time priority: {WAITING}", [sleeping(FIFO[-1], k) for k in (2, 4, 8)]),
    pivot(" | A | 10 ms (F/2) | 18 ms (0.9 F) | 40 ms | 80 ms", LINKS[-1], "{contender} | {num_microbatches}", "latency_ms",
          (10, 18, 40, 80), lost(LINKS[-1])),
    pivot("TUN | 10 ms (F/2) | 18 ms (0.9 F)", TUN[-1], "{contender}", "latency_ms", (10, 18), lost(TUN[-1])),
    *map(compute, ("ResNet-20", "ResNet-56", "channels_last"), (COMPUTE_20[-1], COMPUTE_56[-1], FORMATS[-1])),
    table(f"run | rounds | one worker, ms | {AIMED}", map(aims, [*COMPUTE_20, *COMPUTE_56, *FORMATS])),
    table(f"run | {LAYERS}", map(division, COMPUTE_56)),
    table(f"in parts: {PARTED}", map(in_parts, SPLIT)),
]  # fmt: skip
LOST = [lost(LINKS[-1])(LINKS[-1].where(contender=method, latency_ms=FORWARD / 2)) for method in ("dtrp", "fdg", "bp")]
FASTER = [faster(COMPLETE, method, stages) for method in ("dtrp", "fdg") for stages in (2, 4, 8)]
TWO = COMPUTE_20[-1]
BEST = [
    TWO.only(contender="one worker")["median_ms"] / min(row["median_ms"] for row in TWO.where(contender=name))
    for name in ("dtrp", "spectrain", "torch 1F1B")
]
TEXTS = {
    "two": join(BEST, ".2f"),
    "cold": "{at_once_ms:.2f} {after_sleep_ms:.2f} {slept_ms:g}".format_map(rows("throughput/results/cold.jsonl")[-1]),
    "readme": " ".join([f"{FORWARD:g}", f"{BACKWARD:g}", *FASTER, *LOST]),
}
