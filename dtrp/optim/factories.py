"""Factories of the caller's, which are given the keywords that they name."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from inspect import Parameter
from typing import Any, TypeVar

T = TypeVar("T")


def with_keywords(make: Callable[..., T], first: Any, **offered: Any) -> T:
    """What a factory of the caller's makes of ``first``, and of those of the keywords ``offered`` that it names.

    Args:
        make: called as ``make(first, **named)``. A keyword that a ``functools.partial`` has bound stays bound.
        first: the parameters of a stage, or its optimizer.
        offered: what it may ask for: ``stage``, ``num_stages``, ``delay``, and for an optimizer ``named``.
    """
    try:
        parameters = list(inspect.signature(make).parameters.values())
    except (TypeError, ValueError):  # of a function in C
        parameters = []
    if parameters and parameters[0].kind in (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD):
        del parameters[0]  # takes ``first``
    kinds = (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)
    names = {parameter.name for parameter in parameters if parameter.kind in kinds}
    names -= set(make.keywords) if isinstance(make, functools.partial) else set()  # which the caller has chosen
    return make(first, **{name: value for name, value in offered.items() if name in names})
