"""`Pipeline`: a model in stages, trained without waiting."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from .base_pipeline import BasePipeline, Settings
from .comm.transport import Transport
from .engine.consistency import make_consistent
from .engine.distributed import DistributedEngine
from .engine.habits import StaleStages, optimizer_watch
from .engine.independence import has_sequences_first, warn_if_samples_mix
from .engine.local import LocalEngine
from .engine.loss_weights import weigh
from .launch.ranks import Ranks, find_ranks
from .methods import Keep, Method
from .optim import extrapolated
from .planning.plan_file import Plan, as_plan
from .splitting.stages import Stages, called, check_device, into_stages, stage_device
from .splitting.traced_stage import TracedStage
from .stage.gradients import Clip, OnNonfinite
from .stage.losses import Auxiliary, aux_of_stages, loss_module
from .stage.optimizer_step import check_callables, checked_optimizer
from .stage.reach import Reach, refuse_gradient
from .stage.specs import StageNetwork, StagePosition, StageTraining
from .stage.stage import Stage
from .stage.tied import check_ties, find_shared_buffers, find_ties
from .tensors.module_mode import check_input, follow
from .tensors.pytree import check_samples, flatten, num_samples, targets_fit
from .tensors.rng import drawn_seed
from .typing import Json, LossFn, LossWeight, OptimizerFactory, SchedulerFactory, Tree

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

Device = torch.device | str | int


class Pipeline(BasePipeline):
    """A network in K stages, each with its own optimizer, trained by one of the family's methods.

    The user keeps the training loop. All stages live in this process, on one device or on one each; or, under
    ``torchrun --nproc-per-node K`` and wherever `torch.distributed` is initialized with more than one rank, each rank
    hosts one, and every rank calls the same methods in the same order. There ``x`` matters on the first rank and ``y``
    on the last, each stage's initial values are rank 0's, and what a stage returns to the caller, the loss and the
    output of `infer`, is returned by the last rank, None by the others.

    Args:
        model: an `nn.Sequential`, which is cut between its top-level layers, a list of modules, one a stage, or what
            `dtrp.split` returns. Its parameters stay the same objects and are trained in place. One that several stages
            hold (a tied embedding) is updated once, with the sum of their gradients, by methods that flush; the others
            refuse it.
        optimizer: list of parameters -> `torch.optim.Optimizer`; called once for each stage that has
            trainable parameters. It is given those of these keywords that it names: ``stage`` and ``num_stages``, k and
            K; ``delay``, the largest delay of the stage in steady state, in updates; ``named``, its parameters as
            (name, parameter) pairs, by the model's names: ``lambda params, *, named: configure(named)``.
        loss_fn: (output, target) -> scalar, the mean over the samples. It may depend on these, on constants and on the
            last stage's own tensors. A `torch.nn.Module` with parameters to train is trained with the last stage, and
            saved beside the model. The first mini-batch shows whether it reads another stage's tensors, or would train
            parameters that are not registered in it, and is refused then. Terms of the loss from inside a stage:
            `dtrp.add_loss`.
        num_stages: K. None: the length of a list, or ``len(cuts) + 1``, or 1. By ``num_stages`` alone a
            Sequential is cut into equal numbers of layers, the first stages taking the remainder.
        cuts: index of the first layer of stages 1..K-1.
        method: a name from `list_methods`, or a `Method`, as from ``get_method("fdg", grad_shrink=0.5)``.
        loss_weight: targets of a micro-batch -> what it counts for in its mini-batch, a number of at least 0, where
            that is not the number of its samples: ``lambda y: (y != -100).sum()`` for a loss that leaves labels of -100
            out. ``loss_fn`` returns the mean over what counts. With replicas it counts between them too. A micro-batch
            of weight 0 is not differentiated, and its loss is not used; a mini-batch of weight 0 counts as one with a
            loss that is not finite.
        num_microbatches: A, the parts that `torch.tensor_split` cuts a mini-batch into. More of them
            bring the delay down; a mini-batch of fewer samples has one part a sample. ``"auto"``: as many as stages, and
            at least two samples in each where the mini-batch has two: one of n < 2 A samples has max(1, n // 2) parts.
        lr_scheduler: optimizer -> scheduler, stepped once an update. It is given ``stage``, ``num_stages`` and ``delay``
            where it names them.
        seed: of the stages' random draws (dropout); None: drawn from the global generator, which is left
            as it was.
        devices: one device for all stages or one for each; None: where the model is.
        group: the process group whose ranks host the stages, in order; None: all ranks.
        mesh: a `torch.distributed.device_mesh.DeviceMesh` with the dimensions ``("replica", "stage")``. Each replica
            passes its own shard of the mini-batch, and a stage's gradients are averaged over its replicas at U,
            weighted by samples. The loss is then that of the whole mini-batch. BatchNorm sees its own shard (the
            running statistics saved are the first replica's), unless it is a `torch.nn.SyncBatchNorm` made with the
            process group ``mesh.get_group("replica")``, which needs a sample of each shard in every micro-batch.
        aux: for a method in which each stage has a loss of its own (dgl), the auxiliary networks that make of a stage's
            output what ``loss_fn`` takes: a module for each stage but the last (None for one with nothing to train), or
            a function from the stages to such a list, as `dtrp.models.auxiliary` makes. The optimizer of the stage
            trains them too; they are no part of the model, and saved beside it. On several ranks ``y`` matters on the
            first one then.
        loss_on: ``"last"``: `step` returns the loss on the last rank; ``"all"``: on every rank, which then waits for
            the last one in every step, so that the stages take turns instead of overlapping.
        timeout_s: the longest that a rank waits for another before an error says who waits for whom.
        max_grad_norm: clip a mini-batch's gradient to this 2-norm before its update, as
            `torch.nn.utils.clip_grad_norm_` does.
        clip: whose norm: ``"stage"``: of each stage's gradient (with replicas of their average), which needs no
            waiting; ``"global"``: of all stages' together, as of the unsplit model; for methods that flush.
        on_nonfinite: ``"stop"``: a loss or a gradient that is not finite ends the run, before the update that it would
            have gone into. ``"skip"``: that update is left out: weights and optimizer state stay, version and scheduler
            go on. In a method that flushes all stages then leave it out. In the others each stage decides by its own
            gradient: one that is not finite at a stage is mostly not finite at those before it, and those after it have
            made their update; a loss that is not finite, be its gradient finite, counts so at every stage that learns
            from it. Buffers have moved with the forward.
            `skipped_updates` counts. On an accelerator ``"stop"`` without clipping does not wait for the answer, which
            would keep it from being given work: the run ends at the stage's next update, and for a loss at the next
            step, or at ``flush()``. That update has spoiled the weights then, and nothing has been saved of them: go on
            from the last save.
        keep: what stages keep between F and B, in place of what the method says: ``"graph"`` or ``"input"``, for all
            stages or one for each. A stage of an asynchronous method that keeps its graph evaluates it, and
            differentiates, at the weights its forward read (predicted ones, if the method predicts), and recomputes
            nothing. ``"auto"``: each stage looks at its first micro-batch, with two trial forwards, and keeps its
            graphs if all that it is going to hold stays under ``memory_limit_bytes``, its inputs otherwise; `keeps`
            tells.
        memory_limit_bytes: for each stage, with ``keep="auto"``: weights, optimizer state, gradients, stash and
            messages.
        plan: what `dtrp.plan` returned, or the path of its file: it says ``method``, ``cuts``, ``keep`` and
            ``num_microbatches``. The size of the mini-batch and the learning rate stay the caller's; the plan tells
            what it reckons with (``batch_size``, ``lr_scale``).
        compile: True: each stage's module runs through `torch.compile`, with dropout masks as without it
            (``options={"fallback_random": True}``); or the keyword arguments for `torch.compile`, as they are.
        trace: record when each F, B, U, send and receive runs, for `save_trace`.
        microbatch_samples: the least samples of a micro-batch: a mini-batch of n < ``num_microbatches *
            microbatch_samples`` samples has max(1, n // microbatch_samples) parts. None: 2 with
            ``num_microbatches="auto"`` (1 where replicas share a `torch.nn.SyncBatchNorm`), and 1 with a number. With
            replicas the number of parts is the same for all: those that a shard has no samples for are empty.
        extrapolate: how much further each update goes along its change (`dtrp.optim.extrapolated`); 0: not at all.

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
        {0: Counter({1: 12, 0: 3}), 1: Counter({0: 11, 1: 4}), 2: Counter({0: 15})}
    """

    def __init__(
        self,
        model: nn.Sequential | Sequence[nn.Module],
        optimizer: OptimizerFactory,
        loss_fn: LossFn,
        *,
        num_stages: int | None = None,
        cuts: Sequence[int] | None = None,
        method: str | Method = "dtrp",
        num_microbatches: int | Literal["auto"] = "auto",
        loss_weight: LossWeight | None = None,
        lr_scheduler: SchedulerFactory | None = None,
        aux: Auxiliary | None = None,
        seed: int | None = None,
        devices: Device | Sequence[Device] | None = None,
        group: ProcessGroup | None = None,
        mesh: DeviceMesh | None = None,
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
        microbatch_samples: int | None = None,
        extrapolate: float = 0.0,
    ) -> None:
        if plan is not None:
            given = {"num_stages": num_stages, "cuts": cuts, "keep": keep, "memory_limit_bytes": memory_limit_bytes}
            plan = _planned_alone(as_plan(plan), given, method, num_microbatches)
            model, cuts = _cut_by_plan(model, plan)
            keep, method, num_microbatches = plan.keep, plan.row, plan.num_microbatches
        settings = Settings.checked(
            method, num_microbatches, seed, timeout_s, max_grad_norm, clip, on_nonfinite, keep, memory_limit_bytes,
            microbatch_samples=microbatch_samples,
        )  # fmt: skip
        check_callables(optimizer, loss_fn, lr_scheduler)
        _check_loss(loss_fn, loss_weight, loss_on)
        ranks = find_ranks(group, mesh, timeout_s)
        if ranks is not None and num_stages is None and cuts is None and isinstance(model, nn.Module):
            num_stages = ranks.num_stages
        modules = into_stages(model, num_stages, cuts)
        self._loss_weight, self._unjudged = loss_weight, () if settings.num_microbatches else _may_mix(modules)
        settings = settings.divided(modules, num_replicas=1 if ranks is None else ranks.num_replicas)
        networks = _networks(modules, loss_fn, aux, settings.method, compile)
        make_optimizer = extrapolated(checked_optimizer(optimizer), extrapolate)
        trainings = settings.trainings(len(modules), make_optimizer, lr_scheduler)
        self._configure(settings, len(modules), schedules_lr=lr_scheduler is not None, trace=trace)
        self.seed = drawn_seed() if seed is None else int(seed)
        if ranks is None:
            self._engine = self._local_engine(networks, trainings, devices)
            self._watches = [optimizer_watch.watch(self._engine)]
        else:
            weighs = loss_weight is not None and "a function"
            shared = settings.shared() | {"loss_on": loss_on, "loss_weight": weighs, "extrapolate": extrapolate}
            self._engine = self._distributed_engine(networks, trainings, devices, ranks, timeout_s, shared)
            self._watches = [optimizer_watch.watch(self._engine), StaleStages(modules, ranks.stage, self._engine).end]

    def _local_engine(
        self,
        networks: Sequence[StageNetwork],
        trainings: Sequence[StageTraining],
        devices: Device | Sequence[Device] | None,
    ) -> LocalEngine:
        """All stages in this process."""
        reach = Reach({index: network.whole for index, network in enumerate(networks)}, None)
        stages = [
            Stage(StagePosition(index, len(networks), device, self.seed), network, training, reach)
            for index, (device, network, training) in enumerate(
                zip(_place(networks, devices, range(len(networks))), networks, trainings, strict=True)
            )
        ]
        return LocalEngine(stages, self.method, self.num_microbatches, self._tracer, self.microbatch_samples)

    def _distributed_engine(
        self,
        networks: Sequence[StageNetwork],
        trainings: Sequence[StageTraining],
        devices: Device | Sequence[Device] | None,
        ranks: Ranks,
        timeout_s: float,
        shared: dict[str, Json],
    ) -> DistributedEngine:
        """The stage of this rank, connected with the others, which must have the ``shared`` settings too."""
        _check_world(len(networks), ranks)
        index = ranks.stage
        device = _place(networks, devices, [index])[index]
        transport = Transport(ranks, timeout_s, self._tracer)
        try:
            wholes = [network.whole for network in networks]
            self.seed = make_consistent(transport, wholes, device, shared, self.seed, networks[index].ties)
            position = StagePosition(index, len(networks), device, self.seed, ranks.replica)
            stage = Stage(position, networks[index], trainings[index], Reach(dict(enumerate(wholes)), index))
            counts = self.num_microbatches, transport, self._tracer, shared["loss_on"], self.microbatch_samples
            return DistributedEngine(stage, self.method, *counts)
        except BaseException as error:
            transport.fail(error)
            transport.close()
            raise

    # -- training ---------------------------------------------------------------------------------------

    def step(self, x: Tree, y: Tree) -> Tensor | None:
        """Train on one mini-batch.

        Args:
            x: the model's input, samples along dimension 0; any number of them, of any shape the model takes. It may be
                a tree: tuples, lists and dicts of tensors, each with as many samples. Constants in it, tensors without
                a dimension, and those with one entry along dimension 0 beside longer ones go to every micro-batch
                whole. Between stages such trees travel too: each stage takes the one value that the stage before
                returns. Of a model that `dtrp.split` has traced, and of modules whose forward takes several arguments,
                a tuple is the positional arguments and a dict the keyword arguments: ``pipe.step({"ids": ids, "mask":
                mask}, y)``.
            y: the targets, as many; a tree too, if ``loss_fn`` takes one.

        Returns:
            The mean loss of this mini-batch, at the weights its forward met: a detached scalar tensor; None on ranks
            that do not host the last stage.

        Raises:
            TypeError, ValueError: x and y that do not fit. In one process nothing has happened then; on several ranks
                the run ends, since the others are in the step by now.
            StageError: what failed inside a stage; the pipeline is of no use after it.
        """
        self._check_usable(trains=True)
        engine = self._engine
        with self._shared():
            x = check_samples("x", x, self.num_microbatches) if engine.takes_x else None
            # Of the first and the last rank one needs y. The other may be given it too, and then both are checked
            # against each other.
            needs_y = engine.takes_x if self.method.local else engine.takes_y
            if needs_y and y is None and self.method.local:
                raise TypeError(
                    f"y is None; by method {self.method.name!r} each stage has a loss of its own, and the first hands the "
                    "targets on: pass y where you pass x"
                )
            wants_y = needs_y or ((engine.takes_x or engine.takes_y) and y is not None)
            y = check_samples("y", y, self.num_microbatches) if wants_y else None
            for stage in engine.stages:
                stage.check_trainable()
                follow(stage.module)
            refuse_gradient("x", x, "put what has made it into the first stage's module")
            refuse_gradient("y", y, "put what has made it into the last stage's module")
            if x is not None and y is not None:
                _check_numbers(num_samples(x), num_samples(y), self.num_microbatches)
            if engine.takes_x:
                check_input(engine.stages[0].module, x, whole=engine.num_parts(num_samples(x)) > 1)
                if self._unjudged and engine.num_parts(num_samples(x)) > 1:
                    unjudged, self._unjudged = self._unjudged, ()
                    warn_if_samples_mix(unjudged, called, x)
            weights = None
            if self._loss_weight is not None and needs_y:
                assert y is not None
                weights = weigh(self._loss_weight, engine.cut(y))
        with self._breaking():
            return engine.step(x, y, weights)

    def infer(self, x: Tree) -> Tree:
        """The model's output for ``x``, any number of samples, in eval mode, with the weights as they are.

        Batches in flight stay in flight. Modules that were in train mode are again after it. A module that draws random
        numbers in eval mode (a VAE, a masked autoencoder) draws others at every call, from the pipeline's seed and the number
        of calls so far, which checkpoints keep; the global generator is left alone.
        """
        self._check_usable()
        with self._shared():
            if self._engine.takes_x and not flatten(x, "x")[0]:
                raise TypeError(f"x is a {type(x).__name__}; infer takes a tensor with samples along dimension 0")
            return self._engine.infer(x)

    def __repr__(self) -> str:
        stages = self._engine.stages
        sizes = ", ".join(
            str(len(stage.module)) if isinstance(stage.module, nn.Sequential) else "traced" for stage in stages
        )
        rank = "" if self._engine.alone else f"stage={stages[0].index}, "
        return (
            f"Pipeline(method={self.method.name!r}, num_stages={self.num_stages}, {rank}layers=[{sizes}], "
            f"num_microbatches={self.num_microbatches}, num_updates={self.num_updates}, in_flight={self.in_flight})"
        )


def _check_numbers(inputs: int, targets: int, num_microbatches: int) -> None:
    """Refuse another number of targets than of inputs."""
    if targets_fit(inputs, targets, num_microbatches):
        return
    advice = ""
    if targets_fit(inputs, targets, 1):
        advice = (
            f", to be cut into {num_microbatches} micro-batches; pass num_microbatches=1, or, if dimension 0 of x counts "
            f"samples and not tokens, y with a row a sample, as y.view({inputs}, -1), and flatten it in loss_fn"
        )
    raise ValueError(
        f"x has {inputs} samples and y has {targets}; a mini-batch needs as many targets as inputs{advice}"
    )


def _cut_by_plan(model: nn.Module | Sequence[nn.Module], plan: Plan) -> tuple[Any, Sequence[int] | None]:
    """(the model, the cuts) that `into_stages` takes, of a model that the plan is for."""
    plan.check_model(model)
    if isinstance(model, Stages):
        return model.cut(plan.cuts), None
    return model if isinstance(model, nn.Module) else nn.Sequential(*model), plan.cuts


def _networks(
    modules: Sequence[nn.Module],
    loss_fn: LossFn,
    aux: Auxiliary | None,
    method: Method,
    compile: bool | Mapping[str, Any],
) -> list[StageNetwork]:
    """What each stage computes.

    Raises:
        TypeError, ValueError: nothing to train, parameters that stages may not share, auxiliary networks that do not
            fit.
    """
    trains = [any(p.requires_grad for p in module.parameters()) for module in modules]
    if not any(trains):
        raise ValueError("the model has no parameter that requires a gradient; there is nothing to train")
    ties, shared_buffers = find_ties(modules), find_shared_buffers(modules)
    check_ties(ties, method)
    aux_networks = aux_of_stages(aux, modules, method)
    trained_loss = loss_module(loss_fn, modules, method)
    options = _compile_options(compile)
    return [
        StageNetwork(
            module,
            loss_fn if index == len(modules) - 1 or aux_networks[index] is not None else None,
            needs_input_grad=not method.local and any(trains[:index]),
            aux=aux_networks[index],
            loss_module=trained_loss if index == len(modules) - 1 else None,
            compile=options,
            ties=ties,
            shared_buffers=shared_buffers,
        )
        for index, module in enumerate(modules)
    ]


def _may_mix(stages: Sequence[nn.Module]) -> Sequence[nn.Module]:
    """The stages, if their form leaves open whether dimension 0 is that of the samples; else none."""
    is_traced = any(isinstance(stage, TracedStage) for stage in stages)
    return stages if len(stages) > 1 and (is_traced or has_sequences_first(stages)) else ()


def _check_loss(loss_fn: LossFn, loss_weight: LossWeight | None, loss_on: str) -> None:
    """Refuse a sum, which parts of a mini-batch cannot be weighted by, and what is said of a loss and means nothing."""
    keywords = (
        loss_fn.keywords
        if isinstance(loss_fn, functools.partial)
        else vars(loss_fn)
        if hasattr(loss_fn, "__dict__")
        else {}
    )
    if keywords.get("reduction") == "sum":
        raise ValueError(
            "loss_fn has reduction='sum'; a loss is the mean over the samples of its micro-batch (reduction='mean'), and what a "
            "micro-batch counts for is its samples, or loss_weight"
        )
    if loss_weight is not None and not callable(loss_weight):
        raise TypeError(f"loss_weight is a {type(loss_weight).__name__}; pass a function of the targets, or None")
    if loss_on not in ("last", "all"):
        raise ValueError(f"loss_on={loss_on!r}: choose 'last' or 'all'")


def _compile_options(compile: bool | Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Keyword arguments for `torch.compile`, or None."""
    if isinstance(compile, Mapping):
        return compile
    if not isinstance(compile, bool):
        raise TypeError(f"compile={compile!r}: pass True, False, or a dict of keyword arguments for torch.compile")
    # Inductor draws other numbers with and without a graph: a recomputed forward would have other dropout masks.
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


def _place(
    networks: Sequence[StageNetwork], devices: Device | Sequence[Device] | None, hosted: Sequence[int]
) -> list[torch.device]:
    """The device of each stage; the networks of the stages that this process hosts are moved there."""
    found = _devices_of(networks) if devices is None else _named_devices(devices, len(networks), hosted)
    ties = networks[0].ties
    if len(hosted) > 1 and ties and len(set(found)) > 1:
        raise ValueError(
            f"{ties[0]} are one tensor, which cannot be on {' and '.join(map(str, dict.fromkeys(found)))}; pass one "
            "device, give each stage its own, or start a rank for each stage, where each has a copy"
        )
    for index in hosted:
        check_device(found[index])
        if devices is not None:
            networks[index].module.to(found[index])
        if (section := networks[index].section) is not None:
            section[1].to(found[index])
    return found


def _devices_of(networks: Sequence[StageNetwork]) -> list[torch.device]:
    """Where the modules are; a stage without tensors works where the one before it does, or the first that has any."""
    devices = [stage_device(network.module) for network in networks]
    current = next(device for device in devices if device is not None)
    return [current := device or current for device in devices]


def _named_devices(devices: Device | Sequence[Device], num_stages: int, hosted: Sequence[int]) -> list[torch.device]:
    """The devices that the caller names; those of stages that other processes host are not touched."""
    named = [devices] * num_stages if isinstance(devices, (torch.device, str, int)) else list(devices)
    if len(named) != num_stages:
        raise ValueError(f"devices has {len(named)} entries for {num_stages} stages; pass one device, or one per stage")
    try:  # a tensor knows the index that "cuda" leaves out
        return [
            torch.empty(0, device=device if index in hosted else "cpu").device for index, device in enumerate(named)
        ]
    except (RuntimeError, AssertionError, TypeError) as error:
        raise ValueError(f"devices={devices!r}: torch cannot use them ({str(error).splitlines()[0]})") from error


def _planned_alone(plan: Plan, given: dict[str, Any], method: str | Method, num_microbatches: Any) -> Plan:
    """The plan; refuses arguments that say otherwise. Those that have a default say nothing by it."""
    for name, value in given.items():
        if value is not None:
            raise ValueError(f"{name}={value!r} with a plan, which says it; leave it out, or edit the plan")
    if method not in ("dtrp", plan.method, plan.row):
        shown = repr(method) if isinstance(method, str) else method
        raise ValueError(f"method={shown} with a plan for {plan.row}; leave it out, or plan again with it")
    if num_microbatches not in ("auto", plan.num_microbatches):
        raise ValueError(
            f"num_microbatches={num_microbatches!r} with a plan for {plan.num_microbatches}; leave it out, or plan again"
        )
    return plan
