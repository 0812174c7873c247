"""Whether values from a manifest can stand in the places of a pipeline's own, before any is put there."""

from __future__ import annotations

import warnings
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
        warn_of_options(where, a, b)


def in_flight(manifest: dict[str, Any], leads: list[int]) -> None:
    """What an exact checkpoint says of its stages' places in their order of work: all are in the same run.

    Every stage has had the forwards of all mini-batches, and each the gradients that the next one has sent it.

    Args:
        manifest: whose stages' parts are of their form (`exact.check_form`).
        leads: of the stages.
    """
    for replica in range(manifest["num_replicas"]):
        parts = [manifest["state"][f"{k}.{replica}"] for k in range(len(leads))]
        backwards = [part["position"][1] for part in parts]
        for k, (part, after) in enumerate(zip(parts, [*backwards[1:], None], strict=True)):
            forward, backward, update, left = part["position"]
            notes, what = part["notes"], f"what is in flight in stage {k}"
            counted = (part["num_updates"], part["next_microbatch"], part["version"])
            expect(
                counted == (manifest["num_updates"], manifest["next_microbatch"], update), f"{what} is of another run"
            )
            expect(
                forward == part["next_microbatch"] and forward - backward <= leads[k], f"{what} is more than its lead"
            )
            expect(sum(left) == len(notes) == forward - backward and 0 not in left, f"{what} is not what is left")
            expect(len(left) == len(part["samples"]) == part["num_updates"] - update, f"{what} is not what is left")
            minibatches = [update + i for i, count in enumerate(left) for _ in range(count)]
            said = [(note[0], note[1]) for note in notes]
            expect(said == list(zip(range(backward, forward), minibatches, strict=True)), f"{what} is out of order")
            kept = [tuple(entry["micro"][:2]) for entry in part["stash"]]
            expect(kept == [note[:2] for note in map(tuple, notes) if note[3]], f"{what} is not what is kept")
            arrived = part["arrived"] if isinstance(part["arrived"], list) else []
            expect(len(arrived) == (0 if after is None else after - backward), f"{what} lacks its gradients")


class OtherOptions(UserWarning):
    """An optimizer of this pipeline was made with other options than the checkpoint has."""


def warn_of_options(where: str, own: dict[str, Any], saved: dict[str, Any]) -> None:
    """Say which options of a parameter group are not as the pipeline was made; those of the checkpoint go on.

    A learning rate is compared as it was before any scheduler, and not at all where there is none: loops set it by hand.
    """
    cycled = {"momentum", "betas"} if "max_momentum" in own else set()  # by OneCycleLR and CyclicLR
    for option in sorted(own.keys() & saved.keys() - {"params", "lr"} - cycled):
        a, b = (each.tolist() if isinstance(each, Tensor) else each for each in (own[option], saved[option]))
        if a is not None and a != b:
            warnings.warn(
                f"the optimizer of {where} was made with {option}={a}, and the checkpoint has {b}, which goes on; change it after "
                "load() if it is to be another",
                OtherOptions,
                stacklevel=2,
            )


def entries(where: str, state: Any, known: set[Any]) -> None:
    """An optimizer's state: a dict for each of some parameters, by number or name."""
    form = isinstance(state, dict) and all(isinstance(entry, dict) for entry in state.values())
    expect(form and set(state) <= known, f"the optimizer state of {where} is not by parameter")
