"""What the documents show of the raw files in results/."""

from statistics import fmean

from shown import Rows, accuracy, join, less, rows, spread, table

from dtrp.train import relative_samples

TITLES = {"cifar10": "CIFAR-10", "fashion-mnist": "Fashion-MNIST", "mnist": "MNIST"}
ORDER = ("bp", "dtrp-split", "dtrp-1f1b", "spectrain", "dtrp", "fr", "fdg", "ddg", "dgl")
RUNS, TUNING = (rows(f"datasets/results/{name}.jsonl") for name in ("runs", "tuning"))
HEAD = "seeds | accuracy, % | less than bp's, points (paired) | samples to bp's accuracy, over bp's | delay | all stages, MB"


def title(row: dict[str, str]) -> str:
    return TITLES[row["data"]] + " (split of our own)" * (row["split"] == "own")


def needed(found: Rows, base: Rows) -> str:
    tests = [row["limit_train"] * epoch for row in found[:1] for epoch in range(1, row["epochs"] + 1)]
    curves = ([row["test_accuracy"] for row in some] for some in (found, base))
    return str(relative_samples(tests, next(curves), tests, next(curves), higher_is_better=True))


def line(label: str, found: Rows) -> str:
    row = found[0]
    seeds = {run["seed"] for run in found}
    base = Rows(run for run in RUNS.where(data=row["data"], model=row["model"], method="bp") if run["seed"] in seeds)
    apart = spread(less(found, base), ".2f", error=True) if len(base) == len(found) and row["method"] != "bp" else ""
    memory = fmean(sum(run["peak_bytes"]) for run in found) / 1e6
    told = spread([*map(accuracy, found)], ".2f")
    return f"{label} | {len(found)} | {told} | {apart} | {needed(found, base)} | {row['largest_delay']} | {memory:.1f}"


def lines(found: Rows, label: str) -> list[str]:
    """Methods in their order, within a data set and a network."""
    known = sorted(found.by("{data} {model} {method}").values(), key=lambda runs: ORDER.index(runs[0]["method"]))
    known.sort(key=lambda runs: (sorted(TITLES).index(runs[0]["data"]), runs[0]["model"]))
    return [line(label.format(title=title(runs[0]), **runs[0]), runs) for runs in known]


def rates(found: Rows) -> str:
    chosen = RUNS.where(data=found[0]["data"], model=found[0]["model"], method="bp", seed=found[0]["seed"])
    of = (join([accuracy(row) for row in found if row["lr"] == rate], ".2f") for rate in (0.01, 0.03, 0.1, 0.3, 1.0))
    return f"{title(found[0])} | {found[0]['model']} | {' | '.join(of)} | {join([row['lr'] for row in chosen], 'g')}"


RESNET = RUNS.where(model="resnet14-8")
OTHERS = Rows(row for row in RUNS if row["model"] != "resnet14-8")
TABLES = [
    table(f"ResNet-14 of width 8 on | method | {HEAD}", lines(RESNET, "{title} | `{method}`")),
    table(f"data | network | method | {HEAD}", lines(OTHERS, "{title} | {model} | `{method}`")),
    table("bp, first seed | network | accuracy, % at lr 0.01 | at 0.03 | at 0.1 | at 0.3 | at 1 | chosen",
          map(rates, TUNING.by("{data} {model}").values())),
]  # fmt: skip
