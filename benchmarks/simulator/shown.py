"""What the documents say of results/crossing.jsonl and places.jsonl."""

from typing import Any

from shown import rows, table

HEAD = ["K", "A", "hop / F", "1F1B-flush", "zero-bubble", "dtrp (ahead, delay)", "fdg (ahead, delay)"]
CROSSING = {
    (row["stages"], row["num_microbatches"], row["latency"]): row for row in rows("simulator/results/crossing.jsonl")
}
PLACES = rows("simulator/results/places.jsonl")
CHOSEN = [(4, 4, 0), (4, 4, 1), (4, 16, 0), (4, 16, 1), (16, 16, 0), (16, 64, 0), (16, 64, 0.1), (16, 64, 1), (64, 64, 0),
          (64, 256, 0), (64, 256, 0.1), (64, 256, 4)]  # fmt: skip


def _times(row: dict[str, Any]) -> list[str]:
    decoupled = [f"{row[m]['ratio']:.2f} ({row[m]['ahead']:g}, {row[m]['delay']})" for m in ("dtrp", "fdg")]
    return [f"{row['bp']:.2f}", f"{row['zero-bubble']:.2f}", *decoupled]


def crossing() -> str:
    return table(HEAD, [[f"{key[0]}", f"{key[1]}", f"{key[2]:g}", *_times(CROSSING[key])] for key in CHOSEN])


def places() -> str:
    lines = [["data centre" if row["latency"] < 0.1 else "home", str(row["stages"]), *_times(row)] for row in PLACES]
    lines.sort(key=lambda line: line[0])
    return table(["", "K", *HEAD[3:]], lines)


def price() -> list[str]:
    assert {round(row["dtrp"]["ratio"], 2) for row in CROSSING.values()} == {1.33}
    assert {round(row["fdg"]["ratio"], 2) for row in CROSSING.values()} == {1.00}
    return ["1.33", "1.00"]


def fast_links() -> list[str]:
    many = [CROSSING[k, 4 * k, 0] for k in (4, 16, 64)]
    bounds = [f"{pick(row[name] for row in many):.2f}" for name in ("bp", "zero-bubble") for pick in (min, max)]
    return [*bounds, price()[0]]


def slow_links() -> list[str]:
    many = [CROSSING[k, 4 * k, 1] for k in (4, 16, 64)]
    return [f"{pick(row[name] for row in many):.1f}" for name in ("bp", "zero-bubble") for pick in (min, max)]
