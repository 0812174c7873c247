"""The figures of a report: which ones the runs have numbers for, and these numbers.

With many groups of runs there is a figure (a facet) for every number of stages and micro-batches, all on one scale.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, TypeAlias

from ..methods import get_method
from ..train.comparison import Summary, largest_delay, mean_and_spread, peak_bytes
from ..train.config import METRICS
from ..typing import Json
from .collect import Collection, Groups, Run
from .figures import Plot, Series
from .looks import method_looks

MINIBATCHES_SHOWN = 6  # in a timeline
_MOST_GROUPS = 6  # in a figure without facets
_MOST_TIMELINES = 12
# A figure of several with the same kind of number: (suffix of its name, suffix of its title, groups).
Facet: TypeAlias = tuple[str, str, Groups]

SECTIONS = ("Accuracy and loss", "Memory and time", "Delay and prediction", "What ran when")
LEARNING, MEMORY_AND_TIME, DELAY, TIMELINES = SECTIONS


def make_plots(collection: Collection) -> list[Plot]:
    """Every figure that the runs have numbers for, section by section."""
    groups = collection.groups()
    finished = {label: done for label, runs in groups.items() if (done := [run for run in runs if run.summary])}
    facets = _facets(collection, finished)
    plots = [
        *_curves(_facets(collection, groups, backprop=True), collection.score),
        *_faceted(
            Plot("memory", "Memory of each stage, at most", "", "MB", {}, "bars",
                 "Weights, optimizer state, gradients, the predicted copy, and the most activations at once.", MEMORY_AND_TIME),
            facets, partial(_by_stage, values=lambda run: [size / 1e6 for size in peak_bytes(summary_of(run))]),
        ),
        *_memory_by_stages(collection, finished),
        *_times(finished),
        *_utilization(collection, finished),
        *_faceted(
            Plot("delay", "Delay at stage 0", "updates", "% of micro-batches", {}, "bars",
                 "Counted from the run, start-up and flush included.", DELAY),
            facets, _delays,
        ),
        *_frontier(collection, finished),
        *_faceted(
            Plot("delay-over-time", "Delay over time, at stage 0", "mini-batch", "updates", {},
                 note="Of the micro-batches that --prediction-error-every looked at.", section=DELAY),
            facets, partial(_over_time, value=lambda stage, delay, read, stale: delay if stage == 0 else math.nan),
            from_zero=True,
        ),
        *_faceted(
            Plot("prediction-error", "How well weights are predicted", "mini-batch", "error, relative", {},
                 note="Distance of the weights a forward read from those of its backward, over that of the weights as they were: "
                 "below 1 the prediction helps, 1 is none.", section=DELAY),
            facets, partial(_over_time, value=lambda stage, delay, read, stale: read / stale if stale > 0 else math.nan),
            from_zero=True,
        ),
        *_timelines(finished),
    ]  # fmt: skip
    shorts = dict.fromkeys(collection.label(run, short=True) for runs in groups.values() for run in runs)
    sized = (label for plot in plots if plot.name == "memory-by-stages" for label in plot.series)
    styles = method_looks(sized) | method_looks(groups) | method_looks(shorts)
    return [
        plot if plot.kind == "timeline" else dataclasses.replace(plot, styles=styles) for plot in plots if plot.series
    ]


def summary_of(run: Run) -> Summary:
    """The summary of a finished run."""
    assert run.summary is not None
    return run.summary


def _facets(collection: Collection, groups: Groups, *, backprop: bool = False) -> list[Facet]:
    """The groups by figure: all in one, or those of each number of stages and micro-batches.

    ``backprop``: a facet without bp or gpipe gets a synchronous group of another K, as its numbers are the same there.
    """
    by_size: dict[tuple[int, int], Groups] = {}
    for runs in groups.values():
        cell, label = runs[0].cell, collection.label(runs[0], short=True)
        by_size.setdefault((cell.stages, cell.num_microbatches), {})[label] = runs
    if len(groups) <= _MOST_GROUPS or len(by_size) == 1:
        return [("", "", groups)] if groups else []
    facets = []
    synchronous = {label: runs for label, runs in groups.items() if _flushes(runs[0])}
    for (stages, parts), shown in by_size.items():
        if backprop and synchronous and not any(_flushes(runs[0], whole=True) for runs in shown.values()):
            label = min(synchronous, key=lambda label: synchronous[label][0].cell.num_microbatches != parts)
            shown = {label: synchronous[label], **shown}
        facets.append((f"-K{stages or 'unknown'}-A{parts}", f", K={stages or '?'}, A={parts}", shown))
    return facets


def _faceted(
    template: Plot, facets: Sequence[Facet], series: Callable[[Groups], Series], *, from_zero: bool = False
) -> list[Plot]:
    """A figure like ``template`` for each facet, with the series of its groups, all on one scale."""
    plots = (
        dataclasses.replace(template, name=template.name + suffix, title=template.title + where, series=series(groups))
        for suffix, where, groups in facets
    )
    return one_scale(plots, from_zero=from_zero)


def one_scale(plots: Iterable[Plot], *, from_zero: bool = False) -> list[Plot]:
    """Figures of the same kind with the same scale of y, to be compared by eye. The scale of bars begins at zero."""
    plots = list(plots)
    lines = [line for plot in plots for line in plot.series.values()]
    highs, lows = ([y for line in lines for y in line.get(key, line["y"]) if y is not None] for key in ("high", "low"))
    if not highs or (len(plots) < 2 and not from_zero):
        return plots
    zero = from_zero or plots[0].kind == "bars"
    low = 0.0 if zero else min(lows) - 0.05 * (max(highs) - min(lows))
    high = max(highs) + 0.05 * (max(highs) - low)
    return [dataclasses.replace(plot, limits=(low, high if high > low else low + 1)) for plot in plots]


def _flushes(run: Run, *, whole: bool = False) -> bool:
    """Whether the run's method is synchronous; ``whole``: with whole backwards."""
    try:
        row = get_method(run.cell.method)
        return row.flush and not (whole and row.split_backward)
    except ValueError:  # a method that this version does not know
        return False


def score_heading(score: str) -> str:
    """``accuracy, %``, or the name of a metric of the user's."""
    return f"{score}, %" if score in METRICS else score


def _score_plot(score: str) -> tuple[Plot, str, float]:
    title, y = f"Test {score}", f"{score} (%)" if score in METRICS else score
    return Plot("accuracy", title, "epoch", y, {}, section=LEARNING), "test_accuracy", 100 if score in METRICS else 1


def _curves(facets: Sequence[Facet], score: str) -> list[Plot]:
    """Accuracy and losses by epoch."""
    plots = []
    for template, key, factor in (
        _score_plot(score),
        (Plot("test-loss", "Test loss", "epoch", "loss", {}, section=LEARNING), "test_loss", 1),
        (Plot("train-loss", "Training loss", "epoch", "loss", {}, section=LEARNING), "train_loss", 1),
    ):
        curves = _faceted(template, facets, partial(_by_epoch, key=key, factor=factor))
        for plot, (_, _, groups) in zip(curves, facets, strict=True):
            seeds = max(map(len, groups.values()))
            notes = ["Bands: one standard deviation over seeds."] if seeds > 1 else []
            if gaps := [f"{label} ({epochs})" for label, line in plot.series.items() if (epochs := _gaps(line))]:
                notes.append(f"Not finite, and so not drawn: {', '.join(gaps)}.")
            plots.append(dataclasses.replace(plot, note=" ".join(notes)))
    return plots


def _by_epoch(groups: Groups, key: str, factor: float) -> Series:
    """A metric by epoch, as far as all runs of a group have come."""
    series: Series = {}
    for label, runs in groups.items():
        epochs = list(zip(*(run.metrics for run in runs), strict=False))
        band = _band(([factor * line[key] for line in lines] for lines in epochs), _most(key, factor))
        series[label] = {"x": [int(lines[0]["epoch"]) for lines in epochs], **band}
    return series


def _most(key: str, factor: float) -> float:
    """The most that a metric can be: 100 of a share in per cent."""
    return 100.0 if key == "test_accuracy" and factor == 100 else math.inf


def _gaps(line: dict[str, list[Any]]) -> str:
    """The epochs whose number is not finite."""
    epochs = [str(x) for x, y in zip(line["x"], line["y"], strict=True) if y is None]
    more = f" and {len(epochs) - 3} more" if len(epochs) > 3 else ""
    return f"epoch{'s' if len(epochs) > 1 else ''} {', '.join(epochs[:3])}{more}" if epochs else ""


def _by_stage(groups: Groups, values: Callable[[Run], list[float]]) -> Series:
    """Means of a number of each stage."""
    series: Series = {}
    for label, runs in groups.items():
        means = _band(zip(*map(values, runs), strict=True))["y"]
        series[label] = {"x": [f"stage {k}" for k in range(len(means))], "y": means}
    return series


def _percent_at_work(run: Run) -> list[float]:
    stages = summary_of(run)["stages"]
    return [100 * stage["busy"]["busy"] / max(1e-9, stage["busy"]["elapsed"]) for stage in stages]


def _memory_by_stages(collection: Collection, groups: Groups) -> list[Plot]:
    """The largest stage's memory against K: a line for each method and A, and one for A = K."""
    lines: dict[str, dict[int, list[Run]]] = {}
    several = len({run.cell.num_microbatches for run in collection.runs}) > 1
    for runs in groups.values():
        cell, name = runs[0].cell, collection.label(runs[0], short=True)
        lines.setdefault(f"{name} A={cell.num_microbatches}" if several else name, {})[cell.stages] = runs
        if several and cell.num_microbatches == cell.stages:
            lines.setdefault(f"{name} A=K", {})[cell.stages] = runs
    series: Series = {}
    for label, by_stages in lines.items():
        if len(by_stages) > 1:
            peaks = ([max(peak_bytes(summary_of(run))) / 1e6 for run in by_stages[k]] for k in sorted(by_stages))
            series[label] = {"x": sorted(by_stages), **_band(peaks)}
    title = "Memory of the largest stage, at most"
    return [Plot("memory-by-stages", title, "stages (K)", "MB", series, section=MEMORY_AND_TIME)]


def _by_processes(groups: Groups) -> list[tuple[str, str, Groups]]:
    """(suffix of a name, of a title, groups) of runs with a process for each stage, and of those in one process."""
    workers = {label: runs for label, runs in groups.items() if all(run.in_workers for run in runs)}
    alone = {label: runs for label, runs in groups.items() if label not in workers}
    suffix = "-one-process" if workers and alone else ""
    return [("", "", workers), (suffix, ", in one process", alone)]


def _times(groups: Groups) -> list[Plot]:
    """The time of a mini-batch, a row for each group; that of workers and that of one process are not compared."""
    plots = []
    for suffix, where, shown in _by_processes(groups):
        band = _band([1e3 * summary_of(run)["minibatch_s"] for run in runs] for runs in shown.values())
        series: Series = {"median over epochs": {"x": list(shown), **band}} if shown else {}
        several = any(len(runs) > 1 for runs in shown.values())
        note = "The median over epochs." + (" Lines: one standard deviation over seeds." if several else "")
        if where:
            note += " In one process the stages take turns, so that it is not the time on workers."
        plots.append(
            Plot(f"time{suffix}", f"Time of a mini-batch{where}", "ms", "", series, "rows", note, MEMORY_AND_TIME)
        )
    return plots


def _utilization(collection: Collection, groups: Groups) -> list[Plot]:
    """The share of the time that each stage is at work."""
    plots = []
    for suffix, where, shown in _by_processes(groups):
        note = "The others wait while a stage is at work." if where else "The rest of the time it waits."
        plots += _faceted(
            Plot(f"utilization{suffix}", f"Share of the time at work{where}", "", "%", {}, "bars", note, MEMORY_AND_TIME),
            _facets(collection, shown), partial(_by_stage, values=_percent_at_work),
        )  # fmt: skip
    return plots


def _delays(groups: Groups) -> Series:
    """The share of micro-batches with each delay, at stage 0 of a group's first run."""
    series: Series = {}
    for label, runs in groups.items():
        counts = {int(delay): count for delay, count in summary_of(runs[0])["stages"][0]["delays"].items()}
        total = max(1, sum(counts.values()))
        series[label] = {"x": sorted(counts), "y": [100 * counts[delay] / total for delay in sorted(counts)]}
    return series


def _frontier(collection: Collection, groups: Groups) -> list[Plot]:
    """Accuracy at the end against the largest delay: a point for each K and A of a method."""
    if len(groups) < 2:
        return []
    series: Series = {}
    plot, _, factor = _score_plot(collection.score)
    for runs in groups.values():
        delay = max(largest_delay(summary_of(run)) for run in runs)
        accuracies = [factor * summary_of(run)["test_accuracy"] for run in runs]
        add_point(series, collection.label(runs[0], short=True), delay, accuracies, _most("test_accuracy", factor))
    note = "A point for each K and A: what a delay costs, and what a method gives back. Lines: one standard deviation over seeds."
    title = f"{plot.y_label.removesuffix(' (%)').capitalize()} at the end, by delay"
    return [Plot("frontier", title, "largest delay (updates)", plot.y_label, series, "points", note, DELAY)]


def add_point(series: Series, label: str, x: Any, values: list[float], most: float = math.inf) -> None:
    """Append a point to a series: the mean of some values, with a band of one standard deviation up to ``most``."""
    line = series.setdefault(label, {"x": [], "y": [], "low": [], "high": []})
    for key, numbers in {"x": [x], **_band([values], most)}.items():
        line[key] += numbers


def _over_time(groups: Groups, value: Callable[[int, int, float, float], float]) -> Series:
    """A number of the measured micro-batches: its mean in each mini-batch, over stages and seeds.

    ``value``: (stage, delay, read, stale) -> the number; one that is not finite is left out.
    """
    series: Series = {}
    for label, runs in groups.items():
        numbers: dict[int, list[float]] = {}
        for stage in (stage for run in runs for stage in summary_of(run)["stages"]):
            for minibatch, delay, read, stale in stage["prediction_errors"]:
                if math.isfinite(number := value(stage["stage"], delay, read, stale)):
                    numbers.setdefault(int(minibatch), []).append(number)
        if numbers:
            ordered = sorted(numbers.items())
            means = [finite(math.fsum(values) / len(values)) for _, values in ordered]
            series[label] = {"x": [minibatch for minibatch, _ in ordered], "y": means}
    return series


def _timelines(groups: Groups) -> list[Plot]:
    """A timeline of the first traced run in each group."""
    traced = [(label, run) for label, runs in groups.items() for run in [r for r in runs if r.is_traced][:1]]
    return [_timeline(label, run) for label, run in traced[:_MOST_TIMELINES]]


_SPANS = {
    "F": "forward", "R": "forward, repeated", "B": "backward", "I": "backward, of the input", "W": "backward, of the weights",
    "U": "update", "wait": "waits for a message",
}  # fmt: skip


def _timeline(label: str, run: Run) -> Plot:
    """What ran when in milliseconds, for some mini-batches from the middle of the run, in the first replica."""
    lanes: dict[tuple[int, int], str] = {}
    trace = run.read_trace()
    for event in trace:
        if event.get("name") == "thread_name" and (stage := event["args"]["name"]).startswith("stage "):
            first = next((pid for (pid, _), name in lanes.items() if name == stage), event["pid"])
            if first == event["pid"]:
                lanes[event["pid"], event["tid"]] = stage
    spans = [event for event in trace if event.get("ph") == "X" and (event["pid"], event["tid"]) in lanes]
    spans.sort(key=lambda span: float(span["ts"]))
    length = 1e6 * MINIBATCHES_SHOWN * float(summary_of(run)["minibatch_s"])
    begin = float(spans[len(spans) // 2]["ts"]) if spans else 0.0
    series: Series = {}
    for kind, words in _SPANS.items():
        shown = [span for span in spans if span["cat"] == kind and begin <= float(span["ts"]) < begin + length]
        if shown:
            series[words] = {
                "x": [(float(span["ts"]) - begin) / 1e3 for span in shown],
                "y": [int(lanes[span["pid"], span["tid"]].split()[1]) for span in shown],
                "width": [float(span["dur"]) / 1e3 for span in shown],
            }
    name = "timeline-" + re.sub(r"[^A-Za-z0-9]+", "-", label).strip("-")
    note = "Measured, from the middle of the run. The whole of it is the run's trace.json, for ui.perfetto.dev."
    return Plot(name, label, "ms", "stage", series, "timeline", note, TIMELINES)


def _band(samples: Iterable[Sequence[float]], most: float = math.inf) -> dict[str, list[Json]]:
    """The mean of each point's values, and the band of one standard deviation around it (none for a single value).

    The band ends where values do: at zero where none is below it, as no loss and no share is, and at ``most``.
    """
    band: dict[str, list[Json]] = {"y": [], "low": [], "high": []}
    for values in samples:
        mean, spread = mean_and_spread(values)
        spread = 0.0 if len(values) == 1 else spread
        low = mean - spread
        if low < 0 <= min(values):
            low = 0.0
        high = most if mean + spread > most >= max(values) else mean + spread
        for key, value in zip(band, (mean, low, high), strict=True):
            band[key].append(finite(value))
    return band


def finite(value: float) -> float | None:
    """None for a number that is not finite, for which JSON has no word."""
    return value if math.isfinite(value) else None
