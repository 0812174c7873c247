"""The buffers of a stage: those that its forwards run on, and those that kept graphs have met.

A forward may read what it moves (a hidden state, spectral norm's vectors, a cache that grows), and several forwards come
before the backward of the first. So where a backward repeats the forward, the first forwards have buffers that are ahead of
the module's own::

    F(m)    moves what F(m-1) has left; a copy of the module's own, where nothing is in flight
    B(m)    moves the module's own

A graph that is kept runs on copies, so that nobody writes what it has saved, and then the module has its buffers as the
forward has left them.

No graph can be written down: a checkpoint holds what it was made of, and loading makes it again (`dtrp.saving.exact`). Where the
forward reads a buffer that moves, it must meet then what it met the first time::

    F(m)    1. note of every buffer how often it has been written
            2. run on copies
            3. of what has moved: keep what it was; write the copies back
            4. note again

    save    F(m) has met: what is kept, if it moved the buffer; else what F(m+1) has met, or for the newest what is there now,
            if nobody has written it since 4.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

from ..tensors.module_mode import members
from .reach import storages_of, tensors_in

Slot = tuple[nn.Module, str]  # a module, and the name of a buffer in it; a shared buffer is in several
Buffers = dict[Slot, Tensor | None]  # None: registered, and no tensor
Mark = tuple[Tensor | None, int]  # a buffer, and how often it has been written
_PLAIN = (bool, int, float, str, type(None))
ABSENT = False  # in place of a buffer: it was not registered


class Overwritten(RuntimeError):
    """A buffer has been written, and nobody knows what a graph in flight has met in its place."""

    def __init__(self, slot: Slot) -> None:
        super().__init__(slot[1])
        self.slot = slot


@dataclass
class Met:
    """The buffers that one forward has met.

    Args:
        moved: what those were that it moved.
        before, after: all buffers, before it and after it.
    """

    moved: dict[Slot, Any] = field(default_factory=dict)
    before: dict[Slot, Mark] = field(default_factory=dict)
    after: dict[Slot, Mark] = field(default_factory=dict)


@dataclass
class Elsewhere:
    """A state of a module that is not its own.

    Args:
        buffers: all of them.
        attributes: numbers, texts and None of modules that have buffers, where they are others (how long a cache is).
        seen: the module's own buffers, as ``buffers`` have followed them.
    """

    buffers: Buffers
    attributes: dict[nn.Module, dict[str, Any]] = field(default_factory=dict)
    seen: dict[Slot, Mark] = field(default_factory=dict)

    def follow(self, own: Buffers) -> None:
        """Take on what the caller has done to the module's own buffers since they were seen."""
        now = marks(own)
        self.buffers |= copies_of({slot: own[slot] for slot in now if not same(now[slot], self.seen.get(slot))})
        for slot in self.seen.keys() - now.keys():
            self.buffers.pop(slot, None)
        self.seen = now

    @contextmanager
    def entered(self, module: nn.Module, own: Buffers, noted: Iterable[nn.Module]) -> Iterator[None]:
        """Within it the module is in this state, and moves it; after it, it has its own buffers.

        Args:
            module: whose state it is.
            own: its own buffers.
            noted: those of its modules that have their own attributes too after it, if they have buffers.
        """
        before = {member: dict(vars(member)) for member in noted}
        for member, changed in self.attributes.items():
            vars(member).update(changed)
        put(own, self.buffers)
        try:
            yield
        finally:
            self.buffers = buffers_of(module)
            put(self.buffers, own)
            having = {member for member, _ in own | self.buffers} if before else set()
            for member in before.keys() & having:
                was, now = before[member], vars(member)
                if was.keys() == now.keys() and all(map(is_, was.values(), now.values())):
                    self.attributes.pop(member, None)
                    continue
                changed = {
                    name: value
                    for name, value in now.items()
                    if type(value) in _PLAIN and (name not in was or was[name] is not value)
                }
                self.attributes[member] = changed
                for name in changed:
                    del now[name]
                now.update({name: was[name] for name in changed if name in was})


def buffers_of(module: nn.Module) -> Buffers:
    """Those of a module, and of those in it, as they are now."""
    return {(each, name): buffer for each in members(module) if each._buffers for name, buffer in each._buffers.items()}


def names_of(module: nn.Module, slots: Iterable[Slot]) -> dict[Slot, str]:
    """What buffers in these places are called in the module."""
    prefixes = {member: f"{prefix}." if prefix else "" for prefix, member in module.named_modules()}
    return {(member, name): prefixes[member] + name for member, name in slots}


def doubles(module: nn.Module, buffers: Buffers) -> dict[Slot, str]:
    """Of each buffer that is in the same memory as another, or as an attribute, what that is called in the module."""
    places: dict[int, list[tuple[Slot, Tensor]]] = {}
    for slot, buffer in buffers.items():
        for storage in storages_of(tensors_in(buffer)):
            if storage.data_ptr() and buffer is not None:
                places.setdefault(storage.data_ptr(), []).append((slot, buffer))
    if not places:
        return {}
    names = names_of(module, buffers)
    found = {slot: names[other] for group in places.values() for slot, a in group for other, b in group if a is not b}
    for prefix, member in module.named_modules():
        for name, value in vars(member).items():
            if name not in ("_parameters", "_buffers", "_modules"):
                for storage in storages_of(tensors_in(value)):
                    found |= {slot: f"{prefix}.{name}".lstrip(".") for slot, _ in places.get(storage.data_ptr(), ())}
    return found


def slot_of(module: nn.Module, name: str) -> Slot:
    """Where a buffer of that name is, or would be.

    Raises:
        AttributeError: there is nothing that could have it.
    """
    owner, _, attribute = name.rpartition(".")
    return module.get_submodule(owner), attribute


def kinds_of(module: nn.Module) -> dict[str, tuple[torch.Size, torch.dtype] | None]:
    """Of each buffer of a module, by name, its shape and dtype; None where it is no tensor."""
    buffers = buffers_of(module)
    names = names_of(module, buffers)
    return {names[slot]: None if b is None else (b.shape, b.dtype) for slot, b in buffers.items()}


def put(now: Buffers, buffers: Buffers) -> None:
    """Let modules have ``buffers``, and none besides, where they have those of ``now``."""
    for module, name in now.keys() - buffers.keys():
        module._buffers.pop(name, None)
    for (module, name), buffer in buffers.items():
        module._buffers[name] = buffer


@torch.no_grad()
def write(own: Buffers, values: Buffers, moved: Container[Slot] | None = None) -> Buffers:
    """Let modules have ``values``, and none besides: in the tensors of their ``own`` where they fit, else in new ones.

    Args:
        own: all that they have.
        values: what they are to have.
        moved: what differs for sure; None: anything may.

    Returns:
        What they have then.
    """
    into: dict[int, tuple[Tensor, Tensor]] = {}
    copies: dict[int, Tensor] = {}
    buffers: Buffers = {}
    for slot, value in values.items():
        buffer = own.get(slot)
        if value is None or buffer is None or buffer.shape != value.shape or buffer.dtype is not value.dtype:
            pair = None
        elif buffer.device == value.device and _can_be_written(buffer):
            pair = (buffer, value)
        elif moved is not None and slot not in moved:
            buffers[slot] = buffer
            continue
        else:
            pair = None
        if pair is not None and into.setdefault(id(buffer), pair)[1] is value:
            buffers[slot] = buffer
        else:
            buffers[slot] = None if value is None else copies.setdefault(id(value), value.clone().detach())
    put(own, buffers)
    copy_all([buffer for buffer, _ in into.values()], [value for _, value in into.values()])
    return buffers


def _can_be_written(buffer: Tensor) -> bool:
    """Not if it has been expanded, or is sparse."""
    dense = buffer.layout is torch.strided
    return dense and (buffer.is_contiguous() or not torch._debug_has_internal_overlap(buffer))


def copies_of(buffers: Buffers) -> Buffers:
    """A copy of each, of a shared one once; on an accelerator in a launch for each dtype, and not for each buffer."""
    if not buffers:
        return {}
    tensors = {id(buffer): buffer for buffer in buffers.values() if buffer is not None}
    copies = {key: torch.empty_like(t) if t.layout is torch.strided else t.clone() for key, t in tensors.items()}
    copy_all(copies.values(), tensors.values())
    return {slot: None if buffer is None else copies[id(buffer)] for slot, buffer in buffers.items()}


@torch.no_grad()
def copy_all(to: Iterable[Tensor], source: Iterable[Tensor]) -> None:
    """Write the values of ``source`` into the tensors of ``to``, one into one."""
    groups: dict[Any, tuple[list[Tensor], list[Tensor]]] = {}
    for target, value in zip(to, source, strict=True):
        if (target.dtype, target.device) == (value.dtype, value.device):
            targets, values = groups.setdefault((target.dtype, target.device), ([], []))
            targets.append(target)
            values.append(value)
        else:
            target.copy_(value)
    for targets, values in groups.values():
        torch._foreach_copy_(targets, values)


def marks(buffers: Buffers) -> dict[Slot, Mark]:
    """All of them as they are now."""
    return {slot: (buffer, 0 if buffer is None else buffer._version) for slot, buffer in buffers.items()}


def values_met(entries: Sequence[Met], buffers: Buffers) -> list[dict[Slot, Any]]:
    """What each forward has met that is not there now.

    Args:
        entries: of the forwards, the oldest first.
        buffers: what is there now.

    Raises:
        Overwritten: a buffer was written by something else than these forwards.
    """
    later = marks(buffers)
    known: dict[Slot, Any] = {}  # the others are what is there now
    result = []
    for entry in reversed(entries):
        here = {}
        for slot in dict.fromkeys([*entry.before, *later, *known]):
            if slot in entry.moved:
                here[slot] = entry.moved[slot]
            elif not same(entry.after.get(slot), later.get(slot)):
                raise Overwritten(slot)
            elif slot in known:
                here[slot] = known[slot]
        result.append(here)
        later, known = entry.before, here
    return result[::-1]


def same(a: Mark | None, b: Mark | None) -> bool:
    """Whether nobody has written the buffer in between, or there was none."""
    return a is b or (a is not None and b is not None and a[0] is b[0] and a[1] == b[1])
