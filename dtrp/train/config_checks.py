"""Checks of a run's settings: numbers out of range, unknown names, and options that contradict each other."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator

from ..launch.join import launched
from ..models import has_convolutions, has_stem, takes_text
from ..schedule import num_parts
from ..validation import unknown
from .autosave import SaveEvery
from .config import AUTO, CHOICES, FOLDER_SETTINGS, METRICS, TrainConfig, option_name
from .tensorboard import check_tensorboard
from .user_code import is_reference, parse_arguments

_LEAST = {
    **dict.fromkeys(("epochs", "batch_size", "num_microbatches", "stages", "workers", "replicas", "threads"), 1),
    **dict.fromkeys(("max_updates", "limit_train", "limit_test", "microbatch_samples"), 1),
    **dict.fromkeys(("image_size", "layers", "width", "heads", "context"), 1),
    **dict.fromkeys(
        ("warmup_updates", "lr_by_delay", "max_restarts", "keep_last", "prediction_error_every", "loader_workers"), 0
    ),
}
_IN_THE_RUN_FOLDER = {"save_every": "saves go", "trace": "the trace goes", "tensorboard": "the events go"}


def check_settings(config: TrainConfig) -> None:
    """Check all settings that can be checked without data.

    Raises:
        ValueError: an unknown name, a number out of range, or options that contradict each other.
    """
    for mistakes in (_wrong_values, _wrong_workers, _wrong_data, _wrong_images, _contradictions):
        for message in mistakes(config):
            raise ValueError(message)
    SaveEvery.parse(config.save_every)
    if config.tensorboard:
        check_tensorboard()


def _wrong_values(config: TrainConfig) -> Iterator[str]:
    """Messages about unknown names and numbers out of range."""
    for field, names in CHOICES.items():
        value = getattr(config, field)
        if value is not None and value not in names:
            yield unknown(option_name(field), value, names)
    for field, least in _LEAST.items():
        value = getattr(config, field)
        if isinstance(value, int) and value < least:
            yield f"{option_name(field)} {value}: at least {least}"
    for field in ("lr", "momentum", "weight_decay", "extrapolate"):
        value = getattr(config, field)
        if value is not None and not 0 <= value < math.inf:
            yield f"{option_name(field)} {value}: a finite number of at least 0"
    if config.momentum_by_stage is not None and not 0 <= config.momentum_by_stage < 1:
        yield f"--momentum-by-stage {config.momentum_by_stage}: at least 0 and below 1"
    if config.warmup_by_delay and not config.warmup_updates:
        yield "--warmup-by-delay without --warmup-updates: say how many a stage without a delay has, --warmup-updates 100"
    if config.optimizer == "braking" and not config.momentum:
        yield "--momentum 0 with --optimizer braking, which compares the gradient with the momentum; pass one above 0"
    if isinstance(every := config.prediction_error_every, str) and every != "auto":
        yield f"--prediction-error-every {every}: a whole number of at least 0, or auto"
    if isinstance(number := config.num_microbatches, str) and number != AUTO:
        yield f"--num-microbatches {number}: a whole number of at least 1, or {AUTO}: as many as stages"
    if config.memory_limit is not None and config.memory_limit < 1:
        yield f"--memory-limit {config.memory_limit}: a number of bytes of at least 1"
    if config.max_grad_norm is not None and not 0 < config.max_grad_norm < math.inf:
        yield f"--max-grad-norm {config.max_grad_norm}: a finite number above 0"
    if not 0 <= config.seed < 2**63:
        yield f"--seed {config.seed}: from 0 to 2**63 - 1"
    if config.keep not in (None, "auto") and not set(str(config.keep).split(",")) <= {"graph", "input"}:
        yield f"--keep {config.keep}: auto, graph or input, or one of the last two for each stage: input,graph"


def _wrong_workers(config: TrainConfig) -> Iterator[str]:
    """Messages about workers that may be restarted, and about a number of stages that may change."""
    if elastic := isinstance(config.workers, str):
        worker_range(str(config.workers))
    if isinstance(config.stages, str) and config.stages != "auto":
        yield f"--stages {config.stages}: a number, or auto: as many as there are workers"
    if (config.max_restarts or elastic) and not (config.out and config.keep_last):
        name = f"--workers {config.workers}" if elastic else "--max-restarts"
        lacks = "--out" if not config.out else "saves (--keep-last 0)"
        yield f"{name} without {lacks}: a restart goes on from the last save; pass --out, and keep some"
    alone = config.workers is None and not launched()
    if config.max_restarts is not None and alone:
        yield "--max-restarts without --workers: one process has nobody to start it again; pass --workers"
    if config.elastic and alone:
        yield "--stages auto without --workers: say how many there are, or may be: --workers 2:4"
    auto = "--stages auto" if config.stages == "auto" else f"--workers {config.workers}"
    for option, given in (
        (f"--stages {config.stages}", config.fixed_stages is not None),
        ("--cuts", config.cuts is not None),
        ("--points", config.points is not None),
        ("--plan", config.plan is not None),
        ("--leads", config.leads is not None),
        ("--orders", config.orders is not None and len(config.orders) > 1),
        (f"--keep {config.keep}", config.keep is not None and "," in config.keep),
        (f"--replicas {config.replicas}", config.replicas > 1),
    ):
        if config.elastic and given:
            yield f"{option} with {auto}, where the number of stages may change; leave one of them out"


def _wrong_data(config: TrainConfig) -> Iterator[str]:
    """Messages about data, a loss and metrics that are functions of the user's."""
    supplied = is_reference(config.data)
    if config.data_arg and not supplied:
        yield f"--data-arg {config.data_arg[0]} with --data {config.data}: it is for a function of yours; leave it out"
    parse_arguments("--data-arg", config.data_arg)
    for field in ("data_dir", "image_size"):
        if supplied and getattr(config, field) is not None:
            yield f"{option_name(field)} with --data {config.data}: pass its arguments as --data-arg name=value"
    if supplied and not config.augment:
        yield f"--no-augment with --data {config.data}: what is done to its samples is its own business; pass it a --data-arg"
    if config.loss is not None and not is_reference(config.loss):
        yield f"--loss {config.loss}: pass package.module:function, or path/file.py:function"
    for name in config.callback:
        if not is_reference(name):
            yield f"--callback {name}: pass package.module:name, or path/file.py:name"
    for name in config.metric:
        if not is_reference(name) and name not in METRICS:
            yield unknown("metric", name, METRICS) + ", or package.module:function, or path/file.py:function"
    if config.best == "lowest" and (not config.metric or config.metric[0] in METRICS):
        yield f"--best lowest of {config.metric[0] if config.metric else 'accuracy'}: the highest is the best; leave it out"


def _wrong_images(config: TrainConfig) -> Iterator[str]:
    """Messages about options of a folder of images."""
    for field in FOLDER_SETTINGS:
        if field == "loader_workers" and is_reference(config.data):
            continue
        if config.data != "folder" and getattr(config, field) != getattr(TrainConfig, field):
            name = "--in-memory" if field == "stream" and not config.stream else option_name(field)
            yield f"{name} with --data {config.data}: it is for a folder of images; leave it out, or take --data folder"
    if (config.mean is None) != (config.std is None):
        given, lacking = ("--mean", "--std") if config.std is None else ("--std", "--mean")
        yield f"{given} without {lacking}: pass both, or neither, and they are measured"
    for field in ("mean", "std"):
        values = getattr(config, field)
        if values is not None and (len(values) != 3 or not all(0 <= value < math.inf for value in values)):
            yield f"{option_name(field)} {','.join(map(str, values))}: three numbers from 0 to 1, of red, green and blue"
    if config.std is not None and not all(config.std):
        yield f"--std {','.join(map(str, config.std))}: images are divided by it; pass numbers above 0"
    for field in ("skip_damaged", "listing"):
        if config.stream is False and getattr(config, field):
            yield f"{option_name(field)} with --in-memory: it is for images that are streamed; leave one of them out"


def _contradictions(config: TrainConfig) -> Iterator[str]:
    """Messages about other options that do not go together."""
    yield from _of_the_model(config)
    if takes_text(config.model) and config.data != "text" and not is_reference(config.data):
        yield f"--model {config.model} with --data {config.data}: it reads text; pass --data text --data-dir FILE"
    built_in = not is_reference(config.model)
    if config.data == "text" and built_in and not takes_text(config.model):
        yield f"--model {config.model} with --data text: it reads images; pass --model gpt"
    if config.channels_last and built_in and not has_convolutions(config.model):
        yield f"--channels-last with --model {config.model}, which has no convolutions; leave it out"
    if config.clip == "global" and config.max_grad_norm is None:
        yield "--clip global without --max-grad-norm: say what norm to clip to, or leave --clip out"
    if config.nesterov and config.momentum == 0:
        yield "--nesterov with --momentum 0: there is no momentum to look ahead with; raise it, or leave --nesterov out"
    for field, what in _IN_THE_RUN_FOLDER.items():
        if getattr(config, field) and not config.out:
            yield f"{option_name(field)} without --out: {what} to the run's folder; name one"
    if config.save_every is not None and not config.keep_last:
        yield "--save-every with --keep-last 0, which keeps no save; leave one of them out"
    if isinstance(config.num_microbatches, int) and config.batch_size < config.num_microbatches:
        sizes = f"--batch-size {config.batch_size} is smaller than --num-microbatches {config.num_microbatches}"
        yield f"{sizes}; every micro-batch needs a sample: raise the one or lower the other"
    if config.batch_size < config.replicas:
        sizes = f"--batch-size {config.batch_size} is smaller than --replicas {config.replicas}"
        yield f"{sizes}; every replica needs a sample: raise the one or lower the other"


def _of_the_model(config: TrainConfig) -> Iterator[str]:
    """Messages about options of networks that this one does not have."""
    built_in = not is_reference(config.model)
    if config.model_arg and built_in:
        yield f"--model-arg {config.model_arg[0]} with --model {config.model}, which has options of its own; leave it out"
    parse_arguments("--model-arg", config.model_arg)
    for field in ("layers", "width", "heads"):
        if getattr(config, field) is not None and not built_in:
            yield f"{option_name(field)} with --model {config.model}: pass its arguments as --model-arg name=value"
    if config.stem is not None and not has_stem(config.model):
        yield f"--stem {config.stem} with --model {config.model}, which has no choice of it; leave it out"
    for field, is_given in (
        ("cuts", config.cuts is not None),
        ("plan", config.plan is not None),
        ("stages", config.stages is not None),
    ):
        if config.points is not None and is_given:
            yield f"--points with {option_name(field)}: both say where stages begin; leave one of them out"


def worker_range(text: str) -> tuple[int, int]:
    """``2:4`` as (2, 4): the fewest workers that a run goes on with, and the most.

    Raises:
        ValueError: any other text.
    """
    match = re.fullmatch(r"\s*([0-9]{1,6}):([0-9]{1,6})\s*", text)
    least, most = (int(match[1]), int(match[2])) if match else (0, 0)
    if not 1 <= least <= most:
        raise ValueError(f"--workers {text}: a number, like 4, or the fewest and the most, like 2:4")
    return least, most


def workers_per_replica(config: TrainConfig, num_processes: int | None = None) -> int:
    """K, where each stage has a worker.

    Args:
        config: settings, of which ``workers`` and ``replicas`` say the number of workers.
        num_processes: number of processes that torchrun has started; None: none.

    Raises:
        ValueError: another number of processes, or of stages.
    """
    stages = config.fixed_stages
    for places in (config.cuts, config.points):
        stages = stages if places is None else len(places) + 1
    num_workers = config.workers
    if isinstance(num_workers, str):
        least, most = worker_range(num_workers)
        if num_processes is None or not least <= num_processes <= most:
            raise ValueError(f"--workers {config.workers}, and {num_processes or 'none'} were started")
        num_workers = num_processes
    elif num_workers is None:
        num_workers = stages if num_processes is None else num_processes // config.replicas
    if num_workers is None:
        raise ValueError(f"--replicas {config.replicas} without --workers; say how many workers a replica has")
    needed = num_workers * config.replicas
    if num_processes not in (None, needed):
        raise ValueError(
            f"--workers {num_workers} and --replicas {config.replicas} make {needed} processes, and {num_processes} were "
            f"started; start as many (torchrun --nproc-per-node {needed})"
        )
    if stages not in (None, num_workers):
        raise ValueError(
            f"{stages} stages and --workers {num_workers}: each worker has one stage; leave --stages out, or make them equal"
        )
    return num_workers


def check_last_minibatch(num_samples: int, config: TrainConfig, *, auxiliary: bool) -> None:
    """Check that the smallest mini-batch of an epoch, the last one, is large enough.

    Args:
        num_samples: number of training samples.
        config: settings, with a number of micro-batches.
        auxiliary: whether stages have auxiliary networks. Those of images have a BatchNorm, which needs two samples.

    Raises:
        ValueError: a replica without a sample, or a micro-batch with too few.
    """
    last = min(num_samples, num_samples % config.batch_size or config.batch_size)
    if last < config.replicas:
        raise ValueError(
            f"an epoch's last mini-batch has {last} of the {num_samples} samples, and each of the {config.replicas} "
            "replicas needs at least one; choose another --batch-size or --limit-train"
        )
    share = last // config.replicas
    parts = num_parts(share, int(config.num_microbatches), config.microbatch_samples or 1)
    if auxiliary and not takes_text(config.model) and share // parts < 2:
        raise ValueError(
            f"an epoch's last mini-batch has {last} samples, and its micro-batches one; the auxiliary networks of {config.method} "
            "train on at least two: choose another --batch-size, --num-microbatches or --limit-train"
        )
