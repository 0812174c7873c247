"""Predictors with a state, of which each stage has its own: ``last``, `Scaled` and ``auto``; and predictors by name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..validation import is_number
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
        if not self._known:
            for o, p in zip(out, parameters, strict=True):
                o.copy_(p)
            return
        ratios = {
            id(p): _ratio(group["lr"], rate)
            for group, rate in zip(optimizer.param_groups, self._rates, strict=False)
            for p in group["params"]
        }
        for p, moved, o in zip(parameters, self._moved, out, strict=True):
            ratio = ratios.get(id(p), 1.0)
            if isinstance(ratio, Tensor):
                torch.addcmul(p, moved, ratio.to(moved.dtype), value=horizon, out=o)
            else:
                torch.add(p, moved, alpha=horizon * ratio, out=o)

    @torch.no_grad()
    def before_update(self, parameters: Sequence[Tensor], optimizer: Optimizer) -> None:
        if not self._moved:
            self._moved = [torch.empty_like(p, requires_grad=False) for p in parameters]
        for moved, p in zip(self._moved, parameters, strict=True):
            moved.copy_(p)
        self._rates = [lr.clone() if isinstance(lr := group["lr"], Tensor) else lr for group in optimizer.param_groups]
        self._stepping = True

    @torch.no_grad()
    def after_update(self, parameters: Sequence[Tensor], version: int) -> None:
        if self._stepping:
            for moved, p in zip(self._moved, parameters, strict=True):
                torch.sub(p, moved, out=moved)
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
            for o, p in zip(out, parameters, strict=True):
                o.copy_(p)
        self._base(parameters, optimizer, horizon, out, version=version, **at)
        for o, p in zip(out, parameters, strict=True):
            o.sub_(p)
        if self._due is None:
            if not self._start:
                self._start = [torch.empty_like(p, requires_grad=False) for p in parameters]
                self._displacement = [torch.empty_like(p, requires_grad=False) for p in parameters]
            for start, displacement, p, o in zip(self._start, self._displacement, parameters, out, strict=True):
                start.copy_(p)
                displacement.copy_(o)
            self._due = version + horizon
        factor = None if self._sums is None else self._factor()
        for o, p in zip(out, parameters, strict=True):
            if factor is not None:
                o.mul_(factor.to(o.dtype))
            o.add_(p)

    def before_update(self, parameters: Sequence[Tensor], optimizer: Optimizer) -> None:
        if hasattr(self._base, "before_update"):
            self._base.before_update(parameters, optimizer)

    @torch.no_grad()
    def after_update(self, parameters: Sequence[Tensor], version: int) -> None:
        if hasattr(self._base, "after_update"):
            self._base.after_update(parameters, version)
        if self._due is None or version < self._due:
            return
        fitted = length = torch.zeros((), dtype=_wide(self._start[0]), device=self._start[0].device)
        for p, start, u in zip(parameters, self._start, self._displacement, strict=True):
            torch.sub(p, start, out=start)
            fitted = fitted + _dot(u, start, fitted)
            length = length + _dot(u, u, fitted)
        if self._sums is not None:
            fitted, length = (new + self._decay * old for new, old in zip((fitted, length), self._sums, strict=True))
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
            self._start, self._displacement = map(list, state["probe"])
        if state["base"] is not None:
            self._base.load_state_dict(state["base"])  # type: ignore[union-attr]


def _wide(t: Tensor) -> torch.dtype:
    """The dtype in which sums of products are kept on the tensor's device."""
    return torch.float32 if t.device.type == "mps" else torch.float64


def _dot(a: Tensor, b: Tensor, like: Tensor) -> Tensor:
    """The sum of products, as ``like``; of complex tensors as of pairs of reals."""
    if a.is_complex():
        a, b = torch.view_as_real(a), torch.view_as_real(b)
    if a.element_size() < 4:  # whose squares may be too small for its range
        a, b = a.float(), b.float()
    return torch.sum(a * b, dtype=like.dtype).to(like.device)


class Auto(StatefulPredictor):
    """``"auto"``: `Scaled` of ``linear`` where the optimizer's update rule is known, and of ``last`` elsewhere.

    There it holds one copy more than ``copies`` says (`StageSizes.rule_known`).
    """

    name, copies = "auto", 2

    def for_stage(self, optimizer: Optimizer | None) -> StagePredictor:
        known = optimizer is not None and linear.knows(optimizer)
        return Scaled(linear if known else last).for_stage(optimizer)


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
