"""The commands that need no network: ``dtrp schedule``, ``dtrp simulate`` and ``dtrp methods``."""

from __future__ import annotations

import math
from typing import Any

import click

from ..methods import get_method, list_methods
from ..schedule import Schedule, ScheduleError
from ..train.config import TrainConfig
from .option_types import Name, Sizes, Times
from .options import METHODS, together, train_options


class GridError(click.ClickException):
    """An invalid schedule: the rule on one line, then the grid with the cell marked."""

    def format_message(self) -> str:
        rule, _, grid = self.message.partition("\n")
        if grid:
            click.echo(grid)
        return rule


@click.command(short_help="Print which stage does what in which slot.")
@click.option("--method", type=METHODS, default="dtrp", help="Training method.")
@click.option("--stages", type=click.IntRange(min=1), default=4, help="K.")
@click.option("--minibatches", type=click.IntRange(min=1), default=8, help="Mini-batches in the run.")
@click.option("--num-microbatches", type=click.IntRange(min=1), default=1, help="Micro-batches in each.")
@train_options("ahead", "order")
@click.option("--check", type=click.File(), help="Read a grid from a file ('-': standard input) and check it instead.")
def schedule(
    method: str,
    stages: int,
    minibatches: int,
    num_microbatches: int,
    ahead: float | None,
    order: str | None,
    check: Any,
) -> None:
    """Print who does what and when, and the delays that follow.

    A row is a stage, a column one slot (a forward and a backward). What is sent in one column is there in the
    next, and an empty cell is a worker that waits. F3: forward of micro-batch 3; B3: its backward; U: update.
    """
    from ..train.build import make_method

    try:
        if check is not None:
            grid = Schedule.parse(check.read())
        else:
            row = make_method(TrainConfig(method=method, ahead=ahead, order=order))
            grid = Schedule.build(row, stages, minibatches, num_microbatches)
        grid.validate()
    except ScheduleError as error:
        raise GridError(str(error)) from error
    except ValueError as error:
        raise click.ClickException(str(error)) from error
    click.echo(str(grid))


_time_options = together(
    click.option(
        "--forward", type=Times(), default=1.0, help="Seconds of a micro-batch's forward; one, or one a stage."
    ),
    click.option("--backward", type=Times(), default=2.0, help="Seconds of its backward; one, or one a stage."),
    click.option("--nograd-forward", type=Times(), help="Seconds of a forward without a graph (as --forward)."),
    click.option("--update", type=Times(), default=0.0, help="Seconds of an update; one, or one a stage."),
    click.option("--latency", type=Times(), default=0.0, help="Seconds a message takes; one, or one a hop."),
    click.option("--bandwidth", type=Sizes(), help="Of a link, bytes a second (unbounded); one, or one a hop."),
    click.option("--message", type=Sizes(), default=0, help="Size of a micro-batch's activations; one, or one a hop."),
    click.option("--predict", type=Times(), default=0.0, help="Seconds of a prediction; one, or one a stage."),
    click.option("--speed", type=Times(), default=1.0, help="Of the devices; one, or one a stage."),
    click.option(
        "--weights", type=Sizes(), help="Bytes of a stage's parameters: shows the memory; one, or one a stage."
    ),
    click.option("--optimizer-state", type=Sizes(), default=0, help="Bytes of its optimizer's state."),
    click.option("--input", type=Sizes(), default=0, help="Bytes of its input, a micro-batch."),
    click.option("--graph", type=Sizes(), default=0, help="Bytes of its activations, a micro-batch."),
)


@click.command(short_help="Estimate the time of a schedule, without a network.")
@click.option("--method", "names", type=METHODS, multiple=True, default=("dtrp",), help="May be given several times.")
@click.option("--stages", type=click.IntRange(min=1), default=4, help="K.")
@click.option(
    "--minibatches", type=click.IntRange(min=1), help="Mini-batches in the run (long enough for a steady state)."
)
@click.option("--num-microbatches", type=click.IntRange(min=1), default=1, help="Micro-batches in each.")
@train_options("ahead", "order")
@click.option("--keep", type=Name("keep", ("graph", "input")), help="What stages keep (the method's own).")
@_time_options
@click.option("--timeline", is_flag=True, help="List every action too.")
def simulate(**options: Any) -> None:
    """Run a schedule with given times, without a network: time per mini-batch, waiting, delays.

    Any unit of time will do. Methods that are named together are simulated under the same times.
    """
    from ..planning import simulate as run_simulation
    from ..train.build import make_method
    from .console import show_simulations

    stages, size = options["stages"], options["num_microbatches"]
    rows = []
    try:
        for name in options["names"]:
            method = make_method(TrainConfig(method=name, ahead=options["ahead"], order=options["order"]))
            lead = math.ceil(method.ahead * stages)
            simulation = run_simulation(
                method,
                num_stages=stages,
                num_minibatches=options["minibatches"] or 4 * math.ceil(lead / size) + 20,
                num_microbatches=size,
                forward_s=options["forward"],
                backward_s=options["backward"],
                nograd_forward_s=options["nograd_forward"],
                update_s=options["update"],
                latency_s=options["latency"],
                bandwidth_bytes_s=math.inf if options["bandwidth"] is None else options["bandwidth"],
                predict_s=options["predict"],
                speed=options["speed"],
                weight_bytes=options["weights"],
                optimizer_bytes=options["optimizer_state"],
                input_bytes=options["input"],
                graph_bytes=options["graph"],
                message_bytes=options["message"],
                keep=options["keep"],
            )
            rows.append((name, simulation))
    except ValueError as error:
        raise click.ClickException(str(error)) from error
    show_simulations(rows)
    if options["timeline"]:
        for name, simulation in rows:
            for span in sorted(simulation.timeline, key=lambda span: (span.start_s, span.stage)):
                click.echo(
                    f"{name}  stage {span.stage}  {span.kind}{span.number}  {span.start_s:.6g} to {span.end_s:.6g}"
                )


@click.command(short_help="List the training methods, or explain one.")
@click.argument("name", type=METHODS, required=False)
def methods(name: str | None) -> None:
    """List the methods, or say what one does: its update rule, delay, memory and source."""
    for each in [name] if name else list_methods():
        text = get_method(each).__doc__ or ""
        click.echo(f"{each}\n\n{text}" if name else f"{each:12}{text.splitlines()[0]}")
