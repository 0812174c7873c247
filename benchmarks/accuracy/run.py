"""Accuracy on CIFAR-10 of every method, side by side, over seeds.

    python benchmarks/accuracy/run.py small --data-dir DIR       # ResNet-14 of width 8, 20,000 images, 8 epochs
    python benchmarks/accuracy/run.py wide --data-dir DIR        # every method, K and A on it: 5,000 images, 6 epochs
    python benchmarks/accuracy/run.py resnet20 --data-dir DIR    # ResNet-20, K = 4, four methods: 10,000 images, 6 epochs
    python benchmarks/accuracy/run.py length --data-dir DIR      # ResNet-14 of width 8, all images, 20 epochs; half an hour a run
    python benchmarks/accuracy/run.py long --data-dir DIR --device cuda    # ResNet-20, K = 4: 30 epochs, all images
    python benchmarks/accuracy/run.py long56 --data-dir DIR --device cuda  # ResNet-56, K = 2, one micro-batch
    python benchmarks/accuracy/run.py long18 --data-dir DIR --device cuda  # ResNet-18, K = 4, bfloat16
    python benchmarks/accuracy/run.py figures                    # the figures, from the lines that are there
    python benchmarks/shown.py --write                           # puts the table into README.md

All but the last two are grids of runs, seed after seed and what is checked first. A finished run is a line of results/<part>.jsonl
and is not repeated: break it off, start it again, elsewhere too; several may work on different --stages at the same time, or on
different --methods and --predictions, or --seeds. With --runs-dir a run that was broken off goes on where it was saved.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dtrp.methods import get_method, list_methods
from dtrp.train.comparison import Cell, grid

sys.path.insert(0, str(Path(__file__).parents[1]))
from training import cell_of, key, read_rows, train

HERE = Path(__file__).parent
COMMON = {
    "data": "cifar10", "threads": "1", "warmup-updates": "100", "prediction-error-every": "64", "limit-train": "20000",
    "epochs": "8", "batch-size": "128", "lr": "0.1",
}  # fmt: skip
LONG = {"limit-train": None, "epochs": "30", "batch-size": "256", "lr": "0.2", "warmup-updates": "400"}
LONG_PARTS = ("long", "long56", "long18")
LENGTH = {"limit-train": None, "epochs": "20", "warmup-updates": "400"}
OWN: dict[str, dict[str, str | None]] = {  # of a part; None: all images
    "wide": {"limit-train": "5000", "epochs": "6", "warmup-updates": "50"},
    "resnet20": {"limit-train": "10000", "epochs": "6", "warmup-updates": "50"},
    "length": LENGTH,
    **dict.fromkeys(LONG_PARTS, LONG), "long18": LONG | {"dtype": "bfloat16"},
}  # fmt: skip
MODELS = {
    "small": "resnet14-8", "wide": "resnet14-8", "resnet20": "resnet20", "length": "resnet14-8",
    "long": "resnet20", "long56": "resnet56", "long18": "resnet18",
}  # fmt: skip
BOTH = ("linear", "rollout")
# Methods, stages, micro-batches, predictions: in the order in which they run, for each seed. fdg and adl are one row.
GRIDS: dict[str, list[tuple[str, str, str, tuple[str, ...]]]] = {
    "small": [
        ("bp,spectrain,dtrp,fdg,fr", "4,8", "K", BOTH),
        ("bp,dgl,dtr,dtrp-1f1b,adl,ddg", "4,8", "K", BOTH),
        ("bp,spectrain,dtrp,fdg,fr,dgl,dtr,dtrp-1f1b,ddg", "4,8", "1", BOTH),
        ("bp,spectrain,dtrp,fdg,fr,dgl,dtr,dtrp-1f1b,adl,ddg", "2", "K,1", BOTH),
    ],
    "wide": [
        ("bp,spectrain,dtrp,dtrp-1f1b,dtr,fr,fdg,ddg,dgl", "8,4,2", "K,1", ("linear",)),
        ("dtrp", "8,4,2", "K,1", ("rollout",)),
        ("dtrp-split", "8", "K,1,4", ("linear",)),
        ("dtrp-1f1b", "8", "4", ("linear",)),
    ],
    "resnet20": [("bp,spectrain,dtrp,fdg", "4", "4", ("linear",))],
    "length": [
        ("bp,dtrp-1f1b,spectrain,dtrp,fdg", "8", "8", ("linear",)),
        ("bp,dtrp-1f1b,dtrp-split", "8", "2", ("linear",)),
        ("bp,dtrp-1f1b,spectrain,dtrp,fdg", "4", "4", ("linear",)),
    ],
    "long": [("bp,spectrain,dtrp,fdg", "4", "4", ("linear",))],
    "long56": [("bp,spectrain,dtrp,fdg", "2", "1", ("linear",))],
    "long18": [("bp,spectrain,dtrp,fdg", "4", "4", ("linear",))],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=[*GRIDS, "figures"])
    parser.add_argument("--data-dir", help="where cifar-10-batches-py lies")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--stages", help="some of the part's, as 4,8")
    parser.add_argument("--methods", help="some of the part's, as bp,dtrp,fdg")
    parser.add_argument("--predictions", default=",".join(BOTH), help="for the methods that predict")
    parser.add_argument("--microbatches", help="some of the part's, as K (as many as stages)")
    parser.add_argument("--device", default="cpu", help="as of dtrp train")
    parser.add_argument(
        "--runs-dir", type=Path, help="where runs save themselves, to go on after a stop; none: nowhere"
    )
    options = parser.parse_args()
    if options.part == "figures":
        figures()
        return
    if not options.data_dir:
        parser.error("--data-dir: say where cifar-10-batches-py lies")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    for cell in cells(options.part, options.seeds, options.stages):
        if wanted(cell, options) and key(cell) not in {key(cell_of(row)) for row in finished(options.part)}:
            print(MODELS[options.part], cell.name, flush=True)
            run(options.part, cell, options.data_dir, options.device, options.runs_dir)
    figures()


def wanted(cell: Cell, options: argparse.Namespace) -> bool:
    """Whether the options leave it in."""

    def names(words: str | None, *own: str) -> bool:
        return words is None or not set(own).isdisjoint(words.split(","))

    parts = [str(cell.num_microbatches), *(["K"] if cell.num_microbatches == cell.stages else [])]
    predicts = cell.prediction is None or names(options.predictions, cell.prediction)
    return names(options.methods, cell.method) and names(options.microbatches, *parts) and predicts


def cells(part: str, seeds: Sequence[int], only: str | None) -> Iterator[Cell]:
    """Each once."""
    known: set[Any] = set()
    for seed, (methods, stages, microbatches, predictions) in itertools.product(seeds, GRIDS[part]):
        counts = [int(k) for k in stages.split(",") if only is None or k in only.split(",")]
        for cell in grid(methods.split(","), counts, microbatches.split(","), [seed], predictions):
            if key(cell) not in known:
                known.add(key(cell))
                yield cell


def finished(part: str) -> list[dict[str, Any]]:
    return read_rows(HERE / "results" / f"{part}.jsonl")


def run(part: str, cell: Cell, data_dir: str, device: str, runs: Path | None = None) -> None:
    """Train one cell, or go on with it where ``runs`` has its folder, and add its line."""
    own = OWN.get(part, {})
    if part == "wide" and cell.method == "dgl":
        # Else the last of eight micro-batches would have one sample, and dgl needs two.
        own = own | {"limit-train": "4992"}
    settings = COMMON | own | {
        "data-dir": data_dir, "model": MODELS[part], "method": cell.method, "seed": str(cell.seed), "stages": str(cell.stages),
        "num-microbatches": str(cell.num_microbatches), "prediction": cell.prediction, "device": device,
    }  # fmt: skip
    train(settings, cell.name, HERE / "results" / f"{part}.jsonl", None if runs is None else runs / part)


def figures() -> None:
    """Of each network and K: accuracy by method, and against the largest delay; those of a part on one scale."""
    from dtrp.report.figures import Plot, on_white, svg
    from dtrp.report.plots import add_point, one_scale

    for part, model in MODELS.items():
        if part in LONG_PARTS:
            curves(part)
            continue
        rows = sorted(finished(part), key=lambda row: (list_methods().index(row["method"]), row["prediction"] or ""))
        looks = tuple(dict.fromkeys(cell_of(row).title for row in rows))
        plots: list[Plot] = []
        for stages in sorted({row["stages"] for row in rows}):
            by_method: dict[str, Any] = {}
            by_delay: dict[str, Any] = {}
            for (name, parts), runs in comparable(rows, stages).items():
                accuracies = [100 * row["test_accuracy"][-1] for row in runs]
                add_point(by_method, f"A={parts}", name, accuracies)
                add_point(by_delay, name, max(row["largest_delay"] for row in runs), accuracies)
            title = f"{model}, K={stages}" + (f", {next(iter(by_method))}" if len(by_method) == 1 else "")
            label = "accuracy (%)"
            plots.append(Plot(f"{part}-accuracy-K{stages}", title, label, "", by_method, "points"))
            title, delay = title + ": the frontier", "largest delay (updates)"
            plots.append(Plot(f"{part}-frontier-K{stages}", title, delay, label, by_delay, "points", looks=looks))
        for plot in one_scale(plots):
            (HERE / "results" / f"{plot.name}.svg").write_text(on_white(svg(plot)))


def curves(part: str) -> None:
    """Accuracy epoch by epoch, also of runs that were stopped on the way (results/<part>_stopped.jsonl)."""
    from dtrp.report.figures import Plot, on_white, svg

    rows = [*finished(part), *finished(f"{part}_stopped")]
    seeds = {row["seed"] for row in rows}
    series: dict[str, dict[str, list[Any]]] = {}
    for row in sorted(rows, key=lambda row: (list_methods().index(row["method"]), row["seed"])):
        name = cell_of(row).title + (f", seed {row['seed']}" if len(seeds) > 1 else "")
        y = [100 * accuracy for accuracy in row["test_accuracy"]]
        series[name] = {"x": list(range(1, len(y) + 1)), "y": y}
    if rows:
        title = f"{MODELS[part]}, K={rows[0]['stages']}, A={rows[0]['num_microbatches']}"
        picture = on_white(svg(Plot(part, title, "epochs", "accuracy (%)", series)))
        (HERE / "results" / f"{part}-accuracy.svg").write_text(picture)


def comparable(rows: list[dict[str, Any]], stages: int) -> dict[tuple[str, int], list[dict[str, Any]]]:
    """The runs at one K by method and A, and with them those of methods that flush, with the same A at whatever K."""
    sizes = {row["num_microbatches"] for row in rows if row["stages"] == stages}
    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for row in rows:
        same = row["stages"] == stages or (get_method(row["method"]).flush and row["num_microbatches"] in sizes)
        if same:
            groups.setdefault((cell_of(row).title, row["num_microbatches"]), []).append(row)
    return groups


if __name__ == "__main__":
    main()
