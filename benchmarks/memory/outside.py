"""Memory from outside: what the system says each process took, a process for each stage, as the number of stages grows.

    python benchmarks/memory/outside.py               # a GPT and ResNet-110, K = 1, 2, 4, 8; half an hour on one core
    python benchmarks/memory/outside.py --models resnet110 --batch-size 64 --microbatches K    # for benchmarks/picture
    python benchmarks/shown.py --write                # puts the tables into README.md

A cell is K new processes, forked from one that has torch loaded and has computed nothing, joined by gloo. Of each the kernel
tells, when it has ended, the most that it had resident (what its parent's wait4 returns). Before a process makes its model it
trains a tiny one of the kind, which brings torch's code into memory, and tells what it has then; the difference is what
training took: weights, optimizer, activations, messages, working memory.
A cell runs until each stage has held the most it ever will. A finished one is a line of results/outside.jsonl and is not
repeated. `keep="auto"` has as its limit, for each stage, a fifth more than what the largest stage of bp or of dtrp held at
that K and A.
"""

from __future__ import annotations

import argparse
import functools
import gc
import itertools
import json
import os
import runpy
import socket
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # which the first optimizer would import, in each process
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

import dtrp
from dtrp.launch.join import join
from dtrp.measure.memory import held_at_most
from dtrp.models import cifar_resnet, get_model, gpt
from dtrp.train import class_loss, environment

HERE = Path(__file__).parent
MEMORY = runpy.run_path(str(HERE / "run.py"))
RESULTS = HERE / "results" / "outside.jsonl"
METHODS = {  # what is compared, and the method that it is
    "bp": "bp", "bp, checkpointed": "bp", "gpipe": "gpipe", "fdg": "fdg", "dtrp": "dtrp", "dtrp, keep=auto": "dtrp",
    "spectrain": "spectrain",
}  # fmt: skip
STAGES = (2, 4, 8)
MODELS = ("gpt", "resnet110")
GPT = {"layers": 16, "width": 128, "heads": 4, "context": 128}
NUM_TOKENS = 64
ROOM = 1.2  # the limit of keep="auto", over the largest stage
WAIT_S = 600.0  # for each other


class Checkpointed(nn.Module):
    """A block that keeps its input, and runs again in the backward."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = checkpoint(self.block, x, use_reentrant=False)
        return out


def cells(models: list[str], stages: list[int], batch_size: int) -> Iterator[dict[str, Any]]:
    """Every cell, smallest first. With one micro-batch gpipe is bp."""
    for num_stages, model in itertools.product(stages, models):
        for parts, name in itertools.product(sorted({1, num_stages}), METHODS if num_stages > 1 else ("bp",)):
            if (name, parts) != ("gpipe", 1):
                yield {"model": model, "name": name, "method": METHODS[name], "stages": num_stages,
                       "num_microbatches": parts, "batch_size": batch_size}  # fmt: skip


def pipeline(cell: dict[str, Any]) -> dtrp.Pipeline:
    """The model in stages of as many blocks, the embedding of the GPT with its first and the head with its last."""
    stages, text = cell["stages"], cell["model"] == "gpt"
    model = gpt(NUM_TOKENS, **GPT) if text else get_model(cell["model"])
    if cell["name"].endswith("checkpointed"):
        model = nn.Sequential(
            *(Checkpointed(block) if 0 < i < len(model) - 1 else block for i, block in enumerate(model))
        )
    cuts = {"cuts": [1 + GPT["layers"] // stages * k for k in range(1, stages)]} if text else {"num_stages": stages}
    keep = {"keep": "auto", "memory_limit_bytes": cell["limit_bytes"]} if "limit_bytes" in cell else {}
    return dtrp.Pipeline(
        model, optimizer_of(cell["model"]), loss_of(cell["model"]), method=cell["method"],
        num_microbatches=cell["num_microbatches"], seed=0, timeout_s=WAIT_S, **cuts, **keep,
    )  # fmt: skip


def optimizer_of(model: str) -> Callable[..., torch.optim.Optimizer]:
    if model == "gpt":
        return functools.partial(torch.optim.AdamW, lr=1e-4)
    return functools.partial(torch.optim.SGD, lr=0.01, momentum=0.9)


def loss_of(model: str) -> Callable[[Tensor, Tensor], Tensor]:
    return class_loss if model == "gpt" else cross_entropy


def batch(model: str, size: int) -> tuple[Tensor, Tensor]:
    if model == "gpt":
        tokens = torch.randint(NUM_TOKENS, (size, GPT["context"] + 1))
        return tokens[:, :-1], tokens[:, 1:]
    return torch.randn(size, 3, 32, 32), torch.randint(10, (size,))


def train(cell: dict[str, Any]) -> dict[str, Any]:
    """In each process: what its tensors say it held, and what it had before."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    join(WAIT_S)
    warm_up(cell["model"])
    before = resident()
    pipe = pipeline(cell)
    for _ in range(MEMORY["enough"](dtrp.get_method(cell["method"]), cell["stages"], cell["num_microbatches"])):
        pipe.step(*batch(cell["model"], cell["batch_size"]))
    pipe.flush()
    memory, activations = pipe.memory(), pipe.activations_peak()
    held = {k: held_at_most(memory[k], activations[k]) for k in memory}
    every = pipe.gather({"before": before, "held": held, "keeps": pipe.keeps()})
    pipe.close()
    return {
        "peak_bytes": [size for told in every for size in told["held"].values()],
        "keeps": [keep for told in every for keep in told["keeps"].values()],
        "before": [told["before"] for told in every],
        **environment(),
    }


def warm_up(model: str) -> None:
    """Touch the code and the tables that any training of this kind does: a step of a tiny network, of two samples."""
    tiny = gpt(NUM_TOKENS, **GPT | {"layers": 1, "width": 16}) if model == "gpt" else cifar_resnet(8, width=4)
    optimizer = optimizer_of(model)(tiny.parameters())
    x, y = batch(model, 2)
    loss_of(model)(tiny(x), y).backward()
    optimizer.step()


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def run_cell(cell: dict[str, Any]) -> dict[str, Any]:
    """Train in new processes, and return the line."""
    with socket.socket() as probe, tempfile.TemporaryDirectory() as folder:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        row = Path(folder) / "row.json"
        pids = [start(cell, rank, port, row) for rank in range(cell["stages"])]
        ends = [os.wait4(pid, 0) for pid in pids]
        if any(status for _, status, _ in ends):
            raise SystemExit(f"{cell} failed: {[os.waitstatus_to_exitcode(status) for _, status, _ in ends]}")
        told = json.loads(row.read_text())
    processes = [
        {"rss_before": before, "rss_peak": usage.ru_maxrss * 1024}
        for before, (_, _, usage) in zip(told.pop("before"), ends, strict=True)
    ]
    return {**cell, **told, "processes": processes}


def start(cell: dict[str, Any], rank: int, port: int, row: Path) -> int:
    """A process that is a rank; its id."""
    gc.freeze()  # what is there already is not copied by a collection
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(cell["stages"]), MASTER_ADDR="127.0.0.1",
                          MASTER_PORT=str(port))  # fmt: skip
        told = train(cell)
        if rank == 0:
            row.write_text(json.dumps(told))
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def limit(cell: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """A cell with the limit of `keep="auto"`, where it has one."""
    if not cell["name"].endswith("auto"):
        return cell
    same = ("model", "stages", "num_microbatches", "batch_size")
    base = [row for row in rows if row["name"] in ("bp", "dtrp") and all(row[key] == cell[key] for key in same)]
    return {**cell, "limit_bytes": int(ROOM * max(size for row in base for size in row["peak_bytes"]))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), help="some of them")
    parser.add_argument("--stages", nargs="+", type=int, default=[1, *STAGES], help="some of them")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--microbatches", choices=["1", "K"], nargs="+", default=["1", "K"], help="some of them")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    for cell in cells(options.models, options.stages, options.batch_size):
        rows, words = MEMORY["read"](RESULTS), {"1": 1, "K": cell["stages"]}
        wanted = cell["num_microbatches"] in [words[word] for word in options.microbatches]
        if not wanted or any(cell.items() <= row.items() for row in rows):
            continue
        row = run_cell(limit(cell, rows))
        with RESULTS.open("a") as file:
            file.write(json.dumps(row) + "\n")
        grown = " ".join(f"{(p['rss_peak'] - p['rss_before']) / 1e6:.0f}" for p in row["processes"])
        print(f"{cell['model']} {cell['name']} K={cell['stages']} A={cell['num_microbatches']}: {grown} MB", flush=True)


if __name__ == "__main__":
    main()
