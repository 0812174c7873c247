"""What the documents show of the raw files in results/."""

from typing import Any

from shown import Rows, join, rows, spread, table

PARTS = ("exploration", "gpt", "tuning", "first_recipe")
EXPLORED, RECIPE, TUNED, FIRST = (rows(f"gpt/results/{part}.jsonl") for part in PARTS)
FORMER, CHOSEN = RECIPE.by("{config[cuts]}").values()


def compare(name: str, found: Rows) -> str:
    """Losses and excess over backpropagation's by seed; from three seeds on the mean, with its standard error."""
    bp = {row["seed"]: row["validation_loss"] for row in found.where(method="bp")}
    lines = []
    for method, runs in sorted(found.by("{method}").items()):
        losses = {run["seed"]: run["validation_loss"] for run in sorted(runs, key=lambda run: run["seed"])}
        over = [100 * (loss / bp[seed] - 1) for seed, loss in losses.items() if method != "bp"]
        mean = spread(over, "+.2f", error=True) if len(over) > 2 else ""
        cells = join(losses, "d", ", "), join(losses.values(), ".3f", ", "), join(over, "+.2f", ", "), mean
        lines.append(f"{method} | {' | '.join(cells)}")
    return table(f"{name}: method | seeds | validation loss | over bp's, % | mean", lines)


def explored(updates: int, **wanted: int) -> str:
    """Losses after so many updates with these settings, beside backpropagation's with the same draw and rate."""
    found = {}
    for row in EXPLORED:
        other = {"width": 128, "draw": "`gpt`'s", "cuts": [2, 3, 5], **row["other"]}
        if wanted.items() <= other.items() and str(updates) in row["curve"]:
            settings = " | ".join(str(other[name]).strip("[]") for name in ("batch", "draw", "lr"))
            found[settings, row["method"], str(other["cuts"])[1:-1]] = row["curve"][str(updates)]
    bp = {settings: loss for (settings, method, _), loss in found.items() if method == "bp"}
    lines = [
        f"{settings} | {method} | {cuts} | {loss:.3f} | {100 * (loss / bp[settings] - 1):.1f}"
        for (settings, method, cuts), loss in sorted(found.items())
    ]
    head = "windows | linear layers, embeddings | learning rate | method | cuts | validation loss | over bp's, %"
    return table(f"after {updates} updates: {head}", lines)


def tuned(row: dict[str, Any]) -> str:
    """What else was tried, beside the recipe with that method and seed."""
    recipe = FORMER.only(method=row["method"].removesuffix(", gamma 0.8"), seed=row["seed"])
    other = [f"{name} {value}" for name, value in row["config"].items() if value != recipe["config"][name]]
    losses = join([row["validation_loss"], recipe["validation_loss"]], ".3f", " | ")
    return f"{row['method']} | {row['seed']} | {'; '.join(other)} | {losses}"


TABLES = [
    compare("cuts 1, 3, 5", CHOSEN),
    compare("cuts 2, 3, 5", FORMER),
    compare("first recipe", FIRST),
    table("method | seed | other than the recipe | validation loss | the recipe's", map(tuned, TUNED)),
    explored(150, width=128, batch=16),
    explored(200, width=64),
    explored(250),
]
