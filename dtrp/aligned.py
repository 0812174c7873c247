"""A copy that a kernel cannot tell from the original.

Matrix products and vectorized kernels may round differently for data that starts at another distance
from a cache line. A micro-batch is a slice of the caller's tensor and often starts off the line, so a
plain ``clone()`` of it can change the last bit of what a layer computes. `aligned_clone` keeps the distance.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_LINE_BYTES = 512  # a multiple of every cache line, and what allocators on accelerators align to


def aligned_clone(x: Tensor) -> Tensor:
    """``x.clone()`` with the strides of x and its address modulo the line. Differentiable."""
    clone: Tensor = _AlignedClone.apply(x)  # type: ignore[no-untyped-call]
    return clone


class _AlignedClone(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        size = x.element_size()
        dense = sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True)) + 1 == x.numel()
        if not dense or x.data_ptr() % size:
            return x.clone()
        room = torch.empty(x.numel() + _LINE_BYTES // size, dtype=x.dtype, device=x.device)
        shift = (x.data_ptr() - room.data_ptr()) % _LINE_BYTES // size
        # Not room.as_strided(...): autograd forbids writing a view that a custom function returned.
        clone = torch.empty(0, dtype=x.dtype, device=x.device)
        return clone.set_(room.untyped_storage(), shift, x.shape, x.stride()).copy_(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad
