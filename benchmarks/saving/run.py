"""What saving costs a run: ResNet-56 at batch 128, saves as `dtrp train` makes them.

    python benchmarks/saving/run.py                                             # one process      about 2 minutes
    torchrun --nproc-per-node 2 benchmarks/saving/run.py                        # two ranks        about 2 minutes

Training stands still while a save is written, so its cost is the time from the call to its return; `share_of_a_minute` is that
of one a minute. Saves are exact ones, what is in flight included; portable ones, before which the pipeline is flushed, end the run.
On a machine that others use too, steps and saves wait for the processor alike: times are scaled by what the steps got of it,
which is written down (`processor`). A line is appended to ``results/saving.jsonl``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy

import dtrp
from dtrp.models import get_model
from dtrp.train.autosave import Position, Saves

WARM_UP = 8  # steps: past the start-up of dtrp at K = 4


def sgd(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.01, momentum=0.9, weight_decay=5e-4)


def timed(job: Callable[[], None]) -> tuple[float, float]:
    """Seconds by the clock, and of this process on the processor."""
    wall, cpu = time.perf_counter(), time.process_time()
    job()
    return time.perf_counter() - wall, time.process_time() - cpu


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any] | None:
    """What the first rank has measured; None on the others."""
    pipe = dtrp.Pipeline(
        get_model(options.model),
        sgd,
        cross_entropy,
        num_stages=int(os.environ.get("WORLD_SIZE", options.stages)),
        method=options.method,
        num_microbatches=options.num_microbatches,
        seed=0,
        timeout_s=600,
    )
    with pipe:
        saves = Saves(folder, 2, tidies=pipe.is_first)
        batch = torch.randn(options.batch, 3, 32, 32), torch.randint(10, (options.batch,))

        def step() -> None:
            pipe.step(batch[0] if pipe.is_first else None, batch[1] if pipe.is_last else None)

        def save(*, portable: bool = False) -> None:
            saves.write(pipe, Position(), portable=portable)

        for _ in range(WARM_UP):
            step()
        save()
        steps, exact, portable = [], [], []
        for _ in range(options.saves):
            steps += [timed(step) for _ in range(options.steps)]
            exact.append(timed(save))
        size = sum(f.stat().st_size for f in (folder / "saves").glob(f"*{pipe.num_updates}/*")) if pipe.is_first else 0
        for _ in range(max(1, options.saves // 4)):
            pipe.flush()
            portable.append(timed(lambda: save(portable=True)))
            step()
        # Of all ranks: the one that waits for none is at work all the time.
        processor = max(pipe.gather(sum(cpu for _, cpu in steps) / sum(wall for wall, _ in steps)))
        if not pipe.is_first:
            return None
        processor = min(1.0, processor)
        return {
            "share_of_a_minute": processor * statistics.mean(wall for wall, _ in exact) / 60,
            "processor": processor,
            **{
                f"{name}_s": {"wall": [wall for wall, _ in times], "cpu": [cpu for _, cpu in times]}
                for name, times in (("step", steps), ("exact", exact), ("portable", portable))
            },
            "bytes": size,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--saves", type=int, default=20)
    parser.add_argument("--steps", type=int, default=4, help="between two saves")
    parser.add_argument("--model", default="resnet56")
    parser.add_argument("--method", default="dtrp")
    parser.add_argument("--stages", type=int, default=4, help="in one process; otherwise one a rank")
    parser.add_argument("--num-microbatches", type=int, default=1)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--note", default="", help="about the machine, kept with the result")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "saving.jsonl")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    # The ranks of one launch have this parent in common.
    folder = Path(tempfile.gettempdir(), f"dtrp-saving-{os.environ.get('TORCHELASTIC_RUN_ID', '')}{os.getppid()}")
    folder.mkdir(exist_ok=True)
    try:
        measured = measure(options, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if measured is None:
        return
    record = {
        **measured,
        "ranks": int(os.environ.get("WORLD_SIZE", 1)),
        **{name: getattr(options, name) for name in ("model", "method", "stages", "num_microbatches", "batch", "note")},
        "threads": 1,
        "cpus": os.cpu_count(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "dtrp": dtrp.__version__,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with options.out.open("a") as file:
        file.write(json.dumps(record) + "\n")
    print(json.dumps({name: record[name] for name in ("share_of_a_minute", "processor", "bytes")}))


if __name__ == "__main__":
    main()
