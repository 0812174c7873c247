"""Numbers and names that callers pass: checked before anything is made of them, and answered with what would do."""

from __future__ import annotations

import difflib
import math
import operator
from collections.abc import Iterable
from os.path import commonprefix
from typing import Any


def is_number(value: object, least: float = -math.inf) -> bool:
    """Whether a value is a finite int or float of at least ``least``."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value >= least


def is_whole(value: object, least: int = 1) -> bool:
    """Whether a value is an int of at least ``least``."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def whole(label: str, value: Any, least: int = 1, error: type[ValueError] = ValueError, advice: str = "") -> int:
    """``value`` as an int of at least ``least``; it may be of any integer type. ``advice``: what else would do.

    Raises:
        ValueError: it is none; the subclass ``error``, with the label.
    """
    try:
        number = least - 1 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = least - 1
    if number < least:
        raise error(f"{label}={value!r}: pass a whole number of at least {least}{advice}")
    return number


def check_seed(seed: Any) -> None:
    """Refuse what is neither a seed nor None."""
    if seed is not None and not (is_whole(seed, 0) and seed < 2**63):
        raise ValueError(f"seed={seed!r}: pass a whole number from 0 to 2**63 - 1")


def check_timeout(timeout_s: Any) -> None:
    """Refuse what is no time that a wait may take."""
    if not is_number(timeout_s) or timeout_s <= 0:
        raise ValueError(f"timeout_s={timeout_s!r}: pass a number of seconds above 0")


def nearest(name: object, names: Iterable[str]) -> str | None:
    """The most like it of ``names``, if one is; a name of the same letters before all others.

    >>> nearest("dtpr", ["bp", "dtr", "dtrp"])
    'dtrp'
    >>> nearest("encoder.layer.1", ["bert.encoder.layer", "bert.encoder.layer.1", "bert.pooler"])
    'bert.encoder.layer.1'
    """
    text = str(name).lower()

    def likeness(known: str) -> float:
        return difflib.SequenceMatcher(None, known.lower(), text).ratio()

    return min(
        (known for known in names if likeness(known) > 0.4),
        # Among equally near ones, the one that begins alike: resnet20 for resnet21, not resnet32.
        key=lambda known: (
            sorted(known.lower()) != sorted(text),
            -likeness(known),
            -len(commonprefix([known.lower(), text])),  # noqa: RUF071
        ),
        default=None,
    )


def unknown(label: str, name: object, names: Iterable[str]) -> str:
    """The message.

    >>> unknown("method", "spectran", ["bp", "spectrain"])
    "unknown method 'spectran'; did you mean 'spectrain'? known: bp, spectrain"
    """
    names = list(names)
    near = nearest(name, names)
    hint = f"did you mean {near!r}? " if near is not None else ""
    return f"unknown {label} {name!r}; {hint}known: {', '.join(names)}"
