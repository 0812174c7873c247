"""The commands ``dtrp train`` and ``dtrp demo``. They import torch when they run, so that ``--help`` is fast."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from ..train.config import TrainConfig
from .options import load_run, train_options


@click.command(short_help="Train a network in stages, and test it after each epoch.")
@train_options()
@click.option("--quiet", is_flag=True, help="Plain lines on a terminal too.")
@click.option(
    "--resume",
    type=click.Path(),
    callback=load_run,
    is_eager=True,
    help="Go on with the run in this folder, from its last save, with its own settings; options beside it win.",
)
def train(*, quiet: bool, resume: str | None, **options: Any) -> None:
    """Train a network and test it after each epoch.

    Settings are checked before anything is written. The folder of --out appears when the first epoch is
    through, or with the first save, and then always holds the last finished one. Where it holds an unfinished run of
    these very settings, that run goes on.
    """
    from ..launch.join import launched
    from ..train.comparison import read_summary
    from ..train.run_folder import left_by
    from ..train.trainer import Reporter
    from .console import make_reporter
    from .running import checked, train_in_workers, trained

    # --stages and --cuts exclude each other: an option on the command line replaces the other one from a file.
    source = click.get_current_context().get_parameter_source
    for typed, other in (("stages", "cuts"), ("cuts", "stages")):
        if source(typed) == ParameterSource.COMMANDLINE and source(other) == ParameterSource.DEFAULT_MAP:
            options[other] = None
    if resume is not None:
        if ParameterSource.COMMANDLINE in (source("out"), source("overwrite")):
            raise click.UsageError("--resume goes on in the run's own folder; leave --out and --overwrite out")
        options = {**options, "out": resume, "overwrite": False}
        finished = read_summary(Path(resume))
        if finished is not None and not launched() and options["epochs"] <= finished["epochs"]:
            done = f"{finished['epochs']} epochs, {finished['updates']} updates"
            click.echo(f"{resume} is finished: {done}; to train longer, pass --epochs")
            return
    config = TrainConfig(**options, resume=resume is not None)
    if (config.workers is not None or config.replicas > 1) and not launched():
        train_in_workers(config, quiet=quiet)
        return
    if config.out and launched() and left_by(config.out, "", overwrite=False) == "finished":
        return  # a worker has failed after the end
    trainer = checked(config)
    if not config.out:
        trainer.notes.append("nothing of this run is kept; name a folder for it with --out")
    with make_reporter(quiet=quiet) if trainer.reports else Reporter() as reporter:
        trained(trainer, reporter)


@click.command(short_help="Train a small ResNet by bp and by dtrp, and compare them.")
@click.option("--epochs", type=int, default=12, help="Passes over the training split.")
@click.option("--threads", type=int, default=1, help="CPU threads; the networks are too small for more.")
@click.option("--seed", type=int, default=0, help="Of weights, order and dropout.")
def demo(**options: Any) -> None:
    """Train a small ResNet on handwritten digits with bp and with dtrp, and show the two side by side."""
    from .console import make_reporter, show_side_by_side
    from .running import checked, trained

    base = TrainConfig(model="resnet20", stages=4, num_microbatches=4, batch_size=64, lr=0.05, **options)
    results = []
    for method in ("bp", "dtrp"):
        trainer = checked(dataclasses.replace(base, method=method))
        with make_reporter(table=False) as reporter:
            results.append(trained(trainer, reporter))
    show_side_by_side(results)
