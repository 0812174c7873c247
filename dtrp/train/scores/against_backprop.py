"""How much more training runs need than backpropagation, from the lines of their ``metrics.jsonl``."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TypeAlias

from ...typing import Json
from .samples_needed import RelativeSamples, relative_samples

# Lines of a run's ``metrics.jsonl``.
Lines: TypeAlias = tuple[dict[str, Json], ...]

BACKPROP = "bp"  # the method that others are measured by


def read_lines(folder: Path) -> Lines:
    """The lines of a run's ``metrics.jsonl``; none where it is missing or damaged."""
    try:
        lines = tuple(json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines())
    except (OSError, ValueError):
        return ()
    needed = {"update", "test_loss", "test_accuracy"}
    return lines if all(isinstance(line, dict) and line.keys() >= needed for line in lines) else ()


def judged_by(settings: Mapping[str, Json]) -> dict[str, bool]:
    """What runs are compared in, by its name in the lines, and whether more of it is better. Text: the loss alone."""
    loss = {"test_loss": False}
    return loss if settings.get("data") == "text" else {"test_accuracy": settings.get("best") != "lowest", **loss}


def against_backprop(
    runs: Mapping[int, Lines], base: Mapping[int, Lines], settings: Mapping[str, Json]
) -> dict[str, RelativeSamples]:
    """How much more training runs need to come to what runs of bp with the same settings ended with.

    Their updates are counted, whose ratio is that of samples, as mini-batches are the same.

    Args:
        runs: lines of each run, by its seed.
        base: lines of each run of bp, by its seed.
        settings: of one of the runs.

    Returns:
        By what is compared, as `judged_by` names it; nothing where the lines of a run are missing.
    """
    if not (runs and base and all(runs.values()) and all(base.values())):
        return {}

    def updates(lines: Mapping[int, Lines]) -> list[float]:
        return [line["update"] for line in max(lines.values(), key=len)]

    def curves(lines: Mapping[int, Lines], name: str) -> list[list[float]]:
        return [[_number(line[name]) for line in run] for run in lines.values()]

    try:
        return {
            name: relative_samples(
                updates(runs), curves(runs, name), updates(base), curves(base, name), higher_is_better=higher,
                seeds=list(runs), base_seeds=list(base),
            )
            for name, higher in judged_by(settings).items()
        }  # fmt: skip
    except ValueError:  # updates that do not increase: a program of the user's has written the lines
        return {}


def as_json(needed: RelativeSamples) -> dict[str, Json]:
    """For a file, in which None stands for what is not reached or not known."""

    def finite(value: float) -> float | None:
        return value if math.isfinite(value) else None

    return {
        "level": finite(needed.level),
        "bp_updates": finite(needed.base_samples),
        "ratio": finite(needed.ratio),
        "by_seed": [finite(ratio) for ratio in needed.by_seed],
    }


def _number(value: Json) -> float:
    return math.nan if value is None else float(value)
