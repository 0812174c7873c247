"""A model's forward as a graph of torch's operations, for any number of samples.

`torch.export` runs the forward once on tensors without data. The graph says of each operation in which submodule it
ran; parameters and buffers are attributes of it, under the model's own names.
"""

from __future__ import annotations

import io
import linecache
import re
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.nn.functional import multi_head_attention_forward
from torch.nn.modules.module import register_module_buffer_registration_hook
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import CheckpointFunction

from ..tensors.module_mode import in_mode, members
from ..tensors.pytree import flatten, unflatten
from .regions import marked, replaced, tell_regions

_TORCH = Path(torch.__file__).parent
_HERE = Path(__file__).parent
# Checks of the traced run, of no use to others: they would refuse a batch of one, and autocast.
_CHECKS = (torch.ops.aten._assert_tensor_metadata.default,)
_CASTS = {getattr(Tensor, name) for name in ("to", "type", "type_as", "float", "double", "half", "bfloat16")}
_ALIAS = torch.ops.aten.alias.default


@dataclass(frozen=True)
class Example:
    """What the model is called with: a tuple is its positional arguments, a dict its keyword arguments, anything else
    its only argument.

    Args:
        value: as given.
        leaves: tensors and constants in it, in order.
        paths: how each is named in errors.
        samples: in it; tensors of one sample beside them are one for all, as in `Pipeline.step`.
    """

    value: Any
    leaves: tuple[Any, ...]
    paths: tuple[str, ...]
    samples: int

    @property
    def spec(self) -> pytree.TreeSpec:
        """The tree without its leaves. (Kept in no field: torch warns when one is copied.)"""
        return pytree.tree_structure(self.value)

    @classmethod
    def of(cls, value: Any) -> Example:
        """The example, checked.

        Raises:
            TypeError, ValueError: something else than tensors and constants, no tensors, or tensors of several numbers of samples,
                or none of more than one.
        """
        tensors, form = flatten(value, "example")
        value = unflatten(form, iter(tensors))  # of plain tuples, lists and dicts, as `Pipeline.step` makes it
        with_paths, _ = pytree.tree_flatten_with_path(value)
        paths = tuple("example" + pytree.keystr(path) for path, _ in with_paths)
        leaves = tuple(leaf for _, leaf in with_paths)
        sizes = {path: len(t) for path, t in zip(paths, leaves, strict=True) if isinstance(t, Tensor) and t.dim()}
        if not sizes:
            raise TypeError(
                f"example is a {type(value).__name__} without a tensor of samples; pass what the model is called with: a "
                "tensor, a tuple of arguments, or a dict of keyword arguments"
            )
        first_path, samples = max(sizes.items(), key=lambda each: each[1] > 1)
        for path, size in sizes.items():
            if size not in (1, samples):
                raise ValueError(
                    f"{first_path} has {samples} samples and {path} has {size}; along dimension 0 every tensor has as many, "
                    "or one for all of them"
                )
        if samples < 2:
            raise ValueError(
                f"example has {samples} sample; torch.export takes a size of 0 or 1 for a constant: pass at least 2 samples"
            )
        return cls(value, leaves, paths, samples)

    def counts(self, leaf: Any) -> bool:
        """Whether a leaf has as many samples as the mini-batch, and is not one for all of them."""
        return isinstance(leaf, Tensor) and leaf.dim() > 0 and len(leaf) == self.samples

    def call(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and keyword arguments."""
        if isinstance(self.value, dict):
            return (), dict(self.value)
        return (tuple(self.value) if isinstance(self.value, (tuple, list)) else (self.value,)), {}


@dataclass(frozen=True)
class Traced:
    """A model's forward in one mode.

    Args:
        graph: of its operations.
        input_leaves: the leaf of the example that each of the graph's inputs is.
        returns: a tree of its outputs' places.
        reads_dtypes: whether it asked for a dtype that autocast may change.
    """

    graph: fx.GraphModule
    input_leaves: tuple[int, ...]
    returns: Any
    reads_dtypes: bool


def export(model: nn.Module, example: Example, *, training: bool) -> Traced:
    """The graph of the model's forward in one mode.

    Args:
        model: in train mode submodules that are in eval mode stay so (a frozen BatchNorm), if the model itself is in
            train mode.
        example: what to call it with.
        training: the mode.

    Raises:
        ValueError: it cannot be traced; names the place.
    """
    args, kwargs = example.call()
    args, kwargs = pytree.tree_map_only(Tensor, Tensor.detach, (args, kwargs))
    shapes = torch.export.ShapesCollection()  # type: ignore[no-untyped-call]
    batch = torch.export.Dim("batch")
    for leaf in pytree.tree_leaves((args, kwargs)):
        if example.counts(leaf):
            shapes[leaf] = {0: batch}
    try:
        casts = _Casts()
        with (
            as_it_was(model),
            in_mode(model, training=training),
            without_cache(model),
            _plainly(),
            _watched(model, casts),
        ):
            program = torch.export.export(model, args, kwargs, dynamic_shapes=cast(Any, shapes), strict=False)
            graph = program.module()
    except Exception as error:
        raise _untraceable(model, error) from error
    for node in list(graph.graph.nodes):
        if node.target in _CHECKS or (node.op == "call_module" and node.target == "_guards_fn"):
            graph.graph.erase_node(node)
        elif node.target is _ALIAS:
            node.replace_all_uses_with(node.args[0])
            graph.graph.erase_node(node)
    tell_regions(graph.graph)
    graph.graph.eliminate_dead_code()
    _assign_in_place(graph.graph)
    _name_by_last_write(graph.graph)
    in_spec, out_spec = program.call_spec.in_spec, program.call_spec.out_spec
    assert in_spec is not None
    assert out_spec is not None
    # The program may have put keyword arguments in another order.
    places = pytree.tree_unflatten(list(range(len(example.leaves))), example.spec)
    numbered = Example(places, (), (), 0).call()
    ordered_args, ordered_kwargs = pytree.tree_unflatten(list(range(in_spec.num_leaves)), in_spec)
    order: dict[int, int] = {}
    for mine, its in zip(pytree.tree_leaves(numbered[0]), pytree.tree_leaves(ordered_args), strict=True):
        order[its] = mine
    for name, value in ordered_kwargs.items():
        for mine, its in zip(pytree.tree_leaves(numbered[1][name]), pytree.tree_leaves(value), strict=True):
            order[its] = mine
    returns = pytree.tree_unflatten(list(range(out_spec.num_leaves)), out_spec)
    return Traced(graph, tuple(order[i] for i in range(in_spec.num_leaves)), returns, casts.reads_dtypes)


def _assign_in_place(graph: fx.Graph) -> None:
    """A buffer that the forward assigns is written where its new value is made, and not at the end.

    What reads the old value reads a copy, so that a gradient which needs it still has it.
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
    """After an operation in place, the tensor goes by that operation, so that who reads it later is seen to read it."""
    places = {node: place for place, node in enumerate(graph.nodes)}
    for node in list(graph.nodes):
        if not isinstance(node.target, torch._ops.OpOverload) or not node.target._schema.is_mutable or not node.args:
            continue
        written = node.args[0]
        alias = node.target._schema.arguments[0].alias_info
        if isinstance(written, fx.Node) and written.op != "get_attr" and alias is not None and alias.is_write:
            for user in list(written.users):
                if places[user] > places[node]:
                    user.replace_input_with(written, node)


def attribute(module: Any, name: str) -> Any:
    """What the traced graph calls ``name``: a parameter, a buffer or a constant."""
    for part in name.split("."):
        module = getattr(module, part)
    return module


def module_path(node: fx.Node) -> tuple[str, ...]:
    """The submodules in which an operation ran, outermost first."""
    stack = node.meta.get("nn_module_stack") or {}
    return tuple(fqn for fqn, _ in stack.values() if fqn)


@contextmanager
def without_cache(model: nn.Module) -> Iterator[None]:
    """A Hugging Face model returns no keys and values beside its output: they are for generation."""
    configs = [getattr(member, "config", None) for member in model.modules()]
    caching = [config for config in configs if getattr(config, "use_cache", None) is True]
    try:
        for config in caching:
            config.use_cache = False  # type: ignore[union-attr]
        yield
    finally:
        for config in caching:
            config.use_cache = True  # type: ignore[union-attr]


@contextmanager
def as_it_was(model: nn.Module) -> Iterator[None]:
    """After it every attribute of the model is what it was, and its parameters and buffers are the same tensors."""
    attributes = {member: dict(member.__dict__) for member in members(model)}
    try:
        with on_copies(model, {}):
            yield
    finally:
        for member, before in attributes.items():
            member.__dict__.clear()
            member.__dict__.update(before)


@contextmanager
def on_copies(model: nn.Module, copies: Mapping[int, Tensor]) -> Iterator[None]:
    """Within it the model has ``copies``, by id, for some of its parameters and buffers; what it puts in their places is gone
    after it."""
    own = {member: (member._parameters, member._buffers) for member in members(model)}
    try:
        for member, held in own.items():
            member._parameters, member._buffers = (  # type: ignore[assignment]
                {name: copies.get(id(tensor), tensor) for name, tensor in tensors.items()} for tensors in held
            )
        yield
    finally:
        for member, (parameters, buffers) in own.items():
            member._parameters, member._buffers = parameters, buffers


class _Casts(TorchFunctionMode):
    """Keeps casts to the dtype that a tensor has in the trace, and need not have in a step: under autocast.

    Of such a cast torch returns the tensor itself; an alias of it is another, so that what reads the tensor is not taken to
    read the cast. (torch.nn.functional's own Python is not seen into.)

    Attributes:
        reads_dtypes: whether the forward has asked for autocast settings, or for the dtype of something else than a parameter.
    """

    def __init__(self) -> None:
        super().__init__()
        self.reads_dtypes = False

    def noting(self, ask: Callable[..., Any]) -> Callable[..., Any]:
        """The function, which asks for autocast settings; where it is called in the forward, it is noted."""

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
        if func is multi_head_attention_forward:  # whose float masks are of the query's dtype
            self.reads_dtypes = True
        if isinstance(result, torch.dtype) and not (args and isinstance(args[0], nn.Parameter)):
            self.reads_dtypes = True
        return result


@contextmanager
def _plainly() -> Iterator[None]:
    """With gradients, and without torch's warnings about its own tracing."""
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.enter_context(torch.enable_grad())
        stack.enter_context(redirect_stderr(io.StringIO()))  # a failed trace prints its graph
        stack.enter_context(_no_custom_backward())
        stack.enter_context(marked())
        yield


@contextmanager
def _watched(model: nn.Module, casts: _Casts) -> Iterator[None]:
    """Within it the model's forward runs with ``casts``, and what it assigns to buffers of submodules is written to them at its
    end. (torch.export keeps assignments to buffers of the model itself, and no others.)
    """
    assigned: dict[tuple[nn.Module, str], Tensor] = {}

    def note(module: nn.Module, name: str, value: Any) -> None:
        buffer = module._buffers.get(name)
        if buffer is None:
            return
        if value is None or value.shape != buffer.shape:
            raise ValueError(f"buffer {name!r} of a {type(module).__name__} takes another shape in the forward")
        if module is not model:
            assigned.setdefault((module, name), buffer)

    def write(*_: Any) -> None:
        for (module, name), buffer in assigned.items():
            value, module._buffers[name] = module._buffers[name], buffer
            buffer.copy_(cast(Tensor, value))

    within = ExitStack()

    def enter(*_: Any) -> None:
        asking = {name: casts.noting(getattr(torch, name)) for name in ("is_autocast_enabled", "get_autocast_dtype")}
        within.enter_context(replaced(torch, **asking))
        within.enter_context(casts)

    def leave(*_: Any) -> None:
        within.close()

    handles = [
        register_module_buffer_registration_hook(note),
        model.register_forward_pre_hook(enter, prepend=True),
        model.register_forward_hook(write),
        model.register_forward_hook(leave, always_call=True),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _no_custom_backward() -> AbstractContextManager[None]:
    """Refuse what a trace would change without a word: it records the forward of a `torch.autograd.Function` alone."""

    def refuse(cls: type[torch.autograd.Function], *args: Any, **kwargs: Any) -> Any:
        if cls is CheckpointFunction:  # its backward is that of what it runs
            run, _, *inputs = args
            return run(*inputs)
        raise TypeError(
            f"{cls.__name__} is a torch.autograd.Function with a backward of its own, which a trace does not keep"
        )

    return replaced(torch.autograd.Function, apply=classmethod(refuse))


def _untraceable(model: nn.Module, error: Exception) -> ValueError:
    where = _place(model, error)
    text = str(error).strip()
    if text.startswith("Constraints violated (batch)"):
        return ValueError(
            "the model cannot be traced for any number of samples: its forward works with that of the example alone (a "
            "view or a loop of that size?); take it from the input as x.shape[0], not len(x), or as -1 in a view. torch says: "
            + " ".join(line.strip(" -") for line in text.splitlines()[1:3])
        )
    unknown = re.match(r"Found <class '(?:.*\.)?(\w+)'> in output", text)
    if unknown is not None:
        return ValueError(
            f"the model cannot be traced: it returns a {unknown[1]}; a model in stages returns tensors, None, numbers and text, in "
            "tuples, lists and dicts (and a Hugging Face model no cache: use_cache=False)"
        )
    reason = text.splitlines()[0] if text else type(error).__name__
    return ValueError(
        f"the model cannot be traced{where}: {reason}. Where the way through a model depends on the data, or leaves torch, "
        "divide it by hand: pass a list of modules, one a stage, each taking what the one before returns"
    )


def _place(model: nn.Module, error: BaseException) -> str:
    """The innermost line of the caller's code, and the submodule that ran it."""
    names = {id(module): name for name, module in model.named_modules()}
    found = None
    seen: list[BaseException] = []
    while error not in seen:
        seen.append(error)
        for frame, line in traceback.walk_tb(error.__traceback__):
            file = Path(frame.f_code.co_filename)
            if _TORCH in file.parents or _HERE in file.parents or not file.suffix:
                continue
            first = frame.f_code.co_varnames[:1]
            module = frame.f_locals.get(first[0]) if first else None
            if isinstance(module, nn.Module):
                code = linecache.getline(str(file), line, frame.f_globals).strip()
                label = names.get(id(module)) or type(module).__name__
                found = f" in {label} ({file.name}, line {line}: {code})"
        if found is not None:
            return found
        error = error.__cause__ or error.__context__ or error
    return ""
