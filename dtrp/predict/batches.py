"""Parameters whose weights are predicted by the same numbers, together: a few operations on lists, however many there are.

Optimizers keep the number of a parameter's steps, and NAdam a product, in tensors of one element. Those on the CPU are
read in one go and become numbers; those on an accelerator (of capturable and fused optimizers) stay tensors, which
nobody waits for.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

# What an operation on lists may need beside the tensors; or the largest of them, if that is more.
SCRATCH_BYTES = 64 * 2**20
_SCALARS = ("step", "mu_product")


@dataclass(frozen=True)
class Weight:
    """A parameter to predict: itself, where to write, its optimizer's state and, where it is known, its gradient."""

    p: Tensor
    out: Tensor
    state: dict[str, Any]
    gradient: Tensor | None = None


@dataclass(frozen=True)
class Batch:
    """Parameters of one group with the same numbers.

    Attributes:
        group: the parameter group.
        p, out: the parameters, and where their predicted weights go.
        state: the lists of their states' tensors, by name.
        t: the steps that they have had: a number, or a list of tensors on an accelerator.
        mu_product: NAdam's, in the same form; None: the optimizer has none. ``mu_dtype``: of its tensors.
        gradient: their gradients as far as known; None: they have none.
    """

    group: dict[str, Any]
    p: list[Tensor]
    out: list[Tensor]
    state: dict[str, list[Tensor]] = field(default_factory=dict)
    t: float | list[Tensor] = 0.0
    mu_product: float | list[Tensor] | None = None
    mu_dtype: torch.dtype | None = None
    gradient: list[Tensor] | None = None

    def chunks(self, scratch: int) -> Iterator[Batch]:
        """Parts that a rule which makes ``scratch`` tensors beside each of its own can do one after the other.

        A part's tensors, ``scratch`` times over, take no more than the largest parameter or `SCRATCH_BYTES`; a parameter
        that is too large for that is taken in pieces.
        """
        most = max(SCRATCH_BYTES, *(p.nbytes for p in self.p)) // scratch
        part: list[tuple[Tensor, ...]] = []
        places: list[int] = []  # of the parameters that they are of
        size = 0
        for i, tensors in enumerate(zip(*self._lists, strict=True)):
            for piece in _pieces(tensors, scratch) if tensors[0].nbytes > most else [tensors]:
                if part and size + piece[0].nbytes > most:
                    yield self._with(part, places)
                    part, places, size = [], [], 0
                part.append(piece)
                places.append(i)
                size += piece[0].nbytes
        if part:
            yield self._with(part, places)

    @property
    def _lists(self) -> list[list[Tensor]]:
        return [self.p, self.out, *self.state.values(), *([] if self.gradient is None else [self.gradient])]

    def _with(self, part: list[tuple[Tensor, ...]], places: list[int]) -> Batch:
        """This batch with other lists of tensors."""
        p, out, *others = map(list, zip(*part, strict=True))
        gradient = None if self.gradient is None else others.pop()
        state = dict(zip(self.state, others, strict=True))

        def of_part(value: Any) -> Any:
            return [value[i] for i in places] if isinstance(value, list) else value

        numbers = {"t": of_part(self.t), "mu_product": of_part(self.mu_product)}
        return replace(self, p=p, out=out, state=state, gradient=gradient, **numbers)


def in_batches(weights: Iterable[tuple[Weight, dict[str, Any]]]) -> Iterator[Batch]:
    """The weights with their groups, those with the same numbers together, in their order."""
    listed = list(weights)
    numbers = {name: _numbers([weight.state.get(name) for weight, _ in listed]) for name in _SCALARS}
    found: dict[Any, list[int]] = {}
    for i, (weight, group) in enumerate(listed):
        names = tuple(
            name for name, value in weight.state.items() if isinstance(value, Tensor) and name not in _SCALARS
        )
        known = [None if isinstance(numbers[name][i], Tensor) else numbers[name][i] for name in _SCALARS]
        kind = weight.p.dtype, weight.p.device, None if weight.gradient is None else weight.gradient.layout
        found.setdefault((id(group), names, *known, kind), []).append(i)
    for (_, names, *_, kind), places in found.items():
        members = [listed[i][0] for i in places]
        t, mu_product = ([numbers[name][i] for i in places] for name in _SCALARS)
        yield Batch(
            listed[places[0]][1],
            [weight.p for weight in members],
            [weight.out for weight in members],
            {name: [weight.state[name] for weight in members] for name in names},
            0.0 if t[0] is None else t if isinstance(t[0], Tensor) else t[0],  # type: ignore[arg-type]
            mu_product if isinstance(mu_product[0], Tensor) else mu_product[0],  # type: ignore[arg-type]
            getattr(members[0].state.get("mu_product"), "dtype", None),
            None if kind[2] is None else [weight.gradient for weight in members],  # type: ignore[misc]
        )


def _numbers(scalars: Sequence[Any]) -> list[float | Tensor | None]:
    """Tensors of one element on the CPU as numbers, read together; those elsewhere, and None, as they are."""
    here = [s for s in scalars if isinstance(s, Tensor) and s.device.type == "cpu"]
    alike = len({(s.shape, s.dtype) for s in here}) <= 1
    values = iter(torch.stack(here).flatten().tolist() if here and alike else map(float, here))
    found: list[float | Tensor | None] = []
    for s in scalars:
        if isinstance(s, Tensor):
            found.append(next(values) if s.device.type == "cpu" else s)
        else:
            found.append(None if s is None else float(s))
    return found


def _pieces(tensors: tuple[Tensor, ...], number: int) -> list[tuple[Tensor, ...]]:
    """Tensors of one shape, in ``number`` pieces or fewer, as views."""
    first = tensors[0]
    if any(t.layout is not torch.strided for t in tensors):  # a sparse gradient
        return [tensors]
    if all(t.is_contiguous() for t in tensors):
        tensors, size = tuple(t.view(-1) for t in tensors), max(1, -(-first.numel() // number))
    elif first.dim():
        size = max(1, -(-first.shape[0] // number))
    else:
        return [tensors]
    return list(zip(*(torch.split(t, size) for t in tensors), strict=True))
