"""The training loop behind ``dtrp train``: a plain loop over `Pipeline`, with its run on disk.

`TrainConfig` says what to do, `Trainer(config)` checks all of it and touches no file, and
`Trainer.run` trains. What is shown meanwhile is a `Reporter`'s business.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
import signal
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from ..data import batches
from ..launch.ranks import join, launched, watch_launcher
from ..launch.signals import StopSignals
from ..measure.prediction_error import look_every
from ..models import auxiliary
from ..pipeline import Pipeline
from .autosave import Position, SaveEvery, Saves
from .build import (
    class_loss,
    example,
    find_devices,
    load_dataset,
    lr_factor,
    make_method,
    make_model,
    make_optimizer,
    weights_dtype,
)
from .config import CHOICES, TrainConfig, config_text, default_lr
from .config_checks import check_parts, check_settings, check_shards
from .from_plan import make_plan, resolved
from .results import (
    EpochMetrics,
    StageSummary,
    TrainResult,
    describe_layers,
    environment,
    summarize_delays,
    summarize_stages,
    summary,
)
from .run_folder import RunFolder, left_by
from .staff import fixed_stages, workers_per_replica
from .tensorboard import Events, StageScalars

__all__ = [
    "CHOICES",
    "EpochMetrics",
    "Interrupted",
    "Reporter",
    "StageSummary",
    "TrainConfig",
    "TrainResult",
    "Trainer",
    "check_settings",
    "class_loss",
    "config_text",
    "default_lr",
    "describe_layers",
    "environment",
    "load_dataset",
    "lr_factor",
    "make_method",
    "make_model",
    "make_optimizer",
    "make_plan",
    "resolved",
    "summarize_delays",
    "summary",
]

_TEST_BATCH = 500
_TIMEOUT_S = 300.0
_SAVE, _STOP = 1, 2  # what is proposed to all ranks: to save, and to save and stop


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

    In a process that torchrun has started, or `dtrp.launch.torchrun`, it is one of the run's ranks: it trains one stage, on
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
        devices = find_devices(config.device)
        stage = rank % (num_workers or 1)
        self.replica = rank // (num_workers or 1)
        here = devices[stage if len(devices) > 1 and stage < len(devices) else 0]
        self.device_type = here.type
        # As torchrun does: as many threads as cores in each worker would take turns on the cores.
        threads = config.threads or (1 if num_workers else None)
        if threads is not None:
            torch.set_num_threads(threads)
        self.dtype = weights_dtype(config)
        dataset = load_dataset(config).limit(config.limit_train, config.limit_test)
        check_shards(len(dataset.train_y), config)
        torch.manual_seed(config.seed)
        model = make_model(config, dataset).to(self.dtype)
        if agreed is not None:
            agreed.check_model(model)
        aux = auxiliary(example(config, dataset, 2)[0], dataset.num_classes) if method.local else None
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
            check_parts(len(dataset.train_y), config)
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
        look = config.prediction_error_every
        if isinstance(look, str):
            look = look_every(self.total_updates * config.num_microbatches, config.num_microbatches)
        if look:
            self.pipe.watch_prediction(look)
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
            every = pipe.gather(summarize_stages(pipe) if self.replica == 0 else [])
            stages = tuple(stage for stages in every for stage in stages)
            result = TrainResult(config, tuple(epochs), stages)
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
