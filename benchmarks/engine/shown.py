"""What the documents show of results/engine.jsonl."""

from typing import Any

from shown import rows, table

LAST = [row for row in rows("engine/results/engine.jsonl") if not {"gpu", "model"} & row.keys()][-1]
RATIOS = {name: f"{ratio:.3f}" for name, ratio in LAST["ratios"].items()}
LABELS = {"bp": "`bp`, K=1", "dtrp": "`dtrp`, K=4", "plain": "the plain loop"}


def line(name: str) -> str:
    low, middle, high = (f"{1e3 * time:.0f}" for time in LAST["quartiles_s"][name])
    return f"{LABELS[name]} | {RATIOS.get(name, '')} | {middle} | {low} to {high}"


def divided(row: dict[str, Any]) -> str:
    """dtrp-split beside dtrp: the ratio of medians, ms a step of both, and the share of the weights that wait."""
    median = row["median_s"]
    shares = [100 * share for share in row["deferred"].values()]
    times = f"{1e3 * median['dtrp']:.0f} | {1e3 * median['dtrp-split']:.0f}"
    return f"{row['model']} | {row['ratio']:.3f} | {times} | {min(shares):.1f}"


TABLES = [table(" | time over the plain equivalent | ms a step, median | quartiles", map(line, LABELS)),
          table("network | dtrp-split over dtrp | dtrp, ms | dtrp-split, ms | weights deferred, least of a stage, %",
                map(divided, rows("engine/results/division.jsonl")))]  # fmt: skip
TEXTS = {"cost": f"{RATIOS['bp']} {RATIOS['dtrp']}"}
