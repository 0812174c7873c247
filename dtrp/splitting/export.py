"""A model's forward as a graph of torch's operations, for any number of samples.

`torch.export` runs the forward once on tensors without data. The graph says of each operation in which submodule it
ran; parameters and buffers are attributes of it, under the model's names.
"""

from __future__ import annotations

import builtins
import inspect
import io
import math
import operator
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, redirect_stderr
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.nn.functional import multi_head_attention_forward
from torch.nn.modules.module import register_module_buffer_registration_hook
from torch.overrides import TorchFunctionMode

from ..stage.losses import add_loss, collecting
from ..tensors import torch_private
from ..tensors.module_mode import in_mode
from ..tensors.torch_private import buffer_dict, pytree, writes_arguments
from ..typing import Tree
from .example import Example, Sizes
from .regions import apply_in_stages, functions_kept, marked, record_regions, replaced
from .side_effects import as_it_was, noting_stores
from .untraceable import untraceable, with_other_bounds

_CASTS = {getattr(Tensor, name) for name in ("to", "type", "type_as", "float", "double", "half", "bfloat16")}
_ALIAS = torch.ops.aten.alias.default


@dataclass(frozen=True)
class Traced:
    """A model's forward in one mode.

    Args:
        graph: graph of its operations.
        input_leaves: for each input of the graph, its place among the leaves of the example.
        returns: the tree that the model returns, with places among the graph's outputs as leaves.
        reads_dtypes: whether the forward asked for a dtype that autocast may change.
        stored: attributes that the forward stored on the model's modules, and whether as tensors that require a
            gradient.
        sizes: sizes that tensors of an input may have.
        varying: the dimensions of each leaf of the example that vary, with other bounds where torch needed them.
        called_again: modules without weights that are called several times (one activation for all blocks).
    """

    graph: fx.GraphModule
    input_leaves: tuple[int, ...]
    returns: Tree
    reads_dtypes: bool
    stored: dict[str, bool]
    sizes: Sizes
    varying: Sequence[dict[int, Any]]
    called_again: frozenset[str]


def export(model: nn.Module, example: Example, varying: Sequence[dict[int, Any]], *, training: bool) -> Traced:
    """The graph of the model's forward in one mode.

    Args:
        model: model; if it is in train mode, submodules that are in eval mode (a frozen BatchNorm) stay so.
        example: what to call it with.
        varying: the dimensions of each leaf of the example that vary.
        training: whether to trace it in train mode, or in eval mode.

    Raises:
        ValueError: it cannot be traced; the message names the place.
    """
    args, kwargs = example.call()
    args, kwargs = pytree.tree_map_only(Tensor, Tensor.detach, (args, kwargs))
    named = _naming_arguments(model, kwargs)
    shapes = torch.export.ShapesCollection()  # type: ignore[no-untyped-call]
    for leaf, dims in zip(pytree.tree_leaves((args, kwargs)), varying, strict=True):
        if isinstance(leaf, Tensor):
            shapes[leaf] = dims
    try:
        recorder, mode = _DtypeRecorder(), in_mode(model, training=training)
        with (
            as_it_was(model),
            mode,
            without_cache(model),
            named,
            _plainly(),
            functions_kept() as calls,
            _watched(model, recorder) as stored,
        ):
            program = torch.export.export(model, args, kwargs, dynamic_shapes=cast(Any, shapes), strict=False)
            graph = program.module()
    except Exception as error:
        other = with_other_bounds(str(error), example, varying)
        if other is not None:
            return export(model, example, other, training=training)
        raise untraceable(model, error, example, varying) from error
    in_spec, out_spec = program.call_spec.in_spec, program.call_spec.out_spec
    assert in_spec is not None
    assert out_spec is not None
    returns, terms = pytree.tree_unflatten(list(range(out_spec.num_leaves)), out_spec)
    apply_in_stages(graph.graph, calls)
    _add_terms(graph.graph, len(terms))
    _clean_up(graph.graph)
    called_again = _name_calls(graph.graph, model)
    # The program may have put keyword arguments in another order.
    _, named = pytree.tree_unflatten(list(range(in_spec.num_leaves)), in_spec)
    places = pytree.tree_unflatten(list(range(len(example.leaves))), example.spec)
    args, kwargs = Example(places, (), (), 0).call()
    input_leaves = pytree.tree_leaves([args, [kwargs[name] for name in named]])
    sizes = _sizes(program, graph.graph, input_leaves, example, varying)
    return Traced(graph, tuple(input_leaves), returns, recorder.reads_dtypes, stored, sizes, varying, called_again)


def _sizes(
    program: torch.export.ExportedProgram,
    graph: fx.Graph,
    input_leaves: Sequence[int],
    example: Example,
    varying: Sequence[dict[int, Any]],
) -> Sizes:
    """The sizes that tensors of an input may have in the trace."""
    shapes: list[tuple[Any, ...] | None] = [None] * len(example.leaves)
    names: dict[str, str] = {}
    samples, environment = "", None
    for place, node in zip(input_leaves, graph.find_nodes(op="placeholder"), strict=True):
        if isinstance(example.leaves[place], Tensor):
            shape = node.meta["val"].shape
            shapes[place] = tuple(_number_or_expression(size) for size in shape)
            for dim, size in enumerate(shapes[place] or ()):
                if not isinstance(size, int):
                    environment = shape[dim].node.shape_env
                    asked = getattr(varying[place].get(dim), "__name__", f"dimension {dim} of {example.paths[place]}")
                    names.setdefault(str(size), asked)
                    samples = str(size) if dim == 0 and example.has_samples(example.leaves[place]) else samples
    used = {
        symbol for shape in shapes for size in shape or () if not isinstance(size, int) for symbol in size.free_symbols
    }
    ranges = {
        str(symbol): (int(known.lower), math.inf if known.upper > 2**62 else int(known.upper))
        for symbol, known in program.range_constraints.items()
        if symbol in used
    }
    # What decided the way through the model; `Dim.AUTO` leaves it to whoever calls the program to ask. How many samples
    # there are is not looked at (a way for one sample, say).
    guards = [environment.replace(guard.expr) for guard in environment.guards] if environment is not None else []
    conditions = [guard for guard in guards if any(str(symbol) != samples for symbol in guard.free_symbols)]
    return Sizes(shapes, samples, ranges, conditions, names, example, varying)


def _number_or_expression(size: int | torch.SymInt) -> Any:
    if isinstance(size, int):
        return size
    expression = size.node.expr
    return int(expression) if expression.is_number else expression


def _naming_arguments(model: nn.Module, kwargs: dict[str, Any]) -> AbstractContextManager[None]:
    """Context in which the forward names arguments that it takes as ``**kwargs``, without which torch.export tells no
    sizes of them."""
    forward = model.forward
    signature = inspect.signature(forward)
    parameters = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    unnamed = [name for name in kwargs if name not in signature.parameters]
    more = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in unnamed]
    if not more or len(parameters) == len(signature.parameters):
        return nullcontext()

    def renamed(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    renamed.__signature__ = signature.replace(parameters=[*parameters, *more])  # type: ignore[attr-defined]
    return replaced(model, forward=renamed)


class _MarkedTerms(list[Tensor]):
    """Terms of the loss as aliases: an operation of the trace marks where the forward added each."""

    def append(self, value: Tensor) -> None:
        super().append(_ALIAS(value))


def _add_terms(graph: fx.Graph, num_terms: int) -> None:
    """Let the graph add the terms of the loss, its last ``num_terms`` outputs, where the forward added them."""
    output = next(iter(reversed(graph.nodes)))
    outputs = list(output.args[0])
    num_returned = len(outputs) - num_terms
    for mark in outputs[num_returned:]:
        with graph.inserting_before(mark):
            added = graph.call_function(add_loss, mark.args)
        added.meta = {**mark.meta, "val": None}
    output.args = (tuple(outputs[:num_returned]),)


def _clean_up(graph: fx.Graph) -> None:
    """Remove what served the trace alone, and show writes in place to whoever follows values through the graph."""
    for node in list(graph.nodes):
        # Checks of the traced run, which would refuse a batch of one, and autocast.
        if node.target in (torch_private.ASSERT_TENSOR_METADATA, "_guards_fn"):
            graph.erase_node(node)
        elif node.target is _ALIAS:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    record_regions(graph)
    graph.eliminate_dead_code(lambda node: node.is_impure() or node.target is add_loss)
    _assign_in_place(graph)
    _name_by_last_write(graph)


def _assign_in_place(graph: fx.Graph) -> None:
    """Write a buffer that the forward assigns where its new value is made, and not at the end.

    Operations that read the old value read a copy, so that a gradient which needs it still has it.
    """
    *nodes, _ = graph.nodes
    for node in reversed(nodes):
        if node.target is not torch.ops.aten.copy_.default or node.args[0].op != "get_attr" or node.users:
            return
        buffer, value = node.args
        places = {other: place for place, other in enumerate(graph.nodes)}
        readers = sorted((user for user in buffer.users if user is not node), key=places.__getitem__)
        if readers:
            with graph.inserting_before(readers[0]):
                old = graph.call_function(torch.ops.aten.clone.default, (buffer,))
            old.meta = {**readers[0].meta, "val": buffer.meta.get("val")}
            for reader in readers:
                reader.replace_input_with(buffer, old)
        with graph.inserting_after(value):
            detached = graph.call_function(torch.ops.aten.detach.default, (value,))
        detached.meta = dict(value.meta)
        node.args = (buffer, detached)
        detached.append(node)
        node.meta = dict(value.meta)


def _name_by_last_write(graph: fx.Graph) -> None:
    """Let operations that read a tensor after a write in place read the result of the write, on which they depend."""
    places = {node: place for place, node in enumerate(graph.nodes)}
    for node in list(graph.nodes):
        if not writes_arguments(node.target) or not node.args:
            continue
        written, alias = node.args[0], torch_private.operator_schema(node.target).arguments[0].alias_info
        if isinstance(written, fx.Node) and written.op != "get_attr" and alias is not None and alias.is_write:
            for user in list(written.users):
                if places[user] > places[node]:
                    user.replace_input_with(written, node)


def _name_calls(graph: fx.Graph, model: nn.Module) -> frozenset[str]:
    """Record in which module each operation ran, by the first of its names, and in a later call of one with weights which.

    torch.export records the name by which a module was called, and numbers the calls by each name for themselves.

    Returns:
        The modules without weights that are called several times.
    """
    first_names = {id(module): name for name, module in model.named_modules()}
    weightless = {name for name, module in model.named_modules() if not [*module.parameters(), *module.buffers()]}
    calls: dict[str, dict[str, int]] = {}  # by the module's first name, the number of each call by what torch calls it
    for node in graph.nodes:
        stack = {}
        for key, (name, kind) in (node.meta.get("nn_module_stack") or {}).items():
            try:
                first = first_names[id(model.get_submodule(plain(name)))]
            except (AttributeError, KeyError):  # a module that is none of the model's
                stack[key] = (name, kind)
                continue
            numbers = calls.setdefault(first, {})
            number = numbers.setdefault(key, len(numbers))
            called = f"{first}@{number}" if number and first not in weightless else first
            stack[called] = (called, kind)
        node.meta["nn_module_stack"] = stack
    return frozenset(name for name, numbers in calls.items() if name in weightless and len(numbers) > 1)


def plain(name: str) -> str:
    """The name of a submodule without the number of the call, which later calls have."""
    return ".".join(part.split("@")[0] for part in name.split("."))


def attribute(module: Any, name: str) -> Any:
    """What the traced graph calls ``name``: a parameter, a buffer or a constant."""
    return operator.attrgetter(name)(module)


def module_path(node: fx.Node) -> tuple[str, ...]:
    """The submodules in which an operation ran, outermost first."""
    stack = node.meta.get("nn_module_stack") or {}
    return tuple(fqn for fqn, _ in stack.values() if fqn)


@contextmanager
def without_cache(model: nn.Module) -> Iterator[None]:
    """Context in which a Hugging Face model returns no keys and values beside its output: they are for generation."""
    with ExitStack() as stack:
        for config in [getattr(member, "config", None) for member in model.modules()]:
            if getattr(config, "use_cache", None) is True:
                stack.enter_context(replaced(config, use_cache=False))
        yield


class _DtypeRecorder(TorchFunctionMode):
    """Keeps casts to a dtype that the tensor has already in the trace, but may not have in a step, under autocast.

    torch returns the same tensor from such a cast. The cast of an alias is another tensor, so that what reads the
    tensor is not taken to read the cast. (The Python code of torch.nn.functional is not seen.)

    Attributes:
        reads_dtypes: whether the forward has asked for autocast settings, or for the dtype of something else than a
            parameter.
        has_grad: whether the forward has gradients on. (A trace of torch 2.8 marks where that changes, and changes
            nothing, so that a region which ends there would leave the mode in which the trace runs.)
    """

    def __init__(self) -> None:
        super().__init__()
        self.reads_dtypes = False
        self.has_grad = True

    def recording(self, ask: Callable[..., Any]) -> Callable[..., Any]:
        """The function ``ask``, which reads autocast settings, with a note of its calls."""

        def asked(*args: Any) -> Any:
            self.reads_dtypes = True
            return ask(*args)

        return asked

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.register_hook:
            raise TypeError("a hook on a tensor (register_hook), which a trace does not keep")
        if func in _CASTS:
            args = (_ALIAS(args[0]), *args[1:])
        result = func(*args, **(kwargs or {}))
        if func is torch_private.SET_GRAD_ENABLED:
            self.has_grad = bool(args[0])
        if func is multi_head_attention_forward:  # whose float masks are of the query's dtype
            self.reads_dtypes = True
        if isinstance(result, torch.dtype) and not (args and isinstance(args[0], nn.Parameter)):
            self.reads_dtypes = True
        return result


_len = len


def _length(x: Any) -> Any:
    """``len``, which makes a constant of the first size of a tensor, so that it may vary."""
    varies = isinstance(x, Tensor) and type(x).__len__ is Tensor.__len__ and x.dim() > 0
    return x.shape[0] if varies else _len(x)


@contextmanager
def _plainly() -> Iterator[None]:
    """Context for a trace, with gradients and without torch's warnings about its tracing."""
    hidden = redirect_stderr(io.StringIO())  # a failed trace prints its graph
    any_mask = replaced(nn.modules.transformer, **{torch_private.CAUSAL_MASK_DETECTION: _causal_if_told})
    with warnings.catch_warnings(), torch.enable_grad(), hidden, any_mask, marked():
        warnings.simplefilter("ignore")
        yield


def _causal_if_told(mask: Tensor | None, is_causal: bool | None = None, size: int | None = None) -> bool:
    """Whether torch's transformers may leave a mask out for a kernel that knows it. They look at its values, which a
    trace does not know; to apply the mask is right whatever it is."""
    return is_causal is True


@contextmanager
def _watched(model: nn.Module, recorder: _DtypeRecorder) -> Iterator[dict[str, bool]]:
    """Context in which the model's forward runs with ``recorder``, returns the terms of the loss beside its output, and
    writes what it has assigned to buffers of submodules into these buffers at its end. (torch.export keeps assignments
    to buffers of the model itself, and no others.)

    Returns:
        What the forward stores, as in `Traced`.
    """
    assigned: dict[tuple[nn.Module, str], Tensor] = {}
    stored: dict[str, bool] = {}
    terms = _MarkedTerms()
    during_forward = ExitStack()

    def note(module: nn.Module, name: str, value: Any) -> None:
        buffer = buffer_dict(module).get(name)
        if buffer is None:
            return
        if value is None or value.shape != buffer.shape:
            raise ValueError(f"buffer {name!r} of a {type(module).__name__} takes another shape in the forward")
        if module is not model:
            assigned.setdefault((module, name), buffer)

    def leave(_: nn.Module, args: Any, out: Any) -> tuple[Any, tuple[Tensor, ...]]:
        for (module, name), buffer in assigned.items():
            buffers = buffer_dict(module)
            value, buffers[name] = buffers[name], buffer
            buffer.copy_(cast(Tensor, value))
        return out, tuple(terms)

    def enter(*_: Any) -> None:
        asking = {
            name: recorder.recording(getattr(torch, name)) for name in ("is_autocast_enabled", "get_autocast_dtype")
        }
        asking["is_grad_enabled"] = lambda: recorder.has_grad
        recorder.has_grad = torch.is_grad_enabled()
        terms.clear()
        during_forward.enter_context(collecting(terms))
        during_forward.enter_context(noting_stores(model, stored))
        during_forward.enter_context(replaced(torch, **asking))
        during_forward.enter_context(replaced(builtins, len=_length))
        during_forward.enter_context(recorder)

    with (
        during_forward,  # while it traces, torch calls no hook of a forward that fails
        register_module_buffer_registration_hook(note),
        model.register_forward_pre_hook(enter, prepend=True),
        model.register_forward_hook(leave),
        model.register_forward_hook(lambda *_: during_forward.close()),
    ):
        yield stored
