"""The buffers of a module as a dictionary: to copy, to put into the module, or to write into its tensors."""

from __future__ import annotations

from collections.abc import Container, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .module_mode import Roster, members
from .torch_private import buffer_dict, foreach, has_internal_overlap

Slot = tuple[nn.Module, str]  # a module, and the name of a buffer in it; a shared buffer is in several
Buffers = dict[Slot, Tensor | None]  # None: registered, and no tensor


def buffers_of(module: nn.Module | Roster) -> Buffers:
    """The present buffers of a module and of its submodules."""
    return {
        (member, name): buffer
        for member in members(module)
        if (buffers := buffer_dict(member))
        for name, buffer in buffers.items()
    }


def names_of(module: nn.Module, slots: Iterable[Slot]) -> dict[Slot, str]:
    """The full names in the module of the buffers in these places."""
    prefixes = {member: f"{prefix}." if prefix else "" for prefix, member in module.named_modules()}
    return {(member, name): prefixes[member] + name for member, name in slots}


def slot_of(module: nn.Module, name: str) -> Slot:
    """Where the buffer with this full name is, or would be.

    Raises:
        AttributeError: there is no such submodule.
    """
    owner, _, attribute = name.rpartition(".")
    return module.get_submodule(owner), attribute


def kinds_of(module: nn.Module) -> dict[str, tuple[torch.Size, torch.dtype] | None]:
    """Shape and dtype of every buffer of a module, by name; None where it is no tensor."""
    buffers = buffers_of(module)
    names = names_of(module, buffers)
    return {names[slot]: None if b is None else (b.shape, b.dtype) for slot, b in buffers.items()}


def put(now: Buffers, buffers: Buffers) -> None:
    """Give modules that have the buffers ``now`` the tensors ``buffers`` instead, and no others."""
    for module, name in now.keys() - buffers.keys():
        buffer_dict(module).pop(name, None)
    for (module, name), buffer in buffers.items():
        buffer_dict(module)[name] = buffer


@torch.no_grad()
def write(current: Buffers, values: Buffers, moved: Container[Slot] | None = None) -> Buffers:
    """Give modules these buffers and no others: in their ``current`` tensors where they fit, else in new ones.

    Args:
        current: all buffers that the modules have.
        values: the buffers that they are to have.
        moved: the places that differ for sure; None: any may.

    Returns:
        The buffers that the modules have afterwards.
    """
    into: dict[int, tuple[Tensor, Tensor]] = {}
    copies: dict[int, Tensor] = {}
    buffers: Buffers = {}
    for slot, value in values.items():
        buffer = current.get(slot)
        if value is None:
            buffers[slot] = None
            continue
        if buffer is not None and buffer.shape == value.shape and buffer.dtype is value.dtype:
            if buffer.device == value.device and _can_be_written(buffer):
                if into.setdefault(id(buffer), (buffer, value))[1] is value:
                    buffers[slot] = buffer
                    continue
            elif moved is not None and slot not in moved:
                buffers[slot] = buffer
                continue
        buffers[slot] = copies.setdefault(id(value), value.clone().detach())
    put(current, buffers)
    copy_all([buffer for buffer, _ in into.values()], [value for _, value in into.values()])
    return buffers


def _can_be_written(buffer: Tensor) -> bool:
    """Whether the buffer is dense and was not expanded."""
    return buffer.layout is torch.strided and (buffer.is_contiguous() or not has_internal_overlap(buffer))


def copies_of(buffers: Buffers) -> Buffers:
    """A copy of every buffer, a shared one copied once; on an accelerator with one launch for each dtype."""
    if not buffers:
        return {}
    tensors = {id(buffer): buffer for buffer in buffers.values() if buffer is not None}
    copies = {key: torch.empty_like(t) if t.layout is torch.strided else t.clone() for key, t in tensors.items()}
    copy_all(copies.values(), tensors.values())
    return {slot: None if buffer is None else copies[id(buffer)] for slot, buffer in buffers.items()}


@torch.no_grad()
def copy_all(targets: Iterable[Tensor], sources: Iterable[Tensor]) -> None:
    """Write the values of ``sources`` into ``targets``, pair by pair."""
    groups: dict[Any, tuple[list[Tensor], list[Tensor]]] = {}
    for target, source in zip(targets, sources, strict=True):
        if (target.dtype, target.device) == (source.dtype, source.device):
            group = groups.setdefault((target.dtype, target.device), ([], []))
            group[0].append(target)
            group[1].append(source)
        else:
            target.copy_(source)
    for group in groups.values():
        foreach.copy_(*group)
