"""The commands without a network: ``dtrp schedule``, ``dtrp simulate`` and ``dtrp methods``."""

from __future__ import annotations

import math
from typing import IO, Any

import click

from ..methods import get_method, list_methods
from ..schedule_grid import Schedule, ScheduleError
from ..train.config import TrainConfig
from .endings import mistakes
from .option_types import SIZES, TIMES, Name
from .options import NAME_TYPES, together, train_options

_METHODS = NAME_TYPES["method"]
_AT_LEAST_1 = click.IntRange(min=1)


@click.command(short_help="Print which stage does what in which slot.")
@click.option("--method", type=_METHODS, default="dtrp", help="Training method.")
@click.option("--stages", type=_AT_LEAST_1, default=4, help="K.")
@click.option("--minibatches", type=_AT_LEAST_1, default=8, help="Mini-batches in the run.")
@click.option("--num-microbatches", type=_AT_LEAST_1, default=1, help="Micro-batches in each.")
@train_options("ahead", "order", "leads", "orders")
@click.option("--check", type=click.File(), help="Read a grid from a file ('-': standard input) and check it instead.")
def schedule(stages: int, minibatches: int, num_microbatches: int, check: IO[str] | None, **row: Any) -> None:
    """Print who does what and when, and the delays that follow.

    A row is a stage, a column one slot (a forward and a backward). What is sent in one column is there in the
    next, and an empty cell is a worker that waits. F3: forward of micro-batch 3; B3: its backward; U: update.
    """
    from ..train.build import make_method

    with mistakes(ValueError):
        try:
            if check is not None:
                grid = Schedule.parse(check.read())
            else:
                grid = Schedule.build(make_method(TrainConfig(**row)), stages, minibatches, num_microbatches)
            grid.validate()
        except ScheduleError as error:
            rule, _, marked_grid = str(error).partition("\n")
            if marked_grid:
                click.echo(marked_grid)
            raise click.ClickException(rule) from error
    click.echo(str(grid))


_time_options = together(
    click.option(
        "--forward", "forward_s", type=TIMES, default=1.0, help="Seconds of a micro-batch's forward; one, or one a stage."
    ),
    click.option("--backward", "backward_s", type=TIMES, default=2.0, help="Seconds of its backward; one, or one a stage."),
    click.option(
        "--weight-share", type=TIMES, default=0.5,
        help="Of a backward in two parts, the share of the second, from 0 to 1; one, or one a stage.",
    ),
    click.option("--nograd-forward", "nograd_forward_s", type=TIMES, help="Seconds of a forward without a graph (as --forward)."),
    click.option("--update", "update_s", type=TIMES, default=0.0, help="Seconds of an update; one, or one a stage."),
    click.option("--latency", "latency_s", type=TIMES, default=0.0, help="Seconds a message takes; one, or one a hop."),
    click.option("--bandwidth", type=SIZES, help="Of a link, bytes a second (unbounded); one, or one a hop."),
    click.option(
        "--message", "message_bytes", type=SIZES, default=0, help="Size of a micro-batch's activations; one, or one a hop."
    ),
    click.option("--predict", "predict_s", type=TIMES, default=0.0, help="Seconds of a prediction; one, or one a stage."),
    click.option("--speed", type=TIMES, default=1.0, help="Of the devices; one, or one a stage."),
    click.option(
        "--weights", "weight_bytes", type=SIZES, help="Bytes of a stage's parameters: shows the memory; one, or one a stage."
    ),
    click.option("--optimizer-state", "optimizer_bytes", type=SIZES, default=0, help="Bytes of its optimizer's state."),
    click.option("--input", "input_bytes", type=SIZES, default=0, help="Bytes of its input, a micro-batch."),
    click.option("--graph", "graph_bytes", type=SIZES, default=0, help="Bytes of its activations, a micro-batch."),
)  # fmt: skip


@click.command(short_help="Estimate the time of a schedule, without a network.")
@click.option("--method", "names", type=_METHODS, multiple=True, default=("dtrp",), help="May be given several times.")
@click.option("--stages", "num_stages", type=_AT_LEAST_1, default=4, help="K.")
@click.option("--minibatches", type=_AT_LEAST_1, help="Mini-batches in the run (long enough for a steady state).")
@click.option("--num-microbatches", type=_AT_LEAST_1, default=1, help="Micro-batches in each.")
@train_options("ahead", "order", "leads", "orders")
@click.option("--keep", type=Name("keep", ("graph", "input")), help="What stages keep (the method's).")
@_time_options
@click.option("--timeline", is_flag=True, help="List every action too.")
def simulate(
    names: tuple[str, ...],
    minibatches: int | None,
    ahead: float | None,
    order: str | None,
    leads: tuple[int, ...] | None,
    orders: tuple[str, ...] | None,
    *,
    timeline: bool,
    **options: Any,
) -> None:
    """Run a schedule with given times, without a network: time per mini-batch, waiting, delays.

    Any unit of time will do. Methods that are named together are simulated under the same times.
    """
    from ..planning import simulate as run_simulation
    from ..train.build import make_method
    from .console import show_simulations

    bandwidth = options.pop("bandwidth")
    options["bandwidth_bytes_s"] = math.inf if bandwidth is None else bandwidth
    rows = []
    with mistakes(ValueError):
        for name in names:
            row = TrainConfig(method=name, ahead=ahead, order=order, leads=leads, orders=orders)
            method = make_method(row)
            lead = max(method.leads or [math.ceil(method.ahead * options["num_stages"])])
            length = minibatches or 4 * math.ceil(lead / options["num_microbatches"]) + 20
            rows.append((name, run_simulation(method, num_minibatches=length, **options)))
    show_simulations(rows)
    for name, simulation in rows if timeline else ():
        for span in sorted(simulation.timeline, key=lambda span: (span.start_s, span.stage)):
            click.echo(f"{name}  stage {span.stage}  {span.kind}{span.number}  {span.start_s:.6g} to {span.end_s:.6g}")


@click.command(short_help="List the training methods, or explain one.")
@click.argument("name", type=_METHODS, required=False, metavar="[METHOD]")
def methods(name: str | None) -> None:
    """List the methods, or say what one does: its update rule, delay, memory and source."""
    if name:
        click.echo(f"{name}\n\n{get_method(name).__doc__ or ''}")
        return
    for method in list_methods():
        click.echo(f"{method:12}{(get_method(method).__doc__ or '').splitlines()[0]}")
