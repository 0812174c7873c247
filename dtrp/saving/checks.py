"""Whether values from a manifest fit a pipeline, checked before any of them is put in place."""

from __future__ import annotations

import warnings
from typing import Any

from torch import Tensor

from ..typing import Json, StateDict
from .manifest import CheckpointError, are_counts


class OtherOptions(UserWarning):
    """An optimizer of this pipeline was made with other options than the checkpoint has."""


def expect(condition: object, what: str) -> None:
    """Refuse a manifest unless ``condition`` holds; ``what`` says what is wrong then."""
    if not condition:
        raise CheckpointError(f"the manifest is not of its form: {what}; use another checkpoint")


def expect_counts(values: Any, what: str, length: int | None = None) -> None:
    """Refuse anything but a list of whole numbers from 0 on."""
    expect(are_counts(values, length), f"{what} is no list of {'' if length is None else length} counts")


def expect_alike(current: Any, saved: Any, what: str) -> None:
    """Refuse a saved value of another type than the current one, or with other keys or another length."""
    if current is None or saved is None:
        expect(current is saved, f"{what} is None only here or only there")
        return
    numbers = all(isinstance(value, (int, float, Tensor)) for value in (current, saved))
    fits = numbers and isinstance(current, bool) == isinstance(saved, bool)
    fits = fits or isinstance(saved, type(current)) or isinstance(current, type(saved))
    expect(fits, f"{what} is a {type(saved).__name__}")
    if isinstance(current, list | tuple):
        expect(len(current) == len(saved), f"{what} has another length")
        for i, pair in enumerate(zip(current, saved, strict=True)):
            expect_alike(*pair, f"{what}.{i}")
    if isinstance(current, dict) and all(isinstance(key, str) for key in current):
        expect(current.keys() == saved.keys(), f"{what} has other keys")
        for key in current:
            expect_alike(current[key], saved[key], f"{what}.{key}")


def expect_same_groups(where: str, current: list[StateDict], saved: Any) -> None:
    """Refuse an optimizer's parameter groups that differ in number, in size, or in their options."""
    fits = isinstance(saved, list) and all(isinstance(g, dict) and isinstance(g.get("params"), list) for g in saved)
    expect(fits, f"{where} has no parameter groups")
    if [len(g["params"]) for g in current] != [len(g["params"]) for g in saved]:
        raise CheckpointError(
            f"{where} has other parameter groups in the checkpoint; make the optimizer with the same groups"
        )
    for a, b in zip(current, saved, strict=True):
        if a.keys() != b.keys():
            raise CheckpointError(
                f"the optimizer of {where} has the option {sorted(a.keys() ^ b.keys())[0]!r} only here or only in the checkpoint"
            )
        for option in a.keys() - {"params"}:
            if a[option] is not None:  # which lets torch choose
                expect_alike(a[option], b[option], f"the option {option!r} of {where}")
        warn_of_options(where, a, b)


def warn_of_options(where: str, current: StateDict, saved: StateDict) -> None:
    """Warn of options of a parameter group that differ from those of the pipeline; the saved ones go on.

    Learning rates are compared as they were before any scheduler, and not at all without one: loops set them by hand.
    """
    cycled = {"momentum", "betas"} if "max_momentum" in current else set()  # by OneCycleLR and CyclicLR
    for option in sorted(current.keys() & saved.keys() - {"params", "lr"} - cycled):
        a, b = (v.tolist() if isinstance(v, Tensor) else v for v in (current[option], saved[option]))
        if a is not None and a != b:
            warnings.warn(
                f"the optimizer of {where} was made with {option}={a}, and the checkpoint has {b}, which goes on; change it after "
                "load() if it is to be another",
                OtherOptions,
                stacklevel=2,
            )


def expect_optimizer_state(where: str, state: Any, parameters: set[Any]) -> None:
    """Refuse an optimizer's state that is no dict by parameter (a number or a name) of dicts."""
    fits = isinstance(state, dict) and all(isinstance(entry, dict) for entry in state.values())
    expect(fits and set(state) <= parameters, f"the optimizer state of {where} is not by parameter")


def expect_one_run(manifest: dict[str, Json], leads: list[int]) -> None:
    """Refuse an exact checkpoint whose stages were not all between the same two steps of one run.

    Every stage has run the forwards of all mini-batches, and holds the gradients of the backwards that the next stage
    has run before it.

    Args:
        manifest: whole manifest; the stages' parts have passed `exact.check_form`.
        leads: lead of each stage.
    """
    for replica in range(manifest["num_replicas"]):
        parts = [manifest["state"][f"{k}.{replica}"] for k in range(len(leads))]
        for k, part in enumerate(parts):
            _expect_in_flight(manifest, part, f"what is in flight in stage {k}", leads[k])
            sent = 0 if k + 1 == len(parts) else parts[k + 1]["position"][1] - part["position"][1]
            arrived = part["arrived"] if isinstance(part["arrived"], list) else []
            expect(len(arrived) == sent, f"what is in flight in stage {k} lacks its gradients")


def _expect_in_flight(manifest: dict[str, Json], part: dict[str, Json], what: str, lead: int) -> None:
    forward, backward, update, left, *second = part["position"]
    through = second[1] if second else backward  # micro-batches whose backward is through, both its parts
    notes = [tuple(note) for note in part["notes"]]
    counted = (part["num_updates"], part["next_microbatch"], part["version"])
    expect(counted == (manifest["num_updates"], manifest["next_microbatch"], update), f"{what} is of another run")
    expect(forward == part["next_microbatch"] and forward - backward <= lead, f"{what} is more than its lead")
    fits = len(notes) == forward - backward and sum(left) == forward - through and 0 not in left
    fits = fits and through <= backward
    fits = fits and len(left) == len(part["samples"]) == part["num_updates"] - update
    expect(fits, f"{what} is not what is left")
    minibatches = [update + i for i, count in enumerate(left) for _ in range(count)]
    in_order = list(zip(range(backward, forward), minibatches[backward - through :], strict=True))
    expect([note[:2] for note in notes] == in_order, f"{what} is out of order")
    kept = [tuple(entry["micro"][:2]) for entry in part["stash"]]
    expect(kept == [note[:2] for note in notes if note[3]], f"{what} is not what is kept")
