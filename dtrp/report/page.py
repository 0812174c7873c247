"""The page of a report: a self-contained HTML file with the figures, tables and settings of runs."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import jinja2
import yaml
from markupsafe import Markup

from .. import __version__
from ..atomic_file import whole_file
from ..methods import Method
from ..schedule_grid import Schedule
from ..train.build import make_method
from ..train.config import TrainConfig
from .collect import Collection, collect
from .events import write_events
from .figures import Plot, on_white, png, svg
from .opening import method_lines, named, verdict, what_was_compared
from .plots import MINIBATCHES_SHOWN, SECTIONS, make_plots
from .repeating import repeating_commands
from .table import make_table

_ORDER = ("ahead", "order", "leads", "orders")  # settings of the order of work
_SCHEDULES_OPEN = 15  # the reader unfolds the others


def write_report(folders: list[str], out: str, figures: str | None = None, *, tensorboard: bool = False) -> Collection:
    """Write an HTML file about some runs.

    Args:
        folders: folders of runs or comparisons.
        out: path of the HTML file, which is written whole or not at all.
        figures: folder for each figure as SVG and PNG; None: no such files.
        tensorboard: whether to write TensorBoard events of each run, to ``tensorboard`` beside the file.

    Returns:
        The runs in the report.

    Raises:
        ValueError: folders without runs, or a path that cannot be written.
    """
    collection = collect(folders)
    with _written(Path(out)) as file:
        plots = make_plots(collection)
        drawn = [(plot, svg(plot)) for plot in plots]
        file.write(render(collection, drawn).encode())
        for plot, picture in drawn if figures is not None else ():
            for ending, content in (("svg", on_white(picture).encode()), ("png", png(plot))):
                with _written(Path(str(figures)) / f"{plot.name}.{ending}") as figure:
                    figure.write(content)
        if tensorboard:
            write_events(collection, Path(out).expanduser().absolute().parent / "tensorboard")
    return collection


@contextmanager
def _written(path: Path) -> Iterator[IO[bytes]]:
    """A file to write, in a folder that is made if needed. A path that cannot be written is refused before any work."""
    path = path.expanduser()
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as file:
            yield file
    except OSError as error:
        raise ValueError(f"{path} cannot be written ({error.strerror or error}); choose another place") from error


def render(collection: Collection, drawn: list[tuple[Plot, str]]) -> str:
    """The HTML of the page, with the plots in ``drawn`` as SVG."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("dtrp.report", "."), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    data = {
        "plots": [{"name": p.name, "title": p.title, "y": p.y_label, "series": p.series} for p, _ in drawn],
        "runs": [
            {"folder": run.folder.name, "config": run.config, "metrics": run.metrics, "summary": run.summary}
            for run in collection.runs
        ],
        "failed": collection.failed,
    }  # fmt: skip
    # JSON that every browser reads has no NaN and no infinity.
    finite_data = json.loads(json.dumps(data), parse_constant=lambda name: None)
    shared = collection.shared()
    headings, rows = make_table(collection)
    return environment.get_template("page.html").render(
        title=" on ".join(named(collection.runs[0], key) for key in ("model", "data") if key in shared) or "runs",
        compared=what_was_compared(collection),
        verdict=_sentence(verdict(collection)),
        methods=method_lines(collection),
        sections=[
            (section, shown)
            for section in SECTIONS
            if (shown := [(plot, Markup(picture)) for plot, picture in drawn if plot.section == section])
        ],
        watched=any(plot.name.startswith("prediction-error") for plot, _ in drawn),
        traced=any(plot.name.startswith("timeline") for plot, _ in drawn),
        headings=headings,
        table=rows,
        failed=collection.failed,
        unfinished=[*(run.folder.name for run in collection.runs if run.summary is None), *collection.begun],
        schedules=_schedules(collection),
        schedules_open=_SCHEDULES_OPEN,
        shared=yaml.safe_dump(shared, sort_keys=False) if shared else "",
        commands=repeating_commands(collection),
        environments=sorted(
            {
                ", ".join(f"{name} {value}" for name, value in run.summary["environment"].items() if value is not None)
                for run in collection.runs
                if run.summary
            }
        ),
        version=__version__,
        data=Markup(json.dumps(finite_data).replace("<", "\\u003c")),
    )


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def _schedules(collection: Collection) -> list[tuple[str, str]]:
    """(options that differ from the method's, grid) of each order of work."""
    grids: dict[tuple[Method, int, int], tuple[str, str]] = {}
    for run in collection.runs:
        stages, parts = run.cell.stages, run.cell.num_microbatches
        try:
            options = {key: run.config[key] for key in _ORDER if run.config.get(key) is not None}
            options = {key: tuple(value) if isinstance(value, list) else value for key, value in options.items()}
            method = make_method(TrainConfig(method=run.cell.method, **options))
            if (method, stages, parts) not in grids:
                length = 2 if parts > 1 or method.flush else MINIBATCHES_SHOWN
                words = " ".join(f"--{key} {_option_text(value)}" for key, value in options.items())
                grids[method, stages, parts] = (words, str(Schedule.build(method, stages, length, parts)))
        except ValueError:  # a method that this version does not know, or a number of stages that nobody knows
            continue
    return list(grids.values())


def _option_text(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
