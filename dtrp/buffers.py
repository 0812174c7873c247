"""What buffers a kept graph has met.

No graph can be written down: a checkpoint holds what it was made of, and loading makes it again (`dtrp.saving.exact`). Where the
forward reads a buffer that moves (spectral norm, a codebook), it must meet then what it met the first time::

    F(m)    1. note of every buffer how often it has been written
            2. run on copies
            3. of what has moved: keep what it was; write the copies back
            4. note again

    save    F(m) has met: what is kept, if it moved the buffer; else what F(m+1) has met, or for the newest what is there now,
            if nobody has written it since 4.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .modes import members

Mark = tuple[Tensor, int]  # a buffer, and how often it has been written


class Overwritten(RuntimeError):
    """A buffer has been written, and nobody knows what a graph in flight has met in its place."""


@dataclass
class Met:
    """The buffers that one forward has met.

    Args:
        moved: what those were that it moved.
        before, after: all buffers, before it and after it.
    """

    moved: dict[str, Tensor] = field(default_factory=dict)
    before: dict[str, Mark] = field(default_factory=dict)
    after: dict[str, Mark] = field(default_factory=dict)


def buffers_of(module: nn.Module) -> dict[str, Tensor]:
    """Those of a module as it is now, by name; where there are none, without the generators of ``named_buffers()``."""
    for member in members(module):
        if member._buffers:
            return dict(module.named_buffers())
    return {}


def copies_of(buffers: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A copy of each; on an accelerator in a launch for each dtype, and not for each buffer."""
    if not buffers:
        return {}
    copies = {name: torch.empty_like(buffer) for name, buffer in buffers.items()}
    copy_all(copies.values(), buffers.values())
    return copies


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


def marks(buffers: Mapping[str, Tensor]) -> dict[str, Mark]:
    """All of them as they are now."""
    return {name: (buffer, buffer._version) for name, buffer in buffers.items()}


def values_met(entries: Sequence[Met], buffers: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """What each forward has met that is not there now.

    Args:
        entries: of the forwards, the oldest first.
        buffers: what is there now.

    Raises:
        Overwritten: a buffer was written by something else than these forwards.
    """
    now = later = marks(buffers)
    known: dict[str, Tensor | None] = dict.fromkeys(buffers)  # None: what is there now
    result = []
    for entry in reversed(entries):
        if new := sorted(now.keys() - entry.before.keys()):
            raise Overwritten(new[0])
        here: dict[str, Tensor | None] = {}
        for name in entry.before:
            if name in entry.moved:
                here[name] = entry.moved[name]
            elif _same(entry.after.get(name), later.get(name)):
                here[name] = known.get(name)
            else:
                raise Overwritten(name)
        result.append({name: value for name, value in here.items() if value is not None})
        later, known = entry.before, here
    return result[::-1]


def _same(a: Mark | None, b: Mark | None) -> bool:
    return a is not None and b is not None and a[0] is b[0] and a[1] == b[1]
