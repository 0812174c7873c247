"""Builds the parts of a run from its settings: method, data, network, loss, optimizer and devices."""

from __future__ import annotations

import dataclasses
import math
import os
import warnings
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import LambdaLR

from ..data import Dataset, InMemory, Source, TextDataset, check_request, load_data, open_supplied, stream_folder
from ..data.source import DataFacts
from ..launch.join import told_by_first_rank
from ..methods import Method, get_method
from ..models import auxiliary, get_model, has_stem, takes_text
from ..optim import Braking, MuonAdamW, extrapolated, momentum_by_stage
from ..optim.by_delay import by_delay, delay_factor, warmup_factor
from ..schedule import check_orders
from ..splitting.stages import Stages, into_stages, split
from ..stage.losses import Auxiliary
from ..typing import OptimizerFactory, SchedulerFactory
from .config import DTYPES, TrainConfig, option_name
from .other_libraries import LIBRARIES
from .scores.criterion import Criterion, make_criterion
from .user_code import call_function, explained, is_reference, load_function, parse_arguments

TIMEOUT_S = 300.0  # for which ranks wait for each other
OF_ADAMW = (
    "*embed*",
    "wte",
    "wpe",
    "head",
    "*_head",
)  # parts of names of matrices that --optimizer muon leaves to AdamW
LISTING = "listing"  # the file of the list of images in the folder of a run
_STREAMED_FROM_BYTES = 2 * 10**9  # of all images of a folder, decoded
_IMAGENET_PIXELS = 64  # from which on a ResNet that has both stems takes ImageNet's


def auxiliary_networks(config: TrainConfig, source: Source) -> Auxiliary:
    """The auxiliary networks of a method in which each stage has a loss of its own.

    Raises:
        ValueError: data or a loss for which there are none.
    """
    if is_reference(config.data) and (len(source.sample_shape) != 3 or not source.num_classes):
        raise ValueError(
            f"--method {config.method} with --data {source.name}: its auxiliary networks are for images in a known number of "
            "classes (num_classes, or classes, of the training data); take another method, or dtrp.Pipeline(aux=...)"
        )
    return auxiliary(source.example(2)[0], source.num_classes)


def weights_dtype(config: TrainConfig) -> torch.dtype:
    """The dtype of weights and images."""
    dtype: torch.dtype = getattr(torch, DTYPES[config.dtype])
    return dtype


def make_method(config: TrainConfig) -> Method:
    """The method of a run, with its options."""
    options = {field: getattr(config, field) for field in ("grad_shrink", "lr_shrink", "ahead", "leads")}
    options["predict"] = config.prediction
    options["backward_first"] = None if config.order is None else config.order == "backward-first"
    if config.orders is not None:
        options["orders"] = config.orders[0] if len(config.orders) == 1 else config.orders
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
    if config.mean is not None and config.std is not None and isinstance(dataset, Dataset):
        dataset = dataclasses.replace(dataset, mean=torch.tensor(config.mean), std=torch.tensor(config.std))
    return dataset


def open_source(
    config: TrainConfig, say: Callable[[str], None], device: torch.device | str = "cpu", *, reads: bool = True,
    reads_targets: bool = True,
) -> Source:  # fmt: skip
    """The data of a run as mini-batches on ``device``. All ranks call this together.

    Args:
        config: settings of the run.
        say: called with notes for the user.
        device: where the mini-batches are to be.
        reads: whether this rank needs the inputs, as the first stage of a replica does.
        reads_targets: whether it needs the targets, as the last one does too.

    Raises:
        ValueError, OSError: missing or damaged files, or a size that the data set does not have; on all ranks.
    """
    if is_reference(config.data):
        return _supplied(config, device, reads=(reads, reads_targets))
    if config.data == "folder" and config.stream is not False:
        source = _streamed(config, say, device, reads=reads)
        if source is not None:
            return source
    dataset = load_dataset(config, say).limit(config.limit_train, config.limit_test).to(device)
    augment = config.augment and dataset.augment
    in_memory = InMemory(dataset, seed=config.seed, augment=augment, dtype=weights_dtype(config))
    if config.data == "folder":
        shape = "x".join(map(str, in_memory.sample_shape))
        in_memory.details = f" in {in_memory.num_classes} classes, {shape}, in memory"
    return in_memory


def _supplied(config: TrainConfig, device: torch.device | str, *, reads: tuple[bool, bool]) -> Source:
    """The data sets that a function of the user's makes."""
    arguments = parse_arguments("--data-arg", config.data_arg)
    number = config.num_microbatches
    return open_supplied(
        partial(call_function, "--data", config.data, arguments),
        name=config.data,
        seed=config.seed,
        dtype=weights_dtype(config),
        device=device,
        num_workers=config.loader_workers,
        limits=(config.limit_train, config.limit_test),
        test_batch_size=config.batch_size,
        num_microbatches=number if isinstance(number, int) else config.fixed_stages or 2,  # matters if it is 1
        reads=reads,
        share=partial(told_by_first_rank, timeout_s=TIMEOUT_S),
        explain=partial(explained, reference=config.data),
    )


def criterion_of(config: TrainConfig, source: Source) -> Criterion:
    """The loss and the metrics of a run.

    Raises:
        ValueError: functions that cannot be loaded, or do not take the targets of the data.
    """
    return make_criterion(config.loss, config.metric, source, class_loss, supplied=is_reference(config.data))


def class_loss(out: Tensor, target: Tensor, reduction: str = "mean") -> Tensor:
    """The cross entropy of logits (..., C) and classes (...), where ... is N, or (N, T) for text."""
    return cross_entropy(out.flatten(0, -2), target.flatten(), reduction=reduction)


def _streamed(
    config: TrainConfig, say: Callable[[str], None], device: torch.device | str, *, reads: bool
) -> Source | None:
    """The images of a folder, if they are to be decoded when they are needed."""
    check_request("folder", config.data_dir, image_size=config.image_size)
    if reads and config.listing and not Path(config.listing).expanduser().absolute().parent.is_dir():
        raise ValueError(f"--listing {config.listing} lies in no folder; make it first, or choose another name")
    file = config.listing or (Path(config.out) / LISTING if config.out else None)
    source = stream_folder(
        Path(str(config.data_dir)),
        from_bytes=0 if config.stream else _STREAMED_FROM_BYTES,
        file=None if file is None else Path(file).expanduser(),
        share=partial(told_by_first_rank, timeout_s=TIMEOUT_S),
        reads=reads,
        image_size=config.image_size,
        seed=config.seed,
        augment=config.augment,
        dtype=weights_dtype(config),
        device=device,
        num_workers=config.loader_workers,
        skip_damaged=config.skip_damaged,
        stats=(config.mean, config.std) if config.mean is not None and config.std is not None else None,
        limits=(config.limit_train, config.limit_test),
    )
    if source is None:
        return None
    if config.listing and os.environ.get("RANK", "0") == "0":
        source.keep(Path(config.listing).expanduser())
    for note in source.notes:
        say(note)
    return source


def make_model(config: TrainConfig, data: Source | DataFacts | Dataset | TextDataset) -> nn.Module | list[nn.Module]:
    """The network of a run, for its data, in the dtype of its weights: an `nn.Sequential`, a list, or any module.

    Raises:
        ValueError: a function that cannot be called or returns no network, or a setting that it does not take.
    """
    arguments = parse_arguments("--model-arg", config.model_arg)
    library, _, name = config.model.partition(":")
    if library in LIBRARIES:
        model: Any = LIBRARIES[library](name, data, arguments)
    elif is_reference(config.model):
        model = call_function("--model", config.model, arguments)
        _check_network(config.model, model)
    else:
        model = _built_in(config, data)
    modules = model if isinstance(model, list) else [model]
    for module in modules:
        module.to(weights_dtype(config))
        if config.channels_last:
            module.to(memory_format=torch.channels_last)
    return model  # type: ignore[no-any-return]


def _built_in(config: TrainConfig, data: Source | DataFacts | Dataset | TextDataset) -> nn.Sequential:
    make = partial(get_model, config.model, layers=config.layers, width=config.width, heads=config.heads)
    if is_reference(config.data):
        _check_samples_suit(config.model, data)
    if data.is_text:
        return make(num_classes=data.num_classes, context=data.sample_shape[0])
    if len(data.sample_shape) == 1:  # vectors: images of a pixel
        return make(data.sample_shape[0], data.num_classes, image_size=1)
    in_channels, image_size = data.sample_shape[0], data.sample_shape[-1]
    stem = config.stem or ("imagenet" if has_stem(config.model) and image_size >= _IMAGENET_PIXELS else "cifar")
    return make(in_channels, data.num_classes, image_size=image_size, context=config.context, stem=stem)


def _check_samples_suit(name: str, data: Source | DataFacts | Dataset | TextDataset) -> None:
    """Refuse a built-in network for samples of a user's that it cannot take.

    Raises:
        ValueError: such samples, with what would be taken.
    """
    shape = data.sample_shape
    text = takes_text(name)
    images = len(shape) == 3 and shape[1] == shape[2]
    if not data.num_classes:
        raise ValueError(
            f"--model {name} with --data {data.name}: the number of classes is not known; give the training data an attribute "
            "num_classes, or classes"
        )
    if data.is_text != text or not (text or images or (name == "mlp" and len(shape) == 1)):
        takes = (
            "tokens (T,) with a target each" if text else "square images (C, H, H)" + ", or vectors" * (name == "mlp")
        )
        raise ValueError(
            f"--model {name} with --data {data.name}: it reads {takes}, and samples are of shape {shape}; pass a --model of yours"
        )


def _check_network(reference: str, model: Any) -> None:
    if isinstance(model, nn.Module) or (
        isinstance(model, list) and model and all(isinstance(part, nn.Module) for part in model)
    ):
        return
    what = (
        f"a list with a {type(model[0]).__name__}" if isinstance(model, list) and model else f"a {type(model).__name__}"
    )
    raise ValueError(
        f"--model {reference} returned {what}; return an nn.Sequential, a list of modules (one a stage), or any nn.Module"
    )


def divided(
    model: nn.Module | list[nn.Module], config: TrainConfig, data: Source, num_stages: int | None
) -> tuple[nn.Sequential | list[nn.Module], int | None, tuple[int, ...] | None]:
    """The network as `Pipeline` takes it, with ``num_stages`` and ``cuts``.

    A network that is no `nn.Sequential` is traced, on two samples, and cut at ``config.points``; or in ``num_stages``;
    or, by cuts that a plan has chosen, from a fine division.

    Raises:
        ValueError: a network that cannot be cut so.
    """
    if isinstance(model, list) or (isinstance(model, nn.Sequential) and config.points is None):
        if config.points is not None:
            raise ValueError("--points with a list of modules, which is one module a stage already; leave them out")
        if isinstance(model, list):
            return model, num_stages, None
        default = min(4, len(model)) if config.cuts is None else None
        return model, num_stages if num_stages is not None else default, config.cuts
    if config.points is not None:
        stages = split(model, points=config.points, example=data.example(2)[0])
    elif config.cuts is not None:
        stages = finely_divided(model, data, len(config.cuts) + 1).cut(config.cuts)
    else:
        stages = split(model, num_stages=num_stages or 4, example=data.example(2)[0])
    if num_stages not in (None, len(stages)):
        raise ValueError(f"--points make {len(stages)} stages, and there are {num_stages}; make them equal")
    return stages, None, None


def finely_divided(model: nn.Module, data: Source, num_workers: int) -> Stages:
    """A traced network in several stages a worker, of which a plan makes those of the run."""
    example, _ = data.example(2)
    for parts in range(4, 1, -1):
        with suppress(ValueError):
            return split(model, num_stages=parts * num_workers, example=example)
    return split(model, num_stages=num_workers, example=example)


def check_stages(config: TrainConfig, num_stages: int) -> None:
    """Check what a run has by stage against its network, without data and without weights.

    Raises:
        ValueError: fewer layers than stages, cuts out of range, another number of devices or of kept things, or orders of
            work with which the stages wait for each other.
    """
    check_orders(make_method(config), num_stages)
    sizes = {field: getattr(config, field) for field in ("layers", "width", "heads", "context")}
    if not is_reference(config.model) and config.points is None:
        with torch.device("meta"):
            into_stages(get_model(config.model, image_size=config.image_size or 32, **sizes), num_stages, config.cuts)
    elif is_reference(config.model) and config.model.partition(":")[0] not in LIBRARIES:
        load_function("--model", config.model)
    for option, reference in (
        ("--data", config.data),
        ("--loss", config.loss or ""),
        *(("--metric", m) for m in config.metric),
        *(("--callback", name) for name in config.callback),
    ):
        if is_reference(reference):
            load_function(option, reference)
    for field in ("keep", "device"):
        words = str(getattr(config, field)).split(",")
        if len(words) not in (1, num_stages):
            raise ValueError(
                f"{option_name(field)} {','.join(words)} names {len(words)} stages, and there are {num_stages}"
            )


def make_optimizer(config: TrainConfig) -> OptimizerFactory:
    """The function from a stage's parameters to the optimizer of a run; it may name its keywords."""
    momentum: dict[str, Any] = {"momentum": config.momentum, "nesterov": config.nesterov}
    makers: dict[str, Callable[..., torch.optim.Optimizer]] = {
        "sgd": partial(torch.optim.SGD, **momentum),
        "adam": torch.optim.Adam,
        "adamw": torch.optim.AdamW,
        "nadam": partial(torch.optim.NAdam, decoupled_weight_decay=True),
        "muon": partial(MuonAdamW, skip=OF_ADAMW),
        "braking": partial(Braking, **momentum),
    }
    make, by_name = makers[config.optimizer], config.optimizer == "muon"

    def optimizer(parameters: Any, *, named: Any = ()) -> torch.optim.Optimizer:
        chosen = list(named) if by_name else parameters
        return make(chosen, lr=config.base_lr, weight_decay=config.weight_decay)

    made = optimizer if config.momentum_by_stage is None else momentum_by_stage(optimizer, config.momentum_by_stage)
    return extrapolated(made, config.extrapolate) if config.extrapolate else made


def make_scheduler(config: TrainConfig, total: int) -> SchedulerFactory:
    """The function from a stage's optimizer to its scheduler, over ``total`` updates; it may name its keywords."""
    warmup = 0 if config.warmup_by_delay else config.warmup_updates
    factor = lr_factor(config.lr_schedule, warmup, total)

    of_delay: list[Callable[[int], Callable[[int], float]]] = []
    if config.warmup_by_delay:
        of_delay.append(partial(warmup_factor, config.warmup_updates))
    if config.lr_by_delay:
        of_delay.append(partial(delay_factor, config.lr_by_delay))
    return by_delay(factor, *of_delay) if of_delay else lambda optimizer: LambdaLR(optimizer, factor)


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
