"""A part of a traced model as a module with one value in and one value out."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from ..tensors import torch_private
from ..tensors.autocast import AutocastState
from ..tensors.module_mode import Follower, let_follow
from ..tensors.torch_private import (
    buffer_dict,
    forward_hooks,
    global_hooks,
    module_backward_hooks,
    module_dict,
    parameter_dict,
    pytree,
)
from ..typing import Tree
from .divide import Part, Source, Use, divide
from .example import Example, Sizes, varying
from .export import attribute, export
from .points import assign, check_points, choose_points, uneven_work
from .regions import run_within
from .verify import Verifier
from .weights import Weights, named_tensors

Owner = tuple[nn.Module, str]  # a module that holds a tensor, and its name in the module


class TracedStage(Follower):
    """A contiguous part of a model, with the model's parameters and buffers under their names in the model.

    It takes what the stage before returns, and returns what the next one takes: a tensor, or a tuple of tensors and
    whole numbers. The first takes what the example was, with any number of samples; the last returns what the model
    does. In train and in eval mode it runs the graph that was traced in that mode, and it is in the model's mode
    (`Follower`).

    Args:
        label: name of the stage in errors.
        parts: the parts traced in train and in eval mode.
    """

    def __init__(self, label: str, parts: tuple[Part, Part]) -> None:
        super().__init__()
        self._label = label
        self._parts = parts
        self._weights: tuple[list[Owner | None], list[Owner | None]] = ([], [])  # of each argument, in either mode
        self._dtypes: list[tuple[nn.Module, str, torch.dtype]] = []
        self._example: Example | None = None  # of the first stage, with tensors on the meta device
        self._sizes: list[Sizes] = []  # of the first stage: what tensors that come in may have, in either trace
        self._device: torch.device | None = None
        self._autocast = AutocastState("cpu", False, torch.bfloat16)  # settings in the trace
        self._fits_others = True  # whether the stage does what the model does in other settings too
        # Buffers of the model: the model's module, their name, and the stage's module.
        self._origins: list[tuple[nn.Module, str, nn.Module]] = []

    def forward(self, value: Tree) -> Tree:
        mode = 0 if self.training else 1
        part = self._parts[mode]
        self._check_dtypes()
        if not self._fits_others:
            self._check_autocast(AutocastState.now(self._autocast.device_type))
        carried = self._entered(value)
        carried += [carried[place].shape[dim] for place, dim in part.sizes]
        arguments = [
            carried[source.index] if owner is None else getattr(*owner)
            for source, owner in zip(part.arguments, self._weights[mode], strict=True)
        ]
        made = part.graph(*arguments)
        values = {"in": carried, "made": made if isinstance(made, (tuple, list)) else (made,)}
        outputs = [values[s.kind][s.index] if s.kind in values else s.constant for s in part.outputs]
        if part.is_last:
            return pytree.tree_map(outputs.__getitem__, part.returns)
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    def _check_input(self, value: Tree, *, whole: bool) -> None:
        """Refuse an input of another form, shape or dtype than the example's.

        Args:
            value: the input of the model, with any number of samples.
            whole: whether it is a mini-batch that will be cut.

        Raises:
            TypeError, ValueError: it does not fit, with what to change.
        """
        self._entered(value, whole=whole)

    def _entered(self, value: Tree, *, whole: bool = False) -> list[Any]:
        """The values that come in, checked against the example in the first stage; a ``whole`` mini-batch is cut yet."""
        example = self._example
        if example is None:
            return list(value) if isinstance(value, (tuple, list)) else [value]
        if isinstance(example.value, dict) and isinstance(value, dict) and value.keys() == example.value.keys():
            value = {name: value[name] for name in example.value}
        leaves, spec = pytree.tree_flatten(value)
        if spec != example.spec:
            raise ValueError(
                f"{self._label} takes {_described(example.value)}, as the example of dtrp.split, and got {_described(value)}; "
                "pass the same, or split with another example"
            )
        for leaf, traced, path in zip(leaves, example.leaves, example.paths, strict=True):
            where = path.replace("example", "x", 1)
            if not isinstance(traced, Tensor):
                if leaf != traced or type(leaf) is not type(traced):
                    raise ValueError(
                        f"{where} is {leaf!r}, and the model was traced with {traced!r}; split with another example"
                    )
            elif not isinstance(leaf, Tensor):
                raise TypeError(f"{where} is a {type(leaf).__name__}, and the model was traced with a tensor")
            elif leaf.dtype != traced.dtype:
                raise TypeError(
                    f"{where} is {leaf.dtype}, and the model was traced with {traced.dtype}; convert it, or split with an example "
                    "of that dtype"
                )
            elif leaf.dim() != traced.dim():
                raise ValueError(
                    f"{where} has shape {tuple(leaf.shape)}, and the model was traced with {tuple(traced.shape)}; pass as many "
                    "dimensions, or split with another example"
                )
        for sizes in self._sizes:
            sizes.check(leaves, whole=whole)
        return leaves

    def _check_dtypes(self) -> None:
        for module, name, dtype in self._dtypes:
            if getattr(module, name).dtype != dtype:
                raise TypeError(
                    f"{self._label} was traced in {dtype}, and its {name} is {getattr(module, name).dtype} now; convert the "
                    "model first, then call dtrp.split"
                )

    def _check_autocast(self, now: AutocastState) -> None:
        if now != self._autocast and (now.enabled or self._autocast.enabled):
            raise TypeError(
                f"{self._label} runs {_in_words(now)}, and the model was traced {_in_words(self._autocast)}: its forward asks for "
                "dtypes, as in x.to(y.dtype), which are others there; call dtrp.split, step and infer in the same torch.autocast"
            )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TracedStage:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for original, name, module in self._origins:
            buffer_dict(original)[name] = buffer_dict(module)[name]
        now = next((t.device for t in [*self.parameters(), *self.buffers()]), None)
        if now is not None and self._device is not None and now != self._device:
            for graph in (graph for part in self._parts for graph in part.graph.modules()):
                if isinstance(graph, fx.GraphModule):
                    _move(graph, self._device, now)
            self._device = now
            if now.type != "meta":
                self._autocast = self._autocast._replace(device_type=now.type)
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_origins": [], "_leader": ()}  # a copy has no part in the model

    def extra_repr(self) -> str:
        """Shown in ``repr``."""
        return self._label


def _described(value: Tree) -> str:
    if isinstance(value, dict):
        return f"a dict of {', '.join(map(str, value))}"
    return f"a {type(value).__name__}" + (f" of {len(value)}" if isinstance(value, (tuple, list)) else "")


def _in_words(autocast: AutocastState) -> str:
    return f"in autocast to {autocast.dtype}" if autocast.enabled else "without autocast"


def _move(graph: fx.GraphModule, old: torch.device, new: torch.device) -> None:
    """Let operations that make tensors on the old device make them on the new one, and move autocast regions to it."""

    def moved(value: Any) -> Any:
        if node.target is run_within and value == old.type:
            return new.type
        return new if isinstance(value, torch.device) and value == old else value

    for node in graph.graph.nodes:
        node.args = fx.node.map_aggregate(node.args, moved)
        node.kwargs = fx.node.map_aggregate(node.kwargs, moved)
    graph.recompile()


def trace_into_stages(
    model: nn.Module,
    example: Tree,
    *,
    num_stages: int | None = None,
    points: Sequence[str] | None = None,
    dynamic_shapes: Any = None,
) -> tuple[list[TracedStage], list[str], list[str]]:
    """Trace a model and cut it into stages.

    Args:
        model: any module.
        example: what it is called with.
        num_stages: K, to choose the points by; or
        points: names of the submodules where stages 1..K-1 begin.
        dynamic_shapes: what varies beside the number of samples, as in `dtrp.split`.

    Returns:
        The stages; the names of the submodules where stages 1..K-1 begin; and warnings: of work that is divided
        unevenly, and of what the stages will not store on the model's modules.

    Raises:
        TypeError, ValueError: an example that does not fit, a model that cannot be traced or cut so.
    """
    checked = Example.from_value(example)
    _check_hooks(model)
    train = export(model, checked, varying(checked, dynamic_shapes, model), training=True)
    traced = [train, export(model, checked, train.varying, training=False)]
    graphs = [trace.graph for trace in traced]
    _name_apart(*graphs)
    weights, is_chosen = Weights(model, traced), points is None
    if points is None:
        assert num_stages is not None
        points = choose_points(model, num_stages, weights, *graphs) if num_stages > 1 else []
    places = check_points(model, points, *graphs)
    divisions = [assign(graph, places, weights) for graph in graphs]
    uneven = uneven_work(divisions[0], len(points) + 1) if is_chosen else ""
    senders = weights.senders(divisions)
    (train_parts, train_uses), (eval_parts, eval_uses) = (
        divide(trace, len(points) + 1, stages, senders) for trace, stages in zip(traced, divisions, strict=True)
    )
    stages = [
        TracedStage(f"stage {k} (from {beginning})", (train_parts[k], eval_parts[k]))
        for k, beginning in enumerate(["the beginning", *points])
    ]
    for stage in stages:
        stage._written = weights.written
    _give_tensors(model, stages, [*train_uses, *eval_uses], graphs)
    let_follow(stages, model)
    stages[0]._example = checked.without_data()
    stages[0]._sizes = [trace.sizes for trace in traced]
    verifier = Verifier(model, stages, checked, traced, weights.written)
    try:
        _verify(verifier, stages, reads_dtypes=any(t.reads_dtypes for t in traced))
    except ValueError as error:
        written = weights.written_apart(model, divisions)
        raise (ValueError(written) if written else error) from error
    stores = _stores_warning(verifier.stored, [trace.stored for trace in traced])
    return stages, list(points), [warning for warning in (uneven, stores) if warning]


def _stores_warning(stored: Iterable[str], in_traces: Sequence[Mapping[str, bool]]) -> str:
    """The warning of attributes that the forward stores; ``in_traces`` tells which of them require a gradient."""
    if not stored:
        return ""
    terms = [name for name in stored if any(trace.get(name) for trace in in_traces)]
    way = f"Pass a term of the loss ({_listed(terms, 3)}) to dtrp.add_loss in the forward. " if terms else ""
    return (
        f"the forward stores {_listed(list(stored), 20)}, and the stages that dtrp.split made of it do not: these attributes "
        f"stay as they are. {way}Keep other values in a registered buffer, or divide the model by hand: pass a list of modules, "
        "one a stage"
    )


def _listed(names: Sequence[str], most: int) -> str:
    more = [f"and {len(names) - most} more"] if len(names) > most else []
    return ", ".join([*names[:most], *more])


def _check_hooks(model: nn.Module) -> None:
    """Refuse hooks, which the stages would not call, but for forward hooks of torch and transformers."""
    hooked = [
        (f"module {name!r}" if name else "the model", forward_hooks(member), module_backward_hooks(member))
        for name, member in model.named_modules()
    ]
    for owner, forward, backward in [*hooked, ("every module (torch.nn.modules.module)", *global_hooks())]:
        if backward:
            raise ValueError(
                f"{owner} has a backward hook, which a trace does not keep; remove it, and register it on the stages that "
                "dtrp.split returns, or pass a list of modules, one a stage"
            )
        for _, hook in forward:
            if not _is_traced_right(hook):
                name = getattr(hook, "__qualname__", type(hook).__name__)
                raise ValueError(
                    f"{owner} has a forward hook, {name}, which would run in the trace alone and in no step; remove it, and do its "
                    "work in the module's forward (dtrp.add_loss for a term of the loss), or register it on the stages that "
                    "dtrp.split returns, or pass a list of modules, one a stage"
                )


def _is_traced_right(hook: Any) -> bool:
    """Whether a forward hook is of torch (`weight_norm`, pruning) or transformers, which do their work in the trace."""
    while isinstance(hook, functools.partial):
        hook = hook.func
    return str(hook.__module__).partition(".")[0] in ("torch", "transformers")


def _verify(verifier: Verifier, stages: Sequence[TracedStage], *, reads_dtypes: bool) -> None:
    """Refuse stages that differ from the model, and let them refuse autocast settings in which they would differ."""
    verifier.check()
    traced, fits_others = AutocastState.now(verifier.device_type), True
    if reads_dtypes:
        with traced._replace(enabled=not traced.enabled).region():
            fits_others = verifier.agree_exactly()
    for stage in stages:
        stage._autocast, stage._fits_others = traced, fits_others


def _give_tensors(
    model: nn.Module, stages: Sequence[TracedStage], uses: Sequence[Use], graphs: Sequence[fx.GraphModule]
) -> None:
    """Give each parameter and buffer, under its name in the model, to the stages that use it."""
    tensors = named_tensors(model)
    names: dict[int, list[str]] = {}
    for name, tensor in tensors.items():
        names.setdefault(id(tensor), []).append(name)
    local_names: list[dict[int, str]] = [{} for _ in stages]  # a name of each tensor in each stage
    placed: dict[str, int] = {}  # the first stage that has each name

    def place(stage: int, name: str) -> None:
        placed.setdefault(name, stage)
        local_names[stage].setdefault(id(tensors[name]), name)
        _register(model, stages[stage], name, tensors[name])

    of_model = [use for use in uses if use.name in tensors]
    for use in of_model:
        for name in names[id(tensors[use.name])]:  # of tied names, those of the submodules that read it in this stage
            if name.rpartition(".")[0] in use.readers and name not in placed:
                place(use.stage, name)
    for use in of_model:
        tensor = tensors[use.name]
        if id(tensor) not in local_names[use.stage]:
            place(use.stage, next((name for name in names[id(tensor)] if name not in placed), use.name))
    # A tensor that no graph uses goes where its tied name or its neighbour is.
    stage = 0
    for name, tensor in tensors.items():
        if name not in placed:
            place(next((placed[tied] for tied in names[id(tensor)] if tied in placed), stage), name)
        stage = placed[name]
    for use in uses:
        name = use.name.replace(".", "_")
        if use.name not in tensors and name not in buffer_dict(stages[use.stage]):
            constant = next(t for graph in graphs if (t := _find(graph, use.name)) is not None)
            stages[use.stage].register_buffer(name, constant.detach(), persistent=False)
    for owner, local in zip(stages, local_names, strict=True):
        _put_in_order(owner, model)
        for weights, part in zip(owner._weights, owner._parts, strict=True):
            weights.extend(_owner(owner, source, tensors, local) for source in part.arguments)
        for member in owner.modules():
            for name, held in [*parameter_dict(member).items(), *buffer_dict(member).items()]:
                if held is not None:
                    owner._device = owner._device or held.device
                    if held.is_floating_point() or held.is_complex():
                        owner._dtypes.append((member, name, held.dtype))


def _put_in_order(stage: nn.Module, model: nn.Module) -> None:
    """Put members in the order of the model's: a tensor goes by the first of its names."""
    for dict_of in (module_dict, parameter_dict, buffer_dict):
        members: dict[str, Any] = dict_of(stage)
        for name in dict_of(model):
            if name in members:
                members[name] = members.pop(name)
    for name, member in stage.named_children():
        original = module_dict(model).get(name)
        if original is not None:
            _put_in_order(member, original)


def _owner(
    stage: TracedStage, source: Source, tensors: Mapping[str, Tensor], local_names: Mapping[int, str]
) -> Owner | None:
    """The module of the stage that holds a weight, and the weight's name in it; None where the source is no weight."""
    if source.kind != "weight":
        return None
    tensor = tensors.get(source.name)
    path = source.name.replace(".", "_") if tensor is None else local_names[id(tensor)]
    prefix, _, member = path.rpartition(".")
    return stage.get_submodule(prefix), member


def _name_apart(train: fx.GraphModule, evaluation: fx.GraphModule) -> None:
    """Rename constant tensors of the evaluation that have the name of another tensor in the training."""
    for node in evaluation.graph.find_nodes(op="get_attr"):
        name = str(node.target)
        constant, other = attribute(evaluation, name), _find(train, name)
        differ = other is not None and constant is not other and isinstance(constant, Tensor)
        if differ and not torch.equal(constant, other):
            node.target = f"{name.replace('.', '_')}_evaluation"
            setattr(evaluation, node.target, constant)


def _find(graph: fx.GraphModule, name: str) -> Any:
    """What the traced graph calls ``name``, or None."""
    with suppress(AttributeError):
        return attribute(graph, name)
    return None


def _register(model: nn.Module, stage: TracedStage, name: str, tensor: Tensor) -> None:
    """Give a stage a parameter or buffer of the model, under its name in the model."""
    prefix, _, attribute = name.rpartition(".")
    module: nn.Module = stage
    for part in prefix.split(".") if prefix else ():
        if part not in module_dict(module):
            module.add_module(part, nn.Module())
        module = cast(nn.Module, module_dict(module)[part])
    if isinstance(tensor, nn.Parameter):
        module.register_parameter(attribute, tensor)
    else:
        original = model.get_submodule(prefix)
        module.register_buffer(
            attribute, tensor, persistent=attribute not in torch_private.non_persistent_buffers(original)
        )
        stage._origins.append((original, attribute, module))
