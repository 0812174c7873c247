"""The page: runs into plots and tables, and these into one HTML file that needs nothing beside it."""

from __future__ import annotations

import errno
import json
import math
import os
import shlex
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
from ..schedule import Schedule
from ..train.build import make_method
from ..train.comparison import megabytes_by_stage, prediction_error, shown_delay, weight_distance
from ..train.config import TrainConfig, config_text
from .collect import Collection, Run, collect, mean_and_spread
from .events import write_events
from .figures import Plot, on_white, png, svg
from .plots import MINIBATCHES_SHOWN, SECTIONS, make_plots

_SCHEDULES_OPEN = 12  # the others are a touch away


def write_report(folders: list[str], out: str, figures: str | None = None, *, tensorboard: bool = False) -> Collection:
    """Write one HTML file about some runs; with ``figures`` each figure as SVG and PNG to that folder too.

    With ``tensorboard`` also events of each run, to ``tensorboard`` beside the file.

    Raises:
        ValueError: folders that hold no runs, or a place that cannot be written; the file is there whole or not at all.
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
    """A file to write, in a folder that is made if need be; one that cannot be written is known before there is work."""
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
    """The HTML."""
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
    shared = collection.shared()
    return environment.get_template("page.html").render(
        title=" on ".join(str(shared[key]) for key in ("model", "data") if key in shared) or "runs",
        sections=[
            (section, own)
            for section in SECTIONS
            if (own := [(plot, Markup(picture)) for plot, picture in drawn if plot.section == section])
        ],
        watched=any(plot.name.startswith("prediction-error") for plot, _ in drawn),
        traced=any(plot.name.startswith("timeline") for plot, _ in drawn),
        headings=HEADINGS,
        table=_table(collection),
        failed=collection.failed,
        unfinished=[*(run.folder.name for run in collection.runs if run.summary is None), *collection.begun],
        schedules=_schedules(collection),
        schedules_open=_SCHEDULES_OPEN,
        shared=yaml.safe_dump(shared, sort_keys=False) if shared else "",
        commands=[_command(run) for run in collection.runs],
        environments=sorted(
            {
                ", ".join(f"{name} {value}" for name, value in run.summary["environment"].items() if value is not None)
                for run in collection.runs
                if run.summary
            }
        ),
        version=__version__,
        data=Markup(json.dumps(_plain(data)).replace("<", "\\u003c")),
    )


def _plain(value: Any) -> Any:
    """JSON that every browser reads: no NaN and no infinity."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    return value


HEADINGS = ("", "accuracy, %", "test loss", "ms a mini-batch", "memory by stage, MB", "delay, at most",
            "distance of weights, %", "prediction error", "epochs", "seeds")  # fmt: skip


def _table(collection: Collection) -> list[list[str]]:
    rows = []
    for label, runs in collection.groups().items():
        last = [run.metrics[min(len(other.metrics) for other in runs) - 1] for run in runs]
        finished = [run.summary for run in runs if run.summary]
        distance, error = (
            [value for value in map(of, finished) if math.isfinite(value)]
            for of in (_percent_of_weights, prediction_error)
        )
        rows.append(
            [
                label,
                _shown([100 * line["test_accuracy"] for line in last], 2),
                _shown([line["test_loss"] for line in last], 3),
                _shown([1e3 * s["minibatch_s"] for s in finished], 1) if finished else "-",
                " ".join(megabytes_by_stage(finished)) if finished else "-",
                shown_delay(finished) if finished else "-",
                _shown(distance, 3) if distance else "-",
                _shown(error, 2) if error else "-",
                str(max(int(line["epoch"]) for line in last)),
                ", ".join(str(run.cell.seed) for run in runs),
            ]
        )
    return rows


def _percent_of_weights(summary: dict[str, Any]) -> float:
    return 100 * weight_distance(summary)


def _shown(values: list[float], digits: int) -> str:
    mean, spread = mean_and_spread(values)
    if not math.isfinite(mean):
        return "not a number"
    return f"{mean:.{digits}f}" + (f" ± {spread:.{digits}f}" if len(values) > 1 else "")


def _schedules(collection: Collection) -> list[tuple[str, str]]:
    """(what is not as the method has it, the grid) of each order of work."""
    grids: dict[tuple[Method, int, int], tuple[str, str]] = {}
    for run in collection.runs:
        stages, parts = run.cell.stages, run.cell.num_microbatches
        try:
            method = make_method(
                TrainConfig(method=run.cell.method, ahead=run.config.get("ahead"), order=run.config.get("order"))
            )
            if (method, stages, parts) not in grids:
                length = 2 if parts > 1 or method.flush else MINIBATCHES_SHOWN
                own = [f"--{key} {run.config[key]}" for key in ("ahead", "order") if run.config.get(key) is not None]
                grids[method, stages, parts] = (" ".join(own), str(Schedule.build(method, stages, length, parts)))
        except ValueError:  # a method that this version does not know, or a number of stages that nobody knows
            continue
    return list(grids.values())


def _command(run: Run) -> str:
    """What trains it again, from nothing but this line."""
    defaults = yaml.safe_load(config_text(TrainConfig()))
    words = ["dtrp", "train"]
    for key, value in run.config.items():
        if value == defaults.get(key):
            continue
        if isinstance(value, bool):
            words.append(f"--{key}" if value else f"--no-{key}")
        else:
            words += [f"--{key}", ",".join(map(str, value)) if isinstance(value, list) else str(value)]
    return shlex.join([*words, "--out", f"again/{run.folder.name}"])
