"""The operations whose backward is divided: the gradient of their input, and those of weight and bias.

The formulas are autograd's, with its choices by strides, so that the bits are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

_convolution_backward = torch.ops.aten.convolution_backward.default
_embedding_backward = torch.ops.aten.embedding_backward.default


class Operation(Protocol):
    """One use of a weight; ``x`` is the input, ``w`` the weight as it was read, ``g`` the gradient of the output."""

    def input_gradient(self, g: Tensor, x: Tensor, w: Tensor) -> Tensor:
        """The gradient of x."""
        ...

    def weight_gradients(self, g: Tensor, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor | None]:
        """The gradients of w, and of the bias where there is one to train."""
        ...

    def weight_flops(self, g: Tensor, x: Tensor, w: Tensor) -> int:
        """The floating-point operations of `weight_gradients`, roughly."""
        ...


@dataclass(frozen=True)
class Product:
    """``x @ w``, or ``x @ w.t() + bias`` of a linear map; x of shape (..., inputs).

    Args:
        transposed: whether w has the shape (outputs, inputs).
        bias: the shape of a bias to train, if there is one.
    """

    transposed: bool
    bias: torch.Size | None

    def input_gradient(self, g: Tensor, x: Tensor, w: Tensor) -> Tensor:
        matrix = w.t() if self.transposed else w
        g2, x2 = _flat(g), _flat(x)
        by_columns = x2.stride(0) == 1 and x2.stride(1) == x2.shape[0]
        gradient = matrix.mm(g2.t()).t() if by_columns else g2.mm(matrix.t())
        return gradient if x.dim() == 2 else gradient.view(x.shape)

    def weight_gradients(self, g: Tensor, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor | None]:
        matrix = w.t() if self.transposed else w
        g2, x2 = _flat(g), _flat(x)
        by_columns = matrix.stride(0) == 1 and matrix.stride(1) == matrix.shape[0]
        gradient = g2.t().mm(x2).t() if by_columns else x2.t().mm(g2)
        if self.transposed:
            gradient = gradient.t()
        return gradient, None if self.bias is None else g2.sum_to_size(self.bias)

    def weight_flops(self, g: Tensor, x: Tensor, w: Tensor) -> int:
        return 2 * x.numel() * g.shape[-1]


def _flat(t: Tensor) -> Tensor:
    return t if t.dim() == 2 else t.reshape(-1, t.shape[-1])


@dataclass(frozen=True)
class Convolution:
    """A convolution, or a transposed one, in one to three dimensions; the arguments are those of ``aten::convolution``.

    Args:
        bias: the shape of the bias, if there is one.
        trains_bias: whether it is trained.
    """

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    transposed: bool
    output_padding: tuple[int, ...]
    groups: int
    bias: tuple[int, ...] | None
    trains_bias: bool

    def _backward(self, g: Tensor, x: Tensor, w: Tensor, mask: list[bool]) -> tuple[Tensor, Tensor, Tensor]:
        gradients: tuple[Tensor, Tensor, Tensor] = _convolution_backward(
            g, x, w, self.bias, self.stride, self.padding, self.dilation, self.transposed, self.output_padding,
            self.groups, mask,
        )  # fmt: skip
        return gradients

    def input_gradient(self, g: Tensor, x: Tensor, w: Tensor) -> Tensor:
        return self._backward(g, x, w, [True, False, False])[0]

    def weight_gradients(self, g: Tensor, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor | None]:
        _, gradient, bias = self._backward(g, x, w, [False, True, self.trains_bias])
        return gradient, bias if self.trains_bias else None

    def weight_flops(self, g: Tensor, x: Tensor, w: Tensor) -> int:
        places = x if self.transposed else g
        return 2 * w.numel() * places.numel() // max(1, places.shape[1])


@dataclass(frozen=True)
class Lookup:
    """The rows of an embedding; x holds their numbers."""

    padding_idx: int
    scale_grad_by_freq: bool

    def input_gradient(self, g: Tensor, x: Tensor, w: Tensor) -> Tensor:
        raise AssertionError("numbers of rows have no gradient")

    def weight_gradients(self, g: Tensor, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor | None]:
        gradient: Tensor = _embedding_backward(g, x, w.shape[0], self.padding_idx, self.scale_grad_by_freq, False)
        return gradient, None

    def weight_flops(self, g: Tensor, x: Tensor, w: Tensor) -> int:
        return g.numel()
