"""How a wrong name is answered: with the nearest right one, and all of them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from os.path import commonprefix


def unknown(label: str, name: object, names: Iterable[str]) -> str:
    """The message.

    >>> unknown("method", "spectran", ["bp", "spectrain"])
    "unknown method 'spectran'; did you mean 'spectrain'? known: bp, spectrain"
    """
    names = list(names)
    near = difflib.get_close_matches(str(name), names, n=len(names) or 1, cutoff=0.4)
    # Among equally near ones, the one that begins alike: resnet20 for resnet21, not resnet32.
    near.sort(key=lambda n: (-difflib.SequenceMatcher(None, n, str(name)).ratio(), -len(commonprefix([n, str(name)]))))  # noqa: RUF071
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"unknown {label} {name!r}; {hint}known: {', '.join(names)}"
