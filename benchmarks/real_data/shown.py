"""What the documents say of results/cifar10.jsonl."""

from shown import rows, table

FOUND = {(row["method"], row["seed"]): 100 * row["test_accuracy"] for row in rows("real_data/results/cifar10.jsonl")}
SEEDS = sorted({seed for _, seed in FOUND})
LESS = [FOUND["bp", seed] - FOUND["dtrp", seed] for seed in SEEDS]


def epoch() -> list[str]:
    accuracies = [FOUND[method, seed] for method in ("bp", "dtrp") for seed in SEEDS]
    return [f"{value:.1f}" for value in (*accuracies, sum(LESS) / len(LESS), min(LESS), max(LESS))]


def measured() -> str:
    lines = [
        [str(seed), f"{FOUND['bp', seed]:.1f}", f"{FOUND['dtrp', seed]:.1f}", f"{less:.1f}"]
        for seed, less in zip(SEEDS, LESS, strict=True)
    ]
    return table(["seed", "`bp`", "`dtrp`", "points less"], lines)
