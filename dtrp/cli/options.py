"""The options of ``dtrp train``, which other commands have in part, and the files that they are read from."""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import yaml

from ..data import list_data
from ..did_you_mean import unknown
from ..methods import list_methods
from ..models import list_models
from ..train.config import CHOICES, TrainConfig
from .option_types import Bytes, Count, Name, Numbers

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
        "--data", type=DATA, default=DEFAULTS.data, help="Data set; digits is embedded, the others lie on disk."
    ),
    click.option(
        "--data-dir",
        type=click.Path(),
        help="Where the data set lies (for CIFAR, the current folder); for text, the file.",
    ),
    click.option("--image-size", type=int, help="Side that the images of --data folder are brought to (32)."),
    click.option(
        "--augment/--no-augment", default=DEFAULTS.augment, help="Random crop and flip, where the data set suits it."
    ),
    click.option("--model", type=_MODELS, default=DEFAULTS.model, help="Network."),
    click.option("--layers", type=int, help="Blocks of gpt (6)."),
    click.option("--width", type=int, help="Features of a token in gpt, a multiple of --heads (128)."),
    click.option("--heads", type=int, help="Heads of each attention in gpt (4)."),
    click.option("--context", type=int, help="Characters that gpt reads at once (64)."),
    click.option(
        "--channels-last/--no-channels-last",
        default=DEFAULTS.channels_last,
        help="Convolutions in torch's channels_last memory format, which is often the faster one.",
    ),
    click.option("--method", type=METHODS, default=DEFAULTS.method, help="Training method; see 'dtrp methods'."),
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
        default=DEFAULTS.replicas,
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
        default=DEFAULTS.num_microbatches,
        help="Parts of a mini-batch; about half the lead keeps the delay at 2 updates or less.",
    ),
    click.option(
        "--ahead", type=float, help="Forwards ahead of the first backward, per stage behind (the method's own)."
    ),
    click.option("--order", type=CHOICE_TYPES["order"], help="Within a slot (the method's own)."),
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
    click.option(
        "--prediction", type=CHOICE_TYPES["prediction"], help="Weight prediction instead of the method's own."
    ),
    click.option("--epochs", type=int, default=DEFAULTS.epochs, help="Passes over the training split."),
    click.option("--max-updates", type=int, help="Stop after so many mini-batches."),
    click.option("--limit-train", type=int, help="Use the first N training samples."),
    click.option("--limit-test", type=int, help="Use the first N test samples."),
    click.option("--batch-size", type=int, default=DEFAULTS.batch_size, help="Samples in a mini-batch."),
    click.option(
        "--optimizer", type=CHOICE_TYPES["optimizer"], default=DEFAULTS.optimizer, help="Optimizer of each stage."
    ),
    click.option("--lr", type=float, help="Base learning rate (sgd 0.03, the others 0.001)."),
    click.option("--momentum", type=float, default=DEFAULTS.momentum, help="Of sgd."),
    click.option(
        "--nesterov/--no-nesterov",
        default=DEFAULTS.nesterov,
        help="Nesterov momentum for sgd.",
    ),
    click.option(
        "--weight-decay",
        type=float,
        default=DEFAULTS.weight_decay,
        help="Weight decay (decoupled for adamw and nadam).",
    ),
    click.option(
        "--lr-schedule",
        type=CHOICE_TYPES["lr_schedule"],
        default=DEFAULTS.lr_schedule,
        help="constant; cosine to 0; multistep: a tenth at half and again at three quarters of the run.",
    ),
    click.option(
        "--warmup-updates",
        type=int,
        default=DEFAULTS.warmup_updates,
        help="Updates over which the learning rate rises.",
    ),
    click.option("--max-grad-norm", type=float, help="Clip a mini-batch's gradient to this norm."),
    click.option(
        "--clip",
        type=CHOICE_TYPES["clip"],
        default=DEFAULTS.clip,
        help="Whose norm: each stage's, or that of all stages together (for methods that flush).",
    ),
    click.option(
        "--on-nonfinite",
        type=CHOICE_TYPES["on_nonfinite"],
        default=DEFAULTS.on_nonfinite,
        help="A loss or gradient that is inf or nan: end the run, or leave that update out.",
    ),
    click.option("--device", default=DEFAULTS.device, help="Device, or one per stage: cuda:0,cuda:1,..."),
    click.option(
        "--dtype", type=CHOICE_TYPES["dtype"], default=DEFAULTS.dtype, help="bfloat16: autocast over float32 weights."
    ),
    click.option("--threads", type=int, help="CPU threads (torch's default)."),
    click.option("--seed", type=int, default=DEFAULTS.seed, help="Of weights, order, augmentation and dropout."),
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
        type=Count("auto"),
        default=DEFAULTS.prediction_error_every,
        help="Compare predicted with true weights at every n-th micro-batch (0: never); auto: the 17th, in a short run sooner.",
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
        default=DEFAULTS.keep_last,
        help="Saves that are kept in --out, beside that of the best epoch; 0: none is made.",
    ),
]


def train_options(*names: str, without: tuple[str, ...] = ()) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Some options of ``dtrp train``, by the names of their parameters; or all, but for some."""

    def add(command: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(_TRAIN_OPTIONS):
            before = len(getattr(command, "__click_params__", ()))
            command = option(command)
            added: list[click.Parameter] = command.__click_params__  # type: ignore[attr-defined]
            if len(added) > before and (added[-1].name in without or (names and added[-1].name not in names)):
                added.pop()
        return command

    return add
