"""Predictors with a state, of which each stage has its own: ``last``, `Scaled` and ``auto``; and predictors by name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..tensors.module_buffers import copy_all
from ..tensors.torch_private import foreach
from ..validation import is_number
from .batches import SCRATCH_BYTES
from .built_in import BuiltInPredictor, Predictor, informed, linear, rollout


class StagePredictor(Protocol):
    """A predictor of one stage, which is told of its updates.

    Attributes:
        alike: whether micro-batches of one version and horizon are predicted the same weights.
        uses_gradients: as of any predictor.
        nbytes: bytes of the copies of the weights that it holds.
    """

    alike: bool
    uses_gradients: bool

    @property
    def nbytes(self) -> int: ...

    def __call__(
        self, parameters: Sequence[Tensor], optimizer: Optimizer, horizon: int, out: Sequence[Tensor], **at: Any
    ) -> None: ...

    def before_update(self, parameters: Sequence[Tensor], optimizer: Optimizer) -> None:
        """The optimizer is about to step, with the learning rates that it has now."""
        ...

    def after_update(self, parameters: Sequence[Tensor], version: int) -> None:
        """The stage has had ``version`` updates; one that was left out counts, and `before_update` was not called."""
        ...

    def forget(self) -> None:
        """The weights are others than its updates have made: begin anew."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class StatefulPredictor(ABC):
    """What a predictor is in a method's row, when each stage is to have one of its own.

    Attributes:
        name: what it is called where settings are compared.
        copies: copies of the weights that a stage's holds, for `dtrp.plan` and ``keep="auto"``.
        owns_state: whether no part of a stage's is shared with others, as a base of the user's is.
    """

    name: str
    copies: int
    owns_state = True

    def __repr__(self) -> str:
        return f"<predictor {self.name}>"

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        raise TypeError(
            f"{self.name} has a state, and each stage one of its own: pass it as get_method(..., predict=...)"
        )

    @abstractmethod
    def for_stage(self, optimizer: Optimizer | None) -> StagePredictor:
        """The predictor of a stage that ``optimizer`` updates.

        Raises:
            TypeError: its update rule is not known.
        """


class Last(StatefulPredictor):
    """The last update over and over, whatever optimizer made it; ``"last"``."""

    name, copies = "last", 1

    def for_stage(self, optimizer: Optimizer | None) -> StagePredictor:
        return _LastOfStage()


class _LastOfStage:
    """`Last` of one stage."""

    alike, uses_gradients = True, False

    def __init__(self) -> None:
        self._moved: list[Tensor] = []  # by the last update; while one is made, the weights before it
        self._rates: list[float | Tensor] = []  # the learning rates of that update, by group
        self._known = self._stepping = False

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self._moved)

    @torch.no_grad()
    def __call__(
        self, parameters: Sequence[Tensor], optimizer: Optimizer, horizon: int, out: Sequence[Tensor], **at: Any
    ) -> None:
        copy_all(out, parameters)
        if not self._known:
            return
        places = {id(p): i for i, group in enumerate(optimizer.param_groups) for p in group["params"]}
        ratios = [_ratio(group["lr"], rate) for group, rate in zip(optimizer.param_groups, self._rates, strict=False)]
        moving: dict[int, tuple[list[Tensor], list[Tensor]]] = {}
        for p, moved, o in zip(parameters, self._moved, out, strict=True):
            place = places.get(id(p), len(ratios))
            into, by = moving.setdefault(place if place < len(ratios) else -1, ([], []))
            into.append(o)
            by.append(moved)
        for place, (into, by) in moving.items():
            ratio = ratios[place] if place >= 0 else 1.0
            if isinstance(ratio, Tensor):
                made = {(t.dtype, t.device): ratio.to(t.device, t.dtype) for t in by}
                foreach.addcmul_(into, by, [made[t.dtype, t.device] for t in by], value=horizon)
            else:
                foreach.add_(into, by, alpha=horizon * ratio)

    @torch.no_grad()
    def before_update(self, parameters: Sequence[Tensor], optimizer: Optimizer) -> None:
        if not self._moved:
            self._moved = [torch.empty_like(p, requires_grad=False) for p in parameters]
        copy_all(self._moved, parameters)
        self._rates = [lr.clone() if isinstance(lr := group["lr"], Tensor) else lr for group in optimizer.param_groups]
        self._stepping = True

    @torch.no_grad()
    def after_update(self, parameters: Sequence[Tensor], version: int) -> None:
        if self._stepping:
            foreach.sub_(self._moved, list(parameters))
            foreach.neg_(self._moved)
            self._known, self._stepping = True, False

    def forget(self) -> None:
        self._known = self._stepping = False

    def state_dict(self) -> dict[str, Any]:
        return {"moved": list(self._moved) if self._known else [], "rates": list(self._rates)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._moved, self._rates = list(state["moved"]), list(state["rates"])
        self._known, self._stepping = bool(self._moved), False


def _ratio(now: float | Tensor, then: float | Tensor) -> float | Tensor:
    """How much longer the next update is than the last by their learning rates; after a rate of 0 nothing is known."""
    if isinstance(now, Tensor) or isinstance(then, Tensor):
        then = torch.as_tensor(then)
        return torch.where(then == 0, torch.zeros_like(then), now / torch.where(then == 0, torch.ones_like(then), then))
    return now / then if then else 0.0


class Scaled(StatefulPredictor):
    """A predictor whose displacement is made longer or shorter by a factor that each stage learns while it runs.

    With u the displacement that ``base`` predicts from version t over a horizon h, and x = w(t + h) - w(t) the true one,
    known h updates later::

        factor = sum decay^i <u, x> / sum decay^i <u, u>         i: fits since then; 1 before the first; within [0, 2]
        predicted = w + factor u

    an exponentially weighted least-squares fit, over all weights of a stage. One prediction at a time is remembered for
    it: the next one after the last has been compared. That is two copies of the weights. Ours.

    Args:
        base: ``"linear"``, ``"rollout"``, ``"informed"``, ``"last"``, or a predictor.
        decay: what a fit counts for after the next one; in (0, 1].

    Raises:
        ValueError: ``decay`` out of range, or a name that is none.
    """

    def __init__(self, base: Any = "rollout", decay: float = 0.95) -> None:
        if not (is_number(decay) and 0 < decay <= 1):
            raise ValueError(f"decay={decay!r}: what a fit counts for after the next one lies above 0 and is at most 1")
        if base in ("scaled", "auto") or isinstance(base, (Scaled, Auto)) or base is None:
            raise ValueError(
                f"base={base!r}: scale 'linear', 'rollout', 'informed', 'last', or a predictor of your own"
            )
        if isinstance(base, str) and base not in NAMES:
            raise ValueError(f"base={base!r}: choose 'linear', 'rollout', 'informed' or 'last', or pass a predictor")
        self.base, self.decay = as_predictor(base), float(decay)
        named = isinstance(self.base, (BuiltInPredictor, StatefulPredictor))
        self.name = f"scaled({self.base.name if named else type(self.base).__name__}, decay={self.decay:g})"  # type: ignore[union-attr]
        self.owns_state = named
        self.copies = 2 + (self.base.copies if isinstance(self.base, StatefulPredictor) else 0)

    def for_stage(self, optimizer: Optimizer | None) -> StagePredictor:
        assert self.base is not None
        return _ScaledOfStage(stage_predictor(self.base, optimizer), self.decay)


class _ScaledOfStage:
    """`Scaled` of one stage."""

    def __init__(self, base: Predictor | StagePredictor, decay: float) -> None:
        self._base, self._decay = base, decay
        self._base_writes_all = isinstance(base, (BuiltInPredictor, _LastOfStage))
        self.uses_gradients = bool(getattr(base, "uses_gradients", False))
        self.alike = is_alike(base)
        self._sums: tuple[Tensor, Tensor] | None = None  # <u, x> and <u, u>, scalars of float64 where the device has it
        self._due: int | None = None  # the version at which the prediction that is remembered can be compared
        self._start: list[Tensor] = []  # the weights that it was made from
        self._displacement: list[Tensor] = []

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (*self._start, *self._displacement)) + int(getattr(self._base, "nbytes", 0))

    @property
    def factor(self) -> float:
        """The factor that the next prediction is multiplied by."""
        return 1.0 if self._sums is None else float(self._factor())

    def _factor(self) -> Tensor:
        assert self._sums is not None
        fitted, length = self._sums
        return torch.where(length > 0, fitted / torch.where(length > 0, length, 1), 1).clamp(0, 2)

    @torch.no_grad()
    def __call__(
        self,
        parameters: Sequence[Tensor],
        optimizer: Optimizer,
        horizon: int,
        out: Sequence[Tensor],
        *,
        version: int = 0,
        **at: Any,
    ) -> None:
        if not self._base_writes_all:  # a weight that the predictor leaves out is predicted to stay
            copy_all(out, parameters)
        self._base(parameters, optimizer, horizon, out, version=version, **at)
        weights, predicted = list(parameters), list(out)
        foreach.sub_(predicted, weights)
        if self._due is None:
            if not self._start:
                self._start, self._displacement = _side_by_side(parameters), _side_by_side(parameters)
            copy_all(self._start, weights)
            copy_all(self._displacement, predicted)
            self._due = version + horizon
        if self._sums is not None:
            factor = self._factor()
            for members in _by_dtype(predicted):
                foreach.mul_(members, factor.to(members[0].dtype))
        foreach.add_(predicted, weights)

    def before_update(self, parameters: Sequence[Tensor], optimizer: Optimizer) -> None:
        if hasattr(self._base, "before_update"):
            self._base.before_update(parameters, optimizer)

    @torch.no_grad()
    def after_update(self, parameters: Sequence[Tensor], version: int) -> None:
        if hasattr(self._base, "after_update"):
            self._base.after_update(parameters, version)
        if self._due is None or version < self._due:
            return
        foreach.sub_(self._start, list(parameters))
        foreach.neg_(self._start)
        fitted = length = torch.zeros((), dtype=_wide(self._start[0]), device=self._start[0].device)
        for u, moved in zip(_wholes(self._displacement), _wholes(self._start), strict=True):
            fitted = fitted + _dot(u, moved, fitted)
            length = length + _dot(u, u, fitted)
        # A fit that is not finite counts for nothing: it would stay in the sums for good.
        fits = torch.isfinite(fitted) & torch.isfinite(length)
        before = (torch.zeros_like(length),) * 2 if self._sums is None else self._sums
        fitted, length = (
            torch.where(fits, new + self._decay * old, old) for new, old in zip((fitted, length), before, strict=True)
        )
        self._sums, self._due = (fitted, length), None

    def forget(self) -> None:
        self._sums = self._due = None
        if hasattr(self._base, "forget"):
            self._base.forget()

    def state_dict(self) -> dict[str, Any]:
        base = getattr(self._base, "state_dict", None)
        probe = [] if self._due is None else [list(self._start), list(self._displacement)]
        return {
            "sums": None if self._sums is None else list(self._sums),
            "due": self._due,
            "probe": probe,
            "base": base() if callable(base) else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._sums = None if state["sums"] is None else (state["sums"][0], state["sums"][1])
        self._due = state["due"]
        if self._due is not None:
            self._start, self._displacement = map(_side_by_side, state["probe"])
            for mine, saved in zip((self._start, self._displacement), state["probe"], strict=True):
                copy_all(mine, saved)
        if state["base"] is not None:
            self._base.load_state_dict(state["base"])  # type: ignore[union-attr]


def _wide(t: Tensor) -> torch.dtype:
    """The dtype in which sums of products are kept on the tensor's device."""
    return torch.float32 if t.device.type == "mps" else torch.float64


def _by_dtype(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    groups: dict[torch.dtype, list[Tensor]] = {}
    for t in tensors:
        groups.setdefault(t.dtype, []).append(t)
    return list(groups.values())


def _side_by_side(like: Sequence[Tensor]) -> list[Tensor]:
    """Unwritten tensors of the shapes of ``like``; those of one dtype are parts of one vector, in their order."""
    made: dict[int, Tensor] = {}
    for members in _by_dtype(like):
        whole = torch.empty(sum(t.numel() for t in members), dtype=members[0].dtype, device=members[0].device)
        for t, part in zip(members, torch.split(whole, [t.numel() for t in members]), strict=True):
            made[id(t)] = part.view(t.shape)
    return [made[id(t)] for t in like]


def _wholes(parts: Sequence[Tensor]) -> list[Tensor]:
    """The vectors that `_side_by_side` has made, in pieces of few bytes."""
    wholes = []
    for members in _by_dtype(parts):
        size = sum(t.numel() for t in members)
        whole = members[0].as_strided((size,), (1,), members[0].storage_offset())
        wholes += list(torch.split(whole, SCRATCH_BYTES // 24)) if size else []
    return wholes


def _dot(a: Tensor, b: Tensor, like: Tensor) -> Tensor:
    """The sum of products, as ``like``; of complex tensors as of pairs of reals."""
    if a.is_complex():
        a, b = torch.view_as_real(a), torch.view_as_real(b)
    if a.element_size() < 4:  # whose squares may be too small for its range
        a, b = a.float(), b.float()
    return torch.sum(a * b, dtype=like.dtype).to(like.device)


class Auto(StatefulPredictor):
    """``"auto"``: `Scaled` of ``linear`` where that knows the optimizer and moves its weights, and of ``last`` elsewhere.

    There it holds one copy more than ``copies`` says (`StageSizes.rule_known`).
    """

    name, copies = "auto", 2

    def for_stage(self, optimizer: Optimizer | None) -> StagePredictor:
        foreseen = optimizer is not None and linear.foresees(optimizer)
        return Scaled(linear if foreseen else last).for_stage(optimizer)


last, auto = Last(), Auto()
NAMES: dict[str, Callable[[], Any]] = {
    "linear": lambda: linear, "rollout": lambda: rollout, "informed": lambda: informed, "last": lambda: last,
    "scaled": Scaled, "auto": lambda: auto,
}  # fmt: skip


def is_alike(predictor: Any) -> bool:
    """Whether micro-batches of one version and horizon are predicted the same weights."""
    return bool(getattr(predictor, "alike", False))


def stage_predictor(predictor: Predictor | StatefulPredictor | None, optimizer: Optimizer | None) -> Any:
    """The predictor of one stage: with a state of its own, if it has any.

    Raises:
        TypeError: it does not know the optimizer's update rule.
    """
    if isinstance(predictor, StatefulPredictor):
        return predictor.for_stage(optimizer)
    if isinstance(predictor, BuiltInPredictor) and optimizer is not None:
        predictor.check(optimizer)
    return predictor


def as_predictor(predict: Any) -> Predictor | StatefulPredictor | None:
    """The predictor that a method's ``predict`` names, or is."""
    return NAMES[predict]() if isinstance(predict, str) else predict  # type: ignore[no-any-return]
