"""Peak memory against the number of stages.

    python benchmarks/memory/run.py local              # all stages in one process: ResNet-56, 110 and 1202
    python benchmarks/memory/run.py ranks              # a process for each stage: what the system says each took
    python benchmarks/memory/run.py local --device cuda
    python benchmarks/memory/run.py figures            # the figures, from the lines that are there

Every cell runs in processes of its own, until each stage has held the most that it ever will: a few mini-batches more than its
lead. A finished cell is a line of results/<part>.jsonl, or of a GPU's results/gpu.jsonl or gpu_ranks.jsonl; one that is there is
not repeated.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
import multiprocessing
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy

import dtrp
from dtrp import Method
from dtrp.measure.memory import held_at_most
from dtrp.models import get_model
from dtrp.schedule import lead
from dtrp.train import environment

HERE = Path(__file__).parent
METHODS = ("bp", "gpipe", "ddg", "fr", "fdg", "dtrp", "spectrain")
# Samples of a mini-batch; bytes of activations go with it.
SIZES = {"resnet56": 8, "resnet110": 8, "resnet1202": 2}
DEVICE_SIZES = {"resnet56": 128, "resnet110": 128, "resnet1202": 16}  # of a GPU, which has room
STAGES = (2, 4, 8)
PARTS = {
    "local": [(m, k, a) for a, k, m in itertools.product((1, "K"), STAGES, METHODS)],
    "ranks": [(m, k, a) for k, a, m in itertools.product((2, 4), (1,), ("bp", "fdg", "dtrp"))],
}
RANKS = {"resnet110": 16}


def cells(part: str, models: list[str], device: str) -> list[dict[str, Any]]:
    """Every cell: of all methods at K = 1 one is enough, and no micro-batch is smaller than a sample."""
    found = []
    for model in models:
        size = (RANKS if part == "ranks" else SIZES if device == "cpu" else DEVICE_SIZES)[model]
        alone = [("bp", 1, 1)] if part == "local" else []
        for method, stages, word in [*alone, *PARTS[part]]:
            cell = {"model": model, "method": method, "stages": stages, "num_microbatches": stages if word == "K" else word,
                    "batch_size": size}  # fmt: skip
            same = method == "gpipe" and cell["num_microbatches"] == 1  # as bp
            if cell["num_microbatches"] <= size and cell not in found and not same:
                found.append(cell)
    return found


def measure(cell: dict[str, Any], device: str) -> dict[str, Any]:
    """In a process of its own, or in one of a cell's ranks: what the stages held, and what this process took."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = get_model(cell["model"])
    method, parts = dtrp.get_method(cell["method"]), cell["num_microbatches"]
    pipe = dtrp.Pipeline(
        model, functools.partial(torch.optim.SGD, lr=0.01, momentum=0.9), cross_entropy,
        num_stages=cell["stages"], method=method, num_microbatches=parts, seed=0, devices=torch.device(device),
    )  # fmt: skip
    before = peak_rss()
    for _ in range(enough(method, cell["stages"], parts)):
        pipe.step(torch.randn(cell["batch_size"], 3, 32, 32), torch.randint(10, (cell["batch_size"],)))
    pipe.flush()
    memory, activations = pipe.memory(), pipe.activations_peak()
    own: dict[str, Any] = {
        "stages_bytes": {
            k: {"peak": held_at_most(memory[k], activations[k]), "activations": activations[k], **memory[k]} for k in memory
        },
        "process": {"rss_before": before, "rss_peak": peak_rss()},
    }  # fmt: skip
    if device != "cpu":
        own["process"]["device_peak"] = torch.cuda.max_memory_allocated(device)
    every = pipe.gather(own)
    pipe.close()
    return {
        "peak_bytes": [each["peak"] for one in every for each in one["stages_bytes"].values()],
        "activations_bytes": [each["activations"] for one in every for each in one["stages_bytes"].values()],
        "memory": [each for one in every for each in one["stages_bytes"].values()],
        "processes": [one["process"] for one in every],
        **environment(),
    }


def enough(method: Method, num_stages: int, num_microbatches: int) -> int:
    """Mini-batches until a stage has held the most it ever will."""
    if method.flush:
        return 2
    filled = math.ceil((lead(method, num_stages, 0) + 1) / num_microbatches) + 1
    # Kept graphs stand on copies of the weights, which are all different a lead later.
    return filled + 1 if method.keep == "input" else 2 * filled


def peak_rss() -> int:
    """Of this process so far, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def run_cell(part: str, cell: dict[str, Any], device: str) -> dict[str, Any]:
    """Measure in new processes, and return the line."""
    with tempfile.TemporaryDirectory() as folder:
        row = Path(folder) / "row.json"
        if part == "ranks":
            launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(cell["stages"])]
            own = [str(HERE / "run.py"), "cell", "--cell", json.dumps(cell), "--device", device, "--row", str(row)]
            subprocess.run([sys.executable, *launch, *own], check=True)
        else:  # a fork has torch loaded, and has used no device
            process = multiprocessing.get_context("fork").Process(target=write_row, args=(cell, device, row))
            process.start()
            process.join()
            if process.exitcode:
                raise SystemExit(f"{cell} failed, with exit code {process.exitcode}")
        return {**cell, **json.loads(row.read_text()), "device": device}


def write_row(cell: dict[str, Any], device: str, path: Path) -> None:
    row = measure(cell, device)
    if os.environ.get("RANK", "0") == "0":
        path.write_text(json.dumps(row))


def results(part: str, device: str) -> Path:
    gpu = {"local": "gpu", "ranks": "gpu_ranks"}
    return HERE / "results" / f"{part if device == 'cpu' else gpu[part]}.jsonl"


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def figures() -> None:
    """Peak memory of all stages, and of the largest, against K."""
    from dtrp.report.figures import Plot, on_white, svg

    rows = read(results("local", "cpu"))
    for model in SIZES:
        for shown, title, of in (("sum", "all stages", sum), ("largest", "the largest stage", max)):
            series: dict[str, dict[str, list[Any]]] = {}
            for method in METHODS:
                own = [
                    row for row in rows if (row["model"], row["method"], row["num_microbatches"]) == (model, method, 1)
                ]
                if own:
                    own.sort(key=lambda row: row["stages"])
                    series[method] = {"x": [r["stages"] for r in own], "y": [of(r["peak_bytes"]) / 1e6 for r in own]}
            if series:
                note = f"{model}, mini-batches of {SIZES[model]}, one micro-batch: {title}"
                picture = on_white(svg(Plot(model, note, "stages", "MB", series)))
                (HERE / "results" / f"{model}-{shown}.svg").write_text(picture)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=[*PARTS, "figures", "cell"])
    parser.add_argument("--models", nargs="+", choices=list(SIZES), help="some of them")
    parser.add_argument("--stages", nargs="+", type=int, default=[1, *STAGES], help="some of them")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--cell", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--row", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part == "figures":
        figures()
        return
    if options.part == "cell":
        write_row(options.cell, options.device, options.row)
        return
    path = results(options.part, options.device)
    done = [{key: row[key] for key in ("model", "method", "stages", "num_microbatches", "batch_size", "device")}
            for row in read(path)]  # fmt: skip
    models = options.models or list(SIZES if options.part == "local" else RANKS)
    wanted = [cell for cell in cells(options.part, models, options.device) if cell["stages"] in options.stages]
    left = [cell for cell in wanted if {**cell, "device": options.device} not in done]
    path.parent.mkdir(exist_ok=True)
    for cell in left:
        row = run_cell(options.part, cell, options.device)
        with path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        shown = " ".join(f"{size / 1e6:.1f}" for size in row["peak_bytes"])
        print(
            f"{cell['model']} {cell['method']} K={cell['stages']} A={cell['num_microbatches']}: {shown} MB", flush=True
        )
    figures()


if __name__ == "__main__":
    main()
