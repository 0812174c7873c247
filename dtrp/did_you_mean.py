"""How wrong names are answered: an unknown one with the nearest right one, and all of them."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Iterable, Mapping, Sequence
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


def unknown_point(point: str, known: Iterable[str]) -> str:
    """The message for a submodule in ``points``: of a large model's names, those as deep as the nearest tell most."""
    known = [name for name in known if name]
    depth = (nearest(point, known) or point).count(".")
    level = [name for name in known if name.count(".") == depth] or known
    text = unknown("submodule in points:", point, level)
    return text if len(text) < 1000 else text.split("known:")[0] + f"known at this depth: {', '.join(level[:20])}, ..."


def check_order(points: Sequence[str], places: Mapping[str, int], first: int) -> None:
    """Refuse points that are not in the order of the forward, or leave nothing for the first stage.

    Args:
        points: submodules.
        places: where each begins.
        first: where the model does.
    """
    if points and places[points[0]] <= first:
        raise ValueError(
            f"points={list(points)}: {points[0]!r} is where the model itself begins, and stage 0 would be empty; leave it out"
        )
    for a, b in itertools.pairwise(points):
        if places[a] >= places[b]:
            same = places[a] == places[b]
            raise ValueError(
                f"points={list(points)}: {b!r} begins {'with' if same else 'before'} {a!r}; "
                + ("name one of the two" if same else "put them in the order of the forward")
            )
