"""TensorBoard events of the runs in a report, also of those that were trained without `--tensorboard`."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from ..train.comparison import peak_bytes
from ..train.results import mean_delay
from ..train.tensorboard import EPOCH_SCALARS, check_tensorboard, open_writer
from .collect import Collection, Run


def write_events(collection: Collection, folder: Path) -> None:
    """Write the scalars of each run to a folder with the name of the run; they replace those of an earlier report.

    Names are those of `dtrp train --tensorboard`: curves at the updates of their epochs; prediction errors at the
    mini-batches that were measured; the mean delay over the run and the peak memory at the last update.

    Raises:
        ValueError: tensorboard is not installed, or a folder that cannot be written.
    """
    check_tensorboard()
    names: Counter[str] = Counter()
    for run in collection.runs:
        name = run.folder.resolve().name
        names[name] += 1
        path = folder / (name if names[name] == 1 else f"{name}-{names[name]}")
        try:
            writer = open_writer(path, purge_step=0)
            for tag, value, step in _scalars(run):
                writer.add_scalar(tag, value, step)
            writer.close()
        except OSError as error:
            raise ValueError(f"{path} cannot be written ({error.strerror or error})") from error


def _scalars(run: Run) -> Iterator[tuple[str, float, int]]:
    """(name, value, update) of every scalar."""
    for line in run.metrics:
        for tag, key in [*EPOCH_SCALARS.items(), ("samples_per_s", "samples_per_s")]:
            yield tag, float(line[key]), int(line["update"])
    if run.summary is None:
        return
    last = int(run.metrics[-1]["update"])
    for stage, peak in zip(run.summary["stages"], peak_bytes(run.summary), strict=True):
        k = stage["stage"]
        counts = {int(delay): count for delay, count in stage["delays"].items()}
        if counts:
            yield f"delay/stage{k}", mean_delay(counts), last
        yield f"memory_bytes/stage{k}", float(peak), last
        ratios: dict[int, list[float]] = {}
        for minibatch, _, read, stale in stage["prediction_errors"]:
            if stale > 0:
                ratios.setdefault(int(minibatch), []).append(read / stale)
        for minibatch, values in sorted(ratios.items()):
            yield f"prediction_error/stage{k}", statistics.fmean(values), minibatch
