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
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import CheckpointFunction

from ..modes import in_mode
from ..trees import flatten, unflatten

_TORCH = Path(torch.__file__).parent
_HERE = Path(__file__).parent
# Checks of the traced run, of no use to others: they would refuse a batch of one, and autocast.
_CHECKS = (torch.ops.aten._assert_tensor_metadata.default,)


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
    """A graph, the leaf of the example that each of its inputs is, and what it returns: a tree of its outputs' places."""

    graph: fx.GraphModule
    input_leaves: tuple[int, ...]
    returns: Any


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
        with in_mode(model, training=training), _without_cache(model), _plainly():
            program = torch.export.export(model, args, kwargs, dynamic_shapes=cast(Any, shapes), strict=False)
            graph = program.module()
    except Exception as error:
        raise _untraceable(model, error) from error
    for node in list(graph.graph.nodes):
        if node.target in _CHECKS or (node.op == "call_module" and node.target == "_guards_fn"):
            graph.graph.erase_node(node)
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
    return Traced(graph, tuple(order[i] for i in range(in_spec.num_leaves)), returns)


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
def _without_cache(model: nn.Module) -> Iterator[None]:
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
def _plainly() -> Iterator[None]:
    """With gradients, without autocast, and without torch's warnings about its own tracing."""
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.enter_context(torch.enable_grad())
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        stack.enter_context(redirect_stderr(io.StringIO()))  # a failed trace prints its graph
        stack.enter_context(_no_custom_backward())
        yield


@contextmanager
def _no_custom_backward() -> Iterator[None]:
    """Refuse what a trace would change without a word: it records the forward of a `torch.autograd.Function` alone."""
    own = torch.autograd.Function.__dict__["apply"]

    def refuse(cls: type[torch.autograd.Function], *args: Any, **kwargs: Any) -> Any:
        if cls is CheckpointFunction:  # its backward is that of what it runs
            return own.__func__(cls, *args, **kwargs)
        raise TypeError(
            f"{cls.__name__} is a torch.autograd.Function with a backward of its own, which a trace does not keep"
        )

    setattr(torch.autograd.Function, "apply", classmethod(refuse))  # noqa: B010 (a method is no variable to mypy)
    try:
        yield
    finally:
        setattr(torch.autograd.Function, "apply", own)  # noqa: B010


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
