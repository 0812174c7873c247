"""Factories of the caller's, which are given the keywords that they name; and what optimizers have in common."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from inspect import Parameter
from typing import Any, TypeVar

import torch

T = TypeVar("T")
_PLACE = {"stage", "num_stages", "delay"}


def with_keywords(make: Callable[..., T], first: Any, **offered: Any) -> T:
    """What a factory of the caller's makes of ``first``, and of those of the keywords ``offered`` that it names.

    Args:
        make: called as ``make(first, **named)``. A keyword that a ``functools.partial`` has bound stays bound.
        first: the parameters of a stage, or its optimizer.
        offered: what it may ask for: ``stage``, ``num_stages``, ``delay``, and for an optimizer ``named``.
    """
    names = _keywords(make)
    return make(first, **{name: value for name, value in offered.items() if name in names})


def loss_of(closure: Callable[[], Any] | None) -> Any:
    """What the ``closure`` of an optimizer's step returns, called with autograd; None where there is none."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


def group_options(group: dict[str, Any]) -> dict[str, Any]:
    """The options of a parameter group of an optimizer, without the names that torch may keep beside them."""
    return {key: value for key, value in group.items() if key not in ("params", "param_names")}


def is_by_place(make: Callable[..., Any] | None) -> bool:
    """Whether a factory asks where in the pipeline it is; one that wraps the caller's says it by an attribute."""
    known = getattr(make, "by_place", None)
    return make is not None and (bool(_keywords(make) & _PLACE) if known is None else bool(known))


def _keywords(make: Callable[..., Any]) -> set[str]:
    """The keywords that a factory names and the caller has not chosen already."""
    try:
        parameters = list(inspect.signature(make).parameters.values())
    except (TypeError, ValueError):  # of a function in C
        parameters = []
    if parameters and parameters[0].kind in (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD):
        del parameters[0]  # takes ``first``
    kinds = (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)
    names = {parameter.name for parameter in parameters if parameter.kind in kinds}
    return names - set(make.keywords) if isinstance(make, functools.partial) else names
