"""What the documents show of results/microbatches.jsonl."""

from shown import Rows, accuracy, pivot, rows, spread


def cells(found: Rows) -> str:
    delay = max(int(delay) for run in found for counts in run["delays"].values() for delay in counts)
    return f"{spread([*map(accuracy, found)], '.1f')} | {delay}"


HEAD = "method, K=4 | one micro-batch | largest delay | four micro-batches | largest delay"
ROWS = rows("microbatches/results/microbatches.jsonl")
TABLES = [pivot(HEAD, ROWS, "`{method}`", "num_microbatches", (1, 4), cells)]
