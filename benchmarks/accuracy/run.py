"""Accuracy on CIFAR-10 of every method, side by side, over seeds.

    python benchmarks/accuracy/run.py small --data-dir DIR       # ResNet-14 of width 8, 20,000 images, 8 epochs
    python benchmarks/accuracy/run.py resnet20 --data-dir DIR    # ResNet-20, K = 4, four methods
    python benchmarks/accuracy/run.py show                       # the tables again, from the raw files

Both are grids of `dtrp compare` and go on where they were broken off. Cells are kept in work/ (not in the repository); what a
finished cell came to is a line of results/<part>.jsonl. Differences to bp are of the same seed: paired.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
from pathlib import Path
from typing import Any

from dtrp.cli import run as dtrp
from dtrp.compare import largest_delay, prediction_error, read_summary

HERE = Path(__file__).parent
PARTS: dict[str, dict[str, str]] = {
    "small": {
        "model": "resnet14-8", "limit-train": "20000", "epochs": "8", "batch-size": "128", "lr": "0.1",
        "methods": "bp,spectrain,dtrp,fdg,fr,dtr,ddg,adl,dtrp-1f1b", "stages": "4,8,2", "num-microbatches": "K,1",
        "predictions": "linear,rollout",
    },
    "resnet20": {
        "model": "resnet20", "limit-train": "20000", "epochs": "8", "batch-size": "128", "lr": "0.1",
        "methods": "bp,spectrain,dtrp,fdg", "stages": "4", "num-microbatches": "4",
    },
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=[*PARTS, "show"])
    parser.add_argument("--data-dir", help="where cifar-10-batches-py lies")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--methods", help="some of the part's, as bp,dtrp")
    parser.add_argument("--stages", help="some of the part's, as 4,8")
    parser.add_argument("--num-microbatches", help="some of the part's, as K")
    options = parser.parse_args()
    if options.part == "show":
        for part in PARTS:
            show(part)
        return
    if not options.data_dir:
        parser.error("--data-dir: say where cifar-10-batches-py lies")
    settings = dict(PARTS[options.part])
    for name in ("methods", "stages", "num_microbatches"):
        if getattr(options, name):
            settings[name.replace("_", "-")] = getattr(options, name)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    arguments = [word for name, value in settings.items() for word in (f"--{name}", value)]
    code = dtrp(
        ["compare", "--data", "cifar10", "--data-dir", options.data_dir, "--threads", "1", "--warmup-updates", "100",
         "--prediction-error-every", "64", "--seeds", str(options.seeds), "--out", str(HERE / "work" / options.part), *arguments]
    )  # fmt: skip
    write(options.part)
    show(options.part)
    sys.exit(code)


def write(part: str) -> None:
    """All finished cells as lines, sorted."""
    lines = []
    for folder in sorted((HERE / "work" / part).glob("*-seed*")):
        summary = read_summary(folder)
        if summary is None:
            continue
        config = summary["config"]
        metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        error = prediction_error(summary)
        lines.append(
            {
                **{name: config[name] for name in ("method", "prediction", "stages", "num_microbatches", "seed", "model", "lr",
                                                   "batch_size", "warmup_updates", "limit_train", "epochs")},
                "test_accuracy": [line["test_accuracy"] for line in metrics],
                "test_loss": [line["test_loss"] for line in metrics],
                "largest_delay": largest_delay(summary),
                "prediction_error": None if math.isnan(error) else error,
                "minibatch_s": summary["minibatch_s"],
                **{name: summary["environment"][name] for name in ("torch", "dtrp")},
            }
        )  # fmt: skip
    (HERE / "results").mkdir(exist_ok=True)
    (HERE / "results" / f"{part}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def show(part: str) -> None:
    path = HERE / "results" / f"{part}.jsonl"
    if not path.exists():
        return
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    backprop = {(r["num_microbatches"], r["seed"]): r["test_accuracy"][-1] for r in rows if r["method"] == "bp"}
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for r in rows:
        groups.setdefault((r["stages"], r["num_microbatches"], r["method"], r["prediction"] or ""), []).append(r)
    print(
        f"{part}\n\n| K | A | method | seeds | accuracy, % | less bp's with that A (paired) | delay | prediction error |\n|"
        + "---|" * 8
    )
    for (stages, parts, method, prediction), runs in sorted(groups.items()):
        accuracies = [100 * r["test_accuracy"][-1] for r in runs]
        less = [
            100 * (backprop[parts, r["seed"]] - r["test_accuracy"][-1]) for r in runs if (parts, r["seed"]) in backprop
        ]
        errors = [r["prediction_error"] for r in runs if r["prediction_error"] is not None]
        name = f"{method} ({prediction})" if prediction else method
        paired = "" if method == "bp" else _mean(less, error=True)
        print(
            f"| {stages} | {parts} | {name} | {len(runs)} | {_mean(accuracies)} | {paired} | "
            f"{max(r['largest_delay'] for r in runs)} | {f'{statistics.fmean(errors):.2f}' if errors else ''} |"
        )
    print()


def _mean(values: list[float], *, error: bool = False) -> str:
    """Mean ± standard deviation, or standard error."""
    if not values:
        return ""
    if len(values) == 1:
        return f"{values[0]:.2f}"
    spread = statistics.stdev(values) / (math.sqrt(len(values)) if error else 1)
    return f"{statistics.fmean(values):.2f} ± {spread:.2f}"


if __name__ == "__main__":
    main()
