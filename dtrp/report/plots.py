"""Runs into figures: which there are, and the numbers that each shows.

Where there are many groups of runs, each number of stages and micro-batches has figures of its own, all on one scale.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterable
from typing import Any

from ..methods import get_method
from ..train.comparison import largest_delay, peak_bytes
from .collect import Collection, Groups, Run, mean_and_spread
from .figures import Plot

MINIBATCHES_SHOWN = 6  # of a timeline
_TOGETHER = 6  # groups that one figure holds well
_TIMELINES = 12

LEARNING, MEMORY, TIME, DELAY, TIMELINES = (
    "Accuracy and loss", "Memory", "Time", "Delay and prediction", "What ran when",
)  # fmt: skip
SECTIONS = (LEARNING, MEMORY, TIME, DELAY, TIMELINES)


def make_plots(collection: Collection) -> list[Plot]:
    """Every figure that the runs have numbers for, section by section."""
    groups = collection.groups()
    finished = {label: own for label, runs in groups.items() if (own := [run for run in runs if run.summary])}
    plots: list[Plot] = []
    for name, title, y_label, value in (
        ("accuracy", "Test accuracy", "accuracy (%)", lambda line: 100 * line["test_accuracy"]),
        ("test-loss", "Test loss", "loss", lambda line: line["test_loss"]),
        ("train-loss", "Training loss", "loss", lambda line: line["train_loss"]),
    ):
        plots += one_scale(
            _curve(own, name + suffix, title + where, y_label, value)
            for suffix, where, own in _facets(collection, groups, backprop=True)
        )
    facets = _facets(collection, finished)
    plots += one_scale(
        _by_stage(
            own, MEMORY, "memory" + suffix, "Memory of each stage, at most" + where, "MB",
            lambda run: [b / 1e6 for b in peak_bytes(of(run))],
            "Weights, optimizer state, gradients, the predicted copy, and the most activations at once.",
        )
        for suffix, where, own in facets
    )  # fmt: skip
    plots += _memory_by_stages(collection, finished)
    if finished:
        plots.append(_times(finished))
    plots += one_scale(
        _by_stage(
            own, TIME, "utilization" + suffix, "Share of the time at work" + where, "%",
            lambda run: [100 * s["busy"]["busy"] / max(1e-9, s["busy"]["elapsed"]) for s in of(run)["stages"]],
            "In one process the stages take turns; with a process for each, the rest is waiting.",
        )
        for suffix, where, own in facets
    )  # fmt: skip
    plots += one_scale(_delays(own, "delay" + suffix, "Delay at stage 0" + where) for suffix, where, own in facets)
    plots += _frontier(collection, finished)
    for name, title, y_label, value_of, note in (
        ("delay-over-time", "Delay over time, at stage 0", "updates", _delay_of,
         "Of the micro-batches that --prediction-error-every looked at."),
        ("prediction-error", "How well weights are predicted", "error, relative", _error_of,
         "Distance of the weights a forward read from those of its backward, over that of the weights as they were: below 1 the "
         "prediction helps, 1 is none."),
    ):  # fmt: skip
        plots += one_scale(
            (_over_time(own, name + suffix, title + where, y_label, value_of, note) for suffix, where, own in facets),
            from_zero=True,
        )
    traced = [(label, run) for label, runs in finished.items() for run in [r for r in runs if r.is_traced][:1]]
    plots += [_timeline(label, run) for label, run in traced[:_TIMELINES]]
    shorts = (collection.label(run, short=True) for runs in groups.values() for run in runs)
    looks = tuple(dict.fromkeys([*groups, *shorts] if len(facets) < 2 else [*shorts, *groups]))
    return [dataclasses.replace(plot, looks=looks) for plot in plots if plot.series]


def of(run: Run) -> dict[str, Any]:
    """The summary of a run that has one."""
    assert run.summary is not None
    return run.summary


def _facets(collection: Collection, groups: Groups, *, backprop: bool = False) -> list[tuple[str, str, Groups]]:
    """(suffix of the name, of the title, groups) of the figures that one kind of number takes.

    ``backprop``: where no run of a facet is synchronous, one that is stands beside it: its numbers are the same at every K.
    """
    places = list(
        dict.fromkeys((run.cell.stages, run.cell.num_microbatches) for runs in groups.values() for run in runs)
    )
    if len(groups) <= _TOGETHER or len(places) == 1:
        return [("", "", groups)] if groups else []
    facets = []
    synchronous = {label: runs for label, runs in groups.items() if _flushes(runs[0])}
    for stages, parts in places:
        own = {
            collection.label(runs[0], short=True): runs
            for runs in groups.values()
            if (runs[0].cell.stages, runs[0].cell.num_microbatches) == (stages, parts)
        }
        if backprop and synchronous and not any(_flushes(runs[0]) for runs in own.values()):
            label = min(synchronous, key=lambda label: synchronous[label][0].cell.num_microbatches != parts)
            own = {label: synchronous[label], **own}
        facets.append((f"-K{stages or 'unknown'}-A{parts}", f", K={stages or '?'}, A={parts}", own))
    return facets


def one_scale(plots: Iterable[Plot], *, from_zero: bool = False) -> list[Plot]:
    """Figures of the same kind, on one scale, so that they can be compared by eye; bars stand on zero anyway."""
    plots = list(plots)
    highs = [y for plot in plots for line in plot.series.values() for y in line.get("high", line["y"]) if y is not None]
    lows = [y for plot in plots for line in plot.series.values() for y in line.get("low", line["y"]) if y is not None]
    if not highs or (len(plots) < 2 and not from_zero):
        return plots
    zero = from_zero or plots[0].kind == "bars"
    low = 0.0 if zero else min(lows) - 0.05 * (max(highs) - min(lows))
    high = max(highs) + 0.05 * (max(highs) - low)
    return [dataclasses.replace(plot, limits=(low, high if high > low else low + 1)) for plot in plots]


def _flushes(run: Run) -> bool:
    try:
        return get_method(run.cell.method).flush
    except ValueError:  # a method that this version does not know
        return False


def _curve(groups: Groups, name: str, title: str, y_label: str, value: Callable[[dict[str, Any]], float]) -> Plot:
    series: dict[str, dict[str, list[Any]]] = {}
    for label, runs in groups.items():
        count = min(len(run.metrics) for run in runs)
        points = [mean_and_spread([value(run.metrics[i]) for run in runs]) for i in range(count)]
        series[label] = {"x": [int(runs[0].metrics[i]["epoch"]) for i in range(count)], **_band(points)}
    several = any(len(runs) > 1 for runs in groups.values())
    notes = ["Bands: one standard deviation over seeds."] if several else []
    if gaps := [f"{label} ({epochs})" for label, line in series.items() if (epochs := _gaps(line))]:
        notes.append(f"Not finite, and so not drawn: {', '.join(gaps)}.")
    return Plot(name, title, "epoch", y_label, series, note=" ".join(notes), section=LEARNING)


def _gaps(line: dict[str, list[Any]]) -> str:
    """The epochs that have no number."""
    epochs = [str(x) for x, y in zip(line["x"], line["y"], strict=True) if y is None]
    more = f" and {len(epochs) - 3} more" if len(epochs) > 3 else ""
    return f"epoch{'s' if len(epochs) > 1 else ''} {', '.join(epochs[:3])}{more}" if epochs else ""


def _by_stage(
    groups: Groups, section: str, name: str, title: str, y_label: str, values: Callable[[Run], list[float]], note: str
) -> Plot:
    series: dict[str, dict[str, list[Any]]] = {}
    for label, runs in groups.items():
        columns = zip(*(values(run) for run in runs), strict=True)
        means = [finite(mean_and_spread(list(column))[0]) for column in columns]
        series[label] = {"x": [f"stage {k}" for k in range(len(means))], "y": means}
    return Plot(name, title, "", y_label, series, "bars", note, section)


def _memory_by_stages(collection: Collection, groups: Groups) -> list[Plot]:
    """The largest stage's memory against K: a line for each method and A, and one for A = K."""
    lines: dict[str, dict[int, list[Run]]] = {}
    several = len({run.cell.num_microbatches for run in collection.runs}) > 1
    for runs in groups.values():
        cell, name = runs[0].cell, collection.label(runs[0], short=True)
        lines.setdefault(f"{name} A={cell.num_microbatches}" if several else name, {})[cell.stages] = runs
        if several and cell.num_microbatches == cell.stages:
            lines.setdefault(f"{name} A=K", {})[cell.stages] = runs
    series: dict[str, dict[str, list[Any]]] = {}
    for label, by_stages in lines.items():
        if len(by_stages) > 1:
            points = [
                mean_and_spread([max(peak_bytes(of(run))) / 1e6 for run in by_stages[k]]) for k in sorted(by_stages)
            ]
            series[label] = {"x": sorted(by_stages), **_band(points)}
    title = "Memory of the largest stage, at most"
    return [Plot("memory-by-stages", title, "stages (K)", "MB", series, section=MEMORY)]


def _times(groups: Groups) -> Plot:
    points = [mean_and_spread([1e3 * of(run)["minibatch_s"] for run in runs]) for runs in groups.values()]
    return Plot(
        "time", "Time of a mini-batch", "ms", "", {"median over epochs": {"x": list(groups), **_band(points)}}, "rows",
        "In one process for all stages, unless the settings below say workers. Lines: one standard deviation over seeds.", TIME,
    )  # fmt: skip


def _delays(groups: Groups, name: str, title: str) -> Plot:
    series: dict[str, dict[str, list[Any]]] = {}
    for label, runs in groups.items():
        counts = {int(d): n for d, n in of(runs[0])["stages"][0]["delays"].items()}
        total = max(1, sum(counts.values()))
        series[label] = {"x": sorted(counts), "y": [100 * counts[d] / total for d in sorted(counts)]}
    note = "Counted from the run, start-up and flush included."
    return Plot(name, title, "updates", "% of micro-batches", series, "bars", note, DELAY)


def _frontier(collection: Collection, groups: Groups) -> list[Plot]:
    """Accuracy at the end against the largest delay: a point for each K and A of a method."""
    if len(groups) < 2:
        return []
    series: dict[str, dict[str, list[Any]]] = {}
    for runs in groups.values():
        delay = max(largest_delay(of(run)) for run in runs)
        accuracies = [100 * of(run)["test_accuracy"] for run in runs]
        add_point(series, collection.label(runs[0], short=True), delay, accuracies)
    note = "A point for each K and A: what a delay costs, and what a method gives back. Lines: one standard deviation over seeds."
    title = "Accuracy at the end, by delay"
    return [Plot("frontier", title, "largest delay (updates)", "accuracy (%)", series, "points", note, DELAY)]


def add_point(series: dict[str, dict[str, list[Any]]], label: str, x: Any, values: list[float]) -> None:
    """The mean of some values, and their band of one standard deviation, as another point of a series."""
    line = series.setdefault(label, {"x": [], "y": [], "low": [], "high": []})
    line["x"].append(x)
    for key, numbers in _band([mean_and_spread(values)]).items():
        line[key] += numbers


def _delay_of(stage: int, delay: int, read: float, stale: float) -> float:
    return float(delay) if stage == 0 else math.nan


def _error_of(stage: int, delay: int, read: float, stale: float) -> float:
    return read / stale if stale > 0 else math.nan


def _over_time(
    groups: Groups, name: str, title: str, y_label: str, value: Callable[[int, int, float, float], float], note: str
) -> Plot:
    """Of the micro-batches that were looked at, the mean of those of each mini-batch, over stages and seeds."""
    series: dict[str, dict[str, list[Any]]] = {}
    for label, runs in groups.items():
        at: dict[int, list[float]] = {}
        for run in runs:
            for stage in of(run)["stages"]:
                for minibatch, delay, read, stale in stage["prediction_errors"]:
                    if math.isfinite(number := value(stage["stage"], delay, read, stale)):
                        at.setdefault(int(minibatch), []).append(number)
        if at:
            series[label] = {"x": sorted(at), "y": [finite(math.fsum(at[b]) / len(at[b])) for b in sorted(at)]}
    return Plot(name, title, "mini-batch", y_label, series, note=note, section=DELAY)


def _timeline(label: str, run: Run) -> Plot:
    """What ran when, for some mini-batches from the middle of the run; milliseconds. Of replicas the first."""
    lanes: dict[tuple[int, int], str] = {}
    trace = run.read_trace()
    for e in trace:
        if e.get("name") == "thread_name" and e["args"]["name"].startswith("stage "):
            first = next((pid for (pid, _), lane in lanes.items() if lane == e["args"]["name"]), e["pid"])
            if first == e["pid"]:
                lanes[e["pid"], e["tid"]] = e["args"]["name"]
    spans = [e for e in trace if e.get("ph") == "X" and (e["pid"], e["tid"]) in lanes]
    spans.sort(key=lambda e: float(e["ts"]))
    length = 1e3 * MINIBATCHES_SHOWN * 1e3 * float(of(run)["minibatch_s"])
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
    note = "Measured, from the middle of the run. The whole of it is the run's trace.json, for ui.perfetto.dev."
    return Plot(name, label, "ms", "stage", series, "timeline", note, TIMELINES)


def _band(points: list[tuple[float, float]]) -> dict[str, list[Any]]:
    return {
        "y": [finite(mean) for mean, _ in points],
        "low": [finite(mean - spread) for mean, spread in points],
        "high": [finite(mean + spread) for mean, spread in points],
    }


def finite(value: float) -> float | None:
    """None for what JSON has no word for."""
    return value if math.isfinite(value) else None
