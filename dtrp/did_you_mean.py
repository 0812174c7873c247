"""How wrong names are answered: an unknown one with the nearest right one, and all of them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from os.path import commonprefix


def nearest(name: object, names: Iterable[str]) -> str | None:
    """The most like it of ``names``, if one is.

    >>> nearest("encoder.layer.1", ["bert.encoder.layer", "bert.encoder.layer.1", "bert.pooler"])
    'bert.encoder.layer.1'
    """
    names = list(names)
    near = difflib.get_close_matches(str(name), names, n=len(names) or 1, cutoff=0.4)
    # Among equally near ones, the one that begins alike: resnet20 for resnet21, not resnet32.
    near.sort(key=lambda n: (-difflib.SequenceMatcher(None, n, str(name)).ratio(), -len(commonprefix([n, str(name)]))))  # noqa: RUF071
    return near[0] if near else None


def unknown(label: str, name: object, names: Iterable[str]) -> str:
    """The message.

    >>> unknown("method", "spectran", ["bp", "spectrain"])
    "unknown method 'spectran'; did you mean 'spectrain'? known: bp, spectrain"
    """
    names = list(names)
    near = nearest(name, names)
    hint = f"did you mean {near!r}? " if near is not None else ""
    return f"unknown {label} {name!r}; {hint}known: {', '.join(names)}"
