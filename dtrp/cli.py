"""The command line: ``dtrp train``, ``demo``, ``schedule`` and ``methods``."""

from __future__ import annotations

import dataclasses
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import Any

import click
import yaml
from click.core import ParameterSource

from . import __version__
from .console import make_reporter, show_side_by_side
from .data import list_data
from .failure import WorkerError
from .methods import get_method, list_methods
from .models import list_models
from .names import unknown
from .ranks import under_launcher
from .runs import RunFolder
from .schedule import Schedule, ScheduleError
from .stage import StageError
from .train import CHOICES, Reporter, TrainConfig, Trainer, check_settings, config_text, workers_per_replica


def run(arguments: list[str] | None = None) -> int:
    """Run a command; a user's mistake is one line on stderr and exit code 2."""
    try:
        cli.main(arguments, prog_name="dtrp", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        print(error.format_message(), file=sys.stderr)
        return 2
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


class Name(click.ParamType):  # type: ignore[type-arg,unused-ignore]
    """One of some names; a wrong one is answered with the nearest right one."""

    def __init__(self, label: str, names: tuple[str, ...]) -> None:
        self.name = label
        self.names = names

    def get_metavar(self, param: click.Parameter, ctx: click.Context | None = None) -> str:
        return f"[{'|'.join(self.names)}]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if value in self.names:
            return str(value)
        self.fail(unknown(self.name, value, self.names), param, ctx)


class Cuts(click.ParamType):  # type: ignore[type-arg,unused-ignore]
    """Layer numbers: ``3,6,9``, or a list in a file."""

    name = "3,6,9"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        parts = value.split(",") if isinstance(value, str) else value
        try:
            return tuple(int(part) for part in parts)
        except (TypeError, ValueError):
            self.fail(f"{value!r} is no list of layer numbers like 3,6,9", param, ctx)


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
    known = {p.name for p in ctx.command.params if p.name and p.name != "config"}
    defaults = {}
    for key, entry in values.items():
        name = str(key).replace("-", "_")
        if name not in known:
            known_names = (k.replace("_", "-") for k in sorted(known))
            raise click.BadParameter(f"{value}: {unknown('option', key, known_names)}")
        if isinstance(entry, dict) or (isinstance(entry, list) and name != "cuts"):
            raise click.BadParameter(f"{value}: {key} holds {entry!r}; give one value")
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


@cli.command()
@click.option(
    "--config",
    type=click.Path(),
    callback=_load_config,
    is_eager=True,
    expose_value=False,
    help="YAML or TOML file of these options (a run's own 'config' too); the command line wins.",
)
@click.option(
    "--data", type=_DATA, default=_DEFAULTS.data, help="Data set; digits is embedded, the others lie on disk."
)
@click.option("--data-dir", type=click.Path(), help="Where the data set lies (for CIFAR, the current folder).")
@click.option("--image-size", type=int, help="Side that the images of --data folder are brought to (32).")
@click.option(
    "--augment/--no-augment", default=_DEFAULTS.augment, help="Random crop and flip, where the data set suits it."
)
@click.option("--model", type=_MODELS, default=_DEFAULTS.model, help="Network.")
@click.option("--method", type=_METHODS, default=_DEFAULTS.method, help="Training method; see 'dtrp methods'.")
@click.option("--stages", type=int, help="K: the parts the network is cut into, of equal numbers of layers (4).")
@click.option("--workers", type=int, help="Train in as many processes, a stage each, instead of in one.")
@click.option(
    "--replicas",
    type=int,
    default=_DEFAULTS.replicas,
    help="Copies of the pipeline, each with --workers processes and its share of every mini-batch.",
)
@click.option("--cuts", type=Cuts(), help="First layer of each stage but the first, instead of --stages.")
@click.option(
    "--num-microbatches",
    type=int,
    default=_DEFAULTS.num_microbatches,
    help="Parts of a mini-batch; about half the lead keeps the delay at 2 updates or less.",
)
@click.option("--grad-shrink", type=float, help="Every stage multiplies the gradient it receives by this (fdg's beta).")
@click.option("--lr-shrink", type=float, help="Learning rate times this, per stage behind (dtrp's gamma).")
@click.option("--prediction", type=_CHOICES["prediction"], help="Weight prediction instead of the method's own.")
@click.option("--epochs", type=int, default=_DEFAULTS.epochs, help="Passes over the training split.")
@click.option("--max-updates", type=int, help="Stop after so many mini-batches.")
@click.option("--limit-train", type=int, help="Use the first N training samples.")
@click.option("--limit-test", type=int, help="Use the first N test samples.")
@click.option("--batch-size", type=int, default=_DEFAULTS.batch_size, help="Samples in a mini-batch.")
@click.option("--optimizer", type=_CHOICES["optimizer"], default=_DEFAULTS.optimizer, help="Optimizer of each stage.")
@click.option("--lr", type=float, help="Base learning rate (sgd 0.03, the others 0.001).")
@click.option("--momentum", type=float, default=_DEFAULTS.momentum, help="Of sgd.")
@click.option(
    "--nesterov/--no-nesterov",
    default=_DEFAULTS.nesterov,
    help="Nesterov momentum for sgd.",
)
@click.option(
    "--weight-decay", type=float, default=_DEFAULTS.weight_decay, help="Weight decay (decoupled for adamw and nadam)."
)
@click.option(
    "--lr-schedule",
    type=_CHOICES["lr_schedule"],
    default=_DEFAULTS.lr_schedule,
    help="constant; cosine to 0; multistep: a tenth at half and again at three quarters of the run.",
)
@click.option(
    "--warmup-updates", type=int, default=_DEFAULTS.warmup_updates, help="Updates over which the learning rate rises."
)
@click.option("--device", default=_DEFAULTS.device, help="Device, or one per stage: cuda:0,cuda:1,...")
@click.option(
    "--dtype", type=_CHOICES["dtype"], default=_DEFAULTS.dtype, help="bfloat16: autocast over float32 weights."
)
@click.option("--threads", type=int, help="CPU threads (torch's default).")
@click.option("--seed", type=int, default=_DEFAULTS.seed, help="Of weights, order, augmentation and dropout.")
@click.option("--out", type=click.Path(), help="Folder for config, metrics.jsonl and model.pt.")
@click.option("--overwrite", is_flag=True, help="Replace the run in --out.")
def train(**options: Any) -> None:
    """Train a network and test it after each epoch.

    Settings are checked before anything is written. The folder of --out appears when the first epoch is
    through, and then always holds the last finished one.
    """
    # --stages and --cuts say the same thing: one that is typed replaces the other where a file brought it.
    source = click.get_current_context().get_parameter_source
    for typed, other in (("stages", "cuts"), ("cuts", "stages")):
        if source(typed) == ParameterSource.COMMANDLINE and source(other) == ParameterSource.DEFAULT_MAP:
            options[other] = None
    config = TrainConfig(**options)
    if (config.workers is not None or config.replicas > 1) and not under_launcher():
        _train_in_workers(config)
        return
    trainer = _checked(config)
    reporter = make_reporter() if trainer.reports else Reporter()
    with reporter:
        _trained(trainer, reporter)


def _train_in_workers(config: TrainConfig) -> None:
    """The same command in as many processes as it asks for."""
    from .workers import WorkersError, run_workers  # torchrun's interface takes a while to import

    try:
        check_settings(config)
        num_workers = workers_per_replica(config)
        if config.out:
            RunFolder(config.out, overwrite=config.overwrite)
    except (ValueError, OSError) as error:
        raise click.ClickException(str(error)) from error
    with tempfile.NamedTemporaryFile("w", prefix="dtrp-", suffix=".yaml") as file:
        file.write(config_text(dataclasses.replace(config, workers=num_workers)))
        file.flush()
        arguments = ["-m", "dtrp", "train", "--config", file.name]
        if config.out:
            arguments += ["--out", config.out, *(["--overwrite"] if config.overwrite else [])]
        try:
            # The last stage of the first replica knows the loss.
            run_workers(arguments, num_workers * config.replicas, shown=num_workers - 1)
        except WorkersError as error:
            message = str(error)
            if not message.startswith("dtrp: "):
                click.echo(error.log, err=True)
                message = f"dtrp: rank {error.rank} failed: {message}"
            raise click.ClickException(message.removeprefix("dtrp: ")) from None


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
    except StageError as error:
        cause = error.__cause__ if isinstance(error.__cause__, FloatingPointError) else error
        raise click.ClickException(str(cause)) from error
    except WorkerError as error:
        raise click.ClickException(str(error)) from error
    except OSError as error:
        raise click.ClickException(f"cannot write the run: {error}") from error


@cli.command()
@click.option("--method", type=_METHODS, default="dtrp", help="Training method.")
@click.option("--stages", type=click.IntRange(min=1), default=4, help="K.")
@click.option("--minibatches", type=click.IntRange(min=1), default=8, help="Mini-batches in the run.")
@click.option("--num-microbatches", type=click.IntRange(min=1), default=1, help="Micro-batches in each.")
@click.option("--ahead", type=float, help="Forwards ahead of the first backward, per stage behind (the method's own).")
@click.option(
    "--order", type=Name("order", ("backward-first", "forward-first")), help="Within a slot (the method's own)."
)
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
