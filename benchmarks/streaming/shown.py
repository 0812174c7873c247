"""What the documents show of results/speed.jsonl."""

from statistics import median
from typing import Any

from shown import rows, table


def speed(row: dict[str, Any]) -> str:
    """Images a second of both, and their ratio."""
    streamed, plain = (f"{median(row['rates'][name]):.0f}" for name in ("streamed", "plain"))
    return f"{row['run'][:16]} | {row['workers']} | {streamed} | {plain} | {row['ratio']:.2f}"


TABLES = [
    table(
        "run | loader workers | streamed, images/s | plain DataLoader | ratio",
        map(speed, rows("streaming/results/speed.jsonl")),
    )
]
TEXTS: dict[str, str] = {}
