"""What `Pipeline` and `dtrp.pipelining.ScheduleDTRP` share: an engine, and all that can be asked of it but a step."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Literal, Self, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .engine.base import Engine
from .engine.consistency import method_values
from .errors import message_of
from .measure.prediction_error import PredictionError, PredictionErrorGauge
from .measure.trace import Tracer, write_chrome_trace
from .methods import Keep, Method, as_method, keeping
from .saving import CheckpointError, session, state_dict
from .schedule import check_orders
from .stage.deferral import Share
from .stage.gradients import Clip, GradientRule, OnNonfinite, overall
from .stage.optimizer_step import checked_scheduler
from .stage.specs import StageTraining
from .stage.stage import Stage
from .typing import Json, LossWeight, OptimizerFactory, SchedulerFactory
from .validation import check_seed, check_timeout, whole

T = TypeVar("T")
AUTO = "auto"  # num_microbatches: as many as stages


@dataclass(frozen=True)
class Settings:
    """What the caller has chosen for all stages; every rank of a pipeline has the same.

    Args:
        method: the row of the method that trains.
        num_microbatches: A; 0: as many as stages, until `divided` has counted them.
        seed: of random draws; None: the caller left it open.
        rule: what is done with gradients that are too long or not finite.
        keep, memory_limit_bytes: as given to `dtrp.Pipeline`.
        microbatch_samples: the least samples of a micro-batch; 0: the caller left it open.
        left_open: which of the last two a checkpoint may decide, since the caller has not.
    """

    method: Method
    num_microbatches: int
    seed: int | None
    rule: GradientRule
    keep: Literal["auto"] | Keep | list[Keep] | None
    memory_limit_bytes: int | None
    microbatch_samples: int = 1
    left_open: frozenset[str] = frozenset()

    @classmethod
    def checked(
        cls,
        method: str | Method,
        num_microbatches: int | str,
        seed: int | None,
        timeout_s: float,
        max_grad_norm: float | None,
        clip: Clip,
        on_nonfinite: OnNonfinite,
        keep: Literal["auto"] | Keep | Sequence[Keep] | None,
        memory_limit_bytes: int | None,
        *,
        count: str = "num_microbatches",
        microbatch_samples: int | None = 1,
    ) -> Settings:
        """The arguments of `dtrp.Pipeline` of these names; ``count``: what the caller calls A.

        Raises:
            TypeError, ValueError: an argument that does not fit, with what to change.
        """
        row = as_method(method)
        may_be_open = count == "num_microbatches"
        is_open = may_be_open and num_microbatches == AUTO
        number = 0 if is_open else whole(count, num_microbatches, advice=f", or {AUTO!r}" if may_be_open else "")
        least = 0 if microbatch_samples is None else whole("microbatch_samples", microbatch_samples)
        check_seed(seed)
        check_timeout(timeout_s)
        rule = GradientRule.checked(max_grad_norm, clip, on_nonfinite, row)
        kept = list(keep) if isinstance(keep, Sequence) and not isinstance(keep, str) else keep
        left_open = {"num_microbatches": is_open, "microbatch_samples": microbatch_samples is None}
        names = frozenset(name for name in left_open if left_open[name])
        return cls(row, number, seed, rule, kept, memory_limit_bytes, least, names)

    def divided(self, modules: Sequence[nn.Module], *, num_replicas: int) -> Settings:
        """The settings with the numbers that the caller left open, for these stages.

        Replicas that share a `torch.nn.SyncBatchNorm` need a sample of each in every micro-batch, and one is enough.
        """
        synchronized = any(isinstance(m, nn.SyncBatchNorm) for module in modules for m in module.modules())
        least = 1 if self.num_microbatches or (num_replicas > 1 and synchronized) else 2
        return replace(
            self,
            num_microbatches=self.num_microbatches or len(modules),
            microbatch_samples=self.microbatch_samples or least,
        )

    def shared(self) -> dict[str, Json]:
        """The settings that ranks compare, by the name of the argument."""
        return {
            "num_microbatches": self.num_microbatches,
            "microbatch_samples": self.microbatch_samples,
            "seed": self.seed,
            "method": method_values(self.method),
            "keep": self.keep,
            "memory_limit_bytes": self.memory_limit_bytes,
            "max_grad_norm": self.rule.max_norm,
            "clip": self.rule.clip,
            "on_nonfinite": self.rule.on_nonfinite,
        }

    def trainings(
        self, num_stages: int, optimizer: OptimizerFactory, lr_scheduler: SchedulerFactory | None
    ) -> list[StageTraining]:
        """How each stage is trained."""
        check_orders(self.method, num_stages)
        rows, limit = keeping(self.method, num_stages, self.keep, self.memory_limit_bytes)
        factories = optimizer, checked_scheduler(lr_scheduler)
        return [StageTraining(row, *factories, self.num_microbatches, limit, self.rule) for row in rows]


class BasePipeline:
    """An engine, with all that a caller may ask of it between steps.

    Attributes:
        method: the row of the method that trains.
        num_stages, num_microbatches: K and A.
        microbatch_samples: the least samples of a micro-batch, where the mini-batch has them.
        seed: of the stages' random draws.
    """

    method: Method
    num_stages: int
    num_microbatches: int
    microbatch_samples: int
    seed: int
    _engine: Engine
    _keep: Any  # as the caller gave it
    _left_open: frozenset[str]  # arguments that the caller left open, and an exact checkpoint decides
    _schedules_lr: bool
    _loss_weight: LossWeight | None = None
    _tracer: Tracer
    _watches: list[Callable[[], object]]  # functions that end a watch over the caller's habits
    _closed = False
    _broken: str | None = None  # what it has failed with
    _warned_of_versions = False

    def _configure(self, settings: Settings, num_stages: int, *, schedules_lr: bool, trace: bool) -> None:
        self.method, self.num_stages, self.num_microbatches = settings.method, num_stages, settings.num_microbatches
        self.microbatch_samples, self._left_open = settings.microbatch_samples, settings.left_open
        self._keep, self._schedules_lr, self._tracer = settings.keep, schedules_lr, Tracer(bool(trace))

    def propose(self, word: int) -> None:
        """Propose something to all ranks, at any time, from a signal handler or a thread too: 1, 2, or 3 for both.

        It costs no waiting: the proposal goes to the first rank with gradients, and comes back with the activations of
        a mini-batch, so that `agreed` is the same on every rank after the same step. What the numbers mean is the
        caller's business; ``dtrp train`` saves at 1, and saves and stops at 2.
        """
        if word not in (1, 2, 3):
            raise ValueError(f"word={word!r}: propose 1, 2, or 3 for both")
        self._engine.proposals.add(word)

    @property
    def agreed(self) -> int:
        """What the ranks have proposed, as of the last step; the same on all of them. 0 is nothing.

        A few steps may lie between a proposal and it. What is proposed in the last steps before a flush is agreed on in
        the first after it.
        """
        return self._engine.proposals.agreed

    def flush(self) -> None:
        """Run the backwards and updates that are left. After it every stage has made one update per mini-batch."""
        self._check_usable(trains=True)
        with self._breaking():
            self._engine.flush()

    def rng(self, stage: int, microbatch: int) -> AbstractContextManager[None]:
        """The context in which ``stage`` draws its random numbers for ``microbatch``.

        ``microbatch`` counts from 0 since the pipeline was made, through flush and load. A plain loop that
        runs each stage's layers inside it draws the same dropout masks.
        """
        if not 0 <= stage < self.num_stages:
            raise ValueError(f"stage={stage}: the pipeline has stages 0..{self.num_stages - 1}")
        # The device and replica of that stage, or of the stage that this rank hosts.
        hosted = {candidate.index: candidate for candidate in self._engine.stages}
        return replace(hosted.get(stage, self._engine.stages[0]).draws, stage=stage).region(microbatch)

    # -- what it holds ------------------------------------------------------------------------------------

    def delays(self) -> dict[int, Counter[int]]:
        """``{stage: Counter({delay: micro-batches})}``, in updates, of the micro-batches that are through."""
        return {stage.index: Counter(stage.delays) for stage in self._engine.stages}

    def deferred(self) -> dict[int, Share]:
        """``{stage: what of its backward is deferred}``, of the stages of this process; empty where backwards are whole.

        `dtrp.stage.deferral.Share` has the names of the parameters whose gradients wait for the second part, those of
        the others with the reason, and how large their part is; it is known after the first micro-batch.
        """
        divided = {stage.index: stage.division for stage in self._engine.stages if stage.division is not None}
        return {index: division.share() for index, division in divided.items()}

    def skipped_updates(self) -> dict[int, list[int]]:
        """``{stage: mini-batches}`` whose update was left out for a gradient that is not finite."""
        return {stage.index: list(stage.updates.skipped) for stage in self._engine.stages}

    def grad_norms(self) -> dict[int, float | None]:
        """``{stage: the 2-norm of the gradient of its last update}``, before it was clipped; None before the first.

        Of the stages of this process, without waiting for others. ``p.grad`` is None between updates, so that functions
        of it, as ``torch.nn.utils.clip_grad_norm_``, return 0.
        """
        return {stage.index: next(reversed(stage.gradient_norms.values()), None) for stage in self._engine.stages}

    def grad_norm(self) -> float | None:
        """The 2-norm of a mini-batch's gradient over all stages, before it was clipped; None before the first update.

        That mini-batch is the last one with which every stage has made its update; by a method that flushes, and after
        `flush`, the last one stepped. On ranks all call it, and all are told.
        """
        self._check_usable()
        with self._shared():
            stages = self._engine.gather_stages("grad_norm", lambda stage: stage.gradient_norms)
        minibatches = set.intersection(*map(set, stages))
        return overall([norms[max(minibatches)] for norms in stages]) if minibatches else None

    def memory(self) -> dict[int, dict[str, int]]:
        """Bytes that each stage holds now, measured from its tensors.

        ``weights`` (parameters and buffers, a shared one at each of its stages, an auxiliary network's too),
        ``buffers`` (the copies that forwards move whose repetition is still to come), ``predicted`` (the predicted copy
        that a forward reads), ``optimizer`` (its state), ``gradients`` (those of the last update until the stage's next
        work) and ``gradients_peak``, their maximum so far, ``stash`` (what waits between F and B: inputs, graphs and
        the copies of weights they need) and ``stash_peak``. A graph is weighed by the storages it saves, once for each
        shape of input; one whose saved tensors go through hooks of the caller's weighs nothing.
        """
        return {stage.index: stage.memory() for stage in self._engine.stages}

    def busy(self) -> dict[int, dict[str, float]]:
        """``{stage: seconds}`` of the stages of this rank, from the first step to the last thing done.

        ``elapsed`` is the whole, and the sum of the rest: ``busy``, at work in F, B and U; ``wait_forward``, for the
        input; ``wait_gradient``; ``wait_send``, handing messages over; ``wait_replicas``, averaging gradients; and
        ``outside``, between steps, and in `infer` and the like. The difference of two calls is what happened in
        between. Where all stages are in one process none waits, and ``outside`` of a stage is the others' work. The
        clock is the CPU's: the launches of an accelerator are short, and a wait for its results is work.
        """
        times = self._engine.working_times
        return {stage.index: spent.seconds() for stage, spent in zip(self._engine.stages, times, strict=True)}

    def watch_prediction(self, every: int = 1) -> None:
        """Compare the weights that a forward read with those of its backward, from now on, at every n-th micro-batch."""
        every = whole("every", every)
        for stage in self._engine.stages:
            stage.gauge = PredictionErrorGauge(stage.index, every)

    def prediction_errors(self) -> list[PredictionError]:
        """What `watch_prediction` has seen on this rank: the distances, relative to the norm of the true weights."""
        return [error for stage in self._engine.stages if stage.gauge is not None for error in stage.gauge.errors]

    def activations_peak(self) -> dict[int, int]:
        """``{stage: bytes}``: the most that the stash and the graph that a backward recomputes took together."""
        return {stage.index: stage.activations_peak for stage in self._engine.stages}

    def keeps(self) -> dict[int, Keep | None]:
        """``{stage: what it keeps}`` between F and B; with ``keep="auto"`` None before its first micro-batch.

        The last stage, whose B follows its F at once, has its graph at hand whatever the method says, and so has every
        stage with a loss of its own.
        """
        return {
            stage.index: ("input" if stage.recomputes else "graph") if stage.has_decided else None
            for stage in self._engine.stages
        }

    @property
    def stages(self) -> tuple[nn.Module, ...]:
        """The stages' modules, made of the model's own layers."""
        return tuple(stage.module for stage in self._engine.stages)

    @property
    def aux(self) -> tuple[nn.Module | None, ...]:
        """Each stage's auxiliary network; None where it has none."""
        return tuple(stage.aux for stage in self._engine.stages)

    @property
    def is_first(self) -> bool:
        """Whether this process hosts the first stage, and so reads ``x``, and by a local method ``y`` too."""
        return self._engine.takes_x

    @property
    def is_last(self) -> bool:
        """Whether this process hosts the last stage, and so returns the loss, and reads ``y`` unless the first one does."""
        return self._engine.takes_y

    @property
    def optimizers(self) -> tuple[Optimizer | None, ...]:
        """Each stage's optimizer; None where there is nothing to train."""
        return tuple(stage.optimizer for stage in self._engine.stages)

    @property
    def lr_schedulers(self) -> tuple[Any, ...]:
        """Each stage's learning-rate scheduler; None where there is none."""
        return tuple(stage.lr_scheduler for stage in self._engine.stages)

    @property
    def num_updates(self) -> int:
        """Mini-batches stepped."""
        return self._engine.num_updates

    @property
    def in_flight(self) -> int:
        """Micro-batches whose backward some stage of this process has not run yet."""
        return max(stage.in_flight for stage in self._engine.stages)

    # -- saving -------------------------------------------------------------------------------------------

    def model_state_dict(self) -> dict[str, Tensor]:
        """A snapshot of the whole model under the unsplit model's names; it loads into the plain model.

        On every rank; where there are several, its tensors are on the CPU. Flush first: with batches in flight the
        stages have made different numbers of updates.

        Warns:
            UserWarning: they have; once a pipeline, whatever returns or writes such a model.
        """
        self._check_names("model_state_dict")
        with self._shared():
            parts = self._engine.gather_stages("model_state_dict", _with_version(state_dict.model_part))
        return state_dict.merge_model(self._of_one_version("model_state_dict", parts))

    def model_state_dict_on_first(self) -> dict[str, Tensor] | None:
        """As `model_state_dict`, on the first rank alone, None elsewhere: for the rank that writes files."""
        parts = self._parts_on_first("model_state_dict_on_first")
        return state_dict.merge_model(self._of_one_version("model_state_dict_on_first", parts)) if parts else None

    def _parts_on_first(self, method: str) -> list[tuple[int, dict[str, Tensor]]] | None:
        self._check_names(method)
        with self._shared():
            return self._engine.gather_stages_to_first(method, _with_version(state_dict.model_part))

    def _of_one_version(self, method: str, parts: list[tuple[int, T]]) -> list[T]:
        """The stages' parts, without the updates that each has made; the first rank says once where these differ."""
        first, last = parts[0][0], parts[-1][0]  # which has made the most
        if first != last and self._engine.is_first and not self._warned_of_versions:
            self._warned_of_versions = True
            warnings.warn(
                f"{method}() with batches in flight: stage 0 has made {first} updates and stage {len(parts) - 1} has made {last}, "
                "and together they are no one model; call flush() before it",
                stacklevel=3,
            )
        return [part for _, part in parts]

    def state_dict(self) -> dict[str, Any]:
        """A snapshot: ``{"model", "optimizer", "scheduler", "num_updates"}``, of no particular K.

        ``optimizer`` is ``{"state": {name: ...}, "param_groups": [...]}`` by parameter name. Batches in flight
        are not part of it: flush first to have every stage at the same update. Where there are auxiliary networks,
        ``aux`` is ``{"model", "optimizer"}`` of theirs, under ``aux.`` and the name of the layer that each follows. A
        loss that is trained is in ``loss``, in the same form, under ``loss.`` Where buffers have come or
        gone, or have another shape or dtype, since the pipeline was made, ``buffers`` has their names.

        Warns:
            UserWarning: as of `model_state_dict`.
        """
        self._check_names("state_dict")
        with self._shared():
            parts = self._engine.gather_stages("state_dict", _with_version(state_dict.state_part))
        return {**state_dict.merge_state(self._of_one_version("state_dict", parts)), "num_updates": self.num_updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load what `state_dict` returned, here or at another K, method or engine.

        An auxiliary network that it has not, since no stage ended at that layer, stays as it is, with a warning.

        Raises:
            ValueError: it is another model's; nothing has been written then.
            RuntimeError: batches are in flight.
        """
        self._check_names("load_state_dict")
        self._check_usable(trains=True)

        with self._shared():
            parts = self._engine.gather_stages("load_state_dict", state_dict.shapes_of)
            next_microbatch = self._engine.progress("load_state_dict")[0].next_microbatch
        shapes = state_dict.merge_model(parts)

        def check() -> Callable[[], None]:
            if self.in_flight:
                raise RuntimeError(
                    f"{self.in_flight} micro-batches are in flight; call flush() before load_state_dict()"
                )
            return state_dict.check_state(self._engine.stages, state, shapes, scheduler=self._schedules_lr)

        load = self._engine.all_or_none("load_state_dict", check)
        with self._shared():
            load()
            self._engine.resume_at_rest(state["num_updates"], next_microbatch)

    def save_model(self, path: str | os.PathLike[str]) -> None:
        """Write `model_state_dict` to ``path`` with `torch.save`, on the CPU, whole or not at all; rank 0 writes."""
        parts = self._parts_on_first("save_model")

        def write() -> None:
            if parts:
                state_dict.write_model(state_dict.merge_model([part for _, part in parts]), path)

        self._engine.all_or_none("save_model", write)
        if parts:
            self._of_one_version("save_model", parts)  # after what all ranks do together: a warning may be an error

    def save(self, folder: str | os.PathLike[str], *, portable: bool = False, extra: Json = None) -> None:
        """Write a checkpoint into ``folder``, whole or not at all; one that is there stays until the new one is whole.

        It may be called at any time between steps, on every rank (which all see the same file system). An **exact** one
        holds what is in flight, random draws and counters too: a pipeline made with the same arguments goes on from it
        to the bit, at the same number of torch threads. A **portable** one is flushed first, is kept under the unsplit
        model's names, and loads at any number of stages, cuts, method, engine and number of replicas.

        Args:
            folder: of the checkpoint: new, empty, or an earlier checkpoint, which is replaced; no other run saves to
                it.
            portable: flush, and save what does not depend on the stages.
            extra: what the caller wants back from `load`, as JSON has it: the sampler's state, the epoch, settings. The
                first rank's is kept.

        Raises:
            CheckpointError: it could not be written, on every rank; what was there is as it was, and training can go
                on. Or nothing can hold what is in flight: a graph has met a buffer that the caller has written since;
                flush first.
            TypeError: ``extra`` is no JSON.
        """
        self._check_usable(trains=True)
        if portable:
            self._check_names("save")
            self.flush()
        with self._shared():
            settings = self._settings("save")
        try:
            session.save(self._engine, folder, "portable" if portable else "exact", settings, extra)
        except (CheckpointError, TypeError):
            raise
        except BaseException as error:
            self._break(error)
            raise

    def load(self, folder: str | os.PathLike[str]) -> Json:
        """Go on from a checkpoint that `save` has written; what is in flight here is dropped.

        Every file is checked before anything is read, and nothing of the pipeline has changed when it is refused. The
        pipeline's seed becomes the checkpoint's, and its count of micro-batches, which random draws depend on. With an
        exact checkpoint ``num_microbatches`` and ``microbatch_samples`` become the checkpoint's too, where they were left
        to the pipeline (``"auto"``, None).

        Returns:
            The ``extra`` that was given to `save`.

        Raises:
            CheckpointError: no checkpoint, a damaged one (with the name of the file), one of another model, or an exact
                one of a pipeline made otherwise; on every rank.

        Warns:
            UserWarning: what may change the last bits is otherwise than when it was saved (threads, version of torch,
                devices, ``compile``), or ``on_nonfinite`` is, or an option of the optimizer, of which the checkpoint's
                goes on.
        """
        self._check_usable(trains=True)
        with self._shared():
            settings = self._settings("load")
            parts = self._engine.gather_stages("load", state_dict.shapes_of)
            self._engine.progress("load")
        shapes = state_dict.merge_model(parts)
        commit = self._engine.all_or_none(
            "load",
            lambda: session.load(
                self._engine, folder, settings, shapes, scheduler=self._schedules_lr, left_open=self._left_open
            ),
            error=CheckpointError,
        )
        with self._breaking():
            extra, decided = commit()
        self.seed = decided["seed"]
        self.num_microbatches, self.microbatch_samples = decided["num_microbatches"], decided["microbatch_samples"]
        return extra

    def _settings(self, method: str) -> dict[str, Json]:
        processes = self._engine.gather(method, [session.describe_stage(stage) for stage in self._engine.stages])
        described = [stage for process in processes for stage in process]
        weight = None if self._loss_weight is None else "a function"
        made_with = {
            "num_microbatches": self.num_microbatches, "microbatch_samples": self.microbatch_samples, "seed": self.seed,
            "keep": self._keep, "loss_weight": weight,
        }  # fmt: skip
        return session.settings_of(self._engine.stages[0], described, method=method_values(self.method), **made_with)

    def save_trace(self, path: str | os.PathLike[str]) -> None:
        """Write what ran when, on all ranks, as a Chrome trace (for ui.perfetto.dev); rank 0 writes.

        Raises:
            RuntimeError: the pipeline was made without ``trace=True``.
        """
        if not self._tracer.on:
            raise RuntimeError("nothing has been traced; make the Pipeline with trace=True")
        with self._shared():
            processes = self._engine.gather("save_trace", (self._engine.name, self._engine.spans()))
        self._engine.all_or_none(
            "save_trace", lambda: write_chrome_trace(path, processes) if self._engine.is_first else None
        )

    def gather(self, value: T) -> list[T]:
        """The values of all ranks, on every rank, replica by replica and stage by stage; of one process ``[value]``."""
        self._check_usable()
        with self._shared():
            return self._engine.gather("gather", value)

    # -- the end ------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Drop what is in flight, and leave the other ranks. Training ends here; the model stays as it is.

        Each rank waits until all others have closed theirs, or have ended; what needs all ranks, `save_model` too,
        comes before.

        Raises:
            RuntimeError: another rank has failed meanwhile, or has stepped another number of mini-batches.
        """
        if not self._closed:
            self._closed = True
            for end in self._watches:
                end()
            self._engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None and not self._closed:
            self._engine.fail(error)
        try:
            if kind is None and not self._closed and self._broken is None:
                self.flush()
        finally:
            self.close()

    def _check_names(self, method: str) -> None:
        """Refuse what needs the unsplit model's names where the stages do not have them."""

    def _check_usable(self, *, trains: bool = False) -> None:
        if self._broken is not None:
            raise RuntimeError(f"this pipeline has failed; make a new one (it failed with: {self._broken})")
        if self._closed:
            raise RuntimeError("this pipeline is closed; make a new one")
        if trains and torch.is_inference_mode_enabled():
            raise RuntimeError("a Pipeline trains outside torch.inference_mode(), whose tensors no backward can use")

    @contextmanager
    def _breaking(self) -> Iterator[None]:
        """What fails in the middle of a slot cannot be taken back: it ends the pipeline, on every rank."""
        try:
            yield
        except BaseException as error:
            self._break(error)
            raise

    def _shared(self) -> AbstractContextManager[None]:
        """As `_breaking` where other ranks are in the same call; in one process nothing has happened yet."""
        return nullcontext() if self._engine.alone else self._breaking()

    def _break(self, error: BaseException) -> None:
        self._broken = message_of(error) or type(error).__name__
        self._engine.fail(error)


def _with_version(part: Callable[[Stage], T]) -> Callable[[Stage], tuple[int, T]]:
    return lambda stage: (stage.version, part(stage))
