"""What the documents show of the raw files in results/."""

from shown import Rows, accuracy, less, rows, spread, table

from dtrp.train import relative_samples

WIDE, GPT = (
    Rows({"stretch": 1.0, **row} for row in rows(f"frontier/results/{part}.jsonl")) for part in ("wide", "gpt")
)
ORDER = ("none", "linear", "rollout", "informed", "last", "scaled", "auto")


def base_of(runs: Rows, found: Rows) -> Rows:
    """bp's with the same optimizer, rate and number of micro-batches; of the GPT, where A changes nothing, with any."""
    base = found.where(method="bp", optimizer=runs[0]["optimizer"], lr=runs[0]["lr"])
    return base.where(num_microbatches=runs[0]["num_microbatches"]) if "test_accuracy" in runs[0] else base


def samples(runs: Rows, base: Rows) -> str:
    """The samples to bp's final accuracy, or loss, over bp's."""
    name = "test_accuracy" if "test_accuracy" in runs[0] else "curve"

    def curves(found: Rows) -> list[list[float]]:
        return [list(row[name].values()) if isinstance(row[name], dict) else row[name] for row in found]

    def tests(found: Rows) -> list[int]:
        """When: the updates, or the epochs."""
        curve = found[0][name]
        return [int(n) for n in curve] if isinstance(curve, dict) else list(range(1, len(curve) + 1))

    return str(
        relative_samples(
            tests(runs), curves(runs), tests(base), curves(base), higher_is_better=name == "test_accuracy",
            seeds=[row["seed"] for row in runs], base_seeds=[row["seed"] for row in base],
        )
    )  # fmt: skip


def in_order(found: Rows) -> list[tuple[tuple[str, ...], Rows]]:
    groups = found.by("{optimizer}|{num_microbatches}|{method}|{prediction}|{stretch}|{lr}")
    cells = [(tuple(label.split("|")), runs) for label, runs in groups.items()]
    place = {name: str(i) for i, name in enumerate(ORDER)}
    return sorted(cells, key=lambda cell: (*cell[0][:3], place.get(cell[0][3], "")))


def grid(name: str, found: Rows, part: str) -> str:
    lines = []
    for (optimizer, parts, method, prediction, stretch, lr), runs in in_order(found):
        base = base_of(runs, found)
        rates = {row["lr"] for row in found.where(optimizer=optimizer) if row["method"] != "bp"}
        if rates and runs[0]["lr"] not in rates:
            continue  # which was tried for bp alone
        paired = Rows(row for row in runs if base.where(seed=row["seed"]))
        if part == "wide":
            value = spread([*map(accuracy, runs)], ".2f")
            gap = spread(less(paired, base), ".2f", error=True) if paired and method != "bp" else ""
        else:
            value = spread([row["validation_loss"] for row in runs], ".3f")
            over = [
                100 * (row["validation_loss"] / base.only(seed=row["seed"])["validation_loss"] - 1) for row in paired
            ]
            gap = spread(over, "+.2f", error=True) if over and method != "bp" else ""
        needed = samples(runs, base) if base and method != "bp" else ""
        told = prediction.replace("None", "") + ("" if stretch == "1.0" else f", `{stretch}` times the updates")
        row = f"{optimizer}, {float(lr):g} | {parts} | {method} | {told} | {len(runs)} | {value} | {gap} | {needed}"
        lines.append(row)
    gap_of = "less than bp's, points (paired)" if part == "wide" else "over bp's, % (paired)"
    head = f"{name}: optimizer, learning rate | A | method | prediction | seeds"
    head += " | accuracy, %" if part == "wide" else " | validation loss"
    return table(f"{head} | {gap_of} | samples to bp's, over bp's", lines)


def rates(found: Rows) -> str:
    """What was tried for bp, one seed."""
    tried = [row for row in found.where(method="bp", seed=0) if row["num_microbatches"] == found[0]["num_microbatches"]]
    several = [row for row in tried if sum(other["optimizer"] == row["optimizer"] for other in tried) > 1]
    ordered = sorted(several, key=lambda row: (row["optimizer"], row["lr"]))
    return table(
        "optimizer | learning rate | bp's accuracy, %",
        [f"{row['optimizer']} | {row['lr']:g} | {accuracy(row):.2f}" for row in ordered],
    )


TABLES = [grid("wide", WIDE, "wide"), grid("gpt", GPT, "gpt"), rates(WIDE)]
