"""How a wrong name is answered: with the nearest right one, and all of them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def unknown(label: str, name: object, names: Iterable[str]) -> str:
    """The message.

    >>> unknown("method", "spectran", ["bp", "spectrain"])
    "unknown method 'spectran'; did you mean 'spectrain'? known: bp, spectrain"
    """
    names = list(names)
    near = difflib.get_close_matches(str(name), names, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"unknown {label} {name!r}; {hint}known: {', '.join(names)}"
