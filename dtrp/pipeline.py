"""`Pipeline`: a model in stages, trained without waiting."""

from __future__ import annotations

import math
import operator
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from types import TracebackType
from typing import Any, Literal, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from . import checkpoint
from .distributed import DistributedEngine, agree, method_values
from .engine import Engine
from .gauge import Gauge, PredictionError
from .gradients import Clip, GradientRule, OnNonfinite
from .local import LocalEngine
from .methods import Keep, Method, get_method
from .plan_file import Plan, as_plan
from .ranks import Ranks, find_ranks
from .rng import microbatch_seed, seeded
from .saving import CheckpointError, session
from .splitting import into_stages, stage_device
from .stage import LossFn, Stage
from .trace import Tracer, write_chrome_trace
from .transport import Transport
from .trees import check_samples, num_samples, tensors_of

Device = torch.device | str | int
T = TypeVar("T")


class Pipeline:
    """A network in K stages, each with its own optimizer, trained by one of the family's methods.

    The user keeps the training loop. All stages live in this process, on one device or on one each; or, under
    ``torchrun --nproc-per-node K`` and wherever `torch.distributed` is initialized with more than one rank, each rank hosts
    one, and every rank calls the same methods in the same order. There ``x`` matters on the first rank and ``y`` on the
    last, each stage's initial values are rank 0's, and what a stage returns to the caller, the loss and the output of
    `infer`, is returned by the last rank, None by the others.

    Args:
        model: an `nn.Sequential`, which is cut between its top-level layers, a list of modules, one a stage, or what
            `dtrp.split` returns. Its parameters stay the same objects and are trained in place.
        optimizer: list of parameters -> `torch.optim.Optimizer`; called once for each stage that has
            trainable parameters.
        loss_fn: (output, target) -> scalar, the mean over the samples.
        num_stages: K. None: the length of a list, or ``len(cuts) + 1``, or 1. By ``num_stages`` alone a
            Sequential is cut into equal numbers of layers, the first stages taking the remainder.
        cuts: index of the first layer of stages 1..K-1.
        method: a name from `list_methods`, or a `Method`, as from ``get_method("fdg", grad_shrink=0.5)``.
        num_microbatches: A, the parts that `torch.tensor_split` cuts a mini-batch into. More of them
            bring the delay down; a mini-batch of fewer samples has one part a sample.
        lr_scheduler: optimizer -> scheduler, stepped once an update.
        seed: of the stages' random draws (dropout); None: drawn once from the global generator.
        devices: one device for all stages or one for each; None: where the model is.
        group: the process group whose ranks host the stages, in order; None: all ranks.
        mesh: a `torch.distributed.device_mesh.DeviceMesh` with the dimensions ``("replica", "stage")``. Each replica
            passes its own shard of the mini-batch, and a stage's gradients are averaged over its replicas at U,
            weighted by samples. The loss is then that of the whole mini-batch. BatchNorm sees its own shard (the running
            statistics saved are the first replica's), unless it is a `torch.nn.SyncBatchNorm` made with the process
            group ``mesh.get_group("replica")``.
        loss_on: ``"last"``: `step` returns the loss on the last rank; ``"all"``: on every rank, which then waits for
            the last one in every step, so that the stages take turns instead of overlapping.
        timeout_s: the longest that a rank waits for another before an error says who waits for whom.
        max_grad_norm: clip a mini-batch's gradient to this 2-norm before its update, as `torch.nn.utils.clip_grad_norm_` does.
        clip: whose norm: ``"stage"``: of each stage's gradient (with replicas of their average), which needs no waiting;
            ``"global"``: of all stages' together, as of the unsplit model; for methods that flush.
        on_nonfinite: ``"stop"``: a loss or a gradient that is not finite ends the run, before the update that it would
            have gone into. ``"skip"``: that update is left out: weights and optimizer state stay, version and scheduler go
            on. In a method that flushes all stages then leave it out. In the others each stage decides by its own gradient:
            one that is not finite at a stage is mostly not finite at those before it, and those after it have made their
            update; a loss that is not finite makes it so at every stage. Buffers have moved with the forward.
            `skipped_updates` counts. On accelerators ``"stop"`` without clipping does not wait for the answer where that
            would keep them from overlapping: the run then ends at the stage's next update, and nothing is saved meanwhile.
        keep: what stages keep between F and B, in place of what the method says: ``"graph"`` or ``"input"``, for all
            stages or one for each. A stage of an asynchronous method that keeps its graph evaluates it, and
            differentiates, at the weights its forward read (predicted ones, if the method predicts), and recomputes
            nothing. ``"auto"``: each stage looks at its first micro-batch, with two trial forwards, and keeps its graphs if
            all that it is going to hold stays under ``memory_limit_bytes``, its inputs otherwise; `keeps` tells.
        memory_limit_bytes: for each stage, with ``keep="auto"``: weights, optimizer state, gradients, stash and messages.
        plan: what `dtrp.plan` returned, or the path of its file: it says ``method``, ``cuts``, ``keep`` and
            ``num_microbatches``. The size of the mini-batch and the learning rate stay the caller's; the plan tells what
            it reckons with (``batch_size``, ``lr_scale``).
        compile: True: each stage's module runs through `torch.compile`, with dropout masks as without it
            (``options={"fallback_random": True}``); or the keyword arguments for `torch.compile`, as they are.
        trace: record when each F, B, U, send and receive runs, for `save_trace`.

    Raises:
        TypeError, ValueError: an argument that does not fit, with what to change.
        TimeoutError: the other ranks did not come.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
        >>> pipe = Pipeline(model, lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
        ...                 torch.nn.functional.cross_entropy, num_stages=3)
        >>> for _ in range(5):
        ...     loss = pipe.step(torch.randn(16, 4), torch.randint(2, (16,)))
        >>> pipe.flush()
        >>> pipe.delays()
        {0: Counter({3: 2, 0: 1, 1: 1, 2: 1}), 1: Counter({1: 4, 0: 1}), 2: Counter({0: 5})}
    """

    def __init__(
        self,
        model: nn.Sequential | Sequence[nn.Module],
        optimizer: Callable[[list[nn.Parameter]], Optimizer],
        loss_fn: LossFn,
        *,
        num_stages: int | None = None,
        cuts: Sequence[int] | None = None,
        method: str | Method = "dtrp",
        num_microbatches: int = 1,
        lr_scheduler: Callable[[Optimizer], Any] | None = None,
        seed: int | None = None,
        devices: Device | Sequence[Device] | None = None,
        group: Any = None,
        mesh: Any = None,
        loss_on: Literal["last", "all"] = "last",
        timeout_s: float = 300.0,
        max_grad_norm: float | None = None,
        clip: Clip = "stage",
        on_nonfinite: OnNonfinite = "stop",
        keep: Literal["auto"] | Keep | Sequence[Keep] | None = None,
        memory_limit_bytes: int | None = None,
        plan: Plan | str | os.PathLike[str] | Mapping[str, Any] | None = None,
        compile: bool | Mapping[str, Any] = False,
        trace: bool = False,
    ) -> None:
        if plan is not None:
            given = {"num_stages": num_stages, "cuts": cuts, "keep": keep, "memory_limit_bytes": memory_limit_bytes}
            plan = as_plan(plan)
            plan.check_model(model)
            _check_plan_alone(given, method, num_microbatches, plan)
            model = model if isinstance(model, nn.Module) else nn.Sequential(*model)
            cuts, keep, method, num_microbatches = plan.cuts, plan.keep, plan.row, plan.num_microbatches
        self.method = get_method(method) if isinstance(method, str) else method
        if not isinstance(self.method, Method):
            raise TypeError(f"method is a {type(method).__name__}; pass a name or what get_method returns")
        num_microbatches = _whole("num_microbatches", num_microbatches)
        if seed is not None and (not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**63):
            raise ValueError(f"seed={seed!r}: pass a whole number from 0 to 2**63 - 1")
        _check_callables(optimizer, loss_fn, lr_scheduler)
        if loss_on not in ("last", "all"):
            raise ValueError(f"loss_on={loss_on!r}: choose 'last' or 'all'")
        if isinstance(timeout_s, bool) or not isinstance(timeout_s, (int, float)) or not 0 < timeout_s < math.inf:
            raise ValueError(f"timeout_s={timeout_s!r}: pass a number of seconds above 0")
        rule = GradientRule.of(max_grad_norm, clip, on_nonfinite, self.method)
        ranks = find_ranks(group, mesh, timeout_s)
        if num_stages is None and cuts is None and ranks is not None and isinstance(model, nn.Module):
            num_stages = ranks.num_stages
        modules = into_stages(model, num_stages, cuts)
        if not any(p.requires_grad for module in modules for p in module.parameters()):
            raise ValueError("the model has no parameter that requires a gradient; there is nothing to train")
        self.num_stages = len(modules)
        self.num_microbatches = num_microbatches
        self.seed = int(torch.randint(2**63 - 1, ())) if seed is None else int(seed)
        methods, limit = _keeping(self.method, self.num_stages, keep, memory_limit_bytes)
        self._keep = list(keep) if isinstance(keep, Sequence) and not isinstance(keep, str) else keep
        compiling = _compiling(compile)
        self._closed = False
        self._broken: str | None = None
        self._schedules_lr = lr_scheduler is not None
        self._tracer = Tracer(bool(trace))

        def make_stage(index: int, place: torch.device, replica: int = 0, *, at_once: bool) -> Stage:
            return Stage(
                index,
                len(modules),
                modules[index],
                methods[index],
                _checked_optimizer(optimizer),
                _checked_scheduler(lr_scheduler),
                loss_fn=loss_fn if index == len(modules) - 1 else None,
                needs_input_grad=any(p.requires_grad for module in modules[:index] for p in module.parameters()),
                seed=self.seed,
                device=place,
                replica=replica,
                num_microbatches=num_microbatches,
                memory_limit_bytes=limit,
                rule=rule,
                at_once=at_once,
                compile=compiling,
            )

        self._engine: Engine
        if ranks is None:
            places = _places(modules, devices)
            one_device = len(set(places)) == 1
            stages = [make_stage(index, place, at_once=one_device) for index, place in enumerate(places)]
            self._engine = LocalEngine(stages, self.method, num_microbatches, self._tracer)
        else:
            _check_world(len(modules), ranks)
            place = _places(modules, devices, only=ranks.stage)[ranks.stage]
            transport = Transport(ranks, timeout_s, self._tracer)
            try:
                settings = {
                    "num_microbatches": num_microbatches,
                    "loss_on": loss_on,
                    "seed": seed,
                    "method": self.method,
                    "keep": self._keep,
                    "memory_limit_bytes": limit,
                    "max_grad_norm": rule.max_norm,
                    "clip": clip,
                    "on_nonfinite": on_nonfinite,
                }
                self.seed = agree(transport, modules, place, settings, self.seed)
                stage = make_stage(ranks.stage, place, ranks.replica, at_once=place.type == "cpu")
                self._engine = DistributedEngine(stage, self.method, num_microbatches, transport, self._tracer, loss_on)
            except BaseException as error:
                transport.fail(error)
                transport.close()
                raise

    # -- training ---------------------------------------------------------------------------------------

    def step(self, x: Any, y: Any) -> Tensor | None:
        """Train on one mini-batch.

        Args:
            x: the model's input, samples along dimension 0; any number of them, of any shape the model takes. It may be a
                tree: tuples, lists and dicts of tensors, each with as many samples. Constants in it, tensors without a
                dimension, and those with one entry along dimension 0 beside longer ones go to every micro-batch whole.
                Between stages such trees travel too: each stage takes the one value that the stage before returns.
            y: the targets, as many; a tree too, if ``loss_fn`` takes one.

        Returns:
            The mean loss of this mini-batch, at the weights its forward met: a detached scalar tensor; None on ranks
            that do not host the last stage.

        Raises:
            TypeError, ValueError: x and y that do not fit. In one process nothing has happened then; on several ranks the
                run ends, since the others are in the step by now.
            StageError: what failed inside a stage; the pipeline is of no use after it.
        """
        self._check_usable(trains=True)
        engine = self._engine
        with self._shared():
            x = check_samples("x", x) if engine.takes_x else None
            # The first rank may be given y too, and then both are checked against each other.
            y = check_samples("y", y) if engine.takes_y or (engine.takes_x and y is not None) else None
            for stage in engine.stages:
                stage.check_trainable()
            if x is not None and y is not None and num_samples(x) != num_samples(y):
                raise ValueError(
                    f"x has {num_samples(x)} samples and y has {num_samples(y)}; a mini-batch needs as many targets as inputs"
                )
        with self._breaking():
            return engine.step(x, y)

    def propose(self, word: int) -> None:
        """Propose something to all ranks, at any time, from a signal handler or a thread too: 1, 2, or 3 for both.

        It costs no waiting: the proposal goes to the first rank with gradients, and comes back with the activations of a
        mini-batch, so that `agreed` is the same on every rank after the same step. What the numbers mean is the caller's
        business; ``dtrp train`` saves at 1, and saves and stops at 2.
        """
        if word not in (1, 2, 3):
            raise ValueError(f"word={word!r}: propose 1, 2, or 3 for both")
        self._engine.proposals.add(word)

    @property
    def agreed(self) -> int:
        """What ranks have proposed, as of the last step: the same on all, at least once for every proposal; 0 is nothing.

        A few steps may lie between a proposal and it. What is proposed in the last steps before a flush is agreed on in the
        first after it.
        """
        return self._engine.proposals.agreed

    def flush(self) -> None:
        """Run the backwards and updates that are left. After it every stage has made one update per mini-batch."""
        self._check_usable(trains=True)
        with self._breaking():
            self._engine.flush()

    def infer(self, x: Any) -> Any:
        """The model's output for ``x``, any number of samples, in eval mode, with the weights as they are.

        Batches in flight stay in flight. Modules that were in train mode are again after it.
        """
        self._check_usable()
        with self._shared():
            if self._engine.takes_x and not tensors_of(x):
                raise TypeError(f"x is a {type(x).__name__}; infer takes a tensor with samples along dimension 0")
            return self._engine.infer(x)

    def rng(self, stage: int, microbatch: int) -> AbstractContextManager[None]:
        """The context in which ``stage`` draws its random numbers for ``microbatch``.

        ``microbatch`` counts from 0 since the pipeline was made, through flush and load. A plain loop that
        runs each stage's layers inside it draws the same dropout masks.
        """
        if not 0 <= stage < self.num_stages:
            raise ValueError(f"stage={stage}: the pipeline has stages 0..{self.num_stages - 1}")
        # The stage's own device and replica, or those of this rank's stage.
        near = next((own for own in self._engine.stages if own.index == stage), self._engine.stages[0])
        return seeded(microbatch_seed(self.seed, near.replica, stage, microbatch), near.device)

    # -- what it holds ------------------------------------------------------------------------------------

    def delays(self) -> dict[int, Counter[int]]:
        """``{stage: Counter({delay: micro-batches})}``, in updates, of the micro-batches that are through."""
        return {stage.index: Counter(stage.delays) for stage in self._engine.stages}

    def skipped_updates(self) -> dict[int, list[int]]:
        """``{stage: mini-batches}`` whose update was left out, their gradient not being finite (``on_nonfinite="skip"``)."""
        return {stage.index: list(stage.skipped) for stage in self._engine.stages}

    def memory(self) -> dict[int, dict[str, int]]:
        """Bytes that each stage holds now, measured from its tensors.

        ``weights`` (parameters and buffers), ``predicted`` (the predicted copy that a forward reads),
        ``optimizer`` (its state), ``gradients`` (those of the last update until the stage's next work),
        ``stash`` (what waits between F and B: inputs, graphs and the copies of weights they need), and
        ``stash_peak``, its maximum so far. A graph is weighed by the storages it saves, once for each shape of
        input; one whose saved tensors go through hooks of the caller's weighs nothing.
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
        """From now on compare, at every n-th micro-batch, the weights that a forward read with those of its backward."""
        every = _whole("every", every)
        for stage in self._engine.stages:
            stage.gauge = Gauge(stage.index, every)

    def prediction_errors(self) -> list[PredictionError]:
        """What `watch_prediction` has seen on this rank: the distances, relative to the norm of the true weights."""
        return [error for stage in self._engine.stages if stage.gauge is not None for error in stage.gauge.errors]

    def activations_peak(self) -> dict[int, int]:
        """``{stage: bytes}``: the most that the stash and the graph that a backward recomputes took together."""
        return {stage.index: stage.activations_peak for stage in self._engine.stages}

    def keeps(self) -> dict[int, Keep | None]:
        """``{stage: what it keeps}`` between F and B; with ``keep="auto"`` None before its first micro-batch.

        The last stage, whose B follows its F at once, has its graph at hand whatever the method says.
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
    def is_first(self) -> bool:
        """Whether this process hosts the first stage, and so reads ``x``."""
        return self._engine.takes_x

    @property
    def is_last(self) -> bool:
        """Whether this process hosts the last stage, and so reads ``y`` and returns the loss."""
        return self._engine.takes_y

    @property
    def optimizers(self) -> tuple[Optimizer | None, ...]:
        """Each stage's optimizer; None where there is nothing to train."""
        return tuple(stage.optimizer for stage in self._engine.stages)

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

        On every rank; where there are several, its tensors are on the CPU.
        """
        with self._shared():
            return checkpoint.merge_model(self._engine.of_stages("model_state_dict", checkpoint.model_part))

    def model_state_dict_on_first(self) -> dict[str, Tensor] | None:
        """As `model_state_dict`, on the first rank alone, None elsewhere: for the rank that writes files."""
        return self._model_on_first("model_state_dict_on_first")

    def _model_on_first(self, method: str) -> dict[str, Tensor] | None:
        with self._shared():
            parts = self._engine.of_stages_to_first(method, checkpoint.model_part)
        return None if parts is None else checkpoint.merge_model(parts)

    def state_dict(self) -> dict[str, Any]:
        """A snapshot: ``{"model", "optimizer", "scheduler", "num_updates"}``, of no particular K.

        ``optimizer`` is ``{"state": {name: ...}, "param_groups": [...]}`` by parameter name. Batches in flight
        are not part of it: flush first to have every stage at the same update.
        """
        with self._shared():
            parts = self._engine.of_stages("state_dict", checkpoint.state_part)
            return {**checkpoint.merge_state(parts), "num_updates": self.num_updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load what `state_dict` returned, here or at another K, method or engine.

        Raises:
            ValueError: it is another model's; nothing has been written then.
            RuntimeError: batches are in flight.
        """
        self._check_usable(trains=True)

        with self._shared():
            parts = self._engine.of_stages("load_state_dict", lambda stage: checkpoint.shapes_of(stage.module))
        shapes = checkpoint.merge_model(parts)

        def check() -> Callable[[], None]:
            if self.in_flight:
                raise RuntimeError(
                    f"{self.in_flight} micro-batches are in flight; call flush() before load_state_dict()"
                )
            return checkpoint.check_state(self._engine.stages, state, shapes, scheduler=self._schedules_lr)

        load = self._engine.all_or_none("load_state_dict", check)
        with self._shared():
            load()
        self._engine.num_updates = state["num_updates"]

    def save_model(self, path: str | os.PathLike[str]) -> None:
        """Write `model_state_dict` to ``path`` with `torch.save`, on the CPU, whole or not at all; rank 0 writes."""
        model = self._model_on_first("save_model")
        self._engine.all_or_none(
            "save_model", lambda: checkpoint.write_model(model, path) if model is not None else None
        )

    def save(self, folder: str | os.PathLike[str], *, portable: bool = False, extra: Any = None) -> None:
        """Write a checkpoint into ``folder``, whole or not at all; one that is there stays until the new one is whole.

        It may be called at any time between steps, on every rank (which all see the same file system). An **exact** one
        holds what is in flight, random draws and counters too: a pipeline made with the same arguments goes on from it
        to the bit, at the same number of torch threads. A **portable** one is flushed first, is kept under the unsplit
        model's names, and loads at any number of stages, cuts, method, engine and number of replicas.

        Args:
            folder: of the checkpoint: new, empty, or an earlier checkpoint, which is replaced.
            portable: flush, and save what does not depend on the stages.
            extra: what the caller wants back from `load`, as JSON has it: the sampler's state, the epoch, settings. The
                first rank's is kept.

        Raises:
            CheckpointError: it could not be written, on every rank; what was there is as it was, and training can go on.
            TypeError: ``extra`` is no JSON.
        """
        self._check_usable(trains=True)
        if portable:
            self.flush()
        with self._shared():
            settings = self._settings("save")
        try:
            session.save(self._engine, folder, "portable" if portable else "exact", settings, extra)
        except (CheckpointError, TypeError):
            raise
        except BaseException as error:
            self._broken = str(error) or type(error).__name__
            self._engine.fail(error)
            raise

    def load(self, folder: str | os.PathLike[str]) -> Any:
        """Go on from a checkpoint that `save` has written; what is in flight here is dropped.

        Every file is checked before anything is read, and nothing of the pipeline has changed when it is refused. The
        pipeline's seed becomes the checkpoint's, and its count of micro-batches, which random draws depend on.

        Returns:
            The ``extra`` that was given to `save`.

        Raises:
            CheckpointError: no checkpoint, a damaged one (with the name of the file), one of another model, or an exact one
                of a pipeline made otherwise; on every rank.
        """
        self._check_usable(trains=True)
        with self._shared():
            settings = self._settings("load")
            parts = self._engine.of_stages("load", lambda stage: checkpoint.shapes_of(stage.module))
            self._engine.progress("load")
        shapes = checkpoint.merge_model(parts)
        try:
            commit = self._engine.all_or_none(
                "load",
                lambda: session.load(self._engine, folder, settings, shapes, scheduler=self._schedules_lr),
            )
        except RuntimeError as error:
            if self._engine.alone or not str(error).startswith("load() failed on rank"):
                raise
            raise CheckpointError(str(error)) from error
        with self._breaking():
            extra, self.seed = commit()
        return extra

    def _settings(self, method: str) -> dict[str, Any]:
        stages = self._engine.gather(method, [session.describe_stage(stage) for stage in self._engine.stages])
        flat = [own for process in stages for own in process]
        return session.settings_of(method_values(self.method), flat, self.num_microbatches, self.seed, self._keep)

    def save_trace(self, path: str | os.PathLike[str]) -> None:
        """Write what ran when, on all ranks, as one Chrome trace (for chrome://tracing or ui.perfetto.dev); rank 0 writes.

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
        """Every rank's ``value``, picklable, on every rank, replica by replica and stage by stage; one process: ``[value]``."""
        self._check_usable()
        with self._shared():
            return self._engine.gather("gather", value)

    # -- the end ------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Drop what is in flight, and leave the other ranks. Training ends here; the model stays as it is.

        Each rank waits until all others have closed theirs, or have ended; what needs all ranks, `save_model` too, comes
        before.
        """
        if not self._closed:
            self._closed = True
            self._engine.close()

    def __enter__(self) -> Pipeline:
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

    def __repr__(self) -> str:
        own = self._engine.stages
        sizes = ", ".join(
            str(len(stage.module)) if isinstance(stage.module, nn.Sequential) else "traced" for stage in own
        )
        here = "" if self._engine.alone else f"stage={own[0].index}, "
        return (
            f"Pipeline(method={self.method.name!r}, num_stages={self.num_stages}, {here}layers=[{sizes}], "
            f"num_microbatches={self.num_microbatches}, num_updates={self.num_updates}, in_flight={self.in_flight})"
        )

    def _check_usable(self, *, trains: bool = False) -> None:
        if self._broken is not None:
            raise RuntimeError(f"this pipeline has failed; make a new one (it failed with: {self._broken})")
        if self._closed:
            raise RuntimeError("this pipeline is closed; make a new one")
        if trains and torch.is_inference_mode_enabled():
            raise RuntimeError("a Pipeline trains outside torch.inference_mode(), whose tensors no backward can use")

    @contextmanager
    def _breaking(self) -> Iterator[None]:
        """Half a slot cannot be taken back: what fails in the middle ends the pipeline, on every rank."""
        try:
            yield
        except BaseException as error:
            self._broken = str(error) or type(error).__name__
            self._engine.fail(error)
            raise

    @contextmanager
    def _shared(self) -> Iterator[None]:
        """What fails before anything has happened is harmless, unless other ranks are in the same call by now."""
        if self._engine.alone:
            yield
        else:
            with self._breaking():
                yield


def _compiling(compile: Any) -> Mapping[str, Any] | None:
    """Arguments of `torch.compile`, or None."""
    if isinstance(compile, Mapping):
        return compile
    if not isinstance(compile, bool):
        raise TypeError(f"compile={compile!r}: pass True, False, or a dict of keyword arguments for torch.compile")
    # Else inductor draws masks of its own, and not the same ones with and without a graph: recomputing would see others.
    return {"options": {"fallback_random": True}} if compile else None


def _check_world(num_stages: int, ranks: Ranks) -> None:
    if num_stages == ranks.num_stages:
        return
    if ranks.num_replicas > 1:
        raise ValueError(
            f"num_stages={num_stages} but the mesh has {ranks.num_stages} ranks along its stage dimension; make the mesh "
            f"({ranks.num_replicas}, {num_stages}), with {ranks.num_replicas * num_stages} ranks, or pass "
            f"num_stages={ranks.num_stages}"
        )
    raise ValueError(
        f"num_stages={num_stages} but {ranks.num_stages} ranks take part, and each hosts one stage; start {num_stages} "
        f"(torchrun --nproc-per-node {num_stages}), pass num_stages={ranks.num_stages}, or a mesh for several replicas"
    )


def _whole(label: str, value: Any) -> int:
    """A count of at least 1; any integer type will do."""
    try:
        number = operator.index(value)
    except TypeError:
        number = 0
    if number < 1:
        raise ValueError(f"{label}={value!r}: pass a whole number of at least 1")
    return number


def _check_callables(optimizer: Any, loss_fn: Any, lr_scheduler: Any) -> None:
    if isinstance(optimizer, Optimizer):
        raise TypeError(
            f"optimizer is a {type(optimizer).__name__} made already; each stage has its own: pass a function, "
            "lambda params: torch.optim.SGD(params, lr=0.1)"
        )
    for label, value in (("optimizer", optimizer), ("loss_fn", loss_fn), ("lr_scheduler", lr_scheduler)):
        if not callable(value) and not (label == "lr_scheduler" and value is None):
            raise TypeError(f"{label} is a {type(value).__name__}; pass a function")


def _checked_optimizer(make: Callable[[list[nn.Parameter]], Optimizer]) -> Callable[[list[nn.Parameter]], Optimizer]:
    def checked(parameters: list[nn.Parameter]) -> Optimizer:
        optimizer = make(parameters)
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"optimizer returned a {type(optimizer).__name__}; it returns a torch.optim.Optimizer")
        if isinstance(optimizer, torch.optim.LBFGS):
            raise TypeError(
                "LBFGS calls the loss many times in a step, which no pipeline can do; use another optimizer"
            )
        strange = {id(p) for group in optimizer.param_groups for p in group["params"]} - {id(p) for p in parameters}
        if strange:
            raise ValueError(
                "optimizer was given a stage's parameters and holds others; use only those it is called with"
            )
        return optimizer

    return checked


def _checked_scheduler(make: Callable[[Optimizer], Any] | None) -> Callable[[Optimizer], Any] | None:
    if make is None:
        return None

    def checked(optimizer: Optimizer) -> Any:
        scheduler = make(optimizer)
        if isinstance(scheduler, ReduceLROnPlateau):
            raise TypeError(
                "ReduceLROnPlateau needs a metric at every step; use a scheduler that is a function of the update"
            )
        if not hasattr(scheduler, "step"):
            raise TypeError(
                f"lr_scheduler returned a {type(scheduler).__name__}; it returns a torch.optim.lr_scheduler"
            )
        return scheduler

    return checked


def _places(
    modules: Sequence[nn.Module], devices: Device | Sequence[Device] | None, only: int | None = None
) -> list[torch.device]:
    """Each stage's device; the modules are moved there if ``devices`` says so.

    Args:
        modules: the stages.
        devices: as given to `Pipeline`.
        only: the one stage that this process hosts: the others' devices are not touched.
    """
    if devices is not None:
        given = [devices] * len(modules) if isinstance(devices, (torch.device, str, int)) else list(devices)
        if len(given) != len(modules):
            raise ValueError(
                f"devices has {len(given)} entries for {len(modules)} stages; pass one device, or one per stage"
            )
        hosted = range(len(modules)) if only is None else [only]
        # A tensor knows the index that "cuda" leaves out.
        try:
            places = [
                torch.empty(0, device=device if index in hosted else "cpu").device for index, device in enumerate(given)
            ]
        except (RuntimeError, AssertionError, TypeError) as error:
            raise ValueError(f"devices={devices!r}: torch cannot use them ({str(error).splitlines()[0]})") from error
        for index in hosted:
            modules[index].to(places[index])
        return places
    found = [stage_device(module) for module in modules]
    # A stage without tensors works where the stage before it does, or the first that has any.
    current = next(own for own in found if own is not None)
    result = []
    for own in found:
        current = own or current
        result.append(current)
    return result


def _check_plan_alone(given: dict[str, Any], method: str | Method, num_microbatches: Any, plan: Plan) -> None:
    """Refuse arguments that say otherwise than the plan; those that have a default say nothing by it."""
    for name, value in given.items():
        if value is not None:
            raise ValueError(f"{name}={value!r} with a plan, which says it; leave it out, or edit the plan")
    if method not in ("dtrp", plan.method, plan.row):
        shown = repr(method) if isinstance(method, str) else method
        raise ValueError(f"method={shown} with a plan for {plan.row}; leave it out, or plan again with it")
    if num_microbatches not in (1, plan.num_microbatches):
        raise ValueError(
            f"num_microbatches={num_microbatches!r} with a plan for {plan.num_microbatches}; leave it out, or plan again"
        )


def _keeping(method: Method, num_stages: int, keep: Any, memory_limit_bytes: Any) -> tuple[list[Method], int | None]:
    """Each stage's row, and the limit by which stages decide for themselves, if they do."""
    if keep != "auto" and memory_limit_bytes is not None:
        raise ValueError(
            f"memory_limit_bytes={memory_limit_bytes!r} with keep={keep!r}: the limit is what keep='auto' decides by; pass that"
        )
    if keep is None:
        return [method] * num_stages, None
    if keep == "auto":
        if memory_limit_bytes is None:
            raise ValueError("keep='auto' needs memory_limit_bytes, what a stage may hold")
        limit = _whole("memory_limit_bytes", memory_limit_bytes)
        return [method] * num_stages, limit
    each = [keep] * num_stages if isinstance(keep, str) else list(keep)
    if len(each) != num_stages or any(one not in ("graph", "input") for one in each):
        raise ValueError(
            f"keep={keep!r}: pass 'graph', 'input' or 'auto', or 'graph' or 'input' for each of the {num_stages} stages"
        )
    return [method.keeping(cast(Keep, one)) for one in each], None
