"""What the documents show of results/cifar10.jsonl."""

from statistics import fmean

from shown import accuracy, join, less, pivot, rows

ROWS = rows("real_data/results/cifar10.jsonl")
BP, DTRP = ROWS.where(method="bp"), ROWS.where(method="dtrp")
LESS = less(DTRP, BP)
MEANS = [fmean(map(accuracy, found)) for found in (BP, DTRP)]
TABLES = [pivot("seed | `bp` | `dtrp`", ROWS, "{seed}", "method", ("bp", "dtrp"), lambda at: f"{accuracy(at[0]):.1f}")]
TEXTS = {"epoch": join([*MEANS, fmean(LESS), min(LESS), max(LESS)], ".2f")}
