"""Builds the parts of a run from its settings: method, data, network, loss, optimizer and devices."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ..data import Dataset, TextDataset, batches, load_data
from ..methods import Method, get_method
from ..models import get_model
from ..splitting.stages import into_stages
from ..typing import OptimizerFactory
from .config import DTYPES, TrainConfig, option_name


def weights_dtype(config: TrainConfig) -> torch.dtype:
    """The dtype of weights and images."""
    dtype: torch.dtype = getattr(torch, DTYPES[config.dtype])
    return dtype


def make_method(config: TrainConfig) -> Method:
    """The method of a run, with its options."""
    options = {field: getattr(config, field) for field in ("grad_shrink", "lr_shrink", "ahead")}
    options["predict"] = config.prediction
    options["backward_first"] = None if config.order is None else config.order == "backward-first"
    return get_method(config.method, **{key: value for key, value in options.items() if value is not None})


def load_dataset(config: TrainConfig, say: Callable[[str], None]) -> Dataset | TextDataset:
    """The data set of a run; ``say`` is called with what `dtrp.data.load_data` warns of.

    Raises:
        ValueError, OSError: missing or damaged files, or a size that the data set does not have.
    """
    context = config.context if config.data == "text" else None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        dataset = load_data(
            config.data, config.data_dir, seed=config.seed, image_size=config.image_size, context=context
        )
    for warning in caught:
        say(str(warning.message))
    return dataset


def example(config: TrainConfig, dataset: Dataset | TextDataset, samples: int) -> tuple[Tensor, Tensor]:
    """A mini-batch of training data for the model; samples repeat where the data set has fewer."""
    few = dataset.limit(max(1, min(samples, len(dataset.train_y))), None)
    options = {"dataset": few, "seed": 0, "epoch": 0, "augment": False, "dtype": weights_dtype(config)}
    x, y = next(batches(few.train_x, few.train_y, samples, **options))  # type: ignore[arg-type]
    assert x is not None
    indices = torch.arange(samples, device=x.device) % len(x)
    return x[indices], y[indices]


def make_model(config: TrainConfig, dataset: Dataset | TextDataset) -> nn.Sequential:
    """The network of a run, for its data."""
    make = partial(get_model, config.model, layers=config.layers, width=config.width, heads=config.heads)
    if isinstance(dataset, TextDataset):
        model = make(num_classes=dataset.num_classes, context=dataset.context)
    else:
        model = make(dataset.in_channels, dataset.num_classes, image_size=dataset.image_size, context=config.context)
    if config.channels_last:
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model


def check_stages(config: TrainConfig, num_stages: int) -> None:
    """Check what a run has by stage against its network, without data and without weights.

    Raises:
        ValueError: fewer layers than stages, cuts out of range, or another number of devices or of kept things.
    """
    sizes = {field: getattr(config, field) for field in ("layers", "width", "heads", "context")}
    with torch.device("meta"):
        into_stages(get_model(config.model, image_size=config.image_size or 32, **sizes), num_stages, config.cuts)
    for field in ("keep", "device"):
        words = str(getattr(config, field)).split(",")
        if len(words) not in (1, num_stages):
            raise ValueError(
                f"{option_name(field)} {','.join(words)} names {len(words)} stages, and there are {num_stages}"
            )


def class_loss(out: Tensor, target: Tensor, reduction: str = "mean") -> Tensor:
    """The cross entropy of logits (..., C) and classes (...), where ... is N, or (N, T) for text."""
    return cross_entropy(out.flatten(0, -2), target.flatten(), reduction=reduction)


def counted_labels(target: Tensor) -> Tensor:
    """The number of labels that `class_loss` takes the mean over: it leaves out those of -100."""
    return (target != -100).sum()


def make_optimizer(config: TrainConfig) -> OptimizerFactory:
    """The function from a stage's parameters to the optimizer of a run."""
    makers: dict[str, Callable[..., torch.optim.Optimizer]] = {
        "sgd": partial(torch.optim.SGD, momentum=config.momentum, nesterov=config.nesterov),
        "adam": torch.optim.Adam,
        "adamw": torch.optim.AdamW,
        "nadam": partial(torch.optim.NAdam, decoupled_weight_decay=True),
    }
    make = makers[config.optimizer]
    return lambda parameters: make(parameters, lr=config.base_lr, weight_decay=config.weight_decay)


def lr_factor(schedule: str, warmup: int, total: int) -> Callable[[int], float]:
    """The learning rate of update n, relative to the base rate.

    A linear warm-up over ``warmup`` updates, times: ``constant``: 1; ``cosine``: from 1 to 0 over the run;
    ``multistep``: 0.1 from half of the run on, 0.01 from three quarters on.
    """

    def factor(n: int) -> float:
        start = min(1.0, (n + 1) / (warmup + 1))
        if schedule == "cosine":
            return start * 0.5 * (1 + math.cos(math.pi * min(n, total) / total))
        if schedule == "multistep":
            return start * 0.1 ** ((n >= 0.5 * total) + (n >= 0.75 * total))
        return start

    return factor


def find_devices(text: str) -> list[torch.device]:
    """The devices that ``--device`` names. For ``cuda``, each worker has another GPU.

    Raises:
        ValueError: a device that torch cannot use.
    """
    devices = []
    if text.strip() == "cuda" and "LOCAL_RANK" in os.environ and torch.cuda.is_available():
        text = f"cuda:{int(os.environ['LOCAL_RANK']) % torch.cuda.device_count()}"
    for name in text.split(","):
        try:
            devices.append(torch.empty(0, device=name.strip()).device)
        except (RuntimeError, AssertionError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"--device {text}: torch cannot use {name.strip()!r} ({reason})") from None
    return devices
