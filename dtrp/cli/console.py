"""What commands show: the progress of a run, live on a terminal and as plain lines elsewhere, and tables of results."""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
import time
from collections.abc import Callable, Collection, Sequence

from rich import box
from rich.console import Console, Group, RenderableType
from rich.filesize import decimal
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from ..methods import Method
from ..planning import Choice, Plan, Simulation
from ..schedule import cycle, lead, num_parts, steady_delay
from ..train import comparison
from ..train.comparison import (
    how_much_more,
    mean_score,
    mean_text,
    megabytes_by_stage,
    prediction_error,
    score_of,
    shown_delay,
    weight_distance,
)
from ..train.config import score_name, score_text
from ..train.results import EpochMetrics, TrainResult, describe_layers, summarize_delays
from ..train.scores.against_backprop import BACKPROP
from ..train.trainer import Reporter, Trainer
from .endings import lost_terminal_ignored

_LINE_EVERY_S = 30.0
_MEMORY = "memory by stage, MB"
_COMPARISON_WIDTH = 150  # in columns of text
_BLOCKS = "▁▂▃▄▅▆▇█"


class ConsoleReporter(Reporter):
    """Prints lines about a run, and a table of its stages at the end."""

    def __init__(self, console: Console, *, table: bool = True) -> None:
        self.console = console
        self.table = table

    def start(self, trainer: Trainer) -> None:
        config, data, pipe = trainer.config, trainer.source, trainer.pipe
        self._has_text = data.is_text and config.loss is None
        self._of_characters = config.data == "text"
        self._score = score_name(config.metric)
        processes = ""
        if not (pipe.is_first and pipe.is_last and config.replicas == 1):
            processes = " in a process each" + (f" and {config.replicas} replicas" if config.replicas > 1 else "")
        self.note(
            f"{config.model} on {config.data}: {data.num_train} training and {data.num_test} test {data.samples}{data.details}; "
            f"{config.method}, {pipe.num_stages} stage{'s' if pipe.num_stages > 1 else ''}{processes}, "
            f"{_minibatches(config.batch_size, _parts(trainer))}, {trainer.total_updates} updates"
            + (f"; {what_delay(pipe.method, pipe.num_stages, _parts(trainer))}" if pipe.num_stages > 1 else "")
        )

    def note(self, text: str) -> None:
        with lost_terminal_ignored():
            # A log keeps a note in a line.
            self.console.print(text, highlight=False, markup=False, soft_wrap=not self.console.is_terminal)

    def epoch(self, metrics: EpochMetrics) -> None:
        line = (
            f"epoch {metrics.epoch:3}  update {metrics.update:6}  train loss {metrics.train_loss:.4f}  "
            f"test loss {metrics.test_loss:.4f}  {self._perplexity(metrics)}{self._scores(metrics, width=7)}  "
            f"{metrics.samples_per_s:6.0f} samples/s  {metrics.elapsed_s:6.0f} s"
        )
        if len(line) > self.console.width:
            line = (
                f"epoch {metrics.epoch:3}  train {metrics.train_loss:.4f}  test {metrics.test_loss:.4f}  "
                f"{self._scores(metrics)}  {metrics.elapsed_s:.0f} s"
            )
        self.note(line)

    def _scores(self, metrics: EpochMetrics, separator: str = "  ", width: int = 0) -> str:
        """What a test tells beside the loss."""
        scores = {self._score: metrics.test_accuracy, **metrics.scores}
        return separator.join(f"{name} {score_text(name, value):>{width}}" for name, value in scores.items())

    def _perplexity(self, metrics: EpochMetrics) -> str:
        """The loss of text in its usual units; empty for images."""
        if not self._has_text:
            return ""
        loss = metrics.test_loss
        perplexity = math.exp(loss) if loss < 700 else math.inf
        bits = f"bits per character {loss / math.log(2):.3f}  " if self._of_characters else ""
        return f"perplexity {perplexity:.3f}  {bits}"

    def finish(self, result: TrainResult) -> None:
        if not self.table:
            return
        with lost_terminal_ignored():
            self.console.print(_stage_table(result))
        last = result.epochs[-1]
        skipped = [f"{len(s.skipped_updates)} at stage {s.stage}" for s in result.stages if s.skipped_updates]
        if skipped:
            self.note(f"updates left out, their gradient not being finite: {', '.join(skipped)}")
        if result.damaged:
            num, shown = len(result.damaged), "; ".join(result.damaged[:3]) + "; ..." * (len(result.damaged) > 3)
            self.note(
                f"{num} damaged file{'s' if num > 1 else ''}, in whose place others of the class were taken: {shown}"
            )
        speed = f"{result.samples_per_s:.0f} samples/s (median of the epochs)"
        self.note(f"{self._perplexity(last)}test {self._scores(last, ', ')}, {speed}")
        if result.config.out:
            self.note(f"written to {result.config.out}")


class PlainReporter(ConsoleReporter):
    """Prints lines for a log: after each epoch, and every half minute of a long epoch."""

    def start(self, trainer: Trainer) -> None:
        super().start(trainer)
        self._total = trainer.total_updates
        self._printed = self._began = time.perf_counter()
        self._samples = 0  # since the last line

    def update(self, epoch: int, update: int, loss: Callable[[], float], samples: int) -> None:
        now = time.perf_counter()
        self._samples += samples
        since = now - self._printed
        if since < _LINE_EVERY_S:
            return
        left = (now - self._began) / update * (self._total - update)
        speed = f"{self._samples / since:6.0f} samples/s"
        self.note(f"  update {update:6} of {self._total}  loss {loss():.4f}  {speed}  {left:6.0f} s left")
        self._printed, self._samples = now, 0


class LiveReporter(ConsoleReporter):
    """Shows two lines that refresh: the progress, and the curves of loss and accuracy."""

    def __enter__(self) -> LiveReporter:
        self._progress = Progress(
            TextColumn("epoch {task.fields[epoch]}"),
            BarColumn(bar_width=None),
            TextColumn("{task.completed}/{task.total}"),
            TextColumn("{task.fields[speed]} samples/s"),
            TimeRemainingColumn(),
            console=self.console,
            expand=True,
        )
        self._loss: float | None = None
        self._losses: list[float] = []
        self._accuracies: list[float] = []
        self._live = Live(console=self.console, transient=True, get_renderable=self._lines)
        self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        with lost_terminal_ignored():
            self._live.stop()

    def _lines(self) -> RenderableType:
        if self._loss is None:
            return self._progress
        texts = [f"loss {{}} {self._loss:.4f}"]
        if self._accuracies:
            texts.append(f"{self._score} {{}} {score_text(self._score, self._accuracies[-1])}")
        free = self.console.width - sum(map(len, texts)) + 2 * len(texts) - 2
        width = max(4, min(40, free // len(texts)))
        curves = (curve(values, width) for values in (self._losses, self._accuracies))
        shown = "  ".join(text.format(blocks) for text, blocks in zip(texts, curves, strict=False))
        return Group(self._progress, Text(shown, no_wrap=True))

    def start(self, trainer: Trainer) -> None:
        super().start(trainer)
        self._task = self._progress.add_task("", total=trainer.total_updates, epoch=1, speed="-")
        self._every, self._due = trainer.total_updates // 500, 0  # points of a curve: a few hundred in any run
        self._shown = self._since = time.perf_counter()
        self._samples = 0

    def update(self, epoch: int, update: int, loss: Callable[[], float], samples: int) -> None:
        now = time.perf_counter()
        self._samples += samples
        if now - self._shown < 0.2:  # reading the loss waits for the device
            return
        self._loss = loss()
        if update > self._due:
            self._losses.append(self._loss)
            self._due = update + self._every
        speed = f"{self._samples / (now - self._since):.0f}"
        self._progress.update(self._task, completed=update, epoch=epoch + 1, speed=speed)
        self._shown = now

    def epoch(self, metrics: EpochMetrics) -> None:
        super().epoch(metrics)
        self._accuracies.append(metrics.test_accuracy)
        self._progress.update(self._task, completed=metrics.update)
        self._samples, self._since = 0, time.perf_counter()

    def finish(self, result: TrainResult) -> None:
        self._live.stop()
        super().finish(result)


def curve(values: Sequence[float], width: int = 10) -> str:
    """A line of blocks whose heights show the values, or the means of ``width`` equal parts of them.

    >>> curve([0, 1, 2, 3, 4, 5, 6, 7])
    '▁▂▃▄▅▆▇█'
    """
    parts = min(width, len(values))
    bounds = [round(i * len(values) / parts) for i in range(parts + 1)] if parts else []
    means = [sum(values[a:b]) / (b - a) for a, b in itertools.pairwise(bounds)]
    known = [mean for mean in means if math.isfinite(mean)]
    if not known:
        return ""
    low, span = min(known), (max(known) - min(known)) or 1.0
    return "".join(_BLOCKS[round(7 * (mean - low) / span)] if math.isfinite(mean) else "?" for mean in means)


def make_reporter(*, table: bool = True, quiet: bool = False) -> LiveReporter | PlainReporter:
    """The reporter for standard output: live on a terminal that can refresh lines, else with plain lines.

    Args:
        table: whether to print a table at the end.
        quiet: whether to print plain lines on a terminal too.
    """
    console = Console(soft_wrap=False)
    if console.is_terminal and console.file.isatty() and not console.is_dumb_terminal and not quiet:
        return LiveReporter(console, table=table)
    return PlainReporter(_wide_console(), table=table)


def _parts(trainer: Trainer) -> int:
    """The number of micro-batches in a whole mini-batch; replicas all have as many, be their shards ever so small."""
    config, pipe = trainer.config, trainer.pipe
    if config.replicas > 1:
        return pipe.num_microbatches
    return num_parts(config.batch_size, pipe.num_microbatches, pipe.microbatch_samples)


def _minibatches(batch_size: int, num_microbatches: int) -> str:
    return f"mini-batches of {batch_size} in {_microbatches(num_microbatches)}"


def _microbatches(number: int) -> str:
    return f"{number} micro-batch{'es' if number > 1 else ''}"


def what_delay(method: Method, num_stages: int, num_microbatches: int) -> str:
    """What delay a number of micro-batches gives, and what another number would.

    >>> from dtrp import get_method
    >>> what_delay(get_method("dtrp"), 8, 8)
    'forwards read weights at most 2 updates old (--num-microbatches 1: 13)'
    """

    def delay(parts: int) -> int:
        return steady_delay(method, num_stages, 0, parts, 0)  # of the first stage, whose delay is the largest

    here, other = delay(num_microbatches), 1 if num_microbatches > 1 else num_stages
    if here == 0:
        return "forwards read the newest weights"
    line = f"forwards read weights at most {here} update{'s' if here > 1 else ''} old"
    return line if delay(other) == here else f"{line} (--num-microbatches {other}: {delay(other)})"


def _table(title: str | None, headings: Sequence[str], left: Collection[str] = ()) -> Table:
    """A table with these columns, of which some are aligned to the left and the others to the right."""
    table = Table(title=title, title_justify="left")
    for heading in headings:
        table.add_column(heading, justify="left" if heading in left else "right")
    return table


def _stage_table(result: TrainResult) -> Table:
    headings = ("stage", "layers", "parameters", "delay (updates)", "stash, peak", "stash + graph, peak")
    table = _table(f"{result.config.method}: the stages", headings, left=("layers",))
    for stage in result.stages:
        sizes = decimal(stage.memory["stash_peak"]), decimal(stage.activations_peak)
        delays = summarize_delays(stage.delays)
        table.add_row(str(stage.stage), describe_layers(stage.layers), f"{stage.parameters:,}", delays, *sizes)
    return table


def show_side_by_side(results: Sequence[TrainResult]) -> None:
    """Show runs of several methods with the same number of stages, a column for each."""
    console = Console() if Console().is_terminal else Console(width=100)
    stages = range(len(results[0].stages))
    table = _table("side by side", ("", *(result.config.method for result in results)), left=("",))
    table.add_row("test accuracy", *(f"{result.epochs[-1].test_accuracy:.2%}" for result in results))
    table.add_row("samples/s, one process", *(f"{result.samples_per_s:.0f}" for result in results), end_section=True)
    for k in stages:
        table.add_row(f"stage {k}: activations held, peak", *(decimal(r.stages[k].activations_peak) for r in results))
    totals = (decimal(sum(stage.activations_peak for stage in result.stages)) for result in results)
    table.add_row("all stages", *totals, end_section=True)
    for k in stages:
        table.add_row(f"stage {k}: delay (updates)", *(summarize_delays(r.stages[k].delays) for r in results))
    console.print(table)
    console.print(
        "In one process the stages take turns: nobody waits, and who repeats forwards takes longer. With a process for each stage "
        f"(dtrp train --workers {len(stages)}) backpropagation waits and dtrp does not.",
        highlight=False,
    )


def show_plan(plan: Plan) -> None:
    """Show the choices of a plan, and the alternatives."""
    console = _wide_console()
    row = plan.row
    splits = row.split_backward
    headings = ("stage", "layers", "keeps", "slot", "at work", "memory, at most")
    more = ("W of the backward", "lead", "order") if splits else ()
    stages = _table(f"{plan.method}: the stages", (*headings, *more), left=("layers", "keeps", "order"))
    for k, stage in enumerate(plan.stages):
        numbers = _seconds([stage.slot_s]), f"{stage.utilization:.0%}", decimal(stage.memory_bytes)
        order = lead(row, plan.num_workers, k), cycle(row, plan.num_workers, k)
        parts = (_known(stage.weight_share, ".0%"), *map(str, order)) if splits else ()
        stages.add_row(str(k), describe_layers(stage.layers), stage.keep, *numbers, *parts)
    console.print(stages)
    console.print(
        f"{_minibatches(plan.batch_size, plan.num_microbatches)}; {_order_text(plan.choice)}; "
        f"learning rate times {plan.lr_scale:g}"
        + (f", {plan.warmup_updates} updates of warm-up" if plan.warmup_updates else ""),
        highlight=False,
    )
    for title, choices in (
        ("the same job otherwise", (dataclasses.replace(plan.choice, method="this plan"), *plan.alternatives)),
        ("the lead", plan.leads),
        ("the mini-batch", plan.batches),
    ):
        if choices:
            console.print(_choices_table(title, choices))
    bandwidth = plan.bandwidth_bytes_s
    console.print(
        f"links: {_seconds([plan.latency_s])} a message, "
        + (
            "of a bandwidth that was not given or not measurable"
            if bandwidth is None
            else f"{decimal(round(bandwidth))}/s"
        ),
        highlight=False,
    )
    console.print(plan.advice, highlight=False)


def _order_text(row: Choice) -> str:
    if row.orders is not None:
        return "the orders of the table"
    return f"ahead {row.ahead:g}, {row.order.replace('-', ' ')}"


def _choices_table(title: str, choices: Sequence[Choice]) -> Table:
    headings = (
        "ahead", "order", "A", "mini-batch", "time", "spread", "samples/s", "memory, at most", "delay", "at work, each",
    )  # fmt: skip
    table = _table(title, ("method", *headings), left=("method", "order"))
    for choice in choices:
        table.add_row(
            choice.method, *_ahead_and_order(choice), str(choice.num_microbatches), str(choice.batch_size),
            _seconds([choice.minibatch_s]), _known(choice.spread, ".0%"), _known(choice.samples_per_s, ".0f"),
            decimal(choice.memory_bytes), str(choice.delay), _shares(choice.utilization),
        )  # fmt: skip
    return table


def _ahead_and_order(choice: Choice) -> tuple[str, str]:
    """The cells of a row; of leads and orders of its own those of the first stage, which has the largest delay."""
    if choice.leads is None or choice.orders is None:
        return f"{choice.ahead:g}", choice.order
    letters = choice.orders if isinstance(choice.orders, str) else choice.orders[0]
    return f"lead {choice.leads[0]}", letters


def show_simulations(rows: Sequence[tuple[str, Simulation]]) -> None:
    """Show what `simulate` returned, a row for each method."""
    headings = ["time a mini-batch", "whole run", "at work, each", "stash, peak", "delay (updates)"]
    sized = any(simulation.peak_bytes is not None for _, simulation in rows)
    table = _table(None, ["method", *headings, *(["memory, each"] if sized else [])], left=("method",))
    for name, simulation in rows:
        table.add_row(
            name,
            f"{simulation.minibatch_s:.6g}",
            f"{simulation.total_s:.6g}",
            _shares(tuple(simulation.utilization.values())),
            _few([str(peak) for peak in simulation.peak_stash.values()]),
            summarize_delays(dict(sorted(simulation.delays[0].items()))),
            *([_few([decimal(round(size)) for size in (simulation.peak_bytes or {}).values()])] if sized else []),
        )
    _wide_console().print(table)


def _wide_console() -> Console:
    """A console as wide as the terminal, or with room for every column in a log."""
    console = Console()
    return console if console.file.isatty() else Console(width=220)


def _seconds(values: Sequence[float]) -> str:
    """The mean of some times in s or ms, with their standard deviation."""
    mean = statistics.fmean(values)
    unit, factor = ("s", 1.0) if mean >= 1 else ("ms", 1e3)
    return (
        f"{factor * mean:.3g} {unit}" if len(values) == 1 else mean_text([factor * v for v in values], unit=f" {unit}")
    )


def _known(value: float | None, form: str) -> str:
    """A number in this form, or that it was not measurable."""
    return "not measurable" if value is None else format(value, form)


def _shares(shares: Sequence[float]) -> str:
    return _few([f"{share:.0%}" for share in shares])


def _few(words: Sequence[str]) -> str:
    """All of a few words; the first and the last of many."""
    return " ".join(words) if len(words) <= 8 else f"{' '.join(words[:3])} .. {' '.join(words[-3:])}"


def show_comparison(groups: Sequence[comparison.Group]) -> None:
    """Show runs of several methods, with means and standard deviations over seeds: a row for each group.

    A narrow terminal gets two tables.
    """
    console = _wide_console()
    score = score_of([summary for group in groups for summary in group.summaries])
    columns: dict[str, Callable[[comparison.Group], str]] = {
        "seeds": lambda group: str(len(group.seeds)),
        score: lambda group: mean_score(score, group.values(lambda summary: summary["test_accuracy"])),
        "test loss": lambda group: mean_text(group.values(lambda summary: summary["test_loss"]), 3),
        "time a mini-batch": lambda group: _seconds(group.values(lambda summary: summary["minibatch_s"])),
        _MEMORY: lambda group: _few(megabytes_by_stage(group.summaries)),
        "delay": lambda group: shown_delay(group.summaries),
        "distance of weights, %": lambda group: _measured([100 * d for d in group.values(weight_distance)]),
        "prediction error": lambda group: _measured(group.values(prediction_error), 2),
    }
    texts = {heading: [text(group) for group in groups] for heading, text in columns.items()}
    narrow = console.width < _COMPARISON_WIDTH
    style = {"pad_edge": not narrow, "box": box.SIMPLE_HEAD if narrow else box.HEAVY_HEAD}
    for headings in (list(columns)[:4], list(columns)[4:]) if narrow else (list(columns),):
        title = "side by side (mean ± standard deviation over seeds)" if "seeds" in headings else None
        table = Table(title=title, title_justify="left", **style)  # type: ignore[arg-type]
        table.add_column("method", min_width=max((len(group.cell.method) for group in groups), default=0))
        for heading in ("K", "A"):
            table.add_column(heading, justify="right", no_wrap=True)
        for heading in headings:
            # A list of sizes may wrap.
            width = 0 if heading == _MEMORY else max(map(len, texts[heading]), default=0)
            table.add_column(heading, justify="right", min_width=width)
        for i, cell in enumerate(group.cell for group in groups):
            shown = (texts[heading][i] for heading in headings)
            table.add_row(cell.title, str(cell.stages), str(cell.num_microbatches), *shown)
        console.print(table)
    if any(text != "-" for text in texts["distance of weights, %"]):
        for line in (
            "distance of weights: of those that a forward read, predicted or not, from those of its backward, over their norm",
            "prediction error: this over the distance without prediction (below 1: prediction helps)",
        ):
            console.print(line, highlight=False)
    _show_how_much_more(console, groups, score)


def _show_how_much_more(console: Console, groups: Sequence[comparison.Group], score: str) -> None:
    """Show how many samples methods need to come to what bp ends with; nothing where no bp is among them."""
    rows = [
        (group.cell, needed)
        for group, needed in zip(groups, how_much_more(groups), strict=True)
        if needed and group.cell.method != BACKPROP
    ]
    if not rows:
        return
    console.print("\nsamples to come to what bp ends with, over bp's (range over seeds)", highlight=False)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("method", min_width=max(len(cell.method) for cell, _ in rows))
    names = {"test_accuracy": f"bp's {score}", "test_loss": "bp's test loss"}
    shown = [name for name in names if any(name in needed for _, needed in rows)]
    for heading in ("K", "A", *map(names.__getitem__, shown)):
        table.add_column(heading, justify="right", no_wrap=True)
    for cell, needed in rows:
        texts = (str(needed[name]) if name in needed else "-" for name in shown)
        table.add_row(cell.title, str(cell.stages), str(cell.num_microbatches), *texts)
    console.print(table)


def _measured(values: Sequence[float], digits: int | None = None) -> str:
    """The mean of a number that only runs with a delay have; "-" where a run has none."""
    return "-" if any(map(math.isnan, values)) else mean_text(values, digits)
