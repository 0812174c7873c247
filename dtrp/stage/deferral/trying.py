"""The trial of a division: I and W against one backward, on the first micro-batch, from the same gradients.

What differs by a bit, or raises, is left whole: right, not faster::

    gradients of weights differ             these weights
    the output or the input's gradient      weights by halves, until the rest is equal
    differ, or something raises
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .division import Division

Results = Sequence[Tensor | None]


class Tried(NamedTuple):
    """What a forward and its backward have come to: outputs and gradients of the input; and gradients of the parameters."""

    others: Results
    gradients: Results


Run = Callable[[bool], Tried]
"""Runs the stage's forward, from the same state each time, and its backward from the same gradients: divided (by
`Division.recording`, `Division.input_backward` and `Queue.run`), or not. The graph stands on leaves without hooks."""


@dataclass(frozen=True)
class Share:
    """How much of a backward is deferred.

    Attributes:
        deferred: the parameters whose gradients W computes, by name.
        whole: the other ones, whose gradients I computes, with the reason.
        elements: the elements of the first over those of all.
        flops: the floating-point operations of W for the first micro-batch, roughly; those of `dtrp.defer` are not counted.
    """

    deferred: tuple[str, ...] = ()
    whole: dict[str, str] = field(default_factory=dict)
    elements: float = 0.0
    flops: int = 0


class Trial:
    """The trial of one division.

    Args:
        division: it, to be told what stays whole.
        run: the stage.
    """

    def __init__(self, division: Division, run: Run) -> None:
        self._division, self._run = division, run
        self._plain = Tried((), ())
        self._again: Tried | None = None  # the same, to see what differs by itself

    def settle(self) -> None:
        """Find what can be divided; the rest is whole afterwards."""
        everything = range(len(self._division.names))
        try:
            self._plain = self._run(False)
        except Exception as error:  # as a scripted module does, which runs at no other tensors than its parameters
            self._leave(everything, f"cannot be tried: {_text(error)}")
            return
        reason: str | None = ""
        while reason is not None:
            num_whole = len(self._division.whole)
            reason = self._attempt()
            if reason is not None and len(self._division.whole) == num_whole:  # nothing learnt
                parts = self._divisible(self._groups(), reason)
                self._leave(set(everything).difference(*parts), reason)
                reason = self._attempt()
                if reason is not None:
                    self._leave(everything, reason)
                return

    def _groups(self) -> list[list[int]]:
        """The parameters that may be divided, those of a module together."""
        groups: dict[str, list[int]] = {}
        for i, name in enumerate(self._division.names):
            if i not in self._division.whole:
                module = (
                    name.partition(".parametrizations.")[0] if ".parametrizations." in name else name.rpartition(".")[0]
                )
                groups.setdefault(module, []).append(i)
        return list(groups.values())

    def _divisible(self, groups: list[list[int]], reason: str) -> list[list[int]]:
        """Those of the groups that can be divided when all others are whole, by halves."""
        if len(groups) < 2:
            return []
        found: list[list[int]] = []
        for half in (groups[: len(groups) // 2], groups[len(groups) // 2 :]):
            before = dict(self._division.whole)
            self._leave(set(range(len(self._division.names))).difference(*half), reason)
            why = self._attempt(learns=False)
            self._division.whole = before
            found += half if why is None else self._divisible(half, why)
        return found

    def _attempt(self, *, learns: bool = True) -> str | None:
        """Run divided; what is wrong, if anything is. Parameters whose gradients alone differ are left whole, if it ``learns``."""
        try:
            tried = self._run(True)
        except Exception as error:
            if learns and self._division.mixed:
                self._leave(self._division.mixed, "has a hook, and is used undivided too")
            return f"raises {_text(error)}"
        differing = self._differing(self._plain.gradients, tried.gradients, of_parameters=True)
        others = self._differing(self._plain.others, tried.others, of_parameters=False)
        if not differing and not others:
            return None
        reason = "its gradient would differ in the last bits" if differing else "what the stage returns would differ"
        if learns and differing and not others:
            self._leave(differing, reason)
        return reason

    def _leave(self, indices: Iterable[int], reason: str) -> None:
        for i in indices:
            self._division.whole.setdefault(i, reason)

    def _differing(self, plain: Results, divided: Results, *, of_parameters: bool) -> list[int]:
        if len(plain) != len(divided):
            return [0]
        differing = [i for i, (a, b) in enumerate(zip(plain, divided, strict=True)) if not _equal(a, b)]
        if not differing:
            return []
        if self._again is None:
            self._again = self._run(False)
        again = self._again.gradients if of_parameters else self._again.others
        return [i for i in differing if not _as_close(plain[i], again[i], divided[i])]


def _text(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0][:120]}"


def _equal(a: Tensor | None, b: Tensor | None) -> bool:
    """Whether two results are the same to the bit, and laid out alike; a nan is equal to a nan."""
    if a is None or b is None:
        return a is b
    if a.shape != b.shape or a.dtype != b.dtype or a.layout != b.layout:
        return False
    if a.layout is not torch.strided:
        a, b = a.to_dense(), b.to_dense()
    elif any(size != 1 and s != t for size, s, t in zip(a.shape, a.stride(), b.stride(), strict=True)):
        return False
    if torch.equal(a, b):
        return True
    return bool(torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num()))


def _as_close(plain: Tensor | None, again: Tensor | None, divided: Tensor | None) -> bool:
    """Whether a result that differs from run to run (by a kernel with atomic additions) differs no more when divided."""
    if plain is None or again is None or divided is None or divided.shape != plain.shape or _equal(plain, again):
        return False
    noise = (plain - again).abs().max()
    return bool((plain - divided).abs().max() <= 16 * noise)
