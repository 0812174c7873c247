"""Learning rates, warm-up and momentum that follow a stage's delay, or its place."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from ..validation import is_number
from .factories import with_keywords

Factor = Callable[[int], float]  # update n -> its learning rate, relative to the base rate


def lr_by_delay(anneal: int, factor: Factor | None = None) -> Callable[..., LambdaLR]:
    """A scheduler factory: the learning rate of a stage over its delay at the start, and whole after ``anneal`` updates.

    Update n at a stage with delay d, in updates, has the learning rate::

        factor(n) lr / max(1, d)^p,      p = 1 - min(n / anneal, 1)

    Source: Yang et al., *PipeMare: Asynchronous pipeline parallel DNN training*, MLSys 2021, technique T1, with
    ``tau = d``; a delay below an update, where theirs would raise the rate, leaves it as it is.

    Args:
        anneal: updates after which the delay no longer counts; 0: at once.
        factor: the schedule that it multiplies; None: constant.

    Returns:
        For ``dtrp.Pipeline(lr_scheduler=)``; it names ``delay``, so the last stage, which has none, keeps its rate.

    Raises:
        ValueError: ``anneal`` below 0.

    Example:
        >>> import torch
        >>> from torch import nn, optim
        >>> make = lr_by_delay(anneal=100)
        >>> optimizer = optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.4)
        >>> make(optimizer, delay=4).get_last_lr()
        [0.1]
    """
    if not is_number(anneal) or anneal < 0:
        raise ValueError(f"anneal={anneal!r}: a number of updates of at least 0")

    return by_delay(factor, lambda delay: delay_factor(anneal, delay))


def warmup_by_delay(updates: int, factor: Factor | None = None) -> Callable[..., LambdaLR]:
    """A scheduler factory: a linear warm-up that is longer where the delay is.

    Update n at a stage with delay d has the learning rate::

        factor(n) lr min(1, (n + 1) / (updates (1 + d) + 1))

    which is the usual warm-up over ``updates`` where there is no delay. Ours.

    Args:
        updates: of the warm-up without a delay.
        factor: the schedule that it multiplies; None: constant.

    Returns:
        For ``dtrp.Pipeline(lr_scheduler=)``; it names ``delay``.

    Raises:
        ValueError: ``updates`` below 0.
    """
    if not is_number(updates) or updates < 0:
        raise ValueError(f"updates={updates!r}: a number of updates of at least 0")

    return by_delay(factor, lambda delay: warmup_factor(updates, delay))


def delay_factor(anneal: float, delay: int) -> Factor:
    """What `lr_by_delay` multiplies the learning rates of a stage with this delay by."""
    return lambda n: 1.0 if n >= anneal else max(1, delay) ** (n / anneal - 1)


def warmup_factor(updates: float, delay: int) -> Factor:
    """What `warmup_by_delay` multiplies the learning rates of a stage with this delay by."""
    return lambda n: min(1.0, (n + 1) / (updates * (1 + delay) + 1))


def by_delay(factor: Factor | None, *of_delay: Callable[[int], Factor]) -> Callable[..., LambdaLR]:
    """A scheduler factory: the product of a schedule and of what is made for the delay of a stage."""

    def scheduler(optimizer: Optimizer, *, delay: int) -> LambdaLR:
        factors = [*([] if factor is None else [factor]), *(make(delay) for make in of_delay)]
        return LambdaLR(optimizer, lambda n: math.prod(each(n) for each in factors))

    return scheduler


def momentum_by_stage(make: Callable[..., Optimizer], most: float = 0.99) -> Callable[..., Optimizer]:
    """An optimizer factory: what ``make`` makes, with more momentum the further a stage is from the loss.

    The momentum of stage k of K, counted from 0, of an optimizer with the momentum mu (SGD's ``momentum``, the first of
    Adam's ``betas``) is::

        mu_k = mu + (K - 1 - k) (most - mu) / K

    Source: the released code of Ajanthan et al., *Nesterov method for asynchronous pipeline parallel optimization*, ICML
    2025 (arXiv:2505.01099), option ``adaptive_momentum``: beta1 + (versions - 1)(0.99 - beta1)/K, where a stage of theirs
    has K - k versions of its weights. They use it with NAdam. A scheduler that cycles the momentum (OneCycleLR, unless
    ``cycle_momentum=False``) overwrites it.

    Args:
        make: the factory of the optimizer, which is given the keywords that it names.
        most: what the momentum goes towards; in [0, 1).

    Returns:
        For ``dtrp.Pipeline(optimizer=)``; it names ``stage`` and ``num_stages``.

    Raises:
        ValueError: ``most`` out of range; when it is called: no momentum, or one above ``most``.
        TypeError: when it is called: an optimizer that has neither ``momentum`` nor ``betas``.
    """
    if not is_number(most) or not 0 <= most < 1:
        raise ValueError(f"most={most!r}: a momentum of at least 0 and below 1")

    def factory(params: Any, *, stage: int, num_stages: int, delay: int = 0, named: Any = ()) -> Optimizer:
        optimizer = with_keywords(make, params, stage=stage, num_stages=num_stages, delay=delay, named=named)
        share = (num_stages - 1 - stage) / num_stages
        for group in (optimizer.defaults, *optimizer.param_groups):
            _add_momentum(type(optimizer).__name__, group, share, most)
        return optimizer

    return factory


def _add_momentum(name: str, group: dict[str, Any], share: float, most: float) -> None:
    """Move the momentum in the options of a group by a ``share`` of its way to ``most``."""
    if not {"momentum", "betas"} & group.keys():
        raise TypeError(
            f"momentum_by_stage was given {name}, which has neither momentum nor betas; use SGD, or one of the Adam family"
        )
    now = group["momentum"] if "momentum" in group else group["betas"][0]
    if not now and "betas" not in group:
        raise ValueError(f"momentum_by_stage was given {name} without momentum; pass it one, as momentum=0.9")
    if now > most:
        raise ValueError(f"most={most} is below the momentum {now} of {name}; pass one that is above it")
    if "momentum" in group:
        group["momentum"] += share * (most - group["momentum"])
    if "betas" in group:
        beta1, *others = group["betas"]
        group["betas"] = (beta1 + share * (most - beta1), *others)
