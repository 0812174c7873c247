"""A run that a command starts, here or in as many processes as it asks for, and its end as the command's."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path

import click

from ..errors import StageError, WorkerError
from ..saving import CheckpointError
from ..train.comparison import read_summary
from ..train.config import TrainConfig, config_text
from ..train.config_checks import check_settings, worker_range, workers_per_replica
from ..train.from_plan import resolved
from ..train.results import TrainResult
from ..train.run_folder import RunFolder, left_by
from ..train.trainer import Interrupted, Reporter, Trainer
from .stopped import Stopped


def checked(config: TrainConfig) -> Trainer:
    """The run of a configuration.

    Raises:
        click.ClickException: a setting that does not fit.
    """
    try:
        return Trainer(config)
    except (ValueError, TypeError, OSError, ImportError, StageError, WorkerError) as error:
        raise click.ClickException(str(error)) from error


def trained(trainer: Trainer, reporter: Reporter) -> TrainResult:
    """How a run ended.

    Raises:
        click.ClickException: it failed.
        Stopped: it was asked to stop.
    """
    try:
        return trainer.run(reporter)
    except Interrupted as error:
        if not trainer.reports:
            raise SystemExit(128 + error.signal) from error
        raise Stopped(str(error), 128 + error.signal) from error
    except StageError as error:
        cause = error.__cause__ if isinstance(error.__cause__, FloatingPointError) else error
        raise click.ClickException(str(cause)) from error
    except (WorkerError, CheckpointError) as error:
        raise click.ClickException(str(error)) from error
    except OSError as error:
        raise click.ClickException(f"cannot write the run: {error}") from error


def train_in_workers(config: TrainConfig, *, quiet: bool = True) -> None:
    """``dtrp train`` in as many processes as it asks for.

    Raises:
        click.ClickException: a setting that does not fit, or a worker failed.
        Stopped: they were asked to stop.
    """
    from ..launch.elastic import run_elastic  # torchrun's interface takes a while to import
    from ..launch.torchrun import WorkersError, WorkersStopped, run_workers

    try:
        settings, _ = resolved(config)
        check_settings(settings)
        if not isinstance(config.workers, str):
            config = dataclasses.replace(config, workers=workers_per_replica(settings))
        text = config_text(config)
        if config.out:
            own = config_text(dataclasses.replace(settings, workers=config.workers))  # as a run writes it down
            left = left_by(config.out, own, overwrite=config.overwrite)
            resume = config.resume or left == "unfinished"
            RunFolder(config.out, overwrite=config.overwrite or left == "begun", resume=resume)
    except (ValueError, OSError) as error:
        raise click.ClickException(str(error)) from error
    with tempfile.NamedTemporaryFile("w", prefix="dtrp-", suffix=".yaml") as file:
        file.write(text)
        file.flush()
        arguments = ["-m", "dtrp", "train", "--config", file.name]
        if quiet:
            arguments.append("--quiet")
        if config.resume:
            arguments += ["--resume", str(config.out)]
        elif config.out:
            arguments += ["--out", config.out, *(["--overwrite"] if config.overwrite else [])]
        try:
            if isinstance(config.workers, str):
                least, most = worker_range(config.workers)
                restarts = 10 if config.max_restarts is None else config.max_restarts
                out = Path(str(config.out)).expanduser()
                before = read_summary(out)  # of a run that is trained longer
                run_elastic(
                    arguments,
                    least,
                    most,
                    max_restarts=restarts,
                    is_finished=lambda: read_summary(out) not in (None, before),
                    say=lambda line: None if quiet else click.echo(line),
                )
            else:
                assert config.workers is not None
                num_processes = config.workers * config.replicas
                # The last stage of the first replica knows the loss.
                run_workers(arguments, num_processes, shown=config.workers - 1, max_restarts=config.max_restarts or 0)
        except WorkersStopped as error:
            said = error.log.strip().rpartition("\n")[2].removeprefix("dtrp: ")
            raise Stopped(said if said.startswith("stopped after") else "interrupted", 128 + error.signal) from None
        except WorkersError as error:
            message = str(error)
            own_words = message.startswith("dtrp: ")
            if error.log.strip() and (error.exit_code < 0 or not own_words):  # what native code says is there alone
                click.echo(error.log, err=True)
            if not own_words:
                message = f"dtrp: rank {error.rank} failed: {message}"
            raise click.ClickException(message.removeprefix("dtrp: ")) from None
