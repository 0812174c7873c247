"""The caller's hooks on parameters, where a graph is built on copies of them.

In a plain loop a backward calls them for each parameter that it reaches::

    register_hook                        sees the gradient of this backward, and may return another in its place
    (the gradient is added to p.grad)
    register_post_accumulate_grad_hook   sees p, with the sum so far in p.grad

A copy has no hooks: for the time of a backward it is given hooks that call the parameter's, at the same places.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from functools import partial

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .torch_private import backward_hooks, grad_accumulated_hooks, has_gradient_hooks, write_count


def attach(
    parameters: Mapping[str, nn.Parameter], leaves: Sequence[Tensor], tied: Container[str]
) -> list[RemovableHandle]:
    """Let the next backward call the hooks of parameters, and check what they do.

    Args:
        parameters: the parameters of a stage, by name.
        leaves: the tensors on which its graph is built instead: the parameters themselves, or copies.
        tied: the names of the parameters that other stages hold too.

    Returns:
        Handles, to be removed after the backward.

    Raises:
        ValueError: a tied parameter has hooks; or torch would not call a hook for copies.
    """
    hooked = [
        (name, p, leaf) for (name, p), leaf in zip(parameters.items(), leaves, strict=True) if has_gradient_hooks(p)
    ]
    if refused := [name for name, _, _ in hooked if name in tied]:
        raise ValueError(
            f"{refused[0]} has a hook (register_hook or register_post_accumulate_grad_hook), and other stages hold it too: each of "
            "them would call it with its own part of the gradient. Use a step_pre_hook of the optimizer, which sees the whole, "
            "or cut the model so that all that use it lie in one stage"
        )
    handles: list[RemovableHandle] = []
    for name, p, leaf in hooked:
        hooks = backward_hooks(p)
        if leaf is not p and hooks:
            if any(".<locals>.get_inner_hook." in getattr(hook, "__qualname__", "") for hook in hooks.values()):
                raise ValueError(
                    f"{name} has a hook on several gradients (register_multi_grad_hook), and the graph stands on copies of "
                    "parameters, which torch does not know as such: use mode='any', a step_pre_hook of the optimizer, or a method "
                    "that recomputes at the weights of now (dtrp, dtr, fr)"
                )
            handles.append(leaf.register_hook(partial(_replaced, p)))  # type: ignore[no-untyped-call]
        if grad_accumulated_hooks(p):
            accumulated = partial(_accumulated, name, p, leaf, write_count(p))
            handles.append(leaf.register_post_accumulate_grad_hook(accumulated))  # type: ignore[no-untyped-call]
    return handles


def _replaced(p: nn.Parameter, gradient: Tensor) -> Tensor:
    for hook in list(backward_hooks(p).values()):
        replaced = hook(gradient)
        gradient = gradient if replaced is None else replaced
    return gradient


def _accumulated(name: str, p: nn.Parameter, leaf: Tensor, count: int, _: Tensor) -> None:
    if leaf is not p:
        p.grad = leaf.grad
        try:
            for hook in list(grad_accumulated_hooks(p).values()):
                if hook(p) is not None:
                    raise RuntimeError("Tensor post accumulate grad hooks should return None.")  # as torch says
        finally:
            leaf.grad, p.grad = p.grad, None
    if leaf.grad is None or write_count(p) != count:
        raise RuntimeError(
            f"a hook of {name} (register_post_accumulate_grad_hook) takes its gradient away, or writes the parameter, as one does "
            "that makes the optimizer's step in the backward; a pipeline makes it when the mini-batch's last backward is "
            "through: remove the hook, and pass that optimizer to Pipeline"
        )
