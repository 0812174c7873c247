"""The commands that train the runs of a report again: one for a comparison, one for each other run."""

from __future__ import annotations

import itertools
import re
import shlex
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from ..methods import get_method, list_methods
from ..train.comparison import Cell, begun_with, grid
from ..train.config import AUTO, AUTO_SAMPLES, CHOICES, COMPARISON, PROGRAM, option_words
from ..typing import Json
from .collect import Collection, Run

_LOOKS = "prediction-error-every"


def repeating_commands(collection: Collection) -> list[str]:
    """The command lines that train the runs again; cells that failed or are not finished included."""
    cells: dict[Path, dict[Cell, Run | None]] = {}
    alone = []
    for run in collection.runs:
        parent = run.folder.resolve().parent
        if (parent / COMPARISON).is_file() and run.folder.resolve().name == run.cell.name:
            cells.setdefault(parent, {})[run.cell] = run
        else:
            alone.append(run)
    for path in collection.without_numbers:
        if (cell := parse_cell(path.name)) is not None and path.parent in cells:
            cells[path.parent].setdefault(cell, None)
    commands = [command for folder, found in cells.items() for command in _of_comparison(folder, found)]
    return list(dict.fromkeys([*commands, *map(_of_run, alone)]))


def _of_comparison(folder: Path, cells: dict[Cell, Run | None]) -> Iterator[str]:
    """One command where the cells are a grid; else one for each part of them that is, or for a run."""
    shared = begun_with(str(folder))
    if shared is None:
        yield from (_of_run(run) for run in cells.values() if run is not None)
        return
    keys: list[Callable[[Cell], object]] = [lambda cell: cell.method, lambda cell: cell.stages, lambda cell: cell.seed]
    for part in _grids(list(cells), shared, keys):
        if (options := grid_options(part, shared)) is not None:
            yield shlex.join(["dtrp", "compare", *options, *_shared_words(shared), "--out", f"again/{folder.name}"])
        else:
            yield from (_of_run(run) for cell in part if (run := cells[cell]) is not None)


def _grids(
    cells: Sequence[Cell], shared: dict[str, Json], keys: Sequence[Callable[[Cell], object]]
) -> Iterator[list[Cell]]:
    """The cells in as few parts that are grids as these keys make; what they do not divide into grids last."""
    if grid_options(cells, shared) is not None or not keys:
        yield list(cells)
        return
    parts: dict[object, list[Cell]] = {}
    for cell in cells:
        parts.setdefault(keys[0](cell), []).append(cell)
    for part in parts.values():
        yield from _grids(part, shared, keys[1:])


def grid_options(cells: Iterable[Cell], shared: dict[str, Json]) -> list[str] | None:
    """The options of ``dtrp compare`` whose grid is these cells; None: no grid is.

    Args:
        cells: in any order.
        shared: the settings of the comparison, of which the fewest samples of a micro-batch tell of ``auto``.
    """
    wanted = set(cells)
    methods = list(dict.fromkeys(cell.method for cell in sorted(wanted, key=_place)))
    if not set(methods) <= set(list_methods()):
        return None
    stages = sorted({cell.stages for cell in wanted})
    seeds = 1 + max(cell.seed for cell in wanted)
    predictions = sorted({cell.prediction for cell in wanted if cell.prediction is not None})
    samples = shared.get("microbatch-samples")
    for once, words in itertools.product((False, True), _microbatches(wanted, automatic=samples == AUTO_SAMPLES)):
        if set(grid(methods, stages, words, range(seeds), predictions or None, once=once)) == wanted:
            return [
                "--methods", ",".join(methods), "--stages", ",".join(map(str, stages)), "--num-microbatches", ",".join(words),
                *(["--predictions", ",".join(predictions)] if predictions else []),
                "--seeds", str(seeds), *(["--once"] if once else []),
                *(["--microbatch-samples", str(samples)] if samples is not None and words != [AUTO] else []),
            ]  # fmt: skip
    return None


def _microbatches(cells: set[Cell], *, automatic: bool) -> Iterator[list[str]]:
    """Lists of numbers of micro-batches that may make the cells, as words; ``automatic``: auto may be one."""
    numbers = {cell.num_microbatches for cell in cells}
    everywhere = [
        n for n in sorted(numbers) if {c.stages for c in cells if c.num_microbatches == n} == {c.stages for c in cells}
    ]
    if all(cell.num_microbatches == cell.stages for cell in cells):
        yield from ([[AUTO], ["K"]] if automatic else [["K"]])
    yield [str(n) for n in sorted(numbers)]
    yield [*map(str, everywhere), "K"]


def _place(cell: Cell) -> tuple[int, str]:
    """The place of a cell's method among all; names that are not known come last."""
    methods = list_methods()
    return (methods.index(cell.method) if cell.method in methods else len(methods)), cell.method


def _shared_words(shared: dict[str, Json]) -> list[str]:
    """The words of the settings that all cells share, but for those that the grid's options tell."""
    settings = {key: value for key, value in shared.items() if key not in ("workers", "microbatch-samples", _LOOKS)}
    looks = shared.get(_LOOKS, 0)  # `dtrp compare` has another default than `dtrp train`
    return [
        "--workers" if shared.get("workers") else "--one-process",
        *option_words(settings),
        *([] if looks == AUTO else [f"--{_LOOKS}", str(looks)]),
    ]


def parse_cell(name: str) -> Cell | None:
    """The cell that `Cell.name` names; None for another name."""
    found = re.fullmatch(r"(.+)-K(\d+)-A(\d+)-seed(\d+)", name)
    if found is None:
        return None
    stages, parts, seed = (int(found[i]) for i in (2, 3, 4))
    for method, prediction in itertools.product(list_methods(), (None, *CHOICES["prediction"])):
        cell = Cell(method, stages, parts, seed, prediction)
        if cell.name == name and (prediction is None or get_method(method).predict is not None):
            return cell
    return None


def _of_run(run: Run) -> str:
    """The command line that trains a run again."""
    if PROGRAM in run.config:
        return str(run.config[PROGRAM])
    return shlex.join(["dtrp", "train", *option_words(run.config), "--out", f"again/{run.folder.name}"])
