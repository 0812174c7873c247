"""Adding a gradient to ``.grad`` of a leaf as autograd does it, without its engine."""

from __future__ import annotations

import torch
from torch import Tensor


def accumulate(leaf: Tensor, gradient: Tensor) -> None:
    """Add ``gradient``, a dense tensor that nobody else holds, to ``leaf.grad``; called without autograd.

    The first one is kept as it is where its strides are the leaf's, and copied into such where not: norms of gradients
    are summed in the order of memory.
    """
    if leaf.grad is not None:
        leaf.grad.add_(gradient)
    elif _laid_out_alike(gradient, leaf):
        leaf.grad = gradient
    else:
        leaf.grad = torch.empty_like(leaf, requires_grad=False).copy_(gradient)


def _laid_out_alike(gradient: Tensor, leaf: Tensor) -> bool:
    if gradient.stride() == leaf.stride() and leaf.is_contiguous():
        return True
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
