"""Hooks that the caller has put on parameters, where a graph stands on copies of them.

In a plain loop a backward calls them for each parameter that it reaches::

    register_hook                        sees the gradient of this backward, and may give another in its place
    (the gradient is added to p.grad)
    register_post_accumulate_grad_hook   sees p, with the sum so far in p.grad

A copy has no hooks: for the time of a backward it is given some that call the parameter's, at the same places.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn


def attach(parameters: Mapping[str, nn.Parameter], leaves: Sequence[Tensor], tied: Container[str]) -> list[Any]:
    """Let the next backward call the hooks of parameters, and look at what they do.

    Args:
        parameters: of a stage, by name.
        leaves: what its graph stands on in their places: themselves, or copies.
        tied: the names of those that other stages hold too.

    Returns:
        Handles, which are to be removed after it.

    Raises:
        ValueError: a tied one has hooks; or there is one that torch would not call for copies.
    """
    hooked = [
        (name, p, leaf)
        for (name, p), leaf in zip(parameters.items(), leaves, strict=True)
        if p._backward_hooks or p._post_accumulate_grad_hooks
    ]
    if refused := [name for name, _, _ in hooked if name in tied]:
        raise ValueError(
            f"{refused[0]} has a hook (register_hook or register_post_accumulate_grad_hook), and other stages hold it too: each of "
            "them would call it with its own part of the gradient. Use a step_pre_hook of the optimizer, which sees the whole, "
            "or cut the model so that all that use it lie in one stage"
        )
    handles = []
    for name, p, leaf in hooked:
        if leaf is not p and p._backward_hooks:
            if any(".<locals>.get_inner_hook." in getattr(h, "__qualname__", "") for h in p._backward_hooks.values()):
                raise ValueError(
                    f"{name} has a hook on several gradients (register_multi_grad_hook), and the graph stands on copies of "
                    "parameters, which torch does not know as such: use mode='any', a step_pre_hook of the optimizer, or a method "
                    "that recomputes at the weights of now (dtrp, dtr, fr)"
                )
            handles.append(leaf.register_hook(partial(_replaced, p)))  # type: ignore[no-untyped-call]
        if p._post_accumulate_grad_hooks:
            accumulated = partial(_accumulated, name, p, leaf, p._version)
            handles.append(leaf.register_post_accumulate_grad_hook(accumulated))  # type: ignore[no-untyped-call]
    return handles


def _replaced(p: nn.Parameter, gradient: Tensor) -> Tensor:
    for hook in list((p._backward_hooks or {}).values()):
        replaced = hook(gradient)
        gradient = gradient if replaced is None else replaced
    return gradient


def _accumulated(name: str, p: nn.Parameter, leaf: Tensor, version: int, _: Tensor) -> None:
    if leaf is not p:
        p.grad = leaf.grad
        try:
            for hook in list((p._post_accumulate_grad_hooks or {}).values()):
                if hook(p) is not None:
                    raise RuntimeError("Tensor post accumulate grad hooks should return None.")  # as torch says
        finally:
            leaf.grad, p.grad = p.grad, None
    if leaf.grad is None or p._version != version:
        raise RuntimeError(
            f"a hook of {name} (register_post_accumulate_grad_hook) takes its gradient away, or writes the parameter, as one does "
            "that makes the optimizer's step in the backward; a pipeline makes it when the mini-batch's last backward is "
            "through: remove the hook, and pass that optimizer to Pipeline"
        )
