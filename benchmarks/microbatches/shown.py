"""What the documents say of results/microbatches.jsonl."""

from shown import rows, spread, table

ROWS = rows("microbatches/results/microbatches.jsonl")


def _cell(method: str, parts: int) -> list[str]:
    chosen = [row for row in ROWS if row["method"] == method and row["num_microbatches"] == parts]
    delay = max(int(delay) for row in chosen for counts in row["delays"].values() for delay in counts)
    return [spread([100 * row["test_accuracy"] for row in chosen], 1), str(delay)]


def short() -> str:
    lines = [[f"`{method}`", _cell(method, 1)[0], _cell(method, 4)[0]] for method in ("bp", "fdg", "dtr", "dtrp")]
    return table(["method, K=4", "one micro-batch", "four micro-batches"], lines)


def measured() -> str:
    lines = [[f"`{method}`", *_cell(method, 1), *_cell(method, 4)] for method in ("bp", "fdg", "dtr", "dtrp")]
    return table(["method, K=4", "one micro-batch", "largest delay", "four micro-batches", "largest delay"], lines)
