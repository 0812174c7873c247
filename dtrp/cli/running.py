"""Starts a run for a command, in this process or in several, and turns the end of the run into that of the command."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path

import click

from ..data import DataError
from ..errors import StageError, WorkerError
from ..saving import CheckpointError
from ..train.build import check_stages
from ..train.comparison import read_summary
from ..train.config import TrainConfig, config_text
from ..train.config_checks import check_settings, worker_range, workers_per_replica
from ..train.from_plan import resolved
from ..train.results import TrainResult
from ..train.run_folder import RunFolder
from ..train.trainer import Interrupted, Reporter, Trainer
from ..train.user_code import UserCodeError
from .endings import Stopped, lost_terminal_ignored, mistakes


def checked(config: TrainConfig) -> Trainer:
    """The run with these settings, ready to train.

    Raises:
        click.ClickException: a setting that does not fit.
    """
    with mistakes(ValueError, TypeError, OSError, ImportError, StageError, WorkerError):
        return Trainer(config)


def trained(trainer: Trainer, reporter: Reporter) -> TrainResult:
    """Train, and return the results.

    Raises:
        click.ClickException: the run failed.
        Stopped: it was asked to stop.
    """
    try:
        return trainer.run(reporter)
    except Interrupted as error:
        if not trainer.reports:
            raise SystemExit(128 + error.signal) from error
        raise Stopped(str(error), 128 + error.signal) from error
    except StageError as error:
        text = str(error)
        if isinstance(error.__cause__, FloatingPointError):
            text = str(error.__cause__)
            text += "" if "stage" in text else f" (stage {error.stage})"
        raise click.ClickException(text) from error
    except (WorkerError, CheckpointError, DataError, UserCodeError) as error:
        raise click.ClickException(f"{error}{_resume_hint(trainer.config)}") from error
    except OSError as error:
        raise click.ClickException(f"cannot write the run: {error}{_resume_hint(trainer.config)}") from error


def _resume_hint(config: TrainConfig) -> str:
    """The end of a message about a run that has saves, with the command that goes on with it."""
    if config.out is not None and read_summary(Path(config.out).expanduser()) is not None:
        return "; the run itself is finished"
    has_saves = config.out is not None and any(Path(config.out).expanduser().glob("saves/update-*"))
    return f"; go on with: dtrp train --resume {config.out}" if has_saves else ""


def train_in_workers(config: TrainConfig, *, quiet: bool = True) -> None:
    """Run ``dtrp train`` in as many processes as the settings ask for.

    Raises:
        click.ClickException: a setting that does not fit, or a worker that failed.
        Stopped: the workers were asked to stop.
    """
    from ..launch.torchrun import WorkersError, WorkersStopped  # torchrun's interface takes a while to import

    with mistakes(ValueError, OSError):
        settings, _ = resolved(config)
        check_settings(settings)
        most = worker_range(config.workers)[1] if isinstance(config.workers, str) else workers_per_replica(settings)
        check_stages(settings, most)
        if not isinstance(config.workers, str):
            config = dataclasses.replace(config, workers=most)
        if config.out:
            RunFolder.open(
                dataclasses.replace(settings, workers=config.workers)
            )  # with the settings that the run will write
    with tempfile.NamedTemporaryFile("w", prefix="dtrp-", suffix=".yaml") as file:
        file.write(config_text(config))
        file.flush()
        arguments = ["-m", "dtrp", "train", "--config", file.name, *(["--quiet"] if quiet else [])]
        if config.resume:
            arguments += ["--resume", str(config.out)]
        elif config.out:
            arguments += ["--out", config.out, *(["--overwrite"] if config.overwrite else [])]
        try:
            _launch(arguments, config)
        except WorkersStopped as error:
            last_line = error.log.strip().rpartition("\n")[2].removeprefix("dtrp: ")
            message = last_line if last_line.startswith("stopped after") else "interrupted"
            raise Stopped(message, 128 + error.signal) from None
        except WorkersError as error:
            message, from_dtrp = str(error).removeprefix("dtrp: "), str(error).startswith("dtrp: ")
            if error.log.strip() and (error.exit_code < 0 or not from_dtrp):  # messages of native code are there alone
                click.echo(error.log, err=True)
            if error.exit_code < 0 or isinstance(config.workers, str):  # what a worker says is complete
                message = message.removesuffix(_resume_hint(config)) + _resume_hint(config)
            raise click.ClickException(message if from_dtrp else f"rank {error.rank} failed: {message}") from None


def _show(line: str) -> None:
    with lost_terminal_ignored():
        click.echo(line)


def _launch(arguments: list[str], config: TrainConfig) -> None:
    """Run ``python`` with these arguments in every worker."""
    from ..launch.elastic import run_elastic
    from ..launch.torchrun import run_workers

    if not isinstance(config.workers, str):
        assert config.workers is not None
        # The last stage of the first replica knows the loss.
        shown, restarts = config.workers - 1, config.max_restarts or 0
        run_workers(arguments, config.workers * config.replicas, shown=shown, max_restarts=restarts, say=_show)
        return
    out = Path(str(config.out)).expanduser()
    before = read_summary(out)  # of a run that is trained longer
    run_elastic(
        arguments,
        *worker_range(config.workers),
        max_restarts=10 if config.max_restarts is None else config.max_restarts,
        is_finished=lambda: read_summary(out) not in (None, before),
        say=_show,
    )
