"""What a run shows: a progress line on a terminal, plain lines elsewhere, and a table at the end."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Sequence
from types import TracebackType

from rich import box
from rich.console import Console, Group, RenderableType
from rich.filesize import decimal
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from ..planning import Choice, Plan, Simulation
from ..train.comparison import Group as Cells
from ..train.comparison import megabytes_by_stage, prediction_error, shown_delay, weight_distance
from ..train.results import EpochMetrics, TrainResult, describe_layers, summarize_delays
from ..train.trainer import Reporter, Trainer

_LINE_EVERY_S = 30.0
_MEMORY = "memory by stage, MB"
_ONE_TABLE = 150  # columns of text that a comparison takes
_BLOCKS = "▁▂▃▄▅▆▇█"


class ConsoleReporter(Reporter):
    """Prints a run; a context manager that gives the terminal back."""

    def __init__(self, console: Console, *, table: bool = True) -> None:
        self.console = console
        self.table = table

    def start(self, trainer: Trainer) -> None:
        config, data, pipe = trainer.config, trainer.dataset, trainer.pipe
        self._of_text = config.data == "text"
        self.console.print(
            f"{config.model} on {config.data}: {len(data.train_y)} training and {len(data.test_y)} test "
            f"{'windows' if config.data == 'text' else 'images'}; "
            f"{config.method}, {pipe.num_stages} stage{'s' if pipe.num_stages > 1 else ''}{_processes(trainer)}, "
            f"mini-batches of {config.batch_size} in "
            f"{pipe.num_microbatches} micro-batch{'es' if pipe.num_microbatches > 1 else ''}, "
            f"{trainer.total_updates} updates",
            highlight=False,
        )

    def note(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False)

    def epoch(self, metrics: EpochMetrics) -> None:
        line = (
            f"epoch {metrics.epoch:3}  update {metrics.update:6}  train loss {metrics.train_loss:.4f}  "
            f"test loss {metrics.test_loss:.4f}  {self._perplexity(metrics)}accuracy {metrics.test_accuracy:7.2%}  "
            f"{metrics.samples_per_s:6.0f} samples/s  {metrics.elapsed_s:6.0f} s"
        )
        if len(line) > self.console.width:
            line = (
                f"epoch {metrics.epoch:3}  train {metrics.train_loss:.4f}  test {metrics.test_loss:.4f}  "
                f"accuracy {metrics.test_accuracy:.2%}  {metrics.elapsed_s:.0f} s"
            )
        self.console.print(line, highlight=False)

    def _perplexity(self, metrics: EpochMetrics) -> str:
        """What the loss of a text is told in."""
        if not self._of_text:
            return ""
        loss = metrics.test_loss
        perplexity = math.exp(loss) if loss < 700 else math.inf
        return f"perplexity {perplexity:.3f}  bits per character {loss / math.log(2):.3f}  "

    def finish(self, result: TrainResult) -> None:
        if self.table:
            self.console.print(_stage_table(result))
            last = result.epochs[-1]
            left_out = ", ".join(
                f"{len(s.skipped_updates)} at stage {s.stage}" for s in result.stages if s.skipped_updates
            )
            if left_out:
                self.console.print(f"updates left out, their gradient not being finite: {left_out}", highlight=False)
            self.console.print(
                f"{self._perplexity(last)}test accuracy {last.test_accuracy:.2%}, {result.samples_per_s:.0f} samples/s "
                "(median of the epochs)",
                highlight=False,
            )
            if result.config.out:
                self.console.print(f"written to {result.config.out}", highlight=False)


class PlainReporter(ConsoleReporter):
    """Lines for a log: one an epoch, and one every half minute of a long epoch."""

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
        self.console.print(
            f"  update {update:6} of {self._total}  loss {loss():.4f}  {self._samples / since:6.0f} samples/s  "
            f"{left:6.0f} s left",
            highlight=False,
        )
        self._printed, self._samples = now, 0


class LiveReporter(ConsoleReporter):
    """Two lines that refresh: how far the run is, and the curves of loss and accuracy so far."""

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

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._live.stop()

    def _lines(self) -> RenderableType:
        if self._loss is None:
            return self._progress
        texts = [f"loss {{}} {self._loss:.4f}"]
        if self._accuracies:
            texts.append(f"accuracy {{}} {self._accuracies[-1]:.2%}")
        free = self.console.width - sum(map(len, texts)) + 2 * len(texts) - 2
        width = max(4, min(40, free // len(texts)))
        curves = (curve(values, width) for values in (self._losses, self._accuracies))
        shown = "  ".join(text.format(own) for text, own in zip(texts, curves, strict=False))
        return Group(self._progress, Text(shown, no_wrap=True))

    def start(self, trainer: Trainer) -> None:
        super().start(trainer)
        self._task = self._progress.add_task("", total=trainer.total_updates, epoch=1, speed="-")
        self._every, self._due = (
            trainer.total_updates // 500,
            0,
        )  # a curve of a few hundred points, however long the run
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
        self._progress.update(
            self._task, completed=update, epoch=epoch + 1, speed=f"{self._samples / (now - self._since):.0f}"
        )
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
    """A line of blocks as high as the values, the means of ``width`` equal parts of them, between their extremes.

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
    """The reporter that suits standard output; ``quiet``: plain lines on a terminal too.

    Only a terminal that can refresh lines gets such; a log file does not, whatever colours the environment forces.
    """
    console = Console(soft_wrap=False)
    if console.is_terminal and console.file.isatty() and not console.is_dumb_terminal and not quiet:
        return LiveReporter(console, table=table)
    return PlainReporter(_wide_console(), table=table)


def _processes(trainer: Trainer) -> str:
    config = trainer.config
    if trainer.pipe.is_first and trainer.pipe.is_last and config.replicas == 1:
        return ""
    return " in a process each" + (f" and {config.replicas} replicas" if config.replicas > 1 else "")


def _stage_table(result: TrainResult) -> Table:
    table = Table(title=f"{result.config.method}: the stages", title_justify="left")
    table.add_column("stage", justify="right")
    table.add_column("layers")
    for heading in ("parameters", "delay (updates)", "stash, peak", "stash + graph, peak"):
        table.add_column(heading, justify="right")
    for stage in result.stages:
        table.add_row(
            str(stage.stage),
            describe_layers(stage.layers),
            f"{stage.parameters:,}",
            summarize_delays(stage.delays),
            decimal(stage.memory["stash_peak"]),
            decimal(stage.activations_peak),
        )
    return table


def show_side_by_side(results: Sequence[TrainResult]) -> None:
    """Runs of several methods at the same stages, a column each."""
    console = Console() if Console().is_terminal else Console(width=100)
    table = Table(title="side by side", title_justify="left")
    table.add_column("")
    for result in results:
        table.add_column(result.config.method, justify="right")
    table.add_row("test accuracy", *(f"{result.epochs[-1].test_accuracy:.2%}" for result in results))
    table.add_row("samples/s, one process", *(f"{result.samples_per_s:.0f}" for result in results), end_section=True)
    for k in range(len(results[0].stages)):
        table.add_row(f"stage {k}: activations held, peak", *(decimal(r.stages[k].activations_peak) for r in results))
    table.add_row(
        "all stages",
        *(decimal(sum(stage.activations_peak for stage in r.stages)) for r in results),
        end_section=True,
    )
    for k in range(len(results[0].stages)):
        table.add_row(f"stage {k}: delay (updates)", *(summarize_delays(r.stages[k].delays) for r in results))
    console.print(table)
    console.print(
        "In one process the stages take turns: nobody waits, and who repeats forwards takes longer. With a process for each stage "
        f"(dtrp train --workers {len(results[0].stages)}) backpropagation waits and dtrp does not.",
        highlight=False,
    )


def show_plan(plan: Plan) -> None:
    """A plan's choices and what they were chosen from."""
    console = _wide_console()
    stages = Table(title=f"{plan.method}: the stages", title_justify="left")
    for heading in ("stage", "layers", "keeps", "slot", "at work", "memory, at most"):
        stages.add_column(heading, justify="left" if heading in ("layers", "keeps") else "right")
    for k, stage in enumerate(plan.stages):
        stages.add_row(
            str(k), describe_layers(stage.layers), stage.keep, _seconds(stage.slot_s), f"{stage.utilization:.0%}",
            decimal(stage.memory_bytes),
        )  # fmt: skip
    console.print(stages)
    row = plan.row
    console.print(
        f"mini-batches of {plan.batch_size} in {plan.num_microbatches} micro-batch{'es' if plan.num_microbatches > 1 else ''}; "
        f"ahead {row.ahead:g}, {'backward' if row.backward_first else 'forward'} first; learning rate times {plan.lr_scale:g}"
        + (f", {plan.warmup_updates} updates of warm-up" if plan.warmup_updates else ""),
        highlight=False,
    )
    for title, choices in (
        ("the same job otherwise", plan.alternatives),
        ("the lead", plan.leads),
        ("the mini-batch", plan.batches),
    ):
        if choices:
            console.print(_choices_table(title, choices))
    console.print(plan.advice, highlight=False)


def _choices_table(title: str, choices: Sequence[Choice]) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("method")
    headings = ("ahead", "order", "A", "mini-batch", "time", "samples/s", "memory, at most", "delay", "at work, each")
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "order" else "right")
    for choice in choices:
        table.add_row(
            choice.method, f"{choice.ahead:g}", choice.order, str(choice.num_microbatches), str(choice.batch_size),
            _seconds(choice.minibatch_s), f"{choice.samples_per_s:.0f}", decimal(choice.memory_bytes), str(choice.delay),
            _shares(choice.utilization),
        )  # fmt: skip
    return table


def show_simulations(rows: Sequence[tuple[str, Simulation]]) -> None:
    """What `simulate` found, a method a row."""
    table = Table()
    table.add_column("method")
    sized = any(simulation.peak_bytes is not None for _, simulation in rows)
    memory = ("memory, each",) if sized else ()
    for heading in ("time a mini-batch", "whole run", "at work, each", "stash, peak", "delay (updates)", *memory):
        table.add_column(heading, justify="right")
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
    """As wide as the terminal; a log has room for every column."""
    console = Console()
    return console if console.file.isatty() else Console(width=220)


def _seconds(seconds: float, spread: float = math.nan) -> str:
    unit, factor = ("s", 1.0) if seconds >= 1 else ("ms", 1e3)
    if math.isnan(spread):
        return f"{factor * seconds:.3g} {unit}"
    return _mean((factor * seconds, factor * spread), _digits(factor * seconds), f" {unit}")


def _digits(value: float) -> int:
    """Decimals that show three digits of a number."""
    return max(0, 2 - math.floor(math.log10(value))) if 0 < value < math.inf else 2


def _shares(shares: Sequence[float]) -> str:
    return _few([f"{share:.0%}" for share in shares])


def _few(words: Sequence[str]) -> str:
    return " ".join(words) if len(words) <= 8 else f"{' '.join(words[:3])} .. {' '.join(words[-3:])}"


def show_comparison(groups: Sequence[Cells]) -> None:
    """Runs of several methods, a row for those that differ in their seed alone; mean and standard deviation.

    On a narrow terminal in two tables.
    """
    console = _wide_console()
    columns: list[tuple[str, Callable[[Cells], str]]] = [
        ("seeds", lambda group: str(len(group.seeds))),
        ("accuracy", lambda group: _mean(group.mean(lambda summary: 100 * float(summary["test_accuracy"])), 2, " %")),
        ("test loss", lambda group: _mean(group.mean(lambda summary: float(summary["test_loss"])), 3)),
        ("time a mini-batch", lambda group: _seconds(*group.mean(lambda summary: float(summary["minibatch_s"])))),
        (_MEMORY, lambda group: _few(megabytes_by_stage(group.summaries))),
        ("delay", lambda group: shown_delay(group.summaries)),
        ("distance of weights, %", lambda group: _percent(group.mean(weight_distance))),
        ("prediction error", lambda group: _ratio(group.mean(prediction_error))),
    ]
    narrow = console.width < _ONE_TABLE
    for shown in (columns[:4], columns[4:]) if narrow else (columns,):
        title = "side by side (mean ± standard deviation over seeds)" if shown[0] is columns[0] else None
        table = Table(
            title=title, title_justify="left", pad_edge=not narrow, box=box.SIMPLE_HEAD if narrow else box.HEAVY_HEAD
        )
        table.add_column("method", min_width=max((len(group.cell.method) for group in groups), default=0))
        for heading in ("K", "A"):
            table.add_column(heading, justify="right", no_wrap=True)
        for heading, of in shown:
            cells = [of(group) for group in groups]
            whole = (
                0 if heading == _MEMORY else max(map(len, cells), default=0)
            )  # a list of sizes may have several lines
            table.add_column(heading, justify="right", min_width=whole)
        for group in groups:
            cell = group.cell
            table.add_row(cell.title, str(cell.stages), str(cell.num_microbatches), *(of(group) for _, of in shown))
        console.print(table)
    if any(not math.isnan(group.mean(weight_distance)[0]) for group in groups):
        for line in (
            "distance of weights: of those that a forward read, predicted or not, from those of its backward, over their norm",
            "prediction error: this over the distance without prediction (below 1: prediction helps)",
        ):
            console.print(line, highlight=False)


def _mean(mean_and_deviation: tuple[float, float], digits: int, unit: str = "") -> str:
    mean, deviation = mean_and_deviation
    return f"{mean:.{digits}f}{unit}" if math.isnan(deviation) else f"{mean:.{digits}f} ± {deviation:.{digits}f}{unit}"


def _percent(mean_and_deviation: tuple[float, float]) -> str:
    """Of a number that only runs with a delay have."""
    mean, deviation = (100 * value for value in mean_and_deviation)
    return "-" if math.isnan(mean) else _mean((mean, deviation), _digits(mean))


def _ratio(mean_and_deviation: tuple[float, float]) -> str:
    """The same."""
    return "-" if math.isnan(mean_and_deviation[0]) else _mean(mean_and_deviation, 2)
