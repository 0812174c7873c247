"""The settings of a run: their defaults, the names that they take, and their text in a file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..typing import Json  # imports torch

# The dtype of weights by the name of --dtype: bfloat16 is autocast over float32 weights.
DTYPES = {"float32": "float32", "float64": "float64", "bfloat16": "float32"}

CHOICES = {
    "optimizer": ("sgd", "adam", "adamw", "nadam", "muon", "braking"),
    "lr_schedule": ("constant", "cosine", "multistep"),
    "dtype": tuple(DTYPES),
    "prediction": ("linear", "rollout", "informed", "none", "last", "scaled", "auto"),
    "order": ("backward-first", "forward-first"),
    "clip": ("stage", "global"),
    "on_nonfinite": ("stop", "skip"),
    "stem": ("cifar", "imagenet"),
    "best": ("highest", "lowest"),
}
METRICS = ("accuracy", "top5")  # the names of --metric

FOLDER_SETTINGS = ("stream", "loader_workers", "skip_damaged", "mean", "std", "listing")  # of --data folder
DATA_AND_MODEL = (
    "data", "data_arg", "data_dir", "image_size", *FOLDER_SETTINGS, "model", "model_arg", "stem", "layers", "width", "heads",
    "context", "channels_last", "loss",
)  # fmt: skip
CELL_SETTINGS = ("method", "prediction", "stages", "num_microbatches", "seed")  # of a run in a comparison
AUTO = "auto"  # --num-microbatches: as many as stages; in the config of a run the number stands
AUTO_SAMPLES = 2  # the --microbatch-samples of that
SAVE_SETTINGS = ("save_every", "keep_last")
SETTINGS_WITHOUT_EFFECT = (  # on what a run learns
    "data_dir", "listing", "loader_workers", "trace", "tensorboard", *SAVE_SETTINGS, "prediction_error_every", "plan",
    "max_restarts", "metric", "best", "callback",
)  # fmt: skip
REPEATED_OPTIONS = ("model-arg", "data-arg", "metric", "callback")
PROGRAM = "program"  # in the config of a run of `dtrp.RunFolder`: the command that trains it
COMPARISON = "compare.yaml"  # the file that makes a folder a comparison
_OPPOSITES = {"stream": "in-memory"}  # of switches whose other side is not --no-NAME
_NOT_WRITTEN = ("out", "overwrite", "resume", "max_restarts")  # to the ``config`` of a run


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a run, a field for each option of ``dtrp train``; ``dtrp train --help`` explains them."""

    data: str = "digits"
    data_dir: str | None = None
    image_size: int | None = None
    stream: bool | None = None
    loader_workers: int = 2
    skip_damaged: bool = False
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    listing: str | None = None
    augment: bool = True
    model: str = "resnet20"
    model_arg: tuple[str, ...] = ()
    points: tuple[str, ...] | None = None
    stem: str | None = None
    layers: int | None = None
    width: int | None = None
    heads: int | None = None
    context: int | None = None
    channels_last: bool = False
    method: str = "dtrp"
    stages: int | str | None = None
    workers: int | str | None = None
    max_restarts: int | None = None
    replicas: int = 1
    cuts: tuple[int, ...] | None = None
    num_microbatches: int | str = "auto"
    microbatch_samples: int | None = None
    ahead: float | None = None
    order: str | None = None
    leads: tuple[int, ...] | None = None
    orders: tuple[str, ...] | None = None
    keep: str | None = None
    memory_limit: int | None = None
    plan: str | None = None
    grad_shrink: float | None = None
    lr_shrink: float | None = None
    prediction: str | None = None
    epochs: int = 10
    max_updates: int | None = None
    limit_train: int | None = None
    limit_test: int | None = None
    batch_size: int = 64
    optimizer: str = "sgd"
    lr: float | None = None
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 5e-4
    lr_schedule: str = "cosine"
    warmup_updates: int = 0
    max_grad_norm: float | None = None
    clip: str = "stage"
    on_nonfinite: str = "stop"
    device: str = "cpu"
    dtype: str = "float32"
    threads: int | None = None
    seed: int = 0
    prediction_error_every: int | str = 0
    trace: bool = False
    tensorboard: bool = False
    save_every: int | str | None = None
    keep_last: int = 2
    out: str | None = None
    overwrite: bool = False
    resume: bool = False
    data_arg: tuple[str, ...] = ()
    loss: str | None = None
    metric: tuple[str, ...] = ()
    best: str = "highest"
    callback: tuple[str, ...] = ()
    lr_by_delay: int = 0
    warmup_by_delay: bool = False
    momentum_by_stage: float | None = None
    extrapolate: float = 0.0

    @property
    def elastic(self) -> bool:
        """Whether the number of stages follows the number of workers, which may change at a restart."""
        return self.stages == "auto" or isinstance(self.workers, str)

    def divided(self, num_stages: int) -> TrainConfig:
        """The settings with numbers in the place of ``num_microbatches`` auto."""
        if self.num_microbatches != AUTO:
            return self
        return replace(self, num_microbatches=num_stages, microbatch_samples=self.microbatch_samples or AUTO_SAMPLES)

    @property
    def fixed_stages(self) -> int | None:
        """The number in ``stages``; None where it has none."""
        return self.stages if isinstance(self.stages, int) else None

    @property
    def base_lr(self) -> float:
        """The learning rate, or the optimizer's default."""
        default = 0.03 if self.optimizer in ("sgd", "braking") else 1e-3
        return default if self.lr is None else self.lr


def config_text(config: TrainConfig) -> str:
    """The settings as the text of a YAML file, which ``--config`` reads."""
    import yaml

    text: str = yaml.safe_dump(as_settings(config), sort_keys=False)
    return text


def with_defaults(values: Mapping[str, Json]) -> dict[str, Json]:
    """Settings from such a file, with defaults for those that a file of an older version lacks."""
    return {**as_settings(TrainConfig()), **values}


def read_settings(text: str) -> dict[str, Json] | None:
    """The settings in the text of such a file, with defaults as `with_defaults`; None where it holds no settings."""
    import yaml

    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError:
        return None
    return with_defaults(values) if isinstance(values, dict) else None


def as_settings(config: TrainConfig) -> dict[str, Json]:
    """The settings that a file holds, by the name of their option."""
    return {
        field.replace("_", "-"): list(value) if isinstance(value, tuple) else value
        for field, value in vars(config).items()
        if value not in (None, ()) and field not in _NOT_WRITTEN
    }


def option_words(values: Mapping[str, Json]) -> list[str]:
    """The words of a ``dtrp train`` command with these settings, by option name, but for those that are defaults."""
    defaults, words = as_settings(TrainConfig()), []
    for name, value in values.items():
        if value == defaults.get(name):
            continue
        if name in REPEATED_OPTIONS:
            words += [word for text in value for word in (f"--{name}", text)]
        elif isinstance(value, bool):
            words.append(f"--{name}" if value else f"--{_OPPOSITES.get(name, 'no-' + name)}")
        else:
            words += [f"--{name}", ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)]
    return words


def score_name(metrics: object) -> str:
    """What a run is judged by: accuracy, or the first of its ``metric``."""
    return str(metrics[0]).rpartition(":")[2] if isinstance(metrics, (list, tuple)) and metrics else "accuracy"


def score_text(name: str, value: float) -> str:
    """A score with its unit: ``93.21%``; ``0.4132`` of a function of the user's."""
    return f"{value:.2%}" if name in METRICS else f"{value:.4g}"


def option_name(field: str) -> str:
    """``batch_size`` as ``--batch-size``."""
    return "--" + field.replace("_", "-")
