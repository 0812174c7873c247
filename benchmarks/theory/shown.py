"""What the documents say of results/theory.jsonl."""

from typing import Any

from shown import rows, table

ROWS = [row for row in rows("theory/results/theory.jsonl") if row["trained"] == "first"]
SHOWN = [
    ("bp", 2),
    ("ddg", 2),
    ("dtr", 2),
    ("fdg", 2),
    ("ddg", 3),
    ("dtr", 3),
    ("ddg", 4),
    ("fdg", 3),
    ("dtr", 4),
    ("fdg", 4),
]
PREDICTION = {"dtrp": "rollout", "dtrp-1f1b": "rollout", "spectrain": "linear"}


def _row(method: str, stages: int, step: float) -> dict[str, Any]:
    (found,) = [row for row in ROWS if (row["method"], row["stages"], row["step"]) == (method, stages, step)]
    return found


def floor() -> str:
    lines = []
    for method, stages in SHOWN:
        short, long = _row(method, stages, 0.05), _row(method, stages, 0.15)
        lines.append([
            f"`{method}`, {stages}", str(short["expected_delays"][0]), f"{short['floor']:.5f}", f"{short['closed_form']:.5f}",
            f"{short['theorem_floor']:.3f}", f"{long['floor']:.4f}", f"{long['closed_form']:.4f}",
        ])  # fmt: skip
    head = ["method, K", "delay", "measured, a=0.05", "closed form", "theorem", "measured, a=0.15", "closed form"]
    return table(head, lines)


def momentum() -> str:
    lines = []
    for method in ("dtr", "fdg", "dtrp", "dtrp-1f1b", "spectrain"):
        for stages in (2, 3, 4):
            row = _row(method, stages, 0.01)
            lines.append([
                f"`{method}`, {stages}", str(row["expected_delays"][0]), PREDICTION.get(method, "none"),
                f"{row['floor']:.4f}", f"{row['exact_floor']:.4f}", f"{row['rate']:.4f}", f"{row['exact_rate']:.4f}",
            ])  # fmt: skip
    head = ["method, K", "delay", "prediction", "measured floor", "exact", "measured rate", "exact"]
    return table(head, lines)


def within() -> list[str]:
    """The bounds that the text claims, asserted of every line."""
    assert all(row["path_error"] <= 1e-13 for row in ROWS)
    assert all(abs(row["rate"] / row["exact_rate"] - 1) <= 1e-6 for row in ROWS)
    assert all(abs(row["floor"] / row["exact_floor"] - 1) <= 0.01 for row in ROWS)
    return ["1"]
