"""What the documents say of results/*.jsonl."""

from typing import Any

from shown import rows, table

PARTS = {"workers": "of a random worker, every fourth time of all", "saving": "of a worker in the middle of a save",
         "launcher": "of the launcher; then the same command again"}  # fmt: skip


def measured() -> str:
    return table(
        ["kill -9", "kills", "exit code", "weights equal", "losses equal", "s undisturbed", "s with the kills"],
        [_line(name, rows(f"restarts/results/{part}.jsonl")[-1]) for part, name in PARTS.items()],
    )


def _line(name: str, row: dict[str, Any]) -> list[str]:
    equal = ["yes" if row[f"{what}_equal"] else "no" for what in ("weights", "metrics")]
    kills = str(len(row["kills"])) if "kills" in row else "1"
    return [name, kills, str(row["code"]), *equal, f"{row['undisturbed_s']:.1f}", f"{row['elapsed_s']:.1f}"]


def elastic() -> list[str]:
    row = rows("restarts/results/elastic.jsonl")[-1]
    return [f"{100 * row['accuracy']:.1f}", f"{100 * row['bp_accuracy']:.1f}"]
