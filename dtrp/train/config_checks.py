"""What settings cannot be: numbers out of range, unknown names, and options that say nothing together."""

from __future__ import annotations

import math

from ..did_you_mean import unknown
from ..models import has_convolutions, takes_text
from .autosave import SaveEvery
from .config import CHOICES, TrainConfig, option_name
from .staff import check_workers
from .tensorboard import check_tensorboard


def check_settings(config: TrainConfig) -> None:
    """What can be checked without data.

    Raises:
        ValueError: a number out of range, or a name that nobody knows.
    """
    for field, names in CHOICES.items():
        value = getattr(config, field)
        if value is not None and value not in names:
            raise ValueError(unknown(option_name(field), value, names))
    for field, least in (
        ("epochs", 1), ("batch_size", 1), ("num_microbatches", 1), ("stages", 1), ("max_updates", 1),
        ("workers", 1), ("replicas", 1), ("limit_train", 1), ("limit_test", 1), ("threads", 1), ("warmup_updates", 0),
        ("max_restarts", 0), ("keep_last", 0),
        ("image_size", 1), ("layers", 1), ("width", 1), ("heads", 1), ("context", 1), ("prediction_error_every", 0),
    ):  # fmt: skip
        value = getattr(config, field)
        if isinstance(value, int) and value < least:
            raise ValueError(f"{option_name(field)} {value}: at least {least}")
    if isinstance(config.prediction_error_every, str) and config.prediction_error_every != "auto":
        raise ValueError(
            f"--prediction-error-every {config.prediction_error_every}: a whole number of at least 0, or auto"
        )
    SaveEvery.of(config.save_every)
    check_workers(config)
    if takes_text(config.model) != (config.data == "text"):
        raise ValueError(
            f"--model {config.model} with --data {config.data}: "
            + ("it reads text; pass --data text --data-dir FILE" if takes_text(config.model)
               else "it reads images; pass --model gpt")
        )  # fmt: skip
    if config.channels_last and not has_convolutions(config.model):
        raise ValueError(f"--channels-last with --model {config.model}, which has no convolutions; leave it out")
    if config.memory_limit is not None and config.memory_limit < 1:
        raise ValueError(f"--memory-limit {config.memory_limit}: a number of bytes of at least 1")
    keeps = (config.keep or "graph").split(",")
    if any(keep not in ("graph", "input") for keep in keeps) and config.keep != "auto":
        raise ValueError(
            f"--keep {config.keep}: auto, graph or input, or one of the last two for each stage: input,graph"
        )
    for field in ("lr", "momentum", "weight_decay"):
        value = getattr(config, field)
        if value is not None and not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{option_name(field)} {value}: a finite number of at least 0")
    if config.max_grad_norm is not None and not 0 < config.max_grad_norm < math.inf:
        raise ValueError(f"--max-grad-norm {config.max_grad_norm}: a finite number above 0")
    if config.clip == "global" and config.max_grad_norm is None:
        raise ValueError("--clip global without --max-grad-norm: say what norm to clip to, or leave --clip out")
    if config.nesterov and config.momentum == 0:
        raise ValueError(
            "--nesterov with --momentum 0: there is no momentum to look ahead with; raise it, or leave --nesterov out"
        )
    if config.save_every is not None and not config.out:
        raise ValueError("--save-every without --out: saves go to the run's folder; name one")
    if config.save_every is not None and not config.keep_last:
        raise ValueError("--save-every with --keep-last 0, which keeps no save; leave one of them out")
    if config.trace and not config.out:
        raise ValueError("--trace without --out: the trace goes to the run's folder; name one")
    if config.tensorboard:
        if not config.out:
            raise ValueError("--tensorboard without --out: the events go to the run's folder; name one")
        check_tensorboard()
    if config.batch_size < config.num_microbatches:
        raise ValueError(
            f"--batch-size {config.batch_size} is smaller than --num-microbatches {config.num_microbatches}; every "
            "micro-batch needs a sample: raise the one or lower the other"
        )
    if not 0 <= config.seed < 2**63:
        raise ValueError(f"--seed {config.seed}: from 0 to 2**63 - 1")


def check_shards(num_samples: int, config: TrainConfig) -> None:
    """Each replica needs a sample of every mini-batch.

    Raises:
        ValueError: the last one of an epoch has fewer.
    """
    smallest = min(num_samples, num_samples % config.batch_size or config.batch_size)
    if smallest < config.replicas:
        raise ValueError(
            f"an epoch's last mini-batch has {smallest} of the {num_samples} samples, and each of the {config.replicas} "
            "replicas needs at least one; choose another --batch-size or --limit-train"
        )


def check_parts(num_samples: int, config: TrainConfig) -> None:
    """Auxiliary networks of images have a BatchNorm, which cannot train on one sample.

    Raises:
        ValueError: the last micro-batches of an epoch have one.
    """
    last = min(num_samples, num_samples % config.batch_size or config.batch_size)
    smallest = max(1, last // config.replicas // config.num_microbatches)
    if smallest < 2 and not takes_text(config.model):
        raise ValueError(
            f"an epoch's last mini-batch has {last} samples, and its micro-batches one; the auxiliary networks of {config.method} "
            "train on at least two: choose another --batch-size, --num-microbatches or --limit-train"
        )
