"""Methods side by side: a grid of runs, each in a folder of its own, that can be broken off and gone on with.

    FOLDER/
        compare.yaml            the settings that all cells share
        dtrp-K4-A4-seed0/       a run of `dtrp train`; finished when it has its summary.json
        dtrp-K4-A4-seed1.failed a cell that failed, and why; it is tried again by the next start

A cell is a method, a number of stages and of micro-batches, a prediction and a seed. Nothing else differs between cells, and
nothing is shared by them, so that one which fails loses nothing of the others.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import shutil
import statistics
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ..atomic_file import whole_file
from ..measure.memory import held_at_most
from ..methods import get_method
from .config import TrainConfig, config_text, with_defaults
from .config_checks import check_settings

_SETTINGS = "compare.yaml"
_OWN = ("method", "prediction", "stages", "cuts", "num_microbatches", "seed", "out", "overwrite")  # of a cell


@dataclass(frozen=True)
class Cell:
    """One run of the grid; ``prediction`` None: the method's own."""

    method: str
    stages: int
    num_microbatches: int
    seed: int
    prediction: str | None = None

    @property
    def group(self) -> str:
        """The cell's name without its seed."""
        name = self.method if self.prediction is None else f"{self.method}-{self.prediction}"
        return f"{name}-K{self.stages}-A{self.num_microbatches}"

    @property
    def name(self) -> str:
        return f"{self.group}-seed{self.seed}"

    @property
    def title(self) -> str:
        """The method, and its prediction if that is not its own."""
        return self.method if self.prediction is None else f"{self.method} ({self.prediction})"


def grid(
    methods: Sequence[str],
    stages: Sequence[int],
    microbatches: Sequence[str],
    seeds: Sequence[int],
    predictions: Sequence[str] = (),
    *,
    once: bool = False,
) -> list[Cell]:
    """All cells, in the order in which they run: seed after seed, so that a part of the grid already compares.

    Args:
        methods: names.
        stages: every K.
        microbatches: every A; ``"K"`` is the number of stages.
        seeds: of the runs.
        predictions: for methods that predict, in place of their own.
        once: run a method that flushes at one K for each A, since its accuracy is the same at every K; its time and memory are not.

    Raises:
        ValueError: a word that is no number.
    """
    cells: dict[Cell, None] = {}
    flushing: dict[tuple[int, str, int], int] = {}  # the K at which (seed, method, A) runs
    for seed, num_stages, word, method in itertools.product(seeds, stages, microbatches, methods):
        row = get_method(method)
        if not (word == "K" or (word.isdecimal() and int(word) >= 1)):
            raise ValueError(f"--num-microbatches {word}: whole numbers of at least 1, or K for as many as stages")
        count = num_stages if word == "K" else int(word)
        if once and row.flush and flushing.setdefault((seed, method, count), num_stages) != num_stages:
            continue
        for prediction in predictions if row.predict is not None and predictions else (None,):
            cells[Cell(method, num_stages, count, seed, prediction)] = None
    return list(cells)


class Comparison:
    """A grid in a folder.

    Args:
        base: the settings of every cell.
        cells: as `grid` makes them.
        folder: where the runs go; one that holds runs of the same settings is gone on with.

    Raises:
        ValueError, OSError: settings that no run can have, or a folder of another comparison. Nothing has been written.
    """

    def __init__(self, base: TrainConfig, cells: Sequence[Cell], folder: str) -> None:
        if not cells:
            raise ValueError("the grid has no cells; name methods, stages and seeds")
        self.base, self.cells = base, list(cells)
        self.folder = Path(folder).expanduser().absolute()
        for cell in self.cells:
            check_settings(self.config(cell))
        self._settings = config_text(dataclasses.replace(base, **dict.fromkeys(_OWN)))  # type: ignore[arg-type]
        if self.folder.exists():
            known = self.folder / _SETTINGS
            if not self.folder.is_dir() or not (known.is_file() or all(map(_left_of_settings, self.folder.iterdir()))):
                raise ValueError(f"--out {folder} exists and is no comparison; choose another name")
            if known.is_file() and (other := self._differing(known)):
                raise ValueError(
                    f"--out {folder} holds runs of other settings ({other}, in {known}); choose another name, or give the same ones"
                )

    def _differing(self, known: Path) -> str:
        """What a file says otherwise than these settings; one that it does not name, since it is older, has its default."""
        try:
            theirs = yaml.safe_load(known.read_text())
        except yaml.YAMLError:
            theirs = None
        if not isinstance(theirs, dict):
            return "no settings"
        theirs, ours = with_defaults(theirs), with_defaults(yaml.safe_load(self._settings))
        keys = dict.fromkeys([*theirs, *ours])
        return ", ".join(
            f"{key} {theirs.get(key)} and not {ours.get(key)}" for key in keys if theirs.get(key) != ours.get(key)
        )

    def config(self, cell: Cell) -> TrainConfig:
        """The settings of one cell's run."""
        workers = cell.stages if self.base.workers else None
        return dataclasses.replace(
            self.base, method=cell.method, stages=cell.stages, num_microbatches=cell.num_microbatches, seed=cell.seed,
            prediction=cell.prediction, workers=workers, out=str(self.folder / cell.name), overwrite=True, keep_last=0,
        )  # fmt: skip

    def done(self, cell: Cell) -> dict[str, Any] | None:
        """The summary of a finished cell."""
        return read_summary(self.folder / cell.name)

    def failure(self, cell: Cell) -> str | None:
        """Why a cell failed, if it did."""
        note = self.folder / f"{cell.name}.failed"
        return read_failure(note) if note.is_file() else None

    def run(self, work: Callable[[TrainConfig], None], say: Callable[[str], None]) -> list[Cell]:
        """Run what is not finished yet.

        Args:
            work: trains by a configuration.
            say: called with a line before each cell, and for each that fails.

        Returns:
            The cells that failed.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        if not (self.folder / _SETTINGS).is_file():
            with whole_file(self.folder / _SETTINGS) as file:
                file.write(self._settings.encode())
        left = [cell for cell in self.cells if self.done(cell) is None]
        if len(left) < len(self.cells):
            say(f"{len(self.cells) - len(left)} of {len(self.cells)} cells are finished already")
        failed = []
        for number, cell in enumerate(left):
            say(f"cell {number + 1} of {len(left)}: {cell.name}")
            note = self.folder / f"{cell.name}.failed"
            for remains in (
                self.folder / cell.name,
                *self.folder.glob(f".{cell.name}.*"),
            ):  # of a run that was broken off
                if remains.is_dir():
                    shutil.rmtree(remains)
                else:
                    remains.unlink(missing_ok=True)
            try:
                work(self.config(cell))
                note.unlink(missing_ok=True)
            except Exception as error:
                reason = " ".join(str(error).split()) or type(error).__name__
                with whole_file(note) as file:
                    file.write(f"{reason}\n\n{traceback.format_exc()}".encode())
                say(f"{cell.name} failed: {reason}")
                failed.append(cell)
        return failed

    def groups(self) -> list[Group]:
        """The finished cells by all but their seed, in the order of the grid."""
        return group_cells([(cell, summary) for cell in self.cells if (summary := self.done(cell)) is not None])


@dataclass(frozen=True)
class Group:
    """Runs that differ in their seed alone."""

    cell: Cell
    seeds: tuple[int, ...]
    summaries: tuple[dict[str, Any], ...]

    def values(self, of: Callable[[dict[str, Any]], float]) -> list[float]:
        """A number of each run."""
        return [of(summary) for summary in self.summaries]

    def mean(self, of: Callable[[dict[str, Any]], float]) -> tuple[float, float]:
        """(mean, sample standard deviation; nan of one run, or where a value is none)."""
        return mean_and_deviation(self.values(of))


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    """(mean, sample standard deviation; nan of one value, or where a value is none)."""
    known = len(values) > 1 and all(map(math.isfinite, values))
    return statistics.fmean(values), statistics.stdev(values) if known else math.nan


def group_cells(cells: Iterable[tuple[Cell, dict[str, Any]]]) -> list[Group]:
    """Runs by all but their seed, in the order in which they come."""
    groups: dict[str, list[tuple[Cell, dict[str, Any]]]] = {}
    for cell, summary in cells:
        groups.setdefault(cell.group, []).append((cell, summary))
    return [
        Group(dataclasses.replace(runs[0][0], seed=-1), tuple(c.seed for c, _ in runs), tuple(s for _, s in runs))
        for runs in groups.values()
    ]


def read_summary(folder: Path) -> dict[str, Any] | None:
    """``summary.json`` of a run; None where it is not finished."""
    try:
        summary: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    except (OSError, ValueError):
        return None
    return summary if isinstance(summary, dict) and "stages" in summary else None


def read_failure(note: Path) -> str:
    """Why a cell failed: the first line of its note."""
    return next(iter(note.read_text(errors="replace").splitlines()), "its note is empty")


def _left_of_settings(path: Path) -> bool:
    """Whether it is what a process leaves that dies while it writes the settings."""
    return path.name.startswith(f".{_SETTINGS}.")


def peak_bytes(summary: dict[str, Any]) -> list[int]:
    """Of each stage: weights, optimizer state, gradients, the predicted copy, and the most activations at once."""
    return [held_at_most(stage["memory"], stage["activations_peak"]) for stage in summary["stages"]]


def megabytes_by_stage(summaries: Sequence[dict[str, Any]]) -> list[str]:
    """The most that each stage held: the mean of these runs, and their deviation where it shows."""
    return [_shown_megabytes([size / 1e6 for size in sizes]) for sizes in zip(*map(peak_bytes, summaries), strict=True)]


def _shown_megabytes(sizes: Sequence[float]) -> str:
    mean, deviation = mean_and_deviation(sizes)
    digits = 0 if mean >= 100 else 1 if mean >= 1 else 2
    spread = f"{deviation:.{digits}f}"
    return f"{mean:.{digits}f}" + (f"±{spread}" if deviation > 0 and float(spread) > 0 else "")


def largest_delay(summary: dict[str, Any]) -> int:
    """Of any micro-batch at any stage, in updates."""
    return max(int(delay) for stage in summary["stages"] for delay in stage["delays"])


def shown_delay(summaries: Sequence[dict[str, Any]]) -> str:
    """The largest delay of these runs: one number, or where they differ mean and deviation."""
    delays = [largest_delay(summary) for summary in summaries]
    if len(set(delays)) == 1:
        return str(delays[0])
    mean, deviation = mean_and_deviation(delays)
    return f"{mean:.1f} ± {deviation:.1f}"


def weight_distance(summary: dict[str, Any]) -> float:
    """The mean, over the micro-batches and stages that were looked at, of |read - true| / |true|; nan of none.

    How far the weights that a forward read, predicted or not, were from those of its backward.
    """
    distances = [read for stage in summary["stages"] for _, _, read, _ in stage["prediction_errors"]]
    return statistics.fmean(known) if (known := [one for one in distances if math.isfinite(one)]) else math.nan


def prediction_error(summary: dict[str, Any]) -> float:
    """The mean over the micro-batches and stages that were looked at of |read - true| / |stale - true|; nan of none.

    1: the forward's weights were as far from the backward's as those of then; 0: exact prediction.
    """
    ratios = [
        read / stale
        for stage in summary["stages"]
        for _, _, read, stale in stage["prediction_errors"]
        if stale > 0 and math.isfinite(read / stale)
    ]
    return statistics.fmean(ratios) if ratios else math.nan
