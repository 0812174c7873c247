"""What the documents show of results/crossing.jsonl, places.jsonl and orders.jsonl."""

from shown import rows, table

HEAD = "1F1B-flush | zero-bubble | dtrp (ahead, delay) | fdg (ahead, delay)"
CELLS = (
    "{bp:.2f} | {zero-bubble:.2f} | {dtrp[ratio]:.2f} ({dtrp[ahead]:g}, {dtrp[delay]}) | "
    "{fdg[ratio]:.2f} ({fdg[ahead]:g}, {fdg[delay]})"
)
CROSSING = "{stages} | {num_microbatches} | {latency:g} | " + CELLS
PLACES = "{latency:g} | {wire:g} | {stages} | " + CELLS
DELAYS = (3, 4, 5, 6, 7)


def slowdowns(row):
    """The parts, the link, and the per cent that each largest delay costs: those of the largest one found up to it."""
    cells = []
    for delay in DELAYS:
        cells.append(
            min((f"{max(0.0, point['slower']):.1f}" for point in row["frontier"] if point["delay"] <= delay), key=float)
        )
    parts = ", ".join(f"{seconds:g}" for seconds in row["parts"])
    return f"{parts} | {row['link']:g} | {' | '.join(cells)}"


TABLES = [
    table(f"K | A | hop / F | {HEAD}", map(CROSSING.format_map, rows("simulator/results/crossing.jsonl"))),
    table(f"hop / F | message / F | K | {HEAD}", map(PLACES.format_map, rows("simulator/results/places.jsonl"))),
    table("F, R, I, W | link / F | delay 3 | 4 | 5 | 6 | 7", map(slowdowns, rows("simulator/results/orders.jsonl"))),
]
