"""Checks of the numbers that callers pass, and the error by which they are refused."""

from __future__ import annotations

import math


class PlanError(ValueError):
    """A plan that cannot be made, with what would be possible; or a plan that does not fit."""


def is_number(value: object, least: float = 0) -> bool:
    """Whether a value is a finite int or float of at least ``least``."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and least <= value < math.inf


def is_whole(value: object, least: int = 1) -> bool:
    """Whether a value is an int of at least ``least``."""
    return isinstance(value, int) and is_number(value, least)


def check_whole(name: str, value: object, least: int = 1) -> None:
    """Refuse what is no whole number of at least ``least``."""
    if not is_whole(value, least):
        raise PlanError(f"{name}={value!r}: pass a whole number of at least {least}")
