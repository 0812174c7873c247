"""Adding a gradient to ``.grad`` of a leaf as autograd does it, without its engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def accumulate(leaf: Tensor, gradient: Tensor) -> None:
    """Add ``gradient``, a dense tensor that nobody else holds, to ``leaf.grad``; called without autograd.

    The first one is kept as it is where its strides are the leaf's, and copied into such where not: norms of gradients
    are summed in the order of memory.
    """
    if leaf.grad is not None:
        leaf.grad += gradient
    elif _laid_out_alike(gradient, leaf):
        leaf.grad = gradient
    else:
        leaf.grad = torch.empty_like(leaf, requires_grad=False).copy_(gradient)


def _laid_out_alike(gradient: Tensor, leaf: Tensor) -> bool:
    if not is_dense(leaf):
        return gradient.is_contiguous()
    sizes = zip(leaf.shape, leaf.stride(), gradient.stride(), strict=True)
    return all(size == 1 or a == b for size, a, b in sizes)


def is_dense(t: Tensor) -> bool:
    """Whether the elements fill the memory between the first and the last one, each its own place."""
    expected = 1
    for stride, size in sorted((stride, size) for stride, size in zip(t.stride(), t.shape, strict=True) if size != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def leaves_below(tensors: Sequence[Tensor]) -> set[int]:
    """The identities of the leaves that the tensors are computed of."""
    found: set[int] = set()
    seen: set[Any] = set()
    left: list[Any] = [t.grad_fn for t in tensors]
    while left:
        node = left.pop()
        if node is not None and node not in seen:
            seen.add(node)
            if isinstance(leaf := getattr(node, "variable", None), Tensor):
                found.add(id(leaf))
            left.extend(before for before, _ in node.next_functions)
    return found
