"""The training loop behind ``dtrp train``: a plain loop over `Pipeline`, with its run on disk.

`TrainConfig` holds the settings, `Trainer(config)` checks all of them and touches no file, and `Trainer.run` trains. A
`Reporter` shows the progress.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from ..data import InMemory, Part, SuppliedData
from ..launch.heap import keep_heap
from ..launch.join import join, launched, told_by_first_rank
from ..launch.process_end import watch_launcher
from ..launch.signals import StopRequest, stop_on_signal
from ..measure.prediction_error import look_every
from ..methods import Method
from ..pipeline import Pipeline
from ..tensors.pytree import map_tensors, tensors_in
from . import build
from .autosave import Position, SaveEvery, Saves
from .callbacks.protocol import Callback, RunStart, Update
from .callbacks.told import Told, load_callback
from .config import TrainConfig, as_settings, config_text, score_name
from .config_checks import check_last_minibatch, check_settings, workers_per_replica
from .from_plan import resolved
from .results import EpochMetrics, TrainResult, summarize_stages, summary
from .run_folder import RunFolder, changed_code
from .scores.criterion import Sums, means
from .tensorboard import StageScalars, TensorBoard

_PIPELINE_SETTINGS = (
    "num_microbatches",
    "microbatch_samples",
    "seed",
    "max_grad_norm",
    "clip",
    "on_nonfinite",
    "trace",
)
_SAVE, _STOP = 1, 2  # proposals to all ranks: to save, and to save and stop


class Reporter:
    """Shows the progress of a run; this one shows nothing."""

    def __enter__(self) -> Reporter:
        return self

    def __exit__(self, *error: object) -> None: ...

    def start(self, trainer: Trainer) -> None: ...
    def note(self, text: str) -> None: ...
    def update(self, epoch: int, update: int, loss: Callable[[], float], samples: int) -> None: ...
    def epoch(self, metrics: EpochMetrics) -> None: ...
    def finish(self, result: TrainResult) -> None: ...


class _Shown(Callback):
    """Lets a reporter show what callbacks are told; it shows an epoch when that is on disk, later than they are told.

    Args:
        reporter: the reporter.
        trainer: the run.
    """

    def __init__(self, reporter: Reporter, trainer: Trainer) -> None:
        self._reporter, self._trainer = reporter, trainer

    def start(self, run: RunStart) -> None:
        self._reporter.start(self._trainer)
        for note in self._trainer.notes:
            self._reporter.note(note)

    def update(self, update: Update) -> None:
        self._reporter.update(update.epoch - 1, update.number, update.loss.item, update.samples)

    def finish(self, result: TrainResult | None) -> None:
        if result is not None:
            self._reporter.finish(result)


class Interrupted(Exception):
    """The run was asked to stop, and has saved.

    Attributes:
        signal: number of the signal that asked.
    """

    def __init__(self, signal: int, update: int, out: str) -> None:
        super().__init__(f"stopped after update {update}, which is saved; go on with: dtrp train --resume {out}")
        self.signal = signal


class _LossSum:
    """The sum of an epoch's finite losses, weighted by samples; kept on the device of the losses, and not waited for.

    Args:
        loss_sum, learned: sum and number of samples with a finite loss, in the part of the epoch before a resume.
    """

    def __init__(self, loss_sum: float, learned: float) -> None:
        self.loss_sum = torch.tensor(loss_sum, dtype=torch.float64)
        self.learned = torch.tensor(learned, dtype=torch.float64)

    def add(self, loss: Tensor, samples: int) -> None:
        finite = torch.isfinite(loss)
        self.loss_sum = self.loss_sum.to(loss.device) + torch.where(finite, loss.double(), 0.0) * samples
        self.learned = self.learned.to(loss.device) + finite * samples

    def values(self) -> tuple[float, float]:
        """(sum, number of samples); waits for the device."""
        return float(self.loss_sum), float(self.learned)


class Trainer:
    """A run, checked and ready to train.

    In a process that torchrun or `dtrp.launch.torchrun` has started, it is a rank of the run: it trains one stage, on
    the share of each mini-batch that belongs to its replica.

    Args:
        config: settings of the run.

    Attributes:
        config: settings, completed by the plan if there is one, and with a number of micro-batches.
        source: training and test data, as mini-batches on the device of the first stage of this process.
        criterion: what the run is trained by, and judged by.
        dataset: the data itself where it is in memory; else None.
        pipe: pipeline, or this rank's part of it.
        total_updates: number of updates of the run.
        reports: whether this rank shows the progress.
        notes: notes for the user, about the data and about a run that continues.

    Raises:
        ValueError, OSError: a setting that does not fit, with what to change. No file has been touched.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.config, plan = resolved(config)
        config = self.config
        check_settings(config)
        keep_heap()
        rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        ranks = world_size > 1 or (launched() and (config.elastic or config.workers is not None))
        num_workers = workers_per_replica(config, world_size) if ranks else None
        self.replica, stage = divmod(rank, num_workers or 1)
        self.run_folder = RunFolder.open(config) if config.out and rank == 0 else None
        if (
            config.elastic and config.out
        ):  # the number of micro-batches stays that of the run when it goes on with another K
            kept = None if self.run_folder is None else self.run_folder.division(config)
            config = self.config = dataclasses.replace(config, **told_by_first_rank(kept, None, build.TIMEOUT_S))
        method = build.make_method(config)
        devices = build.find_devices(config.device)
        device = devices[stage if stage < len(devices) else 0]
        self._device_type = device.type
        # As torchrun does: as many threads as cores in each worker would take turns on the cores.
        threads = config.threads or (1 if num_workers else None)
        if threads is not None:
            torch.set_num_threads(threads)
        self.notes: list[str] = []
        self.source = build.open_source(
            config, self.notes.append, device, reads=stage == 0, reads_targets=stage in (0, (num_workers or 1) - 1)
        )
        with ExitStack() as failing:
            failing.callback(self.source.close)
            self.dataset = self.source.dataset if isinstance(self.source, InMemory) else None
            if self.run_folder is not None:
                self.run_folder.facts = self.source.facts()
            self.criterion = build.criterion_of(config, self.source)
            if isinstance(self.source, SuppliedData) and device.type != "cpu":
                self.source.check_targets = self.criterion.check_labels
            self.total_updates = config.epochs * math.ceil(self.source.num_train / config.batch_size)
            if config.max_updates is not None:
                self.total_updates = min(self.total_updates, config.max_updates)
            torch.manual_seed(config.seed)
            model, num_stages, cuts = build.divided(
                build.make_model(config, self.source),
                config,
                self.source,
                num_workers if num_workers is not None else config.fixed_stages,
            )
            if plan is not None and cuts is not None:
                plan.check_model(model)
            self.config = config.divided(len(cuts) + 1 if cuts is not None else num_stages or len(model))
            self.pipe = self._make_pipeline(method, model, num_stages, cuts, devices, num_workers)
            if launched() and world_size == 1:
                watch_launcher(lambda: None, lambda: False)  # on ranks, the engine does
            self.reports = self.pipe.is_last and self.replica == 0
            self._position = Position()
            self._saves = self._open_saves()
            self._stop_request = StopRequest()
            self._callbacks = [load_callback(reference) for reference in config.callback] if self.reports else []
            self._told = Told(())
            self._stage_scalars = StageScalars()
            failing.pop_all()

    def _make_pipeline(
        self,
        method: Method,
        model: nn.Sequential | list[nn.Module],
        num_stages: int | None,
        cuts: tuple[int, ...] | None,
        devices: list[torch.device],
        num_workers: int | None,
    ) -> Pipeline:
        """The pipeline of the run; ``num_workers``: K where each stage has a process, else None."""
        config, source = self.config, self.source
        check_last_minibatch(source.num_train, config, auxiliary=method.local and num_stages != 1)
        aux = build.auxiliary_networks(config, source) if method.local else None
        pipe = Pipeline(
            model,
            build.make_optimizer(config),
            self.criterion.loss,
            loss_weight=self.criterion.loss_weight,
            num_stages=num_stages,
            cuts=cuts,
            method=method,
            keep=config.keep.split(",") if config.keep and "," in config.keep else config.keep,  # type: ignore[arg-type]
            memory_limit_bytes=config.memory_limit,
            lr_scheduler=build.make_scheduler(config, self.total_updates),
            aux=aux,
            devices=devices if len(devices) > 1 else devices[0],
            mesh=self._make_mesh(num_workers),
            timeout_s=build.TIMEOUT_S,
            **{field: getattr(config, field) for field in _PIPELINE_SETTINGS},
        )
        every = config.prediction_error_every
        if isinstance(every, str):
            every = look_every(self.total_updates * pipe.num_microbatches, pipe.num_microbatches)
        if every:
            pipe.watch_prediction(every)
        return pipe

    def _make_mesh(self, num_workers: int | None) -> DeviceMesh | None:
        """The mesh (replica, stage) of a run with replicas."""
        if num_workers is None or self.config.replicas == 1:
            return None
        join(build.TIMEOUT_S)
        return init_device_mesh("cpu", (self.config.replicas, num_workers), mesh_dim_names=("replica", "stage"))

    def _open_saves(self) -> Saves | None:
        """The saves of a run on disk, after the run has been resumed from them where it continues; None: no saves."""
        config = self.config
        if not config.out:
            return None
        every = SaveEvery.parse(config.save_every)
        saves = Saves(self._folder, config.keep_last, tidies=self.run_folder is not None, every=every)
        if self.pipe.gather(self.run_folder.resumes if self.run_folder is not None else config.resume)[0]:
            self._position, notes = saves.resume(self.pipe, num_replicas=config.replicas, check=self._check_position)
            self.notes += notes
            if self.source.skips and self._position.samples:
                self.notes.append(
                    f"the first {self._position.samples} samples of the epoch are read again, and left out: {config.data} has "
                    "an order of its own"
                )
            self.notes += [
                f"{name} has changed since this run began; the run goes on with what it is now"
                for name in changed_code(self._folder)
            ]
            if self.run_folder is not None:
                self.run_folder.go_on(config_text(config), [metrics.line() for metrics in self._position.metrics])
        return saves if config.keep_last else None

    @property
    def _folder(self) -> Path:
        """The folder of ``--out``."""
        return Path(str(self.config.out)).expanduser().absolute()

    def _check_position(self, position: Position) -> None:
        """Refuse a position of another run."""
        if position.samples % self.config.batch_size or position.samples > self.source.num_train:
            raise ValueError(
                f"it is {position.samples} samples into an epoch of {self.source.num_train}, no whole number of mini-batches "
                f"of {self.config.batch_size}"
            )

    def run(self, reporter: Reporter | None = None, *, callbacks: Sequence[Callback] = ()) -> TrainResult:
        """Train, and test after each epoch; the run folder is whole at any time.

        Args:
            reporter: shows the progress.
            callbacks: callbacks beside those of the settings; on several ranks they are told by the one that reports.

        Raises:
            Interrupted: the run was asked to stop, and has saved.
            UserCodeError: a function or a callback of the user's has failed.
        """
        reporter = reporter or Reporter()
        config, pipe = self.config, self.pipe
        with ExitStack() as failing, ExitStack() as ending:
            if self._saves is not None:
                self._stop_request = ending.enter_context(stop_on_signal(lambda: pipe.propose(_STOP)))
            ending.callback(self.source.close)
            failing.callback(lambda: list(map(reporter.note, self._told.fail())))
            failing.push(pipe)  # other ranks learn of an error at once
            self._told = self._all_callbacks(reporter, callbacks)
            folder = self._folder if config.out else None
            self._told.start(RunStart(as_settings(config), folder, pipe.num_updates, self.total_updates))
            self._start = time.perf_counter() - self._position.elapsed_s
            while self._position.epoch < config.epochs and pipe.num_updates < self.total_updates:
                self._run_epoch(reporter)
            result = self._finish()
            failing.pop_all()
        self._told.finish(result)
        return result

    def _all_callbacks(self, reporter: Reporter, callbacks: Sequence[Callback]) -> Told:
        """The callbacks that this rank tells. For TensorBoard the run's folder is made now."""
        members: list[Callback] = [_Shown(reporter, self)]
        if self.config.tensorboard:
            if self.run_folder is not None:
                self.run_folder.begin(config_text(self.config))
            self.pipe.gather(None)  # the folder is there
            if self.reports:
                score, settings = score_name(self.config.metric), config_text(self.config)
                members.append(TensorBoard(self._folder / "tensorboard", score=score, settings=settings))
        return Told([*members, *(callbacks if self.reports else ()), *self._callbacks])

    def _run_epoch(self, reporter: Reporter) -> None:
        """Train for an epoch, or for what is left of it, and test; record the metrics, and save."""
        pipe, position = self.pipe, self._position
        began = time.perf_counter() - position.trained_s
        losses, samples = self._train(began)
        pipe.flush()
        loss_sum, learned = losses.values()  # waits for the device, so that the time is that of the epoch
        trained_s = time.perf_counter() - began
        tested = self._tested()
        measured = EpochMetrics(
            epoch=position.epoch + 1,
            update=pipe.num_updates,
            train_loss=loss_sum / max(1.0, learned),
            test_loss=tested.pop("loss"),
            test_accuracy=tested.pop(score_name(self.config.metric)),
            samples_per_s=samples / trained_s,
            elapsed_s=time.perf_counter() - self._start,
            scores=tested,
        )
        ranks = pipe.gather((measured if self.reports else None, self._stop_request.signal is not None))
        metrics = next(metrics for metrics, _ in ranks if metrics is not None)
        self._record(metrics)
        reporter.epoch(metrics)
        if any(asked for _, asked in ranks) and pipe.num_updates < self.total_updates:
            self._stop()

    def _record(self, metrics: EpochMetrics) -> None:
        """Write the metrics of a finished epoch to the run's files, and save."""
        ranks = self.pipe.gather(self._stage_scalars.since(self.pipe) if self.replica == 0 else {})
        self._told.epoch(metrics, {name: value for scalars in ranks for name, value in scalars.items()})
        self._told.save(metrics.update)
        if self.config.out:
            model = self.pipe.model_state_dict_on_first()
            if self.run_folder is not None and model is not None:
                self.run_folder.write(config_text(self.config), metrics.line(), model)
                self.source.keep(self._folder / build.LISTING)
        best = self._position.best
        sign = -1 if self.config.best == "lowest" else 1
        if best is None or sign * metrics.test_accuracy > sign * best[1]:
            best = (metrics.update, metrics.test_accuracy)
        epochs = [*self._position.metrics, metrics]
        self._position = Position(metrics.epoch, elapsed_s=metrics.elapsed_s, metrics=epochs, best=best)
        if self._saves is not None:
            self._saves.write(self.pipe, self._position, portable=True)

    def _finish(self) -> TrainResult:
        """The results of the run, which are written to its folder."""
        ranks = self.pipe.gather(summarize_stages(self.pipe) if self.replica == 0 else [])
        stages = tuple(itertools.chain.from_iterable(ranks))
        damaged = tuple(itertools.chain.from_iterable(self.pipe.gather(self.source.damaged)))
        result = TrainResult(self.config, tuple(self._position.metrics), stages, damaged)
        if self.config.trace:
            self.pipe.save_trace(self._folder / "trace.json")
        if self.run_folder is not None:
            self.run_folder.finish(summary(result))
        return result

    def _train(self, began: float) -> tuple[_LossSum, int]:
        """Train on what is left of an epoch, which began at ``began``; its losses, and its number of samples."""
        batch_size, source, pipe, position = self.config.batch_size, self.source, self.pipe, self._position
        losses, samples = _LossSum(position.loss_sum, position.learned), position.samples
        proposed = False
        for x, y in source.train_batches(batch_size, epoch=position.epoch, start=samples, part=self._part()):
            if self.run_folder is not None and self._saves is not None and self._saves.late and not proposed:
                pipe.propose(_SAVE)
                proposed = True
            lr = next((o.param_groups[0]["lr"] for o in reversed(pipe.optimizers) if o is not None), None)
            with self._autocast():
                loss = pipe.step(x, y)
            size = min(batch_size, source.num_train - samples)  # of all replicas
            samples += size
            if loss is not None:
                losses.add(loss, size)
                self._told.update(Update(pipe.num_updates, position.epoch + 1, loss, lr, size))
            if pipe.num_updates == self.total_updates or samples == source.num_train:
                break  # the end of the epoch saves
            if self._saves is not None and (pipe.agreed or self._saves.due(pipe.num_updates)):
                self._save_within(self._saves, samples, losses, began)
                proposed = False
                if pipe.agreed & _STOP:
                    self._stop()
        return losses, samples

    def _save_within(self, saves: Saves, samples: int, losses: _LossSum, began: float) -> None:
        """Save in the middle of an epoch: a portable save where the number of stages may change, else an exact one."""
        if self.run_folder is not None:
            self.run_folder.begin(config_text(self.config))
            self.source.keep(self._folder / build.LISTING)
        ranks = self.pipe.gather(losses.values() if self.reports else None)
        loss_sum, learned = next(values for values in ranks if values is not None)
        position = dataclasses.replace(self._position, samples=samples, loss_sum=loss_sum, learned=learned)
        position.trained_s, position.elapsed_s = (time.perf_counter() - since for since in (began, self._start))
        self._told.save(self.pipe.num_updates)
        saves.write(self.pipe, position, portable=self.config.elastic)

    def _stop(self) -> NoReturn:
        """End the run, as all ranks have agreed, after a save."""
        update = self.pipe.num_updates
        self.pipe.close()  # waits for the other ranks, so that none takes the end of another for a failure
        raise Interrupted(self._stop_request.signal or signal.SIGTERM, update, str(self.config.out))

    def _part(self) -> Part:
        """The part of every mini-batch that this rank needs."""
        pipe = self.pipe
        return Part(pipe.is_first, pipe.is_first or pipe.is_last, self.replica, self.config.replicas)

    def test(self) -> tuple[float, float]:
        """(mean loss, accuracy in 0..1, or the first metric) on the test split, with the weights as they are."""
        tested = self._tested()
        return tested["loss"], tested[score_name(self.config.metric)]

    def _tested(self) -> dict[str, float]:
        """Loss and metrics by name on the test split; replicas share the mini-batches."""
        sums: list[Sums] = []
        for x, y in self.source.test_batches(part=self._part()):
            with self._autocast():
                out = self.pipe.infer(x)
            if out is not None:
                device = next((t.device for t in tensors_in(out)), torch.device("cpu"))
                sums.append(self.criterion.judge(out, map_tensors(partial(Tensor.to, device=device), y)))
        return means(itertools.chain.from_iterable(self.pipe.gather(sums)))

    def _autocast(self) -> AbstractContextManager[object]:
        if self.config.dtype != "bfloat16":
            return nullcontext()
        return torch.autocast(self._device_type, dtype=torch.bfloat16)
