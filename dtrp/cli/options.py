"""The options of ``dtrp train``, some of which other commands have too, and the files that give their values."""

from __future__ import annotations

import tomllib
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from types import NoneType
from typing import Any, TypeVar, get_args, get_type_hints

import click
import yaml

from ..data import list_data
from ..methods import list_methods
from ..models import list_models
from ..train.config import CHOICES, COMPARISON, METRICS, PROGRAM, REPEATED_OPTIONS, TrainConfig
from ..validation import unknown
from .option_types import INTERVAL, SIZE, Name, NameOrReference, Parsed, count, numbers, words

Command = TypeVar("Command", bound=Callable[..., Any])
DEFAULTS = TrainConfig()
# Options that may be lists in a file.
_LISTS = ("cuts", "leads", "orders", "points", "model_arg", "data_arg", "metric", "callback", "mean", "std")
_NAMES = {**CHOICES, "data": list_data(), "model": list_models(), "method": list_methods()}
NAME_TYPES: dict[str, Parsed] = {field: Name(field.replace("_", " "), names) for field, names in _NAMES.items()}
NAME_TYPES |= {field: NameOrReference(field, _NAMES[field]) for field in ("model", "data")}
# The types of the other options are those of the fields of TrainConfig.
_TYPES = {
    **NAME_TYPES,
    **dict.fromkeys(("data_dir", "plan", "out", "listing"), click.Path()),
    **dict.fromkeys(("mean", "std"), numbers("numbers", "0.5,0.5,0.5", float)),
    **dict.fromkeys(("stages", "num_microbatches", "prediction_error_every"), count("auto")),
    "workers": count("2:4"),
    "cuts": numbers("layer numbers", "3,6,9"),
    "leads": numbers("forwards ahead", "3,2,1,0"),
    "orders": words("RFIW,RIFW,FIW"),
    "points": words("blocks.2,blocks.4"),
    **dict.fromkeys(("model_arg", "data_arg", "callback"), click.STRING),
    "metric": NameOrReference("metric", METRICS),
    "memory_limit": SIZE,
    "save_every": INTERVAL,
}
_HELP = {
    "--data": "Data set: a name, digits is embedded, the others lie on disk; package.module:function or file.py:function.",
    "--data-arg": "name=value: an argument of that function, once for each.",
    "--data-dir": "Where the data set lies (for CIFAR and the MNISTs, the current folder); for text, the file.",
    "--image-size": "Height and width to which the images of --data folder are resized (32).",
    "--stream/--in-memory": "Decode the images of --data folder when they are needed, or all at the start (by itself, above 2 GB).",
    "--loader-workers": "Processes that decode the images of --stream, or read your data; 0: the training process does.",
    "--skip-damaged": "In the place of an image that cannot be read, take another of its class, and count such files.",
    "--mean": "Mean of each channel of the images of --data folder, in 0..1 (measured).",
    "--std": "Standard deviation of each (measured).",
    "--listing": "File that keeps the list of the images of --stream, and what was measured of them (in --out).",
    "--augment/--no-augment": "Random crop and flip, where the data set suits it.",
    "--model": "Network: a name; package.module:function or file.py:function; timm:NAME; hf:TYPE or hf:FOLDER.",
    "--model-arg": "name=value: an argument of that function, once for each.",
    "--points": "Submodules at which stages begin, of a network that is traced, instead of --stages: blocks.2,blocks.4.",
    "--stem": "First layers of resnet18, 34 and 50 (imagenet from 64 pixels on, cifar below).",
    "--layers": "Number of blocks of gpt (6).",
    "--width": "Features of a token in gpt, a multiple of --heads (128).",
    "--heads": "Attention heads in each block of gpt (4).",
    "--context": "Characters that gpt reads at once (64).",
    "--channels-last/--no-channels-last": "Convolutions in the channels_last memory format, which is often faster.",
    "--loss": "Your loss instead of cross-entropy, a function (output, target): package.module:function or file.py:function.",
    "--metric": "What the test tells instead of accuracy, once for each: such a function, accuracy or top5.",
    "--best": "Which value of the (first) metric is the best epoch's.",
    "--method": "Training method; see 'dtrp methods'.",
    "--stages": "K: parts of the network, with equal numbers of layers (4); auto: as many as there are workers.",
    "--workers": "Train in as many processes, a stage each, instead of in one; 2:4: go on with as many as there are.",
    "--max-restarts": "Failures of a worker after which all start again from the last save (0; of 2:4, 10).",
    "--replicas": "Copies of the pipeline, each with --workers processes and its share of every mini-batch.",
    "--cuts": "First layer of each stage but the first, instead of --stages.",
    "--num-microbatches": "Parts of a mini-batch; auto: as many as stages, which keeps the delay at 2 updates or less.",
    "--microbatch-samples": "Least samples of a part, where a mini-batch is small (2 with --num-microbatches auto, else 1).",
    "--ahead": "Forwards ahead of the first backward, for each stage behind (the method's).",
    "--order": "Order of the forward and the backward in a slot (the method's).",
    "--leads": "Forwards ahead of the first backward of each stage, instead of --ahead: 4,3,3,2,2,1,1,0.",
    "--orders": "Order of work of all stages, or of each: RFIW, or FB of whole backwards; a cycle of one slot or several.",
    "--keep": "What stages keep: auto (graphs within --memory-limit), graph or input, or a list by stage: input,graph.",
    "--memory-limit": "Memory limit of a stage, for --keep auto: 800MB, 2GiB.",
    "--plan": "File of 'dtrp plan': method, cuts, batch size and learning rate scale.",
    "--grad-shrink": "Every stage multiplies the gradient it receives by this (fdg's beta).",
    "--lr-shrink": "The learning rate is multiplied by this for each stage behind (dtrp's gamma).",
    "--prediction": "Weight prediction (the method's).",
    "--epochs": "Passes over the training split.",
    "--max-updates": "Stop after so many mini-batches.",
    "--limit-train": "Use the first N training samples.",
    "--limit-test": "Use the first N test samples.",
    "--batch-size": "Samples in a mini-batch.",
    "--optimizer": "Optimizer of each stage (muon: AdamW for vectors, embeddings, heads; braking: SGD with adaptive braking).",
    "--lr": "Base learning rate (sgd 0.03, the others 0.001).",
    "--momentum": "Momentum of sgd and braking.",
    "--momentum-by-stage": "More momentum the further from the loss, towards this: 0.99.",
    "--nesterov/--no-nesterov": "Nesterov momentum for sgd and braking.",
    "--weight-decay": "Weight decay (decoupled for adamw, nadam and muon).",
    "--lr-schedule": "constant; cosine to 0; multistep: a tenth at half and again at three quarters of the run.",
    "--warmup-updates": "Updates over which the learning rate rises.",
    "--warmup-by-delay/--no-warmup-by-delay": "A stage whose delay is d updates rises over 1 + d times as many.",
    "--lr-by-delay": "Divide a stage's learning rate by its delay (of 2 updates or more), by less and less over so many updates.",
    "--extrapolate": "Add to each update so many times what it differs from the one before.",
    "--max-grad-norm": "Clip a mini-batch's gradient to this norm.",
    "--clip": "Norm to clip: that of each stage, or that of all stages together (for methods that flush).",
    "--on-nonfinite": "A loss or gradient that is inf or nan: end the run, or leave that update out.",
    "--device": "Device, or one per stage: cuda:0,cuda:1,...",
    "--dtype": "bfloat16: autocast over float32 weights.",
    "--threads": "CPU threads (torch's default).",
    "--seed": "Random seed of weights, order, augmentation and dropout.",
    "--trace": "Write what ran when to trace.json in --out, for Perfetto and for 'dtrp report'.",
    "--tensorboard": "Write events to tensorboard/ in --out, while it trains (tensorboard --logdir).",
    "--callback": "Your dtrp.Callback, which is told of updates and epochs; once for each: package.module:name, file.py:name.",
    "--prediction-error-every": "Compare predicted and true weights at every n-th micro-batch (0: never; auto: 17 or less).",
    "--out": "Folder for config, metrics.jsonl, model.pt and, at the end, summary.json.",
    "--overwrite": "Replace the run in --out.",
    "--save-every": "Save within an epoch too: every 500 updates, or every 90s, 5m or 1h.",
    "--keep-last": "Number of latest saves to keep in --out, beside that of the best epoch; 0: no saves.",
}


def load_run(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    """Make a run's settings the defaults of the other options, unless a file of settings has been read."""
    if value is not None:
        folder = Path(value).expanduser()
        if message := _why_no_run(folder):
            raise click.BadParameter(message)
        if not ctx.default_map:
            _load_config(ctx, param, str(folder / "config"))
    return value


def _why_no_run(folder: Path) -> str | None:
    """Why a run cannot be resumed from a place; None where there is one."""
    for place in (folder, folder.parent):
        if (place / COMPARISON).is_file():
            command = f"dtrp compare --out {place}"
            return f"{place} is a comparison, whose runs keep no saves; the command that began it goes on: {command}"
    if (folder / "config").is_file():
        first = (folder / "config").read_text(errors="replace").partition("\n")[0]
        if first.startswith(f"{PROGRAM}:"):
            program = first.removeprefix(f"{PROGRAM}:").strip()
            return f"{folder} is a run of a training loop of its own, which goes on with it: {program}"
        return None
    if run := next((place for place in folder.parents if (place / "metrics.jsonl").is_file()), None):
        return f"{folder} is no run, but lies in one; pass --resume {run}"
    if not folder.exists():
        return f"there is no {folder}; name the folder that 'dtrp train --out' has written"
    what = "a folder without the config of a run" if folder.is_dir() else "a file"
    return f"{folder} is {what}; name the folder that 'dtrp train --out' has written"


class _Yaml(yaml.SafeLoader):
    """YAML whose numbers and dates stay as they are written, and whose names stand once."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        for name, times in names.items():
            if times > 1:
                raise ValueError(f"{name} is there {times} times; keep one")
        return super().construct_mapping(node, deep)

    def as_written(self, node: yaml.ScalarNode) -> str:
        """The text of a number or a date.

        Raises:
            ValueError: a number to the base of 60, which nobody means.
        """
        if ":" in node.value and not node.tag.endswith("timestamp"):
            raise ValueError(f"{node.value} is a number to the base of 60 in YAML; quote it: '{node.value}'")
        return str(node.value)


for _kind in ("int", "float", "timestamp"):
    _Yaml.add_constructor(f"tag:yaml.org,2002:{_kind}", _Yaml.as_written)


def _load_config(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    """Make a file's values the defaults of the other options."""
    if value is None:
        return None
    path = Path(value)
    try:
        text = path.read_text()
        values = tomllib.loads(text) if path.suffix == ".toml" else yaml.load(text, _Yaml)
    except (OSError, UnicodeDecodeError) as error:
        raise click.BadParameter(f"cannot read {value}: {error}") from None
    except (tomllib.TOMLDecodeError, yaml.YAMLError) as error:
        raise click.BadParameter(f"{value} is no {'TOML' if path.suffix == '.toml' else 'YAML'}: {error}") from None
    except ValueError as error:  # of _Yaml
        raise click.BadParameter(f"{value}: {error}") from None
    if not isinstance(values, dict):
        raise click.BadParameter(f"{value} holds no options; write lines like 'method: dtrp'")
    known = {p.name: p for p in ctx.command.params if p.name and p.name not in ("config", "resume")}
    for message in _wrong_entries(values, known):
        raise click.BadParameter(f"{value}: {message}")
    defaults = {
        str(key).replace("-", "_"): entry if isinstance(entry, (str, bool, list)) else str(entry)
        for key, entry in values.items()
        if entry is not None
    }
    ctx.default_map = {**(ctx.default_map or {}), **defaults}
    return value


def _wrong_entries(values: dict[str, Any], known: Mapping[str, click.Parameter]) -> Iterator[str]:
    """Messages about entries of a file that no option takes."""
    for key, entry in values.items():
        option = known.get(str(key).replace("-", "_"))
        if "_" in str(key) and (other := str(key).replace("_", "-")) in values:
            yield f"{key} and {other} are the same option; keep one"
        if option is None:
            yield unknown("option", key, (name.replace("_", "-") for name in sorted(known)))
        elif isinstance(entry, dict) or (isinstance(entry, list) and option.name not in _LISTS):
            yield f"{key} holds {entry!r}; give one value"
        elif isinstance(entry, bool) and not getattr(option, "is_flag", False):
            yield f"{key} holds {entry!r}, and is no switch; give its value (in quotes, if it is a word)"


def _train_option(words: str, text: str) -> Callable[[Command], Command]:
    """An option with the type and the default of its field in `TrainConfig`."""
    field = _field(words)
    hint, default = get_type_hints(TrainConfig)[field], getattr(DEFAULTS, field)
    settings: dict[str, Any] = {} if default is None else {"default": default}
    if field.replace("_", "-") in REPEATED_OPTIONS:
        settings["multiple"] = True
    if bool in (hint, *get_args(hint)):
        settings = {"is_flag": True, "default": default}
    else:
        settings["type"] = _TYPES.get(field) or next(kind for kind in get_args(hint) or [hint] if kind is not NoneType)
    return click.option(words, help=text, **settings)


def _field(words: str) -> str:
    """``--augment/--no-augment`` as ``augment``."""
    return words.split("/")[0].removeprefix("--").replace("-", "_")


config_option = click.option(
    "--config",
    type=click.Path(),
    callback=_load_config,
    is_eager=True,
    expose_value=False,
    help="YAML or TOML file of these options (a run's own 'config' too); the command line wins.",
)


def train_options(*names: str, without: Collection[str] = ()) -> Callable[[Command], Command]:
    """Options of ``dtrp train``, by their fields in `TrainConfig`; without names: all, and ``--config``."""
    chosen = [words for words in _HELP if _field(words) not in without and (not names or _field(words) in names)]
    first = () if names else (config_option,)
    return together(*first, *(_train_option(words, _HELP[words]) for words in chosen))


def together(*options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    """Several options of a command, in this order."""

    def add(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return add
