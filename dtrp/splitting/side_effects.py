"""What a forward leaves on the model's modules beside its output: seen, and put back.

Attributes, and what they hold of lists, dicts, sets and plain objects; parameters and buffers.
"""

from __future__ import annotations

import operator
import sys
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import FunctionType, MethodType, ModuleType
from typing import Any

from torch import Tensor, nn

from ..tensors.module_mode import members
from ..tensors.torch_private import buffer_dict, parameter_dict, pytree, replace_tensor_dicts
from .regions import replaced

_DEPTH = 3  # how deep containers are looked for within one another
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))  # `training`, the dicts of parameters, buffers and hooks
_NO_CONTAINERS = (nn.Module, Tensor, type, ModuleType, FunctionType, MethodType)


@contextmanager
def as_it_was(model: nn.Module) -> Iterator[None]:
    """Context after which the model has the same attributes, parameters and buffers as before."""
    attributes = {member: dict(vars(member)) for member in members(model)}
    containers = _containers(model)
    try:
        with on_copies(model, {}):
            yield
    finally:
        for member, before in attributes.items():
            vars(member).clear()
            vars(member).update(before)
        for _, container, entries in containers:
            if _news(container, entries) is not None:
                _refill(container, entries)


@contextmanager
def on_copies(model: nn.Module, copies: Mapping[int, Tensor]) -> Iterator[None]:
    """Context in which the model has ``copies``, by id, in place of some of its parameters and buffers.

    Tensors that the model registers within the context are gone after it.
    """
    before = {member: (parameter_dict(member), buffer_dict(member)) for member in members(model)}
    try:
        for member, dicts in before.items():
            replace_tensor_dicts(
                member, *({name: copies.get(id(t), t) for name, t in tensors.items()} for tensors in dicts)
            )
        yield
    finally:
        for member, dicts in before.items():
            replace_tensor_dicts(member, *dicts)


@contextmanager
def noting_stores(model: nn.Module, stored: dict[str, bool]) -> Iterator[None]:
    """Context that notes in ``stored`` the attributes of the model's modules that are set, or whose containers change.

    Each comes with whether it was given a tensor that requires a gradient. Buffers, parameters and submodules are left
    out, and what torch's own code sets (`weight_norm`).
    """
    names = {id(member): f"{name}." if name else "" for name, member in model.named_modules()}
    containers = _containers(model)
    set_attribute = nn.Module.__setattr__

    def note(name: str, values: Any) -> None:
        needs_gradient = any(isinstance(t, Tensor) and t.requires_grad for t in pytree.tree_leaves(values))
        stored[name] = stored.get(name, False) or needs_gradient

    def set_and_note(module: nn.Module, name: str, value: Any) -> None:
        set_attribute(module, name, value)
        setter = sys._getframe(1).f_globals.get("__name__", "").partition(".")[0]
        if id(module) in names and setter != "torch" and name in vars(module).keys() - _OF_EVERY_MODULE:
            note(names[id(module)] + name, value)

    with replaced(nn.Module, __setattr__=set_and_note):
        yield
    for name, container, entries in containers:
        news = _news(container, entries)
        if news is not None and name.rpartition(".")[2] not in _OF_EVERY_MODULE:
            note(name, news)


def _containers(model: nn.Module) -> list[tuple[str, Any, list[Any]]]:
    """The containers that the modules' attributes hold: name of the attribute, the container, and its entries."""
    found: dict[int, tuple[str, Any, list[Any]]] = {}

    def look(name: str, value: Any, depth: int) -> None:
        if isinstance(value, (list, dict, set, deque)):
            container = value
        elif isinstance(value, tuple):
            container = None
        elif hasattr(value, "__dict__") and not isinstance(value, _NO_CONTAINERS):
            container = vars(value)
        else:
            return
        if id(container) in found or not depth:
            return
        entries = list(value) if container is None else _entries(container)
        if container is not None:
            found[id(container)] = (name, container, entries)
        for entry in entries:
            look(name, entry, depth - 1)

    for prefix, member in model.named_modules():
        for attribute, value in vars(member).items():
            look(f"{prefix}.{attribute}" if prefix else attribute, value, _DEPTH)
    return list(found.values())


def _entries(container: Any) -> list[Any]:
    return [*container, *container.values()] if isinstance(container, dict) else [*container]


def _news(container: Any, before: list[Any]) -> list[Any] | None:
    """The entries that a container did not have before; None where it has not changed."""
    now = _entries(container)
    if len(now) == len(before) and all(map(operator.is_, now, before)):
        return None
    known = set(map(id, before))
    return [entry for entry in now if id(entry) not in known]


def _refill(container: Any, entries: list[Any]) -> None:
    container.clear()
    half = len(entries) // 2
    if isinstance(container, dict):
        container.update(zip(entries[:half], entries[half:], strict=True))
    else:
        add: Any = container.update if isinstance(container, set) else container.extend
        add(entries)
