"""The commands ``dtrp compare`` and ``dtrp report``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from ..methods import list_methods
from ..train.config import AUTO, AUTO_SAMPLES, CELL_SETTINGS, CHOICES, SAVE_SETTINGS, TrainConfig
from .endings import mistakes
from .option_types import names, numbers
from .options import together, train_options

# Options of `dtrp train` that a comparison sets for each cell, or cannot have. A cell that is interrupted begins again.
_NOT_SHARED = (
    *CELL_SETTINGS, *SAVE_SETTINGS, "cuts", "points", "out", "overwrite",
    "plan", "workers", "replicas", "max_restarts", "memory_limit",
    "keep",
)  # fmt: skip

_grid_options = together(
    click.option(
        "--methods", type=names("method", list_methods()), default="bp,fdg,dtr,dtrp", help="Some of them: bp,dtrp."
    ),
    click.option("--stages", type=numbers("whole numbers", "1,2,4"), default="4", help="Every K."),
    click.option(
        "--num-microbatches",
        default=AUTO,
        help="Every A, K for as many as stages: 1,K; auto: as many as stages, of at least two samples each.",
    ),
    click.option(
        "--predictions",
        type=names("prediction", CHOICES["prediction"]),
        help="For methods that predict: linear,rollout,informed.",
    ),
    click.option("--seeds", type=click.IntRange(min=1), default=3, help="Runs of each, with seeds 0, 1, ..."),
    click.option(
        "--once/--every-k",
        default=False,
        help="Run a method that flushes at one K for each A: its accuracy is the same at every K, its time and memory are not.",
    ),
)


@click.command(
    short_help="Train by several methods, and compare accuracy, time and memory.",
    context_settings={"default_map": {"prediction_error_every": "auto"}},
)
@_grid_options
@click.option(
    "--workers/--one-process",
    default=None,
    help="Whether each stage has a process (by default, if the machine has a core for each and one more, or a GPU for each).",
)
@click.option(
    "--out", type=click.Path(), required=True, help="Folder of the comparison; a comparison that is there goes on."
)
@train_options(without=_NOT_SHARED)
def compare(out: str, *, workers: bool | None, num_microbatches: str, seeds: int, **options: Any) -> None:
    """Train by several methods, and show accuracy, time, memory, delay and prediction error side by side.

    Every cell of the grid is a run of its own. Break it off and start it again: what is finished is not repeated. Every
    other option is one of 'dtrp train'.
    """
    from ..train.comparison import Comparison, begun_with, grid
    from .console import show_comparison

    parts = {name: options.pop(name) for name in ("methods", "stages", "predictions", "once")}
    reason = None if workers else _why_no_workers(options["device"], max(parts["stages"]))
    if workers is None:
        known = begun_with(out)
        workers = reason is None if known is None else known.get("workers") is not None
    with mistakes(ValueError, OSError):
        microbatches = [word.strip() for word in num_microbatches.split(",")]
        if AUTO in microbatches:
            if len(microbatches) > 1:
                raise ValueError(
                    f"--num-microbatches {num_microbatches}: auto stands alone; K is as many as stages too"
                )
            options["microbatch_samples"] = options["microbatch_samples"] or AUTO_SAMPLES
        base = TrainConfig(**options, workers=1 if workers else None)
        cells = grid(microbatches=microbatches, seeds=range(seeds), **parts)
        comparison = Comparison(base, cells, out)
    try:
        failed = comparison.run(_train_cell, click.echo)
    except OSError as error:
        raise click.ClickException(f"cannot write to {out}: {error}") from error
    if groups := comparison.groups():
        show_comparison(groups)
        click.echo(_about_times(in_workers=workers, reason=reason))
    if failed:
        shown = ", ".join(cell.name for cell in failed[:3]) + (", ..." if len(failed) > 3 else "")
        raise click.ClickException(
            f"{len(failed)} of {len(cells)} cells failed ({shown}); why stands in {out}/*.failed. The same command tries them again"
        )


def _why_no_workers(device: str, most: int) -> str | None:
    """Why a process for each of so many stages would not show the time that workers take; None where it does."""
    if most == 1:
        return "one stage needs no workers"
    if device == "cpu":
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        # Helper threads that send and receive, and the process that has started the workers, run beside them.
        return None if cores > most else f"{most} workers need a core each and one more, and this machine has {cores}"
    import torch

    found = torch.cuda.device_count() if device == "cuda" else len(device.split(","))
    return None if found >= most else f"{most} workers need a device each, and --device {device} has {found}"


def _about_times(*, in_workers: bool, reason: str | None) -> str:
    """What the times of a comparison are."""
    if in_workers:
        return "times are of workers, a process for each stage, which wait for each other as the method has it"
    but = f"not shown here: {reason}; --workers measures it all the same" if reason else "--workers measures it"
    return f"times are of one process, in which the stages take turns; time on workers is {but}"


def _train_cell(config: TrainConfig) -> None:
    from ..train.trainer import Trainer
    from .console import make_reporter
    from .running import train_in_workers

    if config.workers is not None:
        train_in_workers(config)
        return
    trainer = Trainer(config)
    with make_reporter(table=False, quiet=True) as reporter:
        trainer.run(reporter)


@click.command(short_help="Write one HTML file about runs and comparisons.")
@click.argument("runs", nargs=-1, required=True, type=click.Path())
@click.option("--out", type=click.Path(dir_okay=False), default="report.html", help="The file to write.")
@click.option("--figures", type=click.Path(file_okay=False), help="Folder for each figure as SVG and PNG.")
@click.option(
    "--tensorboard",
    is_flag=True,
    help="Write events of each run too, to tensorboard/ beside --out (tensorboard --logdir).",
)
def report(runs: tuple[str, ...], out: str, figures: str | None, *, tensorboard: bool) -> None:
    """One HTML file about runs and comparisons: curves, memory, time, delays, prediction error, schedules, settings.

    RUNS are folders that 'dtrp train --out' or 'dtrp compare --out' has written. The file needs nothing beside it.
    """
    try:
        from ..report import write_report  # matplotlib takes a while to import
    except ImportError as error:
        raise click.ClickException(f"{error}; install the extra: pip install 'dtrp[report]'") from error
    with mistakes(ValueError, OSError):
        collection = write_report(list(runs), out, figures, tensorboard=tensorboard)
    click.echo(
        f"{len(collection.runs)} run{'s' if len(collection.runs) > 1 else ''}; written to {out}"
        + (f", figures to {figures}" if figures else "")
        + (f", events to {Path(out).parent / 'tensorboard'}" if tensorboard else "")
    )
