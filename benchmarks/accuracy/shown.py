"""What the documents say of results/small.jsonl, wide.jsonl and resnet20.jsonl."""

from __future__ import annotations

import math
import statistics
from typing import Any

from shown import rows, spread, table

ROWS = rows("accuracy/results/small.jsonl")
HEAD = ("K", "A", "method", "seeds", "accuracy, %", "less than bp's with that A, points (paired)", "largest delay",
        "prediction error")  # fmt: skip


def small() -> str:
    return _grid(ROWS)


def wide() -> str:
    return _grid(rows("accuracy/results/wide.jsonl"))


def resnet20() -> str:
    return _grid(rows("accuracy/results/resnet20.jsonl"))


def long() -> str:
    """The mean of each run's last five epochs, beside bp's of the same epochs of the same schedule."""
    (backprop,) = rows("accuracy/results/long.jsonl")
    lines = []
    for row in [backprop, *rows("accuracy/results/long_stopped.jsonl")]:
        epochs = len(row["test_accuracy"])
        own, then = (_last_five(each, epochs) for each in (row, backprop))
        name = f"`{row['method']}`" + (f" ({row['prediction']})" if row["prediction"] else "")
        beside = ["", ""] if row is backprop else [f"{then:.2f}", f"{then - own:.2f}"]
        lines.append([name, f"{epochs - 4} to {epochs}", f"{own:.2f}", *beside])
    return table(["", "epochs of 30", "accuracy, %, their mean", "`bp`'s", "points less"], lines)


def _last_five(row: dict[str, Any], epochs: int) -> float:
    """The mean accuracy of the five epochs up to this one, in per cent."""
    return 100 * statistics.fmean(row["test_accuracy"][epochs - 5 : epochs])


def long_readme() -> list[str]:
    """bp and dtrp."""
    (backprop,) = rows("accuracy/results/long.jsonl")
    (dtrp,) = (row for row in rows("accuracy/results/long_stopped.jsonl") if row["method"] == "dtrp")
    assert len(dtrp["test_accuracy"]) == 26
    return [f"{_last_five(row, 26):.2f}" for row in (backprop, dtrp)]


def resnet20_less() -> list[str]:
    """Points less than bp's with the same seed, mean and standard error: of spectrain, dtrp and fdg."""
    own = rows("accuracy/results/resnet20.jsonl")
    shown = []
    for method in ("spectrain", "dtrp", "fdg"):
        less = _less([row for row in own if row["method"] == method], own)
        assert len(less) == 3
        shown += [f"{statistics.fmean(less):.2f}", f"{statistics.stdev(less) / math.sqrt(3):.2f}"]
    return shown


def _grid(rows: list[dict[str, Any]]) -> str:
    """Accuracies with their standard deviation, differences with their standard error."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        key = (row["stages"], row["num_microbatches"], row["method"], row["prediction"] or "")
        groups.setdefault(key, []).append(row)
    lines = []
    for (stages, parts, method, prediction), runs in sorted(groups.items()):
        less = _less(runs, rows)
        errors = [row["prediction_error"] for row in runs if row["prediction_error"] is not None]
        lines.append(
            [
                str(stages), str(parts), f"{method} ({prediction})" if prediction else method, str(len(runs)),
                _mean([_accuracy(row) for row in runs]), "" if method == "bp" else _mean(less, error=True),
                str(max(row["largest_delay"] for row in runs)), f"{statistics.fmean(errors):.2f}" if errors else "",
            ]
        )  # fmt: skip
    return table(HEAD, lines)


def _less(runs: list[dict[str, Any]], rows: list[dict[str, Any]]) -> list[float]:
    """Points less than bp's with the same seed and as many micro-batches, of the runs that have such a one among ``rows``."""
    backprop = {(row["num_microbatches"], row["seed"]): _accuracy(row) for row in rows if row["method"] == "bp"}
    keyed = [((row["num_microbatches"], row["seed"]), _accuracy(row)) for row in runs]
    return [backprop[key] - accuracy for key, accuracy in keyed if key in backprop]


def readme() -> list[str]:
    """Of three seeds each: bp, spectrain, dtrp, fdg and fr at K = A = 4, and at 8."""
    shown = []
    for stages in (4, 8):
        for method in ("bp", "spectrain", "dtrp", "fdg", "fr"):
            own = [row for row in ROWS if row["num_microbatches"] == stages and row["method"] == method
                   and row["prediction"] in (None, "linear") and (method == "bp" or row["stages"] == stages)]  # fmt: skip
            assert len(own) == 3
            shown.append(f"{statistics.fmean(map(_accuracy, own)):.2f}")
    return shown


def _accuracy(row: dict[str, Any]) -> float:
    return 100 * float(row["test_accuracy"][-1])


def _mean(values: list[float], *, error: bool = False) -> str:
    if len(values) < 2:
        return "".join(f"{value:.2f}" for value in values)
    if error:
        return f"{statistics.fmean(values):.2f} ± {statistics.stdev(values) / math.sqrt(len(values)):.2f}"
    return spread(values, 2)
