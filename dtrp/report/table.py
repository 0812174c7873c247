"""The table of a report: a row for each group of runs."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..train.comparison import (
    mean_score,
    mean_text,
    megabytes_by_stage,
    prediction_error,
    shown_delay,
    weight_distance,
)
from ..train.scores.against_backprop import BACKPROP, against_backprop
from .collect import Collection, Run
from .plots import score_heading

_NEEDED = {"test_accuracy": "samples to bp's {score}, over bp's", "test_loss": "samples to bp's loss, over bp's"}


def make_table(collection: Collection) -> tuple[list[str], list[list[str]]]:
    """The headings of the table and its rows."""
    groups = collection.groups()
    needed = {label: how_much_more(collection, runs) for label, runs in groups.items()}
    others = [texts for label, texts in needed.items() if groups[label][0].cell.method != BACKPROP]
    shown = [name for name in _NEEDED if any(name in texts for texts in others)]
    in_workers, alone = ({run.in_workers for run in collection.runs if run.summary} >= {kind} for kind in (True, False))
    time = "ms a mini-batch, one process" if alone and not in_workers else "ms a mini-batch"
    headings = [
        "", score_heading(collection.score), "test loss", *(_NEEDED[name].format(score=collection.score) for name in shown),
        time, "memory by stage, MB", "delay, at most", "distance of weights, %", "prediction error", "epochs", "seeds",
    ]  # fmt: skip
    mark = " (one process)" if alone and in_workers else ""
    rows = []
    for label, runs in groups.items():
        last = [run.metrics[min(len(other.metrics) for other in runs) - 1] for run in runs]
        finished = [run.summary for run in runs if run.summary]
        distances, errors = (
            [value for value in map(number, finished) if math.isfinite(value)]
            for number in (weight_distance, prediction_error)
        )
        rows.append(
            [
                label,
                mean_score(collection.score, [line["test_accuracy"] for line in last], ""),
                mean_text([line["test_loss"] for line in last], 3),
                *(needed[label].get(name, "-") for name in shown),
                mean_text([1e3 * summary["minibatch_s"] for summary in finished], 1)
                + ("" if all(run.in_workers for run in runs) else mark),
                " ".join(megabytes_by_stage(finished)) or "-",
                shown_delay(finished),
                mean_text([100 * distance for distance in distances], 3),
                mean_text(errors, 2),
                str(max(int(line["epoch"]) for line in last)),
                ", ".join(str(run.cell.seed) for run in runs),
            ]
        )
    return headings, rows


def how_much_more(collection: Collection, runs: Sequence[Run]) -> dict[str, str]:
    """How many samples a group needs to come to what bp ends with, as text; nothing where bp or its numbers are missing."""
    base = collection.baseline(runs)
    by_seed, base_by_seed = ({run.cell.seed: run.metrics for run in some} for some in (runs, base))
    found = against_backprop(by_seed, base_by_seed, runs[0].config)
    if runs[0].cell.method == BACKPROP:
        return dict.fromkeys(found, "1")
    finished = all(run.summary for run in runs)
    return {
        name: str(needed) if finished or not math.isinf(needed.ratio) else "not yet" for name, needed in found.items()
    }
