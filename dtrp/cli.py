"""The command line: ``dtrp train``, ``compare``, ``report``, ``demo``, ``plan``, ``simulate``, ``schedule`` and ``methods``."""

from __future__ import annotations

import dataclasses
import math
import sys
import tempfile
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import yaml
from click.core import ParameterSource
from rich.console import Console

from . import __version__
from .compare import Comparison, grid, read_summary
from .console import PlainReporter, make_reporter, show_comparison, show_plan, show_side_by_side, show_simulations
from .data import list_data
from .failure import WorkerError
from .methods import get_method, list_methods
from .models import list_models
from .names import unknown
from .option_types import Bytes, Count, Name, Names, Numbers, Sizes, Times
from .planning import simulate as run_simulation
from .planning.choose import LR_SCALING
from .ranks import launched
from .runs import RunFolder, left_by
from .saving import CheckpointError
from .schedule import Schedule, ScheduleError
from .staff import worker_range, workers_per_replica
from .stage import StageError
from .train import (
    CHOICES,
    Interrupted,
    Reporter,
    TrainConfig,
    Trainer,
    check_settings,
    config_text,
    make_plan,
    resolved,
)


class Stopped(BaseException):
    """The run was asked to stop and did. No error, as `KeyboardInterrupt` is none: who notes errors and goes on lets it pass."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


def run(arguments: list[str] | None = None) -> int:
    """Run a command; a user's mistake is one line on stderr and exit code 2."""
    try:
        cli.main(arguments, prog_name="dtrp", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        print(error.format_message(), file=sys.stderr)
        return 2
    except Stopped as error:
        return _complain(str(error), error.code)
    except click.ClickException as error:
        return _complain(error.format_message())
    except (click.Abort, KeyboardInterrupt):
        return _complain("interrupted", 130)
    except BrokenPipeError:  # the reader of a pipe has seen enough
        sys.stdout = None
    return 0


def _complain(text: str, code: int = 2) -> int:
    print(f"dtrp: {' '.join(text.split())}", file=sys.stderr)
    return code


def _load_run(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    """Make a run's settings the defaults of the other options, unless a file of settings has been read."""
    if value is not None and not ctx.default_map:
        _load_config(ctx, param, str(Path(value) / "config"))
    return value


def _load_config(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    """Make a file's values the defaults of the other options."""
    if value is None:
        return None
    path = Path(value)
    try:
        text = path.read_text()
        values = tomllib.loads(text) if path.suffix == ".toml" else yaml.safe_load(text)
    except (OSError, UnicodeDecodeError) as error:
        raise click.BadParameter(f"cannot read {value}: {error}") from None
    except (tomllib.TOMLDecodeError, yaml.YAMLError) as error:
        raise click.BadParameter(f"{value} is no {'TOML' if path.suffix == '.toml' else 'YAML'}: {error}") from None
    if not isinstance(values, dict):
        raise click.BadParameter(f"{value} holds no options; write lines like 'method: dtrp'")
    known = {p.name: p for p in ctx.command.params if p.name and p.name not in ("config", "resume")}
    defaults = {}
    for key, entry in values.items():
        name = str(key).replace("-", "_")
        if name not in known:
            known_names = (k.replace("_", "-") for k in sorted(known))
            raise click.BadParameter(f"{value}: {unknown('option', key, known_names)}")
        if isinstance(entry, dict) or (isinstance(entry, list) and name != "cuts"):
            raise click.BadParameter(f"{value}: {key} holds {entry!r}; give one value")
        if isinstance(entry, bool) and not getattr(known[name], "is_flag", False):
            raise click.BadParameter(
                f"{value}: {key} holds {entry!r}, and is no switch; give its value (in quotes, if it is a word)"
            )
        if entry is not None:
            defaults[name] = entry if isinstance(entry, (str, bool, list)) else str(entry)
    ctx.default_map = {**(ctx.default_map or {}), **defaults}
    return value


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110, "show_default": True})
@click.version_option(__version__, prog_name="dtrp")
def cli() -> None:
    """Train a network that is spread over several workers, without waiting."""


_DEFAULTS = TrainConfig()
_MODELS = Name("model", tuple(list_models()))
_DATA = Name("data", tuple(list_data()))
_METHODS = Name("method", tuple(list_methods()))
_CHOICES = {field: Name(field.replace("_", " "), names) for field, names in CHOICES.items()}


_TRAIN_OPTIONS = [
    click.option(
        "--config",
        type=click.Path(),
        callback=_load_config,
        is_eager=True,
        expose_value=False,
        help="YAML or TOML file of these options (a run's own 'config' too); the command line wins.",
    ),
    click.option(
        "--data", type=_DATA, default=_DEFAULTS.data, help="Data set; digits is embedded, the others lie on disk."
    ),
    click.option(
        "--data-dir",
        type=click.Path(),
        help="Where the data set lies (for CIFAR, the current folder); for text, the file.",
    ),
    click.option("--image-size", type=int, help="Side that the images of --data folder are brought to (32)."),
    click.option(
        "--augment/--no-augment", default=_DEFAULTS.augment, help="Random crop and flip, where the data set suits it."
    ),
    click.option("--model", type=_MODELS, default=_DEFAULTS.model, help="Network."),
    click.option("--layers", type=int, help="Blocks of gpt (6)."),
    click.option("--width", type=int, help="Features of a token in gpt, a multiple of --heads (128)."),
    click.option("--heads", type=int, help="Heads of each attention in gpt (4)."),
    click.option("--context", type=int, help="Characters that gpt reads at once (64)."),
    click.option("--method", type=_METHODS, default=_DEFAULTS.method, help="Training method; see 'dtrp methods'."),
    click.option(
        "--stages",
        type=Count("auto"),
        help="K: the parts the network is cut into, of equal numbers of layers (4); auto: as many as there are workers.",
    ),
    click.option(
        "--workers",
        type=Count("2:4"),
        help="Train in as many processes, a stage each, instead of in one; 2:4: go on with as many as there are.",
    ),
    click.option(
        "--max-restarts",
        type=int,
        help="Failures of a worker after which all start again from the last save (0; of 2:4, 10).",
    ),
    click.option(
        "--replicas",
        type=int,
        default=_DEFAULTS.replicas,
        help="Copies of the pipeline, each with --workers processes and its share of every mini-batch.",
    ),
    click.option(
        "--cuts",
        type=Numbers("layer numbers", "3,6,9"),
        help="First layer of each stage but the first, instead of --stages.",
    ),
    click.option(
        "--num-microbatches",
        type=int,
        default=_DEFAULTS.num_microbatches,
        help="Parts of a mini-batch; about half the lead keeps the delay at 2 updates or less.",
    ),
    click.option(
        "--ahead", type=float, help="Forwards ahead of the first backward, per stage behind (the method's own)."
    ),
    click.option("--order", type=_CHOICES["order"], help="Within a slot (the method's own)."),
    click.option(
        "--keep",
        help="What stages keep: auto (graphs, where --memory-limit allows), graph or input, or one for each: input,graph.",
    ),
    click.option("--memory-limit", type=Bytes(), help="Of a stage, for --keep auto: 800MB, 2GiB."),
    click.option(
        "--plan", type=click.Path(), help="What 'dtrp plan' wrote: method, cuts, batch size and learning rate scale."
    ),
    click.option(
        "--grad-shrink", type=float, help="Every stage multiplies the gradient it receives by this (fdg's beta)."
    ),
    click.option("--lr-shrink", type=float, help="Learning rate times this, per stage behind (dtrp's gamma)."),
    click.option("--prediction", type=_CHOICES["prediction"], help="Weight prediction instead of the method's own."),
    click.option("--epochs", type=int, default=_DEFAULTS.epochs, help="Passes over the training split."),
    click.option("--max-updates", type=int, help="Stop after so many mini-batches."),
    click.option("--limit-train", type=int, help="Use the first N training samples."),
    click.option("--limit-test", type=int, help="Use the first N test samples."),
    click.option("--batch-size", type=int, default=_DEFAULTS.batch_size, help="Samples in a mini-batch."),
    click.option(
        "--optimizer", type=_CHOICES["optimizer"], default=_DEFAULTS.optimizer, help="Optimizer of each stage."
    ),
    click.option("--lr", type=float, help="Base learning rate (sgd 0.03, the others 0.001)."),
    click.option("--momentum", type=float, default=_DEFAULTS.momentum, help="Of sgd."),
    click.option(
        "--nesterov/--no-nesterov",
        default=_DEFAULTS.nesterov,
        help="Nesterov momentum for sgd.",
    ),
    click.option(
        "--weight-decay",
        type=float,
        default=_DEFAULTS.weight_decay,
        help="Weight decay (decoupled for adamw and nadam).",
    ),
    click.option(
        "--lr-schedule",
        type=_CHOICES["lr_schedule"],
        default=_DEFAULTS.lr_schedule,
        help="constant; cosine to 0; multistep: a tenth at half and again at three quarters of the run.",
    ),
    click.option(
        "--warmup-updates",
        type=int,
        default=_DEFAULTS.warmup_updates,
        help="Updates over which the learning rate rises.",
    ),
    click.option("--max-grad-norm", type=float, help="Clip a mini-batch's gradient to this norm."),
    click.option(
        "--clip",
        type=_CHOICES["clip"],
        default=_DEFAULTS.clip,
        help="Whose norm: each stage's, or that of all stages together (for methods that flush).",
    ),
    click.option(
        "--on-nonfinite",
        type=_CHOICES["on_nonfinite"],
        default=_DEFAULTS.on_nonfinite,
        help="A loss or gradient that is inf or nan: end the run, or leave that update out.",
    ),
    click.option("--device", default=_DEFAULTS.device, help="Device, or one per stage: cuda:0,cuda:1,..."),
    click.option(
        "--dtype", type=_CHOICES["dtype"], default=_DEFAULTS.dtype, help="bfloat16: autocast over float32 weights."
    ),
    click.option("--threads", type=int, help="CPU threads (torch's default)."),
    click.option("--seed", type=int, default=_DEFAULTS.seed, help="Of weights, order, augmentation and dropout."),
    click.option(
        "--trace", is_flag=True, help="Write what ran when to trace.json in --out, for Perfetto and for 'dtrp report'."
    ),
    click.option(
        "--tensorboard",
        is_flag=True,
        help="Write events to tensorboard/ in --out, while it trains (tensorboard --logdir).",
    ),
    click.option(
        "--prediction-error-every",
        type=int,
        default=_DEFAULTS.prediction_error_every,
        help="Compare predicted with true weights at every n-th micro-batch (0: never).",
    ),
    click.option(
        "--out", type=click.Path(), help="Folder for config, metrics.jsonl, model.pt and, at the end, summary.json."
    ),
    click.option("--overwrite", is_flag=True, help="Replace the run in --out."),
    click.option(
        "--save-every",
        metavar="UPDATES|TIME",
        help="Save within an epoch too: every 500 updates, or every 90s, 5m or 1h.",
    ),
    click.option(
        "--keep-last",
        type=int,
        default=_DEFAULTS.keep_last,
        help="Saves that are kept in --out, beside that of the best epoch; 0: none is made.",
    ),
]


def _train_options(*, without: tuple[str, ...] = ()) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """The options of ``dtrp train``, but for some."""

    def add(command: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(_TRAIN_OPTIONS):
            before = len(getattr(command, "__click_params__", ()))
            command = option(command)
            added: list[click.Parameter] = command.__click_params__  # type: ignore[attr-defined]
            if len(added) > before and added[-1].name in without:
                added.pop()
        return command

    return add


@cli.command()
@_train_options()
@click.option("--quiet", is_flag=True, help="Plain lines on a terminal too.")
@click.option(
    "--resume",
    type=click.Path(),
    callback=_load_run,
    is_eager=True,
    help="Go on with the run in this folder, from its last save, with its own settings; options beside it win.",
)
def train(*, quiet: bool, resume: str | None, **options: Any) -> None:
    """Train a network and test it after each epoch.

    Settings are checked before anything is written. The folder of --out appears when the first epoch is
    through, or with the first save, and then always holds the last finished one. Where it holds an unfinished run of
    these very settings, that run goes on.
    """
    # --stages and --cuts say the same thing: one that is typed replaces the other where a file brought it.
    source = click.get_current_context().get_parameter_source
    for typed, other in (("stages", "cuts"), ("cuts", "stages")):
        if source(typed) == ParameterSource.COMMANDLINE and source(other) == ParameterSource.DEFAULT_MAP:
            options[other] = None
    if resume is not None:
        if source("out") == ParameterSource.COMMANDLINE or source("overwrite") == ParameterSource.COMMANDLINE:
            raise click.UsageError("--resume goes on in the run's own folder; leave --out and --overwrite out")
        options = {**options, "out": resume, "overwrite": False}
        finished = read_summary(Path(resume))
        if finished is not None and not launched() and options["epochs"] <= finished["epochs"]:
            click.echo(
                f"{resume} is finished: {finished['epochs']} epochs, {finished['updates']} updates; to train longer, "
                "pass --epochs"
            )
            return
    config = TrainConfig(**options, resume=resume is not None)
    if (config.workers is not None or config.replicas > 1) and not launched():
        _train_in_workers(config, quiet=quiet)
        return
    if config.out and launched() and left_by(config.out, "", overwrite=False) == "finished":
        return  # a worker has failed after the end
    trainer = _checked(config)
    reporter = make_reporter(quiet=quiet) if trainer.reports else Reporter()
    with reporter:
        _trained(trainer, reporter)


def _train_in_workers(config: TrainConfig, *, quiet: bool = True) -> None:
    """The same command in as many processes as it asks for."""
    from .elastic import run_elastic  # torchrun's interface takes a while to import
    from .workers import WorkersError, WorkersStopped, run_workers

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


_OF_A_CELL = (
    "method", "prediction", "stages", "cuts", "num_microbatches", "seed", "out", "overwrite", "plan", "workers", "replicas",
    "max_restarts",
    "memory_limit", "keep",
)  # fmt: skip
_OF_SAVES = ("save_every", "keep_last")  # a cell that is broken off begins again
# A prime, so that micro-batches at every place in a mini-batch are looked at, whatever A is (but for its multiples).
_LOOK_EVERY = 17


@cli.command()
@click.option(
    "--methods", type=Names("method", tuple(list_methods())), default="bp,fdg,dtr,dtrp", help="Some of them: bp,dtrp."
)
@click.option("--stages", type=Numbers("whole numbers", "1,2,4"), default="4", help="Every K.")
@click.option("--num-microbatches", default="1", help="Every A; K for as many as stages: 1,K.")
@click.option(
    "--predictions",
    type=Names("prediction", CHOICES["prediction"]),
    help="For methods that predict: linear,rollout,informed.",
)
@click.option("--seeds", type=click.IntRange(min=1), default=3, help="Runs of each, with seeds 0, 1, ...")
@click.option(
    "--once/--every-k",
    default=None,
    help="Run a method that flushes at one K for each A: its accuracy is the same at every K, its time and memory are not (once; "
    "with --workers at every K).",
)
@click.option("--workers/--one-process", default=False, help="A process for each stage.")
@click.option(
    "--prediction-error-every",
    type=int,
    default=_LOOK_EVERY,
    help="Compare predicted with true weights at every n-th micro-batch (0: never); a multiple of A looks at the first ones of "
    "mini-batches alone.",
)
@click.option(
    "--out", type=click.Path(), required=True, help="Folder of the comparison; one that is there is gone on with."
)
@_train_options(without=(*_OF_A_CELL, *_OF_SAVES, "prediction_error_every"))
def compare(
    methods: tuple[str, ...],
    stages: tuple[int, ...],
    num_microbatches: str,
    predictions: tuple[str, ...] | None,
    seeds: int,
    once: bool | None,
    workers: bool,
    out: str,
    **options: Any,
) -> None:
    """Train by several methods, and show accuracy, time, memory, delay and prediction error side by side.

    Every cell of the grid is a run of its own. Break it off and start it again: what is finished is not repeated. Every other
    option is one of 'dtrp train'.
    """
    base = TrainConfig(**options, workers=1 if workers else None)
    try:
        once = not workers if once is None else once
        cells = grid(methods, stages, num_microbatches.split(","), range(seeds), predictions or (), once=once)
        comparison = Comparison(base, cells, out)
    except (ValueError, OSError) as error:
        raise click.ClickException(str(error)) from error

    def work(config: TrainConfig) -> None:
        if config.workers is not None:
            _train_in_workers(config)
            return
        trainer = Trainer(config)
        with PlainReporter(Console(width=140), table=False) as reporter:
            trainer.run(reporter)

    try:
        failed = comparison.run(work, click.echo)
    except OSError as error:
        raise click.ClickException(f"cannot write to {out}: {error}") from error
    groups = comparison.groups()
    if groups:
        show_comparison(groups)
    if failed:
        names = ", ".join(cell.name for cell in failed[:3]) + (", ..." if len(failed) > 3 else "")
        raise click.ClickException(
            f"{len(failed)} of {len(cells)} cells failed ({names}); why stands in {out}/*.failed. The same command tries them again"
        )


@cli.command()
@click.argument("runs", nargs=-1, required=True, type=click.Path())
@click.option("--out", type=click.Path(dir_okay=False), default="report.html", help="The file to write.")
@click.option("--figures", type=click.Path(file_okay=False), help="Folder for each figure as SVG and PNG.")
def report(runs: tuple[str, ...], out: str, figures: str | None) -> None:
    """One HTML file about runs and comparisons: curves, memory, time, delays, prediction error, schedules, settings.

    RUNS are folders that 'dtrp train --out' or 'dtrp compare --out' has written. The file needs nothing beside it.
    """
    try:
        from .report import write_report  # matplotlib takes a while to import
    except ImportError as error:
        raise click.ClickException(f"{error}; install the extra: pip install 'dtrp[report]'") from error
    try:
        collection = write_report(list(runs), out, figures)
    except (ValueError, OSError) as error:
        raise click.ClickException(str(error)) from error
    click.echo(f"{len(collection.runs)} runs; written to {out}" + (f", figures to {figures}" if figures else ""))


@cli.command()
@click.option("--epochs", type=int, default=12, help="Passes over the training split.")
@click.option("--threads", type=int, default=1, help="CPU threads; the networks are too small for more.")
@click.option("--seed", type=int, default=0, help="Of weights, order and dropout.")
def demo(epochs: int, threads: int | None, seed: int) -> None:
    """Train a small ResNet on handwritten digits with bp and with dtrp, and show the two side by side."""
    base = TrainConfig(
        data="digits", model="resnet20", stages=4, num_microbatches=4, batch_size=64, epochs=epochs, lr=0.05,
        threads=threads, seed=seed,
    )  # fmt: skip
    results = []
    for method in ("bp", "dtrp"):
        trainer = _checked(dataclasses.replace(base, method=method))
        reporter = make_reporter(table=False)
        with reporter:
            results.append(_trained(trainer, reporter))
    show_side_by_side(results)


def _checked(config: TrainConfig) -> Trainer:
    try:
        return Trainer(config)
    except (ValueError, TypeError, OSError, ImportError, StageError, WorkerError) as error:
        raise click.ClickException(str(error)) from error


def _trained(trainer: Trainer, reporter: Any) -> Any:
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


@cli.command()
@click.option("--method", type=_METHODS, default="dtrp", help="Training method.")
@click.option("--stages", type=click.IntRange(min=1), default=4, help="K.")
@click.option("--minibatches", type=click.IntRange(min=1), default=8, help="Mini-batches in the run.")
@click.option("--num-microbatches", type=click.IntRange(min=1), default=1, help="Micro-batches in each.")
@click.option("--ahead", type=float, help="Forwards ahead of the first backward, per stage behind (the method's own).")
@click.option("--order", type=_CHOICES["order"], help="Within a slot (the method's own).")
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
    try:
        if check is not None:
            grid = Schedule.parse(check.read())
        else:
            options: dict[str, Any] = {} if ahead is None else {"ahead": ahead}
            if order is not None:
                options["backward_first"] = order == "backward-first"
            grid = Schedule.build(get_method(method, **options), stages, minibatches, num_microbatches)
        grid.validate()
    except ScheduleError as error:
        raise GridError(str(error)) from error
    except ValueError as error:
        raise click.ClickException(str(error)) from error
    click.echo(str(grid))


@cli.command()
@click.option("--data", type=_DATA, default=_DEFAULTS.data, help="Data set, for the shape of a batch.")
@click.option("--data-dir", type=click.Path(), help="Where the data set lies.")
@click.option("--image-size", type=int, help="Side that the images of --data folder are brought to (32).")
@click.option("--model", type=_MODELS, default=_DEFAULTS.model, help="Network.")
@click.option("--layers", type=int, help="Blocks of gpt (6).")
@click.option("--width", type=int, help="Features of a token in gpt, a multiple of --heads (128).")
@click.option("--heads", type=int, help="Heads of each attention in gpt (4).")
@click.option("--context", type=int, help="Characters that gpt reads at once (64).")
@click.option("--method", type=_METHODS, default=_DEFAULTS.method, help="Training method; see 'dtrp methods'.")
@click.option("--workers", type=click.IntRange(min=1), required=True, help="K: how many there are.")
@click.option("--batch-size", type=click.IntRange(min=1), default=_DEFAULTS.batch_size, help="The base mini-batch.")
@click.option(
    "--num-microbatches",
    type=click.IntRange(min=1),
    help="Parts of a mini-batch (1, or what --max-delay asks for or --compensate finds).",
)
@click.option("--optimizer", type=_CHOICES["optimizer"], default=_DEFAULTS.optimizer, help="Optimizer of each stage.")
@click.option("--momentum", type=float, default=_DEFAULTS.momentum, help="Of sgd; 0: it has no state.")
@click.option("--weight-decay", type=float, default=_DEFAULTS.weight_decay, help="As of 'dtrp train'.")
@click.option("--prediction", type=_CHOICES["prediction"], help="Weight prediction instead of the method's own.")
@click.option(
    "--keep",
    type=Name("keep", ("auto", "graph", "input")),
    help="What stages keep (the method's own; with --compensate auto).",
)
@click.option("--memory-limit", type=Bytes(), help="Of a worker: 800MB, 2GiB.")
@click.option("--latency", type=float, help="Seconds a message takes (as measured on this machine's loopback).")
@click.option("--bandwidth", type=Bytes(), help="Of a link, bytes a second: 125MB, 10GB (as measured).")
@click.option("--choose-lead/--keep-lead", default=True, help="Choose ahead and the order of a slot by the latency.")
@click.option("--compensate", is_flag=True, help="Choose the mini-batch too, and what is kept.")
@click.option("--max-batch-size", type=click.IntRange(min=1), help="Largest mini-batch to try (32 times the base).")
@click.option("--max-delay", type=click.IntRange(min=0), help="In updates; met by more micro-batches.")
@click.option("--lr-scaling", type=Name("lr scaling", tuple(LR_SCALING)), default="linear", help="With the mini-batch.")
@click.option("--device", default=_DEFAULTS.device, help="Where to measure.")
@click.option("--dtype", type=_CHOICES["dtype"], default=_DEFAULTS.dtype, help="As of 'dtrp train'.")
@click.option(
    "--threads", type=click.IntRange(min=1), default=1, help="CPU threads of a worker, and of the one worker."
)
@click.option("--repeats", type=click.IntRange(min=1), default=7, help="Rounds of the measurement.")
@click.option("--out", type=click.Path(dir_okay=False), default="plan.json", help="The file to write.")
@click.option("--overwrite", is_flag=True, help="Replace it if it is there.")
def plan(**options: Any) -> None:
    """Measure a network and choose where to cut it, what to keep, how large a batch, and whether to.

    The plan is a small file that 'dtrp train --plan' and Pipeline(plan=...) take; it may be edited.
    """
    out = Path(options["out"])
    if out.exists() and not options["overwrite"]:
        raise click.ClickException(f"{out} is there already; pass --overwrite, or another --out")
    if not out.absolute().parent.is_dir():
        raise click.ClickException(f"{out.absolute().parent} is no folder; make it, or pass another --out")
    shared = (
        "data",
        "data_dir",
        "image_size",
        "model",
        "layers",
        "width",
        "heads",
        "context",
        "method",
        "batch_size",
        "optimizer",
        "momentum",
        "weight_decay",
        "prediction",
        "device",
        "dtype",
        "threads",
    )
    config = TrainConfig(**{name: options[name] for name in shared})
    try:
        made = make_plan(
            config,
            say=lambda text: click.echo(f"{text} ...", err=True),
            num_workers=options["workers"],
            num_microbatches=options["num_microbatches"],
            keep=options["keep"],
            memory_limit_bytes=options["memory_limit"],
            latency_s=options["latency"],
            bandwidth_bytes_s=options["bandwidth"],
            choose_lead=options["choose_lead"],
            compensate=options["compensate"],
            max_batch_size=options["max_batch_size"],
            max_delay=options["max_delay"],
            lr_scaling=options["lr_scaling"],
            repeats=options["repeats"],
        )
        made.save(out)
    except (ValueError, TypeError, OSError, ImportError, RuntimeError) as error:
        raise click.ClickException(str(error)) from error
    show_plan(made)
    told = [f"--{name} {options[name.replace('-', '_')]}"
            for name in ("data-dir", "image-size", "layers", "width", "heads", "context", "optimizer", "momentum",
                         "weight-decay", "dtype")
            if options[name.replace("-", "_")] != getattr(_DEFAULTS, name.replace("-", "_"))]  # fmt: skip
    told.append(f"--workers {options['workers']}" if options["workers"] > 1 else "")
    command = " ".join(
        filter(None, [f"dtrp train --data {config.data} --model {config.model}", *told, f"--plan {out}"])
    )
    click.echo(f"written to {out}; train by it:\n  {command}")


@cli.command()
@click.option("--method", "names", type=_METHODS, multiple=True, default=("dtrp",), help="May be given several times.")
@click.option("--stages", type=click.IntRange(min=1), default=4, help="K.")
@click.option(
    "--minibatches", type=click.IntRange(min=1), help="Mini-batches in the run (long enough for a steady state)."
)
@click.option("--num-microbatches", type=click.IntRange(min=1), default=1, help="Micro-batches in each.")
@click.option("--ahead", type=float, help="Forwards ahead of the first backward, per stage behind (the method's own).")
@click.option("--order", type=_CHOICES["order"], help="Within a slot (the method's own).")
@click.option("--keep", type=Name("keep", ("graph", "input")), help="What stages keep (the method's own).")
@click.option("--forward", type=Times(), default=1.0, help="Seconds of a micro-batch's forward; one, or one a stage.")
@click.option("--backward", type=Times(), default=2.0, help="Seconds of its backward; one, or one a stage.")
@click.option("--nograd-forward", type=Times(), help="Seconds of a forward without a graph (as --forward).")
@click.option("--update", type=Times(), default=0.0, help="Seconds of an update; one, or one a stage.")
@click.option("--latency", type=Times(), default=0.0, help="Seconds a message takes; one, or one a hop.")
@click.option("--bandwidth", type=Sizes(), help="Of a link, bytes a second (unbounded); one, or one a hop.")
@click.option("--message", type=Sizes(), default=0, help="Size of a micro-batch's activations; one, or one a hop.")
@click.option("--predict", type=Times(), default=0.0, help="Seconds of a prediction; one, or one a stage.")
@click.option("--speed", type=Times(), default=1.0, help="Of the devices; one, or one a stage.")
@click.option("--weights", type=Sizes(), help="Bytes of a stage's parameters: shows the memory; one, or one a stage.")
@click.option("--optimizer-state", type=Sizes(), default=0, help="Bytes of its optimizer's state.")
@click.option("--input", type=Sizes(), default=0, help="Bytes of its input, a micro-batch.")
@click.option("--graph", type=Sizes(), default=0, help="Bytes of its activations, a micro-batch.")
@click.option("--timeline", is_flag=True, help="List every action too.")
def simulate(**options: Any) -> None:
    """Run a schedule with given times, without a network: time per mini-batch, waiting, delays.

    Any unit of time will do. Methods that are named together are simulated under the same times.
    """
    stages, size = options["stages"], options["num_microbatches"]
    rows = []
    try:
        for name in options["names"]:
            chosen: dict[str, Any] = {} if options["ahead"] is None else {"ahead": options["ahead"]}
            if options["order"] is not None:
                chosen["backward_first"] = options["order"] == "backward-first"
            method = get_method(name, **chosen)
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


class GridError(click.ClickException):
    """An invalid schedule: the rule on one line, then the grid with the cell marked."""

    def format_message(self) -> str:
        rule, _, grid = self.message.partition("\n")
        if grid:
            click.echo(grid)
        return rule


@cli.command()
@click.argument("name", type=_METHODS, required=False)
def methods(name: str | None) -> None:
    """List the methods, or say what one does: its update rule, delay, memory and source."""
    for each in [name] if name else list_methods():
        text = get_method(each).__doc__ or ""
        click.echo(f"{each}\n\n{text}" if name else f"{each:12}{text.splitlines()[0]}")
