"""The page: runs into plots and tables, and these into one HTML file that needs nothing beside it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2
import yaml
from markupsafe import Markup
from rich.filesize import decimal

from .. import __version__
from ..compare import largest_delay, peak_bytes, prediction_error
from ..files import whole_file
from ..schedule import Schedule
from .collect import Collection, Run, collect, mean_and_spread
from .figures import Plot, png, svg

_MINIBATCHES_SHOWN = 6  # of a schedule
_SCHEDULES_SHOWN = 8


def write_report(folders: list[str], out: str, figures: str | None = None) -> Collection:
    """Write one HTML file about some runs; with ``figures`` each figure as SVG and PNG to that folder too.

    Raises:
        ValueError, OSError: folders that hold no runs, or a place that cannot be written; nothing is half-written.
    """
    collection = collect(folders)
    plots = make_plots(collection)
    drawn = [(plot, svg(plot)) for plot in plots]
    page = render(collection, drawn)
    if figures is not None:
        place = Path(figures)
        place.mkdir(parents=True, exist_ok=True)
        for plot, picture in drawn:
            _write(place / f"{plot.name}.svg", picture.replace("currentColor", "#111111").encode())
            _write(place / f"{plot.name}.png", png(plot))
    _write(Path(out), page.encode())
    return collection


def _write(path: Path, content: bytes) -> None:
    with whole_file(path) as file:
        file.write(content)


# -- plots ----------------------------------------------------------------------------------------------------


def make_plots(collection: Collection) -> list[Plot]:
    """Every figure that the runs have numbers for."""
    groups = collection.groups()
    plots = [
        _curve(groups, "accuracy", "Test accuracy", "accuracy (%)", lambda line: 100 * line["test_accuracy"]),
        _curve(groups, "test-loss", "Test loss", "loss", lambda line: line["test_loss"]),
        _curve(groups, "train-loss", "Training loss", "loss", lambda line: line["train_loss"]),
    ]
    finished = {label: [run for run in runs if run.summary] for label, runs in groups.items()}
    finished = {label: runs for label, runs in finished.items() if runs}
    if finished:
        plots += [
            _by_stage(
                finished, "memory", "Memory of each stage, at most", "MB", lambda run: [b / 1e6 for b in peak_bytes(_of(run))],
                "Weights, optimizer state, the predicted copy, and the most activations at once.",
            ),
            Plot(
                "time", "Time of a mini-batch", "", "ms",
                {"median over epochs": {
                    "x": list(finished),
                    "y": [_mean([1e3 * _of(run)["minibatch_s"] for run in runs]) for runs in finished.values()],
                }},
                "bars",
                "In one process for all stages, unless the settings below say workers.",
            ),
            _by_stage(
                finished, "utilization", "Share of the time at work", "%",
                lambda run: [100 * s["busy"]["busy"] / max(1e-9, s["busy"]["elapsed"]) for s in _of(run)["stages"]],
                "In one process the stages take turns; with a process for each, the rest is waiting.",
            ),
            _delays(finished),
        ]  # fmt: skip
        plots += [_timeline(label, run) for label, runs in finished.items() for run in runs[:1] if run.trace]
        errors = _errors(finished)
        if errors.series:
            plots.append(errors)
    return plots


def _of(run: Run) -> dict[str, Any]:
    assert run.summary is not None
    return run.summary


def _curve(
    groups: dict[str, list[Run]], name: str, title: str, y_label: str, value: Callable[[dict[str, Any]], float]
) -> Plot:
    series: dict[str, dict[str, list[Any]]] = {}
    for label, runs in groups.items():
        epochs = min(len(run.metrics) for run in runs)
        points = [mean_and_spread([value(run.metrics[i]) for run in runs]) for i in range(epochs)]
        series[label] = {
            "x": [int(runs[0].metrics[i]["epoch"]) for i in range(epochs)],
            "y": [_finite(mean) for mean, _ in points],
            "low": [_finite(mean - spread) for mean, spread in points],
            "high": [_finite(mean + spread) for mean, spread in points],
        }
    several = any(len(runs) > 1 for runs in groups.values())
    return Plot(
        name, title, "epoch", y_label, series, note="Bands: one standard deviation over seeds." if several else ""
    )


def _by_stage(
    groups: dict[str, list[Run]], name: str, title: str, y_label: str, values: Callable[[Run], list[float]], note: str
) -> Plot:
    series: dict[str, dict[str, list[Any]]] = {}
    for label, runs in groups.items():
        each = [values(run) for run in runs]
        means = [mean_and_spread(list(column))[0] for column in zip(*each, strict=True)]
        series[label] = {"x": [f"stage {k}" for k in range(len(means))], "y": [_finite(mean) for mean in means]}
    return Plot(name, title, "", y_label, series, "bars", note)


def _delays(groups: dict[str, list[Run]]) -> Plot:
    series: dict[str, dict[str, list[Any]]] = {}
    for label, runs in groups.items():
        counts = {int(d): n for d, n in _of(runs[0])["stages"][0]["delays"].items()}
        total = max(1, sum(counts.values()))
        series[label] = {"x": sorted(counts), "y": [100 * counts[d] / total for d in sorted(counts)]}
    note = "Counted from the run, start-up and flush included."
    return Plot("delay", "Delay at stage 0", "updates", "% of micro-batches", series, "bars", note)


def _errors(groups: dict[str, list[Run]]) -> Plot:
    series: dict[str, dict[str, list[Any]]] = {}
    for label, runs in groups.items():
        at: dict[int, list[float]] = {}
        for run in runs:
            for stage in _of(run)["stages"]:
                for minibatch, _, read, stale in stage["prediction_errors"]:
                    if stale > 0 and math.isfinite(read / stale):
                        at.setdefault(int(minibatch), []).append(read / stale)
        if at:
            series[label] = {"x": sorted(at), "y": [_finite(math.fsum(at[b]) / len(at[b])) for b in sorted(at)]}
    return Plot(
        "prediction-error", "How well weights are predicted", "mini-batch", "error, relative", series,
        note="Distance of the weights a forward read from those of its backward, over that of the weights as they were: below 1 "
             "the prediction helps, 1 is none.",
    )  # fmt: skip


def _mean(values: list[float]) -> float | None:
    return _finite(mean_and_spread(values)[0])


def _timeline(label: str, run: Run) -> Plot:
    """What ran when, for some mini-batches from the middle of the run; milliseconds."""
    lanes = {(e["pid"], e["tid"]): e["args"]["name"] for e in run.trace if e.get("name") == "thread_name"}
    spans = [e for e in run.trace if e.get("ph") == "X" and lanes.get((e["pid"], e["tid"]), "").startswith("stage ")]
    spans.sort(key=lambda e: float(e["ts"]))
    length = 1e3 * _MINIBATCHES_SHOWN * 1e3 * float(_of(run)["minibatch_s"])
    begin = float(spans[len(spans) // 2]["ts"]) if spans else 0.0
    series: dict[str, dict[str, list[Any]]] = {}
    for kind, words in (("F", "forward"), ("B", "backward"), ("U", "update"), ("wait", "waits for a message")):
        own = [e for e in spans if e["cat"] == kind and begin <= float(e["ts"]) < begin + length]
        if own:
            series[words] = {
                "x": [(float(e["ts"]) - begin) / 1e3 for e in own],
                "y": [int(lanes[e["pid"], e["tid"]].split()[1]) for e in own],
                "width": [float(e["dur"]) / 1e3 for e in own],
            }
    name = "timeline-" + re.sub(r"[^A-Za-z0-9]+", "-", label).strip("-")
    return Plot(
        name, f"What ran when: {label}", "ms", "stage", series, "timeline", "Measured, from the middle of the run."
    )


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


# -- the page -------------------------------------------------------------------------------------------------


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
        title=" and ".join(str(shared[key]) for key in ("model", "data") if key in shared) or "runs",
        plots=[(plot, Markup(picture)) for plot, picture in drawn],
        headings=HEADINGS,
        table=_table(collection),
        failed=collection.failed,
        unfinished=[run.folder.name for run in collection.runs if run.summary is None],
        schedules=_schedules(collection),
        shared=yaml.safe_dump(shared, sort_keys=False) if shared else "",
        commands=[_command(run) for run in collection.runs],
        environments=sorted({json.dumps(run.summary["environment"]) for run in collection.runs if run.summary}),
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


HEADINGS = ("", "accuracy, %", "test loss", "ms a mini-batch", "memory, largest stage", "delay, at most", "prediction error",
            "epochs", "seeds")  # fmt: skip


def _table(collection: Collection) -> list[list[str]]:
    rows = []
    for label, runs in collection.groups().items():
        last = [run.metrics[-1] for run in runs]
        finished = [run.summary for run in runs if run.summary]
        error = [value for value in map(prediction_error, finished) if math.isfinite(value)]
        rows.append(
            [
                label,
                _shown([100 * line["test_accuracy"] for line in last], 2),
                _shown([line["test_loss"] for line in last], 3),
                _shown([1e3 * s["minibatch_s"] for s in finished], 1) if finished else "-",
                decimal(max(max(peak_bytes(s)) for s in finished)) if finished else "-",
                str(max(map(largest_delay, finished))) if finished else "-",
                _shown(error, 2) if error else "-",
                str(max(int(line["epoch"]) for line in last)),
                ", ".join(str(run.cell.seed) for run in runs),
            ]
        )
    return rows


def _shown(values: list[float], digits: int) -> str:
    mean, spread = mean_and_spread(values)
    if not math.isfinite(mean):
        return "not a number"
    return f"{mean:.{digits}f}" + (f" ± {spread:.{digits}f}" if len(values) > 1 else "")


def _schedules(collection: Collection) -> list[str]:
    cells = dict.fromkeys((r.cell.method, r.cell.stages, r.cell.num_microbatches) for r in collection.runs)
    grids = []
    for method, stages, parts in list(cells)[:_SCHEDULES_SHOWN]:
        try:
            grids.append(str(Schedule.build(method, stages, _MINIBATCHES_SHOWN if parts == 1 else 2, parts)))
        except ValueError:  # a method that this version does not know
            continue
    return grids


def _command(run: Run) -> str:
    return f"dtrp train --config {run.folder.name}/config --out again"
