"""What torch.export would not keep of a forward: regions in which `torch.no_grad`, `torch.autocast` and the like hold,
and the backwards of `torch.autograd.Function`s.

It would make one operation of each region. The passes that do so are left out here, so that marks remain where regions
begin and end, and every operation records its region: a stage may then begin inside of a region, and each stage runs its
operations in their regions again.

It would record the operations in the forward of a Function, and compute their gradients. Here a Function is one
operation of the trace, and each stage applies the Function itself.
"""

from __future__ import annotations

import importlib
import itertools
import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.autograd.function import FunctionCtx
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing
from torch.fx.passes.split_module import split_module
from torch.utils.checkpoint import CheckpointFunction

from ..tensors.torch_private import (
    SET_GRAD_ENABLED,
    enter_autocast,
    exit_autocast,
    pytree,
    region_passes,
    uncompiled,
    write_count,
)

Autocast = tuple[str, torch.dtype, bool]  # type of device, dtype, whether it is enabled


@dataclass(frozen=True)
class Region:
    """The region of an operation.

    Args:
        has_grad: whether autograd records there.
        autocasts: the enclosing `torch.autocast` contexts, outermost first.
    """

    has_grad: bool = True
    autocasts: tuple[Autocast, ...] = ()


_PLAIN = Region()


@contextmanager
def replaced(owner: Any, **members: Any) -> Iterator[None]:
    """Context in which ``owner`` has these members in place of its own ones."""
    before = {name: vars(owner).get(name, getattr(owner, name)) for name in members}
    try:
        for name, member in members.items():
            setattr(owner, name, member)
        yield
    finally:
        for name, member in before.items():
            setattr(owner, name, member)


@contextmanager
def marked() -> Iterator[None]:
    """Context in which torch.export leaves the marks of regions in the graph.

    It leaves none of inference mode, which is therefore traced as the mode without gradients.
    """

    def enter(mode: Any) -> None:
        mode._had_grad = torch.is_grad_enabled()
        torch.set_grad_enabled(not mode.mode)

    def leave(mode: Any, *error: object) -> None:
        torch.set_grad_enabled(mode._had_grad)

    def unchanged(graph: fx.GraphModule, signature: Any) -> tuple[fx.GraphModule, Any]:
        return graph, signature

    with ExitStack() as stack:
        stack.enter_context(replaced(torch.inference_mode, __enter__=enter, __exit__=leave))
        for module in region_passes():
            stack.enter_context(replaced(module, **{module.__name__.rpartition(".")[2]: unchanged}))
        yield


def record_regions(graph: fx.Graph) -> None:
    """Record the region of each operation in its ``meta``, and remove the marks."""
    has_grad = True
    autocasts: dict[fx.Node, Autocast] = {}  # by the marks where they begin
    marks = []
    for node in graph.nodes:
        if node.target is SET_GRAD_ENABLED:
            has_grad = bool(node.args[0])
        elif node.target is enter_autocast:
            autocasts[node] = node.args[:3]
        elif node.target is exit_autocast:
            del autocasts[node.args[0]]
        else:
            node.meta["region"] = Region(has_grad, tuple(autocasts.values()))
            continue
        marks.append(node)
    for node in reversed(marks):
        graph.erase_node(node)


def in_regions(graph: fx.GraphModule) -> fx.GraphModule:
    """The graph with the operations of each region in a graph of their own, which `run_within` runs."""
    nodes = [node for node in graph.graph.nodes if node.op not in ("placeholder", "get_attr", "output")]
    runs = itertools.groupby(nodes, lambda node: node.meta.get("region", _PLAIN))
    groups = [(region, list(operations)) for region, operations in runs]
    if all(region == _PLAIN for region, _ in groups):
        return graph
    places = {node: place for place, (_, operations) in enumerate(groups) for node in operations}
    whole = split_module(graph, graph, places.__getitem__, keep_original_order=True)
    for node in whole.graph.find_nodes(op="call_module"):
        region, _ = groups[int(str(node.target).removeprefix("submod_"))]
        if region != _PLAIN:
            with whole.graph.inserting_before(node):
                inner = whole.graph.get_attr(node.target)
                arguments = (region.has_grad, region.autocasts, inner, *node.args)
                node.replace_all_uses_with(whole.graph.call_function(run_within, arguments))
            whole.graph.erase_node(node)
    whole.recompile()
    return whole


def run_within(has_grad: bool, autocasts: tuple[Autocast, ...], part: fx.GraphModule, *arguments: Any) -> Any:
    """Run a part in its region."""
    if autocasts:  # not an ExitStack, which torch.compile may not know
        with torch.autocast(*autocasts[0]):
            return run_within(has_grad, autocasts[1:], part, *arguments)
    with torch.no_grad() if not has_grad else nullcontext():
        return part(*arguments)


# -- Functions ------------------------------------------------------------------------------------

_PLAIN_ARGUMENTS = (
    type(None),
    bool,
    int,
    float,
    complex,
    str,
    torch.dtype,
    torch.device,
    torch.layout,
    torch.memory_format,
)

# The operation that stands for a Function while the model is traced: ``call`` is its place among the calls of the trace.
_LIBRARY = torch.library.Library("dtrp", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define("function(Tensor[] tensors, SymInt[] sizes, int call) -> Tensor[]")  # type: ignore[no-untyped-call]
_FUNCTION = torch.ops.dtrp.function.default
_functions: dict[str, type[torch.autograd.Function]] = {}  # Functions that cannot be imported, by name and number


@dataclass
class Call:
    """A call of a Function in a trace.

    Args:
        function: the Function.
        leaves: leaves of its arguments; None for tensors and sizes.
        places: places among them of tensors, and of sizes.
        spec: the tree of its arguments.
        outputs: what its forward returned, without data: its tensors.
    """

    function: type[torch.autograd.Function]
    leaves: list[Any]
    places: tuple[list[int], list[int]]
    spec: pytree.TreeSpec
    outputs: list[Tensor]

    def arguments(self, tensors: Sequence[Any], sizes: Sequence[Any]) -> tuple[Any, ...]:
        """The arguments, with these tensors and sizes."""
        leaves = list(self.leaves)
        for places, values in zip(self.places, (tensors, sizes), strict=True):
            for place, value in zip(places, values, strict=True):
                leaves[place] = value
        return tuple(pytree.tree_unflatten(leaves, self.spec))


_calls: list[Call] = []  # of the present trace


@torch.library.register_fake("dtrp::function", lib=_LIBRARY)  # type: ignore[untyped-decorator]
def _without_data(tensors: Sequence[Tensor], sizes: Sequence[int], call: int) -> list[Tensor]:
    """What a Function returns in a trace: tensors of their own, of the sizes of its outputs."""
    return [t.new_empty_strided(t.shape, t.stride()) for t in _calls[call].outputs]


_applying: list[Callable[..., Any]] = []  # what stands for `torch.autograd.Function.apply` in the present trace


class _Applying:
    def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        """Code for `torch.autograd.Function.apply`, with the free variable that it has."""
        from dtrp.splitting.regions import _applying

        __class__  # type: ignore[name-defined]  # noqa: B018
        return _applying[-1](cls, *args, **kwargs)


@contextmanager
def functions_kept() -> Iterator[list[Call]]:
    """Context of a trace in which every Function that is applied becomes one operation, which `apply_in_stages` gets.

    Returns:
        The calls, to be given to `apply_in_stages`.
    """
    nested = False

    def applied(cls: type[torch.autograd.Function], *args: Any, **kwargs: Any) -> Any:
        nonlocal nested
        if cls is CheckpointFunction:  # its backward is that of what it runs
            run, _, *inputs = args
            return run(*inputs)
        if nested:
            return _forward(cls, args, kwargs)
        args = pytree.tree_map_only(torch.Size, tuple, args)  # a shape is a leaf, and has sizes that vary
        leaves, spec = pytree.tree_flatten(args)
        _check_arguments(cls, leaves, kwargs)
        tensors = [place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        sizes = [place for place, leaf in enumerate(leaves) if isinstance(leaf, torch.SymInt)]
        rest = [None if place in (*tensors, *sizes) else leaf for place, leaf in enumerate(leaves)]
        nested = True
        try:
            with disable_proxy_modes_tracing():
                returned = _forward(cls, args, kwargs)
        finally:
            nested = False
        entries = returned if isinstance(returned, (tuple, list)) else [returned]
        outputs = [entry for entry in entries if isinstance(entry, Tensor)]
        if not all(isinstance(entry, (Tensor, *_PLAIN_ARGUMENTS)) for entry in entries):
            raise TypeError(
                f"{cls.__name__}, a torch.autograd.Function, returns something else than tensors and constants"
            )
        _calls.append(Call(cls, rest, (tensors, sizes), spec, outputs))
        made = iter(_FUNCTION([leaves[p] for p in tensors], [leaves[p] for p in sizes], len(_calls) - 1))
        result = [next(made) if isinstance(entry, Tensor) else entry for entry in entries]
        return tuple(result) if isinstance(returned, (tuple, list)) else result[0]

    _calls.clear()
    _applying.append(applied)
    try:
        with _applied_otherwise():
            yield _calls
    finally:
        _applying.pop()


@contextmanager
def _applied_otherwise() -> Iterator[None]:
    """Context in which `torch.autograd.Function.apply` is the last of ``_applying``."""
    method = getattr(vars(torch.autograd.Function)["apply"], "__func__", None)
    if method is None:  # torch 2.15: it is not of Python
        with replaced(torch.autograd.Function, apply=classmethod(_applying[-1])), _forwards_applied():
            yield
        return
    code = method.__code__
    try:
        # Not another method: many keep the bound one, ``gelu = Gelu.apply``.
        method.__code__ = _Applying.apply.__code__
        yield
    finally:
        method.__code__ = code


@contextmanager
def _forwards_applied() -> Iterator[None]:
    """Context in which an ``apply`` that was bound before, and is not of Python, calls the last of ``_applying``.

    It asks the Function for its forward. What it notes for a backward beside that no trace sees.
    """
    meta: Any = type(torch.autograd.Function)

    def get(cls: Any, name: str) -> Any:
        if name != "forward":
            return type.__getattribute__(cls, name)
        has_context = cls.setup_context is torch.autograd.Function.setup_context
        return lambda *args: _applying[-1](cls, *args[has_context:])

    meta.__getattribute__ = get
    try:
        yield
    finally:
        del meta.__getattribute__


def _check_arguments(cls: type[torch.autograd.Function], leaves: Sequence[Any], kwargs: dict[str, Any]) -> None:
    for leaf in [*leaves, *kwargs.values()]:
        if kwargs or not isinstance(leaf, (Tensor, torch.SymInt, *_PLAIN_ARGUMENTS)):
            raise TypeError(
                f"{cls.__name__}, a torch.autograd.Function, is given a {type(leaf).__name__}; a trace keeps one of "
                "tensors, numbers, text, dtypes and devices, in tuples, lists and dicts"
            )


def _forward(cls: type[torch.autograd.Function], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """What the forward of a Function returns; without gradients."""
    context = FunctionCtx()
    context.needs_input_grad = tuple(isinstance(arg, Tensor) and arg.requires_grad for arg in args)  # type: ignore[attr-defined]
    inputs = pytree.tree_map_only(Tensor, Tensor.detach, tuple(args))
    writes = [write_count(t) for t in pytree.tree_leaves(inputs) if isinstance(t, Tensor)]
    forward = type.__getattribute__(cls, "forward")  # that of the class, also within `_forwards_applied`
    if cls.setup_context is torch.autograd.Function.setup_context:
        output = forward(context, *inputs, **kwargs)
    else:
        output = forward(*inputs, **kwargs)
        cls.setup_context(context, inputs, output)
    if writes != [write_count(t) for t in pytree.tree_leaves(inputs) if isinstance(t, Tensor)]:
        raise TypeError(
            f"{cls.__name__}, a torch.autograd.Function, writes its input in place, which a trace does not keep"
        )
    return output


def apply_in_stages(graph: fx.Graph, calls: Sequence[Call]) -> None:
    """Let the operations that stand for Functions apply them."""
    for node in list(graph.nodes):
        if node.target is _FUNCTION:
            tensors, sizes, index = node.args
            call = calls[index]
            node.target, node.args = apply_function, (_name_of(call.function), *call.arguments(tensors, sizes))


def _name_of(function: type[torch.autograd.Function]) -> str:
    """The name by which `apply_function` finds a Function: where it can be imported from, or with a number."""
    name = f"{function.__module__}:{function.__qualname__}"
    try:
        if _imported(name) is function:
            return name
    except (ImportError, AttributeError):
        pass
    known = next((number for number, other in _functions.items() if other is function), f"{name}#{len(_functions)}")
    _functions[known] = function
    return known


def _imported(name: str) -> Any:
    module, _, path = name.partition(":")
    return operator.attrgetter(path)(importlib.import_module(module))


@uncompiled
def apply_function(name: str, *args: Any) -> tuple[Tensor, ...]:
    """The tensors that a Function returns."""
    function = _functions[name] if name in _functions else _imported(name)
    result = function.apply(*args)
    return tuple(t for t in result if isinstance(t, Tensor)) if isinstance(result, (tuple, list)) else (result,)
