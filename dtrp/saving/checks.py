"""Whether values from a manifest can stand in the places of a pipeline's own, before any is put there."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .manifest import CheckpointError, is_count


def expect(holds: Any, what: str) -> None:
    """Refuse a manifest in which ``what`` does not hold."""
    if not holds:
        raise CheckpointError(f"the manifest is not of its form: {what}; use another checkpoint")


def counts(values: Any, what: str, length: int | None = None) -> None:
    """A list of whole numbers that count something."""
    right = isinstance(values, list | tuple) and all(map(is_count, values))
    expect(right and length in (None, len(values)), f"{what} is no list of {'' if length is None else length} counts")


def alike(own: Any, saved: Any, what: str) -> None:
    """``saved`` is of the type of ``own``, and has its keys if it is a dict, its length if it is a list."""
    if own is None or saved is None:
        expect(own is saved, f"{what} is None only here or only there")
        return
    number = (int, float, Tensor)
    both = isinstance(own, number) and isinstance(saved, number) and isinstance(own, bool) == isinstance(saved, bool)
    expect(both or isinstance(saved, type(own)) or isinstance(own, type(saved)), f"{what} is a {type(saved).__name__}")
    if isinstance(own, list | tuple):
        expect(len(own) == len(saved), f"{what} has another length")
        for i, (a, b) in enumerate(zip(own, saved, strict=True)):
            alike(a, b, f"{what}.{i}")
    if isinstance(own, dict) and all(isinstance(key, str) for key in own):
        expect(own.keys() == saved.keys(), f"{what} has other keys")
        for key in own:
            alike(own[key], saved[key], f"{what}.{key}")


def groups(where: str, own: list[dict[str, Any]], saved: Any) -> None:
    """Parameter groups of an optimizer: as many, with as many members, and with options alike."""
    form = isinstance(saved, list) and all(isinstance(g, dict) and isinstance(g.get("params"), list) for g in saved)
    expect(form, f"{where} has no parameter groups")
    if [len(g["params"]) for g in own] != [len(g["params"]) for g in saved]:
        raise CheckpointError(
            f"{where} has other parameter groups in the checkpoint; make the optimizer with the same groups"
        )
    for a, b in zip(own, saved, strict=True):
        if a.keys() != b.keys():
            raise CheckpointError(
                f"the optimizer of {where} has the option {sorted(a.keys() ^ b.keys())[0]!r} only here or only in the checkpoint"
            )
        for option in a.keys() - {"params"}:
            if a[option] is not None:  # which says that torch chooses
                alike(a[option], b[option], f"the option {option!r} of {where}")


def entries(where: str, state: Any, known: set[Any]) -> None:
    """An optimizer's state: a dict for each of some parameters, by number or name."""
    form = isinstance(state, dict) and all(isinstance(entry, dict) for entry in state.values())
    expect(form and set(state) <= known, f"the optimizer state of {where} is not by parameter")
