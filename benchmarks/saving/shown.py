"""What the documents show of results/saving.jsonl."""

from statistics import median
from typing import Any

from shown import join, rows, table

LAST = {ranks: found[-1] for ranks, found in rows("saving/results/saving.jsonl").by("{ranks}").items()}
HEAD = "processes | % of a minute | s an exact save | s a portable one | s a step | MB | % of a processor"


def line(run: dict[str, Any]) -> str:
    """Times by the clock, scaled to a processor of one's own."""
    times = [run["processor"] * median(run[f"{name}_s"]["wall"]) for name in ("exact", "portable", "step")]
    share, size = 100 * run["share_of_a_minute"], run["bytes"] / 2**20
    return f"{run['ranks']} | {share:.1f} | {join(times, '.2f', ' | ')} | {size:.1f} | {100 * run['processor']:.0f}"


TABLES = [table(HEAD, map(line, LAST.values()))]
TEXTS = {"alone": line(LAST["1"]).split(" | ")[1]}
