"""What a caller hands over, checked before anything is made of it; what does not fit is refused with what to change."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from .methods import Keep, Method, get_method


def as_method(method: str | Method) -> Method:
    """The row that a name means; a row as it is."""
    row = get_method(method) if isinstance(method, str) else method
    if not isinstance(row, Method):
        raise TypeError(f"method is a {type(row).__name__}; pass a name or what get_method returns")
    return row


def check_seed(seed: Any) -> None:
    """A seed, or None."""
    if seed is not None and (not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**63):
        raise ValueError(f"seed={seed!r}: pass a whole number from 0 to 2**63 - 1")


def check_timeout(timeout_s: Any) -> None:
    """A time that a wait may take."""
    if isinstance(timeout_s, bool) or not isinstance(timeout_s, (int, float)) or not 0 < timeout_s < math.inf:
        raise ValueError(f"timeout_s={timeout_s!r}: pass a number of seconds above 0")


def whole(label: str, value: Any) -> int:
    """A count of at least 1; any integer type will do."""
    try:
        number = operator.index(value)
    except TypeError:
        number = 0
    if number < 1:
        raise ValueError(f"{label}={value!r}: pass a whole number of at least 1")
    return number


def check_callables(optimizer: Any, loss_fn: Any, lr_scheduler: Any) -> None:
    if isinstance(optimizer, Optimizer):
        raise TypeError(
            f"optimizer is a {type(optimizer).__name__} made already; each stage has its own: pass a function, "
            "lambda params: torch.optim.SGD(params, lr=0.1)"
        )
    for label, value in (("optimizer", optimizer), ("loss_fn", loss_fn), ("lr_scheduler", lr_scheduler)):
        if not callable(value) and not (label == "lr_scheduler" and value is None):
            raise TypeError(f"{label} is a {type(value).__name__}; pass a function")


def checked_optimizer(make: Callable[[list[nn.Parameter]], Optimizer]) -> Callable[[list[nn.Parameter]], Optimizer]:
    def checked(parameters: list[nn.Parameter]) -> Optimizer:
        optimizer = make(parameters)
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"optimizer returned a {type(optimizer).__name__}; it returns a torch.optim.Optimizer")
        if isinstance(optimizer, torch.optim.LBFGS):
            raise TypeError(
                "LBFGS calls the loss many times in a step, which no pipeline can do; use another optimizer"
            )
        strange = {id(p) for group in optimizer.param_groups for p in group["params"]} - {id(p) for p in parameters}
        if strange:
            raise ValueError(
                "optimizer was given a stage's parameters and holds others; use only those it is called with (what a loss would "
                "train belongs into the last stage's module)"
            )
        return optimizer

    return checked


def checked_scheduler(make: Callable[[Optimizer], Any] | None) -> Callable[[Optimizer], Any] | None:
    if make is None:
        return None

    def checked(optimizer: Optimizer) -> Any:
        scheduler = make(optimizer)
        if isinstance(scheduler, ReduceLROnPlateau):
            raise TypeError(
                "ReduceLROnPlateau needs a metric at every step; use a scheduler that is a function of the update"
            )
        if not hasattr(scheduler, "step"):
            raise TypeError(
                f"lr_scheduler returned a {type(scheduler).__name__}; it returns a torch.optim.lr_scheduler"
            )
        return scheduler

    return checked


def keeping(method: Method, num_stages: int, keep: Any, memory_limit_bytes: Any) -> tuple[list[Method], int | None]:
    """Each stage's row, and the limit by which stages decide for themselves, if they do."""
    if keep != "auto" and memory_limit_bytes is not None:
        raise ValueError(
            f"memory_limit_bytes={memory_limit_bytes!r} with keep={keep!r}: the limit is what keep='auto' decides by; pass that"
        )
    if keep is None:
        return [method] * num_stages, None
    if keep == "auto":
        if memory_limit_bytes is None:
            raise ValueError("keep='auto' needs memory_limit_bytes, what a stage may hold")
        limit = whole("memory_limit_bytes", memory_limit_bytes)
        return [method] * num_stages, limit
    each = [keep] * num_stages if isinstance(keep, str) else list(keep)
    if len(each) != num_stages or any(one not in ("graph", "input") for one in each):
        raise ValueError(
            f"keep={keep!r}: pass 'graph', 'input' or 'auto', or 'graph' or 'input' for each of the {num_stages} stages"
        )
    return [method.keeping(cast(Keep, one)) for one in each], None
