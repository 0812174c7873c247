"""The first paragraph of a report: what was compared, and the verdict in a sentence; then a line for each method.

A difference to bp is that of the means over seeds. Its spread is the root of the sum of both squared standard deviations:
a difference of at most that is not told from chance, and neither is one of a single seed, whose spread is not known.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import date
from typing import NamedTuple

from ..methods import get_method
from ..train.comparison import mean_and_spread, mean_score, mean_text, peak_bytes
from ..train.config import METRICS, PROGRAM
from ..train.scores.against_backprop import BACKPROP
from .collect import Collection, Run
from .looks import method_look
from .repeating import parse_cell

_MOST_LISTED = 3  # settings of a method whose numbers its line lists
_MOST_DETAILED = 3  # methods of a kind whose differences the verdict lists


class MethodLine(NamedTuple):
    """The line of a method: its name and colour, and what it is and came to."""

    method: str
    colour: str
    text: str


@dataclass(frozen=True)
class Measure:
    """What the runs are judged by.

    Attributes:
        name: in words.
        key: name in a line of ``metrics.jsonl``.
        text: mean and spread of values.
        size: a difference, which is not negative.
    """

    name: str
    key: str
    text: Callable[[Sequence[float]], str]
    size: Callable[[float], str]

    def values(self, runs: Sequence[Run]) -> list[float]:
        """The value of each run after its last epoch."""
        return [float(run.metrics[-1][self.key]) for run in runs]


@dataclass(frozen=True)
class Result:
    """A finished group of runs, and its difference to bp.

    Attributes:
        where: what tells the group from others of its method.
        values: the measure of each run.
        base: the same of bp with the same settings; empty: there is none.
        diverged: whether a measure or a loss is not a number.
    """

    method: str
    where: str
    runs: tuple[Run, ...]
    values: tuple[float, ...]
    base: tuple[float, ...]
    base_runs: tuple[Run, ...]

    @property
    def diverged(self) -> bool:
        return not all(map(math.isfinite, [*self.values, *(run.metrics[-1]["test_loss"] for run in self.runs)]))

    @property
    def gap(self) -> float:
        """The difference of the means."""
        return mean_and_spread(self.values)[0] - mean_and_spread(self.base)[0]

    @property
    def spread(self) -> float:
        """Of the difference; nan where it is not known."""
        return math.hypot(*(mean_and_spread(values)[1] for values in (self.values, self.base)))

    @property
    def kind(self) -> str:
        """What the difference is."""
        if self.diverged:
            return "diverged"
        if not self.base or not all(map(math.isfinite, self.base)):
            return "alone"
        if self.gap == 0:
            return "equal"
        if math.isnan(self.spread):
            return "unknown"
        return "within" if abs(self.gap) <= self.spread else "lower" if self.gap < 0 else "higher"


def measure_of(collection: Collection) -> Measure:
    """The score of the runs; of text the loss."""
    if all(run.config.get("data") == "text" for run in collection.runs):
        return Measure("test loss", "test_loss", lambda values: mean_text(values, 3), lambda gap: _size(gap, 3))
    name = collection.score
    if name in METRICS:
        return Measure(
            f"test {name}",
            "test_accuracy",
            lambda values: mean_score(name, values),
            lambda gap: f"{_size(100 * gap, 2)} points",
        )
    return Measure(f"test {name}", "test_accuracy", mean_text, lambda gap: f"{gap:.3g}")


def _size(gap: float, digits: int) -> str:
    """A difference that is not zero, and does not look like it."""
    least = 10.0**-digits
    return f"less than {least:.{digits}f}" if 0 < gap < least / 2 else f"{gap:.{digits}f}"


def results_of(collection: Collection, measure: Measure) -> list[Result]:
    """The finished groups, in the order of the report."""
    results = []
    for label, runs in collection.groups().items():
        if not runs[0].summary:
            continue
        base = collection.baseline(runs)
        where = label.removeprefix(runs[0].cell.method).strip().replace(" A=", "\N{NO-BREAK SPACE}A=")
        values, of_base = (tuple(measure.values(some)) for some in (runs, base))
        results.append(Result(runs[0].cell.method, where, tuple(runs), values, of_base, tuple(base)))
    return results


def what_was_compared(collection: Collection) -> str:
    """Which methods trained what, in how many stages and micro-batches, how long, with how many seeds, and when."""
    runs, groups = collection.runs, collection.groups()
    models, data = (_listed(dict.fromkeys(named(run, key) for run in runs)) for key in ("model", "data"))
    methods = list(dict.fromkeys(run.cell.method for run in runs))
    stages = sorted({run.cell.stages for run in runs})
    parts = sorted({run.cell.num_microbatches for run in runs})
    epochs = sorted({int(group[-1].metrics[-1]["epoch"]) for group in groups.values()})
    seeds = sorted({len({run.cell.seed for run in group}) for group in groups.values()})
    settings = [
        f"{_numbers([n for n in stages if n]) or 'an unknown number of'} {_plural('stage', stages)} (K)",
        "as many micro-batches (A) as stages"
        if parts != [1] and all(run.cell.num_microbatches == run.cell.stages for run in runs)
        else f"{_numbers(parts)} {_plural('micro-batch', parts)} (A)",
        f"for {_numbers(epochs)} {_plural('epoch', epochs)}",
        f"{_numbers(seeds)} {_plural('seed', seeds)}" + (" each" if len(groups) > 1 else ""),
    ]
    who = f"Compared: {_listed(methods)}" if len(methods) > 1 else f"One method: {methods[0]}"
    return (
        f"{who}, training {models} on {data}, with {', '.join(settings)}"
        f"{_processes(runs)}; {_days([run.ended for run in runs])}."
    )


def named(run: Run, key: str) -> str:
    """The model or the data of a run; those of a program of the user's may have no name."""
    name = str(run.config.get(key, "?"))
    return f"the program's {key}" if name == "own" and PROGRAM in run.config else name


def verdict(collection: Collection) -> str:
    """What came of it, in a sentence."""
    measure = measure_of(collection)
    results = results_of(collection, measure)
    if not results:
        return "none yet, as no run is finished."
    clauses = _clauses(results, measure)
    by_bp = any(result.kind not in ("alone", "diverged") for result in results if result.method != BACKPROP)
    whole_bp = any(result.method == BACKPROP and not result.diverged for result in results)
    if not clauses or not (by_bp or whole_bp):
        return f"{_without_bp(results, measure)}{_missing(collection, results)}."
    return f"in {measure.name}, {'; '.join(clauses)}{_missing(collection, results)}."


def _clauses(results: Sequence[Result], measure: Measure) -> list[str]:
    """What the methods' differences to bp are, the largest first: a clause for all methods of a kind."""
    by_method: dict[str, list[Result]] = {}
    for result in results:
        if result.method != BACKPROP and result.kind != "alone":
            by_method.setdefault(result.method, []).append(result)
    by_kind: dict[str, dict[str, list[Result]]] = {}
    for method, own in by_method.items():
        by_kind.setdefault(_kind_of_all(own), {})[method] = own
    clauses = []
    for kind in ("diverged", "lower", "higher", "both", "unknown", "within", "equal"):
        if methods := by_kind.get(kind):
            shown, most = methods, ""
            if len(methods) > _MOST_DETAILED and kind != "diverged":
                kinds = ("lower", "higher") if kind == "both" else (kind,)
                far = max(methods, key=lambda name: max(abs(r.gap) for r in methods[name] if r.kind in kinds))
                shown, most = {far: methods[far]}, "the most, "
            details = [_detail(method, own, kind, measure, named=len(methods) > 1) for method, own in shown.items()]
            clauses.append(_said(kind, list(methods), [most + detail for detail in details if detail]))
    return clauses


def _kind_of_all(results: Sequence[Result]) -> str:
    """The kind of a method, from those of its settings: the most that can be told of it."""
    kinds = {result.kind for result in results}
    if {"lower", "higher"} <= kinds:
        return "both"
    return next(kind for kind in ("diverged", "lower", "higher", "unknown", "within", "equal") if kind in kinds)


def _detail(method: str, results: Sequence[Result], kind: str, measure: Measure, *, named: bool) -> str:
    """The largest difference of a kind, and where it is."""
    own = [result for result in results if kind in (result.kind, "both") and result.kind in ("lower", "higher", kind)]
    if kind == "equal":
        return ""
    some = f" in {len(own)} of {len(results)} settings" if len(own) < len(results) else ""
    if kind == "diverged":
        text = "" if len(results) == 1 else some.strip() or f"in all {len(results)} settings"
    else:
        shown = [
            max((result for result in own if (result.gap < 0) == below), key=lambda result: abs(result.gap))
            for below in (True, False)
            if any((result.gap < 0) == below for result in own)
        ]
        shown = shown if kind == "both" else [max(shown, key=lambda result: abs(result.gap))]
        signs = [result.gap < 0 for result in own]
        text = " and ".join(
            ("up to " if signs.count(result.gap < 0) > 1 else "") + _difference(result, measure) for result in shown
        )
        text += f",{some}" if some and kind != "both" else ""
        largest = max((result for result in results if result.kind == "within"), key=lambda r: abs(r.gap), default=None)
        if largest is not None and abs(largest.gap) > max(abs(result.gap) for result in shown):
            text += f", and {_difference(largest, measure)}, which is within the spread"
    return f"{method}: {text}" if named and text else text


def _difference(result: Result, measure: Measure) -> str:
    return f"{measure.size(abs(result.gap))} {'lower' if result.gap < 0 else 'higher'}{_at(result.where)}"


def _said(kind: str, methods: list[str], details: list[str]) -> str:
    names, one = _listed(methods), len(methods) == 1
    ends = "ends" if one else "end"
    words = {
        "diverged": f"{names} diverged",
        "lower": f"{names} {ends} lower than bp by more than the spread over seeds",
        "higher": f"{names} {ends} higher than bp by more than the spread over seeds",
        "both": f"{names} {ends} lower or higher than bp, by setting, by more than the spread over seeds",
        "unknown": f"that {names} {'differs' if one else 'differ'} from bp may be chance, as one seed has no spread",
        "within": f"{names} cannot be told from bp, as the difference is within the spread over seeds",
        "equal": f"{names} {ends} exactly as bp",
    }[kind]
    return words + (f" ({'; '.join(details)})" if details else "")


def _without_bp(results: Sequence[Result], measure: Measure) -> str:
    """The verdict where no method can be held against bp."""
    whole = [result for result in results if not result.diverged]
    if not whole:
        return f"every run diverged: the {measure.name} or the loss is not a number"
    if len(results) == 1:
        (only,) = results
        end = f"it ends at a {measure.name} of {measure.text(only.values)}"
        return f"{only.method} alone was trained, so there is nothing to compare it with; {end}"
    if all(result.method == BACKPROP for result in results):
        ends = ", ".join(f"{measure.text(result.values)}{_at(result.where)}" for result in results)
        return f"bp alone was trained, so there is no method to compare with it; it ends at a {measure.name} of {ends}"
    why = "without a finished run of bp with the same settings"
    if any(result.method == BACKPROP and result.diverged for result in results):
        why = "as bp diverged"
    diverged = dict.fromkeys(_name(result) for result in results if result.diverged and result.method != BACKPROP)
    more = f"; {_listed(diverged)} diverged" if diverged else ""
    return f"{why}, what the methods lose against backpropagation is not known; {_best(whole, measure)}{more}"


def _best(results: Sequence[Result], measure: Measure) -> str:
    """The best of some results and how far the next one is, where it is known what is better."""
    if len(results) == 1:
        return f"{_name(results[0])} ends at a {measure.name} of {measure.text(results[0].values)}"
    lowest = measure.key == "test_loss" or any(run.config.get("best") == "lowest" for run in results[0].runs)
    ordered = sorted(results, key=lambda result: mean_and_spread(result.values)[0], reverse=not lowest)
    first = ordered[0]
    second = replace(ordered[1], base=first.values)
    gap = f"{measure.size(abs(second.gap))} from the next, {_name(second)}"
    told = {
        "equal": f"as does {_name(second)}",
        "unknown": f"{gap}, and with one seed it is not known whether that is more than chance",
        "within": f"{gap}, which is within the spread over seeds",
    }.get(second.kind, f"{gap}, which is more than the spread over seeds")
    return f"the {'lowest' if lowest else 'highest'} {measure.name} is that of {_name(first)}, {measure.text(first.values)}, {told}"


def _missing(collection: Collection, results: Sequence[Result]) -> str:
    """The methods of which no run is finished."""
    known = {result.method for result in results}
    cells = (parse_cell(path.name) for path in collection.without_numbers)
    begun = [run.cell.method for run in collection.runs] + [cell.method for cell in cells if cell is not None]
    missing = [method for method in dict.fromkeys(begun) if method not in known]
    return f"; of {_listed(missing)} no run is finished" if missing else ""


def method_lines(collection: Collection) -> list[MethodLine]:
    """A line for each method: what it is, what it ends with, and the memory and time that it takes."""
    measure = measure_of(collection)
    by_method: dict[str, list[Result]] = {}
    for result in results_of(collection, measure):
        by_method.setdefault(result.method, []).append(result)
    lines = []
    for method in dict.fromkeys(run.cell.method for run in collection.runs):
        own = by_method.get(method, [])
        parts = [
            _description(method),
            *([_ends(own, measure), _memory(own), *_time(own)] if own else ["No run is finished."]),
        ]
        lines.append(MethodLine(method, method_look(method).colour, " ".join(part for part in parts if part)))
    return lines


def _description(method: str) -> str:
    try:
        return (get_method(method).__doc__ or "").strip().split("\n")[0]
    except ValueError:  # of another version, or of the user's
        return ""


def _ends(results: Sequence[Result], measure: Measure) -> str:
    name = measure.name.capitalize()
    if len(results) > _MOST_LISTED:
        whole = [mean_and_spread(result.values)[0] for result in results if not result.diverged]
        bounds = f" {measure.text([min(whole)])} to {measure.text([max(whole)])}" if whole else ""
        diverged = len(results) - len(whole)
        more = f", {diverged} diverged" if diverged else ""
        return f"{name}{bounds} in {len(results)} settings{more}."
    ends = []
    for result in results:
        gap = ""
        if result.method != BACKPROP and result.kind in ("lower", "higher", "within", "unknown", "equal"):
            sign = "lower" if result.gap < 0 else "higher"
            gap = f" ({'that of bp' if result.gap == 0 else f'{measure.size(abs(result.gap))} {sign} than bp'})"
        ends.append(f"{'diverged' if result.diverged else measure.text(result.values)}{_at(result.where)}{gap}")
    return f"{name} {', '.join(ends)}."


def _memory(results: Sequence[Result]) -> str:
    """The largest stage of the setting that takes the most, beside bp's at the same."""
    most = max(results, key=lambda result: _largest(result.runs))
    base = f" (bp {_largest(most.base_runs):.3g})" if most.base_runs and most.method != BACKPROP else ""
    return f"Its largest stage holds {_largest(most.runs):.3g} MB at most{base}{_at(most.where)}."


def _largest(runs: Iterable[Run]) -> float:
    return max(max(peak_bytes(run.summary)) for run in runs if run.summary) / 1e6


def _time(results: Sequence[Result]) -> list[str]:
    """The time of a mini-batch where every stage has a process; in one process it is not that of the method."""
    measured = [result for result in results if all(run.in_workers for run in result.runs)]
    if not 0 < len(measured) <= _MOST_LISTED:
        return []
    times = [
        mean_text([1e3 * run.summary["minibatch_s"] for run in result.runs if run.summary], unit=" ms")
        + _at(result.where)
        for result in measured
    ]
    return [f"A mini-batch takes {', '.join(times)}."]


def _processes(runs: Sequence[Run]) -> str:
    stages = [run for run in runs if run.summary and run.cell.stages > 1]
    alone = {not run.in_workers for run in stages}
    if alone == {True}:
        return ", all stages in one process"
    return ", a process for each stage" if alone == {False} else ""


def _days(days: Sequence[date]) -> str:
    first, last = min(days), max(days)
    return f"ended on {_day(last)}" if first == last else f"ended from {_day(first)} to {_day(last)}"


def _day(day: date) -> str:
    return f"{day.day} {day:%B %Y}"


def _name(result: Result) -> str:
    return f"{result.method} {result.where}".strip()


def _at(where: str) -> str:
    """``(linear) K=2`` as `` with linear at K=2``."""
    prediction, _, sizes = where.removeprefix("(").partition(")") if where.startswith("(") else ("", "", where)
    return (f" with {prediction}" if prediction else "") + (f" at {sizes.strip()}" if sizes.strip() else "")


def _listed(words: Iterable[str]) -> str:
    """``a, b and c``"""
    *first, last = words
    return f"{', '.join(first)} and {last}" if first else last


def _numbers(numbers: Sequence[int]) -> str:
    return _listed(map(str, numbers)) if numbers else ""


def _plural(word: str, numbers: Sequence[int]) -> str:
    return word if list(numbers) == [1] else word + ("es" if word.endswith("batch") else "s")
