"""The buffers that a stage's forwards run on, and the buffer values that each forward in flight has read.

A forward may read what it moves (a hidden state, spectral norm's vectors, a cache that grows), and several forwards
come before the backward of the first. So where a backward repeats the forward, the first forwards run on buffers that
are ahead of the module's::

    F(m)    moves the buffers that F(m-1) has left; a copy of the module's, where nothing is in flight
    B(m)    moves the module's buffers

A forward whose graph is kept runs on copies, so that nothing writes what the graph has saved; afterwards the module
gets the buffers as the forward has left them.

A graph cannot be written to disk: a checkpoint holds what it was made from, and loading builds it again
(`dtrp.saving.exact`). Where the forward reads a buffer that it moves, the second forward must read what the first has read::

    F(m)    1. note the count of writes of every buffer
            2. run on copies
            3. of the buffers that have moved: keep the old value; write the copies back
            4. note the counts again

    save    F(m) has read: the value that is kept, if it moved the buffer; else what F(m+1) has read, or for the newest
            forward the present value, if nothing has written it since 4.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from operator import is_
from typing import Any

from torch import Tensor, nn

from ..tensors.module_buffers import Buffers, Slot, buffers_of, copies_of, names_of, put
from ..tensors.module_mode import Roster
from ..tensors.pytree import tensors_in
from ..tensors.torch_private import write_count
from .reach import storages_of

Mark = tuple[Tensor | None, int]  # a buffer, and its count of writes
_PLAIN = (bool, int, float, str, type(None))
ABSENT = False  # in place of a buffer that was not registered


class Overwritten(RuntimeError):
    """A buffer has been written, so that the value which a graph in flight has read is lost."""

    def __init__(self, slot: Slot) -> None:
        super().__init__(slot[1])
        self.slot = slot


@dataclass
class BuffersRead:
    """The buffers that one forward has read.

    Args:
        moved: the old values of the buffers that it moved.
        before, after: marks of all buffers, before the forward and after it.
    """

    moved: dict[Slot, Any] = field(default_factory=dict)
    before: dict[Slot, Mark] = field(default_factory=dict)
    after: dict[Slot, Mark] = field(default_factory=dict)


@dataclass
class BufferState:
    """Another state of a module than its present one.

    Args:
        buffers: all buffers.
        attributes: numbers, texts and None of modules that have buffers, where they differ (the length of a cache).
        seen: marks of the module's present buffers, up to which ``buffers`` have followed them.
    """

    buffers: Buffers
    attributes: dict[nn.Module, dict[str, Any]] = field(default_factory=dict)
    seen: dict[Slot, Mark] = field(default_factory=dict)

    def follow(self, current: Buffers) -> None:
        """Adopt what the caller has done to the module's ``current`` buffers since they were seen."""
        now = marks(current)
        self.buffers |= copies_of({slot: current[slot] for slot in now if not same(now[slot], self.seen.get(slot))})
        for slot in self.seen.keys() - now.keys():
            self.buffers.pop(slot, None)
        self.seen = now

    @contextmanager
    def entered(self, module: Roster, current: Buffers, noted: Iterable[nn.Module]) -> Iterator[None]:
        """Within it the module is in this state, and moves it; after it, the module has its ``current`` buffers again.

        Args:
            module: the module whose state this is.
            current: the buffers that the module has.
            noted: the submodules whose attributes are restored too, if they have buffers.
        """
        before = {member: dict(vars(member)) for member in noted}
        for member, changed in self.attributes.items():
            vars(member).update(changed)
        put(current, self.buffers)
        try:
            yield
        finally:
            self.buffers = buffers_of(module)
            put(self.buffers, current)
            having = {member for member, _ in current | self.buffers} if before else set()
            for member in before.keys() & having:
                self._restore_attributes(member, before[member])

    def _restore_attributes(self, member: nn.Module, before: dict[str, Any]) -> None:
        """Move the attributes of a submodule that differ from ``before`` into this state, and put the old ones back."""
        now = vars(member)
        if before.keys() == now.keys() and all(map(is_, before.values(), now.values())):
            self.attributes.pop(member, None)
            return
        changed = {
            name: value
            for name, value in now.items()
            if type(value) in _PLAIN and (name not in before or before[name] is not value)
        }
        self.attributes[member] = changed
        for name in changed:
            del now[name]
        now.update({name: before[name] for name in changed if name in before})


def doubles(module: nn.Module, buffers: Buffers) -> dict[Slot, str]:
    """The buffers that share memory with another buffer or with an attribute, and the full name of that."""
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


def marks(buffers: Buffers) -> dict[Slot, Mark]:
    """The marks of all buffers as they are now."""
    return {slot: (buffer, 0 if buffer is None else write_count(buffer)) for slot, buffer in buffers.items()}


def values_met(entries: Sequence[BuffersRead], buffers: Buffers) -> list[dict[Slot, Any]]:
    """For each forward, the buffer values that it has read and that are not there any more.

    Args:
        entries: the records of the forwards, the oldest first.
        buffers: the present buffers.

    Raises:
        Overwritten: a buffer was written by something else than these forwards.
    """
    later = marks(buffers)
    known: dict[Slot, Any] = {}  # the others have their present value
    result = []
    for entry in reversed(entries):
        values = {}
        for slot in dict.fromkeys([*entry.before, *later, *known]):
            if slot in entry.moved:
                values[slot] = entry.moved[slot]
            elif not same(entry.after.get(slot), later.get(slot)):
                raise Overwritten(slot)
            elif slot in known:
                values[slot] = known[slot]
        result.append(values)
        later, known = entry.before, values
    return result[::-1]


def same(a: Mark | None, b: Mark | None) -> bool:
    """Whether nothing has written the buffer in between, or there was none."""
    return a is b or (a is not None and b is not None and a[0] is b[0] and a[1] == b[1])
