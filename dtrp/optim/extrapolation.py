"""Updates that are extrapolated: the error feedback of a delayed step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..validation import is_number
from .factories import is_by_place, with_keywords

STATE = "last_update"  # of a parameter, in the optimizer's state: what the optimizer itself subtracted last time


def extrapolated(make: Callable[..., Optimizer], c: float) -> Callable[..., Optimizer]:
    """An optimizer factory: what ``make`` makes, each of whose steps goes further along the change of its update.

    With u what the optimizer subtracts from a parameter in this step, and u_before in the last one::

        p <- p - u - c (u - u_before)

    The first step of a parameter is as it is, and one without a gradient is left alone. The type of the optimizer stays
    what it is, so predictors know it; a deep copy of it is extrapolated no longer. It costs a copy of the weights in the
    optimizer's state, where checkpoints find it, and another one while a step is made.

    Source: error feedback for a delay of one step, as the abstract of arXiv:2606.30634 describes it; its equation could
    not be read, and this one is our reading.

    Args:
        make: the factory of the optimizer, which is given the keywords that it names.
        c: how much further; 0: as ``make`` has it.

    Returns:
        For ``dtrp.Pipeline(optimizer=)``; ``dtrp.Pipeline(extrapolate=c)`` is short for it.

    Raises:
        ValueError: ``c`` below 0, or not finite.
    """
    if not is_number(c, 0):
        raise ValueError(f"extrapolate={c!r}: a finite number of at least 0 (0: updates as they are)")
    if c == 0:
        return make

    def factory(params: Any, *, stage: int = 0, num_stages: int = 1, delay: int = 0, named: Any = ()) -> Optimizer:
        optimizer = with_keywords(make, params, stage=stage, num_stages=num_stages, delay=delay, named=named)
        _hook(optimizer, c)
        return optimizer

    factory.by_place = is_by_place(make)  # type: ignore[attr-defined]
    return factory


def _hook(optimizer: Optimizer, c: float) -> None:
    before: list[tuple[Tensor, Tensor]] = []

    @torch.no_grad()
    def remember(optimizer: Optimizer, *_: Any) -> None:
        before[:] = [(p, p.clone()) for group in optimizer.param_groups for p in group["params"] if p.grad is not None]

    @torch.no_grad()
    def go_further(optimizer: Optimizer, *_: Any) -> None:
        for p, update in before:
            update.sub_(p)
            last = optimizer.state[p].get(STATE)
            if last is not None:
                p.sub_(update, alpha=c).add_(last, alpha=c)
            optimizer.state[p][STATE] = update
        before.clear()

    optimizer.extrapolate = c  # type: ignore[attr-defined]
    optimizer.register_step_pre_hook(remember)
    optimizer.register_step_post_hook(go_further)
