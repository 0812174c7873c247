"""The options of ``dtrp train``, which other commands have in part, and the files that they are read from."""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click
import yaml

from ..data import list_data
from ..did_you_mean import unknown
from ..methods import list_methods
from ..models import list_models
from ..train.config import CHOICES, TrainConfig
from .option_types import Bytes, Count, Name, Numbers

Command = TypeVar("Command", bound=Callable[..., Any])
DEFAULTS = TrainConfig()
_MODELS = Name("model", tuple(list_models()))
DATA = Name("data", tuple(list_data()))
METHODS = Name("method", tuple(list_methods()))
CHOICE_TYPES = {field: Name(field.replace("_", " "), names) for field, names in CHOICES.items()}


def load_run(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
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


def _option(words: str, **settings: Any) -> tuple[str, Callable[[Command], Command]]:
    """An option by the name of its parameter, with the default that `TrainConfig` has."""
    name = words.split("/")[0].removeprefix("--").replace("-", "_")
    default = getattr(DEFAULTS, name, None)
    return name, click.option(words, **settings, **({} if default is None else {"default": default}))


_TRAIN_OPTIONS = dict(
    [
        _option(
            "--config",
            type=click.Path(),
            callback=_load_config,
            is_eager=True,
            expose_value=False,
            help="YAML or TOML file of these options (a run's own 'config' too); the command line wins.",
        ),
        _option("--data", type=DATA, help="Data set; digits is embedded, the others lie on disk."),
        _option(
            "--data-dir",
            type=click.Path(),
            help="Where the data set lies (for CIFAR, the current folder); for text, the file.",
        ),
        _option("--image-size", type=int, help="Side that the images of --data folder are brought to (32)."),
        _option("--augment/--no-augment", help="Random crop and flip, where the data set suits it."),
        _option("--model", type=_MODELS, help="Network."),
        _option("--layers", type=int, help="Blocks of gpt (6)."),
        _option("--width", type=int, help="Features of a token in gpt, a multiple of --heads (128)."),
        _option("--heads", type=int, help="Heads of each attention in gpt (4)."),
        _option("--context", type=int, help="Characters that gpt reads at once (64)."),
        _option(
            "--channels-last/--no-channels-last",
            help="Convolutions in torch's channels_last memory format, which is often the faster one.",
        ),
        _option("--method", type=METHODS, help="Training method; see 'dtrp methods'."),
        _option(
            "--stages",
            type=Count("auto"),
            help="K: the parts the network is cut into, of equal numbers of layers (4); auto: as many as there are workers.",
        ),
        _option(
            "--workers",
            type=Count("2:4"),
            help="Train in as many processes, a stage each, instead of in one; 2:4: go on with as many as there are.",
        ),
        _option(
            "--max-restarts",
            type=int,
            help="Failures of a worker after which all start again from the last save (0; of 2:4, 10).",
        ),
        _option(
            "--replicas",
            type=int,
            help="Copies of the pipeline, each with --workers processes and its share of every mini-batch.",
        ),
        _option(
            "--cuts",
            type=Numbers("layer numbers", "3,6,9"),
            help="First layer of each stage but the first, instead of --stages.",
        ),
        _option(
            "--num-microbatches",
            type=int,
            help="Parts of a mini-batch; about half the lead keeps the delay at 2 updates or less.",
        ),
        _option(
            "--ahead", type=float, help="Forwards ahead of the first backward, per stage behind (the method's own)."
        ),
        _option("--order", type=CHOICE_TYPES["order"], help="Within a slot (the method's own)."),
        _option(
            "--keep",
            help="What stages keep: auto (graphs, where --memory-limit allows), graph or input, or one for each: input,graph.",
        ),
        _option("--memory-limit", type=Bytes(), help="Of a stage, for --keep auto: 800MB, 2GiB."),
        _option(
            "--plan",
            type=click.Path(),
            help="What 'dtrp plan' wrote: method, cuts, batch size and learning rate scale.",
        ),
        _option(
            "--grad-shrink", type=float, help="Every stage multiplies the gradient it receives by this (fdg's beta)."
        ),
        _option("--lr-shrink", type=float, help="Learning rate times this, per stage behind (dtrp's gamma)."),
        _option("--prediction", type=CHOICE_TYPES["prediction"], help="Weight prediction instead of the method's own."),
        _option("--epochs", type=int, help="Passes over the training split."),
        _option("--max-updates", type=int, help="Stop after so many mini-batches."),
        _option("--limit-train", type=int, help="Use the first N training samples."),
        _option("--limit-test", type=int, help="Use the first N test samples."),
        _option("--batch-size", type=int, help="Samples in a mini-batch."),
        _option("--optimizer", type=CHOICE_TYPES["optimizer"], help="Optimizer of each stage."),
        _option("--lr", type=float, help="Base learning rate (sgd 0.03, the others 0.001)."),
        _option("--momentum", type=float, help="Of sgd."),
        _option("--nesterov/--no-nesterov", help="Nesterov momentum for sgd."),
        _option("--weight-decay", type=float, help="Weight decay (decoupled for adamw and nadam)."),
        _option(
            "--lr-schedule",
            type=CHOICE_TYPES["lr_schedule"],
            help="constant; cosine to 0; multistep: a tenth at half and again at three quarters of the run.",
        ),
        _option("--warmup-updates", type=int, help="Updates over which the learning rate rises."),
        _option("--max-grad-norm", type=float, help="Clip a mini-batch's gradient to this norm."),
        _option(
            "--clip",
            type=CHOICE_TYPES["clip"],
            help="Whose norm: each stage's, or that of all stages together (for methods that flush).",
        ),
        _option(
            "--on-nonfinite",
            type=CHOICE_TYPES["on_nonfinite"],
            help="A loss or gradient that is inf or nan: end the run, or leave that update out.",
        ),
        _option("--device", help="Device, or one per stage: cuda:0,cuda:1,..."),
        _option("--dtype", type=CHOICE_TYPES["dtype"], help="bfloat16: autocast over float32 weights."),
        _option("--threads", type=int, help="CPU threads (torch's default)."),
        _option("--seed", type=int, help="Of weights, order, augmentation and dropout."),
        _option(
            "--trace",
            is_flag=True,
            help="Write what ran when to trace.json in --out, for Perfetto and for 'dtrp report'.",
        ),
        _option(
            "--tensorboard",
            is_flag=True,
            help="Write events to tensorboard/ in --out, while it trains (tensorboard --logdir).",
        ),
        _option(
            "--prediction-error-every",
            type=Count("auto"),
            help="Compare predicted with true weights at every n-th micro-batch (0: never); auto: the 17th, in a short run sooner.",
        ),
        _option(
            "--out", type=click.Path(), help="Folder for config, metrics.jsonl, model.pt and, at the end, summary.json."
        ),
        _option("--overwrite", is_flag=True, help="Replace the run in --out."),
        _option(
            "--save-every",
            metavar="UPDATES|TIME",
            help="Save within an epoch too: every 500 updates, or every 90s, 5m or 1h.",
        ),
        _option(
            "--keep-last",
            type=int,
            help="Saves that are kept in --out, beside that of the best epoch; 0: none is made.",
        ),
    ]
)


def train_options(*names: str, without: tuple[str, ...] = ()) -> Callable[[Command], Command]:
    """Some options of ``dtrp train``, by the names of their parameters; or all, but for some."""
    return together(*(_TRAIN_OPTIONS[name] for name in names or _TRAIN_OPTIONS if name not in without))


def together(*options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    """Several options of a command, in this order."""

    def add(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return add
