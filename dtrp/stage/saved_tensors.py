"""What autograd saves of a forward, weighed.

Hooks see every tensor that is saved. Where hooks are set autograd does not look itself whether a saved tensor has been
written since, so they do::

    forward     pack      weigh the storage; keep an alias of the tensor, and how often it has been written
    backward    unpack    as often as then? then the alias is what was saved; else the error that autograd raises

An alias and not the tensor: an operation may save its own output, which holds the operation's node, which would hold the
output. Such a graph is freed by its backward alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

import torch
from torch import Tensor, nn

from ..tensors.layout import parts_of
from .buffers import buffers_of, copies_of, write

T = TypeVar("T")
NOT_WEIGHED = (
    "its graph cannot be weighed: the caller's hooks on saved tensors are around it, or its forward refuses any (as "
    "torch.func.grad does)"
)


def weigh_graph(
    run: Callable[[], T], module: nn.Module, known: Iterable[Tensor] = ()
) -> tuple[T, dict[int, int] | None]:
    """Run a forward, and weigh what its graph saves.

    Args:
        run: the forward; called once more, without hooks, where something in it (`torch.func.grad`) refuses them.
        module: whose forward it is; its parameters and buffers are not weighed.
        known: other tensors that are not.

    Returns:
        What ``run`` returns; and the bytes of each storage, by its address. None where nobody could look,
        since the caller has hooks around it, or the forward refuses them. What goes through hooks that the module sets
        within (an activation checkpoint) is not seen.
    """
    if not _admitted():
        return run(), None
    own = [*module.parameters(), *module.buffers(), *known]
    unweighed = {part.untyped_storage().data_ptr() for t in own for part in parts_of(t)}
    sizes: dict[int, int] = {}

    def pack(t: Tensor) -> tuple[Tensor, int]:
        for part in parts_of(t):
            storage = part.untyped_storage()
            if storage.data_ptr() not in unweighed:
                sizes[storage.data_ptr()] = storage.nbytes()
        return t.detach(), t._version  # which they share

    before = copies_of(buffers_of(module))
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, _unpack):
            return run(), sizes
    except RuntimeError as error:
        if "saved tensor hooks" not in str(error):
            raise
    write(buffers_of(module), before)
    return run(), None


def _admitted() -> bool:
    """Whether hooks would be in nobody's way: the caller has none, and has not ruled them out."""
    try:
        with torch.autograd.graph.disable_saved_tensors_hooks("looking"):  # refused where there are any
            pass
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
            return True
    except RuntimeError:
        return False


def _unpack(saved: tuple[Tensor, int]) -> Tensor:
    tensor, version = saved
    if tensor._version != version:
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace operation: "
            f"[{tensor.type()} {list(tensor.shape)}] is at version {tensor._version}; expected version {version} instead; "
            "make the operation that wrote it out of place"
        )
    return tensor
