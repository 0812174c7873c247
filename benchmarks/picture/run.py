"""The picture of results: accuracy over time for the same work, and memory as the number of stages grows.

    python benchmarks/picture/run.py     # docs/_static/results-light.svg and results-dark.svg, from stored rows

Left: test accuracies of benchmarks/accuracy after each epoch, the mean over the seeds and a standard deviation. An epoch
takes what `dtrp.planning.simulate` gives for equal stages whose backward takes twice the forward and links that cost
nothing, over what it gives for ``bp``, which is 1F1B; a forward that is repeated is counted. ``bp-zb`` and ``bp,
checkpointed`` have the gradients of ``bp`` and so its curve, the one on a faster schedule, the other with every forward run
twice. Right: what the system says that all processes of benchmarks/memory took for training, over what one process takes.
"""

from __future__ import annotations

import hashlib
import json
import statistics
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from dtrp.planning import simulate
from dtrp.report.looks import method_look

Row = dict[str, Any]
Lines = dict[str, dict[str, list[float]]]  # x, y and a spread, by label
HERE = Path(__file__).parent
FILES = {name: HERE.parents[1] / "docs" / "_static" / f"results-{name}.svg" for name in ("light", "dark")}
# The longest runs that are there: the part of benchmarks/accuracy, K and A, and what was trained on.
PARTS = [
    ("length", 8, 8, "CIFAR-10, 20 epochs"),
    ("length", 4, 4, "CIFAR-10, 20 epochs"),
    ("small", 8, 8, "20,000 of CIFAR-10, 8 epochs"),
]
METHODS = ("bp", "bp, checkpointed", "bp-zb", "fdg", "dtrp", "dtrp-1f1b", "spectrain")
NEEDED = {"bp", "dtrp", "spectrain"}  # without which there is no picture of a part
MEMORY = {"model": "resnet110", "batch_size": 64}
MEMORY_TITLE = "ResNet-110, mini-batches of 64; as the system counts"
MEMORY_METHODS = ("bp", "bp, checkpointed", "gpipe", "fdg", "dtrp", "spectrain")
INKS = {"light": ("#1f2328", "#ffffff"), "dark": ("#e6edf3", "#0d1117")}
DASHES = {"bp, checkpointed": ":", "bp-zb": "--"}
STYLE: Any = {"svg.fonttype": "path", "svg.hashsalt": "dtrp", "font.family": "sans-serif", "font.size": 10.5,
              "text.parse_math": False}  # fmt: skip


def read(path: str) -> list[Row]:
    file = HERE.parent / path
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def accuracy_lines() -> tuple[str, Lines]:
    """What was trained; and of each method the time after each epoch, in per cent of all of bp's, and the accuracy."""
    for part, stages, parts, told in PARTS:
        found: dict[str, list[list[float]]] = {}
        for row in read(f"accuracy/results/{part}.jsonl"):
            same = row["num_microbatches"] == parts and (row["stages"] == stages or row["method"] == "bp")
            if same and row["prediction"] in (None, "linear"):
                found.setdefault(row["method"], []).append([100 * value for value in row["test_accuracy"]])
        if found.keys() >= NEEDED:
            seeds = min(map(len, found.values()))
            title = f"ResNet-14, {told}; {stages} stages, {seeds} seed{'s' * (seeds > 1)}; simulated time"
            found |= dict.fromkeys(DASHES, found["bp"])
            return title, {name: curve(found[name], name, stages, parts) for name in METHODS if name in found}
    raise SystemExit(f"no part of benchmarks/accuracy has {', '.join(sorted(NEEDED))}")


def curve(runs: list[list[float]], name: str, stages: int, parts: int) -> dict[str, list[float]]:
    tests = list(zip(*runs, strict=True))
    last = 100 * minibatch_time(name, stages, parts) / minibatch_time("bp", stages, parts)
    return {
        "x": [last * (n + 1) / len(tests) for n in range(len(tests))],
        "y": [statistics.fmean(values) for values in tests],
        "spread": [statistics.stdev(values) if len(values) > 1 else 0.0 for values in tests],
    }


def minibatch_time(name: str, stages: int, parts: int) -> float:
    """In units of a forward of a micro-batch on one stage; a backward with activation checkpoints begins with a forward."""
    backward = 3 if name.endswith("checkpointed") else 2
    return simulate(
        name.partition(",")[0], num_stages=stages, num_minibatches=5 * stages, num_microbatches=parts, forward_s=1,
        backward_s=backward,
    ).minibatch_s  # fmt: skip


def memory_lines() -> Lines:
    """Of each method the memory of all processes, over that of one, at each number of stages."""
    rows = [row for row in read("memory/results/outside.jsonl") if MEMORY.items() <= row.items()]
    alone = next(row for row in rows if row["stages"] == 1)
    lines: Lines = {}
    for name in MEMORY_METHODS:
        own = [row for row in rows if row["name"] == name and row["stages"] == row["num_microbatches"] > 1]
        own = [alone, *sorted(own, key=lambda row: row["stages"])]  # with one stage all are bp
        lines[name] = {"x": [row["stages"] for row in own], "y": [grown(row) / grown(alone) for row in own]}
    return lines


def grown(row: Row) -> int:
    """Bytes that all processes took for training."""
    return sum(process["rss_peak"] - process["rss_before"] for process in row["processes"])


def digest() -> str:
    """A name for the numbers of the picture, which its files hold."""
    return hashlib.sha256(json.dumps([accuracy_lines(), memory_lines()]).encode()).hexdigest()


def draw(ink: str, background: str) -> Figure:
    figure = Figure(figsize=(9.8, 4.3), layout="constrained", facecolor=background)
    figure.get_layout_engine().set(wspace=0.08)
    left, right = figure.subplots(1, 2)
    told, curves = accuracy_lines()
    frame(left, ink, background, "Accuracy over time, same work", told)
    left.set(xlabel="training time, % of pipelined bp's (1F1B)", ylabel="test accuracy, %", xlim=(0, 140))
    known = plot(left, curves, ends_only=True)
    left.set_ylim(bottom=min(line["y"][-1] for line in curves.values()) - 30)
    frame(right, ink, background, "Memory of all workers", MEMORY_TITLE)
    right.set(xlabel="stages, each a worker; as many micro-batches", ylabel="times one worker's")
    known |= plot(right, memory_lines())
    right.set_ylim(0, None)
    right.set_xscale("log", base=2)
    right.set_xticks([1, 2, 4, 8], ["1", "2", "4", "8"])
    right.minorticks_off()
    style: Any = {"frameon": False, "labelcolor": ink, "ncols": len(known), "handlelength": 1.8, "columnspacing": 1.4}
    figure.legend(known.values(), known.keys(), loc="outside lower center", **style)
    return figure


def frame(axes: Any, ink: str, background: str, title: str, below: str) -> None:
    axes.set_facecolor(background)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[:].set_color(ink)
    axes.tick_params(colors=ink)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set_color(ink)
    axes.grid(alpha=0.2, linewidth=0.6)
    axes.set_title(title, color=ink, loc="left", fontsize=13, fontweight="bold", pad=24)
    axes.text(0, 1.03, below, transform=axes.transAxes, color=ink, fontsize=9, in_layout=False)


def plot(axes: Any, lines: Lines, *, ends_only: bool = False) -> dict[str, Any]:
    """Draw lines with points, or with one at their end; the lines by label."""
    drawn = {}
    for name, line in lines.items():
        colour = method_look(name.partition(",")[0]).colour
        every = [len(line["x"]) - 1] if ends_only else None
        (drawn[name],) = axes.plot(
            line["x"], line["y"], color=colour, linestyle=DASHES.get(name, "-"), linewidth=1.8, marker="o", markersize=4.5,
            markevery=every,
        )  # fmt: skip
        if "spread" in line and name not in DASHES:  # whose band is bp's
            low, high = ([y + sign * s for y, s in zip(line["y"], line["spread"], strict=True)] for sign in (-1, 1))
            axes.fill_between(line["x"], low, high, color=colour, alpha=0.15, linewidth=0)
    return drawn


def main() -> None:
    for name, path in FILES.items():
        with mpl.rc_context(STYLE):
            canvas: Any = FigureCanvasSVG(draw(*INKS[name]))
            canvas.print_svg(path, metadata={"Date": None, "Creator": None, "Description": digest()})


if __name__ == "__main__":
    main()
