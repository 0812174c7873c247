"""Copies that a kernel cannot tell from the original, and gradients in the layout they were made in.

Matrix products and vectorized kernels may round differently for data that starts at another distance
from a cache line, or lies in another order. A micro-batch is a slice of the caller's tensor and often starts
off the line, so a plain ``clone()`` of it can change the last bit of what a layer computes; and a leaf's
``.grad`` is laid out like the leaf, whatever the order of the gradient that came. Between the layers of
one model neither happens, so it must not happen between stages.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import GradientEdge, get_gradient_edge

from .torch_private import sparse_parts

LINE_BYTES = 512  # what allocators on accelerators align to, and a multiple of every cache line
_CPU_LINE_BYTES = 128  # a multiple of every CPU's cache line and vector


def shift_of(x: Tensor) -> int:
    """Bytes from a line's beginning to the first element of x."""
    return x.data_ptr() % (_CPU_LINE_BYTES if x.device.type == "cpu" else LINE_BYTES)


def parts_of(x: Tensor) -> list[Tensor]:
    """The tensors that hold the values of x: x itself, or the parts of a sparse tensor or a tensor subclass."""
    if type(x) is Tensor and x.layout is torch.strided:
        return [x]
    if x.layout is torch.sparse_coo:
        return [*sparse_parts(x)]
    if x.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [x.crow_indices(), x.col_indices(), x.values()]
    if x.layout in (torch.sparse_csc, torch.sparse_bsc):
        return [x.ccol_indices(), x.row_indices(), x.values()]
    if hasattr(x, "__tensor_flatten__"):
        return [part for name in x.__tensor_flatten__()[0] for part in parts_of(getattr(x, name))]
    return [] if x.is_mkldnn else [x]  # which tells nobody


def sparse_of(indices: Tensor, values: Tensor, shape: Sequence[int], coalesced: bool) -> Tensor:
    """The sparse COO tensor of these parts, which stand where they are."""
    return torch.sparse_coo_tensor(indices, values, torch.Size(shape), is_coalesced=coalesced, check_invariants=False)


class Layout(NamedTuple):
    """How a tensor lies in memory: enough to lay its values down elsewhere so that no kernel sees a difference."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]  # elements
    span: int  # elements from the first to the last, both counted
    shift: int  # bytes from a line's beginning to the first element

    @classmethod
    def from_tensor(cls, x: Tensor, *, holes: bool = False) -> Layout:
        """The layout of x; of its contiguous copy where x overlaps itself other than by expansion.

        Args:
            x: any dense tensor.
            holes: also where x is mostly holes.
        """
        span = 1
        dense = x.data_ptr() % x.element_size() == 0
        for n, stride in sorted(zip(x.shape, x.stride(), strict=True), key=lambda dim: dim[1]):
            if n > 1 and stride:
                dense &= stride >= span
                span += (n - 1) * stride
        if x.numel() and dense and (holes or span <= 4 * x.numel()):
            return cls(tuple(x.shape), x.stride(), span, shift_of(x))
        return cls.contiguous(tuple(x.shape))

    @classmethod
    def contiguous(cls, shape: tuple[int, ...]) -> Layout:
        """The layout of a new tensor."""
        return cls(shape, torch.empty(shape, device="meta").stride(), math.prod(shape), 0)

    @property
    def expanded(self) -> bool:
        """Whether elements share their place."""
        return any(n > 1 and not stride for n, stride in zip(self.shape, self.strides, strict=True))

    def over(self, room: Tensor, dtype: torch.dtype, start: int = 0) -> Tensor:
        """A tensor of this layout on the storage of ``room``, from ``start`` bytes on.

        ``room`` is one of `aligned_room`'s. The result is a tensor of its own, no view, so that it may be written in
        place.
        """
        offset = (room.storage_offset() + start + self.shift) // dtype.itemsize
        tensor = torch.empty(0, dtype=dtype, device=room.device)
        return tensor.set_(room.untyped_storage(), offset, self.shape, self.strides)

    def fill(self, tensor: Tensor, x: Tensor) -> None:
        """Copy the values of x into ``tensor``, of this layout, each once though it be expanded."""
        for dim, (n, stride) in enumerate(zip(self.shape, self.strides, strict=True)):
            if n > 1 and not stride:
                tensor, x = tensor.narrow(dim, 0, 1), x.narrow(dim, 0, 1)
        tensor.copy_(x)


def aligned_room(nbytes: int, device: torch.device | None = None, *, pinned: bool = False) -> Tensor:
    """``nbytes`` of memory that begin at a line, as uint8."""
    room = torch.empty(nbytes + LINE_BYTES, dtype=torch.uint8, device=device, pin_memory=pinned)
    return room.narrow(0, -room.data_ptr() % LINE_BYTES, nbytes)


def aligned_clone(x: Tensor) -> Tensor:
    """``x.detach().clone()`` with the strides of x and its address modulo the line."""
    x = x.detach()
    if x.layout is torch.sparse_coo:
        indices, values = map(aligned_clone, parts_of(x))
        return sparse_of(indices, values, x.shape, x.is_coalesced())
    layout = Layout.from_tensor(x)
    if not x.numel() or layout.expanded:
        return x.clone()
    room = aligned_room(layout.shift + layout.span * x.element_size(), x.device)
    return layout.over(room, x.dtype).copy_(x)


def edge_of(t: Tensor) -> GradientEdge:
    """Where the differentiation of ``t``, which requires a gradient, starts, also when ``t`` is gone."""
    # Before torch 2.10 an edge does not hold the node of an autograd.Function, and a view's node does.
    held = "ownership_token" in GradientEdge._fields or not isinstance(t.grad_fn, BackwardCFunction)
    if held or t.layout is not torch.strided:
        return get_gradient_edge(t)
    with torch.enable_grad():
        return get_gradient_edge(t.view_as(t))


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
        return aligned_clone(x) if copy else x.view_as(x) if x.layout is torch.strided else x.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, None]:
        ctx.gradients.append(grad)
        return None, None, None
