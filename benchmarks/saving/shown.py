"""What the documents say of results/saving.jsonl."""

import statistics
from typing import Any

from shown import rows, table

RECORDS = {record["ranks"]: record for record in rows("saving/results/saving.jsonl")}


def median(record: dict[str, Any], name: str) -> str:
    """Of the time by the clock, scaled to a processor of one's own."""
    return f"{record['processor'] * statistics.median(record[f'{name}_s']['wall']):.2f}"


def measured() -> str:
    lines = []
    for ranks, record in sorted(RECORDS.items()):
        place = f"one process, K={record['stages']}" if ranks == 1 else f"{ranks} ranks, K={ranks}"
        times = [median(record, name) for name in ("exact", "portable", "step")]
        sizes = [f"{record['bytes'] / 2**20:.1f}", f"{100 * record['processor']:.0f}"]
        lines.append([place, f"{100 * record['share_of_a_minute']:.1f}", *times, *sizes])
    return table(
        ["", "% of a minute", "s an exact save", "s a portable one", "s a step", "MB", "% of a processor"], lines
    )


def alone() -> list[str]:
    return [f"{100 * RECORDS[1]['share_of_a_minute']:.1f}"]
