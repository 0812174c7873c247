"""Copies that a kernel cannot tell from the original, and gradients in the layout they were made in.

Matrix products and vectorized kernels may round differently for data that starts at another distance
from a cache line, or lies in another order. A micro-batch is a slice of the caller's tensor and often starts
off the line, so a plain ``clone()`` of it can change the last bit of what a layer computes; and a leaf's
``.grad`` is laid out like the leaf, whatever the order of the gradient that came. Between the layers of
one model neither happens, so it must not happen between stages.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_LINE_BYTES = 512  # a multiple of every cache line, and what allocators on accelerators align to


def aligned_clone(x: Tensor) -> Tensor:
    """``x.detach().clone()`` with the strides of x and its address modulo the line."""
    x = x.detach()
    size = x.element_size()
    strides = [(n, stride) for n, stride in zip(x.shape, x.stride(), strict=True) if n > 1]
    span = sum((n - 1) * stride for n, stride in strides) + 1
    expanded = any(stride == 0 for _, stride in strides)
    if not x.numel() or expanded or span > 4 * x.numel() or x.data_ptr() % size:
        return x.clone()
    room = torch.empty(span + _LINE_BYTES // size, dtype=x.dtype, device=x.device)
    shift = (x.data_ptr() - room.data_ptr()) % _LINE_BYTES // size
    # A tensor of its own and no view of `room`, so that it may be written in place.
    clone = torch.empty(0, dtype=x.dtype, device=x.device)
    return clone.set_(room.untyped_storage(), shift, x.shape, x.stride()).copy_(x)


def enter(x: Tensor, gradients: list[Tensor], *, copy: bool) -> Tensor:
    """``x``, or an aligned copy of it, for a graph to begin at; the gradient that reaches it goes to ``gradients``.

    Args:
        x: a leaf that requires a gradient.
        gradients: receives one tensor when the graph is differentiated, or none where x had no part in it.
        copy: whether the graph may write what it is given.
    """
    entered: Tensor = _Enter.apply(x, gradients, copy)  # type: ignore[no-untyped-call]
    return entered


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gradients: list[Tensor], copy: bool) -> Tensor:
        ctx.gradients = gradients
        return aligned_clone(x) if copy else x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, None]:
        ctx.gradients.append(grad)
        return None, None, None
