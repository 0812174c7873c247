"""Where each contender cuts the network, and into how many micro-batches a mini-batch: the fastest that short turns find.

Cuts are searched with few micro-batches on the plain link, as `benchmarks/throughput/compute.py` does; at the best of
them, and on each link, all numbers of micro-batches are tried.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
from compute import Cuts, balanced, layer_times, optimizer, search
from contenders import Contender, start
from torch import nn
from torch.nn.functional import cross_entropy
from training import Setting, shares
from turns import environment, take_turn

WARMUP, TIMED, TRIALS = 4, 8, 2  # mini-batches, and turns of which the best counts


@dataclass(frozen=True)
class Tuning:
    """The contenders to be tuned on a link; those with cuts keep them."""

    link: str
    contenders: tuple[tuple[Contender, Cuts], ...]
    microbatches: tuple[int, ...]
    setting: Setting
    out: Path


def work(tuning: Tuning, link: Any = None) -> None:
    """Tune all of them, and add a row for each; runs on every rank."""
    load = os.getloadavg()[0]
    data = tuning.setting.load()
    examples = list(itertools.islice(shares(data, tuning.setting, 0, slice(None)), 4))
    times = layer_times(tuning.setting.new_model(data, 0), examples[0][0])

    def seconds(contender: Contender, cuts: Cuts) -> float:
        layers = list(tuning.setting.new_model(data, 0))
        stages = [nn.Sequential(*layers[first:end]) for first, end in itertools.pairwise([0, *cuts, len(layers)])]
        if not all(list(stage.parameters()) for stage in stages):
            return math.inf  # a stage without anything to train
        begin = partial(start, contender, stages, optimizer, cross_entropy, examples[0][0])
        return min(take_turn(begin, examples, warmup=WARMUP, timed=TIMED).typical_s for _ in range(TRIALS))

    for contender, cuts in tuning.contenders:
        sizes = [a for a in tuning.microbatches if a > 1 or (contender.engine == "dtrp" and not contender.row.flush)]
        tried_cuts: dict[Cuts, float] = {}
        if not cuts:
            few = dataclasses.replace(contender, num_microbatches=min(a for a in sizes if a > 1))
            first = balanced(times, few, dist.get_world_size() * few.stages_per_rank())
            tried_cuts = search(first, len(times), partial(seconds, few))
            cuts = min(tried_cuts, key=tried_cuts.__getitem__)
        tried = {a: seconds(dataclasses.replace(contender, num_microbatches=a), cuts) for a in sizes}
        if dist.get_rank() == 0:
            row = {
                "link": tuning.link,
                "contender": contender.name,
                "num_microbatches": min(tried, key=tried.__getitem__),
                "cuts": list(cuts),
                "tried_ms": {str(a): 1e3 * s for a, s in tried.items()},
                "tried_cuts_ms": [[list(c), 1e3 * s] for c, s in tried_cuts.items() if s < math.inf],
                "setting": tuning.setting.recorded(),
                "at": time.strftime("%Y-%m-%dT%H:%M:%S"),
                "load_before": load,
                **environment(),
            }
            with tuning.out.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(f"{tuning.link}: {contender.name}: A={row['num_microbatches']}, cuts {row['cuts']}", flush=True)


def tuned(rows: Sequence[dict[str, Any]], link: str, contender: Contender, setting: Setting) -> dict[str, Any] | None:
    """The last row of a contender on a link, None where there is none. The number of epochs and the like do not matter."""
    for row in reversed(rows):
        same = all(row["setting"][name] == getattr(setting, name) for name in ("model", "batch", "data", "dtype"))
        if same and (row["link"], row["contender"]) == (link, contender.name):
            return row
    return None
