"""Copies of a stage's weights for its forwards, predicted if the method predicts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..predict import BuiltInPredictor, Predictor, StatefulPredictor, is_alike, stage_predictor
from ..tensors.module_buffers import copy_all
from ..tensors.torch_private import write_count


class WeightVersion:
    """A copy of a stage's trainable weights: ``tensors`` to write, ``leaves`` on which graphs are built.

    Attributes:
        minibatch, marks: the last mini-batch that has read the copy as the present weights, and the marks of these
            then.
    """

    minibatch: int | None = None
    marks: list[tuple[int, int]] | None = None

    def __init__(self, like: Sequence[Tensor]) -> None:
        self.tensors = [torch.empty_like(t, requires_grad=False) for t in like]
        self.leaves = [t.detach().requires_grad_() for t in self.tensors]
        self.nbytes = sum(t.nbytes for t in self.tensors)

    @torch.no_grad()
    def copy_from(self, parameters: Sequence[Tensor]) -> None:
        """Take the present weights."""
        copy_all(self.tensors, parameters)


def weight_marks(tensors: Sequence[Tensor]) -> list[tuple[int, int]]:
    """Address and count of writes of each tensor, which differ once it has been written or replaced."""
    return [(t.data_ptr(), write_count(t)) for t in tensors]


class WeightVersions:
    """The weights that the forwards of one stage read.

    Args:
        stage: k, which a predictor is told.
        parameters: the stage's trainable parameters.
        optimizer: the stage's optimizer.
        predictor: None: copies are of the present weights.
        lr: makes the context in which the optimizer has the learning rates of the next update.
        gradients: the keyword arguments for a predictor that uses gradients.

    Attributes:
        shared: the copies on which graphs are built, by (updates made, horizon), as long as something holds them.
        alike: whether micro-batches of one version and horizon read the same weights, which may then be made in
            advance.
        has_state: whether the predictor is one of this stage alone, which is told of its updates.
        owns_state: whether no part of it is shared with other stages.
    """

    def __init__(
        self,
        stage: int,
        parameters: Sequence[Tensor],
        optimizer: Optimizer | None,
        predictor: Predictor | StatefulPredictor | None,
        lr: Callable[[], AbstractContextManager[None]],
        gradients: Callable[[], dict[str, Any]],
    ) -> None:
        self.predictor = stage_predictor(predictor, optimizer)
        self.has_state = isinstance(predictor, StatefulPredictor)
        self.owns_state = isinstance(predictor, StatefulPredictor) and predictor.owns_state
        self.uses_gradients = bool(getattr(self.predictor, "uses_gradients", False))
        known = self.has_state or isinstance(predictor, BuiltInPredictor)
        self.alike = predictor is None or (known and is_alike(self.predictor))
        self.shared: WeakValueDictionary[tuple[int, int], WeightVersion] = WeakValueDictionary()
        self._stage, self._parameters, self._optimizer = stage, parameters, optimizer
        self._lr, self._gradients = lr, gradients
        self._buffer: WeightVersion | None = None
        self._buffered: tuple[int, int] | None = None  # (version, horizon) of what the buffer holds

    @property
    def nbytes(self) -> int:
        """Bytes of the buffer for predictions, and of the copies that the predictor holds."""
        held = self.predictor.nbytes if self.has_state else 0
        return held + (self._buffer.nbytes if self._buffer is not None else 0)

    def tensors(self) -> Sequence[Tensor]:
        """The tensors of the buffer, which the next prediction writes."""
        return self._buffer.tensors if self._buffer is not None else ()

    def predicted(self, microbatch: int, version: int, horizon: int) -> WeightVersion | None:
        """The predicted weights, in the one buffer for them; None where nothing is predicted.

        Args:
            microbatch: m.
            version: updates that the present weights have had.
            horizon: updates until the micro-batch's backward.
        """
        if self.predictor is None:
            return None
        if self._buffer is None:
            self._buffer = WeightVersion(self._parameters)
        if self._buffered != (version, horizon) or not self.alike:
            self._predict(self._buffer, microbatch, version, horizon)
            self._buffered = (version, horizon)
        return self._buffer

    def copied(self, microbatch: int, version: int, horizon: int) -> WeightVersion | None:
        """A new copy, shared by the micro-batches that read the same weights; None where nothing is trained.

        The arguments are those of `predicted`.
        """
        if not self._parameters:
            return None
        key = (version, 0 if self.predictor is None else horizon)
        alike = self.alike or not horizon
        copy = self.shared.get(key) if alike else None
        if copy is None or not self._is_current(copy, version + horizon):
            copy = WeightVersion(self._parameters)
            if self.predictor is None or not horizon:
                copy.copy_from(self._parameters)
            else:
                self._predict(copy, microbatch, version, horizon)
            copy.minibatch, copy.marks = version + horizon, weight_marks(self._parameters)
            if alike:
                self.shared[key] = copy
        return copy

    def _is_current(self, copy: WeightVersion, minibatch: int) -> bool:
        """Whether a copy of this version is of the present weights: between two steps the caller may write them."""
        if copy.minibatch != minibatch:
            # Writes through ``.data`` are not counted, so values are compared, except on an accelerator.
            unwritten = copy.marks == weight_marks(self._parameters) and all(
                p.device.type != "cpu" or torch.equal(p, t) for p, t in zip(self._parameters, copy.tensors, strict=True)
            )
            if not unwritten:
                return False
            copy.minibatch = minibatch
        return True

    def _predict(self, out: WeightVersion, microbatch: int, version: int, horizon: int) -> None:
        assert self.predictor is not None
        assert self._optimizer is not None
        if not (self.has_state or isinstance(self.predictor, BuiltInPredictor)):
            out.copy_from(self._parameters)  # a weight that the predictor leaves out is predicted to stay
        more = self._gradients() if self.uses_gradients else {}
        at = {"stage": self._stage, "microbatch": microbatch, "version": version}
        with torch.no_grad(), self._lr():
            self.predictor(self._parameters, self._optimizer, horizon, out.tensors, **at, **more)

    def before_update(self) -> None:
        """The optimizer is about to step."""
        if self.has_state:
            self.predictor.before_update(self._parameters, self._optimizer)

    def after_update(self, version: int) -> None:
        """The weights have had ``version`` updates."""
        if self.has_state:
            self.predictor.after_update(self._parameters, version)

    def forget(self) -> None:
        """Forget what was predicted from other weights than the present ones."""
        if self.has_state:
            self.predictor.forget()
        self._buffered = None
        self.shared.clear()

    def drop(self) -> None:
        """Forget the predictions, and free their buffer."""
        self._buffer = None
        self.forget()
