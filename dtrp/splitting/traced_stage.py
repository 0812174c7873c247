"""A part of a traced model as a module: one value in, one value out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from ..tensors.autocast import AutocastState
from ..tensors.module_mode import Follower, let_follow
from .divide import Part, Use, divide
from .export import Example, attribute, export
from .points import check_points, choose_points
from .regions import run_within
from .verify import Verifier

Owner = tuple[nn.Module, str]  # a module that holds a tensor, and its name there


class TracedStage(Follower):
    """A contiguous part of a model, with the model's own parameters and buffers under the model's own names.

    It takes what the stage before returns, and returns what the next one takes: a tensor, or a tuple of tensors and
    whole numbers. The first takes what the example was, with any number of samples; the last returns what the model does.
    In train and in eval mode it runs the graph that was traced in that mode, and it is in the model's mode (`Follower`).

    Args:
        label: how errors name it.
        parts: the graphs, in train and in eval mode.
    """

    def __init__(self, label: str, parts: tuple[Part, Part]) -> None:
        super().__init__()
        self._label = label
        self._parts = parts
        self._weights: tuple[list[Owner | None], list[Owner | None]] = ([], [])  # of each argument, in either mode
        self._dtypes: list[tuple[nn.Module, str, torch.dtype]] = []
        self._example: Example | None = None  # of the first stage
        self._shapes: list[tuple[torch.Size, torch.dtype, int] | None] = []  # and the first dimension that is fixed
        self._device: torch.device | None = None
        self._autocast = AutocastState("cpu", False, torch.bfloat16)  # in which it was traced
        self._fits_others = True  # whether it does what the model does in others too
        self._origins: list[
            tuple[nn.Module, str, nn.Module]
        ] = []  # buffers of the model: where they were, and are here

    def forward(self, value: Any) -> Any:
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
        if not isinstance(made, (tuple, list)):
            made = (made,)
        outputs = [
            made[source.index]
            if source.kind == "made"
            else carried[source.index]
            if source.kind == "in"
            else source.constant
            if source.kind == "constant"
            else None
            for source in part.outputs
        ]
        if part.is_last:
            return pytree.tree_map(outputs.__getitem__, part.returns)
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    def _entered(self, value: Any) -> list[Any]:
        if self._example is None:
            return list(value) if isinstance(value, (tuple, list)) else [value]
        example = self._example
        if isinstance(example.value, dict) and isinstance(value, dict) and value.keys() == example.value.keys():
            value = {name: value[name] for name in example.value}
        leaves, spec = pytree.tree_flatten(value)
        if spec != example.spec:
            raise ValueError(
                f"{self._label} takes {_described(example.value)}, as the example of dtrp.split, and got {_described(value)}; "
                "pass the same, or split with another example"
            )
        for leaf, want, path, wanted in zip(leaves, example.leaves, example.paths, self._shapes, strict=True):
            where = path.replace("example", "x", 1)
            if wanted is None:
                if leaf != want or type(leaf) is not type(want):
                    raise ValueError(
                        f"{where} is {leaf!r}, and the model was traced with {want!r}; split with another example"
                    )
            elif not isinstance(leaf, Tensor):
                raise TypeError(f"{where} is a {type(leaf).__name__}, and the model was traced with a tensor")
            elif leaf.dtype != wanted[1]:
                raise TypeError(
                    f"{where} is {leaf.dtype}, and the model was traced with {wanted[1]}; convert it, or split with an example "
                    "of that dtype"
                )
            elif leaf.shape[wanted[2] :] != wanted[0][wanted[2] :] or leaf.dim() != len(wanted[0]):
                raise ValueError(
                    f"{where} has shape {tuple(leaf.shape)}, and the model was traced with {tuple(wanted[0])}; only the number "
                    "of samples may differ: pad it, or split with another example"
                )
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
        for model_part, name, module in self._origins:
            model_part._buffers[name] = module._buffers[name]
        now = next((t.device for t in [*self.parameters(), *self.buffers()]), None)
        if now is not None and self._device is not None and now != self._device:
            for part in self._parts:
                for graph in part.graph.modules():
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


def _described(value: Any) -> str:
    if isinstance(value, dict):
        return f"a dict of {', '.join(map(str, value))}"
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of {len(value)}"
    return f"a {type(value).__name__}"


def _in_words(autocast: AutocastState) -> str:
    return f"in autocast to {autocast.dtype}" if autocast.enabled else "without autocast"


def _move(graph: fx.GraphModule, old: torch.device, new: torch.device) -> None:
    """Operations that make tensors on a device make them on the other one, and autocast regions are for it."""

    def moved(value: Any) -> Any:
        if node.target is run_within and value == old.type:
            return new.type
        return new if isinstance(value, torch.device) and value == old else value

    for node in graph.graph.nodes:
        node.args = fx.node.map_aggregate(node.args, moved)
        node.kwargs = fx.node.map_aggregate(node.kwargs, moved)
    graph.recompile()


def trace_into_stages(
    model: nn.Module, example: Any, *, num_stages: int | None = None, points: Sequence[str] | None = None
) -> tuple[list[TracedStage], list[str]]:
    """The stages of a traced model, and the submodules where they begin.

    Args:
        model: any module.
        example: what it is called with.
        num_stages: K, to choose the points by; or
        points: where stages 1..K-1 begin.

    Raises:
        TypeError, ValueError: an example that does not fit, a model that cannot be traced or cut so.
    """
    checked = Example.of(example)
    _check_hooks(model)
    traced = [export(model, checked, training=training) for training in (True, False)]
    graphs = [one.graph for one in traced]
    _name_apart(*graphs)
    if points is None:
        assert num_stages is not None
        points = choose_points(model, num_stages, *graphs) if num_stages > 1 else []
    points = check_points(model, points, *graphs)
    divided = [divide(one, points) for one in traced]
    bounds = ["the beginning", *points]
    stages = [
        TracedStage(f"stage {k} (from {bounds[k]})", (divided[0][0][k], divided[1][0][k]))
        for k in range(len(points) + 1)
    ]
    _give_tensors(model, stages, [use for _, uses in divided for use in uses], graphs)
    let_follow(stages, model)
    first = stages[0]
    first._example = checked
    first._shapes = [
        (leaf.shape, leaf.dtype, int(checked.counts(leaf))) if isinstance(leaf, Tensor) else None
        for leaf in checked.leaves
    ]
    _verify(Verifier(model, stages, checked, traced), stages, reads_dtypes=any(one.reads_dtypes for one in traced))
    # Shapes are enough of its tensors.
    empty = [torch.empty(0, dtype=leaf.dtype) if isinstance(leaf, Tensor) else leaf for leaf in checked.leaves]
    value = pytree.tree_unflatten(empty, checked.spec)
    first._example = Example(value, tuple(empty), checked.paths, checked.samples)
    return stages, list(points)


def _check_hooks(model: nn.Module) -> None:
    for name, member in model.named_modules():
        if member._backward_hooks or member._backward_pre_hooks:
            raise ValueError(
                f"{f'module {name!r}' if name else 'the model'} has a backward hook, which a trace does not keep; remove it, and "
                "register it on the stages that dtrp.split returns, or pass a list of modules, one a stage"
            )


def _verify(verifier: Verifier, stages: Sequence[TracedStage], *, reads_dtypes: bool) -> None:
    """Refuse stages that do something else than the model, and let them refuse autocast settings in which they would."""
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
    """Each parameter and buffer to the stage that uses it, under its name in the model."""
    own: dict[str, Tensor] = dict(
        [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    )
    names: dict[int, list[str]] = {}
    for name, tensor in own.items():
        names.setdefault(id(tensor), []).append(name)
    here: list[dict[int, str]] = [{} for _ in stages]  # a name of each tensor in each stage
    placed: dict[str, int] = {}
    constants: list[tuple[int, str, Tensor]] = []

    def place(stage: int, name: str, tensor: Tensor) -> None:
        placed.setdefault(name, stage)
        here[stage].setdefault(id(tensor), name)
        _register(model, stages[stage], name, tensor)

    for use in uses:
        used = own.get(use.name)
        if used is None:
            constant = next(attribute(graph, use.name) for graph in graphs if _has(graph, use.name))
            constants.append((use.stage, use.name.replace(".", "_"), constant))
            continue
        for name in names[id(used)]:  # of tied names, those of the submodules that read it in this stage
            if name.rpartition(".")[0] in use.readers and name not in placed:
                place(use.stage, name, used)
    for use in uses:
        used = own.get(use.name)
        if used is not None and id(used) not in here[use.stage]:
            free = [name for name in names[id(used)] if name not in placed]
            place(use.stage, free[0] if free else use.name, used)
    # What no graph uses goes where its tied name or its neighbour is.
    stage = 0
    for name, tensor in own.items():
        if name not in placed:
            tied = [placed[other] for other in names[id(tensor)] if other in placed]
            place(tied[0] if tied else stage, name, tensor)
        stage = placed[name]
    for stage, name, tensor in constants:
        if name not in stages[stage]._buffers:
            stages[stage].register_buffer(name, tensor.detach(), persistent=False)
    for owner in stages:
        _put_in_order(owner, model)
    for index, owner in enumerate(stages):
        for mode, part in enumerate(owner._parts):
            owner._weights[mode].extend(
                _owner(owner, source.name, own, here[index]) if source.kind == "weight" else None
                for source in part.arguments
            )
        for member in owner.modules():
            for name, held in [*member._parameters.items(), *member._buffers.items()]:
                if held is None:
                    continue
                owner._device = owner._device or held.device
                if held.is_floating_point() or held.is_complex():
                    owner._dtypes.append((member, name, held.dtype))


def _put_in_order(own: nn.Module, like: nn.Module) -> None:
    """Members in the order of the model's, by which the first of several names of a tensor is the one it goes by."""
    pairs: tuple[tuple[dict[str, Any], dict[str, Any]], ...] = (
        (own._modules, like._modules),
        (own._parameters, like._parameters),
        (own._buffers, like._buffers),
    )
    for members, order in pairs:
        for name in order:
            if name in members:
                members[name] = members.pop(name)
    for name, member in own._modules.items():
        original = like._modules.get(name)
        if member is not None and original is not None:
            _put_in_order(member, original)


def _owner(stage: TracedStage, name: str, own: dict[str, Tensor], here: dict[int, str]) -> Owner:
    """The module of the stage that holds what the graph calls ``name``, and what it is called there."""
    tensor = own.get(name)
    path = name.replace(".", "_") if tensor is None else here[id(tensor)]
    prefix, _, member = path.rpartition(".")
    return stage.get_submodule(prefix), member


def _name_apart(train: fx.GraphModule, evaluation: fx.GraphModule) -> None:
    """A constant tensor of the evaluation that goes by the name of another in the training gets a name of its own."""
    for node in evaluation.graph.nodes:
        name = str(node.target)
        if node.op != "get_attr" or not _has(train, name):
            continue
        here, there = attribute(evaluation, name), attribute(train, name)
        if here is not there and isinstance(here, Tensor) and not torch.equal(here, there):
            node.target = f"{name.replace('.', '_')}_evaluation"
            setattr(evaluation, node.target, here)


def _has(module: Any, name: str) -> bool:
    try:
        attribute(module, name)
    except AttributeError:
        return False
    return True


def _register(model: nn.Module, stage: TracedStage, name: str, tensor: Tensor) -> None:
    prefix, _, attribute = name.rpartition(".")
    module: nn.Module = stage
    for part in prefix.split(".") if prefix else ():
        if part not in module._modules:
            module.add_module(part, nn.Module())
        child = module._modules[part]
        assert child is not None
        module = child
    if isinstance(tensor, nn.Parameter):
        module.register_parameter(attribute, tensor)
        return
    original = model.get_submodule(prefix)
    module.register_buffer(attribute, tensor, persistent=attribute not in original._non_persistent_buffers_set)
    stage._origins.append((original, attribute, module))
