"""Reads run folders and comparisons: what a report shows, and nothing that they do not hold."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from ..methods import list_methods
from ..train.comparison import (
    Cell,
    largest_delay,
    mean_and_deviation,
    peak_bytes,
    prediction_error,
    read_failure,
    read_summary,
)
from ..train.config import with_defaults


@dataclass(frozen=True)
class Run:
    """A run of `dtrp train`.

    Attributes:
        folder: where it lies.
        cell: what tells it from the others.
        config: its settings, by option.
        metrics: the lines of ``metrics.jsonl``.
        summary: ``summary.json``; None if the run did not finish.
    """

    folder: Path
    cell: Cell
    config: dict[str, Any]
    metrics: tuple[dict[str, Any], ...]
    summary: dict[str, Any] | None

    @property
    def is_traced(self) -> bool:
        return (self.folder / "trace.json").is_file()

    def read_trace(self) -> list[dict[str, Any]]:
        """The events of ``trace.json``, which may be many; none if there is no whole one."""
        try:
            return list(json.loads((self.folder / "trace.json").read_text())["traceEvents"])
        except (OSError, ValueError, KeyError, TypeError):
            return []


Groups = dict[str, list[Run]]  # runs that differ in their seed alone, by a name for them

_OF_AN_EPOCH = {"epoch", "update", "samples_per_s", "train_loss", "test_loss", "test_accuracy"}  # at least
# Settings that a cell has, and those that change nothing of what a run comes to.
_OF_A_CELL = ("method", "prediction", "stages", "num-microbatches", "seed")
_OF_NO_MATTER = (
    "data-dir",
    "trace",
    "tensorboard",
    "save-every",
    "keep-last",
    "prediction-error-every",
    "plan",
    "max-restarts",
)


@dataclass(frozen=True)
class Collection:
    """Runs, the cells that failed with why, and the names of those that have no epoch yet."""

    runs: tuple[Run, ...]
    failed: tuple[tuple[str, str], ...]
    begun: tuple[str, ...] = ()

    def groups(self) -> Groups:
        """The runs, by what tells them apart but for their seed; unfinished ones only where no run of a group is finished."""
        groups: Groups = {}
        for run in self.runs:
            groups.setdefault(self.label(run), []).append(run)
        return {label: [run for run in runs if run.summary] or runs for label, runs in groups.items()}

    def label(self, run: Run, *, short: bool = False) -> str:
        """A run's name as far as it tells groups apart; ``short``: but for K and A."""
        name, cell = run.cell.title, run.cell
        if not short and len({run.cell.stages for run in self.runs}) > 1:
            name += f" K={cell.stages or '?'}"
        if not short and len({run.cell.num_microbatches for run in self.runs}) > 1:
            name += f" A={cell.num_microbatches}"
        return name + "".join(f" {key}={value}" for key, value in self.differing(run).items())

    def differing(self, run: Run) -> dict[str, Any]:
        """Settings that are not the same in all runs, beside those of a cell; workers are as many as stages, or none."""
        own = _comparable(run)
        return {key: own.get(key, "default") for key in self._varying}

    @cached_property
    def _varying(self) -> tuple[str, ...]:
        """The names of these settings."""
        first, *others = map(_comparable, self.runs)
        keys = dict.fromkeys(key for config in (first, *others) for key in config)
        return tuple(key for key in keys if any(config.get(key) != first.get(key) for config in others))

    def shared(self) -> dict[str, Any]:
        """The settings that all runs have in common."""
        first, *others = (run.config for run in self.runs)
        return {key: value for key, value in first.items() if all(other.get(key) == value for other in others)}


def collect(folders: Sequence[str]) -> Collection:
    """The runs in these folders, each once: each folder is a run, or holds runs or comparisons.

    A run in a folder of several that cannot be read is one that failed.

    Raises:
        ValueError: a folder that is neither, or in which nothing has been finished, with what to do.
    """
    runs: dict[Path, Run] = {}
    failed: dict[Path, tuple[str, str]] = {}
    begun: dict[Path, str] = {}
    for name in folders:
        folder = Path(name).expanduser()
        if not folder.is_dir():
            raise ValueError(f"{name} is no folder; pass what 'dtrp train --out' or 'dtrp compare --out' has written")
        if _is_run(folder):
            runs[folder.resolve()] = _read_run(folder)
            continue
        inside = [path for path in sorted(folder.iterdir()) if path.name[0] != "." and path.is_dir()]
        notes: list[Path] = []
        own: list[Path] = []
        for place in (folder, *(path for path in inside if not _is_run(path))):
            notes += [note for note in sorted(place.glob("*.failed")) if read_summary(place / note.stem) is None]
            own += [path for path in sorted(place.iterdir()) if path.name[0] != "." and _is_run(path)]
        if not own and not notes:
            raise ValueError(f"{name} holds no run; pass what 'dtrp train --out' or 'dtrp compare --out' has written")
        failed |= {note.resolve(): (note.stem, read_failure(note)) for note in notes}
        for path in own:
            if (path / "metrics.jsonl").stat().st_size:
                try:
                    runs[path.resolve()] = _read_run(path)
                except ValueError as error:
                    failed[path.resolve()] = path.name, str(error)
            elif path.with_name(f"{path.name}.failed") not in notes:
                begun[path.resolve()] = path.name
    if not runs:
        why = ": ".join(next(iter(failed.values()))) if failed else ""
        first = f"the first failure: {why}" if failed else f"{next(iter(begun.values()))} has no epoch yet"
        raise ValueError(f"no run has been finished; {first}")
    known = {name: number for number, name in enumerate(list_methods())}
    ordered = sorted(
        runs.values(),
        key=lambda run: (run.cell.stages, run.cell.num_microbatches, known.get(run.cell.method, len(known))),
    )
    return Collection(tuple(ordered), tuple(failed.values()), tuple(begun.values()))


def _is_run(path: Path) -> bool:
    return (path / "metrics.jsonl").is_file()


def _comparable(run: Run) -> dict[str, Any]:
    config = {
        key: value for key, value in with_defaults(run.config).items() if key not in (*_OF_A_CELL, *_OF_NO_MATTER)
    }
    return {**config, "workers": "yes"} if config.get("workers") else config


def _read_run(folder: Path) -> Run:
    try:
        config = yaml.safe_load((folder / "config").read_text())
        metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{folder} is no whole run: {error}") from None
    if not isinstance(config, dict) or not metrics:
        raise ValueError(f"{folder} is no whole run: it has no settings, or no epoch yet")
    if not all(isinstance(line, dict) and line.keys() >= _OF_AN_EPOCH for line in metrics):
        raise ValueError(f"{folder} is no whole run: a line of its metrics.jsonl is not that of an epoch")
    summary = read_summary(folder)
    if summary is not None:
        _check_summary(folder, summary)
    try:
        cell = Cell(
            str(config.get("method", "?")), _stages(config, summary), int(config.get("num-microbatches", 1)),
            int(config.get("seed", 0)), config.get("prediction"),
        )  # fmt: skip
    except (TypeError, ValueError):
        raise ValueError(f"{folder} is no whole run: its number of micro-batches or its seed is none") from None
    return Run(folder, cell, config, tuple(metrics), summary)


def _check_summary(folder: Path, summary: dict[str, Any]) -> None:
    """
    Raises:
        ValueError: it lacks something that is shown.
    """
    try:
        for number in (largest_delay, prediction_error):
            number(summary)
        for name in ("minibatch_s", "test_accuracy"):
            float(summary[name])
        for stage, _ in zip(summary["stages"], peak_bytes(summary), strict=True):
            stage["stage"] + stage["busy"]["busy"] + stage["busy"]["elapsed"]
        summary["environment"].items()
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"{folder} is no whole run: its summary.json, of another version perhaps, has not all that is shown ({error!r})"
        ) from None


def _stages(config: dict[str, Any], summary: dict[str, Any] | None) -> int:
    """K; 0 of a run that is not finished and leaves it to the workers or the model."""
    if summary:
        return len(summary["stages"])
    if config.get("cuts"):
        return len(config["cuts"]) + 1
    return next((n for n in (config.get("stages"), config.get("workers")) if isinstance(n, int)), 0)


def mean_and_spread(values: Sequence[float]) -> tuple[float, float]:
    """(mean, sample standard deviation); nan where a value is none, 0 spread of one."""
    if not values or not all(map(math.isfinite, values)):
        return math.nan, math.nan
    mean, deviation = mean_and_deviation(values)
    return mean, 0.0 if len(values) == 1 else deviation
