"""What the documents show of results/crossing.jsonl and places.jsonl."""

from shown import rows, table

HEAD = "1F1B-flush | zero-bubble | dtrp (ahead, delay) | fdg (ahead, delay)"
CELLS = (
    "{bp:.2f} | {zero-bubble:.2f} | {dtrp[ratio]:.2f} ({dtrp[ahead]:g}, {dtrp[delay]}) | "
    "{fdg[ratio]:.2f} ({fdg[ahead]:g}, {fdg[delay]})"
)
CROSSING = "{stages} | {num_microbatches} | {latency:g} | " + CELLS
PLACES = "{latency:g} | {wire:g} | {stages} | " + CELLS
TABLES = [
    table(f"K | A | hop / F | {HEAD}", map(CROSSING.format_map, rows("simulator/results/crossing.jsonl"))),
    table(f"hop / F | message / F | K | {HEAD}", map(PLACES.format_map, rows("simulator/results/places.jsonl"))),
]
