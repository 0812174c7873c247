"""The numbers of a report as TensorBoard events, of runs that were trained without `--tensorboard` too."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..train.comparison import peak_bytes
from ..train.tensorboard import OF_AN_EPOCH, check_tensorboard
from .collect import Collection, Run


def write_events(collection: Collection, folder: Path) -> None:
    """Write the scalars of each run to a folder of its name; those of an earlier report there are void.

    The names are those of `dtrp train --tensorboard`: curves at the updates of their epochs; prediction errors at the
    mini-batches that were looked at; delays, as means over the run, and memory at its end.

    Raises:
        ValueError: tensorboard is not installed, or a place that cannot be written.
    """
    check_tensorboard()
    from torch.utils.tensorboard import SummaryWriter  # takes a while to import

    names: Counter[str] = Counter()
    for run in collection.runs:
        name = run.folder.resolve().name
        names[name] += 1
        own = name if names[name] == 1 else f"{name}-{names[name]}"
        try:
            writer: Any = SummaryWriter(str(folder / own), purge_step=0)
            for tag, value, step in _scalars(run):
                writer.add_scalar(tag, value, step)
            writer.close()
        except OSError as error:
            raise ValueError(f"{folder / own} cannot be written ({error.strerror or error})") from error


def _scalars(run: Run) -> Iterator[tuple[str, float, int]]:
    """(name, value, update)"""
    last = 0
    for line in run.metrics:
        last = int(line["update"])
        for tag, key in [*OF_AN_EPOCH.items(), ("samples_per_s", "samples_per_s")]:
            yield tag, float(line[key]), last
    if run.summary is None:
        return
    for stage, peak in zip(run.summary["stages"], peak_bytes(run.summary), strict=True):
        k = stage["stage"]
        counts = {int(delay): count for delay, count in stage["delays"].items()}
        if counts:
            yield f"delay/stage{k}", sum(d * n for d, n in counts.items()) / sum(counts.values()), last
        yield f"memory_bytes/stage{k}", float(peak), last
        ratios: dict[int, list[float]] = {}
        for minibatch, _, read, stale in stage["prediction_errors"]:
            if stale > 0:
                ratios.setdefault(int(minibatch), []).append(read / stale)
        for minibatch, own in sorted(ratios.items()):
            yield f"prediction_error/stage{k}", statistics.fmean(own), minibatch
