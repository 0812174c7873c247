"""How many bytes an autograd graph saves of a forward.

Hooks see every tensor that is saved. Where hooks are set, autograd does not check by itself whether a saved tensor has
been written since, so the hooks do::

    forward     pack      add the size of the storage; keep an alias of the tensor, and its count of writes
    backward    unpack    the same count? then return the alias; else raise the error that autograd raises

An alias and not the tensor: an operation may save its own output, which holds the operation's node, which would hold
the output. Such a graph is freed by its backward alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

import torch
from torch import Tensor, nn

from ..tensors.layout import parts_of
from ..tensors.module_buffers import buffers_of, copies_of, write
from ..tensors.torch_private import write_count

T = TypeVar("T")
NOT_WEIGHED = (
    "its graph cannot be weighed: the caller's hooks on saved tensors are around it, or its forward refuses any (as "
    "torch.func.grad does)"
)


def weigh_graph(
    run: Callable[[], T], module: nn.Module, known: Iterable[Tensor] = ()
) -> tuple[T, dict[int, int] | None]:
    """Run a forward, and measure what its graph saves.

    Args:
        run: the forward; called again, without hooks, if something in it (`torch.func.grad`) refuses them.
        module: the module that ``run`` calls; its parameters and buffers are not counted.
        known: other tensors that are not counted.

    Returns:
        The result of ``run``; and the bytes of each saved storage, by its address. None instead of the bytes where
        hooks are not possible: the caller has some, or the forward refuses them. What goes through hooks that the
        module sets itself (an activation checkpoint) is not seen.
    """
    if not _admitted():
        return run(), None
    excluded = [*module.parameters(), *module.buffers(), *known]
    unweighed = {part.untyped_storage().data_ptr() for t in excluded for part in parts_of(t)}
    sizes: dict[int, int] = {}

    def pack(t: Tensor) -> tuple[Tensor, int]:
        for part in parts_of(t):
            storage = part.untyped_storage()
            if storage.data_ptr() not in unweighed:
                sizes[storage.data_ptr()] = storage.nbytes()
        return t.detach(), write_count(t)  # the alias has the same count

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
    """Whether hooks can be set: the caller has set none, and has not forbidden them."""
    try:
        with torch.autograd.graph.disable_saved_tensors_hooks("looking"):  # refused where there are any
            pass
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
            return True
    except RuntimeError:
        return False


def _unpack(saved: tuple[Tensor, int]) -> Tensor:
    tensor, version = saved
    now = write_count(tensor)
    if now != version:
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace operation: "
            f"[{tensor.type()} {list(tensor.shape)}] is at version {now}; expected version {version} instead; "
            "make the operation that wrote it out of place"
        )
    return tensor
