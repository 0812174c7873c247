"""What the documents show of results/engine.jsonl."""

from shown import rows, table

LAST = [row for row in rows("engine/results/engine.jsonl") if not {"gpu", "model"} & row.keys()][-1]
RATIOS = {name: f"{ratio:.3f}" for name, ratio in LAST["ratios"].items()}
LABELS = {"bp": "`bp`, K=1", "dtrp": "`dtrp`, K=4", "plain": "the plain loop"}


def line(name: str) -> str:
    low, middle, high = (f"{1e3 * time:.0f}" for time in LAST["quartiles_s"][name])
    return f"{LABELS[name]} | {RATIOS.get(name, '')} | {middle} | {low} to {high}"


TABLES = [table(" | time over the plain equivalent | ms a step, median | quartiles", map(line, LABELS))]
TEXTS = {"cost": f"{RATIOS['bp']} {RATIOS['dtrp']}"}
