"""`ScheduleDTRP`: a stage of `torch.distributed.pipelining`, trained without waiting."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.pipelining.microbatch import merge_chunks
from torch.optim import Optimizer

from .. import saving
from ..base_pipeline import BasePipeline, Settings
from ..comm.process_groups import backend_for, place_of
from ..comm.transport import Transport
from ..engine.consistency import check_same
from ..engine.habits import AccumulationWatch, optimizer_watch
from ..launch.ranks import Ranks
from ..methods import Keep, Method
from ..stage.gradients import Clip, OnNonfinite
from ..stage.optimizer_step import check_callables
from ..stage.reach import Reach, refuse_gradient
from ..stage.specs import StageNetwork, StagePosition, StageTraining
from ..stage.stage import Stage
from ..stage.tied import Tie, check_ties
from ..tensors.layout import aligned_clone
from ..tensors.pytree import flatten
from ..tensors.rng import drawn_seed
from ..tensors.torch_private import pytree
from ..typing import Json
from .cutting import Arguments, MiniBatch
from .engine import RecordedLoss, StageEngine
from .routes import Call, Route
from .torch_stage import check_contexts, checked_module, device_of, maker, ranks_of, scales_by_default
from .traced import Traced, check_written, replace, shared_parameters, unite


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
            of a list of parameters. None where nothing is trained.
        n_microbatches: A, of every mini-batch; any number of at least 1.
        loss_fn: (output, target) -> scalar, of a micro-batch; every rank passes it, the last one calls it. None, on every
            rank: the schedule runs forwards alone, and trains nothing.
        args_chunk_spec, kwargs_chunk_spec, output_merge_spec: as for torch's schedules.
        scale_grads: True: gradients are divided by ``n_microbatches``: for losses that are means. False: for sums. None:
            as torch's schedules do by themselves: they divide, and before torch 2.7, where they have no such argument,
            they do not.
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
        loss_fn: Callable[..., Tensor] | None = None,
        args_chunk_spec: Any = None,
        kwargs_chunk_spec: Any = None,
        output_merge_spec: Any = None,
        scale_grads: bool | None = None,
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
        divides = scales_by_default() if scale_grads is None else bool(scale_grads)
        ranks = ranks_of(stage)
        self._configure(settings, ranks.num_stages, schedules_lr=lr_scheduler is not None, trace=trace)
        self._specs = (args_chunk_spec, kwargs_chunk_spec)
        self._output_merge_spec = output_merge_spec
        self._stage, self._trains = stage, loss_fn is not None
        self._loss = RecordedLoss(loss_fn)
        transport = Transport(ranks, timeout_s, self._tracer)
        transport.collectives.tensor_method = "eval" if self._trains else "step"
        try:  # from here on the other ranks hear of what does not fit on this one
            module = checked_module(stage, ranks)
            make_optimizer = maker(optimizer, module) if self._trains else _never_stepped
            _check_functions(make_optimizer, loss_fn, lr_scheduler)
            trainings = settings.trainings(ranks.num_stages, make_optimizer, lr_scheduler if self._trains else None)
            shared = {"n_microbatches": self.num_microbatches, "scale_grads": divides} | settings.shared()
            needs_input_grad, ties = self._connect(module, device_of(stage), transport, shared, seed)
            ties, replaced = unite(module, ties, ranks.stage)
            replace(optimizer, replaced)
            call = self._call(ranks)
            network = StageNetwork(module, self._loss_here(ranks), needs_input_grad, call=call, ties=ties)
            self._engine: StageEngine = self._stage_engine(network, call, trainings[ranks.stage], transport, divides)
            self._watch = AccumulationWatch(optimizer if self._trains else None)
            self._watches = [self._watch.end, *([optimizer_watch.watch(self._engine)] if self._trains else [])]
        except BaseException as error:
            transport.fail(error)
            transport.close()
            raise

    def _connect(
        self, module: nn.Module, device: torch.device, transport: Transport, shared: dict[str, Json], seed: int | None
    ) -> tuple[bool, list[Tie]]:
        """Compare with the other ranks what must be the same, take the first one's seed, and open the links.

        Returns:
            Whether a stage before this one has something to train, and the parameters that several stages have.
        """
        ranks = transport.ranks
        trains = self._trains and any(p.requires_grad for p in module.parameters())
        loss = "a function" if self._trains else None
        facts = (
            {**shared, "lr_scheduler": self._schedules_lr, "loss_fn": loss},
            place_of(device),
            trains,
            list(module.state_dict()),
            drawn_seed() if seed is None else seed,
            Traced.of(module) if self._is_traced else None,
        )
        everyone = transport.collectives.all_gather("ScheduleDTRP", facts)
        settings, places, all_train, names, seeds, traced = zip(*everyone, strict=True)
        for rank, theirs in zip(ranks.all, settings, strict=True):
            check_same(rank, theirs, settings[0], "make the same ScheduleDTRP on every rank")
        if self._trains and not any(all_train):
            raise ValueError("no stage has a parameter that requires a gradient; there is nothing to train")
        stages = [stage for stage in traced if stage is not None]
        found = shared_parameters(stages) if self._trains and len(stages) == ranks.num_stages else []
        ties = [tie for tie in found if tie.trained]
        if self._trains:
            check_written(stages)
            check_ties(ties, self.method)
        partners = [sorted({k for tie in ties for k in tie.partners(s)}) for s in range(ranks.num_stages)]
        transport.connect(device, backend_for(places), partners)
        self.seed = seeds[0]
        self._shared_name = _shared_name(names)
        modes = [(k, stage.one_mode) for k, stage in enumerate(traced) if stage is not None and stage.one_mode]
        self._one_mode = next((f"{mode} in stage {k}" for k, mode in modes), None)
        return any(all_train[: ranks.stage]), ties

    @property
    def _is_traced(self) -> bool:
        return hasattr(self._stage, "pipe_info")

    def _loss_here(self, ranks: Ranks) -> RecordedLoss | None:
        return self._loss if ranks.after is None and self._trains else None

    def _call(self, ranks: Ranks) -> Call:
        stage = self._stage
        route = Route.from_graph(stage.pipe_info.graph, ranks.stage) if self._is_traced else None
        return Call(stage.submod, route, ranks.stage, ranks.num_stages)

    def _stage_engine(
        self, network: StageNetwork, call: Call, training: StageTraining, transport: Transport, divides: bool
    ) -> StageEngine:
        ranks, module = transport.ranks, network.module
        gradients = [(p, p.grad) for p in module.parameters()]
        hosted = Stage(
            StagePosition(ranks.stage, ranks.num_stages, device_of(self._stage), self.seed),
            network,
            training,
            Reach({ranks.stage: module}),
        )
        if not self._trains:  # the gradients stay the caller's
            for p, gradient in gradients:
                p.grad = gradient
        total = self.num_microbatches if divides else 1
        settings = self.method, self.num_microbatches, total
        engine = StageEngine(hosted, *settings, transport, self._tracer, call, self._loss)
        engine.copy_tied_values()
        return engine

    # -- training ---------------------------------------------------------------------------------------

    def step(
        self,
        *args: Any,
        target: Any = None,
        losses: list[Tensor] | None = None,
        return_outputs: bool = True,
        loss_kwargs: dict[str, Any] | None = None,
        arg_mbs: list[tuple[Any, ...]] | None = None,
        kwarg_mbs: list[dict[str, Any]] | None = None,
        target_mbs: list[Any] | None = None,
        finalize_gradients: bool = True,
        **kwargs: Any,
    ) -> Any:
        """Train on one mini-batch; without ``loss_fn``: run forwards alone, in the mode that the modules are in.

        Args:
            *args: the model's positional arguments; they matter on the first rank.
            target: what the loss compares with; it matters on the last rank.
            losses: is emptied and filled, on the last rank, with the loss of each micro-batch, detached.
            return_outputs: whether the last rank is to return the outputs.
            loss_kwargs: further keyword arguments for ``loss_fn``: tensors and constants, in tuples, lists and dicts;
                each micro-batch gets them whole.
            arg_mbs: in place of ``args``, those of each micro-batch, which may have any number of samples.
            kwarg_mbs: in place of ``kwargs``, those of each micro-batch.
            target_mbs: in place of ``target``, that of each micro-batch.
            finalize_gradients: True. Every step makes an update, and so ends the sum of its gradients.
            **kwargs: keyword arguments for the module of this rank's stage; no gradient of them is made. Keep
                `BlockMask`s unchanged until the next `flush`; of tensors the schedule has copies.

        Returns:
            The last stage's outputs, put together, on the last rank, each micro-batch's as its forward made it;
            detached. None elsewhere.

        Raises:
            TypeError, ValueError: what does not fit; the run ends, on all ranks.
            StageError: what failed inside a stage; the schedule is of no use after it.

        Warns:
            UserWarning: the script's optimizer has stepped once for several steps of the schedule.
        """
        self._check_usable(trains=self._trains)
        batch = MiniBatch(args, kwargs, target, loss_kwargs or {}, arg_mbs, kwarg_mbs, target_mbs)
        with self._shared():
            if not finalize_gradients:
                raise ValueError(
                    "finalize_gradients=False adds up the gradients of several steps, and each step of ScheduleDTRP makes an "
                    "update; pass all of their samples to one step, with as many times the n_microbatches"
                )
            arguments, keywords = self._cut(batch, trains=self._trains)
            targets = self._cut_target(batch, losses)
            if self._engine.takes_y and self._trains and not targets:
                raise ValueError("the last stage's rank passes target to step(), for the loss")
            if not self._trains:
                return self._evaluated(
                    arguments, keywords, targets=[], losses=None, returns=return_outputs, in_eval_mode=False
                )
            self._engine.stages[0].check_trainable()
        self._watch.note_step()
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
        arg_mbs: list[tuple[Any, ...]] | None = None,
        kwarg_mbs: list[dict[str, Any]] | None = None,
        target_mbs: list[Any] | None = None,
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
            arg_mbs: as for `step`.
            kwarg_mbs: as for `step`.
            target_mbs: as for `step`.
            **kwargs: as for `step`.

        Returns:
            As `step`.

        Raises:
            NotImplementedError: a traced stage draws random numbers, takes statistics of the batch, or writes buffers:
                its graph is that of the mode it was traced in. What else a model does in one mode alone, in an ``if
                self.training``, no graph shows.
        """
        self._check_usable()
        if self._one_mode is not None:
            raise NotImplementedError(
                f"eval() of a stage that pipeline(...) has traced: {self._one_mode}; the graph does what the model did in the mode "
                "that it was traced in, dropout and batch statistics included, whatever .eval() is called; make the stages by "
                "hand, load stage.submod.state_dict() into a model of your own, or use dtrp.split, which traces both modes"
            )
        batch = MiniBatch(args, kwargs, target, loss_kwargs or {}, arg_mbs, kwarg_mbs, target_mbs)
        with self._shared():
            arguments, keywords = self._cut(batch, trains=False)
            targets = self._cut_target(batch, losses)
            return self._evaluated(
                arguments, keywords, targets=targets, losses=losses, returns=return_outputs, in_eval_mode=True
            )

    def _evaluated(
        self, *inputs: Any, targets: list[Any], losses: list[Tensor] | None, returns: bool, in_eval_mode: bool
    ) -> Any:
        """Run forwards alone, of arguments and keyword arguments."""
        outputs = self._engine.evaluate(*inputs, in_eval_mode=in_eval_mode)
        if not self._engine.takes_y:
            return None
        if losses is not None:
            with torch.no_grad():
                losses[:] = [self._loss(out, given) for out, given in zip(outputs, targets, strict=True)]
            self._loss.take()
        return self._merged(outputs) if returns else None

    def _cut(self, batch: MiniBatch, *, trains: bool) -> Arguments:
        """The arguments of each micro-batch, of which no gradient is made; copies where they outlive the step."""
        engine = self._engine
        check_contexts(self._stage)
        batch.check(self.num_microbatches)
        cut_args, cut_kwargs = batch.arguments(self.num_microbatches, self._specs, takes_x=engine.takes_x)
        if trains:
            refuse_gradient("the input", (cut_args, cut_kwargs), "put what has made it into the first stage's module")
            given = batch.target, batch.target_mbs, batch.loss_kwargs
            refuse_gradient("target", given, "put what has made it into the last stage's module")
        for number, each in enumerate(cut_args):
            flatten(each, f"arg_mbs[{number}]" if batch.is_cut else "args")
        stage = engine.stages[0]
        copies = trains and stage.distance > 0 and not self.method.flush

        def kept(t: Tensor) -> Tensor:
            return aligned_clone(t) if copies or t.is_inference() else t.detach()

        # Arguments are copied by the stage, where need be.
        arguments = [pytree.tree_map_only(Tensor, lambda t: t.clone() if t.is_inference() else t, c) for c in cut_args]
        return arguments, [pytree.tree_map_only(Tensor, kept, c) for c in cut_kwargs]

    def _cut_target(self, batch: MiniBatch, losses: Any) -> list[Any]:
        """(target, loss_kwargs) of each micro-batch, on the last rank, where there is a target."""
        if losses is not None and not isinstance(losses, list):
            raise TypeError(f"losses is a {type(losses).__name__}; pass a list, which is filled")
        if not self._engine.takes_y:
            return []
        targets = batch.targets(self.num_microbatches)
        if not self._trains and (targets or losses is not None):
            raise ValueError(
                "target or losses, and the schedule was made without loss_fn: it runs forwards alone; pass loss_fn to "
                "ScheduleDTRP, which trains then, or leave them out"
            )
        if losses is not None and not targets:
            raise ValueError("losses without target: pass both on the last stage's rank, or neither")
        return targets

    def _merged(self, outputs: list[Any]) -> Any:
        return merge_chunks(outputs, self._output_merge_spec) if self._engine.takes_y else None

    def flush(self) -> None:
        """Run the backwards and updates that are left. After it every stage has made one update per mini-batch."""
        if self._trains:
            super().flush()
        else:
            self._check_usable()

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


def _check_functions(optimizer: Any, loss_fn: Any, lr_scheduler: Any) -> None:
    """Refuse what cannot be called, and a loss that learns."""
    check_callables(optimizer, _never_stepped if loss_fn is None else loss_fn, lr_scheduler)
    if isinstance(loss_fn, nn.Module) and any(p.requires_grad for p in loss_fn.parameters()):
        raise ValueError(
            "loss_fn has parameters to train, which are no stage's; freeze them (requires_grad_(False)), put them into "
            "the last stage's module, or use dtrp.Pipeline, which trains them"
        )


def _never_stepped(parameters: list[nn.Parameter]) -> Optimizer:
    """The optimizer of a schedule that trains nothing."""
    return torch.optim.SGD(parameters)


def _shared_name(names: Sequence[Sequence[str]]) -> str | None:
    """A name that two stages have."""
    counts = Counter(name for stage in names for name in stage)
    return next((name for name, count in counts.items() if count > 1), None)
