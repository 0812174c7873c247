"""`ScheduleDTRP`: a stage of `torch.distributed.pipelining`, trained without waiting."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining.microbatch import merge_chunks, split_args_kwargs_into_chunks
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import LBFGS, Optimizer

from .. import saving
from ..base_pipeline import BasePipeline, Settings
from ..comm.process_groups import backend_for, place_of
from ..comm.transport import Transport
from ..engine.consistency import check_same
from ..engine.habits import optimizer_watch
from ..launch.ranks import Ranks
from ..methods import Keep, Method
from ..splitting.stages import check_device
from ..stage.gradients import Clip, OnNonfinite
from ..stage.optimizer_step import check_callables, checked_optimizer
from ..stage.reach import Reach, refuse_gradient
from ..stage.specs import StageNetwork, StagePosition, StageTraining
from ..stage.stage import Stage
from ..tensors.layout import aligned_clone
from ..tensors.pytree import flatten, num_samples, split
from ..tensors.torch_private import pytree
from ..typing import Json
from .engine import RecordedLoss, StageEngine
from .routes import Call, Route


class ScheduleDTRP(BasePipeline):
    """A schedule for a stage of `torch.distributed.pipelining`, in the place of torch's `Schedule1F1B`.

    One line of a script changes::

        - schedule = Schedule1F1B(stage, n_microbatches=4, loss_fn=loss_fn)
        + schedule = ScheduleDTRP(stage, optimizer, n_microbatches=4, loss_fn=loss_fn, method="dtrp")

    `step`, its arguments, what it returns and the list ``losses`` are torch's. What differs: the schedule makes the
    updates, since a method that does not wait updates while backwards are still to come. Gradients live in it, and
    ``p.grad`` is None outside an update, so that the ``optimizer.step()`` and ``optimizer.zero_grad()`` that the script
    may have left do nothing. `flush` makes the last updates, and belongs before the weights are used or saved; under
    ``method="bp"`` or ``"gpipe"`` nothing is left to flush. Each rank has its own stage with its own initial values,
    and no values are broadcast. As with torch's schedules micro-batches weigh the same, whatever their size.

    Args:
        stage: a `PipelineStage` made by hand, or what ``pipeline(...).build_stage(...)`` returns: any object with
            ``submod``, ``stage_index``, ``num_stages``, ``device`` and ``group``, whose ranks host one stage each, in
            order.
        optimizer: the optimizer that the script has made of ``stage.submod.parameters()``, or a function that makes one
            of a list of parameters. None where the stage has nothing to train.
        n_microbatches: A, of every mini-batch; any number of at least 1.
        loss_fn: (output, target) -> scalar, of a micro-batch; every rank passes it, the last one calls it.
        args_chunk_spec, kwargs_chunk_spec, output_merge_spec: as for torch's schedules.
        scale_grads: gradients are divided by ``n_microbatches``: for losses that are means. False: for sums.
        method: a name from `dtrp.list_methods`, or a `Method`.
        lr_scheduler: optimizer -> scheduler, stepped once an update. A scheduler that the script steps by itself is
            ahead of a stage's updates by its delay.
        seed: of the stages' random draws (dropout); None: drawn from the first rank's global generator, which is left
            alone.
        timeout_s: the longest that a rank waits for another.
        max_grad_norm, clip, on_nonfinite, keep, memory_limit_bytes, trace: as for `dtrp.Pipeline`. Clipping of
            ``p.grad`` that a script does by itself does nothing.

    Raises:
        TypeError, ValueError: what does not fit, with what to change.
        WaitTimeoutError: the other ranks did not come.

    What else can be asked of it (`flush`, `save`, `load`, `delays`, `memory`, `close`, the context manager) is as for
    `dtrp.Pipeline`. What saves the whole model under one set of names (`model_state_dict`, `save_model`, `state_dict`,
    `save` with ``portable=True``) needs names that no two stages share, as in a model of which each rank has deleted
    the rest; each rank's ``stage.submod.state_dict()`` is there in any case.
    """

    def __init__(
        self,
        stage: Any,
        optimizer: Optimizer | Callable[[list[nn.Parameter]], Optimizer] | None,
        n_microbatches: int,
        loss_fn: Callable[..., Tensor],
        args_chunk_spec: Any = None,
        kwargs_chunk_spec: Any = None,
        output_merge_spec: Any = None,
        scale_grads: bool = True,
        *,
        method: str | Method = "dtrp",
        lr_scheduler: Callable[[Optimizer], Any] | None = None,
        seed: int | None = None,
        timeout_s: float = 300.0,
        max_grad_norm: float | None = None,
        clip: Clip = "stage",
        on_nonfinite: OnNonfinite = "stop",
        keep: Literal["auto"] | Keep | Sequence[Keep] | None = None,
        memory_limit_bytes: int | None = None,
        trace: bool = False,
    ) -> None:
        settings = Settings.checked(
            method, n_microbatches, seed, timeout_s, max_grad_norm, clip, on_nonfinite, keep, memory_limit_bytes,
            count="n_microbatches",
        )  # fmt: skip
        if settings.method.local:
            raise ValueError(
                f"method={settings.method.name!r} needs auxiliary networks, and targets on the first rank, which a schedule of "
                "torch's is not given; use dtrp.Pipeline(aux=...), or another method"
            )
        ranks = _ranks_of(stage)
        self._configure(settings, ranks.num_stages, schedules_lr=lr_scheduler is not None, trace=trace)
        self._specs = (args_chunk_spec, kwargs_chunk_spec)
        self._output_merge_spec = output_merge_spec
        self._is_traced = hasattr(stage, "pipe_info")
        self._loss = RecordedLoss(loss_fn)
        transport = Transport(ranks, timeout_s, self._tracer)
        transport.collectives.tensor_method = "eval"
        try:  # from here on the other ranks hear of what does not fit on this one
            module = _checked_module(stage, ranks)
            make_optimizer = _maker(optimizer, module)
            check_callables(make_optimizer, loss_fn, lr_scheduler)
            if isinstance(loss_fn, nn.Module) and any(p.requires_grad for p in loss_fn.parameters()):
                raise ValueError(
                    "loss_fn has parameters to train, which are no stage's; freeze them (requires_grad_(False)), put them into "
                    "the last stage's module, or use dtrp.Pipeline, which trains them"
                )
            trainings = settings.trainings(ranks.num_stages, make_optimizer, lr_scheduler)
            shared = {"n_microbatches": self.num_microbatches, "scale_grads": bool(scale_grads)} | settings.shared()
            needs_input_grad = self._connect(module, _device_of(stage), transport, shared, seed)
            self._engine: StageEngine = self._stage_engine(
                stage, trainings[ranks.stage], transport, needs_input_grad=needs_input_grad, scale_grads=scale_grads
            )
            self._watches = [optimizer_watch.watch(self._engine)]
        except BaseException as error:
            transport.fail(error)
            transport.close()
            raise

    def _connect(
        self, module: nn.Module, device: torch.device, transport: Transport, shared: dict[str, Json], seed: int | None
    ) -> bool:
        """Compare with the other ranks what must be the same, take the first one's seed, and open the links.

        Returns:
            Whether a stage before this one has something to train.
        """
        ranks = transport.ranks
        trains = any(p.requires_grad for p in module.parameters())
        facts = (
            {**shared, "lr_scheduler": self._schedules_lr},
            place_of(device),
            trains,
            list(module.state_dict()),
            _drawn_seed() if seed is None else seed,
        )
        everyone = transport.collectives.all_gather("ScheduleDTRP", facts)
        settings, places, all_train, names, seeds = zip(*everyone, strict=True)
        for rank, theirs in zip(ranks.all, settings, strict=True):
            check_same(rank, theirs, settings[0], "make the same ScheduleDTRP on every rank")
        if not any(all_train):
            raise ValueError("no stage has a parameter that requires a gradient; there is nothing to train")
        transport.connect(device, backend_for(places))
        self.seed = seeds[0]
        self._shared_name = _shared_name(names)
        return any(all_train[: ranks.stage])

    def _stage_engine(
        self, stage: Any, training: StageTraining, transport: Transport, *, needs_input_grad: bool, scale_grads: bool
    ) -> StageEngine:
        ranks, module = transport.ranks, stage.submod
        route = Route.from_graph(stage.pipe_info.graph, ranks.stage) if self._is_traced else None
        call = Call(module, route, ranks.stage, ranks.num_stages)
        loss_fn = self._loss if ranks.after is None else None
        hosted = Stage(
            StagePosition(ranks.stage, ranks.num_stages, _device_of(stage), self.seed),
            StageNetwork(module, loss_fn, needs_input_grad, call=call),
            training,
            Reach({ranks.stage: module}),
        )
        total = self.num_microbatches if scale_grads else 1
        return StageEngine(hosted, self.method, self.num_microbatches, total, transport, self._tracer, call, self._loss)

    # -- training ---------------------------------------------------------------------------------------

    def step(
        self,
        *args: Any,
        target: Any = None,
        losses: list[Tensor] | None = None,
        return_outputs: bool = True,
        loss_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Train on one mini-batch.

        Args:
            *args: the model's positional arguments; they matter on the first rank.
            target: what the loss compares with; it matters on the last rank.
            losses: is emptied and filled, on the last rank, with the loss of each micro-batch, detached.
            return_outputs: whether the last rank is to return the outputs.
            loss_kwargs: further keyword arguments for ``loss_fn``: tensors and constants, in tuples, lists and dicts;
                each micro-batch gets them whole.
            **kwargs: keyword arguments for the module of this rank's stage; no gradient of them is made. Keep
                `BlockMask`s unchanged until the next `flush`; of tensors the schedule has copies.

        Returns:
            The last stage's outputs, put together, on the last rank, each micro-batch's as its forward made it;
            detached. None elsewhere.

        Raises:
            TypeError, ValueError: what does not fit; the run ends, on all ranks.
            StageError: what failed inside a stage; the schedule is of no use after it.
        """
        self._check_usable(trains=True)
        if not torch.is_grad_enabled():
            raise RuntimeError("step() trains, and torch.no_grad() is on; call it outside, or call eval()")
        with self._shared():
            inputs = (args if self._engine.takes_x else (), kwargs)
            refuse_gradient("the input", inputs, "put what has made it into the first stage's module")
            refuse_gradient("target", (target, loss_kwargs), "put what has made it into the last stage's module")
            arguments, keywords = self._cut(args, kwargs, outlive=True)
            targets = self._cut_target(target, losses, loss_kwargs)
            if self._engine.takes_y and not targets:
                raise ValueError("the last stage's rank passes target to step(), for the loss")
            self._engine.stages[0].check_trainable()
        with self._breaking():
            outcomes = self._engine.train(arguments, keywords, targets, keeps_outputs=return_outputs)
            if losses is not None and self._engine.takes_y:
                losses[:] = [loss for _, loss in outcomes]
            return self._merged([output for output, _ in outcomes]) if return_outputs else None

    def eval(
        self,
        *args: Any,
        target: Any = None,
        losses: list[Tensor] | None = None,
        return_outputs: bool = True,
        loss_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """The model's output, in eval mode, with the weights as they are; batches in flight stay in flight.

        torch's schedules leave the modules in whatever mode they are in.

        Args:
            *args: as for `step`.
            target: as for `step`; without it there are no losses.
            losses: as for `step`.
            return_outputs: as for `step`.
            loss_kwargs: as for `step`.
            **kwargs: as for `step`.

        Returns:
            As `step`.

        Raises:
            NotImplementedError: a traced stage: its graph is that of the mode it was traced in.
        """
        self._check_usable()
        if self._is_traced:
            raise NotImplementedError(
                "eval() of a stage that pipeline(...) has traced: the graph does what the model did in the mode that it was traced "
                "in, dropout and batch statistics included, whatever .eval() is called; make the stages by hand, load "
                "stage.submod.state_dict() into a model of your own, or use dtrp.split, which traces both modes"
            )
        with self._shared():
            arguments, keywords = self._cut(args, kwargs, outlive=False)
            targets = self._cut_target(target, losses, loss_kwargs)
            outputs = self._engine.evaluate(arguments, keywords)
            if not self._engine.takes_y:
                return None
            if losses is not None:
                with torch.no_grad():
                    losses[:] = [self._loss(out, given) for out, given in zip(outputs, targets, strict=True)]
                self._loss.take()
            return self._merged(outputs) if return_outputs else None

    def _cut(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], *, outlive: bool
    ) -> tuple[Sequence[tuple[Any, ...]], Sequence[dict[str, Any]]]:
        """The arguments of each micro-batch, as torch cuts them; copies where they outlive the step."""
        num, engine = self.num_microbatches, self._engine
        if engine.takes_x and not args and not kwargs:
            raise ValueError("the first stage's rank passes the model's input to step() and eval()")
        if not engine.takes_x:
            args = ()  # as in torch: what arrives are the arguments
        if not args and not kwargs:
            return [()] * num, [{}] * num
        args_spec, kwargs_spec = self._specs
        cut_args, cut_kwargs = split_args_kwargs_into_chunks(
            args, kwargs, num, args_spec if args else None, kwargs_spec
        )
        if len(cut_args) != num:
            raise ValueError(
                f"the mini-batch has samples for {len(cut_args)} micro-batches and n_microbatches={num}; pass at least {num} "
                "samples (drop_last=True of a DataLoader), or make the schedule with fewer micro-batches"
            )
        flatten(cut_args[0], "args")
        stage = engine.stages[0]
        copies = outlive and stage.distance > 0 and not self.method.flush

        def kept(t: Tensor) -> Tensor:
            return aligned_clone(t) if copies or t.is_inference() else t.detach()

        # Arguments are copied by the stage, where need be.
        arguments = [pytree.tree_map_only(Tensor, lambda t: t.clone() if t.is_inference() else t, c) for c in cut_args]
        return arguments, [pytree.tree_map_only(Tensor, kept, c) for c in cut_kwargs]

    def _cut_target(self, target: Any, losses: Any, loss_kwargs: Any) -> list[Any]:
        """(target, loss_kwargs) of each micro-batch, on the last rank, where there is a target."""
        if losses is not None and not isinstance(losses, list):
            raise TypeError(f"losses is a {type(losses).__name__}; pass a list, which is filled")
        if not self._engine.takes_y:
            return []
        if target is None:
            if losses is not None:
                raise ValueError("losses without target: pass both on the last stage's rank, or neither")
            return []
        flatten(target, "target")
        flatten(loss_kwargs or {}, "loss_kwargs")
        if num_samples(target) < self.num_microbatches:
            raise ValueError(
                f"target has {num_samples(target)} samples and n_microbatches={self.num_microbatches}; pass at least one for each"
            )
        return [(part, loss_kwargs or {}) for part in split(target, self.num_microbatches)]

    def _merged(self, outputs: list[Any]) -> Any:
        return merge_chunks(outputs, self._output_merge_spec) if self._engine.takes_y else None

    # -- saving -------------------------------------------------------------------------------------------

    def _check_names(self, method: str) -> None:
        if self._shared_name is not None:
            raise RuntimeError(
                f"{method}() needs the names of one model, and two stages have a {self._shared_name}; save each rank's "
                "stage.submod.state_dict(), or give the stages' modules names of their own"
            )

    def load(self, folder: str | os.PathLike[str]) -> Any:
        """As `Pipeline.load`."""
        if self._shared_name is not None and saving.inspect(folder).kind == "portable":
            self._check_names("load")
        return super().load(folder)

    def __repr__(self) -> str:
        return (
            f"ScheduleDTRP(method={self.method.name!r}, stage={self._engine.stages[0].index}, num_stages={self.num_stages}, "
            f"n_microbatches={self.num_microbatches}, num_updates={self.num_updates}, in_flight={self.in_flight})"
        )


def _ranks_of(stage: Any) -> Ranks:
    """The ranks of the stage's group."""
    missing = [name for name in ("submod", "stage_index", "num_stages", "device", "group") if not hasattr(stage, name)]
    if missing:
        raise TypeError(
            f"stage is a {type(stage).__name__} without {missing[0]}; pass the one stage of this rank, a "
            "torch.distributed.pipelining.PipelineStage or what pipeline(...).build_stage(...) returns"
        )
    members = dist.get_process_group_ranks(stage.group) if stage.group is not None else range(dist.get_world_size())
    if len(members) != stage.num_stages:
        raise ValueError(
            f"num_stages={stage.num_stages} and the stage's group has {len(members)} ranks; each rank hosts one stage: start as "
            "many ranks as there are stages, or pass the stages their group"
        )
    return Ranks((tuple(members),), dist.get_rank())


def _checked_module(stage: Any, ranks: Ranks) -> nn.Module:
    """The stage's module, if it can be trained here."""
    if stage.stage_index != ranks.stage:
        raise ValueError(
            f"stage_index={stage.stage_index} on rank {ranks.rank}, which is number {ranks.stage} of the stage's group; rank by "
            "rank the stages are 0, 1, 2, ..."
        )
    module = stage.submod
    if not isinstance(module, nn.Module):
        raise TypeError(f"stage.submod is a {type(module).__name__}; it is a torch.nn.Module")
    if isinstance(module, DistributedDataParallel) or any(isinstance(p, DTensor) for p in module.parameters()):
        raise TypeError(
            "stage.submod is wrapped for data or tensor parallelism (DistributedDataParallel, fully_shard, DTensor), which would "
            "wait for other ranks inside a stage; pass the plain module, or use dtrp.Pipeline(mesh=...), which averages "
            "gradients over replicas"
        )
    if getattr(stage, "dw_builder", None) is not None:
        raise ValueError("the stage has a dw_builder, for schedules that split a backward in two; make it without one")
    return module


def _device_of(stage: Any) -> torch.device:
    """The stage's device, with its number; the module must be there."""
    device = check_device(torch.empty(0, device=stage.device).device)
    for name, tensor in [*stage.submod.named_parameters(), *stage.submod.named_buffers()]:
        if tensor.device != device:
            raise ValueError(
                f"{name} is on {tensor.device} and the stage's device is {device}; move the module there first, then make "
                "optimizer and schedule"
            )
    return device


def _maker(optimizer: Any, module: nn.Module) -> Callable[[list[nn.Parameter]], Optimizer]:
    """A function from parameters to the optimizer, which may be there already."""
    if optimizer is None:
        if any(p.requires_grad for p in module.parameters()):
            raise TypeError("optimizer is None and the stage has parameters to train; pass an optimizer")
        return checked_optimizer(lambda parameters: torch.optim.SGD(parameters))  # never called
    if not isinstance(optimizer, Optimizer):
        return checked_optimizer(optimizer) if callable(optimizer) else optimizer
    parameters = {id(p) for p in module.parameters()}
    members = [p for group in optimizer.param_groups for p in group["params"]]
    strange = sum(id(p) not in parameters for p in members)
    if strange:
        raise ValueError(
            f"{strange} of the optimizer's {len(members)} tensors are no parameters of stage.submod; make it of "
            "stage.submod.parameters(), after the stage (pipeline(...) copies, and moving to a device may)"
        )
    if isinstance(optimizer, LBFGS):
        raise TypeError("LBFGS calls the loss many times in a step, which no pipeline can do; use another optimizer")
    return lambda parameters: optimizer


def _drawn_seed() -> int:
    """A seed from the global generator, which does not notice: the script's own draws stay what they are."""
    before = torch.default_generator.get_state()
    try:
        return int(torch.randint(2**63 - 1, ()))
    finally:
        torch.default_generator.set_state(before)


def _shared_name(names: Sequence[Sequence[str]]) -> str | None:
    """A name that two stages have."""
    counts = Counter(name for stage in names for name in stage)
    return next((name for name, count in counts.items() if count > 1), None)
