"""What the documents show of results/theory.jsonl."""

from shown import rows, table

ROWS = rows("theory/results/theory.jsonl").where(trained="first")
ROWS.sort(key=lambda row: (row["method"], row["stages"]))
SHORT, LONG, MOMENTUM = (ROWS.where(step=step) for step in (0.05, 0.15, 0.01))
LABEL = "`{method}`, {stages} | {expected_delays[0]} | "
PLAIN = LABEL + "{floor:.5f} | {closed_form:.5f} | {theorem_floor:.3f} | {long[floor]:.4f} | {long[closed_form]:.4f}"
MEASURED = LABEL + "{floor:.4f} | {exact_floor:.4f} | {rate:.4f} | {exact_rate:.4f}"
TABLES = [
    table(
        "method, K | delay | measured, a=0.05 | closed form | theorem | measured, a=0.15 | closed form",
        [PLAIN.format(**row, long=long) for row, long in zip(SHORT, LONG, strict=True)],
    ),
    table("method, K | delay | measured floor | exact | measured rate | exact", map(MEASURED.format_map, MOMENTUM)),
]
