"""Reads the folders of runs and comparisons for a report."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date, datetime
from functools import cached_property
from pathlib import Path
from typing import TypeAlias

import yaml

from ..methods import list_methods
from ..train.comparison import (
    Cell,
    Summary,
    baseline,
    common_score,
    largest_delay,
    peak_bytes,
    prediction_error,
    read_failure,
    read_summary,
)
from ..train.config import CELL_SETTINGS, PROGRAM, SETTINGS_WITHOUT_EFFECT, with_defaults
from ..typing import Json


@dataclass(frozen=True)
class Run:
    """A run of `dtrp train`.

    Attributes:
        folder: folder of the run.
        cell: method, stages, micro-batches, seed and prediction.
        config: settings by the name of their option.
        metrics: lines of ``metrics.jsonl``.
        summary: contents of ``summary.json``; None where the run is not finished.
    """

    folder: Path
    cell: Cell
    config: dict[str, Json]
    metrics: tuple[dict[str, Json], ...]
    summary: Summary | None

    @property
    def in_workers(self) -> bool:
        """Whether its stages ran in a process each, and so have waited for each other; False where it is not finished."""
        stages = self.summary["stages"] if self.summary else []
        return any(
            seconds > 0 for stage in stages for name, seconds in stage["busy"].items() if name.startswith("wait")
        )

    @property
    def ended(self) -> date:
        """The day of its last epoch: by its summary, or the date of the file."""
        try:
            return datetime.fromisoformat(str((self.summary or {})["ended"])).date()
        except (KeyError, ValueError):
            return datetime.fromtimestamp((self.folder / "metrics.jsonl").stat().st_mtime).date()

    @property
    def is_traced(self) -> bool:
        return (self.folder / "trace.json").is_file()

    def read_trace(self) -> list[dict[str, Json]]:
        """The events of ``trace.json``; empty where the file is missing or damaged."""
        try:
            return list(json.loads((self.folder / "trace.json").read_text())["traceEvents"])
        except (OSError, ValueError, KeyError, TypeError):
            return []


# Runs that differ in their seed alone, by a name for them.
Groups: TypeAlias = dict[str, list[Run]]

_NEEDED_METRICS = {"epoch", "update", "samples_per_s", "train_loss", "test_loss", "test_accuracy"}
_NOT_COMPARED = {PROGRAM, *(field.replace("_", "-") for field in (*CELL_SETTINGS, *SETTINGS_WITHOUT_EFFECT))}


@dataclass(frozen=True)
class Collection:
    """The runs of a report.

    Attributes:
        runs: runs with at least one epoch.
        failed: name and reason of every cell that failed.
        begun: names of the runs without a finished epoch.
        without_numbers: folders of the failed and of those, where they are, or would be.
    """

    runs: tuple[Run, ...]
    failed: tuple[tuple[str, str], ...]
    begun: tuple[str, ...] = ()
    without_numbers: tuple[Path, ...] = ()

    def groups(self) -> Groups:
        """The runs, grouped by all but the seed; unfinished runs only in groups without a finished run."""
        return dict(self._groups)

    @cached_property
    def _groups(self) -> Groups:
        groups: Groups = {}
        for run in self.runs:
            groups.setdefault(self.label(run), []).append(run)
        return {label: [run for run in runs if run.summary] or runs for label, runs in groups.items()}

    def label(self, run: Run, *, short: bool = False) -> str:
        """A name of a run that tells groups apart; ``short``: without K and A."""
        name, cell = run.cell.title, run.cell
        several_stages, several_parts = self._several
        if several_stages and not short:
            name += f" K={cell.stages or '?'}"
        if several_parts and not short:
            name += f" A={cell.num_microbatches}"
        return name + "".join(f" {key}={value}" for key, value in self.differing(run).items())

    @cached_property
    def _several(self) -> tuple[bool, bool]:
        """Whether there are several numbers of stages, and of micro-batches."""
        cells = [run.cell for run in self.runs]
        return len({cell.stages for cell in cells}) > 1, len({cell.num_microbatches for cell in cells}) > 1

    def differing(self, run: Run) -> dict[str, Json]:
        """The run's values of the settings that are not the same in all runs, those of a cell left out."""
        settings = _compared_settings(run)
        return {key: settings.get(key, "default") for key in self._differing_keys}

    def baseline(self, runs: Sequence[Run]) -> list[Run]:
        """The finished runs of bp that a group is to be measured by, whose other settings are the same; empty: none."""
        alike = {
            dataclasses.replace(others[0].cell, seed=-1): others
            for others in self._groups.values()
            if others[0].summary and self.differing(others[0]) == self.differing(runs[0])
        }
        found = baseline(dataclasses.replace(runs[0].cell, seed=-1), alike)
        return [] if found is None else alike[found]

    @cached_property
    def _differing_keys(self) -> tuple[str, ...]:
        first, *others = map(_compared_settings, self.runs)
        keys = dict.fromkeys(key for config in (first, *others) for key in config)
        return tuple(key for key in keys if any(config.get(key) != first.get(key) for config in others))

    @cached_property
    def score(self) -> str:
        """What the runs are judged by."""
        return common_score(run.config for run in self.runs)

    def shared(self) -> dict[str, Json]:
        """The settings that are the same in all runs."""
        first, *others = (run.config for run in self.runs)
        return {key: value for key, value in first.items() if all(other.get(key) == value for other in others)}


def collect(folders: Sequence[str]) -> Collection:
    """Read the runs in some folders; a run that is in several of them is read once.

    Args:
        folders: folders of runs, of comparisons, or of both. In a folder of several runs a damaged run counts as
            failed.

    Raises:
        ValueError: a folder without runs, or no run with a finished epoch.
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
        paths, notes = _runs_and_failures(folder)
        if not paths and not notes:
            raise ValueError(f"{name} holds no run; pass what 'dtrp train --out' or 'dtrp compare --out' has written")
        failed |= {note.resolve(): (note.stem, read_failure(note)) for note in notes}
        for path in paths:
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
    methods = list_methods()

    def order(run: Run) -> tuple[int, ...]:
        method = run.cell.method
        return run.cell.stages, run.cell.num_microbatches, (*methods, method).index(method)

    without = tuple(path.with_name(name) for path, (name, _) in failed.items()), tuple(begun)
    return Collection(
        tuple(sorted(runs.values(), key=order)), tuple(failed.values()), tuple(begun.values()), without[0] + without[1]
    )


def _runs_and_failures(folder: Path) -> tuple[list[Path], list[Path]]:
    """The folders of runs, and the ``.failed`` files of cells without a summary, in a folder and its subfolders."""
    inside = [path for path in sorted(folder.iterdir()) if path.name[0] != "." and path.is_dir()]
    paths: list[Path] = []
    notes: list[Path] = []
    for parent in (folder, *(path for path in inside if not _is_run(path))):
        paths += [path for path in sorted(parent.iterdir()) if path.name[0] != "." and _is_run(path)]
        notes += [note for note in sorted(parent.glob("*.failed")) if read_summary(parent / note.stem) is None]
    return paths, notes


def _is_run(path: Path) -> bool:
    return (path / "metrics.jsonl").is_file()


def _compared_settings(run: Run) -> dict[str, Json]:
    """The settings that tell groups apart; of workers only whether there are any, as their number is that of stages."""
    config = {key: value for key, value in with_defaults(run.config).items() if key not in _NOT_COMPARED}
    return {**config, "workers": "yes"} if config.get("workers") else config


def _read_run(folder: Path) -> Run:
    try:
        return _parse_run(folder)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{folder} is no whole run: {error}") from None


def _parse_run(folder: Path) -> Run:
    config = yaml.safe_load((folder / "config").read_text())
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    if not isinstance(config, dict) or not metrics:
        raise ValueError("it has no settings, or no epoch yet")
    if not all(isinstance(line, dict) and line.keys() >= _NEEDED_METRICS for line in metrics):
        raise ValueError("a line of its metrics.jsonl is not that of an epoch")
    summary = read_summary(folder)
    if summary is not None:
        _check_summary(summary)
    try:
        cell = Cell(
            str(config.get("method", "?")), _stages(config, summary), int(config.get("num-microbatches", 1)),
            int(config.get("seed", 0)), config.get("prediction"),
        )  # fmt: skip
    except (TypeError, ValueError):
        raise ValueError("its number of micro-batches or its seed is none") from None
    return Run(folder, cell, config, tuple(metrics), summary)


def _check_summary(summary: Summary) -> None:
    """Refuse a summary without a number that the report shows.

    Raises:
        ValueError: such a summary.
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
            f"its summary.json, of another version perhaps, has not all that is shown ({error!r})"
        ) from None


def _stages(config: dict[str, Json], summary: Summary | None) -> int:
    """K; 0 where it is not known: a run that is not finished and sets no number of stages."""
    if summary:
        return len(summary["stages"])
    if config.get("cuts"):
        return len(config["cuts"]) + 1
    return next((n for n in (config.get("stages"), config.get("workers")) if isinstance(n, int)), 0)
