"""`dtrp.defer`: the gradient of a parameter that the backward of an ``autograd.Function`` leaves for later."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from ...tensors.torch_private import in_backward, uncompiled

# The stages that are in a backward: their parameters, and the leaves in the places of these, by identity; and who takes
# a gradient. No context variable: a backward on an accelerator runs in threads of autograd's own, which see none.
_receivers: list[tuple[dict[int, int], Callable[[int, Callable[[], Tensor]], None]]] = []


@uncompiled
def defer(parameter: Tensor, compute: Callable[[], Tensor]) -> None:
    """Leave the gradient of a parameter for later, in the backward of a ``torch.autograd.Function``.

    A method that divides its backward (``split_backward=True``) sends the gradient of a stage's input on, and computes
    those of its weights afterwards. It divides torch's own operations by itself; a Function of the caller's has its part
    in it by this call, and returns None for the parameter. In every other backward (a plain loop, another method) the
    gradient is computed at once, and added as autograd adds it.

    Args:
        parameter: a leaf that requires a gradient. One that does not gets none: ``compute`` is not called.
        compute: returns the gradient, of the shape of the parameter; called once, without autograd, at the latest before the
            stage's update. What it reads (the input, the gradient of the output) must not be written until then.

    Raises:
        TypeError: ``parameter`` is no tensor.
        ValueError: it is no leaf; or, when it is computed, the gradient has another shape.
        RuntimeError: no backward is running.

    Example:
        >>> import torch, dtrp
        >>> class Scale(torch.autograd.Function):
        ...     @staticmethod
        ...     def forward(ctx, x, weight):
        ...         ctx.save_for_backward(x, weight)
        ...         return x * weight
        ...     @staticmethod
        ...     def backward(ctx, grad):
        ...         x, weight = ctx.saved_tensors
        ...         dtrp.defer(weight, lambda: (grad * x).sum(0))
        ...         return grad * weight, None
        >>> weight = torch.nn.Parameter(torch.ones(3))
        >>> Scale.apply(torch.full((2, 3), 2.0), weight).sum().backward()
        >>> weight.grad
        tensor([4., 4., 4.])
    """
    if not isinstance(parameter, Tensor):
        raise TypeError(f"dtrp.defer was given a {type(parameter).__name__}; pass the parameter, a tensor")
    if not parameter.requires_grad:
        return
    if not parameter.is_leaf:
        raise ValueError(
            "dtrp.defer was given a tensor that is computed of others, whose gradient goes on to them; pass the parameter itself, "
            "or return the gradient from backward"
        )
    if not in_backward():
        raise RuntimeError(
            "dtrp.defer is called outside of a backward; call it in the backward of a torch.autograd.Function"
        )
    for indices, receive in reversed(_receivers):
        if (index := indices.get(id(parameter))) is not None:
            receive(index, compute)
            return
    add(parameter, computed(parameter, compute))


@torch.no_grad()
def computed(parameter: Tensor, compute: Callable[[], Tensor]) -> Tensor:
    """What ``compute`` returns, checked against the parameter.

    Raises:
        ValueError: it has another shape.
    """
    gradient = compute()
    if gradient.shape != parameter.shape:
        raise ValueError(
            f"dtrp.defer: compute returned a gradient of shape {tuple(gradient.shape)} for a parameter of shape "
            f"{tuple(parameter.shape)}; return one of the parameter's"
        )
    return gradient.to(parameter.dtype)


def add(leaf: Tensor, gradient: Tensor) -> None:
    """Add a gradient to ``.grad`` of a leaf, by autograd, which calls its hooks."""
    torch.autograd.backward([get_gradient_edge(leaf)], [gradient])


@contextmanager
def receiving(
    parameters: Sequence[nn.Parameter],
    leaves: Sequence[Tensor],
    take: Callable[[int, Callable[[], Tensor]], bool] | None = None,
) -> Iterator[None]:
    """Within it `defer` knows the parameters of a stage, and the leaves in their places.

    What is computed at once is added at the end, to ``.grad`` of the leaves, all of one parameter summed first.

    Args:
        parameters: of the stage.
        leaves: the tensors in their places in the graph that is differentiated, or the parameters.
        take: called with the index of a parameter and ``compute``; returns whether it is queued. None: nothing is.
    """
    sums: dict[int, Tensor] = {}

    def receive(index: int, compute: Callable[[], Tensor]) -> None:
        if take is None or not take(index, compute):
            gradient = computed(leaves[index], compute)
            sums[index] = gradient if index not in sums else sums[index] + gradient

    indices = {id(t): i for i, t in enumerate(parameters)}
    if leaves is not parameters:
        indices |= {id(t): i for i, t in enumerate(leaves)}
    receiver = indices, receive
    _receivers.append(receiver)
    try:
        yield
        for index, gradient in sums.items():
            add(leaves[index], gradient)
    finally:
        _receivers.remove(receiver)
