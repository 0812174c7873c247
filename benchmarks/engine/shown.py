"""What the documents say of results/engine.jsonl."""

from shown import rows, table

RECORD = next(row for row in reversed(rows("engine/results/engine.jsonl")) if "gpu" not in row and "model" not in row)


def cost() -> list[str]:
    return [f"{RECORD['ratios'][name]:.3f}" for name in ("bp", "dtrp")]


def measured() -> str:
    lines = []
    for name, label in (("bp", "`bp`, K=1"), ("dtrp", "`dtrp`, K=4"), ("plain", "the plain loop")):
        low, middle, high = (f"{1e3 * t:.0f}" for t in RECORD["quartiles_s"][name])
        ratio = RECORD["ratios"].get(name)
        lines.append([label, f"{ratio:.3f}" if ratio else "", middle, f"{low} to {high}"])
    return table(["", "time over the plain equivalent", "ms a step, median", "quartiles"], lines)
