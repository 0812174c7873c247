"""The training loop behind ``dtrp train``: a plain loop over `Pipeline`, with its run on disk.

`TrainConfig` says what to do, `Trainer(config)` checks all of it and touches no file, and
`Trainer.run` trains. What is shown meanwhile is a `Reporter`'s business.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
import platform
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer

from .data import Dataset, TextDataset, batches, load_data
from .events import Events, StageScalars, check_tensorboard
from .gauge import PredictionError
from .methods import Method, get_method
from .models import auxiliary, get_model, takes_text
from .names import unknown
from .pipeline import Pipeline
from .planning import Plan, plan
from .ranks import join, launched, watch_launcher
from .runs import RunFolder, left_by
from .saves import Position, SaveEvery, Saves
from .staff import check_workers, fixed_stages, workers_per_replica
from .stopping import StopSignals

_DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.float32}
_TEST_BATCH = 500
_TIMEOUT_S = 300.0
_SAVE, _STOP = 1, 2  # what is proposed to all ranks: to save, and to save and stop


@dataclass(frozen=True)
class TrainConfig:
    """What ``dtrp train`` is told; the options' help says what each means."""

    data: str = "digits"
    data_dir: str | None = None
    image_size: int | None = None
    augment: bool = True
    model: str = "resnet20"
    layers: int | None = None
    width: int | None = None
    heads: int | None = None
    context: int | None = None
    method: str = "dtrp"
    stages: int | str | None = None
    workers: int | str | None = None
    max_restarts: int | None = None
    replicas: int = 1
    cuts: tuple[int, ...] | None = None
    num_microbatches: int = 1
    ahead: float | None = None
    order: str | None = None
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
    prediction_error_every: int = 0
    trace: bool = False
    tensorboard: bool = False
    save_every: int | str | None = None
    keep_last: int = 2
    out: str | None = None
    overwrite: bool = False
    resume: bool = False

    @property
    def elastic(self) -> bool:
        """Whether the number of stages is that of the workers there are, and may be another one after a restart."""
        return self.stages == "auto" or isinstance(self.workers, str)


@dataclass(frozen=True)
class EpochMetrics:
    """A line of ``metrics.jsonl``. Accuracy in 0..1; throughput over the epoch's training alone.

    Of a text, losses are of a character, in nats, and accuracy is the share of next characters told right.
    """

    epoch: int
    update: int
    train_loss: float
    test_loss: float
    test_accuracy: float
    samples_per_s: float
    elapsed_s: float


@dataclass(frozen=True)
class StageSummary:
    """A line of the table at the end: delays in updates, peaks in bytes."""

    stage: int
    layers: tuple[str, ...]
    parameters: int
    delays: dict[int, int]
    memory: dict[str, int]
    activations_peak: int
    keep: str
    busy: dict[str, float]
    prediction_errors: tuple[PredictionError, ...]
    skipped_updates: tuple[int, ...] = ()


@dataclass(frozen=True)
class TrainResult:
    """How a run ended."""

    config: TrainConfig
    epochs: tuple[EpochMetrics, ...]
    stages: tuple[StageSummary, ...]

    @property
    def samples_per_s(self) -> float:
        """The median over epochs."""
        return sorted(e.samples_per_s for e in self.epochs)[len(self.epochs) // 2]


class Reporter:
    """Hears of a run's progress; this one says nothing."""

    def __enter__(self) -> Reporter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...

    def start(self, trainer: Trainer) -> None: ...
    def note(self, text: str) -> None: ...
    def update(self, epoch: int, update: int, loss: Callable[[], float], samples: int) -> None: ...
    def epoch(self, metrics: EpochMetrics) -> None: ...
    def finish(self, result: TrainResult) -> None: ...


class Interrupted(Exception):
    """The run was asked to stop, and has saved.

    Attributes:
        signal: that asked.
    """

    def __init__(self, signal: int, update: int, out: str) -> None:
        super().__init__(f"stopped after update {update}, which is saved; go on with: dtrp train --resume {out}")
        self.signal = signal


class Trainer:
    """A run, checked and ready.

    In a process that torchrun has started, or `dtrp.workers`, it is one of the run's ranks: it trains one stage, on
    one replica's share of each mini-batch, and ``reports`` says whether it is the one that shows the progress.

    Raises:
        ValueError, OSError: a setting that does not fit, with what to change. No file has been touched.
    """

    def __init__(self, config: TrainConfig) -> None:
        config, agreed = resolved(config)
        self.config = config
        rank, world_size = (
            int(os.environ.get(name, default)) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1"))
        )
        check_settings(config)
        ranks = world_size > 1 or (launched() and (config.elastic or config.workers is not None))
        num_workers = workers_per_replica(config, world_size) if ranks else None
        self.run_folder = None
        resume = config.resume
        if config.out and rank == 0:
            left = left_by(config.out, config_text(config), overwrite=config.overwrite)
            resume = resume or left == "unfinished"
            self.run_folder = RunFolder(config.out, overwrite=config.overwrite or left == "begun", resume=resume)
        method = make_method(config)
        devices = _devices(config.device)
        stage = rank % (num_workers or 1)
        self.replica = rank // (num_workers or 1)
        here = devices[stage if len(devices) > 1 and stage < len(devices) else 0]
        self.device_type = here.type
        # As torchrun does: as many threads as cores in each worker would take turns on the cores.
        threads = config.threads or (1 if num_workers else None)
        if threads is not None:
            torch.set_num_threads(threads)
        self.dtype = _DTYPES[config.dtype]
        dataset = load_dataset(config).limit(config.limit_train, config.limit_test)
        _check_shards(len(dataset.train_y), config)
        torch.manual_seed(config.seed)
        model = make_model(config, dataset).to(self.dtype)
        if agreed is not None:
            agreed.check_model(model)
        aux = auxiliary(_example(config, dataset, 2)[0], dataset.num_classes) if method.local else None
        self.dataset = dataset.to(here)
        self.updates_per_epoch = math.ceil(len(dataset.train_y) / config.batch_size)
        self.total_updates = config.epochs * self.updates_per_epoch
        if config.max_updates is not None:
            self.total_updates = min(self.total_updates, config.max_updates)
        factor = lr_factor(config.lr_schedule, config.warmup_updates, self.total_updates)
        num_stages = num_workers if num_workers is not None else fixed_stages(config.stages)
        if num_stages is None and config.cuts is None:
            num_stages = min(4, len(model))
        if method.local and num_stages != 1:
            _check_parts(len(dataset.train_y), config)
        mesh = None
        if num_workers is not None and config.replicas > 1:
            join(_TIMEOUT_S)
            mesh = init_device_mesh("cpu", (config.replicas, num_workers), mesh_dim_names=("replica", "stage"))
        self.pipe = Pipeline(
            model,
            make_optimizer(config),
            class_loss,
            num_stages=num_stages,
            cuts=config.cuts,
            method=method,
            num_microbatches=config.num_microbatches,
            keep=config.keep.split(",") if config.keep and "," in config.keep else config.keep,  # type: ignore[arg-type]
            memory_limit_bytes=config.memory_limit,
            lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, factor),
            aux=aux,
            seed=config.seed,
            devices=devices if len(devices) > 1 else devices[0],
            mesh=mesh,
            timeout_s=_TIMEOUT_S,
            max_grad_norm=config.max_grad_norm,
            clip=config.clip,  # type: ignore[arg-type]
            on_nonfinite=config.on_nonfinite,  # type: ignore[arg-type]
            trace=config.trace,
        )
        if config.prediction_error_every:
            self.pipe.watch_prediction(config.prediction_error_every)
        if launched() and world_size == 1:
            watch_launcher(lambda: None, lambda: False)  # on ranks, the engine does
        self.reports = self.pipe.is_last and self.replica == 0
        self.position, self.notes = Position(), list[str]()
        self._saves: Saves | None = None
        if config.out:
            run = Path(config.out).expanduser().absolute()
            every = SaveEvery.of(config.save_every)
            saves = Saves(run, config.keep_last, tidies=self.run_folder is not None, every=every)
            self._saves = saves if config.keep_last else None
            if self.pipe.gather(resume)[0]:
                self.position, self.notes = saves.resume(
                    self.pipe, num_replicas=config.replicas, check=self._check_position
                )
                if self.run_folder is not None:
                    self.run_folder.go_on(config_text(config), self.position.metrics)
        self._stop_signals = StopSignals(lambda: self.pipe.propose(_STOP))
        self._events: Events | None = None

    def _check_position(self, at: Position) -> None:
        """Refuse a place that is none of this run's."""
        names = {each.name for each in dataclasses.fields(EpochMetrics)}
        for line in at.metrics:
            if (
                not isinstance(line, dict)
                or line.keys() != names
                or not all(type(v) in (int, float) for v in line.values())
            ):
                raise ValueError("its metrics are none")
        if at.samples % self.config.batch_size or at.samples > len(self.dataset.train_y):
            raise ValueError(
                f"it is {at.samples} samples into an epoch of {len(self.dataset.train_y)}, no whole number of mini-batches of "
                f"{self.config.batch_size}"
            )

    def run(self, reporter: Reporter | None = None) -> TrainResult:
        """Train, test after each epoch, and keep the run folder whole all the while."""
        reporter = reporter or Reporter()
        config, pipe = self.config, self.pipe
        listening = self._stop_signals if self._saves is not None else nullcontext()
        with ExitStack() as failing, ExitStack() as ending, listening:
            failing.push(pipe)  # an error here is told to the other ranks at once
            reporter.start(self)
            for note in self.notes:
                reporter.note(note)
            at = self.position
            start = time.perf_counter() - at.elapsed_s
            epochs = [EpochMetrics(**line) for line in at.metrics]
            stage_scalars = StageScalars()
            if config.tensorboard:
                self._begin_events()
                ending.callback(self._end_events)
            for epoch in range(at.epoch, config.epochs):
                if pipe.num_updates >= self.total_updates:
                    break
                began = time.perf_counter() - at.trained_s
                loss_sum, learned, samples = self._train(at, start, began, reporter)
                pipe.flush()
                train_loss = float(loss_sum) / max(
                    1.0, float(learned)
                )  # waits for the device, so that the time is the epoch's
                trained = time.perf_counter() - began
                test_loss, accuracy = self.test()
                own = EpochMetrics(
                    epoch=epoch + 1,
                    update=pipe.num_updates,
                    train_loss=train_loss,
                    test_loss=test_loss,
                    test_accuracy=accuracy,
                    samples_per_s=samples / trained,
                    elapsed_s=time.perf_counter() - start,
                )
                told = pipe.gather((own if self.reports else None, self._stop_signals.asked is not None))
                metrics = next(m for m, _ in told if m is not None)
                epochs.append(metrics)
                if config.tensorboard:
                    scalars = pipe.gather(stage_scalars.since(pipe) if self.replica == 0 else {})
                    if self._events is not None:
                        self._events.epoch(metrics, scalars)
                if config.out:
                    model = pipe.model_state_dict_on_first()
                    if self.run_folder is not None and model is not None:
                        self.run_folder.write(config_text(config), dataclasses.asdict(metrics), model)
                best = at.best
                if best is None or metrics.test_accuracy > best[1]:
                    best = (metrics.update, metrics.test_accuracy)
                lines = [dataclasses.asdict(each) for each in epochs]
                at = Position(epoch + 1, elapsed_s=metrics.elapsed_s, metrics=lines, best=best)
                if self._saves is not None:
                    self._saves.write(pipe, at, portable=True)
                reporter.epoch(metrics)
                if any(asked for _, asked in told) and pipe.num_updates < self.total_updates:
                    self._stop()
            result = TrainResult(config, tuple(epochs), self._stage_summaries())
            if config.trace:
                pipe.save_trace(os.path.join(os.path.expanduser(str(config.out)), "trace.json"))
            if self.run_folder is not None:
                self.run_folder.finish(summary(result))
            failing.pop_all()
        reporter.finish(result)
        return result

    def _train(self, at: Position, start: float, began: float, reporter: Reporter) -> tuple[Tensor, Tensor, int]:
        """What is left of an epoch; the sum of the losses of its samples, how many have a finite one, and how many there are."""
        config, data, pipe = self.config, self.dataset, self.pipe
        loss_sum = torch.tensor(at.loss_sum, dtype=torch.float64)
        learned = torch.tensor(at.learned, dtype=torch.float64)
        samples = at.samples
        proposed = False
        for x, y in batches(
            data.train_x,
            data.train_y,
            config.batch_size,
            dataset=data,
            seed=config.seed,
            epoch=at.epoch,
            augment=config.augment and data.augment,
            dtype=self.dtype,
            images=pipe.is_first,
            start=at.samples,
        ):
            if self.run_folder is not None and self._saves is not None and self._saves.late and not proposed:
                pipe.propose(_SAVE)
                proposed = True
            lr = next((o.param_groups[0]["lr"] for o in reversed(pipe.optimizers) if o is not None), None)
            with self._autocast():
                loss = pipe.step(self._shard(x), self._shard(y))
            samples += len(y)
            if loss is not None:
                known = torch.isfinite(loss)  # nothing is learned from one that is not, nor is it counted
                loss_sum = loss_sum.to(loss.device) + torch.where(known, loss.double(), 0.0) * len(y)
                learned = learned.to(loss.device) + known * len(y)
                reporter.update(at.epoch, pipe.num_updates, loss.item, len(y))
                if self._events is not None:
                    self._events.update(pipe.num_updates, loss, lr, len(y))
            if pipe.num_updates == self.total_updates or samples == len(data.train_y):
                break  # the epoch's end saves
            if self._saves is not None and (pipe.agreed or self._saves.due(pipe.num_updates)):
                self._save_within(self._saves, at, samples, loss_sum, learned, start, began)
                proposed = False
                if pipe.agreed & _STOP:
                    self._stop()
        return loss_sum, learned, samples

    def _save_within(
        self, saves: Saves, at: Position, samples: int, loss_sum: Tensor, learned: Tensor, start: float, began: float
    ) -> None:
        """Save in the middle of an epoch; where the number of stages may change, so that it may."""
        if self.run_folder is not None:
            self.run_folder.begin(config_text(self.config))
        known = self.pipe.gather((float(loss_sum), float(learned)) if self.reports else None)
        sums = next(each for each in known if each is not None)
        now = time.perf_counter()
        here = dataclasses.replace(
            at, samples=samples, loss_sum=sums[0], learned=sums[1], trained_s=now - began, elapsed_s=now - start
        )
        if self._events is not None:
            self._events.flush()  # a run that goes on from the save lacks nothing
        saves.write(self.pipe, here, portable=self.config.elastic)

    def _begin_events(self) -> None:
        """Make the run's folder now, and the writer where the progress is known."""
        if self.run_folder is not None:
            self.run_folder.begin(config_text(self.config))
        self.pipe.gather(None)  # the folder is there
        if self.reports:
            folder = Path(str(self.config.out)).expanduser().absolute() / "tensorboard"
            self._events = Events(folder, after=self.pipe.num_updates, settings=config_text(self.config))

    def _end_events(self) -> None:
        if self._events is not None:
            self._events.close()
            self._events = None

    def _stop(self) -> NoReturn:
        """End the run here, as all ranks have agreed; it has been saved."""
        update = self.pipe.num_updates
        self.pipe.close()  # waits for the other ranks, so that none takes another's end for a failure
        raise Interrupted(self._stop_signals.asked or signal.SIGTERM, update, str(self.config.out))

    def _shard(self, batch: Tensor | None) -> Tensor | None:
        """This replica's part of a mini-batch."""
        if batch is None or self.config.replicas == 1:
            return batch
        return torch.tensor_split(batch, self.config.replicas)[self.replica]

    def test(self) -> tuple[float, float]:
        """(mean loss, accuracy in 0..1) on the test split, with the weights as they are; replicas take turns."""
        data = self.dataset
        loss = correct = 0.0
        every = batches(
            data.test_x, data.test_y, _TEST_BATCH, dataset=data, seed=0, epoch=0, augment=False, shuffle=False,
            dtype=self.dtype, images=self.pipe.is_first,
        )  # fmt: skip
        for x, y in itertools.islice(every, self.replica, None, self.config.replicas):
            with self._autocast():
                out = self.pipe.infer(x)
            if out is not None:
                target = y.to(out.device)
                loss += float(class_loss(out.float(), target, reduction="sum"))
                correct += float((out.argmax(-1) == target).sum())
        sums = self.pipe.gather((loss, correct))
        return sum(s[0] for s in sums) / data.test_y.numel(), sum(s[1] for s in sums) / data.test_y.numel()

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.config.dtype != "bfloat16":
            return nullcontext()
        return torch.autocast(self.device_type, dtype=torch.bfloat16)

    def _stage_summaries(self) -> tuple[StageSummary, ...]:
        delays, memory, peaks = self.pipe.delays(), self.pipe.memory(), self.pipe.activations_peak()
        keeps, busy, errors = self.pipe.keeps(), self.pipe.busy(), self.pipe.prediction_errors()
        skipped = self.pipe.skipped_updates()
        own = [
            StageSummary(
                stage=k,
                layers=tuple(name for name, _ in module.named_children()),
                parameters=sum(p.numel() for p in module.parameters()),
                delays=dict(sorted(delays[k].items())),
                memory=memory[k],
                activations_peak=peaks[k],
                keep=keeps[k] or "graph",
                busy=busy[k],
                prediction_errors=tuple(error for error in errors if error.stage == k),
                skipped_updates=tuple(skipped[k]),
            )
            for k, module in zip(delays, self.pipe.stages, strict=True)
        ]
        every = self.pipe.gather(own if self.replica == 0 else [])
        return tuple(summary for summaries in every for summary in summaries)


def summary(result: TrainResult) -> dict[str, Any]:
    """What ``summary.json`` says of a finished run, for `dtrp compare` and `dtrp report`."""
    config = {field.name: getattr(result.config, field.name) for field in dataclasses.fields(result.config)}
    last = result.epochs[-1]
    return {
        "config": {name: list(value) if isinstance(value, tuple) else value for name, value in config.items()},
        "epochs": last.epoch,
        "updates": last.update,
        "test_accuracy": last.test_accuracy,
        "test_loss": last.test_loss,
        "train_loss": last.train_loss,
        "samples_per_s": result.samples_per_s,
        "minibatch_s": result.config.batch_size / result.samples_per_s,
        "elapsed_s": last.elapsed_s,
        "stages": [
            {
                **{
                    name: getattr(stage, name)
                    for name in ("stage", "parameters", "memory", "activations_peak", "keep", "busy")
                },
                "layers": list(stage.layers),
                "delays": {str(delay): count for delay, count in stage.delays.items()},
                "prediction_errors": [[e.minibatch, e.delay, e.read, e.stale] for e in stage.prediction_errors],
                "skipped_updates": list(stage.skipped_updates),
            }
            for stage in result.stages
        ],
        "environment": environment(),
    }


def environment() -> dict[str, Any]:
    """Versions and hardware, for results that are kept."""
    from . import __version__

    return {
        "dtrp": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def resolved(config: TrainConfig) -> tuple[TrainConfig, Plan | None]:
    """The settings with those of the plan in them, and the plan; a plan says what it says alone.

    Raises:
        ValueError, OSError: a setting that says otherwise than the plan, or a file that is none.
    """
    if config.plan is None:
        return config, None
    agreed = Plan.load(config.plan)
    row = agreed.row
    order = "backward-first" if row.backward_first else "forward-first"
    said: dict[str, Any] = {
        "method": agreed.method,
        "cuts": agreed.cuts or None,
        "num_microbatches": agreed.num_microbatches,
        "batch_size": agreed.batch_size,
        "ahead": row.ahead,
        "order": order,
        "keep": ",".join(agreed.keep),
        "prediction": row.predict or "none",
        "grad_shrink": row.grad_shrink,
        "lr_shrink": row.lr_shrink,
    }
    defaults = TrainConfig()
    for field, value in said.items():
        given = getattr(config, field)
        if given not in (getattr(defaults, field), value):
            shown = given if not isinstance(given, tuple) else ",".join(map(str, given))
            raise ValueError(
                f"{_option(field)} {shown} with a plan that says {value}; leave it out, or edit {config.plan}"
            )
    if config.stages not in (None, agreed.num_workers):
        raise ValueError(f"--stages {config.stages} with a plan for {agreed.num_workers}; leave it out, or plan again")
    if config.memory_limit is not None:
        raise ValueError(
            "--memory-limit with a plan, which says what each stage keeps; leave it out, or plan again with it"
        )
    base_lr = config.lr if config.lr is not None else default_lr(config)
    scaled = dataclasses.replace(
        config,
        **said,
        stages=agreed.num_workers,
        lr=base_lr * agreed.lr_scale,
        warmup_updates=max(config.warmup_updates, agreed.warmup_updates),
        plan=None,
    )
    if make_method(scaled) != row:
        raise ValueError(
            f"{config.plan} has options of {agreed.method} that dtrp train cannot be told ({', '.join(agreed.options)}); use "
            "Pipeline(plan=...)"
        )
    return scaled, agreed


def make_method(config: TrainConfig) -> Method:
    """The row that the configuration names."""
    options = {
        "grad_shrink": config.grad_shrink,
        "lr_shrink": config.lr_shrink,
        "predict": config.prediction,
        "ahead": config.ahead,
        "backward_first": None if config.order is None else config.order == "backward-first",
    }
    return get_method(config.method, **{key: value for key, value in options.items() if value is not None})


def make_plan(config: TrainConfig, *, say: Callable[[str], None], **choices: Any) -> Plan:
    """`dtrp.plan` for the model, the data and the optimizer of a configuration; ``choices`` are its other arguments."""
    check_settings(config)
    device = _devices(config.device)[0]
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    dataset = load_dataset(config)
    torch.manual_seed(config.seed)
    model = make_model(config, dataset)
    x, y = _example(config, dataset, config.batch_size)
    model = model.to(_DTYPES[config.dtype])
    autocast = partial(torch.autocast, device.type, dtype=torch.bfloat16) if config.dtype == "bfloat16" else None
    return plan(
        model,
        (x, y),
        class_loss,
        method=make_method(config),
        optimizer=make_optimizer(config),
        device=device,
        autocast=autocast,
        progress=say,
        **choices,
    )


def _example(config: TrainConfig, dataset: Dataset | TextDataset, samples: int) -> tuple[Tensor, Tensor]:
    """A mini-batch of training data as the model takes it; of few samples some come again."""
    few = dataset.limit(max(1, min(samples, len(dataset.train_y))), None)
    x, y = next(
        batches(
            few.train_x, few.train_y, samples, dataset=few, seed=0, epoch=0, augment=False, dtype=_DTYPES[config.dtype]
        )
    )
    assert x is not None
    times = -(-samples // len(x))
    return torch.cat([x] * times)[:samples], torch.cat([y] * times)[:samples]


def load_dataset(config: TrainConfig) -> Dataset | TextDataset:
    """The data that the configuration names.

    Raises:
        ValueError, OSError: files or sizes that do not fit.
    """
    context = config.context if config.data == "text" else None
    return load_data(config.data, config.data_dir, seed=config.seed, image_size=config.image_size, context=context)


def make_model(config: TrainConfig, dataset: Dataset | TextDataset) -> nn.Sequential:
    """The network that the configuration names, for its data."""
    make = partial(get_model, config.model, layers=config.layers, width=config.width, heads=config.heads)
    if isinstance(dataset, TextDataset):
        return make(num_classes=dataset.num_classes, context=dataset.context)
    return make(dataset.in_channels, dataset.num_classes, image_size=dataset.image_size, context=config.context)


def class_loss(out: Tensor, target: Tensor, reduction: str = "mean") -> Tensor:
    """The cross entropy of logits (..., C) with classes (...): one a sample, or one at each of its places."""
    return cross_entropy(out.flatten(0, -2), target.flatten(), reduction=reduction)


def default_lr(config: TrainConfig) -> float:
    """The learning rate where none is given."""
    return 0.03 if config.optimizer == "sgd" else 1e-3


def config_text(config: TrainConfig) -> str:
    """The configuration as a YAML file that ``--config`` reads."""
    import yaml

    values = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value is not None and field.name not in ("out", "overwrite", "resume", "max_restarts"):
            values[field.name.replace("_", "-")] = list(value) if isinstance(value, tuple) else value
    text: str = yaml.safe_dump(values, sort_keys=False)
    return text


def lr_factor(schedule: str, warmup: int, total: int) -> Callable[[int], float]:
    """Update n's learning rate, over the base rate.

    A linear warm-up over ``warmup`` updates, times: ``constant`` 1; ``cosine`` from 1 to 0 over the run;
    ``multistep`` a tenth from half of the run on, a hundredth from three quarters on.
    """

    def factor(n: int) -> float:
        start = min(1.0, (n + 1) / (warmup + 1))
        if schedule == "cosine":
            return start * 0.5 * (1 + math.cos(math.pi * min(n, total) / total))
        if schedule == "multistep":
            return start * 0.1 ** ((n >= 0.5 * total) + (n >= 0.75 * total))
        return start

    return factor


def make_optimizer(config: TrainConfig) -> Callable[[list[nn.Parameter]], Optimizer]:
    """The optimizer that the configuration names, for a stage's parameters."""
    lr = config.lr if config.lr is not None else default_lr(config)
    decay = config.weight_decay
    makers: dict[str, Callable[[list[nn.Parameter]], Optimizer]] = {
        "sgd": lambda p: torch.optim.SGD(
            p, lr=lr, momentum=config.momentum, weight_decay=decay, nesterov=config.nesterov
        ),
        "adam": lambda p: torch.optim.Adam(p, lr=lr, weight_decay=decay),
        "adamw": lambda p: torch.optim.AdamW(p, lr=lr, weight_decay=decay),
        "nadam": lambda p: torch.optim.NAdam(p, lr=lr, weight_decay=decay, decoupled_weight_decay=True),
    }
    return makers[config.optimizer]


CHOICES = {
    "optimizer": ("sgd", "adam", "adamw", "nadam"),
    "lr_schedule": ("constant", "cosine", "multistep"),
    "dtype": tuple(_DTYPES),
    "prediction": ("linear", "rollout", "informed", "none"),
    "order": ("backward-first", "forward-first"),
    "clip": ("stage", "global"),
    "on_nonfinite": ("stop", "skip"),
}


def _check_shards(num_samples: int, config: TrainConfig) -> None:
    smallest = min(num_samples, num_samples % config.batch_size or config.batch_size)
    if smallest < config.replicas:
        raise ValueError(
            f"an epoch's last mini-batch has {smallest} of the {num_samples} samples, and each of the {config.replicas} "
            "replicas needs at least one; choose another --batch-size or --limit-train"
        )


def _check_parts(num_samples: int, config: TrainConfig) -> None:
    """Auxiliary networks of images have a BatchNorm, which cannot train on one sample."""
    last = min(num_samples, num_samples % config.batch_size or config.batch_size)
    smallest = max(1, last // config.replicas // config.num_microbatches)
    if smallest < 2 and not takes_text(config.model):
        raise ValueError(
            f"an epoch's last mini-batch has {last} samples, and its micro-batches one; the auxiliary networks of {config.method} "
            "train on at least two: choose another --batch-size, --num-microbatches or --limit-train"
        )


def check_settings(config: TrainConfig) -> None:
    """What can be checked without data.

    Raises:
        ValueError: a number out of range, or a name that nobody knows.
    """
    for field, names in CHOICES.items():
        value = getattr(config, field)
        if value is not None and value not in names:
            raise ValueError(unknown(_option(field), value, names))
    for field, least in (
        ("epochs", 1), ("batch_size", 1), ("num_microbatches", 1), ("stages", 1), ("max_updates", 1),
        ("workers", 1), ("replicas", 1), ("limit_train", 1), ("limit_test", 1), ("threads", 1), ("warmup_updates", 0),
        ("max_restarts", 0), ("keep_last", 0),
        ("image_size", 1), ("layers", 1), ("width", 1), ("heads", 1), ("context", 1), ("prediction_error_every", 0),
    ):  # fmt: skip
        value = getattr(config, field)
        if isinstance(value, int) and value < least:
            raise ValueError(f"{_option(field)} {value}: at least {least}")
    SaveEvery.of(config.save_every)
    check_workers(config)
    if takes_text(config.model) != (config.data == "text"):
        raise ValueError(
            f"--model {config.model} with --data {config.data}: "
            + ("it reads text; pass --data text --data-dir FILE" if takes_text(config.model)
               else "it reads images; pass --model gpt")
        )  # fmt: skip
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
            raise ValueError(f"{_option(field)} {value}: a finite number of at least 0")
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


def _option(field: str) -> str:
    return "--" + field.replace("_", "-")


def _devices(text: str) -> list[torch.device]:
    devices = []
    if text.strip() == "cuda" and "LOCAL_RANK" in os.environ and torch.cuda.is_available():
        text = f"cuda:{int(os.environ['LOCAL_RANK']) % torch.cuda.device_count()}"  # a worker's own
    for name in text.split(","):
        try:
            devices.append(torch.empty(0, device=name.strip()).device)
        except (RuntimeError, AssertionError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"--device {text}: torch cannot use {name.strip()!r} ({reason})") from None
    return devices


def summarize_delays(delays: dict[int, int]) -> str:
    """``{0: 3, 5: 95}`` as ``0-5, mostly 5``; steady delays matter, start-up and flush are few."""
    if not delays:
        return "-"
    most = max(delays, key=lambda delay: (delays[delay], delay))
    return str(most) if len(delays) == 1 else f"{min(delays)}-{max(delays)}, mostly {most}"


def describe_layers(layers: Sequence[str]) -> str:
    """``("stem", "block1", "block2")`` as ``stem..block2``."""
    return layers[0] if len(layers) == 1 else f"{layers[0]}..{layers[-1]}"
