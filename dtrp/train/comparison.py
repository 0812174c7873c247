"""A comparison of methods: a grid of runs that can be interrupted and continued, and the numbers of its summaries.

    FOLDER/
        compare.yaml            settings that all cells share
        dtrp-K4-A4-seed0/       a run of `dtrp train`; finished when it has its summary.json
        dtrp-K4-A4-seed1.failed why this cell failed; the next start tries it again
        results.json            numbers of the finished cells, and how much more training they need than bp

A cell is a method, a number of stages and of micro-batches, a prediction and a seed. Cells differ in nothing else and
share no state, so a cell that fails does not affect the others.
"""

from __future__ import annotations

import dataclasses
import gc
import itertools
import json
import math
import shutil
import statistics
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

from ..atomic_file import whole_file
from ..measure.memory import held_at_most
from ..methods import get_method
from ..typing import Json
from .build import LISTING, check_stages
from .config import AUTO, CELL_SETTINGS, COMPARISON, METRICS, TrainConfig, config_text, read_settings, score_name
from .config_checks import check_settings
from .scores.against_backprop import BACKPROP, Lines, against_backprop, as_json, read_lines
from .scores.samples_needed import RelativeSamples

# The data and the model of a cell refer to each other, and would be held for many cells more. To look for them takes a part
# of a second, so it is done after cells that have taken so long.
COLLECT_FROM_S = 5.0
# Contents of a run's ``summary.json``.
Summary: TypeAlias = dict[str, Json]

RESULTS = "results.json"


@dataclass(frozen=True)
class Cell:
    """A run of the grid. ``prediction`` None: the default of the method."""

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
        """The method, and the prediction where it is not the method's default."""
        return self.method if self.prediction is None else f"{self.method} ({self.prediction})"


def grid(
    methods: Sequence[str],
    stages: Sequence[int],
    microbatches: Sequence[str],
    seeds: Sequence[int],
    predictions: Sequence[str] | None = None,
    *,
    once: bool = False,
) -> list[Cell]:
    """All cells in the order of running: seed after seed, so that a part of the grid can be compared already.

    Args:
        methods: names of methods.
        stages: numbers of stages K.
        microbatches: numbers of micro-batches A, as text; ``"K"`` and ``"auto"`` stand for the number of stages.
        seeds: random seeds of the runs.
        predictions: predictions for the methods that predict, in place of the method's default.
        once: run a method that flushes at only one K for each A, of which ``"auto"`` is one. Its accuracy is the same at
            every K, its time and memory are not.

    Raises:
        ValueError: a number of micro-batches that is not a number.
    """
    cells: dict[Cell, None] = {}
    flushing: dict[tuple[int, str, int | str], int] = {}  # the K at which (seed, method, A) runs
    for seed, num_stages, word, method in itertools.product(seeds, stages, microbatches, methods):
        row = get_method(method)
        if not (word in ("K", AUTO) or (word.isdecimal() and int(word) >= 1)):
            raise ValueError(f"--num-microbatches {word}: whole numbers of at least 1, or K for as many as stages")
        count = int(word) if word.isdecimal() else max(1, num_stages)
        key = seed, method, word if word == AUTO else count
        if once and row.flush and flushing.setdefault(key, num_stages) != num_stages:
            continue
        for prediction in predictions if predictions and row.predict is not None else (None,):
            cells[Cell(method, num_stages, count, seed, prediction)] = None
    return list(cells)


def begun_with(folder: str) -> dict[str, Json] | None:
    """The settings that the runs of a comparison share; None where there is none, or none that can be read."""
    try:
        return read_settings((Path(folder).expanduser() / COMPARISON).read_text())
    except (OSError, UnicodeDecodeError):
        return None


class Comparison:
    """A grid of runs in a folder.

    Args:
        base: settings of every cell.
        cells: cells as `grid` makes them.
        folder: folder for the runs; a comparison with the same settings that is there continues.

    Raises:
        ValueError, OSError: invalid settings, or a folder of another comparison. Nothing has been written.
    """

    def __init__(self, base: TrainConfig, cells: Sequence[Cell], folder: str) -> None:
        if not cells:
            raise ValueError("the grid has no cells; name methods, stages and seeds")
        self.base, self.cells = base, list(cells)
        self.folder = Path(folder).expanduser().absolute()
        for cell in self.cells:
            check_settings(self.config(cell))
        for num_stages in {cell.stages for cell in self.cells}:
            check_stages(base, num_stages)
        shared = dict.fromkeys((*CELL_SETTINGS, "cuts", "points"))
        self._settings = config_text(dataclasses.replace(base, **shared))  # type: ignore[arg-type]
        if self.folder.exists():
            known = self.folder / COMPARISON
            unfinished = f".{COMPARISON}."  # left by a process that died while it wrote the settings
            if not self.folder.is_dir() or not (
                known.is_file() or all(path.name.startswith(unfinished) for path in self.folder.iterdir())
            ):
                raise ValueError(f"--out {folder} exists and is no comparison; choose another name")
            if known.is_file() and (other := self._differing(known)):
                raise ValueError(
                    f"--out {folder} holds runs of other settings ({other}, in {known}); choose another name, or give the same ones"
                )

    def _differing(self, known: Path) -> str:
        """The differences between a file's settings and these. A setting that an older file lacks has its default."""
        saved, given = read_settings(known.read_text()), read_settings(self._settings)
        if saved is None or given is None:
            return "no settings"
        differing = (key for key in {**saved, **given} if saved.get(key) != given.get(key))
        return ", ".join(f"{key} {saved.get(key)} and not {given.get(key)}" for key in differing)

    def config(self, cell: Cell) -> TrainConfig:
        """Settings of the run of a cell."""
        workers = cell.stages if self.base.workers else None
        listing = self.base.listing
        if self.base.data == "folder" and self.base.stream is not False and listing is None:
            listing = str(self.folder / LISTING)  # for all cells
        return dataclasses.replace(
            self.base, method=cell.method, stages=cell.stages, num_microbatches=cell.num_microbatches, seed=cell.seed,
            prediction=cell.prediction, workers=workers, out=str(self.folder / cell.name), overwrite=True, keep_last=0,
            listing=listing,
        )  # fmt: skip

    def done(self, cell: Cell) -> Summary | None:
        """The summary of a cell; None where it is not finished."""
        return read_summary(self.folder / cell.name)

    def failure(self, cell: Cell) -> str | None:
        """Why a cell failed; None where it did not."""
        note = self.folder / f"{cell.name}.failed"
        return read_failure(note) if note.is_file() else None

    def run(self, work: Callable[[TrainConfig], None], say: Callable[[str], None]) -> list[Cell]:
        """Run the cells that are not finished.

        Args:
            work: function that trains with a configuration.
            say: function that shows a line: before each cell, and for a cell that fails.

        Returns:
            The cells that failed.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        if not (self.folder / COMPARISON).is_file():
            with whole_file(self.folder / COMPARISON) as file:
                file.write(self._settings.encode())
        left = [cell for cell in self.cells if self.done(cell) is None]
        if len(left) < len(self.cells):
            say(f"{len(self.cells) - len(left)} of {len(self.cells)} cells are finished already")
        failed = []
        for number, cell in enumerate(left):
            say(f"cell {number + 1} of {len(left)}: {cell.name}")
            note = self.folder / f"{cell.name}.failed"
            self._remove_remains(cell)
            began = time.monotonic()
            try:
                work(self.config(cell))
                note.unlink(missing_ok=True)
            except Exception as error:
                reason = " ".join(str(error).split()) or type(error).__name__
                with whole_file(note) as file:
                    file.write(f"{reason}\n\n{traceback.format_exc()}".encode())
                say(f"{cell.name} failed: {reason}")
                failed.append(cell)
            if time.monotonic() - began >= COLLECT_FROM_S:
                gc.collect()
        self._write_results(say)
        return failed

    def _write_results(self, say: Callable[[str], None]) -> None:
        """Write the numbers of the finished cells; a folder that takes no file is shown all the same."""
        groups = self.groups()
        if not groups:
            return
        rows = [result(group, needed) for group, needed in zip(groups, how_much_more(groups), strict=True)]
        try:
            with whole_file(self.folder / RESULTS) as file:
                file.write((json.dumps(rows, indent=1) + "\n").encode())
        except OSError as error:
            say(f"{self.folder / RESULTS} cannot be written ({error.strerror or error})")

    def _remove_remains(self, cell: Cell) -> None:
        """Remove what an interrupted run of the cell has left."""
        for path in (self.folder / cell.name, *self.folder.glob(f".{cell.name}.*")):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    def groups(self) -> list[Group]:
        """The finished cells, grouped by all but the seed, in the order of the grid."""
        groups = group_cells([(cell, summary) for cell in self.cells if (summary := self.done(cell)) is not None])
        return [dataclasses.replace(group, lines=self._lines(group)) for group in groups]

    def _lines(self, group: Group) -> dict[int, Lines]:
        cells = (dataclasses.replace(group.cell, seed=seed) for seed in group.seeds)
        return {cell.seed: read_lines(self.folder / cell.name) for cell in cells}


@dataclass(frozen=True)
class Group:
    """Runs that differ in their seed alone; ``lines``: their ``metrics.jsonl`` by seed, where they have been read."""

    cell: Cell
    seeds: tuple[int, ...]
    summaries: tuple[Summary, ...]
    lines: Mapping[int, Lines] = field(default_factory=dict)

    def values(self, number: Callable[[Summary], float]) -> list[float]:
        """A number of every run."""
        return [number(summary) for summary in self.summaries]

    def mean(self, number: Callable[[Summary], float]) -> tuple[float, float]:
        """Its mean and standard deviation, as `mean_and_spread` has them."""
        return mean_and_spread(self.values(number))


def group_cells(cells: Iterable[tuple[Cell, Summary]]) -> list[Group]:
    """Runs, grouped by all but the seed, in the order of ``cells``."""
    groups: dict[Cell, list[tuple[int, Summary]]] = {}
    for cell, summary in cells:
        groups.setdefault(dataclasses.replace(cell, seed=-1), []).append((cell.seed, summary))
    return [
        Group(cell, tuple(seed for seed, _ in runs), tuple(summary for _, summary in runs))
        for cell, runs in groups.items()
    ]


def baseline(cell: Cell, others: Iterable[Cell]) -> Cell | None:
    """The cell of bp that a cell is to be measured by, seeds aside: of the same K and A, or of another K with the same A.

    bp comes to the same accuracy at every K. None: there is none.
    """
    found = [other for other in others if (other.method, other.num_microbatches) == (BACKPROP, cell.num_microbatches)]
    return min(found, key=lambda other: other.stages != cell.stages, default=None)


def how_much_more(groups: Sequence[Group]) -> list[dict[str, RelativeSamples]]:
    """For each group, how much more training it needs to come to what bp ends with; nothing where that is not known."""
    by_cell = {group.cell: group for group in groups}
    needed = []
    for group in groups:
        base = baseline(group.cell, by_cell)
        settings = group.summaries[0].get("config", {})
        needed.append({} if base is None else against_backprop(group.lines, by_cell[base].lines, settings))
    return needed


def result(group: Group, needed: Mapping[str, RelativeSamples]) -> dict[str, Json]:
    """The entry of a group in ``results.json``: lists have a number for each seed."""
    numbers = ("test_accuracy", "test_loss", "minibatch_s")
    return {
        **{name: getattr(group.cell, name) for name in ("method", "prediction", "stages", "num_microbatches")},
        "seeds": list(group.seeds),
        **{name: [_finite(summary.get(name)) for summary in group.summaries] for name in numbers},
        "samples_over_bp": {name: as_json(samples) for name, samples in needed.items()},
    }


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def mean_and_spread(values: Sequence[float]) -> tuple[float, float]:
    """(mean, sample standard deviation); the deviation is nan for a single value, or where a value is not finite."""
    known = len(values) > 1 and all(map(math.isfinite, values))
    return statistics.fmean(values), statistics.stdev(values) if known else math.nan


def mean_text(values: Sequence[float], digits: int | None = None, unit: str = "") -> str:
    """Mean and standard deviation as text, the deviation of several values only.

    >>> mean_text([64.0, 66.0], 1, " %")
    '65.0 ± 1.4 %'

    Args:
        values: a value per run; a mean that is not finite is "not a number", that of no values "-".
        digits: decimals; None: as many as show three digits of the mean.
        unit: text after the numbers.
    """
    if not values:
        return "-"
    mean, spread = mean_and_spread(values)
    if not math.isfinite(mean):
        return "not a number"
    if digits is None:
        digits = max(0, 2 - math.floor(math.log10(mean))) if mean > 0 else 2
    return f"{mean:.{digits}f}" + ("" if math.isnan(spread) else f" ± {spread:.{digits}f}") + unit


def score_of(summaries: Iterable[Summary]) -> str:
    """What runs are judged by: the name of their first metric, or ``score`` where these differ."""
    return common_score(summary.get("config", {}) for summary in summaries)


def common_score(settings: Iterable[Mapping[str, Json]]) -> str:
    """The same, from their settings."""
    names = {score_name(values.get("metric")) for values in settings}
    return names.pop() if len(names) == 1 else "score" if names else "accuracy"


def mean_score(name: str, values: Sequence[float], unit: str = " %") -> str:
    """Mean and standard deviation of scores as text; shares in per cent."""
    return mean_text([100 * value for value in values], 2, unit) if name in METRICS else mean_text(values)


def read_summary(folder: Path) -> Summary | None:
    """``summary.json`` of a run; None where the run is not finished."""
    try:
        summary: Summary = json.loads((folder / "summary.json").read_text())
    except (OSError, ValueError):
        return None
    return summary if isinstance(summary, dict) and "stages" in summary else None


def read_failure(note: Path) -> str:
    """Why a cell failed: the first line of its ``.failed`` file."""
    return next(iter(note.read_text(errors="replace").splitlines()), "its note is empty")


def peak_bytes(summary: Summary) -> list[int]:
    """Peak memory of each stage: weights, optimizer state, gradients, predicted copy, and the peak of activations."""
    return [held_at_most(stage["memory"], stage["activations_peak"]) for stage in summary["stages"]]


def megabytes_by_stage(summaries: Sequence[Summary]) -> list[str]:
    """Peak memory of each stage in MB: the mean over the runs, and the standard deviation where it is not 0.0."""
    texts = []
    for sizes in zip(*map(peak_bytes, summaries), strict=True):
        mean, spread = (value / 1e6 for value in mean_and_spread(sizes))
        digits = 0 if mean >= 100 else 1 if mean >= 1 else 2
        texts.append(f"{mean:.{digits}f}" + (f"±{spread:.{digits}f}" if round(spread, digits) > 0 else ""))
    return texts


def largest_delay(summary: Summary) -> int:
    """The largest delay of any micro-batch at any stage, in updates."""
    return max(int(delay) for stage in summary["stages"] for delay in stage["delays"])


def shown_delay(summaries: Sequence[Summary]) -> str:
    """The largest delay of the runs as text; where they differ, mean and standard deviation."""
    delays = [largest_delay(summary) for summary in summaries]
    return str(delays[0]) if len(set(delays)) == 1 else mean_text(delays, 1)


def weight_distance(summary: Summary) -> float:
    """Mean over the measured micro-batches of |read - true| / |true|; nan where none was measured.

    The distance of the weights that a forward read, predicted or not, from those of its backward.
    """
    return _finite_mean(read for stage in summary["stages"] for _, _, read, _ in stage["prediction_errors"])


def prediction_error(summary: Summary) -> float:
    """Mean over the measured micro-batches of |read - true| / |stale - true|; nan where none was measured.

    0: the prediction was exact; 1: the weights that the forward read were as far from the backward's as the stale ones.
    """
    errors = [error for stage in summary["stages"] for error in stage["prediction_errors"]]
    return _finite_mean(read / stale for _, _, read, stale in errors if stale > 0)


def _finite_mean(values: Iterable[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return statistics.fmean(finite) if finite else math.nan
